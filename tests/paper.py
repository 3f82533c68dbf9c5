"""The K-sample estimators as their papers write them, in plain autograd: nothing here comes from fastelbo.

`ESTIMATORS[name]` is a function of (log_w, stop, log_q, options): -> (bound [B], what the encoder ascends [B], what the
decoder ascends [B]). To add an estimator is to add a function and its row.

log_w(z, q) is log p(x | z) + log p(z) - log q(z | x) [K, B], q = (mu, logvar).
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.distributions as td
from torch import Tensor

Q = tuple[Tensor, Tensor]


class Setting(NamedTuple):
    log_joint: Callable[[Tensor], Tensor]  # z [K, B, M] -> log p(x, z) [K, B]
    q: Q  # attached to the encoder
    z: Tensor  # reparameterized, attached to the encoder

    @property
    def q_fixed(self) -> Q:
        return self.q[0].detach(), self.q[1].detach()


def log_q(z: Tensor, q: Q) -> Tensor:
    return td.Normal(q[0], torch.exp(0.5 * q[1])).log_prob(z).sum(-1)


def log_mean_exp(log_w: Tensor) -> Tensor:
    return torch.logsumexp(log_w, 0) - math.log(len(log_w))


def elbo(s: Setting, **_: Any) -> tuple[Tensor, Tensor, Tensor]:
    bound = (s.log_joint(s.z) - log_q(s.z, s.q)).mean(0)
    return bound, bound, bound


def stl(s: Setting, **_: Any) -> tuple[Tensor, Tensor, Tensor]:
    path = (s.log_joint(s.z) - log_q(s.z, s.q_fixed)).mean(0)
    return elbo(s)[0], path, elbo(s)[0]


def iwae(s: Setting, **_: Any) -> tuple[Tensor, Tensor, Tensor]:
    bound = log_mean_exp(s.log_joint(s.z) - log_q(s.z, s.q))
    return bound, bound, bound


def dreg(s: Setting, **_: Any) -> tuple[Tensor, Tensor, Tensor]:
    log_w = s.log_joint(s.z) - log_q(s.z, s.q_fixed)
    wt = torch.softmax(log_w, 0).detach()
    return iwae(s)[0], (wt.square() * log_w).sum(0), iwae(s)[0]


def rws(s: Setting, **_: Any) -> tuple[Tensor, Tensor, Tensor]:
    z = s.z.detach()
    wt = torch.softmax(s.log_joint(z) - log_q(z, s.q), 0).detach()
    return iwae(s)[0], (wt * log_q(z, s.q)).sum(0), (wt * s.log_joint(z)).sum(0)


def vr(s: Setting, alpha: float, **_: Any) -> tuple[Tensor, Tensor, Tensor]:
    log_w = s.log_joint(s.z) - log_q(s.z, s.q)
    bound = log_w.mean(0) if alpha == 1 else log_mean_exp((1 - alpha) * log_w) / (1 - alpha)
    return bound, bound, bound


def ciwae(s: Setting, beta: float, **_: Any) -> tuple[Tensor, Tensor, Tensor]:
    bound = beta * elbo(s)[0] + (1 - beta) * iwae(s)[0]
    return bound, bound, bound


def miwae(s: Setting, groups: int, **_: Any) -> tuple[Tensor, Tensor, Tensor]:
    log_w = s.log_joint(s.z) - log_q(s.z, s.q)
    size = len(log_w) // groups
    bound = torch.stack([log_mean_exp(log_w[g * size : (g + 1) * size]) for g in range(groups)]).mean(0)
    return bound, bound, bound


ESTIMATORS = {
    "elbo": elbo,
    "stl": stl,
    "iwae": iwae,
    "dreg": dreg,
    "rws": rws,
    "vr": vr,
    "ciwae": ciwae,
    "miwae": miwae,
}
# (name, options, K) of every estimator, with the options that matter
CASES = [
    ("elbo", {}, 7),
    ("stl", {}, 7),
    ("iwae", {}, 7),
    ("dreg", {}, 7),
    ("dreg", {}, 1),
    ("rws", {}, 7),
    ("vr", {"alpha": 0.5}, 7),
    ("vr", {"alpha": -2.0}, 7),
    ("vr", {"alpha": 1.0}, 7),
    ("vr", {"alpha": 3.0}, 7),
    ("ciwae", {"beta": 0.3}, 7),
    ("ciwae", {"beta": 1.0}, 7),
    ("ciwae", {"beta": 0.0}, 7),
    ("miwae", {"groups": 2}, 8),
    ("miwae", {"groups": 4}, 8),
    ("miwae", {"groups": 8}, 8),
]
CASE_IDS = [f"{name}{''.join(f' {k}={v}' for k, v in options.items())} K={K}" for name, options, K in CASES]
