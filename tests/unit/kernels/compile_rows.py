"""Compile all kernels but those of NVFP4 for GPUs that need not be there: `python compile_rows.py CAPABILITY...`."""

import sys

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from ngpt.kernels.activation import kernels as activation
from ngpt.kernels.activation import triton as activation_tilings
from ngpt.kernels.cross_entropy import kernels as cross_entropy
from ngpt.kernels.cross_entropy import triton as cross_entropy_tilings
from ngpt.kernels.normalize import kernels as normalize
from ngpt.kernels.normalize import triton as normalize_tilings
from ngpt.kernels.rotary import kernels as rotary
from ngpt.kernels.rotary import triton as rotary_tilings
from ngpt.kernels.scale import kernels as scale
from ngpt.kernels.scale import triton as scale_tilings

FP32_POINTERS = {"scale_ptr", "alpha_ptr", "sums_ptr", "partial_ptr", "grad_scale_ptr", "angles_ptr"}
FP32_POINTERS |= {"largest_ptr", "total_ptr", "picked_ptr", "behind_ptr"}
INTEGER_POINTERS = {"table_ptr": "*i32", "targets_ptr": "*i64"}
OF_ROWS = {"EPSILON": 1e-12, "SUMS": 0}
WIDTH = 2048
SQUARED_RELU = OF_ROWS | {"FUNCTION": activation.FUNCTIONS["squared_relu"], "GATED": False, "NORM": True, "GROUPED": False}
SILU = SQUARED_RELU | {"FUNCTION": activation.FUNCTIONS["silu"], "GATED": True}
OF_HEADS = {"WIDTH": 128, "ROTATED": 128, "NORMALIZED": True, "HEADS": 16, "EACH": 4, "SHARES": 1, "EPSILON": 1e-12}
CONTROL = OF_HEADS | {"NORMALIZED": False}
OPTIONS = dict.fromkeys((cross_entropy.forward_kernel, cross_entropy.backward_kernel), {"enable_fp_fusion": False})
CASES = {
    "normalize forward": (normalize.forward_kernel, normalize_tilings.FORWARD, 6144, OF_ROWS),
    "normalize backward": (normalize.backward_kernel, normalize_tilings.BACKWARD, 6144, OF_ROWS),
    "normalize backward, first half": (normalize.backward_kernel, normalize_tilings.BACKWARD, WIDTH, {"SUMS": 1}),
    "normalize backward, second half": (normalize.backward_kernel, normalize_tilings.BACKWARD, WIDTH, {"SUMS": 2}),
    "lerp forward": (normalize.lerp_forward_kernel, normalize_tilings.LERP_FORWARD, WIDTH, OF_ROWS),
    "lerp backward": (normalize.lerp_backward_kernel, normalize_tilings.LERP_BACKWARD, WIDTH, OF_ROWS),
    "scale forward": (scale.forward_kernel, scale_tilings.FORWARD, WIDTH, {}),
    "scale backward": (scale.backward_kernel, scale_tilings.BACKWARD, WIDTH, {}),
    "activation forward": (activation.forward_kernel, activation_tilings.FORWARD, 1856, SILU | {"GROUPED": True}),
    "activation backward": (activation.backward_kernel, activation_tilings.BACKWARD, 6144, SQUARED_RELU),
    "activation backward, first half": (activation.backward_kernel, activation_tilings.BACKWARD, WIDTH, SILU | {"SUMS": 1}),
    "activation backward, second half": (activation.backward_kernel, activation_tilings.BACKWARD, WIDTH, SQUARED_RELU | {"SUMS": 2}),
    "sum of pieces": (activation.sum_pieces_kernel, activation_tilings.BACKWARD, WIDTH, {}),
    "tokens forward": (scale.tokens_forward_kernel, scale_tilings.TOKENS, WIDTH, {}),
    "tokens backward": (scale.tokens_backward_kernel, scale_tilings.TOKENS, WIDTH, {}),
    "cross entropy forward": (cross_entropy.forward_kernel, cross_entropy_tilings.FORWARD, WIDTH, {"SCALED": True, "E": 8}),
    "cross entropy backward": (cross_entropy.backward_kernel, cross_entropy_tilings.BACKWARD, WIDTH, {"SCALED": True, "OTHER": True}),
    "rotary forward": (rotary.forward_kernel, rotary_tilings.FORWARD, 64, OF_HEADS),
    "rotary forward of the control": (rotary.forward_kernel, rotary_tilings.FORWARD, 64, CONTROL),
    "rotary forward, part of a head": (rotary.forward_kernel, rotary_tilings.FORWARD, 64, OF_HEADS | {"ROTATED": 64}),
    "rotary backward": (rotary.backward_kernel, rotary_tilings.BACKWARD, 64, OF_HEADS),
    "rotary backward of the control": (rotary.backward_kernel, rotary_tilings.BACKWARD, 64, CONTROL),
    "rotary backward without positions": (rotary.backward_kernel, rotary_tilings.BACKWARD, 64, OF_HEADS | {"ROTATED": 0}),
}
for name in activation.FUNCTIONS.keys() - {"squared_relu", "silu"}:
    switches = SILU | {"FUNCTION": activation.FUNCTIONS[name]}
    CASES[f"activation backward, {name}"] = (activation.backward_kernel, activation_tilings.BACKWARD, 1856, switches)


def compiled(
    capability: int, kernel: triton.JITFunction, tiling, width: int, switches: dict, stages: int | None = None, activations: str = "*bf16"
):
    """The compiled kernel for rows of this width."""
    by_strip = kernel in (scale.forward_kernel, scale.backward_kernel, activation.sum_pieces_kernel, cross_entropy.backward_kernel)
    rows, columns, warps = tiling.strip(width) if by_strip else tiling.tile(width)
    values = {"WIDTH": width, "R": rows, "C": columns, "STAGES": stages or tiling.stages} | switches
    names = kernel.arg_names

    def kind(name: str) -> str:
        if name.isupper():
            return "constexpr"
        if name.endswith("_ptr"):
            return INTEGER_POINTERS.get(name) or ("*fp32" if name in FP32_POINTERS or "inverse" in name else activations)
        return "fp32" if name == "factor" else "i32"

    aligned = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(names) if name.endswith(("_ptr", "stride", "width"))}
    constants = {(names.index(name),): value for name, value in values.items() if name in names}
    source = ASTSource(kernel, {name: kind(name) for name in names}, constants, aligned)
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options={"num_warps": warps} | OPTIONS.get(kernel, {}))


if __name__ == "__main__":
    for capability in map(int, sys.argv[1:]):
        for kernel, *others in CASES.values():
            print(capability, kernel.fn.__module__, kernel.fn.__name__, len(compiled(capability, kernel, *others).asm["cubin"]))
