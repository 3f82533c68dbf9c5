"""Sparse data: rows in compressed form (CSR), which are read as small dense tiles."""

from collections.abc import Callable, Iterator, Sequence
from functools import wraps
from typing import Any, TypeVar, cast

import torch
from torch import Tensor

TILE_ELEMENTS = 1 << 21  # of a tile [n, D]: it stays in the cache while it is read

_F = TypeVar("_F", bound=Callable[..., Any])


class Rows:
    """A matrix [N, D] by rows: `columns` and `values` from `starts[i]` to `starts[i + 1]` are those of row i.

    The caller's matrix is read in place, and never changed.
    """

    def __init__(self, starts: Tensor, columns: Tensor, values: Tensor, shape: tuple[int, int], is_numpy: bool) -> None:
        self.starts, self.columns, self.values = starts.long(), columns, values
        self.shape, self.is_numpy = shape, is_numpy

    @classmethod
    def of(cls, X: Any) -> "Rows | None":
        """Of a sparse matrix of scipy, or a torch tensor of the layouts CSR, CSC or COO; None of anything else."""
        if isinstance(X, Tensor):
            if X.layout is torch.strided or X.dim() != 2:
                return None
            X = (X.coalesce() if X.layout is torch.sparse_coo else X).to_sparse_csr().detach()
            return cls(X.crow_indices(), X.col_indices(), X.values(), tuple(X.shape), False)
        if not hasattr(X, "tocsr"):
            return None
        csr = X.tocsr()
        if not csr.has_canonical_format:  # a column may be there twice in a row
            csr = csr.copy()
            csr.sum_duplicates()
        starts, columns, values = map(torch.from_numpy, (csr.indptr, csr.indices, csr.data))
        return cls(starts, columns, values, tuple(csr.shape), True)

    def __len__(self) -> int:
        return self.shape[0]

    def tiles(self) -> Iterator[tuple[int, int, Tensor]]:
        """First and last row, and the rows between them [n, D], dense."""
        N, D = self.shape
        size = max(1, TILE_ELEMENTS // max(1, D))
        for first in range(0, N, size):
            last = min(N, first + size)
            a, b = int(self.starts[first]), int(self.starts[last])
            counts = self.starts[first + 1 : last + 1] - self.starts[first:last]
            row = torch.arange(last - first, device=counts.device).repeat_interleave(counts, output_size=b - a)
            tile = self.values.new_zeros(last - first, D)
            tile.view(-1)[row.mul_(D).add_(self.columns[a:b])] = self.values[a:b]
            yield first, last, tile


def by_tiles(method: _F) -> _F:
    """A method of x [N, D], and of other arguments by row, also for sparse x: tile by tile, its results joined."""

    @wraps(method)
    def call(self: Any, x: Any, *args: Any, **kwargs: Any) -> Any:
        rows = Rows.of(x)
        if rows is None:
            return method(self, x, *args, **kwargs)
        found: list[Any] = []
        for a, b, tile in rows.tiles():
            part = tile.numpy() if rows.is_numpy else tile
            found.append(method(self, part, *(t[a:b] for t in args), **kwargs))
        if not isinstance(found[0], tuple):
            return _joined(found)
        means, covariances = zip(*found, strict=True)  # of a posterior, whose covariance all rows share
        if any(covariance.ndim == 3 for covariance in covariances):
            raise ValueError("x must have no NaN where it is sparse: a missing cell is not one that is 0")
        return _joined(means), covariances[0]

    return cast(_F, call)


def _joined(parts: Sequence[Any]) -> Any:
    if isinstance(parts[0], Tensor):
        return torch.cat(list(parts))
    import numpy as np

    return np.concatenate(parts)
