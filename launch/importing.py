"""`ngpt import`: one worker, on the CPU."""

from pathlib import Path

from ngpt.config.errors import ConfigError
from ngpt.config.schema import Config, RunConfig
from ngpt.places import check_place

from .cpu_worker import run_task


def import_folder(folder: Path, name: str, root: Path | None) -> int:
    """Makes a run folder from a folder in Hugging Face's format.

    Args:
        name: the run's name.
        root: the folder of run folders; None: the config's default.

    Returns:
        The worker's exit code.

    Raises:
        ConfigError: the folder is not in that format, or the run folder exists or cannot be made.
    """
    if not (folder / "config.json").exists():
        raise ConfigError(str(folder), "no config.json there", "What `ngpt export` wrote is imported", "Name such a folder")
    root = root or Path(RunConfig.root)
    run_dir = root / name
    if run_dir.exists():
        raise ConfigError("--run", run_dir, "It exists, and an import makes a new run", "Name another one, or remove it")
    check_place("--root", run_dir)
    request = {"folder": str(folder), "run": name, "root": str(root)}
    return run_task("importing", request, Config(), run_dir)
