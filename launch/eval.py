"""`ngpt eval`: scores a checkpoint or an exported folder on lm-eval's tasks and in bits per byte. It needs no Megatron."""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from ngpt.config.errors import ConfigError
from ngpt.data.manifest import split_of
from ngpt.evaluation import OWN_SPLIT
from ngpt.evaluation.names import OPTIONS, check_folders, check_names
from ngpt.places import check_place

from .devices import gpu_names
from .environment import current_world, forbid_forks, sharing_variables, worker_environment
from .extras import check_extra
from .models import device_of, is_run, quiet_transformers
from .processes import worker_command
from .world import World, single_world

if TYPE_CHECKING:
    from ngpt.evaluation.run import Request

MODE = "eval"  # the mode of launch.worker


def run_eval(options: argparse.Namespace) -> int:
    """Evaluates in this process, in several that it starts, or as one rank of a world started by torchrun or srun.

    Args:
        options: as launch/commands/eval.py reads them.

    Returns:
        0, or the exit code of a process that failed.

    Raises:
        ConfigError: an option, the model, a task or a split is invalid.
    """
    tasks = [name for name in options.tasks.split(",") if name]
    _check(options, tasks)
    run, world = is_run(options.path, options.step), current_world()
    processes = _processes(options, run, world)
    from ngpt.evaluation.run import Request

    request = Request(
        path=str(options.path),
        is_run=run,
        tasks=tasks,
        include=list(map(str, options.include)),
        splits=options.split,
        fewshot=options.fewshot,
        limit=options.limit,
        step=options.step,
        dtype=options.dtype,
        device=device_of(options.device),
        batch_size=options.batch_size,
        seed=options.seed,
        out=None if options.out is None else str(options.out),
        as_json=options.json,
    )
    if processes == 1:
        evaluate(request, world or single_world())
        return 0
    return _share(request, processes)


def evaluate(request: "Request", world: World, results_file: Path | None = None) -> None:
    """Evaluates as one rank of a world. The first rank prints and keeps the results, or writes them to `results_file`."""
    import torch.distributed as dist

    from ngpt.evaluation.run import evaluate as results_of
    from ngpt.evaluation.run import finish

    quiet_transformers()
    forbid_forks()
    if world.size > 1:
        address = f"tcp://{world.master_addr}:{world.master_port}"
        dist.init_process_group("gloo", init_method=address, rank=world.rank, world_size=world.size)
    # What libraries print must not mix with the results, and must appear only once.
    with redirect_stdout(sys.stderr), open(os.devnull, "w") as nowhere, redirect_stderr(sys.stderr if world.rank == 0 else nowhere):
        results = results_of(request)
    if world.rank == 0:
        if results_file is None:
            finish(request, results)
        else:
            results_file.write_text(json.dumps(results), encoding="utf-8")
    if world.size > 1:
        dist.destroy_process_group()


def _share(request: "Request", processes: int) -> int:
    """Evaluates in several processes on this machine."""
    from ngpt.evaluation.run import finish

    with tempfile.TemporaryDirectory() as folder:
        results_file = Path(folder) / "results.json"
        command = worker_command([MODE, json.dumps(asdict(request)), str(results_file)], processes, Path(folder))
        done = subprocess.run(command, env=worker_environment(sharing_variables(processes), None), stdout=sys.stderr, check=False)
        if done.returncode == 0:
            finish(request, json.loads(results_file.read_bytes()))
    return done.returncode


def _check(options: argparse.Namespace, tasks: Sequence[str]) -> None:
    """Raises ConfigError for meaningless options, before anything heavy is imported."""
    if not tasks and not options.split:
        raise ConfigError("ngpt eval", "no --tasks and no --split", "There must be something to evaluate", "Set --split valid")
    for name, least in {"fewshot": 0, "limit": 1, "step": 0, "processes": 1, "batch_size": 1, "seed": 0}.items():
        value = getattr(options, name)
        if value is not None and value < least:
            raise ConfigError(f"--{name.replace('_', '-')}", value, f"It is at least {least}", "Give such a number, or leave it out")
    if options.out is not None:
        check_place("--out", options.out, is_file=True)
    check_folders(options.include, OPTIONS[1])
    for prefix in options.split:
        if prefix != OWN_SPLIT:
            split_of(prefix)
    if tasks:
        check_extra(OPTIONS[0], options.tasks, "lm_eval", "eval")
        check_names(tasks, options.include, OPTIONS)


def _processes(options: argparse.Namespace, run: bool, world: World | None) -> int:
    """How many processes to start here; 1 within a world, whose ranks are already running."""
    others = (options.processes or 1) if world is None else world.size
    if others > 1 and not run:
        rule = "lm-eval's own class evaluates an exported folder, in one process"
        raise ConfigError("--processes", others, rule, "Evaluate the run, or call accelerate launch -m lm_eval --model hf")
    if world is not None or not run:
        return 1
    return options.processes or (len(gpu_names()) if options.device != "cpu" else 0) or 1
