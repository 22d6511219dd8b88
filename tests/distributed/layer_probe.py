"""What each layer of a trained model does to its tokens, in whatever layout the model runs; called by case_runner.py."""

from collections.abc import Iterator

import torch
import torch.distributed as dist
from megatron.core.models.hybrid.hybrid_block import HybridStack
from megatron.core.ssm.mamba_mixer import MambaMixer
from megatron.core.transformer.attention import SelfAttention
from megatron.core.transformer.moe.moe_layer import MoELayer
from megatron.core.transformer.moe.router import TopKRouter
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

from megatron_ext.layers import experts
from megatron_ext.precision.executors import Quantizable, QuantizableGrouped
from megatron_ext.precision.policy import linears_of

LENGTH = 32  # tokens of the whole sequence


def starve_experts(chunks: list) -> None:
    """Biases that leave the second half of the experts of each layer without a token, whatever the scores: those are 0 to 1."""
    for router in (module for chunk in chunks for module in chunk.modules() if isinstance(module, TopKRouter)):
        router.expert_bias[router.expert_bias.numel() // 2 :] = -10


@torch.no_grad()
def token_0_leaks(chunks: list) -> list[dict]:
    """For each layer of this rank, what happens to the other tokens of its part of the sequence when the first token changes.

    Returns:
        {"layer", "kind": its symbol, "own": how far the first token's output moved, "moved": how far another token's moved at most,
        "leaked": the same with everything taken out of the layer that carries information from token to token}. Other tokens of a
        layer without attention and Mamba move by the rounding of matrix products of another shape, no more.

    Parallelism: all ranks call this together. Each changes the first token of its own part of the sequence.
    """
    found = []
    for layer in _layers(chunks):
        own, moved = _response(layer)
        _stop_transport(layer)
        found.append({"layer": layer.layer_number, "kind": _kind(layer), "own": own, "moved": moved, "leaked": _response(layer)[1]})
    return found


@torch.no_grad()
def operand_norms(chunks: list) -> dict[str, list[float]]:
    """For each linear that a recipe can quantise, the worst | norm - 1 | of what its quantisers would get: tokens, and weight vectors.

    The layers run one after the other, each on what the one before it left in the residual stream.

    Parallelism: the features in front of an output projection are split over a group; their squares are summed over it.
    """
    found: dict[str, list[float]] = {}

    def measure(name: str, linear: Quantizable) -> None:
        matrices = linear.weight.view(linear.num_matrices, -1, linear.weight.size(1))
        weight = matrices.double().norm(dim=1 + linear.weight.unit_dim)
        worst = found.setdefault(name, [0.0, 0.0])
        worst[1] = max(worst[1], (weight - 1).abs().max().item())
        splits_rows = linear.cut_dim == 0 if isinstance(linear, QuantizableGrouped) else linear.splits_rows

        def watch(linear: Quantizable, x: Tensor, *sizes: list[int]) -> tuple[Tensor, Tensor | None]:
            squares = x.double().square().sum(-1)
            if not splits_rows:
                dist.all_reduce(squares, group=linear.feature_group)
            norms = squares[squares > 0].sqrt()  # zeros fill up experts' tokens
            worst[0] = max(worst[0], (norms - 1).abs().max().item() if len(norms) else 0.0)
            return linear.forward_in_backend(x, *sizes)

        linear.executor = watch

    for name, linear in linears_of(chunks):
        measure(name, linear)
    h_SBD = None
    for layer in _layers(chunks):
        h_SBD = _run(layer, _tokens(layer.config) if h_SBD is None else h_SBD)
    for _, linear in linears_of(chunks):
        del linear.executor
    return found


def padding_effects(chunks: list) -> list[dict]:
    """For each layer of separate experts in a quantised model: what changes if their tokens are filled up beyond whole blocks.

    Returns:
        {"filled": rows of zeros that the linears got, first as trained, then with more, "changes": of the layer's output, its input's
        gradient and each gradient of an expert's matrix, of which at least half are not zero}.
    """
    return [_padding_effect(layer) for layer in _layers(chunks) if _kind(layer) == "E"]


def _padding_effect(layer: nn.Module) -> dict:
    linears = [linear for linear in layer.modules() if isinstance(linear, experts.PadsTokens)]
    trained, filled, results = [linear.executor for linear in linears], [0, 0], []

    def count(linear: nn.Module, x: Tensor) -> tuple[Tensor, None]:
        filled[len(results)] += (x == 0).all(-1).sum().item()
        return trained[linears.index(linear)](linear, x)

    for linear in linears:
        linear.executor = count
    multiple = experts.TOKEN_MULTIPLE
    for experts.TOKEN_MULTIPLE in (multiple, 16 * multiple):
        h_SBD = _tokens(layer.config).requires_grad_()
        for linear in linears:
            linear.weight.main_grad.zero_()  # where the emulated product adds the gradient
        output = _run(layer, h_SBD)
        (grad,) = torch.autograd.grad(output, h_SBD, output.detach().flip(-1))
        results.append((output.detach(), grad, *(linear.weight.main_grad.clone() for linear in linears)))
    experts.TOKEN_MULTIPLE = multiple
    assert sum(tensor.any().item() for tensor in results[0]) > len(linears) / 2
    return {"filled": filled, "changes": [(a - b).abs().max().item() for a, b in zip(*results, strict=True)]}


def _layers(chunks: list) -> Iterator[nn.Module]:
    for chunk in chunks:
        chunk.eval()
        yield from (layer for stack in chunk.modules() if isinstance(stack, HybridStack) for layer in stack.layers)


def _kind(layer: nn.Module) -> str:
    symbols = {MambaMixer: "M", SelfAttention: "*", MoELayer: "E"}
    return next((symbol for kind, symbol in symbols.items() if any(isinstance(module, kind) for module in layer.modules())), "-")


def _response(layer: nn.Module) -> tuple[float, float]:
    """Largest change of the first token's output and of the others'."""
    before = _tokens(layer.config)
    after = torch.cat([before[:1].flip(-1), before[1:]])
    change = (_run(layer, after) - _run(layer, before)).abs()
    return change[0].max().item(), change[1:].max().item()


def _tokens(config: TransformerConfig) -> Tensor:
    """Unit vectors for this rank's part of the sequence, the same on all ranks."""
    parts = config.context_parallel_size * (config.tensor_model_parallel_size if config.sequence_parallel else 1)
    shape = (LENGTH // parts, 2, config.hidden_size)
    return nn.functional.normalize(torch.randn(shape, generator=torch.Generator().manual_seed(11)), dim=-1)


def _run(layer: nn.Module, h_SBD: Tensor) -> Tensor:
    output = layer(hidden_states=h_SBD.clone(), attention_mask=None)
    return output[0] if isinstance(output, tuple) else output


def _stop_transport(layer: nn.Module) -> None:
    """Attention's values are zero; the scan's state stays empty, since its B is zero, and its convolution sees one token."""
    for module in layer.modules():
        if isinstance(module, SelfAttention):
            heads, groups = module.num_attention_heads_per_partition, module.num_query_groups_per_partition
            module.linear_qkv.weight.view(groups, heads // groups + 2, module.hidden_size_per_attention_head, -1)[:, -1] = 0
        elif isinstance(module, MambaMixer):
            state = slice(module.d_inner_local_tp, module.d_inner_local_tp + module.ngroups_local_tp * module.d_state)
            module.conv1d_weight[..., :-1] = 0
            module.conv1d_weight[state] = 0
            module.conv1d_bias[state] = 0
