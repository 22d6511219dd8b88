"""The kernels of one layer on one rank and the seconds they take: a roofline of each product, and bytes over bandwidth for the rest."""

from collections.abc import Callable
from dataclasses import dataclass

from ngpt.config.activations import ACTIVATIONS
from ngpt.config.executor import expected_executor
from ngpt.config.linears import BlockLinear
from ngpt.config.schema import Config
from ngpt.config.sizes import micro_batches_per_step, padded_vocab_size
from ngpt.estimate import calibration as measured
from ngpt.estimate.layout import (
    Layer,
    Tokens,
    activation_bytes,
    computes_norm,
    gates_in_steps,
    gpu_of,
    has_grouped_experts,
    has_own_products,
    kept_weight_operands,
    local_experts,
    operand_bytes,
)
from ngpt.recipes import Recipe


@dataclass(frozen=True)
class Work:
    """Seconds of one GPU by what it does, and of the host that launches it.

    Attributes:
        products: of linear layers and the output layer. attention: its two products and softmax. scan: Mamba's convolution and scan.
        elementwise: norms, residual steps, scales, activations, dispatch of tokens, quantisation. loss: cross entropy.
        host: launching all of them.
    """

    products: float = 0.0
    attention: float = 0.0
    scan: float = 0.0
    elementwise: float = 0.0
    loss: float = 0.0
    host: float = 0.0

    @property
    def gpu(self) -> float:
        return self.products + self.attention + self.scan + self.elementwise + self.loss

    def __add__(self, other: "Work") -> "Work":
        return Work(*(getattr(self, name) + getattr(other, name) for name in self.__dataclass_fields__))


def layer_work(cfg: Config, layer: Layer, tokens: Tokens) -> tuple[Work, Work]:
    """Forward and backward of one layer and one micro-batch."""
    forward, backward = _linears(cfg, layer, tokens)
    for part in (_stream(cfg, tokens), _PARTS[layer.symbol](cfg, layer, tokens), _host(cfg, layer)):
        forward, backward = forward + part[0], backward + part[1]
    return forward, backward


def embedding_work(cfg: Config, tokens: Tokens) -> tuple[Work, Work]:
    """Look-up, and the gradient of the table: summed up in bf16, added to the fp32 buffer."""
    rows, hidden, size = padded_vocab_size(cfg.model) // cfg.parallel.tensor, cfg.model.hidden_size, activation_bytes(cfg)
    copied = 3 * tokens.inner * hidden * size
    table = rows * hidden * (2 * size + 8)
    return Work(elementwise=_move(cfg, copied)), Work(elementwise=_move(cfg, 2 * copied + table))


def output_work(cfg: Config, tokens: Tokens) -> tuple[Work, Work]:
    """Output layer and cross entropy (no final norm), which reads the logits, and writes their gradient in their place."""
    rows, hidden, size = padded_vocab_size(cfg.model) // cfg.parallel.tensor, cfg.model.hidden_size, activation_bytes(cfg)
    logits = tokens.inner * rows
    product = [_product(cfg, tokens.inner, hidden, rows, gradient) for gradient in (False, False, True)]
    own = rows * hidden * (2 * size + 8)  # the output layer's gradient is a temporary
    forward = Work(products=product[0], loss=_move(cfg, logits * size))
    backward = Work(products=product[1] + product[2], loss=_move(cfg, 2 * logits * size), elementwise=_move(cfg, own))
    half = Work(host=measured.STAGE_HOST_S / 2)
    return forward + half, backward + half


def join_work(cfg: Config, tokens: Tokens) -> tuple[Work, Work]:
    """The projection [D, 2 * D] of a prediction depth, whole on every tensor-parallel rank, and the joining in front of it."""
    hidden = cfg.model.hidden_size
    forward, data, weight = (_product(cfg, tokens.stream, 2 * hidden, hidden, gradient) for gradient in (False, False, True))
    moved = _move(cfg, 8 * tokens.stream * hidden * activation_bytes(cfg))
    host = measured.STAGE_HOST_S / 2
    return Work(products=forward, elementwise=moved, host=host), Work(products=data + weight, elementwise=2 * moved, host=host)


def _linears(cfg: Config, layer: Layer, tokens: Tokens) -> tuple[Work, Work]:
    """The three products of each linear layer, and the quantisation of their operands."""
    forward = backward = moved_forward = moved_backward = 0.0
    for linear in layer.linears:
        routed = ".experts." in linear.name
        copies = local_experts(cfg) if routed else 1
        starts = measured.GEMM_RAMP_S * (copies if has_own_products(cfg, layer, linear) else 1)
        rows = tokens.routed / copies if routed else tokens.inner
        recipe = layer.recipes.get(linear.name)
        sizes = (rows, linear.in_features, linear.out_features)
        forward += starts + copies * _product(cfg, *sizes, weight_gradient=False, recipe=recipe)
        backward += 2 * starts + copies * sum(_product(cfg, *sizes, weight_gradient=gradient, recipe=recipe) for gradient in (False, True))
        if recipe is not None:
            before, after = _quantisation_bytes(cfg, layer, linear, rows)
            moved_forward, moved_backward = moved_forward + copies * before, moved_backward + copies * after
    return Work(products=forward, elementwise=_move(cfg, moved_forward)), Work(products=backward, elementwise=_move(cfg, moved_backward))


