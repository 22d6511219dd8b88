"""One export of a run's checkpoint: `python -m launch.hf_worker PARENT REQUEST`. Started by `launch.hf_exports`, not by hand.

PARENT is the id of the process that starts this one, which ends when the parent ends. REQUEST: JSON of `Request`.
"""

import json
import os
import shutil
import sys
import time
import traceback
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from ngpt.checkpoints.choice import Choice, folder_of
from ngpt.config.errors import ConfigError
from ngpt.config.one_process import run_checkpoint, run_config
from ngpt.config.schema import Config
from ngpt.estimate.counts import count_parameters
from ngpt.files import new_folder
from ngpt.lifetime import end_with_parent

from .hf_exports import SUPERSEDED, Request, weights_folder

LOWEST_PRIORITY = 19
USER_ERROR, FAILURE = 2, 1


def main(arguments: Sequence[str]) -> int:
    """Writes the folder whole or not at all. If it fails, the last line that it prints says why.

    Returns:
        0; SUPERSEDED if the checkpoint was removed or replaced meanwhile; 1 or 2 for an error.
    """
    parent, text = arguments
    end_with_parent(int(parent))
    request = Request(**json.loads(text))
    if request.beside:
        step_back()
    cfg = run_config(Path(request.run))
    checkpoint = folder_of(cfg.checkpoint.dir, request.step)
    before = identity(checkpoint)
    try:
        print(export(cfg, request), flush=True)
    except Exception as error:
        if before is None or identity(checkpoint) != before:
            return SUPERSEDED
        expected = isinstance(error, ConfigError)
        print(error if expected else traceback.format_exc().rstrip(), flush=True)
        return USER_ERROR if expected else FAILURE
    return 0


def step_back() -> None:
    """Gives this process and its session the lowest priority. If the kernel groups by session, nice values count only within a group."""
    os.nice(LOWEST_PRIORITY)
    with suppress(OSError):  # this kernel has no such groups
        Path("/proc/self/autogroup").write_text(str(LOWEST_PRIORITY))  # the session is this process's own


def export(cfg: Config, request: Request) -> str:
    """Writes what `ngpt export --parity none` writes, into the checkpoint's folder. Returns a line on what it took.

    Raises:
        ConfigError: the checkpoint cannot be exported, or the disk has too little room.
        FileNotFoundError: another checkpoint has taken its name meanwhile.
    """
    started = time.monotonic()
    checkpoint = folder_of(cfg.checkpoint.dir, request.step)
    before = identity(checkpoint)
    choice = run_checkpoint(cfg, request.step) if request.check else Choice(checkpoint, request.step)
    check_room(cfg, checkpoint, request.room)
    from ngpt.hf import export as hf  # imports torch

    options = hf.Options()
    with new_folder(weights_folder(checkpoint), alone=True) as folder:
        target, written = hf.write_folder(cfg, choice, options, folder)
        hf.describe(cfg, choice, options, target, folder)
        if identity(checkpoint) != before:  # some shards may belong to the new checkpoint
            raise FileNotFoundError(str(checkpoint))
    what = f"step {request.step}: {target.name}, {written.parameters:,} parameters in {written.bytes / 1e6:,.1f} MB"
    return f"{what}, {time.monotonic() - started:.1f} s, {time.process_time():.1f} s of a CPU"


def check_room(cfg: Config, checkpoint: Path, room: int) -> None:
    """Raises ConfigError if fp32 weights would leave less than `room` bytes on the disk: the next checkpoint matters more."""
    size, free = 4 * count_parameters(cfg.model).total, shutil.disk_usage(checkpoint).free
    if free < size + room:
        rule = f"The weights take {size / 1e9:,.2f} GB, and the next checkpoint {room / 1e9:,.2f} GB"
        raise ConfigError(str(checkpoint), f"{free / 1e9:,.2f} GB are free", rule, "Make room, or keep fewer: checkpoint.keep_last")


def identity(folder: Path) -> tuple[int, int] | None:
    """Identifies the folder that has this name now; None if there is none."""
    try:
        found = folder.stat()
    except FileNotFoundError:
        return None
    return found.st_dev, found.st_ino


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
