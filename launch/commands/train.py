"""`ngpt train`."""

import argparse

from ..arguments import Parser, add_overrides, add_path, check_parallel, config_dirs, recorded_command


def add_arguments(parser: Parser) -> None:
    parser.description = "Train a run, or continue it where it stopped. With -m, a sweep: a run for each combination of values."
    parser.explain = explain_words
    add_overrides(parser, sweeps=True)
    what = "a resolved config (config.yaml of a run) instead of all of these"
    add_path(parser, "--config", kind="file", metavar="FILE", help=what)


def run(options: argparse.Namespace) -> int:
    from ..leaving import signals_leave

    with signals_leave():  # from here on, while the rest is imported
        return _run(options)


def _run(options: argparse.Namespace) -> int:
    from ngpt.config.compose import load
    from ngpt.config.errors import ConfigError

    from ..train import train, train_config

    parallel = check_parallel(options)
    if options.multirun and options.config is None:
        from ..sweep import train_sweep

        return train_sweep(options.overrides, config_dirs(options), recorded_command(options), parallel or 1, options.per_gpu)
    if options.config is None:
        return train(options.overrides, config_dirs(options), recorded_command(options))
    if options.overrides or options.config_dir or options.multirun:
        raise ConfigError("--config", options.config, "Is the whole config", "Leave out overrides, --config-dir and -m")
    return train_config(load(options.config), recorded_command(options))


def explain_words() -> str:
    """What the words of a config are, for `--help`."""
    from ngpt.config.describe import groups
    from ngpt.config.folders import EXPERIMENT, options

    from ..environment import user_config_dirs
    from .listing import table

    experiments = {option.name: option.description for option in options(user_config_dirs()) if option.group == EXPERIMENT}
    return "\n".join(
        [
            "words, in any order; the last two replace what the experiment says:",
            "  experiment=NAME   a whole run by its name, from the list below",
            "  GROUP=NAME        a file of a group: precision=nvfp4_paper; `ngpt list GROUP` shows them",
            "  KEY=VALUE         a single value: train.steps=50; `ngpt list keys [PATTERN]` shows them",
            "The run is in runs/NAME of its experiment, or as run.name says. The same command again goes on from its newest checkpoint.",
            "With -m a comma stands between values, KEY=VALUE,VALUE, and range(1,4), choice(...) and glob(*) are several, too. The sweep",
            "is in runs/NAME-sweep, or as run.name says, a folder a member. The same command again runs what is not done.",
            "",
            "groups:",
            *table({name: line for name, line in groups().items() if name != EXPERIMENT}),
            "",
            "experiments:",
            *table(experiments),
        ]
    )
