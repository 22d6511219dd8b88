"""The linear layers of the blocks as they will be built: names, sizes on one tensor-parallel rank, and which of them are quantised.

Names are `layers.<i>.<path in the layer>`, i counting the symbols of the layer pattern from 0 over all pipeline stages, and
`mtp.<depth>.layers.<i>.<path in the layer>` in multi-token prediction depths, both counted from 0. A depth's projection of embedding and
hidden state (eh_proj) is none of them: it stays in high precision like the embedding and the output layer that it stands between.
"""

import math
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from fnmatch import fnmatchcase

from ngpt.config.activations import ACTIVATIONS
from ngpt.config.pattern import parse
from ngpt.config.recipes import recipe_of
from ngpt.config.schema import Config
from ngpt.config.sizes import expert_tensor_size
from ngpt.recipes import Recipe


@dataclass(frozen=True)
class Dimension:
    """Features of one rank: `count` times the value of a config key, plus `others`, split over `shards` tensor-parallel ranks."""

    key: str
    value: int
    count: int = 1
    shards: int = 1
    others: int = 0

    @property
    def features(self) -> int:
        return (self.value * self.count + self.others) // self.shards

    def value_step(self, multiple: int) -> int:
        """What `value` must be a multiple of, so that `features` is a multiple of `multiple` (if `others` are, too)."""
        return self.shards * multiple // math.gcd(self.shards * multiple, self.count)


@dataclass(frozen=True)
class BlockLinear:
    """One linear layer of a block.

    Attributes:
        name: as in this module's docstring.
        symbol: of the layer pattern.
        block_index: the block of the trunk that holds it, from 0 (`Pattern.blocks`); None in a prediction depth, which is not a block.
        inputs: the rank's input features.
        outputs: the rank's output features.
        reads_stream: its input is the residual stream; otherwise it writes to it and its input is the product of the sub-block.
    """

    name: str
    symbol: str
    block_index: int | None
    inputs: Dimension
    outputs: Dimension
    reads_stream: bool

    @property
    def in_features(self) -> int:
        return self.inputs.features

    @property
    def out_features(self) -> int:
        return self.outputs.features

    @property
    def is_routed(self) -> bool:
        """Whether it stands for the linears of a layer's routed experts, which see only the tokens sent to them."""
        return ".experts." in self.name

    @property
    def everywhere(self) -> str:
        """The glob of this linear in every layer."""
        return re.sub(r"\.\d+\.", ".*.", self.name)


def block_linears(cfg: Config) -> list[BlockLinear]:
    """All linear layers of the blocks, in order. For a resolved config whose layer pattern and tensor split are checked."""
    pattern = parse(cfg.model.layer_pattern)
    block_of_symbol = [index for index, block in enumerate(pattern.blocks) for _ in block]
    layers: list[tuple[str, str, int | None]]
    layers = [(f"layers.{index}", symbol, block_of_symbol[index]) for index, symbol in enumerate(pattern.trunk)]
    layers += [
        (f"mtp.{depth}.layers.{index}", symbol, None) for depth, part in enumerate(pattern.depths) for index, symbol in enumerate(part)
    ]
    kinds = {symbol: list(_LINEARS[symbol](cfg)) for symbol in set(pattern.layers)}
    return [
        BlockLinear(f"{layer}.{path}", symbol, block_index, inputs, outputs, reads_stream)
        for layer, symbol, block_index in layers
        for path, inputs, outputs, reads_stream in kinds[symbol]
    ]


def deciding_glob(cfg: Config, linear: str) -> str | None:
    """The last glob of `precision.layers` that matches the name of a linear layer."""
    return next((glob for glob in reversed(cfg.precision.layers) if fnmatchcase(linear, glob)), None)


def named_recipe(cfg: Config, linear: BlockLinear) -> str | None:
    """The recipe that `precision.layers` gives a linear layer, by its key in `precision.recipes`; None: that of the run."""
    glob = deciding_glob(cfg, linear.name)
    return None if glob is None else cfg.precision.layers[glob]


