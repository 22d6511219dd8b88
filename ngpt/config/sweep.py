"""Words of a sweep: which of them stand for several values, by Hydra's own grammar, and the members that they make."""

import hashlib
import itertools
import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Glob, Override, RangeSweep, ValueType
from hydra.errors import HydraException

from ngpt.config.errors import ConfigError
from ngpt.config.folders import options
from ngpt.config.overrides import check_words, is_text, key_of, refuse_hydra

MAX_MEMBERS = 1000
MAX_VALUE, MAX_NAME = 40, 160  # characters in the name of a folder
OWN_KEYS = ("run.name", "run.dir", "run.root")  # a sweep sets them for its members


@dataclass(frozen=True)
class Axis:
    """A key that takes several values. `word`: the key as it was typed, perhaps with a + before it. `values`: as they were typed."""

    key: str
    word: str
    values: tuple[str, ...]


@dataclass(frozen=True)
class Point:
    """A member of a sweep: its name, the values of the keys that are swept, and the words that set them."""

    name: str
    values: dict[str, str]
    words: tuple[str, ...]


def sweep_words(overrides: Sequence[str], config_dirs: Sequence[Path] = ()) -> tuple[list[str], list[Axis]]:
    """The words that all members share, and the keys that are swept.

    A comma in the value of a text key sweeps, too, unless it is quoted.

    Raises:
        ConfigError: no word has several values, or one has what cannot be swept.
    """
    check_words(overrides, config_dirs)
    fixed, axes = [], []
    for word in overrides:
        values = _values(word, config_dirs)
        if values is None:
            fixed.append(word)
            continue
        typed = word.partition("=")[0]
        axes.append(Axis(typed.lstrip("+"), typed, tuple(values)))
        _check_number(math.prod(len(axis.values) for axis in axes))
        _check(axes[-1], word.partition("=")[2])
    if not axes:
        way_out = "Give a key several values, optim.lr=1e-3,3e-3, or leave -m out; choice(X) sweeps one value"
        raise ConfigError("-m", " ".join(overrides) or "no words", "A sweep needs a word with several values", way_out)
    for axis in axes:
        if [other.key for other in axes].count(axis.key) > 1:
            raise ConfigError(axis.key, "is swept twice", "A key has one list of values", "Write all of its values in one word")
    return fixed, axes


def points(axes: Sequence[Axis]) -> list[Point]:
    """Every combination of the values, the last key changing first."""
    labels = _labels([axis.key for axis in axes])
    found = []
    for values in itertools.product(*(axis.values for axis in axes)):
        name = "_".join(f"{label}={_readable(value)}" for label, value in zip(labels, values, strict=True))
        if len(name) > MAX_NAME:
            name = f"{name[:MAX_NAME]}-{_digest(name)}"
        words = tuple(f"{axis.word}={value}" for axis, value in zip(axes, values, strict=True))
        found.append(Point(name, {axis.key: value for axis, value in zip(axes, values, strict=True)}, words))
    return found


def _values(word: str, config_dirs: Sequence[Path]) -> list[str] | None:
    """The values that a word stands for; None if it is a single one."""
    typed, equals, text = word.partition("=")
    key = key_of(word)
    refuse_hydra(key, word)
    if not equals or typed.startswith("~"):
        return None
    try:
        parsed = OverridesParser.create().parse_override(word)
    except (HydraException, RecursionError):  # other keys' values are refused when they are composed
        pieces = list(_split(text)) if is_text(key) else []
        return pieces if len(pieces) > 1 else None
    if not parsed.is_sweep_override():
        return None
    if parsed.is_interval_sweep():
        way_out = f"Write the values: {key}=1,2, or {key}=range(1,4)"
        raise ConfigError(key, text, "An interval has no end of values, and a sweep runs each", way_out)
    if parsed.value_type == ValueType.GLOB_CHOICE_SWEEP:
        return _files(key, text, parsed, config_dirs)
    value = parsed.value()
    if isinstance(value, RangeSweep):  # a range may be too long to be written out
        if value.step == 0:
            raise ConfigError(key, text, "A range has a step, and this one is 0", f"Give {key}=range(START,STOP,STEP)")
        _check_number(sum(1 for _ in itertools.islice(value.range(), MAX_MEMBERS + 1)), or_more=True)
    return _as_typed(text, parsed)


