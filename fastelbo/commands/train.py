"""Training a small VAE: reproducible, resumable, and timed. `fastelbo train` is this module with arguments."""

import csv
import json
import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any, Literal, TypedDict

import torch
import torch.distributed as dist
from torch import Tensor

from fastelbo import reference, reference_mode
from fastelbo._internal.arguments import one_of
from fastelbo._internal.progress import progress
from fastelbo.commands import data, evaluate, files, options
from fastelbo.estimators import Estimator, estimator
from fastelbo.losses import LossParts, Posterior, Recon, join_recon, kept, log_prob, rsample, split_recon
from fastelbo.models.diagnostics import ACTIVE_VARIANCE, DiagnosticsMeter
from fastelbo.models.vae import VAE, VAEOutput, check_objective, draws, objective_loss
from fastelbo.nets import NETS, build_model

IMPLS = ("fused", "reference")
LR_SCHEDULES = ("constant", "cosine")
AMP = ("bf16",)
DEVICES = ("auto", "cpu", "cuda")
FIGURES = ("bound", "elbo", "log_likelihood", "kl")  # nats per datum; bound is the objective's own, minus the loss
COST_METRICS = ("ms_per_step", "loss_share", "kept_share")
METRICS = ("epoch", *(f"{split}_{f}" for split in ("train", "held_out") for f in FIGURES), *COST_METRICS)
LATENT_METRICS = ("active_units", "ess", "samples_99")  # held-out; then KL and variance of mu of every dimension

Metrics = dict[str, float]  # one epoch: a row of metrics.csv


class Noise(TypedDict, total=False):
    """rsample's option: the noise itself, or the seed that it is drawn from."""

    seed: Tensor
    eps: Tensor


class ObjectiveOptions(TypedDict):
    """Of `objective_loss` and `VAE.loss`."""

    beta: float | None
    free_bits: float
    alpha: float
    groups: int


class Diverged(RuntimeError):
    """The loss is NaN or infinite."""


@dataclass(frozen=True)
class Config:
    """Everything that determines a run, besides the number of threads."""

    data: str = "digits"  # see `fastelbo.commands.data.load`
    test_data: str | None = None  # likewise
    objective: str = "elbo"
    num_samples: int = 1  # K
    beta: float | None = None  # see `VAE.loss`
    beta_warmup: int = 0  # epochs in which the KL's weight rises from 0 to beta, step by step (Bowman et al. 2016)
    free_bits: float = 0.0
    alpha: float = 0.0
    groups: int = 1
    keep: int | Literal["auto"] | None = None  # see `VAE.loss`
    likelihood: str | None = None  # None: by the data
    latent_dim: int = 8  # M
    hidden: int = 256  # width of the two hidden layers on either side
    epochs: int = 50
    batch_size: int = 64
    lr: float = 2e-3
    lr_schedule: str = "constant"
    patience: int | None = None  # epochs without a better held-out bound after which to stop
    net: str = "mlp"
    amp: str | None = None  # autocast of the training steps
    device: str = "auto"  # "cuda" where there is one, else "cpu"
    seed: int = 0
    impl: str = "fused"

    def __post_init__(self) -> None:
        options.check(**asdict(self))
        choices = {"impl": IMPLS, "lr_schedule": LR_SCHEDULES, "net": NETS, "amp": AMP, "device": DEVICES}
        for name, names in choices.items():
            if (value := getattr(self, name)) is not None:
                one_of(names)(name, value)
        check_objective(self.objective, beta=self.beta, free_bits=self.free_bits, alpha=self.alpha, groups=self.groups)
        if self.beta_warmup and self.objective != "elbo":
            raise ValueError(f"beta_warmup has no effect with objective {self.objective!r}: leave it out")
        if self.objective != "elbo":
            beta = 0.5 if self.beta is None else self.beta
            estimator(self.objective, self.num_samples, alpha=self.alpha, beta=beta, groups=self.groups)
        if self.keep is not None:
            self.kept_row()
            if self.keep != "auto" and self.keep > self.num_samples:
                raise ValueError(f"keep must be at most num_samples={self.num_samples}; got {self.keep}")

    def kept_row(self) -> Estimator:
        """The row of the objective; a ValueError for one that keeps no samples."""
        beta = 0.5 if self.beta is None else self.beta
        return kept.row_of(self.objective, self.num_samples, alpha=self.alpha, beta=beta, groups=self.groups)


