"""The health panel: scales, hidden-state norms and weight norms of a run, reduced over all ranks.

Figures are taken right after an optimizer step, when every rank is at the same point and may communicate.
"""

from collections.abc import Iterable, Mapping, Sequence
from functools import partial

import torch
import torch.distributed as dist
from megatron.core.transformer.moe.router import TopKRouter
from torch import Tensor, nn

from megatron_ext.models.names import layer_names, layers_of
from megatron_ext.optim.retraction import master_shard
from ngpt.functional import ScaledParameter

HIDDEN = "hidden_norm"  # over all layers; that of one is hidden_norm/<its name>
LOAD = "expert_load"  # of each expert layer: tokens of its busiest expert over those of its average one
# The end of a scale's module name -> its kind. Attention, MLP and later layer types own different `*_bda` slots.
_KINDS = {
    "self_attn_bda.alpha": "attn_alpha",
    "mlp_bda.alpha": "mlp_alpha",
    "mamba_bda.alpha": "mixer_alpha",
    "sqk": "sqk",
    "suv": "suv",
    "mixer_in_scale": "mixer_in_scale",
    "sz": "sz",
}
KINDS = (*_KINDS.values(), HIDDEN, LOAD)


def scale_kind(module_name: str) -> str | None:
    """The kind of the scale that lives at `module_name`, for instance attn_alpha for decoder.layers.0.self_attn_bda.alpha; or None."""
    return next((kind for end, kind in _KINDS.items() if module_name.endswith(end)), None)


def check_scale_names(chunks: Iterable[nn.Module]) -> None:
    """Every scale has a kind, so that no health step fails later.

    Raises:
        ValueError: names the module of a scale that the table of kinds does not know.
    """
    for chunk in chunks:
        for name, module in chunk.named_modules():
            if isinstance(module, ScaledParameter) and scale_kind(name) is None:
                raise ValueError(f"{name}: a scale of unknown kind. Name it in _KINDS of megatron_ext/training/health.py")


class Statistics:
    """Sum, count, minimum and maximum for each kind, on this rank, then over all ranks.

    Args:
        layers: names of all layers of the model, the same on every rank.

    Parallelism: `reduce` does two world all-reduces of a few fp64 numbers. A value that several ranks hold counts once for each. This
        changes neither mean, minimum nor maximum, since every kind is replicated evenly.
    """

    def __init__(self, device: torch.device | int, layers: Sequence[str] = ()):
        self.kinds = (*KINDS, *(f"{HIDDEN}/{layer}" for layer in layers))
        self.sums = torch.zeros(2, len(self.kinds), dtype=torch.float64, device=device)  # sum, count
        self.extremes = torch.full((2, len(self.kinds)), -torch.inf, dtype=torch.float64, device=device)  # max, -min

    def add(self, kind: str, values: Tensor) -> None:
        if not values.numel():
            return
        column, values = self.kinds.index(kind), values.detach().double()
        self.sums[0, column] += values.sum()
        self.sums[1, column] += values.numel()
        pair = torch.stack([values.max(), -values.min()])
        self.extremes[:, column] = torch.maximum(self.extremes[:, column], pair)

    def reduce(self) -> dict[str, float]:
        """{health/<kind>/<mean|min|max>} over all ranks, for the kinds that exist."""
        dist.all_reduce(self.sums)
        dist.all_reduce(self.extremes, op=dist.ReduceOp.MAX)
        figures = {}
        for kind, total, count, high, low in zip(self.kinds, *self.sums.tolist(), *self.extremes.tolist(), strict=True):
            if count:
                figures |= {f"health/{kind}/mean": total / count, f"health/{kind}/min": -low, f"health/{kind}/max": high}
        return figures


class HiddenNormProbe:
    """Norms of every layer's output and the load of every router, taken by forward hooks while `active`. Otherwise it costs nothing.

    A layer's output is the residual stream behind its step. One fp32 norm a token, layer and forward pass stays on the device until it is
    drained, and each router keeps as `load` how many tokens it has sent to each expert.
    """

    def __init__(self, chunks: Iterable[nn.Module]):
        self.active = False
        self.norms: dict[str, list[Tensor]] = {}
        chunks = list(chunks)
        for name, layer in layers_of(chunks):
            layer.register_forward_hook(partial(self._record, name))
        for router in (module for chunk in chunks for module in chunk.modules() if isinstance(module, TopKRouter)):
            router.register_forward_hook(self._record_load)

    def _record(self, name: str, layer: nn.Module, args: tuple, output: Tensor | tuple) -> None:
        if self.active and layer.training:
            hidden_SBD = output[0] if isinstance(output, tuple) else output
            self.norms.setdefault(name, []).append(torch.linalg.vector_norm(hidden_SBD.detach().float(), dim=-1).flatten())

    def _record_load(self, router: TopKRouter, args: tuple, output: tuple[Tensor, Tensor]) -> None:
        if self.active and router.training:
            _, routing_map_TE = output
            router.load = getattr(router, "load", 0) + routing_map_TE.sum(0)

    def drain(self) -> dict[str, Tensor]:
        """The norms recorded since the last call, [tokens] fp32 by the name of the layer, for the layers of this rank."""
        norms, self.norms = self.norms, {}
        return {name: torch.cat(parts) for name, parts in norms.items()}


def expert_loads(chunks: Iterable[nn.Module]) -> Tensor | None:
    """[layers, experts] fp64 tokens since the last call, over all ranks, zeros for layers without experts; None for a dense model.

    The layers of prediction depths come after the model's own.

    Recomputed layers count twice. Parallelism: one world all-reduce.
    """
    chunks = list(chunks)
    config, names = chunks[0].config, layer_names(chunks[0])
    if config.num_moe_experts is None:
        return None
    loads = torch.zeros(len(names), config.num_moe_experts, dtype=torch.float64, device=torch.cuda.current_device())
    for name, layer in layers_of(chunks):
        for router in layer.modules():
            if isinstance(router, TopKRouter):
                loads[names.index(name)] += router.__dict__.pop("load", 0)
    dist.all_reduce(loads)
    return loads


@torch.no_grad()
def health_figures(chunks: Iterable[nn.Module], parameters: list, hidden_norms: Mapping[str, Tensor]) -> dict[str, float]:
    """The panel's figures, equal on every rank. They are effective values; alphas are absolute, as they are used.

    Args:
        hidden_norms: what `HiddenNormProbe.drain` gives.
        parameters: see `megatron_ext.optim.retraction.trained_parameters`. Only the entries whose masters this rank owns are counted:
            the others are a step old until a sharded optimizer gathers them.
    """
    chunks = list(chunks)
    statistics = Statistics(torch.cuda.current_device(), layer_names(chunks[0]))
    scales = {
        module.stored: (scale_kind(name), module.init / module.scale)
        for chunk in chunks
        for name, module in chunk.named_modules()
        if isinstance(module, ScaledParameter)
    }
    for _, param, buffer in parameters:
        if param in scales:
            kind, factor = scales[param]
            values = master_shard(param, buffer)[0] * factor
            statistics.add(kind, values.abs() if kind.endswith("alpha") else values)
    for layer, norms in hidden_norms.items():
        statistics.add(HIDDEN, norms)
        statistics.add(f"{HIDDEN}/{layer}", norms)
    loads = expert_loads(chunks)
    if loads is not None:
        used = loads[loads.sum(-1) > 0]
        statistics.add(LOAD, used.amax(-1) / used.mean(-1))
    return statistics.reduce()
