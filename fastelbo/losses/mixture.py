"""Mixtures of diagonal Gaussians: priors, aggregate posteriors, the densities of a total correlation."""

import math
from typing import Annotated, NamedTuple

import torch
from torch import Tensor

from fastelbo import reference
from fastelbo._internal import arguments
from fastelbo._internal.arguments import checked
from fastelbo._internal.ops import call
from fastelbo._internal.ordered import ordered_sum
from fastelbo.likelihoods import LOG_2PI
from fastelbo.losses.inputs import expand

_op = torch.ops.fastelbo


@checked
def mixture_log_prob(
    z: arguments.Floats,
    mu: arguments.Floats,
    logvar: arguments.Floats,
    log_weights: arguments.Floats | None = None,
    *,
    per_dimension: arguments.Flag = False,
) -> Tensor:
    """Log density of a mixture of diagonal Gaussians, in one pass over all pairs of a point and a component.

    log sum_c w_c prod_m N(z_m; mu_cm, exp(logvar_cm)); with per_dimension log sum_c w_c N(z_m; mu_cm, exp(logvar_cm))
    of each m. Distances are differences, which cancel at no scale; beyond inputs, outputs and gradients, memory is
    O(N + C).

    Args:
        z: [N, M], or any leading dimensions [..., M], a floating dtype.
        mu, logvar: [C, M]. Means and log variances of the components.
        log_weights: [C], or a tensor that broadcasts to [..., C], which is read as it lies: the log weights, which are
            not normalized; -inf leaves a component out. None: -log C.
        per_dimension: whether each dimension is a mixture of its own, with the same weights.

    Returns:
        [...], or [..., M] with per_dimension, in nats; float32, or float64 for float64 inputs. Where no component has
        any density the value is -inf and the gradient 0.

    Raises:
        ValueError, TypeError: no component, shapes or dtypes that do not fit.

    Note:
        torch.func, forward-mode AD and derivatives of the gradient take plain PyTorch, in memory O(N C M).

    Reference: as a prior: Tomczak & Welling 2018, eq. 9; of a total correlation: Chen et al. 2018, app. C.
    """
    own = None
    if log_weights is not None and mu.dim() and (log_weights.dim() == 0 or log_weights.shape[-1] == 1 != len(mu)):
        own, log_weights = log_weights, log_weights.new_zeros(len(mu))  # one weight for all components is a term apart
    log_p: Tensor = call(
        _op.mixture_log_prob.default, reference.mixture_log_prob, z, mu, logvar, log_weights, per_dimension
    )
    if own is None:
        return log_p
    shape = log_p.shape if per_dimension else torch.Size((*log_p.shape, 1))
    own = expand("log_weights", own, shape, "a weight for each z").to(log_p.dtype)
    total = log_p + (own if per_dimension else own.squeeze(-1))
    return torch.where(total == -torch.inf, -torch.inf, total)


class TotalCorrelation(NamedTuple):
    """The KL of q(z | x) from N(0, I), averaged over the data, in three terms; each a scalar, in nats."""

    mutual_information: Tensor  # of x and z: E[log q(z | x) - log q(z)]
    total_correlation: Tensor  # of the dimensions of z: E[log q(z) - sum_m log q(z_m)]
    dimension_wise_kl: Tensor  # E[sum_m log q(z_m) - log p(z)]


WEIGHTS = ("mws", "mss")


def _log_weights(weights: str, B: int, N: int, like: Tensor) -> Tensor:
    """Of the posteriors of a batch in log q(z) of each z: 0-d, or [B, B] for z in reverse order, in memory O(B)."""
    if weights == "mws":
        return torch.full((), -math.log(N * B), dtype=like.dtype, device=like.device)
    others = B - 1
    row = torch.full((2 * B - 1,), 1 / others, dtype=like.dtype, device=like.device)
    row[others] = 1 / N  # that of its own x
    row[[others - 1, -1]] = (N - others) / (N * others)  # that of the x before it
    return row.log().as_strided((B, B), (1, 1))


@checked
def total_correlation(
    z: arguments.Floats,
    mu: arguments.Floats,
    logvar: arguments.Floats,
    dataset_size: arguments.Count,
    *,
    weights: Annotated[str, arguments.one_of(WEIGHTS)] = "mws",
) -> TotalCorrelation:
    """The three terms of the KL of beta-TCVAE, by the posteriors of one batch; they add up to the averaged KL.

    mutual information + total correlation + dimension-wise KL = mean [log q(z | x) - log N(z; 0, I)], with q(z) =
    sum_j w_j q(z | x_j) over the batch, and q(z_m) by the same weights.
    - "mws", minibatch weighted sampling: w = 1 / (N B), as the paper has it. With the whole data set as the batch, log
      N is in the mutual information and -M log N in the dimension-wise KL: constants, without a gradient.
    - "mss", minibatch stratified sampling: 1 / N for the datum's own posterior, (N - B + 1) / (N (B - 1)) for that of
      one other datum, 1 / (B - 1) for the rest. q(z) is unbiased, its logarithm is not.

    For evaluation take `fastelbo.aggregated_posterior`, which has the posteriors of all data.

    Args:
        z: [B, M] or [K, B, M], samples of q(z | x), a floating dtype: those of `fastelbo.rsample`.
        mu, logvar: [B, M], of q(z | x) = N(mu, diag exp(logvar)).
        dataset_size: N, the number of training data.
        weights: "mws" or "mss".

    Returns:
        TotalCorrelation of three scalars, means over K and B, in nats; float32, or float64 for float64 inputs. The loss
        is mean_b -log p(x | z) + alpha mutual_information + beta total_correlation + gamma dimension_wise_kl.

    Raises:
        ValueError: shapes that do not fit; "mss" of a batch of one, or of more data than the data set has.

    Reference: Chen et al. 2018, eq. 2, eq. 5 and app. C.
    """
    if mu.dim() != 2 or logvar.shape != mu.shape or len(mu) == 0:
        raise ValueError(
            f"mu and logvar must be [B, M] with B of at least 1; got {tuple(mu.shape)} and {tuple(logvar.shape)}"
        )
    if z.dim() not in (2, 3) or z.shape[-2:] != mu.shape:
        raise ValueError(f"z must be [B, M] or [K, B, M] with [B, M]={tuple(mu.shape)} from mu; got {tuple(z.shape)}")
    B = len(mu)
    if weights == "mss" and not 2 <= B <= dataset_size:
        raise ValueError(
            f'dataset_size must be at least B={B}, and B at least 2, for weights="mss"; got {dataset_size}'
        )
    z, mu, logvar = (t.to(reference.compute_dtype(z)) for t in (z, mu, logvar))
    terms = (z - mu).square() * torch.exp(-logvar) + logvar
    log_w = _log_weights(weights, B, dataset_size, z)
    points, size = z.flip(-2) if weights == "mss" else z, B * (len(z) if z.dim() == 3 else 1)
    log_q = mixture_log_prob(points, mu, logvar, log_w)
    log_qs = mixture_log_prob(points, mu, logvar, log_w, per_dimension=True)
    log_q_x, log_p = -0.5 * (terms + LOG_2PI), -0.5 * (z.square() + LOG_2PI)
    log_q, log_qs, log_q_x, log_p = (ordered_sum(t, *range(t.dim())) / size for t in (log_q, log_qs, log_q_x, log_p))
    return TotalCorrelation(log_q_x - log_q, log_q - log_qs, log_qs - log_p)
