"""Sparse data: rows in compressed form (CSR), and their products with dense matrices."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from fastelbo import reference
from fastelbo._internal.ops import takes_twins
from fastelbo.reference import read_data

TILE_ELEMENTS = 1 << 21  # of dense rows [n, D]: they stay in the cache while they are read
PIECE_CELLS = 1 << 21  # of sparse rows
_op = torch.ops.fastelbo


class Rows:
    """A matrix [N, D] by rows: `columns`, which rise, and `values` from `starts[i]` to `starts[i + 1]` are those of row
    i.

    The caller's matrix is read in place, and never changed.
    """

    def __init__(self, starts: Tensor, columns: Tensor, values: Tensor, D: int, is_numpy: bool = False) -> None:
        self.starts, self.columns, self.values = starts, columns, values
        self.shape, self.is_numpy = (len(starts) - 1, D), is_numpy

    @classmethod
    def of(cls, X: Any) -> "Rows | None":
        """Of a sparse matrix of scipy, or a torch tensor of the layouts CSR, CSC or COO; None of anything else."""
        if isinstance(X, Rows):
            return X
        if isinstance(X, Tensor):
            if X.layout is torch.strided or X.dim() != 2:
                return None
            csr = (X.coalesce() if X.layout is torch.sparse_coo else X).to_sparse_csr().detach()
            starts, columns, values = csr.crow_indices(), csr.col_indices(), csr.values()
        elif hasattr(X, "tocsr"):
            csr = X.tocsr()
            starts, columns, values = map(torch.from_numpy, (csr.indptr, csr.indices, csr.data))
        else:
            return None
        found = cls(starts.long(), columns, values, int(X.shape[1]), not isinstance(X, Tensor))
        return found if found._is_canonical() else found._canonical()

    def __len__(self) -> int:
        return self.shape[0]

    @property
    def dtype(self) -> torch.dtype:
        return self.values.dtype

    @property
    def device(self) -> torch.device:
        return self.values.device

    def counts(self) -> Tensor:
        """Cells of every row that are there [N]."""
        return self.starts.diff()

    def _is_canonical(self) -> bool:
        """Whether columns rise in every row.

        Raises:
            ValueError: columns or starts beyond the matrix.
        """
        D, cells = self.shape[1], len(self.values)
        bad = bool((self.counts() < 0).any()) or int(self.starts[0]) != 0 or int(self.starts[-1]) > cells
        if bad or (cells and not 0 <= int(self.columns.min()) <= int(self.columns.max()) < D):
            raise ValueError(f"a sparse matrix must have columns from 0 to {D - 1} and starts from 0 to {cells}")
        if cells < 2:
            return True
        rises = self.columns[1:] > self.columns[:-1]
        first = self.starts[1:-1]
        rises[first[(first > 0) & (first < cells)] - 1] = True
        return bool(rises.all())

    def _canonical(self) -> "Rows":
        row = torch.arange(len(self), device=self.device).repeat_interleave(self.counts())
        where = torch.stack([row, self.columns[: len(row)].long()])
        coo = torch.sparse_coo_tensor(where, self.values[: len(row)], self.shape, check_invariants=False).coalesce()
        row, columns = coo.indices()
        starts = torch.searchsorted(row, torch.arange(len(self) + 1, device=self.device))
        return Rows(starts, columns, coo.values(), self.shape[1], self.is_numpy)

    def __getitem__(self, kept: Tensor) -> "Rows":
        """The rows that a mask [N] keeps."""
        counts = self.counts()
        cells = kept.repeat_interleave(counts)
        starts = torch.cat([self.starts[:1], counts[kept].cumsum(0)])
        return Rows(starts, self.columns[cells], self.values[cells], self.shape[1], self.is_numpy)

    def pieces(self) -> Iterator[tuple[int, int, "Rows"]]:
        """First and last row, and the rows between them, whose cells are few."""
        first = 0
        while first < len(self):
            end = int(torch.searchsorted(self.starts, self.starts[first] + PIECE_CELLS, right=True)) - 1
            last = min(len(self), max(first + 1, min(end, first + PIECE_CELLS)))
            a, b = int(self.starts[first]), int(self.starts[last])
            starts = self.starts[first : last + 1] - a
            yield first, last, Rows(starts, self.columns[a:b], self.values[a:b], self.shape[1], self.is_numpy)
            first = last

    def tiles(self, where: Tensor | None = None) -> Iterator[tuple[int, int, Tensor]]:
        """First and last row, and the rows between them [n, D], dense; only tiles that have rows of a mask [N]."""
        N, D = self.shape
        size = max(1, TILE_ELEMENTS // max(1, D))
        for first in range(0, N, size):
            last = min(N, first + size)
            if where is not None and not bool(where[first:last].any()):
                continue
            a, b = int(self.starts[first]), int(self.starts[last])
            counts = self.starts[first + 1 : last + 1] - self.starts[first:last]
            row = torch.arange(last - first, device=self.device).repeat_interleave(counts, output_size=b - a)
            tile = self.values.new_zeros(last - first, D)
            tile.view(-1)[row.mul_(D).add_(self.columns[a:b])] = self.values[a:b]
            yield first, last, tile

    def __matmul__(self, matrix: Tensor) -> Tensor:
        """X matrix [N, M], in the dtype of the matrix [D, M], float32 or float64."""
        take = reference.csr_matmul if takes_twins(self.values) else _op._csr_matmul
        found: Tensor = take(self.starts, self.columns, self.values, matrix)
        return found

    def transposed_matmul(self, matrix: Tensor) -> Tensor:
        """X' matrix [D, M] of the matrix [N, M]."""
        take = reference.csr_matmul_t if takes_twins(self.values) else _op._csr_matmul_t
        found: Tensor = take(self.starts, self.columns, self.values, matrix, self.shape[1])
        return found

    def squares(self) -> Tensor:
        """The sum of squares of every row [N], float64."""
        parts = [
            torch.segment_reduce(read_data(piece.values, torch.float64).square(), "sum", offsets=piece.starts)
            for _, _, piece in self.pieces()
        ]
        return torch.cat(parts) if parts else self.starts.new_zeros(0, dtype=torch.float64)
