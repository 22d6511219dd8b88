"""MLPs, and what those of experts have in common with them."""

from ngpt.config.activations import ACTIVATIONS
from ngpt.config.linears import BlockLinear
from ngpt.config.schema import Config, ModelConfig
from ngpt.estimate.kinds.base import FP32, LayerCount, LayerEstimate, Saved, is_ngpt
from ngpt.estimate.rank import Layer, RankParameters, Tokens, activation_bytes, computes_norm, gates_in_steps, operand_bytes
from ngpt.estimate.roofline import Work, move


class Mlp(LayerEstimate):
    """An MLP; nGPT scales what enters its activation by suv."""

    def count(self, model: ModelConfig) -> LayerCount:
        matrices = mlp_matrices(model, model.ffn_hidden_size)
        return LayerCount(matrices, matrices, others=suv_size(model, model.ffn_hidden_size))

    def parameters(self, cfg: Config, layer: Layer) -> RankParameters:
        """suv."""
        suv = layer.linear("linear_fc1").out_features
        return RankParameters(dense_scales=suv, tensors=1) if is_ngpt(cfg.model) else RankParameters()

    def saved(self, cfg: Config, layer: Layer, tokens: Tokens) -> Saved:
        return {"mlp": tokens.inner * mlp_bytes(cfg, layer, layer.linear("linear_fc1"), layer.linear("linear_fc2"))}

    def work(self, cfg: Config, layer: Layer, tokens: Tokens) -> tuple[Work, Work]:
        forward, backward = mlp_passes(cfg, layer.linear("linear_fc1"), layer.linear("linear_fc2"))
        size = tokens.inner * activation_bytes(cfg)
        return Work(elementwise=move(cfg, forward * size)), Work(elementwise=move(cfg, backward * size))


def mlp_matrices(model: ModelConfig, ffn: int) -> int:
    """Numbers of both matrices of an MLP with this width."""
    return model.hidden_size * (_fc1_width(model, ffn) + ffn)


def suv_size(model: ModelConfig, ffn: int) -> int:
    """Entries of its suv; the control has none."""
    return _fc1_width(model, ffn) if is_ngpt(model) else 0


def mlp_passes(cfg: Config, fc1: BlockLinear, fc2: BlockLinear) -> tuple[float, float]:
    """Numbers moved a token between the linears: the activation, with nGPT's suv and fine-grained norm in it.

    A gate without its own kernel adds f, the product with up and, backward, joining the halves.
    """
    forward, backward = fc1.out_features + fc2.in_features, 2 * fc1.out_features + fc2.in_features
    if gates_in_steps(cfg):
        forward, backward = forward + 2 * fc2.in_features, backward + 8 * fc2.in_features
    return forward, backward


def mlp_bytes(cfg: Config, layer: Layer, fc1: BlockLinear, fc2: BlockLinear) -> float:
    """Bytes a token of an MLP: fc1's output, and what fc2 keeps of the activation. nGPT's activation also makes its norm from fc1's output.

    A gate without its own kernel also keeps the result of f.
    """
    kept = fc2.in_features * operand_bytes(cfg, layer.recipes.get(fc2.name)) + FP32 * computes_norm(cfg, layer, fc2)
    between = fc1.out_features + fc2.in_features * gates_in_steps(cfg)
    return between * activation_bytes(cfg) + kept


def _fc1_width(model: ModelConfig, ffn: int) -> int:
    return ffn * ACTIVATIONS[model.activation].gate_and_up
