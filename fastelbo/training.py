"""Training a small dense VAE: reproducible, resumable, and timed. `fastelbo train` is this module with arguments."""

import csv
import math
import os
import statistics
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from torch import Tensor, nn

from fastelbo import data, likelihoods, reference
from fastelbo.functional import LossParts, Recon, reference_mode, rsample
from fastelbo.vae import OBJECTIVES, VAE, draws, objective_loss

IMPLS = ("fused", "reference")
EVALUATION_BATCH = 500
FIGURES = ("bound", "elbo", "log_likelihood", "kl")  # nats per datum; bound is the objective's own, minus the loss
METRICS = ("epoch", *(f"{split}_{f}" for split in ("train", "held_out") for f in FIGURES), "ms_per_step", "loss_share")

Metrics = dict[str, float]  # one epoch: a row of metrics.csv
Noise = dict[str, Any]  # rsample's seed= or eps=


class Diverged(RuntimeError):
    """The loss is NaN or infinite."""


@dataclass(frozen=True)
class Config:
    """Everything that determines a run, besides the number of threads."""

    data: str = "digits"  # see `fastelbo.data.load`
    objective: str = "elbo"
    num_samples: int = 1  # K
    likelihood: str | None = None  # None: by the data
    latent_dim: int = 8  # M
    hidden: int = 256  # width of the two hidden layers on either side
    epochs: int = 50
    batch_size: int = 64
    lr: float = 2e-3
    seed: int = 0
    impl: str = "fused"

    def __post_init__(self) -> None:
        for name in ("num_samples", "latent_dim", "hidden", "epochs", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1; got {getattr(self, name)}")
        if not 0 < self.lr < math.inf:
            raise ValueError(f"lr must be positive and finite; got {self.lr}")
        for name, valid in (("objective", OBJECTIVES), ("impl", IMPLS)):
            if getattr(self, name) not in valid:
                raise ValueError(f"{name} must be one of {', '.join(valid)}; got {getattr(self, name)!r}")


class LearnedScale(nn.Module):
    """Pairs the decoder's mean with one learned 0-d log variance or log scale (Rybkin et al. 2021, sigma-VAE)."""

    def __init__(self) -> None:
        super().__init__()
        self.log_scale = nn.Parameter(torch.zeros(()))

    def forward(self, mean: Tensor) -> tuple[Tensor, Tensor]:
        return mean, self.log_scale


def build_model(event: tuple[int, ...], latent_dim: int, hidden: int, likelihood: str) -> VAE:
    """A VAE with two hidden layers on either side, for data of any event shape."""
    size = math.prod(event)

    def layers(first: int, last: int) -> list[nn.Module]:
        return [nn.Linear(first, hidden), nn.ReLU(), nn.Linear(hidden, hidden), nn.ReLU(), nn.Linear(hidden, last)]

    encoder = nn.Sequential(nn.Flatten(), *layers(size, 2 * latent_dim))
    decoder = nn.Sequential(*layers(latent_dim, size), nn.Unflatten(1, event))
    if likelihood == "bernoulli_probs":
        decoder.append(nn.Sigmoid())
    elif likelihoods.get(likelihood).has_scale:
        decoder.append(LearnedScale())
    return VAE(encoder, decoder, likelihood, latent_shape=(latent_dim,))


def _totals(parts: LossParts, batch: int) -> Tensor:
    """Sums over the batch of the bound, the ELBO, log p(x | z) and the KL, in float64."""
    fit = parts.log_likelihood.detach().double()
    fit = (fit.mean(0) if fit.dim() == 2 else fit).sum()
    kl = parts.kl.detach().double().sum()
    return torch.stack([-parts.loss.detach().double() * batch, fit - kl, fit, kl])


def _means(split: str, totals: Tensor, count: int) -> Metrics:
    return {f"{split}_{name}": value for name, value in zip(FIGURES, (totals / count).tolist(), strict=True)}


class Trainer:
    """One run: model, optimizer, and the generator that every batch order and every noise comes from.

    Two runs that differ in `impl` alone see the same initial weights, batches and noise. The global generator is left
    as it was. The seed of the noise is drawn for each step; the reference is handed the noise itself, made outside the
    timed part, so that its step times hold what plain PyTorch needs and nothing else.
    """

    def __init__(self, config: Config) -> None:
        self.data = data.load(config.data, config.likelihood)
        self.config = replace(config, likelihood=self.data.likelihood)
        self._draws = draws(config.objective, config.num_samples)
        event = tuple(self.data.train.shape[1:])
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.seed)
            self.model = build_model(event, config.latent_dim, config.hidden, self.data.likelihood)
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=config.lr)
        self.generator = torch.Generator().manual_seed(config.seed)
        self.history: list[Metrics] = []
        self.step_losses: list[float] = []  # of this process; a resumed run starts with none
        self.step_times: list[float] = []  # seconds, likewise

    def _impl(self) -> AbstractContextManager[None]:
        return reference_mode() if self.config.impl == "reference" else nullcontext()

    def _noise(self, x: Tensor, generator: torch.Generator) -> Noise:
        seed = torch.randint(-(2**63), 2**63 - 1, (1,), generator=generator)
        if self.config.impl == "fused":
            return {"seed": seed}
        shape = (*(() if self._draws is None else (self._draws,)), len(x), self.config.latent_dim)
        return {"eps": reference.normal(seed, shape).float()}

    def _loss(self, x: Tensor, noise: Noise) -> LossParts:
        config = self.config
        parts: LossParts = self.model.loss(
            x, objective=config.objective, num_samples=config.num_samples, return_parts=True, **noise
        )
        return parts

    def step(self, x: Tensor) -> LossParts:
        """One step of the optimizer on the batch x [B, *event]."""
        noise = self._noise(x, self.generator)
        with self._impl():
            start = time.perf_counter()
            parts = self._loss(x, noise)
            loss = parts.loss.item()
            if not math.isfinite(loss):
                raise Diverged(f"loss is {loss} in epoch {len(self.history) + 1}: try a smaller lr")
            self.step_losses.append(loss)
            self.optimizer.zero_grad()
            parts.loss.backward()
            self.optimizer.step()
            self.step_times.append(time.perf_counter() - start)
        return parts

    def run_epoch(self) -> Metrics:
        """One pass over the training part, then the held-out part: a row for the history.

        The training figures are means over the epoch, while the parameters move. `loss_share` is the share of a step
        that sampling and loss take, forward and backward.
        """
        from tqdm import tqdm

        self.model.train()
        train = self.data.train
        totals = torch.zeros(4, dtype=torch.float64)
        first_step = len(self.step_times)
        batches = torch.randperm(len(train), generator=self.generator).split(self.config.batch_size)
        label = f"epoch {len(self.history) + 1}"
        for batch in tqdm(batches, label, leave=False, disable=None):  # None: shown on terminals only
            x = train[batch]
            totals += _totals(self.step(x), len(x))
        seconds = statistics.median(self.step_times[first_step:])
        share = self.loss_time(train[: self.config.batch_size]) / seconds
        row = {"epoch": len(self.history) + 1} | _means("train", totals, len(train)) | self.evaluate()
        if not all(map(math.isfinite, row.values())):
            raise Diverged(f"held-out loss is {-row['held_out_bound']} after epoch {row['epoch']}: try a smaller lr")
        self.history.append(row | {"ms_per_step": 1e3 * seconds, "loss_share": share})
        return self.history[-1]

    @torch.no_grad()
    def evaluate(self) -> Metrics:
        """Means over the held-out part, with the same noise at every epoch."""
        self.model.eval()
        generator = torch.Generator().manual_seed(self.config.seed)
        totals = torch.zeros(4, dtype=torch.float64)
        with self._impl():
            for x in self.data.held_out.split(EVALUATION_BATCH):
                totals += _totals(self._loss(x, self._noise(x, generator)), len(x))
        return _means("held_out", totals, len(self.data.held_out))

    def loss_time(self, x: Tensor, repeats: int = 5) -> float:
        """Median seconds of sampling and loss, forward and backward, without encoder and decoder.

        They run on leaves that hold what encoder and decoder give for the batch x [B, *event].
        """
        config, seconds = self.config, []
        noise = self._noise(x, torch.Generator().manual_seed(0))
        with self._impl():
            with torch.no_grad():
                output, posterior = self.model(x, self._draws, **noise)
            mu, logvar = (t.clone().requires_grad_() for t in (posterior.mu, posterior.logvar))
            parts = tuple(t.clone().requires_grad_() for t in (output if isinstance(output, tuple) else (output,)))
            recon: Recon = (parts[0], parts[1]) if len(parts) == 2 else parts[0]
            grad_z = torch.ones_like(posterior.z)
            for _ in range(repeats):
                start = time.perf_counter()
                drawn = rsample(mu, logvar, self._draws, **noise)
                loss = objective_loss(config.objective, recon, x, drawn, likelihood=self.data.likelihood)
                torch.autograd.grad([loss, drawn.z], [mu, logvar, *parts], [None, grad_z])
                seconds.append(time.perf_counter() - start)
        return statistics.median(seconds)

    def save(self, path: Path) -> None:
        """Write a checkpoint, whole or not at all; it loads with torch.load(weights_only=True)."""
        state = {
            "config": asdict(self.config),
            "epoch": len(self.history),
            "history": self.history,
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "generator": self.generator.get_state(),
        }
        partial = path.with_suffix(".partial")
        with partial.open("wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)

    def restore(self, state: dict[str, Any]) -> None:
        """Continue from a checkpoint; ValueError where it was written with another config (epochs may differ)."""
        ours = asdict(self.config)
        differing = [k for k, v in state["config"].items() if k != "epochs" and ours[k] != v]
        if differing:
            changes = ", ".join(f"{k} {state['config'][k]!r} -> {ours[k]!r}" for k in differing)
            raise ValueError(f"a resumed run keeps its options besides epochs; changed: {changes}")
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.generator.set_state(state["generator"])
        self.history = list(state["history"])


def read_checkpoint(out: Path) -> dict[str, Any]:
    """The content of out/checkpoint.pt; FileNotFoundError where there is none, ValueError where it cannot be read."""
    path = out / "checkpoint.pt"
    if not path.exists():
        raise FileNotFoundError(f"nothing to resume: there is no {path}")
    try:
        state = torch.load(path, weights_only=True)
    except (RuntimeError, UnpicklingError, EOFError) as error:
        raise ValueError(f"{path} is damaged, or no checkpoint of fastelbo") from error
    if not isinstance(state, dict) or not {"config", "history", "generator"} <= state.keys():
        raise ValueError(f"{path} is no checkpoint of fastelbo")
    return state


def prepare(config: Config, out: Path, *, resume: bool = False) -> Trainer:
    """A new run, or with `resume` the one of out/checkpoint.pt.

    Raises:
        ValueError, TypeError: data, options or checkpoint that do not fit.
        FileNotFoundError: no such data file, or nothing to resume.
        FileExistsError: `out` holds a run already.
    """
    trainer = Trainer(config)
    if resume:
        trainer.restore(read_checkpoint(out))
    elif (out / "checkpoint.pt").exists():
        raise FileExistsError(f"{out} already holds a run: resume it, or write to another directory")
    return trainer


def fit(trainer: Trainer, out: Path, on_epoch: Callable[[Metrics], object] | None = None) -> None:
    """Run the epochs that are left; after each, append a row to out/metrics.csv and write out/checkpoint.pt.

    A run that was interrupted and resumed ends with the same parameters and figures, bit for bit, as one that was not.

    Raises:
        Diverged: the loss is NaN or infinite; the checkpoint is that of the last good epoch.
    """
    out.mkdir(parents=True, exist_ok=True)
    with (out / "metrics.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, METRICS)
        writer.writeheader()
        writer.writerows(trainer.history)  # the checkpoint decides: a row beyond it belongs to an epoch to be repeated
        while len(trainer.history) < trainer.config.epochs:
            row = trainer.run_epoch()
            writer.writerow(row)
            file.flush()
            trainer.save(out / "checkpoint.pt")
            if on_epoch is not None:
                on_epoch(row)
