"""`ngpt estimate`: one JSON object, a table, refusals, proposals that hold; for every shipped experiment, without torch."""

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

import ngpt
from launch.cli import main
from ngpt.config import compose, config_dir
from ngpt.estimate.calibration import RESERVED, STEP_BAND
from ngpt.estimate.hardware import GPUS
from ngpt.estimate.layouts import balanced_cut, fits, propose_layouts
from ngpt.estimate.memory import estimate_memory
from ngpt.estimate.report import describe_proposals, estimate, proposals_table
from ngpt.estimate.step_time import estimate_step

EXPERIMENTS = sorted(path.stem for path in (config_dir() / "experiment").glob("*.yaml"))
SMALL_HYBRID = ["experiment=ngpt_hybrid_1p5b_bf16", "cluster=h100_8", "train.global_batch_size=64"]


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    status = main(["estimate", *arguments])
    captured = capsys.readouterr()
    return status, captured.out, captured.err


@pytest.fixture(scope="module")
def all_values(tmp_path_factory) -> dict[str, dict]:
    """What `ngpt estimate --json` prints for every experiment, by one process that ends with 99 where it has imported torch."""
    code = (
        "import json, sys; from launch.cli import main\n"
        "for name in sys.argv[1:]: assert main(['estimate', f'experiment={name}', '--json']) == 0; print('next')\n"
        "sys.exit(99 if {'torch', 'megatron', 'numpy'} & set(sys.modules) else 0)"
    )
    environment = {"PYTHONPATH": str(Path(ngpt.__file__).parents[1]), "PATH": ""}
    command = [sys.executable, "-c", code, *EXPERIMENTS]
    finished = subprocess.run(command, cwd=tmp_path_factory.mktemp("all"), env=environment, capture_output=True, text=True, timeout=120)
    assert finished.returncode == 0, finished.stderr
    assert finished.stderr == ""
    printed = finished.stdout.split("next\n")
    assert printed.pop() == ""
    return dict(zip(EXPERIMENTS, map(json.loads, printed), strict=True))


def test_all_experiments_are_estimated_in_one_object_each_without_torch(all_values: dict[str, dict]):
    # 20 blocks of 16 heads of 128 in 4 groups and an MLP of 6144, with their scales; a table, a head and its scale.
    block = (16 + 2 * 4) * 128 * 2048 + 2048 * 2048 + 2 * 6144 * 2048 + 2048 + 6144 + 2 * 2048
    total = 20 * block + 2 * 131072 * 2048 + 131072
    dense = all_values["ngpt_1p2b_dense_bf16"]
    assert dense["parameters_total"] == dense["parameters_active"] == total
    hybrid = all_values["ngpt_hybrid_3b30b_bf16"]  # 122 of 128 experts, each with its suv, are idle in each of 23 layers
    assert hybrid["parameters_total"] - hybrid["parameters_active"] == 23 * 122 * (2 * 1856 * 2688 + 1856)
    for values in all_values.values():
        assert values["parameters_total"] == sum(values["parameters"].values())
        assert values["memory"]["peak_bytes"] > values["memory"]["weights_bytes"] > 0
        assert values["step"]["seconds"] > 0
        assert values["left_out"]


def nvidia_hybrid(width: int, ffn: int, query_heads: int, query_groups: int, mamba_heads: int, mamba_groups: int) -> tuple[int, int]:
    """Parameters of the control and of nGPT in `M-M-M-M*-` six times and `M-M-M-M-`: 28 Mamba-2, 28 MLP and 6 attention layers."""
    inner, bc = mamba_heads * 80, 2 * mamba_groups * 128  # z, as wide as x; B and C of 128 states a group
    in_proj = inner + inner + bc + mamba_heads  # z, x, B and C, dt
    convolution = (inner + bc) * 4 + (inner + bc)  # 4 taps and a bias
    mamba = width * in_proj + convolution + 3 * mamba_heads + inner * width  # between them A_log, D and dt_bias
    mlp = width * ffn + ffn * width
    attention = width * (query_heads + 2 * query_groups) * 128 + query_heads * 128 * width
    layers, tables = 28 * mamba + 28 * mlp + 6 * attention, 131_072 * width + 131_072 * width
    norms = 62 * width + 28 * inner + width  # before each layer, behind each gate, before the head
    scales = 62 * width + 28 * in_proj + 28 * ffn + 6 * query_heads * 128 + 131_072  # alphas, mixer_in_scale, suv, sqk, sz
    return layers + tables + norms, layers + tables + scales


