"""Seeded damage to bytes, to JSON and YAML trees, and to command lines."""

import json
import random
from collections.abc import Iterator, Sequence
from typing import Any

import yaml

_DEEP = 2000
_NUMBERS = [
    0,
    -1,
    1,
    2,
    3,
    7,
    255,
    256,
    2**31 - 1,
    2**31,
    2**32,
    2**63,
    10**30,
    -(2**63),
    0.0,
    -0.5,
    1e-300,
    1e308,
    float("inf"),
    float("nan"),
]
_TEXTS = [
    "",
    " ",
    "x",
    "null",
    "~",
    "none",
    "0",
    "-1",
    "1e9",
    "99999999999",
    "../..",
    "/",
    "a/b",
    "train",
    "\0",
    "é",
    "\ud800",
    "x" * 5000,
    "${x}",
]
_YAML = [
    "a: &a [*a]\n",
    "x: &a [1, 1]\ny: &b [*a, *a, *a, *a, *a, *a, *a, *a]\nz: &c [*b, *b, *b, *b, *b, *b, *b, *b]\n",
    "a: " + "[" * _DEEP + "\n",
    "a: " + "{a: " * _DEEP + "\n",
    "!!python/object/apply:os.system ['true']\n",
    "? {a: b}\n: 1\n",
    "<<: *nothing\n",
    "train: {steps: ${train.steps}}\n",
    "train: {steps: ${oc.env:HOME}}\n",
    "train: {steps: '${largest_divisor:99999999999999999,9999999999999}'}\n",
    "- 1\n",
    "\t\n",
    "--- a\n--- b\n",
    "%YAML 9\n---\n",
    "2001-01-01: 1\n",
    "null: 1\n",
    "1: 2\n",
    "model: {num_layers: 99999999999}\n",
]
_WORDS = [
    "=",
    "==",
    ",",
    "[",
    "]",
    "{",
    "}",
    "'",
    '"',
    "\\",
    "$",
    "${",
    "}",
    "+",
    "++",
    "~",
    "@",
    ":",
    "\n",
    " ",
    "null",
    "[" * 300,
    "{a:" * 100,
]


def any_value(rng: random.Random, depth: int = 0) -> Any:
    """A value of any JSON type, often an unlikely one."""
    kind = rng.randrange(8)
    if kind < 3:
        return rng.choice(_NUMBERS)
    if kind < 5:
        return rng.choice(_TEXTS)
    if kind == 5:
        return rng.choice([None, True, False])
    if depth > 2:
        return []
    items = [any_value(rng, depth + 1) for _ in range(rng.randrange(4))]
    return items if kind == 6 else {str(rng.choice(_TEXTS)): item for item in items}


def mutate_bytes(rng: random.Random, content: bytes) -> bytes:
    """Cut, flipped, zeroed, repeated, spliced or replaced."""
    data = bytearray(content)
    for _ in range(rng.choice([1, 1, 1, 2, 5, 20])):
        place, span = rng.randrange(len(data) + 1), rng.choice([1, 2, 4, 8, 64, 1000])
        kind = rng.randrange(8)
        if kind == 0:
            del data[place:]
        elif kind == 1:
            del data[place : place + span]
        elif kind == 2:
            data[place:place] = rng.randbytes(span)
        elif kind == 3:
            data[place:place] = data[place : place + span] * rng.choice([1, 2, 50])
        elif kind == 4:
            data[place : place + span] = bytes(len(data[place : place + span]))
        elif kind == 5:
            data[place : place + 8] = rng.choice(_NUMBERS[:11]).to_bytes(8, "little", signed=True) if rng.random() < 0.5 else b"\xff" * 8
        elif data:
            data[place % len(data)] ^= 1 << rng.randrange(8)
    return rng.choice([bytes(data)] * 30 + [b"", b"\0" * 100, b"[" * 100_000, rng.randbytes(300)])


def mutate_tree(rng: random.Random, tree: Any) -> Any:
    """A copy of a JSON tree with one to three values replaced, removed, repeated or added."""
    tree = json.loads(json.dumps(tree))
    for _ in range(rng.choice([1, 1, 2, 3])):
        places = list(_places(tree))
        if not places:
            return any_value(rng)
        holder, key = rng.choice(places)
        kind = rng.randrange(6)
        if kind < 3:
            holder[key] = any_value(rng)
        elif kind == 3:
            del holder[key]
        elif kind == 4 and isinstance(holder, dict):
            holder[str(rng.choice(_TEXTS))] = any_value(rng)
        else:
            holder[key] = rng.choice([[holder[key]], {"x": holder[key]}, str(holder[key])])
    return tree


def json_bytes(rng: random.Random, tree: Any) -> bytes:
    """JSON text of a damaged tree, or damaged text."""
    if rng.random() < 0.5:
        return json.dumps(mutate_tree(rng, tree)).encode()
    if rng.random() < 0.1:
        return rng.choice([b"[" * 100_000, b'{"a":' * 100_000, b"null", b"[]", b"{}", b"7", b'"x"', b"\xef\xbb\xbf{}", b"NaN"])
    return mutate_bytes(rng, json.dumps(tree).encode())


def yaml_bytes(rng: random.Random, tree: Any) -> bytes:
    """YAML text of a damaged tree, damaged text, or text with a line that libraries tend to stumble over."""
    kind = rng.random()
    if kind < 0.5:
        return yaml.safe_dump(mutate_tree(rng, tree), allow_unicode=False).encode()
    text = yaml.safe_dump(tree).encode()
    if kind < 0.7:
        return mutate_bytes(rng, text)
    line = rng.choice(_YAML).encode()
    return rng.choice([line, text + line, line + text, mutate_bytes(rng, text + line)])


def override(rng: random.Random, keys: Sequence[str]) -> str:
    """A word of a command line: mostly key=value of a key that exists."""
    key = rng.choice([*keys, *dict.fromkeys(key.split(".")[0] for key in keys), "experiment", "hydra.run.dir", "x", ""])
    value = any_value(rng)
    text = rng.choice([str(value), json.dumps(value).replace(": ", ":"), rng.choice(_TEXTS), "${" + rng.choice(keys) + "}"])
    word = f"{rng.choice(['', '', '', '+', '++', '~'])}{key}{rng.choice(['=', '=', '=', '=', ':', ''])}{text}"
    for _ in range(rng.choice([0, 0, 0, 1, 3])):
        place = rng.randrange(len(word) + 1)
        word = word[:place] + rng.choice(_WORDS) + word[place:]
    return word.replace("\0", "0")


def _places(tree: Any) -> Iterator[tuple[Any, Any]]:
    items = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    for key, value in list(items):
        yield tree, key
        yield from _places(value)
