"""The latent distribution of diffusers' AutoencoderKL with its KL computed by fastelbo. One line before training:

    autoencoder_kl.DiagonalGaussianDistribution = DiagonalGaussianDistribution

where `from diffusers.models.autoencoders import autoencoder_kl`, or the module of another autoencoder. Written for
diffusers 0.42.
"""

from __future__ import annotations

import torch
from diffusers.models.autoencoders import vae
from torch import Generator, Tensor

import fastelbo

__all__ = ["DiagonalGaussianDistribution"]


class DiagonalGaussianDistribution(vae.DiagonalGaussianDistribution):  # type: ignore[misc]
    """diffusers' class: draws, mode, nll and clamps are its own. The KL is one op, with the same gradients.

    Near the prior, the KL keeps the digits that `mean**2 + var - 1 - logvar` loses in float32. Latents may have any
    number of dimensions; diffusers' KL takes [B, C, H, W] alone.
    """

    def kl(self, other: vae.DiagonalGaussianDistribution | None = None) -> Tensor:
        """KL(self || other) [B], nats; other is N(0, I) if None."""
        if self.deterministic:
            return torch.Tensor([0.0])
        prior = (None, None) if other is None else (other.mean, other.logvar)
        return fastelbo.gaussian_kl(self.mean, self.logvar, *prior)

    def sample_with_kl(self, generator: Generator | None = None) -> tuple[Tensor, Tensor]:
        """A sample [B, *latent] and the KL from N(0, I) [B], in one pass. The draws are fastelbo's, not diffusers'.

        Args:
            generator: on the device of the parameters; torch's default one if None.
        """
        if self.deterministic:
            return self.mean, self.kl()
        drawn = fastelbo.rsample(self.mean, self.logvar, generator=generator)
        return drawn.z, drawn.kl
