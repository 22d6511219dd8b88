"""`ngpt export`: checks what a look can tell, and leaves the rest to one worker on the CPU."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from launch.cpu_worker import run_task
from ngpt.config.errors import ConfigError
from ngpt.config.one_process import run_checkpoint, run_config
from ngpt.data.tokenizers import run_tokenizer

DTYPES = {"float32": "the fp32 masters", "bfloat16": "the weights as they were trained with; scales stay fp32"}
PARITY = {"full": "both models whole", "layers": "a layer of both at a time", "none": "no comparison"}


def main(arguments: Sequence[str]) -> int:
    """Writes a run's checkpoint as a folder that transformers opens.

    Returns:
        The worker's exit code.

    Raises:
        ConfigError: the run, its checkpoint or its tokenizer cannot be exported; the folder exists.
    """
    options = _parser().parse_args(arguments)
    cfg = run_config(options.run)
    if options.out.exists():
        raise ConfigError("--out", options.out, "It exists, and an export writes a new folder", "Name another one, or remove it")
    if options.fold_logit_scale and cfg.model.architecture != "ngpt":
        raise ConfigError("--fold-logit-scale", "a GPT control", "its logits have no scale", "Leave the option out")
    choice = run_checkpoint(cfg, options.step)
    if options.tokenizer:
        run_tokenizer(cfg)
    request = vars(options) | {"run": str(options.run), "out": str(options.out), "step": choice.step}
    return run_task("export", request, cfg, options.run)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="ngpt export",
        description="Writes a checkpoint as a folder that transformers opens, and proves that it computes what was trained.",
        epilog="The comparison runs on the CPU in fp32: the same text through the trainer's modules and through the written folder.",
    )
    parser.add_argument("run", type=Path, help="run folder")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder to write; it must not exist")
    parser.add_argument("--step", type=int, help="which checkpoint (default: the newest)")
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help=_listed(DTYPES) + " (default: %(default)s)")
    parser.add_argument(
        "--fold-logit-scale", action="store_true", help="nGPT: multiply the output matrix with the logits' scale; cannot be imported again"
    )
    parser.add_argument("--remote-code", action="store_true", help="a control: our code, even where a class of transformers fits")
    parser.add_argument("--no-tokenizer", dest="tokenizer", action="store_false", help="write no tokenizer")
    parser.add_argument("--parity", choices=PARITY, help=_listed(PARITY) + " (default: full where memory allows it, else layers)")
    return parser


def _listed(described: dict[str, str]) -> str:
    return "; ".join(f"{name}: {line}" for name, line in described.items())
