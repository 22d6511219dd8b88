"""`ngpt export`."""

import argparse

from ..arguments import add_path

DTYPES = {"float32": "the fp32 masters", "bfloat16": "the weights as they were trained with; scales stay fp32"}
PARITY = {"full": "both models whole", "layers": "a layer of both at a time", "none": "no comparison"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = "Writes a checkpoint as a folder that transformers opens, and proves that it computes what was trained."
    parser.epilog = "The comparison runs on the CPU in fp32: the same text through the trainer's modules and through the written folder."
    add_path(parser, "run", metavar="RUN", help="run folder")
    add_path(parser, "--out", required=True, metavar="DIR", help="folder to write; it must not exist")
    parser.add_argument("--step", type=int, help="which checkpoint (default: the newest)")
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help=_listed(DTYPES) + " (default: %(default)s)")
    parser.add_argument(
        "--fold-logit-scale", action="store_true", help="nGPT: multiply the output matrix with the logits' scale; cannot be imported again"
    )
    parser.add_argument("--remote-code", action="store_true", help="a control: our code, even where a class of transformers fits")
    parser.add_argument("--no-tokenizer", dest="tokenizer", action="store_false", help="write no tokenizer")
    parser.add_argument("--parity", choices=PARITY, help=_listed(PARITY) + " (default: full where memory allows it, else layers)")


def run(options: argparse.Namespace) -> int:
    from ..export import export

    return export(options)


def _listed(described: dict[str, str]) -> str:
    return "; ".join(f"{name}: {line}" for name, line in described.items())
