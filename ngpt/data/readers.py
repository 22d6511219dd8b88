"""Source files to records: plain text, JSON lines, parquet; also .gz and .zst of the first two.

A record is what may become one document, not yet decoded: decoding and its failures are the workers' part (`encode.py`).
"""

import gzip
import io
import os
import zlib
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from ngpt.config.errors import ConfigError

if TYPE_CHECKING:
    from zstandard import ZstdDecompressionObj

ZSTD_READ_BYTES = 1 << 17
ZSTD_MAX_WINDOW = 1 << 31  # bytes, of `zstd --long=31`: the library's limit; a frame takes as much memory as its own window
FORMATS = {".txt": "txt", ".jsonl": "jsonl", ".ndjson": "jsonl", ".parquet": "parquet"}
PACKED = (".gz", ".zst")
BOM = b"\xef\xbb\xbf"
PARQUET_ROWS = 1024
DOCUMENTS = ("file", "blank-line")
NAMED = 20  # of what is left out, in a note


@dataclass(frozen=True)
class Source:
    """A file to prepare: where it is, and the name that manifest and messages give it."""

    path: Path
    name: str
    format: str


@dataclass(frozen=True)
class Record:
    """One candidate document. `number` counts from 1: the line of a .jsonl or of a text's first line, the row of a parquet file."""

    source: int
    number: int
    payload: bytes | str | None
    consumed: int  # bytes of the source file read since the record before


def find_sources(inputs: Sequence[Path | str]) -> tuple[list[Source], list[str]]:
    """The files that the inputs name, in order, and what is left out of their folders, each with the reason.

    A folder stands for all files of a known format below it, sorted by path. Linked folders are followed, hidden names are left out.

    Raises:
        ConfigError: Nothing there, an unknown extension, a file named twice, a folder that cannot be read.
    """
    sources: list[Source] = []
    left_out: list[str] = []
    for given in map(Path, inputs):
        if given.is_dir():
            found, others = _files_below(given)
            if not found:
                got = "no text file in this folder" + (f", only {shortened(others)}" if others else "")
                raise ConfigError(str(given), got, f"Known extensions: {_extensions()}", "Name another folder, or files")
            sources += [Source(path, path.relative_to(given).as_posix(), format_of(path) or "") for path in found]
            left_out += others
        elif given.is_file():
            kind = format_of(given)
            if kind is None:
                raise ConfigError(str(given), "unknown extension", f"Known ones: {_extensions()}", "Rename or convert the file")
            sources.append(Source(given, given.name, kind))
        else:
            raise ConfigError(
                str(given), "no such file or folder", "An input is a file, a folder, or a fetched text's name", "Check the path"
            )
    seen: set[Path] = set()
    for source in sources:
        path = source.path.resolve()
        if path in seen:
            raise ConfigError(str(source.path), "named twice", "Each file is prepared once", "Repeat a text by its weight in data.train")
        seen.add(path)
    return sources, left_out


def _files_below(top: Path) -> tuple[list[Path], list[str]]:
    found: list[Path] = []
    left_out: list[tuple[Path, str]] = []
    folders, links, seen = deque([top]), deque[Path](), set[Path]()
    try:
        while folders or links:
            folder = (folders or links).popleft()  # links last: a folder that is also linked to keeps its own name
            target = folder.resolve()
            if target in seen or (folder != top and top.resolve().is_relative_to(target)):
                left_out.append((folder, "link to a folder that is read already"))
                continue
            seen.add(target)
            for path in folder.iterdir():
                if path.name.startswith("."):
                    left_out.append((path, "hidden"))
                elif path.is_dir():
                    (links if path.is_symlink() else folders).append(path)
                elif not path.is_file():
                    left_out.append((path, "no file"))  # a link that leads nowhere, a pipe
                elif format_of(path) is None:
                    left_out.append((path, "unknown extension"))
                else:
                    found.append(path)
    except OSError as error:
        rule = "Nothing in a folder is left out unseen"
        raise ConfigError(str(error.filename), f"unreadable: {error.strerror}", rule, "Check its permissions") from error
    return sorted(found), [f"{path.relative_to(top).as_posix()} ({reason})" for path, reason in sorted(left_out)]


def shortened(names: Sequence[str]) -> str:
    """The first of many names, and how many more there are."""
    more = f" and {len(names) - NAMED:,} more" if len(names) > NAMED else ""
    return ", ".join(names[:NAMED]) + more


