"""Fused losses for latent-variable models: faster and right, as a drop-in for plain PyTorch."""

import importlib
import sys
from typing import TypedDict, cast

from fastelbo import distributions, reference
from fastelbo._internal import ops as _ops
from fastelbo._internal.ops import reference_mode
from fastelbo.losses import (
    ELBOLoss,
    IWAELoss,
    Kept,
    LossParts,
    Posterior,
    TotalCorrelation,
    bernoulli_log_prob,
    bound_loss,
    bound_parts,
    elbo_loss,
    elbo_parts,
    estimator_weights,
    gaussian_kl,
    gaussian_log_prob,
    iwae_loss,
    iwae_parts,
    keep_samples,
    kept_loss,
    log_mean_exp,
    log_prob,
    mixture_log_prob,
    multi_sample_loss,
    multi_sample_parts,
    rsample,
    total_correlation,
)
from fastelbo.models.aggregated import AggregatedPosterior, AggregateTerms, Estimate, aggregated_posterior
from fastelbo.models.diagnostics import Diagnostics, DiagnosticsMeter, diagnostics
from fastelbo.models.evaluation import Evaluation, evaluate
from fastelbo.models.loading import load
from fastelbo.models.marginal import ImportanceWeights, LogMeanExp, MarginalEstimate, importance_weights
from fastelbo.models.objective import Objective
from fastelbo.models.priors import MixturePrior, VampPrior
from fastelbo.models.scaling import Scaling
from fastelbo.models.vae import VAE, VAELoss
from fastelbo.ppca import PPCA, FitReport, ppca_log_prob

__version__ = "0.1.0"

__all__ = [
    "PPCA",
    "VAE",
    "AggregateTerms",
    "AggregatedPosterior",
    "Diagnostics",
    "DiagnosticsMeter",
    "ELBOLoss",
    "Estimate",
    "Evaluation",
    "FitReport",
    "IWAELoss",
    "ImportanceWeights",
    "Kept",
    "LogMeanExp",
    "LossParts",
    "MarginalEstimate",
    "MixturePrior",
    "Objective",
    "Posterior",
    "Scaling",
    "TotalCorrelation",
    "VAELoss",
    "VampPrior",
    "aggregated_posterior",
    "bernoulli_log_prob",
    "bound_loss",
    "bound_parts",
    "build_info",
    "diagnostics",
    "distributions",
    "elbo_loss",
    "elbo_parts",
    "estimator_weights",
    "evaluate",
    "gaussian_kl",
    "gaussian_log_prob",
    "importance_weights",
    "iwae_loss",
    "iwae_parts",
    "keep_samples",
    "kept_loss",
    "load",
    "log_mean_exp",
    "log_prob",
    "mixture_log_prob",
    "multi_sample_loss",
    "multi_sample_parts",
    "ppca_log_prob",
    "reference",
    "reference_mode",
    "rsample",
    "total_correlation",
]


class BuildInfo(TypedDict):
    """What was built, and what of it this machine can use."""

    fastelbo: str  # version
    torch: str  # version that was built against
    compiler: str
    isas: list[str]  # instruction sets that there are kernels for
    isas_of_this_cpu: list[str]
    isa: str  # the instruction set in use
    threads: str  # "openmp", those of torch, or "serial"
    cuda: bool
    cuda_archs: str
    likelihoods: list[str]
    devices: list[str]  # device types with kernels; on any other the functions run `fastelbo.reference`


def build_info() -> BuildInfo:
    """What was built, for bug reports; `fastelbo info` prints it."""
    info = {"fastelbo": __version__, **_ops._C.build_info(), "devices": sorted(reference.random.KERNEL_DEVICES)}
    return cast(BuildInfo, info)


# Pickles of earlier versions name the modules that held their classes then.
for _then, _now in {
    "vae": "models.vae",
    "marginal": "models.marginal",
    "diagnostics": "models.diagnostics",
    "functional": "losses",
    "kept": "losses.kept",
    "ppca.fit": "ppca.closed_form",
}.items():
    sys.modules[f"{__name__}.{_then}"] = importlib.import_module(f"{__name__}.{_now}")
