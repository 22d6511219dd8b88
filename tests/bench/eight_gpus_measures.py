"""What eight_gpus.py reads of the runs that its steps leave: figures, and checks that hold or do not."""

import json
import shutil
import statistics
from collections.abc import Callable, Iterator
from pathlib import Path

from eight_gpus_plan import STEPS, STOP, TRACED, WARM_UP, Host, Step
from overlap import overlap
from profile_table import read
from step import figures as medians

from ngpt.checkpoints import tracker
from ngpt.config.compose import load
from ngpt.estimate.report import estimate

_GIB = 2**30
BF16_UNIT = 2**-8  # unit roundoff of BF16, which has 8 significant bits: two orders of its sums may move a token's loss by this part
FIRST_BOUND = 1 / 32  # of it, before the first step: errors of 1,024 tokens, which the smallest batch has, average out to 1 / sqrt(1024)
NORM_BOUND = 1e-6  # of weights: ngpt/METRICS.md, "Healthy"
MEMORY_BOUND, TIME_BOUND = 0.05, 0.15  # of the measured figures, between them and the estimates
Found = tuple[dict, dict[str, bool]]  # figures, checks


def training(host: Host, step: Step) -> Found:
    """Speed and memory beside their estimates, the loss, health and the share of exposed communication."""
    run = host.run(step.name)
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    losses, architecture = [row["train_loss"] for row in rows], load(run / "config.yaml").model.architecture
    figures = _speed(host, run, TRACED[0] - 1) | {"first_loss": losses[0], "last_loss": losses[-1]} | _exposed(host, step)
    figures["expert_load"] = max(_all(rows, "health/expert_load/max"))
    checks = {
        "the loss falls": statistics.mean(losses[-3:]) < losses[0],
        "all steps are finite": len(rows) == STEPS and not any("nonfinite" in row or row.get("skipped_steps") for row in rows),
    }
    if architecture == "ngpt":  # the norms of a control are free
        figures["weight_norm_deviation"] = max(_all(rows, "worst_norm_deviation"))
        ends = [value for end in ("min", "max") for value in _all(rows, f"health/hidden_norm/{end}")]
        figures["hidden_norm_deviation"] = max(abs(value - 1) for value in ends)
        checks["norms of weights"] = figures["weight_norm_deviation"] <= NORM_BOUND
        checks["norms of hidden states"] = figures["hidden_norm_deviation"] <= BF16_UNIT
    if not host.cpu:
        checks["a trace of the GPU"] = "exposed_share" in figures
    if "estimated_gib" in figures and not host.cut:
        checks["memory as estimated"] = abs(figures["estimated_gib"] / figures["peak_gib"] - 1) <= MEMORY_BOUND
        checks["time as estimated"] = abs(figures["estimated_s"] / figures["step_time_s"] - 1) <= TIME_BOUND
    return figures | {"losses": losses}, checks


def straight(host: Host, step: Step) -> Found:
    """What every tensor of the last checkpoint hashes to; the checkpoint goes, since it takes as much room as the next one."""
    folder = host.checkpoints / "straight"
    found = {"losses": _losses(host, "straight"), "checkpoint_gib": _size(folder) / _GIB, "tensors": _digests(folder, STEPS)}
    shutil.rmtree(folder)
    return found, {}


def half(host: Host, step: Step) -> Found:
    """Its first losses are compared with those of the straight run when all are there."""
    return {"losses": _losses(host, "half")}, {}


def resume(host: Host, step: Step) -> Found:
    """Bits of losses and tensors. The folder goes back to the step that the reshard and the export read."""
    folder, wanted = host.checkpoints / "half", result(host, "straight")["figures"]
    losses, tensors = _losses(host, "half"), _digests(folder, STEPS)
    names = sorted(tensors.keys() | wanted["tensors"].keys())
    different = [name for name in names if tensors.get(name) != wanted["tensors"].get(name)]
    tracker.replace(folder, tracker.stage(folder, STOP))
    shutil.rmtree(folder / f"iter_{STEPS:07d}")
    figures = {"tensors_compared": len(names), "tensors_different": len(different), "losses": losses, "different": different}
    return figures, {"the same losses": losses == wanted["losses"], "the same tensors": not different}


