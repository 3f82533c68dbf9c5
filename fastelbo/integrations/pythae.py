"""Pythae's variational autoencoders with their losses computed by fastelbo. One import changes:

    from fastelbo.integrations.pythae import VAE  # was: from pythae.models import VAE

Configurations, trainers, samplers, random draws and files stay: either class loads the models of the other. Written for
pythae 0.1.2.
"""

from __future__ import annotations

from math import prod
from typing import Any, ClassVar

import torch
from pythae import models
from pythae.models.base.base_utils import ModelOutput
from torch import Tensor, nn

import fastelbo
from fastelbo.likelihoods import LOG_2PI
from fastelbo.losses import weighted

__all__ = [
    "CIWAE",
    "HVAE",
    "INFOVAE_MMD",
    "IWAE",
    "MIWAE",
    "PIWAE",
    "RHVAE",
    "SVAE",
    "VAE",
    "VAE_IAF",
    "VAMP",
    "BetaTCVAE",
    "BetaVAE",
    "DisentangledBetaVAE",
    "PoincareVAE",
    "VAE_LinNF",
]

LIKELIHOODS = {"bce": "bernoulli_probs", "mse": "gaussian"}  # of Pythae's reconstruction_loss


class _Fused:
    """What the models share: the likelihood by its name here, and Pythae's constants.

    Pythae's "mse" is the Gaussian of unit variance without its D / 2 log 2 pi, and stays so.
    """

    likelihoods: ClassVar[dict[str, str]] = LIKELIHOODS
    model_config: Any
    encoder: nn.Module
    decoder: nn.Module

    @property
    def _likelihood(self) -> str:
        return self.likelihoods[self.model_config.reconstruction_loss]

    def _constant(self, x: Tensor) -> float:
        return 0.5 * LOG_2PI * x[0].numel() if self._likelihood == "gaussian" else 0.0

    def _recon_loss(self, recon_x: Tensor, x: Tensor) -> Tensor:
        """-log p(x | z) [B], as Pythae's."""
        log_likelihood = fastelbo.log_prob(recon_x.reshape(x.shape), x, likelihood=self._likelihood)
        return -log_likelihood - self._constant(x)


class _Likelihood(_Fused):
    """The models of which log p(x | z) alone is fastelbo's, and the rest of the loss Pythae's."""

    def loss_function(self, recon_x: Tensor, x: Tensor, *latents: Any) -> tuple[Tensor, ...]:
        """As Pythae's."""
        recon_loss = self._recon_loss(recon_x, x).mean()
        zero = recon_x.new_zeros(len(x), 1)  # of which Pythae's loss is the rest alone
        rest, _, *others = super().loss_function(zero, zero, *latents)  # type: ignore[misc]
        return recon_loss + rest, recon_loss, *others


class _Gaussian(_Fused):
    """The models whose posterior is a Gaussian: the ELBO, and log p(x)."""

    def _elbo(self, recon_x: Tensor, x: Tensor, mu: Tensor, log_var: Tensor, beta: float = 1.0) -> tuple[Tensor, ...]:
        """Loss, reconstruction loss and KL, averaged over the batch."""
        recon, constant = recon_x.reshape(x.shape), self._constant(x)
        parts = fastelbo.elbo_parts(recon, x, mu, log_var, likelihood=self._likelihood, beta=beta)
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


class VAE(_Gaussian, models.VAE):  # type: ignore[misc]
    """pythae.models.VAE whose loss is computed by `fastelbo.elbo_loss`: the same value and gradients."""

    def loss_function(self, recon_x: Tensor, x: Tensor, mu: Tensor, log_var: Tensor, z: Tensor) -> tuple[Tensor, ...]:
        """As Pythae's."""
        return self._elbo(recon_x, x, mu, log_var)


class BetaVAE(_Gaussian, models.BetaVAE):  # type: ignore[misc]
    """pythae.models.BetaVAE whose loss is computed by `fastelbo.elbo_loss`: the same value and gradients."""

    def loss_function(self, recon_x: Tensor, x: Tensor, mu: Tensor, log_var: Tensor, z: Tensor) -> tuple[Tensor, ...]:
        """As Pythae's."""
        return self._elbo(recon_x, x, mu, log_var, self.beta)


class DisentangledBetaVAE(_Gaussian, models.DisentangledBetaVAE):  # type: ignore[misc]
    """pythae.models.DisentangledBetaVAE whose log p(x | z) and KL are fastelbo's: the same value and gradients.

    Reference: Burgess et al. 2018.
    """

    def loss_function(
        self, recon_x: Tensor, x: Tensor, mu: Tensor, log_var: Tensor, z: Tensor, epoch: int
    ) -> tuple[Tensor, ...]:
        """As Pythae's: `epoch` counts for the warm-up of the capacity."""
        recon_loss, kl = self._recon_loss(recon_x, x).mean(), fastelbo.gaussian_kl(mu, log_var)
        capacity = self.C * min(epoch / (self.warmup_epoch + 1), 1)
        return recon_loss + self.beta * (kl - capacity).abs().mean(), recon_loss, kl.mean()


