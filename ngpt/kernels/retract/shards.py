"""What is retracted: contiguous pieces of row-major matrices."""

from collections.abc import Iterable
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class MatrixShard:
    """A contiguous piece of a row-major [rows, cols] matrix: elements start .. start + values.numel() of its flat form.

    Attributes:
        values: flat fp32 view of the master weights; empty where this rank owns nothing of the matrix.
        start: first element's position in the flat matrix.
        rows, cols: shape of the whole matrix (of this tensor-parallel rank).
        unit_dim: 1: rows get unit norm; 0: columns do.
    """

    values: Tensor
    start: int
    rows: int
    cols: int
    unit_dim: int

    @property
    def num_vectors(self) -> int:
        """How many vectors of the matrix have a norm."""
        return self.rows if self.unit_dim == 1 else self.cols

    def pieces(self) -> Iterable[tuple[Tensor, slice]]:
        """(block [r, c], its vectors), at most three: an incomplete first row, the whole rows between, an incomplete last row."""
        position, left = self.start, self.values
        while left.numel():
            row, col = divmod(position, self.cols)
            if col or left.numel() < self.cols:
                size, whole = min(self.cols - col, left.numel()), 1
            else:
                whole = left.numel() // self.cols
                size = whole * self.cols
            block = left[:size].view(whole, -1)
            yield block, slice(row, row + whole) if self.unit_dim == 1 else slice(col, col + block.size(1))
            position, left = position + size, left[size:]