def format_of(path: Path) -> str | None:
    """txt, jsonl, parquet, or None for any other file; extensions in any case."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if suffixes and suffixes[-1] in PACKED:
        return FORMATS.get(suffixes[-2]) if len(suffixes) > 1 and suffixes[-2] != ".parquet" else None
    return FORMATS.get(suffixes[-1]) if suffixes else None


def read_records(index: int, source: Source, text_key: str, documents: str) -> Iterator[Record]:
    """All records of a source, in order.

    Args:
        index: The source's number, put into each record.
        source: The file.
        text_key: Column of a parquet file.
        documents: Of a .txt: "file" for one document, "blank-line" for documents between blank lines.

    Raises:
        ConfigError: The file cannot be read to its end.
    """
    from pyarrow import ArrowException  # costs 0.2 s: not at import
    from zstandard import ZstdError

    try:
        if source.format == "parquet":
            yield from _parquet(index, source, text_key)
        else:
            yield from _text(index, source, documents)
    except (OSError, EOFError, zlib.error, ZstdError, ArrowException) as error:
        if isinstance(error, ZstdError) and "memory" in str(error):  # the file is intact
            limit = f"the limit of {ZSTD_MAX_WINDOW >> 30} GiB" if "too much" in str(error) else "the free memory"
            way_out = "Recompress the file with a smaller window (zstd without --long), then run the same command again"
            got = f"a frame's window is larger than {limit}"
            raise ConfigError(str(source.path), got, "Decoding holds a window in memory", way_out) from error
        way_out = "Repair or remove the file, then run the same command again; finished work is kept"
        raise ConfigError(str(source.path), f"unreadable: {error}", "A source must be readable to its end", way_out) from error


def _text(index: int, source: Source, documents: str) -> Iterator[Record]:
    with source.path.open("rb") as raw, _unpacked(raw, source.path.suffix.lower()) as stream:
        before = 0
        for number, payload in _pieces(stream, source.format, documents):
            now = raw.tell()
            yield Record(index, number, payload, now - before)
            before = now


def _pieces(stream: BinaryIO, kind: str, documents: str) -> Iterator[tuple[int, bytes]]:
    if kind == "txt" and documents == "file":
        yield 1, stream.read().removeprefix(BOM)
        return
    lines = ((number, line.removeprefix(BOM) if number == 1 else line) for number, line in enumerate(stream, 1))
    if kind == "jsonl":
        yield from lines
        return
    first, paragraph = 1, []
    for number, line in lines:
        if line.strip():
            first = first if paragraph else number
            paragraph.append(line)
        elif paragraph:
            yield first, b"".join(paragraph)
            paragraph = []
    if paragraph:
        yield first, b"".join(paragraph)


def _unpacked(raw: BinaryIO, suffix: str) -> BinaryIO:
    if suffix == ".gz":
        return gzip.open(raw)  # type: ignore[return-value]
    if suffix == ".zst":
        return io.BufferedReader(_ZstdStream(raw))  # type: ignore[return-value]
    return raw


class _ZstdStream(io.RawIOBase):
    """The text of all frames of a .zst. The library's own reader takes the end of a cut file for the end of its text."""

    def __init__(self, raw: BinaryIO) -> None:
        from zstandard import ZstdDecompressor

        self._raw, self._decompressor = raw, ZstdDecompressor(max_window_size=ZSTD_MAX_WINDOW)
        self._frame: ZstdDecompressionObj | None = None
        self._packed = b""
        self._text = memoryview(b"")  # sliced without a copy

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        """Fills `buffer` with text, as `io.RawIOBase` asks; 0 at the end. Raises EOFError where a frame is cut."""
        while not self._text:
            self._packed = self._packed or self._raw.read(ZSTD_READ_BYTES)
            if not self._packed:
                if self._frame is not None:
                    raise EOFError("Compressed file ended before the end of a frame")
                return 0
            self._frame = self._frame or self._decompressor.decompressobj()
            self._text = memoryview(self._frame.decompress(self._packed))
            self._packed = self._frame.unused_data
            if self._frame.eof:
                self._frame = None
        size = min(len(buffer), len(self._text))
        buffer[:size], self._text = self._text[:size], self._text[size:]
        return size


def _parquet(index: int, source: Source, text_key: str) -> Iterator[Record]:
    from pyarrow import OSFile, parquet

    # Opened by its bytes: the library takes no other name than UTF-8.
    with OSFile(os.fsencode(source.path)) as file, parquet.ParquetFile(file) as table:
        columns = table.schema_arrow.names
        if text_key not in columns:
            raise ConfigError(
                str(source.path), f"no column {text_key!r}", f"It has {', '.join(columns)}", "Name the text's column with --text-key"
            )
        size, rows, number = source.path.stat().st_size, table.metadata.num_rows, 0
        for batch in table.iter_batches(PARQUET_ROWS, columns=[text_key]):
            for value in batch.column(0).to_pylist():
                number += 1
                payload = value if isinstance(value, bytes | str) else None
                yield Record(index, number, payload, size * number // rows - size * (number - 1) // rows)


def _extensions() -> str:
    return ", ".join(FORMATS) + "; .txt and .jsonl also with " + ", ".join(PACKED)
