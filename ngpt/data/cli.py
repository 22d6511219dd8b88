"""`ngpt data fetch | prepare | inspect`."""

import argparse
import errno
import io
import os
import re
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
from ngpt.data.remote import is_url, without_query
from ngpt.data.sources import format_of
from ngpt.data.verify import verify_deep
from ngpt.shell import in_shell
from ngpt.streams import abandon

ROOT = Path("data")
EXPERIMENT, LARGE_VOCABULARY = "quickstart", 16384
USAGE_ERROR = 2
INTERRUPTED = 130


def run(arguments: argparse.Namespace) -> int:
    """Runs a data command.

    Args:
        arguments: as launch/commands/data.py reads them; `subcommand` is its name.

    Returns:
        0; 2 for a full disk or a path that the system refuses, printed on stderr; 130 after Ctrl-C.

    Raises:
        ConfigError: a user's error.
    """
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # a file name need not be text; stderr escapes it anyway
    try:
        return {"fetch": _fetch, "prepare": _prepare, "inspect": _inspect}[arguments.subcommand](arguments)
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        if not full and error.filename is None:
            raise
        way_out = "Make room there" if full else "Correct this"
        print(
            f"{error.filename or 'A disk'}: {error.strerror}. {way_out}: finished work is kept, and the same command continues",
            file=sys.stderr,
        )
        if error.filename is None:  # the full disk may be the one that takes what is printed
            abandon(sys.stdout)
        return USAGE_ERROR
    except KeyboardInterrupt:
        print("\nInterrupted. Finished work is kept: the same command continues.", file=sys.stderr)
        return INTERRUPTED


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
    _print_result(out, manifest, [f"--config-dir={path}" for path in arguments.config_dir])
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


def _print_result(out: Path, manifest: Manifest, more: Sequence[str]) -> None:
    """Prints what was written, and the command that trains on it, with the words `more` at its end."""
    from ngpt.data.inspect import data_lines

    for line in data_lines(out, samples=0, characters=0):
        print(line)
    print(f"{out / 'manifest.json'} is written. To train a small model on it; other experiments take the same words:")
    print(f"  {in_shell('ngpt', 'train', *_training_words(out, manifest), *more)}")


def _training_words(out: Path, manifest: Manifest) -> list[str]:
    """Overrides that train the quickstart's model on prepared data."""
    tokenizer = manifest.tokenizer
    words = [f"experiment={EXPERIMENT}"]
    words += [f"data.{name}=[{{path: {_in_override(str(out / name))}}}]" for name in manifest.splits if name != "test"]
    if "valid" not in manifest.splits:
        words += ["data.valid=[]", "train.eval_whole_split=false", "train.eval_steps=0"]
    if tokenizer.kind != "bytes":
        words += [f"tokenizer={tokenizer.name}", f"model.vocab_size={tokenizer.vocab_size}"]
    if tokenizer.kind in ("bpe", "tiktoken"):
        words.append(f"tokenizer.vocab_size={tokenizer.vocab_size}")
    if tokenizer.kind in NAMED_BY_PATH and tokenizer.path:
        words.append(f"tokenizer.path={_uninterpolated(str(out / tokenizer.path))}")
    if tokenizer.vocab_size > LARGE_VOCABULARY:
        words.append("train.micro_batch_size=2")  # logits of the experiment's own would take gigabytes
    return [*words, f"run.name={re.sub('[^A-Za-z0-9_.-]+', '_', out.absolute().name) or EXPERIMENT}"]


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
    """Whether a word is a path, not an override. A path with an equals sign is recognised by its beginning or because it exists."""
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
