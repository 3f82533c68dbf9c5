"""`fastelbo train --model ppca`: fits for several numbers of components, one of which is kept."""

import csv
import math
import os
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Generator, Tensor

from fastelbo import data
from fastelbo.ppca import METHODS, PPCA
from fastelbo.ppca_fit import RankError

METRICS = ("components", "train_log_prob", "held_out_log_prob", "bic", "sigma", "steps")

Row = dict[str, float]  # of metrics.csv: one number of components; log p(x) in nats per datum


@dataclass(frozen=True)
class PPCAConfig:
    """Everything that determines a run."""

    data: str = "digits"  # see `fastelbo.data.load`; NaN: missing cells
    latent_dim: int | None = None  # M; None: the one with the lowest BIC of 1, 2, 3, 4, 6, 8, 12, ...
    method: str = "eig"  # see `PPCA.fit`
    seed: int = 0  # of the start of "em"

    def __post_init__(self) -> None:
        if self.latent_dim is not None and self.latent_dim < 1:
            raise ValueError(f"latent_dim must be at least 1; got {self.latent_dim}")
        if self.method not in METHODS:
            raise ValueError(f"method must be one of {', '.join(METHODS)}; got {self.method!r}")


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
        """All fits; writes out/metrics.csv and out/checkpoint.pt.

        Raises:
            ValueError: as `PPCA.fit`, for the first fit; beyond the rank of the data it stops.
        """
        config = self.config
        lowest = math.inf
        tried = [config.latent_dim] if config.latent_dim else ladder(self.train.shape[1])
        with (out / "metrics.csv").open("w", newline="") as file:
            writer = csv.DictWriter(file, METRICS)
            writer.writeheader()
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
                writer.writerow(row)
                report(row)
                if row["bic"] < lowest:
                    lowest, self.model = row["bic"], model
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
        """Write a checkpoint, whole or not at all; it loads with torch.load(weights_only=True)."""
        assert self.model is not None
        event = tuple(self.data.train.shape[1:])
        state = {"ppca": asdict(self.config), "event": event, "model": self.model.state_dict(), "rows": self.rows}
        partial = path.with_suffix(".partial")
        with partial.open("wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)


def evaluate(state: dict[str, Any], name: str | None) -> tuple[PPCA, int, float, float]:
    """Held-out log p(x) of a checkpoint, exactly: model, number of data, mean, its standard error by their choice."""
    held_out = data.load(state["ppca"]["data"] if name is None else name, "gaussian", missing=True).held_out
    if tuple(held_out.shape[1:]) != tuple(state["event"]):
        raise ValueError(f"data must be of shape {tuple(state['event'])} as in training; got {held_out.shape[1:]}")
    model = PPCA(state["model"]["W"].shape[1])
    model.load_state_dict(state["model"])
    with torch.no_grad():
        found = model.log_prob(flat(held_out)).double()
    return model, len(found), found.mean().item(), found.std().item() / math.sqrt(len(found))
