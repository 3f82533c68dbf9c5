"""`fastelbo train --model ppca`: fits for several numbers of components, one of which is kept."""

import math
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from operator import itemgetter
from pathlib import Path
from typing import Any

import torch
from torch import Generator, Tensor

from fastelbo._internal.arguments import count, integer
from fastelbo.commands import data, files, options
from fastelbo.commands.options import option
from fastelbo.ppca import PPCA, RankError
from fastelbo.ppca.model import METHODS

METRICS = ("components", "train_log_prob", "held_out_log_prob", "bic", "sigma", "steps")

Figures = dict[str, float]  # a row of metrics.csv: one number of components; log p(x) in nats per datum


@dataclass(frozen=True)
class PPCAConfig:
    """Everything that determines a run."""

    data: str = option("digits", "see `fastelbo.commands.data.load`; NaN: missing cells", "DATA")
    latent_dim: int | None = option(None, "M; by default that with the lowest BIC of 1, 2, 3, 4, 6, ...", "M", count)
    method: str = option("eig", "of ppca: the closed form, or EM", choices=METHODS)
    seed: int = option(0, "of the start of EM", "SEED", integer())

    def __post_init__(self) -> None:
        options.check(self)


def ladder(limit: int) -> Iterator[int]:
    """1, 2, 3, 4, 6, 8, 12, 16, ... below the limit."""
    for power in range(limit.bit_length() + 1):
        for m in (2**power, 3 * 2 ** (power - 1)) if power else (1,):
            if m < limit:
                yield int(m)


class Run:
    """The fits, and the one that is kept: `model`."""

    def __init__(self, config: PPCAConfig) -> None:
        self.config = config
        self.data = data.load(config.data, "gaussian", missing=True)
        self.train, self.held_out = self.data.train.flatten(1), self.data.held_out.flatten(1)  # [N, D]
        if self.train.shape[1] < 2:
            raise ValueError(f"data must have at least two columns for a PPCA, which needs them; {config.data} has one")
        self.history: list[Figures] = []

    def fit(self, out: Path, report: Callable[[Figures], object]) -> PPCA:
        """All fits -> the one with the lowest BIC; writes metrics.csv, config.json and checkpoint.pt at the end.

        Ctrl-C waits while they are written.

        Raises:
            ValueError: as `PPCA.fit`, for the first fit; beyond the rank of the data it stops.
            OSError: a file cannot be written.
        """
        config = self.config
        best: tuple[float, PPCA] | None = None  # BIC, and the model
        for m in [config.latent_dim] if config.latent_dim else ladder(self.train.shape[1]):
            try:
                model = PPCA(m).fit(self.train, config.method, generator=Generator().manual_seed(config.seed))
            except RankError:
                if best is None:
                    raise
                break
            figures = self._figures(model)
            self.history.append(figures)
            report(figures)
            best = min(best or (math.inf, model), (figures["bic"], model), key=itemgetter(0))
        assert best is not None
        state = {
            "model_kind": "ppca",
            "config": asdict(config),
            "data": data.fingerprint(self.data),
            "model": best[1].state_dict(),
        }
        with files.uninterrupted():
            files.write(out / "metrics.csv", files.csv_bytes(METRICS, self.history, header=True))
            files.save_config(out / "config.json", "ppca", asdict(config))
            files.save_checkpoint(out / "checkpoint.pt", state)
        return best[1]

    def _figures(self, model: PPCA) -> Figures:
        assert model.fit_report is not None and model.log_sigma2 is not None
        return {
            "components": model.n_components,
            "train_log_prob": model.score(self.train),
            "held_out_log_prob": model.score(self.held_out),
            "bic": model.bic(self.train),
            "sigma": math.exp(0.5 * model.log_sigma2.item()),
            "steps": len(model.fit_report.log_likelihood) - 1,
        }


def model_of(state: dict[str, Any]) -> PPCA:
    """The model of a checkpoint. Where the two do not fit, what torch raises: see `fastelbo.commands.files.reading`."""
    model = PPCA(state["model"]["W"].shape[1])
    model.load_state_dict(state["model"])
    return model


@torch.no_grad()
def evaluate(model: PPCA, held_out: Tensor) -> tuple[float, float]:
    """Held-out log p(x), exactly, in nats per datum: mean, and its standard error by the choice of data."""
    found = model.log_prob(held_out.flatten(1)).double()
    return found.mean().item(), found.std().item() / math.sqrt(len(found))
