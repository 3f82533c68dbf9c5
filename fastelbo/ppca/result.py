"""What a fit finds, and what has no maximum of the likelihood."""

import math
from typing import Annotated, NamedTuple

import torch
from torch import Tensor

from fastelbo._internal.arguments import number
from fastelbo.likelihoods import LOG_2PI
from fastelbo.ppca.choice import Components, least, shown

variance = number(lambda value: 0 <= value < math.inf, "at least 0 and finite")
Variance = Annotated[float, variance]


class Parameters(NamedTuple):
    """Of the model x = W z + b + e, in its state dict's order."""

    W: Tensor  # [D, M]
    b: Tensor  # [D]
    log_sigma2: Tensor  # []: log s2

    def to(self, dtype: torch.dtype) -> "Parameters":
        return Parameters(*(t.to(dtype) for t in self))


class FitReport(NamedTuple):
    """How a fit went."""

    method: str  # "eig" or "em"
    rows: int  # N
    converged: bool  # "eig" always, but for the solver "krylov"
    # mean log p(x) per row in nats, with the rows' weights: of the parameters before every step and at the end; of
    # "eig", at the end alone
    log_likelihood: tuple[float, ...]
    solver: str | None = None  # of "eig"


Step = tuple[float, Parameters]  # mean log p(x) per row, and the parameters that have it


Found = tuple[Parameters, FitReport]  # float64; W with orthogonal columns, longest first, the largest entry of each > 0


class RankError(ValueError):
    """As many components as the data have dimensions: the likelihood has no maximum."""


def check_components(n_components: Components, D: int) -> None:
    """ValueError unless at least one direction is left for the noise."""
    if least(n_components) >= D:
        raise ValueError(f"n_components must be less than the number of columns D={D}; got {shown(n_components)}")


def check_rank(rank: int, N: int, n_components: Components) -> None:
    """ValueError unless N centered rows of this rank have a direction of their own for the noise."""
    if rank <= least(n_components):
        got = shown(n_components)
        raise RankError(
            f"n_components must be less than the rank {rank} of the centered data [{N} rows]; got {got}: "
            "to rounding, sigma2 would be 0 and the likelihood without a maximum; if the scales of the columns differ, "
            "standardize the columns"
        )


def best_of_subspace(values: Tensor, vectors: Tensor, D: int, min_sigma2: float) -> tuple[float, Tensor, Tensor]:
    """The maximum of the likelihood over W in the span of vectors, and over s2.

    s2 is the mean variance over the directions that are left; of those in the span too where they are below it.

    Args:
        values: of the covariance, falling: the variances along the vectors, and others whose sum is that of the
            directions that are left.
        vectors: [D, M], orthonormal.

    Returns:
        The mean of log p(x), W [D, M] and log s2.

    Reference: Tipping & Bishop 1999, eq. 7 and 8.
    """
    M = vectors.shape[1]
    means = torch.stack([values[k:].sum() / (D - k) for k in range(M + 1)])
    s2 = means[(values[:M] > means[1:]).sum()].clamp_min(min_sigma2)
    top = values[:M].maximum(s2)
    log_det = torch.log(top).sum() + (D - M) * torch.log(s2)
    log_likelihood = -0.5 * (D * LOG_2PI + log_det + (values[:M] / top).sum() + values[M:].sum() / s2)
    return float(log_likelihood), vectors * torch.sqrt(top - s2), torch.log(s2)


def canonical(W: Tensor) -> Tensor:
    """W turned so that its columns are orthogonal, longest first, the largest entry of each positive: W W' stays."""
    _, turn = torch.linalg.eigh(W.mT @ W)
    W = W @ turn.flip(1)
    return W * torch.where(W.gather(0, W.abs().argmax(0, keepdim=True)) < 0, -1.0, 1.0)
