"""A matrix in NVFP4: packed E2M1 codes, E4M3 block scales and the fp32 global amax."""

from dataclasses import dataclass

import torch
from torch import Tensor

from ngpt.precision.formats import E2M1_MAX, decode_e2m1, decode_e4m3, unpack_e2m1
from ngpt.recipes import BLOCK, DIRECTIONS, BlockShape, Direction, Rht

_STATE_VERSION = 1
_RHTS: tuple[Rht, ...] = ("off", "signed", "unsigned")
_STATE_TENSORS = ("codes", "block_decode_scale", "global_amax", "saturated_elements", "flushed_blocks")


@dataclass(frozen=True, eq=False)
class QuantizedTensor:
    """One direction of a quantised tensor, stored as a matrix [R, C] with blocks of 16 along C.

    rowwise: R = product of the leading dimensions, C = last dimension. columnwise: the transpose, in the rotated domain if `rht` is
    not "off".

    Attributes:
        codes: uint8 [R, C / 2], two E2M1 codes a byte, the even element in the low nibble.
        block_decode_scale: uint8 [R, C / 16], E4M3 bytes. A 16x16 block has its byte on all of its 16 rows.
        global_amax: fp32 [1], or [R] where row-scaled: the magnitude that the largest scale and code stand for.
        block_shape: (1, 16) or (16, 16).
        shape: of the tensor that was quantised, before any transpose.
        direction: "rowwise" or "columnwise".
        rht: transform the stored matrix went through.
        e4m3_bound: block scale that global_amax maps to: 448, or 256 for a 4over6 option.
        saturated_elements: int64 [], elements beyond global_amax, which were clipped.
        flushed_blocks: int64 [], blocks with a nonzero element whose scale rounded to zero.
    """

    codes: Tensor
    block_decode_scale: Tensor
    global_amax: Tensor
    block_shape: BlockShape
    shape: tuple[int, ...]
    direction: Direction
    rht: Rht
    e4m3_bound: int
    saturated_elements: Tensor
    flushed_blocks: Tensor

    @property
    def stored_shape(self) -> tuple[int, int]:
        """(R, C) of the stored matrix."""
        return self.codes.shape[0], 2 * self.codes.shape[1]

    @property
    def decode_factor(self) -> Tensor:
        """fp64 [1, 1], or [R, 1] where row-scaled: the factor for `decode`."""
        return _decode_factor(self.global_amax, self.e4m3_bound).view(-1, 1)

    def decode(self) -> Tensor:
        """fp32 [R, C]: code * block scale, exact in fp32 and in bf16, without the global scale."""
        return decode_blocks(unpack_e2m1(self.codes), self.block_decode_scale)

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """[R, C] values in the stored orientation (columnwise: transposed, and rotated by the RHT).

        fp32 code * (block scale * amax * fl(1 / (6 * bound))), the order of Transformer Engine's kernel, then one rounding to `dtype`.
        """
        reciprocal = torch.tensor(1 / (E2M1_MAX * self.e4m3_bound), dtype=torch.float32, device=self.codes.device)
        scale = decode_e4m3(self.block_decode_scale) * self.global_amax.view(-1, 1) * reciprocal
        return (decode_e2m1(unpack_e2m1(self.codes)) * scale.repeat_interleave(BLOCK, dim=1)).to(dtype)

    def counters(self) -> dict[str, int]:
        """Elements and blocks, how many elements were clipped and how many blocks flushed to zero. Waits for the device."""
        elements = self.stored_shape[0] * self.stored_shape[1]
        return {
            "elements": elements,
            "blocks": elements // (self.block_shape[0] * self.block_shape[1]),
            "saturated_elements": int(self.saturated_elements),
            "flushed_blocks": int(self.flushed_blocks),
        }

    def same_as(self, other: "QuantizedTensor") -> bool:
        """Equal layout, scales, amax and codes, where NaN = NaN, scale bytes 0x7F = 0xFF, -0 = 0 and codes under scale 0 do not count."""
        layout = (self.block_shape, self.shape, self.direction, self.rht, self.e4m3_bound)
        if layout != (other.block_shape, other.shape, other.direction, other.rht, other.e4m3_bound):
            return False
        return (
            equal_values(self.global_amax, other.global_amax)
            and equal_scales(self.block_decode_scale, other.block_decode_scale)
            and equal_codes(self.codes, other.codes, self.block_decode_scale)
        )

    def to_tensors(self) -> dict[str, Tensor]:
        """The state as plain tensors, for checkpoints and autograd's saved tensors."""
        layout = [_STATE_VERSION, *self.block_shape, DIRECTIONS.index(self.direction), _RHTS.index(self.rht), self.e4m3_bound, *self.shape]
        return {name: getattr(self, name) for name in _STATE_TENSORS} | {"layout": torch.tensor(layout, dtype=torch.int64)}

    @classmethod
    def from_tensors(cls, tensors: dict[str, Tensor]) -> "QuantizedTensor":
        """The inverse of `to_tensors`.

        Raises:
            ValueError: The state was written by another version of this format.
        """
        version, rows, columns, direction, rht, e4m3_bound, *shape = tensors["layout"].tolist()
        if version != _STATE_VERSION:
            raise ValueError(f"state version {version}: this code reads version {_STATE_VERSION}. Load it with the code that wrote it.")
        return cls(
            **{name: tensors[name] for name in _STATE_TENSORS},
            block_shape=(rows, columns),
            shape=tuple(shape),
            direction=DIRECTIONS[direction],
            rht=_RHTS[rht],
            e4m3_bound=e4m3_bound,
        )


