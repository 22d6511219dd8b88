"""The files to prepare: what the inputs name, in which order, and what a folder leaves out."""

from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePath, PurePosixPath
from typing import BinaryIO

from ngpt.config.errors import ConfigError
from ngpt.data.remote import check_url, checksum_of, is_url, is_web, listing, local_path, open_url, without_query

FORMATS = {".txt": "txt", ".jsonl": "jsonl", ".ndjson": "jsonl", ".parquet": "parquet"}
PACKED = (".gz", ".zst")
NAMED = 20  # of what is left out, in a note
AT_A_URL = "Check the address, the network and your credentials"
HIDDEN, UNKNOWN = "hidden", "unknown extension"


@dataclass(frozen=True)
class Source:
    """A file to prepare.

    Attributes:
        path: Of a local file, or a URL.
        name: What the manifest calls it: its path below the folder that was given, or the URL.
        format: txt, jsonl or parquet.
        size: Of a URL, in bytes, where its file system says so.
        checksum: Of a URL, the one that its file system gives the content; empty: none.
    """

    path: Path | str
    name: str
    format: str
    size: int | None = None
    checksum: str = ""

    @property
    def place(self) -> str:
        """What messages call it."""
        return self.name if isinstance(self.path, str) else str(self.path)

    @property
    def suffix(self) -> str:
        return PurePath(self.name).suffix.lower()

    def open(self) -> BinaryIO:
        """Its bytes, from the beginning. Raises an OSError where it cannot be read, here and when it is."""
        return open_url(self.path, self.size) if isinstance(self.path, str) else self.path.open("rb")

    def known_size(self) -> int:
        """Bytes; 0 where a file system does not say."""
        return self.size or 0 if isinstance(self.path, str) else self.path.stat().st_size


def find_sources(inputs: Sequence[Path | str]) -> tuple[list[Source], list[str]]:
    """The files that the inputs name, in order, and what is left out of their folders, each with the reason.

    A folder stands for all files of a known format below it, sorted by path. Linked folders are followed, hidden names are left out.

    Raises:
        ConfigError: Nothing there, an unknown extension, a file named twice, a folder or a URL that cannot be read.
    """
    sources: list[Source] = []
    left_out: list[str] = []
    for given in inputs:
        found, others = _at_url(given) if isinstance(given, str) and is_url(given) else _at_path(Path(given))
        sources += found
        left_out += others
    seen: set[Path | str] = set()
    for source in sources:
        path = source.path if isinstance(source.path, str) else source.path.resolve()
        if path in seen:
            raise ConfigError(source.place, "named twice", "Each file is prepared once", "Repeat a text by its weight in data.train")
        seen.add(path)
    return sources, left_out


def _at_path(given: Path) -> tuple[list[Source], list[str]]:
    if given.is_dir():
        found, others = _files_below(given)
        if not found:
            raise _no_text(str(given), others)
        return [Source(path, path.relative_to(given).as_posix(), format_of(path) or "") for path in found], others
    if not given.is_file():
        raise _nothing_there(str(given))
    return [Source(given, given.name, _known_format(given, str(given)))], []


def _at_url(url: str) -> tuple[list[Source], list[str]]:
    check_url(url)
    path = local_path(url)
    if path is not None:
        return _at_path(path)
    name = without_query(url).rstrip("/")
    if is_web(url):
        _known_format(PurePosixPath(name), name)  # before the server is asked: it must be a file
    try:
        files = listing(url)
    except OSError as error:
        raise ConfigError(name, f"unreadable: {error}", "An input must be readable", AT_A_URL) from error
    if files is None:
        raise _nothing_there(name)
    if "" in files:
        info = files[""]
        return [Source(url, name, _known_format(PurePosixPath(name), name), info.get("size"), checksum_of(url, info))], []
    found, others = _sorted_out(files)
    if not found:
        raise _no_text(name, others)
    placed = [(f"{name}/{below}", files[below]) for below in found]
    sources = [Source(path, path, format_of(PurePosixPath(path)) or "", info.get("size"), checksum_of(url, info)) for path, info in placed]
    return sources, others


def _sorted_out(names: Iterable[str]) -> tuple[list[str], list[str]]:
    """Names below a folder by the rules of `_files_below`: those of files to read, and what is left out."""
    found: list[str] = []
    left_out: dict[str, str] = {}
    for parts in sorted(name.split("/") for name in names):
        hidden = next((depth for depth, part in enumerate(parts, 1) if part.startswith(".")), None)
        if hidden is not None:
            left_out["/".join(parts[:hidden])] = HIDDEN
        elif format_of(PurePosixPath(parts[-1])) is None:
            left_out["/".join(parts)] = UNKNOWN
        else:
            found.append("/".join(parts))
    return found, [f"{name} ({reason})" for name, reason in left_out.items()]


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
                    left_out.append((path, HIDDEN))
                elif path.is_dir():
                    (links if path.is_symlink() else folders).append(path)
                elif not path.is_file():
                    left_out.append((path, "no file"))  # a link that leads nowhere, a pipe
                elif format_of(path) is None:
                    left_out.append((path, UNKNOWN))
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


def format_of(path: PurePath) -> str | None:
    """txt, jsonl, parquet, or None for any other file; extensions in any case."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if suffixes and suffixes[-1] in PACKED:
        return FORMATS.get(suffixes[-2]) if len(suffixes) > 1 and suffixes[-2] != ".parquet" else None
    return FORMATS.get(suffixes[-1]) if suffixes else None


def _known_format(path: PurePath, place: str) -> str:
    kind = format_of(path)
    if kind is None:
        raise ConfigError(place, UNKNOWN, f"Known ones: {_extensions()}", "Rename or convert the file")
    return kind


def _nothing_there(place: str) -> ConfigError:
    rule = "An input is a file, a folder, a URL of either, or a fetched text's name"
    return ConfigError(place, "no such file or folder", rule, "Check the path")


def _no_text(place: str, others: Sequence[str]) -> ConfigError:
    got = "no text file in this folder" + (f", only {shortened(others)}" if others else "")
    return ConfigError(place, got, f"Known extensions: {_extensions()}", "Name another folder, or files")


def _extensions() -> str:
    return ", ".join(FORMATS) + "; .txt and .jsonl also with " + ", ".join(PACKED)
