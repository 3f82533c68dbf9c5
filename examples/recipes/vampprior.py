"""VampPrior (Tomczak & Welling 2018): the prior is a mixture of posteriors, p(z) = mean_c q(z | u_c), of learned u_c.

`rsample` gives log N(z; 0, I) - log q(z | x), and `bound_loss` is given log p(z) - log N(z; 0, I).

    python examples/recipes/vampprior.py
"""

import math
import sys

import torch
from torch import Tensor, nn

import fastelbo
from fastelbo.commands.data import load

M, COMPONENTS, STEPS, BATCH = 8, 50, 1500, 64


def log_normal(z: Tensor, mu: Tensor, logvar: Tensor) -> Tensor:
    return -0.5 * ((z - mu).square() * torch.exp(-logvar) + logvar + math.log(2 * math.pi)).sum(-1)


class VampVAE(nn.Module):
    def __init__(self, pseudo_inputs: Tensor) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 2 * M))
        self.decoder = nn.Sequential(nn.Linear(M, 64), nn.Tanh(), nn.Linear(64, 64))
        self.pseudo_inputs = nn.Parameter(pseudo_inputs.clone())

    def log_prior(self, z: Tensor) -> Tensor:
        """log p(z) of z [..., M]."""
        mu, logvar = self.encoder(self.pseudo_inputs).chunk(2, -1)
        return torch.logsumexp(log_normal(z.unsqueeze(-2), mu, logvar), -1) - math.log(len(mu))

    def loss(self, x: Tensor, num_samples: int = 1) -> Tensor:
        q = fastelbo.rsample(*self.encoder(x).chunk(2, -1), num_samples)
        zero = torch.zeros(M)
        log_ratio = self.log_prior(q.z) - log_normal(q.z, zero, zero)
        return fastelbo.bound_loss(fastelbo.log_prob(self.decoder(q.z), x), q, log_ratio=log_ratio)


def build() -> VampVAE:
    return VampVAE(torch.rand(COMPONENTS, 64))


def loss(model: VampVAE, x: Tensor) -> Tensor:
    return model.loss(x)


def main() -> int:
    torch.manual_seed(0)
    digits = load("digits")
    x, held_out = digits.train[:].flatten(1), digits.held_out[:].flatten(1)
    model = VampVAE(x[:COMPONENTS])
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    with torch.no_grad():
        start = -model.loss(held_out, 500).item()
    for _ in range(STEPS):
        optimizer.zero_grad()
        loss(model, x[torch.randint(len(x), (BATCH,))]).backward()
        optimizer.step()
    with torch.no_grad():
        end = -model.loss(held_out, 500).item()
        z = fastelbo.rsample(*model.encoder(held_out).chunk(2, -1), 100).z
        fits = (model.log_prior(z) - log_normal(z, torch.zeros(M), torch.zeros(M))).mean().item()
    print(f"held-out log p(x) {end:.2f} nats; before training {start:.2f}")
    print(f"log p(z) of what held-out digits are encoded as: {fits:.2f} nats more than under N(0, I)")
    return 0 if end > start + 10 and fits > 0 else 1


if __name__ == "__main__":
    sys.exit(main())
