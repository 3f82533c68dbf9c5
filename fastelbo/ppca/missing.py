"""Rows with missing cells: log p and posterior of each by its observed cells, and steps of EM. In float64.

Row n has its own G_n = W_o'W_o + s2 I, over its observed cells o.
"""

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from fastelbo._internal import ordered
from fastelbo._internal.ordered import ordered_sum
from fastelbo.likelihoods import LOG_2PI
from fastelbo.ppca.algebra import grams, pairs, product, solution
from fastelbo.ppca.data import Dataset, dense
from fastelbo.ppca.result import Parameters, Step, check_rank
from fastelbo.reference import read_data


class RowPosteriors(NamedTuple):
    """The posterior of every row, given its observed cells. float64."""

    mean: Tensor  # [N, M]
    inverse: Tensor  # [N, M, M]: G_n^-1
    log_prob: Tensor  # [N]: log p(x_o)
    centered: Tensor  # [N, D]: x - b, 0 where missing


def posteriors(x: Tensor, W: Tensor, b: Tensor, log_sigma2: Tensor, observed: Tensor) -> RowPosteriors:
    """x [N, D], observed bool [N, D] -> log p and posterior of each row; differentiable in all but observed."""
    W, (N, M) = W.double(), (len(x), W.shape[1])
    log_s2 = ordered.expand(log_sigma2.double(), torch.Size([N]))
    s2 = torch.exp(log_s2)
    # replaced before the maths, so that a NaN reaches neither value nor gradient
    known = read_data(torch.where(observed, x, 0), torch.float64)
    r = torch.where(observed, known - ordered.expand(b.double(), x.shape), 0.0)
    cells = observed.double()
    G = grams(cells, W) + torch.diag_embed(s2.unsqueeze(1).expand(N, M))
    mean, inverse, log_det_G = solution(G, product(r, W))
    # |r - W m|^2 / s2 + |m|^2, which is least at m: an error of m is of second order here
    e = torch.where(observed, r - product(mean, W.mT), 0.0)
    distance = ordered_sum(e.square(), 1) / s2 + ordered_sum(mean.square(), 1)
    count = cells.sum(1)
    log_det = (count - M) * log_s2 + log_det_G
    return RowPosteriors(mean, inverse, -0.5 * (count * LOG_2PI + log_det + distance), r)


def steps(dataset: Dataset, start: Parameters, min_sigma2: float, least: Tensor) -> Iterator[Step]:
    """Two steps of parameter-expanded EM, and an extrapolation of them wherever log p(x) does not fall by it.

    Where log s2 falls to `least`, the likelihood has no maximum.

    Reference: missing cells: Ilin & Raiko 2010, sec. 3; extrapolation: Varadhan & Roland 2008 (S3); Liu, Rubin & Wu
    1998.
    """
    (D, M), floor = start.W.shape, math.log(min_sigma2) if min_sigma2 > 0 else -math.inf

    def length(change: Tensor) -> float:
        # in the units of the likelihood: what moves x by less than sigma counts little, whatever the size of W
        moved = change[:-1].square().sum() * torch.exp(-third[-1])
        return math.sqrt(float(moved + 0.5 * D * change[-1].square()))

    first = torch.cat([t.flatten() for t in start])
    first[-1].clamp_(floor)
    value, second = _step(dataset, first, D, floor)
    while True:
        yield value, _split(first, D)
        if not min(first[-1], second[-1]) > least:  # NaN too
            check_rank(M, dataset.N, M)
        middle, third = _step(dataset, second, D, floor)
        r = second - first
        v = third - second - r
        far = max(length(r) / max(length(v), 1e-300), 1.0)
        first = first + 2 * far * r + far**2 * v
        first[-1].clamp_(floor)
        value, second = _step(dataset, first, D, floor)
        if not value >= middle:
            first = third
            value, second = _step(dataset, third, D, floor)


def _split(vector: Tensor, D: int) -> Parameters:
    """The parameters that are in one vector."""
    W, b, log_sigma2 = vector.split([len(vector) - D - 1, D, 1])
    return Parameters(W.view(D, -1), b, log_sigma2[0])


def _step(dataset: Dataset, parameters: Tensor, D: int, floor: float) -> tuple[float, Tensor]:
    """Mean log p(x) of the parameters, in one vector, and the next ones.

    The M step is that for z ~ N(mu, K); the same model with N(0, I) is returned. Each column d has normal equations of
    its own, for its row of W and of b.
    """
    W, b, log_s2 = _split(parameters, D)
    M = W.shape[1]
    i, j, where = pairs(M + 1, W.device)
    A = W.new_zeros(D, len(i))  # sum over n that have d of E[(z, 1) (z, 1)']
    S = W.new_zeros(D, M + 1)  # sum of (x - b) (m, 1)
    squares = W.new_zeros(D)
    of_z = W.new_zeros(len(i))  # sum over n that have any cell of E[(z, 1) (z, 1)']
    log_prob, cells = torch.zeros(2, dtype=W.dtype, device=W.device)
    size = max(16, (1 << 21) // (M * M))
    for piece, weights in dense(dataset.pieces()):
        for x, w in zip(piece.split(size), weights.split(size), strict=True):
            observed = ~x.isnan()
            found = posteriors(x, W, b, log_s2, observed)
            z = torch.cat([found.mean, found.mean.new_ones(len(x), 1)], 1)
            second = z.unsqueeze(2) * z.unsqueeze(1)
            second[:, :M, :M] += torch.exp(log_s2) * found.inverse
            second = second[:, i, j]
            share = observed * w[:, None]
            A += share.mT @ second
            of_z += (observed.any(1) * w) @ second
            S += found.centered.mT @ (z * w[:, None])
            squares += w @ found.centered.square()
            log_prob += w @ found.log_prob
            cells += share.sum()
    dataset.processes.sum(A, S, squares, of_z, log_prob, cells)
    coefficients = torch.linalg.solve(A[:, where], S)
    moments = of_z[where] / of_z[-1]
    mu = moments[:-1, -1]
    K = torch.linalg.cholesky_ex(moments[:-1, :-1] - torch.outer(mu, mu))[0]
    W, shift = coefficients.split([M, 1], 1)
    next_s2 = (squares - (coefficients * S).sum(1)).sum() / cells
    new = (W @ K).flatten(), b + shift[:, 0] + W @ mu, torch.log(next_s2).clamp_min(floor).reshape(1)
    return float(log_prob) / dataset.N, torch.cat(new)
