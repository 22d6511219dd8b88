"""`ngpt train`: from a config to running processes, or to one rank of a world started by torchrun or srun."""

import math
import signal
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from pathlib import Path

import psutil

from ngpt.config.compose import compose, dump
from ngpt.config.errors import ConfigError
from ngpt.config.executor import check_machine
from ngpt.config.schema import Config
from ngpt.data.manifest import check_against_model
from ngpt.data.validation import evaluation_sequences, sequences_of_split
from ngpt.data.verify import verify
from ngpt.places import check_place
from ngpt.rollbacks import read_rollbacks

from .devices import gpu_names
from .ending import ending
from .environment import (
    current_world,
    overruled,
    recorded_variables,
    unseen_gpus,
    variable_origins,
    worker_environment,
    worker_variables,
)
from .extras import check_extras
from .failures import cause
from .hf_exports import check_exportable, hf_exports
from .leaving import signals_leave
from .memory import check_memory
from .outcome import SIGNALLED, SIGNALLED_CODE, Outcome, record_outcome
from .processes import INTERRUPTED, prints_into, run_and_tee, worker_command
from .resumable import check_resumable, resume_notes
from .run_folder import (
    CONFIG_FILE,
    CONSOLE_FILE,
    describe_death,
    first_failure,
    lock_folders,
    locked_run,
    lost_a_peer,
    nothing_left,
    outcome_of,
    record_death,
    record_failure,
    record_interrupt,
    record_launch,
)
from .world import World, check_port_free, single_world

FAILURE = 1
RANKS_APART_SECONDS = 60.0  # at most, between the starts of a world's ranks, clock differences included
OTHERS_SECONDS = 3.0  # how long a rank that lost another one waits for that rank's own record


def train(overrides: Sequence[str], config_dirs: Sequence[Path], command: Sequence[str]) -> int:
    """Composes a config from Hydra overrides and the user's config folders, and trains it (`train_config`)."""
    return train_config(compose(overrides, config_dirs), command)


def train_config(config: Config, command: Sequence[str]) -> int:
    """Trains one run until it ends, or as one rank of a world started by torchrun or srun.

    Args:
        config: The resolved config.
        command: The command line, recorded with the run.

    Returns:
        0 if it finished or reached train.stop_after; 75 if a signal ended it with its newest step saved; 2 for a user's mistake that
        only the workers can detect; anything else is a failure.

    Raises:
        ConfigError: any mistake that can be found before processes start.
    """
    with signals_leave():
        return _train(config, command)


def _train(config: Config, command: Sequence[str]) -> int:
    world = current_world(default_port=config.cluster.rendezvous_port)
    try:
        notes = check_start(config, world)
    except ConfigError as error:
        if world is not None and world.started_by == "srun":  # the job's script needs to know whether a restart would repeat it
            record_failure(Path(config.run.dir), world.rank, error, time.time())
        raise
    if (done := nothing_left(config, verify=world is None)) is not None:
        print(done)
        if config.checkpoint.hf and (world is None or world.rank == 0):  # the launch that trained may have ended before the exports
            console = Path(config.run.dir) / CONSOLE_FILE
            with locked_run(config), hf_exports(config, lambda line: _tell(console, line)) as exports:
                exports.finish(asked=[])
        return 0
    for note in notes:
        print(note, file=sys.stderr)
    cuda = bool(gpu_names())
    processes = config.cluster.gpus_per_node if world is None else world.local_size
    check_memory(config, processes, cuda)
    variables = worker_variables(config, processes, cuda)
    if world is not None:
        return _run_one_rank(config, world, variables, command)
    return _run_all_ranks(config, processes, variables, command)


def check_start(config: Config, world: World | None, verified: set[str] | None = None) -> list[str]:
    """Checks everything that can be checked before processes start.

    Args:
        verified: Split prefixes whose files need no check; those checked here are added.

    Returns:
        What a person should know about the start; [] on all ranks but the first.

    Raises:
        ConfigError: the run cannot start like this.
    """
    _check_world(config, world)
    for key, folder in lock_folders(config).items():
        check_place(key, folder)
    check_extras(config)
    check_resumable(config)
    if nothing_left(config) is None:  # a finished run needs nothing of the machine
        check_machine(config, bool(gpu_names()))
    _check_data(config, world, set() if verified is None else verified)
    if world is not None and world.rank != 0:
        return []
    check_exportable(config)
    return [*resume_notes(config), *overruled(config), *unseen_gpus(config)]


