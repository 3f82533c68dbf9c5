"""The public functions: sampling, likelihoods, and the losses made of them."""

from fastelbo.losses.bounds import bound_loss, bound_parts
from fastelbo.losses.elbo import ELBOLoss, elbo_loss, elbo_parts
from fastelbo.losses.inputs import Recon, expand, join_recon, split_recon, weighted
from fastelbo.losses.kept import estimator_weights, keep_samples, kept_loss
from fastelbo.losses.likelihood import (
    bernoulli_log_prob,
    gaussian_log_prob,
    likelihood_mean,
    likelihood_sample,
    log_prob,
)
from fastelbo.losses.mixture import TotalCorrelation, mixture_log_prob, total_correlation
from fastelbo.losses.multi_sample import (
    IWAELoss,
    iwae_loss,
    iwae_parts,
    log_mean_exp,
    multi_sample_loss,
    multi_sample_parts,
)
from fastelbo.losses.parts import LossParts, loss_of
from fastelbo.losses.sampling import Kept, Posterior, drawn_once, gaussian_kl, rsample, seed_tensor

__all__ = [
    "ELBOLoss",
    "IWAELoss",
    "Kept",
    "LossParts",
    "Posterior",
    "Recon",
    "TotalCorrelation",
    "bernoulli_log_prob",
    "bound_loss",
    "bound_parts",
    "drawn_once",
    "elbo_loss",
    "elbo_parts",
    "estimator_weights",
    "expand",
    "gaussian_kl",
    "gaussian_log_prob",
    "iwae_loss",
    "iwae_parts",
    "join_recon",
    "keep_samples",
    "kept_loss",
    "likelihood_mean",
    "likelihood_sample",
    "log_mean_exp",
    "log_prob",
    "loss_of",
    "mixture_log_prob",
    "multi_sample_loss",
    "multi_sample_parts",
    "rsample",
    "seed_tensor",
    "split_recon",
    "total_correlation",
    "weighted",
]
