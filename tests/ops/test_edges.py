"""Where a fused loss goes wrong first: loss scaling in half precision, NaN behind a floor, infinities times nothing."""

import contextlib

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


def test_where_there_is_more_nan_than_in_eager():
    """The three places that docs/limits.md names."""
    mean = torch.full((1, 40), torch.nan, requires_grad=True)
    value = fastelbo.log_prob(mean, torch.zeros(1, 40), likelihood="laplace")
    assert torch.autograd.grad(value, mean)[0].isnan().all()
    assert (torch.autograd.grad(mean.abs().sum(), mean)[0] == 0).all()

    outside, x = torch.tensor([[1.1]]), torch.tensor([[0.5]])
    assert torch.ops.fastelbo.log_prob([outside], x, None, "bernoulli_probs").isnan().all()
    with pytest.raises(RuntimeError, match="between 0 and 1"):
        torch.nn.functional.binary_cross_entropy(outside, x)

    log_w = torch.zeros(8, 6, requires_grad=True)
    nan = torch.zeros(8, 6)
    nan[0, 1] = torch.nan
    (grad,) = torch.autograd.grad(fastelbo.log_mean_exp(log_w + nan, 0).sum(), log_w)
    assert grad.isnan().any(0).tolist() == [False, True, False, False, False, False]
    assert fastelbo.keep_samples(log_w.detach() + nan, 4).scale.isnan().all()


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
    parts = fastelbo.elbo_parts(logits, torch.ones(4, 3), torch.zeros(4, 2), torch.zeros(4, 2))
    with torch.no_grad():
        parts.kl.div_(8)
    parts.loss.backward()
    torch.testing.assert_close(logits.grad, (torch.sigmoid(logits.detach()) - 1) / 4)


def _elbo(reduction: str = "mean") -> tuple[torch.Tensor, list[torch.Tensor]]:
    leaves = [torch.randn(4, n, requires_grad=True) for n in (8, 2, 2)]
    logits, mu, logvar = leaves
    return fastelbo.elbo_loss(logits, torch.rand(4, 8), mu, logvar, reduction=reduction), leaves


def test_an_upstream_gradient_may_be_a_negative_view_or_a_zero_tensor():
    loss, leaves = _elbo()
    expected = torch.autograd.grad(loss, leaves, torch.tensor(1.5), retain_graph=True)
    negative = torch.tensor(-1.5j).conj().imag
    assert negative.is_neg() and negative.item() == 1.5
    for a, e in zip(torch.autograd.grad(loss, leaves, negative, retain_graph=True), expected, strict=True):
        assert torch.equal(a, e)
    for grad in torch.autograd.grad(loss, leaves, torch._efficientzerotensor(())):
        assert grad.count_nonzero() == 0


def test_hooks_on_saved_tensors_keep_them_unchanged():
    kept = []

    def pack(t):
        kept.append((t, t.clone()))
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        loss, leaves = _elbo()
    assert len(kept) > len(leaves), "the gradients are saved by the forward"
    grads = torch.autograd.grad(loss, leaves, torch.tensor(3.0))
    for grad in grads:
        grad.zero_()
    assert all(torch.equal(now, before) for now, before in kept)


