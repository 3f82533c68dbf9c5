"""What the observed cells of a row say of its other cells: their mean, and how far off it may be. In float64."""

from collections.abc import Iterable
from numbers import Integral
from typing import Any

import torch
from torch import Tensor

from fastelbo._internal import ordered
from fastelbo._internal.arguments import refusal
from fastelbo.ppca import algebra, density, missing
from fastelbo.ppca.algebra import product
from fastelbo.ppca.result import Parameters

PIECE_ELEMENTS = 1 << 21  # of G_n^-1 of the rows, at a time


def impute(x: Tensor, parameters: Parameters, return_std: bool) -> tuple[Tensor, Tensor | None]:
    """x [N, D] with its NaN cells replaced by their means given the row's other cells, and their standard deviations
    sqrt(s2 (1 + w_d' G_o^-1 w_d)) [N, D], 0 of observed cells, if asked for.

    Rows are taken in pieces, so that without gradients no [N, M, M] is in memory.
    """
    W, _, log_s2 = parameters.to(torch.float64)
    std = x.new_zeros(x.shape, dtype=parameters.W.dtype) if return_std else None
    if not density.has_nan(x):
        mean = density.decode(density.posterior(x, parameters)[0], parameters)
        return torch.where(x.isnan(), mean.to(x.dtype), x), std
    gaps = x.isnan().any(1)
    means, deviations = [], []
    for part in x[gaps].split(max(16, PIECE_ELEMENTS // W.shape[1] ** 2)):
        hidden = part.isnan()
        found = missing.posteriors(part, *parameters, ~hidden)
        means.append(torch.where(hidden, density.decode(found.mean, parameters).to(x.dtype), part))
        if return_std:
            spread = algebra.forms(found.inverse, W).clamp_min(0)
            deviation = ordered.expand(torch.exp(0.5 * log_s2), part.shape) * torch.sqrt(1 + spread)
            deviations.append(torch.where(hidden, deviation, 0.0).to(parameters.W.dtype))
    filled = x.index_put((gaps,), torch.cat(means))
    return filled, None if std is None else std.index_put((gaps,), torch.cat(deviations))


def conditional(x: Tensor, columns: list[int], parameters: Parameters) -> tuple[Tensor, Tensor]:
    """Mean [N, L] and covariance W_c Cov(z | x_o) W_c' + s2 I [N, L, L] of these columns given a row's other cells."""
    W, b, log_s2 = parameters.to(torch.float64)
    N, L, (D, M) = len(x), len(columns), W.shape
    chosen = torch.tensor(columns, device=x.device)
    left = torch.ones(D, dtype=torch.bool, device=x.device).index_fill(0, chosen, False)
    others = torch.nonzero(left).flatten()
    rest = x.index_select(1, others)
    if L == D or density.has_nan(rest):
        mean, inverse, *_ = missing.posteriors(x, W, b, log_s2, left & ~x.isnan())
    else:  # one G of all rows
        mean, inverse, _ = algebra.posterior(rest, W[others], b[others], log_s2)
    Wc = W[chosen]
    half = product(inverse.reshape(-1, M), Wc.mT).view(-1, M, L)
    full = product(half.mT.reshape(-1, M), Wc.mT).view(-1, L, L)
    full = 0.5 * (full + full.mT) + torch.eye(L, dtype=W.dtype, device=x.device)
    full = ordered.expand(torch.exp(log_s2), full.shape) * full
    if inverse.dim() == 2:
        full = ordered.expand(full[0], torch.Size([N, L, L])).clone()
    expected = product(mean, Wc.mT)
    expected = expected + ordered.expand(b[chosen], expected.shape)
    return expected.to(parameters.W.dtype), full.to(parameters.W.dtype)


def columns_of(columns: object, D: int) -> list[int]:
    """The columns that a sequence of ints, or a bool mask [D], names.

    Raises:
        TypeError, ValueError: anything else; none; a number twice or beyond the columns.
    """
    expected = "a sequence of ints or a bool mask [D]"
    items = columns.tolist() if hasattr(columns, "tolist") else columns
    if not isinstance(items, Iterable) or isinstance(items, str | bytes | dict):
        raise refusal("columns", expected, columns)
    found: list[Any] = list(items)
    if found and all(type(item) is bool for item in found):
        if len(found) != D:
            raise ValueError(f"columns must be a bool mask [D] with D={D}; got {len(found)} values")
        found = [d for d, named in enumerate(found) if named]
    for d in found:
        if isinstance(d, bool) or not isinstance(d, Integral):
            raise TypeError(f"columns must be {expected}; got one with {type(d).__name__}")
    found = [int(d) for d in found]
    if beyond := [d for d in found if not 0 <= d < D]:
        raise ValueError(f"columns must be from 0 to {D - 1}; got {beyond[0]}")
    if not found:
        raise ValueError("columns must name at least one column; got none")
    if len(set(found)) < len(found):
        raise ValueError(f"columns must name every column once; got {found}")
    return found
