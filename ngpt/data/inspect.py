"""What prepared data holds, and what a planned run will take of each source."""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from ngpt.config.errors import ConfigError
from ngpt.config.schema import Config, DataSource
from ngpt.data.indexed import IndexedReader
from ngpt.data.manifest import NAME, Manifest, SourceInfo, split_of
from ngpt.data.tokenizers import from_manifest

SHOWN = 5  # sources with a line of their own


@dataclass(frozen=True)
class BlendRow:
    """One source of a weighted blend at the planned length; `share` sums to 1, tokens and documents are what the source holds."""

    path: str
    share: float
    documents: int
    tokens: int
    tokens_drawn: float
    epochs: float


def blend(sources: Sequence[DataSource], planned_tokens: int) -> list[BlendRow]:
    """Tokens and epochs that each source will contribute to `planned_tokens` tokens of training.

    Raises:
        ConfigError: Weights that are negative or sum to 0, or a source without a manifest.
    """
    if any(source.weight < 0 for source in sources) or sum(source.weight for source in sources) <= 0:
        raise ConfigError(
            "data.train", [source.weight for source in sources], "Weights are not negative and not all 0", "Set positive weights"
        )
    total = sum(source.weight for source in sources)
    rows = []
    for source in sources:
        manifest, name = split_of(source.path)
        split, share = manifest.splits[name], source.weight / total
        drawn = share * planned_tokens
        rows.append(BlendRow(source.path, share, split.documents, split.tokens, drawn, drawn / split.tokens))
    return rows


def blend_lines(config: Config) -> Iterator[str]:
    """A readable table of `blend` for a composed config."""
    train = config.train
    planned = train.steps * train.global_batch_size * train.seq_length
    yield f"{train.steps} steps x {train.global_batch_size} sequences x {train.seq_length} tokens = {planned:,} tokens"
    if config.data.mock or not config.data.train:
        yield "data.mock: random tokens, no source" if config.data.mock else "data.train names no source"
        return
    yield f"{'source':40} {'share':>7} {'documents':>11} {'tokens':>15} {'drawn':>15} {'epochs':>8}"
    for row in blend(config.data.train, planned):
        counts = f"{row.documents:11,} {row.tokens:15,} {row.tokens_drawn:15,.0f}"
        yield f"{row.path:40} {row.share:7.2%} {counts} {row.epochs:8.2f}"


def prefixes_of(path: Path) -> list[Path]:
    """The splits of a folder of prepared data, or the one that a prefix names."""
    if (path / NAME).is_file():
        return [path / name for name in Manifest.load(path).splits]
    split_of(path)
    return [path]


def _source_lines(sources: Sequence[SourceInfo]) -> Iterator[str]:
    """One line for each of the first sources, and one for all others together, so that no skipped record goes unsaid."""
    for source in sources[:SHOWN]:
        yield f"source {source.path}: {_contents([source])}"
    if others := sources[SHOWN:]:
        yield f"... and {len(others):,} more: {_contents(others)}"


def _contents(sources: Sequence[SourceInfo]) -> str:
    reasons = sum((Counter(source.skipped) for source in sources), Counter[str]())
    skipped = ", ".join(f"{count} {reason}" for reason, count in reasons.items())
    size, documents = sum(source.bytes for source in sources), sum(source.documents for source in sources)
    return f"{size:,} bytes, {documents:,} documents" + (f"; skipped: {skipped}" if skipped else "")


def data_lines(path: Path, samples: int, characters: int) -> Iterator[str]:
    """A readable summary of prepared data: counts, skips, and the beginnings of some documents, decoded.

    Args:
        path: A folder with a manifest, or the prefix of one split.
        samples: Documents to show of each split, evenly spread.
        characters: Of each document.
    """
    if (path / NAME).is_file():
        manifest, names = Manifest.load(path), None
    else:
        manifest, name = split_of(path)
        names = [name]
    info = manifest.tokenizer
    yield f"tokenizer {info.name} ({info.kind}): {info.vocab_size:,} entries, end of document {info.eod_id}, {manifest.dtype}"
    yield from _source_lines(manifest.sources)
    yield from (f"note: {note}" for note in manifest.notes)
    yield f"{'split':8} {'documents':>11} {'tokens':>15} {'bytes of text':>15} {'bytes/token':>12}"
    for name in names or manifest.splits:
        split = manifest.splits[name]
        ratio = split.bytes_of_text / split.tokens
        yield f"{name:8} {split.documents:11,} {split.tokens:15,} {split.bytes_of_text:15,} {ratio:12.2f}"
    if samples <= 0:
        return
    tokenizer = from_manifest(manifest)
    assert manifest.folder is not None
    for name in names or manifest.splits:
        reader = IndexedReader(manifest.folder / name)
        for number in range(min(samples, len(reader))):
            index = number * len(reader) // min(samples, len(reader))
            # 4 tokens a character are enough for any tokenizer that falls back to UTF-8 bytes.
            text = tokenizer.decode(reader[index][: 4 * characters].tolist())[:characters]
            yield f"--- {name} document {index} ({len(reader[index]):,} tokens)\n{text}"
