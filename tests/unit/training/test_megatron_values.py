"""Values of the pass-through group `megatron` that its parser would refuse with its whole usage."""

import pytest

from megatron_ext.training.bridge import to_argv
from ngpt.config import ConfigError


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
