"""The retraction's Triton kernels without a GPU: run in Triton's interpreter, and compiled for those they are for."""

import pytest

pytest.importorskip("triton", reason="Triton is not installed")


def test_kernels_equal_fp64_in_the_interpreter(check_in_interpreter):
    check_in_interpreter("interpreted_retract.py", tests=11)


def test_kernels_compile(check_compilation):
    """The interpreter accepts what the compiler does not."""
    check_compilation("compile_retract.py", "retract")
