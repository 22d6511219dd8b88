"""What stands in for mamba-ssm's kernels takes what Megatron's mixer passes and computes what the kernels are specified to.

The whole mixer is compared with a reference in tests/numerics/test_mamba_against_reference.py.
"""

import ast
import inspect

import pytest
import torch
from reference_mamba import MambaSpec, between_projections, grouped_rms_norm, recurrence, silu
from torch import Tensor

from megatron_ext.compat import mamba_on_cpu

MIXER = "core/ssm/mamba_mixer.py"
SPEC = MambaSpec(heads=4, head_dim=3, groups=2, state=5)
INNER, VECTORS = SPEC.heads * SPEC.head_dim, SPEC.groups * SPEC.state
REPLACED = [
    "HAVE_MAMBA_SSM",
    "MAMBA_HAS_STATE_DTYPE",
    "causal_conv1d_fn",
    "ExtendedRMSNorm",
    "mamba_chunk_scan_combined",
    "mamba_split_conv1d_scan_combined",
    "_check_mamba_sequence_packing_support",
]


@pytest.fixture
def mixer_module(monkeypatch):
    """The mixer's module, its names restored after the test."""
    from megatron.core.ssm import mamba_mixer

    for name in REPLACED:
        monkeypatch.setattr(mamba_mixer, name, getattr(mamba_mixer, name))
    return mamba_mixer


@pytest.fixture
def calls(upstream_source):
    """Calls of a name in a method of upstream's mixer."""

    def find(method: str, name: str) -> list[ast.Call]:
        tree = ast.parse(inspect.cleandoc("\n" + upstream_source(MIXER, f"MambaMixer.{method}")))
        found = [node for node in ast.walk(tree) if isinstance(node, ast.Call) and ast.unparse(node.func) == name]
        assert found, f"{method} no longer calls {name}"
        return found

    return find


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def make_params() -> dict[str, Tensor]:
    width = INNER + 2 * VECTORS
    params = {"conv_weight": normal(width, 4), "conv_bias": normal(width, seed=1), "dt_bias": normal(SPEC.heads, seed=2) - 1}
    return params | {"A_log": 0.5 + normal(SPEC.heads, seed=3).abs(), "D": normal(SPEC.heads, seed=4)}


def split_call(zxbcdt: Tensor, params: dict[str, Tensor], **options):
    p = params
    weights = (p["conv_weight"], p["conv_bias"], p["dt_bias"], -torch.exp(p["A_log"]), p["D"])
    return mamba_on_cpu.mamba_split_conv1d_scan_combined(
        zxbcdt, *weights, chunk_size=4, headdim=SPEC.head_dim, ngroups=SPEC.groups, **options
    )


def test_upstream_still_refuses_a_mixer_without_mamba_ssm(upstream_source):
    assert "if not HAVE_MAMBA_SSM:\n            raise ImportError(" in upstream_source(MIXER, "MambaMixer.__init__")


def test_upstream_still_looks_the_replaced_names_up_in_its_module(upstream_source, mixer_module):
    text = upstream_source(MIXER, "MambaMixer")
    assert [name for name in REPLACED if name not in text] == []
    assert [name for name in REPLACED if not hasattr(mixer_module, name)] == []


@pytest.mark.parametrize(
    "method, name, stand_in",
    [
        ("_ssm_training", "mamba_split_conv1d_scan_combined", mamba_on_cpu.mamba_split_conv1d_scan_combined),
        ("_ssm_prefill", "mamba_chunk_scan_combined", mamba_on_cpu.mamba_chunk_scan_combined),
        ("__init__", "ExtendedRMSNorm", mamba_on_cpu.RMSNorm),
        ("_ssm_training", "_check_mamba_sequence_packing_support", mamba_on_cpu._check_sequence_packing_support),
    ],
)
def test_stand_ins_take_the_arguments_that_upstream_passes(calls, method, name, stand_in):
    """`**state_dtype_kwarg` of upstream has no name here: it is empty, as MAMBA_HAS_STATE_DTYPE is false."""
    for call in calls(method, name):
        keywords = {keyword.arg: None for keyword in call.keywords if keyword.arg}
        inspect.signature(stand_in).bind(*call.args, **keywords)


def test_upstream_still_multiplies_by_the_gate_inside_the_scan_and_normalises_after_it(calls):
    (norm,) = calls("_ssm_training", "self.norm")
    assert ast.unparse(norm) == "self.norm(y)"
    (scan,) = calls("_ssm_training", "mamba_split_conv1d_scan_combined")
    assert "rmsnorm_weight" not in {keyword.arg for keyword in scan.keywords}


def test_installation_replaces_every_name_and_can_be_repeated(mixer_module):
    for name in REPLACED:
        setattr(mixer_module, name, lambda: pytest.fail("upstream's, as with mamba-ssm and causal-conv1d installed"))
    assert mamba_on_cpu.install() and mamba_on_cpu.install()
    assert mixer_module.HAVE_MAMBA_SSM is True and mixer_module.ExtendedRMSNorm is mamba_on_cpu.RMSNorm
    assert not mixer_module.MAMBA_HAS_STATE_DTYPE and mixer_module.causal_conv1d_fn is None
    for name in ("mamba_chunk_scan_combined", "mamba_split_conv1d_scan_combined"):
        assert getattr(mixer_module, name) is getattr(mamba_on_cpu, name)
    assert mixer_module._check_mamba_sequence_packing_support(for_inference_not_training=False)[0]
    assert not mixer_module._check_mamba_sequence_packing_support()[0]


