"""Runs taken from results made elsewhere: the same numbers, whole families, and only what is the same run and the same measure."""

import copy
import json
import math
from pathlib import Path
from typing import Any

import pytest

from ngpt.config.errors import ConfigError
from ngpt.study import results
from ngpt.study.evidence import taken_from
from ngpt.study.page import write_page
from ngpt.study.plan import Plan, PlannedRun
from tests.unit.analysis.runs import record, summary, write_run
from tests.unit.study.studies import TEXT, planned

MEASURES = """\
measures:
  gain: {source: snr, key: "linears/*/gain", unit: dB}
  spikes: {key: train_loss, take: count, above: 9.0}
"""
STUDY = TEXT.replace('options: [--tokens, "64"]', 'options: [--tokens, "{tokens}"]').replace("measures:\n", MEASURES)
STUDY = STUDY.replace("lists:\n", "lists:\n  tokens: [64]\n")
BRANCHES = ["gpt_trunk/seed=1", "gpt_bf16/seed=1", "gpt_nvfp4_nvidia/seed=1"]


def config_of(run: PlannedRun) -> str:
    """In place of a digest."""
    return f"config of {run.name}"


def has_config(run: PlannedRun, known: str) -> bool:
    return known == config_of(run)


def made(folder: Path, plan: Plan) -> dict[str, Any]:
    """Results of finished runs in a folder, one of which has lost its numbers on the way."""
    for run in plan.runs:
        lost = run.name == "wide/hidden_size=128_seed=2"
        losses = [record(step, val_loss=math.nan if lost and step > 2 else 4.0 - step / 100 + 0.01 * run.seed) for step in (2, 4, 8)]
        status = "stopped" if plan.is_trunk(run) else "finished"
        write_run(folder / run.name, losses, {"tokenizer": {"kind": "bytes"}}, summary(status=status, steps=8))
    for number, one in enumerate(plan.analyses[:3]):
        (folder / one.file).parent.mkdir()
        (folder / one.file).write_text(json.dumps({"results": {"linears": {"0": {"gain": number}, "1": {"gain": 6.0}}}}))
    return results.gather(plan, folder, "", "ngpt study mine", {"git": None}, configs={run.name: config_of(run) for run in plan.runs})


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    folder = tmp_path_factory.mktemp("made")
    return made(folder / "out", planned(folder, text=STUDY))


@pytest.fixture
def found(original):
    return copy.deepcopy(original)


@pytest.fixture
def plan(tmp_path):
    return planned(tmp_path, text=STUDY)


def kept(path: Path, found: dict[str, Any], **changes: Any) -> Path:
    """A file of results. Of the changes, those of `runs` go into the runs: name -> what changes."""
    changed = copy.deepcopy(found)
    for run in changed["runs"]:
        run |= changes.get(run["name"], {})
    path.parent.mkdir(exist_ok=True)
    results.write(changed, path)
    return path


def test_a_page_of_a_file_alone_has_the_numbers_of_its_runs_and_is_such_a_file(plan, found, tmp_path):
    path = kept(tmp_path / "there/results.json", found)
    first = f"{path.parent.name}/results.json"
    for _ in range(2):  # the second time from what the first has made, which names where the numbers are from
        taken, notes = taken_from([path], plan, set(), True, has_config)
        assert notes == [f"{len(plan.runs)} runs are in {path}"] and plan.without(taken).runs == plan.without(taken).analyses == ()
        again = results.gather(plan, tmp_path / "none", "", "ngpt study mine", {"git": None}, taken)
        assert {run["origin"] for run in again["runs"]} == {first} and {run["tokenizer"] for run in again["runs"]} == {"bytes"}
        assert {run["name"]: run["config_sha256"] for run in again["runs"]} == {run.name: config_of(run) for run in plan.runs}
        assert again["runs"] == [run | {"origin": first} for run in found["runs"]]
        assert [again[part] for part in ("comparisons", "verdict", "missing")] == [
            found[part] for part in ("comparisons", "verdict", "missing")
        ]
        assert again["missing"] == [f"{plan.analyses[-1].file}: not there"] and again["runs"][-1]["curves"]["val_loss"][-1][1] is None
        assert write_page(again, tmp_path / "page").exists()
        path = kept(tmp_path / "second/results.json", again)


