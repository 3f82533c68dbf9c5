"""Pythae's VAE, BetaVAE, IWAE and VAMP with their losses computed by fastelbo. One import changes:

    from fastelbo.integrations.pythae import VAE  # was: from pythae.models import VAE

Configurations, trainers, samplers, random draws and files stay: either class loads the models of the other. Written for
pythae 0.1.2.
"""

from __future__ import annotations

from typing import Any

import torch
from pythae import models
from pythae.models.base.base_utils import ModelOutput
from torch import Tensor, nn

import fastelbo
from fastelbo import LossParts
from fastelbo.likelihoods import LOG_2PI
from fastelbo.losses import weighted

__all__ = ["IWAE", "VAE", "VAMP", "BetaVAE"]

LIKELIHOODS = {"bce": "bernoulli_probs", "mse": "gaussian"}  # of Pythae's reconstruction_loss


class _Fused:
    """What the models share: the likelihood by its name here, Pythae's constants, and log p(x).

    Pythae's "mse" is the Gaussian of unit variance without its D / 2 log 2 pi, and stays so.
    """

    model_config: Any
    encoder: nn.Module
    decoder: nn.Module
    beta = 1.0

    @property
    def _likelihood(self) -> str:
        return LIKELIHOODS[self.model_config.reconstruction_loss]

    def loss_function(self, recon_x: Tensor, x: Tensor, mu: Tensor, log_var: Tensor, z: Tensor) -> tuple[Tensor, ...]:
        """Loss, reconstruction loss and KL, averaged over the batch, as Pythae's."""
        recon = recon_x.reshape(x.shape)
        return self._outputs(fastelbo.elbo_parts(recon, x, mu, log_var, likelihood=self._likelihood, beta=self.beta), x)

    def _outputs(self, parts: LossParts, x: Tensor) -> tuple[Tensor, ...]:
        constant = 0.5 * LOG_2PI * x[0].numel() if self._likelihood == "gaussian" else 0.0
        return parts.loss - constant, -parts.log_likelihood.mean() - constant, parts.kl.mean()

    def _log_prior_ratio(self, z: Tensor) -> Tensor:
        """log p(z) - log N(z; 0, I); z [n, M] -> [n]."""
        return z.new_zeros(len(z))

    @torch.no_grad()
    def get_nll(self, data: Tensor, n_samples: int = 1, batch_size: int = 100) -> float:
        """log p(x), averaged over data; of exactly n_samples importance samples per datum.

        As in Pythae, the number is the log-likelihood, not minus it. Pythae's takes a multiple of batch_size samples.

        Args:
            data: [N, *event].
            n_samples: K.
            batch_size: how many data are computed at a time.

        Returns:
            The mean over data, nats.

        Reference: Burda et al. 2016, eq. 8.
        """
        total = 0.0
        for x in data.split(batch_size):
            out, rows = self.encoder(x), max(1, batch_size // len(x))  # of one pass of the decoder
            drawn, log_w = fastelbo.rsample(out.embedding, out.log_covariance, n_samples), []
            for z, log_ratio in zip(drawn.z.split(rows), drawn.log_ratio.split(rows), strict=True):
                flat = z.flatten(0, 1)
                recon = self.decoder(flat)["reconstruction"].reshape(-1, *x.shape)
                log_likelihood = fastelbo.log_prob(recon, x, likelihood=self._likelihood)
                log_w.append(log_likelihood + log_ratio + self._log_prior_ratio(flat).view_as(log_ratio))
            total += fastelbo.log_mean_exp(torch.cat(log_w), 0).double().sum().item()
        return total / len(data)


class VAE(_Fused, models.VAE):  # type: ignore[misc]
    """pythae.models.VAE whose loss is computed by `fastelbo.elbo_loss`: the same value and gradients."""


class BetaVAE(_Fused, models.BetaVAE):  # type: ignore[misc]
    """pythae.models.BetaVAE whose loss is computed by `fastelbo.elbo_loss`: the same value and gradients."""


class VAMP(_Fused, models.VAMP):  # type: ignore[misc]
    """pythae.models.VAMP whose log p(x | z) is computed by `fastelbo.log_prob`: the same value and gradients."""

    def loss_function(  # type: ignore[override]
        self, recon_x: Tensor, x: Tensor, mu: Tensor, log_var: Tensor, z: Tensor, epoch: int
    ) -> tuple[Tensor, ...]:
        """As Pythae's: `epoch` counts for the warm-up of the KL."""
        log_likelihood = fastelbo.log_prob(recon_x.reshape(x.shape), x, likelihood=self._likelihood)
        log_q = -0.5 * (log_var + (z - mu).square() / log_var.exp()).sum(1)
        kl = log_q - self._log_p_z(z)  # both without M / 2 log 2 pi
        warm_up = self.linear_scheduling
        beta = min(epoch / warm_up, 1.0) if warm_up > 0 and self.training else 1.0
        return self._outputs(LossParts((weighted(beta, kl) - log_likelihood).mean(), log_likelihood, kl), x)

    def _log_prior_ratio(self, z: Tensor) -> Tensor:
        return self._log_p_z(z) + 0.5 * z.square().sum(1)  # type: ignore[no-any-return]


class IWAE(_Fused, models.IWAE):  # type: ignore[misc]
    """pythae.models.IWAE whose bound is computed by `fastelbo.multi_sample_loss`: the same gradients.

    The loss is minus the bound, -log 1/K sum_k w_k. Pythae's has the bound's gradient, but another value: the mean of
    -log w_k under the normalized weights, which is not a bound and less than this loss by at most log K.

    Reference: Burda et al. 2016, eq. 8 and 13.
    """

    def forward(self, inputs: Any, **kwargs: Any) -> ModelOutput:
        """As Pythae's, with its draws."""
        x = inputs["data"]
        out = self.encoder(x)
        mu, log_var = out.embedding, out.log_covariance
        noise = torch.randn(len(x), self.n_samples, self.latent_dim, dtype=mu.dtype, device=mu.device)
        posterior = fastelbo.rsample(mu, log_var, self.n_samples, eps=noise.transpose(0, 1))
        recon = self.decoder(posterior.z.flatten(0, 1))["reconstruction"].reshape(-1, *x.shape)
        parts = fastelbo.multi_sample_parts(recon, x, posterior, estimator="iwae", likelihood=self._likelihood)
        loss, recon_loss, _ = self._outputs(parts, x)
        return ModelOutput(
            loss=loss,
            recon_loss=recon_loss,
            reg_loss=-posterior.log_ratio.mean(),
            recon_x=recon[0],
            z=posterior.z[0],
        )
