"""The output layer's weight gradient is added to Megatron's fp32 buffer by the product itself.

Upstream (megatron-core 0.19.2), `core/tensor_parallel/layers.py: LinearWithGradAccumulationAndAsyncCommunication.backward` calls
`fused_weight_gradient_mlp_cuda`, an extension of NVIDIA's apex, where `gradient_accumulation_fusion` is on. apex is not among the
dependencies; without it the gradient of every micro-batch is rounded to bf16 before it is added.
Reason: the rounding is a known cause of divergence at scale, and a pass over the largest matrix of the model. The linears of the blocks
are Transformer Engine's, which add in fp32 themselves (`AccumulatesInPlace`).
Goes when: upstream adds in fp32 without apex.
"""

from types import SimpleNamespace

from torch import Tensor


def install() -> bool:
    """Puts the products where upstream looks for apex's. False where apex is installed."""
    from megatron.core.tensor_parallel import layers

    if not layers._grad_accum_fusion_available:
        layers.fused_weight_gradient_mlp_cuda = SimpleNamespace(wgrad_gemm_accum_fp32=_add, wgrad_gemm_accum_fp16=_add)
        layers._grad_accum_fusion_available = True
    return isinstance(layers.fused_weight_gradient_mlp_cuda, SimpleNamespace)


def _add(x_MK: Tensor, grad_MN: Tensor, total_NK: Tensor) -> None:
    """total += grad^T x."""
    from megatron_ext.precision.linear import add_product

    add_product(total_NK, grad_MN.t(), x_MK)
