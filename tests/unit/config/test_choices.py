"""The values of a key stand once, in the schema, and each says what it is."""

import argparse
import copy
import operator

import pytest

from ngpt.config import compose
from ngpt.config.schema import Config
from ngpt.config.values import CHOICES, check_choices

MEGATRON = {  # keys whose values Megatron gets as they are: its argument, and those values that it never sees
    "model.position_embedding": ("position_embedding_type", set()),
    "model.moe_score": ("moe_router_score_function", set()),
    "model.moe_aux_loss": ("moe_router_load_balancing_type", set()),
    "schedule.decay": ("lr_decay_style", {"wsd"}),
    "schedule.wsd_decay": ("lr_wsd_decay_style", set()),
    "parallel.token_dispatcher": ("moe_token_dispatcher_type", set()),
    "parallel.recompute": ("recompute_granularity", {"none"}),
    "parallel.recompute_method": ("recompute_method", set()),
    "optim.optimizer": ("optimizer", set()),
}


def set_at(cfg: Config, key: str, value) -> None:
    section, _, name = key.rpartition(".")
    setattr(operator.attrgetter(section)(cfg), name, value)


@pytest.fixture(scope="module")
def composed() -> Config:
    return compose(["experiment=ngpt_tiny"])


@pytest.fixture
def cfg(composed) -> Config:
    return copy.deepcopy(composed)


@pytest.mark.parametrize("key", CHOICES)
def test_each_value_is_accepted_and_told_in_one_line_and_any_other_refused(key, cfg):
    several = key == "parallel.recompute_modules"
    for value, description in CHOICES[key].items():
        assert description and description == description.strip() and "\n" not in description
        set_at(cfg, key, [value] if several else value)
        assert not list(check_choices(cfg))
    set_at(cfg, key, ["banana"] if several else "banana")
    (error,) = check_choices(cfg)
    assert error.path == key and error.got == "banana"
    assert all(str(value) in error.rule for value in CHOICES[key] if value is not None)


def test_values_handed_on_are_values_of_megatrons_arguments():
    from megatron.training.arguments import add_megatron_arguments

    actions = {action.dest: action for action in add_megatron_arguments(argparse.ArgumentParser())._actions}
    for key, (argument, ours) in MEGATRON.items():
        assert set(CHOICES[key]) - ours <= set(actions[argument].choices), key
