"""`ngpt config`."""

import argparse

from ..arguments import add_overrides, config_dirs


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = "Print the resolved config and its parameter, token and FLOP counts."
    add_overrides(parser)
    parser.add_argument("--json", action="store_true", help="print one JSON object: config, notes, counts")


def run(options: argparse.Namespace) -> int:
    from ngpt.config.cli import as_json, as_text
    from ngpt.config.compose import compose

    from ..unchecked import check_unchecked

    config = compose(options.overrides, config_dirs(options))
    check_unchecked(config)
    print(as_json(config) if options.json else as_text(config))
    return 0
