"""The training cases of models with Mamba and mixture-of-experts layers, added to those of `cases.py`."""

from cases import (
    BF16,
    BUCKETS,
    CP2,
    DP2,
    FIRST,
    HYBRID_MODELS,
    NEAREST,
    NVFP4,
    NVIDIA,
    OVERLAP,
    PP2,
    SAVE,
    STATIC,
    TP2,
    Case,
    _like,
    _seed,
    _stopped,
)

EP2 = ["parallel.expert=2", "cluster.gpus_per_node=2"]
# Pipeline stages of a hybrid are cut by hand.
CUT = ["model.layer_pattern='ME|*E'"]
WHOLE_EXPERTS = ["parallel.expert_tensor=1"]
SEQUENTIAL = ["model.expert_impl=sequential"]  # a parameter for each expert; all other cases stack them
FOUR = ["cluster.gpus_per_node=4"]
# Every kind of layer, and enough layers for four chunks such that each pipeline rank holds experts. Expert widths are whole blocks of
# NVFP4 on each of two ranks. Four experts a token, since a sum over two is the same in any order.
DEEP = ["model.num_layers=6", "model.layer_pattern='ME*E-M'", "model.moe_ffn_hidden_size=64", "model.num_experts=6", "model.moe_top_k=4"]
DEEP_CUT = ["model.layer_pattern='ME*|E-M'"]
DEEP_CHUNKS = ["model.layer_pattern='ME|*E|-|M'", "parallel.virtual_pipeline=2"]
WATCHED = ["precision.diagnostics=true"]
ENDS_IN_HIGH = ["precision.num_layers_at_start_in_bf16=2", "precision.num_layers_at_end_in_bf16=8"]  # as in NVIDIA's 12B hybrid
SELECTIVE = "parallel.recompute=selective"


def _deep(name: str, *groups: list[str], **options: bool) -> Case:
    return Case(name, "hybrid_gated", [*DEEP, *(item for group in groups for item in group)], seed="seed_deep", options=options)


def _starved(name: str, *groups: list[str]) -> Case:
    return Case(name, "hybrid", [item for group in groups for item in group], seed="seed_starved")


def _source(name: str, *groups: list[str]) -> Case:
    """Stopped in the middle, to go on in another layout."""
    overrides = [*SAVE, "train.stop_after=2", *(item for group in groups for item in group)]
    return Case(f"reshard_source_{name}_hybrid", "hybrid_gated", overrides, seed="seed_hybrid_gated")


def _resharded(source: str, target: str, *groups: list[str]) -> Case:
    overrides = [item for group in groups for item in group]
    return Case(f"reshard_hybrid_{source}_to_{target}", "hybrid_gated", overrides, load_all=f"reshard_source_{source}_hybrid")


_SEED = ["train.steps=1", *SAVE, "logging.health_interval=1"]
ONE_PROCESS = [
    *(_seed(model) for model in HYBRID_MODELS),
    *(_like(f"one_{model}", model) for model in HYBRID_MODELS),
    _like("one_hybrid_bf16", "hybrid", BF16),
    *(_like(f"one_{model}_sequential", model, SEQUENTIAL) for model in HYBRID_MODELS),
    _like("recompute_hybrid", "hybrid", ["parallel.recompute=full"]),
    _like("recompute_hybrid_experts", "hybrid", [SELECTIVE, "parallel.recompute_modules=[moe]"]),
    _like("recompute_hybrid_shared_experts", "hybrid", [SELECTIVE, "parallel.recompute_modules=[shared_experts]"]),
    _like("one_hybrid_nvfp4", "hybrid", NVFP4, NEAREST),
    _source("one", SEQUENTIAL),
    Case("seed_deep", "hybrid_gated", [*DEEP, *_SEED], randomize_scales=True),
    _deep("one_deep", probe_layers=True),
    _deep("one_deep_nvfp4", NVFP4, NEAREST, FIRST, WATCHED),
    _deep("one_deep_nvidia", NVIDIA, NEAREST, FIRST, WATCHED),
    _deep("one_deep_static", STATIC, NEAREST, FIRST, WATCHED),
    _deep("recompute_deep", [SELECTIVE, "parallel.recompute_modules=[core_attn,mlp,moe,shared_experts]"]),
    Case("seed_starved", "hybrid", _SEED, options={"starve_experts": True}),
    _starved("one_starved"),
    Case("nvidia_control", "nvidia_control", [*NVIDIA, *ENDS_IN_HIGH, *WATCHED]),
]
TWO_PROCESSES = [
    *(_like(f"tp2_{model}", model, TP2) for model in HYBRID_MODELS),
    *(_like(f"ep2_{model}", model, EP2) for model in HYBRID_MODELS),
    _like("dp2_hybrid_overlap", "hybrid", DP2, OVERLAP),
    _like("dp2_hybrid", "hybrid", DP2),
    _like("tp2_hybrid_gated_whole_experts", "hybrid_gated", TP2, WHOLE_EXPERTS),
    _like("tp2_hybrid_nvfp4", "hybrid", TP2, WHOLE_EXPERTS, NVFP4, NEAREST, FIRST),
    _like("ep2_hybrid_nvfp4", "hybrid", EP2, NVFP4, NEAREST, FIRST),
    _like("pp2_hybrid_nvfp4", "hybrid", PP2, CUT, NVFP4, NEAREST),
    _like("cp2_hybrid_nvfp4", "hybrid", CP2, NVFP4, NEAREST, FIRST),
    _like("cp2_hybrid", "hybrid", CP2),
    *_stopped("resume_ep2", BF16, EP2, BUCKETS, model="hybrid"),
    _resharded("one", "tp2", TP2),
    _source("ep2", EP2),
    _resharded("ep2", "dp2", DP2),  # every rank holds all experts again
    _source("tp2", TP2),
    _resharded("tp2", "pp2", PP2, CUT),
    _source("pp2", PP2, CUT),
    _resharded("pp2", "ep2", EP2, OVERLAP, SEQUENTIAL),
    _like("ep2_hybrid_bf16", "hybrid", EP2, BF16, BUCKETS),
    _deep("vpp2_deep", PP2, DEEP_CHUNKS, probe_layers=True),
    _deep("tp2_deep_nvfp4", TP2, NVFP4, NEAREST, FIRST),
    _deep("cp2_ep2_deep", CP2, EP2, probe_layers=True),
    _starved("ep2_starved", EP2),
    _starved("ep2_starved_nvfp4", EP2, NVFP4),
    _deep("ep2_deep_nvfp4", EP2, SEQUENTIAL, NVFP4, NEAREST, FIRST, probe_padding=True),
]
FOUR_PROCESSES = [
    _like("tp2_ep2_hybrid", "hybrid", TP2, EP2, WHOLE_EXPERTS, OVERLAP, ["parallel.shared_expert_overlap=true"], FOUR),
    _like("tp2_ep2_hybrid_gated", "hybrid_gated", TP2, EP2, ["parallel.token_dispatcher=allgather"], FOUR),
    _deep("tp2_pp2_deep", TP2, PP2, DEEP_CUT, FOUR, probe_layers=True),
    _deep("vpp2_ep2_deep", PP2, DEEP_CHUNKS, EP2, OVERLAP, FOUR),
]
