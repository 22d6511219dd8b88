"""lm-eval over any `Scorer`: the same requests that its `hf` class makes of the exported model, and the same answers.

Source: EleutherAI's lm-evaluation-harness 0.4.13, `api/model.py` for what a model is asked, `models/huggingface.py` for how text becomes
tokens. The optional extra `eval` brings it; nothing else in ngpt imports it.
"""

import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from lm_eval.api.model import LM, TemplateLM
from lm_eval.evaluator import evaluate
from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs, postprocess_generated_text
from lm_eval.tasks import TaskManager
from lm_eval.utils import get_rolling_token_windows

from ngpt.config.errors import ConfigError
from ngpt.evaluation.names import OPTIONS, SHIPPED, check_folders, unknown
from ngpt.evaluation.rows import Row
from ngpt.evaluation.scorer import Scorer
from ngpt.hf.generate import Settings
from ngpt.hf.load import TextModel

FEWSHOT_SEED = 1234  # that of lm-eval's command
NEW_TOKENS = 256  # of a task that does not say how many, as in lm-eval
BOOTSTRAPS = 1000  # for standard errors that have no formula
_SAMPLING = {"temperature", "top_k", "top_p", "do_sample"}


class ScoredLM(TemplateLM):
    """A language model for lm-eval.

    Text becomes tokens as in lm-eval's `hf` class with an exported folder: `start` stands before every text. Where a whole text is
    scored, `start` itself is the first token that is predicted.

    Args:
        encode: text to tokens, without `start`.
        start: the token that begins each document.
        generate: continuations of prompts that are tokens; None: the model only scores.
    """

    def __init__(
        self,
        scorer: Scorer,
        encode: Callable[[str], Sequence[int]],
        start: int,
        generate: Callable[[Sequence[Sequence[int]], Settings], list[str]] | None = None,
    ):
        super().__init__()
        self.scorer, self.encode, self.start, self.generate = scorer, encode, start, generate

    @property
    def eot_token_id(self) -> int:
        return self.start

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        starts = [] if add_special_tokens is False else [self.start]
        return [*starts, *map(int, self.encode(string))]

    def loglikelihood(self, requests: list, disable_tqdm: bool = True) -> list[tuple[float, bool]]:
        return super().loglikelihood(requests, disable_tqdm=disable_tqdm)

    def _loglikelihood_tokens(self, requests: list, **kwargs: Any) -> list[tuple[float, bool]]:
        rows = []
        for texts, context, continuation in requests:
            if len(continuation) > self.scorer.window:
                shown = f"{(texts or ('', ''))[1][:40]!r}: {len(continuation)} tokens"
                rule = f"A continuation has at most the {self.scorer.window} tokens that the model was trained on at once"
                raise ConfigError("--tasks", shown, rule, "Leave this task out")
            rows.append(Row(tuple([*context, *continuation][-(self.scorer.window + 1) :]), len(continuation)))
        return self.scorer.score(rows)

    def loglikelihood_rolling(self, requests: list, disable_tqdm: bool = False) -> list[float]:
        rows: list[Row] = []
        counts = []
        for (text,) in (request.args for request in requests):
            windows = get_rolling_token_windows(self.tok_encode(text), self.start, self.scorer.window, context_len=1)
            made = [Row((*inputs, targets[-1]), len(targets)) for inputs, targets in windows]
            rows += made
            counts.append(len(made))
        scores = iter(self.scorer.score(rows))
        return [sum(next(scores)[0] for _ in range(count)) for count in counts]

    def generate_until(self, requests: list, disable_tqdm: bool = False) -> list[str]:
        assert self.generate is not None, "the model only scores: its caller leaves out tasks that generate"
        answers: dict[int, str] = {}
        asked: dict[tuple[Settings, tuple[str, ...]], list[int]] = {}
        for number, request in enumerate(requests):
            asked.setdefault(self._settings(request), []).append(number)
        for (settings, stops), numbers in asked.items():
            room = self.scorer.window - settings.tokens
            if room < 1:
                rule = f"They and a prompt share the {self.scorer.window} tokens that the model was trained on at once"
                raise ConfigError("max_gen_toks", settings.tokens, rule, "Set fewer in the task, or leave it out")
            starts = [self.tok_encode(requests[number].args[0])[-room:] for number in numbers]
            texts = self.generate(starts, settings)
            answers |= {number: postprocess_generated_text(text, list(stops), None) for number, text in zip(numbers, texts, strict=True)}
        return [answers[number] for number in range(len(requests))]

    def _settings(self, request: Any) -> tuple[Settings, tuple[str, ...]]:
        """How a request wants its text continued, and where the text is cut: before the first of these."""
        kwargs = normalize_gen_kwargs(request.args[1], NEW_TOKENS)
        stops = tuple(handle_stop_sequences(kwargs.pop("until", None), eos=None))
        tokens = kwargs.pop("max_gen_toks")
        unknown = sorted(kwargs.keys() - _SAMPLING)
        if unknown:
            got = f"{request.task_name}: {', '.join(unknown)}"
            raise ConfigError("generation_kwargs", got, f"Known are until, max_gen_toks, {', '.join(sorted(_SAMPLING))}", "Leave it out")
        samples = kwargs.get("do_sample") and kwargs.get("temperature")
        sampling = {name: kwargs.get(name) for name in ("temperature", "top_k", "top_p")} if samples else {}
        return Settings(tokens=tokens, stops=tuple(filter(None, stops)), **sampling), stops


