"""torch.onnx.export of a VAE, against onnxruntime. `make test-integrations` has the environment for it."""

from pathlib import Path

import pytest
import torch

pytest.importorskip("onnxruntime", reason="onnxruntime is not installed: make test-integrations installs it")

import onnxruntime
from torch import Tensor, nn

import fastelbo

B, D, M, K = 5, 6, 2, 3

pytestmark = pytest.mark.filterwarnings("ignore")  # of the exporters


class Outputs(nn.Module):
    """The tensors that a user reads."""

    def __init__(self, num_samples: int | None = None) -> None:
        super().__init__()
        self.num_samples = num_samples
        torch.manual_seed(0)
        encoder, decoder = nn.Sequential(nn.Linear(D, 8), nn.ReLU(), nn.Linear(8, 2 * M)), nn.Linear(M, D)
        prior = nn.Parameter(torch.randn(M)), nn.Parameter(torch.tensor(0.3))
        self.vae = fastelbo.VAE(encoder, decoder, prior=prior, latent_shape=(M,))

    def forward(self, x: Tensor, eps: Tensor | None = None) -> tuple[Tensor, ...]:
        recon, q = self.vae(x, self.num_samples, eps=eps)
        return recon, q.z, q.kl, q.log_ratio, self.vae.reconstruct(x)


@pytest.mark.parametrize("dynamo", [True, False])
@pytest.mark.parametrize("num_samples", [None, K])
def test_forward_with_its_noise(num_samples: int | None, dynamo: bool, tmp_path: Path) -> None:
    model, path = Outputs(num_samples).eval(), tmp_path / "vae.onnx"
    inputs = torch.rand(B, D), torch.randn(*([] if num_samples is None else [K]), B, M)
    torch.onnx.export(model, inputs, path, input_names=["x", "eps"], dynamo=dynamo)
    found = onnxruntime.InferenceSession(path).run(None, {"x": inputs[0].numpy(), "eps": inputs[1].numpy()})
    with torch.no_grad():
        expected = model(*inputs)
    torch.testing.assert_close([torch.from_numpy(a) for a in found], list(expected), rtol=1e-5, atol=1e-5)


def test_the_model_itself_for_any_batch(tmp_path: Path) -> None:
    vae, path = Outputs().vae.eval(), tmp_path / "vae.onnx"
    x, eps, batch = torch.rand(B, D), torch.randn(B, M), torch.export.Dim("batch")
    shapes = {"x": {0: batch}, "eps": {0: batch}}
    torch.onnx.export(vae, (x,), path, kwargs={"eps": eps}, dynamic_shapes=shapes, dynamo=True)
    x, eps = torch.rand(2 * B, D), torch.randn(2 * B, M)
    recon, *_ = onnxruntime.InferenceSession(path).run(None, {"x": x.numpy(), "eps": eps.numpy()})
    torch.testing.assert_close(torch.from_numpy(recon), vae(x, eps=eps).recon.detach(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dynamo", [True, False])
@pytest.mark.parametrize("num_samples", [None, K])
def test_noise_of_onnx_s_own(num_samples: int | None, dynamo: bool, tmp_path: Path) -> None:
    """Without eps, each run draws."""
    model, path, x = Outputs(num_samples).eval(), tmp_path / "vae.onnx", torch.rand(2000, D)
    torch.onnx.export(model, (x,), path, input_names=["x"], dynamo=dynamo)
    session = onnxruntime.InferenceSession(path)
    runs = [[torch.from_numpy(a) for a in session.run(None, {"x": x.numpy()})] for _ in range(2)]
    with torch.no_grad():
        mu, logvar = model.vae.encode(x)
        for recon, z, *_ in runs:
            eps = (z - mu) / torch.exp(0.5 * logvar)
            torch.testing.assert_close(recon, model.vae.decode(z), rtol=1e-5, atol=1e-5)
            assert eps.mean().abs() < 5 / eps.numel() ** 0.5 and (eps.var() - 1).abs() < 5 * (2 / eps.numel()) ** 0.5
    first, second = ((run[1] - mu).flatten() for run in runs)
    assert torch.corrcoef(torch.stack([first, second]))[0, 1].abs() < 5 / len(first) ** 0.5


def test_a_seed_draws_fastelbo_s_noise(tmp_path: Path) -> None:
    vae, path, x = Outputs().vae.eval(), tmp_path / "vae.onnx", torch.rand(B, D)
    torch.onnx.export(vae, (x,), path, kwargs={"seed": 3}, input_names=["x"], dynamo=True)
    _, z, *_ = onnxruntime.InferenceSession(path).run(None, {"x": x.numpy()})
    torch.testing.assert_close(torch.from_numpy(z), vae(x, seed=3).posterior.z.detach(), rtol=1e-5, atol=1e-5)


def test_the_kernels_are_exported_elsewhere() -> None:
    """torch.export keeps the ops; only ONNX takes plain PyTorch."""
    program = torch.export.export(Outputs(), (torch.rand(B, D), torch.randn(B, M)))
    assert "fastelbo.rsample" in str(program.graph)
