"""Lets the tests of this folder, and the ones run under Triton's interpreter, share `nvfp4_cases`; what is compiled for GPUs."""

import ast
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

HERE = Path(__file__).parent
KERNELS = HERE.parents[2] / "ngpt" / "kernels"
CAPABILITIES = ("90", "100")
sys.path.insert(0, str(HERE))
if os.environ.get("TRITON_INTERPRET") == "1":
    import interpreter_patches  # noqa: F401


def launched_kernels(package: str) -> set[str]:
    """Names of the Triton functions of ngpt/kernels/<package>/kernels.py that are launched: those of others begin with an underscore."""
    functions = [node for node in ast.parse((KERNELS / package / "kernels.py").read_text()).body if isinstance(node, ast.FunctionDef)]
    names = {function.name for function in functions if any("triton.jit" in ast.unparse(line) for line in function.decorator_list)}
    return {f"ngpt.kernels.{package}.kernels {name}" for name in names if not name.startswith("_")}


@pytest.fixture
def check_in_interpreter(tmp_path) -> Callable[..., None]:
    """Runs test files in Triton's interpreter, at least this many tests, in a process of its own, since Triton decides at import."""

    def check(*files: str, tests: int) -> None:
        options = ["-q", "-p", "no:cacheprovider", f"--basetemp={tmp_path}"]
        command = [sys.executable, "-m", "pytest", *options, *(str(HERE / file) for file in files)]
        run = subprocess.run(command, env=os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
        assert run.returncode == 0, run.stdout[-5000:] + run.stderr[-2000:]
        assert int(re.search(r"(\d+) passed", run.stdout)[1]) >= tests

    return check


@pytest.fixture
def check_compilation() -> Callable[..., None]:
    """Runs a script that compiles kernels; every kernel of the packages must have machine code for every capability."""

    def check(script: str, *packages: str) -> None:
        command = [sys.executable, str(HERE / script), *CAPABILITIES]
        run = subprocess.run(command, capture_output=True, text=True)
        assert run.returncode == 0, run.stdout[-3000:] + run.stderr[-3000:]
        sizes: dict[str, list[int]] = {}
        for line in run.stdout.splitlines():
            kernel, _, size = line.rpartition(" ")
            sizes.setdefault(kernel, []).append(int(size))
        kernels = set().union(*map(launched_kernels, packages))
        assert sizes.keys() == {f"{capability} {kernel}" for capability in CAPABILITIES for kernel in kernels} and kernels
        assert all(size > 1000 for found in sizes.values() for size in found)

    return check