def test_a_trunk_and_its_branches_come_from_one_place_whole(plan, found, tmp_path):
    whole, failed = kept(tmp_path / "a.json", found), kept(tmp_path / "b.json", found, **{BRANCHES[2]: {"status": "failed"}})
    others = {run.name for run in plan.runs} - set(BRANCHES)
    taken, notes = taken_from([failed], plan, set(), True, has_config)
    rule = "a trunk and all its branches come from one place"
    assert taken.keys() == others
    told = f"2 more runs in {failed} are not taken, the first is {BRANCHES[0]}: {rule}, and it lacks {BRANCHES[2]}"
    assert notes == [f"{len(others)} runs are in {failed}", told]
    taken, notes = taken_from([failed, whole], plan, set(), True, has_config)
    assert taken.keys() == others | set(BRANCHES) and notes[0] == f"{len(others)} runs are in {failed}"
    assert {taken[name].origin for name in BRANCHES} == {f"{tmp_path.name}/a.json"} != {taken[name].origin for name in others}
    taken, notes = taken_from([whole], plan, {BRANCHES[1], "wide/hidden_size=64_seed=1"}, True, has_config)  # what is finished here stays
    assert taken.keys() == others - {"wide/hidden_size=64_seed=1"} and notes[1].startswith("2 more runs")
    assert notes[1].endswith(rule)  # it lacks none
    for change in ({"status": "signalled"}, {"after": "ngpt_trunk/seed=1"}):
        assert taken_from([kept(tmp_path / "c.json", found, **{BRANCHES[1]: change})], plan, set(), True, has_config)[0].keys() == others
    taken, notes = taken_from([failed], plan, set(), False, has_config)  # nothing will be trained
    assert taken.keys() == others | set(BRANCHES[:2]) and len(notes) == 1
    taken, _ = taken_from([failed, whole], plan, set(), False, has_config)
    assert {taken[name].origin for name in BRANCHES} == {f"{tmp_path.name}/a.json"}
    assert not set(BRANCHES) & taken_from([failed], plan, {BRANCHES[2]}, False, has_config)[0].keys()
    stopped = kept(tmp_path / "c.json", found, **{"wide/hidden_size=64_seed=1": {"status": "stopped"}})  # no trunk, and not at its end
    assert "wide/hidden_size=64_seed=1" not in taken_from([stopped], plan, set(), True, has_config)[0]


def test_a_run_with_other_words_is_another_but_for_words_of_where_it_runs(plan, found, tmp_path):
    name = "wide/hidden_size=64_seed=1"
    (words,) = [run["words"] for run in found["runs"] if run["name"] == name]
    same = {"words": ["optim.lr=5", "cluster=h100_8", "logging.interval=2", *reversed(words)]}  # the last value of a key counts
    assert name in taken_from([kept(tmp_path / "a.json", found, **{name: same})], plan, set(), True, has_config)[0]
    path = kept(tmp_path / "a.json", found, **{name: {"words": [*words, "optim.lr=5"]}})
    taken, notes = taken_from([path], plan, set(), True, has_config)
    assert name not in taken and len(taken) == len(plan.runs) - 1
    assert notes[0] == f"1 runs in {path} have other words, the first is {name}: optim.lr=1e-3 optim.lr=5"


