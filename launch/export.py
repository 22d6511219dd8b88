"""`ngpt export`: checks what a look can tell, and leaves the rest to one worker on the CPU."""

import argparse

from ngpt.config.errors import ConfigError
from ngpt.config.one_process import run_checkpoint, run_config
from ngpt.data.tokenizers import run_tokenizer

from .cpu_worker import run_task

_HANDED_ON = ("dtype", "fold_logit_scale", "remote_code", "tokenizer", "parity")

def export(options: argparse.Namespace) -> int:
    """Writes a run's checkpoint as a folder that transformers opens.

    Args:
        options: as launch/commands/export.py reads them.

    Returns:
        The worker's exit code.

    Raises:
        ConfigError: the run, its checkpoint or its tokenizer cannot be exported; the folder exists.
    """
    cfg = run_config(options.run)
    if options.out.exists():
        raise ConfigError("--out", options.out, "It exists, and an export writes a new folder", "Name another one, or remove it")
    if options.fold_logit_scale and cfg.model.architecture != "ngpt":
        raise ConfigError("--fold-logit-scale", "a GPT control", "its logits have no scale", "Leave the option out")
    choice = run_checkpoint(cfg, options.step)
    if options.tokenizer:
        run_tokenizer(cfg)
    request = {name: getattr(options, name) for name in _HANDED_ON}
    request |= {"run": str(options.run), "out": str(options.out), "step": choice.step}
    return run_task("export", request, cfg, options.run)
