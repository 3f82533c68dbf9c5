"""Held-out figures of a trained VAE."""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from fastelbo._internal.progress import progress
from fastelbo.losses import rsample
from fastelbo.models.diagnostics import DiagnosticsMeter
from fastelbo.models.marginal import LogMeanExp, MarginalEstimate, log_weights
from fastelbo.models.vae import VAE

BATCH = 500  # data that are encoded at a time


class Evaluation(NamedTuple):
    """Held-out figures of a trained model, in nats per datum."""

    log_prob: float  # mean over the data of the importance-sampled log p(x)
    sampling_error: float  # standard error of it from the K samples
    data_error: float  # standard error of it from the choice of data
    elbo: float  # on the same samples
    ess: float  # mean effective sample size
    max_weight: float  # mean of the largest normalized weight
    active_units: int
    latent_dim: int


@torch.no_grad()
def evaluate(model: VAE, x: Tensor, num_samples: int, *, seed: int = 0, chunk_size: int | None = None) -> Evaluation:
    """Marginal likelihood of the data x [N, *event] by K importance samples each, beside the ELBO."""
    model.eval()
    meter = DiagnosticsMeter()
    generator = torch.Generator().manual_seed(seed)
    estimates: list[MarginalEstimate] = []
    elbos: list[Tensor] = []
    for batch in x.split(BATCH):
        mu, logvar = model.encode(batch)
        meter.update(rsample(mu, logvar, generator=generator))
        estimate, log_w_sum = LogMeanExp(), torch.zeros(len(batch), dtype=torch.float64)
        chunks = log_weights(model, batch, num_samples, chunk_size=chunk_size, generator=generator)
        label = f"log p(x), {len(elbos) * BATCH} of {len(x)} data done"
        for log_w in progress(chunks, label, "sample", num_samples, len):
            estimate.update(log_w)
            log_w_sum += log_w.double().sum(0)
        estimates.append(estimate.result())
        elbos.append(log_w_sum / num_samples)
    log_prob, ess, error, max_weight = (torch.cat(parts) for parts in zip(*estimates, strict=True))
    latent = meter.result()
    return Evaluation(
        log_prob.mean().item(),
        error.square().sum().sqrt().item() / len(x),
        log_prob.std().item() / math.sqrt(len(x)),
        torch.cat(elbos).mean().item(),
        ess.mean().item(),
        max_weight.mean().item(),
        int(latent.active_units.item()),
        latent.kl.numel(),
    )
