"""Probabilistic PCA of rows with missing cells: log p and posterior of each row by its observed cells, in float64.

Row n has its own G_n = W_o'W_o + s2 I, over its observed cells o.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from fastelbo._internal import ordered
from fastelbo._internal.ordered import ordered_sum
from fastelbo.likelihoods import LOG_2PI
from fastelbo.ppca.algebra import grams, product, solution
from fastelbo.reference import read_data


class Rows(NamedTuple):
    """The posterior of every row, given its observed cells. float64."""

    mean: Tensor  # [N, M]
    inverse: Tensor  # [N, M, M]: G_n^-1
    log_prob: Tensor  # [N]: log p(x_o)
    centered: Tensor  # [N, D]: x - b, 0 where missing


def rows(x: Tensor, W: Tensor, b: Tensor, log_sigma2: Tensor, observed: Tensor) -> Rows:
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
    return Rows(mean, inverse, -0.5 * (count * LOG_2PI + log_det + distance), r)


def log_prob(x: Tensor, W: Tensor, b: Tensor, log_sigma2: Tensor, observed: Tensor) -> Tensor:
    """log N(x_o; b_o, W_o W_o' + s2 I) [N], in the compute dtype of W; 0 where nothing is observed."""
    dtype = torch.float64 if W.dtype == torch.float64 else torch.float32
    return rows(x, W, b, log_sigma2, observed).log_prob.to(dtype)
