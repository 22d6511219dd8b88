"""Names of lm-eval's tasks, looked for in the text of its files: to import it takes half a minute."""

import difflib
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path

from ngpt.config.errors import ConfigError

SHIPPED = Path(__file__).parent / "tasks"
OPTIONS = ("--tasks", "--include")  # of `ngpt eval`: what names tasks and folders
KEYS = ("train.eval_tasks", "train.eval_tasks_include")
_NAMED = re.compile(rb"^ *(?:task|group|tag): *[\"']?([\w.+/-]+)", re.MULTILINE)


def check_names(names: Sequence[str], folders: Sequence[Path], keys: tuple[str, str]) -> None:
    """Refuses a name that occurs in no file of any task. A name that occurs there as some other word passes, and lm-eval refuses it later.

    Args:
        names: of tasks, groups and tags. folders: with task files of the user's.
        keys: what names tasks and folders, for messages.

    Raises:
        ConfigError: no such folder, or no such task.
    """
    check_folders(folders, keys[1])
    missing, known = _missing(names, [SHIPPED, *folders])
    if missing:
        missing, more = _missing(missing, _folders_of_lm_eval())
        known |= more
    if missing:
        raise unknown(missing[0], known, keys)


def check_folders(folders: Iterable[Path], key: str) -> None:
    """Raises ConfigError for one that is no folder."""
    for folder in folders:
        if not folder.is_dir():
            raise ConfigError(key, folder, "It must be a folder with YAML files of tasks", "Correct the path")


def unknown(name: str, known: Iterable[str], keys: tuple[str, str]) -> ConfigError:
    """The error for a task that does not exist."""
    close = difflib.get_close_matches(name, known, n=1)
    rule = f"No task of lm-eval, of ngpt or of {keys[1]} has this name"
    return ConfigError(keys[0], name, rule, f"Did you mean {close[0]}?" if close else "`lm_eval ls tasks` lists lm-eval's")


def _folders_of_lm_eval() -> list[Path]:
    spec = find_spec("lm_eval")
    return [Path(place) / "tasks" for place in (spec and spec.submodule_search_locations) or ()]


def _missing(names: Sequence[str], folders: Iterable[Path]) -> tuple[list[str], set[str]]:
    """The names that occur in no file, and the tasks, groups and tags that files name at the start of a line."""
    wanted = {name: re.compile(rb"(?<![\w.-])" + re.escape(name.encode()) + rb"(?![\w.-])") for name in names}
    known: set[str] = set()
    for text in _texts(folders):
        wanted = {name: pattern for name, pattern in wanted.items() if not pattern.search(text)}
        if not wanted:
            break
        known.update(found.decode() for found in _NAMED.findall(text))
    return list(wanted), known


def _texts(folders: Iterable[Path]) -> Iterator[bytes]:
    """Of all YAML files, templates without a suffix (`_default_template_yaml`) included. What cannot be read is lm-eval's to tell."""
    for folder in folders:
        for parent, _, files in os.walk(folder):
            for file in files:
                if file.endswith("yaml"):
                    try:
                        yield Path(parent, file).read_bytes()
                    except OSError:
                        continue
