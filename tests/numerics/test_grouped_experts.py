"""Hybrid models in emulated NVFP4: experts in grouped linears train as experts that run one by one, bit for bit."""

import json
from pathlib import Path

import pytest
from grouped_probe import SPECS
from torchrun import launch


@pytest.fixture(scope="module")
def found(tmp_path_factory) -> dict[str, dict]:
    out = tmp_path_factory.mktemp("probe") / "found.json"
    launch(Path(__file__).with_name("grouped_probe.py"), [str(out)], processes=1)
    return json.loads(out.read_text())


@pytest.mark.parametrize("spec", SPECS)
def test_loss_and_every_gradient_have_the_same_bits(found, spec):
    sequential, grouped = found[spec]["names"]
    assert sequential == grouped and len(sequential) > 50
    changed = found[spec]["changed"]
    # The gradient of a suv that all experts share is one fp32 sum over all tokens, or one of each expert's sums.
    shared = {f"layers.{layer}.moe.suv_{half}" for layer in (1, 3) for half in ("gate", "up")}
    assert set(changed) <= (shared if "shared" in spec else set())
    assert all(value < 1e-6 for value in changed.values())


@pytest.mark.parametrize("spec", SPECS)
def test_experts_are_quantised_both_ways_under_the_same_names(found, spec):
    sequential, grouped = found[spec]["executors"]
    assert [line.split()[0] for line in sequential] == [line.split()[0] for line in grouped]
    changed = {line for line in grouped if line not in sequential}
    assert changed == {f"layers.{layer}.mlp.experts.linear_fc{linear} GroupedExecutor" for layer in (1, 3) for linear in (1, 2)}


@pytest.mark.parametrize("spec", SPECS)
def test_experts_of_uneven_sizes_and_without_tokens_are_among_those_compared(found, spec):
    sizes = found[spec]["sizes"]
    assert len(sizes) == 4 and any(size % 16 for layer in sizes for size in layer) and any(size > 32 for layer in sizes for size in layer)
    empty = {f"layers.{layer}.moe.experts.{e}" for layer, of in zip((1, 3), sizes[::2], strict=True) for e, n in enumerate(of) if not n}
    assert empty and {name.rpartition(".")[0] for name in found[spec]["all_zero"]} == empty
