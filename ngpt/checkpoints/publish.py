"""The last steps of a save, by one process: describe the written files, give the folder its name, and move the tracker to it.

    .saving/iter_N/ shards, .metadata, metadata.json    written by all ranks, flushed by each
    .saving/iter_N/ config.yaml, manifest.json          what it is; every size and hash
    latest_checkpointed_iteration.txt.partial           the coming tracker: nothing after this needs space
    iter_N/                                             a rename
    latest_checkpointed_iteration.txt                   a rename: published

Killed anywhere before the last line, the tracker names the previous checkpoint, which nothing here touches.
"""

import errno
import os
import shutil
from pathlib import Path

from ngpt.checkpoints import hashing, manifest, tracker
from ngpt.checkpoints.choice import folder_of
from ngpt.checkpoints.hashing import FileRecord
from ngpt.checkpoints.manifest import Manifest
from ngpt.config.errors import ConfigError
from ngpt.files import exchange, sync, write_synced

SAVING = ".saving"  # the folder beside the iteration folders in which a save is written
REPLACED = ".replaced"
FULL_DISK = errno.ENOSPC


class CheckpointNotWritten(ConfigError):
    """A save that the disk refused: one line with the path, what is left, and how to go on.

    Args:
        path: What could not be written.
        reason: The disk's word, or the space needed and free.
        is_full: For lack of space.
        previous: The step of the published checkpoint; None where there is none.
    """

    def __init__(self, path: str, reason: str, is_full: bool, previous: int | None) -> None:
        super().__init__(path, reason, "A checkpoint is written whole or not at all", "The same command continues")
        self.is_full, self.previous = is_full, previous

    def __str__(self) -> str:
        if self.is_full:
            told = "" if self.got == os.strerror(FULL_DISK) else f" ({self.got})"
            problem = f"No space left on {self.path}{told}"
        else:
            problem = f"{self.path} cannot be written: {self.got}"
        kept = "no checkpoint was published before"
        if self.previous is not None:
            kept = f"the previous checkpoint of step {self.previous} is intact"
        return f"{problem}; {kept}; the same command continues"


def is_full(number: int) -> bool:
    """Whether an errno means that space, or a quota, is used up."""
    return number in (errno.ENOSPC, errno.EDQUOT)


def staging_folder(folder: Path | str, step: int) -> Path:
    """Where the checkpoint of `step` is written until it is published."""
    return Path(folder) / SAVING / f"iter_{step:07d}"


def make_staging(folder: Path | str, step: int) -> Path:
    """An empty staging folder. Otherwise shards of another layout, from an interrupted save, would stay in it."""
    staging = staging_folder(folder, step)
    if staging.exists():
        shutil.rmtree(staging)
    staging.mkdir(parents=True)
    return staging


def clear(folder: Path | str) -> None:
    """Removes what interrupted saves of earlier processes have left. Only while no save is under way."""
    for path in [*Path(folder).glob(f"iter_*{REPLACED}"), Path(folder) / SAVING]:
        final = path.with_name(path.name.removesuffix(REPLACED))
        if not path.is_dir() or path.is_symlink():
            continue
        if path.name.endswith(REPLACED) and not final.exists():  # killed between two renames: the old one is all there is
            path.rename(final)
        else:
            shutil.rmtree(path)


def discard(staging: Path) -> None:
    """Removes what a failed save has written."""
    shutil.rmtree(staging, ignore_errors=True)
    (staging.parent.parent / (tracker.TRACKER_FILE + ".partial")).unlink(missing_ok=True)
    try:
        staging.parent.rmdir()
    except OSError:  # another save is under way there
        pass


def describe(staging: Path, written: dict[str, FileRecord]) -> dict[str, FileRecord]:
    """Size and hash of each file of a staging folder.

    Args:
        written: Those that were hashed on their way to the disk. The others are small, and read.

    Raises:
        OSError: a file is missing, or its size on the disk is not that of what was written.
    """
    files = {}
    for path in sorted(staging.iterdir()):
        record = written.get(path.name) or hashing.hash_file(path)
        if path.stat().st_size != record.size:
            raise OSError(errno.EIO, f"{path.stat().st_size:,} bytes are on the disk, {record.size:,} were written", str(path))
        files[path.name] = record
    missing = sorted(written.keys() - files.keys())
    if missing:
        raise OSError(errno.EIO, "it was written and is not on the disk", str(staging / missing[0]))
    return files


def publish(folder: Path, content: Manifest, config: str, written: dict[str, FileRecord]) -> Path:
    """Publishes the checkpoint that lies complete in its staging folder.

    Args:
        folder: The checkpoints folder.
        content: The manifest, its files still to be filled in.
        config: The resolved config, as YAML.
        written: See `describe`.

    Returns:
        The iteration folder.

    Raises:
        OSError: the disk refused something; the previous checkpoint is still the published one.
    """
    staging, final = staging_folder(folder, content.step), folder_of(folder, content.step)
    write_synced(staging / manifest.CONFIG_FILE, config)
    for name in (manifest.METADATA_FILE, manifest.BACKEND_FILE):
        sync(staging / name)  # upstream does not flush all of what it writes itself
    files = describe(staging, written)
    Manifest(content.step, files, content.versions, content.data, content.extra).save(staging)
    staged_tracker = tracker.stage(folder, content.step)
    replaced = final.with_name(final.name + REPLACED)
    if not final.exists():
        staging.rename(final)
    elif not exchange(staging, final):  # the old one is damaged and passed over, of a future that was given up, or saved again
        shutil.rmtree(replaced, ignore_errors=True)
        final.rename(replaced)
        staging.rename(final)
    sync(folder)
    tracker.replace(folder, staged_tracker)
    shutil.rmtree(replaced, ignore_errors=True)
    discard(staging)
    return final