@pytest.mark.parametrize("precision", ["bf16", "nvfp4"])
def test_parameters_of_nvidias_models_are_those_of_their_patterns(all_values: dict[str, dict], precision: str):
    def printed(name: str) -> tuple[int, int]:
        gpt, ngpt = (all_values[f"{architecture}_nvidia_{name}_{precision}"]["parameters_total"] for architecture in ("gpt", "ngpt"))
        return gpt, ngpt

    whole = nvidia_hybrid(5120, 20_480, query_heads=40, query_groups=8, mamba_heads=128, mamba_groups=8)
    assert printed("hybrid_12b") == whole
    assert round(whole[0] / 1e9) == 12  # "12-billion-parameter model", arXiv 2509.25149, abstract
    quarter = nvidia_hybrid(1280, 5120, query_heads=10, query_groups=2, mamba_heads=32, mamba_groups=2)
    assert printed("hybrid_1b") == quarter
    # 20 blocks of attention (16 heads and 2 * 8 groups of 128) and an MLP; "1.2B" in the same paper, without saying of what.
    matrices = 20 * (2048 * (16 + 2 * 8) * 128 + 16 * 128 * 2048 + 2 * 2048 * 6144) + 2 * 131_072 * 2048
    norms, scales = 20 * 2 * 2048 + 2048, 20 * (2 * 2048 + 16 * 128 + 6144) + 131_072
    assert printed("1p2b_dense") == (matrices + norms, matrices + scales)


def test_nvidias_small_hybrids_fit_one_h100(all_values: dict[str, dict]):
    for name in ("gpt_nvidia_hybrid_1b_bf16", "gpt_nvidia_hybrid_1b_nvfp4", "ngpt_nvidia_hybrid_1b_bf16", "ngpt_nvidia_hybrid_1b_nvfp4"):
        values = all_values[name]
        assert (values["gpu"], values["gpus"], values["memory"]["fits"]) == ("h100", 1, True)


def test_the_band_of_measured_steps_is_printed_and_is_the_claimed_one(capsys: pytest.CaptureFixture[str]):
    words = f"took {STEP_BAND[0]} to {STEP_BAND[1]} times their estimates"
    assert words in run(capsys, "experiment=gpt_tiny")[1]
    assert words in (Path(__file__).parents[2] / "CLAIMS.md").read_text()


def test_the_parts_of_an_estimate_add_up():
    values = estimate(compose(["experiment=ngpt_hybrid_3b30b_bf16"]), price=2.5)
    memory, step, cost = values["memory"], values["step"], values["cost"]
    parts = ("weights", "gradients", "optimizer", "quantized_weights", "activations", "temporary", "workspace")
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
    assert "quantised weights" in out


def test_a_run_that_does_not_fit_says_so(capsys: pytest.CaptureFixture[str]):
    status, out, _ = run(capsys, "experiment=ngpt_hybrid_3b30b_bf16", "cluster=h100_8")
    assert status == 0
    assert "DOES NOT FIT" in out
    assert " of 76.65 GiB usable (79.65 GiB less 3 GiB for CUDA and NCCL)" in out


def test_tiny_models_print_figures_instead_of_zeros(capsys: pytest.CaptureFixture[str]):
    _, out, _ = run(capsys, "experiment=ngpt_hybrid_tiny", "--price", "2")
    assert "total 0.876 MFLOP" in out and "weights 0.72 MiB" in out and re.search(r"tokens: \d\.\d s, ", out)
    assert not re.findall(r"-0\.0|e-0|\b0\.0+\b| 0 GPU hours", out)


