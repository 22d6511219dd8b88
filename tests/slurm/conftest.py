"""A private SLURM for each of the two ways it can find a step's processes, and jobs in it whose ranks are a stand-in or the real ones."""

import json
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from slurm_jobs import Run

from launch.run_folder import record_launch
from launch.slurm.script import render
from launch.submit import submit
from ngpt.config.compose import compose

HERE = Path(__file__).parent
PROGRAMS = ("slurmctld", "slurmd", "munged", "sbatch", "srun")
FOLDER = "it's $(touch hacked) `touch hacked` \"100%\"; #ü"  # a name that is hard on shells, for the relative paths and logs of every job


def missing() -> str | None:
    """Why SLURM cannot be started here."""
    path = f"{os.environ['PATH']}:/usr/sbin:/sbin"
    absent = [name for name in PROGRAMS if shutil.which(name, path=path) is None]
    return f"no {', '.join(absent)} on this machine (Debian: slurm-wlm, munge)" if absent else None


def pytest_collection_modifyitems(items):
    reason = missing()
    for item in items:
        if reason and HERE in Path(item.path).parents:
            item.add_marker(pytest.mark.skip(reason=reason))


def free_ports() -> int:
    """The first of 400 ports that no one is likely to listen at."""
    for first in range(17000, 29000, 400):
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", first))
                return first
            except OSError:  # taken
                continue
    raise RuntimeError("no free ports")


@pytest.fixture(scope="module", params=["linuxproc", "cgroup"])
def tracking(request, tmp_path_factory):
    """Starts a SLURM and points this process's commands at it. Gives the name of how it tracks processes."""
    if request.param == "cgroup" and not (os.geteuid() == 0 and os.access("/sys/fs/cgroup/freezer", os.W_OK)):
        pytest.skip("proctrack/cgroup needs root and a writable cgroup v1 freezer")
    folder = tmp_path_factory.mktemp(request.param)
    environment = os.environ | {"TRACKING": request.param, "PORT": str(free_ports())}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SLURM_CONF", str(folder / "slurm.conf"))
        for name in list(os.environ):
            if name.startswith(("SLURM_", "SBATCH_", "SRUN_")) and name != "SLURM_CONF":
                patch.delenv(name)
        subprocess.run([HERE / "cluster.sh", "start", folder], check=True, env=environment, timeout=120)
        yield request.param
        subprocess.run([HERE / "cluster.sh", "stop", folder], check=True, env=environment, timeout=120)


@pytest.fixture(scope="module")
def workplace(tracking, tmp_path_factory) -> Path:
    """Where jobs are submitted from."""
    folder = tmp_path_factory.mktemp("jobs") / FOLDER
    folder.mkdir()
    yield folder
    assert not list(folder.rglob("hacked")), "a shell has read a name"


TWO_RANKS = ["experiment=ngpt_tiny", "cluster.scheduler=slurm", "cluster.nodes=2", "cluster.save_time_s=1", "cluster.save_margin_s=0"]


@pytest.fixture
def submit_stand_in(workplace, request, monkeypatch) -> Callable[..., Run]:
    """Submits the script of `ngpt launch` with stand-ins as ranks, one on each of two nodes."""
    monkeypatch.chdir(workplace)

    def submitted(*overrides: str, **behaviour) -> Run:
        name = request.node.name.replace("[", "-").replace("]", "")
        config = compose([*TWO_RANKS, f"run.name={name}", *overrides])
        run_dir = Path(config.run.dir).absolute()
        record_launch(config, ["ngpt", "launch"], {})
        (run_dir / "behaviour.json").write_text(json.dumps(behaviour))
        rank = [sys.executable, str(HERE / "stand_in.py"), str(run_dir / "config.yaml")]
        return Run(run_dir, submit(run_dir, render(config, run_dir, workplace, rank), ["ngpt", "launch"]))

    return submitted
