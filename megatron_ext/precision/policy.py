"""Applies recipes to the module tree: which linears run in low precision, by which executor, and whether that is allowed."""

import re
from collections.abc import Iterable, Iterator

import torch
from torch import nn

from megatron_ext.device import on_gpu
from megatron_ext.models.names import layers_of
from megatron_ext.precision import te_recipes
from megatron_ext.precision.executors import (
    EmulatedExecutor,
    GroupedExecutor,
    NativeExecutor,
    NativeGroupedExecutor,
    Quantizable,
    QuantizableGrouped,
)
from megatron_ext.precision.state import PrecisionState
from ngpt.config import Config, ConfigError
from ngpt.config.executor import choose_executor, without_modules
from ngpt.config.experts import takes_grouped_experts
from ngpt.config.linears import block_linears, recipe_by_linear, recipes_in_use
from ngpt.optim.retraction import is_marked
from ngpt.recipes import Recipe

EMULATION_CAPABILITY = (9, 0)
_EXPERT = re.compile(r"local_experts\.\d+\.")


def choose_executors(cfg: Config, backend: str) -> dict[Recipe, str]:
    """What runs each recipe in use: `native` (Transformer Engine's kernels) or `emulated`; {} where nothing is quantised.

    Raises:
        ConfigError: the executor or the format asked for cannot run on this device with this backend.
    """
    executors = {recipe: _choose_executor(cfg, recipe, backend) for recipe in recipes_in_use(cfg)}
    if cfg.precision.diagnostics and "emulated" not in executors.values():
        rule = "The operands of Transformer Engine's kernels are not seen, so there is nothing to take figures of"
        raise ConfigError("precision.diagnostics", True, rule, "Set precision.executor=emulated or precision.diagnostics=false")
    return executors


def _choose_executor(cfg: Config, recipe: Recipe, backend: str) -> str:
    if recipe.format == "nvfp4" and on_gpu() and torch.cuda.get_device_capability() < EMULATION_CAPABILITY:
        rule = f"The quantiser kernels need compute capability 9.0, and {torch.cuda.get_device_name()} has less"
        raise ConfigError("precision.format", "nvfp4", rule, "Use precision=bf16, or a Hopper or newer GPU")
    return choose_executor(cfg, recipe, without_modules(cfg, backend) or te_recipes.unavailable(recipe))


def linears_of(chunks: Iterable[nn.Module]) -> Iterator[tuple[str, Quantizable]]:
    """(name, linear) of each linear of the blocks on this rank, named as in `ngpt.config.linears`: the experts of a layer share a name."""
    for name, layer in layers_of(chunks):
        for path, module in layer.named_modules():
            if isinstance(module, Quantizable):
                yield f"{name}.{_EXPERT.sub('', path)}", module


def apply_recipes(chunks: Iterable[nn.Module], cfg: Config, executors: dict[Recipe, str], state: PrecisionState) -> int:
    """Give every linear that the policy quantises the executor of its recipe.

    Args:
        chunks: this rank's model chunks, wrapped or not.
        executors: native | emulated, of each recipe.
        state: of this rank.

    Returns:
        The number of names on this rank whose linears run in low precision; the experts of a layer share theirs.

    Raises:
        ConfigError: a static quantiser would get a tensor that is not normalised.
    """
    indices = {linear.name: index for index, linear in enumerate(block_linears(cfg))}
    wanted = recipe_by_linear(cfg)
    native = {recipe: te_recipes.te_recipe(recipe) for recipe, executor in executors.items() if executor == "native"}
    if "emulated" in executors.values():
        # Partial sums of a split reduction would otherwise be added in bf16.
        torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
    applied, chunks = set(), list(chunks)
    for name, linear in linears_of(chunks):
        assert name in indices, f"{name}: a linear that ngpt/config/linears.py does not list"
        if name not in wanted:
            continue
        recipe = wanted[name]
        check_normalized(name, linear, recipe, "precision" if recipe.name == cfg.precision.name else f"precision.recipes.{recipe.name}")
        if recipe in native and isinstance(linear, QuantizableGrouped):
            linear.executor = NativeGroupedExecutor(state, native[recipe])
        elif recipe in native:
            te_recipes.prepare(linear)
            linear.executor = NativeExecutor(state, native[recipe])
        elif isinstance(linear, QuantizableGrouped):
            assert takes_grouped_experts(recipe, "emulated"), f"{name}: {recipe.name} has no grouped product"
            linear.executor = GroupedExecutor(state, recipe, name, indices[name])
        else:
            linear.executor = EmulatedExecutor(state, recipe, name, indices[name])
        applied.add(name)
    layers = tuple(f"{name}." for name, _ in layers_of(chunks))
    missing = sorted(name for name in wanted if name.startswith(layers) and name not in applied)
    # Otherwise they would train in high precision under a header that says something else.
    assert not missing, f"linears that the recipe quantises and no Quantizable module implements: {missing}"
    return len(applied)


def check_normalized(name: str, linear: Quantizable, recipe: Recipe, key: str) -> None:
    """The precondition of static scaling: the operand of a static quantiser is normalised.

    Args:
        key: of the recipe in the config.

    Raises:
        ConfigError: names the linear.
    """
    static = {operand for operand, spec in recipe.operands.items() if "static" in (spec.rowwise.global_amax, spec.columnwise.global_amax)}
    module = f"{name} ({type(linear).__name__})"
    if "input" in static and not linear.unit_norm_input:
        raise ConfigError(
            f"{key}.input_amax",
            "static",
            f"The input of {module} is not normalised, so its magnitude has no bound",
            f"Set model.fine_grained=true, {key}.input_amax=dynamic_pow2, or add {name!r} to precision.bf16_modules",
        )
    if "weight" in static and not is_marked(linear.weight):
        raise ConfigError(
            f"{key}.weight_amax",
            "static",
            f"The weight of {module} is not kept at unit norm",
            f"Set {key}.weight_amax=dynamic_pow2, or add {name!r} to precision.bf16_modules",
        )
