"""All Triton kernels but those of NVFP4 without a GPU: run in Triton's interpreter, and compiled for those they are for."""

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")
from ngpt.kernels import rows  # noqa: E402


def test_kernels_equal_fp64_in_the_interpreter(check_in_interpreter):
    files = ("rows", "cross_entropy", "rotary", "retract")
    check_in_interpreter(*(f"interpreted_{name}.py" for name in files), tests=131)


@pytest.mark.parametrize("limit", [232_448, 166_912], ids=["H100", "A100"])
@pytest.mark.parametrize("kernel", ["lerp", "activation"])
def test_tiles_loaded_ahead_fit_in_shared_memory(kernel, limit, monkeypatch):
    """The widest fp32 rows: three tensors of 64 KiB a tile."""
    import compile_rows

    monkeypatch.setattr(rows, "_shared_memory", lambda device: limit)
    module, tiling, switches = {
        "lerp": (compile_rows.normalize.lerp_backward_kernel, compile_rows.normalize_tilings.LERP_BACKWARD, {}),
        "activation": (compile_rows.activation.backward_kernel, compile_rows.activation_tilings.BACKWARD, compile_rows.SILU),
    }[kernel]
    height, columns, _ = tiling.tile(rows.MAX_WIDTH)
    stages = tiling.stages_for(12 * height * columns, torch.device("cpu"))
    binary = compile_rows.compiled(90, module, tiling, rows.MAX_WIDTH, switches, stages, activations="*fp32")
    assert stages < tiling.stages and binary.metadata.shared <= limit


def test_kernels_compile(check_compilation):
    """The interpreter accepts what the compiler does not."""
    check_compilation("compile_rows.py", "normalize", "scale", "activation", "cross_entropy", "rotary")
