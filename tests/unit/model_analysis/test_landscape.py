"""Flatness and curvature: against the dense Hessian of the loss on the spheres, against each other, and of operators that are known."""

from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from small_models import NVIDIA, ids, model_of
from torch.func import functional_call

from ngpt.model_analysis.curvature import curvature, dot, largest_eigenvalue
from ngpt.model_analysis.directions import direction, matrices, row_norms, stepped
from ngpt.model_analysis.flatness import fitted, flatness
from ngpt.model_analysis.hessian import Hessian
from ngpt.model_analysis.losses import sequence_losses

SMALL = ["model.num_layers=1", "model.hidden_size=16", "model.ffn_hidden_size=16", "model.num_attention_heads=2"]
SMALL += ["model.num_query_groups=1", "model.head_dim=8"]


def loss_at(u, model, chosen, weights, tokens):
    """The mean loss where each row has moved by u in its own length, back on its sphere where it has one."""
    moved = {}
    for matrix, w, part in zip(chosen, weights, u.split([w.numel() for w in weights]), strict=True):
        norms = w.norm(dim=matrix.dim, keepdim=True)
        step = w + norms * part.view_as(w)
        moved[matrix.name] = step * norms / step.norm(dim=matrix.dim, keepdim=True) if matrix.is_unit else step
    logits = functional_call(model, moved, (tokens[:, :-1],), {"use_cache": False}).logits
    return F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())


@pytest.mark.parametrize("experiment", ["ngpt_tiny", "gpt_tiny"])
def test_products_are_those_of_the_dense_hessian(experiment):
    model, tokens = model_of(experiment, *SMALL).double(), ids(2, 6)
    chosen = [matrix for matrix in matrices(model, "blocks") if "o_proj" in matrix.name or "up_proj" in matrix.name]
    weights = [matrix.parameter.detach().clone() for matrix in chosen]
    assert [(matrix.dim, matrix.is_unit) for matrix in chosen] == ([(-2, True), (-1, True)] if experiment[0] == "n" else [(-1, False)] * 2)
    function = partial(loss_at, model=model, chosen=chosen, weights=weights, tokens=tokens)
    model.set_attn_implementation("eager")
    dense = torch.autograd.functional.hessian(function, torch.zeros(512, dtype=torch.float64))
    model.set_attn_implementation("sdpa")

    hessian = Hessian(model, chosen, tokens, "double_backward")
    generator = torch.Generator().manual_seed(5)
    v = hessian.tangent([torch.randn(w.shape, generator=generator, dtype=torch.float64) for w in weights])
    if experiment[0] == "n":
        assert float((v[0] * weights[0]).sum(dim=0).abs().max()) < 1e-12
    of_dense = (dense @ torch.cat([part.flatten() for part in v])).split([w.numel() for w in weights])
    wanted = hessian.tangent([part.view_as(w) for part, w in zip(of_dense, weights, strict=True)])
    for method, bound in (("double_backward", 1e-10), ("differences", 2e-2)):
        found = Hessian(model, chosen, tokens, method).mean_product(v)
        error = sum(float((a - b).square().sum()) for a, b in zip(found, wanted, strict=True)) ** 0.5
        assert error < bound * sum(float(part.square().sum()) for part in wanted) ** 0.5, method
    assert all(torch.equal(matrix.parameter, w) for matrix, w in zip(chosen, weights, strict=True))
    assert model.config._attn_implementation == "sdpa" and all(parameter.requires_grad for parameter in model.parameters())

    basis = torch.eye(512, dtype=torch.float64)
    tangents = torch.stack(
        [torch.cat([p.flatten() for p in hessian.tangent([part.view(w.shape) for part, w in zip(row.split(256), weights, strict=True)])])
         for row in basis]
    )  # fmt: skip
    projected = tangents @ dense @ tangents.t()
    top = largest_eigenvalue(
        lambda vector: list((projected @ torch.cat([p.flatten() for p in vector])).view(2, 16, 16)), v, iterations=2000
    )
    assert top.value == pytest.approx(float(torch.linalg.eigvalsh(projected)[-1]), rel=2e-2)

    # signs have the trace for their mean
    probes = []
    for number in range(20):
        drawn = torch.Generator().manual_seed(number)
        probe = hessian.tangent([torch.randn(w.shape, generator=drawn, dtype=torch.float64).sign() for w in weights])
        probes.append(float(dot(probe, hessian.mean_product(probe))))
    assert abs(np.mean(probes) - float(projected.trace())) < 3 * np.std(probes) / len(probes) ** 0.5

    # flatness sees the same: half of the second derivative along a direction, tangent where there are spheres
    rows = [row_norms(w, matrix.dim) for matrix, w in zip(chosen, weights, strict=True)]
    d = [direction(matrix, norms, 7, 0) / norms for matrix, norms in zip(chosen, rows, strict=True)]
    u = torch.cat([part.flatten() for part in d])
    start, radius, sides = sequence_losses(model, tokens), 1e-3, []
    for sign in (1, -1):
        with stepped(chosen, sign * radius, 7, 0, retracts=True):
            sides.append(sequence_losses(model, tokens))
            for matrix, norms in zip(chosen, rows, strict=True):
                if matrix.is_unit:
                    torch.testing.assert_close(row_norms(matrix.parameter, matrix.dim), norms)
    change = float((sum(sides) / 2 - start).mean())
    assert change / radius**2 == pytest.approx(float(u @ dense @ u) / 2, rel=1e-3)
    assert all(torch.equal(matrix.parameter, w) for matrix, w in zip(chosen, weights, strict=True))