def test_no_rounding_is_printed_as_waiting(capsys: pytest.CaptureFixture[str]):
    """Sums of seconds in another order differ by 1e-16 where the GPU alone sets the pace: not -0.0 ms, and not 0.0 ns."""
    for size in ("2", "3", "4"):
        _, out, _ = run(capsys, "experiment=ngpt_1p2b_dense_bf16", f"train.micro_batch_size={size}", "train.global_batch_size=768")
        assert "waiting for host 0 ms\n" in out


def test_a_pipeline_says_which_ranks_its_figures_are_of(capsys: pytest.CaptureFixture[str]):
    words = ["experiment=gpt_1p2b_dense_bf16", "cluster=h100_8"]
    _, cut, _ = run(capsys, *words, "parallel.pipeline=2")
    _, whole, _ = run(capsys, *words)
    rank = estimate(compose([*words, "parallel.pipeline=2"]))["memory"]["pipeline_rank"]
    for words in ("(on the slowest pipeline rank)", f" on pipeline rank {rank}"):
        assert words in cut and words not in whole


def test_a_step_that_waits_for_the_host_says_that_hosts_differ(capsys: pytest.CaptureFixture[str]):
    """The 1.2B model at micro-batch 1 does, at 2 it does not."""
    words = ["experiment=gpt_1p2b_dense_bf16", "train.global_batch_size=768"]
    said = ["runs Python" in run(capsys, *words, f"train.micro_batch_size={size}")[1] for size in (1, 2)]
    assert said == [True, False]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["experiment=nothing"], "experiment"),
        (["experiment=ngpt_tiny", "parallel.tensor=3"], "model.num_attention_heads: 4. "),
        (["experiment=ngpt_tiny", "model.layer_pattern=X"], "model.layer_pattern: 'X'. "),
        (["experiment=ngpt_tiny", "--config-dir", "/nowhere"], "--config-dir: /nowhere. "),
        (["experiment=ngpt_tiny", "--fit", "12"], "--fit: 12. Must be whole hosts of 8 GPUs"),
        (["experiment=ngpt_tiny", "--fit", "-1"], "--fit: -1. "),
        (["experiment=ngpt_tiny", "--fit", "0"], "--fit: 0. Must be a number of GPUs. Give 1 or more"),
        (["experiment=ngpt_tiny", "--fit", "many"], "--fit: many. "),
        (["--fit", "experiment=ngpt_tiny", "model.layer_pattern=X"], "model.layer_pattern: 'X'. "),
        (["experiment=ngpt_tiny", "--fit", "8", "model.num_query_groups=3"], "model.num_query_groups: 3. "),
        (["experiment=ngpt_tiny", "--fit", "--top", "0"], "--top: 0. "),
        (["experiment=ngpt_tiny", "--price", "-3"], "--price: -3.0. "),
        (["experiment=ngpt_tiny", "--price", "nan"], "--price: nan. "),
        (["experiment=ngpt_tiny", "--price", "inf"], "--price: inf. "),
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
    layouts = propose_layouts(compose(overrides), gpus).layouts
    assert len(layouts) > 5
    assert [layout.step.total for layout in layouts] == sorted(layout.step.total for layout in layouts)
    cuts = {(cfg.parallel.tensor, cfg.parallel.pipeline, cfg.parallel.expert) for cfg in (layout.cfg for layout in layouts)}
    assert len(cuts) > 3
    for layout in layouts[::3]:
        typed = compose([*overrides, *layout.overrides])
        assert typed.cluster.nodes * typed.cluster.gpus_per_node == gpus
        assert typed.train.global_batch_size == layout.cfg.train.global_batch_size
        memory = estimate_memory(typed)
        assert memory.peak == layout.memory.peak
        assert memory.peak + RESERVED <= GPUS["h100"].memory
        assert estimate_step(typed).total == pytest.approx(layout.step.total)


