"""The kinds of layers that `model.layer_pattern` may hold. The one table of their properties, for config, estimates and cards.

Their linears are in `ngpt.config.linears`, what they cost in `ngpt.estimate.kinds`.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType


@dataclass(frozen=True)
class LayerKind:
    """A kind of layer.

    Attributes:
        name: in counts and JSON.
        title: in tables. long_title: in model cards.
        keys: prefixes of the config keys that mean nothing without such a layer; None: there are none.
        whole: the module of `parallel.recompute_modules` that runs all of the layer again; None: there is none.
        parts: its modules that run parts of the layer again.
    """

    name: str
    title: str
    long_title: str
    keys: str | None = None
    whole: str | None = None
    parts: tuple[str, ...] = ()


LAYERS: Mapping[str, LayerKind] = MappingProxyType(
    {
        "*": LayerKind("attention", "attention", "attention", parts=("core_attn",)),
        "-": LayerKind("mlp", "MLP", "MLP", whole="mlp"),
        "M": LayerKind("mamba", "Mamba", "Mamba-2", keys="model.mamba_"),
        "E": LayerKind("moe", "experts", "mixture of experts", keys="model.moe_", whole="moe", parts=("shared_experts",)),
    }
)


def layer_with(module: str) -> str:
    """The symbol of the layers that a module of `parallel.recompute_modules` belongs to."""
    return next(symbol for symbol, kind in LAYERS.items() if module in (kind.whole, *kind.parts))