def recipe_by_linear(cfg: Config) -> dict[str, Recipe]:
    """The recipe of each linear layer of the blocks that is quantised, by its name, in order.

    The first and last blocks and `bf16_modules` are left out, whatever recipe they have. Prediction depths come after the blocks and do
    not count as blocks: `bf16_modules=["mtp.*"]` keeps them in high precision.

    Raises:
        ValueError: as `recipe_of`, of a config that is not checked.
    """
    precision = cfg.precision
    recipes: dict[str | None, Recipe] = {None: recipe_of(precision)}
    recipes |= {name: recipe_of(section) for name, section in precision.recipes.items()}
    if all(recipe.format == "none" for recipe in recipes.values()):
        return {}
    blocks = range(precision.num_layers_at_start_in_bf16, cfg.model.num_layers - precision.num_layers_at_end_in_bf16)
    return {
        linear.name: recipe
        for linear in block_linears(cfg)
        if (recipe := recipes[named_recipe(cfg, linear)]).format != "none"
        and (linear.block_index is None or linear.block_index in blocks)
        and not any(fnmatchcase(linear.name, glob) for glob in precision.bf16_modules)
    }


def recipes_in_use(cfg: Config) -> dict[Recipe, list[str]]:
    """Every recipe that quantises some linear layers of the blocks, with their names."""
    names: dict[Recipe, list[str]] = {}
    for name, recipe in recipe_by_linear(cfg).items():
        names.setdefault(recipe, []).append(name)
    return names


def describe_precision(cfg: Config) -> list[str]:
    """Lines on how many linear layers are quantised, and how: two for each recipe of NVFP4, one for another."""
    precision = cfg.precision
    tail = f", {precision.dtype} everywhere in the last {precision.bf16_tail:.4g} of the steps" if precision.bf16_tail else ""
    total, lines = len(block_linears(cfg)), []
    for recipe, names in recipes_in_use(cfg).items():
        lines.append(f"{recipe.name}: {recipe.format} operands in {len(names)} of {total} linear layers of the blocks{tail}")
        lines += [recipe.describe()] if recipe.format == "nvfp4" else []
    return lines or [f"{precision.name}: every layer in {precision.dtype}"]


_Linears = Iterable[tuple[str, Dimension, Dimension, bool]]  # path in the layer, inputs, outputs, reads_stream


def _attention(cfg: Config) -> _Linears:
    model, tensor = cfg.model, cfg.parallel.tensor
    stream = Dimension("model.hidden_size", model.hidden_size)
    qkv = Dimension("model.head_dim", model.head_dim, model.num_attention_heads + 2 * model.num_query_groups, tensor)
    heads = Dimension("model.head_dim", model.head_dim, model.num_attention_heads, tensor)
    return [("self_attention.linear_qkv", stream, qkv, True), ("self_attention.linear_proj", heads, stream, False)]


def _mlp(cfg: Config) -> _Linears:
    model, tensor = cfg.model, cfg.parallel.tensor
    stream = Dimension("model.hidden_size", model.hidden_size)
    gate_and_up = ACTIVATIONS[model.activation].gate_and_up
    fc1 = Dimension("model.ffn_hidden_size", model.ffn_hidden_size, gate_and_up, tensor)
    fc2 = Dimension("model.ffn_hidden_size", model.ffn_hidden_size, 1, tensor)
    return [("mlp.linear_fc1", stream, fc1, True), ("mlp.linear_fc2", fc2, stream, False)]


def _moe(cfg: Config) -> _Linears:
    """The routed experts' linears count as one: they have one shape and share their precision."""
    model, tensor = cfg.model, cfg.parallel.tensor
    stream = Dimension("model.hidden_size", model.hidden_size)
    gate_and_up = ACTIVATIONS[model.activation].gate_and_up
    experts = [("experts", "model.moe_ffn_hidden_size", model.moe_ffn_hidden_size, expert_tensor_size(cfg))]
    if model.moe_shared_ffn_hidden_size:
        experts.append(("shared_experts", "model.moe_shared_ffn_hidden_size", model.moe_shared_ffn_hidden_size, tensor))
    for path, key, size, shards in experts:
        yield f"mlp.{path}.linear_fc1", stream, Dimension(key, size, gate_and_up, shards), True
        yield f"mlp.{path}.linear_fc2", Dimension(key, size, 1, shards), stream, False


def _mamba(cfg: Config) -> _Linears:
    model, tensor = cfg.model, cfg.parallel.tensor
    stream = Dimension("model.hidden_size", model.hidden_size)
    groups = 2 * model.mamba_num_groups * model.mamba_state_dim
    zx_bc_dt = Dimension("model.mamba_num_heads", model.mamba_num_heads, 2 * model.mamba_head_dim + 1, tensor, groups)
    inner = Dimension("model.mamba_num_heads", model.mamba_num_heads, model.mamba_head_dim, tensor)
    return [("mixer.in_proj", stream, zx_bc_dt, True), ("mixer.out_proj", inner, stream, False)]


_LINEARS: dict[str, Callable[[Config], _Linears]] = {"*": _attention, "-": _mlp, "E": _moe, "M": _mamba}
