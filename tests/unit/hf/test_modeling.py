"""The Hugging Face model against the fp64 reference, and what users do with one: caches, generation, low precision, training, files."""

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from reference_mamba import MambaSpec
from reference_model import ModelSpec, random_params, reference_logits, reference_loss
from reference_moe import MoeSpec
from torch import Tensor
from transformers import DynamicCache

from ngpt.config.activations import ACTIVATIONS as TABLE
from ngpt.hf.configuration_ngpt import NGPTConfig
from ngpt.hf.modeling_ngpt import CACHE, STORED, NGPTForCausalLM, NGPTModel, ssd_scan

NGPT = ModelSpec("ngpt", num_layers=2, hidden=12, ffn=20, heads=4, groups=2, head_dim=6, vocab=17, norm_epsilon=1e-3)
GPT = replace(NGPT, architecture="gpt")
EXPERTS = MoeSpec(experts=5, top_k=3, ffn=6, shared_ffn=8, scaling=2.5)
HYBRID = replace(NGPT, pattern="ME*E-M", moe=EXPERTS, mamba=MambaSpec(heads=4, head_dim=3, groups=2, state=2), rope=False)
ALTERED = replace(EXPERTS, score="softmax", shared_suv=True, shared_ffn=0, scaled_input=False)
SPECS = {
    "ngpt": NGPT,
    "ngpt_swiglu_tied": replace(NGPT, activation="swiglu", tied=True, rope_base=1e6),
    "ngpt_coarse": replace(NGPT, fine_grained=False, rope=False, alpha_init=0.1, sz_init=10.0),
    "gpt": GPT,
    "gpt_swiglu_tied": replace(GPT, activation="swiglu", tied=True),
    "ngpt_hybrid": HYBRID,
    "ngpt_hybrid_coarse": replace(HYBRID, fine_grained=False, rope=True, conv_kernel=3),
    "ngpt_hybrid_altered": replace(HYBRID, activation="swiglu", moe=ALTERED, gated_norm=True),
    "ngpt_top1": replace(HYBRID, activation="swiglu", moe=replace(EXPERTS, top_k=1), pattern="E*"),
    "ngpt_top1_softmax": replace(HYBRID, moe=replace(ALTERED, top_k=1), pattern="*E"),
    "ngpt_mamba": replace(HYBRID, pattern="M-M"),
    "gpt_hybrid": replace(HYBRID, architecture="gpt"),
    "gpt_hybrid_swiglu": replace(HYBRID, architecture="gpt", activation="swiglu", moe=replace(EXPERTS, score="softmax")),
}
_covered = {spec.activation for spec in SPECS.values()}
SPECS |= {f"{name}_hybrid": replace(HYBRID, activation=name) for name in TABLE if name not in _covered}
CACHED = ["ngpt", "gpt", "ngpt_hybrid", "ngpt_hybrid_altered", "ngpt_mamba", "gpt_hybrid"]
EXACT, FP32 = 1e-10, 1e-5  # largest difference of logits


@pytest.fixture(params=SPECS)
def spec(request) -> ModelSpec:
    return SPECS[request.param]


@pytest.fixture(params=CACHED)
def model(request) -> NGPTForCausalLM:
    return built(SPECS[request.param])[0].float().eval()


def config_of(spec: ModelSpec, **changes) -> NGPTConfig:
    moe, mamba = spec.moe or MoeSpec(0, 0, 0), spec.mamba or MambaSpec(0, 0, 1, 0)
    fields = dict(
        architecture=spec.architecture,
        layer_pattern=spec.pattern or "*-" * spec.num_layers,
        vocab_size=spec.vocab,
        hidden_size=spec.hidden,
        intermediate_size=spec.ffn,
        num_attention_heads=spec.heads,
        num_key_value_heads=spec.groups,
        head_dim=spec.head_dim,
        hidden_act=TABLE[spec.activation].hidden_act,
        gated_mlp=TABLE[spec.activation].gated,
        tie_word_embeddings=spec.tied,
        rope_theta=spec.rope_base if spec.rope else None,
        rms_norm_eps=spec.norm_epsilon,
        fine_grained=spec.fine_grained,
        alpha_init=spec.alpha_init,
        sz_init=spec.sz_init,
        n_routed_experts=moe.experts,
        num_experts_per_tok=moe.top_k,
        moe_intermediate_size=moe.ffn,
        moe_shared_expert_intermediate_size=moe.shared_ffn,
        router_score=moe.score,
        routed_scaling_factor=moe.scaling,
        router_input="scaled" if moe.scaled_input else "unit",
        shared_suv=moe.shared_suv,
        mamba_num_heads=mamba.heads,
        mamba_head_dim=mamba.head_dim,
        ssm_state_size=mamba.state,
        n_groups=mamba.groups,
        conv_kernel=spec.conv_kernel,
        chunk_size=4,
        mamba_gated_norm=spec.gated_norm,
        logit_scale=spec.architecture == "ngpt",
        initializer_range=0.3,
    )
    return NGPTConfig(**fields | changes)


