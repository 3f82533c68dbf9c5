"""Small models that several files test, and how their processes end."""

import math
import os

import torch
import torch.distributions as td
from torch import Tensor, nn

from fastelbo import VAE

M, D = 4, 11  # latent and data dimensions


def log_normal(z: Tensor, mu: Tensor, logvar: Tensor) -> Tensor:
    """log N(z; mu, diag exp(logvar)), summed over the last dimension, as a textbook has it."""
    return -0.5 * ((z - mu).square() * torch.exp(-logvar) + logvar + math.log(2 * math.pi)).sum(-1)


def model_of(dtype: torch.dtype = torch.float64, likelihood: str = "bernoulli") -> VAE:
    torch.manual_seed(1)
    encoder = nn.Sequential(nn.Linear(D, 6), nn.Tanh(), nn.Linear(6, 2 * M))
    decoder = nn.Sequential(nn.Linear(M, 6), nn.Tanh(), nn.Linear(6, D))
    with torch.no_grad():  # so that the weights differ by a few nats
        decoder[2].weight.mul_(4)
    return VAE(encoder, decoder, likelihood).to(dtype)


def linear_gaussian(batch: int = 3) -> tuple[VAE, Tensor, Tensor]:
    """p(x | z) = N(W z + b, I) with W'W diagonal, and q = the exact posterior: -> model, x, log p(x) [batch]."""
    torch.manual_seed(3)
    W = torch.linalg.qr(torch.randn(D, M, dtype=torch.float64))[0] * torch.tensor([2.0, 1.5, 1.0, 0.5])
    b = torch.randn(D, dtype=torch.float64)
    x = (torch.randn(batch, M).double() @ W.T + b + torch.randn(batch, D)).double()
    variance = 1 / (W.square().sum(0) + 1)  # of the posterior: (W'W + I)^-1, diagonal
    encoder, decoder = nn.Linear(D, 2 * M).double(), nn.Linear(M, D).double()
    with torch.no_grad():
        encoder.weight[:M], encoder.weight[M:] = variance[:, None] * W.T, 0
        encoder.bias[:M], encoder.bias[M:] = -variance * (W.T @ b), variance.log()
        decoder.weight[:], decoder.bias[:] = W, b
    marginal = td.MultivariateNormal(b, W @ W.T + torch.eye(D, dtype=torch.float64))
    return VAE(encoder, decoder, "gaussian"), x, marginal.log_prob(x)


# Decoders of data [2, 3] from latents [M].


class LearnedVariance(nn.Module):
    """A decoder that returns (mean, logvar), logvar of a shape that broadcasts."""

    def __init__(self, shape: tuple[int, ...], full: bool = False) -> None:
        super().__init__()
        self.mean = nn.Sequential(nn.Linear(M, 6), nn.Unflatten(1, (2, 3)))
        self.logvar = nn.Parameter(0.3 * torch.randn(shape))
        self.full = full

    def forward(self, z: Tensor) -> tuple[Tensor, Tensor]:
        mean = self.mean(z)
        return mean, self.logvar + z.sum(1)[:, None, None] if self.full else self.logvar


class ThreeParameters(nn.Module):
    """(log_mean, log_theta, zero_logits), the last of them of full size if `full`, else as it is given."""

    def __init__(self, log_theta: tuple[int, ...], zero_logits: tuple[int, ...], full: bool) -> None:
        super().__init__()
        self.log_mean = nn.Sequential(nn.Linear(M, 6), nn.Unflatten(1, (2, 3)))
        self.log_theta = nn.Parameter(0.3 * torch.randn(log_theta))
        self.zero_logits = nn.Parameter(0.3 * torch.randn(zero_logits))
        self.full = full

    def forward(self, z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        zeros = self.zero_logits + z.sum(1)[:, None, None] if self.full else self.zero_logits
        return self.log_mean(z), self.log_theta, zeros


def dense(decoder: nn.Module | None = None, likelihood: str = "bernoulli") -> VAE:
    torch.manual_seed(0)
    encoder = nn.Sequential(nn.Flatten(), nn.Linear(6, 2 * M))
    return VAE(encoder, decoder or nn.Sequential(nn.Linear(M, 6), nn.Unflatten(1, (2, 3))), likelihood).double()


def leave_group() -> None:
    """Ends a process of a gloo group that has saved what it found.

    Without destructors: that of DistributedDataParallel's reducer joins gloo's threads, and was seen to wait for a
    process that had left.
    """
    os._exit(0)
