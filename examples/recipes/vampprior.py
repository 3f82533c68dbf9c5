"""VampPrior (Tomczak & Welling 2018) and a mixture of Gaussians as the prior of a VAE, beside N(0, I).

python examples/recipes/vampprior.py
"""

import math
import sys

import torch
from torch import Tensor, nn

import fastelbo
from fastelbo.commands.data import load

M, WIDTH, COMPONENTS, STEPS, BATCH, SAMPLES = 8, 128, 100, 6000, 64, 1000


def build(prior: str = "VampPrior", data: Tensor | None = None) -> fastelbo.VAE:
    encoder = nn.Sequential(nn.Linear(64, WIDTH), nn.Tanh(), nn.Linear(WIDTH, 2 * M))
    decoder = nn.Sequential(nn.Linear(M, WIDTH), nn.Tanh(), nn.Linear(WIDTH, 64))
    if prior == "VampPrior":
        data = torch.rand(COMPONENTS, 64) if data is None else data[torch.randperm(len(data))]
        return fastelbo.VAE(encoder, decoder, prior=fastelbo.VampPrior(encoder, data[:COMPONENTS]))
    if prior == "MixturePrior":
        return fastelbo.VAE(encoder, decoder, prior=fastelbo.MixturePrior(COMPONENTS, M))
    return fastelbo.VAE(encoder, decoder)


def loss(model: fastelbo.VAE, x: Tensor) -> Tensor:
    return model.loss(x)


def trained(prior: str, x: Tensor) -> fastelbo.VAE:
    torch.manual_seed(0)
    model = build(prior, x)
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3, fused=True)
    for _ in range(STEPS):
        optimizer.zero_grad()
        loss(model, x[torch.randint(len(x), (BATCH,))]).backward()
        optimizer.step()
    return model.eval()


def main() -> int:
    digits = load("digits")
    x, held_out = digits.train[:].flatten(1), digits.held_out[:].flatten(1)
    found = {}
    for prior in ("N(0, I)", "MixturePrior", "VampPrior"):
        found[prior] = trained(prior, x).log_marginal(held_out, SAMPLES, seed=1).log_prob
    base, wins = found["N(0, I)"], []
    print(f"held-out log p(x), {len(held_out)} digits, nats per digit")
    for prior, log_p in found.items():
        gain = log_p - base
        error = gain.std().item() / math.sqrt(len(gain))
        print(f"{prior:12} {log_p.mean():8.2f}   {gain.mean():+.2f} with standard error {error:.2f} beside N(0, I)")
        wins.append(prior == "N(0, I)" or gain.mean().item() > 3 * error)
    return 0 if all(wins) else 1


if __name__ == "__main__":
    sys.exit(main())
