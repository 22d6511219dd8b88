"""`ngpt eval` over a run against lm-eval's own command over its export, in several processes, and while the model trains."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torchrun
from evaluated import ngpt, training

TASKS = ["--tasks", "every_kind,ngpt", "--include", "tasks"]
SAME = 1e-4


@pytest.fixture(scope="module")
def of_run(workplace) -> dict:
    """What `ngpt eval` says of the run, and prints alone on stdout."""
    return json.loads(ngpt("eval", "runs/hybrid", *TASKS, "--split", "valid", "--json", cwd=workplace).stdout)


def figures(results: dict) -> dict[str, float]:
    """Metrics of all tasks by name, without standard errors."""
    found = {f"{task}/{name}": value for task, metrics in results.items() for name, value in metrics.items()}
    return {name: value for name, value in found.items() if not name.endswith(("_stderr", "/samples"))}


def lm_eval(workplace: Path, *arguments: str) -> dict[str, float]:
    """What the command of lm-eval says of the exported folder, as its user calls it."""
    shipped = Path(__file__).parents[2] / "ngpt" / "evaluation" / "tasks"
    tasks = workplace / "all_tasks"
    if not tasks.exists():
        tasks.mkdir()
        for path in [*(workplace / "tasks").iterdir(), *shipped.iterdir()]:
            (tasks / path.name).symlink_to(path)
    command = [sys.executable, "-m", "lm_eval", "--model", "hf", "--model_args", "pretrained=exported,trust_remote_code=True,dtype=float32"]
    command += ["--tasks", "every_kind,ngpt", "--include_path", str(tasks), "--device", "cpu", "--output_path", "theirs", *arguments]
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
    done = subprocess.run(command, cwd=workplace, env=environment, capture_output=True, text=True, timeout=900, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    (path,) = (workplace / "theirs").rglob("results_*.json")
    found = json.loads(path.read_text())["results"]
    return figures({task: {key.split(",")[0]: value for key, value in metrics.items() if "," in key} for task, metrics in found.items()})


def test_numbers_are_those_of_lm_evals_own_command_over_the_export(workplace, of_run):
    ours, theirs = figures(of_run["tasks"]), lm_eval(workplace, "--batch_size", "4")
    assert ours.keys() == theirs.keys() and len(ours) >= 12
    assert {name: value for name, value in ours.items() if value != pytest.approx(theirs[name], rel=SAME, abs=SAME)} == {}


def test_numbers_of_the_exported_folder_are_those_of_the_run(workplace, of_run):
    found = json.loads(ngpt("eval", "exported", *TASKS, "--split", "data/small/valid", "--json", cwd=workplace).stdout)
    ours, theirs = figures(of_run["tasks"]), figures(found["tasks"])
    assert ours.keys() == theirs.keys()
    assert {name: value for name, value in ours.items() if value != pytest.approx(theirs[name], rel=SAME, abs=SAME)} == {}
    assert found["splits"]["data/small/valid"]["loss"] == pytest.approx(of_run["splits"]["data/small/valid"]["loss"], abs=1e-6)


def test_bits_per_byte_are_those_that_training_measured(workplace, of_run):
    summary = json.loads((workplace / "runs" / "hybrid" / "summary.json").read_text())
    found = of_run["splits"]["data/small/valid"]
    assert found["bits_per_byte"] == pytest.approx(summary["val_bits_per_byte"], abs=5e-5)
    assert found["loss"] == pytest.approx(summary["val_loss"], abs=5e-5)


def test_two_processes_share_the_texts_and_say_the_same(workplace, of_run):
    done = ngpt("eval", "runs/hybrid", *TASKS, "--split", "valid", "--processes", "2", "--batch-size", "3", "--json", cwd=workplace)
    found = json.loads(done.stdout)
    ours, theirs = figures(of_run["tasks"]), figures(found["tasks"])
    assert {name: value for name, value in ours.items() if value != pytest.approx(theirs[name], rel=1e-5, abs=1e-5)} == {}
    assert found["splits"]["data/small/valid"]["sequences"] == of_run["splits"]["data/small/valid"]["sequences"]


def test_a_run_keeps_its_results_beside_earlier_ones(workplace, of_run):
    kept = workplace / "runs" / "hybrid" / "eval" / "iter_0000020.json"
    before = json.loads(kept.read_text())
    said = ngpt("eval", "runs/hybrid", "--tasks", "ngpt_cloze", "--limit", "5", cwd=workplace).stderr
    assert json.loads(kept.read_text()) == before and "with --limit the run does not keep the results" in said
    del before["tasks"]["ngpt_cloze"], before["evaluated_at"]
    kept.write_text(json.dumps(before | {"evaluated_at": ""}))
    ngpt("eval", "runs/hybrid", "--tasks", "ngpt_cloze", cwd=workplace)
    after = json.loads(kept.read_text())
    assert after["tasks"].pop("ngpt_cloze")["samples"] == 60 and after["tasks"] == before["tasks"] and after["splits"] == before["splits"]


LAYOUTS = {
    "one": ("ngpt_hybrid_tiny", []),
    "ep2": ("ngpt_hybrid_tiny", ["parallel=ep2", "cluster.gpus_per_node=2"]),
    "tp2": ("ngpt_tiny", ["parallel=tp2", "cluster.gpus_per_node=2", "model.tied_embeddings=true", "model.vocab_size=258"]),
    "pp2": ("ngpt_tiny", ["parallel=pp2_vp2", "model.num_layers=4", "cluster.gpus_per_node=2", "train.micro_batch_size=1"]),
    "mtp_dp2": ("ngpt_tiny", ["model.num_layers=2", "model.layer_pattern='*-*-/*-'", "cluster.gpus_per_node=2", "precision=bf16"]),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_tasks_beside_training_are_those_of_the_checkpoint(workplace, name):
    """In every layout the model that trains says of a text what its checkpoint says, and the tasks change nothing of the training."""
    experiment, overrides = LAYOUTS[name]
    tasks = ["kind_multiple_choice", "kind_loglikelihood", "kind_loglikelihood_rolling"]
    asked = [f"train.eval_tasks=[{','.join(tasks)}]", "train.eval_tasks_include=[tasks]", "train.eval_tasks_interval=4"]
    saves = ["checkpoint=periodic", "checkpoint.interval=2"]
    options = [*training(experiment), *overrides, "train.steps=6", "train.eval_interval=2", *saves]
    ngpt("train", *options, *asked, f"run.name={name}", cwd=workplace)
    rows = [json.loads(line) for line in (workplace / "runs" / name / "metrics.jsonl").read_text().splitlines()]
    measured = {row["step"]: {key: value for key, value in row.items() if key.startswith("tasks/")} for row in rows}
    assert {step for step, found in measured.items() if found} == {4, 6}, "every 4 steps, and the last one"
    dtype = ["--dtype", "bfloat16"] if "precision=bf16" in overrides else []
    tolerance = 2e-2 if dtype else SAME  # Megatron's modules and transformers' round at other places
    for step in (4, 6):
        asked = ["--tasks", ",".join(tasks), "--include", "tasks", "--step", str(step), *dtype, "--json"]
        done = ngpt("eval", f"runs/{name}", *asked, cwd=workplace)
        expected = {f"tasks/{key}": value for key, value in figures(json.loads(done.stdout)["tasks"]).items()}
        assert expected.keys() == measured[step].keys() and len(expected) == 7
        pairs = {key: (value, measured[step][key]) for key, value in expected.items()}
        differ = {key: pair for key, pair in pairs.items() if pair[0] != pytest.approx(pair[1], rel=tolerance)}
        assert not differ or (dtype and all("acc" in key for key in differ)), differ
    if name == "one":
        ngpt("train", *options, "run.name=twin", cwd=workplace)
        twin = [json.loads(line) for line in (workplace / "runs" / "twin" / "metrics.jsonl").read_text().splitlines()]
        assert [row["train_loss"] for row in twin] == [row["train_loss"] for row in rows]


BAD = {
    "no such task": (["--tasks", "ngpt_clozee"], "Did you mean ngpt_cloze?"),
    "no such folder": (["--tasks", "x", "--include", "nowhere"], "It must be a folder with YAML files of tasks"),
    "a task's documents are missing": (["--tasks", "kind_lost", "--include", "lost"], "documents must be readable"),
    "another tokenizer's data": (["--split", "data/bpe/valid"], "numbers text otherwise"),
    "no prepared data": (["--split", "data/nothing/valid"], "data/nothing/manifest.json"),
    "an unknown way to generate": (["--tasks", "kind_beams", "--include", "lost"], "num_beams"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_ends_in_one_line(workplace, name):
    lost = workplace / "lost"
    if not lost.exists():
        write_bad_tasks(workplace, lost)
        options = ["--tokenizer", "bpe", "--vocab-size", "270", "--split", "80,20,0"]
        ngpt("data", "prepare", "text.jsonl", "--out", "data/bpe", *options, cwd=workplace)
    arguments, said = BAD[name]
    done = torchrun.ngpt("eval", "runs/hybrid", *arguments, cwd=workplace)
    assert done.returncode == 2 and done.stdout == "" and "Traceback" not in done.stderr
    assert said in done.stderr.strip().splitlines()[-1]


def test_a_task_that_generates_or_does_not_exist_is_refused_before_training(workplace):
    asked = ["train.eval_tasks_include=[tasks]", "train.steps=2", "run.name=refused"]
    said = {"kind_generate_until": "this task wants text generated", "nothing": "train.eval_tasks: nothing. No task of lm-eval"}
    for task, words in said.items():
        done = torchrun.ngpt("train", *training("ngpt_tiny"), f"train.eval_tasks=[{task}]", *asked, cwd=workplace)
        assert done.returncode == 2 and words in done.stderr + done.stdout


def write_bad_tasks(workplace: Path, folder: Path) -> None:
    folder.mkdir()
    text = (workplace / "tasks" / "loglikelihood.yaml").read_text()
    data = str(workplace / "tasks" / "documents.jsonl")
    (folder / "lost.yaml").write_text(text.replace(data, str(folder / "nothing.jsonl")).replace("kind_loglikelihood", "kind_lost"))
    text = (workplace / "tasks" / "generate_until.yaml").read_text()
    (folder / "beams.yaml").write_text(text.replace("kind_generate_until", "kind_beams").replace("do_sample: false", "num_beams: 3"))
