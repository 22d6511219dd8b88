"""`ngpt sample`: one worker with the environment of a single-process run."""

import subprocess
from pathlib import Path

from launch.devices import gpu_names
from launch.environment import worker_environment, worker_variables
from launch.processes import worker_command
from launch.run_folder import CONFIG_FILE
from launch.world import single_world
from ngpt.config.compose import load
from ngpt.config.errors import ConfigError


def sample(run_dir: Path, prompt: str, tokens: int) -> int:
    """Prints a continuation of `prompt` by the newest checkpoint of a run.

    Raises:
        ConfigError: `run_dir` is not a run folder, or `tokens` is not positive.
    """
    config_path = run_dir / CONFIG_FILE
    if not config_path.exists():
        raise ConfigError(str(run_dir), "no config.yaml there", "A run folder is needed", "Name one, for instance runs/quickstart")
    if tokens < 1:
        raise ConfigError("--tokens", tokens, "At least 1 token must be generated", "Give a positive number")
    variables = worker_variables(load(config_path), local_processes=1, cuda=bool(gpu_names()))
    command = worker_command(["sample", str(run_dir), prompt, str(tokens)], processes=1, run_dir=run_dir)
    return subprocess.run(command, env=worker_environment(variables, single_world()), check=False).returncode
