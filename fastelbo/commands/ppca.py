"""`fastelbo train --model ppca`: fits for several numbers of components, one of which is kept."""

import math
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Generator, Tensor

from fastelbo._internal.arguments import one_of
from fastelbo.commands import data, files, options
from fastelbo.ppca import PPCA, RankError
from fastelbo.ppca.model import METHODS

METRICS = ("components", "train_log_prob", "held_out_log_prob", "bic", "sigma", "steps")

Row = dict[str, float]  # of metrics.csv: one number of components; log p(x) in nats per datum


@dataclass(frozen=True)
class PPCAConfig:
    """Everything that determines a run."""

    data: str = "digits"  # see `fastelbo.commands.data.load`; NaN: missing cells
    latent_dim: int | None = None  # M; None: the one with the lowest BIC of 1, 2, 3, 4, 6, 8, 12, ...
    method: str = "eig"  # see `PPCA.fit`
    seed: int = 0  # of the start of "em"

    def __post_init__(self) -> None:
        options.check(**asdict(self))
        one_of(METHODS)("method", self.method)


def ladder(limit: int) -> Iterator[int]:
    """1, 2, 3, 4, 6, 8, 12, 16, ... below the limit."""
    for power in range(limit.bit_length() + 1):
        for m in (2**power, 3 * 2 ** (power - 1)) if power else (1,):
            if m < limit:
                yield int(m)


def flat(x: Tensor) -> Tensor:
    """[N, *event] -> [N, D]"""
    return x.flatten(1)


class Run:
    """The fits, and the one that is kept: `model`."""

    def __init__(self, config: PPCAConfig) -> None:
        self.config = config
        self.data = data.load(config.data, "gaussian", missing=True)
        self.train, self.held_out = flat(self.data.train), flat(self.data.held_out)
        self.rows: list[Row] = []
        self.model: PPCA | None = None

    def fit(self, out: Path, report: Callable[[Row], object]) -> None:
        """All fits; writes metrics.csv, config.json and checkpoint.pt at the end, in which Ctrl-C waits.

        Raises:
            ValueError: as `PPCA.fit`, for the first fit; beyond the rank of the data it stops.
            OSError: a file cannot be written.
        """
        config = self.config
        lowest = math.inf
        tried = [config.latent_dim] if config.latent_dim else ladder(self.train.shape[1])
        for m in tried:
            generator = Generator().manual_seed(config.seed)
            try:
                model = PPCA(m).fit(self.train, config.method, generator=generator)
            except RankError:
                if not self.rows:
                    raise
                break
            row = self._measure(model)
            self.rows.append(row)
            report(row)
            if row["bic"] < lowest:
                lowest, self.model = row["bic"], model
        with files.uninterrupted():
            files.write(out / "metrics.csv", files.csv_bytes(METRICS, self.rows, header=True))
            files.save_config(out / "config.json", "ppca", asdict(config))
            self.save(out / "checkpoint.pt")

    def _measure(self, model: PPCA) -> Row:
        assert model.fit_report is not None and model.log_sigma2 is not None
        return {
            "components": model.n_components,
            "train_log_prob": model.score(self.train),
            "held_out_log_prob": model.score(self.held_out),
            "bic": model.bic(self.train),
            "sigma": math.exp(0.5 * model.log_sigma2.item()),
            "steps": len(model.fit_report.log_likelihood) - 1,
        }

    def save(self, path: Path) -> None:
        """Write a checkpoint atomically."""
        assert self.model is not None
        state = {
            "model_kind": "ppca",
            "config": asdict(self.config),
            "data": data.fingerprint(self.config.data, self.data),
            "model": self.model.state_dict(),
        }
        files.save_checkpoint(path, state)


def model_of(state: dict[str, Any]) -> PPCA:
    """The model of a checkpoint. Where the two do not fit, what torch raises: see `fastelbo.commands.files.reading`."""
    model = PPCA(state["model"]["W"].shape[1])
    model.load_state_dict(state["model"])
    return model


@torch.no_grad()
def evaluate(model: PPCA, held_out: Tensor) -> tuple[float, float]:
    """Held-out log p(x), exactly, in nats per datum: mean, and its standard error by the choice of data."""
    found = model.log_prob(flat(held_out)).double()
    return found.mean().item(), found.std().item() / math.sqrt(len(found))
