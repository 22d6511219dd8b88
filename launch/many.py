"""Runs many `ngpt` commands, each in its own process: one after another or side by side, with a share of the cores, and of the GPUs.

A member's output goes only to console.log in its folder, not to the terminal.
"""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from graphlib import TopologicalSorter
from pathlib import Path
from typing import IO

from ngpt.config.errors import ConfigError
from ngpt.files import last_lines

from .devices import gpu_names
from .environment import member_environment, visible_gpus
from .leaving import signals_noted
from .outcome import SIGNALLED_CODE
from .run_folder import CONSOLE_FILE, describe_death

WAITING, RUNNING, DONE, FAILED, BLOCKED, STOPPED = "waiting", "running", "done", "failed", "blocked", "stopped"
PROGRAM = (sys.executable, "-m", f"{__package__}.member")  # takes this process's id and a member's command
POLL_SECONDS = 0.1
REPORT_SECONDS = 5.0
KILL_SECONDS = 10.0  # how long a member has after a second Ctrl-C


@dataclass(frozen=True)
class Member:
    """One command among many.

    Attributes:
        name: unique within the group.
        folder: its run folder; console output goes to folder/console.log.
        command: words of ngpt: ("train", "experiment=NAME", ...) or ("report", RUN, ...).
        gpus: how many it needs; 0 on a CPU.
        is_done: whether nothing is left to do; called before it starts.
        after: members that must be done first; if one of them fails, this one is not started.
        undone: in one line, why it counts as failed if it ends without error and `is_done` says no; None: its exit code alone counts.
    """

    name: str
    folder: Path
    command: tuple[str, ...]
    gpus: int
    is_done: Callable[[], bool]
    after: tuple[str, ...] = ()
    undone: str | None = None


@dataclass
class State:
    """The state of a member.

    Attributes:
        status: waiting | running | done | failed | blocked (a member before it cannot be done) | stopped (a signal ended it).
        exit_code: its process's, 128 + n if signal n ended it; None if it has not ended.
        why: in one line, why it failed or is blocked.
        seconds: how long its process has run.
        gpus: its GPUs, as CUDA_VISIBLE_DEVICES names them.
    """

    member: Member
    status: str = WAITING
    exit_code: int | None = None
    why: str = ""
    seconds: float = 0.0
    gpus: tuple[str, ...] = ()


def check_per_gpu(per_gpu: int, parallel: int, most: int) -> None:
    """Checks how many members may share a GPU.

    Args:
        per_gpu: value of --per-gpu.
        parallel: value of --parallel.
        most: GPUs that the largest member needs.

    Raises:
        ConfigError: members cannot share GPUs like this.
    """
    if per_gpu < 1:
        raise ConfigError("--per-gpu", per_gpu, "Members that share a GPU are 1 or more", "Set --per-gpu 1, or leave it out")
    if per_gpu == 1:
        return
    if not gpu_names():
        raise ConfigError("--per-gpu", per_gpu, "No GPU is visible here", "Leave it out: on a CPU, members of --parallel N share the cores")
    if most > 1:
        rule = f"Members of one GPU can share it, and one needs {most} (cluster.gpus_per_node)"
        raise ConfigError("--per-gpu", per_gpu, rule, "Leave it out, or set cluster.gpus_per_node=1")
    if parallel < per_gpu:
        rule = f"No more than {parallel} run at a time (--parallel)"
        raise ConfigError("--per-gpu", per_gpu, rule, f"Set --parallel {per_gpu * len(gpu_names())}")


def run_members(
    members: Sequence[Member],
    parallel: int,
    report: Callable[[list[State]], None],
    program: Sequence[str] = PROGRAM,
    per_gpu: int = 1,
) -> list[State]:
    """Runs members until each is done, has failed or cannot start. One that fails does not stop the others.

    A stop signal is passed to all running members and nothing new starts. The call returns once they have left; a second Ctrl-C kills
    them. If this process ends for any reason, its members end too. Call it in the main thread.

    Args:
        members: each starts once those before it have started, there is room for it, and its `after` members are done.
        parallel: how many members run at a time.
        report: called after every change and every few seconds. It must not wait.
        program: starts a member's process; this process's id and the member's command follow it.
        per_gpu: how many members may share a GPU (see `check_per_gpu`). A member gets the GPUs that the fewest others use.

    Returns:
        The members' states, in the same order. Those that a signal kept from starting are `waiting`.

    Raises:
        ConfigError: a member needs more GPUs than there are.
    """
    names = [member.name for member in members]
    assert len(set(names)) == len(names) and {name for member in members for name in member.after} <= set(names)
    TopologicalSorter({member.name: member.after for member in members}).prepare()  # raises if members wait for each other
    gpus = visible_gpus()
    for member in members:
        if member.gpus > len(gpus):
            rule = f"It needs {member.gpus} GPUs, and {len(gpus)} are visible here"
            raise ConfigError("CUDA_VISIBLE_DEVICES", member.name, rule, "Show more GPUs, or run it where they are")
    return _Runner(members, parallel, report, tuple(program), gpus, per_gpu).run()


@dataclass
class _Process:
    popen: subprocess.Popen
    log: IO[bytes]
    log_start: int
    started: float


