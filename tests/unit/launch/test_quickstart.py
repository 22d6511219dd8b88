"""The quickstart's own decisions: when a run is reused, what the last screen says. The training itself is run by the integration tests."""

import json
import os
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from launch import quickstart
from launch.quickstart import is_finished, table
from launch.run_folder import record_launch
from ngpt.config.compose import compose
from ngpt.config.errors import ConfigError

SUMMARY = {
    "run_name": "quickstart_bf16",
    "status": "finished",
    "parameters": 1_922_688,
    "tokens": 2_048_000,
    "wall_time_s": 330.0,
    "val_bits_per_byte": 2.5,
    "bigram_bits_per_byte": 3.627,
    "unigram_bits_per_byte": 4.669,
}
OVERRIDES = ["experiment=quickstart", "precision=bf16", "run.name=quickstart_bf16"]


@pytest.mark.parametrize(("status", "reused"), [("finished", True), ("stopped", False), ("failed", False)])
def test_only_a_finished_run_is_reused(status, reused, tmp_path):
    config = compose(["experiment=quickstart", f"run.dir={tmp_path}"])
    assert not is_finished(config)
    record_launch(config, ["ngpt"], {})
    assert not is_finished(config)
    (tmp_path / "summary.json").write_text(json.dumps({"status": status}))
    assert is_finished(config) is reused


def test_a_finished_run_of_another_config_is_not_reused(tmp_path):
    record_launch(compose(["experiment=quickstart", f"run.dir={tmp_path}"]), ["ngpt"], {})
    (tmp_path / "summary.json").write_text(json.dumps(SUMMARY))
    assert not is_finished(compose(["experiment=quickstart", f"run.dir={tmp_path}", "train.steps=9"]))


def test_the_table_shows_the_figures_beside_each_other_and_no_control_characters():
    shown = table(SUMMARY, "The \x1b[2Jend\nof it", Path("runs/q/report/index.html"), OVERRIDES)
    figures = ("2.500 bits per byte", "3.627 bits per byte", "4.669 bits per byte", "2,048,000 tokens in 5 min 30 s")
    assert all(part in shown for part in (*figures, "runs/q/report/index.html"))
    assert "\x1b" not in shown
    assert "  | of it" in shown


def test_the_command_for_two_processes_composes():
    shown = table(SUMMARY, "", Path("index.html"), OVERRIDES)
    line = next(line for line in shown.splitlines() if "parallel=tp2" in line)
    command = shlex.split(line[line.index("ngpt train") :])
    config = compose(command[2:])
    assert config.parallel.tensor == config.cluster.gpus_per_node == 2
    assert (config.precision.name, config.run.name) == ("bf16", "quickstart_bf16_tp2")


def test_a_recipe_is_shown_beside_the_plain_run():
    plain = SUMMARY | {"run_name": "quickstart", "val_bits_per_byte": 2.25, "precision": "fp32"}
    shown = table(SUMMARY, "", Path("index.html"), OVERRIDES, plain)
    line = next(line for line in shown.splitlines() if line.startswith("  quickstart "))
    assert "2.250 bits per byte in fp32" in line


def test_the_plain_run_is_made_first(monkeypatch):
    trained = []

    def stop(overrides, fresh=False):
        trained.append((overrides, fresh))
        if len(trained) == 2:
            raise ConfigError("test", "stop", "enough was seen", "none")
        return Path("runs/quickstart")

    monkeypatch.setattr(quickstart, "train", stop)
    assert quickstart.main(["--precision", "nvfp4_paper", "--fresh"]) == 2
    recipe = ["precision=nvfp4_paper", "run.name=quickstart_nvfp4_paper"]
    assert trained == [(["experiment=quickstart"], False), (["experiment=quickstart", *recipe], True)]


def test_a_wrong_recipe_ends_before_anything_is_trained(monkeypatch):
    monkeypatch.setattr(quickstart, "train", lambda *_, **__: pytest.fail("trained"))
    assert quickstart.main(["--precision", "nvfp5"]) == 2


def test_a_step_that_is_interrupted_has_the_time_to_save():
    saves = "signal.signal(signal.SIGINT, lambda *_: (time.sleep(1), sys.exit(75)))"
    child = f"import signal, sys, time; {saves}; print('on', flush=True); time.sleep(60)"
    program = f"quickstart.NGPT = [sys.executable, '-c']; quickstart.run = lambda *_: quickstart.step({child!r})"
    command = [sys.executable, "-c", f"import sys; from launch import quickstart; {program}; sys.exit(quickstart.main([]))"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True) as process:
        assert process.stdout.readline() == "on\n"
        os.killpg(process.pid, signal.SIGINT)  # as a terminal does
        assert process.wait(60) == 75 and process.stderr.read() == ""
