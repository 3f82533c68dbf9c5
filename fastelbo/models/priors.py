"""The prior of a VAE: N(0, I), a Gaussian by its parameters, or a module with a density."""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from fastelbo.losses import Posterior, expand, rsample, rsample_under
from fastelbo.models.pieces import Condition, fold, given, rows_of

Prior = nn.Module | None


class Pair(nn.Module):
    """A prior of a mean and a log variance, which are parameters if they were given as such."""

    def __init__(self, mu: Tensor, logvar: Tensor) -> None:
        super().__init__()
        for name, t in (("mu", mu), ("logvar", logvar)):
            register = self.register_parameter if isinstance(t, nn.Parameter) else self.register_buffer
            register(name, t)  # type: ignore[arg-type]

    def forward(self, condition: Condition | None = None) -> tuple[Tensor, Tensor]:
        return self.mu, self.logvar  # type: ignore[return-value]


def is_density(prior: Prior) -> bool:
    """Whether the prior has a `log_prob`, in place of a mean and a log variance."""
    return hasattr(prior, "log_prob")


def parameters(prior: Prior, condition: Condition | None) -> tuple[Tensor, ...]:
    """(mu, logvar) of a Gaussian prior; () for N(0, I)."""
    if prior is None:
        return ()
    out = prior(*given(condition))
    if not isinstance(out, tuple | list) or len(out) != 2 or not all(isinstance(t, Tensor) for t in out):
        raise TypeError(f"prior must return a pair of tensors (mu, logvar); got {type(out).__name__}")
    return tuple(out)


def sampler(prior: Prior, mu: Tensor, logvar: Tensor, condition: Condition | None) -> Callable[..., Posterior]:
    """`rsample` of q(z | x) = N(mu, diag exp(logvar)) under the prior, which is asked once if it is a Gaussian."""
    if not is_density(prior):
        options = dict(zip(("prior_mu", "prior_logvar"), parameters(prior, condition), strict=False))
        return partial(rsample, mu, logvar, **options)

    def draw(num_samples: int | None = None, **options: object) -> Posterior:
        kept = options.get("kept")
        of_rows = condition if kept is None else rows_of(condition, kept.datum)  # type: ignore[attr-defined]
        log_prior = partial(_log_prob, prior, of_rows)
        return rsample_under(log_prior, mu, logvar, num_samples, **options)  # type: ignore[arg-type]

    return draw


def _log_prob(prior: nn.Module, condition: Condition | None, z: Tensor) -> Tensor:
    log_p: Tensor = prior.log_prob(z, *given(condition))  # type: ignore[operator]
    return log_p


def sample(prior: nn.Module, n: int, condition: Condition | None, seed: Tensor) -> Tensor:
    """n samples of a prior with a density, by its own `sample`, from a seed; torch's generators are left as they were."""
    devices = [seed.device] if seed.device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(int(seed))
        z: Tensor = prior.sample(n, *given(condition))  # type: ignore[operator]
    return z


def latents(prior: Prior, like: Tensor, condition: Condition | None, seed: Tensor) -> Callable[[int, int], Tensor]:
    """(first, count) -> samples first to first + count of the prior, [count, B, *latent] of `like` [B, *latent]."""
    if is_density(prior):
        assert prior is not None

        def draw(first: int, count: int) -> Tensor:
            lead = (count, len(like))
            z = sample(prior, count * len(like), fold(condition, lead), seed + first)
            return z.unflatten(0, lead)

        return draw
    zeros = torch.zeros_like(like)
    mu, logvar = parameters(prior, condition) or (zeros, zeros)
    mu, logvar = (expand("prior", t, like.shape, "one latent") for t in (mu, logvar))
    return lambda first, count: rsample(mu, logvar, count, seed=seed, first_sample=first).z
