"""The one table of classes that depend on the backend: Megatron's own modules (local) or Transformer Engine's."""

import copy
from dataclasses import dataclass

from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_ext.device import on_gpu
from megatron_ext.layers.attention import LocalAttention
from megatron_ext.layers.linear import LocalColumnLinear, LocalRowLinear
from megatron_ext.layers.norm import LocalRMSNorm
from megatron_ext.precision.executors import QuantizableColumn, QuantizableRow
from ngpt.config import Config, ConfigError
from ngpt.config.checks import transformer_engine_attention
from ngpt.config.megatron_keys import captures


@dataclass(frozen=True)
class Backend:
    """The classes that a layer is built from.

    Attributes:
        name: Megatron's `transformer_impl`.
        column, row: tensor-parallel linears that can run in low precision. attention: core attention. norm: RMSNorm of the GPT control.
    """

    name: str
    column: type
    row: type
    attention: type
    norm: type


class AccumulatesInPlace:
    """Mixin over Transformer Engine's linears: weight gradients are added to Megatron's `main_grad` by the GEMM that makes them.

    Megatron's one switch for this is off: it would also reach linears whose weights have no such buffer. The output layer is switched
    once the model has been wrapped (`models/builder.py`).
    """

    def __init__(self, *args, config: TransformerConfig, **kwargs):
        config = copy.copy(config)
        config.gradient_accumulation_fusion = True
        super().__init__(*args, config=config, **kwargs)


def check_backend(cfg: Config, backend: str) -> None:
    """Refuse what this backend or this device cannot do.

    Raises:
        ConfigError: attention that this backend cannot run, what only Transformer Engine can run, or CUDA graphs without CUDA.
    """
    if backend == "transformer_engine":
        for error in transformer_engine_attention(cfg):
            raise error
    elif cfg.megatron.get("tp_comm_overlap"):
        raise ConfigError("megatron.tp_comm_overlap", True, "Transformer Engine overlaps them, and it does not run this model", "Remove it")
    for name, value in ({} if on_gpu() else captures(cfg.megatron)).items():
        raise ConfigError(f"megatron.{name}", value, "CUDA graphs need a CUDA GPU, and there is none here", "Remove it")


def with_mixin(mixin: type, base: type) -> type:
    """A class that is `mixin` over `base`, named after both."""
    return type(f"{mixin.__name__}{base.__name__}", (mixin, base), {})


def get_backend(name: str) -> Backend:
    """The table's row for `local` or `transformer_engine`."""
    if name == "local":
        column, row = _quantizable(LocalColumnLinear, LocalRowLinear)
        return Backend(name, column, row, LocalAttention, LocalRMSNorm)
    from megatron.core.extensions.transformer_engine import TEColumnParallelLinear, TEDotProductAttention, TENorm, TERowParallelLinear

    column, row = (with_mixin(AccumulatesInPlace, linear) for linear in (TEColumnParallelLinear, TERowParallelLinear))
    return Backend(name, *_quantizable(column, row), TEDotProductAttention, TENorm)


def _quantizable(column: type, row: type) -> tuple[type, type]:
    return with_mixin(QuantizableColumn, column), with_mixin(QuantizableRow, row)
