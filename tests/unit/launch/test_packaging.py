"""What a stranger meets first: the Python check, and a Makefile that does nothing twice."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

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
    (checkout / ".venv/.installed").touch()
    assert "pip install" not in make(checkout, "--dry-run", "test").stdout
    (checkout / ".venv/.installed").unlink()
    assert "pip install" in make(checkout, "--dry-run", "test").stdout


def test_make_hands_its_options_to_the_quickstart(checkout):
    shown = make(checkout, "--dry-run", "quickstart", "FRESH=1", "PRECISION=bf16").stdout
    assert "launch.quickstart --fresh --precision bf16" in shown
