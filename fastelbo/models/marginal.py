"""Marginal likelihood: a streaming log mean exp of importance weights, and the estimate of log p(x) made of it."""

import math
from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import NamedTuple, Protocol, Self

import torch
from torch import Generator, Tensor

from fastelbo._internal.arguments import checked, refusal
from fastelbo._internal.ordered import ordered_sum
from fastelbo.losses import Recon, expand, join_recon, log_prob, rsample, seed_tensor, split_recon

Condition = Tensor | tuple[Tensor, ...]  # what a model's modules take besides x or z; each tensor [B, ...]

PROPOSALS = ("posterior", "prior")
# Elements of recon that are decoded at a time. On a CPU few enough that they and the decoder's hidden layers stay in
# the cache, which is up to twice as fast; on other devices enough to keep them busy.
PIECE_ELEMENTS = {"cpu": 1 << 18, "other": 1 << 25}
CHUNK = 512  # samples per datum whose weights are added up at a time, by default


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
    def update(self, log_w: Tensor) -> Self:
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
    """What `log_weights` reads of a model; `fastelbo.VAE` is one."""

    likelihood: str

    def encode(
        self, x: Tensor, condition: Condition | None = None, *, mask: Tensor | None = None
    ) -> tuple[Tensor, Tensor]: ...

    def decode(self, z: Tensor, condition: Condition | None = None) -> Recon: ...

    def _prior_parameters(self, condition: Condition | None = None) -> dict[str, Tensor]: ...


def given(condition: Condition | None) -> tuple[Condition, ...]:
    """The further argument of a module, if there is one."""
    return () if condition is None else (condition,)


def _each(function: Callable[[Tensor], Tensor], condition: Condition | None) -> Condition | None:
    if condition is None or isinstance(condition, Tensor):
        return None if condition is None else function(condition)
    return tuple(map(function, condition))


def fold(condition: Condition | None, lead: tuple[int, ...]) -> Condition | None:
    """The condition [B, ...] of latents whose leading dimensions, [B] or [K, B], are folded."""

    def each(t: Tensor) -> Tensor:
        if t.dim() == 0 or t.shape[0] != lead[-1]:
            raise ValueError(f"condition must be [B, ...] with B={lead[-1]} from z; got {tuple(t.shape)}")
        return t.expand(*lead, *t.shape[1:]).flatten(0, 1) if len(lead) == 2 else t

    return _each(each, condition)


def rows_of(condition: Condition | None, datum: Tensor) -> Condition | None:
    """The condition of the data [n]."""
    return _each(lambda t: t.index_select(0, datum), condition)


def _expand_batch(recon: Recon, x: Tensor) -> Recon:
    """recon [k, 1, *event] as [k, B, *event], without a copy."""
    first, *others = split_recon(recon)
    shape = (len(first), *x.shape)
    return join_recon(first.expand(shape), *(t.expand(shape) if t.dim() == first.dim() else t for t in others))


def _limit(device: torch.device) -> int:
    return PIECE_ELEMENTS.get(device.type, PIECE_ELEMENTS["other"])


