"""iwae_loss and log_mean_exp: the bound, its weights, and what popular code gets wrong."""

import math

import pytest
import torch
import torch.distributions as td
from cases import REPRESENTATIVE_IDS, REPRESENTATIVES, draw, joined
from oracle import DTYPES, HALF_TYPES, assert_backward_repeats, check, gradients
from torch import Tensor

import fastelbo

some_likelihoods = pytest.mark.parametrize("likelihood", REPRESENTATIVES, ids=REPRESENTATIVE_IDS)
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
every_reduction = pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
inf = float("inf")


def iwae(parts: tuple[int, ...] = (0,), **options):
    """(recon, x, second, third, fourth, log_ratio, mask) -> the chosen ones of loss, log-likelihood and KL."""

    def call(recon, x, second, third, fourth, log_ratio, mask=None):
        result = fastelbo.iwae_parts(joined(recon, second, third, fourth), x, log_ratio, mask=mask, **options)
        return [result[i] for i in parts]

    return call


def inputs_for(likelihood=("bernoulli", False), samples=5, dtype=torch.float32, x_dtype=None, shape=(7, 3, 11)):
    """recon, x, second, third, fourth, log_ratio; a few nats between the samples, so that several weights count."""
    recon, x, second, third, fourth = draw(likelihood, shape, samples, dtype, x_dtype)
    with torch.no_grad():
        for t in (recon, second, third, fourth):
            if t is not None and t.requires_grad:
                t.copy_(t[:1] + 0.2 * (t - t[:1]))
    log_ratio = torch.randn(samples, shape[0], dtype=torch.float64).to(dtype).requires_grad_()
    return [recon, x.detach(), second, third, fourth, log_ratio]


@some_likelihoods
@every_dtype
@every_reduction
def test_values_and_gradients(likelihood, dtype, reduction):
    for samples in (1, 5):
        for x_dtype in (None, torch.uint8):
            inputs = inputs_for(likelihood, samples, dtype, x_dtype)
            for parts in ((0,), (0, 1, 2), (1,)):
                call = iwae(parts, likelihood=likelihood[0], reduction=reduction)
                check(call, *inputs, label=f"K={samples}, x {x_dtype}, parts {parts}")


@every_reduction
def test_gradient_of_the_data(reduction):
    for likelihood in (("bernoulli", False), ("gaussian", True), ("zinb", False)):
        inputs = inputs_for(likelihood)
        inputs[1].requires_grad_()
        check(iwae(likelihood=likelihood[0], reduction=reduction), *inputs, label=str(likelihood))


def test_only_what_requires_a_gradient_gets_one():
    for chosen in range(16):
        inputs = inputs_for(("gaussian", True))
        for i, t in enumerate(t for t in inputs if t is not None):
            t.requires_grad_(bool(chosen >> i & 1))
        for reduction in ("mean", "none"):
            check(iwae(likelihood="gaussian", reduction=reduction), *inputs, label=f"subset {chosen:04b}, {reduction}")


@some_likelihoods
@every_reduction
def test_mask(likelihood, reduction):
    keep = torch.rand(7, 3, 11) < 0.7
    for mask in (keep, keep * torch.rand(7, 3, 11), keep[:, :, :1]):
        inputs = inputs_for(likelihood)
        with torch.no_grad():
            inputs[0].masked_fill_(~mask.expand(7, 3, 11).bool(), float("nan"))
        check(iwae(likelihood=likelihood[0], reduction=reduction), *inputs, mask)


@every_dtype
def test_shapes(dtype):
    """Few data with many samples and the reverse; long rows, one column, no event dimensions, nothing at all."""
    for samples, shape in (
        (50, (2, 30)),
        (2, (300, 3)),
        (3, (1, 9000)),
        (4, (5, 1)),
        (6, (5,)),
        (2, (0, 4)),
        (2, (3, 0)),
    ):
        inputs = inputs_for(samples=samples, dtype=dtype, shape=shape)
        for reduction in ("mean", "none"):
            check(iwae((0, 1), reduction=reduction), *inputs, label=f"K={samples}, {shape}, {reduction}")


