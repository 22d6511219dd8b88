"""A report's numbers: the four leading ones, the table of results, and what was not measured."""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from statistics import fmean
from typing import Any

from ngpt.analysis import formats
from ngpt.analysis.compare import Run
from ngpt.analysis.formats import MISSING
from ngpt.analysis.groups import Group, differ_in_text, difference
from ngpt.analysis.statistics import within_noise
from ngpt.durations import duration
from ngpt.recipes import joined_names
from ngpt.spikes import loss_spikes


@dataclass(frozen=True)
class Cell:
    """A cell of the table. `note`: a second, smaller line. `best`: no other cell of its row is better or as good within the noise."""

    text: str
    note: str = ""
    best: bool = False


@dataclass(frozen=True)
class ResultRow:
    """A line of the table of results, with one cell per group."""

    label: str
    cells: list[Cell]


@dataclass(frozen=True)
class Lead:
    """A number in large type. `note`: what to compare it with."""

    label: str
    text: str
    note: str = ""


@dataclass(frozen=True)
class _Quantity:
    """A row's quantity. `value` of a run is None if unknown. `better`: min, max, or None if neither is better."""

    label: str
    value: Callable[[Run], Any]
    form: Callable[[Any], str]
    better: Callable[..., float] | None = None


def _loss(value: float) -> str:
    return f"{value:.4f}"


def _parallel(run: Run) -> str | None:
    sizes = run.config.get("parallel")
    sizes = sizes if isinstance(sizes, dict) else {}
    names = ("tensor", "pipeline", "virtual_pipeline", "context", "expert")
    split = [f"{name.replace('_', ' ')} {sizes[name]}" for name in names if isinstance(sizes.get(name), int) and sizes[name] > 1]
    return ", ".join(split) or None


def _precision(run: Run) -> str | None:
    """The run's recipe, and the recipes of layers that have their own."""
    named = [name for key, name in run.flat_config.items() if key.startswith("precision.layers.")]
    return joined_names(run.flat_config.get("precision.name"), named)


def _worst_deviation(run: Run) -> float | None:
    _, values = run.series("worst_norm_deviation", run.tokens)
    return max((value for value in values if math.isfinite(value)), default=None)


def _spikes(run: Run) -> int | None:
    _, losses = run.series("train_loss", run.tokens)
    return len(loss_spikes(losses)) if losses else None


def _total(key: str) -> Callable[[Run], Any]:
    return lambda run: run.total(key)


_VALIDATION = _Quantity("Validation loss (nats per token)", _total("val_loss"), _loss, min)
_TRAINING = _Quantity("Training loss, last (nats per token)", _total("train_loss"), _loss, min)
_BYTES = _Quantity("Validation bits per byte", _total("val_bits_per_byte"), _loss, min)
_TOKENS = _Quantity("Tokens trained on", _total("tokens"), formats.full_count)
_RATE = _Quantity("Tokens per second", _total("tokens_per_second"), "{:,.0f}".format, max)
_MFU = _Quantity("MFU, last logged", lambda run: run.last("mfu"), "{:.1%}".format, max)
_SPEEDS = (_RATE, _MFU)
_OF_VALIDATION = (_VALIDATION, _BYTES)
_SECONDS = _Quantity("Time in training steps", lambda run: run.training_seconds[-1] or None, duration)
_QUANTITIES = (
    _Quantity("Status", lambda run: run.status.kind, str),
    _Quantity("Architecture", lambda run: run.flat_config.get("model.architecture"), str),
    _Quantity("Precision", _precision, str),
    _Quantity("Parameters", _total("parameters"), formats.full_count),
    _Quantity("Model parallelism", _parallel, str),
    _Quantity("Steps", _total("steps"), "{:,.0f}".format),
    _TOKENS,
    _Quantity("Wall time", _total("wall_time_s"), duration),
    _SECONDS,
    _RATE,
    _MFU,
    _TRAINING,
    _VALIDATION,
    _BYTES,
    _Quantity("Spikes of the training loss, whole run", _spikes, "{:,.0f}".format),
    _Quantity("Bigram entropy of the same split (bits per byte)", _total("bigram_bits_per_byte"), _loss),
    _Quantity("Unigram entropy of the same split (bits per byte)", _total("unigram_bits_per_byte"), _loss),
    _Quantity("Worst unit-norm deviation, whole run", _worst_deviation, "{:.1e}".format),
)


