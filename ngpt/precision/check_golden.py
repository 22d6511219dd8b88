"""Check the quantiser and the GEMM against a file of golden vectors: `python -m ngpt.precision.check_golden FILE.npz`.

On a GPU (`--device cuda`) the Triton kernels quantise, except for 4over6 and row-scaled options, which only the reference has.

Two formats, told apart by content. Cases (`__meta__`): tensors x [M, K], w [N, K], dy [M, N] with codes, scales, amax and dequantised
values of both directions, the RHT's output and the three GEMMs. Stochastic rounding (`x`, `rbits8`, `q`, `code`): one vector an element.
Whatever is missing, unknown or not checked counts as a failure.

One exception is accepted, counted and named: float32 input with the RHT. The vectors keep fp32 through the transform; Transformer Engine
refuses such input, and `random_hadamard_transform` rounds its output to bf16. There the fp32 output must lie within fp32 rounding of the
exact transform in every element, and rounded to bf16 it must be ours as far as any other. All else is checked as in the other cases: the
quantised values bit for bit, from the vectors' own fp32 output.
"""

import argparse
import dataclasses
import json
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np
import torch
from torch import Tensor

from ngpt.config.errors import ConfigError
from ngpt.kernels.nvfp4_quantize import quantize_packed
from ngpt.precision.formats import decode_e2m1, encode_e2m1_stochastic
from ngpt.precision.gemm import global_factor, qgemm
from ngpt.precision.hadamard import HADAMARD_SIZE, exact_hadamard_transform, random_hadamard_transform
from ngpt.precision.quantize import quantize_stored
from ngpt.precision.tensor import QuantizedTensor, equal_codes, equal_scales, equal_values
from ngpt.recipes import Direction, FourOverSix, QuantizerSpec, Rht

ROLES = ("x", "w", "dy")
DIRECTIONS: dict[str, Direction] = {"row": "rowwise", "col": "columnwise"}
GEMMS = {"fprop": ("x.row", "w.row"), "dgrad": ("dy.row", "w.col"), "wgrad": ("dy.col", "x.col")}
GEMM_DTYPES = {"f32": torch.float32, "bf16": torch.bfloat16}
GEMM_BOUND = 4e-7  # of the sum of absolute products
RHT_BOUND = 0.005  # share of elements of the RHT's output that may differ
RHT_FP32_BOUND = 2.0**-20  # of the sum of absolute terms: 15 additions in fp32, in any order
SR_ARRAYS = {"x", "rbits8", "q", "code"}

# Quantises a stored matrix; a kernel under test replaces it.
Quantizer = Callable[[Tensor, QuantizerSpec, Direction], QuantizedTensor]


@dataclass
class Outcome:
    """What was compared, and what was wrong. `passed` and `checked` count by kind."""

    checked: dict[str, int] = field(default_factory=dict)
    passed: dict[str, int] = field(default_factory=dict)
    failures: list[str] = field(default_factory=list)
    accepted: list[str] = field(default_factory=list)  # within the rule of the exception, see the module

    def add(self, kind: str, name: str, problems: list[str]) -> None:
        self.checked[kind] = self.checked.get(kind, 0) + 1
        self.passed[kind] = self.passed.get(kind, 0) + (not problems)
        if problems:
            self.failures.append(f"{name}: {', '.join(problems)}")

    @property
    def ok(self) -> bool:
        return bool(self.checked) and not self.failures

    def count(self, kind: str) -> str:
        return f"{self.passed.get(kind, 0)}/{self.checked.get(kind, 0)}"


class Arrays:
    """The arrays of a file as tensors on one device. It remembers which were asked for."""

    def __init__(self, arrays: Mapping[str, np.ndarray], device: str) -> None:
        self._arrays, self._device = arrays, device
        self.untouched = set(arrays)

    def get(self, name: str, bf16: bool = False) -> Tensor | None:
        """The named array, or None; with `bf16`, uint16 bits become bf16."""
        if name not in self._arrays:
            return None
        self.untouched.discard(name)
        array = self._arrays[name]
        if array.dtype == np.uint16 and bf16:
            return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16).to(self._device)
        return torch.from_numpy(array).to(self._device)


def case_spec(meta: dict[str, Any], role: str) -> QuantizerSpec:
    """The quantiser of a role in a case, from the case's metadata."""
    signs: Rht = "signed" if meta.get("signs", True) else "unsigned"
    four_over_six = meta.get("f46") if role != "dy" else None
    forced = role in meta.get("skip_amax", "").split()
    return QuantizerSpec(
        block_shape=tuple(meta.get("w_tile", (16, 16))) if role == "w" else (1, 16),
        global_amax="static" if forced else "dynamic",
        static_amax=1.0,
        rht=signs if meta.get("rht", True) and role != "w" else "off",
        four_over_six=FourOverSix(*four_over_six) if four_over_six else None,
        row_scaled=role == "x" and meta.get("row_scaled", False),
    )


