"""What the commands' parsers share. Imports nothing slow: the command line is read before the command's own modules are imported."""

import argparse
import difflib
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

USER_ERROR = 2
DEVICES, DTYPES = ("auto", "cpu", "cuda"), ("float32", "bfloat16")  # for commands that use a trained model
# Functions that shtab calls to complete an argument; defined in launch/commands/completion.{bash,zsh}.
WORDS, GROUPS = ({"bash": name, "zsh": name} for name in ("_ngpt_words", "_ngpt_groups"))


class Parser(argparse.ArgumentParser):
    """A parser that reports an error in one line, and accepts options before, between and after other words.

    Attributes:
        commands: its subcommands by name.
        explain: returns the text that `--help` prints after the options; called only for `--help`.
    """

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.allow_abbrev = False
        self.commands: dict[str, Parser] = {}
        self.explain: Callable[[], str] | None = None

    def add_subparsers(self, **options: Any) -> Any:
        action = super().add_subparsers(**options)
        self.commands = action.choices
        return action

    def read(self, words: Sequence[str]) -> argparse.Namespace:
        """The options of the command that the words name. Exits with 2 for words that cannot be parsed, with 0 after --help."""
        if not self.commands:
            return self.parse_intermixed_args(words)
        if not words or words[0].startswith("-"):
            return self.parse_args(words)
        name, *rest = words
        if name not in self.commands:
            near = difflib.get_close_matches(name, self.commands, n=2)
            meant = f"Did you mean {' or '.join(near)}? " if near else ""
            self.exit(USER_ERROR, f"{self.prog}: unknown command {name!r}. {meant}Commands: {', '.join(self.commands)}\n")
        return self.commands[name].read(rest)

    def error(self, message: str) -> NoReturn:
        unknown = re.match(r"unrecognized arguments: (--[\w-]+)", message)
        known = [option for option, action in self._option_string_actions.items() if not isinstance(action, _Refused)]
        near = difflib.get_close_matches(unknown[1], known, n=1) if unknown else []
        takes_words = any(action.dest == "overrides" for action in self._actions)
        meant = f". Did you mean {near[0]}?" if near else f". {self.prog} --help explains"
        if unknown and not near and takes_words:
            meant = f". Words of the config have no dashes: {unknown[1].lstrip('-')}=VALUE{meant}"
        self.exit(USER_ERROR, f"{self.prog}: {message}{meant}\n")

    def format_help(self) -> str:
        return super().format_help() + (f"\n{self.explain()}\n" if self.explain else "")


class _Refused(argparse.Action):
    """An option that Hydra users may expect but `ngpt` lacks; `const` says why, and what to use instead."""

    def __call__(self, parser: argparse.ArgumentParser, namespace: Any, values: Any, option_string: str | None = None) -> NoReturn:
        from ngpt.config.errors import ConfigError  # its package imports Hydra, which takes half a second

        rule, way_out = self.const
        raise ConfigError(str(option_string), f"Is no option of {parser.prog}", rule, way_out)


_COMPOSES = "Hydra only composes the config here"
_ONE_RUN = "Several values are several runs, and this command is about one"
HYDRA_OPTIONS = {
    ("-c", "--cfg"): (_COMPOSES, "ngpt config WORDS prints the resolved config"),
    ("--resolve",): (_COMPOSES, "ngpt config WORDS prints the config, which is always resolved"),
    ("-p", "--package"): (_COMPOSES, "ngpt config WORDS prints the config; --json helps to pick a section"),
    ("-i", "--info", "--hydra-help"): (_COMPOSES, "ngpt list shows groups, files and keys, ngpt config WORDS what comes of them"),
    ("-cn", "--config-name"): (_COMPOSES, "experiment=NAME chooses a run; your own is DIR/experiment/NAME.yaml, with --config-dir DIR"),
    ("-cp", "--config-path"): (_COMPOSES, "--config-dir FOLDER adds a folder of your own, laid out like conf/"),
    ("-r", "--run"): ("That is what it does without", "Leave it out"),
    ("-s", "--shell-completion"): (_COMPOSES, "ngpt completion bash prints the script by which a shell completes words"),
    ("--experimental-rerun",): (_COMPOSES, "The command in environment.json of a run folder repeats it"),
}


