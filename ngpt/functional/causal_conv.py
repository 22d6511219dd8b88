"""The short causal convolution in front of Mamba-2's scan, in plain torch with autograd's gradients.

Shapes: B batch, S sequence, F features (each has its own filter), W filter width.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def causal_conv_silu(x_BSF: Tensor, weight_FW: Tensor, bias_F: Tensor, seq_idx_BS: Tensor | None = None) -> Tensor:
    """SiLU(bias + sum over w of weight[:, w] * x[s - (W - 1) + w]); before the start of a document x counts as zero.

    One multiply-add over all features for each of the few taps. Keeps x, in the dtype of the arithmetic, and the sum before SiLU for
    the backward pass.

    Args:
        x_BSF: any floating dtype.
        weight_FW: the last column meets the token itself.
        bias_F: one number a feature.
        seq_idx_BS: number of the document that each token belongs to; it never returns once another has begun. None: one
            document a row.

    Returns:
        [B, S, F] in x's dtype. All arithmetic is fp32 (fp64 for fp64), rounded once.

    Source: Mamba-2, arXiv 2405.21060 section 7.1.
    """
    wide = torch.promote_types(x_BSF.dtype, torch.float32)
    length, width = x_BSF.shape[1], weight_FW.shape[1]
    padded = F.pad(x_BSF.to(wide), (0, 0, width - 1, 0))
    out_BSF = bias_F.to(wide)
    for tap, weight_F in enumerate(weight_FW.to(wide).unbind(1)):
        shifted_BSF = padded[:, tap : tap + length]
        lag = width - 1 - tap
        if seq_idx_BS is not None and 0 < lag < length:
            inside_BS = F.pad(seq_idx_BS[:, lag:] == seq_idx_BS[:, :-lag], (lag, 0))
            shifted_BSF = shifted_BSF * inside_BS[..., None]
        out_BSF = torch.addcmul(out_BSF, shifted_BSF, weight_F)
    return F.silu(out_BSF).to(x_BSF.dtype)
