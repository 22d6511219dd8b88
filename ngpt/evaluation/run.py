"""One evaluation: a checkpoint of a run or an exported folder, lm-eval's tasks and prepared splits, on one process or several."""

import json
import random
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ngpt.config.errors import ConfigError
from ngpt.config.one_process import run_config
from ngpt.config.schema import TrainConfig
from ngpt.evaluation import OWN_SPLIT
from ngpt.evaluation.ranks import Ranks
from ngpt.evaluation.scorer import ModelScorer
from ngpt.evaluation.split import notes_on, score_split
from ngpt.hf.load import TextModel, open_folder, open_run
from ngpt.progress import write_json

KINDS = ("tasks", "splits")
RANDOM_SEED, OTHER_SEED = 0, 1234  # those of lm-eval's command


@dataclass(frozen=True)
class Request:
    """What `ngpt eval` was asked for; of JSON's types.

    Attributes:
        path: run folder, or one that transformers opens. is_run: which of them.
        tasks: names of lm-eval's. include: folders with further tasks.
        splits: prefixes of prepared data; `OWN_SPLIT`: those that a run evaluates.
        fewshot: examples before each question; None: as the task says. limit: documents of a task and sequences of a split.
        step, dtype: as `ngpt.hf.load.open_run`. device: a name of torch's.
        seed: `train.eval_seed`; None: the run's.
        out: JSON file for the results; None: a run keeps them itself.
    """

    path: str
    is_run: bool
    tasks: list[str] = field(default_factory=list)
    include: list[str] = field(default_factory=list)
    splits: list[str] = field(default_factory=list)
    fewshot: int | None = None
    limit: int | None = None
    step: int | None = None
    dtype: str | None = None
    device: str = "cpu"
    batch_size: int = 8
    seed: int | None = None
    out: str | None = None
    as_json: bool = False


def evaluate(request: Request) -> dict[str, Any]:
    """Runs an evaluation as one of the world's ranks.

    Returns:
        "tasks", metrics by task, and "splits", figures by prefix; and what they are of.

    Raises:
        ConfigError: the model, a task or a split is no good.
    """
    ranks = Ranks()
    tasks = None
    if request.tasks:
        from ngpt.evaluation import harness  # heavy, and there only with the extra `eval`

        tasks = harness.load_tasks(request.tasks, list(map(Path, request.include)), request.fewshot)
    source = _opened(request, ranks)
    _say(ranks, *source.notes)
    scorer = ModelScorer(source, request.batch_size, _window(source), ranks)
    results: dict[str, Any] = {"model": request.path, "step": source.step, "tasks": {}, "splits": {}}
    if request.splits:
        seed = _seed(request)
        for prefix in _splits(request, ranks):
            score = score_split(scorer, source.encode, prefix, seed, request.limit, _progress(ranks, prefix))
            results["splits"][prefix] = asdict(score)
    if tasks is not None:
        _seed_everything()
        if request.is_run:
            lm = harness.ScoredLM(scorer, source.encode, source.start, scorer.generate)
        else:
            lm = harness.folder_lm(source, request.batch_size)
        results["tasks"] = harness.run_tasks(lm, tasks, request.limit)
    return results | {"evaluated_at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())}


def _opened(request: Request, ranks: Ranks) -> TextModel:
    device = request.device
    if device == "cuda" and ranks.size > 1:
        device = f"cuda:{ranks.rank % torch.cuda.device_count()}"
    if request.is_run:
        return open_run(Path(request.path), request.step, request.dtype or "float32", device)
    return open_folder(Path(request.path), request.dtype, device)


def _window(source: TextModel) -> int:
    if source.window is None:
        rule = "It must say max_position_embeddings, the tokens that it was trained on at once"
        raise ConfigError("config.json", "no max_position_embeddings", rule, "Add it")
    return source.window


def _splits(request: Request, ranks: Ranks) -> list[str]:
    """Prefixes of all splits that were asked for."""
    prefixes = []
    for split in request.splits:
        if split != OWN_SPLIT:
            prefixes.append(split)
            continue
        if not request.is_run:
            raise ConfigError("--split", split, f"{request.path} is no run, whose own one that could be", "Name a prefix of prepared data")
        data = run_config(Path(request.path)).data
        if not data.valid or data.mock:
            raise ConfigError("--split", split, "The run has no data.valid", "Name a prefix of prepared data")
        prefixes += [source.path for source in data.valid]
        _say(ranks, *notes_on(data))
    return prefixes


def _seed(request: Request) -> int:
    if request.seed is not None:
        return request.seed
    return run_config(Path(request.path)).train.eval_seed if request.is_run else TrainConfig.eval_seed


def _seed_everything() -> None:
    """As lm-eval's command does: some tasks draw."""
    random.seed(RANDOM_SEED)
    np.random.seed(OTHER_SEED)
    torch.manual_seed(OTHER_SEED)


def finish(request: Request, results: dict[str, Any]) -> None:
    """Prints the results of `evaluate` and keeps them: in a run those over all documents, beside earlier ones of the checkpoint."""
    print(json.dumps(results) if request.as_json else table(results), flush=True)
    if request.out is not None:
        write_json(Path(request.out), results, indent=2)
    elif request.is_run and request.limit is not None:
        print("note: with --limit the run does not keep the results; --out FILE does", file=sys.stderr)
    elif request.is_run:
        path = Path(request.path) / "eval" / f"iter_{results['step']:07d}.json"
        earlier = _earlier(path)
        write_json(path, results | {kind: earlier.get(kind, {}) | results[kind] for kind in KINDS}, indent=2)
        print(f"kept in {path}", file=sys.stderr)


def _earlier(path: Path) -> dict[str, Any]:
    """Results of earlier evaluations; {} where there are none, or a damaged file."""
    try:
        found = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) and all(isinstance(found.get(kind), dict) for kind in KINDS) else {}


def table(results: dict[str, Any]) -> str:
    """A line for each figure: of what, its name, its value, and the standard error where there is one."""
    rows = [
        (name, metric, _shown(value), f"± {_shown(error)}" if (error := found.get(f"{metric}_stderr")) is not None else "")
        for name, found in results["tasks"].items()
        for metric, value in found.items()
        if metric != "samples" and not metric.endswith("_stderr")
    ]
    for prefix, found in results["splits"].items():
        rows += [(prefix, name, _shown(found[name]), "") for name in ("loss", "bits_per_byte")]
    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    return "\n".join(f"{a:<{widths[0]}}  {b:<{widths[1]}}  {c:>{widths[2]}} {d}".rstrip() for a, b, c, d in rows)


def _shown(value: float) -> str:
    return f"{value:.4f}" if abs(value) < 1e4 else f"{value:.4g}"


def _progress(ranks: Ranks, prefix: str) -> Callable[[int, int], None]:
    return lambda done, wanted: _say(ranks, f"{prefix}: {done:,} of {wanted:,} sequences")


def _say(ranks: Ranks, *lines: str) -> None:
    if ranks.rank == 0:
        for line in lines:
            print(line, file=sys.stderr, flush=True)
