"""Cases for GPU hosts, run by tests/bench/gpu_session.sh: Transformer Engine against Megatron's local modules, two GPUs against one.

    python gpu_cases.py LIST FOLDER [REGEX]     the list's cases (whose names match) as JSON, their runs below FOLDER
    python gpu_cases.py --report LIST FOLDER    losses and gradient norms beside those of the case they are compared with

A case is compared with the case named like it up to the last "__".
"""

import json
import re
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
from cases import BF16, CP2, DP2, MODELS, NEAREST, NVFP4, OVERLAP, PP2, SAVE, TP2, WHOLE, Case  # noqa: E402
from hybrid_cases import CUT, EP2, FIRST, WHOLE_EXPERTS  # noqa: E402

PRECISIONS = {"fp32": [], "bf16": BF16}
TE, LOCAL = ["model.transformer_impl=transformer_engine"], ["model.transformer_impl=local"]
# Wide enough for tensor cores and for fused attention kernels.
WIDE = ["model.hidden_size=512", "model.num_attention_heads=8", "model.num_query_groups=4", "model.ffn_hidden_size=1536"]
WIDE += ["model.num_layers=4", "train.seq_length=512"]
# Sizes that mamba-ssm and causal-conv1d take on one GPU and on each of two.
HYBRID_WIDE = [
    *WIDE, "model.mamba_num_heads=16", "model.mamba_head_dim=64", "model.mamba_state_dim=128", "model.mamba_chunk_size=128",
    "model.moe_ffn_hidden_size=256", "model.moe_shared_ffn_hidden_size=512",
]  # fmt: skip
# Every token goes to all four experts: rounding cannot send it to another one, and losses are as close as those of dense models.
ALL_EXPERTS = ["model.moe_top_k=4"]
SEQUENTIAL = ["model.expert_impl=sequential"]
FP8 = ["precision=fp8"]


def _like(name: str, model: str, *groups: list[str]) -> Case:
    return Case(name, model, [*WIDE, *(item for group in groups for item in group)], seed=f"seed_{model}")


def _all(suffix: str, *groups: list[str]) -> list[Case]:
    return [_like(f"{model}_{name}{suffix}", model, precision, *groups) for model in MODELS for name, precision in PRECISIONS.items()]


def _hybrid(name: str, *groups: list[str], model: str = "hybrid") -> Case:
    overrides = [*HYBRID_WIDE, *(item for group in groups for item in group)]
    if model == "hybrid_control":
        overrides.remove("model.moe_shared_ffn_hidden_size=512")
    return Case(name, model, overrides, seed=f"seed_{model}")


def _hybrid_te(suffix: str, *groups: list[str]) -> list[Case]:
    """On Transformer Engine, in both precisions."""
    return [_hybrid(f"hybrid_{name}__te{suffix}", ALL_EXPERTS, precision, TE, *groups) for name, precision in PRECISIONS.items()]


def _confined(backend: list[str]) -> list[Case]:
    """Real text with attention confined to documents: a mask for the local backend, boundaries for Transformer Engine."""
    data = [f"data.{split}=[{{path: .gpu/enwik8_tekken/{split}}}]" for split in ("train", "valid")]
    data += ["tokenizer=tekken", "tokenizer.path=.gpu/enwik8_tekken/tokenizer.json", "model.vocab_size=131072", "data.mock=false"]
    common = [*WIDE, *backend, *data, "train.micro_batch_size=1", "train.seq_length=2048"]
    suffix = "__te" if backend == TE else ""
    confined = [
        Case(f"confined_{name}{suffix}", overrides=[*common, *precision, "data.confine_attention=true"], seed="seed_confined")
        for name, precision in PRECISIONS.items()
    ]
    seed = [] if suffix else [Case("seed_confined", overrides=[*common, "train.steps=1", *SAVE, "logging.health_interval=1"])]
    return [*seed, *confined, Case(f"open_fp32{suffix}", overrides=common, seed="seed_confined")]


