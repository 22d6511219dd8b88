"""The rules of low-precision formats: which options say something, which layers they may quantise, and shapes.

A section is `precision` itself or one of the recipes that `precision.layers` names, `precision.recipes.NAME`.
"""

import difflib
import math
from collections.abc import Iterable, Iterator
from dataclasses import fields
from fnmatch import fnmatchcase

from ngpt.config.errors import ConfigError
from ngpt.config.executor import beyond_kernels, expected_executor
from ngpt.config.linears import BlockLinear, Dimension, block_linears, named_recipe, recipe_by_linear
from ngpt.config.recipes import TABLE, key_of, options_of, recipe_of
from ngpt.config.schema import Config, OperandConfig, PrecisionConfig, RecipeConfig
from ngpt.config.sizes import round_up
from ngpt.estimate.hardware import GPUS
from ngpt.recipes import DIRECTIONS, STATIC_AMAX, QuantizerSpec, Recipe

_NVFP4_OPTIONS = "input_amax weight_amax grad_output_amax static_grad_amax weight_blocks rht stochastic_rounding operands".split()
_NVFP4_RUN_OPTIONS = "executor diagnostics".split()
_POLICY_OPTIONS = "num_layers_at_start_in_bf16 num_layers_at_end_in_bf16 bf16_modules bf16_tail".split()
_STATIC_AMAX_EXPONENTS = (-115, 127)  # beyond them the amax, its scale or the inverse of that is no normal fp32 number
_BLOCK = 16
_NATIVE_BLOCK = 32
_NEEDED_RATE = {"fp8": "fp8", "mxfp8": "mxfp8", "nvfp4": "fp8"}  # NVFP4 is emulated from Hopper on, the first with fp8


def takes_grouped_experts(recipe: Recipe) -> bool:
    """Whether all experts of a rank can be quantised at once: without a format, or where constant scales make that what each alone gives.

    An amax of grad_output may be each expert's own where it is rounded to a power of two.
    """
    if recipe.format != "nvfp4":
        return recipe.format == "none"
    if not all(isinstance(spec, QuantizerSpec) and spec.rht == "off" for spec in recipe.operands.values()):
        return False
    constant = recipe.input.global_amax == recipe.weight.global_amax == "static"
    return constant and recipe.grad_output.global_amax in ("static", "dynamic_pow2")


def recipes_of_experts(cfg: Config) -> list[Recipe]:
    """Of the routed experts, by name alone: whether they are grouped does not depend on which blocks are kept in bf16."""
    names = {named_recipe(cfg, linear) for linear in block_linears(cfg) if ".experts." in linear.name}
    return [recipe_of(cfg.precision if name is None else cfg.precision.recipes[name]) for name in names]


def can_group_experts(cfg: Config) -> bool:
    """Whether every recipe of the routed experts takes them grouped, and `precision.executor` does not ask for native kernels."""
    native = cfg.precision.executor == "native"
    return all(takes_grouped_experts(recipe) and not (recipe.format == "nvfp4" and native) for recipe in recipes_of_experts(cfg))


def check_grouped_experts(cfg: Config) -> Iterator[ConfigError]:
    """Grouped linears of experts compute in high precision, and with emulated operands under constant scales."""
    if cfg.model.expert_impl != "grouped" or "E" not in cfg.model.layer_pattern:
        return
    for recipe in recipes_of_experts(cfg):
        native = recipe.format == "nvfp4" and expected_executor(cfg, recipe) == "native"
        if takes_grouped_experts(recipe) and not native:
            continue
        found = f"precision={recipe.name} has format {recipe.format}{f' ({recipe.describe()})' if recipe.operands else ''}"
        found += ", run by Transformer Engine's kernels" if native else ""
        rule = "Grouped linears take no format, or emulated NVFP4 with static input and weight and static or dynamic_pow2 grad_output; "
        way_out = "Set model.expert_impl=auto: experts then run one by one; or precision=nvfp4_paper precision.executor=emulated"
        yield ConfigError("model.expert_impl", "grouped", rule + found, way_out)


