"""Each operation written by hand in plain PyTorch: the shortest code that a user would write.

It is faster than `fastelbo.reference`, which is written like the formulas.
"""

import math
from collections.abc import Callable
from functools import cache, partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributions import Normal

import fastelbo
from benchmarks.steps import Step
from fastelbo.estimators import ESTIMATORS
from fastelbo.nets import build_model

LOG_2PI = math.log(2 * math.pi)


def _kl(mu: Tensor, logvar: Tensor) -> Tensor:
    return -0.5 * (1 + logvar - mu.square() - logvar.exp())


def plain_elbo_bernoulli(recon: Tensor, x: Tensor, mu: Tensor, logvar: Tensor) -> Tensor:
    return (F.binary_cross_entropy_with_logits(recon, x, reduction="sum") + _kl(mu, logvar).sum()) / len(x)


def plain_elbo_uint8(recon: Tensor, x: Tensor, mu: Tensor, logvar: Tensor) -> Tensor:
    """torch has no loss for bytes: they are converted first."""
    return plain_elbo_bernoulli(recon, x.to(recon.dtype) / 255, mu, logvar)


def plain_elbo_probs(recon: Tensor, x: Tensor, mu: Tensor, logvar: Tensor) -> Tensor:
    return (F.binary_cross_entropy(recon, x, reduction="sum") + _kl(mu, logvar).sum()) / len(x)


def plain_elbo_gaussian(mean: Tensor, scale: Tensor, x: Tensor, mu: Tensor, logvar: Tensor) -> Tensor:
    nll = 0.5 * ((x - mean).square() * torch.exp(-scale) + scale + LOG_2PI)
    return (nll.sum() + _kl(mu, logvar).sum()) / len(x)


def _nb(x: Tensor, log_mean: Tensor, log_theta: Tensor) -> Tensor:
    """scvi-tools' formula, whose eps of 1e-8 the logarithms of mean and theta do not need."""
    theta = log_theta.exp()
    log_sum = torch.log(theta + log_mean.exp())
    combinations = torch.lgamma(x + theta) - torch.lgamma(theta) - torch.lgamma(x + 1)
    return theta * (log_theta - log_sum) + x * (log_mean - log_sum) + combinations


def plain_elbo_nb(log_mean: Tensor, log_theta: Tensor, x: Tensor, mu: Tensor, logvar: Tensor) -> Tensor:
    return (_kl(mu, logvar).sum() - _nb(x, log_mean, log_theta).sum()) / len(x)


def plain_elbo_zinb(
    log_mean: Tensor, log_theta: Tensor, zero_logits: Tensor, x: Tensor, mu: Tensor, logvar: Tensor
) -> Tensor:
    """scvi-tools' formula: one case for x = 0, the other for x > 0, and the sum of both, each times its indicator."""
    theta = log_theta.exp()
    log_sum = torch.log(theta + log_mean.exp())
    softplus, log_zero = F.softplus(-zero_logits), theta * (log_theta - log_sum) - zero_logits
    zero = F.softplus(log_zero) - softplus
    combinations = torch.lgamma(x + theta) - torch.lgamma(theta) - torch.lgamma(x + 1)
    other = log_zero - softplus + x * (log_mean - log_sum) + combinations
    log_p = (x == 0).to(x.dtype) * zero + (x > 0).to(x.dtype) * other
    return (_kl(mu, logvar).sum() - log_p.sum()) / len(x)


def plain_elbo_poisson(log_rate: Tensor, x: Tensor, mu: Tensor, logvar: Tensor) -> Tensor:
    nll = F.poisson_nll_loss(log_rate, x, reduction="sum") + torch.lgamma(x + 1).sum()
    return (nll + _kl(mu, logvar).sum()) / len(x)


def plain_elbo_learned_prior(
    recon: Tensor, x: Tensor, mu: Tensor, logvar: Tensor, prior_mu: Tensor, prior_logvar: Tensor
) -> Tensor:
    kl = -0.5 * (1 + logvar - prior_logvar - ((mu - prior_mu).square() + logvar.exp()) * torch.exp(-prior_logvar))
    return (F.binary_cross_entropy_with_logits(recon, x, reduction="sum") + kl.sum()) / len(x)


