"""Every shipped file composes: experiments as they are and cut down, groups one by one."""

from pathlib import Path

import pytest

from ngpt.config import compose, config_dir, data_parallel_size, dump, load, micro_batches_per_step, model_defining
from ngpt.config.identity import diff, flatten
from ngpt.estimate.counts import count_parameters, training_flops_per_token

EXPERIMENTS = sorted(path.stem for path in (config_dir() / "experiment").glob("*.yaml"))
OPTIONS = sorted((path.parent.name, path.stem) for path in config_dir().glob("*/*.yaml") if path.parent.name != "experiment")
# What an option needs besides itself to make sense on the tiny model.
COMPANIONS = {
    ("data", "enwik8_tekken"): ["model=ngpt_1p2b"],
    ("debug", "profile"): ["train.steps=12"],
    ("model", "ngpt_1p2b"): ["train.micro_batch_size=1"],
    ("parallel", "cp2"): ["cluster.gpus_per_node=2"],
    ("parallel", "pp2"): ["cluster.gpus_per_node=2"],
    ("parallel", "pp2_vp2"): ["cluster.gpus_per_node=2", "model.num_layers=4"],
    ("parallel", "tp2"): ["cluster.gpus_per_node=2"],
    ("parallel", "tp4"): ["cluster.gpus_per_node=4", "model.num_query_groups=4"],
    ("tokenizer", "bpe"): ["model.vocab_size=4096"],
    ("tokenizer", "huggingface"): ["tokenizer.path=tokenizer.json"],
    ("tokenizer", "tekken"): ["model.vocab_size=131072"],
    ("cluster", "b200_128"): ["train.global_batch_size=256"],
    ("cluster", "h100_8"): ["train.global_batch_size=16"],
    ("cluster", "h200_8"): ["train.global_batch_size=16"],
}


def test_the_required_experiments_are_shipped():
    assert {"quickstart", "ngpt_1p2b_dense_bf16", "gpt_1p2b_dense_bf16"} <= set(EXPERIMENTS)


@pytest.mark.parametrize("cut", [[], ["train.global_batch_size=16", "train.steps=50"]], ids=["whole", "cut_down"])
@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_experiment_composes_is_counted_and_reads_back_equal(experiment: str, cut: list[str], tmp_path: Path):
    cfg = compose([f"experiment={experiment}", *cut])
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


@pytest.mark.parametrize(("group", "option"), OPTIONS)
def test_option_composes_and_carries_its_file_name(group: str, option: str):
    cfg = compose(["experiment=ngpt_tiny", f"{group}={option}", *COMPANIONS.get((group, option), [])])
    assert getattr(cfg, group).name == option


@pytest.mark.parametrize("control", [name for name in EXPERIMENTS if name.startswith("gpt") or name.endswith("_gpt")])
def test_control_differs_from_its_ngpt_only_in_architecture_and_optimization(control: str):
    ours = control.removesuffix("_gpt") if control.endswith("_gpt") else f"n{control}"
    changed = diff(flatten(compose([f"experiment={ours}"])), flatten(compose([f"experiment={control}"])))
    allowed = {"model.name", "model.architecture", "schedule.warmup_steps", "checkpoint.dir", "data.cache_dir"}
    assert {key for key in changed if not key.startswith(("optim.", "run."))} <= allowed
    assert changed["model.architecture"] == ("ngpt", "gpt")
    assert changed["optim.weight_decay"] == (0.0, 0.1)


def test_the_paper_model_has_the_paper_hyper_parameters():
    flat = flatten(compose(["experiment=ngpt_1p2b_dense_bf16"]))
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
    base = ["experiment=quickstart"]
    same = [
        ["parallel=pp2", "cluster.gpus_per_node=2", "model.layer_pattern='*-*-|*-*-'"],
        ["precision=bf16"],
        ["model.transformer_impl=local", "run.name=b", "optim.lr=1.0", "train.steps=300"],
        ["model.num_query_groups=4", "model.head_dim=48"],  # the derived values, said aloud
    ]
    for overrides in same:
        assert diff(model_defining(compose(base)), model_defining(compose(base + overrides))) == {}
    other = ["model.fine_grained=false", "train.seq_length=128", "model.ffn_hidden_size=512", "tokenizer=bpe"]
    changed = diff(model_defining(compose(base)), model_defining(compose([*base, *other, "model.vocab_size=4096"])))
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