def device_of(name: str, processes: int = 1) -> torch.device:
    """The device of a run. ValueError: "cuda" where there is none, or with several processes."""
    if name == "cuda" and not torch.cuda.is_available():
        raise ValueError("device must be 'cpu' or 'auto' here: torch sees no CUDA device")
    if name == "cuda" and processes > 1:
        raise ValueError(f"device must be 'cpu' with several processes; got 'cuda' and {processes}")
    return torch.device("cuda" if name != "cpu" and processes == 1 and torch.cuda.is_available() else "cpu")


def _totals(parts: LossParts, batch: int) -> Tensor:
    """Sums over the batch of the bound, the ELBO, log p(x | z) and the KL, in float64."""
    fit = parts.log_likelihood.detach().double()
    fit = (fit.mean(0) if fit.dim() == 2 else fit).sum()
    kl = parts.kl.detach().double().sum()
    return torch.stack([-parts.loss.detach().double() * batch, fit - kl, fit, kl]).cpu()


def _log_w(parts: LossParts, posterior: Posterior) -> Tensor:
    """The samples' log weights [K, B]."""
    log_w = parts.log_likelihood + posterior.log_ratio
    return log_w if log_w.dim() == 2 else log_w[None]


def collapses(rows: Sequence[Metrics], before: Mapping[int, int] | None = None) -> dict[int, int]:
    """Latent dimensions that are collapsed (not active) after the last row -> the first epoch since which they are.

    before: the result for the rows that came before these.
    """
    since = dict(before or {})
    for row in rows:
        for name, value in row.items():
            if not name.startswith("mu_variance_"):
                continue
            dimension = int(name.removeprefix("mu_variance_"))
            if value > ACTIVE_VARIANCE:
                since.pop(dimension, None)
            else:
                since.setdefault(dimension, int(row["epoch"]))
    return since


def _means(split: str, totals: Tensor, count: int) -> Metrics:
    return {f"{split}_{name}": value for name, value in zip(FIGURES, (totals / count).tolist(), strict=True)}


