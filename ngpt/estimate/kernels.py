"""The kernels of layers and of what surrounds them on one rank, and the seconds they take."""

from ngpt.config.executor import expected_executor
from ngpt.config.linears import BlockLinear
from ngpt.config.schema import Config
from ngpt.config.sizes import micro_batches_per_step, padded_vocab_size
from ngpt.estimate import calibration as measured
from ngpt.estimate.kinds import KINDS
from ngpt.estimate.rank import (
    Layer,
    Tokens,
    activation_bytes,
    has_grouped_experts,
    has_own_products,
    kept_weight_operands,
    local_experts,
    operand_bytes,
)
from ngpt.estimate.roofline import Work, move, product


def layer_work(cfg: Config, layer: Layer, tokens: Tokens) -> tuple[Work, Work]:
    """Forward and backward of one layer and one micro-batch."""
    forward, backward = _linears(cfg, layer, tokens)
    for part in (_stream(cfg, tokens), KINDS[layer.symbol].work(cfg, layer, tokens), _host(cfg, layer)):
        forward, backward = forward + part[0], backward + part[1]
    return forward, backward


def embedding_work(cfg: Config, tokens: Tokens) -> tuple[Work, Work]:
    """Look-up, and the gradient of the table: summed in bf16, added to the fp32 buffer."""
    rows, hidden, size = padded_vocab_size(cfg.model) // cfg.parallel.tensor, cfg.model.hidden_size, activation_bytes(cfg)
    copied = 3 * tokens.inner * hidden * size
    table = rows * hidden * (2 * size + 8)
    return Work(elementwise=move(cfg, copied)), Work(elementwise=move(cfg, 2 * copied + table))


def output_work(cfg: Config, tokens: Tokens) -> tuple[Work, Work]:
    """Output layer and cross entropy (no final norm). Cross entropy reads the logits and overwrites them with their gradient."""
    rows, hidden, size = padded_vocab_size(cfg.model) // cfg.parallel.tensor, cfg.model.hidden_size, activation_bytes(cfg)
    logits = tokens.inner * rows
    products = [product(cfg, tokens.inner, hidden, rows, gradient) for gradient in (False, False, True)]
    own = rows * hidden * (2 * size + 8)  # the output layer's gradient is a temporary
    forward = Work(products=products[0], loss=move(cfg, logits * size))
    backward = Work(products=products[1] + products[2], loss=move(cfg, 2 * logits * size), elementwise=move(cfg, own))
    half = Work(host=measured.STAGE_HOST_S / 2)
    return forward + half, backward + half


def join_work(cfg: Config, tokens: Tokens) -> tuple[Work, Work]:
    """The projection [D, 2 * D] of a prediction depth, whole on every tensor-parallel rank, and the join in front of it."""
    hidden = cfg.model.hidden_size
    forward, data, weight = (product(cfg, tokens.stream, 2 * hidden, hidden, gradient) for gradient in (False, False, True))
    moved = move(cfg, 8 * tokens.stream * hidden * activation_bytes(cfg))
    host = measured.STAGE_HOST_S / 2
    return Work(products=forward, elementwise=moved, host=host), Work(products=data + weight, elementwise=2 * moved, host=host)


def _linears(cfg: Config, layer: Layer, tokens: Tokens) -> tuple[Work, Work]:
    """The three products of each linear layer, and the quantisation of their operands."""
    forward = backward = moved_forward = moved_backward = 0.0
    for linear in layer.linears:
        routed = linear.is_routed
        copies = local_experts(cfg) if routed else 1
        starts = measured.GEMM_RAMP_S * (copies if has_own_products(cfg, layer, linear) else 1)
        rows = tokens.routed / copies if routed else tokens.inner
        recipe = layer.recipes.get(linear.name)
        sizes = (rows, linear.in_features, linear.out_features)
        forward += starts + copies * product(cfg, *sizes, weight_gradient=False, recipe=recipe)
        backward += 2 * starts + copies * sum(product(cfg, *sizes, weight_gradient=gradient, recipe=recipe) for gradient in (False, True))
        if recipe is not None:
            before, after = _quantisation_bytes(cfg, layer, linear, rows)
            moved_forward, moved_backward = moved_forward + copies * before, moved_backward + copies * after
    return Work(products=forward, elementwise=move(cfg, moved_forward)), Work(products=backward, elementwise=move(cfg, moved_backward))


def _quantisation_bytes(cfg: Config, layer: Layer, linear: BlockLinear, rows: float) -> tuple[float, float]:
    """Each operand is read once in the model's dtype and written twice, along both dimensions.

    A weight is read and written once in each pass. Where its operands are kept, that is once a step, spread over the forward passes.
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
    return Work(elementwise=move(cfg, forward * row)), Work(elementwise=move(cfg, backward * row))


def _host(cfg: Config, layer: Layer) -> tuple[Work, Work]:
    """Host time of a layer. A third of an expert's three products, and of the quantising for them, is forward."""
    forward, backward = measured.HOST_S[cfg.model.architecture][layer.symbol]
    experts, one_by_one = local_experts(cfg), layer.has_experts and not has_grouped_experts(cfg)
    both = experts * measured.SEQUENTIAL_EXPERT_S if one_by_one else 0.0
    for name, recipe in layer.recipes.items():
        routed, executor = ".experts." in name, expected_executor(cfg, recipe)
        if executor == "emulated":
            both += measured.EMULATED_LINEAR_S * (experts if one_by_one and routed else 1)
        elif routed and not one_by_one:
            both += measured.NATIVE_EXPERT_LINEAR_S * experts
    return Work(host=forward + both / 3), Work(host=backward + both * 2 / 3)


def optimizer_work(cfg: Config, updated: float, held: float, tensors: int) -> Work:
    """The optimizer step.

    Args:
        updated: parameters whose optimizer state this rank has.
        held: parameters whose gradients it has.
        tensors: parameter tensors of the rank.
    """
    own = measured.OPTIMIZER_BYTES + (measured.RETRACTION_BYTES if cfg.model.architecture == "ngpt" else 0)
    # Zeroing, the norm and clipping read or write the whole gradient buffer; the rest is the rank's share.
    return Work(
        elementwise=move(cfg, own * updated + 4 * (held - updated)),
        host=measured.OPTIMIZER_TENSOR_S * tensors,
    )
