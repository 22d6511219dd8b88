"""Values of the pass-through group `megatron` that its parser would refuse with its whole usage."""

import pytest

from megatron_ext.training.bridge import megatron_arguments, to_argv
from ngpt.config import ConfigError, compose


@pytest.mark.parametrize(
    ("name", "value", "rule"),
    [
        ("cuda_graph_impl", "banana", "Must be one of none, local"),
        ("manual_gc_interval", "abc", "reads it as int"),
        ("adam_eps", "x", "reads it as float"),
        ("no_such_argument", 1, "has no such argument"),
    ],
)
def test_is_refused_by_name(name, value, rule):
    with pytest.raises(ConfigError) as caught:
        to_argv({name: value})
    assert caught.value.path == f"megatron.{name}" and str(value) in str(caught.value) and rule in caught.value.rule


def test_others_reach_the_parser():
    assert to_argv({"cuda_graph_impl": "local", "manual_gc_interval": 5}) == ["--cuda-graph-impl=local", "--manual-gc-interval=5"]


def test_what_the_project_sets_otherwise_than_megatron_can_be_set_back():
    def told(*words: str) -> list[str]:
        return to_argv(megatron_arguments(compose(["experiment=ngpt_tiny", *words]), "local"))

    collects, unchecked = {"--manual-gc", "--manual-gc-interval=100"}, "--no-check-for-nan-in-loss-and-grad"
    assert collects | {unchecked} <= set(told())
    set_back = told("megatron.manual_gc=false", "megatron.check_for_nan_in_loss_and_grad=true")
    assert not {"--manual-gc", unchecked} & set(set_back)
