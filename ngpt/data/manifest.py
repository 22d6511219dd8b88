"""manifest.json: what a folder of prepared data was made from, with which tokenizer, and what it must still contain."""

import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import UnionType
from typing import Any, get_origin, get_type_hints

from ngpt.config.errors import ConfigError
from ngpt.config.schema import DataSource, TokenizerConfig
from ngpt.data.files import atomic_write
from ngpt.data.fingerprint import is_record
from ngpt.data.hub import is_hub_id, is_same
from ngpt.data.sources import find_sources
from ngpt.shell import in_shell

FORMAT_VERSION = 1
NAME = "manifest.json"
SPLITS = ("train", "valid", "test")


@dataclass
class TokenizerInfo:
    """The tokenizer of the data.

    `path` is its vocabulary file relative to the manifest's folder, null for bytes; `hub` the path by which it was fetched from the
    Hugging Face Hub, `commit` what that stood for.
    """

    kind: str
    name: str
    vocab_size: int
    eod_id: int
    identity: str
    path: str | None = None
    hub: str = ""
    commit: str = ""


@dataclass
class SourceInfo:
    """One source file: its name or URL, size, checksum, documents taken and records skipped, by reason.

    Where a URL's file system gives a checksum of the content, `checksum` holds it and `sha256` is empty.
    """

    path: str
    bytes: int
    sha256: str
    documents: int = 0
    skipped: dict[str, int] = field(default_factory=dict)
    checksum: str = ""


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
    bin_blocks: str = ""  # see ngpt.data.fingerprint; empty for a small file, and in manifests of earlier versions
    idx_blocks: str = ""


@dataclass
class Manifest:
    """The content of manifest.json; `folder` is where it was read from or written to, `notes` what its user should know of it."""

    tokenizer: TokenizerInfo
    sources: list[SourceInfo]
    splits: dict[str, SplitInfo]
    dtype: str
    options: dict[str, Any]
    notes: list[str] = field(default_factory=list)  # not in manifests of earlier versions
    format_version: int = FORMAT_VERSION
    folder: Path | None = None

    def save(self, folder: Path) -> None:
        """Write FOLDER/manifest.json, whole or not at all."""
        self.folder = folder
        content = asdict(self)
        del content["folder"]
        with atomic_write(folder / NAME) as stream:
            # A byte of a file name that is not UTF-8 is half a surrogate pair. Escaped, it survives.
            stream.write((json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode(errors="backslashreplace"))

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
            tokenizer = _typed(TokenizerInfo, content.pop("tokenizer"))
            sources = [_typed(SourceInfo, source) for source in content.pop("sources")]
            splits = {name: _typed(SplitInfo, split) for name, split in content.pop("splits").items()}
            return _typed(cls, content | {"tokenizer": tokenizer, "sources": sources, "splits": splits, "folder": Path(folder)})
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            if isinstance(error, ConfigError):
                raise
            raise ConfigError(
                str(path), f"unreadable: {error!r}", "A manifest is written by `ngpt data prepare`", "Prepare the data again"
            ) from error


def _typed[T](cls: type[T], values: dict[str, Any]) -> T:
    """An instance whose fields have the types that the class declares, because the manifest's values are computed with.

    Raises:
        TypeError: One has another type, or is missing or unknown.
        ValueError: A negative count, no tokens, a malformed record of blocks, or a split that names no file.
    """
    kinds = get_type_hints(cls)
    instance = cls(**values)
    for name, value in vars(instance).items():
        kind = kinds[name] if isinstance(kinds[name], UnionType) else get_origin(kinds[name]) or kinds[name]
        if not isinstance(value, kind) or isinstance(value, bool):
            raise TypeError(f"{name}: {value!r:.60}")
        if isinstance(value, int) and value < (1 if name in ("tokens", "vocab_size") else 0):
            raise ValueError(f"{name}: {value}")
        if name.endswith("_blocks") and value and not is_record(value):
            raise ValueError(f"{name}: {value:.60}")
        if name == "skipped" and not all(isinstance(count, int) for count in value.values()):
            raise TypeError(f"{name}: {value!r:.60}")
        if name == "notes" and not all(isinstance(note, str) for note in value):
            raise TypeError(f"{name}: {value!r:.60}")
        if name == "splits" and not (value and all(re.fullmatch(r"\w+", split) for split in value)):
            raise ValueError(f"{name}: {list(value)!r:.60}")
    return instance


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
        raise ConfigError(str(prefix), "not prepared data", rule, _way_out(prefix))
    manifest = Manifest.load(prefix.parent)
    if prefix.name not in manifest.splits:
        raise ConfigError(str(prefix), f"no split {prefix.name!r}", f"The folder holds {', '.join(manifest.splits)}", "Name one of these")
    return manifest, prefix.name


def _way_out(prefix: Path) -> str:
    """What to do about a path that is no prepared data: prepare it, unless `ngpt data prepare` would refuse it."""
    words = f"INPUT --out {in_shell(str(prefix.parent))}"
    if prefix.exists():
        try:
            find_sources([prefix])
        except ConfigError:
            return "Name a folder that `ngpt data prepare` has written, or a split in one"
        words = in_shell(str(prefix))
    return f"Prepare it, ngpt data prepare {words}, or correct the path"


def content_of(prefix: Path | str) -> str:
    """A digest of a split's checksums in its manifest: the same wherever the split lies, another one once it is prepared differently."""
    manifest, name = split_of(prefix)
    split = manifest.splits[name]
    return hashlib.sha256(f"{split.bin_sha256} {split.idx_sha256}".encode()).hexdigest()[:32]


def check_against_model(sources: Sequence[DataSource], tokenizer: TokenizerConfig, vocab_size: int) -> list[Manifest]:
    """Check that all sources were made with the configured tokenizer and that the model's vocabulary holds it.

    Reads manifests only (see `ngpt.data.verify` for the data). A `bpe` tokenizer without a path stands for the sources' own. So does
    one of the Hub that any source came from, since all sources must have the same. Nothing is fetched then.

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
    own = tokenizer.kind == "bpe" and tokenizer.path is None or any(_is_from(tokenizer.path, manifest) for manifest in manifests)
    wanted = None if own else from_config(tokenizer)
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


def _is_from(path: str | None, manifest: Manifest) -> bool:
    """Whether a tokenizer's path is the Hub's name of what made the data."""
    return path is not None and is_hub_id(path) and is_same(path, manifest.tokenizer.hub, manifest.tokenizer.commit)
