"""`fastelbo train --model ppca`: fits for several numbers of components, one of which is kept."""

import math
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from operator import itemgetter
from pathlib import Path
from typing import Any

from torch import Generator

from fastelbo._internal import memory
from fastelbo._internal.arguments import count, integer
from fastelbo.commands import data, files, options
from fastelbo.commands.options import option
from fastelbo.ppca import PPCA, RankError
from fastelbo.ppca.closed_form import automatic
from fastelbo.ppca.model import METHODS

METRICS = ("components", "train_log_prob", "held_out_log_prob", "bic", "sigma", "steps")

Figures = dict[str, float]  # a row of metrics.csv: one number of components; log p(x) in nats per datum


@dataclass(frozen=True)
class PPCAConfig:
    """Everything that determines a run."""

    data: str = option("digits", "see `fastelbo.commands.data.load`; NaN: missing cells", "DATA")
    layer: str | None = option(None, "see `fastelbo.data.open_dataset`", "NAME")
    latent_dim: int | None = option(None, "M; by default that with the lowest BIC of 1, 2, 3, 4, 6, ...", "M", count)
    method: str | None = option(
        None, "of ppca: the closed form, or EM; by default EM for missing cells", choices=METHODS
    )
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
        self.data = data.load(config.data, "gaussian", layer=config.layer)
        self.config = replace(config, method=config.method or ("em" if self.data.summary.missing else "eig"))
        N, *event = self.data.train.shape
        if (D := math.prod(event)) < 2:
            raise ValueError(f"data must have at least two columns for a PPCA, which needs them; {config.data} has one")
        krylov = config.latent_dim is not None and automatic(N, D, config.latent_dim) == "krylov"
        if self.config.method == "eig" and not krylov:  # a covariance, its eigenvectors, and what they are computed in
            needed = f"method 'eig' of {D} columns must fit in memory; with a small latent_dim it takes less. It takes"
            memory.check(6 * 8 * D * min(D, N), needed)
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
        train, method = self.data.train, str(config.method)
        for m in [config.latent_dim] if config.latent_dim else ladder(math.prod(train.shape[1:])):
            try:
                model = PPCA(m).fit(train, method, generator=Generator().manual_seed(config.seed))
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
            "data": data.fingerprint(self.data) | {"beside": data.beside(config, out)},
            "model": best[1].state_dict(),
        }
        with files.uninterrupted():
            files.write(out / "metrics.csv", files.csv_bytes(METRICS, self.history, header=True))
            files.save_config(out / "config.json", "ppca", asdict(config))
            files.save_checkpoint(out / "checkpoint.pt", state)
        return best[1]

    def _figures(self, model: PPCA) -> Figures:
        assert model.fit_report is not None and model.log_sigma2 is not None
        train, held_out = self.data.train, self.data.held_out
        score = model.score(train)
        return {
            "components": model.n_components,
            "train_log_prob": score,
            "held_out_log_prob": model.score(held_out),
            "bic": model.bic(train, score=score),
            "sigma": math.exp(0.5 * model.log_sigma2.item()),
            "steps": len(model.fit_report.log_likelihood) - 1,
        }


def model_of(state: dict[str, Any]) -> PPCA:
    """The model of a checkpoint. Where the two do not fit, what torch raises: see `fastelbo.commands.files.reading`."""
    model = PPCA(state["model"]["W"].shape[1])
    model.load_state_dict(state["model"])
    return model
