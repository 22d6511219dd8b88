"""Mixtures of experts."""

from ngpt.config.activations import ACTIVATIONS
from ngpt.config.schema import Config, ModelConfig
from ngpt.config.sizes import expert_tensor_size
from ngpt.estimate import calibration as measured
from ngpt.estimate.collectives import exchange_seconds, gather_seconds
from ngpt.estimate.kinds.base import FP32, LayerCount, LayerEstimate, Saved, is_ngpt
from ngpt.estimate.kinds.mlp import mlp_bytes, mlp_matrices, mlp_passes, suv_size
from ngpt.estimate.rank import Layer, RankParameters, Tokens, activation_bytes, local_experts, operand_bytes
from ngpt.estimate.roofline import Work, move, product


class Experts(LayerEstimate):
    """Router, routed experts, and a shared expert if there is one. Each is an MLP with its own suv, or the routed ones share one."""

    def count(self, model: ModelConfig) -> LayerCount:
        expert, suv = mlp_matrices(model, model.moe_ffn_hidden_size), suv_size(model, model.moe_ffn_hidden_size)
        shared, shared_suv = mlp_matrices(model, model.moe_shared_ffn_hidden_size), suv_size(model, model.moe_shared_ffn_hidden_size)
        router, idle = model.num_experts * model.hidden_size, model.num_experts - model.moe_top_k
        per_expert = model.moe_suv == "per_expert"
        return LayerCount(
            matrices=model.num_experts * expert + shared + router,
            matmul=model.moe_top_k * expert + shared + router,
            others=(model.num_experts if per_expert else 1) * suv + shared_suv,
            idle=idle * (expert + (suv if per_expert else 0)),
        )

    def parameters(self, cfg: Config, layer: Layer) -> RankParameters:
        """The router, and the scales."""
        model, experts = cfg.model, local_experts(cfg)
        router = model.num_experts * model.hidden_size
        parts = RankParameters(dense=router, replicated=router, tensors=1)
        if not is_ngpt(model):
            return parts
        if layer.has_shared_experts:
            parts += RankParameters(dense_scales=layer.linear("shared_experts.linear_fc1").out_features, tensors=1)
        suv = layer.linear(".experts.linear_fc1").out_features
        if model.moe_suv == "per_expert":
            return parts + RankParameters(expert_scales=experts * suv, tensors=1)
        sharded = expert_tensor_size(cfg) > 1
        return parts + RankParameters(dense_scales=suv, replicated=0 if sharded else suv, tensors=1)

    def saved(self, cfg: Config, layer: Layer, tokens: Tokens) -> Saved:
        """Each token once for every expert it is sent to; the control keeps the activation before and after the probabilities."""
        model, size, hidden = cfg.model, activation_bytes(cfg), cfg.model.hidden_size
        fc1, fc2 = layer.linear(".experts.linear_fc1"), layer.linear(".experts.linear_fc2")
        copies = hidden * operand_bytes(cfg, layer.recipes.get(fc1.name))
        routed = copies + mlp_bytes(cfg, layer, fc1, fc2)
        if model.architecture == "ngpt":
            routed += hidden * size + FP32  # the outputs that the probabilities multiply
        elif not ACTIVATIONS[model.activation].fusion:
            routed += fc2.in_features * size
        router = measured.ROUTING_BYTES * model.num_experts / 64
        saved = {"moe": tokens.routed * routed + tokens.stream * router}
        if layer.has_shared_experts:
            shared = layer.linear("shared_experts.linear_fc1"), layer.linear("shared_experts.linear_fc2")
            saved["shared_experts"] = tokens.inner * mlp_bytes(cfg, layer, *shared)
        return saved

    def work(self, cfg: Config, layer: Layer, tokens: Tokens) -> tuple[Work, Work]:
        """Dispatch and combination, activations with the router's probabilities (fp32, hence wide), the shared expert."""
        size, hidden = activation_bytes(cfg), cfg.model.hidden_size
        fc1, fc2 = layer.linear(".experts.linear_fc1"), layer.linear(".experts.linear_fc2")
        forward, backward = mlp_passes(cfg, fc1, fc2)
        if cfg.model.architecture == "ngpt":  # the probabilities multiply the outputs
            forward, backward = forward + 2 * hidden, backward + 3 * hidden
        elif not ACTIVATIONS[cfg.model.activation].fusion:  # times fp32 probabilities, through fp32 copies
            forward, backward = forward + 6 * fc2.in_features, backward + 13 * fc2.in_features
        moved = [
            tokens.routed * size * (passes + dispatch * hidden)
            for passes, dispatch in ((forward, measured.DISPATCH_FORWARD_PASSES), (backward, measured.DISPATCH_BACKWARD_PASSES))
        ]
        if layer.has_shared_experts:
            passes = mlp_passes(cfg, layer.linear("shared_experts.linear_fc1"), layer.linear("shared_experts.linear_fc2"))
            moved = [total + tokens.inner * size * own for total, own in zip(moved, passes, strict=True)]
        router = product(cfg, tokens.stream, hidden, cfg.model.num_experts, weight_gradient=False)
        return Work(products=router, elementwise=move(cfg, moved[0])), Work(products=2 * router, elementwise=move(cfg, moved[1]))

    def links(self, cfg: Config, layer: Layer, tokens: Tokens) -> tuple[float, float]:
        """Tokens to the ranks of their experts and back, both ways."""
        parallel, row, stride = cfg.parallel, cfg.model.hidden_size * activation_bytes(cfg), expert_tensor_size(cfg)
        if parallel.token_dispatcher == "allgather":
            spread = gather_seconds(cfg, tokens.stream * row * parallel.expert, parallel.expert, stride)
        else:
            spread = exchange_seconds(cfg, tokens.stream * cfg.model.moe_top_k * row, parallel.expert, stride)
        within = gather_seconds(cfg, tokens.routed * row, stride)
        return 2 * (spread + within), 2 * (spread + within)
