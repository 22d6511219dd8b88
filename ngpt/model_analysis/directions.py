"""Matrices of a model and steps in them whose size means the same in every architecture.

A direction is Gaussian, and each of its rows has the norm of the matrix's row. For GPT, a row is an output row. For nGPT, it is whichever
has unit norm, a row or a column (`unit_dim`). So at radius r every row moves by r times its own length, and the whole model by r times its
norm. For nGPT, a retraction that restores every row's norm may follow a step.

Source: Li et al., "Visualizing the Loss Landscape of Neural Nets" (2018), section 4 (filter normalisation).
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ngpt.hf.modeling_ngpt import NGPTForCausalLM
from ngpt.model_analysis.linears import block_linears
from ngpt.model_analysis.quantise import restored
from ngpt.precision.rounding import stream_seed

SCOPES = ("blocks", "everything")  # block linears alone; block linears, embeddings and output layer


@dataclass(frozen=True)
class Matrix:
    """A matrix, or the stacked matrices of experts.

    Attributes:
        name: the parameter's name in the transformers model.
        dim: the dimension along which a row lies.
        is_unit: whether nGPT trains it with unit norms along `dim`.
    """

    name: str
    parameter: nn.Parameter
    dim: int
    is_unit: bool

    def norms(self) -> Tensor:
        return row_norms(self.parameter.detach(), self.dim)


def matrices(model: NGPTForCausalLM, scope: str) -> list[Matrix]:
    """The matrices of a scope. Routers, convolutions, norms and scales are not included. Tied embeddings count once.

    Args:
        scope: one of SCOPES.
    """
    wanted = [parameter for linear in block_linears(model) for parameter in linear.parameters]
    if scope == "everything":
        wanted += [model.model.embeddings.weight, model.lm_head.weight]
    dims = {
        id(module.get_parameter(name)): dim for module in model.modules() for name, dim in getattr(module, "unit_dims", {}).items()
    }
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    found = {id(parameter): parameter for parameter in wanted}  # each parameter once
    return [Matrix(names[key], parameter, dims.get(key, -1), key in dims) for key, parameter in found.items()]


def direction(matrix: Matrix, norms: Tensor, seed: int, number: int) -> Tensor:
    """Direction `number` of a matrix. It depends only on the seed, the name, the shape and the kind of device."""
    drawn = gaussian(matrix.parameter, stream_seed(seed, 0, matrix.name, number, 0))
    return drawn.mul_(norms / row_norms(drawn, matrix.dim).clamp(min=torch.finfo(drawn.dtype).tiny))


def gaussian(like: Tensor, seed: int) -> Tensor:
    generator = torch.Generator(like.device).manual_seed(seed)
    return torch.randn(like.shape, generator=generator, dtype=like.dtype, device=like.device)


def row_norms(tensor: Tensor, dim: int) -> Tensor:
    return torch.linalg.vector_norm(tensor, dim=dim, keepdim=True)


@contextmanager
def stepped(found: Sequence[Matrix], step: float, seed: int, number: int, retracts: bool) -> Iterator[None]:
    """Moves the model by `step` along a direction inside the context, then restores its weights bit for bit.

    Args:
        step: the radius, with a sign.
        retracts: whether matrices with unit rows get their norms back after the step.
    """
    with restored(matrix.parameter for matrix in found):
        for matrix in found:
            take_step(matrix, step, seed, number, retracts)
        yield


@torch.no_grad()
def take_step(matrix: Matrix, step: float, seed: int, number: int, retracts: bool) -> None:
    """Moves one matrix permanently."""
    norms = matrix.norms()
    matrix.parameter.add_(direction(matrix, norms, seed, number), alpha=step)
    if retracts and matrix.is_unit:
        matrix.parameter.mul_(norms / row_norms(matrix.parameter, matrix.dim))
