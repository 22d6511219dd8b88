"""The reference quantiser of NVFP4: plain torch, any device, one fp32 operation at a time in the order of Transformer Engine's kernels.

Divisors and factors are tensors on the input's device, since on CUDA torch turns division by a Python number into a multiplication by its
reciprocal, and everywhere it turns number / tensor into reciprocal-then-multiply. Both round differently.
"""

import math

import torch
from torch import Tensor

from ngpt.precision.formats import (
    E2M1_MAX,
    decode_e4m3,
    encode_e2m1,
    encode_e2m1_stochastic,
    encode_e4m3,
    pack_e2m1,
    power_of_two,
)
from ngpt.precision.hadamard import random_hadamard_transform
from ngpt.precision.philox import STREAMS, random_bits, uniforms
from ngpt.precision.tensor import QuantizedTensor, decode_blocks
from ngpt.recipes import BLOCK, STATIC_AMAX, Direction, QuantizerSpec

_FLOAT32_MAX = torch.finfo(torch.float32).max
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Powers of two 2^j for which 1.3125 * 2^j, its encode scale and the inverse of that are normal fp32 numbers.
_POW2_EXPONENTS = (-115, 127)


def quantize(
    x: Tensor,
    spec: QuantizerSpec,
    direction: Direction = "rowwise",
    *,
    random_bytes: Tensor | None = None,
    seed: int | None = None,
) -> QuantizedTensor:
    """Quantise one direction of a tensor.

    Args:
        x: [..., K], fp32, bf16 or fp16; leading dimensions are flattened to rows.
        spec: what to compute.
        direction: "rowwise" blocks lie along K; "columnwise" quantises the transpose, blocks along the rows, after the RHT if any.
        random_bytes: for "sr": uint8 of the stored matrix's shape, 8 random bits an element as the hardware takes them.
        seed: for "sr": 63-bit seed of 16-bit uniforms, which lack the 8-bit rule's bias towards zero. See `ngpt.precision.philox`.

    Raises:
        ValueError: A dimension that blocks cannot tile, an unsupported dtype, or "sr" without exactly one source of randomness.

    Source: NVFP4 as Transformer Engine 2.20.2 computes it; arXiv 2509.25149.
    """
    return quantize_stored(stored_matrix(x, spec, direction), spec, direction, x.shape, random_bytes=random_bytes, seed=seed)


def stored_matrix(x: Tensor, spec: QuantizerSpec, direction: Direction) -> Tensor:
    """The matrix whose rows hold the blocks: x flattened to 2-D, transposed and RHT-transformed for the columnwise direction."""
    if direction not in ("rowwise", "columnwise"):
        raise ValueError(f"direction: {direction!r} is not 'rowwise' or 'columnwise'. Choose one of them.")
    matrix = as_matrix(x)
    if direction == "rowwise":
        return matrix
    return random_hadamard_transform(matrix.t().contiguous(), spec.rht)


def as_matrix(x: Tensor) -> Tensor:
    """x with its leading dimensions flattened to rows."""
    if x.dim() < 2:
        raise ValueError(f"{x.dim()} dimensions: a quantised tensor has at least 2. Add one with unsqueeze(0).")
    return x if x.dim() == 2 else x.reshape(math.prod(x.shape[:-1]), x.shape[-1])