def check_unread_options(cfg: Config) -> Iterator[ConfigError]:
    """Options that the chosen format would ignore are refused."""
    precision = cfg.precision
    formats = {section.format for _, section in _sections(cfg)}
    unread = {}
    if "nvfp4" not in formats:
        unread |= dict.fromkeys(_NVFP4_RUN_OPTIONS, "nvfp4")
    if formats == {"none"}:
        unread |= dict.fromkeys(_POLICY_OPTIONS, "fp8, mxfp8 or nvfp4")
    yield from _unread("precision", precision, unread)
    for path, section in _sections(cfg):
        if section.format != "nvfp4":
            yield from _unread(path, section, dict.fromkeys(_NVFP4_OPTIONS, "nvfp4"))
            continue
        amax, used = section.static_grad_amax, {options_of(section, "grad_output", direction).amax for direction in DIRECTIONS}
        if "static" not in used and amax != _DEFAULTS["static_grad_amax"]:
            rule = f"Is read by precision.grad_output_amax=static only, not {section.grad_output_amax}"
            yield ConfigError(f"{path}.static_grad_amax", amax, rule, f"Set {path}.grad_output_amax=static, or this to {STATIC_AMAX}")


def check_table(cfg: Config) -> Iterator[ConfigError]:
    """The keys of `operands` exist, each option of theirs is read, and those of an operand can be combined."""
    for path, section in _sections(cfg):
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
    operand = next(name for name in TABLE[:3] if key.startswith(name))
    cells = [options_of(section, operand, direction) for direction in DIRECTIONS if key in (operand, f"{operand}_{direction}")]
    if asked.static_amax is not None and not any(cell.amax == "static" for cell in cells):
        rule, way_out = "Is read with amax=static only", f"Set {path}.operands.{key}.amax=static, or leave it out"
        yield ConfigError(f"{path}.operands.{key}.static_amax", asked.static_amax, rule, way_out)
    if asked.bound is not None and not any(cell.four_over_six != "none" for cell in cells):
        rule, way_out = "Is read with four_over_six only", f"Set {path}.operands.{key}.four_over_six=mae, or leave it out"
        yield ConfigError(f"{path}.operands.{key}.bound", asked.bound, rule, way_out)


def check_layers(cfg: Config) -> Iterator[ConfigError]:
    """`precision.layers` gives existing linear layers existing recipes of the run's dtype."""
    precision, names = cfg.precision, [linear.name for linear in block_linears(cfg)]
    for glob, name in precision.layers.items():
        if name not in precision.recipes:
            yield _error("layers", f"{glob}: {name}", "Names a recipe that is not in precision.recipes", "Name one of conf/precision")
        if not any(fnmatchcase(linear, glob) for linear in names):
            yield _unmatched("layers", glob, cfg)
    for name, section in precision.recipes.items():
        if name not in precision.layers.values():
            rule = "No linear layer has it: precision.layers does not name it"
            yield _error(f"recipes.{name}", section.name, rule, f"Remove it, or set precision.layers={{GLOB: {name}}}")
        if section.dtype != precision.dtype:
            rule = f"Has dtype {section.dtype}, and weights and activations of the run are in {precision.dtype}"
            yield _error("layers", name, rule, f"Choose a recipe in {precision.dtype}, or set precision.dtype={section.dtype}")


def check_backend(cfg: Config) -> Iterator[ConfigError]:
    """Formats and executors that only Transformer Engine or newer GPUs have."""
    precision, impl, gpu = cfg.precision, cfg.model.transformer_impl, cfg.cluster.gpu
    for path, section in _sections(cfg):
        if impl == "local" and section.format in ("fp8", "mxfp8"):
            rule = f"Exists in Transformer Engine only, and model.transformer_impl is {impl}"
            yield ConfigError(f"{path}.format", section.format, rule, "Set model.transformer_impl=auto, or choose precision=bf16")
        if gpu is not None and section.format != "none" and _NEEDED_RATE[section.format] not in GPUS[gpu].rates:
            rule = f"Does not run on the GPUs of cluster.gpu {gpu}"
            yield ConfigError(f"{path}.format", section.format, rule, "Choose precision=bf16, or the cluster that has the GPUs")
    recipes = [recipe for _, section in _sections(cfg) if (recipe := recipe_of(section)).format == "nvfp4"]
    if not recipes or precision.executor != "native":
        return
    if impl == "local":
        rule = f"Is Transformer Engine's, and model.transformer_impl is {impl}"
        yield _error("executor", "native", rule, "Set precision.executor=emulated, or model.transformer_impl=auto")
    if precision.diagnostics:
        rule = "The operands of Transformer Engine's kernels are not seen, so there are no figures to take"
        yield _error("diagnostics", True, rule, "Set precision.executor=emulated or precision.diagnostics=false")
    if gpu is not None and "nvfp4" not in GPUS[gpu].rates:
        yield _error("executor", "native", f"Needs Blackwell, and cluster.gpu is {gpu}", "Set precision.executor=emulated or auto")
    for recipe in recipes:
        if reason := beyond_kernels(recipe):
            yield _error("executor", "native", f"{recipe.name} asks for {reason}", "Set precision.executor=emulated, or drop that option")


