"""The networks of `fastelbo train`: a small VAE for data of any event shape and any likelihood."""

import math

import torch
from torch import Tensor, nn

from fastelbo import likelihoods
from fastelbo.models.scaling import Scaling
from fastelbo.models.vae import VAE

NETS = ("mlp", "conv")


class LearnedScale(nn.Module):
    """Puts learned 0-d parameters behind the decoder's mean: a log variance or log scale (Rybkin et al. 2021,
    sigma-VAE), and those that `others` names."""

    def __init__(self, *others: str) -> None:
        super().__init__()
        for name in ("log_scale", *others):
            self.register_parameter(name, nn.Parameter(torch.zeros(())))

    def forward(self, mean: Tensor) -> tuple[Tensor, ...]:
        return mean, *self.parameters()


class Log1p(nn.Module):
    """log(1 + x): counts as an encoder takes them."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.log1p(x)


class LearnedDispersion(nn.Module):
    """The decoder's [B, n, *event] as n tensors, with a learned log_theta [*event] behind the first."""

    def __init__(self, event: tuple[int, ...]) -> None:
        super().__init__()
        self.log_theta = nn.Parameter(torch.zeros(event))

    def forward(self, outputs: Tensor) -> tuple[Tensor, ...]:
        log_mean, *zero_logits = outputs.unbind(1)
        return log_mean, self.log_theta, *zero_logits


class _Movedim(nn.Module):
    """`torch.movedim` as a layer."""

    def __init__(self, source: int, destination: int) -> None:
        super().__init__()
        self.source, self.destination = source, destination

    def forward(self, x: Tensor) -> Tensor:
        return x.movedim(self.source, self.destination)


def _convolutional(event: tuple[int, ...], latent_dim: int, hidden: int) -> tuple[nn.Sequential, nn.Sequential]:
    """Encoder and decoder of two convolutions of stride 2, with half and all of `hidden` / 4 channels."""
    last_dim = len(event) == 3 and event[0] not in (1, 3) and event[2] in (1, 3)
    channels, height, width = (
        (event[2], *event[:2]) if last_dim else (1, *event)[-3:] if len(event) in (2, 3) else (0,) * 3
    )
    if channels not in (1, 3) or height % 4 or width % 4:
        raise ValueError(
            "net 'conv' takes images [H, W], [C, H, W] or [H, W, C] of 1 or 3 channels, H and W multiples of 4; got "
            f"{event}: net 'mlp' takes any"
        )
    last, first = max(hidden // 4, 2), max(hidden // 8, 1)
    inner = (last, height // 4, width // 4)
    stored = (height, width, channels) if last_dim else (channels, height, width)
    encoder = nn.Sequential(
        *(nn.Flatten(), nn.Unflatten(1, stored), *([_Movedim(3, 1)] if last_dim else [])),
        *(nn.Conv2d(channels, first, 4, 2, 1), nn.ReLU(), nn.Conv2d(first, last, 4, 2, 1), nn.ReLU()),
        *(nn.Flatten(), nn.Linear(math.prod(inner), 2 * latent_dim)),
    )
    decoder = nn.Sequential(
        *(nn.Linear(latent_dim, math.prod(inner)), nn.ReLU(), nn.Unflatten(1, inner)),
        *(nn.ConvTranspose2d(last, first, 4, 2, 1), nn.ReLU(), nn.ConvTranspose2d(first, channels, 4, 2, 1)),
        *([_Movedim(1, 3)] if last_dim else []),
        *(nn.Flatten(), nn.Unflatten(1, event)),
    )
    return encoder, decoder


# what `build_model` takes: the networks' outputs are real numbers, and counts that are given by other parameters than
# logarithms have networks of their own
BUILT = tuple(
    name
    for name, row in likelihoods.LIKELIHOODS.items()
    if row.domain != "counts" or row.parameters[0].startswith("log_")
)


def build_model(
    event: tuple[int, ...],
    latent_dim: int,
    hidden: int,
    likelihood: str,
    net: str = "mlp",
    scaling: Scaling | None = None,
) -> VAE:
    """A VAE with two hidden layers on either side, dense ones for data of any event shape.

    Of counts the encoder sees log1p(x), and the decoder gives every parameter but log_theta, one number per element of
    the event, whatever z.
    """
    if likelihood not in BUILT:
        raise ValueError(f"likelihood must be one of {', '.join(BUILT)}; got {likelihood!r}")
    size, row = math.prod(event), likelihoods.get(likelihood)

    def layers(first: int, last: int) -> list[nn.Module]:
        return [nn.Linear(first, hidden), nn.ReLU(), nn.Linear(hidden, hidden), nn.ReLU(), nn.Linear(hidden, last)]

    if net == "conv":
        if row.domain == "counts":
            raise ValueError(f"net 'conv' takes no counts; got likelihood {likelihood!r}")
        encoder, decoder = _convolutional(event, latent_dim, hidden)
    else:
        encoder = nn.Sequential(nn.Flatten(), *layers(size, 2 * latent_dim))
        decoder = nn.Sequential(*layers(latent_dim, size), nn.Unflatten(1, event))
    if row.domain == "counts":
        encoder.insert(0, Log1p())
    if "log_theta" in row.parameters:
        outputs = len(row.parameters) - 1
        decoder = nn.Sequential(*layers(latent_dim, outputs * size), nn.Unflatten(1, (outputs, *event)))
        decoder.append(LearnedDispersion(event))
        return VAE(encoder, decoder, likelihood, latent_shape=(latent_dim,))
    if likelihood == "bernoulli_probs":
        decoder.append(nn.Sigmoid())
    elif len(row.parameters) > 1:
        decoder.append(LearnedScale(*row.parameters[2:]))
    return VAE(encoder, decoder, likelihood, scaling=scaling, latent_shape=(latent_dim,))
