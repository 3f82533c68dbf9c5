"""Method "eig": the maximum of the likelihood by the eigenvalues of the data's covariance, in float64.

To pickles, this is the module `fastelbo.ppca.fit` of earlier versions.
"""

import math
from collections.abc import Iterator

import torch
from torch import Generator, Tensor

from fastelbo.ppca import data
from fastelbo.ppca.choice import Components, choose
from fastelbo.ppca.data import Batch, Dataset, dense
from fastelbo.ppca.krylov import BEYOND, krylov
from fastelbo.ppca.moments import Moments, Sums
from fastelbo.ppca.result import FitReport, Found, Parameters, best_of_subspace, canonical, check_components, check_rank
from fastelbo.reference import read_data

EPS = torch.finfo(torch.float64).eps


SOLVERS = ("auto", "full", "covariance", "krylov")
LARGE = 1000  # rows and columns, from which on "krylov" is the faster one
FEW = 5  # components: at most one in so many of the smaller size
MODERATE = 5000  # the smaller size, up to which "auto" goes on to "full" where "krylov" does not converge


def automatic(rows: float, D: int, M: Components) -> str:
    """What "auto" is, of data that can be read again."""
    size = min(rows, D)
    few = isinstance(M, int) and size >= FEW * M  # what chooses M needs all eigenvalues
    return "krylov" if few and size >= LARGE else "full"


def eig(
    dataset: Dataset, min_sigma2: float, solver: str, max_iter: int, tol: float, generator: Generator | None
) -> Found:
    """The maximum. "krylov" sums the columns in its first pass; the others need no second one, but for "auto", which
    goes on to "full" where "krylov" has taken as long.

    With more than D rows, or for "covariance", the D by D covariance is summed over the batches; else the rows are
    kept, in their dtype, and the N by N Gram matrix gives the same eigenvalues.
    """
    asked, in_memory = solver, dataset.is_array
    kept: list[Batch] = []  # as long as they are at most D rows
    moments: Moments | None = None
    sums = Sums()
    count = 0
    for x, weight in dataset.first_pass():
        if solver == "auto":
            again = dataset.again
            solver = automatic(dataset.rows, x.shape[1], dataset.n_components) if again else "full"
        in_memory &= isinstance(x, Tensor)
        if solver == "krylov":
            sums.update(x, weight)
            continue
        for batch in dense([(x, weight)]):
            kept.append(batch)
            count += len(batch[0])
            if count > x.shape[1] or solver == "covariance":
                moments = moments or Moments(x.shape[1], x.device)
                while kept:
                    moments.update(*kept.pop(0))
    solver = next((s for s in dataset.processes.gather(solver) if s != "auto"), "full")  # one may have no rows
    if solver == "krylov":
        goes_on = asked == "auto" and in_memory and min(dataset.N, dataset.D) <= MODERATE
        most = min(max_iter, _passes_like_full(dataset)) if goes_on else max_iter
        found = krylov(dataset, sums.mean(dataset), min_sigma2, most, tol, generator)
        if found[1].converged or not goes_on:
            return found
        return eig(dataset, min_sigma2, "full", max_iter, tol, generator)
    if solver == "full" and dataset.N <= dataset.D:
        return _of_rows(kept, dataset, min_sigma2)
    moments = moments or Moments(dataset.D, dataset.device)
    for batch in kept:
        moments.update(*batch)
    moments.reduce(dataset.processes)
    return of_moments(moments, dataset.n_components, min_sigma2, solver)


def _passes_like_full(dataset: Dataset) -> int:
    """Those of "krylov" that take as long as "full", by operations: 4 N D n in float64, of twice the time, and some
    20 n^3 for n = min(N, D) eigenvectors; 4 N D k, and 32 D k^2 to orthogonalize, for a pass with k vectors."""
    N, D, M = dataset.N, dataset.D, dataset.n_components
    assert isinstance(M, int)
    n, k = min(N, D), M + BEYOND
    return int((4 * N * D * n + 20 * n**3) / (4 * D * k * (N + 8 * k)))