def check_policy(cfg: Config) -> Iterator[ConfigError]:
    """The layers kept in bf16 exist, and leave some to quantise."""
    precision, layers = cfg.precision, cfg.model.num_layers
    if all(section.format == "none" for _, section in _sections(cfg)):
        return
    linears = block_linears(cfg)
    kept = precision.num_layers_at_start_in_bf16 + precision.num_layers_at_end_in_bf16
    unmatched = [glob for glob in precision.bf16_modules if not any(fnmatchcase(linear.name, glob) for linear in linears)]
    for glob in unmatched:
        yield _unmatched("bf16_modules", glob, cfg)
    if kept > layers:
        rule = f"With num_layers_at_start_in_bf16 {precision.num_layers_at_start_in_bf16} it exceeds model.num_layers {layers}"
        yield _error("num_layers_at_end_in_bf16", precision.num_layers_at_end_in_bf16, rule, "Lower one of them")
    elif not unmatched and not recipe_by_linear(cfg):
        rule = f"num_layers_at_*_in_bf16, bf16_modules and layers leave none of the {len(linears)} linear layers of the blocks to it"
        yield _error("format", precision.format, rule, f"Choose precision={precision.dtype}, or keep fewer layers in bf16")


def check_static(cfg: Config) -> Iterator[ConfigError]:
    """A constant amax needs values whose size is known beforehand."""
    precision, linears = cfg.precision, {linear.name: linear for linear in block_linears(cfg)}
    control = cfg.model.architecture == "gpt"
    if control:
        why, cure = "model.architecture=gpt gives them no fixed length", "model.architecture=ngpt"
    else:
        why, cure = "model.fine_grained=false leaves what enters the output projections at any length", "model.fine_grained=true"
    recipes = recipe_by_linear(cfg)
    for path, section in _sections(cfg):
        name = None if section is precision else path.rpartition(".")[2]
        quantized = [linears[linear] for linear in recipes if named_recipe(cfg, linears[linear]) == name]
        offending = {
            "input": [linear for linear in quantized if control or not (cfg.model.fine_grained or linear.reads_stream)],
            "weight": quantized if control else [],
        }
        for operand, of_any_length in offending.items():
            keys = _keys_of_static(section, operand)
            if not (of_any_length and keys):
                continue
            first = f"the {operand} of {of_any_length[0].name} (the first of {len(of_any_length)} such layers) is not"
            dynamic = " ".join(f"{path}.{key}=dynamic_pow2" for key in keys)
            way_out = f"Set {cure}, or {dynamic}{_or_keep(of_any_length, quantized)}"
            rule = f"Quantised operands must be normalised, and {first}: {why}"
            yield ConfigError(f"{path}.{keys[0]}", "static", rule, way_out)


def check_features(cfg: Config) -> Iterator[ConfigError]:
    """Blocks tile both dimensions of each quantised weight on one tensor-parallel rank."""
    recipes = recipe_by_linear(cfg)
    quantized = [linear for linear in block_linears(cfg) if linear.name in recipes]
    multiples = {recipe: _multiple(cfg, recipe)[0] for recipe in set(recipes.values())}
    dimensions: dict[str, list[tuple[Dimension, BlockLinear, str, int]]] = {}
    for linear in quantized:
        for dimension, verb in ((linear.inputs, "reach"), (linear.outputs, "leave")):
            use = (dimension, linear, verb, multiples[recipes[linear.name]])
            dimensions.setdefault(dimension.key, []).append(use)
    for key, uses in dimensions.items():
        broken = [use for use in uses if use[0].features % use[3]]
        if not broken:
            continue
        size, first, verb, multiple = broken[0]
        times = f" * {size.count}" if size.count > 1 else ""
        times += f" + {size.others}" if size.others else ""
        share = f" / tensor parallel {size.shards}" if size.shards > 1 else ""
        equals = f" = {size.features}" if times or share else ""
        step = math.lcm(*(dimension.value_step(needed) for dimension, _, _, needed in uses))
        way_out = f"Set {key}={round_up(size.value, step)}{_or_keep((linear for _, linear, _, _ in broken), quantized)}"
        got = f"{size.value}{times}{share}{equals} features {verb} {first.name}"
        yield ConfigError(key, got, f"{_multiple(cfg, recipes[first.name])[1]} needs a multiple of {multiple}", way_out)