@dataclass(frozen=True)
class Operand:
    """A quantised and dequantised matrix as an ordinary GEMM reads it.

    Attributes:
        values: [M, K], never transposed: code * block scale, times `decode_factor` where that is a power of two. Exact in bf16.
        global_amax: fp32 [1], the magnitude whose `decode_factor` is still to be applied; None where values hold it. One a stored row for
            a row-scaled spec.
        e4m3_bound: block scale that global_amax maps to: 448, or 256 for a 4over6 option.
    """

    values: Tensor
    global_amax: Tensor | None
    e4m3_bound: int

    @property
    def decode_factor(self) -> Tensor | None:
        """fp64, of global_amax's shape: the factor that values still lack; None where they hold it."""
        return None if self.global_amax is None else _decode_factor(self.global_amax, self.e4m3_bound)


def _decode_factor(global_amax: Tensor, e4m3_bound: int) -> Tensor:
    """fp64: the value of code 1 under block scale 1. Divides by a tensor, since CUDA multiplies by the reciprocal of a Python number."""
    amax = global_amax.double()
    return torch.div(amax, torch.full_like(amax, E2M1_MAX * e4m3_bound))


def decode_blocks(codes: Tensor, block_decode_scale: Tensor) -> Tensor:
    """fp32 [R, C] product of unpacked codes [R, C] and the E4M3 bytes [R, C / 16] of their blocks."""
    return decode_e2m1(codes) * decode_e4m3(block_decode_scale).repeat_interleave(BLOCK, dim=1)


def equal_values(a: Tensor, b: Tensor) -> bool:
    """Whether two floating tensors agree bit for bit, except NaN = NaN and -0 = 0."""
    return a.shape == b.shape and a.dtype == b.dtype and bool(((a == b) | (a.isnan() & b.isnan())).all())


def equal_scales(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors of E4M3 bytes agree, except NaN = NaN and -0 = 0."""
    return equal_values(decode_e4m3(a), decode_e4m3(b))


def equal_codes(a: Tensor, b: Tensor, block_decode_scale: Tensor) -> bool:
    """Whether packed codes agree wherever the scale is not zero, except -0 = 0."""
    if a.shape != b.shape:
        return False
    codes_a, codes_b = unpack_e2m1(a), unpack_e2m1(b)
    counts = ((block_decode_scale & 0x7F) != 0).repeat_interleave(BLOCK, dim=1)
    both_zero = ((codes_a & 7) == 0) & ((codes_b & 7) == 0)
    return bool(((codes_a == codes_b) | both_zero | ~counts).all())
