"""`ngpt estimate`: parameters, FLOPs, memory, step time and cost of a run before it is started, and layouts that fit."""

import argparse
import json
import math
from collections.abc import Iterator, Sequence
from pathlib import Path

from ngpt.config.compose import compose
from ngpt.config.errors import ConfigError
from ngpt.config.schema import Config
from ngpt.estimate.layouts import check_for_gpus, propose_layouts
from ngpt.estimate.report import as_table, describe_proposals, estimate, proposals_table

_SEQUENCE_PARALLEL = "parallel.sequence_parallel"
# A layout that almost every config can have. It shows whether the rest of a config is valid without its own layout.
_NEUTRAL = (
    "parallel.tensor=1",
    "parallel.context=1",
    "parallel.expert=1",
    "parallel.expert_tensor=null",
    f"{_SEQUENCE_PARALLEL}=null",
    "parallel.recompute=none",
    "parallel.recompute_modules=[]",
    "train.micro_batch_size=1",
)
_ONE_STAGE = ("parallel.pipeline=1", "parallel.virtual_pipeline=null")
_FEWEST_NODES = ("cluster.nodes=${parallel.pipeline}",)


def run_estimate(arguments: argparse.Namespace) -> int:
    """Prints an estimate, or proposals.

    Args:
        arguments: as launch/commands/estimate.py reads them.

    Returns:
        The exit status: 1 where no layout fits.

    Raises:
        ConfigError: a config that breaks a rule.
    """
    _check_numbers(arguments)
    if arguments.fit is not None:
        return _propose(arguments)
    cfg = _compose(arguments.overrides, arguments.config_dir)
    values = estimate(cfg, arguments.price)
    print(_json(values) if arguments.json else as_table(cfg, values))
    return 0


def _compose(overrides: Sequence[str], config_dirs: Sequence[Path]) -> Config:
    """A config that could be trained on the GPUs that it is estimated for.

    Raises:
        ConfigError: it breaks a rule of the config or of Transformer Engine.
    """
    cfg = compose(overrides, config_dirs)
    check_for_gpus(cfg)
    return cfg


def _propose(arguments: argparse.Namespace) -> int:
    """Prints the layouts that fit. The configured one need not be possible."""
    gpus = _number_of_gpus(arguments.fit)
    refused: ConfigError | None = None
    # Every proposal lets sequence_parallel follow parallel.tensor (null), and a resolved config no longer says whether it does.
    replaced = [_SEQUENCE_PARALLEL for word in arguments.overrides if word.startswith(f"{_SEQUENCE_PARALLEL}=")]
    try:
        cfg = _compose(arguments.overrides, arguments.config_dir)
    except ConfigError as error:
        refused = error
        cfg, replaced = _without_its_layout(arguments, gpus, error)
    found = propose_layouts(cfg, gpus, replaced)
    if arguments.json:
        values = {"run": cfg.run.name, "refused": str(refused)} if refused else estimate(cfg, arguments.price)
        print(_json(values | describe_proposals(found, arguments.top)))
    else:
        print(proposals_table(found, arguments.top, refused))
    return 0 if found.layouts else 1


def _without_its_layout(arguments: argparse.Namespace, gpus: int | None, error: ConfigError) -> tuple[Config, list[str]]:
    """A config whose own layout is refused, put into a neutral one, and the keys that this replaces.

    Raises:
        ConfigError: the config's own error, if more than the layout is at fault.
    """
    for words in _neutral_layouts(keep_cluster=gpus is None):
        try:
            return _compose([*arguments.overrides, *words], arguments.config_dir), [word.split("=")[0] for word in words]
        except ConfigError:
            continue
    raise error


def _neutral_layouts(keep_cluster: bool) -> Iterator[tuple[str, ...]]:
    """Layouts to try: one stage or, for a pattern that is cut, its own stages; with fewer processes where the batch is small."""
    clusters = [(), _FEWEST_NODES, (*_FEWEST_NODES, "cluster.gpus_per_node=1")]
    for cluster in clusters[:1] if keep_cluster else clusters:
        for pipeline in (_ONE_STAGE, ()):
            yield (*_NEUTRAL, *pipeline, *cluster)


def _check_numbers(arguments: argparse.Namespace) -> None:
    price = arguments.price
    if price is not None and not (math.isfinite(price) and price >= 0):
        raise ConfigError("--price", price, "Must be an amount of 0 or more", "Give the price of one GPU for an hour, or leave it out")
    if arguments.top < 1:
        raise ConfigError("--top", arguments.top, "Must be a number of layouts to print", "Give 1 or more")


def _number_of_gpus(word: str | bool) -> int | None:
    """The number after `--fit`. None if there is none (True): the GPUs of the cluster."""
    if word is True:
        return None
    try:
        gpus = int(word)
    except ValueError:
        gpus = 0
    if gpus < 1:
        raise ConfigError("--fit", word, "Must be a number of GPUs", "Give 1 or more, or no number for the GPUs of the cluster")
    return gpus


def _json(values: dict) -> str:
    return json.dumps(values, indent=1, allow_nan=False)
