"""Method "eig": the maximum of the likelihood by the eigenvalues of the data's covariance, in float64.

To pickles, this is the module `fastelbo.ppca.fit` of earlier versions.
"""

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from fastelbo.ppca import data
from fastelbo.ppca.data import Batch, Dataset
from fastelbo.ppca.moments import Moments
from fastelbo.ppca.result import FitReport, Found, Parameters, best_of_subspace, canonical, check_components, check_rank
from fastelbo.reference import read_data

EPS = torch.finfo(torch.float64).eps


def eig(dataset: Dataset, min_sigma2: float) -> Found:
    """The maximum, in one pass over the data.

    With more than D rows the D by D covariance is summed over the batches; else the rows are kept, in their dtype, and
    the N by N Gram matrix gives the same eigenvalues.
    """
    kept: list[Batch] = []  # as long as they are at most D rows
    moments: Moments | None = None
    count = 0
    for x, weight in dataset.first_pass():
        kept.append((x, weight))
        count += len(x)
        if count > x.shape[1]:
            moments = moments or Moments(x.shape[1], x.device)
            while kept:
                moments.update(*kept.pop(0))
    if dataset.N <= dataset.D:
        return _of_rows(kept, dataset, min_sigma2)
    moments = moments or Moments(dataset.D, dataset.device)
    for batch in kept:
        moments.update(*batch)
    moments.reduce(dataset.processes)
    return of_moments(moments, dataset.n_components, min_sigma2)


def of_moments(moments: Moments, n_components: int, min_sigma2: float) -> Found:
    """The maximum for data with this mean and covariance."""
    N, D = int(moments.rows), len(moments.mean)
    check_components(n_components, D)
    deviation = torch.diagonal(moments.covariance).sqrt()
    inverse = _inverse(deviation, moments.mean, N)
    scaled, turn = torch.linalg.eigh(moments.covariance * inverse * inverse[:, None])
    check_rank(_rank(scaled.flip(0), N, D), N, n_components)
    # of a factor of the covariance: columns that are far smaller than others keep their digits
    vectors, lengths, _ = torch.linalg.svd(deviation[:, None] * turn * scaled.clamp_min(0).sqrt())
    return _maximum(lengths, vectors[:, :n_components], moments.mean, N, min_sigma2)


def _of_rows(kept: list[Batch], dataset: Dataset, min_sigma2: float) -> Found:
    """The maximum for X [N, D], N <= D, of this process's rows and those of the others: the rank by the Gram matrix of
    the scaled columns, the eigenvalues by a QR of X'.

    Reference: Bishop 2006, sec. 12.1.4.
    """
    N, D, M = dataset.N, dataset.D, dataset.n_components
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
    check_rank(_rank(torch.linalg.eigvalsh(gram).flip(0), N, D), N, M)
    _, lengths, coefficients = torch.linalg.svd(R)
    coefficients = coefficients.mT[:, :M] / lengths[:M]
    return _maximum(lengths, torch.cat([r.mT @ coefficients for r, _ in centered()]), torch.cat(means), N, min_sigma2)


def _inverse(deviation: Tensor, mean: Tensor, N: int) -> Tensor:
    """1 / deviation [D]; 0 of columns that are constant but for the rounding of their mean."""
    return torch.where(deviation > math.sqrt(N) * EPS * mean.abs(), 1 / deviation, 0.0)


def _rank(values: Tensor, N: int, D: int) -> int:
    """Of a covariance with these eigenvalues, falling."""
    return int((values > (values[0] * max(N, D) * EPS).clamp_min(0)).sum())


def _maximum(lengths: Tensor, vectors: Tensor, mean: Tensor, N: int, min_sigma2: float) -> Found:
    """Of the singular values, falling, without those that are 0 if need be, and of the first M vectors [D, M]."""
    log_likelihood, W, log_sigma2 = best_of_subspace(lengths.square(), vectors, len(mean), min_sigma2)
    return Parameters(canonical(W), mean, log_sigma2), FitReport("eig", N, True, (log_likelihood,))
