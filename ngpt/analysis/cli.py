"""`ngpt report RUN [RUN...] [--out DIR]`."""

import argparse
import sys
from collections.abc import Sequence

from ngpt.config.errors import ConfigError

_DESCRIPTION = """Write an HTML page of one or more runs, with PNG plots and CSV tables beside it.
Runs that differ in their seed alone are one group."""


def main(argv: Sequence[str]) -> int:
    """Write a report and print its path. Returns the exit code: 2 for a folder that cannot be reported."""
    parser = argparse.ArgumentParser(prog="ngpt report", description=_DESCRIPTION)
    parser.add_argument("runs", nargs="+", metavar="RUN", help="run folder, such as runs/quickstart; several are compared with the first")
    parser.add_argument("--out", metavar="DIR", help="default: RUN/report; for several runs report_<names> beside the first")
    arguments = parser.parse_args(argv)
    # matplotlib takes a second to import: not for --help or a wrong option
    from ngpt.analysis.report import write_report

    try:
        page = write_report(arguments.runs, arguments.out)
    except ConfigError as error:
        print(error, file=sys.stderr)
        return 2
    print(f"Report: {page}")
    return 0
