"""Mamba-2's state-space scan (SSD) in plain torch, chunk by chunk, with autograd's gradients: any device, no compiled kernel.

Shapes: B batch, S sequence, H heads of P features, G groups of R = H / G heads, N state size, K chunks of Q tokens.

For each head, with decay a_t = exp(dt_t * A):

    state_t = a_t * state_(t-1) + dt_t * x_t (outer) B_t        [P, N]
    y_t     = state_t C_t + D * x_t                             [P]

The recurrence is linear, so the tokens of a chunk reach each other through one lower triangular matrix a head,
(C_i . B_j) * a_(j+1) ... a_i, and the past reaches them through the state at the chunk's start. Only those states are computed one
after the other.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def ssd_scan(
    x_BSHP: Tensor,
    dt_BSH: Tensor,
    A_H: Tensor,
    B_BSGN: Tensor,
    C_BSGN: Tensor,
    chunk_size: int,
    D: Tensor | None = None,
    initial_states_BHPN: Tensor | None = None,
    seq_idx_BS: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Runs the recurrence over a whole sequence of any length.

    Work is O(S * Q * (H * P + G * N) + S * H * P * N). Autograd keeps about 2 * B * S * H * Q numbers (the triangular matrices and their
    decays) and 2 * B * S / Q * H * P * N (the states at the chunks' starts) beside some tensors of the inputs' sizes: linear in S, so the
    chunk size trades one for the other. The result does not depend on it.

    Args:
        x_BSHP: inputs, any floating dtype.
        dt_BSH: step sizes, not negative (after the softplus).
        A_H: negative rates of decay.
        B_BSGN: input vectors, shared by the R consecutive heads of a group.
        C_BSGN: output vectors, shared likewise.
        chunk_size: Q; a shorter last chunk is filled up with tokens that neither decay nor feed the state.
        D: [H] or [H, P], the weight of x in y; None: zero.
        initial_states_BHPN: the state before the first token, of the first token's document; None: zero.
        seq_idx_BS: number of the document that each token belongs to; it never returns once another has begun. Every
            document starts from a zero state. None: one document a row.

    Returns:
        y [B, S, H, P] in x's dtype, and the state after the last token [B, H, P, N]. All arithmetic and the state are fp32 (fp64 for
        fp64); exponents of decays are summed in fp64, because their differences between neighbours are small beside the sums.

    Source: Mamba-2, arXiv 2405.21060 section 6.
    """
    batch, length, heads, _ = x_BSHP.shape
    groups = B_BSGN.shape[2]
    wide = torch.promote_types(x_BSHP.dtype, torch.float32)
    chunk = min(chunk_size, length)
    x, dt = x_BSHP.to(wide), dt_BSH.to(wide)
    seq_idx = torch.zeros(batch, length, dtype=torch.int32, device=x.device) if seq_idx_BS is None else seq_idx_BS
    seq_idx_BKQ = torch.cat([seq_idx, seq_idx[:, -1:].expand(-1, -length % chunk)], dim=1).unflatten(1, (-1, chunk))

    u_BKQGRP = _chunked(x * dt[..., None], chunk).unflatten(3, (groups, -1))
    # Not cumsum(dtype=...): its gradient is summed in the input's dtype.
    exponent_BKGRQ = _chunked(dt * A_H.to(wide), chunk).double().unflatten(3, (groups, -1)).permute(0, 1, 3, 4, 2).cumsum(-1)
    B_BKQGN, C_BKQGN = _chunked(B_BSGN.to(wide), chunk), _chunked(C_BSGN.to(wide), chunk)
    state_BGRPN = u_BKQGRP.new_zeros(batch, *u_BKQGRP.shape[3:], B_BSGN.shape[-1])
    if initial_states_BHPN is not None:
        state_BGRPN = initial_states_BHPN.to(wide).unflatten(1, (groups, -1))

    y_BKQGRP = _within_chunks(u_BKQGRP, exponent_BKGRQ, B_BKQGN, C_BKQGN, seq_idx_BKQ)
    past_BKQGRP, state_BGRPN = _across_chunks(u_BKQGRP, exponent_BKGRQ, B_BKQGN, C_BKQGN, seq_idx_BKQ, state_BGRPN)
    y_BSHP = (y_BKQGRP + past_BKQGRP).flatten(3, 4).flatten(1, 2)[:, :length]
    if D is not None:
        y_BSHP = y_BSHP + D.to(wide).view(heads, -1) * x
    return y_BSHP.to(x_BSHP.dtype), state_BGRPN.flatten(1, 2)


