"""SCVI of scvi-tools with and without fastelbo, on counts from a known model.

1. Both are trained from the same seed: the ELBO of every epoch, the time per epoch, and how well the expression that
   each finds agrees with the known one.
2. The error of log p(x), and of its gradient with respect to log theta, of each library's float32 negative binomial.
   The truth is mpmath's, at the same float32 log mean and log theta.

    PYTHONPATH=. .venv-integrations/bin/python examples/scvi_counts.py [DIR]

The environment is that of `make test-integrations`. The picture is written to DIR (default: runs/scvi_counts).
"""

import logging
import statistics
import sys
import time
import warnings
from itertools import product
from pathlib import Path

import anndata
import mpmath
import numpy as np
import scvi
import torch
from lightning.pytorch.callbacks import Callback
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from scvi.distributions import NegativeBinomial
from torch import Tensor

import fastelbo
from fastelbo import likelihoods
from fastelbo.integrations.scvi import SCVI

CELLS, GENES, LATENT = 2560, 4000, 5
EPOCHS = 12
LOG10_THETA = range(-4, 10)
COUNTS, MEANS = (0, 1, 2, 7, 40, 300), (0.05, 1.0, 20.0)


def known_counts() -> tuple[anndata.AnnData, np.ndarray]:
    """Counts of a negative binomial whose log mean is linear in z ~ N(0, I), and their expected shares of a cell."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    share = torch.softmax(normal(CELLS, LATENT) @ normal(LATENT, GENES) * 0.5 + 1.5 * normal(GENES), dim=-1)
    mean = torch.exp(8 + 0.3 * normal(CELLS, 1)) * share
    log_theta = normal(GENES).expand(CELLS, GENES)
    x = likelihoods.get("nb").draw(generator, torch.log(mean), log_theta)
    return anndata.AnnData(x.numpy()), share.numpy()


class EpochTimes(Callback):  # type: ignore[misc]
    def __init__(self) -> None:
        self.seconds: list[float] = []

    def on_train_epoch_start(self, *_: object) -> None:
        self.start = time.perf_counter()

    def on_train_epoch_end(self, *_: object) -> None:
        self.seconds.append(time.perf_counter() - self.start)


def train(cls: type[scvi.model.SCVI], data: anndata.AnnData) -> tuple[scvi.model.SCVI, list[float]]:
    """The trained model and the seconds of every epoch."""
    adata = data.copy()
    cls.setup_anndata(adata)
    scvi.settings.seed = 0
    model, times = cls(adata, gene_likelihood="nb"), EpochTimes()
    options = {"accelerator": "cpu", "enable_progress_bar": False, "check_val_every_n_epoch": 1, "callbacks": [times]}
    model.train(EPOCHS, **options)
    return model, times.seconds


def exact(x: float, log_mean: float, log_theta: float) -> tuple[float, float]:
    """log p(x) and its derivative with respect to log theta, in 60 digits."""
    with mpmath.workdps(60):
        m, t = mpmath.exp(mpmath.mpf(log_mean)), mpmath.exp(mpmath.mpf(log_theta))
        value = mpmath.loggamma(x + t) - mpmath.loggamma(t) - mpmath.loggamma(x + 1)
        value += t * mpmath.log(t / (t + m)) + x * mpmath.log(m / (t + m))
        slope = mpmath.digamma(x + t) - mpmath.digamma(t) + mpmath.log(t / (t + m)) + (m - x) / (t + m)
        return float(value), float(t * slope)


def by_fastelbo(x: Tensor, log_mean: Tensor, log_theta: Tensor) -> Tensor:
    return fastelbo.log_prob((log_mean[:, None], log_theta[:, None]), x[:, None], likelihood="nb")


def by_scvi(x: Tensor, log_mean: Tensor, log_theta: Tensor) -> Tensor:
    return NegativeBinomial(mu=torch.exp(log_mean), theta=torch.exp(log_theta)).log_prob(x)  # type: ignore[no-any-return]


def errors(log10_theta: int) -> dict[str, tuple[float, float]]:
    """Of each library: the largest error of log p and of its gradient, over COUNTS and MEANS."""
    x, mean = torch.tensor(list(product(COUNTS, MEANS))).T
    log_mean = torch.log(mean)
    log_theta = torch.full_like(x, log10_theta * float(np.log(10)))
    parameters = zip(x.tolist(), log_mean.tolist(), log_theta.tolist(), strict=True)
    values, slopes = torch.tensor([exact(*of_one) for of_one in parameters], dtype=torch.float64).T
    found = {}
    for name, log_prob in (("scvi", by_scvi), ("fastelbo", by_fastelbo)):
        leaf = log_theta.clone().requires_grad_()
        value = log_prob(x, log_mean, leaf)
        (slope,) = torch.autograd.grad(value.sum(), leaf)
        found[name] = (value - values).abs().max().item(), (slope - slopes).abs().max().item()
    return found


def style(ax: Axes, title: str, x: str, y: str) -> None:
    ax.set_title(title, fontsize=10)
    ax.set_xlabel(x)
    ax.set_ylabel(y)
    ax.grid(alpha=0.3)
    ax.legend(fontsize=8)


def main() -> int:
    out = Path(sys.argv[1] if len(sys.argv) > 1 else "runs/scvi_counts")
    out.mkdir(parents=True, exist_ok=True)
    warnings.filterwarnings("ignore")  # of lightning: no GPU, few workers
    for name in ("lightning.pytorch", "lightning.fabric", "scvi"):
        logging.getLogger(name).setLevel(logging.ERROR)
    figure = Figure(figsize=(12, 8), layout="constrained")
    (curves, bars), (values, slopes) = figure.subplots(2, 2)
    colors = {"scvi": "tab:orange", "fastelbo": "tab:blue"}

    data, share = known_counts()
    print(f"1. {CELLS} cells, {GENES} genes, {np.mean(data.X == 0):.0%} zeros; {torch.get_num_threads()} threads")
    epochs = np.arange(1, EPOCHS + 1)
    elbos, medians = {}, {}
    for name, cls in (("scvi", scvi.model.SCVI), ("fastelbo", SCVI)):
        model, seconds = train(cls, data)
        medians[name] = statistics.median(seconds)
        elbos[name] = {part: model.history[f"elbo_{part}"].to_numpy(float).ravel() for part in ("train", "validation")}
        found = np.log(model.get_normalized_expression(return_numpy=True))
        agreement = np.corrcoef(found.ravel(), np.log(share).ravel())[0, 1]
        print(
            f"   {name:8}  {medians[name]:.3f} s per epoch, held-out -ELBO {elbos[name]['validation'][-1]:.2f}, "
            f"correlation with the known log expression {agreement:.4f}",
            flush=True,
        )
        wide = name == "scvi"
        for part, line in (("train", "-"), ("validation", "--")):
            curves.plot(
                epochs,
                elbos[name][part],
                line,
                color=colors[name],
                lw=5 if wide else 1.4,
                alpha=0.45 if wide else 1,
                label=f"{name}, {part}",
            )
        bars.bar(name, medians[name], color=colors[name], width=0.5, label=f"{medians[name]:.2f} s")
    apart = max(
        np.abs(elbos["fastelbo"][part] / elbos["scvi"][part] - 1).max().item() for part in ("train", "validation")
    )
    ratio = medians["scvi"] / medians["fastelbo"]
    print(f"   fastelbo is {ratio:.2f} times as fast; the curves differ by at most {apart:.1e} of the ELBO")
    style(curves, "The same ELBO, epoch by epoch", "epoch", "-ELBO, nats per cell")
    style(bars, f"{GENES} genes: an epoch is {ratio:.1f} times as fast", "", "seconds per epoch (median)")

    print("2. largest error of the negative binomial in float32, over x up to 300 and means up to 20")
    print("      theta     log p: scvi    fastelbo    gradient: scvi    fastelbo")
    rows = [errors(power) for power in LOG10_THETA]
    for power, row in zip(LOG10_THETA, rows, strict=True):
        (v, s), (w, t) = row["scvi"], row["fastelbo"]
        print(f"      1e{power:+03d}  {v:13.1e} {w:11.1e} {s:17.1e} {t:11.1e}")
    theta = [10.0**power for power in LOG10_THETA]
    for ax, part, what in ((values, 0, "log p(x)"), (slopes, 1, "d log p(x) / d log theta")):
        for name, color in colors.items():
            ax.plot(theta, [row[name][part] for row in rows], "o-", ms=4, lw=1.4, color=color, label=name)
        ax.set_xscale("log")
        ax.set_yscale("log")
        style(ax, f"Error of {what}, float32", "theta", "largest error, nats per entry")

    path = out / "scvi_counts.png"
    figure.savefig(path, dpi=110, facecolor="white")
    print(f"picture: {path}")
    return 0 if apart < 1e-3 and all(row["fastelbo"][0] < 1e-3 for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
