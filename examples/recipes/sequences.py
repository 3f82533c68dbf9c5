"""Sequences of different lengths, with a latent for every time step: padding counts neither in log p nor in the KL.

The data are generated: sine waves of random frequency and phase with noise, 10 to 40 steps long.

    python examples/recipes/sequences.py
"""

import math
import sys

import torch
from torch import Tensor, nn

import fastelbo

M, T, STEPS, BATCH = 2, 40, 600, 64


def waves(n: int) -> tuple[Tensor, Tensor]:
    """x [n, T, 1], and the mask [n, T, 1] of what is no padding."""
    frequency, phase = 0.2 + 0.4 * torch.rand(n, 1), 2 * math.pi * torch.rand(n, 1)
    clean = torch.sin(frequency * torch.arange(T) + phase)
    mask = torch.arange(T) < torch.randint(10, T + 1, (n, 1))
    x = torch.where(mask, clean + 0.1 * torch.randn(n, T), math.nan)
    return x.unsqueeze(-1), mask.unsqueeze(-1)


class SequenceVAE(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.reader = nn.Sequential(nn.Conv1d(1, 32, 5, padding=2), nn.Tanh(), nn.Conv1d(32, 2 * M, 5, padding=2))
        self.writer = nn.Sequential(nn.Conv1d(M, 32, 5, padding=2), nn.Tanh(), nn.Conv1d(32, 1, 5, padding=2))
        self.logvar = nn.Parameter(torch.zeros(()))

    def loss(self, x: Tensor, mask: Tensor, *, parts: bool = False) -> fastelbo.LossParts:
        mu, logvar = self.reader(torch.where(mask, x, 0.0).mT).mT.chunk(2, -1)  # each [B, T, M]
        z = fastelbo.rsample(mu, logvar).z
        mean = self.writer(torch.where(mask, z, 0.0).mT).mT
        return fastelbo.elbo_parts((mean, self.logvar), x, mu, logvar, likelihood="gaussian", mask=mask, kl_mask=mask)


def build() -> SequenceVAE:
    return SequenceVAE()


def loss(model: SequenceVAE, x: Tensor, mask: Tensor) -> Tensor:
    return model.loss(x, mask).loss


def main() -> int:
    torch.manual_seed(0)
    x, mask = waves(2000)
    held_out, held_out_mask = waves(500)
    model = build()
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
    for _ in range(STEPS):
        batch = torch.randint(len(x), (BATCH,))
        optimizer.zero_grad()
        loss(model, x[batch], mask[batch]).backward()
        optimizer.step()
    with torch.no_grad():
        parts = model.loss(held_out, held_out_mask)
        torch.manual_seed(1)
        padded = model.loss(held_out, held_out_mask).loss
        torch.manual_seed(1)
        other = model.loss(torch.where(held_out_mask, held_out, 1e9), held_out_mask).loss
    steps = held_out_mask.sum().item()
    per_step = -parts.loss.item() * len(held_out) / steps
    observed = held_out[held_out_mask]
    independent = torch.distributions.Normal(observed.mean(), observed.std()).log_prob(observed).mean().item()
    print(f"held-out ELBO {per_step:.3f} nats per step; of independent Gaussian steps {independent:.3f}")
    print(f"KL {parts.kl.sum().item() / steps:.3f} nats per step; padding is not read: {torch.equal(padded, other)}")
    return 0 if per_step > independent and torch.equal(padded, other) else 1


if __name__ == "__main__":
    sys.exit(main())
