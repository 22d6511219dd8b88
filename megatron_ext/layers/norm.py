"""RMSNorm of the GPT control for the local backend: upstream's torch norm refuses sequence parallelism."""

import torch
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn


class LocalRMSNorm(MegatronModule):
    """x / sqrt(mean(x^2) + eps) * weight over the hidden features, fp32 inside; [..., D] in, [..., D] out in x's dtype."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **_):
        super().__init__(config)
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(hidden_size, dtype=config.params_dtype, device=torch.cuda.current_device()))
        self.weight.sequence_parallel = config.sequence_parallel

    def get_extra_state(self) -> None:
        """Nothing, under the key that Transformer Engine's norm has in checkpoints: either backend loads what the other saved."""

    def set_extra_state(self, state: object) -> None:
        """Ignored."""

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.rms_norm(x.float(), self.weight.shape, self.weight.float(), self.eps).to(x.dtype)
