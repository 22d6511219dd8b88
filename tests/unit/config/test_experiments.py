"""Every shipped file composes: experiments as they are and cut down, groups one by one."""

import functools
from pathlib import Path

import pytest

from ngpt.config import Config, compose, config_dir, data_parallel_size, dump, load, micro_batches_per_step, model_defining
from ngpt.config.identity import diff, flatten
from ngpt.config.linears import block_linears, recipe_by_linear
from ngpt.estimate.counts import count_parameters, training_flops_per_token

EXPERIMENTS = sorted(path.stem for path in (config_dir() / "experiment").glob("*.yaml"))
CUT = ["train.global_batch_size=16", "train.steps=50"]
# Each with and without CUT, which decides nothing that depends on the precision.
WHOLE_AND_CUT = [(name, cut) for name in EXPERIMENTS for cut in ([], CUT) if not (cut and name.endswith("_nvfp4"))]
MODELS = {path.stem for path in config_dir().glob("model/*.yaml")}
# Of every group but these two: experiments compose each model.
OPTIONS = sorted(
    (path.parent.name, path.stem) for path in config_dir().glob("*/*.yaml") if path.parent.name not in ("experiment", "model", "study")
)
# What an option needs besides itself to make sense on the tiny model.
EIGHT_EXPERTS = ["cluster.gpus_per_node=8", "model=ngpt_hybrid_tiny", "model.num_experts=8", "train.global_batch_size=16"]
COMPANIONS = {
    ("data", "enwik8_tekken"): ["model=ngpt_1p2b"],
    ("debug", "profile"): ["train.steps=12"],
    ("parallel", "ep2"): ["cluster.gpus_per_node=2", "model=ngpt_hybrid_tiny"],
    ("parallel", "ep8"): EIGHT_EXPERTS,
    ("parallel", "ep8_recompute"): EIGHT_EXPERTS,
    ("parallel", "cp2"): ["cluster.gpus_per_node=2"],
    ("parallel", "pp2"): ["cluster.gpus_per_node=2"],
    ("parallel", "pp2_vp2"): ["cluster.gpus_per_node=2", "model.num_layers=4"],
    ("parallel", "tp2"): ["cluster.gpus_per_node=2"],
    ("parallel", "tp4"): ["cluster.gpus_per_node=4", "model.num_query_groups=4"],
    ("tokenizer", "bpe"): ["model.vocab_size=4096"],
    ("tokenizer", "huggingface"): ["tokenizer.path=tokenizer.json"],
    ("tokenizer", "sentencepiece"): ["tokenizer.path=tokenizer.model"],
    ("tokenizer", "tekken"): ["model.vocab_size=131072"],
    ("cluster", "b200_128"): ["train.global_batch_size=256"],
    ("cluster", "gb200_64"): ["train.global_batch_size=128"],
    ("cluster", "gb300_64"): ["train.global_batch_size=128"],
    ("cluster", "h100_8"): ["train.global_batch_size=16"],
    ("cluster", "h200_8"): ["train.global_batch_size=16"],
    ("cluster", "slurm_b200"): ["train.global_batch_size=16"],
    ("cluster", "slurm_h100"): ["train.global_batch_size=16"],
}


@functools.cache
def shipped(experiment: str) -> Config:
    """A whole experiment, composed once for all tests: they only look at it."""
    return compose([f"experiment={experiment}"])


def test_the_required_experiments_are_shipped():
    dense = {f"{architecture}_1p2b_dense_{precision}" for architecture in ("ngpt", "gpt") for precision in ("bf16", "nvfp4")}
    assert {"quickstart", *dense} <= set(EXPERIMENTS)


