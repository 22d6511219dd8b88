"""From Megatron's log scalars to metrics.jsonl, the trackers and the progress line.

Megatron's loop reports each logged step by calling `add_scalar` on its TensorBoard writer, on the last rank. `MetricsRecorder` takes
those calls, renames what we keep, adds what Megatron does not know or reports wrong (its learning rate is that of the next step), and
writes one record a step. Trackers (ngpt/trackers) get the same figures, and with them the scalars that `megatron.log_*` asks for.
"""

import math
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
from megatron.training import get_args

from megatron_ext.training.step import LOSS_NAME
from ngpt.analysis.metrics import MetricsWriter, truncate_after
from ngpt.config import Config
from ngpt.config.pattern import parse
from ngpt.config.sizes import last_low_precision_step, tokens_per_step, world_size
from ngpt.durations import duration
from ngpt.eta import Eta
from ngpt.trackers import Trackers, figure_name, trackers_of

VALIDATION_LOSS = f"{LOSS_NAME} validation"
_STEP_TIME = "iteration-time"  # the last scalar of a logged step
_NAMES = {
    LOSS_NAME: "train_loss",
    VALIDATION_LOSS: "val_loss",
    "grad-norm": "grad_norm",
    _STEP_TIME: "step_time_s",
}
# Megatron always writes these; they are not kept.
_UNASKED = frozenset({"learning-rate", "batch-size", "skipped-train-samples"})
_SWITCHES_OF_SCALARS = ("log_", "timing_log_level", "moe_per_layer_logging")
# Megatron's name of each balancing loss; it reports more of them than are in use.
_AUX_LOSSES = {"seq_aux_loss": "seq_load_balancing_loss", "aux_loss": "load_balancing_loss"}


