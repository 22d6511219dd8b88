"""A Mamba-2 mixer token by token on plain tensors: the independent truth for the convolution, the scan and the whole layer.

Everything is computed in the dtype of the arguments: fp64 gives the truth, a lower one the error of eager PyTorch.

Shapes: B batch, S sequence, D hidden, H heads of P features, G groups of heads, N state size, W filter width.

Parameters of a mixer are a flat dict:
    in_proj [2*H*P + 2*G*N + H, D] in the order z, x, B, C, dt   out_proj [D, H*P]
    conv_weight [H*P + 2*G*N, W]   conv_bias [H*P + 2*G*N]   dt_bias [H]   A_log [H]   D [H]   norm [H*P]
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class MambaSpec:
    """Sizes of a mixer."""

    heads: int
    head_dim: int
    groups: int
    state: int
    norm_epsilon: float = 1e-5


def silu(x: Tensor) -> Tensor:
    return x / (1 + torch.exp(-x))


def causal_conv(x_BSF: Tensor, weight_FW: Tensor, bias_F: Tensor, seq_idx_BS: Tensor | None = None) -> Tensor:
    """SiLU of each feature's own filter over a token and the W - 1 tokens of its document before it."""
    rows = []
    for row in range(x_BSF.shape[0]):
        tokens = []
        for token in range(x_BSF.shape[1]):
            total = bias_F
            for lag in range(weight_FW.shape[1]):
                source = token - lag
                if source >= 0 and (seq_idx_BS is None or seq_idx_BS[row, source] == seq_idx_BS[row, token]):
                    total = total + weight_FW[:, weight_FW.shape[1] - 1 - lag] * x_BSF[row, source]
            tokens.append(silu(total))
        rows.append(torch.stack(tokens))
    return torch.stack(rows)


def recurrence(
    x_BSHP: Tensor,
    dt_BSH: Tensor,
    A_H: Tensor,
    B_BSGN: Tensor,
    C_BSGN: Tensor,
    D: Tensor,
    initial_states_BHPN: Tensor,
    seq_idx_BS: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """state <- exp(dt A) state + dt x (outer) B and y = state C + D x; y [B, S, H, P] and the last states [B, H, P, N].

    Consecutive heads share the B and C of their group. A document starts from a zero state, the first one from the initial state.
    """
    outputs, final = [], []
    for head in range(x_BSHP.shape[2]):
        group = head // (x_BSHP.shape[2] // B_BSGN.shape[2])
        state_BPN, ys = initial_states_BHPN[:, head], []
        for token in range(x_BSHP.shape[1]):
            if seq_idx_BS is not None and token > 0:
                same_B = seq_idx_BS[:, token] == seq_idx_BS[:, token - 1]
                state_BPN = torch.where(same_B[:, None, None], state_BPN, 0)
            dt_B1, x_BP = dt_BSH[:, token, head, None], x_BSHP[:, token, head]
            added_BPN = (dt_B1 * x_BP)[:, :, None] * B_BSGN[:, token, group, None, :]
            state_BPN = torch.exp(dt_B1 * A_H[head])[..., None] * state_BPN + added_BPN
            ys.append((state_BPN * C_BSGN[:, token, group, None, :]).sum(-1) + D[head] * x_BP)
        outputs.append(torch.stack(ys, dim=1))
        final.append(state_BPN)
    return torch.stack(outputs, dim=2), torch.stack(final, dim=1)


def between_projections(p: dict[str, Tensor], spec: MambaSpec, zxBCdt: Tensor, seq_idx_BS: Tensor | None = None) -> Tensor:
    """From the output of in_proj, [B, S, ...], to the gated output of the scan, [B, S, H*P]."""
    batch, length, _ = zxBCdt.shape
    inner, vectors = spec.heads * spec.head_dim, spec.groups * spec.state
    z, xBC, dt = zxBCdt.split([inner, inner + 2 * vectors, spec.heads], dim=-1)
    x, B, C = causal_conv(xBC, p["conv_weight"], p["conv_bias"], seq_idx_BS).split([inner, vectors, vectors], dim=-1)
    y, _ = recurrence(
        x.reshape(batch, length, spec.heads, spec.head_dim),
        torch.log1p(torch.exp(dt + p["dt_bias"])),
        -torch.exp(p["A_log"]),
        B.reshape(batch, length, spec.groups, spec.state),
        C.reshape(batch, length, spec.groups, spec.state),
        p["D"],
        x.new_zeros(batch, spec.heads, spec.head_dim, spec.state),
        seq_idx_BS,
    )
    return y.reshape(batch, length, inner) * silu(z)


def grouped_rms_norm(y: Tensor, weight: Tensor, groups: int, epsilon: float) -> Tensor:
    """Each of `groups` consecutive parts of the features has its own mean square."""
    parts = y.reshape(*y.shape[:-1], groups, -1)
    return (parts / torch.sqrt((parts * parts).mean(-1, keepdim=True) + epsilon)).reshape(y.shape) * weight


def reference_mixer(p: dict[str, Tensor], spec: MambaSpec, h_BSD: Tensor, seq_idx_BS: Tensor | None = None) -> Tensor:
    """The mixer of the control, [B, S, D]; without `norm` among the parameters, the gated output goes to out_proj as it is."""
    y = between_projections(p, spec, h_BSD @ p["in_proj"].T, seq_idx_BS)
    if "norm" in p:
        y = grouped_rms_norm(y, p["norm"], spec.groups, spec.norm_epsilon)
    return y @ p["out_proj"].T
