"""Samples of a diagonal Gaussian, their log densities, and its KL divergence."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from fastelbo import reference
from fastelbo._internal import arguments
from fastelbo._internal.arguments import checked
from fastelbo._internal.ops import call
from fastelbo.losses.inputs import compiling, expand, number

_op = torch.ops.fastelbo


class _Posterior(NamedTuple):
    z: Tensor  # [K?, B, *latent]
    kl: Tensor  # [B], or [K, B] with batch_dims=2: KL(q || prior)
    log_ratio: Tensor  # [K?, B]: log p(z) - log q(z | x)
    log_q: Tensor  # [K?, B]: log q(z | x)
    mu: Tensor  # [B, *latent], or [K, B, *latent] with batch_dims=2: as it was given
    logvar: Tensor  # likewise
    # (mu, logvar) as they were given; () for N(0, I); (log p(z),) [K?, B] of another density
    prior: tuple[()] | tuple[Tensor] | tuple[Tensor, Tensor] = ()


class Posterior(_Posterior):
    """Samples of q(z | x) with what the losses need of them."""

    # [2, K, B] zeros, None where nothing of K samples was drawn. The "gradient" that an estimator sends back for them
    # are the factors by which its path and score gradients differ from those in the total gradient: a scaling by way
    # of z alone would act on every loss that reads the same z (csrc/math/estimator.h).
    gates: Tensor | None = None

    def _replace(self, **changes: Any) -> "Posterior":
        changed = super()._replace(**changes)
        changed.gates = self.gates
        return changed

    @property
    def prior_options(self) -> dict[str, Tensor]:
        """The prior as the functions take it.

        Raises:
            ValueError: it is known by its density alone.
        """
        if len(self.prior) == 1:
            raise ValueError("posterior must be under a Gaussian prior: one of another density has no KL per dimension")
        return dict(zip(("prior_mu", "prior_logvar"), self.prior, strict=False))

    def under(self, log_prior: Tensor) -> "Posterior":
        """The same samples under a prior of any density, of which log p(z) is given.

        Args:
            log_prior: [K?, B], as log_q. log p of z, in nats.

        Returns:
            Posterior with log_ratio = log_prior - log_q, kl = -log_ratio and prior = (log_prior,).

        Raises:
            ValueError: another shape.
        """
        if log_prior.shape != self.log_q.shape:
            shape = tuple(self.log_q.shape)
            raise ValueError(f"log_prior must be {shape}, a number for each sample; got {tuple(log_prior.shape)}")
        log_ratio = log_prior - self.log_q
        return self._replace(kl=-log_ratio, log_ratio=log_ratio, prior=(log_prior,))


class Kept(NamedTuple):
    """n of K * B samples, in the order of the data and, within a datum, of the samples."""

    sample: Tensor  # int64 [n]: k
    datum: Tensor  # int64 [n]: b
    scale: Tensor  # float64 [n]: how often the sample counts, 1 / (the probability that it is kept); 0: not at all


def _save(ctx: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE


def drawn_once(draw: Callable[[], Tensor]) -> Tensor:
    """draw(), which torch's partitioner, while compiling, must not compute again in the backward: it would be another
    draw there."""
    if not compiling():
        return draw()
    save = partial(create_selective_checkpoint_contexts, _save)
    return cast(Tensor, checkpoint(draw, use_reentrant=False, context_fn=save))


def seed_tensor(seed: int | Tensor | None, generator: torch.Generator | None, device: torch.device) -> Tensor:
    """int64 [1] on the device: the seed as a tensor, or one drawn from the generator (torch's default one if None)."""
    if seed is None:
        options: dict[str, Any] = {"dtype": torch.int64, "device": device, "generator": generator}
        return drawn_once(lambda: torch.randint(-(2**63), 2**63 - 1, (1,), **options))
    if generator is not None:
        raise ValueError("seed and generator exclude each other: give one of them")
    return seed if isinstance(seed, Tensor) else torch.full((1,), seed, dtype=torch.int64, device=device)


@checked
def rsample(
    mu: arguments.Floats,
    logvar: arguments.Floats,
    num_samples: arguments.Count | None = None,
    *,
    prior_mu: arguments.Floats | None = None,
    prior_logvar: arguments.Floats | None = None,
    seed: arguments.Seed | None = None,
    generator: arguments.Generator | None = None,
    eps: arguments.Floats | None = None,
    kept: arguments.AnyKept | None = None,
    first_sample: arguments.Size = 0,
    batch_dims: arguments.BatchDims = 1,
) -> Posterior:
    """Reparameterized samples of a diagonal Gaussian, with their log densities and its KL, in one pass.

    z = mu + exp(logvar / 2) eps, eps ~ N(0, I). The noise is a function of (seed, linear index in [K, B, M]) and is
    computed again in the backward: only the 8 bytes of the seed are kept. It has float32 resolution in every dtype.

    Args:
        mu, logvar: [B, *latent], a floating dtype. Mean and log variance of q(z | x).
        num_samples: K. None draws one sample without the K dimension.
        prior_mu, prior_logvar: broadcast to mu; N(0, I) without them.
        seed: an int, or an int64 tensor with one element on mu's device. None: drawn from `generator`.
        generator: the source of the seed; torch's default one if None.
        eps: [K?, B, *latent]. The noise, in place of a seed.
        kept: from `keep_samples`: only these n of the samples that the same seed draws.
        first_sample: index of the first of these K samples in a longer run that is drawn in chunks.
        batch_dims: 2 for mu and logvar of [K, B, *latent], which differ per sample. Each is drawn from once.

    Returns:
        Posterior(z [K?, B, *latent] in mu's dtype, kl [B], log_ratio [K?, B], log_q [K?, B], mu, logvar, prior), in
        nats; the first four are differentiable. With kept, z [n, *latent], log_ratio [n] and log_q [n]; with
        batch_dims=2, kl [K, B].

    Raises:
        ValueError, TypeError: shapes, dtypes or options that do not fit.
        IndexError: an index of `kept` that is out of range. On CUDA devices nothing waits to see it: its row is NaN.

    Reference: Kingma & Welling 2014, sec. 2.4 and app. B; noise: Salmon et al. 2011 (Philox 4x32-10).
    """
    if (prior_mu is None) != (prior_logvar is None):
        prior_mu = torch.zeros_like(mu) if prior_mu is None else prior_mu
        prior_logvar = torch.zeros_like(mu) if prior_logvar is None else prior_logvar
    prior = () if prior_mu is None or prior_logvar is None else (prior_mu, prior_logvar)
    if batch_dims == 2:
        if num_samples is not None or first_sample or kept is not None:
            raise ValueError(
                "num_samples must be None, first_sample 0 and kept None with batch_dims=2: mu holds the K samples; "
                f"got num_samples={num_samples}, first_sample={first_sample}"
            )
        if mu.dim() < 3 or logvar.shape != mu.shape:
            raise ValueError(
                "mu and logvar must both be [K, B, *latent] with batch_dims=2; "
                f"got {tuple(mu.shape)} and {tuple(logvar.shape)}"
            )
        if eps is not None and eps.shape != mu.shape:
            raise ValueError(f"eps must have the shape {tuple(mu.shape)} of mu; got {tuple(eps.shape)}")
        lead, num_samples = mu.shape[:2], 1
        whole = mu, logvar, *_whole_prior(prior_mu, prior_logvar, mu)
        given = [None if t is None else t.flatten(0, 1) for t in whole]
        eps = None if eps is None else eps.flatten(0, 1).unsqueeze(0)
    else:
        lead, given = None, [mu, logvar, prior_mu, prior_logvar]
    if eps is None and seed is None and reference.exports_to_onnx():  # no seed can be drawn there, but noise can
        eps = torch.randn_like(mu.expand(mu.shape if num_samples is None else (num_samples, *mu.shape)))
    if eps is not None and not (seed is None and generator is None and kept is None):
        raise ValueError("eps and seed (or generator, or kept) exclude each other: give one of them")
    if kept is not None and (seed is None or num_samples is not None):
        raise ValueError("kept takes the seed of the samples that it was chosen from, and no num_samples: give seed")
    if first_sample and first_sample > (limit := 2**63 // max(1, mu.numel()) - (num_samples or 1)):
        raise ValueError(f"first_sample must be at most {limit}: noise has 2^63 elements; got {first_sample}")
    key = None if eps is not None else seed_tensor(seed, generator, mu.device)
    chosen = (None, None) if kept is None else (kept.sample, kept.datum)
    z, kl, log_ratio, log_q, gates = call(
        _op.rsample.default, reference.rsample, *given, num_samples, key, eps, *chosen, first_sample
    )
    if lead is not None:
        z, kl = z.view(mu.shape), kl.view(lead)
        log_ratio, log_q, gates = log_ratio.view(lead), log_q.view(lead), gates.view(2, *lead)
    drawn = Posterior(z, kl, log_ratio, log_q, mu, logvar, prior)
    if num_samples is not None or kept is not None:
        drawn.gates = gates
    return drawn


def _whole_prior(prior_mu: Tensor | None, prior_logvar: Tensor | None, mu: Tensor) -> list[Tensor | None]:
    """A prior in the shape of mu, where rows are taken apart."""
    given = (("prior_mu", prior_mu), ("prior_logvar", prior_logvar))
    return [None if t is None else expand(name, t, mu.shape, "mu") for name, t in given]


@checked
def gaussian_kl(
    mu: arguments.Floats,
    logvar: arguments.Floats,
    prior_mu: arguments.Floats | None = None,
    prior_logvar: arguments.Floats | None = None,
    *,
    free_bits: arguments.NotNegative = 0.0,
    mask: arguments.BoolMask | None = None,
    reduce: arguments.Flag = True,
) -> Tensor:
    """KL divergence of a diagonal Gaussian from a diagonal Gaussian prior.

    1/2 sum_j [exp(t) - 1 - t + (mu - mu_p)^2 exp(-lv_p)], t = lv - lv_p; free of cancellation and never negative.

    Args:
        mu, logvar: [B, *latent], a floating dtype.
        prior_mu, prior_logvar: broadcast to mu; N(0, I) without them.
        free_bits: floor lambda in nats for the batch mean of every dimension's KL; per datum, a dimension below it
            counts lambda, so that the mean over B is sum_j max(lambda, mean_b KL_bj). Not with a mask or reduce=False.
        mask: bool, broadcasts to mu. Where it is False nothing is read, and the KL is 0: padding in sequences.
        reduce: False for the KL of every dimension, for a capacity or weights of your own.

    Returns:
        [B], or [B, *latent] with reduce=False, in nats; float32, or float64 for float64 inputs.

    Raises:
        ValueError, TypeError: shapes or dtypes that do not fit, free_bits with a mask or with reduce=False.

    Reference: Kingma & Welling 2014, app. B; free bits: Kingma et al. 2016, eq. 15.
    """
    if (mask is not None or not reduce) and (isinstance(free_bits, Tensor) or free_bits > 0):
        raise ValueError(f"free_bits must be 0 with a mask or with reduce=False; got {free_bits}")
    given = [mu, logvar, prior_mu, prior_logvar]
    if mask is not None or not reduce:
        given = [mu, logvar, *_whole_prior(prior_mu, prior_logvar, mu)]
    if mask is not None:  # two standard normals have a KL of 0, whose gradient is 0
        where = expand("mask", mask, mu.shape, "mu")
        given = [None if t is None else torch.where(where, t, 0) for t in given]
    if not reduce:  # every element as a row
        given = [None if t is None else t.reshape(-1, 1) for t in given]
    floor = None if mask is not None or not reduce else number(free_bits, 0.0, mu)
    kl: Tensor = call(_op.gaussian_kl.default, reference.gaussian_kl, *given, floor)
    return kl if reduce else kl.view(mu.shape)
