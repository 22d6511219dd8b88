"""The one table of classes that depend on the backend: Megatron's own modules (local) or Transformer Engine's."""

import copy
from dataclasses import dataclass
from importlib.util import find_spec

from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_ext.device import on_gpu
from megatron_ext.layers.attention import LocalAttention
from megatron_ext.layers.linear import LocalColumnLinear, LocalRowLinear
from megatron_ext.layers.norm import LocalRMSNorm
from megatron_ext.precision.executors import QuantizableColumn, QuantizableGrouped, QuantizableRow
from ngpt.config import Config, ConfigError


@dataclass(frozen=True)
class Backend:
    """Classes a layer is put together from.

    Attributes:
        name: Megatron's `transformer_impl`.
        column, row: tensor-parallel linears that can run in low precision. attention: core attention. norm: RMSNorm of the GPT control.
        grouped_column, grouped_row: linears of all experts of a rank in one call, where the backend has such; also in low precision.
    """

    name: str
    column: type
    row: type
    attention: type
    norm: type
    grouped_column: type | None = None
    grouped_row: type | None = None


class AccumulatesInPlace:
    """Mixin over Transformer Engine's linears: weight gradients are added to Megatron's `main_grad` by the GEMM that makes them.

    Megatron's one switch for it would also ask it of the output layer, whose linear needs NVIDIA's apex for that.
    """

    def __init__(self, *args, config: TransformerConfig, **kwargs):
        config = copy.copy(config)
        config.gradient_accumulation_fusion = True
        super().__init__(*args, config=config, **kwargs)


def choose_backend(transformer_impl: str) -> str:
    """`local` or `transformer_engine` for a config's `model.transformer_impl`, which may say `auto`.

    Raises:
        ConfigError: Transformer Engine was asked for by name and cannot run here.
    """
    usable = on_gpu() and find_spec("transformer_engine") is not None
    if transformer_impl == "auto":
        return "transformer_engine" if usable else "local"
    if transformer_impl == "transformer_engine" and not usable:
        raise ConfigError(
            "model.transformer_impl",
            transformer_impl,
            "it needs a CUDA GPU and the package transformer-engine",
            "Install ngpt-megatron[gpu] on a GPU host, or set model.transformer_impl=local",
        )
    return transformer_impl


def check_attention(cfg: Config, backend: str) -> None:
    """Refuse what Transformer Engine's attention cannot do.

    Raises:
        ConfigError: fp32 over a split sequence; several sequences with attention confined to documents.
    """
    if backend != "transformer_engine":
        return
    if cfg.data.confine_attention and cfg.train.micro_batch_size != 1:
        rule = "data.confine_attention with Transformer Engine packs the documents of one sequence"
        raise ConfigError("train.micro_batch_size", cfg.train.micro_batch_size, rule, "Set train.micro_batch_size=1")
    if cfg.parallel.context > 1 and cfg.precision.dtype == "fp32" and "*" in cfg.model.layer_pattern:
        rule = "Transformer Engine's attention over a split sequence computes in bf16, and precision.dtype is fp32"
        way_out = "Set precision=bf16, or model.transformer_impl=local, which gathers keys and values"
        raise ConfigError("parallel.context", cfg.parallel.context, rule, way_out)


def with_mixin(mixin: type, base: type) -> type:
    """A class that is `mixin` over `base`, named after both."""
    return type(f"{mixin.__name__}{base.__name__}", (mixin, base), {})


def get_backend(name: str) -> Backend:
    """The table's row for `local` or `transformer_engine`."""
    if name == "local":
        column, row = _quantizable(LocalColumnLinear, LocalRowLinear)
        return Backend(name, column, row, LocalAttention, LocalRMSNorm)
    from megatron.core.extensions.transformer_engine import (
        TEColumnParallelGroupedLinear,
        TEColumnParallelLinear,
        TEDotProductAttention,
        TENorm,
        TERowParallelGroupedLinear,
        TERowParallelLinear,
    )

    names = (TEColumnParallelLinear, TERowParallelLinear, TEColumnParallelGroupedLinear, TERowParallelGroupedLinear)
    column, row, *grouped = (with_mixin(AccumulatesInPlace, linear) for linear in names)
    grouped = (with_mixin(QuantizableGrouped, linear) for linear in grouped)
    return Backend(name, *_quantizable(column, row), TEDotProductAttention, TENorm, *grouped)


def _quantizable(column: type, row: type) -> tuple[type, type]:
    return with_mixin(QuantizableColumn, column), with_mixin(QuantizableRow, row)
