"""The two number formats of NVFP4, bit by bit: E2M1 elements (two to a byte) and E4M3 block scales.

Written in integer and exact fp32 arithmetic, so the result does not depend on a cast that the device may or may not have.
Source: NVFP4 as Transformer Engine 2.20.2 computes it (`stochastic_round_fp4_e2m1`, `cvt.rn.satfinite`).
"""

import torch
from torch import Tensor

E2M1_VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
E2M1_MAX = 6.0
E2M1_SIGN_BIT = 8
E4M3_MAX = 448.0
E4M3_MAX_BYTE = 0x7E
E4M3_NAN_BYTE = 0x7F
E4M3_BIAS = 7
E4M3_MIN_EXPONENT = -6
E4M3_MANTISSA_BITS = 3

# (midpoint between two neighbours, whether the midpoint itself goes up): ties go to the even code.
_E2M1_MIDPOINTS = ((0.25, False), (0.75, True), (1.25, False), (1.75, True), (2.5, False), (3.5, True), (5.0, False))


def _with_sign(magnitude_code: Tensor, values: Tensor) -> Tensor:
    return torch.where(torch.signbit(values), magnitude_code + E2M1_SIGN_BIT, magnitude_code).to(torch.uint8)


def encode_e2m1(values: Tensor) -> Tensor:
    """Round to the nearest E2M1 code, ties to the even code, magnitudes beyond 6 to 6.

    Args:
        values: fp32, any shape.

    Returns:
        uint8 codes 0..15, one an element; bit 3 is the sign, kept for zero. NaN gives code 0: in NVFP4 its block scale is NaN.
    """
    magnitude = values.abs()
    codes = torch.zeros_like(values, dtype=torch.int32)
    for midpoint, tie_goes_up in _E2M1_MIDPOINTS:
        codes += (magnitude >= midpoint) if tie_goes_up else (magnitude > midpoint)
    return _with_sign(codes, values).masked_fill_(values.isnan(), 0)


def encode_e2m1_stochastic(values: Tensor, uniforms: Tensor) -> Tensor:
    """Round to one of the two neighbouring E2M1 codes, up (in magnitude) with the probability of the distance to the lower one.

    t = |v| + u * step(|v|) with step .5 below 2, 1 below 4 and 2 above; the result is t rounded down to the grid, at most 6.

    Args:
        values: fp32, any shape.
        uniforms: fp32, values' shape, in [0, 1): random bytes / 256 for the hardware's rule, which is biased to zero by step / 512, or
            odd multiples of 2^-17, which are not. The fp32 addition moves no value that lies on the grid.

    Returns:
        uint8 codes 0..15. NaN gives code 7 (+6), as cvt.satfinite does.
    """
    magnitude = values.abs()
    step = torch.where(magnitude < 2, 0.5, torch.where(magnitude < 4, 1.0, 2.0))
    moved = magnitude + uniforms * step
    codes = torch.zeros_like(values, dtype=torch.int32)
    for value in E2M1_VALUES[1:]:
        codes += moved >= value
    return _with_sign(codes, values).masked_fill_(values.isnan(), 7)


def decode_e2m1(codes: Tensor) -> Tensor:
    """fp32 values of E2M1 codes 0..15 (uint8, one an element)."""
    table = torch.tensor(E2M1_VALUES + tuple(-value for value in E2M1_VALUES), dtype=torch.float32, device=codes.device)
    return table[codes.long()]


def pack_e2m1(codes: Tensor) -> Tensor:
    """[..., C] codes to [..., C / 2] bytes, the even element in the low nibble.

    Raises:
        ValueError: C is odd.
    """
    if codes.shape[-1] % 2:
        raise ValueError(f"last dimension {codes.shape[-1]}: two codes share a byte, so it must be even. Pad with zeros.")
    return codes[..., 0::2] | (codes[..., 1::2] << 4)


def unpack_e2m1(packed: Tensor) -> Tensor:
    """[..., C / 2] bytes to [..., C] codes, the inverse of `pack_e2m1`."""
    return torch.stack((packed & 0xF, packed >> 4), dim=-1).flatten(-2)


def power_of_two(exponent: Tensor) -> Tensor:
    """fp32 2^exponent from int32 exponents -126..127, exact on every device (the pow of a GPU is not)."""
    return ((exponent + 127) << 23).view(torch.float32)


def encode_e4m3(values: Tensor) -> Tensor:
    """Round to the nearest E4M3 (fn) value, ties to even, magnitudes beyond 448 to 448, subnormals kept, NaN to 0x7F.

    Args:
        values: fp32, any shape.

    Returns:
        uint8 bytes of values' shape.
    """
    magnitude = torch.nan_to_num(values.abs(), nan=0.0, posinf=E4M3_MAX).clamp(max=E4M3_MAX)
    exponent = torch.frexp(magnitude.clamp(min=2.0**E4M3_MIN_EXPONENT)).exponent - 1
    significand = torch.round(magnitude * power_of_two(E4M3_MANTISSA_BITS - exponent)).to(torch.int32)  # exact product, ties to even
    # A significand of 8..15 carries the implicit bit; 16 rolls over into the next exponent and 0..7 is subnormal by itself.
    code = ((exponent - E4M3_MIN_EXPONENT) << E4M3_MANTISSA_BITS) + significand
    code = torch.where(torch.signbit(values), code + 0x80, code)
    return code.masked_fill(values.isnan(), E4M3_NAN_BYTE).to(torch.uint8)


def decode_e4m3(codes: Tensor) -> Tensor:
    """fp32 values of E4M3 (fn) bytes; 0x7F and 0xFF are NaN."""
    table = [_e4m3_value(byte) for byte in range(128)]
    return torch.tensor(table + [-value for value in table], dtype=torch.float32, device=codes.device)[codes.long()]


def _e4m3_value(byte: int) -> float:
    if byte == E4M3_NAN_BYTE:
        return float("nan")
    exponent, mantissa = divmod(byte, 2**E4M3_MANTISSA_BITS)
    if exponent == 0:
        return mantissa * 2.0 ** (E4M3_MIN_EXPONENT - E4M3_MANTISSA_BITS)
    return (2**E4M3_MANTISSA_BITS + mantissa) * 2.0 ** (exponent - E4M3_BIAS - E4M3_MANTISSA_BITS)
