"""Results of lm-eval tasks during training (`tasks/<task>/<metric>`), one panel per metric."""

from collections.abc import Iterable, Sequence
from functools import partial

from matplotlib.artist import Artist
from matplotlib.axes import Axes

from ngpt.analysis import drawing, figures
from ngpt.analysis.drawing import Curve
from ngpt.analysis.groups import Group
from ngpt.analysis.sheets import Name, Sheet

SECTION, _PREFIX = "Tasks", "tasks/"
_UNITS = {
    "acc": "accuracy (part of the documents)",
    "acc_norm": "accuracy by length (part of the documents)",
    "exact_match": "exact matches (part of the documents)",
    "perplexity": "perplexity of a continuation",
    "word_perplexity": "perplexity per word",
    "byte_perplexity": "perplexity per byte",
    "bits_per_byte": "bits per byte",
}


def sheets_of(groups: Sequence[Group], keys: Iterable[str]) -> list[Sheet]:
    """One sheet, or none. `keys`: every key that any run logged."""
    panels = []
    for key in sorted(key for key in keys if key.startswith(_PREFIX)):
        task, metric = key.removeprefix(_PREFIX).split("/", 1)
        curves = [curve for curve in drawing.over_tokens(groups) if len(curve.series(key))]
        draw = partial(_figure, key=key, is_wide="perplexity" in metric)
        panels.append(figures.panel(curves, _UNITS.get(metric, metric), draw, Name(task), width=4.4, height=2.7))
    caption = "Tasks of lm-eval (train.eval_tasks), evaluated behind the validation loss."
    return [Sheet("tasks", "Tasks", caption, SECTION, tuple(panels), columns=3)] if panels else []


def _figure(axes: Axes, curves: list[Curve], key: str, is_wide: bool) -> Iterable[Artist]:
    for curve in curves:
        curve.line(axes, key, marker="o", markersize=4)
    if is_wide:  # an untrained model's value can have a hundred digits
        drawing.log_axis(axes)
    return ()
