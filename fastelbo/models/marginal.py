"""Marginal likelihood: a streaming log mean exp of importance weights, and the estimate of log p(x) made of it."""

import math
from collections.abc import Iterator
from typing import Annotated, NamedTuple, Protocol, Self

import torch
from torch import Tensor, nn

from fastelbo._internal import arguments
from fastelbo._internal.arguments import Condition, checked, refusal
from fastelbo._internal.ordered import ordered_sum
from fastelbo.losses import Recon, join_recon, log_prob, seed_tensor, split_recon
from fastelbo.models import priors
from fastelbo.models.pieces import blocks_of, cut, given

PROPOSALS = ("posterior", "prior")


class MarginalEstimate(NamedTuple):
    """An estimate of log p(x) and how far it can be trusted. All [B], float64."""

    log_prob: Tensor  # log (1/K) sum_k w_k, nats; its expectation is a lower bound on log p(x)
    ess: Tensor  # effective sample size (sum_k w_k)^2 / sum_k w_k^2: of K samples, how many count
    std_error: Tensor  # of log_prob, by the delta method: sqrt((K / ess - 1) / (K - 1)); NaN for K = 1
    max_weight: Tensor  # the largest normalized weight, max_k w_k / sum_k w_k: near 1, a single sample decides


class LogMeanExp:
    """Streaming log mean exp of weights that come in chunks of any size: log (1/K) sum_k exp(log w_k), per datum.

    Keeps the running maximum, the sum and the sum of squares of exp(log w - maximum), and K, in float64; nothing
    synchronizes. However the samples are cut into chunks, K is their number, and the result is the same to rounding.

    Reference: Burda et al. 2016, eq. 8; effective sample size: Kong 1992; delta method: Owen, Monte Carlo, ch. 9.
    """

    def __init__(self) -> None:
        self.count = 0  # K
        self._top, self._sum, self._squares = torch.empty(0), torch.empty(0), torch.empty(0)  # each [*batch]

    @staticmethod
    def _shift(top: Tensor) -> Tensor:
        return torch.where(top.isfinite(), top, 0.0)

    def _add(self, count: int, top: Tensor, total: Tensor, squares: Tensor) -> Self:
        if self.count == 0:
            self.count, self._top, self._sum, self._squares = count, top, total, squares
            return self
        if top.shape != self._top.shape:
            raise ValueError(f"log_w must be [k, {', '.join(map(str, self._top.shape))}]; got [k, *{tuple(top.shape)}]")
        largest = torch.maximum(self._top, top)
        shift = self._shift(largest)
        ours, theirs = torch.exp(self._top - shift), torch.exp(top - shift)
        self._sum = self._sum * ours + total * theirs
        self._squares = self._squares * ours.square() + squares * theirs.square()
        self._top = largest
        self.count += count
        return self

    @checked
    def update(self, log_w: arguments.Floats) -> Self:
        """Add a chunk of log weights.

        Args:
            log_w: [k, *batch], a floating dtype; *batch is the same in every chunk, k is not.

        Raises:
            ValueError, TypeError: no samples, another shape or a dtype that is not floating.
        """
        if log_w.dim() == 0 or len(log_w) == 0:
            raise ValueError(f"log_w must be [k, *batch] with k of at least 1; got {tuple(log_w.shape)}")
        log_w = log_w.detach().double()
        top = log_w.amax(0)
        weights = torch.exp(log_w - self._shift(top))
        return self._add(len(log_w), top, ordered_sum(weights, 0), ordered_sum(weights.square(), 0))

    def merge(self, other: "LogMeanExp") -> Self:
        """Add the samples that another accumulator has added up for the same data; the other does not change.

        Raises:
            ValueError, TypeError: weights of another shape; other is no LogMeanExp.
        """
        if not isinstance(other, LogMeanExp):
            raise refusal("other", "a LogMeanExp", other)
        if other.count == 0:
            return self
        return self._add(other.count, other._top, other._sum, other._squares)

    def result(self) -> MarginalEstimate:
        """The estimate from all samples so far.

        Where every weight is 0: log_prob -inf, ess 0, std_error inf, max_weight 0.

        Raises:
            ValueError: there was no update yet.
        """
        if self.count == 0:
            raise ValueError("result needs at least one sample: call update first")
        nothing = self._sum == 0
        log_mean = self._shift(self._top) + torch.log(self._sum) - math.log(self.count)
        ess = torch.where(nothing, 0.0, self._sum.square() / self._squares)
        std_error = torch.sqrt(((self.count / ess - 1) / (self.count - 1 or math.nan)).clamp_min(0.0))
        return MarginalEstimate(log_mean, ess, std_error, torch.where(nothing, 0.0, 1 / self._sum))


class Model(Protocol):
    """What is read of a model; `fastelbo.VAE` is one."""

    likelihood: str
    decoder: nn.Module
    prior: nn.Module | None

    def encode(
        self, x: Tensor, condition: Condition | None = None, *, mask: Tensor | None = None
    ) -> tuple[Tensor, Tensor]: ...

    def decode(self, z: Tensor, condition: Condition | None = None) -> Recon: ...


AnyModel = Annotated[Model, arguments.module]


