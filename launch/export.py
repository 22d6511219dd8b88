"""`ngpt export`: runs the quick checks. Without a comparison it writes the folder itself; with one, a CPU worker does."""

import argparse

from ngpt.checkpoints.choice import Choice
from ngpt.config.errors import ConfigError
from ngpt.config.one_process import run_checkpoint, run_config
from ngpt.config.schema import Config
from ngpt.data.tokenizers import run_tokenizer
from ngpt.files import new_folder
from ngpt.places import check_place

from .cpu_worker import run_task

_HANDED_ON = ("dtype", "fold_logit_scale", "remote_code", "tokenizer", "parity")


def export(options: argparse.Namespace) -> int:
    """Writes a run's checkpoint as a folder that transformers can open.

    Args:
        options: as launch/commands/export.py reads them.

    Returns:
        The worker's exit code; 0 without a comparison, which needs no worker.

    Raises:
        ConfigError: the run, its checkpoint or its tokenizer cannot be exported; the folder exists.
    """
    cfg = run_config(options.run)
    if options.out.exists():
        raise ConfigError("--out", options.out, "It exists, and an export writes a new folder", "Name another one, or remove it")
    check_place("--out", options.out)
    if options.fold_logit_scale and cfg.model.architecture != "ngpt":
        raise ConfigError("--fold-logit-scale", "a GPT control", "Its logits have no scale", "Leave the option out")
    choice = run_checkpoint(cfg, options.step)
    if options.tokenizer:
        run_tokenizer(cfg)
    request = {name: getattr(options, name) for name in _HANDED_ON}
    request |= {"run": str(options.run), "out": str(options.out), "step": choice.step}
    if options.parity == "none":
        _write(cfg, choice, options)
        return 0
    return run_task("export", request, cfg, options.run)


def _write(cfg: Config, choice: Choice, options: argparse.Namespace) -> None:
    """Writes the folder in this process: without a comparison, nothing needs Megatron."""
    from ngpt.hf import export as hf  # imports torch

    asked = hf.Options(options.dtype, options.fold_logit_scale, not options.remote_code, options.tokenizer)
    with new_folder(options.out) as folder:
        target, written = hf.write_folder(cfg, choice, asked, folder)
        hf.describe(cfg, choice, asked, target, folder)
    print(*hf.told(choice.step, target, written), hf.opening(target, options.out), sep="\n")
