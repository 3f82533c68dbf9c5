"""Fused losses for latent-variable models: faster and right, as a drop-in for plain PyTorch."""

from typing import Any

from fastelbo import _ops, reference
from fastelbo.functional import (
    ELBOLoss,
    IWAELoss,
    LossParts,
    Posterior,
    bernoulli_log_prob,
    elbo_loss,
    gaussian_kl,
    gaussian_log_prob,
    iwae_loss,
    log_mean_exp,
    log_prob,
    multi_sample_loss,
    ppca_log_prob,
    reference_mode,
    rsample,
)
from fastelbo.latents import Diagnostics, DiagnosticsMeter, diagnostics
from fastelbo.marginal import LogMeanExp, MarginalEstimate
from fastelbo.ppca import PPCA
from fastelbo.ppca_fit import FitReport
from fastelbo.vae import VAE

__version__ = "0.1.0"

__all__ = [
    "PPCA",
    "VAE",
    "Diagnostics",
    "DiagnosticsMeter",
    "ELBOLoss",
    "FitReport",
    "IWAELoss",
    "LogMeanExp",
    "LossParts",
    "MarginalEstimate",
    "Posterior",
    "bernoulli_log_prob",
    "build_info",
    "diagnostics",
    "elbo_loss",
    "gaussian_kl",
    "gaussian_log_prob",
    "iwae_loss",
    "log_mean_exp",
    "log_prob",
    "multi_sample_loss",
    "ppca_log_prob",
    "reference",
    "reference_mode",
    "rsample",
]


def build_info() -> dict[str, Any]:
    """What was built: torch built against, compiler, instruction sets, CUDA architectures, likelihoods, devices.

    `devices` lists where the kernels run; on any other device the functions run `fastelbo.reference`.
    """
    return {"fastelbo": __version__, **_ops._C.build_info(), "devices": sorted(_ops.KERNEL_DEVICES)}
