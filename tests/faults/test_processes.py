"""Signals, killed processes and two launches at once: the run goes on as if nothing had happened, or one line says what did."""

import json
import signal
import socket
import subprocess
import sys
import time
from importlib.util import find_spec

import pytest
from runs import ROOT, TWO_RANKS, WORDS, assert_same_run, finish, gone, last_row, start


@pytest.fixture(scope="session")
def twin(tmp_path_factory):
    """A run on two ranks that nothing disturbs; the port that others would meet at is taken."""
    folder = tmp_path_factory.mktemp("twin") / "run"
    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        finish(folder, *TWO_RANKS, f"cluster.rendezvous_port={taken.getsockname()[1]}")
    return folder


TRACKED = ["logging.wandb.mode=offline"] if find_spec("wandb") else []
SLOW_STEPS = {"kind": "slow_step", "seconds": 0.2}
MOMENTS = {
    "step": (SLOW_STEPS, lambda training: training.wait_for_step(2)),
    "evaluation": (
        {"kind": "slow_evaluation", "seconds": 5},
        lambda training: training.wait_for(lambda t: "injected: slow_evaluation" in t.text),
    ),
    "save": (
        {"kind": "slow_save", "seconds": 1},
        lambda training: training.wait_for(lambda t: list(t.folder.glob("checkpoints/.saving/iter_*/*.distcp"))),
    ),
}


@pytest.mark.parametrize("moment", MOMENTS)
def test_sigterm_to_every_process_saves_and_the_run_goes_on_to_the_same_bits(tmp_path, twin, moment):
    """Those of a tracker's client, too, where it is installed."""
    fault, reach = MOMENTS[moment]
    training = start(tmp_path / "run", *TWO_RANKS, *TRACKED, fault=fault)
    reach(training)
    everybody = training.tree()
    training.send(signal.SIGTERM, everybody)
    training.send(signal.SIGTERM, everybody)
    assert training.end() == 75, training.text
    assert gone(everybody) == []
    assert f"SIGTERM after step {training.newest_step}, which is saved; the same command goes on" in training.text
    assert "Traceback" not in training.text
    finish(tmp_path / "run", *TWO_RANKS, *TRACKED)
    assert_same_run(tmp_path / "run", twin)


def test_ranks_meet_on_a_machine_whose_name_nobody_can_resolve(tmp_path):
    renamed = "import os, socket, sys; os.unshare(os.CLONE_NEWUTS); socket.sethostname('nowhere'); os.execvp(sys.argv[1], sys.argv[1:])"
    if subprocess.run([sys.executable, "-c", renamed, "true"], capture_output=True, check=False).returncode:
        pytest.skip("this user may not rename a machine for one process")
    launch = [sys.executable, "-m", "launch.cli", "train", *WORDS, *TWO_RANKS, f"run.dir={tmp_path / 'run'}", "run.name=run"]
    ended = subprocess.run([sys.executable, "-c", renamed, *launch], cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    assert ended.returncode == 0 and last_row(tmp_path / "run")["step"] == 8, ended.stderr


@pytest.mark.parametrize("processes", [1, 2])
def test_a_signal_during_start_up_leaves(tmp_path, processes):
    training = start(tmp_path / "run", f"cluster.gpus_per_node={processes}", fault={"kind": "slow_start", "seconds": 600})
    training.wait_for(lambda t: len(t.ranks()) == processes)
    everybody = training.tree()
    training.send(signal.SIGTERM, [everybody[0]])
    assert training.end() == 75, training.text
    assert "ended by SIGTERM during start-up" in training.text and "Traceback" not in training.text
    assert gone(everybody) == [] and training.newest_step is None


@pytest.mark.parametrize("name", ["SIGHUP", "SIGINT", "SIGUSR1", "SIGUSR2"])
def test_every_stop_signal_saves(tmp_path, name):
    training = start(tmp_path / "run", fault=SLOW_STEPS)
    training.wait_for_step(2)
    training.send(signal.Signals[name], training.tree()[:1])
    assert training.end() == 75, training.text
    assert training.newest_step == last_row(tmp_path / "run")["step"]


def test_a_signal_to_one_rank_stops_all_at_the_same_step(tmp_path, twin):
    training = start(tmp_path / "run", *TWO_RANKS, fault=SLOW_STEPS)
    training.wait_for_step(2)
    training.send(signal.SIGUSR1, training.ranks()[1:])
    assert training.end() == 75, training.text
    finish(tmp_path / "run", *TWO_RANKS)
    assert_same_run(tmp_path / "run", twin)


@pytest.mark.parametrize("whom", ["launcher", "agent"])
def test_ranks_end_with_what_started_them_and_the_next_launch_goes_on(tmp_path, twin, whom):
    training = start(tmp_path / "run", *TWO_RANKS, fault=SLOW_STEPS)
    training.wait_for_step(5)
    launcher, agent, *_ = everybody = training.tree()
    training.send(signal.SIGKILL, [launcher if whom == "launcher" else agent])
    assert training.end() != 0
    assert gone(everybody) == []
    assert training.newest_step == 3
    finish(tmp_path / "run", *TWO_RANKS)
    assert_same_run(tmp_path / "run", twin)


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        pytest.param("kill", "rank 1: died: ended by SIGKILL", marks=pytest.mark.quick),
        ("exit", "rank 1: died: ended with exit code 137: killed from outside"),
        ("memory", "rank 1: MemoryError: injected"),
        ("error", "rank 1: RuntimeError: injected"),
    ],
)
def test_the_rank_that_died_is_named_and_not_its_neighbour(tmp_path, kind, words):
    training = start(tmp_path / "run", *TWO_RANKS, fault={"kind": kind, "step": 5, "rank": 1})
    training.wait_for_step(2)
    everybody = training.tree()
    assert training.end() not in (0, 2, 75)
    assert f"ngpt train failed: {words}" in training.text
    assert gone(everybody) == [] and training.newest_step == 3


