"""What multiplies the quantised linears, decided in this one place: for a run, for the rules of its config and for its estimate."""

from importlib.util import find_spec

from ngpt.config.errors import ConfigError
from ngpt.config.linears import recipes_in_use
from ngpt.config.schema import Config
from ngpt.config.sizes import micro_batches_per_step
from ngpt.estimate.hardware import GPUS
from ngpt.recipes import BLOCK, OperandSpec, QuantizerSpec, Recipe

_NEEDS = "Transformer Engine needs a CUDA GPU and the package transformer-engine"


def decide_executor(recipe: Recipe, asked: str, has_kernels: bool) -> str:
    """`none` (the format is none), `native` (Transformer Engine's kernels) or `emulated`, which only nvfp4 can be.

    Args:
        asked: `precision.executor`.
        has_kernels: Transformer Engine can run the recipe where the model will be.
    """
    if recipe.format == "none":
        return "none"
    if recipe.format != "nvfp4":
        return "native"
    if asked != "auto":
        return asked
    return "native" if has_kernels else "emulated"


def choose_backend(transformer_impl: str, gpu: bool) -> str:
    """`local` or `transformer_engine` for a config's `model.transformer_impl`, which may say `auto`.

    Args:
        gpu: the model will be on one.

    Raises:
        ConfigError: Transformer Engine was asked for by name and cannot run here.
    """
    usable = gpu and find_spec("transformer_engine") is not None
    if transformer_impl == "auto":
        return "transformer_engine" if usable else "local"
    if transformer_impl == "transformer_engine" and not usable:
        raise ConfigError(
            "model.transformer_impl",
            transformer_impl,
            _NEEDS,
            "Install ngpt-megatron[gpu] on a GPU host, or set model.transformer_impl=local",
        )
    return transformer_impl


def without_modules(cfg: Config, backend: str) -> str | None:
    """Why Transformer Engine's modules, and so its kernels, are not there; None if they are."""
    if backend == "transformer_engine":
        return None
    asked = cfg.model.transformer_impl
    return _NEEDS if asked == "auto" else f"Transformer Engine's kernels need its modules, and model.transformer_impl is {asked}"


def choose_executor(cfg: Config, recipe: Recipe, missing: str | None) -> str:
    """`decide_executor` for a machine.

    Args:
        missing: why Transformer Engine cannot run the recipe there; None if it can.

    Raises:
        ConfigError: nothing else runs the recipe, or the executor asked for.
    """
    chosen = decide_executor(recipe, cfg.precision.executor, has_kernels=missing is None)
    if chosen != "native" or missing is None:
        return chosen
    if recipe.format != "nvfp4":
        way_out = "Use precision=bf16, or nvfp4_paper, which is emulated where it has no hardware"
        key = "precision.format" if recipe.format == cfg.precision.format else "precision.layers"
        raise ConfigError(key, f"{recipe.name} ({recipe.format})", missing, way_out)
    raise ConfigError("precision.executor", "native", missing, "Set precision.executor=auto or emulated")


def check_machine(cfg: Config, gpu: bool) -> None:
    """Refuses what needs Transformer Engine where it is missing. What it cannot do on a GPU is known to the workers alone.

    Args:
        gpu: this machine has one.

    Raises:
        ConfigError: `choose_backend` or `choose_executor` refuses.
    """
    missing = without_modules(cfg, choose_backend(cfg.model.transformer_impl, gpu))
    for recipe in recipes_in_use(cfg):
        choose_executor(cfg, recipe, missing)


def expected_executor(cfg: Config, recipe: Recipe) -> str:
    """`decide_executor` for the GPU that the config names, with Transformer Engine on it. An unnamed one has no NVFP4 kernels."""
    gpu = cfg.cluster.gpu
    has_kernels = gpu is not None and "nvfp4" in GPUS[gpu].rates and cfg.model.transformer_impl != "local"
    return decide_executor(recipe, cfg.precision.executor, has_kernels and beyond_kernels(recipe) is None)


def keeps_quantized_weights(cfg: Config) -> bool:
    """Whether emulated linears keep their quantised weights from the first micro-batch of a step to the last: where there are several.

    With a single one, keeping them would cost the same memory and only save the quantisation in the backward pass.
    """
    return micro_batches_per_step(cfg) > 1


def beyond_kernels(recipe: Recipe) -> str | None:
    """The part of an NVFP4 recipe that Transformer Engine 2.20.2 has no kernels for on any GPU; None: it has all."""
    for name, spec in recipe.operands.items():
        if combination := _beyond_kernels(spec):
            return f"{combination} of {name}: not what Transformer Engine's NVFP4 kernels compute"
    if recipe.dtype != "bf16" and any(spec.columnwise.rht != "off" for spec in recipe.operands.values()):
        return f"rht with dtype {recipe.dtype}: the transform of Transformer Engine reads bf16"
    return None


def _beyond_kernels(spec: OperandSpec) -> str | None:
    if not isinstance(spec, QuantizerSpec):
        return "directions that differ by more than the transform"
    if spec.rht != "off" and spec.global_amax != "dynamic":
        return f"rht with global_amax={spec.global_amax}"  # the columnwise amax is that of the transformed tensor
    if spec.rht != "off" and spec.block_shape == (BLOCK, BLOCK):
        return "rht with 16x16 blocks"
    if spec.rounding == "sr" and spec.block_shape == (BLOCK, BLOCK):
        return "stochastic rounding with 16x16 blocks"  # both directions would have to draw the same numbers
    if spec.row_scaled:
        return "row_scaled"
    return "four_over_six" if spec.four_over_six else None
