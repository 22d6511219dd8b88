"""`ngpt estimate`: parameters, FLOPs, memory, step time and cost of a run before it is started, and layouts that fit."""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from ngpt.config.compose import compose
from ngpt.config.errors import ConfigError
from ngpt.config.sizes import world_size
from ngpt.estimate.layouts import propose_layouts
from ngpt.estimate.report import as_table, describe_layout, estimate, layouts_table

_AS_CONFIGURED = 0


def main(argv: Sequence[str]) -> int:
    """Runs `ngpt estimate`. Returns the exit status: 2 for a config that breaks a rule, 1 where no layout fits."""
    parser = _parser()
    arguments = parser.parse_intermixed_args(argv)
    try:
        cfg = compose(arguments.overrides, arguments.config_dir)
        values = estimate(cfg, arguments.price)
        layouts = None if arguments.fit is None else propose_layouts(cfg, arguments.fit or None)
    except ConfigError as error:
        print(error, file=sys.stderr)
        return 2
    if arguments.json:
        if layouts is not None:
            values["layouts"] = [describe_layout(layout) for layout in layouts[: arguments.top]]
        print(json.dumps(values, indent=1))
    elif layouts is None:
        print(as_table(cfg, values))
    else:
        print(layouts_table(layouts, arguments.fit or world_size(cfg), arguments.top))
    return 1 if layouts == [] else 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="ngpt estimate",
        description="Estimate parameters, FLOPs, memory, step time and cost of a run on GPUs with Transformer Engine. Needs none of them.",
    )
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="experiment=NAME, GROUP=NAME or key=value, as for train")
    parser.add_argument("--config-dir", type=Path, action="append", default=[], metavar="DIR", help="your own folder, laid out like conf/")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--price", type=float, metavar="AMOUNT", help="of one GPU for an hour: adds the cost of the run")
    parser.add_argument(
        "--fit",
        type=int,
        nargs="?",
        const=_AS_CONFIGURED,
        metavar="GPUS",
        help="propose layouts that fit this many GPUs (default: those of the cluster), the fastest first; takes seconds",
    )
    parser.add_argument("--top", type=int, default=10, metavar="N", help="layouts to print (default: %(default)s)")
    return parser
