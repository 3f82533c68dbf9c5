"""CellBender's remove-background with its likelihood computed by fastelbo. One line, before the model is trained:

fastelbo.integrations.cellbender.apply()
"""

from typing import Any

import torch
from cellbender.remove_background.distributions.NegativeBinomialPoissonConvApprox import (
    NegativeBinomialPoissonConvApprox,
)
from torch import Tensor
from torch.autograd import Function

from fastelbo._internal import ops
from fastelbo.integrations._replaced import Applied, Replaced, elements, unexpanded, validate
from fastelbo.likelihoods import THETA_LIMIT

__all__ = ["apply"]

SMALL = 1e-5  # CellBender's: beside a background so much larger the cell's counts are none


def _moments(mu: Tensor, lam: Tensor, alpha: Tensor) -> tuple[Tensor, Tensor]:
    """The mean m = mu + lam and the theta alpha (m / mu)^2: by moments those of a negative binomial plus a Poisson.
    Where mu is small, the Poisson of lam: the one of the largest theta."""
    empty = mu < SMALL * lam
    mean = mu + lam
    theta = alpha * (mean / torch.where(empty, mean, mu)).square()
    return torch.where(empty, lam, mean), torch.where(empty, THETA_LIMIT, theta)


class _Moments(Function):
    """`_moments`, whose gradients are formed in place: fresh memory costs more than what is written there."""

    @staticmethod
    def forward(ctx: Any, mu: Tensor, lam: Tensor, alpha: Tensor) -> tuple[Tensor, Tensor]:
        mean, theta = _moments(mu, lam, alpha)
        ctx.save_for_backward(mu, lam, alpha, mean, theta)
        return mean, theta

    @staticmethod
    def backward(ctx: Any, of_mean: Tensor, of_theta: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        mu, lam, alpha, mean, theta = ctx.saved_tensors
        if torch.is_grad_enabled():
            upstream = of_mean, of_theta
            return torch.autograd.grad(_moments(mu, lam, alpha), (mu, lam, alpha), upstream, create_graph=True)
        empty = mu < SMALL * lam
        by_log = (of_theta * theta).masked_fill_(empty, 0)  # d/dlog theta
        of_alpha = (by_log / alpha).sum_to_size(alpha.shape) if ctx.needs_input_grad[2] else None
        by_log.mul_(2)
        of_mu = torch.div(by_log, mu).masked_fill_(empty, 0).neg_()
        by_log.div_(mean).add_(of_mean)
        of_mu.add_(by_log).masked_fill_(empty, 0)
        return of_mu.sum_to_size(mu.shape), by_log.sum_to_size(lam.shape), of_alpha


def _approximate(px: Any, x: Tensor) -> Tensor | None:
    validate(px, x)
    if ops.takes_twins(px.mu):
        return None
    found = elements("nb_mean", _Moments.apply(px.mu, px.lam, unexpanded(px.alpha)), x)  # type: ignore[no-untyped-call]
    # CellBender's own log_prob names what is NaN
    return None if found is not None and torch.isnan(found.sum()) else found


_REPLACED = Replaced({NegativeBinomialPoissonConvApprox: _approximate})


def apply() -> Applied:
    """CellBender's approximate likelihood is computed by fastelbo from here on, or within `with apply():`.

    log p is the exact one of the approximation, whose theta exceeds 1e9 where the background is large: there the
    lgammas of CellBender's have no digits left in float32, and this is the Poisson. float32 and float64 tensors on the
    CPU, and on CUDA where fastelbo was built for it; others are computed as before.

    Returns:
        An object whose `undo()` ends it; a context manager that does so on exit, also by an exception. Within one
        another the outer one stays on.

    Reference: Fleming et al. 2023.
    """
    return _REPLACED.begin()
