"""The line that says why a launch failed, from what its ranks left in the run folder. `cause` reads it; the rest picks and words it."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ngpt.progress import FAILURE_FILE, GRADIENTS, HANG, describe, in_ranges, order, read_heartbeats, read_records

Record = dict[str, Any]


def cause(run_dir: Path, failure: Record) -> str:
    """The line for the first failure. For a hang it combines all ranks, since each knows only its own part."""
    if failure.get("kind") != HANG:
        return f"rank {failure['rank']}: {failure['error']}: {failure['message']}"
    records = read_records(run_dir, FAILURE_FILE.format(rank="*"))
    return hang_cause([record for record in records if record.get("kind") == HANG], read_heartbeats(run_dir))


def hang_cause(records: Sequence[Record], heartbeats: Sequence[Record] = ()) -> str:
    """Names the ranks that lag behind, and where the others wait.

    Args:
        records: Failure records of kind "hang", see `Watchdog.end_rank`.
        heartbeats: Of all ranks. A rank without a record could not write one (it was stopped, or its machine is gone): its heartbeat
            says where it is.
    """
    size = records[0]["world_size"]
    recorded = {record["rank"] for record in records}
    silent = [beat for beat in heartbeats if beat["rank"] < size and beat["rank"] not in recorded]
    everyone = [*records, *silent]
    lowest = min(map(_reached, everyone))
    behind = [record for record in everyone if _reached(record) == lowest]
    others = [record for record in everyone if _reached(record) != lowest]
    return f"hang: {_stuck(behind, recorded, alone=not others)}{_waiting(others)}{_unheard(size, everyone)}"


def _reached(record: Record) -> tuple:
    """Sort key for a rank's progress. Within a step, a rank that waits for others is ahead of one that does not."""
    waits = record.get("waits", record["operation"] == GRADIENTS)
    step, *rest = order(record["operation"], record["step"], record["microbatch"])
    return step, waits, *rest, *_collective(record)


def _collective(record: Record) -> tuple[int, bool]:
    """Sort key by the collective that the rank's device has not finished; one not yet started is further behind. Equal if unknown."""
    collective = record.get("collective") or {}
    return collective.get("number") or 0, collective.get("state") == "started"


def _stuck(behind: list[Record], recorded: set[int], alone: bool) -> str:
    first = behind[0]
    ranks, where = in_ranges(record["rank"] for record in behind), _where(first)
    has = "have" if len(behind) > 1 else "has"
    longest = max(record["idle_s"] for record in behind)
    if first["rank"] not in recorded:
        return f"{ranks} {has} not answered since {where} (stopped, or its machine is gone)"
    line = f" ({first['line']})" if first.get("line") else ""
    words = f"{ranks} {has} been in {where} for {longest:.0f} s{line}"
    return f"{words}: no rank is behind the others" if alone and len(behind) > 1 else words


def _waiting(others: list[Record]) -> str:
    """`; ranks 0, 2 waited for it in the gradient reduction of step 6`, one part per place."""
    places: dict[str, list[int]] = {}
    for record in sorted(others, key=_reached):
        places.setdefault(_where(record), []).append(record["rank"])
    return "".join(f"; {in_ranges(ranks)} waited in {where}" for where, ranks in places.items())


def _unheard(size: int, everyone: list[Record]) -> str:
    missing = set(range(size)) - {record["rank"] for record in everyone}
    return f"; nothing is known of {in_ranges(missing)}" if missing else ""


def _where(record: Record) -> str:
    return describe(record["operation"], record["step"], record["microbatch"])
