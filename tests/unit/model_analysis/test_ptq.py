"""What the quantised model multiplies, against the reference quantiser; losses, against the model's own."""

import math
from contextlib import AbstractContextManager

import pytest
import torch
import torch.nn.functional as F
from small_models import NVIDIA, ids, model_of

from ngpt.config import compose
from ngpt.config.errors import ConfigError
from ngpt.hf.links import links
from ngpt.model_analysis.linears import block_linears, changed_inputs
from ngpt.model_analysis.losses import sequence_losses
from ngpt.model_analysis.ptq import ptq, weight_error
from ngpt.model_analysis.quantise import quantised_inputs, quantised_weights, weight_spec
from ngpt.precision import quantize
from ngpt.recipes import QuantizerSpec


def checkpoint_of(model, experiment: str) -> dict[str, torch.Tensor]:
    """The model's tensors as training has them: what its quantisers see."""
    state, found = model.state_dict(), {}
    for link in links(compose([f"experiment={experiment}"]).model):
        found |= zip(link.keys, link.to_checkpoint([state[name].clone() for name in link.names]), strict=True)
    return found


@pytest.mark.parametrize("experiment", ["ngpt_hybrid_tiny", "gpt_tiny"])
def test_weights_are_those_of_the_trainers_matrices_and_come_back_bit_for_bit(experiment):
    model = model_of(experiment)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    trained, spec = checkpoint_of(model, experiment), QuantizerSpec((16, 16))
    linears = block_linears(model)
    with quantised_weights(linears, weight_spec(NVIDIA)):
        inside = checkpoint_of(model, experiment)
    changed = 0
    for key, weight in trained.items():
        if key.endswith("conv1d.weight.x") or "embedding" in key or "output_layer" in key or weight.dim() < 2 or ".in_proj." in key:
            continue  # in_proj lies in parts there
        matrices = weight.unbind() if weight.dim() == 3 else [weight]
        if not any(f".{name}." in key for name in ("linear_qkv", "linear_proj", "linear_fc1", "linear_fc2", "out_proj")) or "suv" in key:
            assert torch.equal(inside[key], weight), key
            continue
        wanted = torch.stack([quantize(matrix, spec).dequantize() for matrix in matrices]).view_as(weight)
        torch.testing.assert_close(inside[key], wanted, rtol=1e-6, atol=0)
        changed += 1
    assert changed == len([linear for linear in linears if linear.path != "mixer.in_proj"])
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert 0.05 < weight_error(linears, NVIDIA, "1x16") < weight_error(linears, NVIDIA, "16x16") < 0.2


def test_inputs_are_quantised_for_every_linear_and_no_other():
    model, tokens, spec = model_of("ngpt_hybrid_tiny"), ids(1, 32), NVIDIA.input.rowwise
    linears, before, behind = block_linears(model), [], []

    def noted(seen: list) -> AbstractContextManager:
        return changed_inputs(linears, lambda linear, x: (seen.append((linear, x.clone())), x)[1])

    with noted(before), quantised_inputs(linears, spec):
        quantised = sequence_losses(model, tokens)
    with quantised_inputs(linears, spec), noted(behind):
        assert torch.equal(sequence_losses(model, tokens), quantised)
    assert {linear.name for linear, _ in before} == {linear.name for linear in linears}
    for (linear, x), (_, x_hat) in zip(before, behind, strict=True):
        if linear.stacked:  # the last replacement of an expert's projection is asked first, of hooks the first one
            x, x_hat = x_hat, x
        torch.testing.assert_close(x_hat.flatten(0, -2), quantize(x.flatten(0, -2), spec).dequantize(), rtol=1e-6, atol=0)
    assert abs(float(quantised - sequence_losses(model, tokens))) > 1e-6


def test_losses_are_the_models_and_differences_are_paired():
    model, tokens = model_of("gpt_tiny"), ids(4, 32)
    logits = model(tokens[:, :-1]).logits.detach()
    wanted = F.cross_entropy(logits.transpose(1, 2), tokens[:, 1:], reduction="none").double().mean(dim=1)
    torch.testing.assert_close(sequence_losses(model, tokens, at_once=1), wanted, rtol=1e-6, atol=0)
    found = ptq(model, tokens, NVIDIA, bits_per_nat=1 / math.log(2))
    assert found["unquantised"]["loss"]["value"] == pytest.approx(float(wanted.mean()), rel=1e-6)
    linears = block_linears(model)
    with quantised_weights(linears, weight_spec(NVIDIA, "1x16")), quantised_inputs(linears, NVIDIA.input.rowwise):
        differences = [float(sequence_losses(model, tokens[[number]]) - wanted[number]) for number in range(4)]
    arm = found["arms"]["both_1x16"]
    mean, half = sum(differences) / 4, 3.182446 * torch.tensor(differences).std().item() / 2
    assert arm["difference"]["value"] == pytest.approx(mean, abs=1e-6)
    assert arm["difference"]["upper"] - arm["difference"]["value"] == pytest.approx(half, rel=1e-3)
    assert arm["bits_per_byte_difference"]["value"] == pytest.approx(mean / math.log(2), abs=2e-6)
    assert found["own_weight_blocks"] == "16x16"


def test_a_layer_that_blocks_cannot_tile_is_named():
    model = model_of("ngpt_tiny", "model.ffn_hidden_size=168")
    with pytest.raises(ConfigError, match=r"--recipe: layers\.1\.mlp\.linear_fc2\. 168"):
        ptq(model, ids(2, 16), NVIDIA, None)
