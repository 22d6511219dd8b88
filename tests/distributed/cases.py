"""The training cases of the distributed tests, by world size. Everything is compared with one process from the same seed checkpoint."""

from dataclasses import dataclass, field
from pathlib import Path

# Three models: (name, overrides). Every fork of the layer code is in one of them.
MODELS = {
    "plain": ["model.num_query_groups=2"],
    "gated": ["model.num_layers=4", "model.activation=swiglu", "model.tied_embeddings=true", "model.fine_grained=false"],
    "control": ["model.architecture=gpt", "model.activation=swiglu", "model.num_query_groups=2"],
}
# The same for models with Mamba and experts; their cases are in hybrid_cases.py. Evaluations of such layers are compared in the
# cases of mtp_hybrid.
_HYBRID = ["model=ngpt_hybrid_tiny", "model.num_layers=4", "model.layer_pattern='ME*E'", "train.eval_steps=0"]
HYBRID_MODELS = {
    "hybrid": _HYBRID,
    "hybrid_gated": [
        *_HYBRID, "model.activation=swiglu", "model.moe_score=softmax", "model.moe_expert_bias=false", "model.moe_aux_loss=aux_loss",
        "model.moe_suv=shared", "model.moe_router_normalized=true", "model.mamba_gated_norm=true",
    ],
    "hybrid_control": [*_HYBRID, "model.architecture=gpt", "model.activation=swiglu", "model.moe_shared_ffn_hidden_size=0"],
}  # fmt: skip
# The same for multi-token prediction; their cases are in mtp_cases.py.
_PREDICTION = ["train.global_batch_size=4"]
PREDICTION_MODELS = {
    "mtp": [*_PREDICTION, "model.num_query_groups=2", "model.layer_pattern='*-*-/*-/*-'"],
    "mtp_gated": [
        *_PREDICTION, "model.activation=swiglu", "model.tied_embeddings=true", "model.fine_grained=false",
        "model.layer_pattern='*-*-/*-'",
    ],
    "mtp_control": [*_PREDICTION, "model.architecture=gpt", "model.num_query_groups=2", "model.layer_pattern='*-*-/*-'"],
    "mtp_hybrid": ["model=ngpt_hybrid_tiny", *_PREDICTION, "model.num_layers=4", "model.layer_pattern='ME*E/ME/ME'"],
}  # fmt: skip
# The pattern of NVIDIA's 12B hybrid, for three steps; its case is in hybrid_cases.py.
PATTERN_MODELS = {
    "nvidia_control": [
        "model=gpt_nvidia_hybrid_tiny", "model.num_layers=16", "train.steps=3", "train.global_batch_size=2", "train.eval_steps=0",
    ],
}  # fmt: skip
BASE = [
    "experiment=ngpt_tiny",
    "train.steps=4",
    "train.eval_interval=4",
    "train.eval_steps=1",
    "optim.lr=3e-3",
    # With Adam's usual epsilon the first steps follow the sign of every gradient entry: rounding alone would flip the smallest ones.
    "optim.eps=1e-3",
    "logging.health_interval=2",
    "checkpoint.save_at_end=false",
]
TP2 = ["parallel.tensor=2", "cluster.gpus_per_node=2"]
PP2 = ["parallel.pipeline=2", "cluster.gpus_per_node=2"]
VPP2 = [*PP2, "parallel.virtual_pipeline=2"]
CUT = ["model.layer_pattern='*|-|*|-'"]  # two layers into four chunks: attention apart from its MLP
DP2 = ["cluster.gpus_per_node=2"]
CP2 = ["parallel.context=2", "cluster.gpus_per_node=2"]
OVERLAP = ["parallel.overlap_grad_reduce=true", "parallel.overlap_param_gather=true"]
# Buckets so small that most end in padding: the state of what follows must not move. Only overlapped gradients are in buckets.
BUCKETS = [*OVERLAP, "megatron.ddp_bucket_size=3000"]
# Megatron's arguments on the allow-list, as far as a CPU has them: none may change a bit.
ALLOWED = [
    f"megatron.{word}"
    for word in """
    log_params_norm=true log_throughput=true log_progress=true
    log_validation_ppl_to_tensorboard=true log_num_zeros_in_grad=true log_world_size_to_tensorboard=true barrier_with_L1_time=false
    timing_log_level=2 timing_log_option=all logging_level=30 manual_gc=true manual_gc_interval=1 manual_gc_eval=false
    empty_unused_memory_level=2 train_sync_interval=1 num_dataset_builder_threads=2
    align_grad_reduce=false align_param_gather=false distributed_timeout_minutes=7 te_rng_tracker=true
    cuda_graph_impl=none iterations_to_skip=[] check_for_nan_in_loss_and_grad=true attention_softmax_in_fp32=true
    """.split()
]
PADDED = ["megatron.ddp_pad_buckets_for_high_nccl_busbw=true"]  # moves the shards' bounds, and with them the order of a row's sum
BF16 = ["precision=bf16"]
SAVE = ["checkpoint.save_at_end=true"]
CONFINED = ["data.confine_attention=true"]
WHOLE = ["parallel.distributed_optimizer=false"]
PAPER = ["precision=nvfp4_paper"]
NVFP4 = [*PAPER, "precision.dtype=fp32"]
EVALUATED = [*NVFP4, "train.eval_interval=1"]  # 4 micro-batches a step, and an evaluation behind each
NVIDIA = ["precision=nvfp4_nvidia", "precision.dtype=fp32", "precision.num_layers_at_end_in_bf16=1"]
NVIDIA_EVERYWHERE = [*NVIDIA, "precision.num_layers_at_end_in_bf16=0"]
NEAREST = ["precision.stochastic_rounding=false"]
STATIC = ["precision=nvfp4_static", "precision.dtype=fp32"]
FIRST = ["train.steps=1", "train.eval_steps=0", "logging.health_interval=1"]  # for cases of which only the first step is compared
# One block: in a deeper model one value that differs in its last bit changes more in the layers behind it.
SHALLOW = ["model.num_layers=1", "model.ffn_hidden_size=192"]


