"""The `ngpt` command. Imports what a subcommand needs only when it is called: none but the workers and `generate` import torch."""

import argparse
import errno
import importlib.metadata
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from ngpt.config.errors import ConfigError
from ngpt.streams import abandon

USER_ERROR, FAILURE = 2, 1
# What a person has to put right. Others, those of network file systems say, may pass: a job may start again.
USERS_ERRNOS = {getattr(errno, name) for name in "ENOENT EACCES EPERM EISDIR ENOTDIR EEXIST EROFS ENOSPC EDQUOT ENAMETOOLONG".split()}
FULL = {errno.ENOSPC, errno.EDQUOT}
USAGE = """\
usage: ngpt COMMAND ...

  ngpt config experiment=NAME key=value ...   the resolved config with its parameter, token and FLOP counts
  ngpt estimate experiment=NAME key=value ... memory, step time and cost; --fit GPUS proposes parallel layouts
  ngpt train  experiment=NAME key=value ...   train; the same command again resumes the run
  ngpt launch experiment=NAME cluster=NAME ... submit it as a job of a cluster (SLURM); --dry-run prints the job's script
  ngpt status RUN [--json]                    what a run does: its job, steps, checkpoints, last failure
  ngpt stop   RUN                             have a run save and leave, and not come back
  ngpt data   fetch | prepare | inspect ...   get text and turn it into token files
  ngpt report RUN [RUN ...] [--out DIR]       losses, scales and differences of runs as HTML and PNG
  ngpt generate RUN|DIR [--prompt TEXT] ...   continue texts with a checkpoint or an exported folder; `ngpt sample RUN` is the short form
  ngpt export RUN --out DIR [--step N] ...    write a checkpoint as a folder that Hugging Face's transformers opens
  ngpt import DIR --run NAME                  make a run of such a folder, from whose weights others can start
  ngpt eval   RUN|DIR [--tasks ...] [--split ...] lm-eval's tasks, bits per byte of prepared text
  ngpt doctor [--json]                        what works on this machine, proved by numbers
  ngpt version

config, estimate, train and launch take --config-dir DIR for config files of your own, laid out like conf/. --help explains each command.
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command.

    Returns:
        0; 2 for an error of the user's, told on stderr without a traceback; the workers' exit code for train and export.
    """
    code = 0
    try:
        code = _run(list(sys.argv[1:] if arguments is None else arguments))
        print(end="", flush=True)  # here: over what fails at exit Python has the last word, and 120
        return code
    except ConfigError as error:
        print(error, file=sys.stderr)
        return USER_ERROR
    except BrokenPipeError:  # the reader of a pipe has seen enough: `ngpt ... | head`
        abandon(sys.stdout)
        return code
    except OSError as error:
        if error.filename is None and error.errno not in FULL:
            raise
        print(f"{error.filename or 'A disk'}: {error.strerror}", file=sys.stderr)
        if error.filename is None:  # it may be the one that takes what is printed
            abandon(sys.stdout)
        return USER_ERROR if error.errno in USERS_ERRNOS else FAILURE
    except KeyboardInterrupt:
        return 130


def _run(arguments: Sequence[str]) -> int:
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(USAGE, end="")
        return 0 if arguments else USER_ERROR
    name, *rest = arguments
    if name not in COMMANDS:
        print(f"ngpt: unknown command {name!r}. Commands: {', '.join(COMMANDS)}", file=sys.stderr)
        return USER_ERROR
    return COMMANDS[name](rest)


def _config(arguments: Sequence[str]) -> int:
    from launch.unchecked import check_unchecked
    from ngpt.config.cli import main as config_main

    return config_main(arguments, check_unchecked)


def _estimate(arguments: Sequence[str]) -> int:
    from ngpt.estimate.cli import main as estimate_main

    return estimate_main(arguments)


def _train(arguments: Sequence[str]) -> int:
    from launch.leaving import signals_leave

    with signals_leave():  # from here on, while the rest is imported
        return _train_within(arguments)


def _train_within(arguments: Sequence[str]) -> int:
    from launch.train import train, train_config
    from ngpt.config.compose import load

    parser = argparse.ArgumentParser(prog="ngpt train", description="Train a run, or continue it where it stopped.")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="experiment=NAME, GROUP=NAME or key=value")
    parser.add_argument("--config-dir", type=Path, action="append", default=[], metavar="DIR", help="your own folder, laid out like conf/")
    parser.add_argument("--config", type=Path, metavar="FILE", help="a resolved config (config.yaml of a run) instead of all of these")
    options = parser.parse_intermixed_args(arguments)
    if options.config is not None:
        if options.overrides or options.config_dir:
            raise ConfigError("--config", options.config, "Is the whole config", "Leave out overrides and --config-dir")
        return train_config(load(options.config), ["ngpt", "train", *arguments])
    return train(options.overrides, options.config_dir, ["ngpt", "train", *arguments])


def _launch(arguments: Sequence[str]) -> int:
    from launch.submit import main as launch_main

    return launch_main(arguments)


def _status(arguments: Sequence[str]) -> int:
    from launch.status import main as status_main

    return status_main(arguments)


def _stop(arguments: Sequence[str]) -> int:
    from launch.stop import main as stop_main

    return stop_main(arguments)


def _data(arguments: Sequence[str]) -> int:
    from ngpt.data.cli import main as data_main

    return data_main(arguments)


def _report(arguments: Sequence[str]) -> int:
    from ngpt.analysis.cli import main as report_main

    return report_main(arguments)


def _generate(arguments: Sequence[str]) -> int:
    from launch.generate import main as generate_main

    return generate_main(arguments)


def _sample(arguments: Sequence[str]) -> int:
    from launch.generate import sample

    parser = argparse.ArgumentParser(prog="ngpt sample", description="Continues a text with the newest checkpoint of a run.")
    parser.add_argument("run", type=Path, help="run folder")
    parser.add_argument("--prompt", default="", help="text to continue; empty: from the start of a document")
    parser.add_argument("--tokens", type=int, default=200, help="tokens to generate (default: %(default)s)")
    options = parser.parse_args(arguments)
    return sample(options.run, options.prompt, options.tokens)


def _export(arguments: Sequence[str]) -> int:
    from launch.export import main as export_main

    return export_main(arguments)


def _eval(arguments: Sequence[str]) -> int:
    from launch.eval import main as eval_main

    return eval_main(arguments)


def _import(arguments: Sequence[str]) -> int:
    from launch.importing import main as import_main

    return import_main(arguments)


def _doctor(arguments: Sequence[str]) -> int:
    from launch.doctor import main as doctor_main

    return doctor_main(arguments)


def _version(_arguments: Sequence[str]) -> int:
    for package in ("ngpt-megatron", "megatron-core", "torch"):
        print(package, importlib.metadata.version(package))
    return 0


COMMANDS: dict[str, Callable[[Sequence[str]], int]] = {
    "config": _config,
    "estimate": _estimate,
    "train": _train,
    "launch": _launch,
    "status": _status,
    "stop": _stop,
    "data": _data,
    "report": _report,
    "generate": _generate,
    "sample": _sample,
    "export": _export,
    "import": _import,
    "eval": _eval,
    "doctor": _doctor,
    "version": _version,
}


if __name__ == "__main__":
    sys.exit(main())
