"""Trained scale vectors of nGPT: stored at one magnitude, used at another, always fp32."""

import torch
from torch import Tensor, nn

from ngpt.kernels import scale as kernels


class ScaledParameter(nn.Module):
    """Trains `stored`, which starts at `scale`; the model uses `effective = stored * init / scale`.

    Adam moves every parameter by about its learning rate a step; a vector stored at the magnitude `scale` moves, relatively,
    like the weights around it.

    Args:
        size: number of entries of this rank's part.
        init: initial effective value.
        scale: initial stored value.
        device: where `stored` lives.

    Source: arXiv 2410.01131 section 2.5 (learnable scaling parameters).
    """

    def __init__(self, size: int, init: float, scale: float, device: torch.device | str | int | None = None):
        super().__init__()
        self.init, self.scale = init, scale
        self.stored = nn.Parameter(torch.full((size,), scale, dtype=torch.float32, device=device))

    @property
    def effective(self) -> Tensor:
        """[size] fp32: the value that enters the model."""
        return self.stored * (self.init / self.scale)

    def forward(self, times: float = 1.0) -> tuple[Tensor, float]:
        """`stored` [size] fp32, and the factor that makes it `effective` times a constant: for functions that do this product themselves.

        They save `stored` itself, which keeps its values until the backward pass.
        Only a call lets a sharded optimizer's forward hooks gather the new values first.
        """
        return self.stored, self.init / self.scale * times

    def _apply(self, fn, recurse: bool = True):
        # Mixed precision converts whole modules (`module.bfloat16()`); the scales stay fp32 and follow only the device.
        def move(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            return moved if moved.dtype == tensor.dtype else tensor.to(device=moved.device)

        return super()._apply(move, recurse)


class _ScaleFeatures(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, scale: Tensor, factor: float) -> Tensor:
        ctx.save_for_backward(x, scale)
        ctx.factor = factor
        return kernels.features_forward(x, scale, factor)

    @staticmethod
    def backward(ctx, grad: Tensor):
        return *kernels.features_backward(grad, *ctx.saved_tensors, ctx.factor), None


def scale_features(x: Tensor, scale: Tensor, factor: float = 1.0) -> Tensor:
    """x * (scale * factor), computed in fp32 and rounded to x's dtype once.

    Args:
        x: [..., F], any floating dtype.
        scale: [F] fp32 (fp64 for fp64).
        factor: what a stored scale is multiplied with, see `ScaledParameter`.

    Returns:
        [..., F] in x's dtype.

    Source: MODEL.md (mixer_in_scale on in_proj's output, sz on the logits).
    """
    return _ScaleFeatures.apply(x, scale, factor)


class _ScaleTokens(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, scale: Tensor) -> Tensor:
        ctx.save_for_backward(x, scale)
        return kernels.tokens_forward(x, scale)

    @staticmethod
    def backward(ctx, grad: Tensor):
        return kernels.tokens_backward(grad, *ctx.saved_tensors)


def scale_tokens(x: Tensor, scale: Tensor) -> Tensor:
    """x * scale[:, None], computed in fp32 and rounded to x's dtype once.

    Args:
        x: [T, F], any floating dtype.
        scale: [T] fp32 (fp64 for fp64).

    Returns:
        [T, F] in x's dtype.

    Source: MODEL.md "MoE" (router probabilities on an expert's output).
    """
    return _ScaleTokens.apply(x, scale)
