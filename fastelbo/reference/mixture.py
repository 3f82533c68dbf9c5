"""Mixtures of diagonal Gaussians."""

import math

import torch
from torch import Tensor

from fastelbo.likelihoods import LOG_2PI, divided
from fastelbo.reference.derivatives import backward_of
from fastelbo.reference.likelihood import compute_dtype


def mixture_log_prob(
    z: Tensor, mu: Tensor, logvar: Tensor, log_weights: Tensor | None = None, per_dimension: bool = False
) -> Tensor:
    """log sum_c w_c N(z; mu_c, exp(lv_c)) -> [...], or of each dimension apart -> [..., M].

    z [..., M], mu and logvar [C, M], log_weights broadcasts to [..., C]; None: -log C. Where no component has any
    density the value is -inf and the gradient 0.
    """
    dtype = compute_dtype(z)
    mu, logvar = mu.to(dtype), logvar.to(dtype)
    distance = divided(z.to(dtype).unsqueeze(-2) - mu, 0.5 * logvar)
    terms = -0.5 * (distance.square() + (logvar + LOG_2PI))  # [..., C, M]
    weights = terms.new_full((len(mu),), -math.log(len(mu))) if log_weights is None else log_weights.to(dtype)
    log_p = terms + weights.unsqueeze(-1) if per_dimension else terms.sum(-1) + weights
    dim = -2 if per_dimension else -1
    empty = log_p.detach().amax(dim, keepdim=True) == -torch.inf
    total = torch.logsumexp(torch.where(empty, 0.0, log_p), dim, keepdim=True)
    return torch.where(empty, -torch.inf, total).squeeze(dim)


mixture_log_prob_backward = backward_of(mixture_log_prob, ("z", "mu", "logvar", "log_weights"))