def _product(cfg: Config, rows: float, inputs: int, outputs: int, weight_gradient: bool, recipe: Recipe | None = None) -> float:
    """Seconds of one product of `rows` tokens: the larger of its FLOPs and its bytes.

    A weight gradient is added to the fp32 buffer: read and written.
    """
    gpu, size = gpu_of(cfg), float(activation_bytes(cfg))
    dtype, fraction = ("bf16" if cfg.precision.dtype == "bf16" else "tf32"), measured.GEMM_FRACTION
    if recipe is not None and expected_executor(cfg, recipe) == "native":
        dtype, fraction, size = recipe.format, measured.LOW_PRECISION_GEMM_FRACTION, operand_bytes(cfg, recipe)
    rate = gpu.rates[dtype] * fraction
    weight = inputs * outputs * (8 if weight_gradient else size)
    moved = size * rows * (inputs + outputs) + weight
    return max(2 * rows * inputs * outputs / rate, moved / _copy_rate(cfg))


def _quantisation_bytes(cfg: Config, layer: Layer, linear: BlockLinear, rows: float) -> tuple[float, float]:
    """Each operand is read once in the model's dtype and written twice, along both dimensions.

    A weight is read and written once in each pass, or where its operands are kept once a step: a part of that in each forward pass.
    """
    read, written = activation_bytes(cfg), operand_bytes(cfg, layer.recipes[linear.name])
    features = linear.in_features * linear.out_features
    kept = kept_weight_operands(cfg, layer, linear)
    of_forward = features * (read + kept * written) / micro_batches_per_step(cfg) if kept else features * (read + written)
    of_backward = 0.0 if kept else features * (read + written)
    forward = rows * linear.in_features * (read + 2 * written) + of_forward
    backward = rows * linear.out_features * (read + 2 * written) + of_backward
    return forward, backward


def _stream(cfg: Config, tokens: Tokens) -> tuple[Work, Work]:
    """Residual and norms, in passes over the stream. nGPT: one kernel each way. The control: RMSNorm, sum. Both sum two gradients of x."""
    row = tokens.stream * cfg.model.hidden_size * activation_bytes(cfg)
    forward, backward = (3, 8) if cfg.model.architecture == "ngpt" else (5, 6)
    return Work(elementwise=_move(cfg, forward * row)), Work(elementwise=_move(cfg, backward * row))


def _attention(cfg: Config, layer: Layer, tokens: Tokens) -> tuple[Work, Work]:
    """Causal: a token sees half the sequence. Passes: from the projection to queries, keys and values, and nGPT's norm of the output."""
    model, rate = cfg.model, gpu_of(cfg).rates["bf16"]
    qkv, proj = layer.linear("linear_qkv"), layer.linear("linear_proj")
    queries = proj.in_features
    keys = (qkv.out_features - queries) // 2
    flops = 4 * tokens.inner * tokens.sequence / 2 * queries
    forward = backward = 2 * qkv.out_features
    if model.architecture == "ngpt":
        output = queries * computes_norm(cfg, layer, proj)
        forward, backward = forward + 2 * output, backward + queries + keys + 3 * output
    size = tokens.inner * activation_bytes(cfg)
    return (
        Work(attention=flops / (rate * measured.ATTENTION_FORWARD_FRACTION), elementwise=_move(cfg, forward * size)),
        Work(attention=2 * flops / (rate * measured.ATTENTION_BACKWARD_FRACTION), elementwise=_move(cfg, backward * size)),
    )


def _mlp_passes(cfg: Config, fc1: BlockLinear, fc2: BlockLinear) -> tuple[float, float]:
    """Numbers moved a token between the linears: the activation, with nGPT's suv and fine-grained norm in it.

    A gate without a kernel of its own: f, the product with up, and backward the halves put together again.
    """
    forward, backward = fc1.out_features + fc2.in_features, 2 * fc1.out_features + fc2.in_features
    if gates_in_steps(cfg):
        forward, backward = forward + 2 * fc2.in_features, backward + 8 * fc2.in_features
    return forward, backward


def _mlp(cfg: Config, layer: Layer, tokens: Tokens) -> tuple[Work, Work]:
    forward, backward = _mlp_passes(cfg, layer.linear("linear_fc1"), layer.linear("linear_fc2"))
    size = tokens.inner * activation_bytes(cfg)
    return Work(elementwise=_move(cfg, forward * size)), Work(elementwise=_move(cfg, backward * size))


