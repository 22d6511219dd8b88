"""The reference itself, against computations small enough to write out by hand and against properties that MODEL.md implies."""

import math
import re
from dataclasses import replace

import pytest
import torch
from reference_activations import ACTIVATIONS

from tests.numerics.reference_model import (
    MambaSpec,
    ModelSpec,
    MoeSpec,
    auxiliary_loss,
    l2_normalize,
    lerp_retract,
    parameter_shapes,
    random_params,
    reference_logits,
    reference_loss,
    rotate,
)

NGPT = ModelSpec("ngpt", num_layers=2, hidden=10, ffn=20, heads=4, groups=2, head_dim=6, vocab=17)
GPT = replace(NGPT, architecture="gpt")
EXPERTS = MoeSpec(experts=4, top_k=3, ffn=6, shared_ffn=8, scaling=2.5, aux_loss="seq_aux_loss", aux_loss_coeff=0.1)
SOFTMAX = replace(EXPERTS, score="softmax", shared_suv=True, shared_ffn=0, aux_loss="aux_loss")
HYBRID = replace(NGPT, pattern="ME*E-", moe=EXPERTS, mamba=MambaSpec(heads=4, head_dim=3, groups=2, state=2), conv_kernel=3)
SPECS = {
    "ngpt": NGPT,
    "ngpt_coarse": replace(NGPT, fine_grained=False),
    "ngpt_swiglu_tied": replace(NGPT, activation="swiglu", tied=True),
    "ngpt_no_positions": replace(NGPT, rope=False),
    "gpt": GPT,
    "gpt_swiglu_tied": replace(GPT, activation="swiglu", tied=True),
    "ngpt_hybrid": HYBRID,
    "ngpt_hybrid_softmax": replace(HYBRID, activation="swiglu", moe=SOFTMAX, gated_norm=True),
    "gpt_hybrid": replace(HYBRID, architecture="gpt"),
}
EXACT = {"rtol": 1e-10, "atol": 1e-11}


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(1)


@pytest.fixture(params=SPECS.values(), ids=SPECS.keys())
def spec(request) -> ModelSpec:
    return request.param


def random_tokens(spec: ModelSpec, generator: torch.Generator, batch: int = 2, seq_length: int = 7) -> torch.Tensor:
    return torch.randint(spec.vocab, (batch, seq_length), generator=generator)


def unit(vector: list[float]) -> list[float]:
    length = math.sqrt(sum(v * v for v in vector))
    return [v / length for v in vector]


def times(matrix: torch.Tensor, vector: list[float]) -> list[float]:
    return [sum(m * v for m, v in zip(row, vector, strict=True)) for row in matrix.tolist()]


def step(h: list[float], b: list[float], stored_alpha: torch.Tensor) -> list[float]:
    alpha = [abs(a * 0.05 * math.sqrt(len(h))) for a in stored_alpha.tolist()]
    return unit([x + a * (y - x) for x, y, a in zip(unit(h), unit(b), alpha, strict=True)])


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_one_token_of_ngpt_equals_a_computation_by_hand(activation, generator):
    """With one token attention returns v, so everything can be written in scalars."""
    spec = ModelSpec("ngpt", 1, hidden=3, ffn=4, heads=2, groups=1, head_dim=2, vocab=5, activation=activation)
    p = random_params(spec, generator)
    h = unit(p["embedding"][4].tolist())
    v = times(p["layers.0.attn.v"], h)
    h = step(h, times(p["layers.0.attn.proj"], unit(v + v)), p["layers.0.attn.alpha"])
    reference = ACTIVATIONS[activation]
    if reference.gated:
        gate, up = times(p["layers.0.mlp.gate"], h), times(p["layers.0.mlp.up"], h)
        gate = [s * u * math.sqrt(3) for s, u in zip(p["layers.0.mlp.suv_gate"].tolist(), gate, strict=True)]
        up = [s * u * math.sqrt(3) for s, u in zip(p["layers.0.mlp.suv_up"].tolist(), up, strict=True)]
        a = [reference.by_hand(g) * u for g, u in zip(gate, up, strict=True)]
    else:
        u = times(p["layers.0.mlp.fc1"], h)
        a = [reference.by_hand(s * x * math.sqrt(3)) for s, x in zip(p["layers.0.mlp.suv"].tolist(), u, strict=True)]
    h = step(h, times(p["layers.0.mlp.fc2"], unit(a)), p["layers.0.mlp.alpha"])
    expected = [s * math.sqrt(3) * x for s, x in zip(p["sz"].tolist(), times(p["head"], h), strict=True)]
    actual = reference_logits(p, spec, torch.tensor([[4]]))
    torch.testing.assert_close(actual[0, 0], torch.tensor(expected, dtype=torch.float64), **EXACT)


