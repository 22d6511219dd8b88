"""A thread beside the training loop: it writes this rank's heartbeat, and ends the rank when it makes no progress.

Every rank waits for every other one at the next collective, so that one stuck rank stops them all. Each rank's watchdog then records where
its own rank is; the launcher names the one that is behind (launch/failures.py).
"""

import faulthandler
import linecache
import os
import socket
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import FrameType

from megatron_ext.training.flight_recorder import dump_flight_recorder
from ngpt.progress import END, FAILURE_FILE, HANG, HEARTBEATS, LOAD, SAVE, STARTUP, Progress, describe, read_records, write_json

# Start-up, loads, saves and the first step, which compiles kernels, take longer than any later operation.
SLOW_OPERATIONS, SLOW_FACTOR = (STARTUP, LOAD, SAVE), 6
HEARTBEAT_SECONDS, POLL_SECONDS = 5.0, 1.0
# How long a rank that has left its record waits for the others to leave theirs. The end of one rank ends them all.
GRACE_SECONDS = 20.0
EXIT_CODE = 1
_OURS = ("megatron_ext", "megatron", "ngpt")


class Watchdog:
    """Watches one rank until `stop`.

    Args:
        progress: Where the rank is.
        run_dir: Gets `heartbeat/rank<N>.json`, and after a hang `logs/hang_rank<N>.txt` and the failure record.
        timeout_s: How long the rank may stay without a mark; None: only the heartbeat is written.
        clock: Never jumps, unlike the time of day.
        end: Ends the process; it does not return.
    """

    def __init__(
        self,
        progress: Progress,
        run_dir: Path,
        rank: int,
        world_size: int,
        timeout_s: float | None,
        clock: Callable[[], float] = time.monotonic,
        end: Callable[[int], None] = os._exit,
    ):
        self.progress, self.run_dir, self.rank, self.world_size, self.timeout_s = progress, run_dir, rank, world_size, timeout_s
        self.clock, self.end = clock, end
        self.main_thread = threading.get_ident()
        self.idle_s, self.seen = 0.0, progress.place.marks
        self.polled, self.beaten = clock(), -HEARTBEAT_SECONDS
        self.old_hangs: dict[int, float] = {}
        self.old_hangs = self._hangs()  # of an earlier launch, if its folder was not cleared yet
        self.stopped = threading.Event()
        self.thread = threading.Thread(target=self._run, name="watchdog", daemon=True)

    def start(self) -> None:
        self.beat()
        self.thread.start()

    def stop(self) -> None:
        """Stop watching, and say in the heartbeat that the rank has come to its end."""
        self.stopped.set()
        self.thread.join()
        self.progress.mark(END)
        self.beat()

    def _run(self) -> None:
        while not self.stopped.wait(POLL_SECONDS):
            try:
                self.poll()
            except Exception as error:  # a full disk, say: the run itself decides whether it goes on
                print(f"watchdog of rank {self.rank}: {error}", file=sys.stderr)

    def poll(self) -> None:
        """One look at the rank."""
        now, marks = self.clock(), self.progress.place.marks
        # A process that was stopped (SIGSTOP, a debugger) or starved was not idle, so no poll counts for more than two.
        self.idle_s = 0.0 if marks != self.seen else self.idle_s + min(now - self.polled, 2 * POLL_SECONDS)
        self.seen, self.polled = marks, now
        if self.is_hung():
            self.end_rank()
        elif now - self.beaten >= HEARTBEAT_SECONDS:
            self.beaten = now
            self.beat()

    def allowance_s(self) -> float:
        """How long the rank may stay where it is."""
        slow = self.progress.place.operation in SLOW_OPERATIONS or self.progress.steps == 0
        return self.timeout_s * (SLOW_FACTOR if slow else 1)

    def is_hung(self) -> bool:
        """Whether there was no progress for too long, or for a while since another rank gave up: then one waits for the other in vain."""
        if self.timeout_s is None:
            return False
        if self.idle_s >= self.allowance_s():
            return True
        return self.idle_s >= min(self.timeout_s, GRACE_SECONDS) / 4 and bool(self._hangs())

    def _hangs(self) -> dict[int, float]:
        """Ranks that have given up since this one started, and when."""
        records = read_records(self.run_dir, FAILURE_FILE.format(rank="*"))
        times = {record["rank"]: record["time"] for record in records if record.get("kind") == HANG}
        return {rank: when for rank, when in times.items() if self.old_hangs.get(rank) != when}

    def beat(self) -> None:
        """Write the heartbeat."""
        write_json(self.run_dir / HEARTBEATS / f"rank{self.rank}.json", self._state() | {"step_time_s": self.progress.step_time_s})

    def _state(self) -> dict:
        place = self.progress.place
        return {
            "rank": self.rank,
            "world_size": self.world_size,
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "time": time.time(),
            "step": place.step,
            "operation": place.operation,
            "microbatch": place.microbatch,
            "marks": place.marks,
            "idle_s": round(self.idle_s, 1),
        }

    def end_rank(self) -> None:
        """Record where the rank is stuck, give the others time to do the same, and end the process: nothing else can."""
        try:
            self._leave_record()
            waited = 0.0
            while waited < GRACE_SECONDS and len(self._hangs()) < self.world_size:
                time.sleep(POLL_SECONDS / 2)
                waited += POLL_SECONDS / 2
        except Exception as error:  # the disk may be what hangs or is full
            print(f"rank {self.rank}: no progress for {self.idle_s:.0f} s; not recorded: {error}", file=sys.stderr, flush=True)
        finally:
            self.end(EXIT_CODE)

    def _leave_record(self) -> None:
        state = self._state()
        line, waits = stuck_at(sys._current_frames().get(self.main_thread))
        where = describe(state["operation"], state["step"], state["microbatch"])
        message = f"no progress for {self.idle_s:.0f} s in {where} ({line})"
        logs = self.run_dir / "logs"
        logs.mkdir(parents=True, exist_ok=True)
        with (logs / f"hang_rank{self.rank}.txt").open("w", encoding="utf-8") as stacks:
            stacks.write(f"rank {self.rank} on {state['host']}, process {state['pid']}: {message}\n\n")
            stacks.flush()
            faulthandler.dump_traceback(stacks, all_threads=True)
        collective = dump_flight_recorder(logs / f"hang_rank{self.rank}.flight_recorder.json")
        record = {"error": "Hang", "message": message, "kind": HANG, "line": line, "waits": waits, "collective": collective}
        write_json(self.run_dir / FAILURE_FILE.format(rank=self.rank), state | record)
        print(f"rank {self.rank}: {message}; stacks in {logs}/hang_rank{self.rank}.txt", file=sys.stderr, flush=True)


def stuck_at(frame: FrameType | None) -> tuple[str, bool]:
    """(innermost line of our or Megatron's code, whether it waits for other ranks) of a thread's stack."""
    waits = False
    while frame is not None:
        module = frame.f_globals.get("__name__", "")
        source = linecache.getline(frame.f_code.co_filename, frame.f_lineno)
        waits = waits or module.startswith("torch.distributed") or ".wait(" in source  # the handle of an asynchronous collective
        if module.split(".")[0] in _OURS:
            return f"{module.replace('.', '/')}.py:{frame.f_lineno}", waits
        frame = frame.f_back
    return "outside of our code", waits
