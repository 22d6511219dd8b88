"""The retraction's Triton kernels compiled for the GPUs they are for. In the interpreter: test_rows_triton.py."""

import pytest

pytest.importorskip("triton", reason="Triton is not installed")


def test_kernels_compile(check_compilation):
    """The interpreter accepts what the compiler does not."""
    check_compilation("compile_retract.py", "retract")
