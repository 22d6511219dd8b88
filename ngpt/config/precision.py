"""The rules of low-precision formats: which options say something, which layers they may quantise, and shapes."""

import difflib
import math
from collections.abc import Iterable, Iterator
from dataclasses import fields
from fnmatch import fnmatchcase

from ngpt.config.errors import ConfigError
from ngpt.config.executor import expected_executor
from ngpt.config.linears import BlockLinear, Dimension, block_linears, quantized_linears
from ngpt.config.schema import Config, PrecisionConfig
from ngpt.config.sizes import round_up
from ngpt.estimate.hardware import GPUS

_NVFP4_OPTIONS = """
    executor input_amax weight_amax grad_output_amax static_grad_amax weight_blocks rht stochastic_rounding diagnostics
""".split()
_POLICY_OPTIONS = "num_layers_at_start_in_bf16 num_layers_at_end_in_bf16 bf16_modules bf16_tail".split()
_STATIC_AMAX = 1.3125
_STATIC_AMAX_EXPONENTS = (-115, 127)  # beyond them the amax, its scale or the inverse of that is no normal fp32 number
_BLOCK = 16
_NATIVE_BLOCK = 32
_NEEDED_RATE = {"fp8": "fp8", "mxfp8": "mxfp8", "nvfp4": "fp8"}  # NVFP4 is emulated from Hopper on, the first with fp8


def takes_grouped_experts(precision: PrecisionConfig) -> bool:
    """Whether all experts of a rank can be quantised at once: without a format, or where constant scales make that what each alone gives.

    An amax of grad_output may be each expert's own where it is rounded to a power of two.
    """
    if precision.format != "nvfp4":
        return precision.format == "none"
    constant = precision.input_amax == precision.weight_amax == "static"
    return constant and precision.grad_output_amax in ("static", "dynamic_pow2") and not precision.rht and precision.executor != "native"


def check_grouped_experts(cfg: Config) -> Iterator[ConfigError]:
    """Grouped linears of experts compute in high precision, and with emulated operands under constant scales."""
    precision = cfg.precision
    if cfg.model.expert_impl != "grouped" or "E" not in cfg.model.layer_pattern:
        return
    if takes_grouped_experts(precision) and not (precision.format == "nvfp4" and expected_executor(cfg) == "native"):
        return
    amaxes = f" with input_amax {precision.input_amax}, weight_amax {precision.weight_amax}, grad_output_amax {precision.grad_output_amax}"
    found = f"precision={precision.name} has format {precision.format}{amaxes if precision.format == 'nvfp4' else ''}"
    found += ", run by Transformer Engine's kernels" if precision.format == "nvfp4" and expected_executor(cfg) == "native" else ""
    rule = f"Grouped linears take no format, or emulated NVFP4 with static input and weight and static or dynamic_pow2 grad_output; {found}"
    way_out = "Set model.expert_impl=auto: experts then run one by one; or precision=nvfp4_paper precision.executor=emulated"
    yield ConfigError("model.expert_impl", "grouped", rule, way_out)


def check_unread_options(cfg: Config) -> Iterator[ConfigError]:
    """Options that the chosen format would ignore are refused."""
    precision = cfg.precision
    unread = {}
    if precision.format != "nvfp4":
        unread |= dict.fromkeys(_NVFP4_OPTIONS, "nvfp4")
    if precision.format == "none":
        unread |= dict.fromkeys(_POLICY_OPTIONS, "fp8, mxfp8 or nvfp4")
    for name, formats in unread.items():
        value, default = getattr(precision, name), _DEFAULTS[name]
        if value != default:
            rule = f"Is read by precision.format {formats} only, not {precision.format}"
            yield _error(name, value, rule, f"Choose such a precision=NAME, or set precision.{name}={_written(default)}")
    amax = precision.static_grad_amax
    if precision.format == "nvfp4" and precision.grad_output_amax != "static" and amax != _DEFAULTS["static_grad_amax"]:
        rule = f"Is read by precision.grad_output_amax=static only, not {precision.grad_output_amax}"
        yield _error("static_grad_amax", amax, rule, f"Set precision.grad_output_amax=static, or this to {_STATIC_AMAX}")


