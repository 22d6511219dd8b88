"""Which checkpoints of a folder are kept, and their removal."""

import shutil
from collections.abc import Iterable
from pathlib import Path

from ngpt.checkpoints import manifest
from ngpt.checkpoints.choice import folder_of, listing
from ngpt.checkpoints.manifest import Manifest

DELETING = ".deleting"
GIVEN_UP = "given_up"


def superseded(steps: Iterable[int], newest: int, keep_last: int | None, keep_every: int | None) -> list[int]:
    """The steps that may go once `newest` is published, oldest first.

    Args:
        steps: Of the checkpoints that are there.
        newest: The published one; it stays.
        keep_last: How many of the newest stay; None: all.
        keep_every: Multiples of it stay always; None: none for that reason.
    """
    if keep_last is None:
        return []
    past = sorted(step for step in set(steps) | {newest} if step <= newest)
    old = past[:-keep_last]
    return [step for step in old if keep_every is None or step % keep_every]


def give_up_future(folder: Path, start: int, newest: int) -> None:
    """Moves to `given_up/` what was trained beyond the step that this launch began at, once it has published its first own checkpoint.

    Somebody went back by hand, or what lies there is damaged. It must not be mistaken for this run's. Nothing is removed.
    """
    for step in listing(folder).steps:
        if step > start and step != newest:
            aside = folder / GIVEN_UP
            aside.mkdir(exist_ok=True)
            path, number = folder_of(folder, step), 0
            while (target := aside / (path.name + (f".{number}" if number else ""))).exists():
                number += 1
            path.rename(target)


def set_aside(folder: Path, newest: int, keep_last: int | None, keep_every: int | None) -> list[Path]:
    """Renames what `superseded` lets go to `iter_*.deleting`: a removal that is cut short leaves no half checkpoint under its name.

    Only folders that a manifest proves to be a checkpoint of that very step are touched, and links never.

    Returns:
        The renamed folders, to be given to `remove`; those that an earlier process did not finish are among them.
    """
    own = []
    for step in listing(folder).steps:
        path = folder_of(folder, step)
        found = manifest.read(path)
        if isinstance(found, Manifest) and found.step == step and not path.is_symlink():
            own.append(step)
    if keep_last is None or newest not in own:  # never the last intact one, whatever was asked for
        return []
    for step in superseded(own, newest, keep_last, keep_every):
        path = folder_of(folder, step)
        path.rename(path.with_name(path.name + DELETING))
    return sorted(path for path in folder.glob(f"iter_*{DELETING}") if not path.is_symlink())


def remove(folders: Iterable[Path]) -> None:
    """Removes folders; what cannot be removed is left for the next time."""
    for folder in folders:
        shutil.rmtree(folder, ignore_errors=True)
