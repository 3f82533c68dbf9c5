"""How each file in this folder is read now, and the figures that are then computed from it; figures.json has them as
they were when it was made. By name: a file, or a folder such as that of a run."""

import csv
import io
import json
import math
import pickle
import shutil
from collections.abc import Callable
from contextlib import redirect_stdout
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import fastelbo
from fastelbo.commands import cli

HERE = Path(__file__).parent
RECORDED = HERE / "figures.json"
MORE = 3  # epochs of a resumed run; the saved one has one less
TIMES = ("ms_per_step", "loss_share")
D, M, CLASSES = 6, 2, 3

# Of the largest number of a figure. What differs between processors is the order of sums in float32: they have at most
# n = 400 terms (log p of 200 genes with two parameters each), whose rounding errors add up to n u = 2e-5 of the sum of
# their magnitudes, and that is up to 5 times the figure, where terms cancel. Three steps of Adam move the parameters
# by the same share of lr = 2e-3, which is less. Instruction sets of torch, MKL and fastelbo differed by up to 2e-6.
RTOL = 1e-4

Figures = dict[str, Any]  # tensors, arrays, numbers, or such dicts


class Saved(NamedTuple):
    read: Callable[[Path], Any]
    figures: Callable[[Any], Figures]  # of what was read, or of what was in memory when it was written


def fractions(*shape: int) -> Tensor:
    """Multiples of the golden ratio, modulo 1: numbers that need no generator."""
    steps = torch.arange(math.prod(shape), dtype=torch.float64)
    return (steps * 0.6180339887498949 % 1).float().view(shape)


# ----------------------------------------------------------------------------------------------------------------------
# Modules, as state dicts and as pickles.


def vae_figures(vae: fastelbo.VAE, x: Tensor, condition: Tensor | None = None) -> Figures:
    vae.eval()
    eps = 4 * fractions(len(x), *vae.latent_shape) - 2
    with torch.no_grad():
        parts = vae.parts(x, condition=condition, eps=eps)
        kept = vae.loss(x, objective="iwae", num_samples=40, keep=8, condition=condition, seed=1)
    log_p = vae.log_marginal(x, 20, condition=condition, seed=2).log_prob
    return {**parts._asdict(), "kept": kept, "log_marginal": log_p, "mean": vae.reconstruct(x, condition).detach()[0]}


def small_vae() -> fastelbo.VAE:
    prior = nn.Parameter(torch.zeros(M)), nn.Parameter(torch.zeros(()))
    return fastelbo.VAE(nn.Linear(D, 2 * M), nn.Linear(M, D), prior=prior)


class Conditional(nn.Module):
    """A linear map of the inputs side by side."""

    def __init__(self, features: int, outputs: int) -> None:
        super().__init__()
        self.linear = nn.Linear(features, outputs)

    def forward(self, *inputs: Tensor) -> Tensor:
        return self.linear(torch.cat(inputs, 1))


class Prior(Conditional):
    def forward(self, *inputs: Tensor) -> tuple[Tensor, Tensor]:
        mu, logvar = super().forward(*inputs).chunk(2, 1)
        return mu, logvar


def conditional_vae() -> fastelbo.VAE:
    encoder, decoder = Conditional(D + CLASSES, 2 * M), Conditional(M + CLASSES, D)
    return fastelbo.VAE(encoder, decoder, "gaussian", prior=Prior(CLASSES, 2 * M))


def labels(n: int) -> Tensor:
    return nn.functional.one_hot(torch.arange(n) % CLASSES, CLASSES).float()


def state_of(build: Callable[[], nn.Module]) -> Callable[[Path], nn.Module]:
    def read(path: Path) -> nn.Module:
        module = build()
        module.load_state_dict(torch.load(path, weights_only=True))
        return module

    return read


def whole(path: Path) -> Any:
    return torch.load(path, weights_only=False)


def unpickled(path: Path) -> Any:
    return pickle.loads(path.read_bytes())