@pytest.mark.parametrize(("experiment", "cut"), WHOLE_AND_CUT, ids=lambda value: value if isinstance(value, str) else f"{len(value)}_cut")
def test_experiment_composes_is_counted_and_reads_back_equal(experiment: str, cut: list[str], tmp_path: Path):
    cfg = compose([f"experiment={experiment}", *cut]) if cut else shipped(experiment)
    assert cfg.run.dir == f"runs/{experiment}"
    assert cfg.checkpoint.dir == f"runs/{experiment}/checkpoints"
    assert cfg.train.micro_batch_size * data_parallel_size(cfg) * micro_batches_per_step(cfg) == cfg.train.global_batch_size
    counts = count_parameters(cfg.model)
    assert counts.total > counts.matmul > 0
    assert training_flops_per_token(cfg.model, cfg.train.seq_length) > 6 * counts.matmul
    derived = flatten(cfg.model) | {"sequence_parallel": cfg.parallel.sequence_parallel, "cache_dir": cfg.data.cache_dir}
    assert None not in derived.values()
    dump(cfg, tmp_path / "config.yaml")
    assert load(tmp_path / "config.yaml") == cfg


def test_every_model_has_an_experiment_and_carries_its_file_name():
    assert {shipped(experiment).model.name for experiment in EXPERIMENTS} == MODELS


@pytest.mark.parametrize(("group", "option"), OPTIONS)
def test_option_composes_and_carries_its_file_name(group: str, option: str):
    cfg = compose(["experiment=ngpt_tiny", f"{group}={option}", *COMPANIONS.get((group, option), [])])
    assert getattr(cfg, group).name == option


@pytest.mark.parametrize("control", [name for name in EXPERIMENTS if name.startswith("gpt") or name.endswith("_gpt")])
def test_control_differs_from_its_ngpt_only_in_architecture_and_optimization(control: str):
    ours = control.removesuffix("_gpt") if control.endswith("_gpt") else f"n{control}"
    changed = diff(flatten(shipped(ours)), flatten(shipped(control)))
    allowed = {"model.name", "model.architecture", "schedule.warmup_steps", "checkpoint.dir", "data.cache_dir"}
    recipes = changed.get("precision.name")
    if recipes:  # static scales need what only nGPT has
        assert recipes == ("nvfp4_paper", "nvfp4_nvidia")
    free = ("optim.", "run.", "precision.") if recipes else ("optim.", "run.")
    assert {key for key in changed if not key.startswith(free)} <= allowed
    assert changed["model.architecture"] == ("ngpt", "gpt")
    assert changed["optim.weight_decay"] == (0.0, 0.1)


def test_the_nvfp4_experiment_differs_from_the_bf16_one_only_in_precision():
    changed = diff(*(flatten(shipped(f"ngpt_1p2b_dense_{name}")) for name in ("bf16", "nvfp4")))
    assert {key for key in changed if not key.startswith(("run.", "checkpoint.dir", "data.cache_dir"))} == {
        "precision.name",
        "precision.format",
        "precision.input_amax",
        "precision.weight_amax",
        "precision.grad_output_amax",
    }


def test_the_paper_model_has_the_paper_hyper_parameters():
    flat = flatten(shipped("ngpt_1p2b_dense_bf16"))
    expected = {
        "model.num_layers": 20,
        "model.hidden_size": 2048,
        "model.ffn_hidden_size": 6144,
        "model.num_attention_heads": 16,
        "model.num_query_groups": 4,
        "model.head_dim": 128,
        "model.activation": "squared_relu",
        "model.tied_embeddings": False,
        "model.position_embedding": "rope",
        "model.rope_base": 1_000_000,
        "model.vocab_size": 131_072,
        "model.init_std": 0.0221,
        "model.alpha_init": 0.05,
        "model.fine_grained": True,
        "train.seq_length": 8192,
        "train.global_batch_size": 768,
        "train.micro_batch_size": 3,
        "optim.lr": 3e-4,
        "optim.min_lr": 1.2e-5,
        "optim.beta1": 0.9,
        "optim.beta2": 0.95,
        "optim.weight_decay": 0.0,
        "optim.clip_grad": 1.0,
        "schedule.decay": "wsd",
        "schedule.wsd_decay": "minus_sqrt",
        "schedule.decay_fraction": 0.15,
        "schedule.warmup_steps": 0,
        "precision.dtype": "bf16",
        "parallel.distributed_optimizer": True,
    }
    assert {key: flat[key] for key in expected} == expected


