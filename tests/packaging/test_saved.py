"""What was saved stays readable: tests/saved holds files of earlier revisions, and figures of what they hold."""

import importlib
import pickle
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from saved import make, reading


@pytest.mark.parametrize("name", reading.SAVED)
def test_figures_are_those_of_the_time_of_saving(name: str) -> None:
    reading.check(name)


# Names of classes in files of users, by `torch.save` of a module or by pickle. A class that moves leaves its old name
# behind for one release; then its line goes.
NAMES = [
    "fastelbo.commands.networks.LearnedDispersion",
    "fastelbo.commands.networks.LearnedScale",
    "fastelbo.commands.networks.Log1p",
    "fastelbo.diagnostics.Diagnostics",
    "fastelbo.diagnostics.DiagnosticsMeter",
    "fastelbo.estimators.Estimator",
    "fastelbo.functional.ELBOLoss",
    "fastelbo.functional.IWAELoss",
    "fastelbo.functional.LossParts",
    "fastelbo.functional.Posterior",
    "fastelbo.kept.AutoKeep",
    "fastelbo.kept.Kept",
    "fastelbo.marginal.ImportanceWeights",
    "fastelbo.marginal.LogMeanExp",
    "fastelbo.marginal.MarginalEstimate",
    "fastelbo.ppca.fit.FitReport",
    "fastelbo.ppca.fit.Moments",
    "fastelbo.ppca.model.PPCA",
    "fastelbo.ppca.moments.Moments",
    "fastelbo.ppca.result.FitReport",
    "fastelbo.sklearn.PPCA",
    "fastelbo.vae.VAE",
    "fastelbo.vae.VAEOutput",
    "fastelbo.vae._Pair",
]


@pytest.mark.parametrize("name", NAMES)
def test_old_names_of_classes_can_be_imported(name: str) -> None:
    module, _, kind = name.rpartition(".")
    assert isinstance(getattr(importlib.import_module(module), kind), type)


def named(path: Path) -> set[str]:
    """The names of fastelbo that a file needs, of torch.save or of pickle."""
    found = set()

    class Unpickler(pickle.Unpickler):
        def find_class(self, module: str, name: str) -> object:
            if module.partition(".")[0] == "fastelbo":
                found.add(f"{module}.{name}")
            return super().find_class(module, name)

    if path.suffix == ".pickle":
        with path.open("rb") as file:
            Unpickler(file).load()
    else:
        torch.load(path, weights_only=False, pickle_module=SimpleNamespace(__name__="pickle", Unpickler=Unpickler))
    return found


def test_names_in_the_saved_files_are_among_them() -> None:
    """A state dict, and a checkpoint of the command, need none: torch.load(weights_only=True) reads them."""
    paths = [path for path in reading.HERE.rglob("*") if path.suffix in (".pt", ".ckpt", ".pickle")]
    files = {str(path.relative_to(reading.HERE)): named(path) for path in paths}
    assert set().union(*files.values()) <= set(NAMES)
    plain = {name for name, found in files.items() if not found}
    assert plain == {name for name in files if "/" in name or "state" in name} | {"lightning.ckpt"}
    assert files["vae.pt"] >= {"fastelbo.vae.VAE", "fastelbo.vae._Pair", "fastelbo.kept.AutoKeep"}


def test_every_file_is_read() -> None:
    there = {path.name for path in reading.HERE.iterdir()} - {"make.py", "reading.py", "figures.json", "__pycache__"}
    assert there == make.WRITE.keys() == reading.SAVED.keys() | reading.OF_PACKAGES.keys()
