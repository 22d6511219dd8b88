"""The training cases of models with Mamba and mixture-of-experts layers, added to those of `cases.py`."""

from cases import BF16, CP2, DP2, HYBRID_MODELS, NEAREST, NVFP4, OVERLAP, PP2, SAVE, TP2, Case, _like, _seed, _stopped

EP2 = ["parallel.expert=2", "cluster.gpus_per_node=2"]
# Pipeline stages of a hybrid are cut by hand.
CUT = ["model.layer_pattern='ME|*E'"]
WHOLE_EXPERTS = ["parallel.expert_tensor=1"]
FOUR = ["cluster.gpus_per_node=4"]

ONE_PROCESS = [
    *(_seed(model) for model in HYBRID_MODELS),
    *(_like(f"one_{model}", model) for model in HYBRID_MODELS),
    _like("one_hybrid_bf16", "hybrid", BF16),
    _like("one_hybrid_allgather", "hybrid", ["parallel.token_dispatcher=allgather"]),
    _like("one_hybrid_overlap", "hybrid", ["parallel.shared_expert_overlap=true"]),
    _like("recompute_hybrid", "hybrid", ["parallel.recompute=full"]),
    _like("recompute_hybrid_experts", "hybrid", ["parallel.recompute=selective", "parallel.recompute_modules=[moe,shared_experts]"]),
    _like("one_hybrid_nvfp4", "hybrid", NVFP4, NEAREST),
    Case("reshard_source_one_hybrid", "hybrid_gated", [*SAVE, "train.stop_after=2"], seed="seed_hybrid_gated"),
    Case("reshard_whole_one_hybrid", "hybrid_gated", seed="seed_hybrid_gated"),
]
TWO_PROCESSES = [
    *(_like(f"tp2_{model}", model, TP2) for model in HYBRID_MODELS),
    *(_like(f"ep2_{model}", model, EP2) for model in HYBRID_MODELS),
    _like("pp2_hybrid", "hybrid", PP2, CUT),
    _like("dp2_hybrid_overlap", "hybrid", DP2, OVERLAP),
    _like("dp2_hybrid", "hybrid", DP2),
    _like("tp2_hybrid_whole_experts", "hybrid", TP2, WHOLE_EXPERTS),
    _like("tp2_hybrid_gated_whole_experts", "hybrid_gated", TP2, WHOLE_EXPERTS),
    _like("tp2_hybrid_nvfp4", "hybrid", TP2, WHOLE_EXPERTS, NVFP4, NEAREST),
    _like("ep2_hybrid_nvfp4", "hybrid", EP2, NVFP4, NEAREST),
    _like("cp2_hybrid", "hybrid", CP2),
    _like("cp2_hybrid_gated", "hybrid_gated", CP2),
    *_stopped("resume_ep2", BF16, EP2, OVERLAP, model="hybrid"),
    Case("reshard_hybrid_one_to_tp2", "hybrid_gated", TP2, load_all="reshard_source_one_hybrid"),
    Case("reshard_hybrid_one_to_pp2", "hybrid_gated", [*PP2, *CUT], load_all="reshard_source_one_hybrid"),
    Case("reshard_hybrid_one_to_ep2", "hybrid_gated", [*EP2, *OVERLAP], load_all="reshard_source_one_hybrid"),
    Case("reshard_source_ep2_hybrid", "hybrid_gated", [*EP2, *SAVE, "train.stop_after=2"], seed="seed_hybrid_gated"),
    Case("reshard_hybrid_ep2_to_tp2", "hybrid_gated", TP2, load_all="reshard_source_ep2_hybrid"),
    _like("ep2_hybrid_bf16", "hybrid", EP2, BF16, OVERLAP),
]
FOUR_PROCESSES = [
    _like("tp2_ep2_hybrid", "hybrid", TP2, EP2, WHOLE_EXPERTS, OVERLAP, FOUR),
    _like("tp2_ep2_hybrid_gated", "hybrid_gated", TP2, EP2, ["parallel.token_dispatcher=allgather"], FOUR),
]
