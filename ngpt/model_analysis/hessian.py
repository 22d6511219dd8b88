"""Products with the Hessian of the loss, in coordinates in which every row has length 1.

A step u moves a row w to w + |w| u. In GPT's coordinates the Hessian is S H S, with S the rows' norms. nGPT's rows live on spheres: u is
tangent to them, w moves along the great circle, and the second derivative is that of the loss on the spheres,
    P (S H S - diag(<w, dL/dw>)) P,
P projecting each row on its tangent. So neither architecture is flatter because its weights are smaller, and lengths that nGPT cannot
change do not count.

H v comes from differentiating the gradient once more ("double_backward": exact up to rounding, with attention written out, since fused
kernels cannot be differentiated twice), or from gradients at two points ("differences": error O(step^2), with the model's own attention,
in the memory of one backward pass). The experts that a token is sent to are held as they are in the first, and may change in the second.

Source: Pearlmutter, "Fast Exact Multiplication by the Hessian" (1994); second derivative on a sphere: Absil, Mahony and Sepulchre,
"Optimization Algorithms on Matrix Manifolds" (2008), section 5.5.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from ngpt.hf.modeling_ngpt import NGPTForCausalLM
from ngpt.model_analysis.directions import Matrix
from ngpt.model_analysis.losses import token_losses
from ngpt.model_analysis.quantise import restored

STEP = 3e-3  # step of the row that moves most, relative to its length

type Vector = list[Tensor]  # one tensor per matrix


class Hessian:
    """Products with the Hessian of each sequence's mean loss.

    Args:
        ids_NS: [N, S + 1].
        method: one of `ngpt.model_analysis.request.METHODS`.
        tick: called after each product.
    """

    def __init__(
        self, model: NGPTForCausalLM, chosen: Sequence[Matrix], ids_NS: Tensor, method: str, tick: Callable[[], None] = lambda: None
    ):
        self.model, self.matrices, self.ids_NS, self.method, self.tick = model, chosen, ids_NS, method, tick
        self.norms = [matrix.norms() for matrix in chosen]
        # for each sequence and each matrix with unit rows: <w, dL/dw> of its rows
        self._pulls: dict[int, list[Tensor | None]] = {}

    def tangent(self, vector: Vector) -> Vector:
        """The vector without components that would change the lengths of nGPT's rows."""
        return [self._projected(matrix, part) for matrix, part in zip(self.matrices, vector, strict=True)]

    def product(self, vector: Vector, sequence: int) -> Vector:
        """H v for one sequence's loss, in nats per token; `vector` is tangent."""
        ids_1S = self.ids_NS[sequence : sequence + 1].to(self.model.device)
        steps = [part * norms for part, norms in zip(vector, self.norms, strict=True)]
        with _asking(self.model, self.matrices), _attending(self.model, self.method):
            if self.method == "double_backward":
                gradient, products = self._twice(ids_1S, steps)
            else:
                products = self._difference(ids_1S, vector, steps)
                gradient = self._gradient(ids_1S) if sequence not in self._pulls else []
        if sequence not in self._pulls:
            self._pulls[sequence] = [self._pull(*pair) for pair in zip(self.matrices, gradient, strict=True)]
        found = [
            product * norms if pull is None else product * norms - pull * part
            for product, norms, pull, part in zip(products, self.norms, self._pulls[sequence], vector, strict=True)
        ]
        self.tick()
        return self.tangent(found)

    def mean_product(self, vector: Vector) -> Vector:
        """H v for the mean loss of all sequences."""
        total = [torch.zeros_like(part) for part in vector]
        for sequence in range(len(self.ids_NS)):
            for sum_, part in zip(total, self.product(vector, sequence), strict=True):
                sum_.add_(part, alpha=1 / len(self.ids_NS))
        return total

    def _twice(self, ids_1S: Tensor, steps: Vector) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
        parameters = [matrix.parameter for matrix in self.matrices]
        gradient = torch.autograd.grad(self._loss(ids_1S), parameters, create_graph=True, allow_unused=True)
        used = [(part, step) for part, step in zip(gradient, steps, strict=True) if part is not None]
        products = torch.autograd.grad(
            [part for part, _ in used], parameters, grad_outputs=[step for _, step in used], allow_unused=True, materialize_grads=True
        )
        return [_or_zeros(part, like) for part, like in zip(gradient, parameters, strict=True)], products

    def _difference(self, ids_1S: Tensor, vector: Vector, steps: Vector) -> Sequence[Tensor]:
        longest = max(
            float(torch.linalg.vector_norm(part, dim=matrix.dim).max()) for matrix, part in zip(self.matrices, vector, strict=True)
        )
        size = STEP / longest
        sides = []
        for sign in (1, -1):
            with restored(matrix.parameter for matrix in self.matrices):
                with torch.no_grad():
                    for matrix, step in zip(self.matrices, steps, strict=True):
                        matrix.parameter.add_(step, alpha=sign * size)
                sides.append(self._gradient(ids_1S))
        return [(plus - minus) / (2 * size) for plus, minus in zip(*sides, strict=True)]

    def _gradient(self, ids_1S: Tensor) -> Sequence[Tensor]:
        parameters = [matrix.parameter for matrix in self.matrices]
        return torch.autograd.grad(self._loss(ids_1S), parameters, allow_unused=True, materialize_grads=True)

    @torch.enable_grad()
    def _loss(self, ids_1S: Tensor) -> Tensor:
        h_1SD = self.model.model(ids_1S[:, :-1], use_cache=False).last_hidden_state
        return token_losses(self.model, h_1SD, ids_1S[:, 1:]).mean()

    def _projected(self, matrix: Matrix, part: Tensor) -> Tensor:
        if not matrix.is_unit:
            return part
        w = matrix.parameter.detach()
        along = (part * w).sum(dim=matrix.dim, keepdim=True) / w.square().sum(dim=matrix.dim, keepdim=True)
        return part - along * w

    @staticmethod
    def _pull(matrix: Matrix, gradient: Tensor) -> Tensor | None:
        if not matrix.is_unit:
            return None
        return (gradient.detach() * matrix.parameter.detach()).sum(dim=matrix.dim, keepdim=True)


def _or_zeros(part: Tensor | None, like: Tensor) -> Tensor:
    return torch.zeros_like(like) if part is None else part.detach()


@contextmanager
def _asking(model: NGPTForCausalLM, chosen: Sequence[Matrix]) -> Iterator[None]:
    """Inside the context, only these parameters require gradients."""
    asked = {parameter: parameter.requires_grad for parameter in model.parameters()}
    model.requires_grad_(False)
    for matrix in chosen:
        matrix.parameter.requires_grad_()
    try:
        yield
    finally:
        for parameter, before in asked.items():
            parameter.requires_grad_(before)


@contextmanager
def _attending(model: NGPTForCausalLM, method: str) -> Iterator[None]:
    before = model.config._attn_implementation
    if method == "double_backward":
        model.set_attn_implementation("eager")
    try:
        yield
    finally:
        model.set_attn_implementation(before)
