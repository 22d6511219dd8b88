"""Names of the layers of a built model, the same whatever the layout, as `ngpt.config.linears` has them."""

import re
from collections.abc import Iterable, Iterator

from megatron.core.models.hybrid.hybrid_block import HybridStack
from megatron.core.utils import get_attr_wrapped_model
from torch import nn

_DEPTH = re.compile(r"\bmtp\.layers\.(\d+)\.")


def layers_of(chunks: Iterable[nn.Module]) -> Iterator[tuple[str, nn.Module]]:
    """(name, layer) on this rank: layers.<i>, and mtp.<depth>.layers.<i> in a prediction depth, whose layers Megatron numbers from 1 again.

    Args:
        chunks: this rank's model chunks, wrapped or not.
    """
    for chunk in chunks:
        for path, stack in chunk.named_modules():
            if isinstance(stack, HybridStack):
                depth = _DEPTH.search(path)
                prefix = f"mtp.{depth[1]}." if depth else ""
                yield from ((f"{prefix}layers.{layer.layer_number - 1}", layer) for layer in stack.layers)


def layer_names(chunk: nn.Module) -> list[str]:
    """The names of all layers of the model that a chunk is a part of, those of prediction depths behind the model's own."""
    names = [f"layers.{number}" for number in range(chunk.config.num_layers)]
    in_depth = len(get_attr_wrapped_model(chunk, "mtp_pattern") or "")
    depths = range(chunk.config.mtp_num_layers or 0)
    return names + [f"mtp.{depth}.layers.{number}" for depth in depths for number in range(in_depth)]
