"""Texts by URL through fsspec: s3://, gs://, hf://, https:// and whatever else has a file system there.

A file is read as a stream. What a file system's library raises becomes an OSError of one line. It leaves out a URL's query,
which may hold a signature.
"""

import io
import re
from collections.abc import Buffer, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from ngpt.config.errors import ConfigError
from ngpt.data.files import READ_BYTES

if TYPE_CHECKING:
    from fsspec import AbstractFileSystem

EXTRAS = {"s3": "s3", "s3a": "s3", "gs": "gs", "gcs": "gs", "http": "http", "https": "http"}  # of setup.py
# What a file system calls the checksum of the content. fsspec's own `ukey` may cover the time stamp, or the URL alone.
CHECKSUMS = ("md5Hash", "Content-MD5", "blob_id")
ETAGS = ("ETag", "etag")  # covers the content on S3 alone: elsewhere metadata, too, or the server that answers
_PASSWORD = re.compile(r"://[^/@]*:(?!\d+/)[^@]*@")  # which may hold a slash; host:port/ is none
_QUERY = re.compile(r"""(\w+://[^\s'"?]*)\?[^\s'"]*""")  # of any URL in a message, as a library may have quoted or been redirected to it
_PROTOCOL = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+)://")


def is_url(given: Path | str) -> bool:
    """Whether an input is a URL, not a path."""
    return isinstance(given, str) and _PROTOCOL.match(given) is not None


def without_query(url: str) -> str:
    """A URL as manifests and messages have it: a query is part of a web address, and no part of its name."""
    return url.partition("?")[0] if is_web(url) else url


def is_web(url: str) -> bool:
    """Whether a URL is a web address: it names one file, there are no folders."""
    return _protocol(url) in ("http", "https")


def check_url(url: str) -> None:
    """Raise a ConfigError for a URL that holds a password, or a file system inside another."""
    # Outside the web a name before an @ is a container or the like.
    if (_PASSWORD.search(url) and _protocol(url) != "github") or (is_web(url) and re.search("://[^/]*@", url)):
        hidden = re.sub("://.*@", "://***@", without_query(url))
        raise ConfigError(hidden, "a password", "A URL is kept in the manifest", "Leave it out; give it as the file system's library asks")
    if "::" in url:
        raise ConfigError(without_query(url), "a chain of file systems", "A URL names files of one", "Unpack them first")


def local_path(url: str) -> Path | None:
    """The path that a URL of this machine names, or None."""
    if _protocol(url) not in ("file", "local"):
        return None
    return Path(_file_system(url)[1])


def listing(url: str) -> dict[str, dict[str, Any]] | None:
    """What fsspec knows of the files below a URL, by their names below it. A URL of one file gives the name "". None: nothing is there.

    Raises:
        ConfigError: The file system cannot be used.
        OSError: It cannot be asked.
    """
    system, path = _file_system(url)
    with _one_kind_of_error(url):
        try:
            top = system.info(path)
        except FileNotFoundError as error:
            if is_web(url) and error.__cause__ is not None:  # there it stands for every failure
                raise error.__cause__ from None
            return None
        if top["type"] != "directory":
            return {"": top}
        below = top["name"].rstrip("/") + "/"
        files = system.find(path, detail=True).items()
        return {name.removeprefix(below): info for name, info in files if info["type"] == "file" and not name.endswith("/")}


def checksum_of(url: str, info: dict[str, Any]) -> str:
    """The checksum of the content that a file system gives, with the checksum's name; empty where it gives none."""
    keys = (*CHECKSUMS, *(ETAGS if _protocol(url) in ("s3", "s3a") else ()))
    return next((f"{key} {info[key]}" for key in keys if info.get(key)), "")


def open_url(url: str, size: int | None) -> BinaryIO:
    """A stream of a file's bytes; reading raises an OSError where the file ends before `size`."""
    system, path = _file_system(url)
    with _one_kind_of_error(url):
        file = system.open(path, "rb")
    return io.BufferedReader(_Stream(file, url, size), READ_BYTES)


class _Stream(io.RawIOBase):
    def __init__(self, file: Any, url: str, size: int | None) -> None:
        self._file, self._url, self._size, self._position = file, url, size, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return self._file.seekable()

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        with _one_kind_of_error(self._url):
            self._position = self._file.seek(offset, whence)
        return self._position

    def readinto(self, buffer: Buffer) -> int:
        target = memoryview(buffer)
        with _one_kind_of_error(self._url):
            block = self._file.read(len(target))
        target[: len(block)] = block
        self._position += len(block)
        if not block and self._size is not None and self._position < self._size:
            raise OSError(f"it ended after {self._position:,} of {self._size:,} bytes")
        return len(block)

    def close(self) -> None:
        if not self.closed:
            self._file.close()
        super().close()


def _protocol(url: str) -> str:
    match = _PROTOCOL.match(url)
    return match.group(1).lower() if match else ""


def _file_system(url: str) -> "tuple[AbstractFileSystem, str]":
    from fsspec.core import url_to_fs  # slow to import

    try:
        return url_to_fs(url)
    except ImportError as error:
        extra = EXTRAS.get(_protocol(url))
        way_out = f"Run `pip install 'ngpt-megatron[{extra}]'`" if extra else "Install it"
        raise ConfigError(without_query(url), error, f"{_protocol(url)}:// is read by a package that is not installed", way_out) from error
    except Exception as error:
        from fsspec import available_protocols

        if _protocol(url) in available_protocols():
            got, way_out = f"{type(error).__name__}: {error}", "Give it what its library asks for"
            raise ConfigError(without_query(url), got, "The file system cannot be used", way_out) from error
        rule = "A URL begins with the protocol of a file system that fsspec knows"
        raise ConfigError(without_query(url), error, rule, "For instance s3://, gs://, hf:// or https://") from error


@contextmanager
def _one_kind_of_error(url: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # of any library: botocore's, aiohttp's, httpx's
        said = _QUERY.sub(r"\1", " ".join(str(error).split()))
        raise OSError(f"{type(error).__name__}: {said}") from error
