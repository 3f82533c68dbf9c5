"""Twins of the products of a sparse matrix."""

import torch
from torch import Tensor

from fastelbo.reference.likelihood import read_data


def _dense(starts: Tensor, columns: Tensor, values: Tensor, D: int, dtype: torch.dtype) -> Tensor:
    """X [N, D]"""
    first, last = int(starts[0]), int(starts[-1])
    row = torch.arange(len(starts) - 1, device=starts.device).repeat_interleave(starts.diff())
    where = row, columns[first:last].long()
    return torch.zeros(len(starts) - 1, D, dtype=dtype, device=values.device).index_put(
        where, read_data(values[first:last], dtype), accumulate=True
    )


def csr_matmul(starts: Tensor, columns: Tensor, values: Tensor, matrix: Tensor) -> Tensor:
    """X matrix [N, M] of X [N, D] in the CSR form and the matrix [D, M], in its dtype."""
    return _dense(starts, columns, values, len(matrix), matrix.dtype) @ matrix


def csr_matmul_t(starts: Tensor, columns: Tensor, values: Tensor, matrix: Tensor, D: int) -> Tensor:
    """X' matrix [D, M] of the matrix [N, M]."""
    return _dense(starts, columns, values, D, matrix.dtype).mT @ matrix