def feed_forward(p: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    names = {"up_proj.weight": "fc1", "gate_proj.weight": "gate", "down_proj.weight": "fc2"}
    if f"{prefix}.gate" in p:
        names["up_proj.weight"] = "up"
    out = {name: p[f"{prefix}.{own}"] for name, own in names.items() if f"{prefix}.{own}" in p}
    return out | joined_suv(p, prefix)


def joined_suv(p: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    parts = [p[f"{prefix}.{name}"] for name in ("suv", "suv_gate", "suv_up") if f"{prefix}.{name}" in p]
    return {"suv": torch.cat(parts)} if parts else {}


def expert_layer(p: dict[str, Tensor], prefix: str, spec: ModelSpec) -> dict[str, Tensor]:
    out = {"gate.weight": p[f"{prefix}.router"], "gate.e_score_correction_bias": p[f"{prefix}.bias"]}
    experts = [feed_forward(p, f"{prefix}.experts.{number}") for number in range(spec.moe.experts)]
    gated = TABLE[spec.activation].gated
    ups, name = (("gate_proj.weight", "up_proj.weight"), "gate_up_proj") if gated else (("up_proj.weight",), "up_proj")
    out[f"experts.{name}"] = torch.stack([torch.cat([expert[up] for up in ups]) for expert in experts])
    out["experts.down_proj"] = torch.stack([expert["down_proj.weight"] for expert in experts])
    suv = joined_suv(p, prefix) or ({"suv": torch.stack([expert["suv"] for expert in experts])} if "suv" in experts[0] else {})
    out |= {f"experts.{key}": value for key, value in suv.items()}
    return out | {f"shared_experts.{key}": value for key, value in feed_forward(p, f"{prefix}.shared").items()}


def weights_of(p: dict[str, Tensor], spec: ModelSpec) -> dict[str, Tensor]:
    """The reference's parameters under the names of the Hugging Face model."""
    out = {"model.embeddings.weight": p["embedding"], "lm_head.weight": p["embedding"] if spec.tied else p["head"]}
    out |= {"logit_scale": p["sz"]} if spec.architecture == "ngpt" else {"model.norm_f.weight": p["final_norm"]}
    for index, (prefix, kind) in enumerate(spec.sub_blocks()):
        layer = f"model.layers.{index}"
        if kind == "attn":
            names = {"q": "q_proj.weight", "k": "k_proj.weight", "v": "v_proj.weight", "proj": "o_proj.weight", "sqk": "sqk"}
        elif kind == "mamba":
            names = {"in_proj": "in_proj.weight", "in_scale": "in_scale", "conv_bias": "conv1d.bias", "norm": "norm.weight"}
            names |= {"out_proj": "out_proj.weight", "dt_bias": "dt_bias", "A_log": "A_log", "D": "D"}
            out[f"{layer}.mixer.conv1d.weight"] = p[f"{prefix}.conv_weight"][:, None]
        else:
            names, mixer = {}, feed_forward(p, prefix) if kind == "mlp" else expert_layer(p, prefix, spec)
            out |= {f"{layer}.mixer.{key}": value for key, value in mixer.items()}
        out |= {f"{layer}.mixer.{name}": p[f"{prefix}.{own}"] for own, name in names.items() if f"{prefix}.{own}" in p}
        norm = "norm_before" if kind in ("mamba", "moe") else "norm"
        out |= {f"{layer}.alpha": p[f"{prefix}.alpha"]} if spec.architecture == "ngpt" else {f"{layer}.norm.weight": p[f"{prefix}.{norm}"]}
    return out


def built(spec: ModelSpec, **changes) -> tuple[NGPTForCausalLM, dict[str, Tensor]]:
    """A fp64 model with the random parameters of the reference, and these."""
    params = random_params(spec, torch.Generator().manual_seed(1))
    model = NGPTForCausalLM(config_of(spec, **changes)).double().eval()
    model.load_state_dict(weights_of(params, spec), strict=True)
    return model, params


def tokens_of(model_or_spec, batch: int = 2, length: int = 11) -> Tensor:
    return torch.randint(17, (batch, length), generator=torch.Generator().manual_seed(2))


def states_of(cache: DynamicCache) -> list[Tensor]:
    """Of the Mamba layers; before 5.24 layers without a state have a place for one, too."""
    states = [layer.recurrent_states[0] for layer in cache.layers if hasattr(layer, "recurrent_states")]
    return [state for state in states if state is not None]


def apart(a: Tensor, b: Tensor) -> float:
    return (a.double() - b.double()).abs().max().item()


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_logits_and_loss_equal_those_of_the_reference(spec, attention):
    model, params = built(spec, attn_implementation=attention)
    tokens = tokens_of(spec)
    expected = reference_logits(params, spec, tokens)
    with torch.no_grad():
        out = model(tokens, labels=tokens)
        assert model.config._attn_implementation == attention and out.logits.dtype == torch.float64
        assert apart(out.logits, expected) < EXACT * expected.abs().max()
        assert apart(out.loss, reference_loss(params, spec, tokens[:, :-1], tokens[:, 1:])) < 1e-6  # transformers' loss is fp32
        assert apart(model.float()(tokens).logits, expected) < FP32 * expected.abs().max()


@torch.no_grad()
def test_inputs_of_output_projections_have_unit_norm_where_fine_grained(spec):
    """The logits cannot see it: the residual step takes the length off what a projection gives."""
    model, norms = built(spec)[0], []
    for name, module in model.named_modules():
        if name.endswith(("o_proj", "down_proj", "out_proj")):
            module.register_forward_pre_hook(lambda module, args: norms.append(args[0].norm(dim=-1)))
    model(tokens_of(spec))
    off = max(apart(norm, torch.ones(1)) for norm in norms)
    assert (off < 1e-6) if spec.architecture == "ngpt" and spec.fine_grained else (off > 1e-3), off


def test_the_scan_does_not_depend_on_how_it_is_cut():
    generator = torch.Generator().manual_seed(3)
    x, B, C = (torch.randn(2, 13, *shape, dtype=torch.float64, generator=generator) for shape in ((4, 3), (2, 5), (2, 5)))
    dt, A = torch.rand(2, 13, 4, dtype=torch.float64, generator=generator), -torch.rand(4, dtype=torch.float64, generator=generator)
    state = torch.randn(2, 4, 3, 5, dtype=torch.float64, generator=generator)
    y, last = ssd_scan(x, dt, A, B, C, 1, state)
    for chunk_size in (4, 13, 64):
        for whole, cut in zip((y, last), ssd_scan(x, dt, A, B, C, chunk_size, state), strict=True):
            torch.testing.assert_close(whole, cut, rtol=1e-11, atol=1e-12)
    for token in range(13):
        now = slice(token, token + 1)
        y_now, state = ssd_scan(x[:, now], dt[:, now], A, B[:, now], C[:, now], 4, state)
        torch.testing.assert_close(y_now, y[:, now], rtol=1e-11, atol=1e-12)
    torch.testing.assert_close(state, last, rtol=1e-11, atol=1e-12)


@torch.no_grad()
def test_a_cache_changes_nothing(model):
    """Token by token, in chunks, and under both names of the argument."""
    tokens = tokens_of(model)
    expected = model(tokens, use_cache=False).logits
    for cuts in ([1] * 11, [6, 5], [5, 1, 1, 4], [2, 2, 7]):
        for name in ("cache", "past_key_values"):
            cache, found = None, []
            for part in tokens.split(cuts, dim=1):
                out = model(part, use_cache=True, **{name: cache})
                cache = getattr(out, CACHE)
                found.append(out.logits)
            assert isinstance(cache, DynamicCache)
            assert apart(torch.cat(found, 1), expected) < FP32 * expected.abs().max()


@torch.no_grad()
def test_greedy_generation_follows_the_largest_logits(model):
    tokens = tokens_of(model, length=5)
    generated = model.generate(tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=6, do_sample=False, pad_token_id=0)
    for _ in range(6):
        tokens = torch.cat([tokens, model(tokens, use_cache=False).logits[:, -1:].argmax(-1)], dim=1)
    assert torch.equal(generated, tokens)
    options = dict(do_sample=False, pad_token_id=0)
    uncached = model.generate(tokens[:, :5], attention_mask=torch.ones(2, 5), max_new_tokens=6, use_cache=False, **options)
    assert torch.equal(uncached, tokens)
    half = model.generate(tokens[:, :5], attention_mask=torch.ones(2, 5), max_new_tokens=3, return_dict_in_generate=True, **options)
    cache = getattr(half, CACHE)
    assert cache.get_seq_length() == 7  # it has not seen the newest token
    options |= {CACHE: cache, "attention_mask": torch.ones_like(half.sequences), "output_logits": True, "return_dict_in_generate": True}
    rest = model.generate(half.sequences, max_new_tokens=3, **options)
    assert torch.equal(rest.sequences, tokens)
    assert apart(torch.stack(rest.logits, 1), model(tokens, use_cache=False).logits[:, 7:10]) < FP32


@torch.no_grad()
def test_sampling_and_beams_run(model):
    tokens = tokens_of(model, length=4)
    options = dict(attention_mask=torch.ones_like(tokens), max_new_tokens=3, pad_token_id=0)
    assert model.generate(tokens, do_sample=True, num_return_sequences=2, **options).shape == (4, 7)
    assert model.generate(tokens, do_sample=False, num_beams=2, **options).shape == (2, 7)


@torch.no_grad()
def test_other_ways_to_generate_give_the_same_tokens(model):
    tokens = tokens_of(model, length=5)
    options = dict(attention_mask=torch.ones_like(tokens), max_new_tokens=4, pad_token_id=0, do_sample=False)
    told = dict(output_logits=True, return_dict_in_generate=True)
    grown, static = (model.generate(tokens, cache_implementation=kind, **told, **options) for kind in ("dynamic", "static"))
    for a, b in zip(grown.logits, static.logits, strict=True):  # a mask hides the rest of a static cache
        assert apart(a, b) < FP32 * a.abs().max()
    expected = grown.sequences
    assert torch.equal(static.sequences, expected)
    assert torch.equal(model.generate(tokens, prefill_chunk_size=2, **options), expected)
    assert torch.equal(model.generate(inputs_embeds=model.get_input_embeddings()(tokens), **options), expected[:, 5:])


@torch.no_grad()
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_padding_on_the_left_changes_nothing(model, attention):
    """Whatever the padding tokens are: neither attention nor convolution nor state has seen them."""
    model.set_attn_implementation(attention)
    long, short = tokens_of(model, 1, 9), tokens_of(model, 1, 5)
    batch = torch.cat([long, torch.cat([torch.full((1, 4), 7), short], dim=1)])
    mask = torch.ones_like(batch)
    mask[1, :4] = 0
    out = model(batch, attention_mask=mask, use_cache=True)
    alone = [model(tokens, use_cache=False).logits[0] for tokens in (long, short)]
    assert apart(out.logits[0], alone[0]) < FP32 * alone[0].abs().max()
    assert apart(out.logits[1, 4:], alone[1]) < FP32 * alone[1].abs().max()

    options = dict(max_new_tokens=5, do_sample=False, pad_token_id=7, output_logits=True, return_dict_in_generate=True)
    together = model.generate(batch, attention_mask=mask, **options)
    for row, tokens in enumerate((long, short)):
        single = model.generate(tokens, attention_mask=torch.ones_like(tokens), **options)
        assert torch.equal(together.sequences[row, -5:], single.sequences[0, -5:])
        for a, b in zip(together.logits, single.logits, strict=True):
            assert apart(a[row], b[0]) < FP32 * b.abs().max()


@torch.no_grad()
def test_padding_inside_a_later_chunk_leaves_the_state_alone():
    model = built(SPECS["ngpt_mamba"])[0]
    tokens, options = tokens_of(model, 1, 6), dict(use_cache=True)
    cache = getattr(model(tokens[:, :4], **options), CACHE)
    before = [state.clone() for state in states_of(cache)]
    model(tokens[:, 4:], attention_mask=torch.tensor([[1, 1, 1, 1, 0, 0]]), past_key_values=cache, **options)
    assert len(before) == 2 and all(torch.equal(a, b) for a, b in zip(before, states_of(cache), strict=True))


@torch.no_grad()
def test_only_the_wanted_logits_are_computed(model):
    tokens = tokens_of(model)
    whole = model(tokens).logits
    assert model(tokens, logits_to_keep=2).logits.shape == (2, 2, 17)
    assert apart(model(tokens, logits_to_keep=2).logits, whole[:, -2:]) < 1e-6
    assert apart(model(tokens, logits_to_keep=torch.tensor([1, 4])).logits, whole[:, [1, 4]]) < 1e-6


@torch.no_grad()
def test_hidden_states_attentions_and_tuples_are_returned():
    model = built(SPECS["ngpt_hybrid"], attn_implementation="eager")[0]
    out = model(tokens_of(model), output_hidden_states=True, output_attentions=True)
    assert len(out.hidden_states) == 7 and len(out.attentions) == 1
    assert all(apart(h.norm(dim=-1), torch.ones(2, 11)) < 1e-9 for h in out.hidden_states)
    assert apart(out.attentions[0].sum(-1), torch.ones(2, 4, 11)) < 1e-9
    assert torch.equal(model(tokens_of(model), return_dict=False)[0], out.logits)


@torch.no_grad()
def test_scales_router_and_state_stay_fp32_in_bf16(spec, tmp_path):
    model = built(spec)[0].float()
    model.save_pretrained(tmp_path)
    low = NGPTForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    small = (*STORED, "A_log", "D", "dt_bias", "gate.weight", "e_score_correction_bias")
    for name, value in low.state_dict().items():
        wide = name.endswith(tuple(f".{part}" for part in small)) or name == "logit_scale"
        assert value.dtype == (torch.float32 if wide else torch.bfloat16), name
        if wide:
            assert torch.equal(value, model.state_dict()[name]), name
    assert {value.dtype for value in NGPTForCausalLM._from_config(config_of(spec), dtype=torch.bfloat16).state_dict().values()} == {
        value.dtype for value in low.state_dict().values()
    }
    tokens = tokens_of(spec)
    out = low(tokens, use_cache=True, output_hidden_states=True)
    assert {h.dtype for h in out.hidden_states} == {torch.bfloat16} and out.logits.dtype == torch.float32
    states = states_of(getattr(out, CACHE))
    assert len(states) == (spec.pattern or "").count("M") and {state.dtype for state in states} <= {torch.float32}
    # The same rounded weights in fp32: what is left is the rounding of activations. Another choice of an expert is none of it.
    same = NGPTForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16).float()(tokens).logits
    typical = (out.logits - same).abs().median() / same.abs().max()
    assert typical < 0.02, typical


@torch.no_grad()
def test_fp64_from_a_folder_computes_with_its_fp32_scales(tmp_path):
    model, tokens = built(SPECS["ngpt_hybrid_coarse"])[0].float(), tokens_of(HYBRID)
    model.save_pretrained(tmp_path)
    mixed = NGPTForCausalLM.from_pretrained(tmp_path, dtype=torch.float64)
    assert {param.dtype for param in mixed.parameters()} == {torch.float32, torch.float64}
    assert apart(mixed(tokens).logits, model.double()(tokens).logits) < 1e-6


def test_gradient_checkpointing_changes_no_gradient(model):
    tokens, found = tokens_of(model), []
    model.train()
    for enabled in (False, True):
        if enabled:
            model.gradient_checkpointing_enable()
        model.zero_grad()
        out = model(tokens, labels=tokens, use_cache=enabled)
        assert getattr(out, CACHE) is None  # layers that run again would write to it again
        out.loss.backward()
        found.append({name: param.grad.clone() for name, param in model.named_parameters()})
    assert len(found[0]) == len(list(model.parameters()))
    for name, grad in found[0].items():
        assert torch.equal(grad, found[1][name]), name


def test_gradients_of_fp32_equal_those_of_the_reference(spec):
    model, params = built(spec)
    tokens = tokens_of(spec)
    leaves = {name: value.requires_grad_() for name, value in params.items()}
    reference_loss(leaves, spec, tokens[:, :-1], tokens[:, 1:]).backward()
    model(tokens, labels=tokens).loss.backward()
    grads = weights_of({name: torch.zeros_like(value) if value.grad is None else value.grad for name, value in leaves.items()}, spec)
    largest = max(grad.abs().max() for grad in grads.values())
    for name, param in model.named_parameters():
        assert apart(param.grad, grads[name]) < 1e-6 * largest, name


def unit_norm_dims(spec: ModelSpec) -> dict[str, int]:
    """Names of the matrices of unit norm, and the dimension of the stream."""
    reads = ("embeddings", "lm_head", "q_proj", "k_proj", "v_proj", "up_proj", "gate_proj", "gate_up_proj", "in_proj")
    dims = dict.fromkeys(reads, -1) | dict.fromkeys(("o_proj", "down_proj", "out_proj"), -2)
    found = {
        name: dims.get(name.removesuffix(".weight").split(".")[-1]) for name in weights_of(random_params(spec, torch.Generator()), spec)
    }
    return {name: dim for name, dim in found.items() if dim is not None}


@torch.no_grad()
def test_random_weights_and_retraction_have_unit_norms(spec):
    torch.manual_seed(4)
    model = NGPTForCausalLM(config_of(spec))
    tokens, dims = tokens_of(spec), unit_norm_dims(spec)
    assert len(dims) > 4 and model(tokens).logits.isfinite().all()
    for name, param in model.named_parameters():
        assert param.isfinite().all() and (
            param.std() > 0 or name.endswith((*STORED, "norm.weight", "norm_f.weight", ".D", "conv1d.bias"))
        ), name
        if name.split(".")[-1] in STORED:
            assert torch.equal(param, torch.full_like(param, spec.hidden ** STORED[name.split(".")[-1]]))
        if name in dims and spec.architecture == "ngpt":
            assert apart(param.norm(dim=dims[name]), torch.ones(1)) < 1e-5, name
        param.add_(0.1)
    before = {name: param.clone() for name, param in model.named_parameters()}
    model.retract_()
    for name, param in model.named_parameters():
        if name in dims and spec.architecture == "ngpt":
            assert apart(param.norm(dim=dims[name]), torch.ones(1)) < 1e-5, name
        else:
            assert torch.equal(param, before[name]), name


def test_a_router_can_be_retracted_and_a_folded_head_is_not():
    model = NGPTForCausalLM(config_of(HYBRID, router_normalized=True, logit_scale=False))
    with torch.no_grad():
        for param in model.parameters():
            param.mul_(3)
    model.retract_()
    names = dict(model.named_parameters())
    assert "logit_scale" not in names and apart(names["lm_head.weight"].norm(dim=-1), torch.ones(1)) > 1
    assert apart(names["model.layers.1.mixer.gate.weight"].norm(dim=-1), torch.ones(1)) < 1e-5


@torch.no_grad()
def test_a_folded_logit_scale_gives_the_same_logits():
    model = built(NGPT)[0]
    folded = NGPTForCausalLM(config_of(NGPT, logit_scale=False)).double().eval()
    weights = model.state_dict()
    weights["lm_head.weight"] = weights["lm_head.weight"] * (weights.pop("logit_scale") * 12**0.5)[:, None]
    folded.load_state_dict(weights)
    assert apart(folded(tokens_of(NGPT)).logits, model(tokens_of(NGPT)).logits) < EXACT


def test_a_few_steps_with_retraction_lower_the_loss(model):
    model.train()
    optimizer, tokens = torch.optim.Adam(model.parameters(), lr=3e-3), tokens_of(model, 4, 12)
    losses = []
    for _ in range(8):
        loss = model(tokens, labels=tokens).loss
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        model.retract_()
    assert losses[-1] < losses[0] - 0.05


def test_autocast_leaves_router_and_scan_in_fp32():
    model, tokens = built(SPECS["ngpt_hybrid"])[0].float(), tokens_of(HYBRID)
    seen = []
    model.model.layers[1].mixer.gate.register_forward_hook(lambda module, args, out: seen.append(out[0]))
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        model(tokens)
        gate, h = model.model.layers[1].mixer.gate, torch.nn.functional.normalize(torch.randn(5, 12), dim=-1)
        expected = (h.double() @ gate.weight.double().T) * 12**0.5
        assert seen[0].dtype == torch.float32 and apart(gate(h)[0], expected) < 1e-5


@pytest.mark.parametrize(
    "changes", [dict(architecture="bert"), dict(layer_pattern="*X"), dict(layer_pattern=""), dict(router_score="none")]
)
def test_a_config_that_describes_no_model_is_refused(changes):
    with pytest.raises(ValueError, match=next(iter(changes))):
        config_of(NGPT, **changes)


def test_the_config_survives_its_file(tmp_path):
    for spec in SPECS.values():
        config = config_of(spec, num_nextn_predict_layers=2, mtp_layer_pattern="*E", eos_token_id=3)
        config.save_pretrained(tmp_path)
        again = NGPTConfig.from_pretrained(tmp_path)
        assert again.to_dict() | {"transformers_version": 0} == config.to_dict() | {"transformers_version": 0}
        assert (again.rope_theta is None) == (not spec.rope)


LOAD = """
import sys, torch
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM
folder, tokens, out = sys.argv[1], torch.load(sys.argv[2]), sys.argv[3]
model, report = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, output_loading_info=True)
assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")), report
assert "transformers_modules" in type(model).__module__ and AutoConfig.from_pretrained(folder, trust_remote_code=True).layer_pattern
base = AutoModel.from_pretrained(folder, trust_remote_code=True)
model.save_pretrained(out)  # with its code, so that what is saved can be opened again
again = AutoModelForCausalLM.from_pretrained(out, trust_remote_code=True)
with torch.no_grad():
    logits = model(tokens).logits
    assert torch.equal(again(tokens).logits, logits)
    assert torch.equal(base(tokens).last_hidden_state, model.model(tokens).last_hidden_state)
save_file({"logits": logits}, out + "/logits.safetensors")
"""


def test_a_folder_opens_as_remote_code_in_a_process_of_its_own(tmp_path):
    """With prediction depths beside, which the model does not load; the repository is not on the path."""
    from safetensors.torch import load_file, save_file

    model = built(SPECS["ngpt_hybrid"])[0].float()
    tokens, folder = tokens_of(model), tmp_path / "model"
    model.config.num_nextn_predict_layers, model.config.mtp_layer_pattern = 1, "*"
    model.config.auto_map = {
        "AutoConfig": "configuration_ngpt.NGPTConfig",
        "AutoModel": "modeling_ngpt.NGPTModel",
        "AutoModelForCausalLM": "modeling_ngpt.NGPTForCausalLM",
    }
    model.save_pretrained(folder)
    weights = load_file(folder / "model.safetensors")
    save_file(weights | {"mtp.0.join.weight": torch.ones(12, 24)}, folder / "model.safetensors", metadata={"format": "pt"})
    assert {path.name for path in folder.glob("*.py")} >= {"configuration_ngpt.py", "modeling_ngpt.py"}
    torch.save(tokens, tmp_path / "tokens.pt")
    site = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    kept = os.pathsep.join(path for path in site if path and not (Path(path) / "ngpt").exists())
    environment = os.environ | {"PYTHONPATH": kept, "HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", LOAD, folder, tmp_path / "tokens.pt", tmp_path / "again"]
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    with torch.no_grad():
        assert torch.equal(load_file(tmp_path / "again" / "logits.safetensors")["logits"], model(tokens).logits)


def test_base_model_alone_is_the_stream():
    model = built(NGPT)[0]
    base = NGPTModel(config_of(NGPT)).double().eval()
    base.load_state_dict(model.model.state_dict())
    with torch.no_grad():
        assert torch.equal(base(tokens_of(NGPT)).last_hidden_state, model.model(tokens_of(NGPT)).last_hidden_state)
