"""Starts what tests start: a script under torchrun, or the command as a user types it."""

import os
import subprocess
import sys
from pathlib import Path

LAUNCH_SECONDS = 900  # a hang ends here; no statement about speed
ALONE = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
ALONE |= {"MASTER_PORT": "0"}  # any free one


def launch(script: Path, arguments: list[str], processes: int) -> None:
    """Run a script under torchrun on loopback, one thread a process unless OMP_NUM_THREADS is set; a failure shows its output.

    One process gets the variables that torchrun would give it: torchrun itself takes seconds to import.
    """
    inherited = filter(None, [os.environ.get("PYTHONPATH")])  # GPU hosts have packages there
    environment = os.environ | {
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1"),
        "CUDA_DEVICE_MAX_CONNECTIONS": "1",  # Megatron asserts it for tensor and context parallelism, on a CPU too
        "GLOO_SOCKET_IFNAME": "lo",
        "PYTHONPATH": os.pathsep.join([*map(str, (Path(__file__).parents[2], Path(__file__).parent, script.parent)), *inherited]),
    }
    command = [sys.executable, str(script), *arguments]
    if processes == 1:
        environment |= ALONE
    else:
        command[1:1] = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=LAUNCH_SECONDS)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]


def ngpt(*arguments: str, cwd: Path) -> subprocess.CompletedProcess:
    """Run this repository's `ngpt` with arguments in a folder. What PYTHONPATH names comes first."""
    inherited = filter(None, [os.environ.get("PYTHONPATH")])
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([*inherited, str(Path(__file__).parents[2])])}
    command = [sys.executable, "-m", "launch.cli", *arguments]
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=LAUNCH_SECONDS, check=False)