def ppca_figures(ppca: fastelbo.PPCA) -> Figures:
    x = fractions(5, D)
    x[0, 1] = math.nan
    mean, covariance = ppca.posterior(x[1:])
    return {"log_prob": ppca.log_prob(x), "mean": mean, "covariance": covariance, "imputed": ppca.impute(x)}


def fitted_ppca_figures(ppca: fastelbo.PPCA) -> Figures:
    report = ppca.fit_report._asdict()
    assert report.pop("solver") is None  # which came later
    return ppca_figures(ppca) | {"report": report}


def estimator_figures(estimator: Any) -> Figures:
    x = fractions(5, D).numpy().astype(np.float64)
    z = estimator.transform(x)
    found = {"z": z, "x": estimator.inverse_transform(z), "log_prob": estimator.score_samples(x)}
    x[0, 1] = math.nan
    found |= {"imputed": estimator.impute(x), "covariance": estimator.get_covariance()}
    if estimator.method == "eig":
        more = fractions(30, D).numpy().astype(np.float64)
        found["more"] = estimator.partial_fit(more).score_samples(more[:5])
    return found


def meter_figures(meter: Any) -> Figures:
    """Also merged with itself: both hold sums."""
    return {"once": meter.result()._asdict(), "twice": meter.merge(meter).result()._asdict()}


def networks_figures(models: list[fastelbo.VAE]) -> Figures:
    return {model.likelihood: vae_figures(model, run_data(model)) for model in models}


# ----------------------------------------------------------------------------------------------------------------------
# Runs of the command.


def command(*arguments: object) -> str:
    said = io.StringIO()
    with redirect_stdout(said):
        assert cli.main([str(argument) for argument in arguments]) == 0
    return said.getvalue()


def last_row(run: Path) -> Figures:
    with (run / "metrics.csv").open(newline="") as file:
        *_, row = csv.DictReader(file)
    return {name: float(value) for name, value in row.items() if name not in TIMES}


def run_data(model: fastelbo.VAE) -> Tensor:
    return (10 * fractions(20, 200)).floor() if model.likelihood in ("nb", "zinb") else fractions(20, 8, 8)


def run_figures(run: Path) -> Figures:
    """By `fastelbo.load`, and by the command: evaluate, sample, and train --resume of a copy."""
    evaluated, new = (
        json.loads(command("evaluate", run, "--samples", 20, "--json")),
        ("held_out", "rows", "bits_per_dim", "mutual_information", "marginal_kl", "total_correlation"),
    )
    found = {"evaluated": {k: v for k, v in evaluated.items() if v is not None and k not in ("data", *new)}}
    model = fastelbo.load(run)
    with TemporaryDirectory() as folder:
        drawn, copy = Path(folder) / "drawn.npy", Path(folder) / "run"
        command("sample", run, "--n", 2, "--out", drawn, *(["--mean"] if isinstance(model, fastelbo.VAE) else []))
        found["sampled"] = np.load(drawn)
        if isinstance(model, fastelbo.PPCA):
            x = fractions(5, 64)
            return found | {"log_prob": model.log_prob(x), "z": model.transform(x)}
        shutil.copytree(run, copy)
        if json.loads((run / "config.json").read_text()).get("keep") == "auto":  # of earlier versions: not continued
            with pytest.raises(SystemExit):
                command("train", "--resume", "--epochs", MORE, "--out", copy)
        else:
            command("train", "--resume", "--epochs", MORE, "--out", copy)
            found["resumed"] = last_row(copy)
    if (run / "best.pt").exists():
        found["best"] = vae_figures(fastelbo.load(run / "best.pt"), run_data(model))
    return found | vae_figures(model, run_data(model))


# ----------------------------------------------------------------------------------------------------------------------
# Files of other packages.


def lightning_parts(epochs: int) -> tuple[Any, Any]:
    """A trainer, and its data."""
    import lightning
    from torch.utils.data import DataLoader

    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    trainer = lightning.Trainer(max_epochs=epochs, accelerator="cpu", enable_checkpointing=False, **quiet)
    return trainer, DataLoader(fractions(20, D), batch_size=8)


