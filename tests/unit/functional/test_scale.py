"""Scale vectors on features, on tokens and on groups of tokens, against fp64 autograd of the plain products."""

import pytest
import torch
from torch import Tensor

from ngpt.functional import scale_features, scale_groups, scale_tokens

SIZES = [3, 0, 1500, 7]  # groups of tokens: an empty one, and one larger than a step of the gradient's loop
TOKENS, FEATURES = sum(SIZES), 33
PLAIN = {
    "features": (scale_features, lambda x, scale: x * scale, (FEATURES,)),
    "tokens": (scale_tokens, lambda x, scale: x * scale[:, None], (TOKENS,)),
    "groups": (
        lambda x, scale: scale_groups(x, scale, SIZES),
        lambda x, scale: x * torch.repeat_interleave(scale, torch.tensor(SIZES), dim=0),
        (len(SIZES), FEATURES),
    ),
}


def gradients(function, x: Tensor, scale: Tensor, grad: Tensor) -> list[Tensor]:
    x, scale = x.detach().clone().requires_grad_(), scale.detach().clone().requires_grad_()
    out = function(x, scale)
    out.backward(grad)
    return [out.detach(), x.grad, scale.grad]


@pytest.mark.parametrize("kind", PLAIN)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_value_and_gradients_match_fp64(kind, dtype):
    function, plain, shape = PLAIN[kind]
    generator = torch.Generator().manual_seed(0)
    x, grad = (torch.randn(TOKENS, FEATURES, generator=generator).to(dtype) for _ in range(2))
    scale = torch.rand(shape, generator=generator) + 0.5
    out, grad_x, grad_scale = gradients(function, x, scale, grad)
    truth = gradients(plain, x.double(), scale.double(), grad.double())
    assert (out.dtype, grad_x.dtype, grad_scale.dtype) == (dtype, dtype, torch.float32)
    torch.testing.assert_close(out, (x.float() * (truth[0] / x.double()).float()).to(dtype), rtol=1e-6, atol=0)
    torch.testing.assert_close(grad_x.double(), truth[1], rtol=2**-8 if dtype == torch.bfloat16 else 1e-6, atol=0)
    torch.testing.assert_close(grad_scale.double(), truth[2], rtol=1e-5, atol=1e-4)


def test_a_group_without_tokens_gets_a_zero_gradient():
    x, scale = torch.ones(2, 3), torch.full((3, 3), 2.0)
    _, _, grad_scale = gradients(lambda x, scale: scale_groups(x, scale, [1, 0, 1]), x, scale, torch.ones(2, 3))
    assert grad_scale[1].tolist() == [0.0, 0.0, 0.0] and grad_scale[0].tolist() == [1.0, 1.0, 1.0]
