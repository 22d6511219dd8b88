"""The `ngpt` command: the table of commands, and what they share. A command's own modules are imported when it is called."""

import argparse
import errno
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import Any

from ngpt.streams import abandon

from .arguments import USER_ERROR, Parser

FAILURE = 1
# Errors that a person has to fix. Others, such as those of network file systems, may go away: a job may restart.
USERS_ERRNOS = {getattr(errno, name) for name in "ENOENT EACCES EPERM EISDIR ENOTDIR EEXIST EROFS ENOSPC EDQUOT ENAMETOOLONG".split()}
FULL = {errno.ENOSPC, errno.EDQUOT}


@dataclass(frozen=True)
class Command:
    """A command.

    Attributes:
        name: the word that calls it.
        module: in commands/, with `add_arguments(parser)` and `run(options) -> int`, which returns the exit code.
        help: its line in `ngpt --help`.
    """

    name: str
    module: str
    help: str


COMMANDS = (
    Command("config", "config", "the resolved config with its parameter, token and FLOP counts"),
    Command("list", "listing", "experiments, files of groups and keys, with one line each"),
    Command("estimate", "estimate", "memory, step time and cost of a run; --fit GPUS proposes parallel layouts"),
    Command("train", "train", "train; the same command again resumes the run"),
    Command("launch", "launch", "submit a run as a job of a cluster (SLURM); --dry-run prints the job's script"),
    Command("status", "status", "what a run does: its job, steps, checkpoints, last failure"),
    Command("stop", "stop", "have a run save and leave, and not come back"),
    Command("data", "data", "get text and turn it into token files: fetch, prepare, inspect"),
    Command("study", "study", "test a claim: train and compare the arms of a study, and write a page"),
    Command("report", "report", "losses, scales and differences of runs as HTML and PNG"),
    Command("generate", "generate", "continue texts with a checkpoint or an exported folder"),
    Command("sample", "sample", "the short form of generate: one text, kept in the run folder"),
    Command("export", "export", "write a checkpoint as a folder that Hugging Face's transformers opens"),
    Command("import", "importing", "make a run of such a folder, from whose weights others can start"),
    Command("eval", "eval", "lm-eval's tasks and bits per byte of prepared text, of a run or an exported folder"),
    Command("analyze", "analyze", "signal-to-noise, quantised loss, flatness and curvature of a trained model"),
    Command("doctor", "doctor", "what works on this machine, proved by numbers"),
    Command("completion", "completion", "the script with which bash or zsh completes commands, groups, experiments and keys"),
    Command("version", "version", "versions of this package, Megatron-core and torch"),
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command.

    Returns:
        0; 2 for a user's error, reported on stderr without a traceback; the workers' exit code for train and export.
    """
    code = 0
    try:
        code = _run(list(sys.argv[1:] if arguments is None else arguments))
        print(end="", flush=True)  # flush here: if it failed at exit, Python would exit with 120
        return code
    except BrokenPipeError:  # the reader closed the pipe: `ngpt ... | head`
        abandon(sys.stdout)
        return code
    except OSError as error:
        if error.filename is None and error.errno not in FULL:
            raise
        print(f"{error.filename or 'A disk'}: {error.strerror}", file=sys.stderr)
        if error.filename is None:  # stdout may be on the full disk
            abandon(sys.stdout)
        return USER_ERROR if error.errno in USERS_ERRNOS else FAILURE
    except KeyboardInterrupt:
        return 130
    except ValueError as error:
        from ngpt.config.errors import ConfigError  # its package imports Hydra, which takes half a second

        if not isinstance(error, ConfigError):
            raise
        print(error, file=sys.stderr)
        return USER_ERROR


def _run(words: list[str]) -> int:
    if words[:1] == ["help"]:
        words = [*words[1:], "--help"]
    name = words[0] if words else ""
    try:
        reader = parser(name)
        if not words:
            reader.print_help()
            return USER_ERROR
        options = reader.read(words)
    except SystemExit as left:  # from argparse, which has printed why
        return int(left.code or 0)
    options.command, options.words = name, words[1:]
    return _module(name).run(options)


def parser(name: str | None = None) -> Parser:
    """The parser of all commands.

    Args:
        name: the command whose arguments are needed; None: all commands.
    """
    root = Parser(prog="ngpt", description="Pretraining of normalised transformers. `ngpt COMMAND --help` explains each command.")
    root.add_argument("--version", action=_Version, nargs=0, help="print versions and leave")
    commands = root.add_subparsers(metavar="COMMAND", required=True)
    for command in COMMANDS:
        of_command = commands.add_parser(command.name, help=command.help, description=f"{command.help[0].upper()}{command.help[1:]}.")
        if name in (None, command.name):
            _module(command.name).add_arguments(of_command)
    return root


def _module(name: str) -> Any:
    (module,) = (command.module for command in COMMANDS if command.name == name)
    return import_module(f".commands.{module}", __package__)


class _Version(argparse.Action):
    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> None:
        _module("version").run(None)
        parser.exit()


if __name__ == "__main__":
    sys.exit(main())
