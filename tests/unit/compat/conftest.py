"""What the tests of the patches share: upstream as it is on disk, and a fresh process to patch."""

import ast
import importlib.util
import os
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[3]


@pytest.fixture(scope="session")
def upstream_source() -> Callable[[str, str], str]:
    """Source of a function of the installed Megatron by file and qualified name, read from disk: a patch in memory does not show."""
    folder = Path(next(iter(importlib.util.find_spec("megatron").submodule_search_locations)))

    def source(file: str, name: str) -> str:
        text = (folder / file).read_text()
        node: ast.AST = ast.parse(text)
        for part in name.split("."):
            node = next(child for child in ast.walk(node) if isinstance(child, ast.FunctionDef | ast.ClassDef) and child.name == part)
        return ast.get_source_segment(text, node)

    return source


@pytest.fixture(scope="session")
def run_script(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., str]:
    """Runs Python text in a process of its own without CUDA and returns what it printed."""

    def run(text: str, returncode: int = 0) -> str:
        folder = tmp_path_factory.mktemp("script")
        (folder / "script.py").write_text(textwrap.dedent(text))
        variables = {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", "PYTHONPATH": str(REPOSITORY)}
        environment = os.environ | variables
        # Files, not pipes: a process that the script leaves behind would keep a pipe open.
        with (folder / "stdout").open("w") as stdout, (folder / "stderr").open("w") as stderr:
            command = [sys.executable, "script.py"]
            done = subprocess.run(command, env=environment, cwd=folder, stdout=stdout, stderr=stderr, timeout=300)
        assert done.returncode == returncode, (folder / "stderr").read_text()
        return (folder / "stdout").read_text()

    return run
