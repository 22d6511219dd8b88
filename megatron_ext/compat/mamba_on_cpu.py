"""Mamba layers without CUDA: the scan, the convolution and the gated norm of Megatron's mixer in plain torch.

Upstream (megatron-core 0.19.2): `core/ssm/mamba_mixer.py: MambaMixer` calls kernels of mamba-ssm and causal-conv1d, which run on GPUs only,
and its constructor refuses to go on where mamba-ssm is not installed (`HAVE_MAMBA_SSM`). Without that package its norm, a subclass of
mamba-ssm's, is no class at all.
Reason: hybrid models can be trained and tested on a CPU. Names of that module are replaced, so other code still sees that mamba-ssm is not
there. Training and evaluation are served; upstream's inference contexts (`InferenceMode`) are not.
Goes when: upstream's mixer has a path in plain torch.

Shapes: B batch, S sequence, H heads of P features, G groups, N state size.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ngpt.functional.causal_conv import causal_conv_silu
from ngpt.functional.ssd import ssd_scan


def install() -> bool:
    """Puts the functions below into Megatron's mixer, also where mamba-ssm is installed: its kernels cannot run here."""
    from megatron.core.ssm import mamba_mixer

    mamba_mixer.HAVE_MAMBA_SSM = True
    mamba_mixer.MAMBA_HAS_STATE_DTYPE = False  # the states are fp32
    mamba_mixer.causal_conv1d_fn = None  # the mixer then takes torch's convolution
    mamba_mixer.ExtendedRMSNorm = RMSNorm
    mamba_mixer.mamba_chunk_scan_combined = mamba_chunk_scan_combined
    mamba_mixer.mamba_split_conv1d_scan_combined = mamba_split_conv1d_scan_combined
    mamba_mixer._check_mamba_sequence_packing_support = _check_sequence_packing_support
    return True