def quantize_stored(
    matrix: Tensor,
    spec: QuantizerSpec,
    direction: Direction = "rowwise",
    shape: tuple[int, ...] | None = None,
    *,
    random_bytes: Tensor | None = None,
    seed: int | None = None,
) -> QuantizedTensor:
    """`quantize` from the stored matrix on, without transpose and RHT.

    Args:
        matrix: [R, C] as returned by `stored_matrix`.
        shape: of the original tensor; by default a 2-D one that fits `direction`.
    """
    check_stored(*matrix.shape, matrix.dtype, spec)
    values = matrix.float().contiguous()
    amax = _global_amax(values, spec)
    encode = global_encode_scale(amax, spec).view(-1, 1)
    block_amax = _block_amax(values, spec)
    if spec.four_over_six:
        codes, scales = _four_over_six(values, block_amax, amax.view(-1, 1), encode, spec)
    else:
        mult = encode * _constant(1 / E2M1_MAX, values)
        scales = encode_e4m3(torch.minimum(block_amax * mult, _constant(_FLOAT32_MAX, values)))
        codes = _encode(_scaled(values, scales, encode), spec, direction, random_bytes, seed)
    flushed = ((scales & 0x7F) == 0) & (block_amax != 0)
    return QuantizedTensor(
        codes=pack_e2m1(codes),
        block_decode_scale=scales,
        global_amax=amax,
        block_shape=spec.block_shape,
        shape=tuple(shape) if shape is not None else tuple(matrix.shape if direction == "rowwise" else matrix.t().shape),
        direction=direction,
        rht=spec.rht if direction == "columnwise" else "off",
        e4m3_bound=spec.e4m3_bound,
        saturated_elements=(values.abs() > amax.view(-1, 1)).sum(),
        flushed_blocks=flushed[:: spec.block_shape[0]].sum(),
    )


def _constant(value: float, like: Tensor) -> Tensor:
    return torch.full((), value, dtype=torch.float32, device=like.device)


def check_stored(rows: int, columns: int, dtype: torch.dtype, spec: QuantizerSpec) -> None:
    """Refuse a stored matrix that the spec's blocks cannot tile or whose dtype is not read."""
    if dtype not in _DTYPES:
        raise ValueError(f"dtype {dtype}: the quantiser reads fp32, bf16 and fp16. Cast the tensor first.")
    height, width = spec.block_shape
    if rows % height or columns % width:
        name, size, block = ("rows", rows, height) if rows % height else ("columns", columns, width)
        raise ValueError(
            f"{size} stored {name}: {height}x{width} blocks need a multiple of {block}. "
            f"Pad to {-(-size // block) * block} with zeros, or keep this tensor in bf16."
        )


def _global_amax(values: Tensor, spec: QuantizerSpec) -> Tensor:
    """fp32 [1], or [R] for a row-scaled spec. NaN propagates."""
    if spec.row_scaled:
        return values.abs().amax(dim=1)
    return rounded_amax(values.abs().amax().view(1) if values.numel() else values.new_zeros(1), spec)


def rounded_amax(amax: Tensor, spec: QuantizerSpec) -> Tensor:
    """The global amax that a spec derives from max |x|, fp32 [1]."""
    if spec.global_amax == "static":
        return torch.full_like(amax, spec.static_amax)
    return round_up_to_pow2_scale(amax) if spec.global_amax == "dynamic_pow2" else amax


def round_up_to_pow2_scale(amax: Tensor) -> Tensor:
    """The smallest 1.3125 * 2^j >= amax (at most j = 127, beyond which values saturate); 0, Inf and NaN stay."""
    mantissa, exponent = torch.frexp(amax)  # mantissa in [0.5, 1), and 1.3125 = 0.65625 * 2
    power = torch.where(mantissa > STATIC_AMAX / 2, exponent, exponent - 1).clamp(*_POW2_EXPONENTS)
    rounded = STATIC_AMAX * power_of_two(power)
    return torch.where(amax.isfinite() & (amax != 0), rounded, amax)


def global_encode_scale(amax: Tensor, spec: QuantizerSpec) -> Tensor:
    """fp32, amax's shape: what maps amax to the largest scale times the largest code; 1 where that is zero or there is nothing to map."""
    scale = torch.minimum(torch.div(_constant(E2M1_MAX * spec.e4m3_bound, amax), amax), _constant(_FLOAT32_MAX, amax))
    return torch.where((amax == 0) | (scale == 0), 1.0, scale)


