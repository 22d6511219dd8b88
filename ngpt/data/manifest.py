"""manifest.json: what a folder of prepared data was made from, with which tokenizer, and what it must still contain."""

import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ngpt.config.errors import ConfigError
from ngpt.config.schema import DataSource, TokenizerConfig
from ngpt.data.files import atomic_write, sha256_of
from ngpt.data.indexed import bin_path, idx_path

FORMAT_VERSION = 1
NAME = "manifest.json"
SPLITS = ("train", "valid", "test")
CHECKED = ".checked.json"  # size and mtime of the files whose checksum was last found right


@dataclass
class TokenizerInfo:
    """The tokenizer of the data; `path` is its vocabulary file relative to the manifest's folder, null for bytes."""

    kind: str
    name: str
    vocab_size: int
    eod_id: int
    identity: str
    path: str | None = None


@dataclass
class SourceInfo:
    """One source file: its name, size, checksum, documents taken and records skipped, by reason."""

    path: str
    bytes: int
    sha256: str
    documents: int = 0
    skipped: dict[str, int] = field(default_factory=dict)


@dataclass
class SplitInfo:
    """One split. `tokens` counts the end-of-document tokens, `bytes_of_text` (UTF-8) does not."""

    documents: int
    tokens: int
    bytes_of_text: int
    bin_bytes: int
    bin_sha256: str
    idx_bytes: int
    idx_sha256: str


