"""From run folders to results: numbers, what is missing or damaged, and files that are no results."""

import html
import json

import pytest

from launch import cli
from ngpt.config.errors import ConfigError
from ngpt.study import results
from ngpt.study.analyses import has_result
from ngpt.study.page import write_page
from tests.unit.analysis.runs import summary
from tests.unit.study.studies import TEXT, gathered, planned


def test_results_hold_the_numbers_their_definitions_and_what_is_missing(study):
    found = gathered(study)
    (row,) = [row for row in found["comparisons"]["gap"]["rows"] if row["arm"] == "gpt_nvfp4_nvidia"]
    assert row["by_seed"] == {"1": pytest.approx(0.1), "2": pytest.approx(0.2)}
    assert row["interval"]["estimate"] == pytest.approx(0.15)
    assert row["interval"]["high"] == pytest.approx(0.15 + 12.7062 * 0.05)  # Student's t of one degree of freedom
    (curve,) = [curve for curve in found["comparisons"]["gap"]["curves"] if curve["arm"] == "gpt_nvfp4_nvidia"]
    assert [place["estimate"] for place in curve["places"]] == pytest.approx([0.15] * 3)
    assert found["verdict"]["result"] == "undecided"
    assert found["study"]["claim"] == "It works." and found["study"]["lists"]["width"] == [64, 128]
    (run,) = [run for run in found["runs"] if run["name"] == "gpt_trunk/seed=1"]
    assert (run["status"], run["measures"]["loss"]) == ("stopped", pytest.approx(3.93)) and "train.seed=1" in run["words"]
    (wide,) = [run for run in found["runs"] if run["name"] == "wide/hidden_size=64_seed=1"]
    assert wide["measures"]["gain"] == pytest.approx(6.5) and wide["layers"]["rho"] == {"layers.0.qkv": 0.02, "layers.1.qkv": 0.02}
    assert found["missing"] == ["wide/hidden_size=128_seed=2: missing", f"{study[0].analyses[-1].file}: not there"]
    assert results.gather(*study, "", "", {})["comparisons"] == found["comparisons"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "No such file"),
        ("{", "Expecting"),
        ("[1]", "format list.*Give the"),
        ("{}", "format None.*Give the"),
        ('{"format": 99}', "format 99.*Use the version"),
        ('{"format": 1}', "No name.*Restore it"),
    ],
)
def test_files_that_are_no_results_are_told(tmp_path, text, message):
    path = tmp_path / "results.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(ConfigError, match=message):
        results.read(path)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"runs": 3}, "runs is int. "),
        ({"runs": None}, "runs is NoneType. "),
        ({"runs": [{}]}, "KeyError: 'arm'. "),
        ({"runs": [3]}, "TypeError: "),
        ({"comparisons": {}}, "KeyError: "),
        ({"verdict": {"result": "not judged", "rules": []}}, "ValueError: "),
    ],
)
def test_results_that_lack_what_the_page_shows_are_one_line(study, tmp_path, capsys, change, told):
    path = tmp_path / "damaged" / "results.json"
    path.parent.mkdir()
    results.write(gathered(study) | change, path)
    assert cli.main(["study", "--report", str(path)]) == 2
    shown = capsys.readouterr()
    assert shown.err.startswith(f"{path}: {told}") and shown.err.endswith("Restore it\n") and shown.err.count("\n") == 1
    assert shown.out == ""


def test_an_arm_whose_reference_does_not_belong_to_the_size_has_no_row(tmp_path):
    found = planned(tmp_path, size="large", text=TEXT.replace('arms: ["gpt_*bf16", wide]', 'arms: ["gpt_nvfp4*"]'))
    gathered = results.gather(found, tmp_path / "none", "", "ngpt study mine", {})
    assert gathered["comparisons"]["gap"] == {"rows": [], "curves": []} and gathered["verdict"]["result"] == "undecided"
    assert write_page(gathered, tmp_path).exists()