def test_without_room_nothing_is_proposed_and_the_reason_is_given(capsys: pytest.CaptureFixture[str]):
    words = ["experiment=ngpt_hybrid_3b30b_bf16", "cluster=h100_8"]
    status, out, _ = run(capsys, *words, "--fit", "1")
    assert status == 1
    assert out.startswith("0 layouts fit 1 GPU\n  1 tried: 1 too large\n  the smallest peak: ")
    assert " of 76.65 GiB usable, with " in out and "parallel.recompute=full" in out
    status, out, _ = run(capsys, *words, "--fit", "1", "--json")
    values = json.loads(out)
    assert (status, values["layouts"], values["rejected"], values["fit_gpus"]) == (1, [], {"memory": 1}, 1)
    nearest = compose([*words, *values["nearest"]["overrides"]])
    assert not fits(nearest, estimate_memory(nearest))
    assert values["nearest"]["peak_bytes"] == round(estimate_memory(nearest).peak)


@pytest.mark.parametrize(
    ("words", "gpus", "reasons", "said"),
    [
        (["train.global_batch_size=3"], 8, {"batch", "layers", "checks"}, "the checks, most often: "),
        ([], 1024, {"batch", "layers"}, "Set train.global_batch_size to a multiple of 1024"),
    ],
)
def test_rejections_are_counted_by_reason(capsys: pytest.CaptureFixture[str], words: list[str], gpus: int, reasons: set[str], said: str):
    """A pipeline deeper than the model has layers is one of them."""
    words = ["experiment=ngpt_hybrid_tiny", "train.micro_batch_size=1", *words, "--fit", str(gpus)]
    status, out, _ = run(capsys, *words)
    assert status == 1
    assert said in out
    assert set(json.loads(run(capsys, *words, "--json")[1])["rejected"]) == reasons


def test_json_lists_as_many_proposals_as_asked_for(capsys: pytest.CaptureFixture[str]):
    status, out, _ = run(capsys, "experiment=gpt_1p2b_dense_bf16", "cluster=h100_8", "--fit", "--top", "3", "--json")
    assert status == 0
    values = json.loads(out)
    assert len(values["layouts"]) == 3
    assert values["fit_gpus"] == 8
    assert values["nearest"] is None
    assert set(values["layouts"][0]) == {"overrides", "peak_bytes", "step_s", "tokens_per_second"}


def test_words_in_json_are_arguments_and_in_the_table_a_shell_s():
    """A cut pattern and a list need quotes in a shell, and are refused with them as arguments."""
    large = [*SMALL_HYBRID, "model.num_experts=384"]
    found = propose_layouts(compose(large), 8)
    layouts = describe_proposals(found, 200)["layouts"]
    lines = proposals_table(found, 200, None).splitlines()[1:]
    assert [shlex.split(line.split(" GiB  ")[1]) for line in lines] == [layout["overrides"] for layout in layouts]
    cut = next(layout for layout in layouts if any("|" in word for word in layout["overrides"]))
    recomputed = next(layout for layout in layouts if any("recompute_modules=[moe]" in word for word in layout["overrides"]))
    assert any("'parallel.recompute_modules=[moe]'" in line for line in lines)
    for layout in (cut, recomputed):
        assert round(estimate_memory(compose([*large, *layout["overrides"]])).peak) == layout["peak_bytes"]