def final_rows(groups: Sequence[Group]) -> list[ResultRow]:
    """The table of results: what was trained, at what cost, with what result. Rows without any value are left out.

    A number for several seeds is their mean, with the smallest and the largest as its note.
    """
    rows = [ResultRow(quantity.label, _cells(groups, quantity)) for quantity in _QUANTITIES]
    return [row for row in rows if any(cell.text != MISSING for cell in row.cells)]


def _cells(groups: Sequence[Group], quantity: _Quantity) -> list[Cell]:
    cells = [_cell(group, quantity) for group in groups]
    means = [mean for group in groups if (mean := _mean(group, quantity)) is not None]
    if quantity in _SPEEDS and may_share_cores(groups):
        return cells
    if quantity.better is None or len(means) < 2 or min(means) == max(means):
        return cells
    if quantity in _on_different_texts(groups) or _as_good(groups, quantity):
        return cells
    best = _written(quantity, quantity.better(means))
    return [Cell(cell.text, cell.note, best=cell.text == best) for cell in cells]


def _on_different_texts(groups: Sequence[Group]) -> tuple[_Quantity, ...]:
    """The losses that cannot be compared."""
    runs = [run for group in groups for run in group.runs]
    return (*(_OF_VALIDATION if differ_in_text(runs, "valid") else ()), *((_TRAINING,) if differ_in_text(runs, "train") else ()))


def _as_good(groups: Sequence[Group], quantity: _Quantity) -> list[Group]:
    """The group with the best mean and those whose means differ from it by no more than the noise of seeds; [] if it stands out."""
    known = [(mean, group) for group in groups if (mean := _mean(group, quantity)) is not None]
    if quantity.better is None or len(known) < 2:
        return []
    best, first = quantity.better(known, key=lambda pair: pair[0])
    values = [quantity.value(run) for run in first.runs]
    others = [group for mean, group in known if _written(quantity, mean) != _written(quantity, best)]
    close = [group for group in others if within_noise(values, [quantity.value(run) for run in group.runs])]
    return [first, *close] if close else []


def may_share_cores(groups: Sequence[Group]) -> bool:
    """Whether some of the runs trained on CPUs at the same time. No run records its machine: their speeds may be of shared cores."""
    runs = [run for group in groups for run in group.runs if run.span and not (run.environment or {}).get("gpus")]
    spans = sorted(run.span for run in runs)
    return any(start < earlier for (start, _), earlier in zip(spans[1:], accumulate((end for _, end in spans), max), strict=False))


def _cell(group: Group, quantity: _Quantity) -> Cell:
    mean = _mean(group, quantity)
    texts = [_written(quantity, quantity.value(run)) for run in group.runs]
    if len(set(texts)) == 1:
        return Cell(texts[0])
    if mean is None:  # text, or a number that some run lacks
        return Cell("; ".join(texts))
    values = [quantity.value(run) for run in group.runs]
    return Cell(_written(quantity, mean), f"{_written(quantity, min(values))} to {_written(quantity, max(values))}")


def _mean(group: Group, quantity: _Quantity) -> float | None:
    """The mean over a group's runs; None if a run has no finite number."""
    values = [quantity.value(run) for run in group.runs]
    return fmean(values) if all(map(_is_number, values)) else None


def _is_number(value: Any) -> bool:
    try:
        return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    except OverflowError:  # an integer too large for a float: a summary edited by hand
        return False


def _written(quantity: _Quantity, value: Any) -> str:
    try:
        return MISSING if value is None else quantity.form(value)
    except (TypeError, ValueError, OverflowError):  # a summary of another version, or edited by hand
        return formats.plain(value)