def test_of_two_files_the_first_counts_and_other_numbers_are_told_once(plan, found, tmp_path):
    first = kept(tmp_path / "first.json", found)
    name = "wide/hidden_size=64_seed=1"
    second = kept(tmp_path / "second.json", found, **{name: {"measures": {"loss": 9.0}}})
    loss = [run["measures"]["loss"] for run in found["runs"] if run["name"] == name][0]
    taken, notes = taken_from([first, second], plan, set(), True, has_config)
    assert taken[name].values["loss"] == loss
    assert notes[2:] == [f"1 runs have other numbers in {second}: those of {first} are taken"]
    taken, notes = taken_from([second, first], plan, set(), True, has_config)
    assert (taken[name].values, len(notes)) == ({"gain": None, "spikes": None, "loss": 9.0}, 3)  # what a file lacks is missing
    without = kept(tmp_path / "without.json", found, **{name: {"measures": {"loss": loss}}})
    assert len(taken_from([first, without], plan, set(), True, has_config)[1]) == 2


def test_a_run_whose_config_would_be_another_now_is_not_taken(plan, found, tmp_path):
    names = ["wide/hidden_size=64_seed=1", "wide/hidden_size=64_seed=2"]
    path = kept(tmp_path / "a.json", found, **{name: {"config_sha256": "of another"} for name in names})
    taken, notes = taken_from([path], plan, set(), True, has_config)
    assert taken.keys() == {run.name for run in plan.runs} - set(names)
    assert notes == [
        f"2 runs in {path} are not taken, the first is {names[0]}: its config is another now",
        f"{len(plan.runs) - 2} runs are in {path}",
    ]
    whole = kept(tmp_path / "b.json", found)
    assert {taken_from([path, whole], plan, set(), True, has_config)[0][name].origin for name in names} == {f"{tmp_path.name}/b.json"}
    path = kept(tmp_path / "a.json", found, **{BRANCHES[0]: {"config_sha256": "of another"}})  # a trunk: its branches stay with it
    assert taken_from([path], plan, set(), True, has_config)[0].keys() == {run.name for run in plan.runs} - set(BRANCHES)


def test_only_runs_that_may_be_taken_have_their_config_compared(plan, found, tmp_path):
    here, asked = {run.name for run in plan.runs[1:]}, []
    changed = kept(tmp_path / "a.json", found, **{plan.runs[-1].name: {"words": ["optim.lr=5"]}})
    taken_from([changed], plan, here, True, lambda run, known: asked.append(run.name) or True)
    assert asked == [plan.runs[0].name]


def test_a_file_without_digests_is_taken_by_its_words_and_that_is_told(plan, found, tmp_path):
    for run in found["runs"]:
        del run["config_sha256"]
    path = kept(tmp_path / "old.json", found)
    taken, notes = taken_from([path], plan, set(), True, has_config)
    assert len(taken) == len(plan.runs) and {one.config_sha256 for one in taken.values()} == {None}
    told = f"{path} does not say what its configs were: words alone are compared"
    assert notes == [told, f"{len(plan.runs)} runs are in {path}"]
    assert told not in taken_from([path], plan, {run.name for run in plan.runs}, True, has_config)[1]  # nothing is compared


