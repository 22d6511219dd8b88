"""`ngpt list`: experiments, files of a group, or keys, with one line each."""

import argparse
import sys
from collections.abc import Collection, Mapping, Sequence
from fnmatch import fnmatch
from pathlib import Path

from ..arguments import GROUPS, Parser, add_config_dir, completed, config_dirs

EXPERIMENTS, STUDIES, KEYS = "experiments", "studies", "keys"


def add_arguments(parser: Parser) -> None:
    parser.description = "List what a config can be made of, with one line each."
    what = f"{EXPERIMENTS}, {STUDIES}, {KEYS}, or a group: model, precision, ... (default: the groups themselves)"
    completed(parser.add_argument("what", nargs="?", metavar="WHAT", help=what), GROUPS)
    what = "those with this text in name or line; with * or ? a pattern of the whole name: 'optim.*'"
    parser.add_argument("pattern", nargs="?", metavar="PATTERN", help=what)
    add_config_dir(parser)


def run(options: argparse.Namespace) -> int:
    from ngpt.config.folders import check_config_dirs
    from ngpt.config.user_files import broken_files

    folders = config_dirs(options)
    check_config_dirs(folders)
    broken = dict(broken_files(folders))  # told apart, below the list
    lines = _lines(options.what, folders, broken)
    if options.pattern is not None:
        lines = _matching(lines, options.pattern, f"ngpt list {options.what}")
    print("\n".join(table(lines)))
    for error in broken.values():
        print(error, file=sys.stderr)
    return 0


def table(lines: Mapping[str, str]) -> Sequence[str]:
    """Names and their lines in two columns."""
    width = max(map(len, lines), default=0)
    return [f"  {name:<{width}}  {line}".rstrip() for name, line in lines.items()]


def _lines(what: str | None, folders: Sequence[Path], broken: Collection[Path]) -> dict[str, str]:
    """Name -> line, for everything of a kind but broken files."""
    import difflib

    from ngpt.config.describe import groups, keys
    from ngpt.config.errors import ConfigError
    from ngpt.config.folders import EXPERIMENT
    from ngpt.config.folders import options as files
    from ngpt.config.study import descriptions, studies

    known = {EXPERIMENTS: EXPERIMENT, EXPERIMENT: EXPERIMENT} | {name: name for name in groups()}
    if what is None:
        return {KEYS: "Single values: every key with what it takes and its default.", STUDIES: "Claims that `ngpt study` tests."} | {
            EXPERIMENTS if name == EXPERIMENT else name: line for name, line in groups().items()
        }
    if what == STUDIES:
        usable = [name for name, path in studies(folders).items() if path not in broken]
        return {name: line for name, line in descriptions(folders).items() if name in usable}
    if what == KEYS:
        return {key.name: f"{key.description} ({key.takes})" for key in keys()}
    if what not in known:
        listed = [EXPERIMENTS, STUDIES, KEYS, *(name for name in groups() if name != EXPERIMENT)]
        near = difflib.get_close_matches(what, listed, n=2)
        way_out = f"Did you mean {' or '.join(near)}?" if near else "Choose one of them"
        raise ConfigError("ngpt list", what, f"There are {', '.join(listed)}", way_out)
    return {option.name: option.description for option in files(folders) if option.group == known[what] and option.path not in broken}


def _matching(lines: Mapping[str, str], pattern: str, command: str) -> dict[str, str]:
    from ngpt.config.errors import ConfigError

    wanted = pattern.lower()
    if set(wanted) & set("*?["):
        found = {name: line for name, line in lines.items() if fnmatch(name.lower(), wanted)}
    else:
        found = {name: line for name, line in lines.items() if wanted in f"{name} {line}".lower()}
    if not found:
        raise ConfigError(command, pattern, "None has it in its name or line", f"{command} shows all")
    return found
