"""The training cases of models with multi-token prediction depths, added to those of `cases.py`."""

from cases import BF16, CP2, DP2, FIRST, NEAREST, NVFP4, OVERLAP, PP2, PREDICTION_MODELS, SAVE, TP2, Case, _like, _seed, _stopped
from hybrid_cases import EP2

VPP2 = ["parallel.virtual_pipeline=2", "model.layer_pattern='*|-|*|-/*-/*-'"]
CUT = ["model.layer_pattern='ME|*E/ME/ME'"]

ONE_PROCESS = [
    *(_seed(model) for model in PREDICTION_MODELS),
    *(_like(f"one_{model}", model) for model in PREDICTION_MODELS),
    _like("recompute_mtp_hybrid", "mtp_hybrid", ["parallel.recompute=full"]),
    _like("one_mtp_nvfp4", "mtp", NVFP4, NEAREST, FIRST),
]
TWO_PROCESSES = [
    *(_like(f"tp2_{model}", model, TP2) for model in ("mtp", "mtp_control", "mtp_hybrid")),
    _like("pp2_mtp_gated", "mtp_gated", PP2),
    _like("pp2_mtp_hybrid", "mtp_hybrid", PP2, CUT),
    _like("vpp2_mtp", "mtp", PP2, VPP2),
    _like("ep2_mtp_hybrid", "mtp_hybrid", EP2),
    _like("cp2_mtp", "mtp", CP2),
    _like("cp2_mtp_hybrid", "mtp_hybrid", CP2),
    _like("dp2_mtp", "mtp", DP2, OVERLAP),
    _like("tp2_mtp_nvfp4", "mtp", TP2, NVFP4, NEAREST, FIRST),
    _like("pp2_mtp_gated_bf16", "mtp_gated", PP2, BF16),
    *_stopped("resume_pp2_mtp", PP2, BF16, model="mtp_gated"),
    Case("reshard_source_tp2_mtp", "mtp", [*TP2, *SAVE, "train.stop_after=2"], seed="seed_mtp"),
    Case("reshard_mtp_tp2_to_pp2", "mtp", PP2, load_all="reshard_source_tp2_mtp"),
]