def leads(groups: Sequence[Group]) -> list[Lead]:
    """Four numbers: loss, tokens, rate and time. For several groups, the best loss and rate, with the groups that have them."""
    return [_loss_lead(groups), _tokens_lead(groups), _rate_lead(groups), _time_lead(groups)]


def _loss_lead(groups: Sequence[Group]) -> Lead:
    validated = any(_mean(group, _VALIDATION) is not None for group in groups)
    if len(groups) > 1 and _VALIDATION in _on_different_texts(groups):
        losses = [loss for group in groups if (loss := _mean(group, _VALIDATION)) is not None]
        return Lead("Validation loss", _range(min(losses), max(losses), _loss) if losses else MISSING, "on different texts")
    if len(groups) > 1:
        return _best_lead(groups, _VALIDATION, "Lowest validation loss") if validated else _best_lead(groups, _TRAINING, "Lowest last loss")
    cell, in_bytes = _cell(groups[0], _VALIDATION if validated else _TRAINING), _cell(groups[0], _BYTES)
    if not validated:
        notes = ["nats per token", "no validation was logged"]
    else:
        notes = ["nats per token", *([f"{in_bytes.text} bits per byte"] if in_bytes.text != MISSING else [])]
    return Lead("Validation loss" if validated else "Training loss, last", cell.text, "; ".join([*notes, *_of_seeds(groups[0], cell)]))


def _best_lead(groups: Sequence[Group], quantity: _Quantity, label: str) -> Lead:
    known = [(mean, group) for group in groups if (mean := _mean(group, quantity)) is not None]
    if not known:
        return Lead(label, MISSING, "no group has it of all of its runs")
    mean, group = quantity.better(known, key=lambda pair: pair[0])
    text, base = _written(quantity, mean), _mean(groups[0], quantity)
    if len(known) == len(groups) and all(_written(quantity, other) == text for other, _ in known):
        return Lead(label, text, "the same in every group")
    distance = f"; {mean / base - 1:+.2%} against {formats.short(groups[0].label)}" if group is not groups[0] and base else ""
    noise = "; within the noise of seeds" if _as_good(groups, quantity) else ""
    return Lead(label, text, formats.short(group.label) + distance + noise)


def _tokens_lead(groups: Sequence[Group]) -> Lead:
    runs = [run for group in groups for run in group.runs]
    tokens = [value for run in runs if _is_number(value := run.total("tokens"))]
    reached = {run.progress for run in runs}
    note = (f"{reached.pop()} each" if len(runs) > 1 else reached.pop()) if len(reached) == 1 else "steps: see the table"
    return Lead("Tokens trained on", _range(min(tokens), max(tokens), formats.count) if tokens else MISSING, note)


def _rate_lead(groups: Sequence[Group]) -> Lead:
    if len(groups) > 1 and may_share_cores(groups):
        rates = [rate for group in groups if (rate := _mean(group, _RATE)) is not None]
        return Lead(_RATE.label, _range(min(rates), max(rates), _RATE.form) if rates else MISSING, "on CPUs at the same time")
    if len(groups) > 1:
        return _best_lead(groups, _RATE, "Most tokens per second")
    cell, mfu = _cell(groups[0], _RATE), _cell(groups[0], _MFU)
    known = "MFU not known for this device" if mfu.text == MISSING else f"MFU {mfu.text}"
    return Lead("Tokens per second", cell.text, "; ".join([known, *_of_seeds(groups[0], cell)]))


def _time_lead(groups: Sequence[Group]) -> Lead:
    if len(groups) > 1:
        return _longest_lead(groups)
    cell, walls = _cell(groups[0], _SECONDS), [value for run in groups[0].runs if _is_number(value := run.total("wall_time_s"))]
    known = f"wall time {_range(min(walls), max(walls), duration)}" if walls else "wall time not known yet"
    return Lead("Time in training steps", cell.text, "; ".join([known, *_of_seeds(groups[0], cell)]))


