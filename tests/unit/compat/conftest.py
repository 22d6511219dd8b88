"""What the tests of the patches share: upstream as it is on disk, and a fresh process to patch."""

import ast
import importlib.util
import os
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
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


VARIABLES = {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", "PYTHONPATH": str(REPOSITORY)}


@pytest.fixture(scope="session")
def run_script(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., str]:
    """Runs Python text in a process of its own without CUDA and returns what it printed."""

    def run(text: str, returncode: int = 0) -> str:
        folder = tmp_path_factory.mktemp("script")
        (folder / "script.py").write_text(textwrap.dedent(text))
        # Files, not pipes: a process that the script leaves behind would keep a pipe open.
        with (folder / "stdout").open("w") as stdout, (folder / "stderr").open("w") as stderr:
            command = [sys.executable, "script.py"]
            done = subprocess.run(command, env=os.environ | VARIABLES, cwd=folder, stdout=stdout, stderr=stderr, timeout=300)
        assert done.returncode == returncode, (folder / "stderr").read_text()
        return (folder / "stdout").read_text()

    return run


# Imports and patches once, which takes seconds. Then it forks a process for each folder whose script.py it is told to run. These end by
# os._exit, since taking everything apart would take seconds again.
INSTALLED = """
import os, runpy, sys, traceback
from megatron_ext import compat
compat.install(cpu=True)
import megatron.training.training, megatron.core.dist_checkpointing, megatron.core.datasets.gpt_dataset
for line in sys.stdin:
    child = os.fork()
    if child == 0:
        os.chdir(line.strip())
        for number, name in ((0, "/dev/null"), (1, "stdout"), (2, "stderr")):
            os.dup2(os.open(name, os.O_RDWR | os.O_CREAT), number)
        try:
            runpy.run_path("script.py", run_name="__main__")
            code = 0
        except BaseException:
            traceback.print_exc()
            code = 1
        sys.stdout.flush()
        os._exit(code)
    print("ended", os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
os._exit(0)
"""


@pytest.fixture(scope="session")
def run_installed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[str], str]]:
    """Runs Python text in a process of its own in which `compat.install(cpu=True)` came first, and returns what it printed."""
    with (tmp_path_factory.mktemp("server") / "stderr").open("w+") as stderr:
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": stderr, "text": True}
        with subprocess.Popen([sys.executable, "-c", INSTALLED], env=os.environ | VARIABLES, **pipes) as server:

            def run(text: str) -> str:
                folder = tmp_path_factory.mktemp("script")
                (folder / "script.py").write_text(textwrap.dedent(text))
                print(folder, file=server.stdin, flush=True)
                said = next((line for line in server.stdout if line.startswith("ended")), None)
                assert said is not None, Path(stderr.name).read_text()
                assert said == "ended 0\n", (folder / "stderr").read_text()
                return (folder / "stdout").read_text()

            yield run
            server.stdin.close()