def check_cases(
    arrays: Mapping[str, np.ndarray], metas: dict[str, dict[str, Any]], device: str, quantizer: Quantizer = quantize_stored
) -> Outcome:
    """Check every case of a golden file.

    Args:
        arrays: the file's arrays without `__meta__`.
        metas: the parsed `__meta__`.
        device: where the quantiser and the GEMM run.
        quantizer: what quantises; the reference by default.
    """
    golden, outcome = Arrays(arrays, device), Outcome()
    for case, meta in metas.items():
        operands = {}
        for role in ROLES:
            for side in DIRECTIONS:
                operands[f"{role}.{side}"] = _check_tensor(golden, outcome, f"{case}/{role}", side, case_spec(meta, role), quantizer)
        if not meta.get("quant_only", False):
            for name, (a, b) in GEMMS.items():
                _check_gemm(golden, outcome, f"{case}/{name}", operands[a], operands[b])
    outcome.failures.extend(f"{name}: array is not part of the format, not checked" for name in sorted(golden.untouched))
    return outcome


def _check_tensor(
    golden: Arrays, outcome: Outcome, name: str, side: str, spec: QuantizerSpec, quantizer: Quantizer
) -> QuantizedTensor | None:
    source = golden.get(f"{name}.in", bf16=True)
    fields = {part: golden.get(f"{name}.{side}_{part}") for part in ("codes", "scale", "amax", "deq")}
    missing = [f"{side}_{part} is missing" for part, array in fields.items() if array is None] + ["in is missing"] * (source is None)
    if missing:
        outcome.add("tensor", f"{name}.{side}", missing)
        return None
    matrix = source if side == "row" else source.t().contiguous()
    if side == "col" and spec.rht != "off":
        transformed = golden.get(f"{name}.col_in", bf16=True)
        _check_rht(outcome, f"{name}.col_in", matrix, transformed, spec.rht)
        matrix = matrix if transformed is None else transformed
    ours = quantizer(matrix, spec, DIRECTIONS[side])
    agreement = {
        "amax": equal_values(ours.global_amax, fields["amax"]),
        "scales": equal_scales(ours.block_decode_scale, fields["scale"]),
        "codes": equal_codes(ours.codes, fields["codes"], ours.block_decode_scale),
        "dequantised values": equal_values(ours.dequantize(), fields["deq"]),
    }
    outcome.add("tensor", f"{name}.{side}", [f"{part} differ" for part, equal in agreement.items() if not equal])
    return ours


def _check_rht(outcome: Outcome, name: str, matrix: Tensor, expected: Tensor | None, rht: Rht) -> None:
    if expected is None:
        outcome.add("rht", name, ["is missing"])
        return
    ours = random_hadamard_transform(matrix, rht)
    if matrix.dtype == expected.dtype == torch.float32 and matrix.shape == expected.shape:
        beyond = _beyond_fp32_rounding(matrix, expected, rht)
        outcome.failures.extend([f"{name}: {beyond} elements are not the transform in fp32"] * bool(beyond))
        outcome.accepted.extend([name] * (not beyond))
        expected = expected.bfloat16()
    if ours.shape != expected.shape or ours.dtype != expected.dtype:
        outcome.add("rht", name, [f"{expected.dtype} {tuple(expected.shape)}, expected {ours.dtype} {tuple(ours.shape)}"])
        return
    share = ((ours != expected) & ~(ours.isnan() & expected.isnan())).double().mean().item()
    outcome.add("rht", name, [f"{share:.2%} of the elements differ"] if share > RHT_BOUND else [])


def _beyond_fp32_rounding(matrix: Tensor, transformed: Tensor, rht: Rht) -> int:
    """How many elements are further from the exact transform than fp32 additions can explain."""
    exact = exact_hadamard_transform(matrix, rht)
    terms = matrix.double().abs().unflatten(-1, (-1, HADAMARD_SIZE)).sum(dim=-1) / 4
    close = (transformed.double() - exact).abs() <= RHT_FP32_BOUND * terms.repeat_interleave(HADAMARD_SIZE, dim=-1)
    return int((~close & ~(transformed.isnan() & exact.isnan()) & (transformed != exact)).sum())


def _check_gemm(golden: Arrays, outcome: Outcome, name: str, a: QuantizedTensor | None, b: QuantizedTensor | None) -> None:
    expected = {suffix: golden.get(f"{name}.{suffix}", bf16=True) for suffix in GEMM_DTYPES}
    problems = [f"{suffix} is missing" for suffix, array in expected.items() if array is None]
    if a is None or b is None:
        problems.append("an operand is missing")
    for suffix, dtype in GEMM_DTYPES.items() if not problems else ():
        if not gemm_within_bound(qgemm(a, b, dtype, "division"), expected[suffix], a, b):
            problems.append(f"{suffix} outside the bound")
    outcome.add("gemm", name, problems)


