"""How many components: a number, or what chooses it from the eigenvalues of the data's covariance. In float64."""

import math
from numbers import Integral, Real
from typing import Annotated, Any

import torch
from torch import Tensor

from fastelbo._internal.arguments import count, refusal
from fastelbo.likelihoods import LOG_2PI

CRITERIA = ("bic", "evidence")
EXPECTED = 'an int, a fraction in (0, 1), "bic" or "evidence"'
EPS = torch.finfo(torch.float64).eps


def _components(name: str, value: Any) -> int | float | str:
    if isinstance(value, Integral) and not isinstance(value, bool):
        return int(count(name, value))
    if isinstance(value, bool) or not isinstance(value, str | Real):
        raise refusal(name, EXPECTED, value)
    if isinstance(value, str) and value in CRITERIA:
        return value
    if isinstance(value, str) or not 0 < float(value) < 1:
        raise ValueError(f"{name} must be {EXPECTED}; got {shown(value)}")
    return float(value)


Components = Annotated[int | float | str, _components]  # M, or what chooses it


def shown(n_components: object) -> str:
    """As messages have it."""
    return f'"{n_components}"' if isinstance(n_components, str) else f"{n_components}"


def least(n_components: Components) -> int:
    """M, or the smallest that may be chosen."""
    return n_components if isinstance(n_components, int) else 1


def choose(values: Tensor, N: int, D: int, criterion: float | str, min_sigma2: float = 0.0) -> int:
    """The number of components M of N rows of D columns, from 1 to R - 1.

    Args:
        values: [R], float64, the eigenvalues of the covariance (divided by N) that are not 0, falling; R at least 2.
        criterion: a fraction of the variance, of which the first M components have more; "bic": the least
            -2 N log p + (D M - M (M - 1) / 2 + D + 1) log N, log p the maximum; "evidence": that of `evidence`.
        min_sigma2: the least s2, which "bic" reads.

    Reference: Schwarz 1978; Minka 2000.
    """
    if isinstance(criterion, float):
        share = values.cumsum(0) / values.sum()
        return min(int((share <= criterion).sum()) + 1, len(values) - 1)
    values = values.clamp_min(torch.finfo(torch.float64).tiny)
    scores = evidence(values, N, D) if criterion == "evidence" else -bic(values, N, D, min_sigma2)
    return int(scores.argmax()) + 1


def bic(values: Tensor, N: int, D: int, min_sigma2: float = 0.0) -> Tensor:
    """Of M = 1 .. R - 1 [R - 1]: -2 N log p + (D M - M (M - 1) / 2 + D + 1) log N. Arguments as of `choose`."""
    M, rest = _counts(values), _sums_after(values)
    s2 = (rest / (D - M)).clamp_min(min_sigma2)
    top = values.clamp_min(min_sigma2)[:-1]  # s2 is a mean of smaller ones, unless it is min_sigma2
    log_det = torch.log(top).cumsum(0) + (D - M) * torch.log(s2)
    log_p = -0.5 * (D * LOG_2PI + log_det + (values[:-1] / top).cumsum(0) + rest / s2)
    return -2 * N * log_p + (D * M - M * (M - 1) / 2 + D + 1) * math.log(N)


def evidence(values: Tensor, N: int, D: int) -> Tensor:
    """log p(X | M) of M = 1 .. R - 1 [R - 1] by Laplace's approximation, but for what no M changes.

    log p(U) - N/2 (sum_i log l_i + (D - M) log s2) + (m + M)/2 log 2 pi - log |A|/2 - M/2 log N, with l_i the first M
    values, s2 the mean of the others, m = D M - M (M + 1)/2, p(U) the uniform density of M directions, and
    |A| = prod_{i <= M} prod_{i < j <= D} N (l_i - l_j) (1/k_j - 1/l_i), where k_j = l_j for j <= M, else s2.

    Where values are equal to rounding, A is singular: their difference is taken as their standard error, l_i / sqrt(N).
    Arguments as of `choose`.

    Reference: Minka 2000, eq. 77 to 80.
    """
    R, M, s2 = len(values), _counts(values), _sums_after(values) / (D - _counts(values))
    k = M.long() - 1
    log_l, log_s2 = torch.log(values), torch.log(s2)

    def differences(others: Tensor) -> Tensor:
        """log (l_i - others_j) [R, len(others)] where l_i is the larger one."""
        d = values[:, None] - others
        alike = values[:, None] / math.sqrt(N)
        return torch.where(d > D * EPS * values[:, None], d, alike).log_()

    of_pairs = differences(values).triu_(1)  # i < j; beyond R, l_j = 0
    within = of_pairs.sum(0).cumsum(0)[k]  # i < j <= M
    across = (of_pairs.sum(1) + (D - R) * log_l).cumsum(0)[k] - within  # i <= M < j
    of_s2 = differences(s2)[:, k].triu_().sum(0)  # i <= M
    before = log_l.cumsum(0)[k]
    # (1/k_j - 1/l_i) = (l_i - k_j) / (l_i k_j): each pair i < j <= M has its difference twice
    inner = 2 * within - (M - 1) * before
    outer = across + (D - M) * (of_s2 - before - M * log_s2)
    m = D * M - M * (M + 1) / 2
    log_det = inner + outer + m * math.log(N)
    half = (D - torch.arange(R - 1, dtype=values.dtype, device=values.device)) / 2
    log_u = (torch.lgamma(half) - half * math.log(math.pi)).cumsum(0) - M * math.log(2)
    fit = -0.5 * N * (before + (D - M) * log_s2)
    return log_u + fit + 0.5 * ((m + M) * LOG_2PI - log_det - M * math.log(N))


def _counts(values: Tensor) -> Tensor:
    """M = 1 .. R - 1, float64"""
    return torch.arange(1, len(values), dtype=values.dtype, device=values.device)


def _sums_after(values: Tensor) -> Tensor:
    """The sums of all values but the first M, M = 1 .. R - 1."""
    return values.flip(0).cumsum(0).flip(0)[1:]
