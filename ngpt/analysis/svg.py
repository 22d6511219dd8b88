"""A figure as SVG inside a page: it uses the style sheet's colour variables and the page's font."""

import io
import re

import matplotlib
from matplotlib.figure import Figure

from ngpt.analysis.drawing import CSS_NAMES

_COLOR = re.compile(r"#[0-9a-f]{6}\b")
_FONT = re.compile(r"font-family: [^;\"]*;? ?")
_NUMBER = re.compile(r"(?<=[\s\"(])-?\d+\.\d{3,}")
# Only ids that something refers to (clip paths, markers) are kept. The others would repeat in every figure.
_ID = re.compile(r" id=\"(?:figure|axes|subfigure|patch|line2d|text|legend|[xy]tick|matplotlib\.axis|[A-Za-z]*Collection)_\d+\"")
_NAMESPACES = 'xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink"'
_STYLE = re.compile(r"style=\"[^\"]*\"")


def inline(figure: Figure, salt: str) -> str:
    """The `<svg>` element of a figure. It fills the available width; its height follows.

    Args:
        figure: drawn in the colours of `drawing.CSS_NAMES`. Colour maps are images and keep their colours.
        salt: different for each figure of a page; the ids inside are derived from it.

    Raises:
        ValueError: a colour has no name in the page's style sheet, and would be wrong in dark mode.
    """
    stream = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": salt, "svg.fonttype": "none"}):
        figure.savefig(stream, format="svg", transparent=True, metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")))
    return _adapted(stream.getvalue())


def _adapted(document: str) -> str:
    element = document[document.index("<svg") :]
    element = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>", "", element, flags=re.DOTALL)
    element = re.sub(r"<svg [^>]*?(viewBox=\"[^\"]*\")[^>]*>", rf"<svg {_NAMESPACES} \1>", element, count=1)
    element = _ID.sub("", element)
    # round positions to a hundredth of a point; text and image data hold no such numbers directly after a space or bracket
    element = re.sub(r"(?:d|transform|x|y|points)=\"[^\"]*\"", lambda match: _NUMBER.sub(_rounded, match[0]), element)
    element = _STYLE.sub(lambda match: _COLOR.sub(_variable, _FONT.sub("", match[0])), element)
    return element.strip()


def _rounded(match: re.Match[str]) -> str:
    return f"{float(match[0]):.2f}".rstrip("0").rstrip(".")


def _variable(match: re.Match[str]) -> str:
    if match[0] not in CSS_NAMES:
        raise ValueError(f"{match[0]} in a figure: a colour of drawing.CSS_NAMES is wanted")
    return f"var({CSS_NAMES[match[0]]})"