_SEED = [*LOCAL, *WIDE, "train.steps=1", *SAVE, "logging.health_interval=1"]
_RESUME = [*TE, *WIDE, *BF16, *SAVE]
_HYBRID_SEED = [*LOCAL, *HYBRID_WIDE, "train.steps=1", *SAVE, "logging.health_interval=1"]
_HYBRID_RESUME = [*TE, *HYBRID_WIDE, *BF16, *EP2, *SAVE]
LISTS = {
    "one": [
        *(Case(f"seed_{model}", model, _SEED, randomize_scales=True) for model in MODELS),
        *_all("", LOCAL),
        *_all("__te", TE),
        _like("plain_bf16__te__overlap", "plain", TE, BF16, OVERLAP),
        _like("plain_bf16__te__recompute", "plain", TE, BF16, ["parallel.recompute=full"]),
        Case("resume", overrides=_RESUME),
        Case("resume__halves", overrides=[*_RESUME, "train.stop_after=2"]),
        Case("resume__halves", overrides=_RESUME),
    ],
    "confined": [*_confined(LOCAL), *_confined(TE)],
    "two": [
        *_all("__te__dp2", TE, DP2, OVERLAP),
        *_all("__te__tp2", TE, TP2),
        _like("plain_bf16__te__cp2", "plain", TE, BF16, CP2),
        _like("plain_bf16__te__pp2", "plain", TE, BF16, PP2),
        _like("plain_fp32__te__dp2_whole_masters", "plain", TE, DP2, WHOLE),
    ],
    "hybrid_one": [
        Case("seed_hybrid", "hybrid", _HYBRID_SEED, randomize_scales=True),
        Case("seed_hybrid_gated", "hybrid_gated", _HYBRID_SEED, randomize_scales=True),
        Case("seed_hybrid_control", "hybrid_control", [item for item in _HYBRID_SEED if "shared_ffn" not in item]),
        *(_hybrid(f"hybrid_{name}", ALL_EXPERTS, precision, LOCAL) for name, precision in PRECISIONS.items()),
        *_hybrid_te(""),
        *_hybrid_te("__sequential", SEQUENTIAL),
        _hybrid("hybrid_bf16__te__recomputed", ALL_EXPERTS, BF16, TE, ["parallel.recompute=full"]),
        _hybrid("hybrid_gated_fp32", ALL_EXPERTS, LOCAL, model="hybrid_gated"),
        _hybrid("hybrid_gated_fp32__te", ALL_EXPERTS, TE, model="hybrid_gated"),
        _hybrid("hybrid_control_fp32", ALL_EXPERTS, LOCAL, model="hybrid_control"),
        _hybrid("hybrid_control_fp32__te", ALL_EXPERTS, TE, model="hybrid_control"),
        _hybrid("hybrid_top2_fp32", LOCAL),
        _hybrid("hybrid_top2_fp32__te", TE),
        _hybrid("hybrid_nvfp4", ALL_EXPERTS, NVFP4, NEAREST, FIRST, LOCAL),
        _hybrid("hybrid_nvfp4__te", ALL_EXPERTS, NVFP4, NEAREST, FIRST, TE, SEQUENTIAL),
        _hybrid("hybrid_nvfp4__te__grouped", ALL_EXPERTS, NVFP4, NEAREST, FIRST, TE),
        _hybrid("hybrid_fp8", ALL_EXPERTS, FP8, TE, SEQUENTIAL),
        _hybrid("hybrid_fp8__grouped", ALL_EXPERTS, FP8, TE),
        _hybrid("hybrid_fp8__grouped__recomputed", ALL_EXPERTS, FP8, TE, ["parallel.recompute=full"]),
    ],
    # With the GPUs hidden: the scan and the convolution in plain torch against the kernels that hybrid_one ran.
    "hybrid_cpu": [_hybrid("hybrid_fp32__cpu", ALL_EXPERTS, LOCAL)],
    "hybrid_two": [
        *_hybrid_te("__ep2", EP2),
        *_hybrid_te("__tp2", TP2),
        _hybrid("hybrid_fp8__grouped__ep2", ALL_EXPERTS, FP8, TE, EP2),
        _hybrid("hybrid_bf16__te__ep2_overlap", ALL_EXPERTS, BF16, TE, EP2, OVERLAP),
        _hybrid("hybrid_bf16__te__tp2_whole_experts", ALL_EXPERTS, BF16, TE, TP2, WHOLE_EXPERTS),
        _hybrid("hybrid_fp32__te__dp2", ALL_EXPERTS, TE, DP2, OVERLAP),
        _hybrid("hybrid_bf16__te__cp2", ALL_EXPERTS, BF16, TE, CP2),
        _hybrid("hybrid_fp32__te__pp2", ALL_EXPERTS, TE, PP2, CUT),
        _hybrid("hybrid_gated_fp32__te__tp2", ALL_EXPERTS, TE, TP2, model="hybrid_gated"),
        _hybrid("hybrid_top2_fp32__te__ep2", TE, EP2),
        Case("hybrid_resume", "hybrid", _HYBRID_RESUME),
        Case("hybrid_resume__stopped", "hybrid", [*_HYBRID_RESUME, "train.stop_after=2"]),
        Case("hybrid_resume__stopped", "hybrid", _HYBRID_RESUME),
    ],
}


