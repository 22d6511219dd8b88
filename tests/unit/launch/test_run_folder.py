"""The run folder: what it records, what it refuses, what it keeps of earlier launches."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from launch import train
from launch.outcome import Outcome, record_outcome
from launch.provenance import git_state
from launch.resumable import check_resumable, resume_notes
from launch.run_folder import (
    first_failure,
    locked,
    locked_run,
    nothing_left,
    outcome_of,
    record_death,
    record_failure,
    record_interrupt,
    record_launch,
)
from ngpt.checkpoints.hashing import hash_file
from ngpt.checkpoints.manifest import WEIGHTS_ONLY, Manifest
from ngpt.config.checkpoints import newest_step
from ngpt.config.compose import compose, dump, load
from ngpt.config.errors import ConfigError
from ngpt.locks import LOCK_FILE

COMMAND = ["ngpt", "train", "experiment=ngpt_tiny", "run.name=a b"]


@pytest.fixture
def make_config(tmp_path):
    return lambda *overrides: compose(["experiment=ngpt_tiny", f"run.dir={tmp_path / 'run'}", *overrides])


def git(folder, *arguments):
    identity = ["-c", "user.name=t", "-c", "user.email=t@t"]
    return subprocess.run(["git", *identity, *arguments], cwd=folder, check=True, capture_output=True, text=True).stdout.strip()


def test_records_config_code_versions_and_command(make_config):
    config = make_config()
    path = record_launch(config, COMMAND, {"OMP_NUM_THREADS": "2"})
    assert load(path) == config
    recorded = json.loads((path.parent / "environment.json").read_text())
    assert recorded["command"] == "ngpt train experiment=ngpt_tiny 'run.name=a b'"
    assert recorded["versions"]["megatron-core"] == "0.19.2"
    assert recorded["versions"]["torch"].startswith("2.11")
    assert recorded["environment"] == {"OMP_NUM_THREADS": "2"}
    assert {"git", "python", "platform", "gpus", "started"} <= set(recorded)


def test_code_state_is_that_of_git(tmp_path):
    git(tmp_path, "init", "--initial-branch", "topic")
    (tmp_path / "code.py").write_text("a = 1\n")
    git(tmp_path, "add", "code.py")
    git(tmp_path, "commit", "--message", "first")
    commit = git(tmp_path, "rev-parse", "HEAD")
    assert git_state(tmp_path) == ({"commit": commit, "branch": "topic", "dirty": False, "untracked": []}, "")
    (tmp_path / "code.py").write_text("a = 2\n")
    (tmp_path / "new.py").write_text("")
    state, diff = git_state(tmp_path)
    assert state == {"commit": commit, "branch": "topic", "dirty": True, "untracked": ["new.py"]}
    assert "-a = 1\n+a = 2\n" in diff


def test_the_difference_restores_untracked_sources_and_is_bounded(tmp_path, monkeypatch):
    repository, copy = tmp_path / "a", tmp_path / "b"
    repository.mkdir()
    git(repository, "init", "--initial-branch", "topic")
    (repository / "code.py").write_text("a = 1\n")
    git(repository, "add", "code.py")
    git(repository, "commit", "--message", "first")
    git(tmp_path, "clone", str(repository), str(copy))
    (repository / "code.py").write_text("a = 2\n")
    (repository / "more").mkdir()
    texts = {"more/new.py": "b = 1\n\nc = 2", "empty.py": "", "line.yaml": "x: 1\n"}
    for name, text in texts.items():
        (repository / name).write_text(text)
    (repository / "weights.bin").write_bytes(b"x" * 100)
    (repository / "large.py").write_text("#" * 300_000)
    (repository / "odd.py").write_bytes(b"\xff\xfe")
    difference = git_state(repository)[1]
    assert "large.py, 300000 bytes, left out" in difference and "odd.py, no readable text" in difference and "weights" not in difference
    (tmp_path / "code.diff").write_text("".join(line for line in difference.splitlines(True) if not line.startswith("# untracked")))
    git(copy, "apply", str(tmp_path / "code.diff"))
    assert {name: (copy / name).read_text() for name in texts} == texts and (copy / "code.py").read_text() == "a = 2\n"
    monkeypatch.setattr("launch.provenance.MAX_DIFF_BYTES", 50)
    assert "cut off here" in git_state(repository)[1] and len(git_state(repository)[1]) < 150


def test_installed_code_has_no_git_state(tmp_path):
    assert git_state(tmp_path) == (None, "")


def with_checkpoint(config, step: int):
    folder = Path(config.checkpoint.dir)
    own = folder / f"iter_{step:07d}"
    own.mkdir(parents=True)
    for name, content in ((".metadata", "__0_0.distcp"), ("__0_0.distcp", "shard"), ("metadata.json", "{}")):
        (own / name).write_text(content)
    (folder / "latest_checkpointed_iteration.txt").write_text(str(step))


def test_a_run_without_a_checkpoint_may_start_again_with_another_schedule(make_config):
    record_launch(make_config(), COMMAND, {})
    check_resumable(make_config("train.steps=77", "precision=bf16"))


@pytest.mark.parametrize("override", ["train.steps=77", "optim.lr=0.5", "train.global_batch_size=16", "schedule.warmup_steps=1"])
def test_a_checkpoint_keeps_its_schedule(make_config, override):
    record_launch(make_config(), COMMAND, {})
    with_checkpoint(make_config(), 2)
    check_resumable(make_config("precision=bf16"))
    with pytest.raises(ConfigError, match=override.split("=")[0]):
        check_resumable(make_config(override))
    check_resumable(make_config(override, "megatron.override_opt_param_scheduler=true"))


def with_described_checkpoint(config, step: int, extra: dict | None = None):
    """One that carries its config and a manifest."""
    with_checkpoint(config, step)
    folder = Path(config.checkpoint.dir) / f"iter_{step:07d}"
    dump(config, folder / "config.yaml")
    Manifest(step, {path.name: hash_file(path) for path in folder.iterdir()}, extra=extra or {}).save(folder)


def test_weights_alone_start_new_runs_and_continue_none(make_config, tmp_path):
    source = make_config(f"run.dir={tmp_path / 'imported'}")
    with_described_checkpoint(source, 0, {WEIGHTS_ONLY: True})
    load = f"checkpoint.load={source.checkpoint.dir}"
    check_resumable(make_config(load))
    with pytest.raises(ConfigError, match="holds weights alone.*checkpoint.load_optimizer=false"):
        check_resumable(make_config(load, "checkpoint.load_optimizer=true"))
    with pytest.raises(ConfigError, match=f"holds weights alone.*checkpoint.load={source.checkpoint.dir}"):
        check_resumable(source)


def test_weights_may_learn_otherwise_but_not_compute_otherwise(make_config, tmp_path):
    source = make_config(f"run.dir={tmp_path / 'other'}", "model=gpt_hybrid_tiny")
    with_described_checkpoint(source, 2)
    start = ("model=gpt_hybrid_tiny", f"checkpoint.load={source.checkpoint.dir}")
    other = ("model.init_std=0.01", "model.moe_aux_loss_coeff=0.5", "model.moe_expert_bias_rate=0.1", "model.alpha_init=0.1")
    check_resumable(make_config(*start, *other))
    with_optimizer = (*start, "checkpoint.load_optimizer=true")
    check_resumable(make_config(*with_optimizer))
    for change in other:
        with pytest.raises(ConfigError, match=change.split("=")[0]):
            check_resumable(make_config(*with_optimizer, change))
    for change in ("model.moe_scaling=2.0", "model.moe_expert_bias=false", "model.norm_epsilon=1e-6"):
        with pytest.raises(ConfigError, match=change.split("=")[0]):
            check_resumable(make_config(*start, change))


def test_a_finished_run_has_nothing_left(make_config):
    config = make_config()
    assert nothing_left(config) is None
    with_checkpoint(config, config.train.steps - 1)
    assert nothing_left(config) is None
    assert "train.stop_after is 2" in nothing_left(make_config("train.stop_after=2"))
    dump(config, Path(config.run.dir) / "config.yaml")
    assert nothing_left(make_config("train.stop_after=2", "logging.interval=5", "data.num_workers=0")).endswith("nothing to train")
    told = nothing_left(make_config("train.stop_after=2", "data.mock=false", "data.train=[{path: a}]", "data.valid=[{path: b}]"))
    assert "It was trained with other values (data.mock: True -> False; data.train" in told
    with_checkpoint(config, config.train.steps)
    assert "nothing to train" in nothing_left(config)


def test_a_finished_run_has_nothing_left_on_a_machine_that_could_not_train_it(make_config, monkeypatch, capsys):
    monkeypatch.setattr(train, "gpu_names", lambda: ())
    monkeypatch.setattr(train, "run_and_tee", lambda *_, **__: pytest.fail("started workers"))
    config = make_config("precision=mxfp8")
    with_checkpoint(config, config.train.steps - 1)
    with pytest.raises(ConfigError, match="Transformer Engine needs a CUDA GPU"):
        train.train_config(config, COMMAND)
    with_checkpoint(config, config.train.steps)
    assert train.train_config(config, COMMAND) == 0 and "nothing to train" in capsys.readouterr().out


def test_a_finished_run_whose_last_checkpoint_has_changed_goes_on_from_the_one_before(make_config):
    config = make_config()
    with_checkpoint(config, 2)
    with_checkpoint(config, config.train.steps)
    own = Path(config.checkpoint.dir) / f"iter_{config.train.steps:07d}"
    Manifest(config.train.steps, {path.name: hash_file(path) for path in own.iterdir()}).save(own)
    shard = own / "__0_0.distcp"
    shard.write_bytes(bytes(byte ^ 1 for byte in shard.read_bytes()))
    assert nothing_left(config, verify=True) is None
    assert "nothing to train" in nothing_left(make_config("checkpoint.verify=sizes"), verify=True)
    with pytest.raises(ConfigError, match="another checksum"):
        nothing_left(make_config("checkpoint.fallback=false"), verify=True)


def test_changed_data_on_resume_is_noted(make_config):
    record_launch(make_config(), COMMAND, {})
    with_checkpoint(make_config(), 2)
    assert resume_notes(make_config()) == []
    assert "train.seed: 1234 -> 5" in resume_notes(make_config("train.seed=5"))[0]


def saved_with(config, step: int):
    """A checkpoint that carries the config it was saved with, in the folder of `config`."""
    with_checkpoint(config, step)
    own = Path(config.checkpoint.dir) / f"iter_{step:07d}"
    dump(config, own / "config.yaml")
    Manifest(step, {path.name: hash_file(path) for path in own.iterdir()}).save(own)


def test_the_schedule_that_binds_is_the_checkpoints_and_not_the_last_launchs(make_config):
    saved_with(make_config(), 2)
    record_launch(make_config("optim.lr=0.5", "megatron.override_opt_param_scheduler=true"), COMMAND, {})  # ended before its first save
    check_resumable(make_config())
    with pytest.raises(ConfigError, match=r"iter_0000002 is a checkpoint of another schedule .optim.lr.*\. With the optimizer's"):
        check_resumable(make_config("optim.lr=0.5"))


def test_a_lost_config_of_the_run_folder_loosens_nothing(make_config):
    saved_with(make_config(), 2)
    with pytest.raises(ConfigError, match="another schedule"):
        check_resumable(make_config("optim.lr=0.5"))


def test_what_starts_anew_among_checkpoints_is_refused(make_config):
    check_resumable(make_config("checkpoint.resume=false"))
    with_checkpoint(make_config(), 2)
    with pytest.raises(ConfigError, match="checkpoint.resume: False.*run.name"):
        check_resumable(make_config("checkpoint.resume=false"))


def test_two_runs_cannot_share_a_checkpoints_folder(make_config, tmp_path):
    first, second = (make_config(f"run.dir={tmp_path / name}", f"checkpoint.dir={tmp_path / 'shared'}") for name in ("a", "b"))
    with locked_run(first):
        with pytest.raises(ConfigError, match="checkpoint.dir: .*shared. Is being trained by"), locked_run(second):
            pass
    with locked_run(second):
        pass


def test_a_second_ctrl_c_is_no_death_that_needs_an_explanation(tmp_path):
    record_death(tmp_path, 1, -9, when=1.0)
    record_interrupt(tmp_path)
    assert first_failure(tmp_path)["message"] == "a second Ctrl-C killed the workers"


def test_another_model_is_refused_with_both_values(make_config):
    record_launch(make_config(), COMMAND, {})
    with pytest.raises(ConfigError, match="model.ffn_hidden_size: 160 -> 192") as refusal:
        check_resumable(make_config("model.ffn_hidden_size=192"))
    assert refusal.value.path == "run.dir"
    assert "run.name" in str(refusal.value)


def test_the_folder_is_checked_again_once_it_is_locked(make_config):
    path = record_launch(make_config(), COMMAND, {})  # another launch, which came while this one verified its data
    with pytest.raises(ConfigError, match="holds a run of another model"):
        train._run_all_ranks(make_config("model.ffn_hidden_size=192"), 1, {}, COMMAND)
    assert load(path) == make_config()


def test_a_validation_split_without_a_whole_sequence_is_refused_before_the_start(make_config, monkeypatch):
    words = ["data.mock=false", "data.train=[{path: a/train}]", "data.valid=[{path: a/valid}]"]
    config = make_config(*words, "train.seq_length=16")
    manifest = SimpleNamespace(splits={"valid": SimpleNamespace(tokens=16)})  # a sequence takes one more
    monkeypatch.setattr("ngpt.data.validation.split_of", lambda prefix: (manifest, "valid"))
    monkeypatch.setattr(train, "check_against_model", lambda *_: None)
    with pytest.raises(ConfigError, match="data.valid: a/valid: 16 tokens. A sequence takes train.seq_length 16 tokens and the one behind"):
        train.check_prepared(config)
    train.check_prepared(make_config(*words, "train.seq_length=15"))
    train.check_prepared(make_config(*words, "train.seq_length=16", "train.eval_steps=0", "train.eval_whole_split=false"))


def test_an_earlier_launch_is_kept(make_config):
    first = make_config()
    path = record_launch(first, COMMAND, {})
    record_launch(make_config("train.steps=77"), COMMAND, {})
    record_launch(make_config("train.steps=78"), COMMAND, {})
    assert load(path).train.steps == 78
    kept = path.parent / "launches"
    assert sorted(folder.name for folder in kept.iterdir()) == ["001", "002"]
    assert load(kept / "001" / "config.yaml").train.steps == first.train.steps
    assert (kept / "001" / "environment.json").exists()


@pytest.mark.parametrize("died", [True, False])
def test_a_failure_during_start_up_is_told_though_the_others_were_told_to_leave(tmp_path, died):
    record_outcome(tmp_path, Outcome("signalled", signal="SIGTERM"))  # by the rank that was told
    if died:
        record_death(tmp_path, 1, -9, when=1.0)
    else:
        record_failure(tmp_path, 1, ConfigError("a", "b", "c", "d"), when=1.0)
    assert outcome_of(tmp_path) is None and first_failure(tmp_path)["rank"] == 1


def test_ranks_that_all_left_during_start_up_did_not_fail(tmp_path):
    record_outcome(tmp_path, Outcome("signalled", signal="SIGTERM"))
    record_death(tmp_path, 1, 75, when=1.0)
    record_failure(tmp_path, 2, RuntimeError("Connection closed by peer"), when=2.0)
    assert outcome_of(tmp_path).exit_code == 75


def test_the_first_failure_is_the_cause_and_a_new_launch_forgets_it(make_config):
    folder = record_launch(make_config(), COMMAND, {}).parent
    record_failure(folder, 0, RuntimeError("connection reset"), when=20.0)
    record_failure(folder, 3, ValueError("loss is NaN"), when=10.0)
    assert first_failure(folder) == {"rank": 3, "time": 10.0, "error": "ValueError", "message": "loss is NaN", "mistake": False}
    record_launch(make_config(), COMMAND, {})
    assert first_failure(folder) is None


def test_the_launcher_takes_the_checkpoint_that_the_workers_take(make_config):
    """Which one it is for every state of a folder: tests/unit/checkpoints/test_choice.py."""
    config = make_config()
    with_checkpoint(config, 2)
    with_checkpoint(config, config.train.steps)
    assert nothing_left(config) is not None
    (Path(config.checkpoint.dir) / f"iter_{config.train.steps:07d}" / "__0_0.distcp").unlink()
    assert newest_step(config) == 2 and nothing_left(config) is None
    with pytest.raises(ConfigError, match="__0_0.distcp: missing.*step 2"):
        newest_step(make_config("checkpoint.fallback=false"))
    assert newest_step(make_config("checkpoint.resume=false")) is None


def carrying(config, step: int, saved):
    """A checkpoint of `config` that says it was saved by `saved`, as far as a look at its config goes."""
    with_checkpoint(config, step)
    own = Path(config.checkpoint.dir) / f"iter_{step:07d}"
    dump(saved, own / "config.yaml")
    Manifest(step, {path.name: hash_file(path) for path in own.iterdir()}).save(own)


def test_a_moved_checkpoint_of_another_model_is_refused_by_its_own_config(make_config, tmp_path):
    config = make_config()
    carrying(config, 2, make_config("model.ffn_hidden_size=192", f"run.dir={tmp_path / 'elsewhere'}"))
    with pytest.raises(
        ConfigError, match="checkpoint.dir: .*iter_0000002 holds another model .*ffn_hidden_size: 192 -> 160.*run.name=NAME"
    ):
        check_resumable(config)


def test_weights_of_another_model_are_refused_wherever_they_lie(make_config, tmp_path):
    source = make_config(f"run.dir={tmp_path / 'source'}")
    carrying(source, 2, make_config("model.ffn_hidden_size=192"))
    with pytest.raises(ConfigError, match="checkpoint.load: .*another model .model.ffn_hidden_size: 192 -> 160"):
        check_resumable(make_config(f"checkpoint.load={source.checkpoint.dir}"))


def test_weights_may_learn_another_length(make_config, tmp_path):
    source = make_config(f"run.dir={tmp_path / 'source'}")
    carrying(source, 2, source)
    check_resumable(make_config(f"checkpoint.load={source.checkpoint.dir}", "train.seq_length=16"))


def test_the_run_folder_in_place_of_its_checkpoints_gets_a_hint(make_config, tmp_path):
    config = make_config()
    with_checkpoint(config, 2)
    with pytest.raises(ConfigError, match="Set checkpoint.load=.*run/checkpoints"):
        check_resumable(make_config(f"run.dir={tmp_path / 'other'}", f"checkpoint.load={config.run.dir}"))


def test_a_folder_is_one_launch_s_until_it_ends(tmp_path):
    """The other holder is a process of its own, which ends without letting go."""
    folder = tmp_path / "run"
    hold = "import sys, time; from pathlib import Path; from launch.run_folder import locked\n"
    hold += f"with locked(Path({str(folder)!r})): print('held', flush=True); time.sleep(600)"
    with subprocess.Popen([sys.executable, "-c", hold], stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(ConfigError, match=f"run.dir: .*Is being trained by process {holder.pid} on .*run.name"), locked(folder):
            pass
        holder.kill()
    with locked(folder):
        assert f"process {os.getpid()} " in (folder / LOCK_FILE).read_text()


def test_a_checkpoints_folder_is_one_launch_s_however_it_is_spelled(make_config, tmp_path):
    own = make_config()
    other = make_config(f"run.dir={tmp_path / 'other'}", f"checkpoint.dir={own.run.dir}/./checkpoints/")
    with locked_run(own):
        with pytest.raises(ConfigError, match="checkpoint.dir"), locked_run(other):
            pass
    with locked_run(make_config(f"checkpoint.dir={own.run.dir}/")):  # the run folder itself: one lock
        pass


def test_another_runs_optimizer_brings_its_schedule(make_config, tmp_path):
    saved_with(make_config(), 2)
    load_it = [f"run.dir={tmp_path / 'other'}", f"checkpoint.load={make_config().checkpoint.dir}", "optim.lr=0.5"]
    check_resumable(make_config(*load_it))
    with pytest.raises(ConfigError, match="checkpoint.load: .*another schedule.*checkpoint.load_optimizer=false"):
        check_resumable(make_config(*load_it, "checkpoint.load_optimizer=true"))
