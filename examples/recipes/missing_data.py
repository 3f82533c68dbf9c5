"""MIWAE (Mattei & Frellsen 2019): training on incomplete data, and imputation by importance weights.

Half of the pixels are missing, in training too. With a mask, the loss is a bound on log p of the pixels that are there,
and the encoder sees 0 for the others.

    python examples/recipes/missing_data.py
"""

import math
import sys

import torch
from torch import Tensor, nn

from fastelbo import PPCA, VAE, importance_weights
from fastelbo.commands.data import load

M, K, STEPS, BATCH = 8, 20, 1500, 64


def build() -> VAE:
    encoder = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 2 * M))
    decoder = nn.Sequential(nn.Linear(M, 128), nn.ReLU(), nn.Linear(128, 64))
    return VAE(encoder, decoder, latent_shape=(M,))


def loss(model: VAE, x: Tensor) -> Tensor:
    return model.loss(x, "iwae", num_samples=K, mask=~x.isnan())


def impute(model: VAE, x: Tensor, num_samples: int = 500) -> Tensor:
    """E[x_missing | x_observed] = sum_k w_k E[x | z_k] (their eq. 11)."""
    missing = x.isnan()
    found = importance_weights(model, x, num_samples, mask=~missing, seed=0)
    with torch.no_grad():
        mean = torch.einsum("kb,kbd->bd", found.normalized.float(), torch.sigmoid(model.decode(found.z)))
    return torch.where(missing, mean, x)


def main() -> int:
    torch.manual_seed(0)
    digits = load("digits")
    truth = digits.held_out[:].flatten(1)
    x, held_out = (torch.where(torch.rand_like(t) < 0.5, math.nan, t) for t in (digits.train[:].flatten(1), truth))
    model = build()
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    for _ in range(STEPS):
        optimizer.zero_grad()
        loss(model, x[torch.randint(len(x), (BATCH,))]).backward()
        optimizer.step()
    missing, means = held_out.isnan(), x.nanmean(0).expand_as(truth)
    linear = torch.as_tensor(PPCA(M).fit(x, "em", generator=torch.Generator().manual_seed(0)).impute(held_out))
    errors = [(t - truth)[missing].square().mean().sqrt().item() for t in (impute(model, held_out), linear, means)]
    print(
        "root mean square error of missing pixels: {:.3f}; of PPCA {:.3f}, of the pixels' means {:.3f}".format(*errors)
    )
    return 0 if errors[0] < 0.85 * errors[2] else 1


if __name__ == "__main__":
    sys.exit(main())