def load_tasks(
    names: Sequence[str], folders: Sequence[Path], fewshot: int | None = None, keys: tuple[str, str] = OPTIONS
) -> dict[str, Any]:
    """Tasks with their documents, which may have to be fetched.

    Args:
        names: of tasks, groups and tags. folders: with task files of the user's, which come before shipped ones and lm-eval's.
        fewshot: examples before each question; None: as the task says. A task that says 0 keeps 0.
        keys: what names tasks and folders, for messages.

    Raises:
        ConfigError: no such task, or its file or its documents cannot be read.
    """
    check_folders(folders, keys[1])
    for logger in ("lm_eval", "datasets"):
        logging.getLogger(logger).setLevel(logging.ERROR)
    paths = [str(path) for path in (SHIPPED, *folders)]
    manager = TaskManager(include_path=paths, include_defaults=False)
    if not set(names) <= set(manager.all_tasks):
        manager = TaskManager(include_path=paths)  # reads some 13,000 files
    for name in names:
        if name not in manager.all_tasks:
            raise unknown(name, manager.all_tasks, keys)
    try:
        loaded = manager.load(list(names))
    except Exception as error:  # the libraries that read and fetch documents raise many kinds
        first = next(iter(str(error).strip().splitlines()), type(error).__name__)
        rule = "The task's file and its documents must be readable; lm-eval's own are fetched from the Hugging Face Hub"
        raise ConfigError(keys[0], f"{', '.join(names)}: {first}", rule, "Correct the file, or fetch the documents beforehand") from error
    for task in loaded["tasks"].values():
        default = task.get_config("num_fewshot")
        if default is None or (fewshot is not None and default != 0):
            task.set_config(key="num_fewshot", value=fewshot or 0)
        task.set_fewshot_seed(seed=FEWSHOT_SEED)
    return loaded


def folder_lm(source: TextModel, batch_size: int) -> LM:
    """lm-eval's own `hf` class over a model and a tokenizer that transformers has opened."""
    from lm_eval.models.huggingface import HFLM

    return HFLM(pretrained=source.model, tokenizer=source.tokenizer, batch_size=batch_size)


def run_tasks(lm: LM, tasks: dict[str, Any], limit: int | None = None, errors: bool = True) -> dict[str, dict[str, float]]:
    """Evaluates loaded tasks.

    Args:
        limit: documents of each task at most; None: all.
        errors: whether standard errors are estimated, too.

    Returns:
        Of each task and group its metrics as numbers, "NAME_stderr" beside "NAME", and the number of "samples".
    """
    found = evaluate(lm, tasks, limit=limit, log_samples=False, bootstrap_iters=BOOTSTRAPS if errors else 0)
    figures = {}
    for name, metrics in found["results"].items():
        figures[name] = {_metric_name(key): value for key, value in metrics.items() if isinstance(value, int | float) and "," in key}
        if name in found["n-samples"]:
            figures[name]["samples"] = found["n-samples"][name]["effective"]
    return figures


def _metric_name(key: str) -> str:
    """lm-eval's "acc,none" without the filter "none", which does nothing."""
    metric, _, filtered = key.partition(",")
    if filtered == "none":
        return metric
    return f"{metric.removesuffix('_stderr')}/{filtered}{'_stderr' if metric.endswith('_stderr') else ''}"