def _block_amax(values: Tensor, spec: QuantizerSpec) -> Tensor:
    """fp32 [R, C / 16]; a 16x16 block's amax stands on each of its 16 rows. NaN propagates."""
    rows, columns = values.shape
    height = spec.block_shape[0]
    blocks = values.abs().view(rows // height, height, columns // BLOCK, BLOCK)
    return blocks.amax(dim=(1, 3)).repeat_interleave(height, dim=0)


def _scaled(values: Tensor, scales: Tensor, global_encode_scale: Tensor) -> Tensor:
    """x * encode scale of its block: the numbers that are rounded to E2M1."""
    one = _constant(1.0, values)
    decode = decode_e4m3(scales) * torch.div(one, global_encode_scale)
    encode = torch.minimum(torch.div(one, decode), _constant(_FLOAT32_MAX, values))
    return values * encode.repeat_interleave(BLOCK, dim=1)


def _encode(scaled: Tensor, spec: QuantizerSpec, direction: Direction, random_bytes: Tensor | None, seed: int | None) -> Tensor:
    if spec.rounding == "rtne":
        return encode_e2m1(scaled)
    if (random_bytes is None) == (seed is None):
        raise ValueError("rounding 'sr': needs exactly one source of randomness. Pass either random_bytes or seed.")
    if seed is not None:
        return encode_e2m1_stochastic(scaled, uniforms(_drawn_bits(scaled, spec, direction, seed)))
    if random_bytes.dtype != torch.uint8 or random_bytes.shape != scaled.shape:
        raise ValueError(
            f"random_bytes: {random_bytes.dtype} {tuple(random_bytes.shape)}; sr takes one uint8 an element of the stored matrix. "
            f"Pass uint8 {tuple(scaled.shape)}."
        )
    return encode_e2m1_stochastic(scaled, random_bytes.float() / 256)


def random_stream(spec: QuantizerSpec, direction: Direction) -> int:
    """Which random numbers of a seed "sr" takes. Each direction has its own, except that square blocks have the same codes in both."""
    return STREAMS["rowwise" if spec.block_shape == (BLOCK, BLOCK) else direction]


def _drawn_bits(stored: Tensor, spec: QuantizerSpec, direction: Direction, seed: int) -> Tensor:
    """Random bits belong to the elements of the matrix before the transpose, so that one pass over it can draw those of both directions."""
    if direction == "rowwise":
        return random_bits(seed, random_stream(spec, direction), range(stored.shape[0]), stored.shape[1], stored.device)
    return random_bits(seed, random_stream(spec, direction), range(stored.shape[1]), stored.shape[0], stored.device).t()


def _four_over_six(values: Tensor, block_amax: Tensor, amax: Tensor, encode: Tensor, spec: QuantizerSpec) -> tuple[Tensor, Tensor]:
    """Codes and scales of the better of map-to-4 and map-to-6 for every block; ties go to map-to-6."""
    to_six = torch.div(block_amax, _constant(E2M1_MAX, values)) * encode
    candidates = []
    for base in (to_six * _constant(1.5, values), to_six):
        scales = encode_e4m3(base)
        codes = encode_e2m1(_scaled(values, scales, encode))
        candidates.append((codes, scales, _block_error(values, codes, scales, amax, spec)))
    (codes_4, scales_4, error_4), (codes_6, scales_6, error_6) = candidates
    take_4 = error_4 < error_6
    return torch.where(take_4.repeat_interleave(BLOCK, dim=1), codes_4, codes_6), torch.where(take_4, scales_4, scales_6)


def _block_error(values: Tensor, codes: Tensor, scales: Tensor, amax: Tensor, spec: QuantizerSpec) -> Tensor:
    """fp32 [R, C / 16] error of a candidate in the input's domain, summed in the kernel's order (16 elements in turn, rows as a tree)."""
    rows, columns = values.shape
    product = decode_blocks(codes, scales) * amax
    difference = torch.div(product, _constant(E2M1_MAX * spec.e4m3_bound, values)) - values
    terms = difference * difference if spec.four_over_six.error == "MSE" else difference.abs()
    terms = terms.view(rows, columns // BLOCK, BLOCK)
    error = torch.zeros_like(terms[:, :, 0])
    for element in range(BLOCK):
        error = error + terms[:, :, element]
    if spec.block_shape[0] == 1:
        return error
    tree = error.view(rows // BLOCK, BLOCK, columns // BLOCK)
    while tree.shape[1] > 1:
        half = tree.shape[1] // 2
        tree = tree[:, :half] + tree[:, half:]
    return tree.squeeze(1).repeat_interleave(BLOCK, dim=0)
