"""Whether prepared data still is what its manifest says: quickly at the start of a job, or byte by byte."""

import hashlib
import json
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from ngpt.config.errors import ConfigError, ConfigErrors
from ngpt.data.files import progress, sha256_of
from ngpt.data.fingerprint import WHOLE_BYTES, changed_block, is_record, record_of
from ngpt.data.indexed import bin_path, idx_path
from ngpt.data.manifest import NAME, Manifest, SplitInfo, split_of
from ngpt.files import replacing

CHECKED = ".checked.json"  # blocks, as first found, of files whose manifest has no hashes of them


@dataclass(frozen=True)
class PreparedFile:
    """One file of a split and what the manifest says of it."""

    path: Path
    bytes: int
    sha256: str
    blocks: str


def files_of(prefix: Path | str, split: SplitInfo) -> list[PreparedFile]:
    """The token file and the index of a split."""
    return [
        PreparedFile(bin_path(prefix), split.bin_bytes, split.bin_sha256, split.bin_blocks),
        PreparedFile(idx_path(prefix), split.idx_bytes, split.idx_sha256, split.idx_blocks),
    ]


def _check_size(file: PreparedFile) -> None:
    if not file.path.is_file():
        raise ConfigError(str(file.path), "no such file", f"{NAME} names it", "Prepare the data again")
    size = file.path.stat().st_size
    if size != file.bytes:
        rule = f"{NAME} says {file.bytes}: it changed since its preparation"
        raise ConfigError(str(file.path), f"{size} bytes", rule, "Prepare it again")


def _check_whole(file: PreparedFile, bar: tqdm | None) -> None:
    if sha256_of(file.path, bar) != file.sha256:
        rule = f"{NAME} says {file.sha256}: it changed since its preparation"
        raise ConfigError(str(file.path), "another checksum", rule, "Prepare it again")


def verify(prefix: Path | str, record_folder: Path | None = None) -> Manifest:
    """Check that a split still is what was prepared, quickly enough for the start of a job: see `ngpt.data.fingerprint`.

    Sizes are always compared; a file that is read whole is compared with the manifest's checksum, a larger one by some of its blocks.
    Manifests of earlier versions have no hashes of blocks. The first check records them, and later checks notice a change.

    Args:
        prefix: Split prefix, FOLDER/train.
        record_folder: Where such a record goes when the data's folder cannot be written; None: nowhere.

    Raises:
        ConfigError: A file is missing or changed since the preparation.
    """
    manifest, name = split_of(prefix)
    for file in files_of(prefix, manifest.splits[name]):
        _check_size(file)
        if file.bytes <= WHOLE_BYTES:
            _check_whole(file, None)
        elif file.blocks:
            _check_blocks(file, file.blocks, f"{NAME} speaks of other bytes: it changed since its preparation")
        else:
            _check_as_first_found(file, _record_path(file.path, record_folder))
    return manifest


def verify_deep(prefixes: Sequence[Path | str]) -> None:
    """Compare all bytes of the splits with their manifests' checksums, a file a thread, with a progress bar.

    Raises:
        ConfigErrors: What is missing or changed, a line each.
    """
    files = [file for prefix in prefixes for manifest, name in [split_of(prefix)] for file in files_of(prefix, manifest.splits[name])]
    errors: list[ConfigError] = []

    def check(file: PreparedFile) -> None:
        try:
            _check_size(file)
            _check_whole(file, bar)
        except ConfigError as error:
            errors.append(error)

    with progress(sum(file.bytes for file in files), "checksums") as bar, ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        list(pool.map(check, files))
    if errors:
        raise ConfigErrors(errors)


def _record_path(path: Path, record_folder: Path | None) -> Path | None:
    """Where the blocks of a file of an earlier version's manifest are recorded: beside it if that is possible."""
    if os.access(path.parent, os.W_OK):
        return path.parent / CHECKED
    if record_folder is None:
        return None
    where = hashlib.sha256(os.fsencode(path.parent.resolve())).hexdigest()[:16]
    return record_folder / f"{where}{CHECKED}"


def _check_blocks(file: PreparedFile, record: str, rule: str) -> None:
    changed = changed_block(file.path, record)
    if changed is not None:
        way_out = "Restore it or prepare it again; `ngpt data inspect --deep` compares every byte"
        raise ConfigError(str(file.path), f"another content at byte {changed}", rule, way_out)


def _check_as_first_found(file: PreparedFile, path: Path | None) -> None:
    """Compare a file with the blocks that an earlier check recorded, or record them now."""
    entry = _load_checked(path).get(file.path.name) if path else None
    if isinstance(entry, dict) and entry.get("sha256") == file.sha256 and is_record(entry.get("blocks")):
        _check_blocks(file, entry["blocks"], f"{path} holds other bytes: it changed since they were recorded")
    elif path is not None:
        checked = _load_checked(path) | {file.path.name: {"sha256": file.sha256, "blocks": record_of(file.path, file.sha256)}}
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as stream:
            stream.write(json.dumps(checked).encode())


def _load_checked(path: Path) -> dict[str, Any]:
    try:
        checked = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return {}
    return checked if isinstance(checked, dict) else {}
