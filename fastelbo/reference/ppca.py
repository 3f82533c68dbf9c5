"""Probabilistic PCA."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from fastelbo.likelihoods import LOG_2PI
from fastelbo.reference.derivatives import backward_of
from fastelbo.reference.likelihood import compute_dtype, read_data


def ppca_qr(W: Tensor, log_sigma2: Tensor) -> tuple[Tensor, Tensor]:
    """Q [D, M] and R [M, M], upper, of [W; sigma I] = [Q; sigma R^-1] R: R'R = W'W + s2 I.

    A Cholesky factor of W'W + s2 I is the same but for signs, and loses twice the digits where that is ill-conditioned.
    """
    sigma = torch.exp(0.5 * log_sigma2)
    Q, R = torch.linalg.qr(torch.cat([W, sigma * torch.eye(W.shape[1], dtype=W.dtype, device=W.device)]))
    return Q[: len(W)], R


def ppca_log_prob(x: Tensor, W: Tensor, b: Tensor, log_sigma2: Tensor) -> Tensor:
    """log N(x; b, W W' + s2 I) -> [N], by the QR decomposition of [W; sigma I].

    r' C^-1 r = |r - W m|^2 / s2 + |m|^2, with r = x - b, m = R^-1 Q'r and W m = Q Q'r: unlike (|r|^2 - (W'r)' m) / s2
    it cancels nothing.
    """
    dtype = compute_dtype(W)
    W, log_s2 = W.to(dtype), log_sigma2.to(dtype)
    D, M = W.shape
    Q, R = ppca_qr(W, log_s2)
    r = read_data(x, dtype) - b.to(dtype)
    p = r @ Q
    m: Tensor = torch.linalg.solve_triangular(R, p.mT, upper=True).mT
    distance = ((r - p @ Q.mT) * torch.exp(-0.5 * log_s2)).square().sum(1) + m.square().sum(1)
    log_det = (D - M) * log_s2 + 2 * torch.log(torch.diagonal(R).abs()).sum()
    log_p: Tensor = -0.5 * (D * LOG_2PI + log_det + distance)
    return log_p


ppca_log_prob_backward = backward_of(ppca_log_prob, ("x", "W", "b", "log_sigma2"))


def ppca_factor(W: Tensor, log_sigma2: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """basis [D, M], triangle and whiten [M, M], float64: W = basis triangle with an orthonormal basis, and
    whiten' (triangle triangle' + s2 I) whiten = I. Both matrices are upper; what beyond that is free are signs, and the
    directions that columns of W take which depend on those before them.
    """
    D, M = W.shape
    padded = torch.nn.functional.pad(W.double(), (0, 0, 0, max(M - D, 0)))
    basis, triangle = torch.linalg.qr(padded)
    sigma = torch.exp(0.5 * log_sigma2.double())
    eye = torch.eye(M, dtype=triangle.dtype, device=W.device)
    R = torch.linalg.qr(torch.cat([triangle.mT, sigma * eye]), "r")[1]
    return basis[:D], triangle, torch.linalg.solve_triangular(R, eye, upper=True)


def _residual(x: Tensor, b: Tensor, basis: Tensor, coords: Tensor) -> Tensor:
    return read_data(x, torch.float64) - b.double() - coords @ basis.mT


def ppca_posterior(x: Tensor, W: Tensor, b: Tensor, log_sigma2: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The mean G^-1 W'(x - b) [N, M], G^-1 and log |G|, where G = W'W + s2 I; float64."""
    Q, R = ppca_qr(W, log_sigma2)
    mean = torch.linalg.solve_triangular(R, ((read_data(x, torch.float64) - b) @ Q).mT, upper=True).mT
    root = torch.linalg.solve_triangular(R, torch.eye(len(R), dtype=R.dtype, device=R.device), upper=True)
    return mean, root @ root.mT, 2 * torch.log(torch.diagonal(R).abs()).sum()


def ppca_grams(observed: Tensor, W: Tensor) -> Tensor:
    """The sums over the observed d of W_d W_d' [N, M, M]; observed [N, D] is 0 and 1."""
    squares = (W.unsqueeze(2) * W.unsqueeze(1)).flatten(1)
    found: Tensor = torch.unflatten(observed @ squares, 1, (W.shape[1], -1))
    return found


def ppca_forms(A: Tensor, W: Tensor) -> Tensor:
    """w_d' A_n w_d [N, D] of A [N, M, M], symmetric, and the rows w_d of W [D, M]."""
    return ((W @ A) * W).sum(2)


def ppca_solution(G: Tensor, p: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """G^-1 p [N, M], G^-1 and log |G| [N] of G [N, M, M]; the last is NaN where G is not positive definite."""
    factor, info = torch.linalg.cholesky_ex(G)
    mean = torch.cholesky_solve(p.unsqueeze(2), factor).squeeze(2)
    log_det = 2 * torch.log(torch.diagonal(factor, dim1=1, dim2=2)).sum(1)
    return mean, torch.cholesky_inverse(factor), torch.where(info == 0, log_det, math.nan)


def ppca_invert(matrices: Tensor) -> tuple[Tensor, Tensor]:
    """The inverses of symmetric positive definite matrices [N, M, M], and their log determinants [N]."""
    return ppca_solution(matrices, matrices[:, 0])[1:]


def ppca_project(x: Tensor, basis: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """(x - b) basis [N, M] and |x - b|^2 [N], float64; the basis may be any matrix."""
    r = read_data(x, torch.float64) - b.double()
    return r @ basis, r.square().sum(1)


def ppca_rest(x: Tensor, basis: Tensor, b: Tensor, coords: Tensor, square: Tensor) -> Tensor:
    """|x - b - basis coords|^2 [N], float64, of the `coords` and `square` that `ppca_project` gave."""
    return _residual(x, b, basis, coords).square().sum(1)


def ppca_residual(
    x: Tensor, basis: Tensor, b: Tensor, coords: Tensor, mean: Tensor, weight: Tensor, needs: Sequence[bool]
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """With e = weight (x - b - basis coords), those that are needed: e [N, D], sum_n e mean' [D, M], sum_n e [D]."""
    e, dtype = weight[:, None] * _residual(x, b, basis, coords), compute_dtype(b)
    found = (e, e.mT @ mean, e.sum(0))
    residual, cross, total = (t.to(dtype) if need else None for t, need in zip(found, needs, strict=True))
    return residual, cross, total


def ppca_log_prob_forward(
    x: Tensor, W: Tensor, b: Tensor, log_sigma2: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """log p(x) [N], and coords, rest, basis, triangle and whiten, which its backward reads."""
    basis, triangle, whiten = ppca_factor(W, log_sigma2)
    coords, square = ppca_project(x, basis, b)
    rest = ppca_rest(x, basis, b, coords, square)
    return ppca_log_prob(x, W, b, log_sigma2), coords, rest, basis, triangle, whiten
