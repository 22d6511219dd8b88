"""Which checkpoint of a folder is loaded. Launcher and workers decide it here and nowhere else."""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from ngpt.checkpoints import manifest, tracker
from ngpt.checkpoints.manifest import Damage
from ngpt.checkpoints.tracker import Tracker
from ngpt.config.errors import ConfigError

RULE = "A checkpoint is loaded as it was written or not at all"


@dataclass(frozen=True)
class Choice:
    """A checkpoint to load.

    Attributes:
        folder: Its iteration folder.
        step: Its step.
        passed_over: What is wrong with the newer ones, newest first; empty where the published one is taken.
    """

    folder: Path
    step: int
    passed_over: tuple[Damage, ...] = ()

    def note(self) -> str | None:
        """A line for the person at the terminal where it is not the published one."""
        if not self.passed_over:
            return None
        return f"note: {'; '.join(map(str, self.passed_over))}. The newest intact checkpoint is taken instead: {self.folder}"


@dataclass(frozen=True)
class Listing:
    """What a checkpoints folder holds: its tracker, and the steps of its iteration folders, newest first."""

    folder: Path
    tracker: Tracker
    steps: tuple[int, ...]


def folder_of(folder: Path | str, step: int) -> Path:
    return Path(folder) / f"iter_{step:07d}"


def listing(folder: Path | str) -> Listing:
    """Reads a checkpoints folder; one that does not exist counts as empty. Names that no save would give are ignored."""
    folder = Path(folder)
    steps = []
    if folder.is_dir():
        for path in folder.iterdir():
            if re.fullmatch(r"iter_[0-9]{7,12}", path.name, re.ASCII) and path.is_dir():
                step = int(path.name.removeprefix("iter_"))
                if folder_of(folder, step).name == path.name:
                    steps.append(step)
    return Listing(folder, tracker.read(folder), tuple(sorted(steps, reverse=True)))


def _was_finished(folder: Path) -> bool:
    """Whether a save was completed here, whatever has happened to the folder since. Each version writes one of these files last."""
    return any((folder / name).exists() for name in (manifest.NAME, manifest.CONFIG_FILE, manifest.BACKEND_FILE))


def is_empty(found: Listing) -> bool:
    """Whether nothing was ever published: a run starts at step 0. What an interrupted first save left does not count."""
    return found.tracker.is_missing and not any(_was_finished(folder_of(found.folder, step)) for step in found.steps)


def leftovers(found: Listing) -> str | None:
    """A note for a run that starts over although a first save had begun; None where nothing is left of one."""
    begun = [folder_of(found.folder, step) for step in found.steps] + sorted((found.folder / ".saving").glob("iter_*"))
    if not is_empty(found) or not begun:
        return None
    return f"note: {begun[-1]} is what an interrupted first save has left; no checkpoint was published, and the run starts from step 0"


def choose(found: Listing, fallback: bool, inspect: Callable[[Path], Damage | None]) -> Choice | None:
    """The checkpoint to load: the published one, or the newest intact one before it.

    Args:
        found: What the folder holds.
        fallback: Whether an older one may be taken.
        inspect: Says what is wrong with an iteration folder.

    Returns:
        None where nothing was ever published.

    Raises:
        ConfigError: the published one is damaged and no older one is intact, or none may be taken.
    """
    if is_empty(found):
        return None
    passed, steps = _published(found)
    for step in steps:
        if passed and not fallback:
            break
        folder = folder_of(found.folder, step)
        damage = inspect(folder)
        if damage is None:
            return Choice(folder, step, tuple(passed))
        passed.append(damage)
    raise _refusal(found, passed, steps, fallback, inspect)


def _published(found: Listing) -> tuple[list[Damage], list[int]]:
    """What is wrong with the tracker, and the steps that may be loaded, best first."""
    named, steps = found.tracker.step, list(found.steps)
    if named is None:
        return [Damage(found.tracker.path, found.tracker.problem or "missing; it names the checkpoint to load")], steps
    missing = [] if named in steps else [Damage(folder_of(found.folder, named), f"missing, and {found.tracker.path.name} names it")]
    # Later checkpoints belong to a future that was given up: somebody wrote an earlier step into the tracker.
    return missing, [step for step in steps if step <= named]


def _refusal(
    found: Listing, passed: Sequence[Damage], steps: Sequence[int], fallback: bool, inspect: Callable[[Path], Damage | None]
) -> ConfigError:
    first, *others = passed
    seen = {path for damage in passed for path in (damage.path, damage.path.parent)}
    rest = (step for step in steps if folder_of(found.folder, step) not in seen) if not fallback else iter(())
    older = next((step for step in rest if inspect(folder_of(found.folder, step)) is None), None)
    got = first.what if not others else f"{first.what} (and no older one is intact: {'; '.join(map(str, others))})"
    if older is not None:
        way_out = f"Set checkpoint.fallback=true to go on from the newest intact one, step {older}"
    else:
        way_out = f"Restore it from a copy; or remove {found.folder} to start again"
    return ConfigError(str(first.path), got, RULE, way_out)


def choose_by_sizes(folder: Path | str, fallback: bool = True, verify: str = "full") -> Choice | None:
    """`choose` with a look at names and sizes only, which is what a launcher can afford."""
    return choose(listing(folder), fallback, lambda path: manifest.inspect(path, sizes=verify != "none"))
