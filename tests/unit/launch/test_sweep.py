"""A sweep before and after its members run: folders, refusals, its record, status and stop. Members that train: tests/integration."""

import functools
import json
import os
import signal
import sys
import threading
import time
from pathlib import Path

import pytest

from launch import cli, many, sweep
from launch.outcome import Outcome, record_outcome
from launch.sweep_plan import is_done, plan_sweep
from launch.sweep_status import sweep_status
from ngpt.config.errors import ConfigError
from ngpt.sweeps import read_sweep

TINY = ["experiment=ngpt_tiny", "train.seed=1,2"]
# In place of `ngpt train`: leaves what a run leaves, or fails where its folder holds a file `fail`, or waits where it holds `wait`.
TRAINS = """
import json, os, signal, sys, time
from pathlib import Path
words = dict(word.split("=", 1) for word in sys.argv[3:])
folder = Path(words["run.dir"])
Path("started").open("a").write(words["train.seed"])
if (folder / "fail").exists():
    sys.exit("no luck")
if (folder / "wait").exists():
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(75))
    (folder / "waits").touch()
    time.sleep(600)
(folder / "metrics.jsonl").write_text(json.dumps({"step": 4, "val_loss": float(words["train.seed"])}) + chr(10))
(folder / "outcome.json").write_text(json.dumps({"status": "finished", "step": 4}))
"""


