"""sweep.json: what a sweep's folder says of its members. Each member is a run in its own folder inside it."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from ngpt.progress import write_json

SWEEP_FILE = "sweep.json"


@dataclass
class SweptRun:
    """A member of a sweep.

    Attributes:
        name: of its folder.
        values: of the swept keys, as typed.
        command: the words of `ngpt` that train it alone.
        status: waiting | running | done | failed | stopped, as the last launch of the sweep saw it.
        exit_code: of its last start; None where it has not ended.
        why: the reason that it failed.
        val_loss: the newest, in nats per token.
        changed: when its status last changed, in UTC.
    """

    name: str
    values: dict[str, str]
    command: list[str]
    status: str = "waiting"
    exit_code: int | None = None
    why: str = ""
    step: int | None = None
    val_loss: float | None = None
    changed: str | None = None


@dataclass
class Sweep:
    """A sweep.

    Attributes:
        fixed: words that all members share.
        swept: keys that differ between them.
        command: the command line that continues it.
    """

    name: str
    fixed: list[str]
    swept: list[str]
    command: str
    members: list[SweptRun] = field(default_factory=list)


def is_sweep(folder: Path) -> bool:
    return (Path(folder) / SWEEP_FILE).is_file()


def read_sweep(folder: Path) -> Sweep | None:
    """None where the folder is no sweep's, or its file cannot be read."""
    try:
        content = json.loads((Path(folder) / SWEEP_FILE).read_text(encoding="utf-8"))
        return Sweep(**content | {"members": [SweptRun(**member) for member in content["members"]]})
    except (OSError, ValueError, TypeError, KeyError):
        return None


def way_to_a_run(folder: Path) -> str:
    """What to name in place of a folder that holds no run: if it is a sweep's, one of its members."""
    sweep = read_sweep(folder)
    members = [folder / member.name for member in sweep.members] if sweep else []
    if made := [member for member in members if member.is_dir()]:
        return f"It holds a sweep: name a run of it, for instance {made[0]}"
    return "Name one, for instance runs/quickstart"


def write_sweep(folder: Path, sweep: Sweep) -> None:
    """Replaces the file in one move."""
    write_json(Path(folder) / SWEEP_FILE, asdict(sweep), indent=1)


def without_seed(values: dict[str, str]) -> dict[str, str]:
    """A member's values without its seed: what it shares with members that differ from it in the seed alone."""
    return {key: value for key, value in values.items() if key != "train.seed"}


def by_seed(members: Sequence[SweptRun]) -> list[list[SweptRun]]:
    """The members in groups that differ in the seed alone, ordered by the first member of each."""
    groups: dict[tuple, list[SweptRun]] = {}
    for member in members:
        groups.setdefault(tuple(without_seed(member.values).items()), []).append(member)
    return list(groups.values())
