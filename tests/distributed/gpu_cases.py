"""Cases for GPU hosts, run by tests/bench/gpu_session.sh: Transformer Engine against Megatron's local modules, two GPUs against one.

    python gpu_cases.py LIST FOLDER [REGEX]     the list's cases (whose names match) as JSON, their runs below FOLDER
    python gpu_cases.py --report LIST FOLDER    losses and gradient norms beside those of the case they are compared with

A case is compared with the one whose name is its own up to the last "__".
"""

import json
import re
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
from cases import BF16, CP2, DP2, MODELS, OVERLAP, PP2, SAVE, TP2, WHOLE, Case  # noqa: E402

PRECISIONS = {"fp32": [], "bf16": BF16}
TE, LOCAL = ["model.transformer_impl=transformer_engine"], ["model.transformer_impl=local"]
# Wide enough for tensor cores and for fused attention kernels.
WIDE = ["model.hidden_size=512", "model.num_attention_heads=8", "model.num_query_groups=4", "model.ffn_hidden_size=1536"]
WIDE.append("train.seq_length=512")


def _like(name: str, model: str, *groups: list[str]) -> Case:
    return Case(name, model, [*WIDE, *(item for group in groups for item in group)], seed=f"seed_{model}")


def _all(suffix: str, *groups: list[str]) -> list[Case]:
    return [_like(f"{model}_{name}{suffix}", model, precision, *groups) for model in MODELS for name, precision in PRECISIONS.items()]


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
}


def _rows(folder: Path) -> list[dict]:
    path = folder / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def bound(name: str) -> float:
    """Largest relative difference of a case's losses from its counterpart's. Transformer Engine multiplies fp32 matrices in TF32."""
    if name.endswith(("overlap", "recompute", "halves")):
        return 0.0
    return 1e-4 if "bf16" in name or name.endswith("__te") else 2e-5


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
        differs = not worst["train_loss"] <= bound(case.name) and "__" in case.name
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
