"""Peak memory of a rank: states, activations of the micro-batches in flight, and the largest of the moments on top of them."""

from collections import Counter
from dataclasses import dataclass

from ngpt.config.executor import expected_executor
from ngpt.config.linears import BlockLinear
from ngpt.config.schema import Config
from ngpt.config.sizes import micro_batches_per_step, padded_vocab_size
from ngpt.estimate.activations import kept_bytes, saved_bytes
from ngpt.estimate.calibration import WORKSPACE
from ngpt.estimate.rank import (
    Chunk,
    Layer,
    Tokens,
    activation_bytes,
    chunks_by_rank,
    kept_weight_operands,
    local_experts,
    operand_bytes,
    tokens,
)
from ngpt.estimate.states import RankParameters, StateBytes, rank_parameters, state_bytes

_JOIN_ROWS = 5  # a prediction depth: embedding and state before and after their norms, joined (2 * D); its output for the output layer
_EMULATED_OPERAND = 2  # bytes of a number: bf16 on every GPU


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes of torch's allocations at the peak of a rank, without CUDA's context and NCCL's buffers.

    Attributes:
        pipeline_rank: the stage with the highest peak.
        states: weights, gradients, optimizer state.
        quantized_weights: operands of emulated linears and of native experts, kept from the first micro-batch of a step to the last.
        activations: what layers keep for the backward pass, of all micro-batches in flight.
        temporary: logits, or the recomputed layers and their gradients, at the `moment`.
        workspace: of the libraries.
        moment: what happens at the peak.
    """

    pipeline_rank: int
    parameters: RankParameters
    states: StateBytes
    quantized_weights: float
    activations: float
    temporary: float
    workspace: float
    moment: str

    @property
    def peak(self) -> float:
        return self.states.total + self.quantized_weights + self.activations + self.temporary + self.workspace


def estimate_memory(cfg: Config) -> MemoryEstimate:
    """The memory of the pipeline rank that needs the most."""
    return max((rank_memory(cfg, rank, held) for rank, held in enumerate(chunks_by_rank(cfg))), key=lambda memory: memory.peak)


def rank_memory(cfg: Config, pipeline_rank: int, held: list[Chunk]) -> MemoryEstimate:
    """The peak of the ranks of one pipeline stage, which hold these chunks."""
    sizes, parameters = tokens(cfg), rank_parameters(cfg, held)
    kept = sum(chunk_bytes(cfg, chunk, sizes) for chunk in held) / len(held) * chunks_in_flight(cfg, pipeline_rank)
    moments = {"backward pass of a layer": max(_backward_bytes(cfg, chunk, sizes) for chunk in held)}
    if held[-1].last:
        moments["backward pass of a layer"] += _output_weight_bytes(cfg)  # Transformer Engine keeps the gradient that nobody reads
        moments["backward pass of the output layer"] = output_layer_bytes(cfg, sizes, held[-1].depths)
    moment, largest = max(moments.items(), key=lambda item: item[1])
    quantized = sum(quantized_weight_bytes(cfg, chunk) for chunk in held)
    return MemoryEstimate(pipeline_rank, parameters, state_bytes(cfg, parameters), quantized, kept, largest, WORKSPACE, moment)


def quantized_weight_bytes(cfg: Config, chunk: Chunk) -> float:
    """Bytes of the quantised weights of a chunk's linears, see `kept_weight_operands`."""
    return sum(
        kept_weight_operands(cfg, layer, linear)
        * _bytes_of_kept(cfg, layer, linear)
        * linear.in_features
        * linear.out_features
        * (local_experts(cfg) if linear.is_routed else 1)
        for layer in chunk.layers
        for linear in layer.linears
        if linear.name in layer.recipes
    )


def _bytes_of_kept(cfg: Config, layer: Layer, linear: BlockLinear) -> float:
    recipe = layer.recipes[linear.name]
    return operand_bytes(cfg, recipe) if expected_executor(cfg, recipe) == "native" else _EMULATED_OPERAND


