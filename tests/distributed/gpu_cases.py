"""Cases for GPU hosts, run by tests/bench/gpu_session.sh: Transformer Engine against Megatron's local modules, and two GPUs against one.

    python gpu_cases.py NAME FOLDER            the list of cases as JSON
    python gpu_cases.py --report NAME FOLDER   losses beside those of the case they are compared with
"""

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
from cases import BF16, DP2, MODELS, OVERLAP, SAVE, TP2, WHOLE, Case  # noqa: E402

TE, LOCAL = ["model.transformer_impl=transformer_engine"], ["model.transformer_impl=local"]
# Wide enough for tensor cores and for attention kernels.
WIDE = ["model.hidden_size=512", "model.num_attention_heads=8", "model.num_query_groups=4", "model.ffn_hidden_size=1536", "train.seq_length=512"]


def _seeds(extra: list[str]) -> list[Case]:
    return [
        Case(f"seed_{model}", model, [*extra, "train.steps=1", *SAVE, "logging.health_interval=1"], randomize_scales=True)
        for model in MODELS
    ]


def _like(name: str, model: str, *groups: list[str]) -> Case:
    return Case(name, model, [item for group in groups for item in group], seed=f"seed_{model}")


# name of the list -> cases; the compared case is the part of a case's name before "__", which is its own name where there is no "__"
ONE_GPU = [
    *_seeds([*LOCAL, *WIDE]),
    *(_like(f"{model}_fp32", model, LOCAL, WIDE) for model in MODELS),
    *(_like(f"{model}_fp32__te", model, TE, WIDE) for model in MODELS),
    *(_like(f"{model}_bf16", model, LOCAL, WIDE, BF16) for model in MODELS),
    *(_like(f"{model}_bf16__te", model, TE, WIDE, BF16) for model in MODELS),
    _like("plain_bf16__te_overlap", "plain", TE, WIDE, BF16, OVERLAP),
    _like("plain_bf16__te_recompute", "plain", TE, WIDE, BF16, ["parallel.recompute=full"]),
    Case("resume", overrides=[*TE, *WIDE, *BF16, *SAVE]),
    Case("resume__halves_1", overrides=[*TE, *WIDE, *BF16, *SAVE, "train.stop_after=2", "run.name=resume__halves"]),
    Case("resume__halves_2", overrides=[*TE, *WIDE, *BF16, *SAVE, "run.name=resume__halves"]),
]
TWO_REFERENCE = [*_seeds([*TE, *WIDE]), *(_like(f"{m}_{p}", m, TE, WIDE, o) for m in MODELS for p, o in (("fp32", []), ("bf16", BF16)))]
TWO_GPUS = [
    *(_like(f"{m}_{p}__tp2", m, TE, WIDE, o, TP2) for m in MODELS for p, o in (("fp32", []), ("bf16", BF16))),
    *(_like(f"{m}_{p}__dp2_overlap", m, TE, WIDE, o, DP2, OVERLAP) for m in MODELS for p, o in (("fp32", []), ("bf16", BF16))),
    _like("plain_bf16__dp2", "plain", TE, WIDE, BF16, DP2),
    _like("plain_bf16__cp2", "plain", TE, WIDE, BF16, ["parallel.context=2", "cluster.gpus_per_node=2"]),
    _like("plain_bf16__pp2", "plain", TE, WIDE, BF16, ["parallel.pipeline=2", "cluster.gpus_per_node=2"]),
    _like("plain_fp32__dp2_whole_masters", "plain", TE, WIDE, DP2, WHOLE),
]
LISTS = {"one_gpu": ONE_GPU, "two_gpus_reference": TWO_REFERENCE, "two_gpus": TWO_GPUS}


def _rows(folder: Path) -> list[dict]:
    path = folder / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def report(name: str, root: Path) -> None:
    """Print each case's largest relative difference of losses and gradient norms from the case it is compared with."""
    for case in LISTS[name]:
        shown = case.name.removesuffix("_1").removesuffix("_2") if "halves" in case.name else case.name
        result = next(iter(sorted((root / shown).glob("result-rank0.json"))), None)
        error = json.loads(result.read_text()).get("error", "") if result else "no result"
        rows, wanted = _rows(root / shown), {row["step"]: row for row in _rows(root / shown.split("__")[0])}
        worst = {
            key: max((abs(row[key] / wanted[row["step"]][key] - 1) for row in rows if row["step"] in wanted), default=float("nan"))
            for key in ("train_loss", "grad_norm")
        }
        norms = max((row.get("worst_norm_deviation", 0) for row in rows), default=float("nan"))
        last = f"{rows[-1]['train_loss']:.6f}" if rows else "-"
        print(f"{shown:28} loss {last} rel. diff. {worst['train_loss']:.1e} grad norm {worst['grad_norm']:.1e} norms {norms:.1e} {error[:200]}")


if __name__ == "__main__":
    if sys.argv[1] == "--report":
        report(sys.argv[2], Path(sys.argv[3]).with_name("two_gpus_reference") if sys.argv[2] == "two_gpus" else Path(sys.argv[3]))
    else:
        folder = Path(sys.argv[3] if len(sys.argv) > 3 else sys.argv[2])
        # two_gpus continues from the seeds of its one-GPU reference
        root = folder.with_name("two_gpus_reference") if sys.argv[1] == "two_gpus" else folder
        print(json.dumps([case.as_json(root) for case in LISTS[sys.argv[1]]]))
