"""`ngpt estimate`: one JSON object, a table, refusals, proposals that hold; for every shipped experiment, without torch."""

import json
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

import ngpt
from ngpt.config import compose, config_dir
from ngpt.estimate.calibration import RESERVED
from ngpt.estimate.cli import main
from ngpt.estimate.counts import count_parameters
from ngpt.estimate.hardware import GPUS
from ngpt.estimate.layouts import balanced_cut, fits, propose_layouts
from ngpt.estimate.memory import estimate_memory
from ngpt.estimate.report import estimate
from ngpt.estimate.step_time import estimate_step

EXPERIMENTS = sorted(path.stem for path in (config_dir() / "experiment").glob("*.yaml"))
SMALL_HYBRID = ["experiment=ngpt_hybrid_1p5b_bf16", "cluster=h100_8", "train.global_batch_size=64"]


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    status = main(arguments)
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def test_all_experiments_are_estimated_in_one_object_each_without_torch(tmp_path: Path):
    code = (
        "import json, sys; from ngpt.estimate.cli import main\n"
        "for name in sys.argv[1:]: assert main([f'experiment={name}', '--json']) == 0; print('next')\n"
        "sys.exit(99 if {'torch', 'megatron', 'numpy'} & set(sys.modules) else 0)"
    )
    environment = {"PYTHONPATH": str(Path(ngpt.__file__).parents[1]), "PATH": ""}
    command = [sys.executable, "-c", code, *EXPERIMENTS]
    finished = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120)
    assert finished.returncode == 0, finished.stderr
    assert finished.stderr == ""
    printed = finished.stdout.split("next\n")
    assert printed.pop() == ""
    for name, text in zip(EXPERIMENTS, printed, strict=True):
        values, counts = json.loads(text), count_parameters(compose([f"experiment={name}"]).model)
        assert values["parameters_total"] == counts.total == sum(values["parameters"].values())
        assert values["parameters_active"] == counts.active
        assert values["memory"]["peak_bytes"] > values["memory"]["weights_bytes"] > 0
        assert values["step"]["seconds"] > 0
        assert values["left_out"]


def test_the_parts_of_an_estimate_add_up():
    values = estimate(compose(["experiment=ngpt_hybrid_3b30b_bf16"]), price=2.5)
    memory, step, cost = values["memory"], values["step"], values["cost"]
    parts = ("weights", "gradients", "optimizer", "activations", "temporary", "workspace")
    assert memory["peak_bytes"] == pytest.approx(sum(memory[f"{part}_bytes"] for part in parts), abs=8)
    flops = values["flops_per_token"]
    assert flops["total"] == flops["matrices"] + flops["attention"] + flops["mamba_scan"]
    micro = step["micro_batch_s"]
    assert micro["total"] == pytest.approx(sum(seconds for part, seconds in micro.items() if part != "total"))
    once = step["bubble_s"] + step["data_parallel_s"] + step["optimizer_s"]
    assert step["seconds"] == pytest.approx(step["micro_batches"] * micro["total"] + once)
    assert cost["gpu_hours"] == pytest.approx(39737 * step["seconds"] * 8 / 3600)
    assert cost["total"] == pytest.approx(2.5 * cost["gpu_hours"])
    assert all(isinstance(values[key], int) for key in ("parameters_total", "parameters_active", "gpus"))


def test_the_table_names_what_it_assumes(capsys: pytest.CaptureFixture[str]):
    status, out, err = run(capsys, "experiment=ngpt_hybrid_1p5b_nvfp4", "megatron.manual_gc=true", "precision.bf16_tail=0.1")
    assert (status, err) == (0, "")
    for words in ("cluster.gpu is not set", "unbalanced routing", "megatron.*: manual_gc", "last 0.1 of the steps", "active for a token"):
        assert words in out