def lightning_module() -> Any:
    from fastelbo.integrations.lightning import LightningVAE

    return LightningVAE(small_vae(), lr=0.01, seed=3)


def lightning_figures(path: Path) -> Figures:
    from fastelbo.integrations.lightning import LightningVAE

    model = LightningVAE.load_from_checkpoint(path, model=small_vae(), seed=3).model
    module = lightning_module()
    trainer, data = lightning_parts(MORE)
    trainer.fit(module, data, ckpt_path=path)
    return {"loaded": vae_figures(model, fractions(20, D)), "resumed": vae_figures(module.model, fractions(20, D))}


def cells(count: int = 40, columns: int = 12) -> Any:
    import anndata

    data = anndata.AnnData((fractions(count, columns) * 6).floor().numpy())
    data.obs["batch"] = ["first", "second"] * (count // 2)
    return data


def scvi_model(name: str) -> Callable[[Path], Any]:
    def read(folder: Path) -> Any:
        from fastelbo.integrations import scvi

        return getattr(scvi, name).load(folder, adata=cells(), accelerator="cpu")

    return read


def scvi_figures(model: Any) -> Figures:
    from scvi import settings

    settings.seed = 0
    return {"z": model.get_latent_representation(), "elbo": float(model.get_elbo())}


SAVED = {
    "mlp": Saved(Path, run_figures),
    "conv": Saved(Path, run_figures),
    "nb": Saved(Path, run_figures),
    "zinb": Saved(Path, run_figures),
    "kept": Saved(Path, run_figures),
    "kept_four": Saved(Path, run_figures),
    "ppca": Saved(Path, run_figures),
    "networks.pt": Saved(whole, networks_figures),
    "vae_state.pt": Saved(state_of(small_vae), lambda vae: vae_figures(vae, fractions(20, D))),
    "vae.pt": Saved(whole, lambda vae: vae_figures(vae, fractions(20, D))),
    "conditional_state.pt": Saved(
        state_of(conditional_vae), lambda vae: vae_figures(vae, fractions(20, D), labels(20))
    ),
    "ppca_state.pt": Saved(state_of(lambda: fastelbo.PPCA(M)), ppca_figures),
    "ppca.pt": Saved(whole, fitted_ppca_figures),
    "estimator_eig.pickle": Saved(unpickled, estimator_figures),
    "estimator_em.pickle": Saved(unpickled, estimator_figures),
    "log_mean_exp.pickle": Saved(unpickled, meter_figures),
    "diagnostics_meter.pickle": Saved(unpickled, meter_figures),
}
OF_PACKAGES = {
    "lightning.ckpt": Saved(Path, lightning_figures),
    "scvi": Saved(scvi_model("SCVI"), scvi_figures),
    "peakvi": Saved(scvi_model("PEAKVI"), scvi_figures),
}


def numbers(figures: Any) -> Any:
    """As JSON has them, with nine digits."""
    if isinstance(figures, dict):
        return {name: numbers(value) for name, value in figures.items()}
    if isinstance(figures, Tensor | np.ndarray):
        return numbers(figures.tolist())
    if isinstance(figures, list | tuple):
        return [numbers(value) for value in figures]
    return float(f"{figures:.9g}") if isinstance(figures, float) else figures


def check(name: str) -> None:
    """Read a file, and compare the figures with those of the time when it was made."""
    entry = (SAVED | OF_PACKAGES)[name]
    found = numbers(entry.figures(entry.read(HERE / name)))
    compare(name, found, json.loads(RECORDED.read_text())[name]["figures"])


def compare(name: str, found: Any, recorded: Any) -> None:
    if isinstance(recorded, dict):
        assert found.keys() == recorded.keys(), name
        for key, value in recorded.items():
            compare(f"{name}: {key}", found[key], value)
    elif isinstance(recorded, float | list):
        assert np.shape(found) == np.shape(recorded), name
        scale = np.abs(recorded).max()
        np.testing.assert_allclose(found, recorded, rtol=0, atol=RTOL * scale, err_msg=name)
    else:
        assert found == recorded, name
