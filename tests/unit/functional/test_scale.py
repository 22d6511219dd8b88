"""Scale vectors on features and on tokens, against fp64 autograd of the plain products."""

import pytest
import torch
from torch import Tensor

from ngpt.functional import scale_features, scale_tokens

TOKENS, FEATURES = 1510, 33  # more tokens than a step of the gradient's loop
PLAIN = {
    "features": (scale_features, lambda x, scale: x * scale, (FEATURES,)),
    "tokens": (scale_tokens, lambda x, scale: x * scale[:, None], (TOKENS,)),
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
