"""Solver "krylov" of method "eig": the first eigenpairs of the covariance, by products of the rows with blocks of
vectors alone.

Block Krylov iterations with full reorthogonalization run in the dtype of the data. What they find is checked in
float64: eigenvalues are Rayleigh quotients there, and residuals say how far the vectors are from eigenvectors.

Reference: Musco & Musco 2015; errors by residuals: Davis & Kahan 1970.
"""

import math
from typing import NamedTuple

import torch
from torch import Generator, Tensor

from fastelbo.ppca.data import Dataset
from fastelbo.ppca.result import FitReport, Found, Parameters, best_of_subspace, canonical, check_rank
from fastelbo.ppca.sparse import Rows
from fastelbo.reference import read_data

BEYOND = 10  # vectors of a block beyond M
BLOCKS = 8  # of a basis, at most
PIECE_ELEMENTS = 1 << 19  # of the centered rows at a time, which two products read; at least 3 k rows, since the sum
# over pieces, [D, k] in float64, is read and written for every one
EPS = torch.finfo(torch.float64).eps


def krylov(
    dataset: Dataset, mean: Tensor, min_sigma2: float, max_iter: int, tol: float, generator: Generator | None
) -> Found:
    """The maximum, with s2 to a relative error of `tol` and a subspace to an angle of which the sine squared is `tol`,
    in at most max_iter passes over the data. mean: of the rows [D], float64."""
    rows = _Rows(dataset, mean)
    N, D, M = dataset.N, dataset.D, dataset.n_components
    assert isinstance(M, int)
    device = "cpu" if generator is None else generator.device  # not torch's default device
    block = torch.randn(D, min(M + BEYOND, D), dtype=torch.float64, device=device, generator=generator)
    block = block.to(rows.mean.device)
    dataset.processes.broadcast(block)
    dtype, before, passes = dataset.dtype, math.inf, 0
    while True:
        vectors, blocks = _subspace(rows, block.to(dtype), M, tol, max_iter - passes - 1)
        vectors = torch.linalg.qr(vectors.double())[0]  # orthonormal to float64: so are the Rayleigh quotients
        image = rows.product(vectors)
        values, turn = _eigh(vectors.mT @ image)
        vectors, image = vectors @ turn, image @ turn
        errors = _Errors.of(values, torch.linalg.vector_norm(image - vectors * values, dim=0), M, rows.trace, D)
        passes += blocks + 1
        rest = rows.trace - float(values[:M].sum())
        check_rank(M + (rest > D * EPS * rows.trace), N, M)
        if errors.within(tol) or passes + 2 > max_iter:
            break
        if errors.sine > before / 4:  # as near as this dtype comes
            dtype = torch.float64
        block, before = image, errors.sine
    spectrum = torch.cat([values[:M], values.new_tensor([rest])])
    log_likelihood, W, log_sigma2 = best_of_subspace(spectrum, vectors[:, :M], D, min_sigma2)
    report = FitReport("eig", N, errors.within(tol), (log_likelihood,), "krylov")
    return Parameters(canonical(W), rows.mean, log_sigma2), report


class _Errors(NamedTuple):
    """Estimates for the first M of k Ritz pairs: what their residuals point to is orthogonal to all k vectors, and its
    eigenvalues are at most the last Ritz value."""

    sine: float  # of the largest angle between the M vectors and the eigenvectors
    sigma2: float  # relative

    @classmethod
    def of(cls, values: Tensor, residuals: Tensor, M: int, trace: float, D: int) -> "_Errors":
        if len(values) == D:  # nothing is left out
            return cls(0.0, 0.0)
        gap = (values[:M] - values[-1]).clamp_min(0)
        residuals = residuals[:M]
        missed = (residuals.square() / gap).sum()
        rest = trace - float(values[:M].sum())
        return cls(float((residuals / gap).square().sum().sqrt()), float(missed) / rest if rest > 0 else math.inf)

    def within(self, tol: float) -> bool:
        return self.sine <= math.sqrt(tol) and self.sigma2 <= tol  # both of second order in log p(x)


