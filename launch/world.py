"""The world of processes that an environment describes: torchrun's, SLURM's, or none."""

import errno
import socket
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from ngpt.config.errors import ConfigError

DEFAULT_PORT = 29500  # torchrun's
STEP_PORTS = range(15000, 30000)
FIRST_RESERVED_STEP = 0xFFFFFFF0  # SLURM numbers steps from 0; from here up are a job's batch script, prolog and interactive step
TERMINAL_VARIABLES = ("SLURM_PTY_PORT", "SLURM_PTY_WIN_COL", "SLURM_PTY_WIN_ROW")


@dataclass(frozen=True)
class World:
    """Where this process stands among the processes of one run."""

    rank: int
    size: int
    local_rank: int
    local_size: int  # processes on this machine
    master_addr: str
    master_port: int
    started_by: str  # torchrun | srun | ngpt


@dataclass(frozen=True)
class Job:
    """A SLURM job, or one task of a job array."""

    id: str
    restarts: int  # how often it had been restarted when it started


def world_of(environ: Mapping[str, str], default_port: int | None = None) -> World | None:
    """The world that torchrun or srun has put this process in, or None for a process started by hand.

    Args:
        environ: The environment; an empty variable counts as not set.
        default_port: The port where ranks meet unless the environment sets one. None: the step's own port under srun, else `DEFAULT_PORT`.

    Raises:
        ConfigError: a world was announced but its description is incomplete, or a value is not a number.
    """
    if environ.get("RANK") and environ.get("WORLD_SIZE"):
        return _torchrun_world(environ, default_port)
    if _is_task_of_a_step(environ) and _number(environ, "SLURM_STEP_NUM_TASKS", _number(environ, "SLURM_NTASKS", 1)) > 1:
        return _srun_world(environ, default_port)
    return None


def _number(environ: Mapping[str, str], name: str, default: int | None = None) -> int:
    """The value of a variable that holds a whole number of at least 0."""
    text = environ.get(name, "").strip()
    if not text and default is not None:
        return default
    if not (text.isascii() and text.isdigit()):
        raise ConfigError(name, repr(text), "This environment variable must be a whole number", f"Correct it, or unset {name}")
    return int(text)


def _torchrun_world(environ: Mapping[str, str], default_port: int | None) -> World:
    size = _number(environ, "WORLD_SIZE")
    if size > 1 and not environ.get("MASTER_ADDR"):
        raise ConfigError("MASTER_ADDR", "Not set", f"{size} ranks need an address to meet at", "Start the ranks with torchrun")
    return _consistent(
        World(
            rank=_number(environ, "RANK"),
            size=size,
            local_rank=_number(environ, "LOCAL_RANK", 0),
            local_size=_number(environ, "LOCAL_WORLD_SIZE", 1),
            master_addr=environ.get("MASTER_ADDR") or "127.0.0.1",
            master_port=_number(environ, "MASTER_PORT", default_port or DEFAULT_PORT),
            started_by="torchrun",
        ),
        "RANK",
        "WORLD_SIZE",
    )


def _consistent(world: World, rank_name: str, size_name: str) -> World:
    if world.rank >= world.size:
        rule = f"Ranks of {size_name}={world.size} processes go from 0 to {world.size - 1}"
        raise ConfigError(rank_name, world.rank, rule, "Correct these environment variables, or unset them")
    return world


def _is_task_of_a_step(environ: Mapping[str, str]) -> bool:
    """Whether srun has started this process as one of its tasks. An sbatch script or a shell of an allocation is not a task."""
    # The shells of sbatch and salloc have no step number, or a reserved one (the interactive step).
    return _number(environ, "SLURM_STEP_ID", FIRST_RESERVED_STEP) < FIRST_RESERVED_STEP and not _is_in_a_terminal(environ)


def _is_in_a_terminal(environ: Mapping[str, str]) -> bool:
    """Whether the task is a shell opened by `srun --pty`, whose environment looks like rank 0's."""
    if not any(environ.get(name) for name in TERMINAL_VARIABLES):
        return False
    try:  # A step started from such a shell inherits the variables; only the shell itself, the first process of its task, has the terminal.
        stat = Path(f"/proc/{_number(environ, 'SLURM_TASK_PID')}/stat").read_text(encoding="ascii", errors="replace")
    except (OSError, ConfigError):
        return True
    return stat.rpartition(")")[2].split()[4] != "0"  # tty_nr, the 7th field of /proc/PID/stat; the 2nd is a name in brackets