def gemm_within_bound(ours: Tensor, expected: Tensor, a: QuantizedTensor, b: QuantizedTensor) -> bool:
    """|difference| <= 4e-7 * sum|ab|, plus one ulp for bf16; where a result is not finite, the other is the same Inf or NaN."""
    if ours.shape != expected.shape or ours.dtype != expected.dtype:
        return False
    bound = GEMM_BOUND * global_factor(a, b, "division").double() * (a.decode().abs().double() @ b.decode().abs().double().t())
    if expected.dtype == torch.bfloat16:
        bound = bound + torch.ldexp(torch.ones_like(bound), torch.frexp(expected.double()).exponent - 8)
    close = (ours.double() - expected.double()).abs() <= bound
    same = (ours == expected) | (ours.isnan() & expected.isnan())
    return bool(torch.where(expected.isfinite() & ours.isfinite(), close, same).all())


def kernel_quantizer(matrix: Tensor, spec: QuantizerSpec, direction: Direction) -> QuantizedTensor:
    """`quantize_stored` by a GPU's kernels. For columnwise, it transposes back; the rotation has been done already."""
    unrotated = dataclasses.replace(spec, rht="off")
    if direction == "rowwise":
        return quantize_packed(matrix, unrotated, columnwise=False)[0]
    return dataclasses.replace(quantize_packed(matrix.t(), unrotated, rowwise=False)[1], rht=spec.rht)


def check_stochastic_rounding(arrays: Mapping[str, np.ndarray], device: str) -> Outcome:
    """Check E2M1 codes and values of every (input, random byte) pair."""
    golden, outcome = Arrays(arrays, device), Outcome()
    x, random_bytes, values, codes = (golden.get(name) for name in ("x", "rbits8", "q", "code"))
    ours = encode_e2m1_stochastic(x, random_bytes.float() / 256)
    right = (ours == codes) & (decode_e2m1(ours) == values)
    outcome.checked["vector"], outcome.passed["vector"] = right.numel(), int(right.sum())
    if not right.all():
        first = int((~right).nonzero()[0])
        outcome.failures.append(f"vector {first}: x {x[first].item()}, byte {random_bytes[first].item()}: code {ours[first].item()}")
    return outcome


def check_file(path: Path, device: str = "cpu", quantizer: Quantizer = quantize_stored) -> tuple[Outcome, str]:
    """Check a golden file of either format.

    Returns:
        The outcome and its summary for people.

    Raises:
        ConfigError: The file cannot be read or has neither format.
    """
    try:
        with np.load(path) as file:
            arrays = {name: file[name] for name in file.files}
        metas = json.loads(arrays.pop("__meta__").tobytes()) if "__meta__" in arrays else None
    except (OSError, ValueError, EOFError, TypeError, BadZipFile) as error:
        raise ConfigError(str(path), error, "A golden file is an .npz archive", "Name a file of the golden format") from error
    if metas is not None:
        outcome = check_cases(arrays, metas, device, quantizer)
        rht = f"{outcome.count('rht')} RHT inputs within bound\n{_accepted_line(outcome.accepted)}"
        return outcome, f"{rht}{outcome.count('tensor')} quantised tensors bit-identical, {outcome.count('gemm')} GEMMs within bound"
    if set(arrays) == SR_ARRAYS:
        outcome = check_stochastic_rounding(arrays, device)
        return outcome, f"{outcome.count('vector')} stochastic rounding vectors bit-identical"
    raise ConfigError(
        str(path),
        f"arrays {', '.join(sorted(arrays)[:5])}",
        "A golden file has `__meta__` with cases, or exactly x, rbits8, q and code",
        "Name a file of the golden format",
    )


def _accepted_line(accepted: list[str]) -> str:
    """The line of the summary that names the exception; empty where it was not needed."""
    if not accepted:
        return ""
    return f"{len(accepted)} accepted: float32 input with RHT, which Transformer Engine refuses: {', '.join(accepted)}\n"


def main(arguments: list[str] | None = None) -> int:
    """Entry point; 0 if everything in the file was checked and agrees, else 1."""
    parser = argparse.ArgumentParser("python -m ngpt.precision.check_golden", description="Check NVFP4 numerics against golden vectors.")
    parser.add_argument("file", type=Path, metavar="FILE.npz")
    parser.add_argument("--device", default="cpu", help="torch device the quantiser and the GEMM run on (default: cpu)")
    options = parser.parse_args(arguments)
    try:
        on_gpu = torch.device(options.device).type == "cuda"
        outcome, summary = check_file(options.file, options.device, kernel_quantizer if on_gpu else quantize_stored)
    except ConfigError as error:
        print(error, file=sys.stderr)
        return 1
    for failure in outcome.failures:
        print(failure, file=sys.stderr)
    if "tensor" in outcome.checked:
        print(f"quantised by {'the Triton kernels' if on_gpu else 'the reference'} on {options.device}")
    print(summary)
    return 0 if outcome.ok else 1


if __name__ == "__main__":
    sys.exit(main())