def plain_rsample(mu: Tensor, logvar: Tensor, num_samples: int, eps: Tensor | None = None) -> tuple[Tensor, ...]:
    if eps is None:
        eps = torch.randn(num_samples, *mu.shape, device=mu.device)
    z = mu + torch.exp(0.5 * logvar) * eps
    return z, _kl(mu, logvar).sum(-1), 0.5 * (eps.square() - z.square() + logvar).sum(-1)


def plain_iwae(recon: Tensor, x: Tensor, log_ratio: Tensor) -> Tensor:
    nll = F.binary_cross_entropy_with_logits(recon, x.expand_as(recon), reduction="none").sum(-1)
    return (math.log(len(recon)) - torch.logsumexp(log_ratio - nll, 0)).mean()


def plain_objective(
    estimator: str, recon: Tensor, x: Tensor, mu: Tensor, logvar: Tensor, eps: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """-> loss, z. As is usual, detaching removes score terms, and a hook weights the gradient of z."""
    eps = torch.randn(len(recon), *mu.shape, device=mu.device) if eps is None else eps
    z = mu + torch.exp(0.5 * logvar) * eps
    log_p = -F.binary_cross_entropy_with_logits(recon, x.expand_as(recon), reduction="none").sum(-1)
    if estimator in ("stl", "dreg"):
        m, lv = mu.detach(), logvar.detach()
        log_ratio = 0.5 * ((z - m).square() * torch.exp(-lv) - z.square() + lv).sum(-1)
    else:
        log_ratio = 0.5 * (eps.square() - z.square() + logvar).sum(-1)
    log_w = log_p + log_ratio
    elbo, iwae = log_w.mean(0), torch.logsumexp(log_w, 0) - math.log(len(log_w))
    if estimator in ("elbo", "stl"):
        return -elbo.mean(), z
    if estimator == "vr":
        return -2 * (torch.logsumexp(0.5 * log_w, 0) - math.log(len(log_w))).mean(), z
    if estimator == "ciwae":
        return -(0.5 * elbo + 0.5 * iwae).mean(), z
    if estimator == "miwae":
        inner = log_w.unflatten(0, (5, -1))
        return -(torch.logsumexp(inner, 1) - math.log(inner.shape[1])).mean(), z
    if estimator == "iwae":
        return -iwae.mean(), z
    weights = torch.softmax(log_w.detach(), 0)
    if estimator == "dreg":
        z.register_hook(lambda g: g * weights.unsqueeze(-1))
        return -iwae.mean(), z
    assert estimator == "rws"
    z.register_hook(torch.zeros_like)
    log_q = -0.5 * ((z.detach() - mu).square() * torch.exp(-logvar) + logvar).sum(-1)
    surrogate = -(weights * (log_p + log_q)).sum(0).mean()
    return surrogate + (-iwae.mean() - surrogate).detach(), z


def plain_iwae_probs(recon: Tensor, x: Tensor, mu: Tensor, logvar: Tensor, z: Tensor) -> Tensor:
    log_p = -F.binary_cross_entropy(recon, x.expand_as(recon), reduction="none").sum(-1)
    log_ratio = 0.5 * ((z - mu).square() * torch.exp(-logvar) - z.square() + logvar).sum(-1)
    return (math.log(len(recon)) - torch.logsumexp(log_p + log_ratio, 0)).mean()


def plain_step(x: Tensor, module: Step, eps: Tensor | None = None) -> Tensor:
    """A whole training step except the optimizer's: encode, sample, decode, loss."""
    mu, logvar = module.encode(x)
    if module.samples is None:
        z = mu + torch.exp(0.5 * logvar) * (torch.randn_like(mu) if eps is None else eps)
        return plain_elbo_bernoulli(module.decode(z), x, mu, logvar)
    eps = torch.randn(module.samples, *mu.shape, device=mu.device) if eps is None else eps
    z = mu + torch.exp(0.5 * logvar) * eps
    recon = module.decode(z.flatten(0, 1)).unflatten(0, z.shape[:2])
    return plain_iwae(recon.flatten(2), x.flatten(1), 0.5 * (eps.square() - z.square() + logvar).sum(-1))


def plain_step_loss(recon: Tensor, x: Tensor, mu: Tensor, logvar: Tensor, eps: Tensor | None = None) -> Any:
    """The sampling and the loss of a step, without the decoder between them. -> loss, z"""
    if recon.dim() > x.dim():
        return plain_objective("iwae", recon.flatten(2), x.flatten(1), mu, logvar, eps)
    eps = torch.randn_like(mu) if eps is None else eps
    return plain_elbo_bernoulli(recon, x, mu, logvar), mu + torch.exp(0.5 * logvar) * eps


@cache
def digits_model() -> fastelbo.VAE:
    torch.manual_seed(0)
    return build_model((8, 8), 8, 256, "bernoulli").eval()


@torch.no_grad()
def plain_log_marginal(x: Tensor, num_samples: int, chunk_size: int) -> Tensor:
    model, parts = digits_model(), []
    mu, logvar = model.encode(x)
    q, prior = Normal(mu, torch.exp(0.5 * logvar)), Normal(torch.zeros_like(mu), torch.ones_like(mu))
    for first in range(0, num_samples, chunk_size):
        z = q.sample((min(chunk_size, num_samples - first),))
        logits = model.decoder(z.flatten(0, 1)).unflatten(0, z.shape[:2])
        bce = F.binary_cross_entropy_with_logits(logits, x.expand_as(logits), reduction="none").flatten(2).sum(2)
        parts.append((prior.log_prob(z) - q.log_prob(z)).sum(2) - bce)
    return torch.logsumexp(torch.cat(parts), 0) - math.log(num_samples)


def plain_ppca(x: Tensor, W: Tensor, b: Tensor, log_sigma2: Tensor) -> Tensor:
    """By Woodbury's formula and the determinant lemma."""
    D, M = W.shape
    s2, r = torch.exp(log_sigma2), x - b
    factor = torch.linalg.cholesky(W.mT @ W + s2 * torch.eye(M, dtype=W.dtype, device=W.device))
    u = torch.linalg.solve_triangular(factor, (r @ W).mT, upper=False)
    distance = (r.square().sum(1) - u.square().sum(0)) / s2
    return -0.5 * (D * LOG_2PI + (D - M) * log_sigma2 + 2 * torch.log(factor.diagonal()).sum() + distance)


def plain_mixture(z: Tensor, mu: Tensor, logvar: Tensor, log_weights: Tensor, per_dimension: bool = False) -> Tensor:
    terms = -0.5 * ((z.unsqueeze(1) - mu).square() * torch.exp(-logvar) + logvar + LOG_2PI)
    if per_dimension:
        return torch.logsumexp(terms + log_weights.unsqueeze(1), 1)
    return torch.logsumexp(terms.sum(2) + log_weights, 1)


def mixture_by_products(z: Tensor, mu: Tensor, logvar: Tensor, log_weights: Tensor) -> Tensor:
    """Without [N, C, M]; the squares cancel where the components are narrow."""
    precision = torch.exp(-logvar)
    pulled = mu * precision
    squares = z.square() @ precision.mT - 2 * z @ pulled.mT + (mu * pulled).sum(1)
    constants = log_weights - 0.5 * (logvar + LOG_2PI).sum(1)
    return torch.logsumexp(constants - 0.5 * squares, 1)


def one_bce(recon: Tensor, x: Tensor, **_: Tensor) -> Tensor:
    """Not an ELBO: the cheapest loss in PyTorch, a yardstick for what a call costs."""
    return F.binary_cross_entropy_with_logits(recon, x)


PLAIN: dict[str, Callable[..., Any]] = {
    "elbo_bernoulli": plain_elbo_bernoulli,
    "elbo_uint8": plain_elbo_uint8,
    "elbo_probs": plain_elbo_probs,
    "elbo_gaussian": plain_elbo_gaussian,
    "elbo_learned_prior": plain_elbo_learned_prior,
    "elbo_poisson": plain_elbo_poisson,
    "elbo_nb": plain_elbo_nb,
    "elbo_zinb": plain_elbo_zinb,
    "rsample": plain_rsample,
    "iwae": plain_iwae,
    "iwae_probs": plain_iwae_probs,
    **{f"{name} step": partial(plain_objective, name) for name in ESTIMATORS},
    **dict.fromkeys(("step", "step of all samples"), plain_step),
    "step loss": plain_step_loss,
    "log_marginal": plain_log_marginal,
    "mixture": plain_mixture,
    "mixture per dimension": partial(plain_mixture, per_dimension=True),
    "ppca": plain_ppca,
    "ppca_score": plain_ppca,
}
