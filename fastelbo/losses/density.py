"""Samples under a prior of which only the density is known."""

from collections.abc import Callable
from typing import Any

from torch import Tensor

from fastelbo.losses.likelihood import log_prob
from fastelbo.losses.sampling import Kept, Posterior, rsample


def rsample_under(
    log_prior: Callable[[Tensor], Tensor],
    mu: Tensor,
    logvar: Tensor,
    num_samples: int | None = None,
    *,
    kept: Kept | None = None,
    **noise: Any,
) -> Posterior:
    """`rsample` under a prior of any log density: log_ratio = log p(z) - log q(z | x) and kl = -log_ratio, at z.

    Args:
        log_prior: z [K?, B, *latent] -> log p(z) [K?, B]; z [n, *latent] -> [n] with `kept`.
        mu, logvar, num_samples, kept, noise: as in `rsample`.

    Returns:
        Posterior whose kl has the shape of log_ratio, and whose prior is (log p(z),).

    Raises:
        ValueError, TypeError: log_prior returns something else; as in `rsample`.
    """
    # log p(z) - log q(z) = log p(z) - log r(z) + log r(z) - log q(z) for any constant r. With r = q, held constant, the
    # op has what changes with mu and logvar at a fixed z, which estimators scale by itself; the rest goes through z.
    fixed = [mu.detach(), logvar.detach()]
    drawn = rsample(mu, logvar, num_samples, prior_mu=fixed[0], prior_logvar=fixed[1], kept=kept, **noise)
    mean, scale = fixed if kept is None else (t.index_select(0, kept.datum) for t in fixed)
    log_p = log_prior(drawn.z)
    if not isinstance(log_p, Tensor):
        raise TypeError(f"log_prob of the prior must return a tensor; got {type(log_p).__name__}")
    if log_p.shape != drawn.log_ratio.shape:
        expected = tuple(drawn.log_ratio.shape)
        raise ValueError(f"log_prob of the prior must return {expected}, a number for each z; got {tuple(log_p.shape)}")
    log_ratio = drawn.log_ratio + (log_p - log_prob((drawn.z, scale), mean, likelihood="gaussian"))
    posterior = drawn._replace(kl=-log_ratio, log_ratio=log_ratio, prior=(log_p,))
    posterior.gates = drawn.gates
    return posterior
