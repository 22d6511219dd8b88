"""The command line: exit codes, one-line errors, and a start fast enough to use (no torch)."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from launch import cli, train
from ngpt.config import compose

ROOT = Path(__file__).resolve().parents[3]


def run_ngpt(*arguments: str, folder: Path = ROOT, **variables: str) -> subprocess.CompletedProcess:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), **variables}
    command = [sys.executable, "-m", "launch.cli", *arguments]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)


def test_help_names_every_command(capsys):
    assert cli.main(["--help"]) == 0
    shown = capsys.readouterr().out
    assert all(re.search(rf"^    {command.name}\b", shown, re.MULTILINE) for command in cli.COMMANDS)


def test_no_command_and_an_unknown_one_are_user_errors(capsys):
    assert cli.main([]) == 2
    assert cli.main(["trian"]) == 2
    assert "'trian'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["train", "experiment=ngpt_tiny", "train.step=3"], "train.step: "),
        (["train", "experiment=nothing"], "experiment: nothing"),
        (["train", "experiment=ngpt_tiny", "parallel.tensor=3"], "model.num_attention_heads: 4"),
        (["config", "experiment=ngpt_tiny", "model.hidden_size=wide"], "model.hidden_size: "),
        (["sample", "no_such_run"], "no_such_run: "),
        (["train", "experiment=ngpt_tiny", "cluster.nodes=2"], "cluster.nodes: 2"),
    ],
)
def test_user_errors_are_told_on_stderr_and_leave_nothing_behind(arguments, expected, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert cli.main(arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith(expected)
    assert "Traceback" not in captured.err
    assert not list(tmp_path.iterdir())


def test_the_exit_code_reaches_the_shell(tmp_path):
    done = run_ngpt("train", "experiment=ngpt_tiny", "train.step=3", folder=tmp_path)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)


@pytest.mark.parametrize("buffered", [True, False], ids=["buffered", "unbuffered"])
def test_a_reader_that_has_left_is_no_error_and_a_full_disk_is_one_line(buffered, tmp_path):
    """Python itself tries once more at exit, and would end with 120."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"} | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, *([] if buffered else ["-u"]), "-m", "launch.cli", "version"]
    reader, writer = os.pipe()
    os.close(reader)
    with open("/dev/full", "wb") as full:
        options = {"env": environment, "stderr": subprocess.PIPE, "text": True, "check": False}
        piped, stored = (subprocess.run(command, stdout=stdout, **options) for stdout in (writer, full))
    os.close(writer)
    assert (piped.returncode, piped.stderr) == (0, "")
    assert (stored.returncode, stored.stderr) == (2, "A disk: No space left on device\n")


def test_an_unwritable_place_is_a_user_error(tmp_path, capsys):
    blocked = tmp_path / "file"
    blocked.write_text("")
    assert cli.main(["train", "experiment=ngpt_tiny", f"run.dir={blocked}/run"]) == 2
    assert str(blocked) in capsys.readouterr().err


def test_commands_start_without_torch():
    code = "import sys, launch.cli, launch.train, launch.generate, launch.worker, launch.quickstart; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0


TWO_RANKS = ["train", "experiment=ngpt_tiny", "parallel.tensor=2", "cluster.gpus_per_node=2"]


@pytest.fixture
def no_workers(tmp_path, monkeypatch):
    """A launch that gets so far fails here, instead of waiting for ranks that never come."""
    monkeypatch.setattr(train, "run_and_tee", lambda *_, **__: pytest.fail("started workers"))
    monkeypatch.chdir(tmp_path)


def test_a_world_of_another_size_is_refused(no_workers, tmp_path, monkeypatch, capsys):
    """One of the size asked for: test_ranks_of_a_given_world_share_the_work_on_the_run_folder."""
    for name, value in {"RANK": "0", "WORLD_SIZE": "4", "MASTER_ADDR": "localhost"}.items():
        monkeypatch.setenv(name, value)
    assert cli.main(TWO_RANKS) == 2
    assert "torchrun has started 4 processes" in capsys.readouterr().err and not list(tmp_path.iterdir())