def _check_world(config: Config, world: World | None) -> None:
    """Checks that there are as many processes as the config asks for."""
    nodes, per_node = config.cluster.nodes, config.cluster.gpus_per_node
    if world is None:
        if nodes > 1:
            way_out = "Start it on every node with launch/torchrun.sh, or submit it: ngpt launch cluster=slurm_..."
            raise ConfigError("cluster.nodes", nodes, "ngpt train starts processes on this machine only", way_out)
        available = len(gpu_names())
        if 0 < available < per_node:
            way_out = f"Set cluster.gpus_per_node={available}, or hide the GPUs to run on the CPU: CUDA_VISIBLE_DEVICES="
            raise ConfigError("cluster.gpus_per_node", per_node, f"This machine has {available} visible GPUs", way_out)
    elif world.size != nodes * per_node:
        rule = f"{world.started_by} has started {world.size} processes"
        way_out = "Set cluster.nodes and cluster.gpus_per_node to what was started"
        raise ConfigError("cluster", f"{nodes} nodes * {per_node} processes", rule, way_out)


def _check_data(config: Config, world: World | None, verified: set[str]) -> None:
    """Checks that the token files are as prepared, and by the configured tokenizer. Only the first rank reads them."""
    check_prepared(config)
    if not config.data.mock and (world is None or world.rank == 0):
        for path in dict.fromkeys(source.path for source in [*config.data.train, *config.data.valid]):
            if path not in verified:
                verify(path, record_folder=Path(config.data.cache_dir))
                verified.add(path)


def check_prepared(config: Config) -> None:
    """The part of `_check_data` that reads manifests only."""
    if not config.data.mock:
        check_against_model([*config.data.train, *config.data.valid], config.tokenizer, config.model.vocab_size)
        for source in config.data.valid if evaluation_sequences(config) else []:
            sequences_of_split(source.path, config.train.seq_length)  # refuses one without a whole sequence


def _run_all_ranks(config: Config, processes: int, variables: dict[str, str], command: Sequence[str]) -> int:
    """Runs every rank on this machine, keeps their output, and prints in one line how they ended."""
    run_dir = Path(config.run.dir)
    environment = worker_environment(variables, single_world() if processes == 1 else None)
    rollbacks = len(read_rollbacks(run_dir))
    console, asked = run_dir / CONSOLE_FILE, list[signal.Signals]()
    with locked_run(config), hf_exports(config, lambda line: _tell(console, line)) as exports:
        check_resumable(config)  # again: until it was locked, another launch may have trained here
        config_path = record_launch(config, command, recorded_variables(environment), variable_origins(config, variables))
        _begin_log(console)
        workers = worker_command(["train", str(config_path)], processes, run_dir)
        code = run_and_tee(
            workers, environment, console, processes - 1, forwarded=asked, meanwhile=lambda: exports.look(leaving=bool(asked))
        )
        if code != 0 and processes == 1:  # with several workers, the agent records it
            record_death(run_dir, 0, code, time.time())
        if _came_to_its_end(run_dir):
            exports.finish(asked)
    if code != 0 and len(made := read_rollbacks(run_dir)) > rollbacks:  # as often as train.max_rollbacks allows
        print(f"ngpt train goes back to step {made[-1]['to']}: {made[-1]['why']}", file=sys.stderr)
        if not asked:
            return _run_all_ranks(config, processes, variables, command)
        # The signal reached the ranks as they were leaving, with no step to save.
        record_outcome(run_dir, Outcome(SIGNALLED, made[-1]["to"], asked[0].name, saved=True))
    code = _ended(run_dir, code, "" if prints_into(console, sys.stderr) else f"\nWhole output: {console}")
    if code == 0 and (lines := ending(run_dir)):
        print(lines)
    return code


