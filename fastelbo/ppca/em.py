"""Method "em": expectation maximization, accelerated: once over the data, then once per step. In float64."""

import math
from collections.abc import Iterator
from itertools import islice, pairwise

import torch
from torch import Generator, Tensor

from fastelbo import reference
from fastelbo._internal.ops import call
from fastelbo._internal.progress import progress
from fastelbo.ppca import missing
from fastelbo.ppca.choice import least
from fastelbo.ppca.data import Dataset, dense
from fastelbo.ppca.moments import column_moments
from fastelbo.ppca.result import FitReport, Found, Parameters, Step, best_of_subspace, canonical, check_rank

EPS = torch.finfo(torch.float64).eps
_op = torch.ops.fastelbo


def em(dataset: Dataset, min_sigma2: float, max_iter: int, tol: float, generator: Generator | None) -> Found:
    """The maximum by steps of O(N D M); with missing cells O(N D M^2).

    It ends when less than `tol` nats per row seem left to gain. log p(x) never falls from one step to the next but by
    rounding; should it, the step before is the result, and the report says that it did not converge.
    """
    b, variance = column_moments(dataset)
    N, D, M = dataset.N, dataset.D, least(dataset.n_components)
    check_rank(M + 1 if float(variance) > 0 else 0, N, M)  # no more is known of the rank before the fit
    device = "cpu" if generator is None else generator.device  # not torch's default device
    columns = M if dataset.missing else min(3 * M, D)
    W = torch.randn(D, columns, dtype=torch.float64, device=device, generator=generator)
    W = W.to(b.device) * torch.sqrt(variance / (2 * M))
    dataset.processes.broadcast(W, b, variance)
    if dataset.missing:
        start = Parameters(W, b, torch.log(variance / 2))
        steps = missing.steps(dataset, start, min_sigma2, torch.log(variance) + math.log(D * EPS))
    else:
        steps = complete_steps(dataset, W, b, min_sigma2)
    history: list[float] = []
    converged = False
    for value, found in progress(islice(steps, max_iter + 1), "EM", "step", max_iter + 1):
        # the exponent of log p(x) is known as well as squares of the data are in units of s2
        rounding = EPS * D * (abs(value) + D * float(variance / torch.exp(found.log_sigma2)))
        if history and not value >= history[-1] - rounding:
            break
        history.append(value)
        best = found
        if converged := _is_settled(history, tol):
            break
    return best._replace(W=canonical(best.W)), FitReport("em", N, converged, tuple(history))


def _is_settled(history: list[float], tol: float) -> bool:
    """Whether less than tol is left to gain, if the gains go on falling no slower than in the last three steps."""
    gains = [b - a for a, b in pairwise(history[-4:])]
    if len(gains) < 3:
        return False
    if gains[2] <= 1e-14 * abs(history[-1]):  # rounding errors
        return True
    ratio = max(gains[1] / gains[0], gains[2] / gains[1])
    return ratio < 1 and gains[2] * ratio / (1 - ratio) < tol


def complete_steps(dataset: Dataset, W: Tensor, b: Tensor, min_sigma2: float) -> Iterator[Step]:
    """Of complete rows, the best parameters of the subspaces that steps reach.

    The M step of EM turns span W into span S W, S the covariance of the data. Given the span, the scale of W and s2 are
    maximized exactly (the closed form for the M by M covariance of the coordinates): EM changes them by a factor of
    1 - O(s2) per step. The next span is the best one within the present one, S times it, and the direction in which it
    moved last, so that steps are conjugate: log p(x) rises by more than a step of EM would make it.

    Reference: Tipping & Bishop 1999, app. B; parameter expansion: Liu, Rubin & Wu 1998; Knyazev 2001.
    """
    N, D, M = dataset.N, dataset.D, least(dataset.n_components)
    while True:
        basis, _, _ = call(_op._ppca_factor.default, reference.ppca_factor, W, W.new_zeros(()))
        cross, second, rest = _sums(dataset, basis, b)
        second = second / N
        vectors = torch.linalg.eigh(second)[1].flip(1)
        # not eigh's values, whose errors are those of the largest: near the end, the rest of the span holds little
        values = (vectors * (second @ vectors)).sum(0).clamp_min(0)
        values, vectors = torch.cat([values, rest.reshape(1) / N]), vectors[:, :M]
        # squares of lengths, whose rounding is that of the data
        rounding = (max(N, D) * EPS) ** 2 * (values[0] + b.square().sum())
        check_rank(min(int((values > rounding).sum()), N - 1), N, M)
        U = basis @ vectors
        log_likelihood, best, log_sigma2 = best_of_subspace(values, U, D, min_sigma2)
        yield log_likelihood, Parameters(best, b, log_sigma2)
        W = torch.cat([U, cross @ vectors, basis[:, M:] @ vectors[M:]], 1)


def _sums(dataset: Dataset, basis: Tensor, b: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The weighted sums of e c', c c' and |e|^2, where c = basis'(x - b) and e = x - b - basis c.

    basis [D, L] has orthonormal columns. Three passes over each piece of the data, in its own dtype.
    """
    cross, second, rest = torch.zeros_like(basis), basis.new_zeros(basis.shape[1], basis.shape[1]), basis.new_zeros(())
    for x, w in dense(dataset.pieces()):
        coords, square = call(_op._ppca_project.default, reference.ppca_project, x, basis, b)
        rest += w @ call(_op._ppca_rest.default, reference.ppca_rest, x, basis, b, coords, square)
        inputs = x, basis, b, coords, coords, w, [False, True, False]
        cross += call(_op._ppca_residual.default, reference.ppca_residual, *inputs)[1]  # type: ignore[arg-type]
        second += (coords * w[:, None]).mT @ coords
    dataset.processes.sum(cross, second, rest)
    return cross, second, rest