def of_moments(moments: Moments, n_components: Components, min_sigma2: float, solver: str = "full") -> Found:
    """The maximum for data with this mean and covariance; of n_components, or of as many as they choose.

    "full" scales the columns, for the rank and for the digits of those that are far smaller than others; "covariance"
    does not, and takes a third of the time.
    """
    N, D = int(moments.rows), len(moments.mean)
    check_components(n_components, D)
    if solver == "covariance":
        values, vectors = torch.linalg.eigh(moments.covariance)
        values, vectors = values.flip(0).clamp_min(0), vectors.flip(1)
        check_rank(rank := _rank(values, N, D), N, n_components)
        M = _chosen(n_components, values[:rank].sqrt(), N, D, min_sigma2)
        return _maximum(values.sqrt(), vectors[:, :M], moments.mean, N, min_sigma2, solver)
    deviation = torch.diagonal(moments.covariance).sqrt()
    inverse = _inverse(deviation, moments.mean, N)
    scaled, turn = torch.linalg.eigh(moments.covariance * inverse * inverse[:, None])
    check_rank(rank := _rank(scaled.flip(0), N, D), N, n_components)
    # of a factor of the covariance: columns that are far smaller than others keep their digits
    vectors, lengths, _ = torch.linalg.svd(deviation[:, None] * turn * scaled.clamp_min(0).sqrt())
    M = _chosen(n_components, lengths[:rank], N, D, min_sigma2)
    return _maximum(lengths, vectors[:, :M], moments.mean, N, min_sigma2)


def _of_rows(kept: list[Batch], dataset: Dataset, min_sigma2: float) -> Found:
    """The maximum for X [N, D], N <= D, of this process's rows and those of the others: the rank by the Gram matrix of
    the scaled columns, the eigenvalues by a QR of X'.

    Reference: Bishop 2006, sec. 12.1.4.
    """
    N, D = dataset.N, dataset.D
    none = torch.zeros(0, D, device=dataset.device)
    parts = kept or [(none, none[:, 0].double())]
    X = dataset.processes.concatenate(torch.cat([read_data(x, dataset.dtype) for x, _ in parts]))
    weight = dataset.processes.concatenate(torch.cat([w for _, w in parts]))
    share = weight / weight.sum()

    def centered() -> Iterator[tuple[Tensor, Tensor]]:
        for part in X.split(max(1, data.PIECE_ELEMENTS // N), 1):
            wide = part.double()
            center = share @ wide
            yield (wide - center) * share.sqrt()[:, None], center

    means = []
    gram, R = torch.zeros(2, N, N, dtype=torch.float64, device=X.device)
    for r, center in centered():
        means.append(center)
        scaled = r * _inverse(torch.linalg.vector_norm(r, dim=0), center, N)
        gram.addmm_(scaled, scaled.mT)
        R = torch.linalg.qr(torch.cat([R, r.mT]), mode="r")[1]
    check_rank(rank := _rank(torch.linalg.eigvalsh(gram).flip(0), N, D), N, dataset.n_components)
    _, lengths, coefficients = torch.linalg.svd(R)
    M = _chosen(dataset.n_components, lengths[:rank], N, D, min_sigma2)
    coefficients = coefficients.mT[:, :M] / lengths[:M]
    return _maximum(lengths, torch.cat([r.mT @ coefficients for r, _ in centered()]), torch.cat(means), N, min_sigma2)


def _inverse(deviation: Tensor, mean: Tensor, N: int) -> Tensor:
    """1 / deviation [D]; 0 of columns that are constant but for the rounding of their mean."""
    return torch.where(deviation > math.sqrt(N) * EPS * mean.abs(), 1 / deviation, 0.0)


def _rank(values: Tensor, N: int, D: int) -> int:
    """Of a covariance with these eigenvalues, falling."""
    return int((values > (values[0] * max(N, D) * EPS).clamp_min(0)).sum())


def _chosen(n_components: Components, lengths: Tensor, N: int, D: int, min_sigma2: float) -> int:
    """M, a number as it is; lengths: the singular values, falling, that are not 0."""
    if isinstance(n_components, int):
        return n_components
    return choose(lengths.square(), N, D, n_components, min_sigma2)


def _maximum(lengths: Tensor, vectors: Tensor, mean: Tensor, N: int, min_sigma2: float, solver: str = "full") -> Found:
    """Of the singular values, falling, without those that are 0 if need be, and of the first M vectors [D, M]."""
    log_likelihood, W, log_sigma2 = best_of_subspace(lengths.square(), vectors, len(mean), min_sigma2)
    return Parameters(canonical(W), mean, log_sigma2), FitReport("eig", N, True, (log_likelihood,), solver)
