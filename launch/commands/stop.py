"""`ngpt stop`."""

import argparse

from ..arguments import add_path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = "Have a run save its newest step and leave. Its command continues it."
    add_path(parser, "run", help="run folder")


def run(options: argparse.Namespace) -> int:
    from ..status import config_of_run
    from ..stop import stop

    config_of_run(options.run)  # or this is no run
    print(stop(options.run))
    return 0
