"""`ngpt launch`."""

import argparse

from ..arguments import Parser, add_overrides, config_dirs, recorded_command
from .train import explain_words


def add_arguments(parser: Parser) -> None:
    parser.description = "Submit a run to the cluster's scheduler. Without one (cluster.scheduler=none) train it here."
    parser.explain = explain_words
    add_overrides(parser)
    parser.add_argument("--dry-run", action="store_true", help="print the job's script and stop; nothing is written")


def run(options: argparse.Namespace) -> int:
    from ..submit import launch

    return launch(options.overrides, config_dirs(options), recorded_command(options), options.dry_run)