@pytest.mark.parametrize("architecture", ["ngpt", "gpt"])
def test_attention_over_two_tokens_equals_a_computation_by_hand(architecture, generator):
    """One head of two dims: rotary positions turn the second token's q and k by one radian."""
    spec = ModelSpec(architecture, 1, hidden=3, ffn=4, heads=1, groups=1, head_dim=2, vocab=5, fine_grained=False)
    p, record = random_params(spec, generator), {}
    reference_logits(p, spec, torch.tensor([[2, 0]]), record)

    embedding = [p["embedding"][token].tolist() for token in (2, 0)]
    if architecture == "gpt":
        norm = p["layers.0.attn.norm"].tolist()
        rms = [math.sqrt(sum(x * x for x in row) / 3 + 1e-5) for row in embedding]
        embedding = [[x / r * w for x, w in zip(row, norm, strict=True)] for row, r in zip(embedding, rms, strict=True)]
    q, k = times(p["layers.0.attn.q"], embedding[1]), [times(p["layers.0.attn.k"], row) for row in embedding]
    v = [times(p["layers.0.attn.v"], row) for row in embedding]
    c, s = math.cos(1), math.sin(1)
    q, k[1] = [c * q[0] - s * q[1], s * q[0] + c * q[1]], [c * k[1][0] - s * k[1][1], s * k[1][0] + c * k[1][1]]
    scale = 1 / math.sqrt(2)
    if architecture == "ngpt":
        sqk = [x * math.sqrt(3) for x in p["layers.0.attn.sqk"].tolist()]
        q, k = [x * y for x, y in zip(unit(q), sqk, strict=True)], [[x * y for x, y in zip(unit(row), sqk, strict=True)] for row in k]
        scale = math.sqrt(2)
    odds = [math.exp(scale * sum(x * y for x, y in zip(q, row, strict=True))) for row in k]
    expected = [(odds[0] * v[0][i] + odds[1] * v[1][i]) / sum(odds) for i in range(2)]
    torch.testing.assert_close(record["layers.0.attn.proj_in"][0, 1], torch.tensor(expected, dtype=torch.float64), **EXACT)


def test_one_token_of_gpt_equals_a_computation_by_hand(generator):
    spec = ModelSpec("gpt", 1, hidden=3, ffn=4, heads=2, groups=1, head_dim=2, vocab=5)
    p = random_params(spec, generator)

    def norm(x: list[float], weight: torch.Tensor) -> list[float]:
        rms = math.sqrt(sum(y * y for y in x) / 3 + 1e-5)
        return [y / rms * w for y, w in zip(x, weight.tolist(), strict=True)]

    h = p["embedding"][1].tolist()
    v = times(p["layers.0.attn.v"], norm(h, p["layers.0.attn.norm"]))
    h = [x + y for x, y in zip(h, times(p["layers.0.attn.proj"], v + v), strict=True)]
    a = [max(u, 0) ** 2 for u in times(p["layers.0.mlp.fc1"], norm(h, p["layers.0.mlp.norm"]))]
    h = [x + y for x, y in zip(h, times(p["layers.0.mlp.fc2"], a), strict=True)]
    expected = torch.tensor(times(p["head"], norm(h, p["final_norm"])), dtype=torch.float64)
    torch.testing.assert_close(reference_logits(p, spec, torch.tensor([[1]]))[0, 0], expected, **EXACT)