class MetricsRecorder:
    """Collects one record a logged step and writes it when the step is complete. Lives on the last rank.

    Args:
        flops_per_token: of a training step.
        peaks: FLOP/s of one GPU for this model's products (in low precision, and in the high precision of a run's end), or None without a
            known GPU.
        say: prints a line for a person.
    """

    def __init__(self, cfg: Config, flops_per_token: float, peaks: tuple[float, float] | None, say: Callable[[str], None]):
        self.cfg, self.say = cfg, say
        self.flops_per_token, self.peaks = flops_per_token, peaks
        self.passes_through = any(name.startswith(_SWITCHES_OF_SCALARS) for name in cfg.megatron)
        self.path = Path(cfg.run.dir) / "metrics.jsonl"
        aux_loss = _AUX_LOSSES.get(cfg.model.moe_aux_loss) if "E" in cfg.model.layer_pattern else None
        self.names = _NAMES | ({aux_loss: "aux_loss"} if aux_loss else {})  # without its coefficient: 1 where all experts are equally busy
        pattern = parse(cfg.model.layer_pattern)
        self.names |= {f"mtp_{depth} loss": f"mtp_{depth}_loss" for depth in range(1, len(pattern.depths) + 1)}
        # Megatron divides the sum over all expert layers by their number and the prediction depths.
        experts = pattern.layers.count("E")
        self.factors = {"aux_loss": (experts + len(pattern.depths)) / experts} if aux_loss else {}
        self.record: dict[str, float] = {}
        self.extra: dict[int, dict[str, float]] = {}
        self.last: dict[str, float] = {}
        self.start_step = self.skipped_steps = 0  # of this launch
        self.rates: list[float] = []
        self.eta = Eta(cfg.train.steps)
        self.writer: MetricsWriter | None = None
        self.trackers: Trackers | None = None
        self.passed: dict[int, dict[str, float]] = {}  # step -> Megatron's scalars for the trackers that came before the step's record

    def open(self, start_step: int) -> None:
        """Begin after `start_step` (0 for a fresh run): what was recorded beyond it is superseded."""
        truncate_after(self.path, start_step)
        self.writer = MetricsWriter(self.path)
        self.start_step, self.written = start_step, start_step or None
        self.trackers = trackers_of(self.cfg, self.say)
        self.trackers.open(start_step)

    def add_scalar(self, name: str, value: float | torch.Tensor, step: int, *_, **__) -> None:
        """Megatron's call. Scalars that we do not keep are dropped."""
        if not self.is_logged(step):
            return
        if name not in self.names:
            if self.trackers and self.passes_through and name not in _UNASKED and not name.endswith(" vs samples"):
                self._pass_on(f"megatron/{name}", float(value), step)
            return
        if step == self.written:  # Megatron evaluates once more at the end: the same sequences, the same loss
            return
        if self.record and self.record["step"] != step:
            self.flush()
        self.record.setdefault("step", step)
        kept = self.names[name]
        self.record[kept] = float(value) * self.factors.get(kept, 1.0)
        last_scalar = VALIDATION_LOSS if self._evaluates_after(step) else _STEP_TIME
        if name == last_scalar:
            self.flush()

    def add_figures(self, step: int, figures: dict[str, float]) -> None:
        """Figures that belong to `step`, given before Megatron reports it."""
        if self.writer is not None:  # of the rank that writes
            self.extra.setdefault(step, {}).update(figures)

    def typical_rate(self) -> float | None:
        """Median tokens per second of the logged intervals, without the first, in which kernels are compiled and caches filled."""
        return statistics.median(self.rates[1:] or self.rates) if self.rates else None

    def flush(self) -> None:
        """Write the record at hand."""
        if not self.record:
            return
        record, self.record = self.record, {}
        step = record.pop("step")
        figures = {"step": step, "tokens": step * tokens_per_step(self.cfg)} | record
        if "step_time_s" in figures:
            figures["tokens_per_second"] = tokens_per_step(self.cfg) / figures["step_time_s"]
            achieved = figures["tokens_per_second"] * self.flops_per_token / world_size(self.cfg)
            figures["tflops_per_gpu"] = achieved / 1e12
            in_tail = step > last_low_precision_step(self.cfg.train.steps, self.cfg.precision.bf16_tail)
            figures["mfu"] = achieved / self.peaks[in_tail] if self.peaks else None
        if self.skipped_steps:
            figures["skipped_steps"] = self.skipped_steps
        for earlier in [s for s in self.extra if s <= step]:
            health = self.extra.pop(earlier)
            if earlier == step:
                figures |= health
        try:
            self.writer.write(figures)
        except OSError as error:  # a full disk: the run is worth more than its curves
            self.say(f"note: {self.path} lacks step {step} ({error}); the run goes on")
        self.written = step
        if self.trackers:
            named = {figure_name(name): value for name, value in figures.items() if value is not None}
            named.pop(None, None)
            self.trackers.log(step, named | self.passed.pop(step, {}))
        worst = max(figures.get("worst_norm_deviation", 0.0), self.last.get("worst_norm_deviation", 0.0))
        self.last |= {name: value for name, value in figures.items() if value is not None and math.isfinite(value)}
        if worst:
            self.last["worst_norm_deviation"] = worst
        if "tokens_per_second" in figures:
            self.rates.append(figures["tokens_per_second"])
            self.eta.add(step, figures["step_time_s"], time.monotonic())
        self.say(self._progress(figures))

    def close(self) -> None:
        """Finish metrics.jsonl."""
        if self.writer is not None:
            self.flush()
            self.writer.close()

    def close_trackers(self, status: str) -> None:
        """Finish the trackers, which may take seconds: the last thing that a launch does.

        Args:
            status: finished | stopped | signalled | failed.
        """
        if self.trackers is not None:
            self.trackers.close(status)

    def _pass_on(self, name: str, value: float, step: int) -> None:
        """A scalar goes out with its step's record, or by itself where that is written already."""
        if step == self.written:
            self.trackers.log(step, {name: value})
        else:
            self.passed.setdefault(step, {})[name] = value

    def is_logged(self, step: int) -> bool:
        """Every interval and both ends of a run: the first step carries the check of the norms, the last one the result."""
        interval, eval_interval = self.cfg.logging.interval, self.cfg.train.eval_interval
        return step % interval == 0 or step % eval_interval == 0 or step in (self.start_step + 1, self.cfg.train.steps)

    def _evaluates_after(self, step: int) -> bool:
        args = get_args()
        return bool(args.do_valid) and (step % args.eval_interval == 0 or step == args.train_iters)

    def _progress(self, figures: dict[str, float]) -> str:
        step, steps = figures["step"], self.cfg.train.steps
        parts = [f"step {step:>{len(str(steps))}}/{steps}"]
        parts += [f"{name.removesuffix('_loss')} loss {figures[name]:.4f}" for name in ("train_loss", "val_loss") if name in figures]
        if "learning_rate" in figures:
            parts.append(f"lr {figures['learning_rate']:.2e}")
        if "grad_norm" in figures:
            parts.append(f"grad norm {figures['grad_norm']:.3f}")
        if "tokens_per_second" in figures:
            parts.append(f"{figures['tokens_per_second']:,.0f} tokens/s")
        if figures.get("mfu"):
            parts.append(f"MFU {figures['mfu']:.1%}")
        if step < steps and (left := self.eta.seconds_left()) is not None:
            parts.append(f"ETA {duration(left)}")
        return " | ".join(parts)


def memory_figures() -> dict[str, float]:
    """The allocator's peaks since the process started, and how often it had to free its cache to go on. Both of the rank that needs most.

    Parallelism: every rank calls this together; three numbers are all-reduced.
    """
    stats = torch.cuda.memory_stats()
    own = [torch.cuda.max_memory_allocated() / 2**30, torch.cuda.max_memory_reserved() / 2**30, stats.get("num_alloc_retries", 0)]
    most = torch.tensor(own, dtype=torch.float64, device=torch.cuda.current_device())
    dist.all_reduce(most, op=dist.ReduceOp.MAX)
    allocated, reserved, retries = most.tolist()
    return {"memory_gib": allocated, "memory_reserved_gib": reserved, "allocation_retries": int(retries)}
