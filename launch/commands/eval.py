"""`ngpt eval`."""

import argparse

from ..arguments import DEVICES, DTYPES, add_path

BATCH = 8


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = "Evaluates a checkpoint of a run, as it lies there, or a folder that transformers opens."
    parser.epilog = "A run keeps its results in eval/iter_<step>.json. Small tasks shipped: ngpt_cloze, ngpt_copying, ngpt_arithmetic."
    add_path(parser, "path", metavar="RUN|DIR", help="run folder, or a folder with a config.json of transformers")
    parser.add_argument("--tasks", default="", metavar="NAME,...", help="of lm-eval (extra `eval`), shipped ones, or those of --include")
    add_path(parser, "--include", action="append", default=[], metavar="DIR", help="folder with task files of your own")
    parser.add_argument(
        "--split",
        action="append",
        default=[],
        metavar="PREFIX",
        help="bits per byte of prepared data, data/NAME/valid for instance; `valid`: what the run evaluates. May be given several times",
    )
    parser.add_argument("--fewshot", type=int, metavar="N", help="examples before each question (default: as the task says)")
    parser.add_argument("--limit", type=int, metavar="N", help="at most so many documents of a task, and sequences of a split")
    parser.add_argument("--step", type=int, help="which checkpoint of a run (default: the newest)")
    parser.add_argument("--dtype", choices=DTYPES, help="of a run: the fp32 masters (default), or what was trained; of a folder: its own")
    parser.add_argument("--device", choices=DEVICES, default="auto", help="(default: a GPU where there is one)")
    parser.add_argument("--processes", type=int, metavar="N", help="that share a run's texts (default: one a GPU)")
    parser.add_argument("--batch-size", type=int, default=BATCH, metavar="N", help="texts that are read at once (default: %(default)s)")
    parser.add_argument("--seed", type=int, help="train.eval_seed, for --split: which documents meet in a sequence (default: the run's)")
    add_path(parser, "--out", kind="file", metavar="FILE", help="JSON file for the results, in place of the run's own")
    parser.add_argument("--json", action="store_true", help="print the results as one JSON object")


def run(options: argparse.Namespace) -> int:
    from ..eval import run_eval

    return run_eval(options)