def test_the_hybrid_model_has_the_paper_hyper_parameters():
    flat = flatten(shipped("ngpt_hybrid_3b30b_bf16"))
    expected = {
        "model.layer_pattern": "MEMEM*EMEMEM*EMEMEM*EMEMEM*EMEMEM*EMEMEMEM*EMEMEMEME",
        "model.hidden_size": 2688,
        "model.num_attention_heads": 32,
        "model.num_query_groups": 2,
        "model.head_dim": 128,
        "model.activation": "squared_relu",
        "model.position_embedding": "none",
        "model.tied_embeddings": False,
        "model.vocab_size": 131_072,
        "model.init_std": 0.0192,
        "model.alpha_init": 0.05,
        "model.fine_grained": True,
        "model.num_experts": 128,
        "model.moe_top_k": 6,
        "model.moe_ffn_hidden_size": 1856,
        "model.moe_shared_ffn_hidden_size": 3712,
        "model.moe_score": "sigmoid",
        "model.moe_scaling": 2.5,
        "model.moe_expert_bias": True,
        "model.moe_aux_loss": "seq_aux_loss",
        "model.moe_aux_loss_coeff": 1e-4,
        "model.moe_router_input": "scaled",
        "model.moe_suv": "per_expert",
        "model.mamba_num_heads": 64,
        "model.mamba_head_dim": 64,
        "model.mamba_state_dim": 128,
        "model.mamba_num_groups": 8,
        "model.mamba_conv_kernel": 4,
        "model.mamba_chunk_size": 128,
        "model.mamba_gated_norm": False,
        "train.seq_length": 8192,
        "train.global_batch_size": 3072,
        "train.micro_batch_size": 1,
        "parallel.expert": 8,
        "optim.lr": 5e-4,
        "optim.min_lr": 5e-6,
        "optim.weight_decay": 0.0,
        "optim.clip_grad": 1.0,
        "schedule.decay": "wsd",
        "schedule.wsd_decay": "minus_sqrt",
        "schedule.decay_fraction": 0.2,
        "schedule.warmup_steps": 0,
        "precision.dtype": "bf16",
    }
    assert {key: flat[key] for key in expected} == expected


NVIDIA_HYBRID = {
    "model.hidden_size": 5120,
    "model.ffn_hidden_size": 20_480,
    "model.num_attention_heads": 40,
    "model.num_query_groups": 8,
    "model.head_dim": 128,
    "model.activation": "squared_relu",
    "model.tied_embeddings": False,
    "model.position_embedding": "none",
    "model.norm_epsilon": 1e-5,
    "model.vocab_size": 131_072,
    "model.init_std": 0.0125,
    "model.mamba_num_heads": 128,
    "model.mamba_head_dim": 80,
    "model.mamba_state_dim": 128,
    "model.mamba_num_groups": 8,
    "model.mamba_conv_kernel": 4,
    "train.seq_length": 8192,
    "train.global_batch_size": 736,
    "optim.lr": 4.5e-4,
    "optim.min_lr": 4.5e-6,
    "optim.beta1": 0.9,
    "optim.beta2": 0.95,
    "optim.clip_grad": 1.0,
    "schedule.decay": "wsd",
    "schedule.decay_fraction": 0.2,
}


@pytest.mark.parametrize("architecture", ["gpt", "ngpt"])
def test_nvidias_hybrid_has_its_paper_hyper_parameters(architecture: str):
    flat = flatten(shipped(f"{architecture}_nvidia_hybrid_12b_bf16"))
    assert {key: flat[key] for key in NVIDIA_HYBRID} == NVIDIA_HYBRID
    assert flat["model.layer_pattern"] == "M-M-M-M*-" * 6 + "M-M-M-M-"
    assert flat["train.steps"] * 736 * 8192 == pytest.approx(1e13, rel=1e-6)