class _Rows:
    """Products with the covariance of the rows, which are centered piece by piece.

    Attributes:
        trace: of the covariance, once there was a product.
    """

    def __init__(self, dataset: Dataset, mean: Tensor) -> None:
        self._dataset, self.mean, self.trace = dataset, mean, math.nan

    def product(self, block: Tensor) -> Tensor:
        """The covariance times the block [D, k], in the dtype of the block; the sum over pieces in float64."""
        dtype = block.dtype
        center = self.mean.to(dtype)
        rest = (self.mean - center).to(dtype)  # what a float32 mean loses
        found = torch.zeros(block.shape, dtype=torch.float64, device=block.device)
        squares = torch.zeros((), dtype=torch.float64, device=block.device)
        # float64 has the digits that are left of the trace once the first eigenvalues are taken off
        traced = not math.isnan(self.trace) and dtype != torch.float64
        shift = self.mean @ block.double()  # sparse rows are centered by what the mean would give, and their sums
        sums = torch.zeros_like(shift)
        size = max(3 * block.shape[1], PIECE_ELEMENTS // len(center))
        for piece, weights in self._dataset.pieces():
            equal = weights.stride(0) == 0
            if isinstance(piece, Rows):
                y = (piece @ block - shift.to(dtype)) * weights.to(dtype)[:, None]
                found += piece.transposed_matmul(y).double()
                sums += y.sum(0, dtype=torch.float64)
                if not traced:
                    distance = piece.squares() - 2 * (piece @ self.mean[:, None])[:, 0] + self.mean @ self.mean
                    squares += weights @ distance
                continue
            for x, weight in zip(piece.split(size), weights.split(size), strict=True):
                r = read_data(x, dtype) - center
                if dtype != torch.float64:
                    r -= rest
                if not equal:
                    r *= weight.sqrt().to(dtype)[:, None]
                factor = weight[0] if equal else 1.0
                found += factor * (r.mT @ (r @ block)).double()
                if not traced:
                    squares += factor * r.square().sum(0, dtype=torch.float64).sum()
        found.addr_(self.mean, sums, alpha=-1)
        total = self._dataset.N  # the mean of the weights of a pass is 1
        self._dataset.processes.sum(found, *([] if traced else [squares]))
        if not traced:
            self.trace = float(squares) / total
        result: Tensor = (found / total).to(dtype)
        return result


def _subspace(rows: _Rows, block: Tensor, M: int, tol: float, most: int) -> tuple[Tensor, int]:
    """k orthonormal vectors [D, k] of the Krylov space of the block [D, k], and the products that it took."""
    k = block.shape[1]
    blocks = [torch.linalg.qr(block)[0]]
    projected: list[Tensor] = []  # the columns of basis' C basis, by block
    while True:
        basis = torch.cat(blocks, 1)
        image = rows.product(blocks[-1])
        columns = basis.mT @ image
        image -= basis @ columns
        again = basis.mT @ image  # what rounding has left
        image -= basis @ again
        projected.append((columns + again).double())
        following, factor = torch.linalg.qr(image)
        size = basis.shape[1]
        matrix = torch.zeros(size, size, dtype=torch.float64, device=block.device)
        for i, part in enumerate(projected):
            matrix[: len(part), i * k : (i + 1) * k] = part
        values, turn = _eigh(matrix.triu() + matrix.triu(1).mT)
        turn = turn[:, :k]
        residuals = torch.linalg.vector_norm(factor.double() @ turn[-k:], dim=0)
        errors = _Errors.of(values[:k], residuals, M, rows.trace, len(block))
        room = len(block) - size
        if (len(blocks) > 1 and errors.within(tol / 4)) or len(blocks) >= min(BLOCKS, most) or room < k:
            return torch.linalg.qr(basis @ turn.to(basis.dtype))[0], len(blocks)
        blocks.append(following)


def _eigh(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues, falling, and eigenvectors of what is symmetric but for rounding."""
    values, vectors = torch.linalg.eigh((matrix + matrix.mT) / 2)
    return values.flip(0), vectors.flip(1)
