"""`ngpt launch`: the script it writes, what it refuses, and that nothing a user gives reaches a shell unquoted."""

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from launch import cli
from launch.slurm.script import TEMPLATE, render, render_study
from launch.status import status
from launch.stop import stop
from ngpt.checkpoints.hashing import hash_file
from ngpt.checkpoints.manifest import Manifest
from ngpt.config.compose import compose, load
from ngpt.config.errors import ConfigError

ROOT = Path(__file__).resolve().parents[3]
JOB = ["experiment=ngpt_tiny", "cluster.scheduler=slurm", "cluster.nodes=2"]
IMAGE = "docker://x#$(>hacked)';y"
HOSTILE = "it's $(touch hacked) `touch hacked` \"100%\"; #@RUN@ @SRUN@"


@pytest.fixture
def workplace(tmp_path, monkeypatch):
    folder = tmp_path / HOSTILE
    folder.mkdir()
    monkeypatch.chdir(folder)
    return folder


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="no shellcheck on this machine")
def test_the_template_and_the_script_are_clean(tmp_path):
    (tmp_path / "job").write_text(render(compose([*JOB, "cluster.container_image=i.sqsh"]), tmp_path / "runs/a", tmp_path))
    subprocess.run(["shellcheck", TEMPLATE, tmp_path / "job"], check=True)


def test_hostile_names_reach_programs_as_they_are_and_no_shell(workplace):
    config = compose([*JOB, "run.name=a", "cluster.cpus_per_task=3", f'cluster.container_image="{IMAGE}"'])
    script = render(config, workplace / "runs/a", workplace)
    (workplace / "job").write_text(script)
    # Run with every program replaced by one that prints its arguments: each value arrives as it was given, and no other command runs.
    echo = workplace / "srun"
    echo.write_text('#!/bin/bash\nprintf "%s\\n" "$@"\n')
    echo.chmod(0o755)
    environment = {"PATH": f"{workplace}:{os.environ['PATH']}", "SLURM_JOB_ID": ""}
    (workplace / "runs/a").mkdir(parents=True)
    done = subprocess.run(["bash", "job"], env=environment, capture_output=True, text=True, check=False)
    arguments = done.stdout.splitlines()
    assert f"--container-mounts={workplace}:{workplace}" in arguments
    assert f"--container-image={IMAGE}" in arguments
    assert arguments[-2:] == ["--config", str(workplace / "runs/a/config.yaml")]
    assert "no job" in done.stderr
    assert not list(workplace.rglob("hacked"))


def test_the_job_asks_for_one_task_a_process_and_for_time_to_save(workplace):
    words = ["cluster.gpus_per_node=4", "cluster.gpu=h100", "cluster.save_time_s=100", "cluster.save_margin_s=20"]
    words += ["cluster.account=lab", "train.micro_batch_size=1"]
    script = render(compose([*JOB, *words, 'cluster.sbatch=["--mem=0"]']), workplace / "runs/a", workplace)
    options = [shlex.split(line)[1] for line in script.splitlines() if line.startswith("#SBATCH")]
    assert {"--nodes=2", "--ntasks-per-node=4", "--gpus-per-node=4", "--signal=TERM@150", "--requeue", "--open-mode=append"} <= set(options)
    assert {"--account=lab", "--mem=0"} <= set(options) and not any(option.startswith("--time") for option in options)
    assert f"--output={workplace}/runs/a/slurm-%j.out".replace("100%", "100%%") in options


def test_the_one_task_of_a_page_has_the_cores_of_all_analyses_that_run_at_a_time(tmp_path):
    words = [*JOB, "cluster.gpus_per_node=4", "train.micro_batch_size=1"]
    for more, asked in (["cluster.cpus_per_task=3"], ["--cpus-per-task=12"]), ([], []):
        script = render_study(compose([*words, *more]), "page", tmp_path / "study", tmp_path, ["study", "a"], ["7"])
        srun = next(line for line in script.splitlines() if line.startswith("exec srun"))
        assert "--ntasks=1" in srun.split() and [word for word in srun.split() if word.startswith("--cpus-per-task")] == asked
        options = script.partition("exec srun")[0]
        assert "--nodes=1\n" in options and "--ntasks-per-node=4\n" in options and ("--cpus-per-task=3\n" in options) == bool(more)


@pytest.mark.parametrize("name", ["new\nline", "back\\slash"])
def test_a_folder_that_slurm_cannot_take_is_refused(tmp_path, name):
    with pytest.raises(ConfigError, match="run.dir"):
        render(compose(JOB), tmp_path / name, tmp_path)


