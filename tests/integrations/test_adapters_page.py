"""The code of docs/adapters.md and docs/counts.md, with the packages themselves. `make test-integrations` has the
environment for it.
"""

import importlib
import importlib.util
import re
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from pages import ROOT, code_of

NEEDS = {
    "A script in plain PyTorch": (),
    "Pythae": ("pythae",),
    "Pyro": ("pyro",),
    "Lightning": ("lightning",),
    "scvi-tools": ("scvi",),
    "cell2location and CellBender": ("pyro",),
    "diffusers": ("diffusers",),
    "scikit-learn": ("skorch",),
    "PyTorch Geometric": ("torch_geometric",),
    "ONNX": ("onnxscript", "onnxruntime"),
}
_, *PARTS = re.split(r"^## (.+)\n", (ROOT / "docs/adapters.md").read_text(), flags=re.MULTILINE)
SECTIONS = {title: code_of(text) for title, text in zip(PARTS[::2], PARTS[1::2], strict=True)}


def run(title: str) -> dict:
    for package in NEEDS[title]:
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"{package} is not installed: make test-integrations installs it")
    space = {"__name__": "page"}
    for block in SECTIONS[title]:
        exec(block, space)
    return space


def test_every_section_with_code_is_run() -> None:
    assert {title for title, blocks in SECTIONS.items() if blocks} == set(NEEDS)


def test_plain_pytorch() -> None:
    space = run("A script in plain PyTorch")
    torch.testing.assert_close(space["after"], space["before"], rtol=1e-6, atol=0)


def test_pythae() -> None:
    out = run("Pythae")["model"]({"data": torch.rand(4, 1, 28, 28)})
    out.loss.backward()
    assert out.loss.isfinite()


def test_pyro() -> None:
    assert 300 < run("Pyro")["loss"] / 128 < 1000


@pytest.mark.filterwarnings("ignore")  # of lightning: no GPU, few workers
def test_lightning() -> None:
    space = run("Lightning")
    for module in (space["module"], space["Own"]()):
        before = [p.clone() for p in module.parameters()]
        trainer = space["lightning"].Trainer(
            max_epochs=1, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False
        )
        loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(torch.rand(8, 784)), batch_size=4)
        trainer.fit(module, loader)
        assert all(not torch.equal(p, b) for p, b in zip(module.parameters(), before, strict=True))


@contextmanager
def undone(name: str) -> Iterator[None]:
    """What the page applies is undone."""
    module = importlib.import_module(f"fastelbo.integrations.{name}")
    applied = []
    with pytest.MonkeyPatch.context() as patch:
        apply = module.apply
        patch.setattr(module, "apply", lambda: applied.append(apply()) or applied[-1])
        yield
    assert applied
    for one in applied:
        one.undo()


def test_cell2location() -> None:
    pytest.importorskip("pyro", reason="Pyro is not installed: make test-integrations installs it")
    with undone("cell2location"):
        run("cell2location and CellBender")


def test_scvi() -> None:
    pytest.importorskip("scvi", reason="scvi-tools is not installed: make test-integrations installs it")
    with undone("scvi"):
        space = run("scvi-tools")
        (block,) = code_of((ROOT / "docs/counts.md").read_text())
        exec(block)
    assert space["SCVI"]._module_cls.__name__ == "FusedVAE" and space["PEAKVI"]._module_cls.__name__ == "FusedPEAKVAE"


def test_diffusers() -> None:
    if importlib.util.find_spec("diffusers") is not None:
        from diffusers.models.autoencoders import autoencoder_kl, vae
    try:
        space = run("diffusers")
        assert autoencoder_kl.DiagonalGaussianDistribution is space["DiagonalGaussianDistribution"]
    finally:
        if importlib.util.find_spec("diffusers") is not None:
            autoencoder_kl.DiagonalGaussianDistribution = vae.DiagonalGaussianDistribution


def test_skorch() -> None:
    net = run("scikit-learn")["net"]
    losses = net.history[:, "train_loss"]
    assert len(losses) == 2 and losses[1] < losses[0]


def test_torch_geometric() -> None:
    loss = run("PyTorch Geometric")["loss"]
    loss.backward()
    assert loss.isfinite()


@pytest.mark.filterwarnings("ignore")  # of the exporter
def test_onnx(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    space = run("ONNX")
    session = importlib.import_module("onnxruntime").InferenceSession("vae.onnx")
    recon, *posterior = session.run(None, {name: space[name].numpy() for name in ("x", "eps")})
    expected = space["vae"](space["x"], eps=space["eps"])
    torch.testing.assert_close(torch.from_numpy(recon), expected.recon.detach(), rtol=1e-4, atol=1e-5)
    assert len(posterior) == len([t for t in expected.posterior if isinstance(t, torch.Tensor)])