def reshard(host: Host, step: Step) -> Found:
    """Losses on half of the ranks beside those of the straight run."""
    losses, wanted = _losses(host, "reshard"), _losses(host, "straight")[STOP:]
    parts = [abs(one / other - 1) / BF16_UNIT for one, other in zip(losses, wanted, strict=True)]
    figures = {"first_difference_units": parts[0], "largest_difference_units": max(parts), "losses": losses}
    return figures, {"first loss within 1/32 of a unit of BF16": parts[0] <= FIRST_BOUND, "losses within a unit": max(parts) <= 1}


def export(host: Host, step: Step) -> Found:
    """What the export found when it compared its logits with the trainer's."""
    from ngpt.hf.export import RECORD  # imports torch

    folder = host.checkpoints / "export"
    parity = json.loads((folder / RECORD).read_text())["parity"]
    names = ("mode", "tokens", "disagreeing", "logit_difference", "bound", "loss_trainer", "loss_export")
    figures = {name: parity[name] for name in names} | {"export_gib": _size(folder) / _GIB}
    shutil.rmtree(folder)
    return figures, {"the trainer's logits": parity["holds"]}


def full_save(host: Host, step: Step) -> Found:
    folder = host.checkpoints / "full_save"
    found = {"checkpoint_gib": _size(folder) / _GIB}
    shutil.rmtree(folder)
    return found, {}


def scaling(host: Host, step: Step) -> Found:
    """Tokens per second over those of one GPU, times as many."""
    figures = _speed(host, host.run(step.name))
    one = figures if step.name == "dp1" else result(host, "dp1")["figures"]
    efficiency = {"efficiency": figures["tokens_per_second"] / step.ranks / one["tokens_per_second"]}
    if "estimated_s" in figures:  # as many tokens a GPU, so steps of one GPU over steps of several
        efficiency["estimated_efficiency"] = one["estimated_s"] / figures["estimated_s"]
    return efficiency | figures, {}


MEASURES: dict[str, Callable[[Host, Step], Found]] = {
    measure.__name__: measure for measure in (training, straight, half, resume, reshard, export, full_save, scaling)
}


def result(host: Host, step: str) -> dict:
    """What a step has left; {} where it has not run."""
    file = host.out / f"{step}.json"
    return json.loads(file.read_text()) if file.is_file() else {}


def _speed(host: Host, run: Path, last: int = STEPS) -> dict:
    """Medians behind the warm-up, and what the estimate says of the same config where the GPU is known."""
    names = ("tokens_per_second", "mfu", "peak_gib", "step_time_s")
    found = medians(run, WARM_UP, last)
    figures = {name: found[name] for name in names if found[name] is not None}
    if host.gpu:
        said = estimate(load(run / "config.yaml"))
        figures |= {"estimated_gib": said["memory"]["peak_bytes"] / _GIB, "estimated_s": said["step"]["seconds"]}
    return figures


def _exposed(host: Host, step: Step) -> dict:
    """The share of rank 0's traced steps in which it only communicates; all that the trace says goes to a file. {}: no GPU in a trace."""
    traces = sorted((host.run(step.name) / "torch_profile").glob("*.json*"))
    found = overlap(read(traces[0])) if traces else {"span_ms": 0}
    if not found["span_ms"]:
        return {}
    (host.out / f"{step.name}.overlap.json").write_text(json.dumps(found, indent=1) + "\n")
    return {"exposed_share": found["exposed_ms"] / found["span_ms"], "idle_share": found["idle_ms"] / found["span_ms"]}


def _all(rows: list[dict], key: str) -> list[float]:
    return [row[key] for row in rows if key in row]


def _losses(host: Host, step: str) -> list[float]:
    return medians(host.run(step), 0, STEPS)["losses"]


def _digests(folder: Path, step: int) -> dict[str, str]:
    """Tensor by tensor, so that a checkpoint larger than the memory can be compared."""
    from ngpt.checkpoint_tensors import CheckpointTensors  # imports torch
    from ngpt.checkpoints.hashing import hash_bytes

    tensors = CheckpointTensors(folder / f"iter_{step:07d}")

    def digests() -> Iterator[tuple[str, str]]:
        import torch

        for name in tensors.sizes:
            tensor = tensors.read(name)
            yield name, f"{tensor.dtype} {tuple(tensor.shape)} {hash_bytes(tensor.reshape(-1).view(torch.uint8).numpy())}"

    return dict(digests())


def _size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