def _run_one_rank(config: Config, world: World, variables: dict[str, str], command: Sequence[str]) -> int:
    """Runs this process's rank of a given world. Rank 0 records the launch. The last rank prints the progress, and keeps the output.

    Returns:
        0 even if a signal ended the run with its newest step saved: at any other code, torchrun and srun would end the other ranks.
        Whoever started the world reads the outcome in the run folder.
    """
    run_dir = Path(config.run.dir)
    environment = worker_environment(variables, world)
    console = run_dir / CONSOLE_FILE if world.rank == world.size - 1 else None
    if world.rank == 0 and world.started_by == "srun":  # under torchrun, torchrun itself listens there
        try:
            check_port_free(world)
        except ConfigError as error:
            print(error, file=sys.stderr)
            return FAILURE  # not the code for a user's mistake, which ends a job for good: its next start takes another port
    asked = list[signal.Signals]()
    with ExitStack() as stack, tempfile.TemporaryDirectory() as folder:
        exports = None
        if world.rank == 0:
            in_job = world.started_by == "srun"
            try:
                stack.enter_context(locked_run(config))
            except ConfigError as error:
                if not in_job:
                    raise
                print(error, file=sys.stderr)  # ranks of a lost node may still hold the lock; it is free by the job's next start
                return FAILURE
            check_resumable(config)  # again: until it was locked, another launch may have trained here
            variables_from = variable_origins(config, variables)
            before = psutil.Process().create_time() - RANKS_APART_SECONDS if in_job else math.inf
            record_launch(config, command, recorded_variables(environment), variables_from, before)
            exports = stack.enter_context(hf_exports(config, lambda line: _tell(run_dir / CONSOLE_FILE, line)))
        # A separate config file: the one in the run folder may still be an earlier launch's.
        config_path = Path(folder) / CONFIG_FILE
        dump(config, config_path)
        if console is not None:
            _begin_log(console)
        code = run_and_tee(
            worker_command(["train", str(config_path)], 1, run_dir),
            environment,
            console,
            forwarded=asked,
            meanwhile=lambda: exports.look(leaving=bool(asked)) if exports else None,
        )
        if code != 0:
            record_death(run_dir, world.rank, code, time.time())
        if exports and _came_to_its_end(run_dir):
            exports.finish(asked)
    if code == 0:
        return 0
    return _ended(run_dir, code) if world.rank == 0 else exit_code(code)


def _begin_log(console: Path) -> None:
    _log(console, f"\n== ngpt train, {time.strftime('%Y-%m-%d %H:%M:%S %z')}")


def _came_to_its_end(run_dir: Path) -> bool:
    """Whether the run has trained and saved everything that this launch was to train."""
    outcome = outcome_of(run_dir)
    return outcome is not None and outcome.exit_code == 0


def _tell(console: Path, line: str) -> None:
    """Prints a line alongside the workers' output."""
    if not prints_into(console, sys.stderr):
        _log(console, line)
    with suppress(OSError, ValueError):  # if nobody reads the output any more, the run goes on
        print(line, file=sys.stderr, flush=True)


def _log(console: Path, line: str) -> None:
    with suppress(OSError), console.open("a", encoding="utf-8") as stream:
        stream.write(f"{line}\n")


def _ended(run_dir: Path, code: int, hint: str = "") -> int:
    """Prints how the workers ended if they did not simply finish, and returns the exit code of `ngpt train`."""
    outcome = outcome_of(run_dir)
    if outcome is None and code == SIGNALLED_CODE:
        outcome = Outcome(SIGNALLED)
    line, console = None, run_dir / CONSOLE_FILE
    if outcome is not None:  # a rank that leaves ends the others, so their exit codes do not matter
        line, code = outcome.line, outcome.exit_code
    elif code == INTERRUPTED:
        record_interrupt(run_dir)
        line = "interrupted twice: the workers were killed; the same command goes on from the newest checkpoint, if there is one"
    else:
        line, code = f"failed: {_cause(run_dir, code)}", exit_code(code) or FAILURE
    if line is not None:
        if not prints_into(console, sys.stderr):
            _log(console, f"ngpt train {line}")
        print(f"ngpt train {line}{hint if line.startswith('failed') else ''}", file=sys.stderr)
    return code


def exit_code(code: int) -> int:
    """The exit code to report for a process: 128 + n if signal n ended it."""
    return 128 - code if code < 0 else code


def _cause(run_dir: Path, code: int) -> str:
    deadline = time.monotonic() + OTHERS_SECONDS
    while True:
        failure = first_failure(run_dir)
        if failure is not None and not lost_a_peer(failure):
            break
        if time.monotonic() > deadline:  # ranks on other machines are reported by their own launchers
            break
        time.sleep(0.1)
    return cause(run_dir, failure) if failure else f"what started the workers {describe_death(code)}"
