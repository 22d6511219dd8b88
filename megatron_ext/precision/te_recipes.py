"""Recipes that Transformer Engine's own kernels compute: fp8, mxfp8, and nvfp4 on Blackwell (executor "native").

A linear runs natively as `with autocast(te_recipe(recipe)): linear(x)`, after `prepare(linear)` once; the linears of all experts of a rank
run as te_grouped.py says, with `quantizers_of_experts`. Transformer Engine is imported
inside the functions: without its CUDA libraries it does not import, and nothing else here may depend on it. Its files are named as of
2.20.2.

Megatron's --fp8-format and --fp4-format stay unset, because they would put whole layers, attention included, under a context of
Megatron's own. What else depends on them in Megatron 0.19.2: recompute takes tensor_parallel.checkpoint, whose second forward pass enters
`autocast` again; parameters stay in bf16 for gradients, optimizer and checkpoints; tensor-parallel overlap gets bf16 buffers, which
Transformer Engine refuses with an error; and the weight cache is never refreshed, see `prepare`.
"""

from contextlib import AbstractContextManager
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

from torch import nn

from megatron_ext.device import on_gpu
from ngpt.config.executor import beyond_kernels
from ngpt.recipes import QuantizerSpec, Recipe

_AVAILABILITY = {"fp8": "is_fp8_available", "mxfp8": "is_mxfp8_available", "nvfp4": "is_nvfp4_available"}


def unavailable(recipe: Recipe) -> str | None:
    """Why Transformer Engine cannot compute the recipe's format here, in its own words where it has them; None if it can.

    The executor is not looked at: for "auto" the answer decides it. Ask before a custom recipe runs: Transformer Engine checks none when
    its context is entered, and on an H100 its NVFP4 kernels fail for some shapes and for others give zeros without an error.
    """
    if recipe.format == "none":
        return None
    if find_spec("transformer_engine") is None:
        return "the package transformer-engine is not installed"
    if not on_gpu():
        return "Transformer Engine needs a CUDA GPU"
    try:
        from transformer_engine.pytorch import quantization
    except (ImportError, OSError, RuntimeError) as error:
        return f"Transformer Engine does not import: {error}"
    available, reason = getattr(quantization, _AVAILABILITY[recipe.format])(return_reason=True)
    return beyond_kernels(recipe) if available else reason


def te_recipe(recipe: Recipe) -> Any:
    """Transformer Engine's object for a recipe in fp8, mxfp8 or nvfp4. Make one for each recipe of a run: modules compare identities.

    Returns:
        A `transformer_engine.common.recipe.Recipe` with every option given explicitly: the defaults of its fields come from environment
        variables, read when Transformer Engine is imported.

    Raises:
        ValueError: format "none" needs no recipe.
        NotImplementedError: options that Transformer Engine does not combine.
    """
    if recipe.format not in _AVAILABILITY:
        raise ValueError(f"format {recipe.format!r}: Transformer Engine has recipes for {', '.join(_AVAILABILITY)}. Run it without one.")
    if unsupported := beyond_kernels(recipe):
        raise NotImplementedError(f"{unsupported}. Set precision.executor=emulated")
    from transformer_engine.common import recipe as te

    common = {"fp8_dpa": False, "fp8_mha": False, "backward_override": None}
    if recipe.format == "fp8":
        return _current_scaling(te, common)
    if recipe.format == "mxfp8":
        return te.MXFP8BlockScaling(margin=0, fp8_format=te.Format.E4M3, enable_2d_quantization=False, **common)
    factory = Nvfp4Factory(recipe.input, recipe.weight, recipe.grad_output)
    return te.CustomRecipe(qfactory=factory, fp8_format=te.Format.HYBRID, quantization_alignment=128, **common)


