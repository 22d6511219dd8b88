"""Where a key stands in a YAML file, so that errors in a user's file name the line."""

import re
from pathlib import Path

import yaml

from ngpt.config.errors import ConfigError


def unreadable(path: Path, error: Exception, way_out: str) -> ConfigError:
    """The error for a file that cannot be read as YAML, with the line where that can be told.

    Args:
        error: a `yaml.YAMLError`, `UnicodeDecodeError` or `OSError`.
    """
    line, got = None, str(error)
    if isinstance(error, yaml.MarkedYAMLError):
        mark = error.problem_mark or error.context_mark
        line, got = mark and mark.line + 1, ", ".join(filter(None, (error.problem, error.context)))
    elif isinstance(error, UnicodeDecodeError):
        line, got = error.object.count(b"\n", 0, error.start) + 1, f"byte {error.object[error.start]:#04x} is no UTF-8"
    elif isinstance(error, yaml.reader.ReaderError):
        text = path.read_text(encoding="utf-8", errors="replace")
        line, got = text.count("\n", 0, error.position) + 1, f"character {error.character:#06x}: {error.reason}"
    return ConfigError(at(path, line), got, "Must be a readable YAML file", way_out)


def at(path: Path, line: int | None) -> str:
    """FILE:LINE, as editors and terminals know it; FILE where no line is known."""
    return str(path) if line is None else f"{path}:{line}"


class Lines:
    """Where the keys of a readable file are.

    Args:
        path: of the file, which is parsed once.
    """

    def __init__(self, path: Path) -> None:
        self._path, self._text = path, path.read_text(encoding="utf-8")
        self._root = yaml.compose(self._text, Loader=yaml.SafeLoader)

    def place(self, key: str) -> str:
        """FILE:LINE of a dotted key of the whole config; FILE if it is not there. A group's file has the key without its first part.

        Entries of lists may be numbered: `data.train[0].path`.
        """
        parts = re.findall(r"[^.\[\]]+", key)
        line = _line_of(self._root, parts) if parts else None
        if line is None:
            line = _line_of(self._root, parts[1:]) if len(parts) > 1 else self._anywhere(key)
        return at(self._path, line)

    def _anywhere(self, key: str) -> int | None:
        """The first line with a key of this name: OmegaConf does not say where in a list an entry lies."""
        found = re.search(rf"^[^#\n]*\b{re.escape(key)}\s*:", self._text, re.MULTILINE)
        return found and self._text.count("\n", 0, found.start()) + 1


def _line_of(node: yaml.Node | None, parts: list[str]) -> int | None:
    """The line of what `parts` lead to from a node."""
    first, *rest = parts
    if isinstance(node, yaml.SequenceNode) and first.isdigit() and int(first) < len(node.value):
        entry = node.value[int(first)]
        return _line_of(entry, rest) if rest else entry.start_mark.line + 1
    if isinstance(node, yaml.MappingNode):
        for name, value in node.value:
            if name.value == first:
                return _line_of(value, rest) if rest else name.start_mark.line + 1
    return None