def test_lerp_retract_stays_on_the_sphere_and_ends_where_alpha_says(generator):
    h, b = (torch.randn(5, 8, dtype=torch.float64, generator=generator) * size for size in (3.0, 0.01))
    alpha = torch.randn(8, dtype=torch.float64, generator=generator)
    ones = torch.ones(5, dtype=torch.float64)
    torch.testing.assert_close(lerp_retract(h, b, alpha).norm(dim=-1), ones, **EXACT)
    torch.testing.assert_close(lerp_retract(h, b, 0 * alpha), h / h.norm(dim=-1, keepdim=True), **EXACT)
    torch.testing.assert_close(lerp_retract(h, b, -torch.ones_like(alpha)), b / b.norm(dim=-1, keepdim=True), rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(lerp_retract(h, b, -alpha), lerp_retract(h, b, alpha), rtol=0, atol=0)
    torch.testing.assert_close(lerp_retract(7 * h, 9 * b, alpha), lerp_retract(h, b, alpha), rtol=1e-7, atol=1e-7)


def test_ngpt_hidden_states_and_weights_have_unit_norm(generator):
    params, record = random_params(NGPT, generator), {}
    reference_logits(params, NGPT, random_tokens(NGPT, generator), record)
    for name, value in record.items():
        if name.endswith(("hidden", "embedding_out", "head_in", "proj_in", "fc2_in")):
            torch.testing.assert_close(value.norm(dim=-1), torch.ones(2, 7, dtype=torch.float64), rtol=0, atol=1e-10, msg=name)
    for name, value in params.items():
        if value.dim() == 2:
            along_hidden = value.norm(dim=0) if value.shape[0] == NGPT.hidden else value.norm(dim=1)
            torch.testing.assert_close(along_hidden, torch.ones_like(along_hidden), rtol=0, atol=1e-10, msg=name)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_fine_grained_changes_what_reaches_the_output_projections_and_not_the_logits(activation, generator):
    fine = replace(NGPT, activation=activation)
    coarse = replace(fine, fine_grained=False)
    params, tokens = random_params(fine, generator), random_tokens(fine, generator)
    fine_record, coarse_record = {}, {}
    logits = reference_logits(params, fine, tokens, fine_record)
    torch.testing.assert_close(logits, reference_logits(params, coarse, tokens, coarse_record), rtol=1e-8, atol=1e-8)
    for name in ("attn.proj_in", "attn.proj_out", "mlp.fc2_in", "mlp.fc2_out"):
        after, before = fine_record[f"layers.1.{name}"], coarse_record[f"layers.1.{name}"]
        assert (after - before).abs().max() > 1e-2, name
        torch.testing.assert_close(l2_normalize(after), l2_normalize(before), rtol=1e-8, atol=1e-8)


def test_changing_a_token_changes_no_logit_before_it(spec, generator):
    params, tokens = random_params(spec, generator), random_tokens(spec, generator)
    changed = tokens.clone()
    changed[:, 4] = (changed[:, 4] + 1) % spec.vocab
    before, after = reference_logits(params, spec, tokens), reference_logits(params, spec, changed)
    torch.testing.assert_close(after[:, :4], before[:, :4], rtol=0, atol=0)
    assert ((after - before)[:, 4:].abs().amax(dim=-1) > 1e-6).all()


def test_grouped_queries_equal_full_attention_with_repeated_key_and_value_heads(spec, generator):
    params, tokens = random_params(spec, generator), random_tokens(spec, generator)
    full = dict(params)
    for name in params:
        if name.endswith((".k", ".v")):
            per_group = params[name].reshape(spec.groups, spec.head_dim, spec.hidden)
            full[name] = per_group.repeat_interleave(spec.heads // spec.groups, dim=0).reshape(-1, spec.hidden)
    expected = reference_logits(full, replace(spec, groups=spec.heads), tokens)
    torch.testing.assert_close(reference_logits(params, spec, tokens), expected, **EXACT)


def test_sqk_on_queries_squared_equals_sqk_on_queries_and_keys(generator):
    """The two forms are equal where each query head has its own key; checked on attention's output."""
    spec = ModelSpec("ngpt", 1, hidden=12, ffn=4, heads=2, groups=2, head_dim=6, vocab=9, rope=False, fine_grained=False)
    p, record = random_params(spec, generator), {}
    reference_logits(p, spec, torch.tensor([[1, 2, 3]]), record)
    sqk = (p["layers.0.attn.sqk"] * math.sqrt(12)).reshape(2, 6)
    q, k = (sqk * l2_normalize(record[f"layers.0.attn.{name}_out"].reshape(1, 3, 2, 6)) for name in "qk")
    v = record["layers.0.attn.v_out"].reshape(1, 3, 2, 6)
    heads = [x.transpose(1, 2) for x in (q, k, v)]
    expected = torch.nn.functional.scaled_dot_product_attention(*heads, is_causal=True, scale=math.sqrt(6))
    torch.testing.assert_close(record["layers.0.attn.proj_in"], expected.transpose(1, 2).reshape(1, 3, 12), **EXACT)


def test_rope_scores_depend_only_on_the_distance_and_keep_lengths(generator):
    q, k = (torch.randn(6, dtype=torch.float64, generator=generator).expand(1, 9, 1, 6) for _ in range(2))
    rotated_q, rotated_k = rotate(q, 100.0), rotate(k, 100.0)
    torch.testing.assert_close(rotated_q.norm(dim=-1), q.norm(dim=-1), **EXACT)
    scores = rotated_q[0, :, 0] @ rotated_k[0, :, 0].T
    for distance in range(-8, 9):
        diagonal = scores.diagonal(distance)
        torch.testing.assert_close(diagonal, diagonal[:1].expand_as(diagonal), **EXACT)
    assert (scores[0, 1:] - scores[0, 0]).abs().min() > 1e-3


def test_rope_turns_pairs_half_a_head_apart_by_the_stated_angles():
    x = torch.zeros(1, 4, 1, 6, dtype=torch.float64)
    x[..., 1] = 1.0
    angle = 3 * 100.0 ** (-2 / 6)
    expected = torch.tensor([0, math.cos(angle), 0, 0, math.sin(angle), 0], dtype=torch.float64)
    torch.testing.assert_close(rotate(x, 100.0)[0, 3, 0], expected, **EXACT)


@pytest.mark.parametrize("score", ["sigmoid", "softmax"])
def test_an_expert_layer_equals_a_computation_by_hand(score, generator):
    """One token, two of three experts: the bias decides which, the scores without it how much."""
    moe = MoeSpec(experts=3, top_k=2, ffn=9, score=score, scaling=1.5, aux_loss="seq_aux_loss", aux_loss_coeff=0.2)
    spec = replace(NGPT, hidden=3, vocab=5, pattern="E", moe=moe)
    p, record = random_params(spec, generator), {}
    p["layers.0.moe.bias"] = torch.tensor([0.0, 10.0, 20.0], dtype=torch.float64)
    reference_logits(p, spec, torch.tensor([[4]]), record)
    h = p["embedding"][4].tolist()
    logits = [math.sqrt(3) * u for u in times(p["layers.0.moe.router"], h)]
    scores = [1 / (1 + math.exp(-u)) if score == "sigmoid" else math.exp(u) for u in logits]
    y = [0.0] * 3
    for e in (1, 2):
        suv = p[f"layers.0.moe.experts.{e}.suv"].tolist()
        u = [s * x * math.sqrt(3) for s, x in zip(suv, times(p[f"layers.0.moe.experts.{e}.fc1"], h), strict=True)]
        out = times(p[f"layers.0.moe.experts.{e}.fc2"], unit([max(x, 0) ** 2 for x in u]))
        y = [a + 1.5 * scores[e] / (scores[1] + scores[2]) * b for a, b in zip(y, out, strict=True)]
    torch.testing.assert_close(record["layers.0.moe.out"][0, 0], torch.tensor(y, dtype=torch.float64), **EXACT)
    assert record["layers.0.moe.loads"].tolist() == [[0, 1, 1]]
    best = sorted(scores)[-2:]  # the loss knows no bias
    assert record["layers.0.moe.aux_loss"].item() == pytest.approx(0.2 * 3 * sum(best) / 2 / sum(scores), rel=1e-12)


def test_balanced_experts_cost_the_coefficient_and_a_single_busy_one_more(generator):
    moe = MoeSpec(experts=4, top_k=1, ffn=2, aux_loss="aux_loss", aux_loss_coeff=1.0, scaled_input=False)
    spec = replace(NGPT, hidden=4, vocab=4, pattern="E", moe=moe)
    p, record = random_params(spec, generator), {}
    p["embedding"] = torch.eye(4, dtype=torch.float64)
    p["layers.0.moe.router"] = 100 * torch.eye(4, dtype=torch.float64) - 50
    reference_logits(p, spec, torch.tensor([[0, 1, 2, 3]]), record)
    assert record["layers.0.moe.aux_loss"].item() == pytest.approx(1.0)
    reference_logits(p, spec, torch.tensor([[2, 2, 2, 2]]), record)
    assert record["layers.0.moe.aux_loss"].item() == pytest.approx(4.0)


def test_a_mixer_scale_of_one_equals_an_in_proj_that_is_longer(generator):
    """nGPT's scale on the mixer's input is the same function as longer rows of in_proj in the control's mixer."""
    spec = replace(HYBRID, pattern="M", fine_grained=False)
    p, ours = random_params(spec, generator), {}
    tokens = random_tokens(spec, generator)
    reference_logits(p, spec, tokens, ours)
    q = dict(p)
    q["layers.0.mamba.in_proj"] = p["layers.0.mamba.in_scale"][:, None] * math.sqrt(spec.hidden) * p["layers.0.mamba.in_proj"]
    q["layers.0.mamba.in_scale"] = torch.full_like(p["layers.0.mamba.in_scale"], 1 / math.sqrt(spec.hidden))
    theirs = {}
    reference_logits(q, spec, tokens, theirs)
    torch.testing.assert_close(ours["layers.0.mamba.out_proj_in"], theirs["layers.0.mamba.out_proj_in"], **EXACT)


def test_a_zero_row_gives_zero_and_finite_gradients(generator):
    x = torch.zeros(2, 5, dtype=torch.float64, requires_grad=True)
    b = torch.zeros(2, 5, dtype=torch.float64, requires_grad=True)
    assert l2_normalize(x).eq(0).all()
    out = lerp_retract(x, b, torch.full((5,), 0.3, dtype=torch.float64))
    assert out.eq(0).all()
    assert all(gradient.isfinite().all() for gradient in torch.autograd.grad(out.sum(), (x, b)))

    params = {name: value.requires_grad_() for name, value in random_params(NGPT, generator).items()}
    with torch.no_grad():
        params["embedding"][3] = 0
    loss = reference_loss(params, NGPT, torch.tensor([[3, 1, 3]]), torch.tensor([[1, 3, 2]]))
    assert loss.isfinite()
    assert all(gradient.isfinite().all() for gradient in torch.autograd.grad(loss, list(params.values())))


def test_loss_is_the_mean_cross_entropy_in_nats_over_kept_tokens(spec, generator):
    params = random_params(spec, generator)
    tokens, labels = random_tokens(spec, generator), random_tokens(spec, generator)
    logits = reference_logits(params, spec, tokens).flatten(0, 1)
    expected = torch.nn.functional.cross_entropy(logits, labels.flatten(), reduction="none")
    torch.testing.assert_close(reference_loss(params, spec, tokens, labels), expected.mean(), **EXACT)
    mask = torch.ones_like(tokens)
    mask[0, 2:] = 0
    masked = reference_loss(params, spec, tokens, labels, loss_mask_BS=mask)
    torch.testing.assert_close(masked, expected[mask.flatten().bool()].mean(), **EXACT)
    last = "sz" if spec.architecture == "ngpt" else "final_norm"
    silent = params | {last: torch.zeros_like(params[last])}
    assert reference_loss(silent, spec, tokens, labels).item() == pytest.approx(math.log(spec.vocab), abs=1e-12)


def test_every_parameter_gets_the_gradient_that_finite_differences_give(spec, generator):
    spec = replace(spec, num_layers=1)
    params = {name: value.requires_grad_() for name, value in random_params(spec, generator).items()}
    tokens, labels = random_tokens(spec, generator, 1, 9), random_tokens(spec, generator, 1, 9)

    def loss(values: dict[str, torch.Tensor]) -> torch.Tensor:
        record = {}
        return reference_loss(values, spec, tokens, labels, record=record) + auxiliary_loss(record)

    trained = {name: value for name, value in params.items() if not name.endswith(".bias")}
    gradients = dict(zip(trained, torch.autograd.grad(loss(params), list(trained.values())), strict=True))
    together: dict[str, list[str]] = {}  # the experts of a layer move at once
    for name, gradient in gradients.items():
        assert gradient.abs().max() > 1e-7, name
        together.setdefault(re.sub(r"experts\.\d+", "experts", name), []).append(name)
    for kind, names in together.items():
        directions = {name: torch.randn(gradients[name].shape, dtype=torch.float64, generator=generator) for name in names}
        with torch.no_grad():
            high, low = (loss(params | {name: params[name] + e * directions[name] for name in names}) for e in (1e-6, -1e-6))
        expected = sum((gradients[name] * directions[name]).sum().item() for name in names)
        assert ((high - low) / 2e-6).item() == pytest.approx(expected, rel=1e-5, abs=1e-8), kind


def test_the_record_names_every_projection_and_reaches_the_graph(spec, generator):
    params = {name: value.requires_grad_() for name, value in random_params(spec, generator).items()}
    record = {}
    logits = reference_logits(params, spec, random_tokens(spec, generator), record)
    names = {
        "attn": {"qkv_in", "q_out", "k_out", "v_out", "proj_in", "proj_out", "hidden"},
        "mlp": {"fc1_in", "fc1_out", "fc2_in", "fc2_out", "hidden"},
        "mamba": {"out_proj_in", "out_proj_out", "hidden"},
        "moe": {"out", "aux_loss", "loads", "hidden"},
    }
    expected = {"embedding_out", "head_in", "head_out"}
    for prefix, kind in spec.sub_blocks():
        expected |= {f"{prefix}.{name}" for name in names[kind]}
    assert set(record) == expected
    for prefix, kind in spec.sub_blocks():
        projection = {"attn": "proj", "mlp": "fc2", "mamba": "out_proj"}.get(kind)
        if projection:
            entering, leaving = record[f"{prefix}.{projection}_in"], record[f"{prefix}.{projection}_out"]
            torch.testing.assert_close(entering @ params[f"{prefix}.{projection}"].T, leaving, **EXACT)
            assert torch.autograd.grad(logits.sum(), entering, retain_graph=True)[0].abs().max() > 0


def test_random_parameters_have_the_stated_shapes_and_vary(spec, generator):
    params = random_params(spec, generator)
    assert {name: tuple(value.shape) for name, value in params.items()} == parameter_shapes(spec)
    for name, value in params.items():
        if name.endswith("alpha"):
            assert (value < 0).any() and (value > 0).any()
        if value.dim() == 1:
            assert value.abs().max() / value.abs().min() > 1.2, name