def test_gates_of_rws_ask_nothing_of_the_weights():
    """With path_weight = 0 the factors of the gates are constants, also where a weight is NaN or infinite."""
    for bad in (torch.nan, torch.inf):
        found = []
        for mode in (contextlib.nullcontext, fastelbo.reference_mode):
            torch.manual_seed(0)
            mu, logvar = torch.zeros(2, 3, requires_grad=True), torch.zeros(2, 3, requires_grad=True)
            with mode():
                p = fastelbo.rsample(mu, logvar, 4, seed=1)
                log_ratio = p.log_ratio + torch.tensor([[bad, 0.0]] + 3 * [[0.0, 0.0]])
                loss = fastelbo.multi_sample_loss(
                    torch.zeros(4, 2, 5), torch.ones(2, 5), p._replace(log_ratio=log_ratio), estimator="rws"
                )
                found.append(torch.autograd.grad(loss, p.gates)[0])
        torch.testing.assert_close(found[0], found[1], rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("gates", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("ratio", [torch.float32, torch.float16], ids=str)
def test_gradients_of_half_precision_gates_and_ratios_fit_them(gates, ratio):
    K, B = 5, 70
    logits, x = torch.randn(K, B, 12, requires_grad=True), torch.rand(B, 12)
    log_ratio = torch.randn(K, B).to(ratio).requires_grad_()
    opened = torch.zeros(2, K, B, dtype=gates, requires_grad=True)

    def loss(logits, log_ratio, opened):
        return torch.ops.fastelbo.multi_sample_loss(
            [logits], x, log_ratio, opened, None, None, None, 1, [0, 1, 0], "bernoulli", "mean"
        )[0]

    found = torch.autograd.grad(loss(logits, log_ratio, opened), (logits, log_ratio, opened))
    wide = [t.detach().float().requires_grad_() for t in (logits, log_ratio, opened)]
    expected = torch.autograd.grad(loss(*wide), wide)
    for f, e, t in zip(found, expected, (logits, log_ratio, opened), strict=True):
        assert f.dtype == t.dtype
        torch.testing.assert_close(f, e.to(t.dtype), rtol=2 * torch.finfo(t.dtype).eps, atol=1e-7)


def test_gradient_of_a_large_batch_by_beta_does_not_depend_on_threads():
    B = 100_001
    mu, logvar, x = torch.randn(B, 1), torch.randn(B, 1), torch.rand(B, 1)
    beta = torch.tensor(0.7, requires_grad=True)
    before, grads = torch.get_num_threads(), []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        loss = fastelbo.elbo_loss(torch.zeros(B, 1), x, mu, logvar, beta=beta)
        grads.append(torch.autograd.grad(loss, beta)[0].item())
    torch.set_num_threads(before)
    assert grads[0] == grads[1] == grads[2] == pytest.approx(fastelbo.gaussian_kl(mu, logvar).mean().item(), rel=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_many_floors_of_free_bits_add_up(dtype):
    """The roundings of a sum of equal numbers all go the same way."""
    zero = torch.zeros(2, 4100, dtype=dtype)
    exact = torch.full((2,), 0.3 * 4100, dtype=dtype)
    torch.testing.assert_close(
        fastelbo.gaussian_kl(zero, zero, free_bits=0.3), exact, rtol=torch.finfo(dtype).eps, atol=0
    )


# ----------------------------------------------------------------------------------------------------------------------
# Zero times infinity.

every_float = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
both_paths = pytest.mark.parametrize("path", [contextlib.nullcontext, fastelbo.reference_mode], ids=["op", "twin"])


def _with_gradients(value: torch.Tensor, *leaves: torch.Tensor) -> list[torch.Tensor]:
    return [value, *torch.autograd.grad(value.sum(), leaves)]


@every_float
@both_paths
@pytest.mark.parametrize("log", [-80.0, -89.0, -100.0, -103.0, -200.0, -708.0, -720.0, -1500.0, -1e30])
def test_a_difference_of_zero_is_zero_beside_any_scale(path, dtype, log):
    mean, scale = torch.ones(1, 1, dtype=dtype).requires_grad_(), torch.full((1, 1), log, dtype=dtype).requires_grad_()
    with path():
        gaussian = _with_gradients(
            fastelbo.log_prob((mean, scale), torch.ones_like(mean), likelihood="gaussian"), mean, scale
        )
        laplace = _with_gradients(
            fastelbo.log_prob((mean, scale), torch.ones_like(mean), likelihood="laplace"), mean, scale
        )
        prior = mean.detach().clone().requires_grad_(), scale.detach().clone().requires_grad_()
        leaves = (mean, scale, *prior)
        for kl in (fastelbo.gaussian_kl(*leaves), fastelbo.gaussian_kl(*leaves, reduce=False)):
            assert [t.item() for t in _with_gradients(kl, *leaves)] == [0.0] * 5
        drawn = fastelbo.rsample(
            *leaves[:2], 2, prior_mu=prior[0], prior_logvar=prior[1], eps=torch.zeros(2, 1, 1, dtype=dtype)
        )
        assert drawn.log_ratio.tolist() == [[0.0], [0.0]]
        assert [g.item() for g in torch.autograd.grad(drawn.log_ratio.sum(), leaves)] == [0.0, 1.0, 0.0, -1.0]
    exact = torch.tensor(log, dtype=dtype).double()
    expected = [-0.5 * (exact + torch.log(torch.tensor(2 * torch.pi).double())), 0.0, -0.5]
    assert [t.item() for t in gaussian] == [pytest.approx(float(e), rel=1e-6) for e in expected]
    expected = [-(exact + torch.log(torch.tensor(2.0).double())), 0.0, -1.0]
    assert [t.item() for t in laplace] == [pytest.approx(float(e), rel=1e-6) for e in expected]


@both_paths
def test_a_small_difference_beside_a_small_scale(path):
    """The square overflows, or vanishes, where log p and the KL do, and not before."""
    difference, logvar = torch.tensor([[1e-20, 3e-22, 1e-30]]), torch.tensor([[-90.0, -100.0, -140.0]])
    zeros, exact = torch.zeros_like(logvar), 0.5 * (difference.double() * torch.exp(-0.5 * logvar.double())).square()
    with path():
        log_p = [
            fastelbo.log_prob(
                (zeros[:, i : i + 1], logvar[:, i : i + 1]), difference[:, i : i + 1], likelihood="gaussian"
            )
            for i in range(3)
        ]
        kl = fastelbo.gaussian_kl(difference, logvar, zeros, logvar, reduce=False)
    expected = -exact - 0.5 * (logvar.double() + torch.log(torch.tensor(2 * torch.pi).double()))
    torch.testing.assert_close(torch.stack(log_p, 1).double().squeeze(-1), expected, rtol=1e-6, atol=0)
    torch.testing.assert_close(kl.double(), exact, rtol=1e-6, atol=0)


@every_float
@both_paths
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("free_bits", [0.0, 0.5])
@pytest.mark.parametrize("beta", ["float", "tensor", "learned", "per dimension", "kl_mask"])
def test_a_weight_of_zero_leaves_nothing_of_an_infinite_kl(path, dtype, reduction, free_bits, beta):
    """Minus the log-likelihood, and no gradient of the KL: the first step of a warm-up."""
    if free_bits and beta in ("per dimension", "kl_mask"):
        pytest.skip("free_bits excludes them")
    recon, x = torch.randn(3, 4, dtype=dtype, requires_grad=True), torch.rand(3, 4, dtype=dtype)
    mu, logvar = torch.randn(3, 2, dtype=dtype, requires_grad=True), torch.randn(3, 2, dtype=dtype)
    logvar[1, 1] = 2000.0
    logvar.requires_grad_()
    zero = torch.zeros(2 if beta == "per dimension" else (), dtype=dtype, requires_grad=beta == "learned")
    options = {"beta": 0.0 if beta in ("float", "kl_mask") else zero, "reduction": reduction, "free_bits": free_bits}
    if beta == "kl_mask":
        options["kl_mask"] = torch.ones(2, dtype=torch.bool)
    with path():
        parts = fastelbo.elbo_parts(recon, x, mu, logvar, **options)
        grads = torch.autograd.grad(parts.loss.sum(), (recon, mu, logvar))
        only = -fastelbo.log_prob(recon, x)
    only = {"mean": only.mean(), "sum": only.sum(), "none": only}[reduction]
    assert parts.kl.isinf().tolist() == [False, True, False]
    torch.testing.assert_close(parts.loss, only, rtol=1e-6, atol=0)
    torch.testing.assert_close(grads[0], torch.autograd.grad(only.sum(), recon)[0])
    assert not grads[1].any() and not grads[2].any()


@pytest.mark.parametrize("estimator", ["iwae", "dreg", "stl"])
def test_a_kl_weight_of_zero_leaves_nothing_of_an_infinite_log_ratio(estimator):
    mu = torch.full((2, 3), 1e25, requires_grad=True)
    drawn = fastelbo.rsample(mu, torch.zeros(2, 3), 4, prior_logvar=torch.full((2, 3), -20.0), seed=0)
    assert drawn.log_ratio.isinf().all()
    log_p = torch.randn(4, 2, requires_grad=True)
    loss = fastelbo.bound_loss(log_p, drawn, estimator=estimator, kl_weight=0.0)
    expected = fastelbo.bound_loss(log_p, drawn._replace(log_ratio=torch.zeros(4, 2)), estimator=estimator)
    torch.testing.assert_close(loss, expected)
    assert not torch.autograd.grad(loss, mu)[0].any()


def test_the_loss_has_the_dtype_of_its_inputs_beside_a_float64_beta():
    zeros = torch.zeros(2, 3)
    for beta in (torch.ones(3, dtype=torch.float64), torch.ones((), dtype=torch.float64)):
        parts = fastelbo.elbo_parts(zeros, zeros, zeros, zeros, beta=beta)
        assert {t.dtype for t in parts} == {torch.float32}
