"""The rules of `cluster.*` for jobs: what reaches a scheduler's command line or script has a known form."""

import re
from collections.abc import Iterator

from ngpt.config.errors import ConfigError
from ngpt.config.schema import ClusterConfig, Config

KILL_MARGIN_S = 30  # SLURM checks the time twice a minute: its warning may be this late
_LONGEST_WARNING_S = 65535  # SLURM's
_NAMES = {"account": r"[\w.@+-]+", "partition": r"[\w.@+-]+(,[\w.@+-]+)*", "qos": r"[\w.@+-]+"}
_TIME = r"(?:(?P<days>\d+)-)?(?P<first>\d+)(?::(?P<second>\d+))?(?::(?P<third>\d+))?"
_MOST_MINUTES = 3599
_OPTION = r"--[a-z][a-z0-9-]*(=[\w.,:/@%+*\[\]=-]+)?"
_SET_BY_KEYS = {  # options of sbatch that other keys or `ngpt launch` itself set
    **{name: f"cluster.{name}" for name in ("account", "partition", "qos", "nodes")},
    "job-name": "run.name",
    "time": "cluster.time_limit",
    "cpus-per-task": "cluster.cpus_per_task",
    "container-image": "cluster.container_image",
    "container-mounts": "cluster.container_mounts",
    **dict.fromkeys(("ntasks", "ntasks-per-node", "gpus", "gpus-per-node", "gpus-per-task", "ntasks-per-gpu"), "cluster.gpus_per_node"),
    **dict.fromkeys(("signal", "requeue", "no-requeue", "open-mode", "output", "error", "chdir", "export", "wrap", "parsable"), None),
}
PLACE_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def warning_seconds(cluster: ClusterConfig) -> int:
    """How long before the end of its time a job is told to save and leave."""
    return cluster.save_time_s + cluster.save_margin_s + KILL_MARGIN_S


def time_limit_seconds(text: str) -> int | None:
    """How sbatch reads `text`: minutes, minutes:seconds, hours:minutes:seconds, or days-hours[:minutes[:seconds]]. None: not a time.

    A large plain number is not a time either. YAML turns an unquoted 01:00:00 into seconds, which sbatch would read as minutes.
    """
    match = re.fullmatch(_TIME, text, re.ASCII)
    if match is None:
        return None
    if text.isdigit() and int(text) > _MOST_MINUTES:
        return None
    days, *numbers = (int(match[name]) if match[name] else None for name in ("days", "first", "second", "third"))
    given = [number for number in numbers if number is not None]
    if days is None:
        units = {1: (60,), 2: (60, 1), 3: (3600, 60, 1)}[len(given)]
    else:
        units = (3600, 60, 1)[: len(given)]
    return (days or 0) * 86400 + sum(number * unit for number, unit in zip(given, units, strict=True))


def check_job(cfg: Config) -> Iterator[ConfigError]:
    """Names, times and further options have the form that sbatch reads."""
    cluster = cfg.cluster
    for name, pattern in _NAMES.items():
        value = getattr(cluster, name)
        if value is not None and not re.fullmatch(pattern, value, re.ASCII):
            yield ConfigError(f"cluster.{name}", repr(value), "Letters, digits and . _ - + @ make a name", f"Set cluster.{name}=NAME")
    yield from _check_time(cluster)
    for option in cluster.sbatch:
        name = option.removeprefix("--").partition("=")[0]
        if not re.fullmatch(_OPTION, option, re.ASCII):
            rule = "An option of sbatch is written --name or --name=value, without spaces and quotes"
            yield ConfigError("cluster.sbatch", repr(option), rule, "Write it so, or leave it out")
        elif name in _SET_BY_KEYS:
            key = _SET_BY_KEYS[name]
            yield ConfigError("cluster.sbatch", option, f"{key or 'ngpt launch'} sets this", f"Set {key}" if key else "Leave it out")


def _check_time(cluster: ClusterConfig) -> Iterator[ConfigError]:
    warning = warning_seconds(cluster)
    if warning > _LONGEST_WARNING_S:
        rule = f"With the margin the warning comes {warning} s early, and SLURM knows {_LONGEST_WARNING_S} s at most"
        yield ConfigError("cluster.save_time_s", cluster.save_time_s, rule, "Set what a save takes")
    if cluster.time_limit is None:
        return
    limit = time_limit_seconds(cluster.time_limit)
    if limit is None:
        rule = "A time is written as for sbatch: minutes below 3600, HH:MM:SS or D-HH:MM:SS, in quotes in a file"
        yield ConfigError("cluster.time_limit", repr(cluster.time_limit), rule, 'Set for instance cluster.time_limit="04:00:00"')
    elif limit <= warning:
        rule = f"The job is told to save {warning} s before its end (cluster.save_time_s, save_margin_s and {KILL_MARGIN_S} s)"
        yield ConfigError("cluster.time_limit", cluster.time_limit, rule, "Set a longer time, or a shorter cluster.save_time_s")


def check_container(cfg: Config) -> Iterator[ConfigError]:
    """Mounts are pairs of absolute folders; without an image they would do nothing."""
    cluster = cfg.cluster
    if cluster.container_image is not None and not re.fullmatch(r"[^\s\0]+", cluster.container_image):
        rule = "An image is a file or a registry's name, without spaces"
        yield ConfigError("cluster.container_image", repr(cluster.container_image), rule, "Correct it")
    if cluster.container_mounts and cluster.container_image is None:
        rule = "Mounts are those of a container, and cluster.container_image is null"
        yield ConfigError("cluster.container_mounts", cluster.container_mounts, rule, "Set cluster.container_image, or no mounts")
    for mount in cluster.container_mounts:
        if not re.fullmatch(r"/[^:,\s\0]*:/[^:,\s\0]*(:(ro|rw))?", mount):
            rule = "A mount is HOST:CONTAINER or HOST:CONTAINER:ro of absolute folders without spaces, commas and colons"
            yield ConfigError("cluster.container_mounts", repr(mount), rule, "Write it so")


def check_environment(cfg: Config) -> Iterator[ConfigError]:
    """Variables have names that a shell knows, and say nothing about a rank's place."""
    for name, value in cfg.cluster.environment.items():
        if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name):
            rule = "A variable's name is of letters, digits and _"
            yield ConfigError("cluster.environment", repr(name), rule, "Correct the name")
        elif name in PLACE_VARIABLES or name.startswith("SLURM_"):
            rule = "Says where a rank stands, which whoever starts the ranks does"
            yield ConfigError(f"cluster.environment.{name}", value, rule, "Leave it out")
        elif "\0" in value:
            yield ConfigError(f"cluster.environment.{name}", repr(value), "No variable can hold a null byte", "Correct the value")


CHECKS = (check_job, check_container, check_environment)