class INFOVAE_MMD(_Gaussian, models.INFOVAE_MMD):  # type: ignore[misc]
    """pythae.models.INFOVAE_MMD whose log p(x | z) and KL are `fastelbo.elbo_loss`: the same value and gradients.

    The maximum mean discrepancy is computed by Pythae.

    Reference: Zhao et al. 2019.
    """

    def loss_function(
        self, recon_x: Tensor, x: Tensor, z: Tensor, z_prior: Tensor, mu: Tensor, log_var: Tensor
    ) -> tuple[Tensor, ...]:
        """As Pythae's."""
        elbo, recon_loss, kl = self._elbo(recon_x, x, mu, log_var, 1 - self.alpha)
        zero = z.new_zeros(len(z), 1)  # of which Pythae's loss is the rest alone
        rest, *_, mmd = super().loss_function(zero, zero, z, z_prior, zero, zero)
        return elbo + rest, recon_loss, kl, mmd


class BetaTCVAE(_Gaussian, models.BetaTCVAE):  # type: ignore[misc]
    """pythae.models.BetaTCVAE whose loss is computed by `fastelbo.total_correlation`: the same value and gradients with
    use_mss=False.

    With use_mss the importance weights are those of the paper: the matrix of Pythae has them in one column, where they
    belong to the diagonal and the one beside it.

    Reference: Chen et al. 2018, eq. 2 and app. C.
    """

    def loss_function(
        self, recon_x: Tensor, x: Tensor, mu: Tensor, log_var: Tensor, z: Tensor, dataset_size: int
    ) -> tuple[Tensor, ...]:
        """As Pythae's."""
        recon_loss, weights = self._recon_loss(recon_x, x).mean(), "mss" if self.use_mss else "mws"
        information, correlation, rest = fastelbo.total_correlation(z, mu, log_var, dataset_size, weights=weights)
        kl = self.alpha * information + self.beta * correlation + self.gamma * rest
        return recon_loss + kl, recon_loss, kl


class VAE_LinNF(_Likelihood, models.VAE_LinNF):  # type: ignore[misc]
    """pythae.models.VAE_LinNF whose log p(x | z) is computed by `fastelbo.log_prob`: the same value and gradients."""


class VAE_IAF(_Likelihood, models.VAE_IAF):  # type: ignore[misc]
    """pythae.models.VAE_IAF whose log p(x | z) is computed by `fastelbo.log_prob`: the same value and gradients."""


class SVAE(_Likelihood, models.SVAE):  # type: ignore[misc]
    """pythae.models.SVAE whose log p(x | z) is computed by `fastelbo.log_prob`: the same value and gradients."""


class PoincareVAE(_Likelihood, models.PoincareVAE):  # type: ignore[misc]
    """pythae.models.PoincareVAE whose log p(x | z) is computed by `fastelbo.log_prob`: the same value and gradients."""


class HVAE(_Fused, models.HVAE):  # type: ignore[misc]
    """pythae.models.HVAE whose log p(x | z) is computed by `fastelbo.log_prob`: the same value and gradients.

    As in Pythae, its "bce" takes the decoder's output for logits. Pythae refuses x other than 0 and 1.
    """

    likelihoods: ClassVar = LIKELIHOODS | {"bce": "bernoulli"}

    def _log_p_x_given_z(self, recon_x: Tensor, x: Tensor) -> Tensor:
        return -self._recon_loss(recon_x, x)


class RHVAE(_Fused, models.RHVAE):  # type: ignore[misc]
    """pythae.models.RHVAE whose log p(x | z) is computed by `fastelbo.log_prob`: the same value and gradients."""

    def _log_p_x_given_z(self, recon_x: Tensor, x: Tensor) -> Tensor:
        return -self._recon_loss(recon_x, x)


class VAMP(_Gaussian, models.VAMP):  # type: ignore[misc]
    """pythae.models.VAMP whose log p(x | z) is computed by `fastelbo.log_prob`: the same value and gradients."""

    def loss_function(
        self, recon_x: Tensor, x: Tensor, mu: Tensor, log_var: Tensor, z: Tensor, epoch: int
    ) -> tuple[Tensor, ...]:
        """As Pythae's: `epoch` counts for the warm-up of the KL."""
        recon_loss = self._recon_loss(recon_x, x).mean()
        log_q = -0.5 * (log_var + (z - mu).square() / log_var.exp()).sum(1)
        kl = log_q - self._log_p_z(z)  # both without M / 2 log 2 pi
        warm_up = self.linear_scheduling
        beta = min(epoch / warm_up, 1.0) if warm_up > 0 and self.training else 1.0
        return recon_loss + weighted(beta, kl).mean(), recon_loss, kl.mean()

    def _log_prior_ratio(self, z: Tensor) -> Tensor:
        return self._log_p_z(z) + 0.5 * z.square().sum(1)  # type: ignore[no-any-return]


