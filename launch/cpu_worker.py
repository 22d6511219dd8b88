"""Runs the part of a command that needs Megatron: one worker, which sees no GPU."""

import json
import subprocess
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ngpt.config.schema import Config

from .environment import worker_environment, worker_variables
from .processes import worker_command
from .world import single_world


def run_task(name: str, request: Mapping[str, Any], cfg: Config, run_dir: Path) -> int:
    """Runs a task of `launch.worker` until it ends.

    Args:
        name: the task's name. request: its argument, in JSON types.
        cfg: the config whose environment variables the worker gets.

    Returns:
        The worker's exit code.
    """
    command = worker_command([name, json.dumps(request)], processes=1, run_dir=run_dir)
    with tempfile.TemporaryDirectory() as modules:
        environment = worker_environment(worker_variables(cfg, local_processes=1, cuda=False), single_world()) | {
            "CUDA_VISIBLE_DEVICES": "",  # plain fp32 is wanted, and a GPU's kernels round differently
            "HF_MODULES_CACHE": modules,  # transformers copies the code it runs into this folder, and would keep it
            "HF_HUB_OFFLINE": "1",
        }
        return subprocess.run(command, env=environment, check=False).returncode
