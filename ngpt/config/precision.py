"""Rules for a run's recipes: which layers they may quantise, what computes them, and shapes. Within one: `ngpt.config.recipe_rules`."""

import difflib
import math
from collections.abc import Iterable, Iterator
from fnmatch import fnmatchcase

from ngpt.config import recipe_rules
from ngpt.config.errors import ConfigError
from ngpt.config.executor import beyond_kernels, expected_executor
from ngpt.config.experts import check_grouped_experts
from ngpt.config.linears import BlockLinear, Dimension, block_linears, deciding_glob, named_recipe, recipe_by_linear
from ngpt.config.recipe_rules import sections
from ngpt.config.recipes import key_of, options_of, recipe_of
from ngpt.config.schema import Config, RecipeConfig
from ngpt.config.sizes import round_up
from ngpt.estimate.hardware import GPUS
from ngpt.recipes import DIRECTIONS, Recipe

_BLOCK = 16
_NATIVE_BLOCK = 32
_NEEDED_RATE = {"fp8": "fp8", "mxfp8": "mxfp8", "nvfp4": "fp8"}  # NVFP4 is emulated from Hopper on, the first with fp8


def check_layers(cfg: Config) -> Iterator[ConfigError]:
    """`precision.layers` gives existing linear layers existing recipes of the run's dtype."""
    precision, names = cfg.precision, [linear.name for linear in block_linears(cfg)]
    for glob, name in precision.layers.items():
        if name not in precision.recipes:
            yield _error("layers", f"{glob}: {name}", "Names a recipe that is not in precision.recipes", "Name one of conf/precision")
        matched = [linear for linear in names if fnmatchcase(linear, glob)]
        if not matched:
            yield _unmatched("layers", glob, cfg)
        elif not any(deciding_glob(cfg, linear) == glob for linear in matched):
            rule = f"Decides nothing: every linear layer that it matches is matched by a later glob, {deciding_glob(cfg, matched[0])} first"
            yield _error("layers", f"{glob}: {name}", rule, "Write the narrower globs behind the wider ones")
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
    for path, section in sections(cfg):
        other = "choose precision=bf16" if section is precision else "name another recipe in precision.layers"
        if impl == "local" and section.format in ("fp8", "mxfp8"):
            rule = f"Exists in Transformer Engine only, and model.transformer_impl is {impl}"
            yield ConfigError(f"{path}.format", section.format, rule, f"Set model.transformer_impl=auto, or {other}")
        if gpu is not None and section.format != "none" and _NEEDED_RATE[section.format] not in GPUS[gpu].rates:
            rule = f"Does not run on the GPUs of cluster.gpu {gpu}"
            yield ConfigError(f"{path}.format", section.format, rule, f"Choose the cluster that has the GPUs, or {other}")
    recipes = [recipe for _, section in sections(cfg) if (recipe := recipe_of(section)).format == "nvfp4"]
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
    if all(section.format == "none" for _, section in sections(cfg)):
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
    for path, section in sections(cfg):
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


def _keys_of_static(section: RecipeConfig, operand: str) -> list[str]:
    """The keys within a section that make an operand's amax static, in either direction."""
    if section.format != "nvfp4":
        return []
    static = [direction for direction in DIRECTIONS if options_of(section, operand, direction).amax == "static"]
    return list(dict.fromkeys(key_of(section, operand, direction, "amax") for direction in static))


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


# Each group reads what those before it have checked.
CHECKS = (
    recipe_rules.CHECKS,
    (check_layers,),
    (check_backend, check_grouped_experts, check_policy, check_static, check_features, check_tokens),
)
