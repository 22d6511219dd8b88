"""Environment variables: the only file that reads or sets them.

Nothing here decides what is computed: that is the config alone. The variables give a process's place in its world, and tune libraries
that cannot be tuned otherwise.
"""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from ngpt.config.cluster import PLACE_VARIABLES
from ngpt.config.errors import ConfigError
from ngpt.config.megatron_keys import captures
from ngpt.config.schema import Config
from ngpt.config.sizes import world_size

from . import world as worlds
from .devices import gpu_names
from .world import Job, World

# Removed, because Transformer Engine would then use approximate reciprocals and not round its Hadamard transform.
REMOVED = ("NVTE_USE_FAST_MATH",)
CONFIG_DIRS = "NGPT_CONFIG_DIR"
SIDE_BY_SIDE = "NGPT_SIDE_BY_SIDE"  # members of a sweep that share this machine's cores: set by launch/many.py
GPUS = "CUDA_VISIBLE_DEVICES"
# Two names of one setting: if the user has set the second, the first is left unset.
OTHER_NAMES = {"PYTORCH_CUDA_ALLOC_CONF": "PYTORCH_ALLOC_CONF", "TORCH_FR_BUFFER_SIZE": "TORCH_NCCL_TRACE_BUFFER_SIZE"}
# Prefixes recorded with a run: they change speed or numerics, and name neither a host nor a user.
RECORDED_PREFIXES = ("CUDA_", "CUBLAS_", "GLOO_", "NCCL_", "NVTE_", "OMP_", "PYTORCH_", "TORCH", "TRITON_", "UB_")


def current_world(environ: Mapping[str, str] = os.environ, default_port: int | None = None) -> World | None:
    """The world that this process belongs to (launch/world.py), or None for a process started by hand."""
    return worlds.world_of(environ, default_port)


def own_world(environ: Mapping[str, str] = os.environ) -> World:
    """The world of a worker, which always has one.

    Raises:
        ConfigError: it was started by hand, not by `ngpt`.
    """
    world = current_world(environ)
    if world is None:
        raise ConfigError("RANK", "Not set", "A worker is one rank of the world that its environment describes", "Call ngpt train")
    return world


def user_config_dirs(environ: Mapping[str, str] = os.environ) -> list[Path]:
    """The user's folders of config files if there is no --config-dir: NGPT_CONFIG_DIR, separated as in PATH.

    Raises:
        ConfigError: one of them is not a folder.
    """
    folders = [Path(folder).expanduser() for folder in environ.get(CONFIG_DIRS, "").split(os.pathsep) if folder]
    for folder in folders:
        if not folder.is_dir():
            raise ConfigError(CONFIG_DIRS, folder, "Each of its folders is laid out like conf/", "Create it, or correct the variable")
    return folders


def current_job(environ: Mapping[str, str] = os.environ) -> Job | None:
    """The SLURM job that this process belongs to, or None."""
    return worlds.job_of(environ)


def submission_environment(environ: Mapping[str, str] = os.environ) -> dict[str, str]:
    """The environment that a job is submitted with and its ranks inherit: this process's own, without its place in other worlds."""
    place = set(PLACE_VARIABLES)
    return {
        name: value for name, value in environ.items() if name not in place and (name == "SLURM_CONF" or not name.startswith("SLURM_"))
    }


def worker_variables(config: Config, local_processes: int, cuda: bool) -> dict[str, str]:
    """Variables of a worker process, each with its reason. A variable that the user has set keeps its value (`worker_environment`).

    Args:
        config: The resolved config.
        local_processes: Workers on this machine.
        cuda: Whether workers run on GPUs.
    """
    variables = {
        # Without it each worker starts one thread per core, and the workers of a machine compete for the cores.
        "OMP_NUM_THREADS": _threads(local_processes),
        # A worker's output appears at once, not when a pipe's buffer is full.
        "PYTHONUNBUFFERED": "1",
    }
    if local_processes == world_size(config):
        # Otherwise Gloo resolves the machine's own name, which fails in many containers, on laptops and on hosts without network.
        variables["GLOO_SOCKET_IFNAME"] = "lo"
    if config.parallel.tensor > 1 or config.parallel.context > 1:
        # One hardware queue: collectives start in the order they were issued, and overlap. Megatron requires it, even on a CPU.
        variables["CUDA_DEVICE_MAX_CONNECTIONS"] = "1"
    if config.logging.wandb.mode != "disabled":
        # By default the client of Weights & Biases reports its own errors to its makers.
        variables["WANDB_ERROR_REPORTING"] = "false"
    return variables | (_gpu_variables(config) if cuda else _cpu_variables()) | config.cluster.environment


def sharing_variables(processes: int) -> dict[str, str]:
    """Variables of processes on this machine that share work without a run's config."""
    return {"OMP_NUM_THREADS": _threads(processes), "GLOO_SOCKET_IFNAME": "lo"}


