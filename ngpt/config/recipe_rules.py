"""The rules within a recipe: which of its options have an effect, and which can be combined.

A section is `precision` itself or one of the recipes that `precision.layers` names, `precision.recipes.NAME`.
"""

import difflib
import math
from collections.abc import Iterator
from dataclasses import fields

from ngpt.config.errors import ConfigError
from ngpt.config.recipes import TABLE, key_of, options_of, recipe_of
from ngpt.config.schema import Config, OperandConfig, PrecisionConfig, RecipeConfig
from ngpt.recipes import DIRECTIONS, OPERANDS, STATIC_AMAX

_NVFP4_OPTIONS = "input_amax weight_amax grad_output_amax static_grad_amax weight_blocks rht stochastic_rounding operands".split()
_NVFP4_RUN_OPTIONS = "executor diagnostics".split()
_POLICY_OPTIONS = "num_layers_at_start_in_bf16 num_layers_at_end_in_bf16 bf16_modules bf16_tail".split()
_STATIC_AMAX_EXPONENTS = (-115, 127)  # beyond them the amax, its scale or the inverse of that is no normal fp32 number
_DEFAULTS = {entry.name: getattr(PrecisionConfig(), entry.name) for entry in fields(PrecisionConfig)}


def sections(cfg: Config) -> Iterator[tuple[str, RecipeConfig]]:
    """(its key, section) of the run's recipe and of those that `precision.layers` names."""
    yield "precision", cfg.precision
    for name, section in cfg.precision.recipes.items():
        yield f"precision.recipes.{name}", section


def check_unread_options(cfg: Config) -> Iterator[ConfigError]:
    """Options that the chosen format would ignore are refused."""
    precision = cfg.precision
    formats = {section.format for _, section in sections(cfg)}
    unread: dict[str, str] = {}
    if "nvfp4" not in formats:
        unread |= dict.fromkeys(_NVFP4_RUN_OPTIONS, "nvfp4")
    if formats == {"none"}:
        unread |= dict.fromkeys(_POLICY_OPTIONS, "fp8, mxfp8 or nvfp4")
    yield from _unread("precision", precision, unread)
    for path, section in sections(cfg):
        if section.format != "nvfp4":
            yield from _unread(path, section, dict.fromkeys(_NVFP4_OPTIONS, "nvfp4"))
            continue
        static = [direction for direction in DIRECTIONS if options_of(section, "grad_output", direction).amax == "static"]
        read = any(key_of(section, "grad_output", direction, "static_amax") == "static_grad_amax" for direction in static)
        amax = section.static_grad_amax
        if static and not read and amax != _DEFAULTS["static_grad_amax"]:
            rule, way_out = f"{path}.operands says another static_amax for grad_output", f"Set one of the two, or this to {STATIC_AMAX}"
            yield ConfigError(f"{path}.static_grad_amax", amax, rule, way_out)
        elif not read and amax != _DEFAULTS["static_grad_amax"]:
            rule = f"Is read by {path}.grad_output_amax=static only, not {section.grad_output_amax}"
            yield ConfigError(f"{path}.static_grad_amax", amax, rule, f"Set {path}.grad_output_amax=static, or this to {STATIC_AMAX}")


def check_table(cfg: Config) -> Iterator[ConfigError]:
    """The keys of `operands` exist, each of their options is read, and those of an operand can be combined."""
    for path, section in sections(cfg):
        if section.format != "nvfp4":
            continue
        for key in (key for key in section.operands if key not in TABLE):
            near = difflib.get_close_matches(key, TABLE, n=2, cutoff=0.0)
            yield ConfigError(f"{path}.operands", key, f"Must be one of {', '.join(TABLE)}", f"Did you mean {' or '.join(near)}?")
        for key, asked in section.operands.items():
            yield from _unread_of_operand(path, section, key, asked)
        if errors := list(_check_static_amaxes(path, section)):
            yield from errors
            continue
        try:
            recipe_of(section)
        except ValueError as error:
            rule, _, way_out = str(error).rstrip(".").partition(". ")
            yield ConfigError(f"{path}.operands", section.name, rule, way_out)


def _unread_of_operand(path: str, section: RecipeConfig, key: str, asked: OperandConfig) -> Iterator[ConfigError]:
    """Options in one row of the table that need another one beside them."""
    if key not in TABLE:
        return
    operand = next(name for name in OPERANDS if key.startswith(name))
    cells = [options_of(section, operand, direction) for direction in DIRECTIONS if key in (operand, f"{operand}_{direction}")]
    if asked.static_amax is not None and not any(cell.amax == "static" for cell in cells):
        rule, way_out = "Is read with amax=static only", f"Set {path}.operands.{key}.amax=static, or leave it out"
        yield ConfigError(f"{path}.operands.{key}.static_amax", asked.static_amax, rule, way_out)
    if asked.bound is not None and not any(cell.four_over_six != "none" for cell in cells):
        rule, way_out = "Is read with four_over_six only", f"Set {path}.operands.{key}.four_over_six=mae, or leave it out"
        yield ConfigError(f"{path}.operands.{key}.bound", asked.bound, rule, way_out)


def _check_static_amaxes(path: str, section: RecipeConfig) -> Iterator[ConfigError]:
    """A constant amax is a power of two of the usual one, and no transform makes elements larger than it."""
    seen = set()
    for operand in OPERANDS:
        for direction in DIRECTIONS:
            options = options_of(section, operand, direction)
            if options.amax != "static":
                continue
            amax_key, value_key = (key_of(section, operand, direction, option) for option in ("amax", "static_amax"))
            if value_key not in seen:
                yield from _check_static_amax(f"{path}.{value_key}", options.static_amax)
            if options.rht != "none":
                rule = "precision.rht makes elements up to 4 times as large, which a constant amax would saturate"
                off = "false" if (key := key_of(section, operand, direction, "rht")) == "rht" else "none"
                yield ConfigError(f"{path}.{amax_key}", "static", rule, f"Set {path}.{amax_key}=dynamic_pow2, or {path}.{key}={off}")
            seen.add(value_key)


def _check_static_amax(key: str, amax: float) -> Iterator[ConfigError]:
    mantissa, exponent = math.frexp(amax)
    lowest, highest = _STATIC_AMAX_EXPONENTS
    if mantissa == STATIC_AMAX / 2 and lowest <= exponent - 1 <= highest:
        return
    rule = f"Must be {STATIC_AMAX} * 2^j with j from {lowest} to {highest}: the scale is then a power of two and exact"
    nearest = 0 if not (amax > 0 and math.isfinite(amax)) else min(max(round(math.log2(amax / STATIC_AMAX)), lowest), highest)
    yield ConfigError(key, amax, rule, f"Set {key}={math.ldexp(STATIC_AMAX, nearest)!r}")


def _unread(path: str, section: RecipeConfig, unread: dict[str, str]) -> Iterator[ConfigError]:
    """Errors for options that are set but not read. `unread`: option -> the formats that read it."""
    for name, formats in unread.items():
        value, default = getattr(section, name), _DEFAULTS[name]
        if value != default:
            rule = f"Is read by precision.format {formats} only, not {section.format}"
            got = ", ".join(value) if isinstance(value, dict) else value
            yield ConfigError(f"{path}.{name}", got, rule, f"Choose such a precision=NAME, or set {path}.{name}={_written(default)}")


def _written(value: object) -> str:
    """As the command line takes it."""
    return str(value).lower() if isinstance(value, bool) else str(value)


CHECKS = (check_unread_options, check_table)
