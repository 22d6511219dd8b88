"""`ngpt train`: from a config to running processes, or to one rank of a world that torchrun or srun has started."""

import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from launch.devices import gpu_names
from launch.environment import World, current_world, recorded_variables, single_world, worker_environment, worker_variables
from launch.processes import run_and_tee, worker_command
from launch.run_folder import CONFIG_FILE, CONSOLE_FILE, check_resumable, first_failure, record_launch
from ngpt.config.compose import compose, dump
from ngpt.config.errors import ConfigError
from ngpt.config.schema import Config
from ngpt.data.manifest import check_against_model, verify

WORKER_LOGS = "logs"


def train(overrides: Sequence[str], config_dirs: Sequence[Path], command: Sequence[str]) -> int:
    """Trains one run to its end.

    Args:
        overrides: Hydra overrides.
        config_dirs: Config folders of the user.
        command: The command line, recorded with the run.

    Returns:
        The exit code of the workers.

    Raises:
        ConfigError: anything that can be known to be wrong before processes start.
    """
    config = compose(overrides, config_dirs)
    world = current_world(default_port=config.cluster.rendezvous_port)
    _check_world(config, world)
    check_resumable(config)
    _check_data(config)
    processes = world.local_size if world else config.cluster.gpus_per_node
    if world is None and processes == 1:
        world = single_world()
    environment = worker_environment(worker_variables(config, local_processes=processes, cuda=bool(gpu_names())), world)
    if world is not None and world.rank > 0:
        return _run_following_rank(config, environment)
    config_path = record_launch(config, command, recorded_variables(environment))
    return _run_first_rank(config_path, processes if world is None else 1, environment)


def _check_world(config: Config, world: World | None) -> None:
    """The number of processes asked for must be the number there is."""
    nodes, per_node = config.cluster.nodes, config.cluster.gpus_per_node
    if world is None:
        if nodes > 1:
            way_out = "Start it on every node with launch/torchrun.sh, or submit launch/slurm/train.sbatch"
            raise ConfigError("cluster.nodes", nodes, "ngpt train starts processes on this machine only", way_out)
        available = len(gpu_names())
        if 0 < available < per_node:
            way_out = f"Set cluster.gpus_per_node={available}, or hide the GPUs to run on the CPU: CUDA_VISIBLE_DEVICES="
            raise ConfigError("cluster.gpus_per_node", per_node, f"this machine has {available} visible GPUs", way_out)
    elif world.size != nodes * per_node:
        rule = f"{world.started_by} has started {world.size} processes"
        way_out = "Set cluster.nodes and cluster.gpus_per_node to what was started"
        raise ConfigError("cluster", f"{nodes} nodes * {per_node} processes", rule, way_out)


def _check_data(config: Config) -> None:
    """The token files must be those that were prepared, by the tokenizer configured here."""
    if config.data.mock:
        return
    sources = [*config.data.train, *config.data.valid]
    check_against_model(sources, config.tokenizer, config.model.vocab_size)
    for source in sources:
        verify(source.path)


def _run_first_rank(config_path: Path, processes: int, environment: dict[str, str]) -> int:
    """Runs rank 0, or all ranks where torchrun is ours; keeps the output and says in one line what failed."""
    run_dir = config_path.parent
    console = run_dir / CONSOLE_FILE
    code = run_and_tee(worker_command(["train", str(config_path)], processes, run_dir / WORKER_LOGS), environment, console)
    if code != 0:
        failure = first_failure(run_dir)
        cause = f"rank {failure['rank']}: {failure['error']}: {failure['message']}" if failure else f"workers ended with exit code {code}"
        print(f"ngpt train failed: {cause}\nWhole output: {console}", file=sys.stderr)
    return code


def _run_following_rank(config: Config, environment: dict[str, str]) -> int:
    """Runs another rank of a given world, from a config file of its own: rank 0 may be writing the run folder's at this moment."""
    with tempfile.TemporaryDirectory() as folder:
        config_path = Path(folder) / CONFIG_FILE
        dump(config, config_path)
        return run_and_tee(worker_command(["train", str(config_path)], 1, Path(folder)), environment, None)
