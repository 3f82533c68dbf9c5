"""The aggregated posterior of a data set: the mixture of the posteriors of all data."""

import math
from typing import Annotated, NamedTuple

import torch
from torch import Tensor

from fastelbo._internal import arguments
from fastelbo._internal.arguments import checked
from fastelbo.losses import mixture_log_prob
from fastelbo.models import priors
from fastelbo.models.pieces import Rows, masked
from fastelbo.models.vae import VAE


class Estimate(NamedTuple):
    """A mean over points, in nats."""

    value: float  # nats
    std_error: float | None  # None of one point


class AggregateTerms(NamedTuple):
    """The averaged KL of q(z | x) from the prior is the first two; the third is a part of the second."""

    mutual_information: Estimate  # of x and z: E[log q(z | x) - log q(z)], at most log N
    marginal_kl: Estimate  # of q(z) from p(z): E[log q(z) - log p(z)]
    total_correlation: Estimate  # of the dimensions of z: E[log q(z) - sum_m log q(z_m)]


class AggregatedPosterior:
    """q(z) = 1/N sum_n q(z | x_n), a mixture of N diagonal Gaussians. `aggregated_posterior` makes it of a VAE.

    Args:
        mu, logvar: [N, *latent], of q(z | x_n) = N(mu_n, diag exp(logvar_n)).
        prior: that of the VAE, of which `terms` makes use.

    Raises:
        ValueError, TypeError: no data, or tensors of two shapes.
    """

    @checked
    def __init__(self, mu: arguments.Floats, logvar: arguments.Floats, prior: arguments.Module | None = None) -> None:
        if mu.dim() < 2 or len(mu) == 0 or logvar.shape != mu.shape:
            expected = "mu and logvar must be [N, *latent] with N of 1 or more"
            raise ValueError(f"{expected}; got {tuple(mu.shape)} and {tuple(logvar.shape)}")
        self.mu, self.logvar, self._prior = mu, logvar, prior

    @checked
    def log_prob(self, z: arguments.Floats, *, per_dimension: arguments.Flag = False) -> Tensor:
        """log q(z), in nats: O(N) time for each z, and O(N) memory for all.

        Args:
            z: [..., *latent].
            per_dimension: log q(z_m) of each dimension.

        Returns:
            [...], or [..., *latent] with per_dimension.

        Raises:
            ValueError: z of another latent shape.
        """
        latent = self.mu.shape[1:]
        lead = z.dim() - len(latent)
        if lead < 0 or z.shape[lead:] != latent:
            raise ValueError(f"z must be [..., *latent] with latent={tuple(latent)}; got {tuple(z.shape)}")
        flat = z.reshape(*z.shape[:lead], latent.numel())
        log_q = mixture_log_prob(flat, self.mu.flatten(1), self.logvar.flatten(1), per_dimension=per_dimension)
        return log_q.reshape(z.shape) if per_dimension else log_q

    @torch.no_grad()
    @checked
    def terms(self, num_points: arguments.Count | None = None, *, seed: arguments.Integer = 0) -> AggregateTerms:
        """Mutual information, marginal KL and total correlation, with standard errors.

        By a draw z ~ q(z | x_n) of each datum, or of num_points data at equal distances.

        Args:
            num_points: at most N, which is what None means.
            seed: of the draws.

        Returns:
            AggregateTerms, in nats. The standard errors are those of the draws: the aggregate is that of these data.

        Raises:
            ValueError: num_points above N.

        Reference: Hoffman & Johnson 2016; Chen et al. 2018, eq. 2.
        """
        N = len(self.mu)
        if num_points is not None and num_points > N:
            raise ValueError(f"num_points must be at most N={N}; got {num_points}")
        which = torch.arange(num_points or N, device=self.mu.device) * N // (num_points or N)
        mu, logvar = self.mu[which], self.logvar[which]
        drawn = priors.sampler(self._prior, mu, logvar, None)(seed=seed)
        log_q = self.log_prob(drawn.z).double()
        log_qs = self.log_prob(drawn.z, per_dimension=True).double().flatten(1).sum(1)
        log_q_x = drawn.log_q.double()
        log_p = log_q_x + drawn.log_ratio.double()
        return AggregateTerms(*map(_estimate, (log_q_x - log_q, log_q - log_p, log_q - log_qs)))


def _estimate(values: Tensor) -> Estimate:
    error = values.std().item() / math.sqrt(len(values)) if len(values) > 1 else None
    return Estimate(values.mean().item(), error)


@torch.no_grad()
@checked
def aggregated_posterior(
    model: Annotated[VAE, arguments.instance(VAE, "a fastelbo.VAE")], data: Rows
) -> AggregatedPosterior:
    """The mixture of the posteriors of all data, q(z) = 1/N sum_n q(z | x_n).

    The model goes to evaluation mode. Memory is that of mu and logvar [N, *latent].

    Args:
        model: a `fastelbo.VAE` without a condition.
        data: [N, *event] of a dtype that the model takes, or a `fastelbo.data.Dataset`; NaN is a missing cell.

    Returns:
        AggregatedPosterior, with log_prob and terms.

    Raises:
        ValueError, TypeError: data of no rows; as in `VAE.encode`.

    Reference: Makhzani et al. 2015, sec. 2; Hoffman & Johnson 2016.
    """
    if len(data.shape) < 2 or data.shape[0] == 0:
        raise ValueError(f"data must be [N, *event] with N of 1 or more; got {tuple(data.shape)}")
    model.eval()
    mu, logvar = zip(*(model.encode(batch, mask=mask) for batch, mask in masked(data)), strict=True)
    return AggregatedPosterior(torch.cat(mu), torch.cat(logvar), model.prior)