def test_a_folder_that_no_mount_can_name_is_refused(tmp_path):
    contained = compose([*JOB, "cluster.container_image=image.sqsh"])
    with pytest.raises(ConfigError, match="cluster.container_image"):
        render(contained, tmp_path / "run", tmp_path / "a,b")


@pytest.mark.parametrize(
    ("override", "path"),
    [
        ("cluster.account='a b'", "cluster.account"),
        ("cluster.partition='$(x)'", "cluster.partition"),
        ("cluster.qos='a;b'", "cluster.qos"),
        ("cluster.time_limit=soon", "cluster.time_limit"),
        ("cluster.time_limit=86400", "cluster.time_limit"),  # what YAML makes of an unquoted 24:00:00
        ("cluster.time_limit='00:02:00'", "cluster.time_limit"),  # no longer than a save
        ("cluster.save_time_s=70000", "cluster.save_time_s"),
        ("cluster.sbatch=['--mem 0']", "cluster.sbatch"),
        ("cluster.sbatch=['--wrap=x']", "cluster.sbatch"),
        ("cluster.sbatch=['--comment=$(x)']", "cluster.sbatch"),
        ("cluster.sbatch=['--time=5']", "cluster.sbatch"),
        ("cluster.container_image='a b'", "cluster.container_image"),
        ("cluster.container_mounts=['/a:/b']", "cluster.container_mounts"),
        ("cluster.environment.RANK='3'", "cluster.environment.RANK"),
        ("cluster.scheduler=pbs", "cluster.scheduler"),
        ("cluster.max_restarts=-1", "cluster.max_restarts"),
    ],
)
def test_what_reaches_the_scheduler_has_a_known_form(override, path):
    with pytest.raises(ConfigError) as caught:
        compose([*JOB, override])
    assert caught.value.path == path


@pytest.mark.parametrize("name", ["slurm_h100", "slurm_b200", "slurm_gb200"])
def test_shipped_clusters_submit(name, workplace, slurm, capsys):
    assert cli.main(["launch", "experiment=ngpt_1p2b_dense_bf16", "data=mock", f"cluster={name}", "train.micro_batch_size=1"]) == 0
    script = slurm.of("42", "script")
    assert f"--ntasks-per-node={4 if name == 'slurm_gb200' else 8}" in script and "--signal=TERM@300" in script
    assert "memory a rank" in capsys.readouterr().err


def test_a_dry_run_prints_the_script_and_writes_nothing(workplace, capsys):
    assert cli.main(["launch", *JOB, "--dry-run"]) == 0
    assert capsys.readouterr().out.startswith("#!/usr/bin/env bash\n#SBATCH --job-name=ngpt_tiny\n")
    assert not list(workplace.iterdir())


def test_without_a_scheduler_a_dry_run_names_the_command(capsys):
    assert cli.main(["launch", "experiment=ngpt_tiny", "--dry-run"]) == 0
    assert capsys.readouterr().out.endswith("\nngpt train experiment=ngpt_tiny\n")


def test_a_launch_leaves_everything_in_the_run_folder(workplace, slurm, monkeypatch, capsys):
    monkeypatch.setenv("NCCL_DEBUG", "WARN")
    monkeypatch.setenv("SLURM_NTASKS", "3")
    monkeypatch.setenv("RANK", "0")
    words = ["cluster.environment.NCCL_DEBUG=INFO", "cluster.environment.NCCL_IB_HCA=mlx5"]
    assert cli.main(["launch", *JOB, *words]) == 0
    script, environment = slurm.of("42", "script") + "\n", slurm.environment("42")
    assert not {"SLURM_NTASKS", "RANK"} & environment.keys() and environment["NCCL_DEBUG"] == "WARN"
    run = workplace / "runs/ngpt_tiny"
    assert (run / "job.sbatch").read_text() == script
    assert load(run / "config.yaml").cluster.nodes == 2
    recorded = json.loads((run / "environment.json").read_text())
    assert recorded["environment_from"] == {"NCCL_DEBUG": "exported", "NCCL_IB_HCA": "cluster.environment"}
    shown = capsys.readouterr()
    assert "NCCL_DEBUG=WARN as exported, not INFO" in shown.err
    assert shown.out.startswith("job 42, run folder ") and "ngpt status" in shown.out and "ngpt stop" in shown.out


