"""A run's config for one process that examines what the run has learned."""

import copy
import os
from pathlib import Path

from ngpt.checkpoints import manifest
from ngpt.checkpoints.choice import RULE, Choice, choose, folder_of, listing
from ngpt.checkpoints.manifest import CONFIG_FILE, Damage
from ngpt.config.checkpoints import READING_THREADS
from ngpt.config.compose import load
from ngpt.config.errors import ConfigError
from ngpt.config.pattern import without_cuts
from ngpt.config.schema import Config
from ngpt.sweeps import way_to_a_run


def run_config(run_dir: Path) -> Config:
    """The config of a run folder, wherever the folder is now.

    Raises:
        ConfigError: `run_dir` is not a run folder.
    """
    path = Path(run_dir) / CONFIG_FILE
    if not path.exists():
        raise ConfigError(str(run_dir), f"no {CONFIG_FILE} there", "A run folder is needed", way_to_a_run(Path(run_dir)))
    cfg = load(path)
    inside = os.path.relpath(cfg.checkpoint.dir, cfg.run.dir)
    if not inside.startswith(".."):
        cfg.checkpoint.dir = str(Path(run_dir) / inside)
    cfg.run.dir = str(run_dir)
    return cfg


def run_checkpoint(cfg: Config, step: int | None = None) -> Choice:
    """A checkpoint of a run.

    Args:
        cfg: of `run_config`.
        step: None: the newest intact one, or with `checkpoint.fallback=false` the published one.

    Raises:
        ConfigError: there is none, or it is damaged.
    """

    def inspect(folder: Path) -> Damage | None:
        verify = cfg.checkpoint.verify
        return manifest.verify(folder, READING_THREADS) if verify == "full" else manifest.inspect(folder, sizes=verify != "none")

    saved = listing(cfg.checkpoint.dir)
    if step is None:
        found = choose(saved, cfg.checkpoint.fallback, inspect)
        if found is None:
            way_out = "Train with checkpoint.save_at_end=true"
            raise ConfigError(str(cfg.checkpoint.dir), "no finished checkpoint", "The run must have saved one", way_out)
        return found
    if step not in saved.steps:
        rule = f"There are checkpoints of {', '.join(map(str, sorted(saved.steps))) or 'no step'}"
        raise ConfigError("--step", step, rule, "Name one of these, or leave it out for the newest")
    found = Choice(folder_of(cfg.checkpoint.dir, step), step)
    damage = inspect(found.folder)
    if damage is not None:
        raise ConfigError(str(damage.path), damage.what, RULE, "Restore it from a copy, or name another one by --step")
    return found


def on_one_process(cfg: Config) -> Config:
    """The same model and data in one process, which loads and does not train."""
    cfg = copy.deepcopy(cfg)
    cfg.parallel.tensor = cfg.parallel.pipeline = cfg.parallel.context = cfg.parallel.expert = 1
    cfg.parallel.virtual_pipeline = cfg.parallel.expert_tensor = None
    cfg.model.layer_pattern = without_cuts(cfg.model.layer_pattern)
    cfg.parallel.sequence_parallel = cfg.parallel.overlap_grad_reduce = cfg.parallel.overlap_param_gather = False
    cfg.megatron.pop("tp_comm_overlap", None)
    cfg.cluster.nodes = cfg.cluster.gpus_per_node = 1
    cfg.train.micro_batch_size = cfg.train.global_batch_size = 1
    cfg.checkpoint.resume = True
    cfg.checkpoint.async_save = False
    return cfg