def _rows(folder: Path) -> list[dict]:
    path = folder / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def bounds(name: str) -> dict[str, float]:
    """Largest relative differences of a case's figures from its counterpart's. Transformer Engine multiplies fp32 matrices in TF32."""
    if name.startswith("hybrid"):
        return dict(zip(("train_loss", "grad_norm"), _hybrid_bounds(name), strict=True))
    if name.endswith(("overlap", "recompute", "halves")):
        return {"train_loss": 0.0}
    return {"train_loss": 1e-4 if "bf16" in name or name.endswith("__te") else 2e-5}


def _hybrid_bounds(name: str) -> tuple[float, float]:
    """Of loss and gradient norm. None is bitwise: mamba-ssm's backward pass adds with atomics; it multiplies fp32 matrices in TF32.

    A token that goes to two of four experts goes to another one where two scores are closer than rounding, and in NVFP4 a value rounds
    to its other neighbour. Rounding every product's operands to TF32 on a CPU moves loss and norm by 2e-7 and 2e-5, with two of four
    experts by 6e-6 and 4e-4, in NVFP4 by 4e-6 and 3e-4, where NVFP4 itself moves them by 2e-5 and 2e-3.
    """
    if "bf16" in name or "fp8" in name or name.endswith("resume__stopped"):
        return 1e-4, 1e-2
    if "top2" in name:
        return 2e-5, 2e-3
    return (1e-5, 1e-3) if name.endswith(("__te", "__cpu")) else (5e-6, 5e-4)


def report(name: str, root: Path) -> int:
    """Print each case's last loss, the largest relative differences from its counterpart, and the worst norm deviation.

    Returns:
        The number of cases that failed: no result, an error, or beyond the bound.
    """
    failures = 0
    for case in {case.name: case for case in LISTS[name]}.values():
        result = root / case.name / "result-rank0.json"
        error = json.loads(result.read_text()).get("error", "") if result.exists() else "no result"
        rows, wanted = _rows(root / case.name), {row["step"]: row for row in _rows(root / case.name.rpartition("__")[0])}
        worst = {
            key: max((abs(row[key] / wanted[row["step"]][key] - 1) for row in rows if row["step"] in wanted), default=float("nan"))
            for key in ("train_loss", "grad_norm")
        }
        norms = max((row.get("worst_norm_deviation", 0) for row in rows), default=float("nan"))
        last = f"{rows[-1]['train_loss']:.6f}" if rows else "-"
        differences = f"loss {worst['train_loss']:.1e}, grad norm {worst['grad_norm']:.1e}"
        differs = "__" in case.name and not all(worst[key] <= bound for key, bound in bounds(case.name).items())
        failed = bool(error) or differs or not norms < 1e-6
        failures += failed
        print("FAILED" if failed else "      ", f"{case.name:34} {len(rows)} steps, last loss {last};", end=" ")
        print(f"differs by {differences}; norms {norms:.1e} {error[:160]}")
    return failures


if __name__ == "__main__":
    if sys.argv[1] == "--report":
        sys.exit(report(sys.argv[2], Path(sys.argv[3])) > 0)
    else:
        wanted = re.compile(sys.argv[3] if len(sys.argv) > 3 else "")
        print(json.dumps([case.as_json(Path(sys.argv[2])) for case in LISTS[sys.argv[1]] if wanted.search(case.name)]))
