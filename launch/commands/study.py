"""`ngpt study`."""

import argparse
from pathlib import Path

from ..arguments import WORDS, Parser, add_config_dir, add_path, add_per_gpu, completed, config_dirs


def add_arguments(parser: Parser) -> None:
    parser.description = (
        "Test a claim: train the arms of a study, measure and compare them, and write a page. "
        "The same command again goes on: what is finished stays, what failed is repeated."
    )
    parser.explain = _explain
    parser.add_argument("name", nargs="?", metavar="NAME", help="a study, from the list below")
    what = "words of the config of every run, or of one of the study's lists: seed=[1,2], recipe+=mine"
    completed(parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help=what), WORDS)
    add_config_dir(parser)
    parser.add_argument("--size", metavar="SIZE", help="how large it is run (default: the first of the study's sizes)")
    what = "runs at a time (default: 1; with --slurm as many as it starts)"
    parser.add_argument("--parallel", type=int, metavar="N", help=what)
    add_per_gpu(parser, "runs")
    parser.add_argument("--plan", action="store_true", help="print the runs with tokens and time, and stop")
    what = "submit the runs as arrays of jobs, and a job that analyses them and writes the page; needs cluster=slurm_... among the words"
    parser.add_argument("--slurm", action="store_true", help=what)
    what = "analyse the runs that are finished and write the page; nothing is trained"
    parser.add_argument("--analyze", action="store_true", help=what)
    what = "write the page of a results.json alone, beside it or into --out; without one, of what has run so far. Nothing is trained"
    add_path(parser, "--report", kind="file", nargs="?", const=Path(), metavar="JSON", help=what)
    what = (
        "results of the same study made elsewhere: runs with the same words and config are taken from it, and not trained here; "
        "may be given several times, and the first that has a run counts"
    )
    add_path(parser, "--from", kind="file", dest="sources", action="append", default=[], metavar="FILE", help=what)
    add_path(parser, "--out", metavar="DIR", help="folder of runs, results and page (default: runs/studies/NAME_SIZE)")


def run(options: argparse.Namespace) -> int:
    from ..study import run_study

    options.config_dir = config_dirs(options)
    return run_study(options)


def _explain() -> str:
    from ngpt.config.study import descriptions

    from ..environment import user_config_dirs
    from .listing import table

    return "\n".join(["studies:", *table(descriptions(user_config_dirs()))])
