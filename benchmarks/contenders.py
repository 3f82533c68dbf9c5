"""Who competes: the same operations, written by hand in plain PyTorch, the same compiled, and fastelbo's.

The plain versions are the shortest that a user would write, which makes them faster than `fastelbo.reference`, kept to
the letter of the formulas. In float64 that one is the judge of everybody's values and gradients.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import fastelbo
from fastelbo import reference

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


def one_bce(recon: Tensor, x: Tensor, **_: Tensor) -> Tensor:
    """Not an ELBO: the cheapest loss in PyTorch, to tell what a call costs."""
    return F.binary_cross_entropy_with_logits(recon, x)


PLAIN: dict[str, Callable[..., Any]] = {
    "elbo_bernoulli": plain_elbo_bernoulli,
    "elbo_gaussian": plain_elbo_gaussian,
    "rsample": plain_rsample,
    "iwae": plain_iwae,
}

FASTELBO: dict[str, Callable[..., Any]] = {
    "elbo_bernoulli": fastelbo.elbo_loss,
    "elbo_gaussian": lambda mean, scale, x, mu, logvar: fastelbo.elbo_loss(
        (mean, scale), x, mu, logvar, likelihood="gaussian"
    ),
    "rsample": lambda mu, logvar, num_samples, eps=None: fastelbo.rsample(mu, logvar, num_samples, eps=eps)[:3],
    "iwae": fastelbo.iwae_loss,
}

# Computed in float64 to judge the others.
JUDGE: dict[str, Callable[..., Any]] = {
    "elbo_bernoulli": lambda recon, x, mu, logvar: reference.elbo_loss(recon, x, mu, logvar)[0],
    "elbo_gaussian": lambda mean, scale, x, mu, logvar: reference.elbo_loss(
        mean, x, mu, logvar, scale, likelihood="gaussian"
    )[0],
    "rsample": reference.rsample,
    "iwae": lambda recon, x, log_ratio: reference.iwae_loss(recon, x, log_ratio)[0],
    "bce": one_bce,
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
    Contender("compile", PLAIN, compiled=True),
    # Without rsample: the reference draws the very noise of the kernels, which is slow in plain PyTorch.
    Contender("reference", {op: JUDGE[op] for op in ("elbo_bernoulli", "elbo_gaussian", "iwae")}),
    Contender("one BCE", {"bce": one_bce}),
    Contender(SUBJECT, FASTELBO),
]