def test_results_that_alone_have_the_numbers_of_a_run_are_kept(study, tmp_path):
    path = tmp_path / "results.json"
    found = json.loads(json.dumps(gathered(study)))
    results.write(found, path)
    names = [run["name"] for run in found["runs"] if run["status"] == "finished"]
    fewer = found | {"runs": [run | {"status": "missing"} if run["name"] in names[:2] else run for run in found["runs"]]}
    trunks = {run["name"] for run in found["runs"] if run["status"] == "stopped"}

    def is_done(place, trunk):
        name = str(place.relative_to(tmp_path))
        assert trunk == (name in trunks)
        return name == names[0]  # its numbers are in its folder

    assert results.keep_lost(path, found, is_done) is None and path.exists()
    (tmp_path / names[1]).mkdir(parents=True)  # begun again
    note = results.keep_lost(path, fewer, is_done)
    kept = tmp_path / "results.kept1.json"
    shown = f"{kept} has their numbers, and ngpt study --report {kept} --out DIR shows them"
    assert note == f"1 runs of {path} are not there any more, the first is {names[1]}. {shown}"
    assert results.read(kept) == found and not path.exists()
    results.write(found, path)
    note = results.keep_lost(path, fewer | {"runs": []}, is_done)
    assert note.startswith(f"{len(names) + len(trunks) - 1} runs of ") and "results.kept2.json" in note
    path.write_text("{")
    assert results.keep_lost(path, fewer, is_done) is None


def test_a_branch_that_was_stopped_is_missing_and_a_trunk_is_not(study, tmp_path):
    plan, folder = study
    branch = "gpt_bf16/seed=1"
    (folder / branch / "summary.json").write_text(json.dumps(summary(status="stopped", steps=8)))
    found = gathered(study)
    assert f"{branch}: stopped" in found["missing"] and not any(line.startswith("gpt_trunk") for line in found["missing"])
    path = tmp_path / "results.json"
    results.write(found, path)
    note = results.keep_lost(path, found | {"runs": []}, lambda place, trunk: str(place.relative_to(tmp_path)) != branch)
    assert note is None  # it had not ended


@pytest.mark.parametrize(
    ("file", "content", "reason"),
    [
        ("summary.json", "{", "unreadable: summary.json: Expecting"),
        ("metrics.jsonl", "", "unreadable: metrics.jsonl: "),
        ("summary.json", None, "unfinished"),
    ],
)
def test_a_run_with_a_damaged_file_is_missing_and_the_page_is_made_of_the_others(study, tmp_path, file, content, reason):
    plan, folder = study
    name = "gpt_bf16/seed=1"
    before = {run["name"]: run for run in gathered(study)["runs"]}
    path = folder / name / file
    path.unlink() if content is None else path.write_text(content)
    found = gathered(study)
    (line,) = [line for line in found["missing"] if line.startswith(name)]
    assert line.startswith(f"{name}: {reason}") and str(folder) not in line
    assert all(run == before[run["name"]] for run in found["runs"] if run["name"] != name)
    assert [row["by_seed"].keys() for row in found["comparisons"]["gap"]["rows"]][-1] == ({"2"} if content is not None else {"1", "2"})
    results.write(found, tmp_path / "results.json")
    assert line in html.unescape(write_page(results.read(tmp_path / "results.json"), tmp_path).read_text())


@pytest.mark.parametrize(
    ("content", "got"),
    [
        ("", "Expecting"),
        ('{"results": {', "Expecting"),
        ("[1]", "no object with `results`"),
        ('{"results": []}', "no object with `results`"),
        ("\0", "Expecting"),
        (None, "Is a directory"),
    ],
)
def test_a_damaged_analysis_lacks_its_numbers_alone_and_the_page_says_what_heals_it(study, tmp_path, content, got):
    plan, folder = study
    damaged, before = plan.analyses[0], gathered(study)
    path = folder / damaged.file
    path.unlink()
    path.mkdir() if content is None else path.write_text(content)
    found = gathered(study)
    for run, old in zip(found["runs"], before["runs"], strict=True):
        if run["name"] == damaged.run:
            assert run["measures"] == {"loss": old["measures"]["loss"]} | dict.fromkeys(("gain", "rho", "rho_noise"))
            assert run["layers"] == dict.fromkeys(("gain", "rho", "rho_noise"), {}) and run["status"] == "finished"
        else:
            assert run == old
    (line,) = [line for line in found["missing"] if line.startswith(f"{damaged.file}: unreadable: ")]
    way_out = "The study makes it again, called without --report" if content is not None else "It is not made again: make it readable"
    assert got in line and line.endswith(f"Must be the JSON that `ngpt analyze` writes. {way_out}")
    assert has_result(path) == (content is None)  # what cannot be read may be a result
    assert len(found["missing"]) == len(before["missing"]) + 1 and str(folder) not in line
    results.write(found, tmp_path / "results.json")
    assert line in html.unescape(write_page(results.read(tmp_path / "results.json"), tmp_path).read_text())
