"""The likelihoods: for each, its parameters, the domain of x, log p in plain PyTorch, its mean, and how to draw x.

A row has a counterpart in C++, csrc/likelihoods/NAME.h, with the same name, parameters and domain.
"""

import math
from collections.abc import Callable
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

LOG_2 = math.log(2.0)
LOG_2PI = math.log(2.0 * math.pi)

Domain = Literal["reals", "[0, 1]", "counts"]


class Likelihood(NamedTuple):
    """p(x | parameters) of one element. The functions take tensors that broadcast to the first parameter.

    A parameter behind the first `fewest` may be left out; its default is that of `log_prob`.
    """

    parameters: tuple[str, ...]
    fewest: int  # the number of parameters that must be there
    domain: Domain  # of x; uint8 data are counts there, and mean x / 255 elsewhere
    log_prob: Callable[..., Tensor]  # (x, *parameters) -> log p of each element
    mean: Callable[..., Tensor]  # (*parameters) -> E[x]
    draw: Callable[..., Tensor]  # (generator or None, *parameters) -> x


# ----------------------------------------------------------------------------------------------------------------------
# Bernoulli.


def _bernoulli(x: Tensor, logits: Tensor) -> Tensor:
    """x l - softplus(l), l the logit."""
    return -F.binary_cross_entropy_with_logits(logits, x, reduction="none")


def _bernoulli_probs(x: Tensor, probs: Tensor) -> Tensor:
    """x log p + (1 - x) log(1 - p), each logarithm clamped at -100."""
    return -F.binary_cross_entropy(probs, x, reduction="none")


def _draw_bernoulli(generator: Generator | None, logits: Tensor) -> Tensor:
    return torch.bernoulli(torch.sigmoid(logits), generator=generator)


def _draw_bernoulli_probs(generator: Generator | None, probs: Tensor) -> Tensor:
    return torch.bernoulli(probs, generator=generator)


# ----------------------------------------------------------------------------------------------------------------------
# Gaussian and Laplace: unit scale without the second parameter.


def _gaussian(x: Tensor, mean: Tensor, logvar: Tensor | None = None) -> Tensor:
    """-1/2 [(x - m)^2 exp(-lv) + lv + log 2 pi]; lv = 0 by default."""
    square = (x - mean).square()
    return -0.5 * (square + LOG_2PI if logvar is None else square * torch.exp(-logvar) + logvar + LOG_2PI)


def _draw_gaussian(generator: Generator | None, mean: Tensor, logvar: Tensor | None = None) -> Tensor:
    noise = torch.randn(mean.shape, dtype=mean.dtype, device=mean.device, generator=generator)
    return mean + (noise if logvar is None else torch.exp(0.5 * logvar) * noise)


def _laplace(x: Tensor, mean: Tensor, log_scale: Tensor | None = None) -> Tensor:
    """-[|x - m| exp(-s) + s + log 2]; s = 0 by default."""
    distance = (x - mean).abs()
    return -(distance + LOG_2 if log_scale is None else distance * torch.exp(-log_scale) + log_scale + LOG_2)


def _draw_laplace(generator: Generator | None, mean: Tensor, log_scale: Tensor | None = None) -> Tensor:
    first, second = (torch.empty_like(mean).exponential_(generator=generator) for _ in range(2))
    noise = first - second
    return mean + (noise if log_scale is None else torch.exp(log_scale) * noise)


def _first(mean: Tensor, scale: Tensor | None = None) -> Tensor:
    return mean


LIKELIHOODS = {
    "bernoulli": Likelihood(("logits",), 1, "[0, 1]", _bernoulli, torch.sigmoid, _draw_bernoulli),
    "bernoulli_probs": Likelihood(("probs",), 1, "[0, 1]", _bernoulli_probs, _first, _draw_bernoulli_probs),
    "gaussian": Likelihood(("mean", "logvar"), 1, "reals", _gaussian, _first, _draw_gaussian),
    "laplace": Likelihood(("mean", "log_scale"), 1, "reals", _laplace, _first, _draw_laplace),
}


def get(name: str) -> Likelihood:
    """The row of a likelihood.

    Raises:
        ValueError: an unknown name; the message lists the valid ones.
    """
    if name not in LIKELIHOODS:
        raise ValueError(f"likelihood must be one of {', '.join(LIKELIHOODS)}; got {name!r}")
    return LIKELIHOODS[name]