def check_backend(cfg: Config) -> Iterator[ConfigError]:
    """Formats and executors that only Transformer Engine or newer GPUs have."""
    precision, impl, gpu = cfg.precision, cfg.model.transformer_impl, cfg.cluster.gpu
    native = precision.executor == "native"
    if impl == "local" and precision.format in ("fp8", "mxfp8"):
        rule = f"Exists in Transformer Engine only, and model.transformer_impl is {impl}"
        yield _error("format", precision.format, rule, "Set model.transformer_impl=auto, or choose precision=bf16")
    if gpu is not None and precision.format != "none" and _NEEDED_RATE[precision.format] not in GPUS[gpu].rates:
        rule = f"Does not run on the GPUs of cluster.gpu {gpu}"
        yield _error("format", precision.format, rule, "Choose precision=bf16, or the cluster that has the GPUs")
    if not (native and precision.format == "nvfp4"):
        return
    if impl == "local":
        rule = f"Is Transformer Engine's, and model.transformer_impl is {impl}"
        yield _error("executor", "native", rule, "Set precision.executor=emulated, or model.transformer_impl=auto")
    if precision.diagnostics:
        rule = "The operands of Transformer Engine's kernels are not seen, so there are no figures to take"
        yield _error("diagnostics", True, rule, "Set precision.executor=emulated or precision.diagnostics=false")
    if precision.rht and (precision.input_amax, precision.grad_output_amax) != ("dynamic", "dynamic"):
        rule = "Transformer Engine transforms operands of dynamic scale only"
        yield _error("executor", "native", rule, "Set precision.executor=emulated, or the amax of input and grad_output to dynamic")
    if gpu is not None and "nvfp4" not in GPUS[gpu].rates:
        yield _error("executor", "native", f"Needs Blackwell, and cluster.gpu is {gpu}", "Set precision.executor=emulated or auto")
    if precision.rht and precision.dtype != "bf16":
        rule = f"Transformer Engine's Hadamard transform reads bf16, and precision.dtype is {precision.dtype}"
        yield _error("executor", "native", rule, "Set precision.dtype=bf16, precision.rht=false or precision.executor=emulated")


def check_policy(cfg: Config) -> Iterator[ConfigError]:
    """The layers kept in bf16 exist, and leave some to quantise."""
    precision, layers = cfg.precision, cfg.model.num_layers
    if precision.format == "none":
        return
    linears = block_linears(cfg)
    kept = precision.num_layers_at_start_in_bf16 + precision.num_layers_at_end_in_bf16
    unmatched = [glob for glob in precision.bf16_modules if not any(fnmatchcase(linear.name, glob) for linear in linears)]
    for glob in unmatched:
        known = [*dict.fromkeys(linear.everywhere for linear in linears), *(linear.name for linear in linears)]
        near = difflib.get_close_matches(glob, known, n=3, cutoff=0.0)
        yield _error("bf16_modules", repr(glob), "Matches no linear layer of the blocks", f"The nearest are {', '.join(near)}")
    if kept > layers:
        rule = f"With num_layers_at_start_in_bf16 {precision.num_layers_at_start_in_bf16} it exceeds model.num_layers {layers}"
        yield _error("num_layers_at_end_in_bf16", precision.num_layers_at_end_in_bf16, rule, "Lower one of them")
    elif not unmatched and not quantized_linears(cfg):
        rule = f"num_layers_at_*_in_bf16 and bf16_modules leave none of the {len(linears)} linear layers of the blocks to it"
        yield _error("format", precision.format, rule, f"Choose precision={precision.dtype}, or keep fewer layers in bf16")


def check_static(cfg: Config) -> Iterator[ConfigError]:
    """A constant amax needs values whose size is known beforehand."""
    precision = cfg.precision
    if precision.format != "nvfp4":
        return
    if precision.grad_output_amax == "static":
        yield from _check_static_grad_amax(precision.static_grad_amax)
    for name in ("input_amax", "grad_output_amax"):
        if precision.rht and getattr(precision, name) == "static":
            rule = "precision.rht makes elements up to 4 times as large, which a constant amax would saturate"
            yield _error(name, "static", rule, f"Set precision.{name}=dynamic_pow2, or precision.rht=false")
    quantized = quantized_linears(cfg)
    control = cfg.model.architecture == "gpt"
    if control:
        why, cure = "model.architecture=gpt gives them no fixed length", "model.architecture=ngpt"
    else:
        why, cure = "model.fine_grained=false leaves what enters the output projections at any length", "model.fine_grained=true"
    offending = {
        "input_amax": [linear for linear in quantized if control or not (cfg.model.fine_grained or linear.reads_stream)],
        "weight_amax": quantized if control else [],
    }
    for name, linears in offending.items():
        if linears and getattr(precision, name) == "static":
            operand = name.removesuffix("_amax")
            first = f"the {operand} of {linears[0].name} (the first of {len(linears)} such layers) is not"
            way_out = f"Set {cure}, or precision.{name}=dynamic_pow2{_or_keep(linears, quantized)}"
            yield _error(name, "static", f"Quantised operands must be normalised, and {first}: {why}", way_out)