def encode_blocks(
    model: Model, x: Tensor, condition: Condition | None = None, mask: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """`model.encode`, in blocks that stay in the cache."""
    mu, logvar = zip(
        *(model.encode(part, *given(c), mask=m) for part, c, m in blocks_of(x, condition, mask)), strict=True
    )
    return torch.cat(mu), torch.cat(logvar)


def _of_every_datum(recon: Recon, x: Tensor) -> Recon:
    """recon [k, 1, *event] as [k, B, *event], without a copy."""
    first, *others = split_recon(recon)
    shape = (len(first), *x.shape)
    return join_recon(first.expand(shape), *(t.expand(shape) if t.dim() == first.dim() else t for t in others))


@checked
def weighted_samples(
    model: AnyModel,
    x: arguments.Data,
    num_samples: arguments.Count,
    *,
    chunk_size: arguments.Count | None = None,
    proposal: arguments.Text = "posterior",
    condition: Condition | None = None,
    mask: arguments.Mask | None = None,
    seed: arguments.Seed | None = None,
    generator: arguments.Generator | None = None,
) -> Iterator[tuple[Tensor, Tensor]]:
    """Piece by piece, the samples z and log weights [k, B] of `VAE.log_marginal`, which explains the arguments.

    z is [k, B, *latent], or [k, 1, *latent] where all data share the samples of one prior.
    """
    if proposal not in PROPOSALS:
        raise ValueError(f"proposal must be one of {', '.join(PROPOSALS)}; got {proposal!r}")
    key = seed_tensor(seed, generator, x.device)
    # without a condition, the same samples of the prior serve every datum: K of them are decoded, not K times B
    of_prior, shared = proposal == "prior", proposal == "prior" and condition is None
    with torch.no_grad():
        mu, logvar = encode_blocks(model, x, condition, mask)
        latents = priors.latents(model.prior, mu[:1] if shared else mu, condition, key)
        draw = priors.sampler(model.prior, mu, logvar, condition)

    def piece(first: int, count: int) -> tuple[Tensor, Tensor]:
        drawn = None if of_prior else draw(count, seed=key, first_sample=first)
        z = latents(first, count) if drawn is None else drawn.z
        if shared:
            whole = _of_every_datum(model.decode(z, condition), x)
            return z, log_prob(whole, x, likelihood=model.likelihood, mask=mask)
        log_p, start = [], 0
        for part, of_part, left in blocks_of(x, condition, mask):
            recon = model.decode(z[:, start : start + len(part)], of_part)
            log_p.append(log_prob(recon, part, likelihood=model.likelihood, mask=left))
            start += len(part)
        log_likelihood = torch.cat(log_p, 1)
        return z, log_likelihood if drawn is None else log_likelihood + drawn.log_ratio

    size, elements = chunk_size or num_samples, max((x[:1] if shared else x).numel(), len(x))
    for start in range(0, num_samples, size):
        for first, last in cut(start, min(start + size, num_samples), elements, x.device):
            with torch.no_grad():
                found = piece(first, last - first)
            yield found


def log_weights(model: Model, x: Tensor, num_samples: int, **options: object) -> Iterator[Tensor]:
    """The log weights of `weighted_samples`, which has the options, alone."""
    for _, log_w in weighted_samples(model, x, num_samples, **options):  # type: ignore[arg-type]
        yield log_w


class ImportanceWeights(NamedTuple):
    """Samples of q(z | x) and their log importance weights."""

    log_w: Tensor  # [K, B]: log p(x | z) + log p(z) - log q(z | x), nats
    z: Tensor  # [K, B, *latent]

    @property
    def normalized(self) -> Tensor:
        """[K, B], float64: w_k / sum_k w_k. sum_k normalized_k f(z_k) estimates E[f(z) | x]."""
        log_w = self.log_w.double()
        weights = torch.exp(log_w - log_w.amax(0))
        return weights / ordered_sum(weights, 0)


@torch.no_grad()
@checked
def importance_weights(
    model: AnyModel,
    x: arguments.Data,
    num_samples: arguments.Count,
    *,
    condition: Condition | None = None,
    mask: arguments.Mask | None = None,
    seed: arguments.Seed | None = None,
    generator: arguments.Generator | None = None,
) -> ImportanceWeights:
    """K samples of q(z | x) with their weights, for estimates of your own: imputation, posterior expectations.

    With w the normalized weights, sum_k w_k f(z_k) estimates E[f(z) | x]; of a part of x, where a mask leaves out the
    rest: sum_k w_k E[x | z_k] imputes it (Mattei & Frellsen 2019, eq. 11). The decoder runs in pieces that fit the
    cache; z of all samples is returned.

    Args:
        model: a `fastelbo.VAE`.
        x: [B, *event], of a dtype that its `encode` takes.
        num_samples: K.
        condition, mask: see `fastelbo.VAE`.
        seed, generator: the noise, as in `fastelbo.rsample`.

    Returns:
        ImportanceWeights(log_w [K, B], z [K, B, *latent]), with the normalized weights [K, B] as `normalized`.

    Raises:
        ValueError, TypeError: a number below 1; as in `VAE.encode` and `VAE.decode`.

    Reference: Burda et al. 2016, eq. 8; Owen, Monte Carlo, ch. 9.2 (self-normalized importance sampling).
    """
    pieces = weighted_samples(model, x, num_samples, condition=condition, mask=mask, seed=seed, generator=generator)
    z, log_w = map(torch.cat, zip(*pieces, strict=True))
    return ImportanceWeights(log_w, z)
