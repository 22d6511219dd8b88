"""`ngpt report`."""

import argparse

from ..arguments import add_path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Write an HTML page of one or more runs, with PNG plots and CSV tables beside it. "
        "Runs that differ in their seed alone are one group. The folder of a sweep stands for its members."
    )
    add_path(parser, "runs", nargs="+", metavar="RUN", help="run folder, such as runs/quickstart; several are compared with the first")
    add_path(
        parser,
        "--out",
        metavar="DIR",
        help="default: RUN/report; for several runs report_<names>, if need be shortened, beside the first",
    )


def run(options: argparse.Namespace) -> int:
    from ngpt.analysis.report import write_report

    print(f"Report: {write_report(options.runs, options.out)}")
    return 0
