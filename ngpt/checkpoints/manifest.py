"""manifest.json of a checkpoint: what it is, and the size and hash of each of its files. Written last, so it is there when all are."""

import json
import re
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ngpt.checkpoints import hashing
from ngpt.checkpoints.hashing import FileRecord
from ngpt.files import replacing

NAME = "manifest.json"
CONFIG_FILE = "config.yaml"  # the resolved config of the run that saved
METADATA_FILE = ".metadata"  # torch's index of the shards
BACKEND_FILE = "metadata.json"  # Megatron's word for the format; the last file that it writes
FORMAT = 1
WEIGHTS_ONLY = "weights_only"  # among `Manifest.extra`: there is no optimizer's state
_SHARD_NAME = re.compile(rb"__\d+_\d+\.distcp")


@dataclass(frozen=True)
class Damage:
    """One thing wrong with a checkpoint: the file or folder, and what was found there."""

    path: Path
    what: str

    def __str__(self) -> str:
        return f"{self.path}: {self.what}"


@dataclass(frozen=True)
class Manifest:
    """The content of manifest.json.

    Attributes:
        step: Optimizer steps taken.
        files: Name -> size and hash, of every file of the folder but the manifest.
        versions: Package -> version of the process that saved; None where absent.
        data: Position in the data: `consumed_samples` (sequences), `tokens`, `sources`.
        extra: Marks of the layout that readers may need.
        format: Of the manifest.
    """

    step: int
    files: dict[str, FileRecord]
    versions: dict[str, str | None] = field(default_factory=dict)
    data: dict[str, Any] = field(default_factory=dict)
    extra: dict[str, Any] = field(default_factory=dict)
    format: int = FORMAT

    def save(self, folder: Path) -> None:
        """Writes the manifest into an iteration folder, whole or not at all, and flushes it."""
        content = asdict(self) | {"hash": hashing.NAME}
        content["checksum"] = _checksum(content)
        with replacing(folder / NAME) as stream:
            stream.write((json.dumps(content, indent=1, sort_keys=True) + "\n").encode())

    @property
    def bytes(self) -> int:
        return sum(record.size for record in self.files.values())


def holds_weights_alone(folder: Path) -> bool:
    """Whether an iteration folder says that no optimizer's state is in it."""
    found = read(folder)
    return isinstance(found, Manifest) and bool(found.extra.get(WEIGHTS_ONLY))


def _checksum(content: dict[str, Any]) -> str:
    rest = {key: value for key, value in content.items() if key != "checksum"}
    return hashing.hash_bytes(json.dumps(rest, sort_keys=True, separators=(",", ":")).encode())


def read(folder: Path) -> Manifest | Damage | None:
    """The manifest of an iteration folder, or what is wrong with it; None where the folder is older than manifests."""
    path = folder / NAME
    try:
        content = json.loads(path.read_bytes())
    except FileNotFoundError:
        return Damage(path, "missing") if (folder / CONFIG_FILE).exists() else None
    except OSError as error:
        return Damage(path, error.strerror or str(error))
    except (ValueError, RecursionError):
        return Damage(path, "not the JSON that was written")
    if not isinstance(content, dict) or content.get("checksum") != _checksum(content):
        return Damage(path, "changed since it was written: its checksum differs")
    if content.get("format") != FORMAT or content.get("hash") != hashing.NAME:
        what = f"format {content.get('format')} with {content.get('hash')}, and this version reads {FORMAT} with {hashing.NAME}"
        return Damage(path, what)
    try:
        files = {name: FileRecord(int(record["size"]), str(record["digest"])) for name, record in content["files"].items()}
        return Manifest(int(content["step"]), files, content["versions"], content["data"], content["extra"])
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        return Damage(path, f"incomplete: {error!r}")


def inspect(folder: Path, sizes: bool = True) -> Damage | None:
    """What a look at names and sizes finds wrong with an iteration folder; no file is read through.

    Args:
        folder: `iter_%07d`.
        sizes: Compare sizes, too. Without a manifest no size is known, and only empty files are found.
    """
    found = read(folder)
    if isinstance(found, Damage):
        return found
    if found is None:
        return _inspect_without_manifest(folder)
    if f"iter_{found.step:07d}" != folder.name:
        return Damage(folder / NAME, f"of step {found.step}, not of this folder")
    for name, record in found.files.items():
        damage = _inspect_file(folder / name, record.size if sizes else None)
        if damage is not None:
            return damage
    return None


def _inspect_file(path: Path, size: int | None) -> Damage | None:
    try:
        present = path.stat().st_size
    except (FileNotFoundError, NotADirectoryError):
        return Damage(path, "missing")
    except OSError as error:
        return Damage(path, error.strerror or str(error))
    if size is not None and present != size:
        return Damage(path, f"{present:,} bytes, {size:,} were written")
    return None


def _inspect_without_manifest(folder: Path) -> Damage | None:
    """A checkpoint of an earlier version: the two indices, and the shards that torch's index names (found as text, without unpickling)."""
    for name in (METADATA_FILE, BACKEND_FILE):
        path = folder / name
        if not path.is_file():
            return Damage(path, "missing")
        if path.stat().st_size == 0:
            return Damage(path, "empty")
    try:
        shards = sorted(set(_SHARD_NAME.findall((folder / METADATA_FILE).read_bytes())))
    except OSError as error:
        return Damage(folder / METADATA_FILE, error.strerror or str(error))
    if not shards:
        return Damage(folder / METADATA_FILE, "it names no shard")
    for shard in shards:
        path = folder / shard.decode()
        if not path.is_file():
            return Damage(path, "missing")
        if path.stat().st_size == 0:
            return Damage(path, "empty")
    return None


def verify(folder: Path, threads: int) -> Damage | None:
    """`inspect`, after which every byte is read where the folder has a manifest."""
    damage = inspect(folder)
    found = read(folder) if damage is None else None
    return next(iter(compare(folder, found.files, threads)), None) if isinstance(found, Manifest) else damage


def compare(folder: Path, files: dict[str, FileRecord], threads: int) -> list[Damage]:
    """Reads `files` of an iteration folder through and returns those that are not what was written."""
    wanted = {folder / name: record for name, record in files.items()}
    damages = []
    for path, found in hashing.hash_files(wanted, threads).items():
        if isinstance(found, OSError):
            damages.append(Damage(path, "missing" if isinstance(found, FileNotFoundError) else found.strerror or str(found)))
        elif found.size != wanted[path].size:
            damages.append(Damage(path, f"{found.size:,} bytes, {wanted[path].size:,} were written"))
        elif found.digest != wanted[path].digest:
            damages.append(Damage(path, "its bytes changed since they were written: another checksum"))
    return damages
