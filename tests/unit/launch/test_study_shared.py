"""A run that another study has finished is linked, not trained again; what it is compared by; what happens once it is gone."""

import dataclasses
import json
import os
import shutil
from datetime import UTC, datetime
from pathlib import Path

import pytest

from launch import cli, study
from launch.many import DONE, State
from launch.resume_checks import SOURCES_FILE, has_data_of
from launch.run_folder import locked, record_launch
from launch.study_plan import digests
from launch.study_shared import IGNORED, Shared, compared, digest, digest_of
from ngpt.config.compose import compose, dump
from ngpt.config.identity import flatten
from ngpt.config.schema import TokenizerConfig
from ngpt.config.translate import leaf_types
from ngpt.data.plan import Options
from ngpt.data.prepare import prepare
from ngpt.progress import write_json
from ngpt.study.plan import Plan, PlannedRun
from ngpt.study.results import gather, write
from tests.unit.study.studies import HEAD, TAIL, planned, write_study

TEXT = (
    HEAD
    + """\
words: [experiment=ngpt_tiny, train.steps=8]
lists: {seed: [1], decay: [0.1], tokens: [64]}
arms:
  trunk: {until: 0.5}
  "decay{decay}": {after: trunk, words: ["optim.weight_decay={decay}"]}
analyses:
  ptq: {what: ptq, arms: ["decay*"], options: [--tokens, "{tokens}"]}
"""
    + TAIL
)


def run_members(members, parallel, report, per_gpu):
    """In place of that of launch/many.py: members in order, which note what they were called for and leave what one leaves."""
    for member in members:
        if member.is_done():
            continue
        kind, *words = member.command
        if kind == "analyze":
            place = Path(words[words.index("--out") + 1])
            place.parent.mkdir(exist_ok=True)
            place.write_text('{"results": {}}')
        else:
            config = compose([word for word in words if not word.startswith("--")], [Path("conf")])
            place = member.folder
            place.mkdir(parents=True)
            dump(config, place / "config.yaml")
            status = "stopped" if config.train.stop_after else "finished"
            (place / "summary.json").write_text(json.dumps({"status": status, "finished_at": datetime.now(UTC).isoformat()}))
            (place / "checkpoints").mkdir()
            (place / "checkpoints/latest_checkpointed_iteration.txt").write_text("8")
        with Path("calls").open("a") as calls:
            calls.write(f"{place.relative_to('runs/studies')}\n")
    return [State(member, DONE) for member in members]