@pytest.mark.parametrize("size", ["hybrid_12b", "hybrid_1b"])
def test_nvidias_recipe_has_four_ingredients_in_all_but_the_first_and_last_blocks(size: str):
    cfg = shipped(f"gpt_nvidia_{size}_nvfp4")
    quantised = recipe_by_linear(cfg)
    kept = [linear.name for linear in block_linears(cfg) if linear.name not in quantised]
    assert {int(name.split(".")[1]) for name in kept} == {0, 1, *range(54, 62)}  # of 62 layers the first 2 and the last 8
    assert (len(kept), len(quantised)) == (20, 104)  # 16 % of the linear layers
    (recipe,) = set(quantised.values())
    assert recipe.weight.rowwise.block_shape == recipe.weight.columnwise.block_shape == (16, 16)
    assert recipe.grad_output.rowwise.rounding == recipe.grad_output.columnwise.rounding == "sr"
    assert {recipe.input.columnwise.rht, recipe.grad_output.columnwise.rht} == {"signed"}  # both operands of wgrad


def test_nvidias_dense_model_has_its_hyper_parameters_and_bf16_in_its_last_blocks():
    cfg = shipped("gpt_nvidia_1p2b_dense_nvfp4")
    model, optim, schedule = cfg.model, cfg.optim, cfg.schedule
    assert (model.num_layers, model.hidden_size, model.ffn_hidden_size) == (20, 2048, 6144)
    assert (model.num_attention_heads, model.num_query_groups, model.position_embedding) == (16, 8, "rope")
    assert (optim.lr, optim.min_lr, optim.weight_decay, schedule.decay_fraction) == (1.2e-3, 1.2e-5, 0.1, 0.15)
    assert cfg.train.steps * cfg.train.global_batch_size * cfg.train.seq_length == pytest.approx(1e12, rel=1e-5)
    assert {linear.block_index for linear in block_linears(cfg) if linear.name not in recipe_by_linear(cfg)} == {17, 18, 19}


def test_a_group_on_the_command_line_beats_the_experiment():
    cfg = compose(["experiment=quickstart", "precision=bf16", "data=mock", "model=gpt_small"])
    assert (cfg.precision.dtype, cfg.data.mock, cfg.model.architecture) == ("bf16", True, "gpt")


def test_run_name_and_dir_can_be_chosen():
    assert compose(["experiment=quickstart", "run.name=mine"]).checkpoint.dir == "runs/mine/checkpoints"
    assert compose(["experiment=quickstart", "run.dir=elsewhere/x"]).data.cache_dir == "elsewhere/x/data_cache"


def test_any_other_megatron_argument_passes_through():
    cfg = compose(["experiment=quickstart", "megatron.log_params_norm=true", "+megatron.manual_gc_interval=5"])
    assert cfg.megatron == {"log_params_norm": True, "manual_gc_interval": 5}


def test_model_defining_keys_hold_the_function_and_not_its_execution():
    base, plain = ["experiment=quickstart"], model_defining(shipped("quickstart"))
    same = [
        ["parallel=pp2", "cluster.gpus_per_node=2", "model.layer_pattern='*-*-|*-*-'"],
        ["precision=bf16"],
        ["precision=nvfp4_paper", "precision.bf16_tail=0.2"],
        ["model.transformer_impl=local", "run.name=b", "optim.lr=1.0", "train.steps=300"],
        ["model.num_query_groups=4", "model.head_dim=48"],  # the derived values, said aloud
    ]
    for overrides in same:
        assert diff(plain, model_defining(compose(base + overrides))) == {}
    other = ["model.fine_grained=false", "train.seq_length=128", "model.ffn_hidden_size=512", "tokenizer=bpe"]
    changed = diff(plain, model_defining(compose([*base, *other, "model.vocab_size=4096"])))
    assert changed == {
        "model.ffn_hidden_size": (768, 512),
        "model.fine_grained": (True, False),
        "model.vocab_size": (257, 4096),
        "tokenizer.kind": ("bytes", "bpe"),
        "tokenizer.vocab_size": (None, 4096),
        "train.seq_length": (256, 128),
    }


def test_diff_names_keys_that_one_side_lacks():
    assert diff({"a": {"b": 1, "c": 2}}, {"a": {"b": 1}, "d": 3}) == {"a.c": (2, "(not set)"), "d": ("(not set)", 3)}
