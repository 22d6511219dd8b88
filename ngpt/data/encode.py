"""A worker's part of the preparation: one chunk of records to one shard file of tokens."""

import json
import signal
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tqdm import tqdm

from ngpt.config.errors import ConfigError
from ngpt.config.schema import TokenizerConfig
from ngpt.data.files import atomic_write
from ngpt.data.indexed import MAX_DOCUMENT_TOKENS, dtype_for
from ngpt.data.readers import Record
from ngpt.data.sources import Source
from ngpt.data.tokenizers import Tokenizer, from_config
from ngpt.lifetime import end_with_parent


class Skip(Exception):
    """A record that is not a document; the argument is the reason that the manifest counts."""


@dataclass(frozen=True)
class Job:
    """What every worker must know."""

    sources: Sequence[Source]
    tokenizer: TokenizerConfig
    text_key: str
    strict: bool
    folder: Path  # of the shards


type Counts = dict[int, tuple[int, dict[str, int]]]  # source number -> documents taken, records skipped by reason


@dataclass(frozen=True)
class Shard:
    """A chunk's documents, end to end, each with its end-of-document token, and what was skipped, by source number."""

    tokens: np.ndarray
    lengths: np.ndarray  # int64, tokens of each document
    text_bytes: np.ndarray  # int64, UTF-8 bytes of each document's text
    counts: Counts
    dropped: Counter[str]  # characters of the texts that the tokenizer has no token for


def shard_path(folder: Path, index: int) -> Path:
    return folder / f"{index:08d}.npz"


def text_of(record: Record, kind: str, text_key: str) -> str:
    """A record's text.

    Raises:
        Skip: It has none.
    """
    payload = record.payload
    if kind == "jsonl":
        assert isinstance(payload, bytes)
        if not payload.strip():
            raise Skip("blank line")
        try:
            payload = json.loads(payload.decode("utf-8"))
        except UnicodeDecodeError:
            raise Skip("not UTF-8") from None
        except (ValueError, RecursionError):
            raise Skip("malformed JSON") from None
        payload = payload.get(text_key) if isinstance(payload, dict) else None
    if isinstance(payload, bytes):
        try:
            payload = payload.decode("utf-8")
        except UnicodeDecodeError:
            raise Skip("not UTF-8") from None
    if not isinstance(payload, str):
        raise Skip("no text")
    if not payload.strip():
        raise Skip("empty document")
    return payload


def encode_records(records: Sequence[Record], job: Job, tokenizer: Tokenizer) -> Shard:
    """Decode and tokenize records.

    Raises:
        ConfigError: A record that cannot be used, when `job.strict`, or that the tokenizer cannot encode; a document of more than
            2**31 - 1 tokens.
    """
    dtype = dtype_for(tokenizer.vocab_size)
    tokens: list[np.ndarray] = [np.zeros(0, dtype)]
    lengths: list[int] = []
    text_bytes: list[int] = []
    taken: Counter[int] = Counter()
    skipped: dict[int, Counter[str]] = {record.source: Counter() for record in records}
    dropped = Counter[str]()
    end = np.array([tokenizer.eod_id], dtype)
    for record in records:
        source = job.sources[record.source]
        place = f"{source.place}:{record.number}"
        try:
            text = text_of(record, source.format, job.text_key)
            size = _utf8_bytes(text)
        except Skip as skip:
            if job.strict:
                raise ConfigError(place, str(skip), "--strict allows no skipped record", "Repair it, or prepare without --strict") from None
            skipped[record.source][str(skip)] += 1
            continue
        try:
            document = tokenizer.encode(text)
        except ConfigError as error:
            raise ConfigError(error.path, f"{place}: {error.got}", error.rule, error.way_out) from error
        dropped += tokenizer.dropped(text)
        if len(document) >= MAX_DOCUMENT_TOKENS:
            raise ConfigError(place, f"{len(document)} tokens", "The format holds 2**31 - 1 in a document", "Split the document")
        tokens += [document.astype(dtype), end]
        lengths.append(len(document) + 1)
        text_bytes.append(size)
        taken[record.source] += 1
    counts: Counts = {source: (taken[source], dict(reasons)) for source, reasons in skipped.items()}
    return Shard(np.concatenate(tokens), np.array(lengths, np.int64), np.array(text_bytes, np.int64), counts, dropped)


def save_shard(path: Path, shard: Shard) -> None:
    """Write a shard; it is there whole or not at all."""
    counts, dropped = (np.frombuffer(json.dumps(part).encode(), np.uint8) for part in (shard.counts, shard.dropped))
    with atomic_write(path) as stream:
        np.savez(stream, tokens=shard.tokens, lengths=shard.lengths, text_bytes=shard.text_bytes, counts=counts, dropped=dropped)


def load_shard(path: Path) -> Shard:
    """Read a shard that `save_shard` wrote."""
    with np.load(path) as arrays:
        return Shard(arrays["tokens"], arrays["lengths"], *_header(arrays))


def load_header(path: Path) -> tuple[np.ndarray, Counts, Counter[str]]:
    """Only the documents' sizes, the counts and the dropped characters of a shard."""
    with np.load(path) as arrays:
        return _header(arrays)


def _header(arrays: Mapping[str, np.ndarray]) -> tuple[np.ndarray, Counts, Counter[str]]:
    counts = json.loads(arrays["counts"].tobytes())
    dropped = json.loads(arrays["dropped"].tobytes()) if "dropped" in arrays else {}  # earlier versions' shards have none
    return arrays["text_bytes"], {int(source): (taken, skipped) for source, (taken, skipped) in counts.items()}, Counter(dropped)


def sample_texts(records: Iterator[Record], job: Job, limit: int, bar: tqdm) -> Iterator[str]:
    """The usable texts among the records, until `limit` bytes of sources are read; at least one document."""
    consumed = 0
    for record in records:
        try:
            text = text_of(record, job.sources[record.source].format, job.text_key)
            _utf8_bytes(text)
        except Skip:
            continue
        yield text
        consumed += record.consumed
        bar.update(record.consumed)
        if consumed >= limit:
            return


_worker: tuple[Job, Tokenizer]


def start_worker(job: Job) -> None:
    """Prepare a worker process: its tokenizer, and its end with the process that started it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    end_with_parent()
    set_job(job)


def set_job(job: Job) -> None:
    """Prepare this process for `run_chunk`."""
    global _worker
    _worker = (job, from_config(job.tokenizer))


def run_chunk(index: int, records: Sequence[Record]) -> None:
    """A worker's task: write one shard."""
    job, tokenizer = _worker
    save_shard(shard_path(job.folder, index), encode_records(records, job, tokenizer))


def _utf8_bytes(text: str) -> int:
    try:
        return len(text.encode("utf-8"))
    except UnicodeEncodeError:
        raise Skip("not UTF-8") from None  # a lone surrogate, which JSON can escape