def _threads(processes: int, environ: Mapping[str, str] = os.environ) -> str:
    """Threads per process if `processes` of them share the cores that this one may use."""
    return str(max(1, len(os.sched_getaffinity(0)) // (processes * int(environ.get(SIDE_BY_SIDE) or 1))))


def visible_gpus(environ: Mapping[str, str] = os.environ) -> tuple[str, ...]:
    """Entries of CUDA_VISIBLE_DEVICES for the GPUs that this process sees: numbers, or the names that the user gave."""
    named, count = environ.get(GPUS), len(gpu_names())
    return tuple(entry.strip() for entry in named.split(","))[:count] if named else tuple(map(str, range(count)))


def member_environment(gpus: Sequence[str], side_by_side: int) -> dict[str, str]:
    """The environment of one of several commands that run at once: it sees only its own GPUs, and shares the cores."""
    hidden = {GPUS: ",".join(gpus)} if gpus or gpu_names() else {}
    return {**os.environ, SIDE_BY_SIDE: str(side_by_side), **hidden}


def forbid_forks() -> None:
    """Keeps lm-eval's bootstraps from forking this process: a fork of a process with threads may hang."""
    os.environ.setdefault("DISABLE_MULTIPROC", "1")


def _gpu_variables(config: Config) -> dict[str, str]:
    # Autotuning results stay on disk: a second start with the same shapes tunes nothing.
    variables = {
        "TRITON_CACHE_AUTOTUNING": "1",
        # torch keeps a record of this many of the last NCCL collectives; the watchdog writes it out when a rank hangs.
        "TORCH_FR_BUFFER_SIZE": "2000",
    }
    if not captures(config.megatron):
        # Otherwise blocks of several GiB (logits) find no room between smaller ones: dense nGPT 1.2B at micro-batch 2 ran out of 80 GB with
        # 63 GiB in use. With it, it trains in 71 GiB. CUDA graphs of collectives do not work with such segments everywhere.
        variables["PYTORCH_CUDA_ALLOC_CONF"] = "expandable_segments:True"
    if config.model.num_experts:
        # On Hopper, Transformer Engine multiplies all experts of a rank in one kernel instead of one each. Elsewhere it ignores this.
        variables["NVTE_USE_CUTLASS_GROUPED_GEMM"] = "1"
    if config.megatron.get("tp_comm_overlap"):
        # Transformer Engine's buffers are shared by CUDA IPC. Its default, NVLink multicast, can harm more than a run: a virtual machine
        # may not be allowed to use it.
        variables["UB_SKIPMC"] = "1"
    if config.debug.deterministic:
        variables |= {
            "CUBLAS_WORKSPACE_CONFIG": ":4096:8",  # cuBLAS is deterministic only with a fixed workspace
            "NCCL_ALGO": "Ring",  # one reduction order
            "NVTE_ALLOW_NONDETERMINISTIC_ALGO": "0",  # attention backward without atomics
        }
    return variables


def _cpu_variables() -> dict[str, str]:
    # Megatron's fused functions use torch.compile, which looks for an accelerator that is not there.
    return {"TORCHDYNAMO_DISABLE": "1"}


def world_variables(world: World) -> dict[str, str]:
    """The variables from which torch.distributed and Megatron read a rank's place."""
    return {
        "RANK": str(world.rank),
        "WORLD_SIZE": str(world.size),
        "LOCAL_RANK": str(world.local_rank),
        "LOCAL_WORLD_SIZE": str(world.local_size),
        "MASTER_ADDR": world.master_addr,
        "MASTER_PORT": str(world.master_port),
    }


def worker_environment(variables: Mapping[str, str], world: World | None) -> dict[str, str]:
    """The whole environment of a worker: this process's own, those of `variables` that the user has not set, and the rank's place."""
    inherited = {name: value for name, value in os.environ.items() if name not in REMOVED}
    unset = {name: value for name, value in variables.items() if OTHER_NAMES.get(name) not in inherited}
    return {**unset, **inherited, **(world_variables(world) if world else {})}


def exporter_environment() -> dict[str, str]:
    """The environment of a process that exports during a run: it leaves the cores and GPUs to the run."""
    return worker_environment({}, None) | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}


def variable_origins(config: Config, variables: Mapping[str, str], environ: Mapping[str, str] = os.environ) -> dict[str, str]:
    """Where a worker's value of each of `variables` comes from: exported (by the user), cluster.environment, or ngpt."""

    def origin(name: str) -> str:
        if name in environ or OTHER_NAMES.get(name, name) in environ:
            return "exported"
        return "cluster.environment" if name in config.cluster.environment else "ngpt"

    return {name: origin(name) for name in variables}


def overruled(config: Config, environ: Mapping[str, str] = os.environ) -> list[str]:
    """A line for each variable of cluster.environment that the user has exported with another value. The user's value wins."""
    return [
        f"note: {name}={environ[name]} as exported, not {value} as in cluster.environment"
        for name, value in config.cluster.environment.items()
        if environ.get(name, value) != value
    ]


def unseen_gpus(config: Config, environ: Mapping[str, str] = os.environ) -> list[str]:
    """A line if the user or the cluster names GPUs and CUDA sees none. GPUs hidden on purpose are not reported."""
    named = environ.get(GPUS)
    if gpu_names() or named == "":
        return []
    if named:
        return [f"note: {GPUS}={named} shows CUDA no GPU (each may be named once): on the CPU"]
    return [f"note: cluster={config.cluster.name} has GPUs, and none is visible here: on the CPU"] if config.cluster.gpu else []


def recorded_variables(environ: Mapping[str, str] = os.environ) -> dict[str, str]:
    """The variables of an environment that are recorded with a run."""
    return {name: environ[name] for name in sorted(environ) if name.startswith(RECORDED_PREFIXES)}