def check_tokens(cfg: Config) -> Iterator[ConfigError]:
    """Blocks tile the tokens of a micro-batch on each rank that holds a part of them."""
    recipes = set(recipe_by_linear(cfg).values())
    if not recipes:
        return
    train, parallel = cfg.train, cfg.parallel
    shards = parallel.context * (parallel.tensor if parallel.sequence_parallel else 1)
    tokens = train.micro_batch_size * train.seq_length // shards
    multiple, who = max((_multiple(cfg, recipe) for recipe in recipes), key=lambda found: found[0])  # powers of two
    if tokens % multiple == 0:
        return
    split = f" / parallel.context {parallel.context}" if parallel.context > 1 else ""
    split += f" / parallel.tensor {parallel.tensor} (sequence parallel)" if parallel.sequence_parallel else ""
    got = f"{train.seq_length} * train.micro_batch_size {train.micro_batch_size}{split} = {tokens} tokens"
    needed = shards * multiple // math.gcd(shards * multiple, train.micro_batch_size)
    step = math.lcm(needed, 2 * shards)  # what context and sequence parallelism split evenly, too
    rule = f"{who} needs a multiple of {multiple} in each matrix product"
    yield ConfigError("train.seq_length", got, rule, f"Set train.seq_length={round_up(train.seq_length, step)}, or another micro-batch")


def _sections(cfg: Config) -> Iterator[tuple[str, RecipeConfig]]:
    """(its key, section) of the run's recipe and of those that `precision.layers` names."""
    yield "precision", cfg.precision
    for name, section in cfg.precision.recipes.items():
        yield f"precision.recipes.{name}", section


def _unread(path: str, section: RecipeConfig, unread: dict[str, str]) -> Iterator[ConfigError]:
    """`unread`: option -> the formats that read it."""
    for name, formats in unread.items():
        value, default = getattr(section, name), _DEFAULTS[name]
        if value != default:
            rule = f"Is read by precision.format {formats} only, not {section.format}"
            yield ConfigError(f"{path}.{name}", value, rule, f"Choose such a precision=NAME, or set {path}.{name}={_written(default)}")


def _keys_of_static(section: RecipeConfig, operand: str) -> list[str]:
    """The keys within a section that make an operand's amax static, in either direction."""
    if section.format != "nvfp4":
        return []
    static = [direction for direction in DIRECTIONS if options_of(section, operand, direction).amax == "static"]
    return list(dict.fromkeys(key_of(section, operand, direction, "amax") for direction in static))


def _check_static_amaxes(path: str, section: RecipeConfig) -> Iterator[ConfigError]:
    """A constant amax is a power of two of the usual one, and no transform makes elements larger than it."""
    seen = set()
    for operand in TABLE[:3]:
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


def _unmatched(option: str, glob: str, cfg: Config) -> ConfigError:
    linears = block_linears(cfg)
    known = [*dict.fromkeys(linear.everywhere for linear in linears), *(linear.name for linear in linears)]
    near = difflib.get_close_matches(glob, known, n=3, cutoff=0.0)
    return _error(option, repr(glob), "Matches no linear layer of the blocks", f"The nearest are {', '.join(near)}")


def _multiple(cfg: Config, recipe: Recipe) -> tuple[int, str]:
    """What dimensions of a product must be multiples of, and whose rule that is."""
    if recipe.format != "nvfp4":
        return (_NATIVE_BLOCK if recipe.format == "mxfp8" else _BLOCK), recipe.format.upper()
    if expected_executor(cfg, recipe) == "native":
        return _NATIVE_BLOCK, "NVFP4 in cuBLAS (the native executor)"
    return _BLOCK, "NVFP4"


def _or_keep(linears: Iterable[BlockLinear], quantized: list[BlockLinear]) -> str:
    """The way out of keeping some kinds of linear in bf16; empty where that would leave nothing to quantise."""
    globs = list(dict.fromkeys(linear.everywhere for linear in linears))
    if {linear.everywhere for linear in quantized} <= set(globs):
        return ""
    return ", or add " + " and ".join(f'"{glob}"' for glob in globs) + " to precision.bf16_modules"


def _error(name: str, got: object, rule: str, way_out: str) -> ConfigError:
    return ConfigError(f"precision.{name}", got, rule, way_out)


def _written(value: object) -> str:
    """As the command line takes it."""
    return str(value).lower() if isinstance(value, bool) else str(value)


_DEFAULTS = {entry.name: getattr(PrecisionConfig(), entry.name) for entry in fields(PrecisionConfig)}

# Each group reads what those before it have checked.
CHECKS = (
    (check_unread_options, check_table),
    (check_layers,),
    (check_backend, check_grouped_experts, check_policy, check_static, check_features, check_tokens),
)