def test_a_run_that_does_not_fit_says_so(capsys: pytest.CaptureFixture[str]):
    status, out, _ = run(capsys, "experiment=ngpt_hybrid_3b30b_bf16", "cluster=h100_8")
    assert status == 0
    assert "DOES NOT FIT" in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["experiment=nothing"], "experiment"),
        (["experiment=ngpt_tiny", "parallel.tensor=3"], "model.num_attention_heads: 4. "),
        (["experiment=ngpt_tiny", "model.layer_pattern=X"], "model.layer_pattern: 'X'. "),
        (["experiment=ngpt_tiny", "--config-dir", "/nowhere"], "--config-dir: /nowhere. "),
        (["experiment=ngpt_tiny", "--fit", "12"], "--fit: 12. Must be whole hosts of 8 GPUs"),
        (["experiment=ngpt_tiny", "--fit", "-1"], "--fit: -1. "),
        (["experiment=ngpt_tiny", "cluster.gpu=rtx4090"], "cluster.gpu: rtx4090. "),
    ],
)
def test_refusals_are_one_line_on_stderr(capsys: pytest.CaptureFixture[str], arguments: list[str], message: str):
    status, out, err = run(capsys, *arguments, "--json")
    assert (status, out) == (2, "")
    assert message in err and "Traceback" not in err


@pytest.mark.parametrize(
    ("overrides", "gpus"),
    [(SMALL_HYBRID, 8), ([*SMALL_HYBRID, "model.layer_pattern=MEMEM*EMEMEM*EMEME/*E"], 4), (["experiment=gpt_1p2b_dense_bf16"], 16)],
    ids=["hybrid", "prediction", "dense"],
)
def test_proposals_compose_as_printed_fit_and_are_ranked(overrides: list[str], gpus: int):
    layouts = propose_layouts(compose(overrides), gpus)
    assert len(layouts) > 5
    assert [layout.step.total for layout in layouts] == sorted(layout.step.total for layout in layouts)
    cuts = {(cfg.parallel.tensor, cfg.parallel.pipeline, cfg.parallel.expert) for cfg in (layout.cfg for layout in layouts)}
    assert len(cuts) > 3
    for layout in layouts[::3]:
        words = shlex.split(" ".join(layout.overrides))  # as a shell takes them from the table
        typed = compose([*overrides, *words])
        assert typed.cluster.nodes * typed.cluster.gpus_per_node == gpus
        assert typed.train.global_batch_size == layout.cfg.train.global_batch_size
        memory = estimate_memory(typed)
        assert memory.peak == layout.memory.peak
        assert memory.peak + RESERVED <= GPUS["h100"].memory
        assert estimate_step(typed).total == pytest.approx(layout.step.total)


def test_without_room_nothing_is_proposed(capsys: pytest.CaptureFixture[str]):
    status, out, _ = run(capsys, "experiment=ngpt_hybrid_3b30b_bf16", "cluster=h100_8", "--fit", "1")
    assert status == 1
    assert out.startswith("0 layouts fit 1 GPUs")
    assert not fits(
        compose(["experiment=ngpt_hybrid_3b30b_bf16", "cluster=h100_8"]), estimate_memory(compose(["experiment=ngpt_hybrid_3b30b_bf16"]))
    )


def test_json_lists_as_many_proposals_as_asked_for(capsys: pytest.CaptureFixture[str]):
    status, out, _ = run(capsys, *SMALL_HYBRID, "--fit", "--top", "3", "--json")
    assert status == 0
    layouts = json.loads(out)["layouts"]
    assert len(layouts) == 3
    assert set(layouts[0]) == {"overrides", "peak_bytes", "step_s", "tokens_per_second"}


def test_a_cut_balances_time_not_symbols():
    """The expensive output layer leaves fewer layers to the last stage; the parts are the pattern, prediction depths stay behind."""
    cfg = compose(["experiment=ngpt_hybrid_3b30b_bf16"])
    parts = balanced_cut(cfg, 4).split("|")
    assert "".join(parts) == cfg.model.layer_pattern
    assert len(parts[-1]) < len(parts[0])
    with_depth = compose(["experiment=ngpt_hybrid_3b30b_bf16", f"model.layer_pattern={cfg.model.layer_pattern}/*E"])
    assert balanced_cut(with_depth, 2).endswith("/*E")
    assert "|" not in balanced_cut(compose(["experiment=gpt_1p2b_dense_bf16"]), 4)
