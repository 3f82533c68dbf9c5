"""What the tests know of each likelihood: how its parameters and its data are drawn. A new likelihood is one row."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from fastelbo import likelihoods
from fastelbo.reference import COUNTS


class Row(NamedTuple):
    recon: Callable[[Tensor], Tensor]  # standard normal noise -> the first parameter
    x: Callable[[Tensor], Tensor]  # standard normal noise -> data
    second: Callable[[Tensor], Tensor] | None = None  # noise -> the second parameter, where there is one
    third: Callable[[Tensor], Tensor] | None = None
    fourth: Callable[[Tensor], Tensor] | None = None


def _unit(noise: Tensor) -> Tensor:
    """In (0, 1), away from the ends: what happens at the ends has its own tests."""
    return torch.special.ndtr(noise).clamp(0.02, 0.98)


def _itself(noise: Tensor) -> Tensor:
    return noise


def _twice(noise: Tensor) -> Tensor:
    return 2 * noise


MOST = 30  # successes, of more trials: at random rounding x and a total that is x are no longer equal


def _counts(noise: Tensor) -> Tensor:
    """70 % zeros, some in the thousands; float16 and int16 hold all of them."""
    return torch.exp(3 * noise - 1.573).floor().clamp(max=30_000)


def _zero_logits(noise: Tensor) -> Tensor:
    """More zeros than in the data: a gradient that rows share does not cancel to nothing."""
    return 2 * noise + 4


def _log_theta(noise: Tensor) -> Tensor:
    return -9 + 29 * torch.special.ndtr(noise)


def _theta(noise: Tensor) -> Tensor:
    """float16 holds them."""
    return torch.exp(-4 + 13 * torch.special.ndtr(noise))


def _positive(noise: Tensor) -> Tensor:
    """float16 holds them."""
    return torch.exp((2 * noise).clamp(-8, 8))


def _rate(noise: Tensor) -> Tensor:
    """float16 holds gradients by them."""
    return torch.exp(noise.clamp(-2, 2))


def _successes(noise: Tensor) -> Tensor:
    return _counts(noise).clamp(max=MOST)


def _total(noise: Tensor) -> Tensor:
    return (MOST + 1 + 10 * noise.abs()).floor()


ROWS = {
    "bernoulli": Row(recon=lambda n: 3 * n, x=_unit),
    "bernoulli_probs": Row(recon=_unit, x=_unit),
    "gaussian": Row(recon=_itself, x=_itself, second=_itself),
    "laplace": Row(recon=_itself, x=_itself, second=_itself),
    "student_t": Row(recon=_itself, x=_twice, second=_itself, third=lambda n: 3 * n + 1),
    "poisson": Row(recon=_twice, x=_counts),
    "nb": Row(recon=_twice, x=_counts, second=_log_theta),
    "zinb": Row(recon=_twice, x=_counts, second=_log_theta, third=_zero_logits),
    "nb_mean": Row(recon=_positive, x=_counts, second=_theta),
    "nb_logits": Row(recon=_theta, x=_counts, second=_twice),
    "gamma_poisson": Row(recon=_positive, x=_counts, second=_rate),
    "zinb_mean": Row(recon=_positive, x=_counts, second=_theta, third=_zero_logits),
    "nb_mixture": Row(recon=_positive, x=_counts, second=_positive, third=_theta, fourth=_twice),
    "beta_binomial": Row(recon=_positive, x=_successes, second=_positive, third=_total),
}


def _optional(name: str) -> bool:
    row = likelihoods.get(name)
    return row.fewest < len(row.parameters)


# (name, whether the parameters that may be left out are given)
LIKELIHOODS = [(name, full) for name in ROWS for full in ((False, True) if _optional(name) else (False,))]
LIKELIHOOD_IDS = [f"{name}-pair" if full else name for name, full in LIKELIHOODS]

# Of every number of parameters, every domain, and data among the parameters: where the subject is no formula
REPRESENTATIVES = [
    (name, name == "gaussian") for name in ("bernoulli", "gaussian", "student_t", "nb", "nb_mixture", "beta_binomial")
]
REPRESENTATIVE_IDS = [name for name, _ in REPRESENTATIVES]


def is_counts(name: str) -> bool:
    return likelihoods.get(name).domain == "counts"


def holds(dtype: torch.dtype | None, name: str) -> bool:
    """Whether x of this type, None being that of recon, is data of the likelihood."""
    return dtype in (None, torch.float32, torch.uint8) or is_counts(name) == (dtype in COUNTS)


def further(likelihood: tuple[str, bool]) -> list[Callable[[Tensor], Tensor]]:
    """How the parameters behind the first are drawn."""
    name, full = likelihood
    row = ROWS[name]
    drawn = [draw for draw in (row.second, row.third, row.fourth) if draw is not None]
    return drawn if full else drawn[: likelihoods.get(name).fewest - 1]


def joined(recon: Tensor, *others: Tensor | None) -> Tensor | tuple[Tensor, ...]:
    """The parameters as the functions take them."""
    given = [t for t in others if t is not None]
    return (recon, *given) if given else recon


class Drawn(NamedTuple):
    recon: Tensor
    x: Tensor
    second: Tensor | None
    third: Tensor | None
    fourth: Tensor | None


def draw(
    likelihood: tuple[str, bool],
    shape: tuple[int, ...],
    samples: int | None = None,
    dtype: torch.dtype = torch.float32,
    x_dtype: torch.dtype | None = None,
    requires_grad: bool = True,
) -> Drawn:
    """recon [K?, *shape], x [*shape] and the further parameters; those that can, require a gradient."""
    row = ROWS[likelihood[0]]
    whole = shape if samples is None else (samples, *shape)

    def noise(size: tuple[int, ...]) -> Tensor:
        return torch.randn(size, dtype=torch.float64)

    if x_dtype == torch.uint8:
        x = torch.randint(0, MOST + 1 if likelihoods.get(likelihood[0]).data else 256, shape, dtype=torch.uint8)
    elif x_dtype == torch.bool:
        x = torch.rand(shape) < 0.5
    else:
        x = row.x(noise(shape)).to(x_dtype or dtype)
    recon = row.recon(noise(whole)).to(dtype)
    others = [values(noise(whole)).to(dtype) for values in further(likelihood)]
    for t in (recon, x, *others[: len(others) - likelihoods.get(likelihood[0]).data]):
        if t.is_floating_point():
            t.requires_grad_(requires_grad)
    return Drawn(recon, x, *others, *[None] * (3 - len(others)))