def chunks_in_flight(cfg: Config, pipeline_rank: int) -> int:
    """Chunks whose activations a rank holds at once under the 1F1B schedule, which virtual pipelining interleaves."""
    ranks, virtual = cfg.parallel.pipeline, cfg.parallel.virtual_pipeline or 1
    behind = ranks - pipeline_rank - 1
    warm_up = behind if virtual == 1 else 2 * behind + (virtual - 1) * ranks
    if ranks == 1:
        return virtual
    return min(warm_up + 1, micro_batches_per_step(cfg) * virtual)


def chunk_bytes(cfg: Config, chunk: Chunk, sizes: Tokens) -> float:
    """What a chunk keeps of one micro-batch: every layer's part, or with full recomputation only what enters the recomputed layers."""
    row = sizes.stream * cfg.model.hidden_size * activation_bytes(cfg)
    recomputed = _recomputed_groups(cfg, chunk)
    others = chunk.layers[sum(map(len, recomputed)) :]
    total = len(recomputed) * row + sum(number * kept_bytes(cfg, layer, sizes) for layer, number in Counter(others).items())
    if chunk.last:  # the input of the output layer, and of the control's final norm
        total += row * (2 if cfg.model.architecture == "gpt" else 1)
        total += chunk.depths * row * _JOIN_ROWS
    return total


def output_layer_bytes(cfg: Config, sizes: Tokens, depths: int) -> float:
    """Bytes at the start of the backward pass: logits, which their gradient overwrites, and a gradient of the layer's weight that only
    autograd needs. The product itself adds the real one to the sum.

    Each prediction depth keeps logits of its own.
    """
    size = activation_bytes(cfg)
    logits = sizes.inner * padded_vocab_size(cfg.model) // cfg.parallel.tensor
    return size * logits * (1 + depths) + _output_weight_bytes(cfg)


def _output_weight_bytes(cfg: Config) -> int:
    return activation_bytes(cfg) * padded_vocab_size(cfg.model) // cfg.parallel.tensor * cfg.model.hidden_size


def _backward_bytes(cfg: Config, chunk: Chunk, sizes: Tokens) -> float:
    """What the most demanding layer adds in its backward pass: what it recomputes, and gradients of its largest tensors."""
    groups = _recomputed_groups(cfg, chunk)
    rebuilt = max((sum(_all_bytes(cfg, layer, sizes) for layer in group) for group in set(groups)), default=0.0)
    partly = max(_all_bytes(cfg, layer, sizes) - kept_bytes(cfg, layer, sizes) for layer in set(chunk.layers))
    return (rebuilt or partly) + max(_gradient_bytes(cfg, layer, sizes) for layer in set(chunk.layers))


def _all_bytes(cfg: Config, layer: Layer, sizes: Tokens) -> float:
    return sum(saved_bytes(cfg, layer, sizes).values())


def _gradient_bytes(cfg: Config, layer: Layer, sizes: Tokens) -> float:
    """Gradients alive at once: those of an operation's input and output, the widest of the layer, and of the stream."""
    size = activation_bytes(cfg)
    widths = [
        (sizes.routed if linear.is_routed else sizes.inner) * max(linear.in_features, linear.out_features)
        for linear in layer.linears
    ]
    return size * (2 * max(widths) + 2 * sizes.stream * cfg.model.hidden_size)


def _recomputed_groups(cfg: Config, chunk: Chunk) -> list[tuple[Layer, ...]]:
    """The leading layers of a chunk that full recomputation runs again, in groups. Of a group only the first layer's input is kept."""
    parallel, layers = cfg.parallel, chunk.layers
    if parallel.recompute != "full":
        return []
    number = parallel.recompute_num_layers
    if parallel.recompute_method == "block":
        return [(layer,) for layer in layers[:number]]
    return [layers[first : first + number] for first in range(0, len(layers), number)]
