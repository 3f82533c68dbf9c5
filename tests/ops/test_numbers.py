"""Numbers of the losses as 0-d tensors, learned or not, by op and twin: values and gradients against the formulas."""

import math
from collections.abc import Callable
from contextlib import nullcontext

import mpmath
import pytest
import torch
from torch import Tensor

import fastelbo

K, B, M = 5, 3, 4
INF, NAN = math.inf, math.nan
TYPES = [torch.float32, torch.float64]

every_path = pytest.mark.parametrize("path", [nullcontext, fastelbo.reference_mode], ids=["op", "twin"])
every_type = pytest.mark.parametrize("dtype", TYPES, ids=str)  # of the data
every_number_type = pytest.mark.parametrize("number_dtype", TYPES, ids=str)


def drawn(dtype: torch.dtype) -> fastelbo.Posterior:
    mu, logvar = torch.randn(2, B, M, dtype=dtype)
    return fastelbo.rsample(mu, logvar, K, seed=0)


def multi_sample_loss(log_w: Tensor, **options) -> Tensor:
    """Of a log p(x | z) that is 0: nothing of x is seen."""
    posterior = drawn(log_w.dtype)._replace(log_ratio=log_w)
    x = torch.zeros(B, 1, dtype=log_w.dtype)
    return fastelbo.multi_sample_loss(
        x.expand(K, B, 1), x, posterior, mask=torch.zeros(()), **{"reduction": "none", **options}
    )


def bound_loss(log_w: Tensor, **options) -> Tensor:
    posterior = drawn(log_w.dtype)
    nothing = posterior._replace(log_ratio=torch.zeros_like(posterior.log_ratio))
    return fastelbo.bound_loss(log_w, nothing, **{"reduction": "none", **options})


every_function = pytest.mark.parametrize("function", [multi_sample_loss, bound_loss])


def spread(dtype: torch.dtype) -> Tensor:
    return (2 * torch.randn(K, B, dtype=torch.float64) - 5).to(dtype).requires_grad_()


def learned(number: float, dtype: torch.dtype) -> Tensor:
    return torch.tensor(number, dtype=dtype, requires_grad=True)


def close(actual: Tensor, expected: Tensor, dtype: torch.dtype) -> None:
    rtol, atol = (1e-5, 1e-5) if torch.float32 in (dtype, actual.dtype) else (1e-11, 1e-12)
    torch.testing.assert_close(actual.detach().double(), expected.detach().double(), rtol=rtol, atol=atol)


def renyi(log_w: Tensor, alpha: float) -> tuple[Tensor, Tensor, Tensor]:
    """The bound [B], its gradient by log w [K, B] and that by alpha [B], to 60 digits."""
    columns = []
    with mpmath.workdps(60):
        t = 1 - mpmath.mpf(alpha)
        for column in log_w.detach().double().T.tolist():
            w = [mpmath.mpf(v) for v in column]
            powers = [mpmath.exp(t * v) for v in w]
            total = mpmath.fsum(powers)
            a = [p / total for p in powers]
            mean = mpmath.fsum(w) / len(w)
            if t == 0:
                value, slope = mean, mpmath.fsum([(v - mean) ** 2 for v in w]) / len(w) / 2
            else:
                value = mpmath.log(total / len(w)) / t
                slope = (mpmath.fsum([p * v for p, v in zip(a, w, strict=True)]) - value) / t
            columns.append([float(value), *map(float, a), float(-slope)])
    found = torch.tensor(columns, dtype=torch.float64)
    return found[:, 0], found[:, 1:-1].T, found[:, -1]


@pytest.mark.parametrize("alpha", [-2.0, 0.0, 1 - 1e-3, 1 - 1e-9, 1.0, 1 + 1e-9, 3.0])
@every_number_type
@every_type
@every_function
@every_path
def test_alpha(path, function, dtype, number_dtype, alpha):
    log_w, number, upstream = spread(dtype), learned(alpha, number_dtype), torch.randn(B, dtype=torch.float64)
    value, by_log_w, by_alpha = renyi(log_w, number.item())
    if number.item() == 1:
        close(value, log_w.mean(0), dtype)
        torch.testing.assert_close(by_alpha, -log_w.detach().double().var(0, correction=0) / 2)
    with path():
        loss = function(log_w, estimator="vr", alpha=number)
        grads = torch.autograd.grad(loss, (log_w, number), upstream.to(dtype))
    assert grads[0].dtype == dtype and grads[1].dtype == number_dtype and grads[1].shape == ()
    close(-loss, value, dtype)
    close(-grads[0], upstream * by_log_w, dtype)
    close(-grads[1], (upstream * by_alpha).sum(), dtype)


