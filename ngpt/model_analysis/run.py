"""One analysis, from request to result."""

import time
from collections.abc import Callable
from typing import Any

from torch import Tensor

from ngpt.hf.modeling_ngpt import NGPTForCausalLM
from ngpt.model_analysis import curvature, flatness, hessian, ptq, snr
from ngpt.model_analysis.request import Request
from ngpt.model_analysis.text import Text, read_text
from ngpt.precision import diagnostics

SECONDS_BETWEEN_LINES = 5.0
_DEFINITIONS = {"snr": (snr, diagnostics), "ptq": (ptq,), "flatness": (flatness,), "curvature": (curvature, hessian)}

type Say = Callable[[str], None]


def measure(model: NGPTForCausalLM, request: Request, say: Say = lambda line: None) -> dict[str, Any]:
    """Reads the text and runs the analysis.

    Args:
        model: in evaluation mode, with dtype `request.dtype`.
        say: called with lines on the progress.

    Returns:
        what, options, tokens, seconds, definition (of the figures, in words), and results, in JSON types.

    Raises:
        ConfigError: the recipe cannot quantise a layer of this model.
    """
    text, started = read_text(request.splits, request.length, request.sequences, request.seed), time.monotonic()
    results = _results(model, request, text, _Progress(request.what, say))
    return {
        "what": request.what,
        "options": request.options(),
        "tokens": text.tokens,
        "seconds": round(time.monotonic() - started, 1),
        "device": model.device.type,
        "definition": "\n\n".join(str(module.__doc__).strip() for module in _DEFINITIONS[request.what]),
        "results": results,
    }


def _results(model: NGPTForCausalLM, request: Request, text: Text, progress: "_Progress") -> dict[str, Any]:
    ids_NS: Tensor = text.ids_NS
    if request.what == "snr":
        return snr.snr(model, ids_NS, request.recipe, request.batch_size, request.seed, tick=lambda *n: progress("batches", *n))
    if request.what == "ptq":
        return ptq.ptq(model, ids_NS, request.recipe, text.bits_per_nat, lambda arm, *n: progress(f"sequences, {arm}", *n))
    if request.what == "flatness":
        return flatness.flatness(
            model, ids_NS, request.recipe, request.seed, request.directions, request.radii, lambda *n: progress("points", *n)
        )
    return curvature.curvature(
        model, ids_NS, request.seed, request.hvp, tick=lambda scope, *n: progress(f"products at most, {scope}", *n)
    )


class _Progress:
    """Prints a line now and then, and the last one of each kind."""

    def __init__(self, what: str, say: Say):
        self.what, self.say, self.last = what, say, time.monotonic()

    def __call__(self, unit: str, done: int, of: int) -> None:
        if done == of or time.monotonic() - self.last > SECONDS_BETWEEN_LINES:
            self.last = time.monotonic()
            self.say(f"{self.what}: {done:,} of {of:,} {unit}")
