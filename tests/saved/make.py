"""Makes what is in this folder, and figures.json: figures of each while it was still in memory, and the versions.

    PYTHONPATH=.:tests .venv-integrations/bin/python -m saved.make

after `make test-integrations`. What is there already stays, since a file shows that it can be read only
as long as it is as old as it is: a change of the code makes none of them anew. What a later revision saves for the
first time is an entry more.
"""

import json
import math
import pickle
import platform
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from saved import reading
from saved.reading import MORE, RECORDED, D, Figures, M, fractions, numbers

import fastelbo
from fastelbo.nets import build_model

Write = Callable[[Path], Any]  # writes to a path -> what was written, as reading.SAVED[...].figures takes it

PACKAGES = ("torch", "numpy", "scikit-learn", "lightning", "scvi-tools")


def fit(vae: fastelbo.VAE, x: torch.Tensor, condition: torch.Tensor | None = None, **options: Any) -> fastelbo.VAE:
    optimizer = torch.optim.Adam(vae.parameters(), 0.05)
    for seed in range(20):
        optimizer.zero_grad()
        vae.loss(x, condition=condition, seed=seed, **options).backward()
        optimizer.step()
    return vae


def trained() -> fastelbo.VAE:
    return fit(reading.small_vae(), fractions(20, D), objective="iwae", num_samples=40, keep=8)


def conditional() -> fastelbo.VAE:
    return fit(reading.conditional_vae(), fractions(20, D), reading.labels(20))


def networks() -> list[fastelbo.VAE]:
    """Those with modules of the command's own."""
    made = [build_model((200,), M, 4, "zinb"), build_model((8, 8), M, 4, "gaussian")]
    return [fit(vae, reading.run_data(vae)) for vae in made]


def rows() -> torch.Tensor:
    """[50, D] about a plane."""
    torch.manual_seed(1)
    return torch.randn(50, M) @ torch.randn(M, D) + 0.1 * torch.randn(50, D) + 1


def ppca() -> fastelbo.PPCA:
    return fastelbo.PPCA(M).fit(rows())


def estimator(method: str) -> Any:
    from fastelbo.sklearn import PPCA

    x = rows().double().numpy()
    if method == "em":
        x[::3, 1] = math.nan
    return PPCA(M, method=method, random_state=0).fit(x)


def log_mean_exp() -> fastelbo.LogMeanExp:
    return fastelbo.LogMeanExp().update(9 * fractions(7, 3)).update(-900 * fractions(2, 3))


def meter() -> fastelbo.DiagnosticsMeter:
    posterior = fastelbo.rsample(fractions(5, M), fractions(5, M) - 1, 4, seed=0)
    return fastelbo.DiagnosticsMeter().update(posterior, fractions(4, 5))


def whole(build: Callable[[], Any]) -> Write:
    def write(path: Path) -> Any:
        made = build()
        torch.save(made, path)
        return made

    return write


def state(build: Callable[[], torch.nn.Module]) -> Write:
    def write(path: Path) -> torch.nn.Module:
        made = build()
        torch.save(made.state_dict(), path)
        return made

    return write


def pickled(build: Callable[[], Any]) -> Write:
    def write(path: Path) -> Any:
        made = build()
        path.write_bytes(pickle.dumps(made))
        return made

    return write


def train(out: Path, options: str) -> None:
    reading.command("train", "--out", out, *options.split())
    for picture in out.glob("*.png"):
        picture.unlink()


def run(options: str) -> Write:
    small = f"--hidden 8 --latent-dim {M} --batch-size 512 {options} --epochs"

    def write(out: Path) -> Path:
        train(out, f"{small} {MORE - 1}")
        return out

    write.uninterrupted = f"{small} {MORE}"
    return write


def ppca_run(out: Path) -> Path:
    train(out, "--model ppca --latent-dim 3")
    return out


def lightning(path: Path) -> Figures:
    found = {}
    for name, epochs in (("loaded", MORE - 1), ("resumed", MORE)):
        torch.manual_seed(0)
        module = reading.lightning_module()
        trainer, data = reading.lightning_parts(epochs)
        trainer.fit(module, data)
        if name == "loaded":
            trainer.save_checkpoint(path)
        found[name] = reading.vae_figures(module.model, fractions(20, D))
    return found


def scvi_model(name: str, **options: Any) -> Write:
    def write(folder: Path) -> Any:
        import scvi

        from fastelbo.integrations import scvi as fused

        scvi.settings.seed = 0
        kind, data = getattr(fused, name), reading.cells()
        kind.setup_anndata(data, batch_key="batch")
        model = kind(data, n_hidden=8, n_latent=M, **options)
        model.train(max_epochs=2, accelerator="cpu", enable_progress_bar=False, logger=None)
        model.save(folder)
        return model

    return write


WRITE: dict[str, Write] = {
    "mlp": run("--patience 2"),
    "conv": run("--net conv --likelihood gaussian --objective iwae --samples 3"),
    "nb": run("--data counts --likelihood nb"),
    "zinb": run("--data counts --likelihood zinb --beta-warmup 4"),
    "kept": run("--objective iwae --samples 40 --keep auto"),  # of an earlier version: there is no "auto" any more
    "kept_four": run("--objective iwae --samples 40 --keep 4"),
    "ppca": ppca_run,
    "networks.pt": whole(networks),
    "vae_state.pt": state(trained),
    "vae.pt": whole(trained),
    "conditional_state.pt": state(conditional),
    "ppca_state.pt": state(ppca),
    "ppca.pt": whole(ppca),
    "estimator_eig.pickle": pickled(lambda: estimator("eig")),
    "estimator_em.pickle": pickled(lambda: estimator("em")),
    "log_mean_exp.pickle": pickled(log_mean_exp),
    "diagnostics_meter.pickle": pickled(meter),
    "lightning.ckpt": lightning,
    "scvi": scvi_model("SCVI"),
    "peakvi": scvi_model("PEAKVI"),
}


def main() -> None:
    recorded = json.loads(RECORDED.read_text()) if RECORDED.exists() else {}
    made_with = {"python": platform.python_version(), **{name: version(name) for name in PACKAGES}}
    for name, entry in (reading.SAVED | reading.OF_PACKAGES).items():
        path, write = reading.HERE / name, WRITE[name]
        if path.exists():
            continue
        torch.manual_seed(0)
        torch.set_num_threads(1)
        written = write(path)
        figures = written if isinstance(written, dict) else entry.figures(written)
        if options := getattr(write, "uninterrupted", None):
            with TemporaryDirectory() as folder:
                train(Path(folder) / "run", options)
                figures["resumed"] = reading.last_row(Path(folder) / "run")
        recorded[name] = {"made_with": made_with, "figures": numbers(figures)}
        print(name)
    lines = (f"{json.dumps(name)}: {json.dumps(entry)}" for name, entry in recorded.items())
    RECORDED.write_text("{\n" + ",\n".join(lines) + "\n}\n")


if __name__ == "__main__":
    main()