def completed(action: argparse.Action, kind: str | dict[str, str]) -> None:
    """Sets what completion offers for an argument: directory | file, WORDS or GROUPS."""
    action.complete = kind  # type: ignore[attr-defined]


def add_path(parser: argparse.ArgumentParser, *names: str, kind: str = "directory", **options: Any) -> None:
    """Adds an argument that is a path; `kind` decides how it is completed."""
    completed(parser.add_argument(*names, type=Path, **options), kind)


def add_config_dir(parser: argparse.ArgumentParser) -> None:
    """Adds `--config-dir`; `config_dirs` reads it."""
    what = "your own folder, laid out like conf/; may be given several times (default: those of NGPT_CONFIG_DIR)"
    add_path(parser, "--config-dir", action="append", metavar="DIR", help=what)


def add_overrides(parser: argparse.ArgumentParser, sweeps: bool = False) -> None:
    """Adds the words that make a config: overrides and --config-dir.

    Args:
        sweeps: Whether the command can make one run per value (-m).
    """
    what = "experiment=NAME, GROUP=NAME or key=value"
    completed(parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help=what), WORDS)
    add_config_dir(parser)
    if sweeps:
        what = "a run for each combination of values: optim.lr=1e-3,3e-3 train.seed=range(1,4) model=glob(*)"
        parser.add_argument("-m", "--multirun", action="store_true", help=what.replace("%", "%%"))
        what = "with -m: members that run at a time, each on GPUs of its own (default: 1; of a cluster: as many as it starts)"
        parser.add_argument("--parallel", type=int, metavar="N", help=what)
        add_per_gpu(parser, "with -m: members")
    else:
        rule = (_ONE_RUN, "Leave it out; ngpt train -m and ngpt launch -m sweep")
        parser.add_argument("-m", "--multirun", nargs=0, action=_Refused, const=rule, help=argparse.SUPPRESS)
    for names, reason in HYDRA_OPTIONS.items():
        free = [name for name in names if name not in parser._option_string_actions]
        parser.add_argument(*free, nargs="?", action=_Refused, const=reason, help=argparse.SUPPRESS)


def add_per_gpu(parser: argparse.ArgumentParser, who: str) -> None:
    """Adds `--per-gpu`; `who` begins its help."""
    what = f"{who} of one GPU that may share it, for models that leave it half idle; their speeds say little (default: %(default)s)"
    parser.add_argument("--per-gpu", type=int, default=1, metavar="K", help=what)


def check_parallel(options: argparse.Namespace) -> int | None:
    """The value of --parallel, None if it is not given.

    Raises:
        ConfigError: it or --per-gpu is given without -m, or it is not a valid number of members.
    """
    from ngpt.config.errors import ConfigError

    if options.per_gpu != 1 and not options.multirun:
        raise ConfigError("--per-gpu", options.per_gpu, "Says how many members of a sweep share a GPU", "Add -m, or leave it out")
    if options.parallel is not None and not options.multirun:
        raise ConfigError("--parallel", options.parallel, "Says how many members of a sweep run at a time", "Add -m, or leave it out")
    if options.parallel is not None and options.parallel < 1:
        raise ConfigError("--parallel", options.parallel, "Members that run at a time are 1 or more", "Set --parallel 1, or leave it out")
    return options.parallel


def config_dirs(options: argparse.Namespace) -> list[Path]:
    """The user's folders of config files: from --config-dir, else from NGPT_CONFIG_DIR.

    Raises:
        ConfigError: NGPT_CONFIG_DIR names something that is not a folder.
    """
    if options.config_dir:
        return options.config_dir
    from .environment import user_config_dirs

    return user_config_dirs()


def recorded_command(options: argparse.Namespace) -> list[str]:
    """The command line that is recorded with a run. It means the same without NGPT_CONFIG_DIR."""
    folders = [] if options.config_dir or not getattr(options, "overrides", True) else config_dirs(options)
    return ["ngpt", options.command, *options.words, *(f"--config-dir={folder}" for folder in folders)]
