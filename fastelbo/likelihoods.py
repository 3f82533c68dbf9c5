"""What models need of a likelihood besides its log-probability: the mean of p(x | recon), and how to draw x."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Generator, Tensor

from fastelbo.arguments import checked
from fastelbo.functional import Recon, split_recon


def _identity(t: Tensor) -> Tensor:
    return t


def _noise(like: Tensor, generator: Generator | None) -> Tensor:
    return torch.randn(like.shape, dtype=like.dtype, device=like.device, generator=generator)


def _exponential(like: Tensor, generator: Generator | None) -> Tensor:
    return torch.empty_like(like).exponential_(generator=generator)


def _draw_bernoulli(mean: Tensor, _: Tensor | None, generator: Generator | None) -> Tensor:
    return torch.bernoulli(mean, generator=generator)


def _draw_gaussian(mean: Tensor, logvar: Tensor | None, generator: Generator | None) -> Tensor:
    noise = _noise(mean, generator)
    return mean + (noise if logvar is None else torch.exp(0.5 * logvar) * noise)


def _draw_laplace(mean: Tensor, log_scale: Tensor | None, generator: Generator | None) -> Tensor:
    noise = _exponential(mean, generator) - _exponential(mean, generator)
    return mean + (noise if log_scale is None else torch.exp(log_scale) * noise)


class Likelihood(NamedTuple):
    mean: Callable[[Tensor], Tensor]  # of recon, or of the first tensor of the pair
    draw: Callable[[Tensor, Tensor | None, Generator | None], Tensor]  # of mean and second parameter
    unit_interval: bool  # x lies in [0, 1]
    has_scale: bool  # recon may be a pair


LIKELIHOODS = {
    "bernoulli": Likelihood(torch.sigmoid, _draw_bernoulli, unit_interval=True, has_scale=False),
    "bernoulli_probs": Likelihood(_identity, _draw_bernoulli, unit_interval=True, has_scale=False),
    "gaussian": Likelihood(_identity, _draw_gaussian, unit_interval=False, has_scale=True),
    "laplace": Likelihood(_identity, _draw_laplace, unit_interval=False, has_scale=True),
}


def get(name: str) -> Likelihood:
    """The row of the table; ValueError with the valid names for an unknown one."""
    if name not in LIKELIHOODS:
        raise ValueError(f"likelihood must be one of {', '.join(LIKELIHOODS)}; got {name!r}")
    return LIKELIHOODS[name]


@checked
def mean(recon: Recon, likelihood: str = "bernoulli") -> Tensor:
    """E[x | recon]: sigmoid(logits), the probabilities, or the mean of the pair.

    Args:
        recon: [..., *event], or a pair of such tensors, as in `fastelbo.log_prob`.
        likelihood: "bernoulli", "bernoulli_probs", "gaussian" or "laplace".

    Returns:
        [..., *event], in recon's dtype.

    Raises:
        ValueError, TypeError: an unknown likelihood, or a recon that is neither a tensor nor a pair.
    """
    row = get(likelihood)
    return row.mean(split_recon(recon)[0])


@checked
def sample(recon: Recon, likelihood: str = "bernoulli", *, generator: Generator | None = None) -> Tensor:
    """A draw x ~ p(x | recon), not differentiable; arguments and errors as in `mean`.

    Args:
        generator: the source of the noise; torch's default one if None.

    Returns:
        [..., *event], in recon's dtype.
    """
    row = get(likelihood)
    with torch.no_grad():
        first, *others = split_recon(recon)
        return row.draw(row.mean(first), others[0] if others else None, generator)
