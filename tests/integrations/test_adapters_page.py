"""The code of docs/adapters.md and docs/counts.md, with the packages themselves. `make test-integrations` has the
environment for it.
"""

import importlib.util
import re

import pytest
import torch
from pages import ROOT, code_of

NEEDS = {
    "A script in plain PyTorch": (),
    "Pythae": ("pythae",),
    "Pyro": ("pyro",),
    "Lightning": ("lightning",),
    "scvi-tools": ("scvi",),
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


def test_scvi() -> None:
    space = run("scvi-tools")
    (line,) = code_of((ROOT / "docs/counts.md").read_text())
    exec(line)
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
    """Against VGAE's own losses, whose 1e-15 is below rounding here."""
    space = run("PyTorch Geometric")
    torch.manual_seed(0)
    edges, other = torch.randint(0, 10, (2, 20)), torch.randint(0, 10, (2, 25))
    mu, logstd = (torch.randn(10, 4, dtype=torch.float64, requires_grad=True) for _ in range(2))
    results = []
    for kind in (space["VGAE"], space["FusedVGAE"]):
        model = kind(torch.nn.Identity())
        model.__mu__, model.__logstd__ = mu, logstd
        loss = model.recon_loss(mu, edges, other) + 0.1 * model.kl_loss() + model.kl_loss(2 * mu, logstd + 9)
        results.append([loss, *torch.autograd.grad(loss, (mu, logstd))])
    torch.testing.assert_close(results[1], results[0], rtol=1e-10, atol=1e-10)


@pytest.mark.filterwarnings("ignore")  # of the exporter
def test_onnx(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    space = run("ONNX")
    session = importlib.import_module("onnxruntime").InferenceSession("vae.onnx")
    recon, *posterior = session.run(None, {name: space[name].numpy() for name in ("x", "eps")})
    expected = space["vae"](space["x"], eps=space["eps"])
    torch.testing.assert_close(torch.from_numpy(recon), expected.recon.detach(), rtol=1e-4, atol=1e-5)
    assert len(posterior) == len([t for t in expected.posterior if isinstance(t, torch.Tensor)])
