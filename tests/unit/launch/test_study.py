"""`ngpt study`: every shipped study composes, members wait for what they need, and folders are not mixed."""

import dataclasses
import json
import re

import pytest

from launch import cli
from launch.study import _check_folder, _members, _record_words
from launch.study_plan import checked, table
from launch.study_shared import WORDS_FILE, Shared, is_done
from ngpt.config.errors import ConfigError
from ngpt.config.folders import config_dir
from ngpt.config.kept_keys import check_kept_keys
from ngpt.config.study import load_study, studies
from ngpt.study.plan import plan
from tests.unit.study.studies import TEXT, planned, write_study

SHIPPED = [(name, size) for name in studies() for size in load_study(name).sizes]


@pytest.mark.parametrize(("name", "size"), SHIPPED)
def test_shipped_studies_compose_and_their_branches_may_continue_their_trunks(name, size, tmp_path):
    whole = plan(name, load_study(name), size)
    if size == "smoke":  # whose words all arms share: the first of each architecture has them
        first = {next(arm for arm in whole.study.arms if arm.startswith(architecture)) for architecture in ("gpt", "ngpt")}
        whole = dataclasses.replace(whole, runs=tuple(run for run in whole.runs if run.arm in first))
    configs = checked(whole, tmp_path, [], with_data=False)
    for run in whole.points:
        one = configs[run.name]
        assert one.config.run.dir.startswith(str(tmp_path / run.arm))
        assert (one.seconds is None) == (size == "smoke")
        if run.after is not None:
            trunk = configs[run.after]
            assert 0 < trunk.last == one.first < one.last == one.config.train.steps
            assert trunk.config.train.steps == one.config.train.steps
            check_kept_keys(trunk.config, one.config, tmp_path)
            decay = one.config.schedule.decay_fraction
            assert trunk.last <= one.last * (1 - decay), "a trunk ends before the rate decays"
    assert {run.seed for run in whole.runs} == set(whole.study.lists["seed"])
    assert f"{len(whole.runs)} runs" in table(whole, configs)


def test_every_study_has_a_smoke_size_first_that_judges_nothing_and_a_full_one_last_that_judges():
    for name in studies():
        study = load_study(name)
        first, *_, last = study.sizes
        assert (first, last) == ("smoke", "full")
        silent = {"smoke", "chance"}  # the latter compares BF16 with itself
        assert {size: spec.judges for size, spec in study.sizes.items()} == {size: size not in silent for size in study.sizes}
        assert len(study.lists["seed"]) >= 3 and study.verdict and study.figures


def test_members_wait_for_trunks_and_analyses_for_their_runs(tmp_path):
    whole = planned(tmp_path)
    configs = checked(whole, tmp_path, [write_study(tmp_path)])
    shared = Shared(whole, tmp_path, {name: one.config for name, one in configs.items()}, lambda run: configs[run.name].config)
    members = {member.name: member for member in _members(whole, configs, shared, [tmp_path])}
    assert members["gpt_bf16/seed=2"].after == ("gpt_trunk/seed=2",) and members["gpt_trunk/seed=1"].after == ()
    command = members["gpt_bf16/seed=2"].command
    assert command[0] == "train" and command[-1] == f"--config-dir={tmp_path}" and "train.seed=2" in command
    place = tmp_path / "gpt_bf16/seed=2"
    rule = f"It ended without error, and {place}/summary.json does not say that all its steps are trained"
    assert members["gpt_bf16/seed=2"].undone == f"{rule}. Remove the folder {place}: the same command trains the run again"
    analysis = members[whole.analyses[0].file]
    assert analysis.undone == f"It wrote no result to {tmp_path / whole.analyses[0].file}"
    assert analysis.after == ("wide/hidden_size=64_seed=1",) and analysis.command[0] == "analyze"
    assert len(members) == len(whole.runs) + len(whole.analyses)
    for run in whole.runs:
        assert cli.parser().read(list(members[run.name].command)).overrides


