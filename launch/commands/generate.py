"""`ngpt generate`."""

import argparse

from ..arguments import DEVICES, DTYPES, add_path, completed

TOKENS, TEMPERATURE, SEED, BATCH = 200, 0.8, 0, 8


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = "Continues texts with a checkpoint of a run, as it lies there, or with a folder that transformers opens."
    parser.epilog = "Without --prompt and --file: a prompt a line of stdin; where that is a terminal, from the start of a document."
    add_path(parser, "path", metavar="RUN|DIR", help="run folder, or a folder with a config.json of transformers")
    parser.add_argument("--prompt", action="append", metavar="TEXT", help="text to continue; may be given several times")
    what = 'a prompt a line; of a .jsonl file the "prompt" of each object; -: stdin. Empty lines are left out'
    completed(parser.add_argument("--file", metavar="FILE", help=what), "file")
    parser.add_argument("--tokens", type=int, default=TOKENS, help="at most, for each prompt (default: %(default)s)")
    parser.add_argument("--greedy", action="store_true", help="take the most probable token")
    parser.add_argument("--temperature", type=float, help=f"of sampling (default: {TEMPERATURE})")
    parser.add_argument("--top-k", type=int, metavar="N", help="sample from the N most probable tokens (default: all)")
    parser.add_argument("--top-p", type=float, metavar="P", help="sample from the fewest tokens of probability P in all (default: 1)")
    parser.add_argument("--seed", type=int, default=SEED, help="of sampling: a prompt's text depends on it and the prompt's number alone")
    parser.add_argument("--stop", action="append", default=[], metavar="TEXT", help="end before this text; may be given several times")
    parser.add_argument("--batch-size", type=int, default=BATCH, metavar="N", help="prompts at a time (default: %(default)s)")
    parser.add_argument("--step", type=int, help="which checkpoint of a run (default: the newest)")
    parser.add_argument("--dtype", choices=DTYPES, help="of a run: the fp32 masters (default), or what was trained; of a folder: its own")
    parser.add_argument("--device", choices=DEVICES, default="auto", help="(default: a GPU where there is one)")
    parser.add_argument("--no-cache", dest="cache", action="store_false", help="compute all tokens again for each new one")
    parser.add_argument("--json", action="store_true", help="a line a prompt: prompt, text, tokens (their number), stopped_by")


def run(options: argparse.Namespace) -> int:
    from ..generate import generate

    return generate(options)
