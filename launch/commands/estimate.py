"""`ngpt estimate`."""

import argparse

from ..arguments import Parser, add_overrides, config_dirs


def add_arguments(parser: Parser) -> None:
    parser.description = "Estimate parameters, FLOPs, memory, step time and cost of a run on GPUs. Needs none."
    parser.explain = _limits
    add_overrides(parser)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--price", type=float, metavar="AMOUNT", help="of one GPU for an hour: adds the cost of the run")
    parser.add_argument(
        "--fit",
        nargs="?",
        const=True,
        metavar="GPUS",
        help="propose layouts that fit this many GPUs (default: those of the cluster), the fastest first; takes seconds",
    )
    parser.add_argument("--top", type=int, default=10, metavar="N", help="layouts to print (default: %(default)s)")


def run(options: argparse.Namespace) -> int:
    from ngpt.estimate.cli import run_estimate

    if isinstance(options.fit, str) and "=" in options.fit:  # `--fit experiment=X`: --fit has no number here, the word is an override
        options.overrides, options.fit = [options.fit, *options.overrides], True
    options.config_dir = config_dirs(options)
    return run_estimate(options)


def _limits() -> str:
    import textwrap

    from ngpt.estimate.layouts import LIMITS

    return textwrap.fill(LIMITS, 100)
