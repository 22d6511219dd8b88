"""The experts' weight gradients without a GPU: plain torch; the kernel in Triton's interpreter, and compiled for those it is for."""

import re

import pytest
import torch
from grouped_gradient_cases import check, make_inputs

from ngpt.kernels.grouped_gradient import add_gradients

SIZES = [0, 5, 0, 8, 1, 27, 0]
SHARED_MEMORY = 233_472  # bytes of a multiprocessor of an H100 or H200, of which each program takes 1024 more than it asks for


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_plain_torch_adds_what_fp64_does(dtype, generator):
    assert not check(make_inputs(SIZES, 33, 7, dtype, generator))


def test_doubles_stay_doubles(generator):
    total, dy, x, ends = (tensor.double() for tensor in make_inputs([4, 2], 3, 5, torch.float32, generator))
    found = total.clone()
    add_gradients(found, dy, x, ends.int())
    wanted = total + torch.stack([dy[rows].t() @ x[rows] for rows in (slice(0, 4), slice(4, 6))])
    torch.testing.assert_close(found, wanted, rtol=1e-14, atol=1e-14)


def test_no_rows_and_no_experts_are_fine():
    for experts in (0, 3):
        total = torch.full((experts, 4, 2), torch.nan)
        add_gradients(total, torch.empty(0, 4), torch.empty(0, 2), torch.zeros(experts, dtype=torch.int32))
        assert total.isnan().all()


@pytest.mark.parametrize(
    ("total", "ends", "message"),
    [
        (torch.zeros(2, 4, 3), torch.ones(2, dtype=torch.int32), r"total \(2, 4, 3\).*\[E, N, K\]"),
        (torch.zeros(2, 4, 2), torch.ones(3, dtype=torch.int32), r"ends \(3,\)"),
        (torch.zeros(2, 4, 2), torch.ones(2, dtype=torch.int64), "torch.int64 ends"),
        (torch.zeros(2, 2, 4).mT, torch.ones(2, dtype=torch.int32), r"strides \(8, 1, 4\)"),
    ],
)
def test_what_does_not_fit_is_refused(total, ends, message):
    with pytest.raises(ValueError, match=message):
        add_gradients(total, torch.ones(1, 4), torch.ones(1, 2), ends)


def test_the_kernel_equals_fp64_in_the_interpreter(check_in_interpreter):
    pytest.importorskip("triton", reason="Triton is not installed")
    check_in_interpreter("interpreted_grouped_gradient.py", tests=11)


def test_the_kernel_compiles(check_compilation):
    """The interpreter accepts what the compiler does not."""
    pytest.importorskip("triton", reason="Triton is not installed")
    check_compilation("compile_grouped_gradient.py", "grouped_gradient")


def test_hopper_multiplies_from_shared_memory_without_spilling():
    """Asynchronous products and copies of 16 bytes, which the compiler gives up silently where it does not know the alignment."""
    pytest.importorskip("triton", reason="Triton is not installed")
    from compile_grouped_gradient import compiled

    kernel = compiled(90)
    assert 2 * (kernel.metadata.shared + 1024) <= SHARED_MEMORY, "two programs do not fit on a multiprocessor"
    copies = re.findall(r"cp\.async\.c[ag]\.shared\.global[^;]*, (0x\w+), ", kernel.asm["ptx"])
    assert "wgmma.mma_async" in kernel.asm["ptx"] and copies and set(copies) == {"0x10"}
    operations = set(re.findall(r"\b(HGMMA|LDGSTS|REDG|ATOMG|LDL|STL)\b", kernel.asm["sass"]))
    assert operations == {"HGMMA", "LDGSTS", "REDG"}, "sums are spilled, or the program waits for the total"