def _srun_world(environ: Mapping[str, str], default_port: int | None) -> World:
    size = _number(environ, "SLURM_STEP_NUM_TASKS", _number(environ, "SLURM_NTASKS", 1))
    nodes = _number(environ, "SLURM_STEP_NUM_NODES", _number(environ, "SLURM_NNODES", 1))
    if nodes == 0 or size % nodes != 0:
        raise ConfigError("srun", f"{size} tasks on {nodes} nodes", "Every node must run as many ranks", "Use --ntasks-per-node")
    return _consistent(
        World(
            rank=_number(environ, "SLURM_PROCID"),
            size=size,
            local_rank=_number(environ, "SLURM_LOCALID"),
            local_size=size // nodes,
            master_addr=environ.get("MASTER_ADDR") or _first_node_of_step(environ),
            master_port=_number(environ, "MASTER_PORT", default_port or _port_of_step(environ)),
            started_by="srun",
        ),
        "SLURM_PROCID",
        "SLURM_STEP_NUM_TASKS",
    )


def _first_node_of_step(environ: Mapping[str, str]) -> str:
    """Where rank 0 runs: the first node's name or, if that does not resolve, the address of the node that runs the batch script."""
    node = first_host(environ.get("SLURM_STEP_NODELIST") or environ.get("SLURM_JOB_NODELIST") or "127.0.0.1")
    launched_from = environ.get("SLURM_LAUNCH_NODE_IPADDR")
    if not launched_from:
        return node
    try:
        socket.getaddrinfo(node, None)
    except OSError:
        return launched_from  # second choice only: for an srun typed on a login node, this is the login node's address
    return node


def _port_of_step(environ: Mapping[str, str]) -> int:
    """A port below those that the kernel assigns, different for each job, step and restart, so that steps on one node do not collide."""
    numbers = [_number(environ, name, 0) for name in ("SLURM_JOB_ID", "SLURM_STEP_ID", "SLURM_RESTART_COUNT")]
    offset = sum(number * factor for number, factor in zip(numbers, (1, 1009, 5003), strict=True))
    return STEP_PORTS.start + offset % len(STEP_PORTS)


def check_port_free(world: World) -> None:
    """Called by rank 0, which listens there.

    Raises:
        ConfigError: another process has the port. The other ranks would talk to that process, and wait for minutes.
    """
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as torch does: connections left by an earlier run do not count
        try:
            probe.bind(("", world.master_port))
        except OSError as error:
            if error.errno != errno.EADDRINUSE:
                return  # torch tries other ways of listening
            rule = "Ranks meet at this port of rank 0's machine, and another process listens there"
            raise ConfigError("MASTER_PORT", world.master_port, rule, "Set cluster.rendezvous_port to another one") from None


def first_host(node_list: str) -> str:
    """The first name of a SLURM node list: `gpu[007-009,12],login1` gives `gpu007`."""
    head, bracket, rest = node_list.partition("[")
    if "," in head or not bracket:
        return head.split(",")[0]
    ranges, _, tail = rest.partition("]")
    first = ranges.split(",")[0].split("-")[0]
    suffix = tail.split(",")[0]
    return head + first + (first_host(suffix) if suffix else "")


def single_world() -> World:
    """A world of one process. Its port is 0: the kernel chooses one when the process listens."""
    return World(rank=0, size=1, local_rank=0, local_size=1, master_addr="127.0.0.1", master_port=0, started_by="ngpt")


def job_of(environ: Mapping[str, str]) -> Job | None:
    """The SLURM job that this process belongs to, or None."""
    job = environ.get("SLURM_JOB_ID")
    if not job:
        return None
    if environ.get("SLURM_ARRAY_JOB_ID") and environ.get("SLURM_ARRAY_TASK_ID"):
        # The last task's own job id is the array's, and would name all tasks.
        job = f"{environ['SLURM_ARRAY_JOB_ID']}_{environ['SLURM_ARRAY_TASK_ID']}"
    return Job(id=job, restarts=_number(environ, "SLURM_RESTART_COUNT", 0))