@pytest.fixture(autouse=True)
def workplace(tmp_path, monkeypatch):
    """Members are programs that take no seconds to start."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(many, "POLL_SECONDS", 0.01)
    monkeypatch.setattr(sweep, "run_members", functools.partial(many.run_members, program=(sys.executable, "-c", TRAINS)))
    return tmp_path


def train(capsys, *words: str) -> tuple[int, str, str]:
    code = cli.main(["train", "-m", *TINY, *words])
    out, err = capsys.readouterr()
    return code, out, err


def test_a_sweep_is_a_folder_of_runs_named_by_what_differs():
    plan = plan_sweep([*TINY, "optim.lr=1e-3,3e-3"], [])
    assert plan.folder == Path("runs/ngpt_tiny-sweep")
    first = plan.members[0]
    assert first.folder == plan.folder / "seed=1_lr=1e-3" and first.config.run.name == "ngpt_tiny-sweep_seed=1_lr=1e-3"
    assert (first.config.train.seed, first.config.optim.lr) == (1, 1e-3)
    assert cli.parser().read(list(first.command)).overrides == list(first.command[1:])
    assert not plan.folder.exists()


def test_a_name_a_root_and_a_folder_of_the_users_count():
    assert plan_sweep([*TINY, "run.name=mine", "run.root=elsewhere"], []).folder == Path("elsewhere/mine")
    assert plan_sweep([*TINY, "run.name=mine", "run.dir=there"], []).members[1].folder == Path("there/seed=2")
    several = ["experiment=ngpt_tiny,quickstart", "data=mock"]
    with pytest.raises(ConfigError, match="run.name: Not set"):
        plan_sweep(several, [])
    assert [member.config.run.name for member in plan_sweep([*several, "run.name=both"], []).members] == [
        "both_experiment=ngpt_tiny",
        "both_experiment=quickstart",
    ]


def test_members_are_shown_together_by_wandb_unless_the_user_says_otherwise():
    online = [*TINY, "logging.wandb.mode=offline"]
    assert {member.config.logging.wandb.group for member in plan_sweep(online, []).members} == {"ngpt_tiny-sweep"}
    assert {member.config.logging.wandb.group for member in plan_sweep([*online, "logging.wandb.group=own"], []).members} == {"own"}


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["model.hidden_size=64,66"], "seed=1_hidden_size=66: model.num_attention_heads: 4. "),
        (["cluster.nodes=2"], "seed=1: cluster.nodes: 2. "),
        (["data=enwik8_bytes"], "seed=1: "),
        (["checkpoint.dir=shared"], "checkpoint.dir: shared. Is the same for several members"),
        (["optim.lr=1,1.0,wide"], "seed=1_lr=wide: optim.lr: 'wide'. "),
    ],
)
def test_everything_is_checked_before_the_first_member_starts(words, told, workplace, capsys):
    code, out, err = train(capsys, *words)
    assert (code, out) == (2, "") and err.startswith(told)
    assert not list(workplace.iterdir())


def test_side_by_side_they_need_enough_gpus(capsys, monkeypatch):
    monkeypatch.setattr(sweep, "gpu_names", lambda: ("a GPU",) * 4)
    code, _, err = train(capsys, "cluster.gpus_per_node=2", "--parallel", "3")
    assert code == 2 and err == (
        "--parallel: 3. 3 members of 2 GPUs (cluster.gpus_per_node) need 6, and 4 are visible. Set --parallel 2\n"
    )


def test_members_that_share_gpus_need_room_on_them_and_runs_alone_share_none(capsys, monkeypatch):
    monkeypatch.setattr(sweep, "gpu_names", lambda: ("a GPU",) * 2)
    monkeypatch.setattr(many, "gpu_names", lambda: ("a GPU",) * 2)
    told = "5 members of 1 GPUs (cluster.gpus_per_node) need 5, and 2 are visible, for 2 members each (--per-gpu). Set --parallel 4"
    assert told in train(capsys, "--parallel", "5", "--per-gpu", "2")[2]
    assert "needs 2 (cluster.gpus_per_node)" in train(capsys, "cluster.gpus_per_node=2", "--parallel", "2", "--per-gpu", "2")[2]
    assert cli.main(["train", TINY[0], "--per-gpu", "2"]) == 2
    assert "Add -m, or leave it out" in capsys.readouterr().err


def test_the_same_command_skips_what_is_done_and_repeats_what_has_failed(capsys):
    Path("runs/ngpt_tiny-sweep/seed=2").mkdir(parents=True)
    Path("runs/ngpt_tiny-sweep/seed=2/fail").touch()
    code, out, _ = train(capsys)
    assert code == 1 and Path("started").read_text() == "12"
    assert "seed=2 failed: no luck\n  ngpt train experiment=ngpt_tiny train.seed=2 run.name=ngpt_tiny-sweep_seed=2" in out
    assert "the same command goes on, with what is not done alone: ngpt train -m experiment=ngpt_tiny train.seed=1,2\n" in out
    kept = {member.name: (member.status, member.exit_code, member.val_loss) for member in read_sweep(Path("runs/ngpt_tiny-sweep")).members}
    assert kept == {"seed=1": ("done", 0, 1.0), "seed=2": ("failed", 1, None)}
    Path("runs/ngpt_tiny-sweep/seed=2/fail").unlink()
    code, out, _ = train(capsys)
    assert code == 0 and "one after another, 1 done before" in out and Path("started").read_text() == "122"


def test_more_values_add_members_and_other_words_are_another_sweep(capsys):
    assert train(capsys)[0] == 0
    folder = Path("runs/ngpt_tiny-sweep")
    assert cli.main(["train", "-m", TINY[0], "train.seed=range(2,4)", "cluster.hang_timeout_s=99"]) == 0
    assert Path("started").read_text() == "123"
    assert [member.name for member in read_sweep(folder).members] == ["seed=1", "seed=2", "seed=3"]
    capsys.readouterr()
    for words, told in (
        (["optim.lr=1"], "(optim.lr=1 is new)"),
        (["optim.lr=1,2"], "(optim.lr is swept now)"),
    ):
        code, _, err = train(capsys, *words)
        assert code == 2 and told in err and err.startswith("run.name: runs/ngpt_tiny-sweep holds another sweep ")
    assert Path("started").read_text() == "123"


def test_a_folder_that_holds_a_run_takes_no_sweep(capsys):
    Path("runs/a").mkdir(parents=True)
    Path("runs/a/config.yaml").touch()
    assert "runs/a holds a run" in train(capsys, "run.name=a")[2]


def test_a_run_is_done_where_it_has_reached_what_its_config_asks_for():
    config = plan_sweep(TINY, []).members[0].config
    run_dir = Path(config.run.dir)
    assert not is_done(config)
    record_outcome(run_dir, Outcome("signalled", 4, "SIGTERM", saved=True))
    assert not is_done(config)
    record_outcome(run_dir, Outcome("stopped", 3))
    assert not is_done(config)
    config.train.stop_after = 3
    assert is_done(config)
    config.train.stop_after = None
    record_outcome(run_dir, Outcome("finished", 4))
    assert is_done(config)


def test_a_signal_ends_the_sweep_with_75_and_the_same_command_goes_on(capsys):
    waits = Path("runs/ngpt_tiny-sweep/seed=1")
    waits.mkdir(parents=True)
    (waits / "wait").touch()

    def stop_it():
        while not (waits / "waits").exists():
            time.sleep(0.01)
        found.append(sweep_status(waits.parent))
        os.kill(os.getpid(), signal.SIGTERM)

    found = []
    threading.Thread(target=stop_it, daemon=True).start()
    code, out, _ = train(capsys)
    assert code == 75 and Path("started").read_text() == "1" and "the same command goes on" in out
    assert found[0]["launcher"]["pid"] == os.getpid() and found[0]["counts"] == {"running": 1, "waiting": 1}
    assert [member["status"] for member in sweep_status(waits.parent)["members"]] == ["stopped", "waiting"]
    (waits / "wait").unlink()
    assert train(capsys)[0] == 0 and Path("started").read_text() == "112"


def test_status_tells_what_the_folders_say_and_what_to_do_next(capsys):
    assert train(capsys)[0] == 0
    folder = "runs/ngpt_tiny-sweep"
    assert cli.main(["status", folder]) == 0
    assert capsys.readouterr().out.splitlines() == [
        "runs/ngpt_tiny-sweep: sweep over train.seed, 2 members: 2 done",
        "member  status  step  val loss",
        "seed=1  done    4     1.0000",
        "seed=2  done    4     2.0000",
        "next      ngpt report runs/ngpt_tiny-sweep",
    ]
    record_outcome(Path(folder, "seed=2"), Outcome("signalled", 4, "SIGTERM"))  # continued by itself, and stopped
    assert cli.main(["status", folder, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["counts"] == {"done": 1, "stopped": 1} and found["members"][1]["val_loss"] == 2.0
    assert cli.main(["stop", folder]) == 0
    assert capsys.readouterr().out == f"no member of {folder} runs\n"


def test_an_array_is_one_kind_of_job_and_the_sweeps_own(capsys):
    slurm = ["cluster.scheduler=slurm", "run.name=s"]
    for words, told in (
        (['cluster.sbatch=["--array=1-2"]'], "cluster.sbatch: --array=1-2. Many runs are an array itself"),
        (["cluster.nodes=1,2"], "asks for other resources"),
    ):
        assert cli.main(["launch", "-m", *TINY, *slurm, *words]) == 2
        assert told in capsys.readouterr().err
    assert cli.main(["launch", "-m", *TINY, *slurm, "--per-gpu", "2"]) == 2
    assert "--per-gpu: 2. Each member is a job with GPUs of its own" in capsys.readouterr().err
    assert cli.main(["launch", "-m", *TINY, *slurm, "--parallel", "3", "--dry-run"]) == 0
    shown = capsys.readouterr().out
    assert "#SBATCH --array=0-1%3\n" in shown and "#SBATCH --job-name=s\n" in shown and not Path("runs").exists()