@pytest.mark.parametrize("alpha", [-2.0, 0.0, 1 - 1e-3, 1 - 1e-9, 1.0, 1 + 1e-9, 3.0])
@every_function
@every_path
def test_a_weight_of_0_beside_any_alpha(path, function, alpha):
    """log w of -inf: the bound is that of the other weights below 1, and -inf from there on; never NaN."""
    log_w = spread(torch.float64).detach()
    log_w[2, 1] = -INF
    log_w.requires_grad_()
    with path():
        bounds = [-function(log_w, estimator="vr", alpha=n) for n in (alpha, learned(alpha, torch.float64))]
    value, by_log_w, _ = renyi(log_w, alpha) if alpha < 1 else (torch.full((B,), -INF), torch.zeros(K, B), None)
    for bound in bounds:
        torch.testing.assert_close(bound[1].detach(), value[1].double())
        assert bound[[0, 2]].isfinite().all()
        (gradient,) = torch.autograd.grad(bound.sum(), log_w)
        assert gradient[:, [0, 2]].isfinite().all()
        if alpha < 1:
            torch.testing.assert_close(gradient, by_log_w)


@pytest.mark.parametrize("beta", [0.0, 0.3, 1.0])
@every_number_type
@every_type
@every_function
@every_path
def test_beta_of_ciwae(path, function, dtype, number_dtype, beta):
    log_w, number, upstream = spread(dtype), learned(beta, number_dtype), torch.randn(B, dtype=torch.float64)
    wide, beta = log_w.detach().double(), number.item()
    elbo, iwae = wide.mean(0), torch.logsumexp(wide, 0) - math.log(K)
    with path():
        loss = function(log_w, estimator="ciwae", beta=number)
        grads = torch.autograd.grad(loss, (log_w, number), upstream.to(dtype))
    assert grads[1].dtype == number_dtype
    close(-loss, beta * elbo + (1 - beta) * iwae, dtype)
    close(-grads[0], upstream * (beta / K + (1 - beta) * torch.softmax(wide, 0)), dtype)
    close(-grads[1], (upstream * (elbo - iwae)).sum(), dtype)


@pytest.mark.parametrize("beta", [0.0, 0.3, 1.0])
@every_function
@every_path
def test_a_weight_of_0_beside_any_beta(path, function, beta):
    """A beta of 0 leaves nothing of an ELBO of -inf."""
    log_w = spread(torch.float64).detach()
    log_w[2, 1] = -INF
    log_w.requires_grad_()
    with path():
        bounds = [-function(log_w, estimator="ciwae", beta=n) for n in (beta, torch.tensor(beta))]
    for bound in bounds:
        assert bound[[0, 2]].isfinite().all()
        expected = torch.logsumexp(log_w, 0)[1] - math.log(K) if beta == 0 else -INF
        torch.testing.assert_close(bound[1], torch.as_tensor(expected, dtype=torch.float64))
        (gradient,) = torch.autograd.grad(bound.sum(), log_w)
        assert gradient.isfinite().all()
        torch.testing.assert_close(
            gradient, beta / K + (1 - beta) * torch.softmax(log_w.detach(), 0), check_dtype=False
        )


@every_number_type
@every_type
@every_path
def test_kl_weight(path, dtype, number_dtype):
    log_p, number, upstream = spread(dtype), learned(0.7, number_dtype), torch.randn(B, dtype=torch.float64)
    posterior = drawn(dtype)
    weight, wide = number.detach().double(), posterior.log_ratio.double()
    log_w = log_p.detach().double() + weight * wide
    a = torch.softmax(log_w, 0)
    with path():
        loss = fastelbo.bound_loss(log_p, posterior, kl_weight=number, reduction="none")
        grads = torch.autograd.grad(loss, (log_p, number), upstream.to(dtype))
    assert grads[1].dtype == number_dtype
    close(-loss, torch.logsumexp(log_w, 0) - math.log(K), dtype)
    close(-grads[0], upstream * a, dtype)
    close(-grads[1], (upstream * a * wide).sum(), dtype)


def elbo_loss(mu: Tensor, logvar: Tensor, **options) -> Tensor:
    """Of a log p(x | z) that is 0."""
    x = torch.zeros(B, 1, dtype=mu.dtype)
    return fastelbo.elbo_loss(x, x, mu, logvar, mask=torch.zeros(()), **{"reduction": "none", **options})


def terms_of(mu: Tensor, logvar: Tensor) -> Tensor:
    mu, logvar = mu.double(), logvar.double()
    return 0.5 * (torch.exp(logvar) - 1 - logvar + mu.square())


