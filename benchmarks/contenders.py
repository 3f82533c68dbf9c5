"""Who competes: the same operations, written by hand in plain PyTorch, the same compiled, and fastelbo's.

The plain versions are the shortest that a user would write, which makes them faster than `fastelbo.reference`, kept to
the letter of the formulas. In float64 that one is the judge of everybody's values and gradients.
"""

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import torch
import torch.nn.functional as F
from sklearn.decomposition import PCA
from torch import Tensor
from torch.distributions import LowRankMultivariateNormal, Normal

import fastelbo
from fastelbo import reference
from fastelbo.estimators import ESTIMATORS
from fastelbo.training import build_model

LOG_2PI = math.log(2 * math.pi)


def _kl(mu: Tensor, logvar: Tensor) -> Tensor:
    return -0.5 * (1 + logvar - mu.square() - logvar.exp())


def plain_elbo_bernoulli(recon: Tensor, x: Tensor, mu: Tensor, logvar: Tensor) -> Tensor:
    return (F.binary_cross_entropy_with_logits(recon, x, reduction="sum") + _kl(mu, logvar).sum()) / len(x)


def plain_elbo_gaussian(mean: Tensor, scale: Tensor, x: Tensor, mu: Tensor, logvar: Tensor) -> Tensor:
    nll = 0.5 * ((x - mean).square() * torch.exp(-scale) + scale + LOG_2PI)
    return (nll.sum() + _kl(mu, logvar).sum()) / len(x)


def plain_rsample(mu: Tensor, logvar: Tensor, num_samples: int, eps: Tensor | None = None) -> tuple[Tensor, ...]:
    if eps is None:
        eps = torch.randn(num_samples, *mu.shape)
    z = mu + torch.exp(0.5 * logvar) * eps
    return z, _kl(mu, logvar).sum(-1), 0.5 * (eps.square() - z.square() + logvar).sum(-1)


def plain_iwae(recon: Tensor, x: Tensor, log_ratio: Tensor) -> Tensor:
    nll = F.binary_cross_entropy_with_logits(recon, x.expand_as(recon), reduction="none").sum(-1)
    return (math.log(len(recon)) - torch.logsumexp(log_ratio - nll, 0)).mean()


