"""Weights & Biases. Its client uploads figures from a process of its own, or keeps them in <run.dir>/wandb for `wandb sync`.

A run folder is one run there, however often it is launched: the run's id is made once and kept in wandb_run.json. The server takes no
figure back. So figures of steps beyond a launch's last checkpoint stay there, beside those that the next launch sends.
Figures are drawn over our `step`, which may repeat, and not over the client's own row count.
"""

import dataclasses
import json
import secrets
import time
from collections import deque
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil

from ngpt.config.errors import ConfigError
from ngpt.config.schema import Config
from ngpt.files import replacing
from ngpt.trackers.base import first_line

RUN_FILE = "wandb_run.json"
UPLOAD_SECONDS = 15  # after the last figure; shorter than what a run waits for its trackers
FLUSH_SECONDS = 20  # the client writes a figure down within 15
SERVICE = "wandb-core"  # the name of the client's process


class WeightsAndBiases:
    """One W&B run for a run folder. The API key comes from the client's own settings (`wandb login`, WANDB_API_KEY).

    Where the server does not start a run, figures are kept as with mode=offline.
    """

    name = "Weights & Biases"

    def __init__(self, cfg: Config):
        import wandb

        self.cfg, self.wandb = cfg, wandb
        self.mode, self.abandoned = cfg.logging.wandb.mode, False
        self.run: Any = None
        self.recent: deque[tuple[float, dict[str, float]]] = deque()  # when, row

    def open(self, start_step: int) -> str | None:
        folder, line = Path(self.cfg.run.dir), None
        self.run_id = own_run_id(folder)
        try:
            self._init()
        except Exception as error:
            if self.abandoned:
                raise
            self._end_service()  # it may still wait for the server, under this id
            if self.mode == "online" and isinstance(error, self.wandb.Error):  # no answer, no key, no such entity
                self.mode = "offline"
                line = f"note: W&B has no run for this one ({first_line(error)}); {folder}/wandb keeps the figures for `wandb sync`"
            self._init()
        if self.mode == "online":
            record_run(folder, {"id": self.run_id, "entity": self.run.entity, "project": self.run.project, "url": self.run.url})
            line = f"W&B run: {self.run.url}"
        return line

    def log(self, step: int, figures: Mapping[str, float]) -> None:
        row, now = {"step": step, **figures}, time.monotonic()
        self._call(lambda: self.run.log(row))
        self.recent.append((now, row))
        while now - self.recent[0][0] > FLUSH_SECONDS:
            self.recent.popleft()

    def close(self, status: str) -> None:
        if status == "signalled":
            self._call(lambda: self.run.mark_preempting())  # with an exit code that is not 0: shown as preempted, not as failed
        self._call(lambda: self.run.finish(exit_code=0 if status in ("finished", "stopped") else 1))
        self.wandb.teardown()

    def abandon(self) -> None:
        self.abandoned = True
        self._end_service()

    def _init(self) -> None:
        options = self.cfg.logging.wandb
        self.run = self.wandb.init(
            mode=self.mode,
            id=self.run_id,
            resume="allow",
            name=self.cfg.run.name,
            project=options.project,
            entity=options.entity,
            group=options.group,
            tags=options.tags or None,
            config=shown_config(self.cfg),
            dir=self.cfg.run.dir,
            # The run folder has the output and the state of the code.
            settings=self.wandb.Settings(
                console="off", save_code=False, disable_code=True, disable_git=True, quiet=True, finish_timeout=UPLOAD_SECONDS
            ),
        )
        self.run.define_metric("*", step_metric="step")

    def _call(self, call: Callable[[], None]) -> None:
        """Calls the client. Where its service has died, a new one goes on with the run: a scheduler's SIGTERM to every process of a job
        ends the service, and the run still has a step and a checkpoint to go."""
        try:
            call()
        except Exception:
            if self.abandoned:
                raise
            self._end_service()
            self._init()
            for _, row in self.recent:  # the old one may not have written them; a repeat does no harm
                self.run.log(row)
            call()

    def _end_service(self) -> None:
        with suppress(psutil.Error):
            for child in psutil.Process().children():
                with suppress(psutil.Error):
                    if child.name() == SERVICE:
                        child.kill()  # every call that waits for it raises
        with suppress(Exception, SystemExit):  # it ends the process with the service's code where that was killed
            self.wandb.teardown()  # otherwise it would be tried when the process exits


def own_run_id(folder: Path) -> str:
    """The id of a run folder's W&B run, made at the first call.

    Raises:
        ConfigError: the file that keeps it is damaged.
    """
    path = folder / RUN_FILE
    if not path.exists():
        record_run(folder, {"id": secrets.token_hex(4)})
    try:
        run_id = json.loads(path.read_bytes())["id"]
        assert isinstance(run_id, str)
    except (ValueError, KeyError, TypeError, AssertionError):
        rule = "It keeps the id of the W&B run that this run goes on with"
        raise ConfigError(str(path), "unreadable", rule, "Restore it; or remove it, and the next launch begins a new one") from None
    return run_id


def record_run(folder: Path, known: Mapping[str, str | None]) -> None:
    """Keeps what is known of the W&B run: its id, and once a server has it its entity, project and URL."""
    with replacing(folder / RUN_FILE) as stream:
        stream.write((json.dumps(known, indent=2) + "\n").encode())


def shown_config(cfg: Config) -> dict[str, Any]:
    """The config without what may be secret: cluster.environment may hold keys."""
    config = dataclasses.asdict(cfg)
    del config["cluster"]["environment"]
    return config