def test_more_processes_than_gpus_are_refused(no_workers, tmp_path, monkeypatch, capsys):
    """Without a GPU, processes share the CPU: tests/integration."""
    monkeypatch.setattr(train, "gpu_names", lambda: ("a GPU",))
    assert cli.main(TWO_RANKS) == 2
    assert "This machine has 1 visible GPU" in capsys.readouterr().err and not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("words", "key", "cures"),
    [
        (["precision=mxfp8"], "precision.format", [["precision=bf16"], ["precision=nvfp4_paper"]]),
        (["precision=fp8"], "precision.format", [["precision=bf16"]]),
        (["precision=nvfp4_paper", "precision.executor=native"], "precision.executor", [["precision.executor=auto"]]),
        (["precision=nvfp4_paper", "precision.layers={layers.0.*: fp8}"], "precision.layers", [["precision=bf16", "precision.layers={}"]]),
        (["model.transformer_impl=transformer_engine"], "model.transformer_impl", [["model.transformer_impl=local"]]),
    ],
)
def test_what_needs_transformer_engine_is_refused_once_before_workers_start(words, key, cures, no_workers, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(train, "gpu_names", lambda: ())
    assert cli.main(["train", "experiment=ngpt_tiny", *words]) == 2
    told = capsys.readouterr().err
    assert told.startswith(f"{key}: ") and "Transformer Engine needs a CUDA GPU and the package transformer-engine. " in told
    assert told.count("\n") == 1 and not list(tmp_path.iterdir())
    for cure in cures:
        train.check_start(compose(["experiment=ngpt_tiny", *words, *cure]), None)


@pytest.fixture
def failing_trainer(tmp_path):
    """A folder that shadows the trainer by one that fails as the config's seed says."""
    code = (
        "from pathlib import Path\n"
        "from ngpt.config.errors import ConfigError\n"
        "def leave(session): pass\n"
        "class Session: status, step = 'finished', 4\n"
        "def train(config, rank, on_built, stop_request):\n"
        "    print('step 1', flush=True)\n"
        "    if config.train.seed == 11:\n"
        "        raise RuntimeError('loss is NaN at step 2')\n"
        "    if config.train.seed == 12:\n"
        "        raise ConfigError('megatron.x', 1, 'not that', 'Leave it out')\n"
        "    if config.train.seed == 13:\n"
        "        import os; os.kill(os.getpid(), 9)\n"
        "    if config.train.seed == 14:\n"
        "        Session.status = 'signalled'\n"
        "    return Session\n"
    )
    for package in ("megatron_ext", "megatron_ext/training", "megatron_ext/compat"):
        (tmp_path / "fake" / package).mkdir(parents=True)
        (tmp_path / "fake" / package / "__init__.py").write_text("def install(cpu): pass\n")
    (tmp_path / "fake/megatron_ext/training/run.py").write_text(code)
    (tmp_path / "fake/torch.py").write_text("class cuda:\n    is_available = staticmethod(lambda: False)\n")  # the real one takes seconds
    return f"{tmp_path / 'fake'}{os.pathsep}{ROOT}"


@pytest.mark.parametrize(
    ("seed", "exit_code", "cause"),
    [
        (10, 0, ""),
        (11, 1, "rank 0: RuntimeError: loss is NaN at step 2"),
        (12, 2, "rank 0: ConfigError: megatron.x: 1. not that. Leave it out"),
        (13, 137, "rank 0: died: ended by SIGKILL: killed from outside, for instance by the kernel where memory ran out (dmesg says so)"),
    ],
)
def test_what_a_worker_ends_with_is_the_launchers_last_word(seed, exit_code, cause, failing_trainer, tmp_path):
    done = run_ngpt("train", "experiment=ngpt_tiny", f"train.seed={seed}", folder=tmp_path, PYTHONPATH=failing_trainer, PYTHONSAFEPATH="1")
    run_dir = tmp_path / "runs/ngpt_tiny"
    assert done.returncode == exit_code, done.stderr
    assert done.stdout.startswith("step 1\n")
    begun, said = (run_dir / "console.log").read_text().removeprefix("\n").split("\n", 1)
    assert re.fullmatch(r"== ngpt train, \d{4}-\d\d-\d\d \d\d:\d\d:\d\d [+-]\d{4}", begun)
    assert said == done.stdout + (f"ngpt train failed: {cause}\n" if cause else "")
    assert json.loads((run_dir / "environment.json").read_text())["command"].endswith(f"train.seed={seed}")
    if cause:
        assert done.stderr == f"ngpt train failed: {cause}\nWhole output: runs/ngpt_tiny/console.log\n"
    assert ("Traceback" in done.stdout) == (exit_code == 1)


def test_a_run_that_a_signal_has_ended_is_no_failure(failing_trainer, tmp_path):
    done = run_ngpt("train", "experiment=ngpt_tiny", "train.seed=14", folder=tmp_path, PYTHONPATH=failing_trainer, PYTHONSAFEPATH="1")
    assert done.returncode == 75
    assert done.stderr == "ngpt train ended by a signal after step 4, which is saved; the same command goes on\n"
    assert json.loads((tmp_path / "runs/ngpt_tiny/outcome.json").read_text())["status"] == "signalled"


def test_ranks_of_a_given_world_share_the_work_on_the_run_folder(failing_trainer, tmp_path):
    world = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "PYTHONSAFEPATH": "1", "PYTHONPATH": failing_trainer}
    run_dir = tmp_path / "runs/ngpt_tiny"
    assert run_ngpt(*TWO_RANKS, folder=tmp_path, RANK="1", LOCAL_RANK="1", **world).returncode == 0
    assert (run_dir / "console.log").read_text() == "step 1\n"
    assert not (run_dir / "config.yaml").exists()
    assert run_ngpt(*TWO_RANKS, folder=tmp_path, RANK="0", LOCAL_RANK="0", **world).returncode == 0
    assert (run_dir / "console.log").read_text() == "step 1\n"
    assert (run_dir / "config.yaml").exists()