@dataclass
class Manifest:
    """The content of manifest.json; `folder` is where it was read from or written to."""

    tokenizer: TokenizerInfo
    sources: list[SourceInfo]
    splits: dict[str, SplitInfo]
    dtype: str
    options: dict[str, Any]
    format_version: int = FORMAT_VERSION
    folder: Path | None = None

    def save(self, folder: Path) -> None:
        """Write FOLDER/manifest.json, whole or not at all."""
        self.folder = folder
        content = asdict(self)
        del content["folder"]
        with atomic_write(folder / NAME) as stream:
            stream.write((json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode())

    @classmethod
    def load(cls, folder: Path | str) -> "Manifest":
        """Read FOLDER/manifest.json.

        Raises:
            ConfigError: It is missing, unreadable or of another format version.
        """
        path = Path(folder) / NAME
        if not path.is_file():
            raise ConfigError(str(path), "no such file", "Prepared data has a manifest beside it, written last", "Run `ngpt data prepare`")
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            if content["format_version"] != FORMAT_VERSION:
                got = f"format version {content['format_version']}"
                raise ConfigError(str(path), got, f"This version reads {FORMAT_VERSION}", "Prepare the data again")
            tokenizer = TokenizerInfo(**content.pop("tokenizer"))
            sources = [SourceInfo(**source) for source in content.pop("sources")]
            splits = {name: SplitInfo(**split) for name, split in content.pop("splits").items()}
            return cls(tokenizer=tokenizer, sources=sources, splits=splits, folder=Path(folder), **content)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            if isinstance(error, ConfigError):
                raise
            raise ConfigError(
                str(path), f"unreadable: {error!r}", "A manifest is written by `ngpt data prepare`", "Prepare the data again"
            ) from error


def split_of(prefix: Path | str) -> tuple[Manifest, str]:
    """The manifest and the split name behind a prefix such as data/enwik8_bytes/train.

    Raises:
        ConfigError: No manifest, or the manifest has no such split.
    """
    prefix = Path(prefix)
    if (prefix / NAME).is_file():
        splits = ", ".join(str(prefix / name) for name in Manifest.load(prefix).splits)
        raise ConfigError(str(prefix), "a folder of prepared data", "A source is one of its splits", f"Name one: {splits}")
    if not (prefix.parent / NAME).is_file():
        rule = f"There is no {prefix.parent / NAME}, which `ngpt data prepare` writes last"
        raise ConfigError(str(prefix), "not prepared data", rule, "Prepare the data, or correct the path")
    manifest = Manifest.load(prefix.parent)
    if prefix.name not in manifest.splits:
        raise ConfigError(str(prefix), f"no split {prefix.name!r}", f"The folder holds {', '.join(manifest.splits)}", "Name one of these")
    return manifest, prefix.name


def verify(prefix: Path | str, deep: bool = False) -> Manifest:
    """Check that a split still is what was prepared.

    Sizes are compared always. Checksums are computed when `deep`, or when a file's size and modification time are not those of the
    last successful check (the first use, a copied or a touched file); the result is remembered beside the data where that is writable.

    Args:
        prefix: Split prefix, FOLDER/train.
        deep: Compute the checksums whatever the times say.

    Raises:
        ConfigError: A file is missing or changed since the preparation.
    """
    manifest, name = split_of(prefix)
    split, folder = manifest.splits[name], Path(prefix).parent
    checked = _load_checked(folder)
    for path, size, sha256 in (
        (bin_path(prefix), split.bin_bytes, split.bin_sha256),
        (idx_path(prefix), split.idx_bytes, split.idx_sha256),
    ):
        if not path.is_file():
            raise ConfigError(str(path), "no such file", f"{NAME} names it", "Prepare the data again")
        stat = path.stat()
        if stat.st_size != size:
            raise ConfigError(
                str(path), f"{stat.st_size} bytes", f"{NAME} says {size}: it changed since its preparation", "Prepare it again"
            )
        stamp = [stat.st_size, stat.st_mtime_ns, sha256]
        if not deep and checked.get(path.name) == stamp:
            continue
        if sha256_of(path) != sha256:
            raise ConfigError(str(path), "another checksum", f"{NAME} says {sha256}: it changed since its preparation", "Prepare it again")
        checked[path.name] = stamp
    _save_checked(folder, checked)
    return manifest


def check_against_model(sources: Sequence[DataSource], tokenizer: TokenizerConfig, vocab_size: int) -> list[Manifest]:
    """Check that all sources were made with the configured tokenizer and that the model's vocabulary holds it.

    Reads manifests only (see `verify` for the data). A `bpe` tokenizer without a path stands for the sources' own.

    Args:
        sources: `data.train` or `data.valid`.
        tokenizer: The configured tokenizer.
        vocab_size: `model.vocab_size`, unpadded.

    Returns:
        The manifest of each source.

    Raises:
        ConfigError: Tokenizers differ, or a vocabulary is larger than the model's.
    """
    from ngpt.data.tokenizers import from_config

    manifests = [split_of(source.path)[0] for source in sources]
    wanted = None if tokenizer.kind == "bpe" and tokenizer.path is None else from_config(tokenizer)
    for source, manifest in zip(sources, manifests, strict=True):
        have = manifest.tokenizer
        if have.kind != tokenizer.kind:
            raise ConfigError(
                source.path,
                f"tokenizer kind {have.kind}",
                f"tokenizer.kind is {tokenizer.kind}",
                f"Set tokenizer={have.kind} or prepare the data again",
            )
        if wanted is not None and have.identity != wanted.identity:
            got = f"tokenizer {have.name}, {have.identity[:12]}"
            rule = f"The configured one is {wanted.name}, {wanted.identity[:12]}: other tokens under the same numbers"
            raise ConfigError(source.path, got, rule, "Configure the data's tokenizer (tokenizer.path), or prepare the data again")
        if have.identity != manifests[0].tokenizer.identity:
            got = f"tokenizer {have.name}, {have.identity[:12]}"
            rule = f"{sources[0].path} has {manifests[0].tokenizer.name}, {manifests[0].tokenizer.identity[:12]}; a blend needs one"
            raise ConfigError(source.path, got, rule, "Prepare both with the same tokenizer")
        if have.vocab_size > vocab_size:
            rule = f"The tokenizer of {source.path} has {have.vocab_size} entries, the model must have at least as many"
            raise ConfigError("model.vocab_size", vocab_size, rule, f"Set model.vocab_size={have.vocab_size}")
    return manifests


def _load_checked(folder: Path) -> dict[str, list[Any]]:
    try:
        return json.loads((folder / CHECKED).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}


def _save_checked(folder: Path, checked: dict[str, list[Any]]) -> None:
    if checked == _load_checked(folder) or not os.access(folder, os.W_OK):
        return
    with atomic_write(folder / CHECKED) as stream:
        stream.write(json.dumps(checked).encode())