class Trainer:
    """One run: model, optimizer, and the generator that every batch order and every noise comes from, on the CPU.

    The data stay there; batches go to the device of the model.

    Two runs that differ in `impl` alone see the same initial weights, batches and noise. The global generator is left
    as it was. The seed of the noise is drawn for each step; the reference is handed the noise itself, made outside the
    timed part, so that its step times hold what plain PyTorch needs and nothing else. With `keep`, both get the seed.

    In a process group, every process takes its rows of each batch, with the noise that one process would give them, and
    the gradients are added up: all hold the same parameters, those of one process on whole batches up to rounding.
    """

    def __init__(self, config: Config) -> None:
        parallel = dist.is_available() and dist.is_initialized()
        self.rank, self.processes = (dist.get_rank(), dist.get_world_size()) if parallel else (0, 1)
        if self.processes > 1 and config.keep is not None:
            raise ValueError(
                f"keep takes one process: the samples of a batch are chosen together; got {self.processes}"
            )
        self.device = device_of(config.device, self.processes)
        self.data = data.load(config.data, config.likelihood, test_data=config.test_data)
        self.config = replace(config, likelihood=self.data.likelihood)
        self._draws = draws(config.objective, config.num_samples)
        self._seeded = config.impl == "fused" or config.keep is not None
        event = tuple(self.data.train.shape[1:])
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.seed)
            self.model = build_model(event, config.latent_dim, config.hidden, self.data.likelihood, config.net)
        self.model.to(self.device)
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=config.lr)
        self.generator = torch.Generator().manual_seed(config.seed)
        self._auto = self.model._auto_keep(config.kept_row(), config.num_samples) if config.keep == "auto" else None
        self.history: list[Metrics] = []
        self.step_losses: list[float] = []  # of this process; a resumed run starts with none
        self.step_times: list[float] = []  # seconds, likewise

    def _impl(self) -> AbstractContextManager[None]:
        return reference_mode() if self.config.impl == "reference" else nullcontext()

    def _noise(self, x: Tensor, generator: torch.Generator, rows: slice | None = None) -> Noise:
        """Of the data x, or of some rows of it."""
        seed = torch.randint(-(2**63), 2**63 - 1, (1,), generator=generator)
        if self._seeded and rows is None:
            return {"seed": seed.to(self.device)}
        eps = reference.noise(seed, (self._draws or 1, len(x), self.config.latent_dim))
        return {"eps": (eps[0] if self._draws is None else eps)[..., rows or slice(None), :].to(self.device)}

    def _device_generator(self) -> torch.Generator:
        """For what draws on the device; on the CPU the run's own."""
        if self.device.type == "cpu":
            return self.generator
        seed = int(torch.randint(2**63 - 1, (), generator=self.generator))
        return torch.Generator(self.device).manual_seed(seed)

    def _now(self) -> float:
        """Seconds, once the device has done what it was given."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    def _rows(self, x: Tensor) -> slice | None:
        """This process's share of a batch; None if it is alone."""
        if self.processes == 1:
            return None
        return slice(len(x) * self.rank // self.processes, len(x) * (self.rank + 1) // self.processes)

    def _add_up(self, *tensors: Tensor) -> None:
        """Replace each by its sum over the processes."""
        if self.processes > 1:
            for t in tensors:
                dist.all_reduce(t)

    @property
    def columns(self) -> tuple[str, ...]:
        """The names of a row of the history."""
        latents = range(self.config.latent_dim)
        return (*METRICS, *LATENT_METRICS, *(f"kl_{j}" for j in latents), *(f"mu_variance_{j}" for j in latents))

    @property
    def _steps_per_epoch(self) -> int:
        return math.ceil(len(self.data.train) / self.config.batch_size)

    def lr(self, step: int) -> float:
        """Adam's step size in a step of the whole run, from 0: "cosine" falls to 0 (Loshchilov & Hutter 2017)."""
        if self.config.lr_schedule == "constant":
            return self.config.lr
        return self.config.lr * 0.5 * (1 + math.cos(math.pi * step / (self.config.epochs * self._steps_per_epoch)))

    @property
    def best(self) -> int:
        """The epoch of the best held-out bound so far; 0 before the first."""
        return max(range(1, len(self.history) + 1), key=lambda n: self.history[n - 1]["held_out_bound"], default=0)

    @property
    def done(self) -> bool:
        """Whether all epochs are done, or `patience` of them were no better than one before."""
        patience = self.config.patience
        return len(self.history) >= self.config.epochs or (
            patience is not None and len(self.history) - self.best >= patience
        )

    def beta(self, step: int) -> float | None:
        """The KL's weight in a step, counted from 0 over the whole run."""
        warmup = self.config.beta_warmup * self._steps_per_epoch
        if step >= warmup:
            return self.config.beta
        return (1.0 if self.config.beta is None else self.config.beta) * step / warmup

    def _options(self, beta: float | None) -> ObjectiveOptions:
        config = self.config
        return {"beta": beta, "free_bits": config.free_bits, "alpha": config.alpha, "groups": config.groups}

    def _objective(self, x: Tensor, output: VAEOutput, beta: float | None) -> LossParts:
        options = self._options(beta)
        return objective_loss(
            self.config.objective, output.recon, x, output.posterior, likelihood=self.data.likelihood, **options
        )

    def _loss(self, x: Tensor, noise: Noise, beta: float | None) -> LossParts:
        config = self.config
        if config.keep is None:
            return self._objective(x, self.model(x, self._draws, **noise), beta)
        return self.model.loss(
            x,
            objective=config.objective,
            num_samples=config.num_samples,
            keep=config.keep,
            return_parts=True,
            generator=self._device_generator(),
            **self._options(beta),
        )

    def _kept_loss(
        self, x: Tensor, mu: Tensor, logvar: Tensor, recon: Recon, kept_recon: Recon, keep: int, seed: Tensor
    ) -> tuple[Tensor, Tensor]:
        """What `VAE.loss` with `keep` computes besides encoder and decoder -> the loss, and z of the kept samples."""
        likelihood, row = self.data.likelihood, self.config.kept_row()
        with torch.no_grad():
            drawn = rsample(mu, logvar, self.config.num_samples, seed=seed)
            weights = kept.weigh(log_prob(recon, x, likelihood=likelihood) + drawn.log_ratio, row)
        chosen = kept.select(weights.a, keep, 0.5)
        posterior = kept.rsample_kept(mu, logvar, chosen, seed=seed)
        log_likelihood = log_prob(kept_recon, x.index_select(0, chosen.datum), likelihood=likelihood)
        return kept.loss_of(log_likelihood, posterior, chosen, weights, row).mean(), posterior.z

    @property
    def kept_share(self) -> float:
        """Of the K samples of the next step, the share that is back-propagated."""
        keep = self._auto.keep if self._auto is not None else self.config.keep
        return keep / self.config.num_samples if isinstance(keep, int) else 1.0

    def step(self, x: Tensor, beta: float | None = None) -> Tensor:
        """One step of the optimizer on the batch x [B, *event] -> `_totals`; beta: see `VAE.loss`."""
        rows = self._rows(x)
        noise: Noise = {} if self.config.keep else self._noise(x, self.generator, rows)
        mine, parts = x if rows is None else x[rows], None
        with self._impl():
            start = self._now()
            mine = mine.to(self.device)
            self.optimizer.zero_grad()
            total = torch.zeros((), device=self.device)
            if len(mine):
                with torch.autocast(self.device.type, torch.bfloat16, enabled=self.config.amp == "bf16"):
                    parts = self._loss(mine, noise, beta)
                share = parts.loss * (len(mine) / len(x))
                share.backward()  # type: ignore[no-untyped-call]
                total = share.detach()
            self._add_up(total, *self._gradients())
            loss = total.item()
            if not math.isfinite(loss):
                raise Diverged(f"loss is {loss} in epoch {len(self.history) + 1}: try a smaller lr")
            self.step_losses.append(loss)
            self.optimizer.step()
            self.step_times.append(self._now() - start)
        totals = torch.zeros(4, dtype=torch.float64) if parts is None else _totals(parts, len(mine))
        self._add_up(totals)
        return totals

    def _gradients(self) -> list[Tensor]:
        """Of all parameters, if there are several processes to add them up."""
        if self.processes == 1:
            return []
        for p in self.model.parameters():
            if p.grad is None:
                p.grad = torch.zeros_like(p)
        return [p.grad for p in self.model.parameters() if p.grad is not None]

    def run_epoch(self) -> Metrics:
        """One pass over the training part, then the held-out part: a row for the history.

        The training figures are means over the epoch, while the parameters move. `loss_share` is the time of sampling
        and loss, forward and backward, divided by that of a step.
        """
        self.model.train()
        train = self.data.train
        totals, kept_shares = torch.zeros(4, dtype=torch.float64), []
        first_step = len(self.step_times)
        batches = torch.randperm(len(train), generator=self.generator).split(self.config.batch_size)
        label = f"epoch {len(self.history) + 1}"
        start = len(self.history) * len(batches)
        for step, batch in enumerate(progress(batches, label, "step", len(batches)), start):
            x = train[batch]
            kept_shares.append(self.kept_share)
            for group in self.optimizer.param_groups:
                group["lr"] = self.lr(step)
            totals += self.step(x, self.beta(step))
        seconds = statistics.median(self.step_times[first_step:])
        loss_share = self.loss_time(train[: self.config.batch_size]) / seconds
        row = {"epoch": len(self.history) + 1} | _means("train", totals, len(train)) | self.evaluate()
        if not math.isfinite(sum(row.values())):
            raise Diverged(f"held-out loss is {-row['held_out_bound']} after epoch {row['epoch']}: try a smaller lr")
        cost = {"ms_per_step": 1e3 * seconds, "loss_share": loss_share, "kept_share": statistics.fmean(kept_shares)}
        self.history.append(row | cost)
        return self.history[-1]

    @torch.no_grad()
    def evaluate(self) -> Metrics:
        """Means over the held-out part, with the same noise at every epoch, and what the latent dimensions hold."""
        self.model.eval()
        generator = torch.Generator().manual_seed(self.config.seed)
        totals, carrying = torch.zeros(4, dtype=torch.float64), 0.0
        meter = DiagnosticsMeter()
        count = len(self.data.held_out)
        with self._impl():
            for rows in self.data.held_out.split(math.ceil(evaluate.BATCH / self.config.num_samples)):
                x = rows.to(self.device)
                output = self.model(x, self._draws, **self._noise(x, generator))
                parts = self._objective(x, output, self.config.beta)
                totals += _totals(parts, len(x))
                log_w = _log_w(parts, output.posterior)
                meter.update(output.posterior, log_w)
                carrying += kept.carrying(log_w, 0.99).sum().item() / count
        found = meter.result()
        latent = {"active_units": found.active_units.item(), "ess": found.ess.item(), "samples_99": carrying}
        latent |= {f"kl_{j}": value for j, value in enumerate(found.kl.tolist())}
        latent |= {f"mu_variance_{j}": value for j, value in enumerate(found.mu_variance.tolist())}
        return _means("held_out", totals, count) | latent

    def loss_time(self, x: Tensor, repeats: int = 5) -> float:
        """Median seconds of sampling and loss, forward and backward, without encoder and decoder.

        They run on leaves that hold what encoder and decoder give for the batch x [B, *event].
        """
        config, seconds, x = self.config, [], x.to(self.device)
        noise = self._noise(x, torch.Generator().manual_seed(0))
        with self._impl():
            with torch.no_grad():
                output, posterior = self.model(x, self._draws, **noise)
            mu, logvar = (t.clone().requires_grad_() for t in (posterior.mu, posterior.logvar))
            keep, full = round(self.kept_share * config.num_samples), split_recon(output)
            some = keep < config.num_samples  # then the decoder returns keep * B rows with a graph
            rows = [t.flatten(0, 1)[: keep * len(x)] if some and t.dim() == full[0].dim() else t for t in full]
            leaves = tuple(t.clone().requires_grad_() for t in rows)
            for _ in range(repeats):
                start = self._now()
                if some:
                    recon, seed = join_recon(*full), noise["seed"]
                    loss, z = self._kept_loss(x, mu, logvar, recon, join_recon(*leaves), keep, seed)
                else:
                    drawn = rsample(mu, logvar, self._draws, **noise)
                    loss, z = self._objective(x, VAEOutput(join_recon(*leaves), drawn), config.beta).loss, drawn.z
                torch.autograd.grad([loss, z], [mu, logvar, *leaves], [None, torch.ones_like(z)])
                seconds.append(self._now() - start)
        return statistics.median(seconds)

    @cached_property
    def fingerprint(self) -> dict[str, Any]:
        """Of the data: see `fastelbo.commands.data.fingerprint`."""
        return data.fingerprint(self.config.test_data or self.config.data, self.data)

    def save(self, path: Path) -> None:
        """Write a checkpoint atomically; the history is not part of it."""
        state = {
            "model_kind": "vae",
            "config": asdict(self.config),
            "epoch": len(self.history),
            "data": self.fingerprint,
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "generator": self.generator.get_state(),
            "auto_keep": None if self._auto is None else self._auto.state_dict(),
        }
        files.save_checkpoint(path, state)

    def restore(self, out: Path) -> None:
        """Continue the run in the folder `out`: its checkpoint, and the rows of metrics.csv up to that.

        Raises:
            OSError: there is none, or the system cannot read it.
            ValueError: a damaged file, another config (epochs may differ), data that changed.
        """
        state, ours = files.read_checkpoint(out), asdict(self.config)
        free = {"device"} if self.config.lr_schedule == "cosine" else {"device", "epochs"}  # the schedule depends on it
        differing = [k for k, v in ours.items() if k not in free and state["config"].get(k) != v]
        if differing:
            changes = ", ".join(f"{k} {state['config'].get(k)!r} -> {ours[k]!r}" for k in differing)
            besides = " besides epochs" if "epochs" in free else ""
            raise ValueError(f"a resumed run keeps its options{besides}; changed: {changes}")
        data.check_unchanged(self.config.test_data or self.config.data, self.data, state["data"])
        with files.reading(out / "checkpoint.pt", files.CHECKPOINT):
            self.model.load_state_dict(state["model"])
            self.optimizer.load_state_dict(state["optimizer"])
            self.generator.set_state(state["generator"])
            if self._auto is not None:
                self._auto.load_state_dict(state["auto_keep"])
            epoch = int(state["epoch"])
        self.history = read_history(out / "metrics.csv", self.columns, epoch)


def read_history(path: Path, columns: Sequence[str], epochs: int) -> list[Metrics]:
    """The first rows of a metrics.csv, one per epoch.

    Raises:
        OSError: the system cannot read it.
        ValueError: a row of them is missing or damaged.
    """
    with path.open(newline="") as file, files.reading(path, f"metrics.csv with the {epochs} epochs of the checkpoint"):
        reader = csv.DictReader(file)
        rows = [{name: json.loads(row[name]) for name in columns} for row in islice(reader, epochs)]
        if [row["epoch"] for row in rows] != list(range(1, epochs + 1)):
            raise ValueError(f"the epochs of its rows are not 1 to {epochs}")
        if not all(math.isfinite(value) for row in rows for value in row.values()):
            raise ValueError("a figure is not finite")
        return rows


def model_of(state: dict[str, Any]) -> VAE:
    """The model of a checkpoint. Where the two do not fit, what torch raises: see `fastelbo.commands.files.reading`."""
    config = Config(**state["config"])
    with torch.device("meta"):  # memory is taken by what is in the checkpoint, not by the sizes that it names
        event, likelihood = tuple(state["data"]["shape"][1:]), str(config.likelihood)
        model = build_model(event, config.latent_dim, config.hidden, likelihood, config.net)
    model.load_state_dict(state["model"], assign=True)
    return model


def prepare(config: Config, out: Path, *, resume: bool = False) -> Trainer:
    """A new run, or with `resume` the one in the folder `out`.

    Raises:
        ValueError, TypeError: data, options or checkpoint that do not fit.
        FileNotFoundError: no such data file, or nothing to resume.
        FileExistsError: `out` holds a run already.
    """
    trainer = Trainer(config)
    if resume:
        trainer.restore(out)
    elif (out / "checkpoint.pt").exists():
        raise FileExistsError(f"{out} already holds a run: resume it, or write to another directory")
    if trainer.processes > 1:
        dist.barrier()  # all have read the folder before one writes there
    return trainer


def fit(trainer: Trainer, out: Path, on_epoch: Callable[[Metrics], object] | None = None) -> None:
    """Write out/config.json and run the epochs that are left; each appends to metrics.csv and writes checkpoint.pt.

    A run that was interrupted and resumed ends with the same parameters and figures, bit for bit, as one that was not.
    Ctrl-C waits until both files are written. The caller locks the folder: `fastelbo.commands.files.locked`.

    Raises:
        Diverged: the loss is NaN or infinite; the checkpoint is that of the last good epoch.
        OSError: a file cannot be written; both are those of the epoch before.
    """
    out.mkdir(parents=True, exist_ok=True)
    if trainer.rank:  # the first process writes
        while not trainer.done:
            trainer.run_epoch()
        return
    files.save_config(out / "config.json", "vae", asdict(trainer.config))
    table = out / "metrics.csv"
    # the checkpoint decides: a row beyond it belongs to an epoch to be repeated
    files.write(table, files.csv_bytes(trainer.columns, trainer.history, header=True))
    while not trainer.done:
        row = trainer.run_epoch()
        line = files.csv_bytes(trainer.columns, [row], header=False)
        with files.uninterrupted(), files.appended(table, line):
            if trainer.config.patience is not None and trainer.best == len(trainer.history):
                trainer.save(out / "best.pt")
            trainer.save(out / "checkpoint.pt")
        if on_epoch is not None:
            on_epoch(row)
