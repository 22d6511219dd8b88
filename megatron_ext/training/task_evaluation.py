"""lm-eval's tasks on the model while it trains: `train.eval_tasks`, evaluated behind data.valid.

Texts are only scored. Tasks that need generated text are for `ngpt eval` on a checkpoint.
"""

import contextlib
import io
from collections.abc import Callable
from pathlib import Path

from torch import nn

from megatron_ext.training.scorer import TrainingScorer
from ngpt.config import Config
from ngpt.config.errors import ConfigError
from ngpt.data.tokenizers import run_tokenizer
from ngpt.evaluation.harness import ScoredLM, load_tasks, run_tasks
from ngpt.evaluation.names import KEYS


class TaskEvaluation:
    """The tasks of a run, loaded once.

    Args:
        mark: as of `TrainingScorer`.

    Raises:
        ConfigError: a task does not exist, cannot be read, or wants text generated.
    """

    def __init__(self, cfg: Config, mark: Callable[[], None]):
        train = cfg.train
        self.interval, self.limit = train.eval_tasks_interval or train.eval_interval, train.eval_tasks_limit
        self.last_step, self.evaluated = train.steps, -1
        tokenizer = run_tokenizer(cfg)
        folders = [Path(folder) for folder in train.eval_tasks_include]
        self.tasks = load_tasks(train.eval_tasks, folders, keys=KEYS)
        generating = sorted(name for name, task in self.tasks["tasks"].items() if task.OUTPUT_TYPE == "generate_until")
        if generating:
            rule = "During training texts are scored, and this task wants text generated"
            raise ConfigError("train.eval_tasks", ", ".join(generating), rule, "Leave it out, and use ngpt eval on the checkpoints")
        self.scorer = TrainingScorer(cfg, mark)
        self.lm = ScoredLM(self.scorer, tokenizer.encode, tokenizer.eod_id)

    def figures(self, chunks: list[nn.Module], step: int) -> dict[str, float]:
        """`tasks/<task>/<metric>` of the model behind a step, on every rank; {} where none are due. All ranks call it together."""
        if step == self.evaluated or (step % self.interval and step != self.last_step):
            return {}
        self.scorer.chunks, self.evaluated = chunks, step
        with contextlib.redirect_stderr(io.StringIO()):  # progress bars of lm-eval
            found = run_tasks(self.lm, self.tasks, self.limit, errors=False)
        figures = {f"tasks/{name}/{metric}": value for name, metrics in found.items() for metric, value in metrics.items()}
        return {name: value for name, value in figures.items() if not name.endswith("/samples")}
