"""Source files to records: plain text, JSON lines, parquet; also .gz and .zst of the first two.

A record is what may become one document, not yet decoded: decoding and its failures are the workers' part (`encode.py`).
"""

import gzip
import io
import json
import os
import zlib
from collections.abc import Buffer, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from ngpt.config.errors import ConfigError
from ngpt.data.sources import Source

if TYPE_CHECKING:
    from zstandard import ZstdDecompressionObj

ZSTD_READ_BYTES = 1 << 17
ZSTD_MAX_WINDOW = 1 << 31  # bytes, as of `zstd --long=31`: the library's limit; a frame takes as much memory as its window
BOM = b"\xef\xbb\xbf"
PARQUET_ROWS = 1024
DOCUMENTS = ("file", "blank-line")


@dataclass(frozen=True)
class Record:
    """One candidate document. `number` counts from 1: the line of a .jsonl or of a text's first line, the row of a parquet file."""

    source: int
    number: int
    payload: bytes | str | None
    consumed: int  # bytes of the source file read since the record before


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
            raise ConfigError(source.place, got, "Decoding holds a window in memory", way_out) from error
        cure = "Repair or remove the file" if isinstance(source.path, Path) else "Check the network, or repair the file"
        way_out = f"{cure}, then run the same command again; finished work is kept"
        raise ConfigError(source.place, f"unreadable: {error}", "A source must be readable to its end", way_out) from error


def keys_of_first_record(source: Source) -> list[str]:
    """The keys of the first record of a .jsonl; [] if its first line is no JSON object.

    Raises:
        ConfigError: The file cannot be read.
    """
    for record in read_records(0, source, "", ""):
        try:
            found = json.loads(record.payload or b"")
        except (ValueError, RecursionError):
            return []
        return list(found) if isinstance(found, dict) else []
    return []


def _text(index: int, source: Source, documents: str) -> Iterator[Record]:
    with source.open() as raw, _unpacked(raw, source.suffix) as stream:
        before = 0
        for number, payload in _pieces(stream, source.format, documents):
            now = raw.tell()
            yield Record(index, number, payload, now - before)
            before = now


def _pieces(stream: BinaryIO | gzip.GzipFile, kind: str, documents: str) -> Iterator[tuple[int, bytes]]:
    if kind == "txt" and documents == "file":
        yield 1, stream.read().removeprefix(BOM)
        return
    lines = ((number, line.removeprefix(BOM) if number == 1 else line) for number, line in enumerate(stream, 1))
    if kind == "jsonl":
        yield from lines
        return
    first = 1
    paragraph: list[bytes] = []
    for number, line in lines:
        if line.strip():
            first = first if paragraph else number
            paragraph.append(line)
        elif paragraph:
            yield first, b"".join(paragraph)
            paragraph = []
    if paragraph:
        yield first, b"".join(paragraph)


def _unpacked(raw: BinaryIO, suffix: str) -> BinaryIO | gzip.GzipFile:
    if suffix == ".gz":
        return gzip.open(raw)
    if suffix == ".zst":
        return io.BufferedReader(_ZstdStream(raw))
    return raw


class _ZstdStream(io.RawIOBase):
    """The text of all frames of a .zst. The library's own reader mistakes the end of a truncated file for the end of the text."""

    def __init__(self, raw: BinaryIO) -> None:
        from zstandard import ZstdDecompressor

        self._raw, self._decompressor = raw, ZstdDecompressor(max_window_size=ZSTD_MAX_WINDOW)
        self._frame: ZstdDecompressionObj | None = None
        self._packed = b""
        self._text = memoryview(b"")  # sliced without a copy

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Buffer) -> int:
        """Fills `buffer` with text, as `io.RawIOBase` asks; 0 at the end. Raises EOFError where a frame is truncated."""
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
        target = memoryview(buffer)
        size = min(len(target), len(self._text))
        target[:size], self._text = self._text[:size], self._text[size:]
        return size


def _parquet(index: int, source: Source, text_key: str) -> Iterator[Record]:
    from pyarrow import OSFile, parquet

    # Opened here by the path's bytes: the library only takes names in UTF-8.
    opened = OSFile(os.fsencode(source.path)) if isinstance(source.path, Path) else source.open()
    with opened as file, parquet.ParquetFile(file) as table:
        columns = table.schema_arrow.names
        if text_key not in columns:
            raise ConfigError(
                source.place, f"no column {text_key!r}", f"It has {', '.join(columns)}", "Name the text's column with --text-key"
            )
        size, rows, number = file.seek(0, os.SEEK_END), table.metadata.num_rows, 0
        for batch in table.iter_batches(PARQUET_ROWS, columns=[text_key]):
            for value in batch.column(0).to_pylist():
                number += 1
                payload = value if isinstance(value, bytes | str) else None
                yield Record(index, number, payload, size * number // rows - size * (number - 1) // rows)
