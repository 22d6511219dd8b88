"""What a preparation depends on, and whether a folder holds this preparation, another one, or none."""

import json
import shutil
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

from ngpt import locks
from ngpt.config.errors import ConfigError
from ngpt.config.schema import TokenizerConfig
from ngpt.config.vocabularies import FILES
from ngpt.data.files import atomic_write
from ngpt.data.manifest import NAME, SPLITS, Manifest, SourceInfo
from ngpt.data.readers import DOCUMENTS
from ngpt.data.tokenizers import BPE_DEFAULT_VOCAB, check_bpe_size, from_config
from ngpt.data.verify import CHECKED, verify
from ngpt.data.vocabulary import SETTINGS

WORK = ".prepare"
PLAN = "plan.json"
PLAN_VERSION = 1  # of what a shard holds
TOKENIZER = "tokenizer.json"
BPE_SAMPLE_BYTES = 32 << 20  # of sources, at most, to train a BPE on


@dataclass(frozen=True)
class Options:
    """What shapes the result, besides sources and tokenizer.

    Attributes:
        split: Shares of train, valid, test, as numbers with commas; by bytes of text, over the documents in order.
        text_key: Key of the text in JSON lines, column in parquet.
        documents: Of a .txt: "file" for one document, "blank-line" for documents between blank lines.
        strict: An unusable record is an error, not a counted skip.
    """

    split: str = "90,5,5"
    text_key: str = "text"
    documents: str = "file"
    strict: bool = False

    def check(self) -> None:
        """Raise a ConfigError for a value that a preparation does not take."""
        parse_split(self.split)
        if self.documents not in DOCUMENTS:
            raise ConfigError("--documents", self.documents, f"One of {', '.join(DOCUMENTS)}", "Choose one of these")


def parse_split(split: str) -> list[Fraction]:
    """Shares of train, valid and test that sum to 1.

    Raises:
        ConfigError: Not three numbers, or none for train.
    """
    try:
        shares = [Fraction(part.strip()) for part in split.split(",")]
    except (ValueError, ZeroDivisionError):
        shares = []
    if len(shares) != len(SPLITS) or min(shares) < 0 or shares[0] == 0:
        raise ConfigError("--split", split, "Three shares, of train, valid and test; train's is not 0", "For instance 90,5,5 or 100,0,0")
    return [share / sum(shares) for share in shares]


def make_plan(infos: Sequence[SourceInfo], tokenizer: TokenizerConfig, options: Options, chunk_bytes: int) -> dict[str, Any]:
    """`result`: what the prepared data depends on. `shards`: what the shards depend on, which is not the split."""
    sources = [_identity(info) for info in infos]
    wanted: dict[str, Any]
    if is_trained(tokenizer):
        sample = min(BPE_SAMPLE_BYTES, int(sum(info.bytes for info in infos) * parse_split(options.split)[0]))
        size = BPE_DEFAULT_VOCAB if tokenizer.vocab_size is None else tokenizer.vocab_size
        check_bpe_size(size)  # before anything is written
        wanted = {"kind": "bpe", "vocab_size": size, "sample_bytes": sample}
    else:
        built = from_config(tokenizer)
        wanted = {"kind": built.kind, "vocab_size": built.vocab_size, "identity": built.identity}
    result_options = {**asdict(options), "tokenizer": wanted}
    shard_options = {key: value for key, value in result_options.items() if key != "split"}
    return {
        "result": {"options": result_options, "sources": sources},
        "shards": {"version": PLAN_VERSION, "chunk_bytes": chunk_bytes, "options": shard_options, "sources": sources},
    }


def _identity(info: SourceInfo) -> dict[str, Any]:
    checksum = {"checksum": info.checksum} if info.checksum else {}  # plans of earlier versions have none
    return {"path": info.path, "bytes": info.bytes, "sha256": info.sha256, **checksum}


def is_trained(tokenizer: TokenizerConfig) -> bool:
    """Whether the preparation trains this tokenizer itself."""
    return tokenizer.kind == "bpe" and tokenizer.path is None


def locked(out: Path) -> AbstractContextManager[None]:
    """Hold the folder: two preparations at once would mix."""
    rule = "Data is being prepared there by {holder}, and one preparation at a time may write a folder"
    return locks.locked(out, "--out", rule, "Wait, or choose another --out", named=False)


def clear(out: Path, vocabulary: Path | None) -> None:
    """Remove prepared data, and what an unfinished preparation would continue from.

    The vocabulary that is asked for stays. So do files with these names in a folder where no data was ever prepared.
    """
    tokens = [f"{split}.{suffix}" for split in SPLITS for suffix in ("bin", "idx")]
    copied = [*FILES.values(), SETTINGS] if (out / NAME).exists() else []
    kept = {path.resolve() for path in (vocabulary, vocabulary.with_name(SETTINGS))} if vocabulary else set()
    for name in (NAME, CHECKED, *tokens, *(f".{name}.{ending}" for name in tokens for ending in ("partial", "tmp")), *copied):
        if (out / name).resolve() not in kept:
            (out / name).unlink(missing_ok=True)
    # The plan goes first: shards without one are never used.
    (out / WORK / PLAN).unlink(missing_ok=True)


def find_finished(out: Path, plan: dict[str, Any]) -> Manifest | None:
    """The manifest in `out` if it is of this very plan, None if there is none.

    Raises:
        ConfigError: It is of another plan, or the data changed.
    """
    if not (out / NAME).is_file():
        strangers = [split for split in SPLITS if (out / f"{split}.bin").exists()]
        if strangers and not (out / WORK / PLAN).is_file():
            raise ConfigError(
                str(out), f"holds {strangers[0]}.bin but no {NAME}", "Files of another origin stay", "Choose another --out, or --overwrite"
            )
        return None
    manifest = Manifest.load(out)
    sources = [_identity(source) for source in manifest.sources]
    have = {"options": manifest.options, "sources": sources}
    _refuse_difference(out, "holds data prepared otherwise", have, plan["result"])
    for split in manifest.splits:
        verify(out / split)
    return manifest


def open_shards(out: Path, plan: dict[str, Any]) -> Path:
    """The folder of the plan's shards, those of an interrupted run included."""
    work = out / WORK
    path = work / PLAN
    if path.is_file():
        _refuse_difference(out, "holds an unfinished preparation", json.loads(path.read_bytes()), plan["shards"])
    else:
        # Shards without a plan are of unknown origin.
        shutil.rmtree(work, ignore_errors=True)
        work.mkdir()
        with atomic_write(path) as stream:
            stream.write(json.dumps(plan["shards"], indent=2).encode())
    return work


def _refuse_difference(out: Path, state: str, have: Any, want: Any) -> None:
    have, want = _flat(have), _flat(want)
    keys = [key for key in sorted({*have, *want}) if have.get(key) != want.get(key)]
    if keys:
        shown = "; ".join(f"{key}: {have.get(key)!r} -> {want.get(key)!r}" for key in keys[:5])
        more = f" and {len(keys) - 5} more" if len(keys) > 5 else ""
        raise ConfigError(
            str(out), f"{state}: {shown}{more}", "A folder holds one preparation", "Choose another --out, or --overwrite to replace it"
        )


def _flat(tree: Any, prefix: str = "") -> dict[str, Any]:
    if isinstance(tree, dict | list):
        items = tree.items() if isinstance(tree, dict) else enumerate(tree)
        return {key: value for name, branch in items for key, value in _flat(branch, f"{prefix}.{name}" if prefix else str(name)).items()}
    return {prefix: tree}
