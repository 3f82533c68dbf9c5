"""beta-TCVAE (Chen et al. 2018) on pictures of known factors: a disc whose place and size are independent.

The total correlation of q(z) weighs BETA in the loss. Printed are it and the mutual information gap, a mean over
factors: what the best latent tells more of the factor than the second best does, as a part of the factor's entropy.

    python examples/recipes/beta_tc.py
"""

import sys

import torch
from torch import Tensor, nn

import fastelbo

SIDE, GRID, M, WIDTH, STEPS, BATCH, BETA = 16, 16, 6, 256, 2500, 256, 6.0
BINS = 20  # of a latent's mean, in the mutual information with a factor
N = GRID**3


def pictures() -> tuple[Tensor, Tensor]:
    """[N, SIDE^2] in [0, 1], and the three factors [N, 3] of each, from 0 to GRID - 1."""
    factors = torch.cartesian_prod(*[torch.arange(GRID)] * 3)
    at = factors / (GRID - 1)
    axis = (torch.arange(SIDE) + 0.5) / SIDE
    across, down, radius = 0.25 + 0.5 * at[:, 0], 0.25 + 0.5 * at[:, 1], 0.08 + 0.16 * at[:, 2]
    squares = (axis - across[:, None]).square()[:, None] + (axis - down[:, None]).square()[:, :, None]
    return torch.sigmoid(40 * (radius[:, None, None] - squares.sqrt())).flatten(1), factors


def build() -> fastelbo.VAE:
    encoder = nn.Sequential(nn.Linear(SIDE**2, WIDTH), nn.ReLU(), nn.Linear(WIDTH, WIDTH), nn.ReLU())
    decoder = nn.Sequential(nn.Linear(M, WIDTH), nn.ReLU(), nn.Linear(WIDTH, WIDTH), nn.ReLU())
    encoder.append(nn.Linear(WIDTH, 2 * M))
    decoder.append(nn.Linear(WIDTH, SIDE**2))
    return fastelbo.VAE(encoder, decoder)


def loss(model: fastelbo.VAE, x: Tensor, beta: float = BETA) -> Tensor:
    recon, q = model(x)
    terms = fastelbo.total_correlation(q.z, q.mu, q.logvar, N)
    kl = terms.mutual_information + beta * terms.total_correlation + terms.dimension_wise_kl
    return kl - fastelbo.bernoulli_log_prob(recon, x).mean()


def information_gap(mu: Tensor, factors: Tensor) -> float:
    """mu [N, M], cut into BINS of equal numbers of data."""
    bins = mu.argsort(0).argsort(0) * BINS // len(mu)
    gaps = []
    for factor in factors.T:
        information = []
        for latent in bins.T:
            joint = torch.bincount(latent * GRID + factor, minlength=BINS * GRID).view(BINS, GRID) / len(mu)
            product = joint.sum(1, keepdim=True) * joint.sum(0)
            information.append(torch.special.xlogy(joint, joint / product).nansum().item())
        best = sorted(information)
        entropy = torch.special.entr(torch.bincount(factor) / len(mu)).sum().item()
        gaps.append((best[-1] - best[-2]) / entropy)
    return sum(gaps) / len(gaps)


def main() -> int:
    x, factors = pictures()
    found = {}
    for beta in (1.0, BETA):
        torch.manual_seed(0)
        model = build()
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-3, fused=True)
        for _ in range(STEPS):
            optimizer.zero_grad()
            loss(model, x[torch.randint(N, (BATCH,))], beta).backward()
            optimizer.step()
        q = fastelbo.aggregated_posterior(model, x)
        found[beta] = q.terms(seed=1).total_correlation, information_gap(q.mu, factors)
        correlation, gap = found[beta]
        error = f"standard error {correlation.std_error:.3f}"
        print(
            f"beta {beta:g}: total correlation {correlation.value:.3f} nats, {error}; mutual information gap {gap:.2f}"
        )
    return 0 if found[BETA][0].value < found[1.0][0].value and found[BETA][1] > found[1.0][1] else 1


if __name__ == "__main__":
    sys.exit(main())
