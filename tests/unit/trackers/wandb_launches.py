"""Launches of a run through the real client of Weights & Biases, without a model, and what the client keeps of them.

Its files are records in LevelDB's log format behind a header of its own. Blocks of 32 KiB; a record is a checksum (4 bytes), a length (2),
a type (1: whole, 2: first part, 3: middle, 4: last) and its bytes; the rest of a block that is too short for these seven is padding.
Source: LevelDB, doc/log_format.md.
"""

import json
import os
import struct
import subprocess
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from ngpt.config import compose, dump

ROOT = Path(__file__).resolve().parents[3]
LAUNCH_SECONDS = 300  # a hang ends here; no statement about speed
BLOCK, HEADER, WHOLE, LAST = 32768, 7, 1, 4
needs_client = pytest.mark.skipif(find_spec("wandb") is None, reason="the client is not installed: pip install 'ngpt-megatron[wandb]'")

# What the last rank does. Arguments: the config, the status that the launch ends with, its first and its last step, what it waits for its
# trackers (seconds), and a signal that the client's process gets before the last step. Prints what a person would see.
_LAUNCH = """
import sys, time
from pathlib import Path
import psutil
import ngpt.trackers.base
from ngpt.config import load
from ngpt.stopping import block_stop_signals
from ngpt.trackers import trackers_of

config, status = sys.argv[1:3]
first, last, waits, number = map(int, sys.argv[3:])
ngpt.trackers.base.CLOSE_SECONDS = waits
block_stop_signals()
trackers = trackers_of(load(Path(config)), print)
trackers.open(first - 1)
for step in range(first, last + 1):
    if number and step == last:
        while trackers._running[0]._calls.qsize():  # until the client has what came before
            time.sleep(0.05)
        time.sleep(1)
        (client,) = [child for child in psutil.Process().children() if child.name() == "wandb-core"]
        client.send_signal(number)
        time.sleep(1)
    trackers.log(step, {"train/loss": 1 / step, "health/sqk/mean": float("nan")})
trackers.close(status)
left = [child for child in psutil.Process().children(recursive=True) if child.status() != psutil.STATUS_ZOMBIE]
print("closed", len(left), "children")
"""


def launch(
    folder: Path, status: str, first: int, last: int, *overrides: str, waits: int = 60, number: int = 0, **environment: str
) -> str:
    """What a launch of the run in `folder`/run prints before its last line; it must end by itself, without an error or a process left.

    Args:
        waits: seconds, for the trackers at its end.
        number: of a signal that the client gets before the last step.
        environment: variables of it beside this process's.
    """
    words = ["experiment=ngpt_tiny", "run.name=tracked", "logging.tensorboard=false", "logging.wandb.mode=offline"]
    dump(compose([*words, f"run.dir={folder / 'run'}", *overrides]), folder / "config.yaml")
    (folder / "run").mkdir(exist_ok=True)
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("WANDB_")}
    own = {"PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), inherited.get("PYTHONPATH")])), "HOME": str(folder)}
    arguments = [str(folder / "config.yaml"), status, str(first), str(last), str(waits), str(int(number))]
    done = subprocess.run(
        [sys.executable, "-c", _LAUNCH, *arguments],
        cwd=folder,
        env=inherited | own | {"WANDB_ERROR_REPORTING": "false"} | environment,
        capture_output=True,
        text=True,
        timeout=LAUNCH_SECONDS,
    )
    assert done.returncode == 0 and "Traceback" not in done.stderr, done.stderr
    said, _, end = done.stdout.rpartition("closed")
    assert end == " 0 children\n", done.stdout
    return said


class Kept:
    """What the client has kept of one launch offline.

    Attributes:
        run: the newest record of the run: run_id, project, display_name, run_group, tags; None where none was written down.
        config: key -> value, of all records.
        history: the rows in their order, without the client's own columns.
        exit_code: None where the run was not finished.
        step_metrics: glob or name -> the metric that it is drawn over.
        preempting: whether the launch said that the run will go on.
    """

    def __init__(self, path: Path):
        from wandb.proto import wandb_internal_pb2

        self.run: Any = None
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
    """What the launches of a run folder have kept offline, oldest first."""
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
