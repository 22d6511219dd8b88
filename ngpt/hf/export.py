"""A training checkpoint as a folder that transformers opens: weights, config, code, tokenizer. No Megatron."""

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ngpt.checkpoint_tensors import CheckpointTensors
from ngpt.checkpoints.choice import Choice
from ngpt.config.schema import Config
from ngpt.data.tokenizers import run_tokenizer
from ngpt.hf.card import write_card
from ngpt.hf.targets import CODE, Target, target_of
from ngpt.hf.tokenizer import write_tokenizer
from ngpt.hf.weights import DTYPES, Written, write_weights

RECORD = "ngpt_export.json"


@dataclass(frozen=True)
class Options:
    """What `ngpt export` was asked for; see its --help."""

    dtype: str = "float32"
    fold_logit_scale: bool = False
    in_tree: bool = True
    tokenizer: bool = True


def write_folder(cfg: Config, choice: Choice, options: Options, folder: Path) -> tuple[Target, Written]:
    """Writes everything but what `describe` adds into an empty folder.

    Args:
        cfg: of the run, resolved. choice: the checkpoint.

    Raises:
        ConfigError: the checkpoint or the tokenizer cannot be written in this form.
    """
    tokenizer = run_tokenizer(cfg) if options.tokenizer else None
    if tokenizer is not None:
        write_tokenizer(tokenizer, folder, cfg.train.seq_length)
    target = target_of(cfg, tokenizer and tokenizer.eod_id, options.fold_logit_scale, options.in_tree)
    written = write_weights(
        CheckpointTensors(choice.folder), cfg.model, target, folder, DTYPES[options.dtype], options.fold_logit_scale
    )
    _write_json(folder / "config.json", target.config | {"dtype": options.dtype})
    ends = {name: target.config[name] for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    _write_json(folder / "generation_config.json", ends)
    for path in folder.glob("*.safetensors"):
        shutil.copymode(folder / "config.json", path)  # the library makes files that only their owner reads
    if target.remote_code:
        for name in CODE:
            shutil.copyfile(Path(__file__).parent / name, folder / name)
    return target, written


def describe(
    cfg: Config, choice: Choice, options: Options, target: Target, folder: Path, parity: tuple[str, dict[str, Any]] | None = None
) -> None:
    """Adds the model card, and for programs where the weights come from.

    Args:
        parity: what the comparison with the trainer found, in words and for programs; None: there was none.
    """
    told, found = parity or (None, None)
    write_card(folder, cfg, choice.step, options.dtype, told, Path(cfg.run.dir), target.remote_code, options.tokenizer)
    _write_json(folder / RECORD, {"step": choice.step, "run": cfg.run.name, "parity": found})


def told(step: int, target: Target, written: Written) -> list[str]:
    """Lines for the person at the terminal on what was written."""
    code = "with its own code beside it" if target.remote_code else "a class of transformers"
    lines = [f"step {step}: {target.name}, {code}; {written.parameters:,} parameters in {written.bytes / 1e6:,.1f} MB"]
    if written.left_out:
        lines.append(f"note: {target.name} has no place for the prediction depths; {len(written.left_out)} of their tensors stay behind")
    return lines


def opening(target: Target, out: Path) -> str:
    """A line for the person at the terminal on how the folder is opened."""
    trust = ", trust_remote_code=True" if target.remote_code else ""
    return f"open it with transformers.AutoModelForCausalLM.from_pretrained({str(out)!r}{trust})"


def _write_json(path: Path, content: dict) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
