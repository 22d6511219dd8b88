"""The block linears of a model as training quantises them: named as in `ngpt.config.linears`, weights joined as in one training GEMM.

The transformers model keeps queries, keys and values separate, and the gate separate from the up projection. Training multiplies each set
at once. The routed experts of a layer share a name and are stacked in one tensor.

Shapes: w_NK for a linear, [E, N, K] for routed experts; x_MK tokens by input features.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ngpt.hf.links import join_qkv, split_qkv
from ngpt.hf.modeling_ngpt import NGPTMLP, NGPTAttention, NGPTForCausalLM, NGPTMamba2, NGPTMoE


@dataclass(frozen=True)
class Linear:
    """A block linear.

    Attributes:
        layer: number of its layer. path: its name within the layer, the same in all layers.
        module: the module that holds the parameters of routed experts; for other linears the projections hold them.
        projections: the model's linear modules whose outputs, joined, are this linear's; empty for routed experts.
        groups: number of groups of queries, keys and values; 0: outputs are concatenated.
        stacked: name of the experts' parameter.
    """

    layer: int
    path: str
    module: nn.Module
    projections: tuple[nn.Linear, ...] = ()
    groups: int = 0
    stacked: str = ""

    @property
    def name(self) -> str:
        return f"layers.{self.layer}.{self.path}"

    @property
    def parameters(self) -> tuple[nn.Parameter, ...]:
        return tuple(projection.weight for projection in self.projections) or (self.module.get_parameter(self.stacked),)

    def weight(self) -> Tensor:
        """[N, K], or [E, N, K] for routed experts; a view if nothing is joined."""
        return self.join([parameter.detach() for parameter in self.parameters])

    def join(self, rows: Sequence[Tensor]) -> Tensor:
        """Joins one tensor per projection into one; their first dimension is the outputs."""
        if len(rows) == 1:
            return rows[0]
        return join_qkv(rows, self.groups) if self.groups else torch.cat(list(rows))

    @torch.no_grad()
    def write(self, weight: Tensor) -> None:
        """Overwrites the weights with a tensor of `weight`'s shape."""
        parts = [weight]
        if self.projections:
            rows = [len(projection.weight) for projection in self.projections]
            parts = split_qkv(weight, rows, self.groups) if self.groups else list(weight.split(rows))
        for parameter, part in zip(self.parameters, parts, strict=True):
            parameter.copy_(part)


def block_linears(model: NGPTForCausalLM) -> list[Linear]:
    """All block linears of a model, in order."""
    return [linear for number, layer in enumerate(model.model.layers) for linear in _of_layer(number, layer.mixer)]


def _of_layer(layer: int, mixer: nn.Module) -> Iterator[Linear]:
    if isinstance(mixer, NGPTAttention):
        queries = (mixer.q_proj, mixer.k_proj, mixer.v_proj)
        yield Linear(layer, "self_attention.linear_qkv", mixer, queries, mixer.config.num_key_value_heads)
        yield Linear(layer, "self_attention.linear_proj", mixer, (mixer.o_proj,))
    elif isinstance(mixer, NGPTMLP):
        yield from _of_mlp(layer, "mlp", mixer)
    elif isinstance(mixer, NGPTMamba2):
        yield Linear(layer, "mixer.in_proj", mixer, (mixer.in_proj,))
        yield Linear(layer, "mixer.out_proj", mixer, (mixer.out_proj,))
    elif isinstance(mixer, NGPTMoE):
        yield Linear(layer, "mlp.experts.linear_fc1", mixer.experts, stacked=mixer.experts.up_name)
        yield Linear(layer, "mlp.experts.linear_fc2", mixer.experts, stacked="down_proj")
        if mixer.shared_experts is not None:
            yield from _of_mlp(layer, "mlp.shared_experts", mixer.shared_experts)
    else:
        raise NotImplementedError(f"layer {layer}: {type(mixer).__name__} has no entry in ngpt.model_analysis.linears")


def _of_mlp(layer: int, path: str, mlp: NGPTMLP) -> Iterator[Linear]:
    up = (mlp.gate_proj, mlp.up_proj) if mlp.activate.is_gated else (mlp.up_proj,)
    yield Linear(layer, f"{path}.linear_fc1", mlp, up)
    yield Linear(layer, f"{path}.linear_fc2", mlp, (mlp.down_proj,))


@contextmanager
def changed_inputs(linears: Sequence[Linear], change: Callable[[Linear, Tensor], Tensor]) -> Iterator[None]:
    """Inside the context, every linear that the model gives x, [..., K], multiplies change(linear, x) instead."""
    with ExitStack() as stack:
        for linear in linears:
            for projection in linear.projections:
                hook = projection.register_forward_pre_hook(lambda _, inputs, linear=linear: (change(linear, inputs[0]),))
                stack.callback(hook.remove)
        stack.enter_context(projected_by(linears, lambda linear, _, x, project: project(change(linear, x))))
        yield


type Project = Callable[[Tensor], Tensor]


@contextmanager
def projected_by(linears: Sequence[Linear], function: Callable[[Linear, int, Tensor, Project], Tensor]) -> Iterator[None]:
    """Inside the context, routed experts project with function(linear, expert, x, the model's own projection)."""
    of_module: dict[nn.Module, dict[str, Linear]] = {}
    for linear in linears:
        if linear.stacked:
            of_module.setdefault(linear.module, {})[linear.stacked] = linear
    replaced = {module: vars(module).get("project") for module in of_module}  # None: the class's own method
    for module, by_name in of_module.items():
        own = module.project

        def project(x: Tensor, weight: Tensor, name: str, expert: int, own=own, by_name=by_name) -> Tensor:
            return function(by_name[name], expert, x, lambda changed: own(changed, weight, name, expert))

        module.project = project
    try:
        yield
    finally:
        for module, before in replaced.items():
            del module.project
            if before is not None:
                module.project = before
