"""Environment variables: the only file that reads or sets them.

Nothing here decides what is computed: a run is its config. The variables say where a process stands in its world, and tune libraries
that offer no other handle.
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass

from ngpt.config.errors import ConfigError
from ngpt.config.megatron_keys import captures
from ngpt.config.schema import Config

# Would change what the precision recipe computes: approximate reciprocals and an unrounded Hadamard transform in Transformer Engine.
REMOVED = ("NVTE_USE_FAST_MATH",)
# Names of one setting: where the user has set the second, the first is left alone.
OTHER_NAMES = {"PYTORCH_CUDA_ALLOC_CONF": "PYTORCH_ALLOC_CONF", "TORCH_FR_BUFFER_SIZE": "TORCH_NCCL_TRACE_BUFFER_SIZE"}
# Prefixes recorded with a run: they change speed or numerics, and name neither a host nor a user.
RECORDED_PREFIXES = ("CUDA_", "CUBLAS_", "GLOO_", "NCCL_", "NVTE_", "OMP_", "PYTORCH_", "TORCH", "TRITON_")


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


def current_world(environ: Mapping[str, str] = os.environ, default_port: int = 29500) -> World | None:
    """The world that torchrun or srun has put this process in, or None for a process started by hand.

    Raises:
        ConfigError: a world was announced but its description is incomplete.
    """
    if "RANK" in environ and "WORLD_SIZE" in environ:
        return _torchrun_world(environ, default_port)
    # Inside an sbatch script SLURM_NTASKS is set too, but only srun makes a step: the script itself is no rank.
    if "SLURM_STEP_ID" in environ and int(environ.get("SLURM_NTASKS", "1")) > 1:
        return _srun_world(environ, default_port)
    return None


def _torchrun_world(environ: Mapping[str, str], default_port: int) -> World:
    size = int(environ["WORLD_SIZE"])
    if size > 1 and "MASTER_ADDR" not in environ:
        raise ConfigError("MASTER_ADDR", "Not set", f"{size} ranks need an address to meet at", "Start the ranks with torchrun")
    return World(
        rank=int(environ["RANK"]),
        size=size,
        local_rank=int(environ.get("LOCAL_RANK", "0")),
        local_size=int(environ.get("LOCAL_WORLD_SIZE", "1")),
        master_addr=environ.get("MASTER_ADDR", "127.0.0.1"),
        master_port=int(environ.get("MASTER_PORT", default_port)),
        started_by="torchrun",
    )


def _srun_world(environ: Mapping[str, str], default_port: int) -> World:
    size = int(environ["SLURM_NTASKS"])
    nodes = int(environ.get("SLURM_STEP_NUM_NODES", environ.get("SLURM_NNODES", "1")))
    if size % nodes != 0:
        raise ConfigError("srun", f"{size} tasks on {nodes} nodes", "every node must run as many ranks", "Use --ntasks-per-node")
    node_list = environ.get("SLURM_STEP_NODELIST", environ.get("SLURM_JOB_NODELIST", "127.0.0.1"))
    return World(
        rank=int(environ["SLURM_PROCID"]),
        size=size,
        local_rank=int(environ["SLURM_LOCALID"]),
        local_size=size // nodes,
        master_addr=environ.get("MASTER_ADDR") or first_host(node_list),
        master_port=int(environ.get("MASTER_PORT", default_port)),
        started_by="srun",
    )


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
    """A world of one process, which meets itself at whatever port is free when it binds one."""
    return World(rank=0, size=1, local_rank=0, local_size=1, master_addr="127.0.0.1", master_port=0, started_by="ngpt")


def worker_variables(config: Config, local_processes: int, cuda: bool) -> dict[str, str]:
    """What a worker process gets, each with its reason. A variable that the user has set keeps the user's value (`worker_environment`).

    Args:
        config: The resolved config.
        local_processes: Workers on this machine.
        cuda: Whether workers run on GPUs.
    """
    variables = {
        # Without it each worker starts one thread a core, and workers on one machine fight over the cores.
        "OMP_NUM_THREADS": str(max(1, len(os.sched_getaffinity(0)) // local_processes)),
        # A worker's print appears when it happens, not when a pipe's buffer is full.
        "PYTHONUNBUFFERED": "1",
    }
    if config.parallel.tensor > 1 or config.parallel.context > 1:
        # One hardware queue: collectives start in the order they were issued, and overlap. Megatron insists on it, on a CPU too.
        variables["CUDA_DEVICE_MAX_CONNECTIONS"] = "1"
    return variables | (_gpu_variables(config) if cuda else _cpu_variables(config))


def _gpu_variables(config: Config) -> dict[str, str]:
    # Autotuning results stay on disk: a second start of the same shapes tunes nothing.
    variables = {
        "TRITON_CACHE_AUTOTUNING": "1",
        # torch keeps this many of NCCL's last collectives; the watchdog writes them down when a rank hangs.
        "TORCH_FR_BUFFER_SIZE": "2000",
    }
    if not captures(config.megatron):
        # Otherwise blocks of several GiB (logits) find no room between smaller ones: dense nGPT 1.2B at micro-batch 2 ran out of 80 GB with
        # 63 GiB in use, and trains in 71 GiB with it. CUDA graphs of collectives and such segments do not go together everywhere.
        variables["PYTORCH_CUDA_ALLOC_CONF"] = "expandable_segments:True"
    if config.model.num_experts:
        # Transformer Engine multiplies the experts of a rank by one kernel on Hopper, instead of by one each (elsewhere it ignores this).
        variables["NVTE_USE_CUTLASS_GROUPED_GEMM"] = "1"
    if config.debug.deterministic:
        variables |= {
            "CUBLAS_WORKSPACE_CONFIG": ":4096:8",  # cuBLAS repeats its sums only with a fixed workspace
            "NCCL_ALGO": "Ring",  # one reduction order
            "NVTE_ALLOW_NONDETERMINISTIC_ALGO": "0",  # attention backward without atomics
        }
    return variables


def _cpu_variables(config: Config) -> dict[str, str]:
    # Megatron's fused functions go through torch.compile, which looks for an accelerator that is not there.
    variables = {"TORCHDYNAMO_DISABLE": "1"}
    if config.cluster.nodes == 1:
        # Gloo otherwise resolves the machine's own name, which many containers and laptops cannot.
        variables["GLOO_SOCKET_IFNAME"] = "lo"
    return variables


def world_variables(world: World) -> dict[str, str]:
    """The variables torch.distributed and Megatron read a rank's place from."""
    return {
        "RANK": str(world.rank),
        "WORLD_SIZE": str(world.size),
        "LOCAL_RANK": str(world.local_rank),
        "LOCAL_WORLD_SIZE": str(world.local_size),
        "MASTER_ADDR": world.master_addr,
        "MASTER_PORT": str(world.master_port),
    }


def worker_environment(variables: Mapping[str, str], world: World | None) -> dict[str, str]:
    """The whole environment of a worker: this process's, `variables` where the user set none, and the rank's place."""
    inherited = {name: value for name, value in os.environ.items() if name not in REMOVED}
    unset = {name: value for name, value in variables.items() if OTHER_NAMES.get(name) not in inherited}
    return {**unset, **inherited, **(world_variables(world) if world else {})}


def recorded_variables(environ: Mapping[str, str] = os.environ) -> dict[str, str]:
    """Variables of an environment that are stored with a run."""
    return {name: environ[name] for name in sorted(environ) if name.startswith(RECORDED_PREFIXES)}
