"""`ngpt completion bash | zsh`: the script that completes commands, options, and the words of a config.

Words come from lists that are part of the script. File names in the user's folders are looked up by the shell itself. So pressing tab
never starts Python.
"""

import argparse
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

from ..arguments import Parser

SHELLS = ("bash", "zsh")
BOOLEAN = "true | false"
_HELP = """\
bash, in ~/.bashrc:  eval "$(ngpt completion bash)"
zsh, in ~/.zshrc behind compinit:  eval "$(ngpt completion zsh)"
Or kept in a file, which shells open faster, and which is to be written again with each version:
  ngpt completion bash > ~/.local/share/bash-completion/completions/ngpt
  ngpt completion zsh > FOLDER/_ngpt    (FOLDER: one of $fpath)"""


def add_arguments(parser: Parser) -> None:
    parser.explain = _HELP.strip
    parser.add_argument("shell", choices=SHELLS)


def run(options: argparse.Namespace) -> int:
    print(script(options.shell))
    return 0


def script(shell: str) -> str:
    """The script for one of SHELLS."""
    import shtab

    from ..cli import parser

    ours = Path(__file__).with_name(f"completion.{shell}").read_text(encoding="utf-8")
    if shell == "zsh":  # shtab's last lines register the function
        made = shtab.complete(parser(), shell, preamble=f"{_zsh_lists()}\n{ours}")
        return re.sub(r'"\(\*\)::?', '"*:', made)  # "(*):" excludes all other words, so shtab would end a list after its first word
    return f"{shtab.complete(parser(), shell)}\n\n{_bash_lists()}\n{ours}"


def _bash_lists() -> str:
    values = [f"{key}={value}" for key, described in _values().items() for value in described]
    lists = {"_ngpt_keys": [f"{key}=" for key in _keys()], "_ngpt_values": values, "_ngpt_group_names": list(_listed())}
    return "\n".join(f"{name}=({shlex.join(words)})" for name, words in lists.items())


def _zsh_lists() -> str:
    arrays = {"_ngpt_keys": _keys(), "_ngpt_group_names": _listed()}
    lines = [f"{name}=({shlex.join(_described(lines))})" for name, lines in arrays.items()]
    values = [word for key, described in _values().items() for word in (key, "\n".join(_described(described)))]
    return "\n".join([*lines, f"typeset -gA _ngpt_values=({shlex.join(values)})"])


def _described(lines: dict[str, str]) -> Iterator[str]:
    """Names with their lines, in the form that _describe takes."""
    return (f"{name}:{line}" for name, line in lines.items())


def _keys() -> dict[str, str]:
    """What may precede =: groups, and keys that are not entries of lists or mappings."""
    from ngpt.config.describe import groups, keys

    return groups() | {key.name: key.description for key in keys() if "NAME" not in key.name and "[]" not in key.name}


def _listed() -> dict[str, str]:
    """What `ngpt list` lists."""
    from ngpt.config.describe import groups
    from ngpt.config.folders import EXPERIMENT

    from .listing import EXPERIMENTS, KEYS

    return {EXPERIMENTS: "runs by name", KEYS: "single values"} | {name: line for name, line in groups().items() if name != EXPERIMENT}


def _values() -> dict[str, dict[str, str]]:
    """Group -> its files, key -> its values, each with its line."""
    from ngpt.config.describe import keys
    from ngpt.config.folders import options

    values: dict[str, dict[str, str]] = {}
    for option in options():
        values.setdefault(option.group, {})[option.name] = option.description
    for key in keys():
        if key.choices and not key.is_list:
            values[key.name] = {"null" if value is None else str(value): line for value, line in key.choices.items()}
        elif key.kind.startswith(BOOLEAN):
            values[key.name] = {word: "" for word in BOOLEAN.split(" | ")}
    return values
