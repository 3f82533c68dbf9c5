"""Training a small VAE: reproducible, resumable, and timed. `fastelbo train` is this module with arguments."""

import math
import statistics
import time
from argparse import ArgumentTypeError
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastelbo import likelihoods, reference, reference_mode
from fastelbo._internal import memory
from fastelbo._internal.arguments import count, integer, number, size
from fastelbo._internal.process_groups import Processes
from fastelbo._internal.progress import progress
from fastelbo.commands import data, files, options
from fastelbo.commands.options import option
from fastelbo.data.built_in import BUILT_IN
from fastelbo.losses import LossParts, Recon, join_recon, split_recon
from fastelbo.models.diagnostics import ACTIVE_VARIANCE, DiagnosticsMeter
from fastelbo.models.objective import OBJECTIVES, Objective
from fastelbo.models.pieces import batch_size
from fastelbo.models.scaling import Scaling
from fastelbo.models.vae import VAE
from fastelbo.nets import BUILT, NETS, build_model

FIGURES = ("bound", "elbo", "log_likelihood", "kl")  # nats per datum; bound is the objective's own, minus the loss
COST_METRICS = ("ms_per_step", "loss_share", "kept_share")
METRICS = ("epoch", *(f"{split}_{f}" for split in ("train", "held_out") for f in FIGURES), *COST_METRICS)
LATENT_METRICS = ("active_units", "ess", "samples_99")  # held-out; then KL and variance of mu of every dimension

Metrics = dict[str, float]  # one epoch: a row of metrics.csv


class Diverged(RuntimeError):
    """The loss is NaN or infinite."""


def _keep(text: str) -> int:
    if text == "auto":
        raise ArgumentTypeError('"auto", of earlier versions, is gone: give a number of samples, such as a sixth of K')
    return int(text)


_keep.__name__ = "int"  # as argparse names it in errors
_weight = number(lambda value: 0 <= value < math.inf, "finite and at least 0")
_positive = number(lambda value: 0 < value < math.inf, "positive and finite")
_sources = ", ".join(f"{name} (generated)" if each.generated else name for name, each in BUILT_IN.items())


@dataclass(frozen=True)
class Config:
    """Everything that determines a run, besides the number of threads."""

    data: str = option("digits", f"{_sources}, or an .npy, .npz or .h5ad file of arrays [N, ...]", "DATA")
    test_data: str | None = option(None, "a file of held-out data; by default a tenth of --data", "FILE")
    layer: str | None = option(None, "in place of X of an .h5ad file, or x of an .npz file", "NAME")
    fractions: bool = option(False, "a likelihood of counts takes fractions")
    objective: str = option("elbo", "what is maximized", choices=tuple(OBJECTIVES))
    num_samples: int = option(1, "K, samples per datum", "K", count, flag="--samples")
    beta: float | None = option(None, "elbo: weight of the KL (1); ciwae: weight of the ELBO (0.5)", "BETA", _weight)
    beta_warmup: int = option(0, "epochs in which the KL's weight rises from 0", "N", size)  # Bowman et al. 2016
    free_bits: float = option(0.0, "floor in nats of every latent dimension's KL", "NATS", _weight)
    alpha: float = option(0.0, "of objective vr", "ALPHA", number(math.isfinite, "finite"))
    groups: int = option(1, "of objective miwae: groups of K / N samples", "N", count)
    keep: int | None = option(None, "of the K samples, how many are back-propagated", "N", count, parse=_keep)
    likelihood: str | None = option(None, "p(x | z); by default the data decide", choices=BUILT)
    latent_dim: int = option(8, "M, latent dimensions", "M", count)
    hidden: int = option(256, "width of the hidden layers", "N", count)
    epochs: int = option(50, "passes over the training data", "N", count)
    batch_size: int = option(64, "B, data per step", "B", count)
    lr: float = option(2e-3, "Adam's step size", "LR", _positive)
    lr_schedule: str = option("constant", "of the step size over all epochs", choices=("constant", "cosine"))
    patience: int | None = option(
        None, "stop after N epochs without a better held-out bound; best.pt holds the best epoch", "N", count
    )
    net: str = option("mlp", "dense layers, or convolutions for images", choices=NETS)
    amp: str | None = option(None, "autocast of the training steps", choices=("bf16",))
    device: str = option("auto", "auto is cuda where torch sees a GPU", choices=("auto", "cpu", "cuda"))
    seed: int = option(0, "of weights, batches and noise", "SEED", integer())
    impl: str = option("fused", "the kernels, or plain PyTorch", choices=("fused", "reference"))

    def __post_init__(self) -> None:
        options.check(self)
        if self.beta_warmup and self.objective != "elbo":
            raise ValueError(f"beta_warmup has no effect with objective {self.objective!r}: leave it out")
        if self.keep is not None:
            self.bound.check_keep(self.keep)

    @cached_property
    def bound(self) -> Objective:
        """The objective with its numbers."""
        return Objective(
            self.objective,
            num_samples=self.num_samples,
            beta=self.beta,
            free_bits=self.free_bits,
            alpha=self.alpha,
            groups=self.groups,
        )