def test_a_single_rank_that_is_killed_does_not_keep_its_launcher(tmp_path):
    training = start(tmp_path / "run", fault={"kind": "kill", "step": 5})
    assert training.end() == 128 + 9
    assert "ngpt train failed: rank 0: died: ended by SIGKILL" in training.text


def test_a_second_launch_is_refused_in_one_line_and_disturbs_nothing(tmp_path):
    first = start(tmp_path / "run", fault=SLOW_STEPS)
    first.wait_for_step(1)
    recorded = (tmp_path / "run" / "config.yaml").read_bytes()
    command = [sys.executable, "-m", "launch.cli", "train", *WORDS, f"run.dir={tmp_path / 'run'}", "run.name=run", "optim.clip_grad=2"]
    second = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    assert second.returncode == 2 and "Is being trained by process" in second.stderr and second.stderr.count("\n") == 1
    assert first.end() == 0, first.text
    assert (tmp_path / "run" / "config.yaml").read_bytes() == recorded


def test_a_rollback_goes_on_in_the_same_command_behind_the_batch(tmp_path):
    rolled = start(tmp_path / "run", *TWO_RANKS, "train.on_nonfinite=rollback", fault={"kind": "nan", "step": 5, "rank": 1})
    assert rolled.end() == 0, rolled.text
    assert "ngpt train goes back to step 3: step 5 (samples " in rolled.text
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if "train_loss" in row] == [1, 2, 3, 6, 7, 8]
    finish(tmp_path / "skipped", *TWO_RANKS, "megatron.iterations_to_skip=[4,5]")
    assert_same_run(tmp_path / "run", tmp_path / "skipped")


def test_a_clock_that_goes_back_changes_nothing(tmp_path, twin):
    training = start(tmp_path / "run", *TWO_RANKS, fault={"kind": "clock", "step": 2})
    assert training.end() == 0, training.text
    assert_same_run(tmp_path / "run", twin)


def test_a_second_ctrl_c_ends_it_at_once(tmp_path):
    training = start(tmp_path / "run", fault={"kind": "hang", "step": 3})
    training.wait_for_step(1)
    everybody = training.tree()
    training.send(signal.SIGINT, everybody[:1])
    time.sleep(1)  # two that come at once are one
    training.send(signal.SIGINT, everybody[:1])
    assert training.end() == 130, training.text
    assert gone(everybody) == []