class _Runner:
    def __init__(
        self,
        members: Sequence[Member],
        parallel: int,
        report: Callable[[list[State]], None],
        program: tuple[str, ...],
        gpus: Sequence[str],
        per_gpu: int,
    ):
        self.states = {member.name: State(member) for member in members}
        self.parallel, self.report, self.program, self.per_gpu = parallel, report, program, per_gpu
        self.users = dict.fromkeys(gpus, 0)  # of each GPU
        self.processes: dict[str, _Process] = {}
        self.asked: list[signal.Signals] = []
        self.passed_on, self.interrupts = 0, 0
        self.kill_at: float | None = None
        self.reported = -REPORT_SECONDS

    def run(self) -> list[State]:
        """As `run_members`."""
        with signals_noted(self.asked):
            try:
                while True:
                    changed = self._collect()
                    self._pass_on_signals()
                    changed |= not self.asked and self._start_members()
                    if changed or time.monotonic() - self.reported > REPORT_SECONDS:
                        self._report()
                    waiting = any(state.status == WAITING for state in self.states.values())
                    if not self.processes and (self.asked or not waiting):
                        break
                    time.sleep(POLL_SECONDS)
            finally:
                for process in self.processes.values():  # after an error here they must not keep the machine
                    process.popen.kill()
        return list(self.states.values())

    def _report(self) -> None:
        self.reported = time.monotonic()
        for name, process in self.processes.items():
            self.states[name].seconds = self.reported - process.started
        self.report(list(self.states.values()))

    def _start_members(self) -> bool:
        """Starts members that are due and have room. Returns whether any state changed."""
        changed = False
        for state in self.states.values():
            if state.status != WAITING or not self._is_due(state):
                changed |= state.status == BLOCKED
                continue
            if len(self.processes) >= self.parallel or state.member.gpus > len(self._free_gpus()):
                break
            changed = True
            try:
                if state.member.is_done():
                    state.status = DONE
                else:
                    self._start(state)
            except (ConfigError, OSError) as error:
                state.status, state.why = FAILED, str(error)
        return changed

    def _is_due(self, state: State) -> bool:
        """Whether all members before it are done. Marks it as blocked if they cannot be."""
        before = [self.states[name] for name in state.member.after]
        lost = [other for other in before if other.status in (FAILED, BLOCKED, STOPPED)]
        if lost:
            state.status, state.why = BLOCKED, f"{lost[0].member.name} is {lost[0].status}"
        return all(other.status == DONE for other in before)

    def _free_gpus(self) -> list[str]:
        """The GPUs that take another member; those with the fewest first."""
        return sorted((gpu for gpu, users in self.users.items() if users < self.per_gpu), key=lambda gpu: self.users[gpu])

    def _start(self, state: State) -> None:
        member = state.member
        member.folder.mkdir(parents=True, exist_ok=True)
        gpus = self._free_gpus()[: member.gpus]
        log = (member.folder / CONSOLE_FILE).open("ab")
        popen = subprocess.Popen(
            [*self.program, str(os.getpid()), *member.command],
            env=member_environment(gpus, min(self.parallel, len(self.states)), self.per_gpu),
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # so that a terminal's Ctrl-C arrives once, passed on by this process
        )
        for gpu in gpus:
            self.users[gpu] += 1
        self.processes[member.name] = _Process(popen, log, log.tell(), time.monotonic())
        state.status, state.gpus = RUNNING, tuple(gpus)

    def _collect(self) -> bool:
        """Records processes that have ended. Returns whether there were any."""
        ended = [name for name, process in self.processes.items() if process.popen.poll() is not None]
        for name in ended:
            process, state = self.processes.pop(name), self.states[name]
            process.log.close()
            for gpu in state.gpus:
                self.users[gpu] -= 1
            code = process.popen.returncode
            state.seconds, state.exit_code = time.monotonic() - process.started, 128 - code if code < 0 else code
            by_signal = code < 0 or state.exit_code in (SIGNALLED_CODE, 128 + signal.SIGINT)
            if code == 0 and state.member.undone is not None and not state.member.is_done():
                state.status, state.why = FAILED, state.member.undone
            elif code == 0:
                state.status = DONE
            elif code == SIGNALLED_CODE or (self.asked and by_signal):
                state.status = STOPPED
            else:
                said = [line.strip() for line in last_lines(state.member.folder / CONSOLE_FILE, start=process.log_start) if line.strip()]
                word = said[-1].removeprefix("ngpt train failed: ") if said and code > 0 else describe_death(code)
                state.status, state.why = FAILED, word
        return bool(ended)

    def _pass_on_signals(self) -> None:
        for number in self.asked[self.passed_on :]:
            self.passed_on += 1
            self.interrupts += number == signal.SIGINT
            if self.interrupts > 1:  # on which `ngpt train` kills its workers
                self.kill_at = time.monotonic() + (KILL_SECONDS if self.interrupts == 2 else 0.0)
            for process in self.processes.values():
                process.popen.send_signal(number)
        if self.kill_at is not None and time.monotonic() >= self.kill_at:
            for process in self.processes.values():
                process.popen.kill()
