"""What a layer keeps of a micro-batch for its backward pass, by the part of it that selective recomputation may drop.

The figures follow the autograd functions of `ngpt.functional` and of Megatron's and Transformer Engine's modules; a number is of the
model's dtype unless its factor says otherwise. "x" is what enters a layer, D the hidden size.
"""

from collections.abc import Callable

from ngpt.config.activations import ACTIVATIONS
from ngpt.config.executor import expected_executor
from ngpt.config.linears import BlockLinear
from ngpt.config.schema import Config
from ngpt.estimate.calibration import ROUTING_BYTES
from ngpt.estimate.layout import Layer, Tokens, activation_bytes, computes_norm, gates_in_steps, operand_bytes

Saved = dict[str, float]  # part of the layer: bytes
_FP32 = 4


def saved_bytes(cfg: Config, layer: Layer, tokens: Tokens) -> Saved:
    """Bytes by part: stream (what the residual stream and its norms keep), core_attn, attention, mlp, mixer, moe, shared_experts."""
    size, hidden = activation_bytes(cfg), cfg.model.hidden_size
    if cfg.model.architecture == "ngpt":  # the residual step keeps x and the sub-block's output, with three norms a row
        stream = tokens.stream * (2 * hidden * size + 3 * _FP32)
    else:  # the norm keeps x and a number a row
        stream = tokens.stream * (hidden * size + _FP32)
    return {"stream": stream + _input_of_readers(cfg, layer, tokens)} | _PARTS[layer.symbol](cfg, layer, tokens)


def kept_bytes(cfg: Config, layer: Layer, tokens: Tokens) -> float:
    """Bytes of a layer that lives through `parallel.recompute` none or selective."""
    return sum(size for part, size in saved_bytes(cfg, layer, tokens).items() if part not in dropped_parts(cfg))


def dropped_parts(cfg: Config) -> set[str]:
    """The parts that selective recomputation computes again."""
    if cfg.parallel.recompute != "selective":
        return set()
    modules = set(cfg.parallel.recompute_modules or ["core_attn"])
    return modules | ({"shared_experts"} if "moe" in modules else set())


def _input_of_readers(cfg: Config, layer: Layer, tokens: Tokens) -> float:
    """What the linears that read the stream keep: the control's normalised x; nGPT's is the stream itself; quantised: their own copy."""
    readers = [linear for linear in layer.linears if linear.reads_stream and ".experts." not in linear.name]
    hidden, size = cfg.model.hidden_size, activation_bytes(cfg)
    quantized = [layer.recipes[linear.name] for linear in readers if linear.name in layer.recipes]
    in_dtype = len(quantized) < len(readers) or layer.symbol == "E"  # the router and the experts' copy read the same tensor
    copies: float = size * (cfg.model.architecture == "gpt" and in_dtype)
    if quantized:
        recipe = quantized[0]  # one of a layer's readers stands for all
        emulated = expected_executor(cfg, recipe) == "emulated"
        gathers = cfg.parallel.sequence_parallel and emulated  # then it keeps x as it is and quantises it again
        shares_x = gathers and (cfg.model.architecture == "ngpt" or in_dtype)
        copies += 0 if shares_x else operand_bytes(cfg, recipe)
    return tokens.stream * hidden * copies


def _written(cfg: Config, layer: Layer, linear: BlockLinear) -> float:
    """Bytes a token that an output projection keeps of its input, with the fine-grained norm in front of it where that is computed."""
    size, features = activation_bytes(cfg), linear.in_features
    operand = operand_bytes(cfg, layer.recipes.get(linear.name))
    return features * (size + operand) + _FP32 if computes_norm(cfg, layer, linear) else features * operand


def _attention(cfg: Config, layer: Layer, tokens: Tokens) -> Saved:
    """Queries, keys, values and output with a number a head; nGPT keeps the three once more, as the projection gave them."""
    model, size = cfg.model, activation_bytes(cfg)
    qkv, proj = layer.linear("linear_qkv"), layer.linear("linear_proj")
    queries, heads = proj.in_features, model.num_attention_heads // cfg.parallel.tensor
    groups = model.num_query_groups // cfg.parallel.tensor
    core = heads * _FP32
    outside = qkv.out_features * size + _written(cfg, layer, proj)
    if model.architecture == "ngpt":
        outside += qkv.out_features * size + (heads + groups) * _FP32
    if proj.name in layer.recipes and not computes_norm(cfg, layer, proj):
        outside += queries * size  # the attention keeps its output beside the projection's operand
    return {"core_attn": tokens.inner * core, "attention": tokens.inner * outside}


def _mlp_numbers(cfg: Config, layer: Layer, fc1: BlockLinear, fc2: BlockLinear) -> float:
    """Bytes a token of an MLP: fc1's output, and what fc2 keeps of the activation; nGPT's activation makes its norm, too, from fc1's.

    A gate without a kernel of its own keeps f of it, too.
    """
    kept = fc2.in_features * operand_bytes(cfg, layer.recipes.get(fc2.name)) + _FP32 * computes_norm(cfg, layer, fc2)
    between = fc1.out_features + fc2.in_features * gates_in_steps(cfg)
    return between * activation_bytes(cfg) + kept


def _mlp(cfg: Config, layer: Layer, tokens: Tokens) -> Saved:
    return {"mlp": tokens.inner * _mlp_numbers(cfg, layer, layer.linear("linear_fc1"), layer.linear("linear_fc2"))}


def _moe(cfg: Config, layer: Layer, tokens: Tokens) -> Saved:
    """Each token once for every expert it is sent to; the control keeps the activation before and after the probabilities."""
    model, size, hidden = cfg.model, activation_bytes(cfg), cfg.model.hidden_size
    fc1, fc2 = layer.linear(".experts.linear_fc1"), layer.linear(".experts.linear_fc2")
    copies = hidden * operand_bytes(cfg, layer.recipes.get(fc1.name))
    routed = copies + _mlp_numbers(cfg, layer, fc1, fc2)
    if model.architecture == "ngpt":
        routed += hidden * size + _FP32  # the outputs that the probabilities multiply
    elif not ACTIVATIONS[model.activation].fusion:
        routed += fc2.in_features * size
    router = ROUTING_BYTES * model.num_experts / 64
    saved = {"moe": tokens.routed * routed + tokens.stream * router}
    if layer.has_shared_experts:
        shared = layer.linear("shared_experts.linear_fc1"), layer.linear("shared_experts.linear_fc2")
        saved["shared_experts"] = tokens.inner * _mlp_numbers(cfg, layer, *shared)
    return saved


def _mamba(cfg: Config, layer: Layer, tokens: Tokens) -> Saved:
    """in_proj's output before and (nGPT) after its scale, the scan's output, and what out_proj keeps; the rest is computed again."""
    size, in_proj, out_proj = activation_bytes(cfg), layer.linear("in_proj"), layer.linear("out_proj")
    scaled = 2 if cfg.model.architecture == "ngpt" else 1
    numbers = (scaled * in_proj.out_features + out_proj.in_features) * size + _written(cfg, layer, out_proj)
    return {"mixer": tokens.inner * numbers}


_PARTS: dict[str, Callable[[Config, Layer, Tokens], Saved]] = {"*": _attention, "-": _mlp, "E": _moe, "M": _mamba}