def prepare(linear: nn.Module) -> None:
    """Make a Megatron linear over Transformer Engine fit for `autocast`: it quantises its weight at every forward pass.

    Megatron hands Transformer Engine `is_first_microbatch`, which keeps a quantised copy of the weight until the flag is set again. Only
    `set_is_first_microbatch` (megatron/core/transformer/module.py) sets it, and does nothing unless Megatron's own fp8 or fp4 flag is
    set: the copy of the first forward pass would serve for the whole run. Even where it works, evaluation after an optimizer step would
    take the copy of before the step. Without the cache a weight is quantised again for every microbatch and recompute (an fp8 linear on an
    H100 takes 0.78 instead of 0.68 ms at 8192x2048x6144, no longer at 16384x4096x14336), and pipeline stages hold a copy for each
    microbatch in flight. The gradient is accumulated into main_grad at every microbatch, instead of overwriting it at the first.
    """
    linear.disable_parameter_transpose_cache = True


def autocast(recipe: Any) -> AbstractContextManager:
    """The context in which linears quantise as `recipe`, an object of `te_recipe`, says. Enter it around one linear's forward pass.

    It sets process-wide state and restores the former on exit, so it nests. Backward needs no context: the module keeps its quantisers
    and flags from the forward pass. No group is given for amaxes: only delayed scaling reduces over it. Where sequence parallelism
    gathers tokens, the module reduces dynamic amaxes over its own tensor-parallel group.
    """
    from transformer_engine.pytorch.quantization import autocast as te_autocast

    return te_autocast(enabled=True, calibrating=False, recipe=recipe, amax_reduction_group=None)


def quantizers_of_experts(recipe: Any) -> tuple[Any, Any, Any]:
    """Quantisers of input, weight and grad_output as a module of all experts gets them for each expert, from an object of `te_recipe`.

    None of these recipes keeps state in them (delayed scaling would), so one set serves all experts.
    """
    from transformer_engine.pytorch.quantization import QuantizerRole, RecipeState

    found = []
    for mode, operands in (("forward", ("input", "weight")), ("backward", ("grad_output",))):
        roles = [QuantizerRole(module_type="grouped_linear", tensor_type=operand) for operand in operands]
        found += RecipeState.create(recipe, mode=mode, num_quantizers=len(roles), roles=roles).make_quantizers()
    for quantizer in found:
        quantizer.internal = True  # results are not torch tensors, which take longer to make
    of_input, of_weight, of_gradient = found
    return of_input, of_weight, of_gradient


@dataclass(frozen=True)
class Nvfp4Factory:
    """Gives Transformer Engine one quantiser for each operand slot of each module.

    A class, not a closure: `get_extra_state` of a module pickles a custom recipe into checkpoints (and `set_extra_state` ignores it).
    """

    input: QuantizerSpec
    weight: QuantizerSpec
    grad_output: QuantizerSpec

    def __call__(self, role: Any) -> Any:
        """A new quantiser: a module changes its usage flags between calls, so that none may serve two slots.

        Args:
            role: Transformer Engine's `QuantizerRole` of the slot, or None for a linear's output and input gradient, which stay in bf16.
        """
        from megatron_ext.precision import te_nvfp4

        specs = {"input": self.input, "weight": self.weight, "grad_output": self.grad_output}
        is_linear = role is not None and role.module_type in ("linear", "grouped_linear")
        return te_nvfp4.quantizer_of(specs.get(role.tensor_type) if is_linear else None)


def _current_scaling(te: Any, common: dict[str, Any]) -> Any:
    scaling = te.Float8CurrentScaling(
        use_power_2_scales=False,
        fp8_format=te.Format.HYBRID,
        fp8_gemm_fprop=te.MMParams(use_split_accumulator=False),
        fp8_gemm_dgrad=te.MMParams(use_split_accumulator=True),
        fp8_gemm_wgrad=te.MMParams(use_split_accumulator=True),
        **common,
    )
    # These are attributes of the class, not fields of it; they follow the environment too, and Linear reads them.
    operand = te.QParams(
        power_2_scale=False, amax_epsilon=0.0, random_hadamard_transform=False, stochastic_rounding=False, fp4_2d_quantization=False
    )
    scaling.fp8_quant_fwd_inp = scaling.fp8_quant_fwd_weight = scaling.fp8_quant_bwd_grad = operand
    return scaling