def _moe(cfg: Config, layer: Layer, tokens: Tokens) -> tuple[Work, Work]:
    """Dispatch and combination, activations with the router's probabilities (fp32, hence wide), the shared expert."""
    size, hidden = activation_bytes(cfg), cfg.model.hidden_size
    fc1, fc2 = layer.linear(".experts.linear_fc1"), layer.linear(".experts.linear_fc2")
    forward, backward = _mlp_passes(cfg, fc1, fc2)
    if cfg.model.architecture == "ngpt":  # the probabilities on the outputs
        forward, backward = forward + 2 * hidden, backward + 3 * hidden
    elif not ACTIVATIONS[cfg.model.activation].fusion:  # times fp32 probabilities, through fp32 copies
        forward, backward = forward + 6 * fc2.in_features, backward + 13 * fc2.in_features
    moved = [
        tokens.routed * size * (passes + dispatch * hidden)
        for passes, dispatch in ((forward, measured.DISPATCH_FORWARD_PASSES), (backward, measured.DISPATCH_BACKWARD_PASSES))
    ]
    if layer.has_shared_experts:
        passes = _mlp_passes(cfg, layer.linear("shared_experts.linear_fc1"), layer.linear("shared_experts.linear_fc2"))
        moved = [total + tokens.inner * size * own for total, own in zip(moved, passes, strict=True)]
    router = _product(cfg, tokens.stream, hidden, cfg.model.num_experts, weight_gradient=False)
    return Work(products=router, elementwise=_move(cfg, moved[0])), Work(products=2 * router, elementwise=_move(cfg, moved[1]))


def _mamba(cfg: Config, layer: Layer, tokens: Tokens) -> tuple[Work, Work]:
    """The scan is bound by memory: passes over in_proj's output and the fp32 states at the chunks' starts."""
    model, size = cfg.model, activation_bytes(cfg)
    writer = layer.linear("out_proj")
    in_proj, out_proj = layer.linear("in_proj").out_features, writer.in_features
    states = out_proj * model.mamba_state_dim / model.mamba_chunk_size
    scanned = tokens.inner * (in_proj * size + states * 4)
    forward = backward = 0.0
    if cfg.train.micro_batch_size > 1:  # batch and sequence change places
        forward = backward = 2 * (in_proj + out_proj)
    if model.architecture == "ngpt":
        forward, backward = forward + 2 * in_proj, backward + 3 * in_proj
    if computes_norm(cfg, layer, writer):
        forward, backward = forward + 2 * out_proj, backward + 3 * out_proj
    return (
        Work(scan=_move(cfg, measured.SCAN_FORWARD_PASSES * scanned), elementwise=_move(cfg, tokens.inner * size * forward)),
        Work(scan=_move(cfg, measured.SCAN_BACKWARD_PASSES * scanned), elementwise=_move(cfg, tokens.inner * size * backward)),
    )


def _host(cfg: Config, layer: Layer) -> tuple[Work, Work]:
    """Host time of a layer. Of an expert's three products, and of the work of quantising for them, a third is forward."""
    forward, backward = measured.HOST_S[cfg.model.architecture][layer.symbol]
    experts, one_by_one = local_experts(cfg), layer.symbol == "E" and not has_grouped_experts(cfg)
    both = experts * measured.SEQUENTIAL_EXPERT_S if one_by_one else 0.0
    for name, recipe in layer.recipes.items():
        routed, executor = ".experts." in name, expected_executor(cfg, recipe)
        if executor == "emulated":
            both += measured.EMULATED_LINEAR_S * (experts if one_by_one and routed else 1)
        elif routed and not one_by_one:
            both += measured.NATIVE_EXPERT_LINEAR_S * experts
    return Work(host=forward + both / 3), Work(host=backward + both * 2 / 3)


def _move(cfg: Config, moved: float) -> float:
    """Seconds of kernels that read and write so many bytes."""
    return moved / (_copy_rate(cfg) * measured.KERNEL_FRACTION)


def _copy_rate(cfg: Config) -> float:
    return gpu_of(cfg).hbm * measured.COPY_FRACTION


def optimizer_work(cfg: Config, updated: float, held: float, tensors: int) -> Work:
    """The optimizer step.

    Args:
        updated: parameters whose optimizer state this rank has.
        held: parameters whose gradients it has.
        tensors: parameter tensors of the rank.
    """
    own = measured.OPTIMIZER_BYTES + (measured.RETRACTION_BYTES if cfg.model.architecture == "ngpt" else 0)
    # Zeroing, its norm and clipping read or write the whole gradient buffer; the rest is the rank's share.
    return Work(
        elementwise=_move(cfg, own * updated + 4 * (held - updated)),
        host=measured.OPTIMIZER_TENSOR_S * tensors,
    )


Part = Callable[[Config, Layer, Tokens], tuple[Work, Work]]
_PARTS: dict[str, Part] = {"*": _attention, "-": _mlp, "E": _moe, "M": _mamba}