@dataclass
class Case:
    """One run: `seed` names the case whose weights it starts from."""

    name: str
    model: str = "plain"
    overrides: list[str] = field(default_factory=list)
    seed: str | None = None
    randomize_scales: bool = False
    load_all: str | None = None  # weights, optimizer state, schedule and RNG of another case's checkpoint
    options: dict[str, bool] = field(default_factory=dict)  # of case_runner.py

    def as_json(self, root: Path) -> dict:
        model = (MODELS | HYBRID_MODELS | PREDICTION_MODELS | PATTERN_MODELS)[self.model]
        overrides = [*BASE, *model, f"run.root={root}", f"run.name={self.name}", *self.overrides]
        if self.seed:
            overrides.append(f"checkpoint.load={root / self.seed / 'checkpoints'}")
        if self.load_all:
            overrides += [f"checkpoint.load={root / self.load_all / 'checkpoints'}", "checkpoint.load_optimizer=true"]
        return {"name": self.name, "overrides": overrides, "randomize_scales": self.randomize_scales} | self.options


def _seed(model: str) -> Case:
    return Case(f"seed_{model}", model, ["train.steps=1", *SAVE, "logging.health_interval=1"], randomize_scales=True)


def _like(name: str, model: str, *groups: list[str]) -> Case:
    return Case(name, model, [item for group in groups for item in group], seed=f"seed_{model}")


def _shallow(name: str, *groups: list[str]) -> Case:
    return Case(name, overrides=[*SHALLOW, *(item for group in groups for item in group)], seed="seed_shallow")