def check_features(cfg: Config) -> Iterator[ConfigError]:
    """Blocks tile both dimensions of each quantised weight on one tensor-parallel rank."""
    quantized = quantized_linears(cfg)
    multiple, who = _multiple(cfg)
    dimensions: dict[str, list[tuple[Dimension, BlockLinear, str]]] = {}
    for linear in quantized:
        for dimension, verb in ((linear.inputs, "reach"), (linear.outputs, "leave")):
            dimensions.setdefault(dimension.key, []).append((dimension, linear, verb))
    for key, uses in dimensions.items():
        broken = [use for use in uses if use[0].features % multiple]
        if not broken:
            continue
        size, first, verb = broken[0]
        times = f" * {size.count}" if size.count > 1 else ""
        times += f" + {size.others}" if size.others else ""
        share = f" / tensor parallel {size.shards}" if size.shards > 1 else ""
        equals = f" = {size.features}" if times or share else ""
        step = math.lcm(*(dimension.value_step(multiple) for dimension, _, _ in uses))
        way_out = f"Set {key}={round_up(size.value, step)}{_or_keep((linear for _, linear, _ in broken), quantized)}"
        got = f"{size.value}{times}{share}{equals} features {verb} {first.name}"
        yield ConfigError(key, got, f"{who} needs a multiple of {multiple}", way_out)


def check_tokens(cfg: Config) -> Iterator[ConfigError]:
    """Blocks tile the tokens of a micro-batch on each rank that holds a part of them."""
    if cfg.precision.format == "none":
        return
    train, parallel = cfg.train, cfg.parallel
    shards = parallel.context * (parallel.tensor if parallel.sequence_parallel else 1)
    tokens = train.micro_batch_size * train.seq_length // shards
    multiple, who = _multiple(cfg)
    if tokens % multiple == 0:
        return
    split = f" / parallel.context {parallel.context}" if parallel.context > 1 else ""
    split += f" / parallel.tensor {parallel.tensor} (sequence parallel)" if parallel.sequence_parallel else ""
    got = f"{train.seq_length} * train.micro_batch_size {train.micro_batch_size}{split} = {tokens} tokens"
    needed = shards * multiple // math.gcd(shards * multiple, train.micro_batch_size)
    step = math.lcm(needed, 2 * shards)  # what context and sequence parallelism split evenly, too
    rule = f"{who} needs a multiple of {multiple} in each matrix product"
    yield ConfigError("train.seq_length", got, rule, f"Set train.seq_length={round_up(train.seq_length, step)}, or another micro-batch")


def _check_static_grad_amax(amax: float) -> Iterator[ConfigError]:
    mantissa, exponent = math.frexp(amax)
    lowest, highest = _STATIC_AMAX_EXPONENTS
    if mantissa == _STATIC_AMAX / 2 and lowest <= exponent - 1 <= highest:
        return
    rule = f"Must be {_STATIC_AMAX} * 2^j with j from {lowest} to {highest}: the scale is then a power of two and exact"
    nearest = 0 if not (amax > 0 and math.isfinite(amax)) else min(max(round(math.log2(amax / _STATIC_AMAX)), lowest), highest)
    yield _error("static_grad_amax", amax, rule, f"Set precision.static_grad_amax={math.ldexp(_STATIC_AMAX, nearest)!r}")


def _multiple(cfg: Config) -> tuple[int, str]:
    """What dimensions of a product must be multiples of, and whose rule that is."""
    precision = cfg.precision
    if precision.format != "nvfp4":
        return (_NATIVE_BLOCK if precision.format == "mxfp8" else _BLOCK), precision.format.upper()
    if expected_executor(cfg) == "native":
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

CHECKS = (check_unread_options, check_backend, check_grouped_experts, check_policy, check_static, check_features, check_tokens)
