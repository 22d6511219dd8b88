"""`ngpt status`."""

import argparse

from ..arguments import add_path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_path(parser, "run", metavar="RUN", help="folder of a run, of a sweep, or of many of them, such as runs")
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(options: argparse.Namespace) -> int:
    from ngpt.sweeps import is_sweep

    if is_sweep(options.run):
        from ..sweep_status import print_sweep_status

        print_sweep_status(options.run, options.json)
        return 0
    from ..status import is_run_folder, print_status

    if options.run.is_dir() and not is_run_folder(options.run):
        from ..folder_status import entries, print_folder_status

        if found := entries(options.run):
            print_folder_status(options.run, found, options.json)
            return 0
    print_status(options.run, options.json)
    return 0