def test_a_trackers_client_that_is_not_installed_is_missed_before_anything_starts(workplace, slurm, monkeypatch, capsys):
    monkeypatch.setattr("launch.extras.find_spec", lambda name: None)
    for words in (["launch", *JOB], ["train", "experiment=ngpt_tiny"]):
        assert cli.main([*words, "logging.wandb.mode=online"]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith("logging.wandb.mode: online. ") and "pip install 'ngpt-megatron[wandb]'" in line
    assert slurm.jobs == [] and not list(workplace.iterdir())
    assert cli.main(["launch", *JOB, "logging.wandb.mode=online", "cluster.container_image=image.sqsh"]) == 0  # it has its own packages


def test_a_run_folder_has_one_job_at_a_time(workplace, slurm, capsys):
    assert cli.main(["launch", *JOB]) == 0
    assert cli.main(["launch", *JOB]) == 2
    assert slurm.jobs == ["42"] and "Its job 42 is PENDING" in capsys.readouterr().err


def test_stopping_a_job_leaves_word_for_its_script_and_lets_its_ranks_save(workplace, slurm):
    assert cli.main(["launch", *JOB]) == 0
    run = workplace / "runs/ngpt_tiny"
    slurm.set("42", JobState="RUNNING")
    assert "not to come back" in stop(run)
    assert slurm.of("42", "heard") == "--signal=TERM 42 after the stop file"  # its steps hear it, its script does not
    slurm.set("42", JobState="PENDING")
    assert "is cancelled" in stop(run) and slurm.of("42", "JobState") == "CANCELLED"
    assert cli.main(["launch", *JOB]) == 0 and slurm.jobs == ["42", "43"] and not (run / "stop").exists()


def checkpoint(run: Path, step: int) -> Path:
    """One as earlier versions wrote it, published."""
    own = run / "checkpoints" / f"iter_{step:07d}"
    own.mkdir(parents=True)
    for name, content in ((".metadata", "__0_0.distcp"), ("__0_0.distcp", "shard"), ("metadata.json", "{}")):
        (own / name).write_text(content)
    (run / "checkpoints/latest_checkpointed_iteration.txt").write_text(str(step))
    return own


def test_status_tells_the_checkpoint_that_would_be_taken_and_what_is_wrong_with_the_others(workplace, slurm):
    assert cli.main(["launch", *JOB]) == 0
    run = workplace / "runs/ngpt_tiny"
    checkpoint(run, 2)
    newest = checkpoint(run, 3)
    tracker = run / "checkpoints/latest_checkpointed_iteration.txt"
    for damage, step, told in (
        (lambda: tracker.write_text("abc"), 3, "'abc' is not the step of a checkpoint"),
        (tracker.unlink, 3, "missing; it names the checkpoint to load"),
        (lambda: tracker.write_text("3"), 3, None),
        ((newest / "__0_0.distcp").unlink, 2, "__0_0.distcp: missing"),
        ((run / "checkpoints/iter_0000002/.metadata").unlink, None, "no older one is intact"),
    ):
        damage()
        found = status(run)["checkpoint"]
        assert found["step"] == step and (told in found["problem"] if told else found["problem"] is None)


def test_the_launcher_of_a_local_run_is_asked_also_where_its_config_cannot_be_read(workplace):
    run = workplace / "runs/ngpt_tiny"
    hold = f"import signal; from pathlib import Path; from launch.run_folder import locked; run = Path({str(run)!r})\n"
    command = [sys.executable, "-c", hold + "with locked(run): print(flush=True), signal.pause()"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, env=os.environ | {"PYTHONPATH": str(ROOT)}) as launcher:
        try:
            assert launcher.stdout.readline()
            (run / "config.yaml").write_text("")
            found = status(run)
            assert found["state"] == "running" and "Empty" in found["config_problem"] and found["launcher"]["pid"] == launcher.pid
            assert f"asked process {launcher.pid} to save" in stop(run)
            assert launcher.wait(timeout=60) == -signal.SIGTERM
        finally:
            launcher.kill()
    assert stop(run).endswith("does not run")


def test_a_run_whose_launcher_was_killed_says_so(workplace, slurm):
    assert cli.main(["launch", *JOB]) == 0
    slurm.set("42", JobState="COMPLETED")
    run = workplace / "runs/ngpt_tiny"
    (run / "heartbeat").mkdir()
    (run / "heartbeat/rank0.json").write_text('{"rank": 0, "step": 3, "operation": "forward", "microbatch": 1, "time": 1.0}')
    assert status(run)["state"] == "not running" and "its launcher was killed" in status(run)["failure"]


@pytest.mark.parametrize("content", ["", '{"status": "fini', "[1]", "\x00" * 9], ids=["empty", "cut", "no_object", "zeros"])
def test_a_damaged_outcome_is_told_with_what_to_do(content, workplace, slurm, capsys):
    assert cli.main(["launch", *JOB]) == 0
    slurm.set("42", JobState="COMPLETED")
    run = workplace / "runs/ngpt_tiny"
    (run / "heartbeat").mkdir()
    (run / "heartbeat/rank0.json").write_text('{"rank": 0, "step": 3, "operation": "end", "microbatch": 0, "time": 1.0}')
    (run / "outcome.json").write_text(content)
    capsys.readouterr()
    assert cli.main(["status", str(run)]) == 0
    shown = capsys.readouterr().out
    assert shown.startswith(f"{run}: damaged outcome.json, step 3 of 4\n") and "was killed" not in shown
    assert f"\noutcome     {run}/outcome.json: Damaged, so that " in shown
    assert ". The next launch writes it anew: start the run again; if nothing is left to train, remove the file\n" in shown
    checkpoint(run, 4)  # says that it has finished all the same
    found = status(run)
    assert found["state"] == "finished" and "Damaged" in found["outcome"]
    (run / "outcome.json").unlink()
    assert status(run)["outcome"] is None


def test_status_of_a_run_that_is_over(workplace, slurm, capsys):
    assert cli.main(["launch", *JOB]) == 0
    slurm.set("42", JobState="FAILED")
    run = workplace / "runs/ngpt_tiny"
    checkpoint(run, 3)
    (run / "metrics.jsonl").write_text('{"step": 2}\n{"step": 3}\n')
    (run / "heartbeat").mkdir()
    (run / "heartbeat/rank1.json").write_text('{"rank": 1, "step": 3, "operation": "forward", "microbatch": 2, "time": 1.0}')
    (run / "failure_rank1.json").write_text('{"rank": 1, "time": 1, "error": "RuntimeError", "message": "NaN"}')
    capsys.readouterr()
    assert cli.main(["status", str(run), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["state"], found["step"], found["last_step"], found["checkpoint"]["step"]) == ("failed", 3, 4, 3)
    assert found["hf"] is None
    assert found["failure"] == "rank 1: RuntimeError: NaN" and found["job"] == {"id": "42", "tasks": []}
    for step in (1, 2):
        (run / f"checkpoints/iter_000000{step}/hf").mkdir(parents=True)
    assert cli.main(["status", str(run)]) == 0
    shown = capsys.readouterr().out
    assert f"\nhf          {run}/checkpoints/iter_0000002/hf\n" in shown
    assert "heartbeats" not in shown and "next        ngpt launch experiment=ngpt_tiny" in shown


def test_status_of_a_run_that_goes_on_names_the_rank_that_was_heard_of_longest_ago(workplace, slurm, capsys):
    assert cli.main(["launch", *JOB]) == 0
    run = workplace / "runs/ngpt_tiny"
    (run / "heartbeat").mkdir()
    for rank, age in ((0, 2.0), (1, 1.0)):
        beat = {"rank": rank, "step": 3, "operation": "forward", "microbatch": 2, "time": age}
        (run / f"heartbeat/rank{rank}.json").write_text(json.dumps(beat))
    slurm.set("42", JobState="RUNNING", RunTime="1:00", TimeLeft="2:00", NodeList="n[1-2]")
    capsys.readouterr()
    assert cli.main(["status", str(run)]) == 0
    shown = capsys.readouterr().out
    assert "running, step 3 of 4" in shown and "job         42 RUNNING, 1:00 so far, 2:00 left, on n[1-2]" in shown
    assert "2 ranks; the oldest" in shown and "rank 1 in forward of step 3, micro-batch 2" in shown
    assert "next        ngpt stop " in shown


def test_a_folder_without_a_run_has_no_status(tmp_path, capsys):
    for command in ("status", "stop"):
        assert cli.main([command, str(tmp_path)]) == 2
    assert capsys.readouterr().err.count("\n") == 2


def test_a_finished_run_whose_last_checkpoint_has_changed_is_submitted_to_go_on(workplace, slurm, capsys):
    run = workplace / "runs/ngpt_tiny"
    checkpoint(run, 2)
    own = checkpoint(run, 4)
    Manifest(4, {path.name: hash_file(path) for path in own.iterdir()}).save(own)
    assert cli.main(["launch", *JOB]) == 0 and not slurm.jobs and "nothing to train" in capsys.readouterr().out
    (own / "__0_0.distcp").write_text("shar!")
    assert cli.main(["launch", *JOB]) == 0 and slurm.jobs == ["42"]
    assert "names step 2 now" in capsys.readouterr().err
