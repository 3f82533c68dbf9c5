"""scvi-tools' distributions of counts, whose log_prob is computed by fastelbo while `apply` is on."""

import warnings
from typing import Any

from scvi import distributions, settings
from torch import Tensor
from torch.distributions import Distribution, Independent, MixtureSameFamily, Normal
from torch.distributions import NegativeBinomial as TorchNegativeBinomial

import fastelbo
from fastelbo.integrations._replaced import Applied, Replaced, elements, fits, is_counts, validate
from fastelbo.likelihoods import SCVI_ADDED, THETA_LIMIT


def _with_warning(px: Distribution, x: Tensor, found: Tensor | None) -> Tensor | None:
    """`found`, with scvi's warning of x outside of the support; without where scvi computes log p, and warns itself."""
    if found is None or is_counts(x):
        return found
    try:
        px._validate_sample(x)
    except ValueError:
        warnings.warn(
            "The value argument must be within the support of the distribution",
            UserWarning,
            stacklevel=settings.warnings_stacklevel,
        )
    return found


def _nb(px: Any, x: Tensor) -> Tensor | None:
    if px._eps != SCVI_ADDED:
        return None
    found = elements("scvi_nb", (px.mu, px.theta), x)
    return _with_warning(px, x, found) if px._validate_args else found


def _zinb(px: Any, x: Tensor) -> Tensor | None:
    return _with_warning(px, x, elements("scvi_zinb", (px.mu, px.theta, px.zi_logits), x))


def _mixture(px: Any, x: Tensor) -> Tensor | None:
    if px.theta2 is not None:
        return None
    parameters = (px.mu1, px.mu2, px.theta1, px.mixture_logits)
    return _with_warning(px, x, elements("scvi_nb_mixture", parameters, x))


def _poisson(px: Any, x: Tensor) -> Tensor | None:
    """Of the rate as it is, which may be 0: the negative binomial of the largest theta, to x^2 / 2e17."""
    validate(px, x)
    return elements("nb_mean", (px.rate, px.rate.new_full((), THETA_LIMIT)), x)


def _beta_binomial(px: Any, x: Tensor) -> Tensor | None:
    if px.approx_log_prob_tol:
        return None
    validate(px, x)
    total = px.total_count.detach()
    return elements("beta_binomial", (px.concentration1, px.concentration0, total.to(px.concentration1.dtype)), x)


def _torch_nb(px: Any, x: Tensor) -> Tensor | None:
    validate(px, x)
    return elements("nb_logits", (px.total_count, px.logits), x)


def _gaussians(px: Any, z: Tensor) -> Tensor | None:
    """Of diagonal Gaussians that all z share: priors that are mixtures, and aggregated posteriors."""
    parts, logits = px.component_distribution, px.mixture_distribution.logits
    of = parts.base_dist if type(parts) is Independent and parts.reinterpreted_batch_ndims == 1 else None
    if type(of) is not Normal or of.loc.dim() != 2 or logits.dim() != 1 or not fits(of.loc, of.scale, logits, z):
        return None
    if px._validate_args:
        px._validate_sample(z)
    return fastelbo.mixture_log_prob(z, of.loc, 2 * of.scale.log(), logits.log_softmax(0))


_REPLACED = Replaced(
    {
        distributions.NegativeBinomial: _nb,
        distributions.ZeroInflatedNegativeBinomial: _zinb,
        distributions.NegativeBinomialMixture: _mixture,
        distributions.Poisson: _poisson,
        distributions.BetaBinomial: _beta_binomial,
        TorchNegativeBinomial: _torch_nb,
        MixtureSameFamily: _gaussians,
    }
)


def apply() -> Applied:
    """Every scvi-tools model computes log p of counts by fastelbo from here on, or within `with apply():`.

    The distributions of `scvi.distributions` (NegativeBinomial, ZeroInflatedNegativeBinomial, NegativeBinomialMixture,
    Poisson, BetaBinomial) and torch's NegativeBinomial, of which Stereoscope and Decipher make use, compute `log_prob`
    by `fastelbo.log_prob(reduce=False)` for float32 and float64 tensors on the CPU, and on CUDA where fastelbo was
    built for it. Of others, of half types, of a mixture with two thetas and under the transforms of torch.func they
    compute it as before. Nothing else changes. torch's MixtureSameFamily of diagonal Gaussians, which priors and
    `differential_abundance` take, does so by `fastelbo.mixture_log_prob` where all z share the components: not where
    each cell has those of its label, nor of Student's t.

    log p is that of mean + 1e-8 and theta + 1e-8, which scvi adds inside of its logarithms: it differs from scvi's by
    about 2e-8 x / mean in exact arithmetic. In float32 scvi's has the rounding of lgamma(x + theta) - lgamma(theta),
    which grows with theta: up to 1 nat per entry at theta = 1e6. Of a negative x it is -inf.

    Returns:
        An object whose `undo()` ends it; a context manager that does so on exit, also by an exception. Within one
        another the outer one stays on.
    """
    return _REPLACED.begin()