def _stopped(name: str, *groups: list[str], model: str = "plain") -> list[Case]:
    """A run stopped after step 2 and started again. Its checkpoint of step 2 stays the newest."""
    overrides = [*(item for group in groups for item in group), f"run.name={name}_halves"]
    return [
        Case(f"{name}_halves_1", model, [*overrides, *SAVE, "train.stop_after=2"], seed=f"seed_{model}"),
        Case(f"{name}_halves_2", model, overrides, seed=f"seed_{model}"),
    ]


ONE_PROCESS = [
    *(_seed(model) for model in MODELS),
    *(_like(f"one_{model}", model) for model in MODELS),
    _like("one_bf16", "plain", BF16),
    _like("one_allowed", "plain", ALLOWED),
    _like("one_confined", "plain", CONFINED),
    _like("recompute_full", "plain", ["parallel.recompute=full"]),
    _like("recompute_full_block", "plain", ["parallel.recompute=full", "parallel.recompute_method=block"]),
    _like("recompute_core_attn", "plain", ["parallel.recompute=selective"]),
    _like("recompute_mlp", "plain", ["parallel.recompute=selective", "parallel.recompute_modules=[mlp]"]),
    *_stopped("resume_fp32"),
    *_stopped("resume_bf16", BF16),
    Case("fp32_from_rounded", seed="resume_bf16_halves"),  # weights alone, BF16 into FP32
    Case("norm_check_stops", overrides=["debug.norm_tolerance=1e-12"]),
]
ONE_PROCESS += [
    Case("seed_shallow", overrides=[*SHALLOW, "train.steps=1", *SAVE, "logging.health_interval=1"], randomize_scales=True),
    _shallow("one_shallow", NVFP4, NEAREST),
    _shallow("one_shallow_static", STATIC, NEAREST),
    _like("one_nvfp4", "plain", NVFP4, NEAREST),
    _like("one_nvfp4_gated", "gated", NVIDIA, NEAREST, FIRST),
    _like("one_nvfp4_control", "control", NVIDIA, NEAREST, FIRST),
    _like("one_nvfp4_sr", "plain", NVFP4),
    _like("recompute_nvfp4_sr", "plain", NVFP4, ["parallel.recompute=full"]),
    Case("nvfp4_kept", overrides=EVALUATED, seed="seed_plain"),
    Case("nvfp4_requantised", overrides=EVALUATED, seed="seed_plain", options={"requantise": True}),
    _like("nvfp4_watched", "plain", NVFP4, NEAREST, ["precision.diagnostics=true"]),
    Case("nvfp4_first_half", overrides=[*NVFP4, *SAVE, "train.stop_after=2"]),
    Case("nvfp4_tail", overrides=[*NVFP4, "precision.bf16_tail=0.5"]),
    Case("nvfp4_layers", overrides=[*NVFP4, "precision.layers={*.mlp.*: nvfp4_nvidia}", "precision.bf16_modules=['*.linear_fc2']"]),
    Case("nvfp4_layers_swapped", overrides=[*NVIDIA_EVERYWHERE, "precision.layers={*.linear_fc2: fp32, *.self_attention.*: nvfp4_paper}"]),
    Case("nvfp4_tail_by_hand", overrides=["precision=fp32"], load_all="nvfp4_first_half"),
]
_HALF = ["schedule.warmup_steps=0", "schedule.decay_fraction=0.5"]
RATES = {  # schedules of test_rates.py
    "constant": ["schedule=constant", "schedule.warmup_steps=2", "train.steps=5"],
    "linear": ["schedule=linear", "schedule.warmup_steps=2", "train.steps=6"],
    "cosine": ["schedule=cosine", "schedule.warmup_steps=0", "optim.min_lr=0.002", "train.steps=4"],
    **{
        f"wsd_{decay}": ["schedule=wsd", *_HALF, f"schedule.wsd_decay={decay}", "train.steps=8"]
        for decay in ("linear", "minus_sqrt", "cosine", "exponential")
    },
    "wsd_without_decay": ["schedule=wsd", "schedule.warmup_steps=0", "schedule.decay_fraction=0.15", "train.steps=3"],
}
_ADAM = ["optim.lr=1e-2", "optim.eps=3e-5", "optim.beta1=0.8", "optim.beta2=0.9"]
_STILL = ["train.steps=1", "optim.lr=1e-12", "train.eval_sequences=5"]  # weights do not move, so that evaluations can be compared
ONE_PROCESS += [
    *(
        Case(f"rate_{name}", overrides=[*SHALLOW, *_ADAM, *words, "train.eval_steps=0", "logging.interval=1"])
        for name, words in RATES.items()
    ),
    _like("valid_one", "plain", _STILL, ["train.global_batch_size=1", "train.micro_batch_size=1"]),
    _like("valid_small", "plain", _STILL, ["train.seed=5", "train.global_batch_size=4", "train.micro_batch_size=2"]),
    _like("valid_large", "plain", _STILL, ["train.seed=6", "train.global_batch_size=8", "train.micro_batch_size=8"]),
    _like("valid_other", "plain", _STILL, ["train.eval_seed=5"]),
    *(Case(f"fresh_micro{size}", "hybrid", [*FIRST, f"train.micro_batch_size={size}"]) for size in (1, 2)),
]
TWO_PROCESSES = [
    *(_like(f"tp2_{model}", model, TP2) for model in MODELS),
    *(_like(f"pp2_{model}", model, PP2) for model in MODELS),
    *(_like(f"dp2_{model}", model, DP2) for model in ("plain", "gated")),
    *(_like(f"cp2_{model}", model, CP2) for model in ("plain", "control")),
    _like("vpp2_plain", "plain", VPP2, CUT),
    _like("vpp2_gated", "gated", VPP2),
    _like("tp2_no_sequence_parallel", "plain", TP2, ["parallel.sequence_parallel=false"]),
    _like("tp2_confined", "plain", TP2, CONFINED),
    _like("vpp2_confined", "plain", VPP2, CUT, CONFINED),
    _like("dp2_overlap", "plain", DP2, OVERLAP),
    _like("dp2_buckets", "plain", DP2, BUCKETS),
    _like("dp2_allowed", "plain", DP2, OVERLAP, ALLOWED),
    _like("dp2_padded", "plain", DP2, OVERLAP, PADDED),
    _like("dp2_whole_masters", "plain", DP2, WHOLE),
    _like("dp2_bf16", "plain", DP2, BF16),
    _like("dp2_bf16_overlap", "plain", DP2, BF16, OVERLAP),
    _like("tp2_bf16", "plain", TP2, BF16),
    *_stopped("resume_dp2", DP2, BUCKETS),
    Case("dp2_fp32_from_rounded", overrides=DP2, seed="resume_bf16_halves"),
    Case("reshard_one_to_dp2", overrides=DP2, load_all="resume_fp32_halves"),
    Case("reshard_dp2_to_tp2", overrides=TP2, load_all="resume_dp2_halves"),
]
TWO_PROCESSES += [
    _shallow("tp2_shallow", TP2, NVFP4, NEAREST),
    _shallow("tp2_shallow_static", TP2, STATIC, NEAREST),
    _shallow("tp2_shallow_no_sequence_parallel", TP2, NVFP4, NEAREST, ["parallel.sequence_parallel=false"]),
    _like("tp2_nvfp4_watched", "plain", TP2, NVFP4, NEAREST, ["precision.diagnostics=true"]),
    _like("pp2_nvfp4", "plain", PP2, NVFP4, NEAREST),
    _like("dp2_nvfp4", "plain", DP2, NVFP4, NEAREST, OVERLAP),
    _like("tp2_bf16_nvfp4", "plain", PAPER, TP2),
    *_stopped("resume_tp2_bf16_nvfp4", PAPER, TP2),
]
FOUR_PROCESSES = [
    _like("tp2_pp2_plain", "plain", TP2, PP2, ["cluster.gpus_per_node=4"]),
    _like("tp2_dp2_bf16_overlap", "plain", TP2, BF16, OVERLAP, ["cluster.gpus_per_node=4"]),
]
