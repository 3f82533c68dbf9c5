"""Figures of a trained VAE, or of a PPCA, on data."""

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from fastelbo._internal.progress import progress
from fastelbo.data.dataset import Dataset
from fastelbo.losses import rsample
from fastelbo.models.diagnostics import DiagnosticsMeter
from fastelbo.models.marginal import LogMeanExp, MarginalEstimate, log_weights
from fastelbo.models.vae import VAE
from fastelbo.ppca import PPCA

BATCH = 500  # data that are encoded at a time
BATCH_ELEMENTS = 1 << 24  # at most, of those


class Evaluation(NamedTuple):
    """Figures of a trained model, in nats per datum. None where there is no such figure."""

    rows: int
    log_prob: float  # mean over the data of log p(x): by importance sampling, or of a PPCA exactly
    data_error: float | None  # standard error of it from the choice of data; none of one datum
    bits_per_dim: float | None  # -log2 p(x) per cell that is there; none where the likelihood is no density of x
    sampling_error: float | None = None  # standard error of log_prob from the K samples; none of one sample
    elbo: float | None = None  # on the same samples
    ess: float | None = None  # mean effective sample size
    max_weight: float | None = None  # mean of the largest normalized weight
    active_units: int | None = None  # none of one datum
    latent_dim: int | None = None


def batch_size(x: Dataset, num_samples: int = 1) -> int:
    """How many data are encoded at a time, decoded num_samples times each."""
    return max(1, min(math.ceil(BATCH / num_samples), BATCH_ELEMENTS // math.prod(x.shape[1:])))


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def bits(log_prob: Tensor, cells: int, log_unit: float | None) -> float | None:
    """Per cell that is there, of log p(x) in nats.

    log_unit: the logarithm of how many units of the data one unit of x is; None where there is no density.
    """
    if log_unit is None or not cells:
        return None
    return _finite((cells * log_unit - log_prob.sum().item()) / (cells * math.log(2)))


def masked(x: Dataset) -> Iterator[tuple[Tensor, Tensor | None]]:
    """Batches, and the cells that are not missing where some are."""
    for batch in x.batches(batch_size(x)):
        there = ~batch.isnan() if batch.is_floating_point() else None
        yield batch, None if there is None or bool(there.all()) else there


@torch.no_grad()
def evaluate(
    model: VAE,
    x: Dataset,
    num_samples: int,
    *,
    seed: int = 0,
    chunk_size: int | None = None,
    log_unit: float | None = None,
) -> Evaluation:
    """Marginal likelihood of the data x [N, *event] by K importance samples each, beside the ELBO.

    log_unit: see `bits`.
    """
    model.eval()
    meter = DiagnosticsMeter()
    generator = torch.Generator().manual_seed(seed)
    estimates: list[MarginalEstimate] = []
    elbos: list[Tensor] = []
    done = cells = 0
    for batch, mask in masked(x):
        mu, logvar = model.encode(batch, mask=mask)
        meter.update(rsample(mu, logvar, generator=generator))
        estimate, log_w_sum = LogMeanExp(), torch.zeros(len(batch), dtype=torch.float64)
        chunks = log_weights(model, batch, num_samples, mask=mask, chunk_size=chunk_size, generator=generator)
        label = f"log p(x), {done} of {len(x)} data done"
        for log_w in progress(chunks, label, "sample", num_samples, len):
            estimate.update(log_w)
            log_w_sum += log_w.double().sum(0)
        estimates.append(estimate.result())
        elbos.append(log_w_sum / num_samples)
        done, cells = done + len(batch), cells + (batch.numel() if mask is None else int(mask.sum()))
    log_prob, ess, error, max_weight = (torch.cat(parts) for parts in zip(*estimates, strict=True))
    latent = meter.result()
    return Evaluation(
        len(x),
        log_prob.mean().item(),
        _standard_error(log_prob),
        bits(log_prob, cells, log_unit),
        _finite(error.square().sum().sqrt().item() / len(x)) if num_samples > 1 else None,
        torch.cat(elbos).mean().item(),
        ess.mean().item(),
        max_weight.mean().item(),
        int(latent.active_units.item()) if len(x) > 1 else None,
        latent.kl.numel(),
    )


def _standard_error(values: Tensor) -> float | None:
    return _finite(values.std().item() / math.sqrt(len(values))) if len(values) > 1 else None


@torch.no_grad()
def exactly(model: PPCA, x: Dataset, log_unit: float | None = None) -> Evaluation:
    """log p(x) of the data x [N, *event] under a PPCA."""
    parts, cells = [], 0
    for batch, mask in masked(x):
        parts.append(model.log_prob(batch.flatten(1)).double())
        cells += batch.numel() if mask is None else int(mask.sum())
    log_prob = torch.cat(parts)
    return Evaluation(len(x), log_prob.mean().item(), _standard_error(log_prob), bits(log_prob, cells, log_unit))
