"""The models of whole training steps, as users write them, in 8 x 8 and 28 x 28 pixels."""

from torch import Tensor, nn

import fastelbo
from fastelbo.nets import build_model


class Step(nn.Module):
    """A model, how many samples K its objective takes (None: the ELBO with one), and how many of them are kept."""

    def __init__(self, vae: fastelbo.VAE, samples: int | None = None, keep: int | None = None) -> None:
        super().__init__()
        self.vae, self.samples, self.keep = vae, samples, keep

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        mu, logvar = self.vae.encode(x)
        return mu, logvar

    def decode(self, z: Tensor) -> Tensor:
        logits: Tensor = self.vae.decoder(z)
        return logits


def dense(side: int, latent: int, hidden: int, samples: int | None = None, keep: int | None = None) -> Step:
    return Step(build_model((side, side), latent, hidden, "bernoulli"), samples, keep)


def convolutional(latent: int, samples: int | None = None, keep: int | None = None) -> Step:
    """28 x 28 pixels: two convolutions of stride 2 and their transposes."""
    encoder = nn.Sequential(
        *(nn.Conv2d(1, 32, 4, 2, 1), nn.ReLU(), nn.Conv2d(32, 64, 4, 2, 1), nn.ReLU()),
        *(nn.Flatten(), nn.Linear(64 * 7 * 7, 2 * latent)),
    )
    decoder = nn.Sequential(
        *(nn.Linear(latent, 64 * 7 * 7), nn.ReLU(), nn.Unflatten(1, (64, 7, 7))),
        *(nn.ConvTranspose2d(64, 32, 4, 2, 1), nn.ReLU(), nn.ConvTranspose2d(32, 1, 4, 2, 1)),
    )
    return Step(fastelbo.VAE(encoder, decoder, "bernoulli", latent_shape=(latent,)), samples, keep)
