"""`ngpt launch`."""

import argparse

from ..arguments import Parser, add_overrides, check_parallel, config_dirs, recorded_command
from .train import explain_words


def add_arguments(parser: Parser) -> None:
    parser.description = (
        "Submit a run to the cluster's scheduler; with -m, a sweep as an array of jobs. "
        "Without a scheduler (cluster.scheduler=none) train here."
    )
    parser.explain = explain_words
    add_overrides(parser, sweeps=True)
    parser.add_argument("--dry-run", action="store_true", help="print the job's script and stop; nothing is written")


def run(options: argparse.Namespace) -> int:
    parallel = check_parallel(options)
    if options.multirun:
        from ..submit_sweep import launch_sweep

        command = recorded_command(options)
        return launch_sweep(options.overrides, config_dirs(options), command, parallel, options.per_gpu, options.dry_run)
    from ..submit import launch

    return launch(options.overrides, config_dirs(options), recorded_command(options), options.dry_run)
