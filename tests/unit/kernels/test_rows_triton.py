"""All Triton kernels but those of NVFP4 without a GPU: run in Triton's interpreter, and compiled for those they are for."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="Triton is not installed")

HERE = Path(__file__).parent


def test_kernels_equal_fp64_in_the_interpreter(tmp_path):
    """A process of its own: Triton decides at import whether it interprets."""
    files = [str(HERE / f"interpreted_{name}.py") for name in ("rows", "cross_entropy", "rotary")]
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"--basetemp={tmp_path}", *files]
    run = subprocess.run(command, env=os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout[-5000:] + run.stderr[-2000:]
    assert int(re.search(r"(\d+) passed", run.stdout)[1]) >= 90


def test_kernels_compile(check_compilation):
    """The interpreter accepts what the compiler does not."""
    check_compilation("compile_rows.py", "normalize", "scale", "activation", "cross_entropy", "rotary")
