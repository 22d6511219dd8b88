"""The Triton kernels where there is no GPU: run in Triton's interpreter, and compiled for the GPUs they are for."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="Triton is not installed")

HERE = Path(__file__).parent


def test_kernels_equal_the_reference_in_the_interpreter():
    """A process of its own: Triton decides at import whether it interprets."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(HERE / "interpreted_nvfp4.py")]
    run = subprocess.run(command, env=os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout[-5000:] + run.stderr[-2000:]
    assert int(re.search(r"(\d+) passed", run.stdout)[1]) >= 50


def test_kernels_compile(check_compilation):
    """The interpreter accepts what the compiler does not."""
    check_compilation("compile_nvfp4.py", "nvfp4_quantize")