def device_of(name: str, processes: int = 1) -> torch.device:
    """The device of a run. ValueError: "cuda" where there is none, or with several processes."""
    if name == "cuda" and not torch.cuda.is_available():
        raise ValueError("device must be 'cpu' or 'auto' here: torch sees no CUDA device")
    if name == "cuda" and processes > 1:
        raise ValueError(f"device must be 'cpu' with several processes; got 'cuda' and {processes}")
    return torch.device("cuda" if name != "cpu" and processes == 1 and torch.cuda.is_available() else "cpu")


def _totals(parts: LossParts) -> Tensor:
    """Sums over the batch of the bound, the ELBO, log p(x | z) and the KL, in float64; the loss is a sum already."""
    log_likelihood = torch.atleast_2d(parts.log_likelihood.detach().double()).mean(0).sum()
    kl = parts.kl.detach().double().sum()
    return torch.stack([-parts.loss.detach().double(), log_likelihood - kl, log_likelihood, kl]).cpu()


def samples_of_weight(log_w: Tensor, share: float) -> Tensor:
    """Of log w [K, B], the fewest samples that have this share of the weight, [B]."""
    weights = torch.softmax(log_w.double(), 0).sort(0, descending=True).values
    return (weights.cumsum(0) < share).sum(0).clamp(max=len(log_w) - 1) + 1


def collapses(rows: Sequence[Metrics], before: Mapping[int, int] | None = None) -> dict[int, int]:
    """Latent dimensions that are collapsed (not active) after the last row -> the first epoch since which they are.

    before: the result for the rows that came before these.
    """
    since = dict(before or {})
    for row in rows:
        variances = {name.removeprefix("mu_variance_"): value for name, value in row.items() if "mu_variance_" in name}
        for dimension, variance in variances.items():
            if variance > ACTIVE_VARIANCE:
                since.pop(int(dimension), None)
            else:
                since.setdefault(int(dimension), int(row["epoch"]))
    return since


def _means(split: str, totals: Tensor, count: int) -> Metrics:
    return {f"{split}_{name}": value for name, value in zip(FIGURES, (totals / count).tolist(), strict=True)}


