"""Trackers show a run's figures while it trains, beside metrics.jsonl: TensorBoard, Weights & Biases.

A tracker is one small class (`ngpt.trackers.base.Tracker`). Another one is written in a file beside these, and named in `trackers_of`.
"""

from collections.abc import Callable

from ngpt.config.schema import Config
from ngpt.trackers.base import Tracker, Trackers
from ngpt.trackers.tensorboard import TensorBoard
from ngpt.trackers.weights_and_biases import WeightsAndBiases

__all__ = ["Tracker", "Trackers", "figure_name", "trackers_of"]


def trackers_of(cfg: Config, say: Callable[[str], None]) -> Trackers:
    """The trackers that a config asks for.

    Args:
        say: prints a line for a person.
    """
    asked: list[type[Tracker]] = []
    if cfg.logging.tensorboard:
        asked.append(TensorBoard)
    if cfg.logging.wandb.mode != "disabled":
        asked.append(WeightsAndBiases)
    return Trackers(asked, cfg, say)


def figure_name(name: str) -> str | None:
    """The name of a figure of metrics.jsonl in a tracker, with its group; None where it has none there (steps, confidence bounds).

    Groups: train/, valid/, health/, precision/. Scalars of Megatron's own that `megatron.log_*` asks for are megatron/.
    """
    if name == "step" or name.endswith(("_lower", "_upper")):
        return None
    if "/" in name:
        return name
    if name == "worst_norm_deviation":
        return f"health/{name}"
    group = "valid" if name.startswith("val_") else "train"
    return f"{group}/{name.removeprefix('val_').removeprefix('train_')}"