@pytest.mark.parametrize(
    "words",
    [
        ["experiment=ngpt_hybrid_1p5b_bf16", "cluster=h100_1", "parallel.expert=8"],  # 8 expert-parallel ranks on one process
        ["experiment=ngpt_1p2b_dense_bf16", "cluster=h100_8", "parallel.tensor=3"],
        ["experiment=ngpt_1p2b_dense_bf16", "cluster=h100_1", "parallel.tensor=2", "parallel.sequence_parallel=false"],
        ["experiment=ngpt_1p2b_dense_bf16", "cluster=h100_1", "parallel.pipeline=2", "model.layer_pattern=*-*-*-*-|*-*-*-*-*-*-*-*-"],
    ],
    ids=["experts", "tensor", "sequence", "cut"],
)
def test_the_configured_layout_need_not_be_possible(capsys: pytest.CaptureFixture[str], words: list[str]):
    words = [word.replace("=*", "='*") + "'" if "pattern" in word else word for word in words]
    if "pattern" in words[-1]:
        words.append("model.num_layers=12")
    status, out, err = run(capsys, *words, "--fit", "16", "--json", "--top", "200")
    assert (status, err) == (0, "")
    values = json.loads(out)
    assert values["refused"] and values["fit_gpus"] == 16
    for layout in values["layouts"][::9]:
        typed = compose([*words, *layout["overrides"]])
        assert typed.cluster.nodes * typed.cluster.gpus_per_node == 16
        assert round(estimate_memory(typed).peak) == layout["peak_bytes"]


def test_a_stated_sequence_parallel_is_taken_back(capsys: pytest.CaptureFixture[str]):
    words = ["experiment=ngpt_1p2b_dense_bf16", "cluster=h100_8", "parallel.sequence_parallel=false"]
    layouts = json.loads(run(capsys, *words, "--fit", "--json")[1])["layouts"]
    cut = next(layout for layout in layouts if "parallel.tensor=2" in layout["overrides"])
    assert round(estimate_memory(compose([*words, *cut["overrides"]])).peak) == cut["peak_bytes"]


@pytest.mark.parametrize(
    "words", [["--fit", "experiment=ngpt_tiny"], ["experiment=ngpt_tiny", "--fit"], ["--fit", "1", "experiment=ngpt_tiny"]]
)
def test_fit_stands_anywhere(capsys: pytest.CaptureFixture[str], words: list[str]):
    status, out, _ = run(capsys, *words)
    assert status == 0
    assert out.startswith("1 layout fits 1 GPU\n")


def test_a_cut_balances_time_not_symbols():
    """The expensive output layer leaves fewer layers to the last stage; the parts are the pattern, prediction depths stay behind."""
    cfg = compose(["experiment=ngpt_hybrid_3b30b_bf16"])
    parts = balanced_cut(cfg, 4).split("|")
    assert "".join(parts) == cfg.model.layer_pattern
    assert len(parts[-1]) < len(parts[0])
    with_depth = compose(["experiment=ngpt_hybrid_3b30b_bf16", f"model.layer_pattern={cfg.model.layer_pattern}/*E"])
    assert balanced_cut(with_depth, 2).endswith("/*E")
    assert "|" not in balanced_cut(compose(["experiment=gpt_1p2b_dense_bf16"]), 4)


def test_without_words_the_missing_keys_are_named(capsys: pytest.CaptureFixture[str]):
    status, _, err = run(capsys)
    assert status == 2 and "run.name: Not set" in err


@pytest.mark.parametrize(
    ("words", "key"),
    [
        (["precision=fp32", "parallel.context=2"], "parallel.context"),
        (["data.confine_attention=true", "data.mock=false", "data.train=[{path: x}]", "data.valid=[{path: x}]"], "train.micro_batch_size"),
    ],
    ids=["fp32", "documents"],
)
def test_what_attention_on_gpus_cannot_do_is_neither_estimated_nor_proposed(words: list[str], key: str, capsys: pytest.CaptureFixture[str]):
    words = ["experiment=ngpt_1p2b_dense_bf16", "train.global_batch_size=96", "cluster=h100_8", *words]
    status, _, err = run(capsys, *words, "train.micro_batch_size=2")
    assert status == 2 and err.startswith(f"{key}: ")
    _, out, _ = run(capsys, *words, "train.micro_batch_size=1", "--fit", "--json", "--top", "100")
    overrides = [word for layout in json.loads(out)["layouts"] for word in layout["overrides"]]
    assert overrides and not any(word.startswith(f"{key}=") and not word.endswith("=1") for word in overrides)
