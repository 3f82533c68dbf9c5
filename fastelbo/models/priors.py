"""The prior of a VAE: N(0, I), a Gaussian by its parameters, a mixture, or any module with a density."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastelbo._internal import arguments
from fastelbo._internal.arguments import Condition, checked, refusal
from fastelbo.losses import Posterior, expand, mixture_log_prob, rsample
from fastelbo.models import checks
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


class _Mixture(nn.Module):
    """What mixtures of diagonal Gaussians share: their components, each tensor [C, *latent], and log weights [C]."""

    def components(self) -> tuple[Tensor, Tensor, Tensor | None]:
        """mu, logvar and the normalized log weights; None: equal ones."""
        raise NotImplementedError

    @checked
    def log_prob(self, z: arguments.Floats) -> Tensor:
        """log p(z) of z [K?, B, *latent]: [K?, B], in nats."""
        mu, logvar, log_weights = self.components()
        latent = mu.dim() - 1
        if z.dim() <= latent or z.shape[z.dim() - latent :] != mu.shape[1:]:
            raise ValueError(f"z must be [K?, B, *latent] with latent={tuple(mu.shape[1:])}; got {tuple(z.shape)}")
        flat = z.flatten(z.dim() - latent) if latent > 1 else z
        return mixture_log_prob(flat, mu.flatten(1), logvar.flatten(1), log_weights)

    @torch.no_grad()
    def sample(self, n: int) -> Tensor:
        """n draws [n, *latent], by torch's default generator."""
        mu, logvar, log_weights = self.components()
        weights = torch.ones(len(mu), device=mu.device) if log_weights is None else log_weights.float().exp()
        which = torch.multinomial(weights, n, replacement=True) if n else mu.new_empty(0, dtype=torch.int64)
        return mu[which] + torch.exp(0.5 * logvar[which]) * torch.randn_like(mu[which])


class MixturePrior(_Mixture):
    """A learned mixture of diagonal Gaussians as the prior of a VAE: sum_c w_c N(z; mu_c, diag exp(logvar_c)).

    w = softmax(logits). mu begins as standard normal draws, logvar and logits as 0.

    Args:
        components: C, their number.
        latent: M, or the shape of one latent.

    Raises:
        ValueError, TypeError: a number below 1.

    Reference: Dilokthanakul et al. 2016; Tomczak & Welling 2018, sec. 2 (MoG).
    """

    @checked
    def __init__(self, components: arguments.Count, latent: arguments.CountOrShape) -> None:
        super().__init__()
        shape = (components, *((latent,) if isinstance(latent, int) else latent))
        self.mu, self.logvar = nn.Parameter(torch.randn(shape)), nn.Parameter(torch.zeros(shape))
        self.logits = nn.Parameter(torch.zeros(components))

    def components(self) -> tuple[Tensor, Tensor, Tensor | None]:
        """The parameters, and log w [C]."""
        return self.mu, self.logvar, F.log_softmax(self.logits, 0)


class VampPrior(_Mixture):
    """A mixture of posteriors as the prior of a VAE: p(z) = 1/C sum_c q(z | u_c), of learned pseudo-inputs u_c.

    `VAE(encoder, decoder, prior=VampPrior(encoder, x[:500]))`. The encoder is the same module, and learns from both.

    Args:
        encoder: that of the VAE, without a condition.
        pseudo_inputs: [C, *event], a floating dtype: where u begins, as the encoder sees data; data, for example. With
            a `fastelbo.Scaling` these are standardized ones.

    Raises:
        TypeError: pseudo_inputs of another dtype.

    Reference: Tomczak & Welling 2018, eq. 9.
    """

    @checked
    def __init__(self, encoder: arguments.Module, pseudo_inputs: arguments.Floats) -> None:
        super().__init__()
        if pseudo_inputs.dim() < 2 or len(pseudo_inputs) == 0:
            raise ValueError(f"pseudo_inputs must be [C, *event], C of 1 or more; got {tuple(pseudo_inputs.shape)}")
        self.encoder = encoder
        self.pseudo_inputs = nn.Parameter(pseudo_inputs.detach().clone())

    def components(self) -> tuple[Tensor, Tensor, Tensor | None]:
        """q(z | u_c), with equal weights."""
        return *checks.encoded(self.encoder(self.pseudo_inputs), None), None


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
