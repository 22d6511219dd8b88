"""What NCCL did last on this rank, from torch's flight recorder (a ring buffer of collectives; launch/environment.py sets its size)."""

import json
from pathlib import Path
from typing import Any

import torch.distributed as dist


def dump_flight_recorder(path: Path) -> dict[str, Any] | None:
    """Write the recorded collectives to `path`.

    Returns:
        The oldest one that has not completed, see `oldest_open`; None without NCCL.
    """
    if not (dist.is_available() and dist.is_initialized() and dist.get_backend() == "nccl"):
        return None
    try:
        from torch._C._distributed_c10d import _dump_nccl_trace_json

        text = _dump_nccl_trace_json(includeCollectives=True, onlyActive=False)
    except Exception as error:  # torch-internal, so the rest of the record is written without it
        return {"error": f"{type(error).__name__}: {error}"}
    text = text.decode() if isinstance(text, bytes) else text
    path.write_text(text, encoding="utf-8")
    return oldest_open(json.loads(text).get("entries", []))


def oldest_open(entries: list[dict[str, Any]]) -> dict[str, Any] | None:
    """Name, number in its group, sizes and state of the first collective that is not completed; None where all are.

    `scheduled`: this rank has not reached it on the device; `started`: it has, and waits there for others.
    """
    for entry in entries:
        if entry.get("state") != "completed" and not entry.get("retired", False):
            return {
                "name": entry.get("profiling_name"),
                "number": entry.get("collective_seq_id"),
                "group": entry.get("process_group"),
                "state": entry.get("state"),
                "sizes": entry.get("input_sizes"),
            }
    return None
