"""Which layers, tokens and groups one rank has: what the estimates of memory and time share.

Names: a chunk is a piece of the model between two pipeline cuts; pipeline rank r of P holds the chunks r, r + P, ...
"""

import operator
import re
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import accumulate

from ngpt.config.activations import ACTIVATIONS
from ngpt.config.executor import expected_executor, keeps_quantized_weights
from ngpt.config.experts import groups_experts
from ngpt.config.linears import BlockLinear, block_linears, recipe_by_linear
from ngpt.config.pattern import cut_pattern, parse
from ngpt.config.schema import Config
from ngpt.config.sizes import data_parallel_size, expert_tensor_size, pipeline_stages, world_size
from ngpt.estimate.hardware import GPUS, Gpu
from ngpt.recipes import Recipe

ASSUMED_GPU = "h100"  # where cluster.gpu does not say
_LAYER = re.compile(r".*?layers\.\d+")  # in the name of a linear


@dataclass(frozen=True, eq=False)
class Layer:
    """One symbol of the layer pattern on one rank.

    Attributes:
        symbol: as in `model.layer_pattern`.
        linears: its linear layers with this rank's sizes; the routed experts' count as one, as in `ngpt.config.linears`. Equal layers
            are one object, with the linears of the first: what is computed for it holds for all.
        recipes: of the quantised linears, by name.
    """

    symbol: str
    linears: tuple[BlockLinear, ...]
    recipes: Mapping[str, Recipe]

    def linear(self, ending: str) -> BlockLinear:
        """The linear layer whose name ends in `ending`: "linear_qkv", ".experts.linear_fc1"."""
        return next(linear for linear in self.linears if linear.name.endswith(ending))

    @property
    def has_experts(self) -> bool:
        return any(linear.is_routed for linear in self.linears)

    @property
    def has_shared_experts(self) -> bool:
        return any(".shared_experts." in linear.name for linear in self.linears)


def computes_norm(cfg: Config, layer: Layer, writer: BlockLinear) -> bool:
    """Whether the fine-grained norm in front of an output projection is computed: for experts, which are summed, and quantised linears."""
    is_normalized = cfg.model.architecture == "ngpt" and cfg.model.fine_grained
    return is_normalized and (layer.has_experts or writer.name in layer.recipes)


@dataclass(frozen=True)
class Chunk:
    """Layers between two pipeline cuts. The first chunk has the embedding, the last the output layer and the loss.

    Attributes:
        layers: of the trunk, and in the last chunk those of the multi-token prediction depths after them.
        depths: prediction depths, each with its projection and its own use of the embedding, the output layer and the loss.
    """

    layers: tuple[Layer, ...]
    first: bool
    last: bool
    depths: int


@dataclass(frozen=True)
class RankParameters:
    """Numbers that one rank holds.

    Attributes:
        dense, dense_scales: everything but the routed experts: in the model's dtype, and nGPT's scales, which are fp32.
        experts, expert_scales: the rank's part of the routed experts.
        replicated: those among `dense` and `dense_scales` that all tensor-parallel ranks hold whole.
        tensors: parameter tensors.
    """

    dense: int = 0
    dense_scales: int = 0
    experts: int = 0
    expert_scales: int = 0
    replicated: int = 0
    tensors: int = 0

    @property
    def total(self) -> int:
        return self.dense + self.dense_scales + self.experts + self.expert_scales

    def __add__(self, other: "RankParameters") -> "RankParameters":
        return RankParameters(*map(operator.add, vars(self).values(), vars(other).values()))

    def __mul__(self, number: int) -> "RankParameters":
        return RankParameters(*(number * count for count in vars(self).values()))


@dataclass(frozen=True)
class Tokens:
    """Tokens of one micro-batch on one rank.

    Attributes:
        inner: of the sub-blocks' products, whose features are split over tensor-parallel ranks.
        stream: of the residual stream: with sequence parallelism a part of `inner`.
        routed: (token, expert) pairs that the rank's experts multiply, when routing is balanced.
        sequence: length of a whole sequence.
    """

    inner: int
    stream: int
    routed: int
    sequence: int