def test_a_file_in_two_spellings_counts_once(plan, found, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = kept(Path("a.json"), found)
    (tmp_path / "link.json").symlink_to(path)
    spellings = [path, tmp_path / "a.json", Path("link.json")]
    assert taken_from(spellings, plan, set(), True, has_config)[1] == [f"{len(plan.runs)} runs are in a.json"]


def test_a_run_of_another_study_comes_from_the_file_that_has_it(plan, found, tmp_path):
    name = plan.runs[0].name
    path = kept(tmp_path / "a.json", found, **{name: {"origin": f"other_small/{name}"}})
    assert taken_from([path], plan, set(), True, has_config)[0][name].origin == f"{tmp_path.name}/a.json"


@pytest.mark.parametrize(
    ("place", "change", "measure", "old", "new"),
    [
        (("measures", "loss"), {"key": "train_loss"}, "loss", "key=train_loss", "key=val_loss"),
        (("measures", "loss"), {"take": "mean"}, "loss", "take=mean", "take=last"),
        (("measures", "spikes"), {"above": 1.0}, "spikes", "above=1.0", "above=9.0"),
        (("measures", "gain"), {"source": "metrics"}, "gain", "source=metrics", "source=snr"),
        (("analyses", "snr"), {"what": "ptq"}, "gain", "what=ptq", "what=snr"),
        (("analyses", "snr"), {"step": 2}, "gain", "step=2", "step=4"),
        (("analyses", "snr"), {"options": ["--tokens", "128"]}, "gain", "options=--tokens 128", "options=--tokens 64"),
        (("lists",), {"tokens": [128]}, "gain", "options=--tokens 128", "options=--tokens 64"),
    ],
)
def test_a_measure_taken_in_another_way_is_refused(plan, found, tmp_path, place, change, measure, old, new):
    part = found["study"]
    for key in place:
        part = part[key]
    part |= change
    path = kept(tmp_path / "old.json", found)
    with pytest.raises(ConfigError) as error:
        taken_from([path], plan, set(), True, has_config)
    one = error.value
    assert (one.path, one.got.partition(" is ")[0]) == (str(path), measure)
    assert old in one.got and new in one.rule and new not in one.got and old not in one.rule


def test_texts_of_a_measure_may_differ_and_a_new_measure_is_missing(plan, found, tmp_path):
    found["study"]["measures"]["loss"] |= {"says": "Other words.", "unit": "nats a token"}
    del found["study"]["measures"]["spikes"]
    found["study"]["analyses"]["snr"]["options"] = ["--tokens", "64"]  # of the list's only value
    for run in found["runs"]:
        del run["measures"]["spikes"]
    taken, _ = taken_from([kept(tmp_path / "old.json", found)], plan, set(), True, has_config)
    assert len(taken) == len(plan.runs) and {one.values["spikes"] for one in taken.values()} == {None}


def test_values_of_a_measure_that_the_file_does_not_define_are_not_taken(plan, found, tmp_path):
    name = plan.analyses[0].run
    del found["study"]["measures"]["gain"]
    taken, _ = taken_from([kept(tmp_path / "old.json", found)], plan, set(), True, has_config)
    assert taken[name].values["gain"] is None and taken[name].values["loss"] is not None and "gain" not in taken[name].layers
    found["study"]["measures"] = {}
    taken, _ = taken_from([kept(tmp_path / "old.json", found)], plan, set(), True, has_config)
    assert taken[name].values == dict.fromkeys(["gain", "spikes", "loss"]) and taken[name].curves


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"name": "other"}, "--from: .*It is of the study other, and mine was asked for"),
        ({"runs": [{}]}, "KeyError: 'name'.*Restore it"),
        ({"study": {"measures": {}}, "runs": [3]}, "TypeError: .*Restore it"),
        ({"study": {}}, "KeyError: 'measures'.*Restore it"),
        ({"runs": 3}, "runs is int.*Restore it"),
    ],
)
def test_results_of_another_study_and_damaged_ones_are_refused(plan, found, tmp_path, change, told):
    path = kept(tmp_path / "old.json", found)
    path.write_text(json.dumps(found | change))
    with pytest.raises(ConfigError, match=told):
        taken_from([path], plan, set(), True, has_config)


def test_values_that_are_no_numbers_are_refused(plan, found, tmp_path):
    for part, value in (
        ("measures", {"loss": "high"}),
        ("measures", {"loss": True}),
        ("measures", {"loss": 10**400}),
        ("tokens", 10**400),
        ("curves", {"val_loss": [3]}),
        ("curves", {"val_loss": [[1, True]]}),
        ("curves", {"val_loss": [["1", 2.0]]}),
        ("curves", {"val_loss": [[None, 2.0]]}),
        ("provenance", 3),
        ("tokenizer", ["bytes"]),
        ("layers", []),
        ("layers", {"gain": {"0": "much"}}),
        ("words", "optim.lr=5"),
        ("words", [3]),
        ("name", BRANCHES[1]),  # two of this name
    ):
        with pytest.raises(ConfigError, match="Restore it"):
            taken_from([kept(tmp_path / "old.json", found, **{BRANCHES[0]: {part: value}})], plan, set(), True, has_config)
