"""A folder of Hugging Face's form as the config of a run. No Megatron."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import yaml

from ngpt.config.compose import compose
from ngpt.config.identity import flatten, function_defining, model_defining
from ngpt.config.schema import LEARNING_FIELDS, Config
from ngpt.hf.folder import Folder
from ngpt.hf.links import links
from ngpt.hf.targets import completed, floor_of_steps, model_from, rename_to

OPTION = "imported"  # name of the options of `model` and `tokenizer` that an import writes
CONF = "conf"  # their folder within the run's
BIAS = "gate.e_score_correction_bias"
TOKENIZERS = {"tokenizer.json": "huggingface", "tokenizer.model": "sentencepiece"}  # file -> kind, the better one first


@dataclass(frozen=True)
class Source:
    """What an import takes over.

    Attributes:
        folder: where from. cfg: of the run, resolved. names: tensor of `modeling_ngpt.py` -> its name in the folder. notes: for the user.
    """

    folder: Folder
    cfg: Config
    names: dict[str, str]
    notes: list[str]


def read_source(path: Path, name: str, root: str, conf: Path) -> Source:
    """Reads config.json and the headers of the weight files.

    Args:
        path: the folder. name, root: of the run that it becomes.
        conf: folder to write the options `model=imported` and `tokenizer=imported` into, laid out like conf/.

    Raises:
        ConfigError: it is not a model of ours, its files are not whole, or the run cannot have that name.
    """
    folder = Folder(path)
    where = str(path / "config.json")
    model = model_from(folder.config, where)
    whole = completed(folder.config, where)
    if "E" in model["layer_pattern"]:
        model["moe_expert_bias"] = any(folder.read(name).any() for name in sorted(folder.names) if name.endswith(BIAS))
    present = next((file for file in TOKENIZERS if (path / file).exists()), next(iter(TOKENIZERS)))
    vocabulary, kind = (path / present).absolute(), TOKENIZERS[present]
    _write_option(conf / "model" / f"{OPTION}.yaml", {"name": name} | model)
    _write_option(conf / "tokenizer" / f"{OPTION}.yaml", {"name": kind, "kind": kind, "path": str(vocabulary)})
    batch = [f"train.{key}=1" for key in ("micro_batch_size", "global_batch_size", "steps")]
    options = [f"model={OPTION}", f"tokenizer={OPTION}", f"train.seq_length={whole['max_position_embeddings']}", *batch]
    cfg = compose([*options, f"run.name={_quoted(name)}", f"run.root={_quoted(root)}"], [conf])
    rename = rename_to(whole["model_type"])
    names = {ours: theirs for link in links(cfg.model) for ours in link.names if (theirs := rename(ours)) is not None}
    folder.check_names(names.values(), cfg.model.tied_embeddings)
    return Source(folder, cfg, names, list(_notes(cfg, whole, set(model), vocabulary)))


def _notes(cfg: Config, config: dict, said: set[str], vocabulary: Path) -> Iterator[str]:
    meant = function_defining(cfg).keys() | {key for key in model_defining(cfg) if key.removeprefix("model.") in LEARNING_FIELDS}
    if "E" not in cfg.model.layer_pattern:
        meant -= {"model.num_experts"}
    values = flatten(cfg)
    unsaid = [f"{key}={values[key]}" for key in sorted(meant) if key.removeprefix("model.") not in said]
    if unsaid:
        yield f"note: config.json does not say {', '.join(unsaid)}: these are the defaults"
    if (floor := floor_of_steps(config)) is not None:
        yield f"note: transformers raises Mamba's time steps to time_step_min={floor:g}; the model here does not, as Megatron trains it"
    if not vocabulary.exists():
        yield f"note: no {vocabulary}: text needs the model's tokenizer there"


def _write_option(path: Path, values: dict) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump(values, sort_keys=False), encoding="utf-8")


def _quoted(text: str) -> str:
    """In the form in which Hydra reads a string on a command line."""
    return "'" + text.replace("\\", "\\\\").replace("'", "\\'") + "'"
