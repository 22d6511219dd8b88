"""The batch script of a run, from the template job.sbatch. Everything a user gives is quoted here, or has a form that needs no quotes."""

import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from ngpt.config.cluster import warning_seconds
from ngpt.config.errors import ConfigError
from ngpt.config.schema import Config

from ..provenance import SOURCE
from ..run_folder import CONFIG_FILE

TEMPLATE = Path(__file__).with_name("job.sbatch")
ARRAY_TEMPLATE = Path(__file__).with_name("array.sbatch")
STUDY_TEMPLATE = Path(__file__).with_name("study.sbatch")
SCRIPT_FILE, ARRAY_FILE = "job.sbatch", "array.sbatch"
OUTPUT_FILE = "slurm-{job}.out"


def render(config: Config, run_dir: Path, work_dir: Path, rank_command: list[str] | None = None) -> str:
    """The script that trains `config` under SLURM.

    Args:
        config: A resolved config with cluster.scheduler=slurm.
        run_dir: Its run folder, absolute.
        work_dir: The folder that the config's relative paths start from. The job runs there.
        rank_command: What each task runs instead of training (tests).

    Raises:
        ConfigError: a folder's name that SLURM cannot take.
    """
    _check_folders(run_dir, work_dir)
    contained = config.cluster.container_image is not None
    if contained and set(",:") & set(str(work_dir)):
        rule = f"The container mounts {work_dir}, and a mount's name holds no comma and no colon"
        raise ConfigError("cluster.container_image", config.cluster.container_image, rule, "Call ngpt launch in another folder")
    python = "python3" if contained else sys.executable
    rank_command = rank_command or [python, "-m", "ngpt.launch.cli", "train", "--config", str(run_dir / CONFIG_FILE)]
    values = {
        "#@SBATCH@": _header(sbatch_options(config, run_dir, work_dir)),
        "@RUN@": shlex.quote(str(run_dir)),
        "@AFTER@": shlex.join([sys.executable, "-m", "ngpt.launch.slurm.after", str(run_dir)]),
        "@SOURCE@": shlex.quote(str(SOURCE)),
        "@SRUN@": shlex.join(_srun_options(config, work_dir)),
        "@RANK@": shlex.join(rank_command),
    }
    return _filled(TEMPLATE.read_text(encoding="utf-8"), values)


def render_array(
    config: Config,
    name: str,
    folder: Path,
    run_dirs: Sequence[Path],
    work_dir: Path,
    parallel: int | None,
    trunks: Sequence[Path] = (),
    after: Sequence[str] = (),
) -> str:
    """The script of a job array with one task per run. Each run's folder holds its own script.

    Args:
        config: The config of any of the runs: all ask SLURM for the same resources.
        name, folder: The name and folder of the array; the folder is absolute.
        run_dirs: The run folders, absolute.
        parallel: How many tasks run at a time; None: as many as SLURM starts.
        trunks: For each run the folder of the run whose checkpoint it continues, absolute. A task ends at once if that is not finished.
        after: Ids of jobs that must have ended before a task starts.

    Raises:
        ConfigError: a folder's name that SLURM cannot take.
    """
    _check_folders(folder, work_dir)
    named = replace(config, run=replace(config.run, name=name))
    tasks = f"0-{len(run_dirs) - 1}" + (f"%{parallel}" if parallel is not None else "")
    output = _output(folder, "%A")
    options = [option for option in sbatch_options(named, folder, work_dir) if not option.startswith("--output=")]
    values = {
        "#@SBATCH@": _header([*options, f"--output={output}", f"--array={tasks}", *_dependency(after)]),
        "@RUNS@": shlex.join(map(str, run_dirs)),
        "@TRUNKS@": shlex.join(map(str, trunks)),
        "@SOURCE@": shlex.quote(str(SOURCE)),
        "@TRUNK@": shlex.join([sys.executable, "-m", "ngpt.launch.slurm.trunk"]),
    }
    return _filled(ARRAY_TEMPLATE.read_text(encoding="utf-8"), values)


def render_study(config: Config, name: str, folder: Path, work_dir: Path, words: Sequence[str], after: Sequence[str]) -> str:
    """The script of the job that analyses a study's runs and writes its page.

    Args:
        config: The config of any of the runs: the job asks for one host of what they ask for.
        name, folder: The name of the job, and the study's folder, absolute.
        words: What `ngpt` is called with.
        after: Ids of jobs that must have ended before it starts.
    """
    _check_folders(folder, work_dir)
    alone = replace(config, run=replace(config.run, name=name), cluster=replace(config.cluster, nodes=1))
    cores = None if alone.cluster.cpus_per_task is None else alone.cluster.cpus_per_task * alone.cluster.gpus_per_node
    one_task = replace(alone, cluster=replace(alone.cluster, cpus_per_task=cores))  # runs an analysis for each GPU at a time
    python = "python3" if config.cluster.container_image is not None else sys.executable
    values = {
        "#@SBATCH@": _header([*sbatch_options(alone, folder, work_dir), *_dependency(after)]),
        "@SOURCE@": shlex.quote(str(SOURCE)),
        "@SRUN@": shlex.join(["--ntasks=1", *_srun_options(one_task, work_dir)]),
        "@STUDY@": shlex.join([python, "-m", "ngpt.launch.cli", *words]),
    }
    return _filled(STUDY_TEMPLATE.read_text(encoding="utf-8"), values)


def _dependency(after: Sequence[str]) -> list[str]:
    return [f"--dependency=afterany:{':'.join(after)}"] if after else []


def _check_folders(*folders: Path) -> None:
    for path in folders:
        if not str(path).isprintable() or "\\" in str(path):
            raise ConfigError("run.dir", repr(str(path)), "SLURM takes no backslash and no control characters", "Choose another folder")


def _header(options: Sequence[str]) -> str:
    return "\n".join(f"#SBATCH {shlex.quote(option)}" for option in options)


def _output(folder: Path, job: str) -> str:
    return str(folder).replace("%", "%%") + "/" + OUTPUT_FILE.format(job=job)


def _filled(template: str, values: Mapping[str, str]) -> str:
    """The template with every placeholder filled in one pass; a value that looks like a placeholder is left as it is."""
    parts = [template]
    for placeholder, value in values.items():
        index = next(index for index, text in enumerate(parts) if index % 2 == 0 and placeholder in text)
        before, after = parts[index].split(placeholder, 1)
        parts[index : index + 1] = [before, value, after]
    return "".join(parts)


def sbatch_options(config: Config, run_dir: Path, work_dir: Path) -> list[str]:
    """The options with which the job asks SLURM for resources."""
    cluster = config.cluster
    chained = any(option.startswith("--array") for option in cluster.sbatch)
    wanted = {
        "job-name": config.run.name,
        "chdir": str(work_dir),
        "output": _output(run_dir, "%A_%a" if chained else "%j"),
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
    """Options under which a failed rank ends the others. A rank that has saved leaves with 0, and the others leave by themselves."""
    cluster = config.cluster
    options = ["--kill-on-bad-exit=1", "--label", "--export=ALL"]
    if cluster.cpus_per_task is not None:
        options.append(f"--cpus-per-task={cluster.cpus_per_task}")  # srun does not inherit it from sbatch
    if cluster.container_image is not None:
        mounts = ",".join([f"{work_dir}:{work_dir}", *cluster.container_mounts])
        options += [f"--container-image={cluster.container_image}", f"--container-mounts={mounts}", f"--container-workdir={work_dir}"]
    return options
