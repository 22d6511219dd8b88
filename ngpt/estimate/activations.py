"""What a layer keeps of a micro-batch for its backward pass, split into the parts that selective recomputation may drop.

The figures follow the autograd functions of `ngpt.functional` and of Megatron's and Transformer Engine's modules; a number has the
model's dtype unless its factor says otherwise. "x" is what enters a layer, D the hidden size.
"""

from ngpt.config.executor import expected_executor
from ngpt.config.schema import Config
from ngpt.estimate.kinds import KINDS
from ngpt.estimate.kinds.base import FP32, Saved
from ngpt.estimate.rank import Layer, Tokens, activation_bytes, operand_bytes


def saved_bytes(cfg: Config, layer: Layer, tokens: Tokens) -> Saved:
    """Bytes by part: stream (what the residual stream and its norms keep), core_attn, attention, mlp, mixer, moe, shared_experts."""
    size, hidden = activation_bytes(cfg), cfg.model.hidden_size
    if cfg.model.architecture == "ngpt":  # the residual step keeps x and the sub-block's output, with three norms a row
        stream = tokens.stream * (2 * hidden * size + 3 * FP32)
    else:  # the norm keeps x and a number a row
        stream = tokens.stream * (hidden * size + FP32)
    return {"stream": stream + _input_of_readers(cfg, layer, tokens)} | KINDS[layer.symbol].saved(cfg, layer, tokens)


def kept_bytes(cfg: Config, layer: Layer, tokens: Tokens) -> float:
    """Bytes that a layer keeps under `parallel.recompute` none or selective."""
    return sum(size for part, size in saved_bytes(cfg, layer, tokens).items() if part not in dropped_parts(cfg))


def dropped_parts(cfg: Config) -> set[str]:
    """The parts that selective recomputation computes again."""
    if cfg.parallel.recompute != "selective":
        return set()
    modules = set(cfg.parallel.recompute_modules or ["core_attn"])
    return modules | ({"shared_experts"} if "moe" in modules else set())


def _input_of_readers(cfg: Config, layer: Layer, tokens: Tokens) -> float:
    """What linears that read the stream keep: the control's normalised x; for nGPT the stream itself; if quantised, their own copy."""
    readers = [linear for linear in layer.linears if linear.reads_stream and not linear.is_routed]
    hidden, size = cfg.model.hidden_size, activation_bytes(cfg)
    quantized = [layer.recipes[linear.name] for linear in readers if linear.name in layer.recipes]
    in_dtype = len(quantized) < len(readers) or layer.has_experts  # the router and the experts' copy read the same tensor
    copies: float = size * (cfg.model.architecture == "gpt" and in_dtype)
    if quantized:
        recipe = quantized[0]  # one of a layer's readers stands for all
        emulated = expected_executor(cfg, recipe) == "emulated"
        gathers = cfg.parallel.sequence_parallel and emulated  # then it keeps x as it is and quantises it again
        shares_x = gathers and (cfg.model.architecture == "ngpt" or in_dtype)
        copies += 0 if shares_x else operand_bytes(cfg, recipe)
    return tokens.stream * hidden * copies
