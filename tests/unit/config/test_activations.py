"""The table of activations against sizes and values written out here for each of them."""

import argparse

import pytest
from reference_activations import ACTIVATIONS as REFERENCES

from ngpt.config import compose
from ngpt.config.activations import ACTIVATIONS
from ngpt.config.linears import block_linears
from ngpt.estimate.counts import count_parameters, training_flops_per_token

HIDDEN, FFN, VOCAB = 64, 160, 384
FC1 = {name: 320 if reference.gated else 160 for name, reference in REFERENCES.items()}  # outputs of the first linear


def model_of(name: str):
    return compose(["experiment=ngpt_tiny", "model.layer_pattern=-", "model.num_layers=1", f"model.activation={name}"])


def test_the_tests_know_every_activation():
    assert set(ACTIVATIONS) == set(REFERENCES)


@pytest.mark.parametrize("name", FC1)
def test_sizes_parameters_and_flops(name):
    cfg = model_of(name)
    fc1, fc2 = block_linears(cfg)
    assert (fc1.out_features, fc2.in_features) == (FC1[name], FFN)
    matrices = HIDDEN * FC1[name] + FFN * HIDDEN
    assert count_parameters(cfg.model).layers["-"] == matrices + FC1[name] + HIDDEN  # suv, alpha
    assert training_flops_per_token(cfg.model, 32) == 6 * (matrices + VOCAB * HIDDEN)


@pytest.mark.parametrize("name", FC1)
def test_megatron_is_told_to_compute_it(name):
    import torch
    from megatron.training.argument_utils import core_transformer_config_from_args
    from megatron.training.arguments import add_megatron_arguments

    from megatron_ext.training.bridge import choose_activation, megatron_arguments, to_argv

    told = megatron_arguments(model_of(name), "transformer_engine")
    args = add_megatron_arguments(argparse.ArgumentParser()).parse_args(to_argv(told))
    args.params_dtype, args.num_layers = torch.float32, 1  # as Megatron derives them
    config = core_transformer_config_from_args(args)
    choose_activation(config, name)
    assert config.gated_linear_unit == (FC1[name] == 2 * FFN)
    assert config.bias_activation_fusion == bool(ACTIVATIONS[name].fusion)
    values = torch.linspace(-3, 3, 13, dtype=torch.float64)
    torch.testing.assert_close(config.activation_func(values).tolist(), [REFERENCES[name].by_hand(value) for value in values.tolist()])


@pytest.mark.parametrize("name", REFERENCES)
def test_its_function_and_derivative_are_exact_in_fp64(name):
    """The kernels are held to the error of plain torch, which runs the same function."""
    import torch

    from ngpt.kernels.activation.functions import FUNCTIONS

    v = torch.linspace(-6, 6, 97, dtype=torch.float64).requires_grad_()
    value = REFERENCES[name].f(v)
    (slope,) = torch.autograd.grad(value.sum(), v)
    for found, truth in zip(FUNCTIONS[ACTIVATIONS[name].function](v.detach()), (value, slope), strict=True):
        torch.testing.assert_close(found, truth.detach(), rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("name", REFERENCES)
def test_transformers_has_its_function_under_that_name(name):
    import torch
    from transformers.activations import ACT2FN

    values = torch.linspace(-3, 3, 13, dtype=torch.float64)
    expected = [REFERENCES[name].by_hand(value) for value in values.tolist()]
    torch.testing.assert_close(ACT2FN[ACTIVATIONS[name].hidden_act](values).tolist(), expected)


def test_two_activations_are_never_one_to_transformers():
    """An import would not know which of them a folder means."""
    assert len({(activation.hidden_act, activation.gated) for activation in ACTIVATIONS.values()}) == len(ACTIVATIONS)
