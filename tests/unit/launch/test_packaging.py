"""What a stranger meets first: the Python check, a Makefile that does nothing twice, and what is installed."""

import email
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from launch.provenance import git_state

ROOT = Path(__file__).resolve().parents[3]
OLD_PYTHON = """
import sys
sys.version_info = (3, 9, 0)
source = open("setup.py").read()
exec(compile(source, "setup.py", "exec"))
"""


def make(folder: Path, *arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run(["make", *arguments], cwd=folder, capture_output=True, text=True, check=False)


@pytest.fixture
def checkout(tmp_path):
    if shutil.which("make") is None:
        pytest.skip("no make on this machine")
    for name in ("Makefile", "setup.py", "pyproject.toml"):
        shutil.copy(ROOT / name, tmp_path)
    return tmp_path


def test_setup_tells_an_old_python_in_one_line_before_importing_setuptools():
    done = subprocess.run([sys.executable, "-S", "-c", OLD_PYTHON], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1
    assert "needs Python 3.12 or newer, this is 3.9" in done.stderr


def test_setup_parses_on_old_pythons():
    import ast

    ast.parse((ROOT / "setup.py").read_text(), feature_version=(3, 5))


def test_make_tells_an_unusable_python_in_one_line(checkout):
    old = checkout / "old_python"
    old.write_text("#!/bin/sh\nexit 1\n")
    old.chmod(0o755)
    done = make(checkout, "lint", f"PYTHON={old}")
    assert done.returncode != 0
    assert f"ngpt needs Python 3.12 or newer, found: {old}" in done.stderr
    assert not (checkout / ".venv").exists()


def test_make_installs_again_only_when_the_package_changed(checkout):
    (checkout / ".venv").mkdir()
    for stamp in (".installed", ".installed-dev"):
        (checkout / ".venv" / stamp).touch()
    assert "pip install" not in make(checkout, "--dry-run", "test").stdout
    (checkout / ".venv/.installed").unlink()
    assert "pip install" in make(checkout, "--dry-run", "test").stdout


def test_the_quickstart_installs_no_developer_tools(checkout):
    shown = make(checkout, "--dry-run", "quickstart").stdout
    assert "pip install" in shown and "[dev]" not in shown
    assert "[dev]" in make(checkout, "--dry-run", "test").stdout


def test_make_hands_its_options_to_the_quickstart(checkout):
    shown = make(checkout, "--dry-run", "quickstart", "FRESH=1", "PRECISION=bf16").stdout
    assert "launch.quickstart --fresh --precision bf16" in shown


def build(sources: Path, command: str, *options: str, **environment: str) -> None:
    done = subprocess.run(
        [sys.executable, "setup.py", "-q", command, *options],
        cwd=sources,
        env=os.environ | environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr


def git(folder: Path, *arguments: str) -> str:
    identity = ["-c", "user.name=A", "-c", "user.email=a@b.c"]
    return subprocess.run(["git", *identity, *arguments], cwd=folder, check=True, capture_output=True, text=True).stdout.strip()


@pytest.fixture
def sources(tmp_path):
    """A small checkout with the real setup.py."""
    folder = tmp_path / "sources"
    for package in ("launch", "ngpt"):
        (folder / package).mkdir(parents=True)
        (folder / package / "__init__.py").touch()
    (folder / "conf").mkdir()
    (folder / "conf" / "config.yaml").touch()
    (folder / "tests" / "unit").mkdir(parents=True)
    (folder / "tests" / "unit" / "test_it.py").touch()
    (folder / "Makefile").touch()
    (folder / ".gitignore").write_text("*.egg-info\n")
    shutil.copy(ROOT / "setup.py", folder)
    git(folder, "init", "--quiet")
    git(folder, "add", ".")
    git(folder, "commit", "--quiet", "--message", "first")
    return folder


def test_what_is_installed_knows_its_commit(sources, tmp_path):
    build(sources, "build_py", "--build-lib", str(tmp_path / "clean"))
    commit = git(sources, "rev-parse", "HEAD")
    wanted = {"commit": commit, "branch": None, "dirty": False, "untracked": [], "installed": True}
    assert git_state(tmp_path / "clean") == (wanted, "")
    (sources / "ngpt" / "changed.py").touch()
    build(sources, "build_py", "--build-lib", str(tmp_path / "changed"))
    assert git_state(tmp_path / "changed")[0] == wanted | {"dirty": True}


def test_an_archive_hands_its_commit_on(sources, tmp_path):
    build(sources, "sdist", "--dist-dir", str(tmp_path))
    (archive,) = tmp_path.glob("*.tar.gz")
    shutil.unpack_archive(archive, tmp_path / "unpacked", filter="data")
    (unpacked,) = (tmp_path / "unpacked").iterdir()
    build(unpacked, "build_py", "--build-lib", str(tmp_path / "built"))
    known = git_state(tmp_path / "built")[0]
    assert (known["commit"], known["dirty"]) == (git(sources, "rev-parse", "HEAD"), False)
    tracked = {path for path in git(sources, "ls-files").splitlines()}
    assert tracked <= {path.relative_to(unpacked).as_posix() for path in unpacked.rglob("*")}


def test_sources_without_git_take_the_commit_from_whoever_builds(sources, tmp_path):
    shutil.rmtree(sources / ".git")
    build(sources, "build_py", "--build-lib", str(tmp_path / "told"), NGPT_COMMIT="abc")
    assert git_state(tmp_path / "told")[0]["commit"] == "abc"
    build(sources, "build_py", "--build-lib", str(tmp_path / "untold"), NGPT_COMMIT="")
    assert git_state(tmp_path / "untold") == (None, "")


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """What a wheel of this checkout puts into site-packages."""
    folder = tmp_path_factory.mktemp("site")
    build(ROOT, "build_py", "--build-lib", str(folder))
    return folder


def test_what_is_installed_has_two_names_of_its_own_and_every_file_that_the_program_opens(installed):
    assert {path.name for path in installed.iterdir()} == {"megatron_ext", "ngpt"}  # ROS has a `launch`
    for folder, place in (("conf", "ngpt/conf"), ("launch", "ngpt/launch"), ("megatron_ext", "megatron_ext"), ("ngpt", "ngpt")):
        tracked = git(ROOT, "ls-files", folder).splitlines() if (ROOT / ".git").exists() else []
        assert [name for name in tracked if not (installed / place / Path(name).relative_to(folder)).is_file()] == []


# Every module of the command, and the commands of the processes that it starts.
LOADED = """
import pkgutil, sys
from importlib import import_module
from pathlib import Path
import ngpt.launch
for module in pkgutil.walk_packages(ngpt.launch.__path__, "ngpt.launch."):
    import_module(module.name)
assert "launch" not in sys.modules
from ngpt.launch import cli, doctor, hf_exports, processes, provenance, quickstart
from ngpt.launch.slurm.script import render
from ngpt.config.compose import compose
commands = [
    processes.worker_command([], 1, Path()),
    processes.worker_command([], 2, Path()),
    hf_exports.export_command(hf_exports.Request("run", 1, False, 0, False)),
    quickstart.NGPT,
    ["", "-m", doctor.WORKER],
]
assert {command[2].rpartition(".")[0] for command in commands} == {"ngpt.launch"}, commands
job = render(compose(["experiment=ngpt_tiny", "cluster=slurm_h100", "train.global_batch_size=16"]), Path("/run"), Path("/work"))
assert f"PYTHONPATH={provenance.SOURCE}" in job and job.count(" -m ngpt.launch.") == 2, job
assert Path(ngpt.launch.__file__).is_relative_to(provenance.SOURCE)
print(provenance.SOURCE)
sys.exit(cli.main(["config", "experiment=ngpt_tiny"]))
"""


def test_the_command_runs_under_its_installed_name_and_starts_what_it_needs_by_it(installed, tmp_path):
    """From a checkout, too: a job has the same names, and its container an installation of either kind."""
    for source in (installed, ROOT):
        environment = os.environ | {"PYTHONPATH": str(source)}
        done = subprocess.run([sys.executable, "-c", LOADED], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        assert done.stdout.startswith(f"{source}\n") and "115,776" in done.stdout


def test_the_registrys_page_has_no_dead_links(tmp_path):
    build(ROOT, "egg_info", "--egg-base", str(tmp_path))
    page = email.message_from_string((tmp_path / "ngpt_megatron.egg-info" / "PKG-INFO").read_text())
    assert re.findall(r"\]\((?!https?://)", page.get_payload()) == []
    assert "Operations (launch/OPERATIONS.md) has signals" in page.get_payload()
    assert page["License-Expression"] == "Apache-2.0" and page["Author"]
    assert {"gpu", "data", "hf", "eval", "wandb", "dev"} <= set(page.get_all("Provides-Extra"))
