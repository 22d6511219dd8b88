"""checkpoint.hf: a process beside the run writes published checkpoints for transformers as well, one at a time.

The launcher of rank 0 starts it, so no rank waits, forks or imports anything for it. The launcher learns of new checkpoints from the
tracker. The process (`launch.hf_worker`) has the lowest priority, one thread and no GPU. It writes into the checkpoint's own folder, so
whatever removes, replaces or moves the checkpoint does the same to its weights. The manifest does not list them.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

from ngpt.checkpoints import manifest, tracker
from ngpt.checkpoints.choice import folder_of
from ngpt.checkpoints.manifest import Manifest
from ngpt.config.errors import ConfigError
from ngpt.config.schema import Config
from ngpt.data.tokenizers import run_tokenizer
from ngpt.files import partial_folder
from ngpt.hf.tokenizer import write_tokenizer
from ngpt.shell import in_shell
from ngpt.stopping import stop_signals_blocked

from .environment import exporter_environment
from .leaving import signals_noted
from .run_folder import describe_death

FOLDER = "hf"  # inside an iteration folder
LOG_FILE = "logs/hf-export.log"  # what the process prints, in the run folder
SUPERSEDED = 3  # the process's exit code if the checkpoint is gone
POLL_SECONDS = 0.2


@dataclass(frozen=True)
class Request:
    """What `launch.hf_worker` is to write.

    Attributes:
        run: the run folder. step: the checkpoint's step.
        check: whether to verify the whole checkpoint first, as `ngpt export` does. A new checkpoint was hashed while it was written.
        room: bytes that must stay free on the disk for the next checkpoint.
        beside: whether ranks are training and need the cores.
    """

    run: str
    step: int
    check: bool
    room: int
    beside: bool


def weights_folder(checkpoint: Path) -> Path:
    """The folder of an iteration folder that holds its weights for transformers."""
    return checkpoint / FOLDER


def check_exportable(config: Config) -> None:
    """Refuses a run whose tokenizer cannot be exported for transformers: every export would fail.

    Raises:
        ConfigError: transformers cannot express the tokenizer, or its vocabulary file is gone.
    """
    if not config.checkpoint.hf:
        return
    with tempfile.TemporaryDirectory() as folder:
        try:
            write_tokenizer(run_tokenizer(config), Path(folder), config.train.seq_length)
        except ConfigError as error:
            rule = f"The run's tokenizer goes beside the weights: {error.path}: {error.got}. {error.rule}"
            raise ConfigError("checkpoint.hf", True, rule, "Set it to false, and call ngpt export --no-tokenizer") from error


@contextmanager
def hf_exports(config: Config, say: Callable[[str], None]) -> Iterator["HfExports"]:
    """The exports of a launch that holds the run's folders. On exit, an export in progress is ended.

    Args:
        say: prints a line for a person.
    """
    exports = HfExports(config, say)
    try:
        yield exports
    finally:
        exports.end()


@dataclass(frozen=True)
class _Export:
    """An export in progress: its step, its process, and `log_start`, the byte of the log where its lines begin."""

    step: int
    process: subprocess.Popen
    log_start: int


class HfExports:
    """Decides which checkpoint is exported when. Does nothing without `checkpoint.hf`. See `hf_exports`."""

    def __init__(self, config: Config, say: Callable[[str], None]):
        self.config, self.say = config, say
        self.checkpoints, self.log = Path(config.checkpoint.dir), Path(config.run.dir) / LOG_FILE
        self.last_step = config.train.stop_after or config.train.steps
        self.running: _Export | None = None
        self.waiting: int | None = None  # the next step to export
        self.seen: int | None = None  # the published step that was last seen
        self.found: int | None = None  # the step that was published before this launch
        if config.checkpoint.hf:
            self.found = tracker.read(self.checkpoints).step
            for left in self.checkpoints.glob(f"iter_*/{partial_folder(Path(FOLDER))}"):  # left by a launch that was killed
                shutil.rmtree(left, ignore_errors=True)

    def look(self, leaving: bool = False) -> None:
        """Starts an export if it can, and reports one that has ended. Called often while the ranks run; never waits.

        Args:
            leaving: a signal has asked the run to end, so the disk is reserved for the last checkpoint.
        """
        if not self.config.checkpoint.hf:
            return
        if leaving:
            self.end()
            return
        self._reap()
        step = tracker.read(self.checkpoints).step
        if step is not None and step != self.seen:
            self.seen = step
            if step < self.last_step:  # the last export waits for the summary, which its model card quotes
                self._queue(step)
        if self.running is None and self.waiting is not None:
            step, self.waiting = self.waiting, None
            self._start(step, beside=True)

    def finish(self, asked: list[signal.Signals]) -> None:
        """Exports the newest checkpoint and waits for it: the run has finished, and this is its last part.

        Args:
            asked: signals received during the run; signals that arrive now are added. Any of them ends the export and the wait.
        """
        step = tracker.read(self.checkpoints).step if self.config.checkpoint.hf else None
        if step is None:
            return
        out = weights_folder(folder_of(self.checkpoints, step))
        with signals_noted(asked):
            self._wait(asked)
            self._queue(step)
            if self.waiting is not None and not asked:
                self.say(f"writing the Hugging Face weights of step {step}")
                self.waiting = None
                self._start(step, beside=False)
                self._wait(asked)
        if self._is_written(step):
            self.say(f"Hugging Face weights of step {step}: {out}")
        elif asked:
            self.say(f"note: no Hugging Face weights of step {step}: ended by {asked[0].name}. The same command writes them")

    def end(self) -> None:
        """Ends an export in progress and removes what it has written."""
        self.waiting = None
        if self.running is None:
            return
        export, self.running = self.running, None
        export.process.kill()  # it ignores the gentler signals
        export.process.wait()
        shutil.rmtree(partial_folder(weights_folder(folder_of(self.checkpoints, export.step))), ignore_errors=True)

    def _is_written(self, step: int) -> bool:
        """Whether a step's weights are written. Does not raise if the file system does not answer: that must not end a run."""
        return os.path.isdir(weights_folder(folder_of(self.checkpoints, step)))

    def _queue(self, step: int) -> None:
        """Makes a step the next to export, in place of an older one that waits."""
        if self._is_written(step):
            return
        if self.waiting is not None and self.waiting != step:
            self.say(f"note: no Hugging Face weights of step {self.waiting}: those of step {step} are newer. {self._by_hand(self.waiting)}")
        self.waiting = step

    def _start(self, step: int, beside: bool) -> None:
        try:
            request = Request(self.config.run.dir, step, check=step == self.found, room=self._next_save(step), beside=beside)
            self.log.parent.mkdir(parents=True, exist_ok=True)
            with self.log.open("ab") as log, stop_signals_blocked():  # inherited: a signal to all of a job's processes is for its ranks
                start = log.seek(0, os.SEEK_END)
                process = subprocess.Popen(
                    export_command(request),
                    env=exporter_environment(),
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                )
        except OSError as error:  # for instance no room for the log, no memory, or a file system that does not answer
            self._failed(step, str(error))
            return
        self.running = _Export(step, process, start)

    def _next_save(self, step: int) -> int:
        """Bytes that the next checkpoint needs; 0 after the last."""
        found = manifest.read(folder_of(self.checkpoints, step)) if step < self.last_step else None
        return found.bytes if isinstance(found, Manifest) else 0

    def _wait(self, asked: Sequence[signal.Signals]) -> None:
        """Waits for an export in progress; a signal ends the export."""
        while self.running is not None:
            if asked:
                self.end()
                return
            try:
                self.running.process.wait(POLL_SECONDS)
            except subprocess.TimeoutExpired:
                continue
            self._reap()

    def _reap(self) -> None:
        if self.running is None or (code := self.running.process.poll()) is None:
            return
        export, self.running = self.running, None
        if code == SUPERSEDED:
            self.say(f"note: no Hugging Face weights of step {export.step}: its checkpoint was removed or replaced meanwhile")
        elif code != 0:
            self._failed(export.step, self._last_words(export.log_start) or describe_death(code))

    def _last_words(self, start: int) -> str:
        """The last line that the process printed."""
        try:
            with self.log.open("rb") as log:
                log.seek(start)
                lines = log.read().decode(errors="replace").split("\n")
        except OSError:
            return ""
        return next((line.strip() for line in reversed(lines) if line.strip()), "")

    def _failed(self, step: int, why: str) -> None:
        shutil.rmtree(partial_folder(weights_folder(folder_of(self.checkpoints, step))), ignore_errors=True)
        self.say(f"note: no Hugging Face weights of step {step}: {why.rstrip('.')}. {self._by_hand(step)}")

    def _by_hand(self, step: int) -> str:
        run, out = self.config.run.dir, weights_folder(folder_of(self.checkpoints, step))
        return f"By hand: {in_shell('ngpt', 'export', run, '--step', str(step), '--out', str(out))}"


def export_command(request: Request) -> list[str]:
    return [sys.executable, "-m", f"{__package__}.hf_worker", str(os.getpid()), json.dumps(asdict(request))]
