"""What a resumed run may change: every key of the config has its verdict, and data prepared again is noticed.

That samples are said to be reordered where Megatron reorders them: tests/unit/training/test_sample_index.py.
"""

import copy
import functools
import json
from operator import attrgetter
from pathlib import Path

import pytest

from launch import resume_checks, run_folder
from launch.resumable import check_resumable, resume_notes
from launch.resume_checks import SOURCES_FILE
from launch.run_folder import record_launch
from ngpt.config.compose import compose, load
from ngpt.config.errors import ConfigError
from ngpt.config.schema import DataSource, TokenizerConfig
from ngpt.config.translate import leaf_types
from ngpt.data.plan import Options
from ngpt.data.prepare import prepare

OVERRIDE = "megatron.override_opt_param_scheduler=true"
REFUSED = "refused"
UNLESS_OVERRIDDEN = "refused without override_opt_param_scheduler"
NOTED = "noted"
FREE = "free"

# The first that the key starts with.
VERDICTS = {
    **dict.fromkeys(("model.name", "model.transformer_impl", "model.expert_impl", "model.mamba_chunk_size"), FREE),
    # Of layers that the tested model does not have: no part of it.
    **dict.fromkeys(("model.moe_", "model.mamba_", "model.mtp_"), FREE),
    "model.": REFUSED,
    "train.seq_length": REFUSED,
    "tokenizer.kind": REFUSED,
    "tokenizer.vocab_size": REFUSED,
    "tokenizer.": FREE,  # the tokens of the data decide
    **dict.fromkeys(("optim.optimizer", "optim.beta1", "optim.beta2", "optim.eps"), REFUSED),
    **dict.fromkeys(("optim.clip_grad", "optim.name"), FREE),
    "optim.": UNLESS_OVERRIDDEN,
    "schedule.name": FREE,
    "schedule.": UNLESS_OVERRIDDEN,
    **dict.fromkeys(("train.steps", "train.global_batch_size"), UNLESS_OVERRIDDEN),
    "parallel.distributed_optimizer": REFUSED,
    "train.seed": NOTED,
    "train.": FREE,
    **dict.fromkeys(("data.name", "data.num_workers", "data.cache_dir", "data.accept_changed"), FREE),
    "data.": NOTED,
    **dict.fromkeys(("precision.", "parallel.", "cluster.", "logging.", "checkpoint.", "debug.", "megatron"), FREE),
    "run.": FREE,  # another run.dir is another run
}
KEYS = [key for key, _ in leaf_types()]


def verdict_of(key):
    return next(verdict for start, verdict in VERDICTS.items() if key.startswith(start))


def another(value):
    if isinstance(value, bool):
        return not value
    if isinstance(value, int | float):
        return value * 2 + 1
    return {"manual_gc": True} if isinstance(value, dict) else ["x"] if isinstance(value, list) else f"{value}_other"


@pytest.fixture(scope="module")
def resumed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    config = compose(["experiment=ngpt_tiny", f"run.dir={folder / 'run'}", OVERRIDE])
    config.megatron.clear()
    record_launch(config, ["ngpt"], {})
    with_checkpoint(config)
    return config


@pytest.fixture(scope="module")
def known():
    return functools.cache(load)


@pytest.fixture
def read_once(known, monkeypatch):
    """The recorded config, which stays the same, is read and checked once for all keys."""
    for module in (run_folder, resume_checks):
        monkeypatch.setattr(module, "load", lambda path: copy.deepcopy(known(path)))


def with_checkpoint(config, step=2):
    folder = Path(config.checkpoint.dir)
    own = folder / f"iter_{step:07d}"
    own.mkdir(parents=True)
    for name, content in ((".metadata", "__0_0.distcp"), ("__0_0.distcp", "shard"), ("metadata.json", "{}")):
        (own / name).write_text(content)
    (folder / "latest_checkpointed_iteration.txt").write_text(str(step))


@pytest.mark.parametrize("key", [key for key in KEYS if key not in ("run.dir", "checkpoint.dir", "checkpoint.load", "checkpoint.resume")])
def test_every_key_has_its_verdict(resumed, read_once, key):
    """On resume a key is refused, or refused unless the schedule is replaced, or noted, or simply takes effect."""
    config = copy.deepcopy(resumed)
    section, _, name = key.rpartition(".")
    holder = attrgetter(section)(config) if section else config
    value = getattr(holder, name)
    setattr(holder, name, "E*-" if key == "model.layer_pattern" else [DataSource("x")] if key == "data.train" else another(value))
    # The sources of this config are not there: what they hold is the matter of other tests.
    config.data.mock = True if key != "data.mock" else config.data.mock

    def outcome():
        try:
            check_resumable(config)
        except ConfigError as refusal:
            assert key in str(refusal)
            return REFUSED
        config.data.valid = config.data.valid if key == "data.valid" else []
        return NOTED if any(key in note for note in resume_notes(config)) else FREE

    verdict = verdict_of(key)
    assert outcome() == (REFUSED if verdict == UNLESS_OVERRIDDEN else verdict)
    if verdict == UNLESS_OVERRIDDEN:
        config.megatron["override_opt_param_scheduler"] = True
        assert outcome() == FREE