class _ImportanceWeighted(_Gaussian):
    """The models of K samples, whose bounds are computed by `fastelbo.multi_sample_parts`."""

    bounds: ClassVar[dict[str, str]]  # the estimator of each loss
    latent_dim: int
    n_samples: int
    gradient_n_estimates = 0  # where the model has no such number
    beta = 1.0

    def forward(self, inputs: Any, **kwargs: Any) -> ModelOutput:
        """As Pythae's, with its draws."""
        x = inputs["data"]
        out = self.encoder(x)
        mu, log_var = out.embedding, out.log_covariance
        sizes = [n for n in (self.gradient_n_estimates, self.n_samples) if n]
        noise = torch.randn(len(x), *sizes, self.latent_dim, dtype=mu.dtype, device=mu.device)
        noise = noise.transpose(0, -2)  # a group of "miwae" is of consecutive samples, and runs over sizes[0] in Pythae
        posterior = fastelbo.rsample(mu, log_var, prod(sizes), eps=noise.flatten(0, -3))
        recon = self.decoder(posterior.z.flatten(0, 1))["reconstruction"].reshape(-1, *x.shape)
        options: dict[str, Any] = {"likelihood": self._likelihood, "beta": self.beta, "groups": sizes[-1]}
        parts = {
            name: fastelbo.multi_sample_parts(recon, x, posterior, estimator=estimator, **options)
            for name, estimator in self.bounds.items()
        }
        constant, (log_likelihood, *_) = self._constant(x), [p.log_likelihood for p in parts.values()]

        def means(t: Tensor) -> Tensor:
            return t.mean(1).view(noise.shape[:-2]).transpose(0, -1)

        return ModelOutput(
            **{name: p.loss - constant for name, p in parts.items()},
            recon_loss=means(-log_likelihood - constant),
            reg_loss=means(-posterior.log_ratio),
            recon_x=recon[0],
            z=posterior.z[0],
        )


class IWAE(_ImportanceWeighted, models.IWAE):  # type: ignore[misc]
    """pythae.models.IWAE whose bound is computed by `fastelbo.multi_sample_loss`: the same gradients.

    The loss is minus the bound, -log 1/K sum_k w_k. Pythae's has the bound's gradient, but another value: the mean of
    -log w_k under the normalized weights, which is not a bound and less than this loss by at most log K.

    Reference: Burda et al. 2016, eq. 8 and 13.
    """

    bounds: ClassVar = {"loss": "iwae"}

    def forward(self, inputs: Any, **kwargs: Any) -> ModelOutput:
        """As Pythae's, with its draws."""
        out = super().forward(inputs, **kwargs)
        out.recon_loss, out.reg_loss = out.recon_loss.mean(), out.reg_loss.mean()
        return out


class CIWAE(_ImportanceWeighted, models.CIWAE):  # type: ignore[misc]
    """pythae.models.CIWAE whose bound is computed by `fastelbo.multi_sample_loss`: the same gradients.

    The loss is minus the bound, where Pythae's is less by 1 - beta times what that of its `IWAE` is.

    Reference: Rainforth et al. 2018, eq. 10.
    """

    bounds: ClassVar = {"loss": "ciwae"}


class MIWAE(_ImportanceWeighted, models.MIWAE):  # type: ignore[misc]
    """pythae.models.MIWAE whose bound is computed by `fastelbo.multi_sample_loss`: the same gradients.

    The loss is minus the bound, where Pythae's is less, as that of its `IWAE`. As in Pythae, the two numbers of the
    configuration have each other's place: weights are normalized over number_gradient_estimates, the paper's K, and
    number_samples of such bounds, the paper's M, are averaged.

    Reference: Rainforth et al. 2018, eq. 9.
    """

    bounds: ClassVar = {"loss": "miwae"}


class PIWAE(_ImportanceWeighted, models.PIWAE):  # type: ignore[misc]
    """pythae.models.PIWAE whose bounds are computed by `fastelbo.multi_sample_loss`: the same gradients.

    Both losses are minus the bounds, where Pythae's are less, as that of its `IWAE`; the numbers of the configuration
    have each other's place, as in `MIWAE`. Pythae's trainer, which stays, gives the encoder the gradient of the
    decoder's loss too: it minimizes the sum of both.

    Reference: Rainforth et al. 2018, sec. 5.
    """

    bounds: ClassVar = {"encoder_loss": "miwae", "decoder_loss": "iwae"}

    def forward(self, inputs: Any, **kwargs: Any) -> ModelOutput:
        """As Pythae's, with its draws."""
        out = super().forward(inputs, **kwargs)
        out.loss, out.update_encoder, out.update_decoder = out.encoder_loss + out.decoder_loss, True, True
        return out
