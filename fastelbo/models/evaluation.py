"""Figures of a trained model on data that need not fit in memory."""

import math
from typing import Annotated, NamedTuple

import torch
from torch import Tensor

from fastelbo import likelihoods, reference
from fastelbo._internal import arguments
from fastelbo._internal.arguments import checked
from fastelbo._internal.progress import progress
from fastelbo.losses import rsample
from fastelbo.models.aggregated import AggregatedPosterior
from fastelbo.models.diagnostics import DiagnosticsMeter
from fastelbo.models.marginal import LogMeanExp, MarginalEstimate, log_weights
from fastelbo.models.pieces import Rows, masked
from fastelbo.models.vae import VAE
from fastelbo.ppca import PPCA

AGGREGATED = 50_000  # data, at most, whose posteriors are aggregated: the time grows with their square


class Evaluation(NamedTuple):
    """Figures of a trained model, in nats per datum; None where there is no such figure."""

    rows: int  # data
    log_prob: float  # mean over the data of log p(x): by importance sampling, or of a PPCA exactly
    data_error: float | None  # standard error of it from the choice of data; none of one datum
    bits_per_dim: float | None  # -log2 p(x) per cell that is there; none of grey values under a Bernoulli
    sampling_error: float | None = None  # standard error of log_prob from the K samples; none of one sample
    elbo: float | None = None  # on the same samples
    ess: float | None = None  # mean effective sample size
    max_weight: float | None = None  # mean of the largest normalized weight
    active_units: int | None = None  # none of one datum
    latent_dim: int | None = None  # M
    # of the aggregated posterior q(z) of the data, or of AGGREGATED of them at equal distances
    mutual_information: float | None = None  # of x and z
    marginal_kl: float | None = None  # of q(z) from the prior
    total_correlation: float | None = None  # of the dimensions of z


class _Bits:
    """Bits per cell that is there. Of bytes that are read as x / 255 they are those of pixels from 0 to 255."""

    def __init__(self, likelihood: str) -> None:
        self.domain = likelihoods.get(likelihood).domain
        self.cells, self.log_unit, self.density = 0, 0.0, True

    def update(self, x: Tensor, mask: Tensor | None) -> None:
        self.cells += x.numel() if mask is None else int(mask.sum())
        if self.domain == "reals" and x.dtype == torch.uint8:
            self.log_unit = math.log(255)
        if self.domain == "[0, 1]" and self.density:
            values = reference.read_data(x, torch.float32)
            self.density = bool(((values == 0) | (values == 1) | values.isnan()).all())

    def result(self, log_prob: Tensor) -> float | None:
        if not self.density or not self.cells:
            return None
        return _finite((self.cells * self.log_unit - log_prob.sum().item()) / (self.cells * math.log(2)))


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _standard_error(values: Tensor) -> float | None:
    return _finite(values.std().item() / math.sqrt(len(values))) if len(values) > 1 else None


Model = Annotated[VAE | PPCA, arguments.instance((VAE, PPCA), "a fastelbo.VAE or fastelbo.PPCA")]


@torch.no_grad()
@checked
def evaluate(
    model: Model,
    x: Rows,
    num_samples: arguments.Count = 5000,
    *,
    chunk_size: arguments.Count | None = None,
    seed: arguments.Integer = 0,
) -> Evaluation:
    """Marginal likelihood of data, with its errors, in memory that does not grow with them.

    Of a VAE by importance sampling, beside the ELBO on the same samples and the terms of its KL
    (`fastelbo.aggregated_posterior`); the model goes to evaluation mode. Of a PPCA exactly, num_samples, chunk_size and
    seed being of no use.

    Args:
        model: a `fastelbo.VAE` without a condition, or a `fastelbo.PPCA`.
        x: [N, *event] of a dtype that the model takes, or a `fastelbo.data.Dataset`; NaN is a missing cell, which
            counts for nothing.
        num_samples: K.
        chunk_size: at most so many samples per datum are decoded at a time.
        seed: of the noise.

    Returns:
        Evaluation: log p(x) in nats per datum, its standard errors, bits per cell, and what the latents hold.

    Raises:
        ValueError, TypeError: x of no rows; as in `VAE.log_marginal`, or `PPCA.log_prob`.

    Reference: Burda et al. 2016, eq. 8; bits per dimension: Theis et al. 2016, sec. 3.1.
    """
    if len(x.shape) < 2 or x.shape[0] == 0:
        raise ValueError(f"x must be [N, *event] with N of 1 or more; got {tuple(x.shape)}")
    if isinstance(model, PPCA):
        return _exactly(model, x)
    model.eval()
    meter, bits = DiagnosticsMeter(), _Bits(model.likelihood)
    generator = torch.Generator().manual_seed(seed)
    estimates: list[MarginalEstimate] = []
    elbos: list[Tensor] = []
    latents: list[tuple[Tensor, Tensor]] = []
    done, step = 0, math.ceil(len(x) / AGGREGATED)
    for batch, mask in masked(x):
        mu, logvar = model.encode(batch, mask=mask)
        meter.update(rsample(mu, logvar, generator=generator))
        latents.append((mu[-done % step :: step], logvar[-done % step :: step]))
        estimate, log_w_sum = LogMeanExp(), torch.zeros(len(batch), dtype=torch.float64)
        chunks = log_weights(model, batch, num_samples, mask=mask, chunk_size=chunk_size, generator=generator)
        label = f"log p(x), {done} of {len(x)} data done"
        for log_w in progress(chunks, label, "sample", num_samples, len):
            estimate.update(log_w)
            log_w_sum += log_w.double().sum(0)
        estimates.append(estimate.result())
        elbos.append(log_w_sum / num_samples)
        bits.update(batch, mask)
        done += len(batch)
    log_prob, ess, error, max_weight = (torch.cat(parts) for parts in zip(*estimates, strict=True))
    latent = meter.result()
    mu, logvar = (torch.cat(parts) for parts in zip(*latents, strict=True))
    terms = AggregatedPosterior(mu, logvar, model.prior).terms(seed=seed)
    return Evaluation(
        len(x),
        log_prob.mean().item(),
        _standard_error(log_prob),
        bits.result(log_prob),
        _finite(error.square().sum().sqrt().item() / len(x)) if num_samples > 1 else None,
        torch.cat(elbos).mean().item(),
        ess.mean().item(),
        max_weight.mean().item(),
        int(latent.active_units.item()) if len(x) > 1 else None,
        latent.kl.numel(),
        *(_finite(term.value) for term in terms),
    )


def _exactly(model: PPCA, x: Rows) -> Evaluation:
    bits, parts = _Bits("gaussian"), []
    for batch, mask in masked(x):
        parts.append(model.log_prob(batch.flatten(1)).double())
        bits.update(batch, mask)
    log_prob = torch.cat(parts)
    return Evaluation(len(x), log_prob.mean().item(), _standard_error(log_prob), bits.result(log_prob))