def test_the_refusal_of_optimizer_keys_names_no_way_that_does_not_work(resumed):
    config = copy.deepcopy(resumed)
    config.optim.beta2, config.megatron["override_opt_param_scheduler"] = 0.99, True
    with pytest.raises(ConfigError, match="optim.beta2: 0.95 -> 0.99") as refusal:
        check_resumable(config)
    assert "override" not in str(refusal.value) and "checkpoint.load" in str(refusal.value)


def test_megatron_s_ramp_of_weight_decay_belongs_to_the_schedule(resumed):
    config = copy.deepcopy(resumed)
    config.megatron["weight_decay_incr_style"] = "linear"
    with pytest.raises(ConfigError, match="megatron.weight_decay_incr_style: .not set. -> linear"):
        check_resumable(config)


def make(folder, count):
    source = folder / "x.jsonl"
    source.write_text("".join(json.dumps({"text": f"text {i}"}) + "\n" for i in range(count)))
    prepare([source], folder / "d", TokenizerConfig(name="bytes", kind="bytes"), Options(split="50,50,0"), workers=1, overwrite=True)


@pytest.fixture
def make_config(tmp_path):
    data = [f"data.train=[{{path: {tmp_path}/d/train}}]", f"data.valid=[{{path: {tmp_path}/d/valid}}]", "data.mock=false"]
    base = ["experiment=ngpt_tiny", f"run.dir={tmp_path / 'run'}", *data]
    return lambda *overrides: compose([*base, *overrides])


def test_training_data_prepared_again_is_refused_on_resume_until_accepted(make_config, tmp_path):
    make(tmp_path, 100)
    record_launch(make_config(), [], {})
    with_checkpoint(make_config())
    assert resume_notes(make_config()) == []
    make(tmp_path, 120)
    refused = r"data.train: .*d/train was prepared again: 51 documents .* 63 documents .*data.accept_changed=true"
    with pytest.raises(ConfigError, match=refused):
        resume_notes(make_config())
    accepted = make_config("data.accept_changed=true")
    notes = resume_notes(accepted)
    assert len(notes) == 2 and all("was prepared again" in note for note in notes) and "data.valid" in notes[1]
    record_launch(accepted, [], {})
    assert resume_notes(make_config()) == []
    assert (tmp_path / "run" / "launches" / "001" / SOURCES_FILE).exists()


def test_other_validation_data_alone_is_noted(make_config, tmp_path):
    make(tmp_path, 100)
    record_launch(make_config(), [], {})
    with_checkpoint(make_config())
    path = tmp_path / "run" / SOURCES_FILE
    recorded = json.loads(path.read_text())
    next(iter(recorded["valid"].values()))["content"] = "other"
    path.write_text(json.dumps(recorded))
    assert [note.split(" was ")[0] for note in resume_notes(make_config())] == [f"note: {tmp_path}/d/valid (data.valid)"]


def test_without_a_checkpoint_data_may_change(make_config, tmp_path):
    make(tmp_path, 100)
    record_launch(make_config(), [], {})
    make(tmp_path, 120)
    assert resume_notes(make_config()) == []


@pytest.mark.parametrize("content", ["", "[]", "null", '{"train": []}', '{"train": {"x": 5}}', "[" * 100_000])
def test_a_damaged_record_of_the_data_compares_nothing(make_config, tmp_path, content):
    make(tmp_path, 100)
    record_launch(make_config(), [], {})
    with_checkpoint(make_config())
    (tmp_path / "run" / SOURCES_FILE).write_text(content)
    assert resume_notes(make_config()) == []


def test_a_longer_run_that_reaches_into_another_epoch_is_noted(make_config, tmp_path):
    make(tmp_path, 100)  # 440 tokens of training: 13 samples of 32 tokens
    record_launch(make_config("train.steps=1"), [], {})
    with_checkpoint(make_config(), 1)
    notes = resume_notes(make_config("train.steps=4", OVERRIDE))
    assert len(notes) == 1 and "1 -> 3 epochs" in notes[0] and "seen come again" in notes[0]
    assert resume_notes(make_config("train.steps=1", OVERRIDE)) == []