def mamba_split_conv1d_scan_combined(
    zxbcdt: Tensor,
    conv1d_weight: Tensor,
    conv1d_bias: Tensor,
    dt_bias: Tensor,
    A: Tensor,
    D: Tensor,
    chunk_size: int,
    initial_states: Tensor | None = None,
    seq_idx: Tensor | None = None,
    dt_limit: tuple[float, float] = (0.0, float("inf")),
    return_final_states: bool = False,
    activation: str = "silu",
    rmsnorm_weight: Tensor | None = None,
    headdim: int | None = None,
    ngroups: int = 1,
    norm_before_gate: bool = True,
) -> Tensor | tuple[Tensor, Tensor]:
    """Everything between a Mamba-2 mixer's two projections: SiLU(convolution) of x, B and C, the scan, and y * SiLU(z).

    Args:
        zxbcdt: [B, S, z (H*P), x (H*P), B (G*N), C (G*N), dt (H)], the output of in_proj.
        conv1d_weight: [H*P + 2*G*N, width]. conv1d_bias: [H*P + 2*G*N].
        dt_bias: [H], added to dt before the softplus.
        A: [H], negative. D: [H] with `headdim`, or [H, P].
        chunk_size, initial_states, seq_idx: see `ssd_scan`. The convolution has no state from before the first token.
        dt_limit: bounds of the step size after the softplus.
        rmsnorm_weight: must be None: the mixer applies its norm itself.
        norm_before_gate: says nothing where there is no norm.

    Returns:
        [B, S, H*P] in zxbcdt's dtype, and with `return_final_states` also the last states, [B, H, P, N] fp32.

    Raises:
        NotImplementedError: `activation` is not SiLU, or `rmsnorm_weight` is given.
    """
    if activation not in ("silu", "swish") or rmsnorm_weight is not None:
        raise NotImplementedError(f"Mamba on a CPU: activation={activation!r}, a norm inside the scan: {rmsnorm_weight is not None}")
    head_dim = headdim if D.dim() == 1 else D.shape[1]
    inner = D.shape[0] * head_dim
    z, conv_input, dt = zxbcdt.split([inner, conv1d_weight.shape[0], D.shape[0]], dim=-1)
    conv_output = causal_conv_silu(conv_input, conv1d_weight, conv1d_bias, seq_idx)
    x, B, C = conv_output.tensor_split([inner, (inner + conv_output.shape[-1]) // 2], dim=-1)
    out = mamba_chunk_scan_combined(
        x.unflatten(-1, (-1, head_dim)),
        dt,
        A,
        B.unflatten(-1, (ngroups, -1)),
        C.unflatten(-1, (ngroups, -1)),
        chunk_size,
        D=D,
        z=z.unflatten(-1, (-1, head_dim)),
        dt_bias=dt_bias,
        initial_states=initial_states,
        seq_idx=seq_idx,
        dt_softplus=True,
        dt_limit=dt_limit,
        return_final_states=return_final_states,
    )
    return (out[0].flatten(2), out[1]) if return_final_states else out.flatten(2)


def mamba_chunk_scan_combined(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    chunk_size: int,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    initial_states: Tensor | None = None,
    seq_idx: Tensor | None = None,
    dt_softplus: bool = False,
    dt_limit: tuple[float, float] = (0.0, float("inf")),
    return_final_states: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """The scan and its gate, (SSD(x) + D * x) * SiLU(z), rounded once.

    Args:
        x, z: [B, S, H, P]. dt: [B, S, H]. A, dt_bias: [H]. B, C: [B, S, G, N]. D: [H] or [H, P].
        dt_softplus: the step size is softplus(dt + dt_bias), else dt + dt_bias.
        Others as in `mamba_split_conv1d_scan_combined`.

    Returns:
        [B, S, H, P] in x's dtype, and with `return_final_states` also the last states, [B, H, P, N] fp32.
    """
    wide = torch.promote_types(x.dtype, torch.float32)
    step = dt.to(wide)
    if dt_bias is not None:
        step = step + dt_bias.to(wide)
    if dt_softplus:
        step = F.softplus(step)
    y, states = ssd_scan(x.to(wide), step.clamp(*dt_limit), A, B, C, chunk_size, D, initial_states, seq_idx)
    if z is not None:
        y = y * F.silu(z.to(wide))
    y = y.to(x.dtype)
    return (y, states) if return_final_states else y


class RMSNorm(nn.Module):
    """RMSNorm over groups of `group_size` features, with a gate before or after it where `z` is given; fp32 inside.

    Parallelism: the features are sharded over `tp_group`, which the mixer sets, in whole groups; nothing is communicated.
    """

    def __init__(
        self,
        hidden_size: int,
        eps: float = 1e-5,
        group_size: int | None = None,
        norm_before_gate: bool = True,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(hidden_size, device=device, dtype=dtype))
        self.eps, self.group_size, self.norm_before_gate = eps, group_size or hidden_size, norm_before_gate

    def forward(self, x: Tensor, z: Tensor | None = None) -> Tensor:
        wide = torch.promote_types(x.dtype, torch.float32)
        y = x.to(wide)
        gate = 1 if z is None else F.silu(z.to(wide))
        if not self.norm_before_gate:
            y = y * gate
        y = F.rms_norm(y.unflatten(-1, (-1, self.group_size)), (self.group_size,), eps=self.eps).flatten(-2) * self.weight.to(wide)
        if self.norm_before_gate:
            y = y * gate
        return y.to(x.dtype)

    def sharded_state_dict(self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None) -> dict:
        """{prefix + "weight": ShardedTensor}, the entry of upstream's norm."""
        from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint

        return make_sharded_tensors_for_checkpoint(
            self.state_dict(keep_vars=True),
            prefix,
            {"weight": 0},
            sharded_offsets,
            tp_group=self.tp_group,
            dp_cp_group=metadata["dp_cp_group"],
        )


def _check_sequence_packing_support(for_inference_not_training: bool = True) -> tuple[bool, str | None]:
    """Stands in for a check of the kernels' versions: documents packed into one sequence are confined, in training."""
    return (False, "Mamba on a CPU has no inference kernels") if for_inference_not_training else (True, None)