def test_a_run_is_done_where_its_summary_says_so(tmp_path):
    assert not is_done(tmp_path, trunk=True)
    for status, done in (("finished", (True, True)), ("stopped", (False, True)), ("signalled", (False, False))):
        (tmp_path / "summary.json").write_text(json.dumps({"status": status}))
        assert (is_done(tmp_path, trunk=False), is_done(tmp_path, trunk=True)) == done


def test_a_folder_keeps_to_the_words_that_its_runs_were_started_with(tmp_path):
    folder = tmp_path / "out"
    _check_folder(planned(tmp_path), folder)
    _record_words(planned(tmp_path), folder)
    (folder / "gpt_bf16/seed=1").mkdir(parents=True)
    again = planned(tmp_path, "cluster=cpu", "logging.interval=2", "seed=[1,2,3]")  # more seeds, another machine
    _check_folder(again, folder)
    _record_words(again, folder)
    assert "gpt_bf16/seed=3" in json.loads((folder / WORDS_FILE).read_text())
    message = "out: Holds another study. gpt_bf16/seed=1 was started with other words: .*train.steps=12 .*--out DIR"
    with pytest.raises(ConfigError, match=message):
        _check_folder(planned(tmp_path, "train.steps=12"), folder)


def test_a_plan_is_printed_and_mistakes_end_before_anything_starts(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    where = ["--config-dir", str(write_study(tmp_path))]
    assert cli.main(["study", "mine", "--plan", "seed=[1,2,3]", *where]) == 0
    shown = capsys.readouterr().out
    assert re.search(r"gpt_nvfp4_nvidia +3 x steps 5 to 8 +1.02K tokens", shown) and "15 runs, 6 analyses" in shown
    assert cli.main(["study", "mine", "optim.lrr=1", *where]) == 2
    assert "gpt_trunk/seed=1: optim.lrr: Unknown key" in capsys.readouterr().err
    assert cli.main(["study"]) == 2
    assert "ngpt list studies" in capsys.readouterr().err
    assert cli.main(["study", "mine", "--parallel", "0", *where]) == 2
    assert cli.main(["study", "mine", "--per-gpu", "2", *where]) == 2
    assert "--per-gpu: 2. No" in capsys.readouterr().err  # GPU here, or more than one run at a time
    assert cli.main(["list", "studies", *where]) == 0
    assert re.search(r"mine +A study of tests\.", capsys.readouterr().out)
    assert not (tmp_path / "runs").exists()


def test_a_plan_marks_times_of_runs_whose_gpu_waits_for_the_host(tmp_path):
    """Then the time says nothing of the model's size."""
    text = TEXT.replace("words: [experiment=ngpt_tiny]", "words: [experiment=ngpt_shallow, data=mock]")
    text = text.replace("width: [64, 128]", "width: [512, 4096]").replace("gpt_tiny", "gpt_shallow").replace("[train.steps=8, ", "[")
    whole = planned(tmp_path, text=text)
    lines = table(whole, checked(whole, tmp_path, [])).splitlines()
    (small,) = [line for line in lines if line.startswith("wide, model.hidden_size=512")]
    (large,) = [line for line in lines if line.startswith("wide, model.hidden_size=4096")]
    assert re.search(r" s \*  1 analyses$", small) and "*" not in large
    assert lines[-2] == "* the host's time to launch kernels, whatever their size: the GPU waits for it"


def test_a_size_that_says_nothing_has_no_colon_behind_it(tmp_path):
    whole = planned(tmp_path)
    assert table(whole, checked(whole, tmp_path, [write_study(tmp_path)])).splitlines()[0] == "mine, size small"


def test_the_study_of_the_page_is_one(tmp_path):
    text = (config_dir().parent / "ngpt/study/README.md").read_text(encoding="utf-8")
    found = planned(tmp_path, text=re.search(r"```yaml\n(.*?)```", text, re.DOTALL)[1])
    assert [run.name for run in found.runs if run.seed == 1] == ["trunk/seed=1", "plain/seed=1", "decay0.01/seed=1", "decay0.1/seed=1"]
    configs = checked(plan("mine", found.study, None, ["data=mock"]), tmp_path, [])
    check_kept_keys(configs["trunk/seed=1"].config, configs["decay0.1/seed=1"].config, tmp_path)
