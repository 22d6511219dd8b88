"""The batch script of a run, from the template job.sbatch. All that a user gives is quoted here, or is of a form that needs none."""

import shlex
import sys
from collections.abc import Mapping
from pathlib import Path

from ngpt.config.cluster import warning_seconds
from ngpt.config.errors import ConfigError
from ngpt.config.schema import Config

from ..provenance import SOURCE, module_in_source
from ..run_folder import CONFIG_FILE

TEMPLATE = Path(__file__).with_name("job.sbatch")
SCRIPT_FILE = "job.sbatch"
OUTPUT_FILE = "slurm-{job}.out"


def render(config: Config, run_dir: Path, work_dir: Path, rank_command: list[str] | None = None) -> str:
    """The script that trains `config` under SLURM.

    Args:
        config: A resolved config with cluster.scheduler=slurm.
        run_dir: Its run folder, absolute.
        work_dir: Where relative paths of the config start: the job runs there.
        rank_command: What each task runs instead of training (tests).

    Raises:
        ConfigError: a folder's name that SLURM cannot take.
    """
    for path in (run_dir, work_dir):
        if not str(path).isprintable() or "\\" in str(path):
            raise ConfigError("run.dir", repr(str(path)), "SLURM takes no backslash and no control characters", "Choose another folder")
    contained = config.cluster.container_image is not None
    if contained and set(",:") & set(str(work_dir)):
        rule = f"The container mounts {work_dir}, and a mount's name holds no comma and no colon"
        raise ConfigError("cluster.container_image", config.cluster.container_image, rule, "Call ngpt launch in another folder")
    python = "python3" if contained else sys.executable
    rank_command = rank_command or [python, "-m", module_in_source("cli"), "train", "--config", str(run_dir / CONFIG_FILE)]
    values = {
        "#@SBATCH@": "\n".join(f"#SBATCH {shlex.quote(option)}" for option in sbatch_options(config, run_dir, work_dir)),
        "@RUN@": shlex.quote(str(run_dir)),
        "@AFTER@": shlex.join([sys.executable, "-m", module_in_source("slurm.after"), str(run_dir)]),
        "@SOURCE@": shlex.quote(str(SOURCE)),
        "@SRUN@": shlex.join(_srun_options(config, work_dir)),
        "@RANK@": shlex.join(rank_command),
    }
    return _filled(TEMPLATE.read_text(encoding="utf-8"), values)


def _filled(template: str, values: Mapping[str, str]) -> str:
    """The template with each placeholder replaced once; a value that looks like another placeholder stays as it is."""
    parts = [template]
    for placeholder, value in values.items():
        index = next(index for index, text in enumerate(parts) if index % 2 == 0 and placeholder in text)
        before, after = parts[index].split(placeholder, 1)
        parts[index : index + 1] = [before, value, after]
    return "".join(parts)


def sbatch_options(config: Config, run_dir: Path, work_dir: Path) -> list[str]:
    """What the job asks SLURM for."""
    cluster = config.cluster
    chained = any(option.startswith("--array") for option in cluster.sbatch)
    output = str(run_dir).replace("%", "%%") + "/" + OUTPUT_FILE.format(job="%A_%a" if chained else "%j")
    wanted = {
        "job-name": config.run.name,
        "chdir": str(work_dir),
        "output": output,
        "open-mode": "append",
        "nodes": cluster.nodes,
        "ntasks-per-node": cluster.gpus_per_node,
        "gpus-per-node": cluster.gpus_per_node if cluster.gpu else None,
        "cpus-per-task": cluster.cpus_per_task,
        "time": cluster.time_limit,
        "signal": f"TERM@{warning_seconds(cluster)}",
        "account": cluster.account,
        "partition": cluster.partition,
        "qos": cluster.qos,
    }
    return [f"--{name}={value}" for name, value in wanted.items() if value is not None] + ["--requeue", *cluster.sbatch]


def _srun_options(config: Config, work_dir: Path) -> list[str]:
    """A rank that fails ends the others; one that has saved leaves with 0, and they follow by themselves."""
    cluster = config.cluster
    options = ["--kill-on-bad-exit=1", "--label", "--export=ALL"]
    if cluster.cpus_per_task is not None:
        options.append(f"--cpus-per-task={cluster.cpus_per_task}")  # srun does not take it over from sbatch
    if cluster.container_image is not None:
        mounts = ",".join([f"{work_dir}:{work_dir}", *cluster.container_mounts])
        options += [f"--container-image={cluster.container_image}", f"--container-mounts={mounts}", f"--container-workdir={work_dir}"]
    return options