def _as_typed(text: str, parsed: Override) -> list[str]:
    """The text of each value as typed, if it can be found: 1e-3 stays 1e-3 and does not become 0.001."""
    read = list(parsed.sweep_string_iterator())
    if parsed.value_type == ValueType.CHOICE_SWEEP and (inner := re.fullmatch(r"\s*choice\((.*)\)\s*", text, re.DOTALL)):
        text = inner[1]
    elif parsed.value_type != ValueType.SIMPLE_CHOICE_SWEEP:
        return read
    pieces = list(_split(text))
    return pieces if len(pieces) == len(read) else read


def _files(key: str, text: str, parsed: Override, config_dirs: Sequence[Path]) -> list[str]:
    names = list(dict.fromkeys(option.name for option in options(config_dirs) if option.group == key))
    if not names:
        raise ConfigError(key, text, "glob() chooses among the files of a group, and this is none", "ngpt list shows the groups")
    pattern = parsed.value()
    assert isinstance(pattern, Glob)
    if not (found := pattern.filter(names)):
        raise ConfigError(key, text, "No file of the group matches", f"ngpt list {key} shows them")
    return found


def _check_number(members: int, or_more: bool = False) -> None:
    """Refuses more members than a sweep may have. `or_more`: the counting ended there."""
    if members > MAX_MEMBERS:
        rule = f"A sweep has at most {MAX_MEMBERS:,} members, each with a folder of its own"
        way_out = "Sweep fewer values, or in several sweeps with a run.name each"
        raise ConfigError("-m", f"{members:,} members{' or more' if or_more else ''}", rule, way_out)


def _check(axis: Axis, text: str) -> None:
    if axis.key in OWN_KEYS:
        rule = "A sweep names its members by what differs between them"
        raise ConfigError(axis.key, text, rule, "Give it one value, or none; in quotes a comma is part of a name")
    twice = next((value for value in axis.values if axis.values.count(value) > 1), None)
    if twice is not None:
        raise ConfigError(axis.key, text, f"{twice} is given twice, and each value makes one member", "Write each value once")


def _split(text: str) -> Iterator[str]:
    """The parts between commas outside of quotes and brackets."""
    part, quote, depth, escaped = "", "", 0, False
    for sign in text:
        if sign == "," and not quote and depth <= 0 and not escaped:
            yield part.strip()
            part = ""
            continue
        part += sign
        if escaped or sign == "\\":
            escaped = not escaped
        elif quote:
            quote = "" if sign == quote else quote
        elif sign in "'\"":
            quote = sign
        else:
            depth += (sign in "([{") - (sign in ")]}")
    yield part.strip()


def _labels(keys: Sequence[str]) -> list[str]:
    """The last part of each key, or all of it if another key ends the same."""
    last = [key.rpartition(".")[2] for key in keys]
    return [name if last.count(name) == 1 else key for key, name in zip(keys, last, strict=True)]


def _readable(value: str) -> str:
    """A value as part of a folder's name. One that cannot be kept whole ends in a hash of it."""
    text = value[1:-1] if re.fullmatch(r"'[^'\\]*'|\"[^\"\\]*\"", value) else value
    if len(text) <= MAX_VALUE and re.fullmatch(r"[\w.+@-]+", text, re.ASCII):
        return text
    safe = re.sub(r"[^\w.+@-]+", "-", text, flags=re.ASCII).strip("-")
    return f"{safe[:MAX_VALUE]}-{_digest(text)}".lstrip("-")


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:6]
