"""Probabilistic PCA of rows with missing cells: log p and posterior of each row by its observed cells, in float64.

Row n has its own G_n = W_o'W_o + s2 I, over its observed cells o. All G_n of a batch come out of one matrix product,
observed [N, D] times the products W_di W_dj [D, M (M + 1) / 2], taken in pieces of D: memory O(N M^2).
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from fastelbo.likelihoods import LOG_2PI
from fastelbo.reference import read_data

PIECE_ELEMENTS = 1 << 20  # of the products W_di W_dj that are in memory at a time


class Rows(NamedTuple):
    """The posterior of every row, given its observed cells. float64."""

    mean: Tensor  # [N, M]
    factor: Tensor  # [N, M, M]: the Cholesky factor of G_n
    log_prob: Tensor  # [N]: log p(x_o)
    centered: Tensor  # [N, D]: x - b, 0 where missing


def pairs(size: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """The pairs i <= j of 0 .. size - 1: i [P], j [P], and where in them each (i, j) is [size, size]."""
    i, j = torch.triu_indices(size, size, device=device)
    where = torch.empty(size, size, dtype=torch.int64, device=device)
    where[i, j] = where[j, i] = torch.arange(len(i), device=device)
    return i, j, where


def _grams(observed: Tensor, W: Tensor) -> Tensor:
    """sum over observed d of W_d W_d' [N, M, M]; observed [N, D] is 0 and 1 in W's dtype."""
    i, j, where = pairs(W.shape[1], W.device)

    def piece(cells: Tensor, part: Tensor) -> Tensor:
        return cells @ (part[:, i] * part[:, j])

    total = observed.new_zeros(len(observed), len(i))
    size = max(1, PIECE_ELEMENTS // len(i))
    # computed again in the backward, so that only W itself is kept; the first checkpoint imports torch's compiler
    again = W.requires_grad and torch.is_grad_enabled()
    for cells, part in zip(observed.split(size, 1), W.split(size), strict=True):
        total = total + (checkpoint(piece, cells, part, use_reentrant=False) if again else piece(cells, part))
    return total[:, where]


def rows(x: Tensor, W: Tensor, b: Tensor, log_sigma2: Tensor, observed: Tensor) -> Rows:
    """x [N, D], observed bool [N, D] -> log p and posterior of each row; differentiable in all but observed."""
    W, b, log_s2 = W.double(), b.double(), log_sigma2.double()
    s2 = torch.exp(log_s2)
    # replaced before the maths, so that a NaN reaches neither value nor gradient
    r = torch.where(observed, read_data(torch.where(observed, x, 0), torch.float64) - b, 0.0)
    M = W.shape[1]
    cells = observed.double()
    G = _grams(cells, W) + s2 * torch.eye(M, dtype=W.dtype, device=W.device)
    factor, info = torch.linalg.cholesky_ex(G)
    p = r @ W
    mean = torch.cholesky_solve(p.unsqueeze(2), factor).squeeze(2)
    # |r - W m|^2 / s2 + |m|^2, which is least at m: an error of m is of second order here
    e = torch.where(observed, r - mean @ W.mT, 0.0)
    distance = e.square().sum(1) / s2 + mean.square().sum(1)
    count = cells.sum(1)
    log_det = (count - M) * log_s2 + 2 * torch.log(torch.diagonal(factor, dim1=1, dim2=2)).sum(1)
    log_prob = torch.where(info == 0, -0.5 * (count * LOG_2PI + log_det + distance), math.nan)
    return Rows(mean, factor, log_prob, r)


def log_prob(x: Tensor, W: Tensor, b: Tensor, log_sigma2: Tensor, observed: Tensor) -> Tensor:
    """log N(x_o; b_o, W_o W_o' + s2 I) [N], in the compute dtype of W; 0 where nothing is observed."""
    dtype = torch.float64 if W.dtype == torch.float64 else torch.float32
    return rows(x, W, b, log_sigma2, observed).log_prob.to(dtype)
