"""`ngpt status`."""

import argparse

from ..arguments import add_path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_path(parser, "run", metavar="RUN", help="folder of a run, or of a sweep")
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(options: argparse.Namespace) -> int:
    from ngpt.sweeps import is_sweep

    if is_sweep(options.run):
        from ..sweep_status import print_sweep_status

        print_sweep_status(options.run, options.json)
    else:
        from ..status import print_status

        print_status(options.run, options.json)
    return 0