def chunks(cfg: Config) -> list[Chunk]:
    """The chunks of the model in order, cut where the pattern says or, for a dense one, evenly."""
    pattern = parse(cut_pattern(cfg.model.layer_pattern, pipeline_stages(cfg)))
    recipes = recipe_by_linear(cfg)
    by_layer: dict[str, list[BlockLinear]] = {}
    for linear in block_linears(cfg):
        by_layer.setdefault(_LAYER.findall(linear.name)[0], []).append(linear)
    kinds: dict[tuple, Layer] = {}
    layers = []
    for linears in map(tuple, by_layer.values()):
        kind = (linears[0].symbol, *(recipes.get(linear.name) for linear in linears))
        own = {linear.name: recipes[linear.name] for linear in linears if linear.name in recipes}
        layers.append(kinds.setdefault(kind, Layer(linears[0].symbol, linears, own)))
    ends = list(accumulate(map(len, pattern.stages)))
    ends[-1] = len(layers)
    found = []
    for position, (first, end) in enumerate(zip([0, *ends], ends, strict=False)):
        last = position == len(ends) - 1
        found.append(Chunk(tuple(layers[first:end]), position == 0, last, len(pattern.depths) if last else 0))
    return found


def chunks_by_rank(cfg: Config) -> list[list[Chunk]]:
    """The chunks that each pipeline rank holds."""
    found, ranks = chunks(cfg), cfg.parallel.pipeline
    return [found[rank::ranks] for rank in range(ranks)]


def tokens(cfg: Config) -> Tokens:
    """Tokens of a micro-batch on each rank."""
    inner = cfg.train.micro_batch_size * cfg.train.seq_length // cfg.parallel.context
    stream = inner // cfg.parallel.tensor if cfg.parallel.sequence_parallel else inner
    # Each expert's tokens come from all ranks that share the experts, and each of its tensor-parallel ranks sees all of them.
    routed = stream * cfg.model.moe_top_k * expert_tensor_size(cfg)
    return Tokens(inner, stream, routed, cfg.train.seq_length)


def local_experts(cfg: Config) -> int:
    """Routed experts of one layer that a rank holds, whole or in part."""
    return cfg.model.num_experts // cfg.parallel.expert


def expert_data_parallel_size(cfg: Config) -> int:
    """Ranks that hold the same part of the same experts."""
    return world_size(cfg) // (cfg.parallel.expert * expert_tensor_size(cfg) * cfg.parallel.pipeline)


def dense_data_parallel_size(cfg: Config) -> int:
    """Ranks that hold the same part of everything else: gradients are reduced over context-parallel ranks, too."""
    return data_parallel_size(cfg) * cfg.parallel.context


def gpu_of(cfg: Config) -> Gpu:
    """The GPU of the table that an estimate is for."""
    return GPUS[cfg.cluster.gpu or ASSUMED_GPU]


def activation_bytes(cfg: Config) -> int:
    """Bytes of a number in activations and matrices."""
    return 2 if cfg.precision.dtype == "bf16" else 4


def gates_in_steps(cfg: Config) -> bool:
    """Whether a gate's function and its product with up are separate kernels. Megatron's, for the control, may be fused."""
    activation = ACTIVATIONS[cfg.model.activation]
    return cfg.model.architecture == "gpt" and activation.gated and not activation.fusion


def has_grouped_experts(cfg: Config) -> bool:
    """Whether all experts of a rank run together on the GPU that the estimate is for."""
    return groups_experts(cfg, lambda recipe: expected_executor(cfg, recipe))


def has_own_products(cfg: Config, layer: Layer, linear: BlockLinear) -> bool:
    """Whether each of the layer's experts has its own product of a linear. Natively it has one even where experts run together."""
    if not linear.is_routed:
        return False
    return not has_grouped_experts(cfg) or _is_native(cfg, layer, linear)


def kept_weight_operands(cfg: Config, layer: Layer, linear: BlockLinear) -> int:
    """Quantised matrices of each weight of a linear that are kept through a step; 0 where every pass quantises the weight.

    Native experts that run together keep both, at least for the backward pass. In fp8 on Blackwell, whose products read rows or columns,
    they keep one. Transformer Engine's own modules are not counted.
    """
    recipe = layer.recipes.get(linear.name)
    if recipe is None:
        return 0
    if _is_native(cfg, layer, linear):
        both = 1 if recipe.format == "fp8" and "nvfp4" in gpu_of(cfg).rates else 2
        return both if linear.is_routed and has_grouped_experts(cfg) else 0
    return recipe.weight_operands if keeps_quantized_weights(cfg) else 0


def _is_native(cfg: Config, layer: Layer, linear: BlockLinear) -> bool:
    recipe = layer.recipes.get(linear.name)
    return recipe is not None and expected_executor(cfg, recipe) == "native"


def operand_bytes(cfg: Config, recipe: Recipe | None) -> float:
    """Bytes of a number in an operand of a linear with this recipe, its block scales included."""
    if recipe is None or expected_executor(cfg, recipe) != "native":
        return activation_bytes(cfg)  # emulated operands hold codes times block scales
    return {"fp8": 1.0, "mxfp8": 1 + 1 / 32, "nvfp4": 0.5 + 1 / 16}[recipe.format]
