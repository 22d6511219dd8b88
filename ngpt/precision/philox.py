"""Counter-based random bits: Philox4x32-7, bit for bit what the kernels draw.

One evaluation gives the 16 bits of 8 neighbouring columns. Counter: (column // 8, row, stream, 0); key: the seed's two halves. So an
element's bits depend on the seed, the stream and its place alone, whatever computes them and in which order. Seven rounds is the smallest
number with which all of the authors' tests pass. numpy computes them: its 64-bit integers are unsigned, and three times as fast as torch's.

Source: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", 2011.
"""

import numpy as np
import torch
from torch import Tensor

from ngpt.recipes import Direction

ROUNDS = 7
STREAMS: dict[Direction, int] = {"rowwise": 0, "columnwise": 1}
COLUMNS_PER_DRAW = 8
UNIFORM_BITS = 16

_MULTIPLIERS = (np.uint64(0xD2511F53), np.uint64(0xCD9E8D57))
_KEY_STEPS = (0x9E3779B9, 0xBB67AE85)
_MASK = 0xFFFFFFFF
_HALF = np.uint64(32)

Words = tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]


def philox4x32(counter: Words, seed: int, rounds: int = ROUNDS) -> Words:
    """The four random words of each counter.

    Args:
        counter: four uint64 arrays of values 0 .. 2^32 - 1 that broadcast together. An array is only as large as what its values depend on.
        seed: 0 .. 2^64 - 1.

    Returns:
        Four uint64 arrays whose low 32 bits count.
    """
    c0, c1, c2, c3 = counter
    key = [seed & _MASK, seed >> 32]
    for _ in range(rounds):
        product_0, product_2 = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        # c1 and c3 are whole products whose low halves are meant, so their high halves go after the xor.
        c0, c2 = _mixed(product_2, c1, key[0]), _mixed(product_0, c3, key[1])
        c1, c3 = product_2, product_0
        key = [(word + step) & _MASK for word, step in zip(key, _KEY_STEPS, strict=True)]
    return c0, c1, c2, c3


def _mixed(product: np.ndarray, word: np.ndarray, key: int) -> np.ndarray:
    mixed = (product >> _HALF) ^ word
    mixed ^= np.uint64(key)
    mixed &= np.uint64(_MASK)
    return mixed


def random_bits(seed: int, stream: int, rows: range, columns: int, device: torch.device | str = "cpu") -> Tensor:
    """uint16 [len(rows), columns]: 16 random bits for each element of some rows of a matrix.

    Args:
        seed: 0 .. 2^63 - 1.
        stream: what tells draws of one seed apart, see `STREAMS`.
        rows: which rows of the matrix, consecutive.
        columns: of the matrix, all of them.
    """
    draws = -(-columns // COLUMNS_PER_DRAW)
    column = np.arange(draws, dtype=np.uint64)[None, :]
    row = np.arange(rows.start, rows.stop, dtype=np.uint64)[:, None]
    words = philox4x32((column, row, np.full((1, 1), stream, np.uint64), np.zeros((1, 1), np.uint64)), seed)
    bits = np.empty((len(rows), draws, len(words)), np.dtype("<u4"))  # little endian: the low half of a word is the even column's
    for i, word in enumerate(words):
        bits[:, :, i] = word
    return torch.from_numpy(bits.view("<u2").reshape(len(rows), -1)).to(device)[:, :columns]


def uniforms(bits: Tensor) -> Tensor:
    """fp32 (bits + 1/2) / 2^16, exact: symmetric about 1/2, never 0 or 1."""
    return bits.float().add_(0.5).mul_(2.0**-UNIFORM_BITS)
