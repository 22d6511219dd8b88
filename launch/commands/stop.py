"""`ngpt stop`."""

import argparse

from ..arguments import add_path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = "Have a run, or all runs of a sweep, save and leave. The same command continues them."
    add_path(parser, "run", metavar="RUN", help="folder of a run, or of a sweep")


def run(options: argparse.Namespace) -> int:
    from ngpt.sweeps import is_sweep

    from ..status import config_of_run
    from ..stop import stop, stop_sweep

    if is_sweep(options.run):
        print(stop_sweep(options.run))
        return 0
    config_of_run(options.run)  # raises if this is not a run
    print(stop(options.run))
    return 0
