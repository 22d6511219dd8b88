"""Text from a model: prompts in, continuations out, by transformers' generation and the model's own caches."""

import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    StoppingCriteria,
    StoppingCriteriaList,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from ngpt.config.errors import ConfigError
from ngpt.hf.load import TextModel

END_OF_DOCUMENT, STOP, TOKENS = "end_of_document", "stop", "tokens"  # what ends a continuation


@dataclass(frozen=True)
class Settings:
    """How text is continued.

    Attributes:
        tokens: at most, for each prompt.
        temperature: of sampling; None: the most probable token is taken.
        top_k, top_p: how many tokens, and what part of the probability, sampling may use; None: all.
        seed: each prompt has random numbers of its own, by seed and number.
        stops: strings that end a continuation and are not part of it.
        use_cache: whether keys, values and states of earlier tokens are kept. Otherwise they are computed again for each token.
    """

    tokens: int = 200
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    seed: int = 0
    stops: tuple[str, ...] = ()
    use_cache: bool = True


@dataclass(frozen=True)
class Continuation:
    """A prompt, the text that follows it, its number of tokens (an end of document counts), and what ended it."""

    prompt: str
    text: str
    tokens: int
    stopped_by: str


@dataclass(frozen=True)
class Speed:
    """Tokens and seconds: of the prompts, each with its first new token, and of the new tokens after it."""

    prompt_tokens: int = 0
    prefill_s: float = 0.0
    new_tokens: int = 0
    decoding_s: float = 0.0

    def __add__(self, other: "Speed") -> "Speed":
        return Speed(
            self.prompt_tokens + other.prompt_tokens,
            self.prefill_s + other.prefill_s,
            self.new_tokens + other.new_tokens,
            self.decoding_s + other.decoding_s,
        )

    def __str__(self) -> str:
        decoding = f", decoding {self.new_tokens / self.decoding_s:,.1f} tokens/s" if self.new_tokens else ""
        return f"prefill {self.prompt_tokens / self.prefill_s:,.1f} tokens/s{decoding}"


def prompt_ids(source: TextModel, prompt: str) -> list[int]:
    """Tokens of a prompt, as a document begins: the start token once, then the text.

    Raises:
        ConfigError: there are none, or the model has no such token.
    """
    try:
        prompt.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ConfigError("--prompt", f"{prompt!r} is no text", "It must be valid UTF-8", "Correct its bytes") from error
    start = [] if source.start is None else [source.start]
    ids = [*start, *map(int, source.encode(prompt))]
    if not ids:
        raise ConfigError("--prompt", f"{prompt!r} has no tokens", "There must be one to continue", "Give some text")
    vocabulary = source.model.config.vocab_size
    if max(ids) >= vocabulary:
        got, rule = f"{prompt[:60]!r} has token {max(ids)}", f"The model's vocabulary has {vocabulary}"
        raise ConfigError("--prompt", got, rule, "Give the model the tokenizer that it was trained with")
    return ids


def window_note(source: TextModel, prompts: Sequence[str], tokens: int) -> str | None:
    """A line for the person at the terminal where texts may outgrow what the model was trained on."""
    longest = max(len(prompt_ids(source, prompt)) for prompt in prompts) + tokens
    if source.window is None or longest <= source.window:
        return None
    return f"note: up to {longest:,} tokens, and training had {source.window:,} in a row: beyond them text may get worse"


def continue_texts(source: TextModel, prompts: Sequence[str], settings: Settings, first: int = 0) -> tuple[list[Continuation], Speed]:
    """Continues some prompts in one batch, padded on the left. The batch makes no difference beyond rounding.

    Args:
        first: number of the first prompt among all that the seed is for.

    Raises:
        ConfigError: as `prompt_ids`.
    """
    starts = [prompt_ids(source, prompt) for prompt in prompts]
    made, speed = continue_tokens(source, starts, settings, range(first, first + len(prompts)))
    return [Continuation(prompt, *found) for prompt, found in zip(prompts, made, strict=True)], speed


def continue_tokens(
    source: TextModel, starts: Sequence[Sequence[int]], settings: Settings, numbers: Sequence[int]
) -> tuple[list[tuple[str, int, str]], Speed]:
    """Continues prompts that are tokens already, in one batch.

    Args:
        starts: tokens of each prompt, at least one. numbers: of the prompts among all that the seed is for.

    Returns:
        (text that follows, number of its tokens, what ended it) of each prompt; the speed.
    """
    watch = Watch(source, settings.stops, len(starts))
    _decode(source, starts, settings, watch, numbers)
    made = []
    for ids, new, reason in zip(starts, watch.new, watch.reasons, strict=True):
        text = continuation_text(source, ids, new)
        if reason == STOP:
            text = text[: min((place for place in map(text.find, settings.stops) if place >= 0), default=None)]
        made.append((text, len(new), reason or TOKENS))
    return made, watch.speed(sum(map(len, starts)))


