"""Limits of YAML files, checked before a library builds what they describe: a few lines can describe more than a machine holds.

A config is small. A damaged or hostile file may hold deeply nested lists, or aliases of aliases. They end in a RecursionError of the
libraries, or in hours of work.
"""

from pathlib import Path

import yaml

from ngpt.config.errors import ConfigError

MAX_BYTES = 4 << 20
MAX_DEPTH = 40
MAX_NODES = 100_000  # every alias counted as all that it stands for

_OPENS = (yaml.SequenceStartEvent, yaml.MappingStartEvent)
_CLOSES = (yaml.SequenceEndEvent, yaml.MappingEndEvent)
_RULE = "Configs are small: a few sections, no deep nesting"
_WAY_OUT = "Correct or remove the file"


def check_yaml(path: Path) -> None:
    """Refuses a file beyond the size of any reasonable config. Whoever reads it checks its syntax.

    Raises:
        ConfigError: It is too large, too deeply nested, or its aliases stand for too much.
        OSError, yaml.YAMLError, UnicodeDecodeError: It cannot be read.
    """
    size = path.stat().st_size
    if size > MAX_BYTES:
        raise ConfigError(str(path), f"{size} bytes", _RULE, _WAY_OUT)
    text = path.read_text(encoding="utf-8")
    try:
        _check_events(str(path), text)
    except RecursionError:
        raise ConfigError(str(path), "Nested too deeply", _RULE, _WAY_OUT) from None


def _check_events(path: str, text: str) -> None:
    """Counts nodes while the parser goes through the text, without building any."""
    anchors: dict[str, int] = {}  # nodes that an alias stands for
    opened: list[tuple[str | None, int]] = []  # anchor of each open collection, and the nodes counted before it
    nodes = 0
    for event in yaml.parse(text, Loader=yaml.SafeLoader):
        if isinstance(event, _OPENS):
            opened.append((event.anchor, nodes))
            nodes += 1
        elif isinstance(event, _CLOSES):
            anchor, before = opened.pop()
            if anchor:
                anchors[anchor] = nodes - before
        elif isinstance(event, yaml.AliasEvent):
            if any(anchor == event.anchor for anchor, _ in opened):
                raise ConfigError(path, f"The alias *{event.anchor} lies inside of what it stands for", _RULE, _WAY_OUT)
            nodes += anchors.get(event.anchor, 1)
        elif isinstance(event, yaml.ScalarEvent):
            nodes += 1
        if len(opened) > MAX_DEPTH:
            raise ConfigError(path, f"Nested more than {MAX_DEPTH} levels deep", _RULE, _WAY_OUT)
        if nodes > MAX_NODES:
            raise ConfigError(path, f"Stands for more than {MAX_NODES} values", _RULE, _WAY_OUT)
