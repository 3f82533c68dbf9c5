"""The prior of a VAE: N(0, I), a Gaussian by its parameters, or a module with a density."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from fastelbo._internal.arguments import Condition, refusal
from fastelbo.losses import Posterior, expand, rsample
from fastelbo.models.pieces import fold, given, rows_of


class Pair(nn.Module):
    """A prior of a mean and a log variance, which are parameters if they were given as such."""

    def __init__(self, mu: Tensor, logvar: Tensor) -> None:
        super().__init__()
        for name, t in (("mu", mu), ("logvar", logvar)):
            register = self.register_parameter if isinstance(t, nn.Parameter) else self.register_buffer
            register(name, t)  # type: ignore[arg-type]

    def forward(self, condition: Condition | None = None) -> tuple[Tensor, Tensor]:
        return self.mu, self.logvar  # type: ignore[return-value]


def is_density(prior: nn.Module | None) -> bool:
    """Whether the prior has a `log_prob`, in place of a mean and a log variance."""
    return hasattr(prior, "log_prob")


def parameters(prior: nn.Module | None, condition: Condition | None) -> tuple[Tensor, ...]:
    """(mu, logvar) of a Gaussian prior; () for N(0, I)."""
    if prior is None:
        return ()
    out = prior(*given(condition))
    if not isinstance(out, tuple | list) or len(out) != 2 or not all(isinstance(t, Tensor) for t in out):
        raise TypeError(f"prior must return a pair of tensors (mu, logvar); got {type(out).__name__}")
    return tuple(out)


def sampler(
    prior: nn.Module | None, mu: Tensor, logvar: Tensor, condition: Condition | None
) -> Callable[..., Posterior]:
    """`rsample` of q(z | x) = N(mu, diag exp(logvar)) under the prior, which is asked once if it is a Gaussian."""
    options: dict[str, Any] = {}
    if not is_density(prior):
        options = dict(zip(("prior_mu", "prior_logvar"), parameters(prior, condition), strict=False))

    def draw(num_samples: int | None = None, **noise: Any) -> Posterior:
        drawn = rsample(mu, logvar, num_samples, **options, **noise)
        if not is_density(prior):
            return drawn
        kept = noise.get("kept")
        log_p = prior.log_prob(drawn.z, *given(condition if kept is None else rows_of(condition, kept.datum)))  # type: ignore
        if not isinstance(log_p, Tensor):
            raise refusal("log_prob of the prior", "a tensor", log_p)
        return drawn.under(log_p)

    return draw


def sample(prior: Any, n: int, condition: Condition | None, seed: Tensor) -> Tensor:
    """n samples of a prior with a density, by its own `sample`; torch's generators are left as they were."""
    with torch.random.fork_rng(devices=[seed.device] if seed.device.type == "cuda" else []):
        torch.manual_seed(int(seed))
        z: Tensor = prior.sample(n, *given(condition))
    return z


def latents(
    prior: nn.Module | None, like: Tensor, condition: Condition | None, seed: Tensor
) -> Callable[[int, int], Tensor]:
    """(first, count) -> samples first to first + count of the prior, [count, *like.shape], like [B, *latent]."""
    if is_density(prior):

        def draw(first: int, count: int) -> Tensor:
            lead = count, len(like)
            z = sample(prior, count * len(like), fold(condition, lead), seed + first)
            return z.view(*lead, *z.shape[1:])

        return draw
    zeros = torch.zeros_like(like)
    mu, logvar = (expand("prior", t, like.shape, "one latent") for t in parameters(prior, condition) or (zeros, zeros))
    return lambda first, count: rsample(mu, logvar, count, seed=seed, first_sample=first).z