def test_the_largest_eigenvalue_is_found_behind_a_larger_negative_one():
    generator = torch.Generator().manual_seed(1)
    basis, _ = torch.linalg.qr(torch.randn(40, 40, generator=generator, dtype=torch.float64))
    values = torch.linspace(-1, 2, 40, dtype=torch.float64)
    values[0] = -9
    matrix = basis * values @ basis.t()
    start = [torch.randn(40, generator=generator, dtype=torch.float64)]
    found = largest_eigenvalue(lambda vector: [matrix @ vector[0]], start, 3000)
    assert found.value == pytest.approx(2, rel=5e-2) and 0 <= found.residual < 0.2
    assert float(found.vector[0].norm()) == pytest.approx(1)


def test_directions_have_the_norms_of_the_rows_and_the_fit_is_that_of_a_parabola():
    for experiment in ("ngpt_hybrid_tiny", "gpt_hybrid_tiny"):
        model = model_of(experiment)
        everything = matrices(model, "everything")
        blocks = {matrix.name for matrix in matrices(model, "blocks")}
        outside = {"model.embeddings.weight", "lm_head.weight"}
        assert {matrix.name for matrix in everything} == blocks | outside
        assert not any(part in name for name in blocks for part in ("gate.weight", "conv1d", "norm"))
        for matrix in everything:
            unit = experiment.startswith("ngpt")
            assert matrix.is_unit == unit and (unit or matrix.dim == -1)
            d = direction(matrix, matrix.norms(), 3, 1)
            torch.testing.assert_close(row_norms(d, matrix.dim), matrix.norms(), rtol=1e-5, atol=1e-7)
            assert torch.equal(d, direction(matrix, matrix.norms(), 3, 1))
            assert not torch.equal(d, direction(matrix, matrix.norms(), 3, 2))
    radii, c_KS = (0.02, 0.05, 0.1, 0.3), np.random.RandomState(0).uniform(1, 3, (3, 4))
    changes = np.stack([c_KS * r**2 if r <= 0.1 else np.full((3, 4), 99.0) for r in radii])
    assert fitted(radii, changes)["value"] == pytest.approx(c_KS.mean())


def test_a_hybrid_has_all_figures_and_keeps_its_bits():
    model, tokens = model_of("ngpt_hybrid_tiny"), ids(2, 8)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    flat = flatness(model, tokens, NVIDIA, directions=2, radii=(0.05, 0.2))
    bent = curvature(model, tokens, iterations=1, probes=2)
    assert set(flat["directions"]["blocks"]) == {"plain", "retracted"} and 0.05 < flat["noise"]["relative_error"] < 0.2
    for ways in flat["directions"].values():
        for found in ways.values():
            assert all(point["loss_change"]["value"] != 0 for point in found["points"]) and np.isfinite(found["curvature"]["value"])
    assert set(bent["scopes"]) == {"blocks", "everything"}
    assert all(np.isfinite(found["trace"]["value"]) and found["residual"] >= 0 for found in bent["scopes"].values())
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