def _chunked(x: Tensor, chunk: int) -> Tensor:
    """[B, S, ...] -> [B, K, Q, ...], filled up with zeros."""
    return F.pad(x, (0, 0) * (x.dim() - 2) + (0, -x.shape[1] % chunk)).unflatten(1, (-1, chunk))


def _within_chunks(u_BKQGRP: Tensor, exponent_BKGRQ: Tensor, B_BKQGN: Tensor, C_BKQGN: Tensor, seq_idx_BKQ: Tensor) -> Tensor:
    """What the tokens of a chunk give to the later ones of the same chunk and document, [B, K, Q, G, R, P]."""
    reached_BKQQ = (seq_idx_BKQ[..., :, None] == seq_idx_BKQ[..., None, :]).tril()
    between = (exponent_BKGRQ[..., :, None] - exponent_BKGRQ[..., None, :]).to(u_BKQGRP.dtype)
    # Masked before exp: above the diagonal it could overflow, and infinity times a zero gradient is NaN.
    decay_BKGRQQ = between.masked_fill(~reached_BKQQ[:, :, None, None], float("-inf")).exp()
    scores_BKGQQ = torch.einsum("bkign,bkjgn->bkgij", C_BKQGN, B_BKQGN)
    return torch.einsum("bkgrij,bkjgrp->bkigrp", scores_BKGQQ[:, :, :, None] * decay_BKGRQQ, u_BKQGRP)


def _across_chunks(
    u_BKQGRP: Tensor, exponent_BKGRQ: Tensor, B_BKQGN: Tensor, C_BKQGN: Tensor, seq_idx_BKQ: Tensor, state_BGRPN: Tensor
) -> tuple[Tensor, Tensor]:
    """What earlier chunks and the initial state give to every token, [B, K, Q, G, R, P], and the state after the last chunk."""
    last_BK1 = seq_idx_BKQ[..., -1:]
    before_BK1 = torch.cat([seq_idx_BKQ[:, :1, :1], last_BK1[:, :-1]], dim=1)
    total_BKGR1 = exponent_BKGRQ[..., -1:]

    def decay(exponent: Tensor, same_document: Tensor) -> Tensor:
        return exponent.exp().to(u_BKQGRP.dtype) * same_document[:, :, None, None]

    to_end_BKQGR = decay(total_BKGR1 - exponent_BKGRQ, seq_idx_BKQ == last_BK1).permute(0, 1, 4, 2, 3)
    from_start_BKQGR = decay(exponent_BKGRQ, seq_idx_BKQ == before_BK1).permute(0, 1, 4, 2, 3)
    through_BKGR1 = decay(total_BKGR1, last_BK1 == before_BK1)
    added_BKGRPN = torch.einsum("bkqgrp,bkqgn->bkgrpn", u_BKQGRP * to_end_BKQGR[..., None], B_BKQGN)

    starts = []
    # unbind, not indexing: the gradient of an index is a whole tensor of zeros, which would make the backward pass quadratic in K.
    for through_BGR1, added_BGRPN in zip(through_BKGR1.unbind(1), added_BKGRPN.unbind(1), strict=True):
        starts.append(state_BGRPN)
        state_BGRPN = through_BGR1[..., None] * state_BGRPN + added_BGRPN
    past_BKQGRP = torch.einsum("bkqgn,bkgrpn->bkqgrp", C_BKQGN, torch.stack(starts, dim=1))
    return past_BKQGRP * from_start_BKQGR[..., None], state_BGRPN
