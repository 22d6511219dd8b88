"""The table of activations against sizes and values written out here for each of them."""

import argparse
import math

import pytest

from ngpt.config import compose
from ngpt.config.activations import ACTIVATIONS
from ngpt.config.linears import block_linears
from ngpt.config.megatron_keys import OWNED
from ngpt.estimate.counts import count_parameters, training_flops_per_token

HIDDEN, FFN, VOCAB = 64, 160, 384
FC1 = {"squared_relu": 160, "swiglu": 320}  # outputs of the first linear
AT = {  # the activation of one number; a gated one's other half is 1
    "squared_relu": lambda u: max(0.0, u) ** 2,
    "swiglu": lambda gate: gate / (1 + math.exp(-gate)),
}


def model_of(name: str):
    return compose(["experiment=ngpt_tiny", "model.layer_pattern=-", "model.num_layers=1", f"model.activation={name}"])


def test_the_tests_know_every_activation():
    assert set(ACTIVATIONS) == set(FC1) == set(AT)


@pytest.mark.parametrize("name", FC1)
def test_sizes_parameters_and_flops(name):
    cfg = model_of(name)
    fc1, fc2 = block_linears(cfg)
    assert (fc1.out_features, fc2.in_features) == (FC1[name], FFN)
    matrices = HIDDEN * FC1[name] + FFN * HIDDEN
    assert count_parameters(cfg.model).mlp == matrices + FC1[name] + HIDDEN  # suv, alpha
    assert training_flops_per_token(cfg.model, 32) == 6 * (matrices + VOCAB * HIDDEN)


@pytest.mark.parametrize("name", FC1)
def test_megatron_is_told_to_compute_it(name):
    import torch
    from megatron.training.argument_utils import core_transformer_config_from_args
    from megatron.training.arguments import add_megatron_arguments

    from megatron_ext.training.bridge import megatron_arguments, to_argv

    told = megatron_arguments(model_of(name), "transformer_engine")
    args = add_megatron_arguments(argparse.ArgumentParser()).parse_args(to_argv(told))
    args.params_dtype, args.num_layers = torch.float32, 1  # as Megatron derives them
    config = core_transformer_config_from_args(args)
    assert config.gated_linear_unit == (FC1[name] == 2 * FFN)
    assert config.bias_activation_fusion == bool(ACTIVATIONS[name].fusion)
    values = torch.linspace(-3, 3, 13, dtype=torch.float64)
    torch.testing.assert_close(config.activation_func(values).tolist(), [AT[name](value) for value in values.tolist()])


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_its_arguments_of_megatron_belong_to_the_key(name):
    assert {OWNED[argument] for argument in ACTIVATIONS[name].megatron} == {"model.activation"}