def test_the_value_is_the_bound():
    """Written out with torch.distributions: log (1/K) sum_k p(x, z_k) / q(z_k | x)."""
    torch.manual_seed(1)
    mu, logvar, x = torch.randn(3, 4, dtype=torch.float64), torch.randn(3, 4, dtype=torch.float64), torch.rand(3, 4)
    x = x.double()
    posterior = fastelbo.rsample(mu, logvar, 6, seed=0)
    q, prior = td.Normal(mu, torch.exp(logvar / 2)), td.Normal(0.0, 1.0)
    log_joint = td.Bernoulli(logits=posterior.z, validate_args=False).log_prob(x) + prior.log_prob(posterior.z)
    log_w = (log_joint - q.log_prob(posterior.z)).sum(-1)
    bound = torch.stack([torch.stack([log_w[k, b].exp() for k in range(6)]).mean().log() for b in range(3)])
    loss = fastelbo.iwae_loss(posterior.z, x, posterior.log_ratio, reduction="none")
    torch.testing.assert_close(loss, -bound, rtol=1e-6, atol=1e-6)
    parts = fastelbo.iwae_parts(posterior.z, x, posterior.log_ratio)
    torch.testing.assert_close(parts.loss, -bound.mean(), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(parts.kl, -posterior.log_ratio.mean(0))


def test_weights_belong_to_a_datum_and_point_the_right_way():
    recon, x, *_, log_ratio = inputs_for(samples=5, shape=(7, 11))
    loss = fastelbo.iwae_loss(recon, x, log_ratio, reduction="sum")
    recon_grad, ratio_grad = torch.autograd.grad(loss, [recon, log_ratio])
    torch.testing.assert_close(ratio_grad.sum(0), -torch.ones(7))
    log_w = fastelbo.bernoulli_log_prob(recon, x) + log_ratio
    assert torch.equal(ratio_grad.argmin(0), log_w.argmax(0)), "the likeliest sample has the largest weight"
    # changing one datum leaves the others' gradients as they are, to the bit
    with torch.no_grad():
        log_ratio[:, 3] += torch.randn(5) * 3
        recon[:, 3] += 1
    loss = fastelbo.iwae_loss(recon, x, log_ratio, reduction="sum")
    others = [b for b in range(7) if b != 3]
    changed = torch.autograd.grad(loss, [recon, log_ratio])
    assert torch.equal(changed[0][:, others], recon_grad[:, others])
    assert torch.equal(changed[1][:, others], ratio_grad[:, others])


@every_dtype
@every_reduction
def test_impossible_samples(dtype, reduction):
    """A weight of -inf counts for nothing; where all are, the bound is -inf and the gradient 0."""
    inputs = inputs_for(samples=4, dtype=dtype, shape=(5, 33))
    with torch.no_grad():
        inputs[5][:, 1] = -inf
        inputs[5][[0, 2], 3] = -inf
        inputs[5][1:, 4] = -inf
    check(iwae(reduction=reduction), *inputs)
    outputs = iwae(reduction=reduction)(*inputs)
    assert (outputs[0] if reduction != "none" else outputs[0][1]) == inf
    recon, ratio = gradients(outputs, inputs, [torch.ones_like(outputs[0])])
    assert (recon[:, 1] == 0).all() and (ratio[:, 1] == 0).all()
    assert (recon[[0, 2], 3] == 0).all() and (ratio[[0, 2], 3] == 0).all()
    assert (recon[1, 3] != 0).any() and (ratio[[1, 3], 3] != 0).all()


@every_reduction
def test_nan_and_infinity_come_through(reduction):
    for poison in (float("nan"), inf):
        inputs = inputs_for(samples=4, shape=(5, 33))
        with torch.no_grad():
            inputs[5][2, 1] = poison
        loss = fastelbo.iwae_loss(inputs[0], inputs[1], inputs[5], reduction="none")
        assert not loss[1].isfinite() and loss[[0, 2, 3, 4]].isfinite().all()
        assert not fastelbo.iwae_loss(inputs[0], inputs[1], inputs[5], reduction=reduction).sum().isfinite()


@pytest.mark.parametrize("dtype", [torch.float32, *HALF_TYPES], ids=str)
@every_reduction
def test_large_log_weights_are_not_rounded_to_half_precision(dtype, reduction):
    """log w near -7000, where a bfloat16 ulp is 32 nats and a float32 ulp 5e-4."""
    recon, x, *_ = draw(("bernoulli", False), (2, 5000), 10, torch.float64, requires_grad=False)
    recon = (recon[:1] + 0.02 * (recon - recon[:1])).to(dtype).requires_grad_()
    log_ratio = torch.randn(10, 2).requires_grad_()
    x = x.to(dtype)
    log_likelihood = fastelbo.bernoulli_log_prob(recon, x)
    assert log_likelihood.dtype == torch.float32 and -10_000 < log_likelihood.mean() < -4000
    check(iwae((0, 1), reduction=reduction), recon, x, None, None, None, log_ratio)
    check(iwae((0,), reduction=reduction), recon, x, None, None, None, log_ratio)


@every_reduction
def test_shift_of_all_weights_is_a_shift_of_the_bound(reduction):
    recon, x, *_, log_ratio = inputs_for(dtype=torch.float64)
    for shift in (-7000.0, -1e6, 1e6):
        loss, moved = (
            fastelbo.iwae_loss(recon, x, ratio, reduction="none") for ratio in (log_ratio, log_ratio + shift)
        )
        torch.testing.assert_close(moved, loss - shift, rtol=1e-13, atol=1e-8)


# ----------------------------------------------------------------------------------------------------------------------
# What a backward may not do


@every_reduction
@pytest.mark.parametrize("upstream", [1.0, 0.3])
def test_second_backward_equals_the_first(reduction, upstream):
    inputs = inputs_for(("gaussian", True))
    wanted = [t for t in inputs if t is not None and t.requires_grad]
    before = [t.detach().clone() for t in inputs if t is not None]
    loss = iwae(likelihood="gaussian", reduction=reduction)(*inputs)[0]
    assert_backward_repeats(loss, wanted, upstream)
    assert all(torch.equal(t, b) for t, b in zip((t for t in inputs if t is not None), before, strict=True))


def test_expanded_and_strided_upstream_gradients():
    for upstream in (torch.tensor(0.7).expand(7), torch.randn(14)[::2]):
        inputs = inputs_for()
        grads = []
        for up in (upstream, upstream.clone(memory_format=torch.contiguous_format)):
            grads.append(gradients(iwae(reduction="none")(*inputs), inputs, [up]))
        assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


def test_module_form():
    recon, x, scale, _, _, log_ratio = inputs_for(("gaussian", True))
    mask = torch.rand(7, 3, 11) < 0.5
    options = {"likelihood": "gaussian", "reduction": "none"}
    expected = fastelbo.iwae_loss((recon, scale), x, log_ratio, mask=mask, **options)
    module = fastelbo.IWAELoss(**options)
    actual = module((recon, scale), x, log_ratio, mask)
    assert torch.equal(actual, expected) and "gaussian" in repr(module)


# ----------------------------------------------------------------------------------------------------------------------
# log_mean_exp


@every_dtype
def test_log_mean_exp(dtype):
    for shape in ((5,), (5, 3), (1, 4), (2, 3, 4), (600, 2), (3, 0), (5000,), (2, 1030, 3), (300, 33), (2, 7, 70)):
        for dim in range(-len(shape), len(shape)):
            if shape[dim]:
                log_w = (3 * torch.randn(shape, dtype=torch.float64)).to(dtype).requires_grad_()
                check(lambda t, dim=dim: fastelbo.log_mean_exp(t, dim), log_w, label=f"{shape}, dim {dim}")


@every_dtype
def test_log_mean_exp_extremes(dtype):
    nan = float("nan")
    rows = [[-inf] * 3, [-inf, 0.0, -inf], [-7000.0, -7000.0, -7001.0], [60000.0, 0.0, -60000.0], [-60000.0] * 3]
    log_w = torch.tensor(rows, dtype=dtype, requires_grad=True)
    check(lambda t: fastelbo.log_mean_exp(t, 1), log_w)
    value = fastelbo.log_mean_exp(log_w, 1)
    assert value[0] == -inf and value[1].item() == pytest.approx(-math.log(3), rel=1e-6)
    assert (gradients([value], [log_w], [torch.ones_like(value)])[0][0] == 0).all()
    odd = fastelbo.log_mean_exp(torch.tensor([[nan, 0.0], [inf, 0.0], [nan, -inf], [nan, inf]], dtype=dtype), 1)
    assert odd[[0, 2, 3]].isnan().all() and odd[1] == inf


def test_log_mean_exp_of_one_weight_is_the_weight():
    log_w: Tensor = torch.randn(1, 50) * 100
    torch.testing.assert_close(fastelbo.log_mean_exp(log_w), log_w[0], rtol=2e-7, atol=0)