def _longest_lead(groups: Sequence[Group]) -> Lead:
    label, known = "Longest time in steps", [(mean, group) for group in groups if (mean := _mean(group, _SECONDS)) is not None]
    if not known:
        return Lead(label, MISSING, "step times were not logged")
    longest, group = max(known, key=lambda pair: pair[0])
    text, shortest = duration(longest), duration(min(mean for mean, _ in known))
    return Lead(label, text, f"{formats.short(group.label)}; shortest {shortest}" if shortest != text else "about the same in every group")


def _of_seeds(group: Group, cell: Cell) -> list[str]:
    return [f"{len(group.runs)} seeds: {cell.note}"] if cell.note else []


def _range(low: float, high: float, form: Callable[[float], str]) -> str:
    return form(low) if form(low) == form(high) else f"{form(low)} to {form(high)}"


def not_measured(groups: Sequence[Group]) -> list[str]:
    """One sentence for each quantity that a reader may miss because some runs did not log it, with the config key that enables it."""
    runs = [run for group in groups for run in group.runs]
    apart = [group for group in groups[1:] if not any(len(difference(group, groups[0], key)) for key in ("train_loss", "val_loss"))]
    shared = "No best in speed: runs trained on CPUs at the same time and may have shared cores. One after the other they can be compared."
    return (
        ([shared] if len(groups) > 1 and may_share_cores(groups) else [])
        + _without_best(groups)
        + [f"No loss difference of {group.label}: it shares no logged token count with {groups[0].label}." for group in apart]
        + [
            sentence if len(missing) == len(runs) else f"{', '.join(run.name for run in missing)}: {sentence[0].lower()}{sentence[1:]}"
            for sentence, applies in _ABSENCES
            if (missing := [run for run in runs if applies(run)])
        ]
    )


def _without_best(groups: Sequence[Group]) -> list[str]:
    """Why no loss is marked as best: one sentence for validation on different texts, one for each loss within the noise of seeds."""
    apart = _on_different_texts(groups)
    texts = ((_VALIDATION, "validation", "evaluated", "valid"), (_TRAINING, "training loss", "trained", "train"))
    sentences = [
        f"No best in {name}: the runs were {verb} on different texts (data.{split}), between which no difference is drawn."
        for quantity, name, verb, split in texts
        if quantity in apart
    ]
    for quantity in (one for one in (_TRAINING, *_OF_VALIDATION) if one not in apart):
        if names := [group.label for group in _as_good(groups, quantity)]:
            label = f"{quantity.label[0].lower()}{quantity.label[1:].partition(' (')[0]}"
            why = f"{names[0]} is lowest, but not apart from {', '.join(names[1:])} by more than the noise of seeds"
            sentences.append(f"No best {label}: {why} (95 % interval of the difference).")
    return sentences


def _lacks(run: Run, prefix: str) -> bool:
    return not any(key.startswith(prefix) for record in run.metrics for key in record)


def _is_ngpt(run: Run) -> bool:
    return run.flat_config.get("model.architecture") == "ngpt"


def _quantises(run: Run) -> bool:
    return "nvfp4" in str(_precision(run))


_ABSENCES: tuple[tuple[str, Callable[[Run], bool]], ...] = (
    ("No validation loss was logged: train.eval_interval and train.eval_steps ask for it.", lambda run: _lacks(run, "val_loss")),
    ("No MFU: the peak rate of this device is not known.", lambda run: run.last("mfu") is None),
    ("No health step was reached: logging.health_interval says how often scales and norms are taken.", lambda run: _lacks(run, "health/")),
    ("No norm deviation was logged.", lambda run: _is_ngpt(run) and _lacks(run, "worst_norm_deviation")),
    ("A GPT control has neither unit norms nor learned scales.", lambda run: run.flat_config.get("model.architecture") == "gpt"),
    ("No quantisation errors: precision.diagnostics=true records them.", lambda run: _quantises(run) and _lacks(run, "precision/")),
)


def status_lines(groups: Sequence[Group]) -> Iterator[tuple[str, str, str]]:
    """(kind, name, message) for the only run, or for those of several that did not finish."""
    runs = [run for group in groups for run in group.runs]
    for run in runs:
        if len(runs) == 1 or run.status.kind != "finished":
            yield run.status.kind, run.name if len(runs) > 1 else "", run.status.message