def plain_objective(
    estimator: str, recon: Tensor, x: Tensor, mu: Tensor, logvar: Tensor, eps: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """-> loss, z. Score terms are cut by detaching, the gradient of z is weighted by a hook, as is usual."""
    eps = torch.randn(len(recon), *mu.shape) if eps is None else eps
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


# options of the estimators that have any, in the benchmarks
OPTIONS: dict[str, dict[str, Any]] = {"vr": {"alpha": 0.5}, "ciwae": {"beta": 0.5}, "miwae": {"groups": 5}}


def fused_objective(
    estimator: str, recon: Tensor, x: Tensor, mu: Tensor, logvar: Tensor, eps: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    drawn = fastelbo.rsample(mu, logvar, len(recon), eps=eps)
    return fastelbo.multi_sample_loss(recon, x, drawn, estimator=estimator, **OPTIONS.get(estimator, {})), drawn.z


def reference_objective(*args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
    with fastelbo.reference_mode():
        return fused_objective(*args, **kwargs)


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


def judged_log_marginal(x: Tensor, num_samples: int, chunk_size: int) -> Tensor:
    with fastelbo.reference_mode():
        return copy.deepcopy(digits_model()).double().log_marginal(x.double(), num_samples, seed=0).log_prob


def plain_ppca(x: Tensor, W: Tensor, b: Tensor, log_sigma2: Tensor) -> Tensor:
    """By Woodbury's formula and the determinant lemma."""
    D, M = W.shape
    s2, r = torch.exp(log_sigma2), x - b
    factor = torch.linalg.cholesky(W.mT @ W + s2 * torch.eye(M, dtype=W.dtype))
    u = torch.linalg.solve_triangular(factor, (r @ W).mT, upper=False)
    distance = (r.square().sum(1) - u.square().sum(0)) / s2
    return -0.5 * (D * LOG_2PI + (D - M) * log_sigma2 + 2 * torch.log(factor.diagonal()).sum() + distance)


def distributions_ppca(x: Tensor, W: Tensor, b: Tensor, log_sigma2: Tensor) -> Tensor:
    return LowRankMultivariateNormal(b, W, torch.exp(log_sigma2).expand(len(b))).log_prob(x)


def sklearn_ppca(x: Tensor, W: Tensor, b: Tensor, log_sigma2: Tensor) -> Tensor:
    """PCA.score_samples of a PCA with these components; no gradient."""
    lengths, s2 = W.square().sum(0), math.exp(log_sigma2.item())
    pca = PCA(W.shape[1])
    pca.n_components_, pca.n_features_in_, pca.whiten = W.shape[1], W.shape[0], False
    pca.components_, pca.mean_ = (W / torch.sqrt(lengths)).mT.numpy(), b.numpy()
    pca.explained_variance_, pca.noise_variance_ = (lengths + s2).numpy(), s2
    return torch.from_numpy(pca.score_samples(x.numpy()))


def one_bce(recon: Tensor, x: Tensor, **_: Tensor) -> Tensor:
    """Not an ELBO: the cheapest loss in PyTorch, to tell what a call costs."""
    return F.binary_cross_entropy_with_logits(recon, x)


PLAIN: dict[str, Callable[..., Any]] = {
    "elbo_bernoulli": plain_elbo_bernoulli,
    "elbo_gaussian": plain_elbo_gaussian,
    "rsample": plain_rsample,
    "iwae": plain_iwae,
    **{f"{name} step": partial(plain_objective, name) for name in ESTIMATORS},
    "log_marginal": plain_log_marginal,
    "ppca": plain_ppca,
    "ppca_score": plain_ppca,
}

FASTELBO: dict[str, Callable[..., Any]] = {
    "elbo_bernoulli": fastelbo.elbo_loss,
    "elbo_gaussian": lambda mean, scale, x, mu, logvar: fastelbo.elbo_loss(
        (mean, scale), x, mu, logvar, likelihood="gaussian"
    ),
    "rsample": lambda mu, logvar, num_samples, eps=None: fastelbo.rsample(mu, logvar, num_samples, eps=eps)[:3],
    "iwae": fastelbo.iwae_loss,
    **{f"{name} step": partial(fused_objective, name) for name in ESTIMATORS},
    "log_marginal": lambda x, num_samples, chunk_size: (
        digits_model().log_marginal(x, num_samples, chunk_size=chunk_size).log_prob
    ),
    "ppca": fastelbo.ppca_log_prob,
    "ppca_score": fastelbo.ppca_log_prob,
}

# Computed in float64 to judge the others.
JUDGE: dict[str, Callable[..., Any]] = {
    "elbo_bernoulli": lambda recon, x, mu, logvar: reference.elbo_loss(recon, x, mu, logvar)[0],
    "elbo_gaussian": lambda mean, scale, x, mu, logvar: reference.elbo_loss(
        mean, x, mu, logvar, scale, likelihood="gaussian"
    )[0],
    "rsample": lambda *args, **kwargs: reference.rsample(*args, **kwargs)[:3],
    "iwae": lambda recon, x, log_ratio: reference.multi_sample_loss(recon, x, log_ratio)[0],
    "bce": one_bce,
    **{f"{name} step": partial(reference_objective, name) for name in ESTIMATORS},
    "its iwae": partial(reference_objective, "iwae"),
    "log_marginal": judged_log_marginal,
    "ppca": reference.ppca_log_prob,
    "ppca_score": reference.ppca_log_prob,
}


@dataclass(frozen=True)
class Contender:
    name: str
    functions: dict[str, Callable[..., Any]]  # op -> function of the case's tensors and options
    compiled: bool = False  # through torch.compile(dynamic=False), anew for each case

    def function(self, op: str) -> Callable[..., Any]:
        function = self.functions[op]
        return torch.compile(function, dynamic=False) if self.compiled else function


SUBJECT = "fastelbo"  # the one whom the bars are for

CONTENDERS = [
    Contender("eager", PLAIN),
    Contender("compile", {op: f for op, f in PLAIN.items() if op != "log_marginal"}, compiled=True),
    # Without rsample: the reference draws the very noise of the kernels, which is slow in plain PyTorch.
    Contender("reference", {op: JUDGE[op] for op in ("elbo_bernoulli", "elbo_gaussian", "iwae")}),
    Contender("distributions", {"ppca": distributions_ppca}),
    Contender("sklearn", {"ppca_score": sklearn_ppca}),
    Contender("one BCE", {"bce": one_bce}),
    Contender("its iwae", {"its iwae": partial(fused_objective, "iwae")}),
    Contender(SUBJECT, FASTELBO),
]
