import re

import pytest

from ngpt.config.errors import ConfigError
from ngpt.config.study import load_study
from ngpt.study.plan import merged, plan
from tests.unit.study.studies import HEAD, TAIL, TEXT, loaded, planned, write_study


def test_every_arm_point_and_seed_is_a_run_with_the_words_of_its_trunk(tmp_path):
    found = planned(tmp_path)
    assert [run.name for run in found.runs] == [
        *("gpt_trunk/seed=1", "gpt_trunk/seed=2", "gpt_bf16/seed=1", "gpt_bf16/seed=2"),
        *("gpt_nvfp4_nvidia/seed=1", "gpt_nvfp4_nvidia/seed=2"),
        *("wide/hidden_size=64_seed=1", "wide/hidden_size=64_seed=2", "wide/hidden_size=128_seed=1", "wide/hidden_size=128_seed=2"),
    ]
    trunk, *_, branch = found.runs[1:6]
    assert set(trunk.words) - set(branch.words) == {"precision=bf16", "train.stop_after='${fraction:${train.steps},0.5}'"}
    assert set(branch.words) - set(trunk.words) == {"precision=nvfp4_nvidia"}
    assert {"experiment=gpt_tiny", "train.steps=8", "train.seed=2"} < set(branch.words)
    assert (branch.seed, branch.after) == (2, "gpt_trunk/seed=2")
    located = branch.located(tmp_path / "out", "mine")
    assert f"checkpoint.load={tmp_path}/out/gpt_trunk/seed=2/checkpoints" in located and "checkpoint.load_optimizer=true" in located
    assert f"run.dir={tmp_path}/out/gpt_nvfp4_nvidia/seed=2" in located and "run.name=mine_gpt_nvfp4_nvidia_seed=2" in located
    assert found.study.arms["gpt_nvfp4_nvidia"].label == "GPT, nvfp4_nvidia"
    assert dict(found.runs[-1].point) == {"model.hidden_size": 128}


def test_each_analysis_belongs_to_a_run_and_says_its_file(tmp_path):
    one, *others = planned(tmp_path).analyses
    assert (one.run, len(others)) == ("wide/hidden_size=64_seed=1", 3)
    folder = tmp_path / "wide/hidden_size=64_seed=1"
    words = ["--what", "snr", "--step", "4", "--tokens", "64", "--out", str(tmp_path / one.file)]
    assert one.command(tmp_path) == ["analyze", str(folder), *words]


def test_a_result_with_other_options_has_another_file(tmp_path):
    """Runs are shared between studies: a study must not take the result of another one's question for its own."""
    files = [planned(tmp_path, text=TEXT.replace('"64"', tokens)).analyses[0].file for tokens in ('"64"', '"128"', '"64"')]
    assert files[0] == files[2] != files[1]
    assert all(re.fullmatch(r"wide/hidden_size=64_seed=1/analysis/study_snr_[0-9a-f]{8}\.json", file) for file in files)


def test_a_size_replaces_lists_and_keeps_the_trunks_of_its_arms(tmp_path):
    found = planned(tmp_path, size="large")
    assert list(found.study.arms) == ["gpt_trunk", "gpt_bf16", "wide"]
    assert {run.seed for run in found.runs} == {1, 2, 3} and "train.steps=80" in found.runs[0].words


def test_words_of_the_command_line_change_lists_and_configs(tmp_path):
    found = planned(tmp_path, "seed=7", "recipe+=mine", "train.steps=12", "optim.lr=2e-3")
    assert {run.seed for run in found.runs} == {7}
    assert {"gpt_nvfp4_nvidia", "gpt_mine"} < set(found.study.arms)
    assert all({"train.steps=12", "optim.lr=2e-3"} < set(run.words) and "train.steps=8" not in run.words for run in found.runs)


