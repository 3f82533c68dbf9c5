"""The error of approximate inference, on a model in which log p(x) is known exactly: probabilistic PCA.

The error of the ELBO is log p(x) - ELBO = KL(q || posterior). Three experiments:

1. `elbo_loss` trains a linear VAE on data of a known PPCA. At the end its ELBO is the exact maximum of log p(x) (Lucas
   et al. 2019), and its noise and principal subspace are those of the closed form.
2. q is the best diagonal Gaussian, without the posterior's correlations. Its K-sample bounds rise with K to log p(x)
   (Burda et al. 2016, theorem 1).
3. Plain Monte Carlo draws from the prior. The error of its estimate of log p(x) grows with M, and the number of samples
   that it needs grows exponentially with M.

    python examples/inference_gap.py [DIR]        writes the picture to DIR (default: runs/inference_gap)
"""

import math
import sys
from pathlib import Path

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor, nn

import fastelbo
from fastelbo import PPCA, VAE

N, D, M = 1000, 24, 5
STEPS = 10_000
BOUND_SAMPLES = (1, 4, 16, 64, 256, 1024, 4096, 16384)
PRIOR_SAMPLES = (100, 1000, 10_000, 100_000)
PRIOR_DIMENSIONS = (1, 2, 4, 6, 8, 12, 16)


def known_ppca(latent: int, generator: torch.Generator, sigma: float = 0.5) -> PPCA:
    """A PPCA with random loadings, so that the dimensions of its posterior are correlated."""
    model = PPCA(latent, D)
    W = torch.randn(D, latent, generator=generator) * torch.linspace(1.5, 0.5, latent)
    model.load_state_dict({"W": W, "b": torch.zeros(D), "log_sigma2": torch.tensor(2 * math.log(sigma))})
    return model.requires_grad_(False)


