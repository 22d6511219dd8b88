"""The Triton kernels where there is no GPU: run in Triton's interpreter, and compiled for the GPUs they are for."""

import pytest

pytest.importorskip("triton", reason="Triton is not installed")


def test_kernels_equal_the_reference_in_the_interpreter(check_in_interpreter):
    check_in_interpreter("interpreted_nvfp4.py", tests=50)


def test_kernels_compile(check_compilation):
    """The interpreter accepts what the compiler does not."""
    check_compilation("compile_nvfp4.py", "nvfp4_quantize")
