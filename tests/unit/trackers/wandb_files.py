"""Reads what the client of Weights & Biases keeps of a run: records in LevelDB's log format behind a header of its own.

Source: LevelDB, doc/log_format.md. Blocks of 32 KiB; a record is a checksum (4 bytes), a length (2), a type (1: whole, 2: first part,
3: middle, 4: last) and its bytes; what is left of a block that is too short for the seven is padding.
"""

import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from wandb.proto import wandb_internal_pb2

BLOCK, HEADER, WHOLE, LAST = 32768, 7, 1, 4


class Kept:
    """One launch's records.

    Attributes:
        run: the newest record of the run: run_id, project, display_name, run_group, tags.
        config: key -> value, of all records.
        history: the rows in their order, without the client's own columns.
        exit_code: None where the run was not finished.
        step_metrics: glob or name -> the metric that it is drawn over.
        preempting: whether the launch said that it is to go on.
    """

    def __init__(self, path: Path):
        self.config: dict[str, Any] = {}
        self.history: list[dict[str, Any]] = []
        self.step_metrics: dict[str, str] = {}
        self.exit_code, self.preempting = None, False
        for data in _records(path.read_bytes()):
            record = wandb_internal_pb2.Record.FromString(data)
            kind = record.WhichOneof("record_type")
            if kind == "run":
                self.run = record.run
                self.config |= {item.key: json.loads(item.value_json) for item in record.run.config.update}
            elif kind == "history":
                row = {(item.key or "/".join(item.nested_key)): json.loads(item.value_json) for item in record.history.item}
                self.history.append({name: value for name, value in row.items() if not name.startswith("_")})
            elif kind == "metric":
                self.step_metrics[record.metric.glob_name or record.metric.name] = record.metric.step_metric
            elif kind == "exit":
                self.exit_code = record.exit.exit_code
            elif kind == "preempting":
                self.preempting = True


def launches(run_dir: Path) -> list[Kept]:
    """What the offline launches of a run folder have kept, oldest first."""
    return [Kept(path) for path in sorted((run_dir / "wandb").glob("offline-run-*/*.wandb"), key=lambda path: path.stat().st_mtime_ns)]


def _records(data: bytes) -> Iterator[bytes]:
    assert data[:4] == b":W&B"
    position, parts = HEADER, b""
    while position + HEADER <= len(data):
        room = BLOCK - position % BLOCK
        if room < HEADER:
            position += room
            continue
        length, kind = struct.unpack("<HB", data[position + 4 : position + HEADER])
        parts += data[position + HEADER : position + HEADER + length]
        position += HEADER + length
        if kind in (WHOLE, LAST):
            yield parts
            parts = b""
