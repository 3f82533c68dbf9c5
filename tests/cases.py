"""What the tests know of each likelihood: how its parameters and its data are drawn. A new likelihood is one row."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor


class Row(NamedTuple):
    recon: Callable[[Tensor], Tensor]  # standard normal noise -> the first parameter
    x: Callable[[Tensor], Tensor]  # standard normal noise -> data
    scale: Callable[[Tensor], Tensor] | None = None  # noise -> the second parameter, where recon may be a pair


def _unit(noise: Tensor) -> Tensor:
    """In (0, 1), away from the ends: what happens at the ends has its own tests."""
    return torch.special.ndtr(noise).clamp(0.02, 0.98)


def _itself(noise: Tensor) -> Tensor:
    return noise


ROWS = {
    "bernoulli": Row(recon=lambda n: 3 * n, x=_unit),
    "bernoulli_probs": Row(recon=_unit, x=_unit),
    "gaussian": Row(recon=_itself, x=_itself, scale=_itself),
    "laplace": Row(recon=_itself, x=_itself, scale=_itself),
}

# (name, whether recon is a pair)
LIKELIHOODS = [(name, pair) for name, row in ROWS.items() for pair in ((False, True) if row.scale else (False,))]
LIKELIHOOD_IDS = [f"{name}-pair" if pair else name for name, pair in LIKELIHOODS]


class Drawn(NamedTuple):
    recon: Tensor
    x: Tensor
    scale: Tensor | None


def draw(
    likelihood: tuple[str, bool],
    shape: tuple[int, ...],
    samples: int | None = None,
    dtype: torch.dtype = torch.float32,
    x_dtype: torch.dtype | None = None,
    requires_grad: bool = True,
) -> Drawn:
    """recon [K?, *shape], x [*shape] and, for a pair, scale; those that can, require a gradient."""
    name, pair = likelihood
    row = ROWS[name]
    whole = shape if samples is None else (samples, *shape)

    def noise(size: tuple[int, ...]) -> Tensor:
        return torch.randn(size, dtype=torch.float64)

    if x_dtype == torch.uint8:
        x = torch.randint(0, 256, shape, dtype=torch.uint8)
    elif x_dtype == torch.bool:
        x = torch.rand(shape) < 0.5
    else:
        x = row.x(noise(shape)).to(x_dtype or dtype)
    recon = row.recon(noise(whole)).to(dtype)
    scale = row.scale(noise(whole)).to(dtype) if pair and row.scale else None
    for t in (recon, x, scale):
        if t is not None and t.is_floating_point():
            t.requires_grad_(requires_grad)
    return Drawn(recon, x, scale)