@torch.inference_mode()
def _decode(source: TextModel, starts: Sequence[Sequence[int]], settings: Settings, watch: "Watch", numbers: Sequence[int]) -> None:
    device, length = source.model.device, max(map(len, starts))
    padding = min(source.ends, default=0)  # masked: any token will do
    ids_BS = torch.tensor([[padding] * (length - len(ids)) + list(ids) for ids in starts], device=device)
    mask_BS = torch.tensor([[0] * (length - len(ids)) + [1] * len(ids) for ids in starts], device=device)
    chosen: list[LogitsProcessor] = []
    if settings.temperature is not None:
        chosen.append(TemperatureLogitsWarper(settings.temperature))
        chosen += [] if settings.top_k is None else [TopKLogitsWarper(settings.top_k)]
        chosen += [] if settings.top_p is None else [TopPLogitsWarper(settings.top_p)]
        chosen.append(Draw(settings.seed + number for number in numbers))
    # A folder's own defaults (penalties, sampling) are ignored: the output follows from the settings alone.
    source.model.generation_config = GenerationConfig()
    config = GenerationConfig(max_new_tokens=settings.tokens, do_sample=False, use_cache=settings.use_cache, pad_token_id=padding)
    watch.start()
    source.model.generate(
        input_ids=ids_BS,
        attention_mask=mask_BS,
        generation_config=config,
        logits_processor=LogitsProcessorList(chosen),
        stopping_criteria=StoppingCriteriaList([watch]),
    )


def continuation_text(source: TextModel, ids: Sequence[int], new: Sequence[int]) -> str:
    """The text of new tokens that follow others. They are decoded together, since a tokenizer may drop a space where text begins."""
    kept = [token for token in new if token not in source.ends]
    before, whole = source.decode(_text_of(source, ids)), source.decode([*_text_of(source, ids), *kept])
    return whole.removeprefix(before) if whole.startswith(before) else source.decode(kept)


def _text_of(source: TextModel, ids: Sequence[int]) -> list[int]:
    return list(ids[1:] if source.start is not None else ids)


class Draw(LogitsProcessor):
    """Leaves one token of each row, drawn by its probability with the row's own random numbers.

    So a prompt's continuation depends neither on the batch nor on its neighbours. Up to rounding it is the same on a CPU and a GPU.
    """

    def __init__(self, seeds: Iterable[int]) -> None:
        self.generators = [torch.Generator().manual_seed(seed) for seed in seeds]

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        cumulative_BV = scores.double().softmax(-1).cumsum(-1)
        drawn_B = torch.cat([torch.rand(1, generator=generator, dtype=torch.float64) for generator in self.generators])
        level_B1 = drawn_B.to(scores.device)[:, None] * cumulative_BV[:, -1:]
        # The first token whose sum is above the level: one of probability 0 adds nothing and is never the first.
        token_B1 = torch.searchsorted(cumulative_BV, level_B1, right=True).clamp(max=scores.shape[-1] - 1)
        return torch.full_like(scores, -torch.inf).scatter(1, token_B1, 0.0)


class Watch(StoppingCriteria):
    """Takes each new token as it comes, and says which rows are done and when.

    Attributes:
        new: tokens of each row, up to what ended it. reasons: what that was; None: nothing yet.
    """

    def __init__(self, source: TextModel, stops: Sequence[str], rows: int) -> None:
        self.source, self.stops = source, stops
        self.new: list[list[int]] = [[] for _ in range(rows)]
        self.reasons: list[str | None] = [None] * rows
        # As many tokens as a stop string can take: at worst one a byte, with some tokens without text between.
        self.reach = 16 + max((len(stop.encode()) for stop in stops), default=0)
        self.times: list[float] = []

    def start(self) -> None:
        self.times = [time.perf_counter()]

    def __call__(self, input_ids: Tensor, scores: Tensor | None, **kwargs) -> Tensor:
        for row, token in enumerate(input_ids[:, -1].tolist()):
            if self.reasons[row] is None:
                self.new[row].append(token)
                self.reasons[row] = self._reason(self.new[row])
        self.times.append(time.perf_counter())
        return torch.tensor([reason is not None for reason in self.reasons], device=input_ids.device)

    def _reason(self, new: Sequence[int]) -> str | None:
        if new[-1] in self.source.ends:
            return END_OF_DOCUMENT
        tail = self.source.decode(new[-self.reach :]) if self.stops else ""
        return STOP if any(stop in tail for stop in self.stops) else None

    def speed(self, prompt_tokens: int) -> Speed:
        began, first, *_ = self.times
        return Speed(prompt_tokens, first - began, sum(map(len, self.new)) - len(self.new), self.times[-1] - first)
