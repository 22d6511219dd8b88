"""Trained scale vectors of nGPT: stored at one magnitude, used at another, always fp32."""

import torch
from torch import Tensor, nn

# Rows that one step of the scale's gradient reads at once: bounds its fp32 temporaries to ROWS * features numbers.
_ROWS = 1024


class ScaledParameter(nn.Module):
    """Trains `stored` (starts at `scale`) and is used as `effective = stored * init / scale`.

    Adam moves every parameter by about its learning rate a step; storing the vector at the magnitude `scale` makes it move, relatively,
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

    def forward(self, times: float = 1.0) -> Tensor:
        """`effective` times a constant, for the modules that use it.

        Only a call lets a sharded optimizer's forward hooks gather the new values first.
        """
        return self.stored * (self.init / self.scale * times)

    def _apply(self, fn, recurse: bool = True):
        # Mixed precision converts whole modules (`module.bfloat16()`); the scales stay fp32 and follow only the device.
        def move(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            return moved if moved.dtype == tensor.dtype else tensor.to(device=moved.device)

        return super()._apply(move, recurse)


class _ScaleFeatures(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, scale: Tensor) -> Tensor:
        ctx.save_for_backward(x, scale)
        return torch.mul(x, scale, out=torch.empty_like(x))  # computed in fp32, rounded once, no fp32 temporary

    @staticmethod
    def backward(ctx, grad: Tensor):
        x, scale = ctx.saved_tensors
        grad_scale = torch.zeros_like(scale)
        for grad_rows, x_rows in zip(grad.flatten(0, -2).split(_ROWS), x.flatten(0, -2).split(_ROWS), strict=True):
            grad_scale += (grad_rows.to(scale.dtype) * x_rows).sum(0)
        return torch.mul(grad, scale, out=torch.empty_like(x)), grad_scale


class _ScaleTokens(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, scale: Tensor) -> Tensor:
        ctx.save_for_backward(x, scale)
        return torch.mul(x, scale[:, None], out=torch.empty_like(x))

    @staticmethod
    def backward(ctx, grad: Tensor):
        x, scale = ctx.saved_tensors
        grad_scale = torch.empty_like(scale)
        for grad_rows, x_rows, out in zip(grad.split(_ROWS), x.split(_ROWS), grad_scale.split(_ROWS), strict=True):
            out.copy_((grad_rows.to(scale.dtype) * x_rows).sum(-1))
        return torch.mul(grad, scale[:, None], out=torch.empty_like(x)), grad_scale


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


class _ScaleGroups(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, scale: Tensor, sizes: list[int]) -> Tensor:
        ctx.save_for_backward(x, scale)
        ctx.sizes = sizes
        out = torch.empty_like(x)
        for x_rows, scale_row, out_rows in zip(x.split(sizes), scale, out.split(sizes), strict=True):
            torch.mul(x_rows, scale_row, out=out_rows)
        return out

    @staticmethod
    def backward(ctx, grad: Tensor):
        x, scale = ctx.saved_tensors
        grad_x, grad_scale = torch.empty_like(x), torch.zeros_like(scale)
        groups = zip(grad.split(ctx.sizes), x.split(ctx.sizes), scale, grad_x.split(ctx.sizes), grad_scale, strict=True)
        for grad_group, x_group, scale_row, out_rows, grad_row in groups:
            torch.mul(grad_group, scale_row, out=out_rows)
            for grad_rows, x_rows in zip(grad_group.split(_ROWS), x_group.split(_ROWS), strict=True):
                grad_row += (grad_rows.to(scale.dtype) * x_rows).sum(0)
        return grad_x, grad_scale, None


def scale_groups(x: Tensor, scale: Tensor, sizes: list[int]) -> Tensor:
    """Consecutive rows of x in groups, each times its own vector; computed in fp32 and rounded to x's dtype once.

    Args:
        x: [T, F], any floating dtype.
        scale: [G, F] fp32 (fp64 for fp64).
        sizes: rows of each of the G groups, T in all; a group may be empty.

    Returns:
        [T, F] in x's dtype.

    Source: MODEL.md (suv of the experts whose tokens lie one after the other).
    """
    return _ScaleGroups.apply(x, scale, sizes)


def scale_features(x: Tensor, scale: Tensor) -> Tensor:
    """x * scale, computed in fp32 and rounded to x's dtype once.

    Args:
        x: [..., F], any floating dtype.
        scale: [F] fp32 (fp64 for fp64).

    Returns:
        [..., F] in x's dtype.

    Source: MODEL.md (suv on the MLP's pre-activation, sz on the logits).
    """
    return _ScaleFeatures.apply(x, scale)
