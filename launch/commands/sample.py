"""`ngpt sample`: the short form of `ngpt generate`, which keeps its text."""

import argparse

from ..arguments import add_path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = "Continues a text with the newest checkpoint of a run."
    add_path(parser, "run", metavar="RUN", help="run folder")
    parser.add_argument("--prompt", default="", help="text to continue; empty: from the start of a document")
    parser.add_argument("--tokens", type=int, default=200, help="tokens to generate (default: %(default)s)")


def run(options: argparse.Namespace) -> int:
    from ..generate import sample

    return sample(options.run, options.prompt, options.tokens)