class LinearVAE(nn.Module):
    """mu = V (x - c), one log variance per latent dimension; mean W z + b, one log variance of the noise."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Linear(D, M)
        self.logvar = nn.Parameter(torch.zeros(M))
        self.ppca = PPCA(M, D)

    def q(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.encoder(x), self.logvar.expand(len(x), M)

    def loss(self, x: Tensor) -> Tensor:
        mu, logvar = self.q(x)
        mean = self.ppca.inverse_transform(fastelbo.rsample(mu, logvar).z)
        recon = mean, self.ppca.log_sigma2.expand(mean.shape)
        return fastelbo.elbo_loss(recon, x, mu, logvar, likelihood="gaussian")


def train(x: Tensor) -> tuple[LinearVAE, list[tuple[int, float, float]]]:
    """Returns the model, and (step, exact ELBO, exact log p(x)) for every 40th step."""
    model = LinearVAE()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS, eta_min=1e-4)
    history = []
    for step in range(STEPS + 1):
        if step % 40 == 0:
            with torch.no_grad():
                elbo, log_prob = model.ppca.elbo(x, *model.q(x)).mean(), model.ppca.log_prob(x).mean()
            history.append((step, elbo.item(), log_prob.item()))
        optimizer.zero_grad()
        model.loss(x).backward()
        optimizer.step()
        schedule.step()
    return model, history


class Mean(nn.Module):
    """The decoder of a VAE: the mean and the noise of a PPCA."""

    def __init__(self, ppca: PPCA) -> None:
        super().__init__()
        self.ppca = ppca

    def forward(self, z: Tensor) -> tuple[Tensor, Tensor]:
        mean = self.ppca.inverse_transform(z)
        return mean, self.ppca.log_sigma2.expand(mean.shape)


class BestDiagonal(nn.Module):
    """The encoder of a VAE: the diagonal q with the smallest KL(q || posterior).

    Its mean is that of the posterior, its variances are the inverse diagonal of the posterior's precision.
    """

    def __init__(self, ppca: PPCA) -> None:
        super().__init__()
        self.ppca = ppca

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        mean, covariance = self.ppca.posterior(x)
        return mean, -torch.log(torch.linalg.inv(covariance).diagonal()).expand_as(mean)


def as_vae(ppca: PPCA) -> VAE:
    return VAE(BestDiagonal(ppca), Mean(ppca), "gaussian", latent_shape=(ppca.n_components,))


def style(axes: Axes, title: str, xlabel: str, ylabel: str) -> None:
    axes.set_title(title, fontsize=10, loc="left")
    axes.set_xlabel(xlabel, fontsize=9)
    axes.set_ylabel(ylabel, fontsize=9)
    axes.tick_params(labelsize=8)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25, lw=0.6)
    axes.legend(frameon=False, fontsize=8)


def main() -> int:
    out = Path(sys.argv[1] if len(sys.argv) > 1 else "runs/inference_gap")
    out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(0)
    figure = Figure(figsize=(13, 3.6), layout="constrained")
    left, middle, right = figure.subplots(1, 3)

    truth = known_ppca(M, generator)
    x = truth.sample(N, generator=generator)
    best = PPCA(M).fit(x)
    exact = best.score(x)
    model, history = train(x)
    _, elbo, log_prob = history[-1]
    assert best.log_sigma2 is not None and model.ppca.log_sigma2 is not None
    sigmas = [math.exp(0.5 * p.log_sigma2.item()) for p in (model.ppca, best)]
    print(f"1. linear VAE, {N} data, D={D}, M={M}, {STEPS:,} steps; nats per datum")
    print(f"   maximum of log p(x), closed form   {exact:10.4f}")
    print(f"   log p(x) of the trained model      {log_prob:10.4f}")
    print(f"   its ELBO                           {elbo:10.4f}   {exact - elbo:.4f} below the maximum")
    print(f"   its sigma                          {sigmas[0]:10.4f}   closed form {sigmas[1]:.4f}")
    steps, elbos, log_probs = zip(*history, strict=True)
    left.plot(steps, [exact - e for e in elbos], color="C0", lw=1.4, label="maximum - ELBO")
    left.plot(
        steps,
        [e_max - e for e_max, e in zip(log_probs, elbos, strict=True)],
        color="C1",
        lw=1.4,
        label="its gap: log p(x) - ELBO",
    )
    left.set_yscale("log")
    style(left, "Linear VAE: the ELBO reaches the exact maximum", "step", "nats per datum")

    held_out = truth.sample(200, generator=generator)
    exact_held_out = truth.log_prob(held_out).double()
    vae = as_vae(truth)
    mu, logvar = vae.encode(held_out)
    gap = truth.inference_gap(held_out, mu, logvar).mean().item()
    missing = [(exact_held_out - vae.log_marginal(held_out, k, seed=1).log_prob).mean().item() for k in BOUND_SAMPLES]
    print(f"2. the best diagonal q, K-sample bounds; KL(q || posterior) = {gap:.4f}")
    print("   " + "  ".join(f"K={k}: {d:+.4f}" for k, d in zip(BOUND_SAMPLES, missing, strict=True)))
    middle.plot(BOUND_SAMPLES, missing, "o-", ms=4, lw=1.4, label="log p(x) - K-sample bound")
    middle.axhline(gap, color="black", lw=0.8, ls="--", label="KL(q || posterior) = log p(x) - ELBO")
    middle.set_xscale("log")
    middle.set_ylim(bottom=-0.02 * gap)
    style(middle, f"Importance sampling, M={M}: the bounds climb", "samples K", "nats per datum")

    print("3. log p(x) minus its plain Monte Carlo estimate, mean over 100 data")
    print("   M  " + "".join(f"{f'K={k}':>12}" for k in PRIOR_SAMPLES))
    errors: dict[int, list[float]] = {k: [] for k in PRIOR_SAMPLES}
    for latent in PRIOR_DIMENSIONS:
        ppca = known_ppca(latent, generator)
        y = ppca.sample(100, generator=generator)
        exact_y, vae = ppca.log_prob(y).double(), as_vae(ppca)
        for k in PRIOR_SAMPLES:
            found = vae.log_marginal(y, k, proposal="prior", seed=2)
            errors[k].append((exact_y - found.log_prob).mean().item())
        print(f"   {latent:2d} " + "".join(f"{errors[k][-1]:12.3f}" for k in PRIOR_SAMPLES), flush=True)
    for k in PRIOR_SAMPLES:
        right.plot(PRIOR_DIMENSIONS, errors[k], "o-", ms=4, lw=1.4, label=f"K = {k:,}")
    right.set_yscale("symlog", linthresh=0.1)
    right.set_ylim(bottom=-0.05)
    style(right, "Sampling the prior: what it misses", "latent dimensions M", "log p(x) - estimate, nats per datum")

    path = out / "inference_gap.png"
    figure.savefig(path, dpi=110, facecolor="white")
    print(f"picture: {path}")
    return 0 if exact - elbo < 0.01 and missing[-1] < 0.05 * gap else 1


if __name__ == "__main__":
    sys.exit(main())
