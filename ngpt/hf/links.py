"""How the tensors of a training checkpoint become those of a Hugging Face model, and back again.

The model's names are those of `modeling_ngpt.py`. Where transformers' Nemotron-H has the same thing, they are its names.
Symbols: D hidden, N query heads, G key/value groups, K head dim, F MLP width, E experts, V vocabulary.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ngpt.config.activations import ACTIVATIONS
from ngpt.config.pattern import parse
from ngpt.config.schema import ModelConfig
from ngpt.config.sizes import padded_vocab_size

type Tensors = Sequence[Tensor]
MAMBA_PARTS = {
    "in_proj.weight": ("z", "x", "B", "C", "dt"),
    "in_proj.mixer_in_scale.stored": ("z", "x", "B", "C", "dt"),
    "conv1d.weight": ("x", "B", "C"),
    "conv1d.bias": ("x", "B", "C"),
}


def _as_is(tensors: Tensors) -> Tensors:
    return tensors


@dataclass(frozen=True)
class Link:
    """Tensors of a checkpoint and the tensors of a Hugging Face model that hold the same numbers.

    Attributes:
        keys: names in the checkpoint. names: in the model.
        to_model: the model's tensors from the checkpoint's, in the order of the names, each contiguous or a view of what it was given.
        to_checkpoint: the way back.
        missing: what stands for a tensor that the checkpoint does not have; None: it has all.
    """

    keys: tuple[str, ...]
    names: tuple[str, ...]
    to_model: Callable[[Tensors], Tensors] = _as_is
    to_checkpoint: Callable[[Tensors], Tensors] = _as_is
    missing: Callable[[], Tensor] | None = None


def links(model: ModelConfig) -> Iterator[Link]:
    """Every tensor of a model, in the order of its layers; prediction depths last, under `mtp.`.

    Args:
        model: resolved.
    """
    vocab, padded = model.vocab_size, padded_vocab_size(model)

    def without_padding(tensors: Tensors) -> Tensors:
        return [tensor[:vocab] for tensor in tensors]

    def with_padding(tensors: Tensors) -> Tensors:
        """Rows of padding are never read. In matrices they are zeros, which retraction leaves alone."""
        return [torch.cat([tensor, tensor.new_zeros(padded - vocab, *tensor.shape[1:])]) for tensor in tensors]

    def of_vocabulary(key: str, name: str) -> Link:
        return Link((key,), (name,), without_padding, with_padding)

    pattern = parse(model.layer_pattern)
    yield of_vocabulary("embedding.word_embeddings.weight", "model.embeddings.weight")
    for number, symbol in enumerate(pattern.trunk):
        yield from layer_links(model, symbol, f"decoder.layers.{number}.", f"model.layers.{number}.")
    if model.architecture == "gpt":
        yield Link(("decoder.final_norm.weight",), ("model.norm_f.weight",))
    if not model.tied_embeddings:
        yield of_vocabulary("output_layer.weight", "lm_head.weight")
    if model.architecture == "ngpt":
        yield of_vocabulary("sz.stored", "logit_scale")
    for depth, layers in enumerate(pattern.depths):
        source, target = f"mtp.layers.{depth}.", f"mtp.layers.{depth}."
        yield Link((f"{source}eh_proj.weight",), (f"{target}eh_proj.weight",))
        if model.architecture == "gpt":
            for norm, name in (("enorm", "enorm"), ("hnorm", "hnorm"), ("final_layernorm", "norm_f")):
                yield Link((f"{source}{norm}.weight",), (f"{target}{name}.weight",))
        for number, symbol in enumerate(layers):
            yield from layer_links(model, symbol, f"{source}mtp_model_layer.layers.{number}.", f"{target}layers.{number}.")


def layer_links(model: ModelConfig, symbol: str, source: str, target: str) -> Iterator[Link]:
    """The tensors of one layer.

    Args:
        symbol: of the layer pattern. source, target: what the layer's names begin with on either side.
    """
    makers = {"*": _attention, "-": _mlp, "E": _experts, "M": _mamba}
    norms = {"*": "input_layernorm", "-": "pre_mlp_layernorm", "E": "pre_mlp_layernorm", "M": "norm"}
    steps = {"*": "self_attn_bda", "-": "mlp_bda", "E": "mlp_bda", "M": "mamba_bda"}
    if model.architecture == "ngpt":
        yield Link((f"{source}{steps[symbol]}.alpha.stored",), (f"{target}alpha",))
    else:
        yield Link((f"{source}{norms[symbol]}.weight",), (f"{target}norm.weight",))
    yield from makers[symbol](model, source, f"{target}mixer.")


def _attention(model: ModelConfig, source: str, target: str) -> Iterator[Link]:
    groups = model.num_query_groups
    features = [heads * model.head_dim for heads in (model.num_attention_heads, groups, groups)]
    attention = f"{source}self_attention."
    names = tuple(f"{target}{name}_proj.weight" for name in "qkv")
    yield Link(
        (f"{attention}linear_qkv.weight",),
        names,
        lambda tensors: split_qkv(tensors[0], features, groups),
        lambda tensors: [join_qkv(tensors, groups)],
    )
    yield Link((f"{attention}linear_proj.weight",), (f"{target}o_proj.weight",))
    if model.architecture == "ngpt":
        yield Link((f"{attention}core_attention.sqk.stored",), (f"{target}sqk",))


def split_qkv(tensor: Tensor, features: Sequence[int], groups: int) -> list[Tensor]:
    """Queries, keys and values of the trainer's matrix, in which the queries of each group are followed by its key and its value.

    Args:
        features: how many rows each of the three has.
    """
    by_group = tensor.unflatten(0, (groups, -1))
    return [part.flatten(0, 1) for part in by_group.split([rows // groups for rows in features], dim=1)]


def join_qkv(tensors: Tensors, groups: int) -> Tensor:
    """The way back."""
    return torch.cat([part.unflatten(0, (groups, -1)) for part in tensors], dim=1).flatten(0, 1)


def _mlp(model: ModelConfig, source: str, target: str) -> Iterator[Link]:
    yield from _feed_forward(model, f"{source}mlp.", target)


def _feed_forward(model: ModelConfig, source: str, target: str) -> Iterator[Link]:
    fc1 = (f"{source}linear_fc1.weight",)
    if ACTIVATIONS[model.activation].gated:
        halves = (f"{target}gate_proj.weight", f"{target}up_proj.weight")
        yield Link(fc1, halves, lambda tensors: tensors[0].chunk(2), lambda tensors: [torch.cat(list(tensors))])
    else:
        yield Link(fc1, (f"{target}up_proj.weight",))
    yield Link((f"{source}linear_fc2.weight",), (f"{target}down_proj.weight",))
    if model.architecture == "ngpt":
        yield Link((f"{source}linear_fc1.suv.stored",), (f"{target}suv",))


def _experts(model: ModelConfig, source: str, target: str) -> Iterator[Link]:
    moe = f"{source}mlp."
    yield Link((f"{moe}router.weight",), (f"{target}gate.weight",))
    bias = None if model.moe_expert_bias else lambda: torch.zeros(model.num_experts)
    yield Link((f"{moe}router.expert_bias",), (f"{target}gate.e_score_correction_bias",), missing=bias)
    experts, up = f"{moe}experts.experts.", "gate_up_proj" if ACTIVATIONS[model.activation].gated else "up_proj"
    yield Link((f"{experts}linear_fc1.weight",), (f"{target}experts.{up}",))
    yield Link((f"{experts}linear_fc2.weight",), (f"{target}experts.down_proj",))
    if model.architecture == "ngpt":
        suv = f"{moe}experts.suv.stored" if model.moe_suv == "shared" else f"{experts}linear_fc1.suv.stored"
        yield Link((suv,), (f"{target}experts.suv",))
    if model.moe_shared_ffn_hidden_size:
        yield from _feed_forward(model, f"{moe}shared_experts.", f"{target}shared_experts.")


def _mamba(model: ModelConfig, source: str, target: str) -> Iterator[Link]:
    inner, states = model.mamba_num_heads * model.mamba_head_dim, model.mamba_num_groups * model.mamba_state_dim
    sizes = {"z": inner, "x": inner, "B": states, "C": states, "dt": model.mamba_num_heads}
    for name, parts in MAMBA_PARTS.items():
        if "scale" in name and model.architecture == "gpt":
            continue
        keys = tuple(f"{source}mixer.{name}.{part}" for part in parts)
        cuts = [sizes[part] for part in parts]
        yield Link(
            keys,
            (f"{target}{'in_scale' if 'scale' in name else name}",),
            lambda tensors: [torch.cat(list(tensors))],
            lambda tensors, cuts=cuts: tensors[0].split(cuts),
        )
    has_norm = model.architecture == "gpt" or model.mamba_gated_norm
    for name in ("dt_bias", "A_log", "D", "out_proj.weight", *(["norm.weight"] if has_norm else [])):
        yield Link((f"{source}mixer.{name}",), (f"{target}{name}",))


def shapes_of(link: Link, sizes: dict[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a link's tensors in the model, from those in the checkpoint.

    Args:
        sizes: name in the checkpoint -> shape.
    """
    empty = [torch.empty(sizes[key], device="meta") if key in sizes else _stand_in(link, key) for key in link.keys]
    return {name: tuple(tensor.shape) for name, tensor in zip(link.names, link.to_model(empty), strict=True)}


def _stand_in(link: Link, key: str) -> Tensor:
    if link.missing is None:
        raise KeyError(key)
    return link.missing().to("meta")

