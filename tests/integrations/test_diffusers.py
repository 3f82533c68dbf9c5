"""fastelbo.integrations.diffusers against diffusers' own class. `make test-integrations` has the environment for it."""

import pytest
import torch

pytest.importorskip("diffusers", reason="diffusers is not installed: make test-integrations installs it")

from diffusers.models.autoencoders import autoencoder_kl, vae

from fastelbo.integrations.diffusers import DiagonalGaussianDistribution

B, C, H, W = 3, 4, 5, 6


def pair(parameters: torch.Tensor, **options: bool) -> list[vae.DiagonalGaussianDistribution]:
    return [kind(parameters, **options) for kind in (vae.DiagonalGaussianDistribution, DiagonalGaussianDistribution)]


def close(actual: object, expected: object) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("with_other", [False, True])
def test_kl_and_gradients(with_other: bool) -> None:
    """Also where diffusers clamps the log variance to [-30, 20]: there the gradient is 0."""
    torch.manual_seed(0)
    parameters = torch.randn(B, 2 * C, H, W, dtype=torch.float64)
    parameters[0, C, 0, :2] = torch.tensor([-31.0, 21.0])
    parameters.requires_grad_()
    second = torch.randn(B, 2 * C, H, W, dtype=torch.float64, requires_grad=True)
    inputs = [parameters, second] if with_other else [parameters]
    results = []
    for one, other in zip(pair(parameters), pair(second), strict=True):
        kl = one.kl(other if with_other else None)
        results.append([kl, *torch.autograd.grad(kl @ torch.arange(1.0, B + 1, dtype=torch.float64), inputs)])
    close(results[1], results[0])


def test_draws_mode_and_the_deterministic_one_are_diffusers() -> None:
    parameters = torch.randn(B, 2 * C, H, W)
    plain, ours = pair(parameters)
    draws = [one.sample(torch.Generator().manual_seed(1)) for one in (plain, ours)]
    assert torch.equal(*draws) and torch.equal(plain.mode(), ours.mode())
    plain, ours = pair(parameters, deterministic=True)
    assert torch.equal(plain.kl(), ours.kl()) and torch.equal(ours.sample_with_kl()[0], plain.mean)


def test_sample_with_kl() -> None:
    parameters = torch.randn(2000, 2 * C, 1, 1, dtype=torch.float64)
    plain, ours = pair(parameters)
    z, kl = ours.sample_with_kl(torch.Generator().manual_seed(1))
    close(kl, plain.kl())
    noise = ((z - plain.mean) / plain.std).flatten()
    assert abs(noise.mean()) < 0.05 and abs(noise.var() - 1) < 0.05


def test_the_kl_keeps_its_digits_near_the_prior() -> None:
    mean, logvar = torch.full((1, 1, 1, 1), 1e-5), torch.full((1, 1, 1, 1), 1e-5)
    plain, ours = pair(torch.cat([mean, logvar], 1))
    true = 0.5 * (mean.double() ** 2 + torch.expm1(logvar.double()) - logvar.double()).item()
    assert abs(ours.kl().item() / true - 1) < 1e-6 < abs(plain.kl().item() / true - 1)


def test_an_autoencoder_trains_with_it(monkeypatch) -> None:
    torch.manual_seed(0)
    model = autoencoder_kl.AutoencoderKL(
        block_out_channels=(8,),
        norm_num_groups=4,
        down_block_types=("DownEncoderBlock2D",),
        up_block_types=("UpDecoderBlock2D",),
        latent_channels=2,
    ).double()
    x = torch.rand(2, 3, 8, 8, dtype=torch.float64)
    results = []
    for kind in (vae.DiagonalGaussianDistribution, DiagonalGaussianDistribution):
        monkeypatch.setattr(autoencoder_kl, "DiagonalGaussianDistribution", kind)
        model.zero_grad()
        posterior = model.encode(x).latent_dist
        assert type(posterior) is kind
        recon = model.decode(posterior.sample(torch.Generator().manual_seed(1))).sample
        loss = (recon - x).square().sum() + posterior.kl().sum()
        loss.backward()
        results.append([loss.detach(), *(p.grad.clone() for p in model.parameters())])
    close(results[1], results[0])