class _WithoutNetworks(VAE):
    """What a step does besides encoder and decoder: these return, as leaves, what they gave for the batch x before.

    Every sample has the decoder's output for the first datum: so that of kept samples repeats that of all, whichever
    they are. `z` and `leaves` are those of the latest run.
    """

    def __init__(self, model: VAE, x: Tensor) -> None:
        super().__init__(nn.Identity(), nn.Identity(), model.likelihood, latent_shape=model.latent_shape)
        with torch.no_grad():
            self.q = tuple(t.clone().requires_grad_() for t in model.encode(x))
            self.first = split_recon(model.decode(self.q[0][:1]))
        self.outputs: dict[torch.Size, list[Tensor]] = {}  # by the number of samples

    def encode(self, x: Tensor, condition: object = None, *, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return self.q[0], self.q[1]

    def decode(self, z: Tensor, condition: object = None) -> Recon:
        samples = z.shape[:-1]
        if samples not in self.outputs:  # parameters of fewer dimensions are the same for all data
            dim = self.first[0].dim()
            rows = [t.expand(*samples, *t.shape[1:]) if t.dim() == dim else t for t in self.first]
            self.outputs[samples] = [t.clone().requires_grad_() for t in rows]
        self.z, self.leaves = z, [*self.q, *self.outputs[samples]]
        return join_recon(*self.outputs[samples])


class Trainer:
    """One run: model, optimizer, and the generator that every batch order and every noise comes from, on the CPU.

    The data stay there; batches go to the device of the model.

    Two runs that differ in `impl` alone see the same initial weights, batches and noise. The global generator is left
    as it was. The seed of the noise is drawn for each step; the reference is handed the noise itself, made outside the
    timed part, so that its step times hold what plain PyTorch needs and nothing else. With `keep`, both get the
    generator.

    In a process group, every process takes its rows of each batch, with the noise that one process would give them, and
    the gradients are added up: all hold the same parameters, those of one process on whole batches up to rounding.
    """

    def __init__(self, config: Config) -> None:
        self.processes = Processes.world()
        if (several := self.processes.size) > 1 and config.keep is not None:
            raise ValueError(f"keep takes one process: the samples of a batch are chosen together; got {several}")
        self.device = device_of(config.device, several)
        self.data = data.load(
            config.data,
            config.likelihood,
            test_data=config.test_data,
            layer=config.layer,
            fractions=config.fractions,
        )
        self.config = replace(config, likelihood=self.data.likelihood)
        self.objective = config.bound
        event, likelihood = tuple(self.data.train.shape[1:]), self.data.likelihood
        sizes = (event, config.latent_dim, config.hidden, likelihood, config.net)
        named = f"latent_dim={config.latent_dim} and hidden={config.hidden}"
        memory.check_training(lambda: build_model(*sizes), self.device, named)
        scaling = None
        if likelihoods.get(likelihood).domain == "reals":
            scaling = Scaling(*(t.float() for t in self.data.summary.scale()))
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.seed)
            self.model = build_model(*sizes, scaling)
        self.model.to(self.device)
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=config.lr, fused=True)
        self.generator = torch.Generator().manual_seed(config.seed)
        self.history: list[Metrics] = []
        self.step_losses: list[float] = []  # of this process; a resumed run starts with none
        self.step_times: list[float] = []  # seconds, likewise
        self._steps_per_epoch = math.ceil(len(self.data.train) / config.batch_size)

    def _impl(self) -> AbstractContextManager[None]:
        return reference_mode() if self.config.impl == "reference" else nullcontext()

    def noise(self, x: Tensor, generator: torch.Generator, rows: slice = slice(None)) -> dict[str, Any]:
        """Of some rows of the data x, all by default, by a generator on the CPU: an argument of `VAE.parts`."""
        if self.config.keep is not None:  # the choice of samples is drawn on the device, too
            if self.device.type == "cpu":
                return {"generator": generator}
            seed = int(torch.randint(2**63 - 1, (), generator=generator))
            return {"generator": torch.Generator(self.device).manual_seed(seed)}
        key = torch.randint(-(2**63), 2**63 - 1, (1,), generator=generator)
        if self.config.impl == "fused" and self.processes.size == 1:
            return {"seed": key.to(self.device)}
        eps = reference.noise(key, (self.config.num_samples, len(x), self.config.latent_dim))[:, rows]
        return {"eps": (eps[0] if self.objective.draws is None else eps).to(self.device)}

    def _mask(self, x: Tensor) -> Tensor | None:
        """The cells of x that are not missing."""
        return ~x.isnan() if self.data.summary.missing else None

    def _now(self) -> float:
        """Seconds, once the device has done what it was given."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    @property
    def columns(self) -> tuple[str, ...]:
        """The names of a row of the history."""
        latents = range(self.config.latent_dim)
        return (*METRICS, *LATENT_METRICS, *(f"kl_{j}" for j in latents), *(f"mu_variance_{j}" for j in latents))

    def lr(self, step: int) -> float:
        """Adam's step size in a step of the whole run, from 0: "cosine" falls to 0 (Loshchilov & Hutter 2017)."""
        if self.config.lr_schedule == "constant":
            return self.config.lr
        return self.config.lr * 0.5 * (1 + math.cos(math.pi * step / (self.config.epochs * self._steps_per_epoch)))

    def beta(self, step: int) -> float | None:
        """The objective's beta in a step, counted from 0 over the whole run; None if it has none."""
        beta, warmup = self.objective.beta, self.config.beta_warmup * self._steps_per_epoch
        return beta if beta is None or step >= warmup else beta * step / warmup

    @property
    def best(self) -> int:
        """The epoch of the best held-out bound so far; 0 before the first."""
        return max(range(1, len(self.history) + 1), key=lambda n: self.history[n - 1]["held_out_bound"], default=0)

    @property
    def done(self) -> bool:
        """Whether all epochs are done, or `patience` of them were no better than one before."""
        epochs, patience = len(self.history), self.config.patience
        return epochs >= self.config.epochs or (patience is not None and epochs - self.best >= patience)

    def step(self, x: Tensor, beta: float | None = None) -> Tensor:
        """One step of the optimizer on the batch x [B, *event] -> `_totals`; beta: see `VAE.loss`."""
        rank, processes = self.processes.rank, self.processes.size
        rows = slice(len(x) * rank // processes, len(x) * (rank + 1) // processes)
        noise = self.noise(x, self.generator, rows)
        with self._impl():
            start = self._now()
            mine = x[rows].to(self.device)
            self.optimizer.zero_grad()
            with torch.autocast(self.device.type, torch.bfloat16, enabled=self.config.amp == "bf16"):
                options: dict[str, Any] = {"keep": self.config.keep, "beta": beta, "reduction": "sum"}
                parts = self.model.parts(mine, self.objective, mask=self._mask(mine), **options, **noise)
            mean = parts.loss / len(x)
            mean.backward()  # type: ignore[no-untyped-call]
            loss = mean.detach()
            self.processes.sum(loss, *(p.grad for p in self.model.parameters() if p.grad is not None))
            self.step_losses.append(loss.item())
            if not math.isfinite(self.step_losses[-1]):
                epoch = len(self.history) + 1
                raise Diverged(f"loss is {self.step_losses[-1]} in epoch {epoch}: try a smaller lr")
            self.optimizer.step()
            self.step_times.append(self._now() - start)
        totals = _totals(parts)
        self.processes.sum(totals)
        return totals

    def run_epoch(self) -> Metrics:
        """One pass over the training part, then the held-out part: a row for the history.

        The training figures are means over the epoch, while the parameters move. `loss_share` is the time of sampling
        and loss, forward and backward, divided by that of a step.
        """
        self.model.train()
        config, train, epoch = self.config, self.data.train, len(self.history) + 1
        totals, first_step = torch.zeros(4, dtype=torch.float64), len(self.step_times)
        batches = train.batches(config.batch_size, train.order(self.generator))
        start = len(self.history) * len(batches)
        for step, batch in enumerate(progress(batches, f"epoch {epoch}", "step", len(batches)), start):
            for group in self.optimizer.param_groups:
                group["lr"] = self.lr(step)
            totals += self.step(batch, self.beta(step))
        seconds = statistics.median(self.step_times[first_step:])
        loss_share = self.loss_time(train[: config.batch_size]) / seconds
        row = {"epoch": epoch} | _means("train", totals, len(train)) | self.evaluate()
        if not math.isfinite(sum(row.values())):
            raise Diverged(f"held-out loss is {-row['held_out_bound']} after epoch {epoch}: try a smaller lr")
        kept_share = (config.keep or config.num_samples) / config.num_samples
        row |= {"ms_per_step": 1e3 * seconds, "loss_share": loss_share, "kept_share": kept_share}
        self.history.append(row)
        return row

    @torch.no_grad()
    def evaluate(self) -> Metrics:
        """Means over the held-out part, with the same noise at every epoch, and what the latent dimensions hold."""
        self.model.eval()
        generator = torch.Generator().manual_seed(self.config.seed)
        totals, samples_99, meter = torch.zeros(4, dtype=torch.float64), 0.0, DiagnosticsMeter()
        held_out = self.data.held_out
        with self._impl():
            for batch in held_out.batches(batch_size(held_out, self.config.num_samples)):
                x = batch.to(self.device)
                mask = self._mask(x)
                recon, posterior = self.model(x, self.objective.draws, mask=mask, **self.noise(x, generator))
                parts = self.objective.parts(
                    recon, x, posterior, likelihood=self.data.likelihood, mask=mask, reduction="sum"
                )
                totals += _totals(parts)
                log_w = torch.atleast_2d(parts.log_likelihood + posterior.log_ratio)
                meter.update(posterior, log_w)
                samples_99 += samples_of_weight(log_w, 0.99).sum().item() / len(held_out)
        found = meter.result()
        latent = {"active_units": found.active_units.item(), "ess": found.ess.item(), "samples_99": samples_99}
        latent |= {f"kl_{j}": value for j, value in enumerate(found.kl.tolist())}
        latent |= {f"mu_variance_{j}": value for j, value in enumerate(found.mu_variance.tolist())}
        return _means("held_out", totals, len(held_out)) | latent

    def loss_time(self, x: Tensor, repeats: int = 5) -> float:
        """Median seconds of sampling and loss, forward and backward, without encoder and decoder."""
        x, keep, seconds = x.to(self.device), self.config.keep, []
        with self._impl():
            rest = _WithoutNetworks(self.model, x)
            for _ in range(repeats):
                noise = self.noise(x, torch.Generator().manual_seed(0))
                start = self._now()
                loss = rest.loss(x, self.objective, mask=self._mask(x), keep=keep, **noise)
                torch.autograd.grad([loss, rest.z], rest.leaves, [None, torch.ones_like(rest.z)])
                seconds.append(self._now() - start)
        return statistics.median(seconds)

    @cached_property
    def fingerprint(self) -> dict[str, Any]:
        """Of the data: see `fastelbo.commands.data.fingerprint`."""
        return data.fingerprint(self.data)

    def save(self, path: Path) -> None:
        """Write a checkpoint atomically; the history is not part of it."""
        state = {
            "model_kind": "vae",
            "config": asdict(self.config),
            "epoch": len(self.history),
            "data": self.fingerprint | {"beside": data.beside(self.config, path.parent)},
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "generator": self.generator.get_state(),
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
        moved = {"data", "test_data"} if "content" in self.fingerprint else set()  # what they hold is compared below
        before = {"fractions": False} | state["config"]  # an earlier version has none
        differing = [k for k, v in ours.items() if k not in free | moved and before.get(k) != v]
        if differing:
            changes = ", ".join(f"{k} {state['config'].get(k)!r} -> {ours[k]!r}" for k in differing)
            besides = " besides epochs" if "epochs" in free else ""
            raise ValueError(f"a resumed run keeps its options{besides}; changed: {changes}")
        data.check_unchanged(self.data, state["data"])
        if "scaling.scale" not in state["model"]:  # by an earlier version
            self.model.scaling = None
        with files.reading(out / "checkpoint.pt", files.CHECKPOINT):
            self.model.load_state_dict(state["model"])
            self.optimizer.load_state_dict(state["optimizer"])
            self.generator.set_state(state["generator"])
            epoch = int(state["epoch"])
        self.history = files.read_history(out / "metrics.csv", self.columns, epoch)


def model_of(state: dict[str, Any]) -> VAE:
    """The model of a checkpoint. Where the two do not fit, what torch raises: see `fastelbo.commands.files.reading`."""
    config = Config(**state["config"] | {"keep": None})  # in older versions it could be "auto"
    scaled = [state["model"].get(f"scaling.{name}") for name in ("shift", "scale")]
    scaling = None if scaled[0] is None else Scaling(*scaled)
    with torch.device("meta"):  # memory is taken by what is in the checkpoint, not by the sizes that it names
        event, likelihood = tuple(state["data"]["shape"][1:]), str(config.likelihood)
        model = build_model(event, config.latent_dim, config.hidden, likelihood, config.net, scaling)
    model.load_state_dict(state["model"], assign=True)
    return model


def prepare(config: Config, out: Path, *, resume: bool = False) -> Trainer:
    """A new run, or with `resume` the one in the folder `out`.

    Raises:
        ValueError, TypeError: data, options or checkpoint that do not fit.
        FileNotFoundError: no such data file, or nothing to resume.
        FileExistsError: `out` holds a run already.
    """
    if not resume and (out / "checkpoint.pt").exists():
        raise FileExistsError(f"{out} already holds a run: resume it, or write to another directory")
    trainer = Trainer(config)
    if resume:
        trainer.restore(out)
    trainer.processes.gather(None)  # all have read the folder before one writes there
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
    if trainer.processes.rank:  # the first process writes
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
