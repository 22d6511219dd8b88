"""Whether a rank's routed experts run together or one by one, decided in this one place: for a run, its config and its estimate."""

from collections.abc import Callable, Iterator

from ngpt.config.errors import ConfigError
from ngpt.config.executor import expected_executor
from ngpt.config.linears import block_linears, named_recipe
from ngpt.config.recipes import recipe_of
from ngpt.config.schema import Config
from ngpt.config.sizes import expert_tensor_size
from ngpt.recipes import QuantizerSpec, Recipe

_GROUPED_MULTIPLE = 8  # features: torch's grouped product takes rows of whole 16 bytes
ExecutorOf = Callable[[Recipe], str]  # none | emulated | native, as `decide_executor` says


def groups_experts(cfg: Config, executor_of: ExecutorOf) -> bool:
    """Whether all experts of a rank are quantised and multiplied together.

    Args:
        executor_of: what runs a recipe, on the run's machine or on the one that an estimate is for.

    Raises:
        ConfigError: this was asked for by name and is impossible.
    """
    impl, obstacle = cfg.model.expert_impl, next(obstacles(cfg, executor_of), None)
    if impl == "grouped" and obstacle:
        raise _refusal(obstacle)
    return impl == "grouped" or (impl == "auto" and obstacle is None)


def obstacles(cfg: Config, executor_of: ExecutorOf) -> Iterator[str]:
    """Why experts cannot run together; empty if they can."""
    for key, width in _odd_widths(cfg).items():
        yield f"A grouped product takes rows of multiples of {_GROUPED_MULTIPLE} features, and those of {key} are {width} on a rank"
    for recipe in recipes_of_experts(cfg):
        if not takes_grouped_experts(recipe, executor_of(recipe)):
            yield (
                "Emulated experts are quantised together under static input and weight and static or dynamic_pow2 grad_output without "
                f"rht; precision={recipe.name} has {recipe.describe()}"
            )


def takes_grouped_experts(recipe: Recipe, executor: str) -> bool:
    """Whether all experts of a rank can be quantised together by this executor.

    Without a format nothing is quantised. Transformer Engine's kernels get each expert's operands separately. Emulation makes one
    call for all experts, so its constant scales must be those of each expert alone. The amax of grad_output may be each expert's own if it
    is rounded to a power of two.
    """
    if executor != "emulated":
        return True
    specs = [spec for spec in recipe.operands.values() if isinstance(spec, QuantizerSpec) and spec.rht == "off"]
    if len(specs) < len(recipe.operands):
        return False
    of_input, of_weight, of_gradient = specs
    if not of_input.global_amax == of_weight.global_amax == "static":
        return False
    of_each_expert = of_gradient.global_amax == "dynamic_pow2" and not of_gradient.same_both_ways
    return of_each_expert or of_gradient.global_amax == "static"


def recipes_of_experts(cfg: Config) -> list[Recipe]:
    """The recipes of the routed experts, by name alone: whether they are grouped does not depend on which blocks are kept in bf16."""
    if not cfg.precision.layers:
        return [recipe_of(cfg.precision)] if "E" in cfg.model.layer_pattern else []
    names = {named_recipe(cfg, linear) for linear in block_linears(cfg) if linear.is_routed}
    return [recipe_of(cfg.precision if name is None else cfg.precision.recipes[name]) for name in names]


def check_grouped_experts(cfg: Config) -> Iterator[ConfigError]:
    """Experts that are asked to run together can, on the GPU that the config names."""
    if cfg.model.expert_impl == "grouped" and "E" in cfg.model.layer_pattern:
        yield from map(_refusal, obstacles(cfg, lambda recipe: expected_executor(cfg, recipe)))


def _refusal(obstacle: str) -> ConfigError:
    way_out = "Set model.expert_impl=auto: experts then run one by one"
    return ConfigError("model.expert_impl", "grouped", obstacle, way_out)


def _odd_widths(cfg: Config) -> dict[str, int]:
    """The widths of an expert's matrices on a rank that a grouped product does not take, by key."""
    model = cfg.model
    widths = {"model.hidden_size": model.hidden_size, "model.moe_ffn_hidden_size": model.moe_ffn_hidden_size // expert_tensor_size(cfg)}
    return {key: width for key, width in widths.items() if width % _GROUPED_MULTIPLE}
