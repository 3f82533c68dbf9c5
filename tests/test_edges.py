"""Where a fused loss goes wrong first: loss scaling in half precision, NaN behind a floor, infinities times nothing."""

import pytest
import torch

import fastelbo


@pytest.mark.parametrize("scale", [1.0, 1024.0, 65536.0])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_gradients_of_half_types_survive_loss_scaling(dtype, scale):
    """The upstream gradient is applied before the rounding to half, as a gradient scaler expects."""
    logits = (4 * torch.randn(64, 32)).to(dtype).requires_grad_()
    x, latent = (torch.rand(64, 32) > 0.5).float(), torch.zeros(64, 4)
    (grad,) = torch.autograd.grad(fastelbo.elbo_loss(logits, x, latent, latent) * scale, logits)
    exact = scale / 64 * (torch.sigmoid(logits.detach().double()) - x.double())
    torch.testing.assert_close(grad, exact.to(dtype), rtol=2 * torch.finfo(dtype).eps, atol=2.0**-24)


def test_nan_is_not_below_the_floor_of_free_bits():
    mu = torch.zeros(4, 3)
    mu[1, 2] = torch.nan
    assert fastelbo.gaussian_kl(mu, torch.zeros(4, 3), free_bits=0.5).isnan().tolist() == [False, True, False, False]
    assert fastelbo.elbo_loss(torch.zeros(4, 2), torch.ones(4, 2), mu, torch.zeros(4, 3), free_bits=0.5).isnan()


def test_an_absent_gradient_is_not_zero_times_infinity():
    mu, logvar = torch.zeros(1, 1, requires_grad=True), torch.full((1, 1), 90.0, requires_grad=True)
    z = fastelbo.rsample(mu, logvar, eps=torch.ones(1, 1)).z
    grad_mu, grad_logvar = torch.autograd.grad(z.sum(), (mu, logvar))
    assert grad_mu.item() == 1
    assert grad_logvar.item() == pytest.approx(
        0.5 * torch.exp(torch.tensor(45.0, dtype=torch.float64)).item(), rel=1e-6
    )


def test_gradient_of_shared_data_does_not_depend_on_threads():
    x, logits = torch.zeros(1, 1, requires_grad=True), torch.randn(50000, 1, 1)
    before, sums = torch.get_num_threads(), []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        sums.append(torch.autograd.grad(fastelbo.bernoulli_log_prob(logits, x).sum(), x)[0].item())
    torch.set_num_threads(before)
    assert sums[0] == sums[1] == pytest.approx(logits.double().sum().item(), rel=1e-4)


def test_parts_may_be_changed_in_place_before_the_backward():
    logits = torch.randn(4, 3, requires_grad=True)
    parts = fastelbo.elbo_loss(logits, torch.ones(4, 3), torch.zeros(4, 2), torch.zeros(4, 2), return_parts=True)
    with torch.no_grad():
        parts.kl.div_(8)
    parts.loss.backward()
    torch.testing.assert_close(logits.grad, (torch.sigmoid(logits.detach()) - 1) / 4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_many_floors_of_free_bits_add_up(dtype):
    """The roundings of a sum of equal numbers all go the same way."""
    zero = torch.zeros(2, 4100, dtype=dtype)
    exact = torch.full((2,), 0.3 * 4100, dtype=dtype)
    torch.testing.assert_close(
        fastelbo.gaussian_kl(zero, zero, free_bits=0.3), exact, rtol=torch.finfo(dtype).eps, atol=0
    )