@pytest.mark.parametrize("free_bits", [0.0, 0.4])
@every_number_type
@every_type
@every_path
def test_beta_and_free_bits_of_the_elbo(path, dtype, number_dtype, free_bits):
    mu, logvar = (torch.linspace(0.2, 1.5, M) * torch.randn(2, B, M)).to(dtype).unbind()
    number, upstream = learned(0.3, number_dtype), torch.randn(B, dtype=torch.float64)
    latents = mu.requires_grad_(), logvar.requires_grad_()
    terms = terms_of(*latents)
    mean = terms.mean(0)
    assert free_bits == 0 or 0 < (mean < 0.4).sum() < M
    free_bits = torch.tensor(free_bits, dtype=number_dtype)
    penalty = torch.where(mean.detach() < free_bits, free_bits.double(), terms).sum(1)
    expected = [penalty.detach(), *torch.autograd.grad(number.detach() * penalty, latents, upstream)]
    with path():
        for floor in (free_bits, free_bits.item()):
            loss = elbo_loss(*latents, beta=number, free_bits=floor)
            *by_latents, by_beta = torch.autograd.grad(loss, (*latents, number), upstream.to(dtype))
            close(loss, number.detach() * expected[0], dtype)
            for ours, theirs in zip(by_latents, expected[1:], strict=True):
                close(ours, theirs, dtype)
            assert by_beta.dtype == number_dtype
            close(by_beta, (upstream * expected[0]).sum(), dtype)
            close(fastelbo.gaussian_kl(*latents, free_bits=floor), expected[0], dtype)


NAMES = {"vr": "alpha", "ciwae": "beta"}


@pytest.mark.parametrize("estimator", NAMES)
@every_function
@every_path
def test_reductions_and_second_derivatives(path, function, estimator):
    """A loss that is one number has its gradients computed with it."""
    log_w, number = spread(torch.float64), learned(0.4, torch.float64)

    def loss(log_w: Tensor, number: Tensor, reduction: str = "none") -> Tensor:
        return function(log_w, estimator=estimator, reduction=reduction, **{NAMES[estimator]: number})

    with path():
        rows = torch.autograd.grad(loss(log_w, number), (log_w, number), torch.ones(B, dtype=torch.float64))
        for reduction, share in (("mean", 1 / B), ("sum", 1.0)):
            whole = loss(log_w, number, reduction)
            for upstream in (1.0, -0.3):
                given = torch.tensor(upstream, dtype=torch.float64)
                for ours, row in zip(
                    torch.autograd.grad(whole, (log_w, number), given, retain_graph=True), rows, strict=True
                ):
                    torch.testing.assert_close(ours, upstream * share * row, rtol=1e-11, atol=1e-13)
        assert torch.autograd.gradgradcheck(loss, (log_w, number))


def _loss_of(kind: str, number: float | Tensor) -> Callable[[], Tensor]:
    log_w, mu = torch.zeros(K, B), torch.ones(B, M)
    return {
        "alpha": lambda: multi_sample_loss(log_w, estimator="vr", alpha=number),
        "alpha of a bound": lambda: bound_loss(log_w, estimator="vr", alpha=number),
        "beta": lambda: multi_sample_loss(log_w, estimator="ciwae", beta=number),
        "beta of a bound": lambda: bound_loss(log_w, estimator="ciwae", beta=number),
        "kl_weight": lambda: bound_loss(log_w, kl_weight=number),
        "beta of the elbo": lambda: elbo_loss(mu, mu, beta=number),
        "free_bits": lambda: elbo_loss(mu, mu, free_bits=number),
        "free_bits of a KL": lambda: fastelbo.gaussian_kl(mu, mu, free_bits=number),
    }[kind]


KINDS = ["alpha", "beta", "kl_weight", "beta of the elbo", "free_bits", "free_bits of a KL"]


@pytest.mark.parametrize("kind", [*KINDS, "alpha of a bound", "beta of a bound"])
@every_path
def test_a_number_of_nan_is_seen_in_the_loss(path, kind):
    """Tensors are not looked at: no device waits for them."""
    with path():
        assert _loss_of(kind, torch.tensor(NAN))().isnan().all()


@pytest.mark.parametrize("kind", ["free_bits", "free_bits of a KL"])
@every_path
def test_learned_free_bits_are_refused(path, kind):
    """The mean over the batch has no derivative by its floor where the floor is reached."""
    with path(), pytest.raises(ValueError, match="free_bits must not require a gradient; got requires_grad=True"):
        _loss_of(kind, learned(0.1, torch.float32))()


@pytest.mark.parametrize(
    "kind, number",
    [
        ("alpha", INF),
        ("alpha", -INF),
        ("alpha", NAN),
        ("alpha of a bound", INF),
        ("beta", NAN),
        ("beta", -0.1),
        ("beta", 1.1),
        ("beta of a bound", NAN),
        ("kl_weight", INF),
        ("kl_weight", NAN),
        ("free_bits", -1.0),
        ("free_bits", NAN),
        ("free_bits of a KL", -1.0),
    ],
)
@every_path
def test_floats_out_of_range_are_refused(path, kind, number):
    with path(), pytest.raises(ValueError, match=rf"^{kind.split()[0]}\b.* must be .*; got {number}"):
        _loss_of(kind, number)()


@pytest.mark.parametrize("kind", KINDS)
@every_path
def test_what_is_no_number_is_refused(path, kind):
    name = kind.split()[0]
    for wrong, error in ((torch.zeros(2, 1), ValueError), (torch.tensor(1), TypeError), ("1", TypeError)):
        with path(), pytest.raises(error, match=rf"^{name} must"):
            _loss_of(kind, wrong)()
