"""Torch's Adam in the distributed optimizer: its state can be described before the first step and is loaded with its own step counts."""

from types import SimpleNamespace

import pytest
import torch

from megatron_ext.compat import distrib_optimizer_load

distrib_optimizer = pytest.importorskip("megatron.core.optimizer.distrib_optimizer")
pytestmark = pytest.mark.skipif(
    distrib_optimizer.HAVE_APEX_OR_TE, reason="Adam comes from Transformer Engine or apex here: the patch does not apply"
)

METHODS = ("state_dict", "_set_main_param_and_optimizer_states", "load_state_dict")


def upstream(name):
    method = getattr(distrib_optimizer.DistributedOptimizer, name)
    return getattr(method, "__wrapped__", method)


@pytest.fixture
def patched(monkeypatch):
    for name in METHODS:
        monkeypatch.setattr(distrib_optimizer.DistributedOptimizer, name, upstream(name))
    assert distrib_optimizer_load.install()
    return distrib_optimizer.DistributedOptimizer


def make_optimizer(steps: int = 0):
    """A DistributedOptimizer with what the three methods read, around AdamW over two parameters."""
    params = [torch.nn.Parameter(torch.full((3,), 1.0 + index)) for index in range(2)]
    adam = torch.optim.AdamW(params, lr=0.1, weight_decay=0.5)
    for _ in range(steps):
        for param in params:
            param.grad = torch.ones_like(param)
        adam.step()
    optimizer = object.__new__(distrib_optimizer.DistributedOptimizer)
    optimizer.optimizer = adam
    optimizer.grad_scaler = None
    optimizer.is_stub_optimizer = False
    optimizer.ddp_config = SimpleNamespace(use_megatron_fsdp=False)
    optimizer.config = SimpleNamespace(use_precision_aware_optimizer_no_fp8_or_ds_fp8=False, fp16=False, optimizer="adam")
    optimizer.model_param_group_index_map = {param: (0, index) for index, param in enumerate(params)}
    return optimizer, params


def test_upstream_cannot_describe_an_optimizer_that_has_not_stepped():
    with pytest.raises(AssertionError):
        upstream("state_dict")(make_optimizer()[0])


def test_upstream_wants_a_step_for_each_parameter():
    optimizer, params = make_optimizer(steps=1)
    loaded = {name: torch.zeros(3) for name in ("param", "exp_avg", "exp_avg_sq")}
    with torch.no_grad(), pytest.raises(KeyError, match="step"):
        upstream("_set_main_param_and_optimizer_states")(optimizer, params[0], loaded)


def test_upstream_counts_one_step_tensor_for_all_parameters():
    optimizer, params = make_optimizer(steps=1)
    upstream("load_state_dict")(optimizer, upstream("state_dict")(optimizer))
    optimizer.optimizer.step()
    assert optimizer.optimizer.state[params[0]]["step"].item() == 3


def test_description_before_the_first_step_moves_nothing_and_changes_no_later_step(patched):
    described, params = make_optimizer()
    assert described.state_dict()["optimizer"]["param_groups"][0]["step"] == 0
    assert [param.tolist() for param in params] == [[1.0] * 3, [2.0] * 3]
    untouched, expected = make_optimizer(steps=2)
    for _ in range(2):
        for param in params:
            param.grad = torch.ones_like(param)
        described.optimizer.step()
    for param, truth in zip(params, expected, strict=True):
        assert torch.equal(param, truth)
        for name, value in untouched.optimizer.state[truth].items():
            assert torch.equal(described.optimizer.state[param][name], value)


def test_a_loaded_parameter_takes_its_moments_and_keeps_the_step(patched):
    optimizer, params = make_optimizer(steps=4)
    loaded = {"param": torch.full((3,), 5.0), "exp_avg": torch.full((3,), 6.0), "exp_avg_sq": torch.full((3,), 7.0)}
    with torch.no_grad():
        optimizer._set_main_param_and_optimizer_states(params[1], loaded)
    state = optimizer.optimizer.state[params[1]]
    assert (params[1][0].item(), state["exp_avg"][0].item(), state["exp_avg_sq"][0].item()) == (5.0, 6.0, 7.0)
    assert state["step"].item() == 4


def test_each_parameter_counts_its_own_steps_after_a_load(patched):
    optimizer, params = make_optimizer(steps=4)
    optimizer.load_state_dict(optimizer.state_dict())
    optimizer.optimizer.step()
    assert [optimizer.optimizer.state[param]["step"].item() for param in params] == [5, 5]


def test_a_second_installation_wraps_nothing_again(patched):
    wrapped = [getattr(patched, name) for name in METHODS]
    assert distrib_optimizer_load.install()
    assert [getattr(patched, name) for name in METHODS] == wrapped


def test_nothing_is_wrapped_where_adam_is_fused(monkeypatch):
    monkeypatch.setattr(distrib_optimizer, "HAVE_APEX_OR_TE", True)
    before = [getattr(distrib_optimizer.DistributedOptimizer, name) for name in METHODS]
    assert not distrib_optimizer_load.install()
    assert [getattr(distrib_optimizer.DistributedOptimizer, name) for name in METHODS] == before