@pytest.fixture
def workplace(tmp_path, monkeypatch):
    """Two studies of the same text, whose members train nothing and whose pages are not written."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(study, "run_members", run_members)
    monkeypatch.setattr("ngpt.study.page.write_page", lambda results, folder: folder / "index.html")
    for name in ("first", "second"):
        write_study(tmp_path / "conf", TEXT, name)
    return tmp_path


@pytest.fixture
def call(workplace, capsys):
    def called(*words: str) -> tuple[list[str], str]:
        """What an `ngpt study` trained and analysed, as `STUDY: RUN`, and what it printed."""
        calls = workplace / "calls"
        calls.write_text("")
        code = cli.main(["study", *words, "--config-dir", "conf"])
        out, err = capsys.readouterr()
        assert code == 0, err
        return calls.read_text().replace("_small/", ": ").splitlines(), out

    return called


def without_analyses(made: list[str]) -> list[str]:
    return [line for line in made if "/analysis/" not in line]


def test_a_study_takes_what_another_has_finished_and_trains_the_rest(call, workplace):
    made, out = call("first")
    (analysis,) = [line.removeprefix("first: ") for line in made if "/analysis/" in line]
    assert made == ["first: trunk/seed=1", "first: decay0.1/seed=1", f"first: {analysis}"] and "taken" not in out

    made, out = call("second", "--plan", "decay+=0.2")
    assert made == [] and not (workplace / "runs/studies/second_small").exists()
    assert "trunk/seed=1     is taken from runs/studies/first_small/trunk/seed=1\n" in out
    assert "decay0.1/seed=1  is taken from runs/studies/first_small/decay0.1/seed=1\nleft: 1 runs, 1 analyses, " in out

    made, out = call("second", "decay+=0.2")
    other = analysis.replace("decay0.1", "decay0.2")
    assert made == ["second: decay0.2/seed=1", f"second: {other}"]  # the analysis of what was taken is there, too
    assert "decay0.1/seed=1 is taken from runs/studies/first_small/decay0.1/seed=1\n" in out
    folder = workplace / "runs/studies/second_small"
    assert os.readlink(folder / "trunk/seed=1") == "../../first_small/trunk/seed=1"
    origins = {run["name"]: run["origin"] for run in json.loads((folder / "results.json").read_bytes())["runs"]}
    taken = {name: f"first_small/{name}" for name in ("trunk/seed=1", "decay0.1/seed=1")}
    assert origins == {**taken, "decay0.2/seed=1": None}
    assert call("second", "decay+=0.2")[0] == call("first")[0] == []

    made, out = call("second", "decay+=0.2", "tokens=[128]")
    assert without_analyses(made) == [] and len(made) == 2  # the same question of more text

    shutil.rmtree(workplace / "runs/studies/first_small/decay0.1")
    assert "decay0.1/seed=1 " not in call("second", "--plan", "decay+=0.2")[1]
    made, out = call("second", "decay+=0.2")
    assert made == ["second: decay0.1/seed=1", f"second: {analysis}"]
    gone = "the run that it was taken from, ../../first_small/decay0.1/seed=1, is gone, or is another run now"
    assert out.count(f"decay0.1/seed=1: {gone}\n") == 1 and not (folder / "decay0.1/seed=1").is_symlink()


@pytest.mark.parametrize(("words", "content"), [(["first"], ""), (["first", "--analyze"], '{"results": {'), (["second"], "[1]")])
def test_a_damaged_analysis_is_made_again(call, workplace, words, content):
    (analysis,) = [line.removeprefix("first: ") for line in call("first")[0] if "/analysis/" in line]
    call("second")  # whose run is a link to that of the first
    path = workplace / "runs/studies/first_small" / analysis
    whole = path.read_text()
    path.write_text(content)
    assert "\nleft: 0 runs, 1 analyses, 0 tokens" in call("first", "--plan")[1]
    assert call("first", "--report")[0] == [] and path.read_text() == content
    made, _ = call(*words)
    assert made == [f"{words[0]}: {analysis}"] and path.read_text() == whole
    assert call(*words)[0] == []


def test_a_size_with_more_branches_takes_the_trunk_and_branches_of_another_size(call, workplace):
    larger = TEXT.replace('  "decay{decay}"', "  plain: {after: trunk}\n" + '  "decay{decay}"')
    (workplace / "conf/study/first.yaml").write_text(larger.replace("small: {}", "small: {arms: [decay*]}\n  large: {}"))
    call("first")
    assert without_analyses(call("first", "--size", "large")[0]) == ["first_large/plain/seed=1"]
    shutil.rmtree("runs/studies/first_large")
    shutil.rmtree("runs/studies/first_small/trunk/seed=1/checkpoints")  # as in a copy without weights: a new branch has no start
    again = ["trunk/seed=1", "plain/seed=1", "decay0.1/seed=1"]
    assert without_analyses(call("first", "--size", "large")[0]) == [f"first_large/{name}" for name in again]


def test_a_branch_of_another_trunk_is_not_taken(call, workplace):
    """Pairs of branches have a common start: with a trunk of its own a study has branches of its own."""
    call("first")
    shutil.move(workplace / "runs/studies/first_small", workplace / "kept")
    (workplace / "conf/study/second.yaml").write_text(TEXT.replace('  "decay{decay}"', "  alone: {after: trunk}\n" + '  "decay{decay}"'))
    call("second", "decay=[0.2]")
    shutil.move(workplace / "kept", workplace / "runs/studies/first_small")
    made, _ = call("second")
    assert made[0] == "second: decay0.1/seed=1"

    shutil.rmtree(workplace / "runs/studies/second_small")
    assert without_analyses(call("second")[0]) == ["second: alone/seed=1"]
    shutil.rmtree(workplace / "runs/studies/first_small/trunk")  # then the trunk is trained again, and so is what is to be compared
    made, out = call("second")
    assert without_analyses(made) == ["second: trunk/seed=1", "second: alone/seed=1", "second: decay0.1/seed=1"]


BRANCHES = ["first: decay0.1/seed=1", "first: decay0.2/seed=1"]


def test_branches_of_a_trunk_that_was_deleted_are_trained_again_with_it(call, workplace):
    """Pairs of branches have a common start, also of branches that are finished and of those that come later."""
    words, folder = ["first", "decay=[0.1,0.2]"], Path("runs/studies/first_small")
    call(*words)
    shutil.rmtree(folder / "trunk")
    assert call(*words, "--report")[0] == call(*words, "--analyze")[0] == []  # where none is trained, they are pairs as they were
    out = call(*words, "--plan")[1]
    assert out.count("is trained again: it continued a trunk that is not there any more") == 2 and "\nleft: 3 runs, 2 analyses, " in out
    made, out = call(*words)
    assert without_analyses(made) == ["first: trunk/seed=1", *BRANCHES] and len(made) == 5
    kept = folder / "decay0.1/seed=1.kept1"
    assert f"decay0.1/seed=1 is trained again: it continued a trunk that is not there any more. It is kept as {kept}\n" in out
    assert (kept / "summary.json").exists()
    assert call(*words)[0] == []

    shutil.rmtree(folder / "trunk")
    assert without_analyses(call(*words, "seed=[1,2]")[0])[:4] == [
        *("first: trunk/seed=1", "first: trunk/seed=2", "first: decay0.1/seed=1", "first: decay0.1/seed=2")
    ]
    assert (folder / "decay0.1/seed=1.kept2").exists()


@pytest.mark.parametrize("content", ["{", None])
def test_a_trunk_that_lacks_its_summary_alone_keeps_its_branches(call, workplace, content):
    """Its own training cannot begin before its folder is removed."""
    call("first")
    folder = workplace / "runs/studies/first_small"
    trunk = folder / "trunk/seed=1"
    (trunk / "summary.json").write_text("{") if content else (trunk / "summary.json").unlink()
    found = shared(planned(workplace / "conf", text=TEXT), folder)
    assert found.outdated() == ["decay0.1/seed=1"]  # it is in the middle of a training
    write_json(trunk / "outcome.json", {"status": "stopped", "step": 4})
    assert found.outdated() == []
    write_json(trunk / "outcome.json", {"status": "signalled", "step": 3})
    assert found.outdated() == ["decay0.1/seed=1"]
    shutil.rmtree(trunk)
    assert found.outdated() == ["decay0.1/seed=1"]


def test_branches_of_a_trunk_that_was_trained_again_by_hand_are_trained_again(call, workplace):
    words, folder = ["first", "decay=[0.1,0.2]"], Path("runs/studies/first_small")
    call(*words)
    (folder / "decay0.1/seed=1/summary.json").write_text('{"status": "signalled", "finished_at": "2026-01-01T00:00:00Z"}')
    (folder / "decay0.2/seed=1/summary.json").touch()  # a copy of a folder is newer than what it is a copy of
    trained_again(folder / "trunk/seed=1")
    out = call(*words, "--report")[1]
    told = "1 branches continued another trunk than the one there now, and are left out, the first is decay0.2/seed=1: "
    assert told in out
    missing = json.loads((folder / "results.json").read_bytes())["missing"]
    assert "decay0.2/seed=1: continued another trunk" in missing
    assert without_analyses(call(*words)[0]) == BRANCHES  # also the one that had not finished: it would go on from the earlier start
    assert told not in call(*words, "--report")[1] and call(*words)[0] == []


def test_a_trunk_of_a_host_whose_clock_is_ahead_keeps_its_branches(call, workplace):
    call("first")
    trunk, branch = (Path("runs/studies/first_small") / name / "summary.json" for name in ("trunk/seed=1", "decay0.1/seed=1"))
    written = branch.stat().st_mtime - 60
    trunk.write_text('{"status": "stopped", "finished_at": "2999-01-01T00:00:00Z"}')
    os.utime(trunk, (written, written))
    assert call("first")[0] == []


@pytest.mark.parametrize("option", ["--plan", "--report", "--analyze"])
def test_a_folder_of_another_study_or_of_other_words_is_refused(call, workplace, capsys, option):
    call("first")
    folder = Path("runs/studies/first_small")
    results = (folder / "results.json").read_bytes()
    others = {"Its runs are of first": ["second", "--out", str(folder)], "was started with other words: ": ["first", "train.steps=16"]}
    for told, words in others.items():
        assert cli.main(["study", *words, "--config-dir", "conf", option]) == 2
        assert told in capsys.readouterr().err
    assert (folder / "results.json").read_bytes() == results


def test_a_branch_that_has_trained_nothing_stays_where_it_is(call, workplace):
    """The folder of a job that waits for its trunk, or of a run that failed at its start."""
    branch = Path("runs/studies/first_small/decay0.1/seed=1/console.log")
    branch.parent.mkdir(parents=True)
    branch.touch()
    plan = planned(workplace / "conf", text=TEXT)
    assert shared(plan, Path("runs/studies/first_small")).outdated() == []


def test_branches_of_a_trunk_that_another_study_has_now_are_trained_again(call, workplace):
    call("first")
    shutil.move("runs/studies/first_small", "kept")
    call("second")
    shutil.move("kept", "runs/studies/first_small")
    shutil.rmtree("runs/studies/second_small/trunk")
    shutil.rmtree("runs/studies/first_small/decay0.1")
    assert without_analyses(call("second")[0]) == ["second: decay0.1/seed=1"]  # the trunk of the first study has ended before


def test_a_branch_that_is_being_trained_is_not_moved(call, workplace, capsys):
    call("first")
    shutil.rmtree("runs/studies/first_small/trunk")
    with locked(Path("runs/studies/first_small/decay0.1/seed=1")):
        assert cli.main(["study", "first", "--config-dir", "conf"]) == 2
    assert "decay0.1/seed=1. Is being trained by process" in capsys.readouterr().err


def trained_again(trunk: Path) -> None:
    summary = json.loads((trunk / "summary.json").read_bytes())
    (trunk / "summary.json").write_text(json.dumps(summary | {"finished_at": datetime.now(UTC).isoformat()}))


def test_a_link_holds_only_while_it_leads_to_the_same_run(call, workplace):
    call("first")
    call("second")
    trained_again(workplace / "runs/studies/first_small/trunk/seed=1")
    assert "decay0.1/seed=1 " not in call("second", "--plan")[1]

    shutil.rmtree(workplace / "runs/studies/first_small")
    call("first", "optim.lr=9e-3")  # other runs, in the same places
    made, out = call("second")
    assert without_analyses(made) == ["second: trunk/seed=1", "second: decay0.1/seed=1"]
    assert out.count("is gone, or is another run now") == 2


def elsewhere(workplace: Path, *words: str) -> Path:
    """Results of the study first that were made elsewhere: a loss of 1 for each run of seed 1."""
    path, plan = workplace / "kept.json", planned(workplace / "conf", *words, text=TEXT)
    configs = {run.name: digest(compose(run.located(Path("there"), "first"))) for run in plan.runs}
    results = gather(dataclasses.replace(plan, name="first"), workplace / "none", "", "ngpt study first", {}, configs=configs)
    for run in results["runs"]:
        run |= {"status": "stopped" if run["arm"] == "trunk" else "finished", "measures": {"loss": run["seed"]}}
    write(results, path)
    return path


def test_runs_that_results_from_elsewhere_hold_are_not_trained(call, workplace):
    elsewhere(workplace, "decay=[0.1]")
    given = ["--from", "kept.json"]
    assert call("first", *given, "--plan") == ([], "2 runs are in kept.json\n0 runs left to train\n")
    made, out = call("first", *given, "--report")  # nothing has run here
    assert made == [] and "Page: " in out
    page = json.loads(Path("runs/studies/first_small/results.json").read_bytes())
    assert page["command"] == "ngpt study first --size small --config-dir=conf --from=kept.json"
    shutil.rmtree("runs")
    made, out = call("first", *given, "--plan", "seed=[1,2]")
    assert made == [] and out.startswith("2 runs are in kept.json\n") and "\n2 runs, 1 analyses, " in out and not Path("runs").exists()

    made, out = call("first", *given, "seed=[1,2]")
    assert out.startswith("2 runs are in kept.json\n") and len(made) == 3
    assert without_analyses(made) == ["first: trunk/seed=2", "first: decay0.1/seed=2"]
    folder = workplace / "runs/studies/first_small"
    results = json.loads((folder / "results.json").read_bytes())
    origins = {run["name"]: run["origin"] for run in results["runs"]}
    taken = dict.fromkeys(("trunk/seed=1", "decay0.1/seed=1"), f"{workplace.name}/kept.json")
    assert origins == {**taken, "trunk/seed=2": None, "decay0.1/seed=2": None}
    assert results["command"] == "ngpt study first 'seed=[1,2]' --size small --config-dir=conf --from=kept.json"
    assert results["comparisons"]["loss"]["rows"][0]["by_seed"] == {"1": 1.0}

    elsewhere(workplace, "decay=[0.1]", "seed=[1,2]")
    assert call("first", *given, "seed=[1,2]", "--report")[1].startswith("2 runs are in kept.json\n")  # the others are finished here


def test_runs_from_elsewhere_are_those_of_the_config_that_the_words_mean_now(call, workplace):
    mine = workplace / "conf/experiment/mine.yaml"
    mine.parent.mkdir()
    mine.write_text("# @package _global_\ndefaults: [ngpt_tiny, _self_]\noptim: {lr: 1.0e-3}\n")
    (workplace / "conf/study/first.yaml").write_text(TEXT.replace("experiment=ngpt_tiny", "experiment=mine"))
    call("first")
    shutil.move("runs/studies/first_small/results.json", "kept.json")
    shutil.rmtree("runs")
    known = {run["name"]: run["config_sha256"] for run in json.loads(Path("kept.json").read_bytes())["runs"]}
    for run in (kept := json.loads(Path("kept.json").read_bytes()))["runs"]:  # these members have logged nothing
        run |= {"status": "finished"}
    write(kept, Path("kept.json"))
    given = ["first", "--from", "kept.json"]
    assert call(*given, "--plan")[1] == "2 runs are in kept.json\n0 runs left to train\n"
    call(*given)
    again = json.loads(Path("runs/studies/first_small/results.json").read_bytes())
    assert {run["name"]: run["config_sha256"] for run in again["runs"]} == known and None not in known.values()

    mine.write_text(mine.read_text().replace("1.0e-3", "2.0e-3"))
    out = call(*given, "--plan")[1]
    told = "2 runs in kept.json are not taken, the first is trunk/seed=1: its config is another now\n"
    assert out.startswith(told + "0 runs are in kept.json\n")
    assert "\n2 runs, 1 analyses, " in out


def test_a_digest_is_of_what_is_trained_wherever_that_was(tmp_path, monkeypatch):
    words = ["experiment=ngpt_tiny", "train.seed=3", "optim.lr=1", "precision=nvfp4_nvidia"]
    config = compose([*words, f"run.dir={tmp_path}"])
    dump(config, tmp_path / "config.yaml")
    there = compose([*words, "run.dir=there", "run.name=x", "cluster=h100_1", "logging.interval=5", "checkpoint.load=trunk/checkpoints"])
    assert digest_of(tmp_path) == digest(config) == digest(there)
    assert digest_of(tmp_path / "none") is None
    for word in ("train.seed=4", "optim.lr=2", "model.hidden_size=128", "train.seq_length=64", "precision=bf16"):
        assert digest(compose([word, *(other for other in words if other.split("=")[0] != word.split("=")[0])])) != digest(config), word
    before = digest(config)
    monkeypatch.setattr("launch.study_shared.flatten", lambda cfg: flatten(cfg) | {"model.of_a_later_version": 0})
    assert digest(config) == before


@pytest.mark.parametrize(("more", "composed"), [([], 2), (["train.eval_steps=${train.seed}"], 4)])
def test_seeds_of_a_point_share_a_composed_config_unless_words_use_the_seed(workplace, monkeypatch, more, composed):
    plan = planned(workplace / "conf", "seed=[1,2]", *more, text=TEXT)
    calls = []
    monkeypatch.setattr("launch.study_plan.compose", lambda words, folders: calls.append(words) or compose(words, folders))
    has_config = digests(plan, Path("here"), [])
    for run in plan.runs:
        own = compose(run.located(Path("there"), "mine"))
        assert has_config(run, digest(own))
    assert len(calls) == composed
    other = compose([*plan.runs[0].located(Path("there"), "mine"), "optim.weight_decay=0.3"])
    assert not has_config(plan.runs[0], digest(other))


def test_a_file_is_kept_only_if_runs_that_had_finished_cannot_be_read_again(call, workplace):
    call("first")
    path = workplace / "runs/studies/first_small/results.json"
    whole = json.loads(path.read_bytes())
    for run in whole["runs"]:
        run |= {"status": "stopped" if run["arm"] == "trunk" else "finished"}
    write(whole, path)
    assert " are not there any more" not in call("first", "decay=[0.2]", "--report")[1]  # the folder has the other branch
    write(whole, path)
    (workplace / "runs/studies/first_small/decay0.1/seed=1/summary.json").write_text('{"status": "failed"}')
    out = call("first", "--report")[1]
    assert f"1 runs of {path.relative_to(workplace)} are not there any more, the first is decay0.1/seed=1. " in out
    assert json.loads(path.with_suffix(".kept1.json").read_bytes()) == whole


def test_what_results_from_elsewhere_cannot_do_is_told_in_one_line(workplace, capsys):
    kept = str(elsewhere(workplace))
    for words, told in (
        (["first", "--from", kept, "--slurm"], "--from: with --slurm or --report JSON. "),
        (["first", "--from", kept, "--report", kept], "--from: with --slurm or --report JSON. "),
        (["first", "--from", "none.json"], "none.json: No such file"),
        (["first", "--from", "out/../out/results.json", "--out", "out"], "--from: out/../out/results.json. Is what this call writes"),
        (["first", "--report", "optim.lr=1e-3"], "--report: optim.lr=1e-3. It was read as the JSON of --report, and there is no such file"),
        (["--from", kept, "--report", "first"], "--report: first. It was read as the JSON of --report, and there is no such file"),
        (["second", "--from", kept, "--report"], f"--from: {kept}. It is of the study first, and second was asked for"),
    ):
        assert cli.main(["study", *words, "--config-dir", "conf"]) == 2
        shown = capsys.readouterr().err
        assert shown.startswith(told) and shown.count("\n") == 1


def shared(plan: Plan, folder: Path, *words: str) -> Shared:
    def config(run: PlannedRun):
        return compose([*run.located(folder, plan.name), *words])

    return Shared(plan, folder, {run.name: config(run) for run in plan.runs}, config)


def test_only_a_whole_run_of_the_same_config_is_taken(workplace, call):
    call("first")
    plan = planned(workplace / "conf", text=TEXT)
    plan = dataclasses.replace(plan, runs=plan.runs[:1])
    run, place = plan.runs[0].name, Path("runs/studies/first_small/trunk/seed=1")
    other = Path("runs/studies/mine_small")
    assert shared(plan, other).place(run) == place
    free = ["cluster.save_time_s=7", "logging.wandb.tags=[x]", "data.num_workers=0"]
    assert shared(plan, other, *free).place(run) == place
    for word in ("optim.lr=9e-3", "logging.interval=5", "cluster.environment.A=b"):
        assert shared(plan, other, word).place(run) is None, word
    assert shared(plan, Path("elsewhere/mine_small")).place(run) is None
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("launch.study_shared.has_data_of", lambda config, folder: folder != place)  # its tokens were others
        assert shared(plan, other).place(run) is None
    tracker = place / "checkpoints/latest_checkpointed_iteration.txt"
    tracker.rename("tracker")
    assert shared(plan, other).place(run) is None
    Path("tracker").rename(tracker)
    (other / run).mkdir(parents=True)  # begun here: it goes on here
    assert shared(plan, other).place(run) is None and not shared(plan, other).take(run)
    (place / "summary.json").unlink()
    assert shared(plan, Path("runs/studies/third_small")).place(run) is None


def test_keys_that_do_not_count_are_keys_and_say_nothing_of_what_is_trained():
    known = {key for key, _ in leaf_types()}
    assert known >= IGNORED
    counts = known - IGNORED
    sections = {key.partition(".")[0] for key in counts}
    assert {key for key in IGNORED if key.startswith(("train.", "debug.p", "optim.l", "megatron", "parallel.t"))} == set()
    assert {"model.hidden_size", "precision.rht", "optim.lr", "train.seed", "train.stop_after", "train.micro_batch_size"} <= counts
    assert {"cluster.nodes", "cluster.gpus_per_node", "cluster.gpu", "cluster.environment"} <= counts
    assert {"logging.interval", "logging.health_interval", "checkpoint.load_optimizer", "tokenizer.path"} <= counts
    assert sections >= {"model", "precision", "optim", "schedule", "data", "parallel", "train", "debug", "megatron"}
    assert set(compared(compose(["experiment=ngpt_tiny"]))).isdisjoint(IGNORED)


def test_a_run_counts_only_with_the_very_tokens_that_it_was_trained_on(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def prepared(text: str) -> None:
        Path("raw.txt").write_text(text * 50)
        options = Options(split="50,25,25", documents="blank-line")
        prepare([Path("raw.txt")], Path("text"), TokenizerConfig(name="bytes", kind="bytes"), options, workers=1, overwrite=True)

    prepared("Some text.\n\n")
    words = ["experiment=ngpt_tiny", "data.mock=false", "data.train=[{path: text/train}]", "data.valid=[{path: text/valid}]"]
    config = compose([*words, "run.dir=run"])
    record_launch(config, ["ngpt"], {})
    assert has_data_of(config, Path("run"))
    assert not has_data_of(compose([*words, "run.dir=run", "data.valid=[{path: text/test}]"]), Path("run"))
    prepared("Another text.\n\n")
    assert not has_data_of(config, Path("run"))
    shutil.rmtree("text")
    assert not has_data_of(config, Path("run"))
    Path("run", SOURCES_FILE).unlink()
    assert not has_data_of(config, Path("run")) and has_data_of(compose(["experiment=ngpt_tiny"]), Path("run"))