@pytest.mark.parametrize("seq_idx", [None, torch.tensor([[0] * 3 + [1] * 6, [0] * 8 + [1]])], ids=["whole", "documents"])
def test_everything_between_the_projections(seq_idx):
    leaves = [normal(2, 9, 2 * INNER + 2 * VECTORS + SPEC.heads, seed=5), *make_params().values()]
    found = []
    for function in (split_call, lambda zxbcdt, params, seq_idx: between_projections(params, SPEC, zxbcdt, seq_idx)):
        zxbcdt, *weights = (leaf.detach().clone().requires_grad_() for leaf in leaves)
        out = function(zxbcdt, dict(zip(make_params(), weights, strict=True)), seq_idx=seq_idx)
        found.append([out, *torch.autograd.grad((normal(*out.shape, seed=6) * out).sum(), [zxbcdt, *weights])])
    for actual, truth in zip(*found, strict=True):
        torch.testing.assert_close(actual, truth, rtol=1e-11, atol=1e-11)


def test_bf16_goes_in_and_comes_out_rounded_once_and_states_are_fp32():
    x, B, C, z = (
        normal(*shape, seed=seed).bfloat16() for seed, shape in enumerate([(2, 9, 4, 3), (2, 9, 2, 5), (2, 9, 2, 5), (2, 9, 4, 3)])
    )
    dt, rate, skip = normal(2, 9, 4, seed=4).abs().bfloat16(), -normal(4, seed=5).abs().float(), normal(4, seed=6).float()
    out, states = mamba_on_cpu.mamba_chunk_scan_combined(x, dt, rate, B, C, 4, D=skip, z=z, return_final_states=True)
    assert (out.dtype, states.dtype) == (torch.bfloat16, torch.float32)
    y, _ = recurrence(*(value.double() for value in (x, dt, rate, B, C, skip)), torch.zeros(2, 4, 3, 5, dtype=torch.float64))
    truth = y * silu(z.double())
    assert ((out.double() - truth).abs() <= truth.abs() * 2**-8 * 1.001 + 1e-6 * truth.abs().max()).all()


def test_step_limits_initial_states_and_a_skip_for_each_feature_reach_the_scan():
    x, B, C = normal(2, 9, 4, 3), normal(2, 9, 2, 5, seed=1), normal(2, 9, 2, 5, seed=2)
    dt, bias, rate = normal(2, 9, 4, seed=3), normal(4, seed=4), -normal(4, seed=5).abs()
    skip, z, initial = normal(4, 3, seed=6), normal(2, 9, 4, 3, seed=7), normal(2, 4, 3, 5, seed=8)
    options = dict(D=skip, z=z, dt_bias=bias, initial_states=initial, dt_limit=(0.3, 0.9), return_final_states=True)
    for softplus in (True, False):
        out, states = mamba_on_cpu.mamba_chunk_scan_combined(x, dt, rate, B, C, 4, dt_softplus=softplus, **options)
        step = torch.log1p(torch.exp(dt + bias)) if softplus else dt + bias
        y, final = recurrence(x, step.clamp(0.3, 0.9), rate, B, C, skip, initial)
        torch.testing.assert_close(out, y * silu(z), rtol=1e-11, atol=1e-11)
        torch.testing.assert_close(states, final, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("option", [{"activation": None}, {"activation": "gelu"}, {"rmsnorm_weight": torch.ones(INNER)}], ids=str)
def test_what_is_not_built_is_refused(option):
    with pytest.raises(NotImplementedError, match="Mamba on a CPU"):
        split_call(normal(1, 4, 2 * INNER + 2 * VECTORS + SPEC.heads), make_params(), **option)


@pytest.mark.parametrize("gated, before", [(False, True), (True, True), (True, False)], ids=["no_gate", "norm_first", "gate_first"])
@pytest.mark.parametrize("groups", [1, 3])
def test_gated_norm_is_its_definition(groups, gated, before):
    x, z, weight = normal(2, 5, 12), normal(2, 5, 12, seed=1), normal(12, seed=2)
    norm = mamba_on_cpu.RMSNorm(12, eps=1e-3, group_size=12 // groups, norm_before_gate=before, dtype=torch.float64)
    norm.weight.data.copy_(weight)
    if not gated:
        actual, truth = norm(x), grouped_rms_norm(x, weight, groups, 1e-3)
    elif before:
        actual, truth = norm(x, z), grouped_rms_norm(x, weight, groups, 1e-3) * silu(z)
    else:
        actual, truth = norm(x, z), grouped_rms_norm(x * silu(z), weight, groups, 1e-3)
    torch.testing.assert_close(actual, truth, rtol=1e-12, atol=1e-12)
    assert norm.bfloat16()(x.bfloat16()).dtype == torch.bfloat16
