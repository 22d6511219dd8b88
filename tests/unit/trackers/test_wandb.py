"""Weights & Biases through its real client, offline: what a run folder's files hold, over several launches, and whatever goes wrong."""

import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from ngpt.config import ConfigError, compose, dump
from ngpt.trackers import check_installed
from ngpt.trackers.weights_and_biases import RUN_FILE, own_run_id

pytest.importorskip("wandb", reason="the client is not installed: pip install 'ngpt-megatron[wandb]'")

ROOT = Path(__file__).resolve().parents[3]
LAUNCH_SECONDS = 300  # a hang ends here; no statement about speed
# A launch of a run as the last rank sees it. Its arguments: the config, the status that it ends with, the first and the last step, and a
# signal that its client's process gets before the last step. Prints what a person would see.
LAUNCH = """
import sys, time
from pathlib import Path
import psutil
import ngpt.trackers.base
from ngpt.config import load
from ngpt.stopping import block_stop_signals
from ngpt.trackers import trackers_of

config, status, first, last, *numbers = sys.argv[1:]
block_stop_signals()
ngpt.trackers.base.CLOSE_SECONDS = 60.0 if status != "failed" else 3.0
trackers = trackers_of(load(Path(config)), print)
trackers.open(int(first) - 1)
for step in range(int(first), int(last) + 1):
    if numbers and step == int(last):
        while not (clients := [child for child in psutil.Process().children() if child.name() == "wandb-core"]):
            time.sleep(0.05)
        time.sleep(1)
        for number in numbers:
            clients[0].send_signal(int(number))
        time.sleep(1)
    trackers.log(step, {"train/loss": 1 / step, "health/sqk/mean": float("nan")})
trackers.close(status)
left = [child for child in psutil.Process().children(recursive=True) if child.status() != psutil.STATUS_ZOMBIE]
print("closed", len(left), "children")
"""
OFFLINE = ["experiment=ngpt_tiny", "run.name=tracked", "logging.tensorboard=false", "logging.wandb.mode=offline"]


def launch(folder: Path, overrides: list[str], *arguments: str | int, **environment: str) -> str:
    """What a launch prints; it must end by itself and without an error."""
    dump(compose([*OFFLINE, f"run.dir={folder / 'run'}", *overrides]), folder / "config.yaml")
    (folder / "run").mkdir(exist_ok=True)
    home = {"HOME": str(folder), "WANDB_ERROR_REPORTING": "false"}
    done = subprocess.run(
        [sys.executable, "-c", LAUNCH, str(folder / "config.yaml"), *map(str, arguments)],
        cwd=folder,
        env={name: value for name, value in os.environ.items() if not name.startswith("WANDB_")}
        | {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
        | home
        | environment,
        capture_output=True,
        text=True,
        timeout=LAUNCH_SECONDS,
    )
    assert done.returncode == 0 and "Traceback" not in done.stderr, done.stderr
    assert done.stdout.endswith("closed 0 children\n"), done.stdout
    return done.stdout


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A run ended by a signal after step 3 and gone on behind its checkpoint of step 2."""
    folder = tmp_path_factory.mktemp("wandb")
    options = ["logging.wandb.project=other", "logging.wandb.group=pairs", "logging.wandb.tags=[a,b]"]
    options += ["+cluster.environment.HF_TOKEN=secret"]
    assert launch(folder, options, "signalled", 1, 3) == "closed 0 children\n"
    launch(folder, options, "finished", 3, 4)
    return folder


def test_a_folders_launches_are_one_run_with_our_names_config_and_steps(folder):
    from tests.unit.trackers.wandb_files import launches

    first, second = launches(folder / "run")
    known = json.loads((folder / "run" / RUN_FILE).read_text())
    for kept in (first, second):
        assert kept.run.run_id == known["id"] and (kept.run.project, kept.run.display_name) == ("other", "tracked")
        assert (kept.run.run_group, list(kept.run.tags)) == ("pairs", ["a", "b"])
        assert kept.config["model"]["hidden_size"] == 64 and kept.config["logging"]["wandb"]["mode"] == "offline"
        assert kept.step_metrics["*"] == "step"
    assert [row["step"] for row in first.history] == [1, 2, 3] and [row["step"] for row in second.history] == [3, 4]
    assert [row["train/loss"] for row in first.history] == pytest.approx([1, 1 / 2, 1 / 3])
    assert all(row["health/sqk/mean"] != row["health/sqk/mean"] or row["health/sqk/mean"] == "NaN" for row in first.history)
    assert known["project"] == "other" and known["url"] is None


def test_how_a_launch_ended_is_told(folder):
    from tests.unit.trackers.wandb_files import launches

    first, second = launches(folder / "run")
    assert (first.preempting, first.exit_code) == (True, 1)
    assert (second.preempting, second.exit_code) == (False, 0)


def test_no_code_no_output_and_nothing_secret_is_kept(folder):
    kept = [path for path in (folder / "run" / "wandb").rglob("*") if path.is_file()]
    assert not {path.name for path in kept} & {"diff.patch", "output.log"} and not [path for path in kept if path.suffix == ".py"]
    assert not [path for path in kept if b"secret" in path.read_bytes()]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL, signal.SIGSTOP])
def test_a_client_that_dies_or_hangs_costs_figures_and_nothing_else(tmp_path, number):
    """A scheduler's signal reaches its process, too."""
    said = launch(tmp_path, [], "failed", 1, 3, number)
    assert said.count("note: Weights & Biases takes no more figures") == 1 and "the run goes on" in said


@pytest.fixture
def silent_server() -> Iterator[dict[str, str]]:
    """The environment of a client whose server takes connections and answers nothing."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield {"WANDB_BASE_URL": f"http://127.0.0.1:{server.getsockname()[1]}", "WANDB_API_KEY": "0123456789" * 4}


ONLINE = ["logging.wandb.mode=online"]


def test_a_run_that_ends_before_the_server_answers_does_not_wait_for_it(tmp_path, silent_server):
    said = launch(tmp_path, ONLINE, "failed", 1, 2, **silent_server)
    assert said.count("note: Weights & Biases takes no more figures") == 1


@pytest.mark.parametrize("key", [True, False])
def test_figures_that_no_server_takes_are_kept(tmp_path, silent_server, key):
    from tests.unit.trackers.wandb_files import launches

    environment = silent_server | {"WANDB_INIT_TIMEOUT": "2"}
    said = launch(tmp_path, ONLINE, "finished", 1, 2, **(environment if key else environment | {"WANDB_API_KEY": ""}))
    assert said.count("note: W&B has no run for this one") == 1 and "wandb sync" in said
    (kept,) = launches(tmp_path / "run")
    assert [row["step"] for row in kept.history] == [1, 2] and kept.exit_code == 0
    assert kept.run.run_id == own_run_id(tmp_path / "run")


def test_a_damaged_id_is_no_new_run(tmp_path):
    first = own_run_id(tmp_path)
    assert own_run_id(tmp_path) == first
    (tmp_path / RUN_FILE).write_text("{")
    with pytest.raises(ConfigError, match="remove it, and the next launch begins a new one"):
        own_run_id(tmp_path)


def test_what_is_installed_is_accepted():
    check_installed(compose(OFFLINE))