def test_a_key_goes_by_the_scanned_value(tmp_path):
    text = TEXT.replace("width}}", 'width}, by: {optim.lr: {"64": 2.0e-3, "128": 1.0e-3}}}').replace(", optim.lr=1e-3", "")
    rates = {run.point["model.hidden_size"]: run.words for run in planned(tmp_path, text=text).runs if run.point}
    assert "optim.lr=0.002" in rates[64] and "optim.lr=0.001" in rates[128]
    with pytest.raises(ConfigError, match=r"arms.wide.by.optim.lr: 256. There is a value for 64, 128. Add one for this"):
        planned(tmp_path, "width=[256]", text=text)
    with pytest.raises(ConfigError, match=r"arms.gpt_trunk.by: optim.lr. Goes by the one key in `over`"):
        planned(tmp_path, text=text.replace("until: 0.5}", 'until: 0.5, by: {optim.lr: {"64": 1.0}}}'))


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("model.hidden_size=64", r"model.hidden_size: .* arms.wide.over sets it to the values of the list width. .*: width=\[A,B\]"),
        ("optim.lr=1e-2", r"arms.wide.by sets it, by the value of the list width. Change `by` in a copy of the study, DIR/study/mine.yaml"),
        ("train.seed=3", r"train.seed: train.seed=3. The list seed sets it in every run. Change that list: seed=\[1,2\]"),
        ("experiment=ngpt_tiny", r"The words of every arm set it: experiment={model}, experiment=gpt_tiny. Change model=\[A,B\]"),
        ("run.dir=x", r"run.dir: run.dir=x. A study names its runs and their folders. Say where the study belongs, --out DIR"),
        ("precision.dtype=fp32", r"precision.dtype=bf16. Change them in a copy of the study, DIR/study/mine.yaml with --config-dir DIR"),
    ],
)
def test_a_word_that_would_do_nothing_is_refused(tmp_path, word, message):
    text = """\
lists: {seed: [1], width: [64], model: [ngpt_tiny], wd: [0.1]}
arms:
  wide:
    words: ["experiment={model}", precision.dtype=bf16]
    over: {model.hidden_size: width}
    by: {optim.lr: {"64": 2.0e-3}}
  "mine{wd}":
    words: [experiment=gpt_tiny, precision.dtype=bf16, "optim.weight_decay={wd}"]
    over: {model.hidden_size: width}
    by: {optim.lr: {"64": 1.0e-3}}
"""
    text = HEAD + text + TAIL
    with pytest.raises(ConfigError, match=message):
        planned(tmp_path, word, text=text)
    runs = planned(tmp_path, "optim.weight_decay=0.5", "train.steps=1", "train.steps=2", text=text).runs  # of one of the arms
    assert ["optim.weight_decay=0.5" in run.words for run in runs] == [True, False] and "train.steps=2" in runs[0].words
    without = text.replace('    by: {optim.lr: {"64": 1.0e-3}}\n', "")  # then one arm takes the word, and the other has its own
    assert ["optim.lr=5e-3" in run.words for run in planned(tmp_path, "optim.lr=5e-3", text=without).runs] == [False, True]


def test_a_list_that_changes_no_run_of_the_size_is_refused(tmp_path):
    study, word = loaded(tmp_path, TEXT), "recipe+=nvfp4_paper"
    with pytest.raises(ConfigError, match=r"recipe: .*nvfp4_paper.*No run of size large depends on it. Choose .* of small, large"):
        plan("mine", study, "large", [word])
    assert any("precision=nvfp4_paper" in run.words for run in plan("mine", study, "small", [word]).runs)


def test_a_key_is_given_once_as_it_was_last_given():
    assert merged(["a.b=1", "c=2", "+a.b=3", "~d"]) == ["+a.b=3", "c=2", "~d"]


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("measure: loss,", "measure: los,", r"mine.yaml:20: comparisons.gap.measure: los. No measure has this name. Did you mean loss"),
        ("kind: tokens", "kind: token", r"mine.yaml:22: figures\[0\].kind: token. Must be one of intervals, tokens"),
        ("must: be_above", "must: rise", r"mine.yaml:24: verdict\[0\].must"),
        ("until: 0.5", "until: 1.5", r"mine.yaml:11: arms.gpt_trunk.until: 1.5. Is a part of the steps"),
        ("width: [64", "widths: [64", r"arms.wide.over: width. No list has this name. Did you mean widths"),
        ("  seed: [1, 2]\n", "", "lists: No list seed. Every run has a seed"),
        ("claim: It works.", "claims: It works.", "claims"),
        ("claim: It works.\n", "", "claim"),
        ("words: [experiment=ngpt_tiny]", "words: {a: 1}", "mine.yaml: config: Cannot merge"),
        ("tuning: None.", "tuning: [", "Must be a readable YAML file"),
    ],
)
def test_a_mistake_in_the_file_is_told_with_its_place(tmp_path, old, new, message):
    assert old in TEXT
    with pytest.raises(ConfigError, match=message):
        loaded(tmp_path, TEXT.replace(old, new, 1))


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("arms: [wide], options", "arms: [wider], options", "analyses.snr.arms: wider. Matches none of the arms gpt_trunk"),
        ('"gpt_*": gpt_bf16}}', '"gpt_*": gpt_bf61}}', "comparisons.gap.less: gpt_bf61. Matches none"),
        ("gpt_bf16: {after: gpt_trunk}", "gpt_bf16: {after: wide}", "arms.gpt_bf16.after: wide. Arms continue a trunk"),
        ("gpt_bf16: {after", "gpt_nvfp4_nvidia: {after", "gpt_nvfp4_nvidia. Is the name of two arms"),
        ("gpt_bf16: {after: gpt_trunk}", "gpt_bf16: {after: gpt_trunk, over: {model.hidden_size: width}}", "gpt_trunk has no run for each"),
        ("recipe: [nvfp4_nvidia]", "recipe: [nvfp4_nvidia, nvfp4_nvidia]", "Must be a list of different values"),
        ("seed: [1, 2]", "seed: [1, b]", "seed: b. Must be a whole number"),
    ],
)
def test_names_that_match_nothing_are_mistakes(tmp_path, old, new, message):
    assert old in TEXT
    with pytest.raises(ConfigError, match=message):
        planned(tmp_path, text=TEXT.replace(old, new, 1))


def test_unknown_studies_sizes_and_words_are_told(tmp_path):
    folder = write_study(tmp_path)
    with pytest.raises(ConfigError, match="ngpt study: mien. There are .*mine. Did you mean mine"):
        load_study("mien", [folder])
    with pytest.raises(ConfigError, match="--size: huge. mine has the sizes small, large"):
        planned(tmp_path, size="huge")
    with pytest.raises(ConfigError, match=r"seed: \[. Cannot be read as a list"):
        planned(tmp_path, "seed=[")
