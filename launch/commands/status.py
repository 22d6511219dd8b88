"""`ngpt status`."""

import argparse

from ..arguments import add_path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_path(parser, "run", help="run folder")
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(options: argparse.Namespace) -> int:
    from ..status import print_status

    print_status(options.run, options.json)
    return 0