def cut(start: int, end: int, elements: int, device: torch.device) -> list[tuple[int, int]]:
    """start to end in pieces that stay in the cache, each step of so many elements."""
    piece = max(1, _limit(device) // max(1, elements))
    count = max(1, round((end - start) / piece))
    return list(pairwise(start + (end - start) * i // count for i in range(count + 1)))  # of nearly equal size


def pieces(x: Tensor, start: int, end: int) -> list[tuple[int, int]]:
    """Samples start to end, cut so that recon of each piece, for data like x [B, *event], stays in the cache."""
    return cut(start, end, x.numel(), x.device)


def rows_between(condition: Condition | None, start: int, end: int) -> Condition | None:
    """The condition of the data from start to end."""
    return _each(lambda t: t[start:end], condition)


def blocks_of(
    x: Tensor, condition: Condition | None, mask: Tensor | None
) -> Iterator[tuple[Tensor, Condition | None, Tensor | None]]:
    """x [B, *event] with its condition and mask, cut along B so that each block stays in the cache."""
    if x.dim() == 0:  # the model says what is wrong
        yield x, condition, mask
        return
    fold(condition, (len(x),))  # refuses one of another number of rows
    whole = None if mask is None else expand("mask", mask, x.shape, "x")
    for a, b in cut(0, len(x), x.numel() // max(1, len(x)), x.device):
        yield x[a:b], rows_between(condition, a, b), None if whole is None else whole[a:b]


FIRST_ROWS = 16  # of which the size of a row is learned


def by_rows(function: Callable[[int, int], Tensor], n: int) -> Tensor:
    """function(first, last) [last - first, ...] of rows 0 to n, in pieces and put into one tensor."""
    if n < 2 * FIRST_ROWS or torch.compiler.is_compiling():
        return function(0, n)
    found = function(0, FIRST_ROWS)
    whole = found.new_empty(n, *found.shape[1:])
    whole[:FIRST_ROWS] = found
    for a, b in cut(FIRST_ROWS, n, found[0].numel(), found.device):
        whole[a:b] = function(a, b)
    return whole


def encode_blocks(
    model: Model, x: Tensor, condition: Condition | None = None, mask: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """`model.encode`, in blocks that stay in the cache."""
    mu, logvar = zip(
        *(model.encode(part, *given(c), mask=m) for part, c, m in blocks_of(x, condition, mask)), strict=True
    )
    return torch.cat(mu), torch.cat(logvar)


def _weigh(
    model: Model,
    x: Tensor,
    num_samples: int,
    chunk_size: int | None,
    proposal: str,
    condition: Condition | None,
    mask: Tensor | None,
    seed: int | Tensor | None,
    generator: Generator | None,
) -> Iterator[Iterator[tuple[Tensor, Tensor]]]:
    """Chunk by chunk, samples z [k, B, *latent] (or [k, 1, ...], of one prior) and log weights [k, B] in pieces."""
    if proposal not in PROPOSALS:
        raise ValueError(f"proposal must be one of {', '.join(PROPOSALS)}; got {proposal!r}")
    key = seed_tensor(seed, generator, x.device)
    from_prior = proposal == "prior"
    with torch.no_grad():
        mu, logvar = encode_blocks(model, x, condition, mask)
        prior = model._prior_parameters(condition)
        if from_prior:
            # without a condition, the same samples for every datum: K of them are decoded, not K times B
            like = mu if condition is not None else mu[:1]
            mu = expand("prior_mu", prior.get("prior_mu", torch.zeros_like(like)), like.shape, "one latent")
            logvar = expand("prior_logvar", prior.get("prior_logvar", torch.zeros_like(like)), like.shape, "one latent")
            prior = {}

    def weigh(first: int, count: int) -> tuple[Tensor, Tensor]:
        drawn = rsample(mu, logvar, count, **prior, seed=key, first_sample=first)
        if len(mu) != len(x):  # one prior for all data
            whole = _expand_batch(model.decode(drawn.z, condition), x)
            return drawn.z, log_prob(whole, x, likelihood=model.likelihood, mask=mask)
        log_p, start = [], 0
        for part, of_part, left in blocks_of(x, condition, mask):
            recon = model.decode(drawn.z[:, start : start + len(part)], of_part)
            log_p.append(log_prob(recon, part, likelihood=model.likelihood, mask=left))
            start += len(part)
        log_likelihood = torch.cat(log_p, 1)
        return drawn.z, log_likelihood if from_prior else log_likelihood + drawn.log_ratio

    def chunk(start: int, end: int) -> Iterator[tuple[Tensor, Tensor]]:
        for first, last in cut(start, end, max(x[: len(mu)].numel(), len(x)), x.device):
            with torch.no_grad():
                found = weigh(first, last - first)
            yield found

    size = chunk_size or max(1, min(CHUNK, _limit(x.device) // max(1, len(x))))
    for start in range(0, num_samples, size):
        yield chunk(start, min(start + size, num_samples))


@checked
def log_weights(
    model: Model,
    x: Tensor,
    num_samples: int,
    *,
    chunk_size: int | None = None,
    proposal: str = "posterior",
    condition: Condition | None = None,
    mask: Tensor | None = None,
    seed: int | Tensor | None = None,
    generator: Generator | None = None,
) -> Iterator[Tensor]:
    """The log importance weights of `VAE.log_marginal`, chunk by chunk: [k, B]. It explains the arguments."""
    for chunk in _weigh(model, x, num_samples, chunk_size, proposal, condition, mask, seed, generator):
        yield torch.cat([log_w for _, log_w in chunk])


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
    model: Model,
    x: Tensor,
    num_samples: int,
    *,
    condition: Condition | None = None,
    mask: Tensor | None = None,
    seed: int | Tensor | None = None,
    generator: Generator | None = None,
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
    chunks = _weigh(model, x, num_samples, None, "posterior", condition, mask, seed, generator)
    found = [piece for chunk in chunks for piece in chunk]
    z, log_w = (torch.cat(parts) for parts in zip(*found, strict=True))
    return ImportanceWeights(log_w, z)
