"""The random Hadamard transform of NVFP4: 16 neighbouring tokens at a time, before wgrad operands are quantised."""

from typing import Literal

import torch
from torch import Tensor

from ngpt.recipes import Rht

HADAMARD_SIZE = 16
SIGNS = (1, 1, 1, -1, 1, -1, -1, -1, -1, -1, -1, 1, -1, 1, -1, -1)


def random_hadamard_transform(x: Tensor, rht: Rht = "signed") -> Tensor:
    """x viewed as [-1, 16] times diag(signs) H16 / 4 (Sylvester order), rounded to bf16, whatever dtype x has.

    Transformer Engine refuses fp32 input with this transform; its Python reference keeps such input in fp32 through it.
    `ngpt.precision.check_golden` accepts golden vectors made this way, and names them.

    The sums run in fp64, where 16 bf16 terms are exact unless their exponents lie more than 40 apart. So the result does not depend on
    the order of additions. An fp32 accumulator differs from it in the last bit where large terms cancel.

    Args:
        x: [..., C], C a multiple of 16, any floating dtype.
        rht: "signed" flips the fixed signs first, "unsigned" is the plain transform, "off" returns x.

    Returns:
        bf16 tensor of x's shape; x itself for "off".

    Raises:
        ValueError: C is not a multiple of 16.

    Source: NVFP4 as Transformer Engine 2.20.2 computes it; arXiv 2509.25149.
    """
    return x if rht == "off" else exact_hadamard_transform(x, rht).float().to(torch.bfloat16)


def exact_hadamard_transform(x: Tensor, rht: Literal["signed", "unsigned"]) -> Tensor:
    """`random_hadamard_transform` before it rounds: fp64."""
    if x.shape[-1] % HADAMARD_SIZE:
        raise ValueError(
            f"transformed dimension {x.shape[-1]}: the Hadamard transform mixes groups of {HADAMARD_SIZE}. "
            f"Pad it to {-(-x.shape[-1] // HADAMARD_SIZE) * HADAMARD_SIZE} or set rht='off'."
        )
    groups = x.double().reshape(-1, HADAMARD_SIZE)
    if rht == "signed":
        groups = groups * torch.tensor(SIGNS, dtype=torch.float64, device=x.device)
    half = 1
    while half < HADAMARD_SIZE:
        pairs = groups.view(-1, HADAMARD_SIZE // (2 * half), 2, half)
        groups = torch.stack((pairs[:, :, 0] + pairs[:, :, 1], pairs[:, :, 0] - pairs[:, :, 1]), dim=2).reshape(-1, HADAMARD_SIZE)
        half *= 2
    return (groups / 4).reshape(x.shape)
