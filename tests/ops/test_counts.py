"""Likelihoods of counts against mpmath, scipy and themselves: accuracy over the whole range, limits, draws."""

import math
from itertools import product

import mpmath
import pytest
import torch
from cases import ROWS, draw, is_counts, joined
from oracle import check
from scipy import stats
from torch import Tensor

import fastelbo
from fastelbo.likelihoods import LOG_THETA_LIMIT
from fastelbo.losses import likelihood_mean, likelihood_sample
from fastelbo.reference import COUNTS

inf, nan = float("inf"), float("nan")
COUNT_LIKELIHOODS = [name for name in ROWS if is_counts(name)]
every_likelihood = pytest.mark.parametrize("name", COUNT_LIKELIHOODS)
every_float = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)

# ----------------------------------------------------------------------------------------------------------------------
# Values and gradients against mpmath: each as exactly as its terms allow.

DIGITS = 60
XS = (0, 0.5, 1, 1.5, 2, 7, 9.75, 33, 100, 999.5, 1e4)
MEANS = (1e-3, 0.1, 1, 30, 1e4)
THETAS = tuple(10.0**e for e in range(-4, 10))
ZERO_LOGITS = (-20.0, -1.5, 0.3, 6.0, 40.0)

Exact = tuple[list[mpmath.mpf], list[mpmath.mpf]]  # log p and its gradients; how large the terms of each are


def _poisson(x: mpmath.mpf, log_rate: mpmath.mpf) -> Exact:
    """The gradients: by the log rate, by x."""
    rate, log_factorial, psi = mpmath.exp(log_rate), mpmath.loggamma(x + 1), mpmath.digamma(x + 1)
    values = [x * log_rate - rate - log_factorial, x - rate, log_rate - psi]
    # digamma has a root near 1.46, where its own terms are of size 1
    return values, [abs(x * log_rate) + rate + abs(log_factorial), x + rate, abs(log_rate) + max(abs(psi), 1)]


def _nb(x: mpmath.mpf, log_mean: mpmath.mpf, log_theta: mpmath.mpf) -> Exact:
    """The gradients: by log_mean, by log_theta, by x."""
    m, theta = mpmath.exp(log_mean), mpmath.exp(log_theta)
    log1p_ratio, psi, psi_theta = mpmath.log1p(m / theta), mpmath.digamma(x + theta), mpmath.digamma(theta)
    rising = (
        mpmath.loggamma(x + theta) - mpmath.loggamma(theta) - x * log_theta
    )  # of at most x^2 / theta where that is small
    log_factorial = mpmath.loggamma(x + 1)
    values = [
        rising - log_factorial - (x + theta) * log1p_ratio + x * log_mean,
        theta * (x - m) / (theta + m),
        theta * (psi - psi_theta - log1p_ratio + (m - x) / (theta + m)),
        psi - mpmath.digamma(x + 1) + log_mean - log_theta - log1p_ratio,
    ]
    of_theta = theta * (abs(psi) + abs(psi_theta) + log1p_ratio + abs(m - x) / (theta + m))
    terms = [
        abs(rising) + abs(log_factorial) + (x + theta) * log1p_ratio + abs(x * log_mean),
        theta * (x + m) / (theta + m),
        min(of_theta, (x + (x - m) ** 2) / theta),  # its leading terms where theta is large: no digit may cancel there
        abs(psi) + abs(mpmath.digamma(x + 1)) + abs(log_mean - log_theta) + log1p_ratio,
    ]
    return values, terms


def _zinb(x: mpmath.mpf, log_mean: mpmath.mpf, log_theta: mpmath.mpf, logit: mpmath.mpf) -> Exact:
    """The gradients: by log_mean, by log_theta, by the zero logit, by x."""
    (nb, *grads), (size, *sizes) = _nb(x, log_mean, log_theta)
    zero, rest = 1 / (1 + mpmath.exp(-logit)), 1 / (1 + mpmath.exp(logit))
    if x > 0:
        values = [mpmath.log(rest) + nb, grads[0], grads[1], -zero, grads[2]]
        return values, [abs(mpmath.log(rest)) + size, sizes[0], sizes[1], zero, sizes[2]]
    p = mpmath.exp(nb)
    q = zero + rest * p
    weight, slope = rest * p / q, zero * rest * (1 - p) / q
    values = [mpmath.log(q), weight * grads[0], weight * grads[1], slope, weight * grads[2]]
    # the weight has the relative error of exp(nb)
    terms = [
        abs(mpmath.log(q)),
        *(weight * s * (1 + abs(nb)) for s in sizes[:2]),
        slope,
        weight * sizes[2] * (1 + abs(nb)),
    ]
    return values, terms


FORMULAS = {"poisson": _poisson, "nb": _nb, "zinb": _zinb}
GRIDS = {
    "poisson": list(product(XS, MEANS)),
    "nb": list(product(XS, MEANS, THETAS)),
    "zinb": list(product((0, 0.5, 3, 1e3), (1e-3, 1, 300), THETAS[::3], ZERO_LOGITS)),
}


def _columns(name: str, dtype: torch.dtype) -> list[Tensor]:
    """x and the parameters, one element a row."""
    x, mean, *others = torch.tensor(GRIDS[name], dtype=torch.float64).T
    columns = [x, mean.log(), *(t.log() if i == 0 else t for i, t in enumerate(others))]
    return [c.to(dtype).requires_grad_() for c in columns]


def _found(name: str, x: Tensor, *parameters: Tensor) -> list[Tensor]:
    value = fastelbo.log_prob(joined(*parameters), x, likelihood=name)
    return [value.detach(), *torch.autograd.grad(value.sum(), [*parameters, x])]


@every_float
@pytest.mark.parametrize("name", FORMULAS)
def test_every_digit_that_the_terms_leave(name, dtype):
    columns = _columns(name, dtype)
    found = [t.tolist() for t in _found(name, *columns)]
    eps, rows = torch.finfo(dtype).eps, list(zip(*(c.tolist() for c in columns), strict=True))
    wrong = []
    with mpmath.workdps(DIGITS):
        for i, row in enumerate(rows):
            values, terms = FORMULAS[name](*map(mpmath.mpf, row))
            for j, (exact, size) in enumerate(zip(values, terms, strict=True)):
                error = float(abs(mpmath.mpf(found[j][i]) - exact))
                allowed = 4 * eps * float(max(size, abs(exact))) + torch.finfo(dtype).tiny
                if error > allowed or (j == 0 and dtype == torch.float64 and error > 1e-10):
                    wrong.append(
                        f"result {j} at {row}: {found[j][i]!r}, exactly {float(exact)!r}; {error / allowed:.2g}"
                    )
    assert not wrong, f"{len(wrong)} of {len(rows)} rows:\n" + "\n".join(wrong[:20])


EDGES = {  # log of float32's and of float64's smallest mean or theta; beyond the last, log p is continued
    torch.float32: (-80.0, -61.0, -45.0, -25.5, 0.0, 10.0),
    torch.float64: (-300.0, -151.0, -101.0, -59.0, 0.0, 10.0),
}
FEW = (1e-42, 1e-20, 1e-3, 0.07, 0.6)  # counts below 1


@every_float
@pytest.mark.parametrize("name", FORMULAS)
def test_means_and_thetas_at_the_edges_of_their_range(name, dtype):
    """x, the mean and theta small and large, each beside each. Gradients of less than 1 are as exact as those of 1."""
    edges = EDGES[dtype]
    logs = [*product(edges, edges), (-1e10, -1e10), (-30.0, -40.0), (-20.0, -30.0), (-24.0, -26.0), (-24.0, -24.0)]
    counts = (*FEW, 1, 3, 1e3)
    if name == "poisson":
        rows = [(x, log) for x in (*counts, 1e12, 1e20) for log in (*edges, 5.0, 57.0, 80.0)]
    else:
        rows = [(x, *pair) for x in (0, *counts) for pair in logs if x >= 1 or pair[1] > -1e3]
    rows = [(*row, -1.5) if name == "zinb" else row for row in rows]
    columns = [c.clone().requires_grad_() for c in torch.tensor(rows, dtype=torch.float64).to(dtype).T]
    found, info = [t.tolist() for t in _found(name, *columns)], torch.finfo(dtype)
    wrong = []
    with mpmath.workdps(350):
        for i, row in enumerate(zip(*(c.tolist() for c in columns), strict=True)):
            values, terms = FORMULAS[name](*map(mpmath.mpf, row))
            for j, (exact, size) in enumerate(zip(values, terms, strict=True)):
                if abs(exact) > info.max:
                    assert found[j][i] == math.copysign(inf, exact)
                    continue
                allowed = 4 * info.eps * float(max(size, abs(exact), int(j > 0))) + info.tiny
                if not abs(mpmath.mpf(found[j][i]) - exact) <= allowed:
                    wrong.append(
                        f"result {j} at {row}: {found[j][i]!r}, exactly {float(exact)!r}; allowed {allowed:.2g}"
                    )
    assert not wrong, f"{len(wrong)}:\n" + "\n".join(wrong[:20])


@every_float
def test_nan_in_any_argument_is_nan_in_every_gradient(dtype):
    """Of zinb as in eager PyTorch, so that a guard by parameter sees it."""
    for x in (0.0, 0.3, 2.0):
        for bad in range(4):
            given = [torch.tensor([[t]], dtype=dtype) for t in (x, 0.3, 0.2, -0.4)]
            given[bad].fill_(nan)
            assert all(t.isnan() for t in _found("zinb", *(t.requires_grad_() for t in given)))


@every_likelihood
@every_float
def test_means_of_any_size(name, dtype):
    for log_mean in (-80.0, -45.0, -20.0, 20.0, 42.0, 80.0):
        x, (first, *others) = _inputs(name, (4, 20), dtype)
        given = [torch.full_like(first, log_mean).requires_grad_(), *others]
        check(lambda x, *given: fastelbo.log_prob(joined(*given), x, likelihood=name), x, *given, label=f"{log_mean}")


@every_float
def test_a_vanishing_theta(dtype):
    """log p(x > 0) = log theta - log x, but for terms like theta log theta and x theta / mean, below 1e-8."""
    x, log_mean = torch.tensor([1.0, 3.0, 50.0], dtype=dtype), torch.tensor([2.0, -1.0, -1.0], dtype=dtype)
    for log_theta in (-24.0, -30.0, -59.0, -65.0, -200.0):
        theta = torch.full_like(x, log_theta).requires_grad_()
        value = fastelbo.log_prob((log_mean, theta), x, likelihood="nb")
        off = 1e-8 + 4 * torch.finfo(dtype).eps * abs(log_theta)
        torch.testing.assert_close(value.detach(), log_theta - x.log(), rtol=0, atol=off)
        torch.testing.assert_close(*torch.autograd.grad(value.sum(), theta), torch.ones_like(x), rtol=0, atol=off)


@pytest.mark.parametrize("theta", [1e-2, 0.7, 5.0, 300.0])
def test_agrees_with_scipy(theta):
    x = torch.arange(0, 2000, 7, dtype=torch.float64)
    for mean in (0.01, 1.0, 250.0):
        log_mean = torch.full_like(x, math.log(mean))
        ours = fastelbo.log_prob((log_mean, torch.tensor(theta, dtype=torch.float64).log()), x, likelihood="nb")
        expected = torch.from_numpy(stats.nbinom.logpmf(x.numpy(), theta, theta / (theta + mean)))
        torch.testing.assert_close(ours, expected, rtol=1e-10, atol=1e-10)
        ours = fastelbo.log_prob(log_mean, x, likelihood="poisson")
        torch.testing.assert_close(
            ours, torch.from_numpy(stats.poisson.logpmf(x.numpy(), mean)), rtol=1e-10, atol=1e-10
        )


# ----------------------------------------------------------------------------------------------------------------------
# Distributions.


def _parameters(name: str, dtype: torch.dtype = torch.float64) -> tuple[Tensor, ...]:
    """Of three elements, one of them with a theta that all rows share."""
    given = (torch.tensor([0.2, 1.5, -1.0]), torch.tensor([-0.7, 0.5, 3.0]), torch.tensor([-1.0, 0.4, 2.0]))
    return tuple(t.to(dtype) for t in given[: {"poisson": 1, "nb": 2, "zinb": 3}[name]])


@every_likelihood
def test_probabilities_add_up_to_1_and_give_the_mean(name):
    x = torch.arange(3000, dtype=torch.int32)[:, None].expand(3000, 3)
    first, *others = _parameters(name)
    terms = [(first[i].expand(3000, 1), *(t[i] for t in others)) for i in range(3)]
    p = torch.stack([fastelbo.log_prob(joined(*t), x[:, :1], likelihood=name).exp() for t in terms], 1)
    torch.testing.assert_close(p.sum(0), torch.ones(3).double(), rtol=1e-12, atol=0)
    mean = likelihood_mean(joined(first, *others), name)
    torch.testing.assert_close((p * x).sum(0), mean, rtol=1e-9, atol=0)


@every_likelihood
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_draws_have_the_mean_variance_and_zeros_of_the_distribution(name, dtype):
    parameters, count = _parameters(name, dtype), 200_000
    first, *others = (t.double() for t in parameters)
    mean = first.exp()
    variance = mean + mean**2 * torch.exp(-others[0]) if others else mean
    p0 = fastelbo.log_prob(
        joined(first[None].T, *(t[None].T for t in others[:1])),
        torch.zeros(3, 1).double(),
        likelihood="nb" if others else "poisson",
    ).exp()
    if len(others) == 2:
        keep = torch.sigmoid(-others[1])
        p0, variance, mean = 1 - keep + keep * p0, keep * (variance + (1 - keep) * mean**2), keep * mean
    recon = joined(parameters[0].expand(count, 3), *parameters[1:])
    x = likelihood_sample(recon, name, generator=torch.Generator().manual_seed(0))
    assert x.dtype == dtype and x.shape == (count, 3)
    x = x.double()
    assert (x >= 0).all() and (x == x.round()).all()
    rounding = torch.finfo(dtype).eps * mean if dtype == torch.bfloat16 else 0  # large counts are rounded
    assert ((x.mean(0) - mean).abs() < 4 * (variance / count).sqrt() + rounding).all()
    assert ((x == 0).double().mean(0) - p0).abs().max() < 4 * (0.25 / count) ** 0.5
    fourth = ((x - mean) ** 4).mean(0)
    assert ((x.var(0) - variance).abs() < 5 * (fourth / count).sqrt() + 4 * rounding * mean).all()
    again = likelihood_sample(recon, name, generator=torch.Generator().manual_seed(0))
    assert torch.equal(again.double(), x)


def test_draws_in_half_precision_round_no_mean():
    """exp(4.65625) is 105.24, and 105 in bfloat16; counts up to 256 are whole there."""
    log_mean, log_theta = torch.tensor([4.65625, 40.0], dtype=torch.bfloat16)
    x = likelihood_sample((log_mean.expand(200_000), log_theta), "nb").double()
    mean = log_mean.double().exp()  # and the variance, at this theta
    assert (x.mean() - mean).abs() < 5 * (mean / len(x)).sqrt() < 0.12


@every_float
def test_a_large_theta_is_the_poisson(dtype):
    x = torch.tensor([0.0, 1.0, 7.0, 300.0, 0.5], dtype=dtype)
    log_mean = torch.tensor([0.5, -3.0, 2.0, 5.7, 0.0], dtype=dtype, requires_grad=True)
    expected = fastelbo.log_prob(log_mean, x, likelihood="poisson")
    (slope,) = torch.autograd.grad(expected.sum(), log_mean)
    for log_theta in (LOG_THETA_LIMIT, 1e3, inf):
        theta = torch.full_like(x, log_theta).requires_grad_()
        value = fastelbo.log_prob((log_mean, theta), x, likelihood="nb")
        grads = torch.autograd.grad(value.sum(), [log_mean, theta])
        torch.testing.assert_close(value, expected, rtol=8 * torch.finfo(dtype).eps, atol=0)
        torch.testing.assert_close(grads[0], slope, rtol=8 * torch.finfo(dtype).eps, atol=0)
        assert grads[1].abs().max() < 1e-12
        far = torch.full_like(x, -inf)
        zinb = fastelbo.log_prob((log_mean, theta, far.clamp(min=-1e4)), x, likelihood="zinb")
        torch.testing.assert_close(zinb, expected, rtol=8 * torch.finfo(dtype).eps, atol=0)


@every_float
def test_a_certain_zero(dtype):
    """A mean of 0 with x = 0, and a zero logit at either end."""
    log_mean, log_theta = torch.full((2,), -inf, dtype=dtype), torch.zeros(2, dtype=dtype)
    x = torch.tensor([0.0, 1.0], dtype=dtype)
    for parameters in ((log_mean,), (log_mean, log_theta)):
        name = ("poisson", "nb")[len(parameters) - 1]
        value = fastelbo.log_prob(joined(*parameters), x, likelihood=name).tolist()
        assert value == [pytest.approx(0, abs=1e-15), -inf]
    ends = torch.tensor([1e4, 1e4], dtype=dtype)
    assert fastelbo.log_prob((log_theta, log_theta, ends), x, likelihood="zinb").tolist()[0] == 0.0
    expected = fastelbo.log_prob((log_theta, log_theta), x, likelihood="nb")
    torch.testing.assert_close(fastelbo.log_prob((log_theta, log_theta, -ends), x, likelihood="zinb"), expected)


# ----------------------------------------------------------------------------------------------------------------------
# What x may be.


def _inputs(name: str, shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> tuple[Tensor, list[Tensor]]:
    """x and the parameters."""
    recon, x, *others = draw((name, False), shape, None, dtype)
    return x.detach(), [recon, *(t for t in others if t is not None)]


@every_likelihood
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_integers_are_the_counts_themselves(name, dtype):
    x, parameters = _inputs(name, (6, 300), dtype)
    x = x.round().clamp(max=30_000).to(torch.int64)
    x[0, :4] = torch.tensor([0, 1, 255, 32_767])
    compute = torch.float64 if dtype == torch.float64 else torch.float32
    expected = _found(name, x.to(compute).requires_grad_(), *parameters)[:-1]
    for kind in (*COUNTS, torch.uint8):
        data = x.to(kind)
        if kind == torch.uint8:
            expected = _found(name, data.to(compute).requires_grad_(), *parameters)[:-1]
        for laid in (data, data.T.contiguous().T):
            value = fastelbo.log_prob(joined(*parameters), laid, likelihood=name)
            found = [value.detach(), *torch.autograd.grad(value.sum(), parameters)]
            for a, b in zip(found, expected, strict=True):
                tolerance = 16 * torch.finfo(a.dtype).eps
                torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


@every_likelihood
def test_integers_that_no_float_holds(name):
    for x in (torch.tensor([2**24 + 1, 2**31 - 1], dtype=torch.int32), torch.tensor([2**40 + 1, 2**24 + 1])):
        for dtype in (torch.float32, torch.float64):
            parameters = [torch.full((2,), t, dtype=dtype) for t in (15.0, 2.0, 0.3)[: len(_parameters(name))]]
            value = fastelbo.log_prob(joined(*parameters), x, likelihood=name)
            expected = fastelbo.log_prob(joined(*parameters), x.to(dtype), likelihood=name)
            torch.testing.assert_close(value, expected, rtol=0, atol=0)


@every_likelihood
@every_float
def test_what_is_no_count_has_probability_0(name, dtype):
    """-inf with a gradient of 0, in a row of others too; NaN stays NaN; under a mask neither is read."""
    for bad, expected in ((-1.0, -inf), (-0.5, -inf), (-inf, -inf), (inf, -inf), (nan, nan)):
        x, parameters = _inputs(name, (3, 41), dtype)
        clean = _found(name, x.clone().requires_grad_(), *parameters)
        x[1, 17] = bad
        value, *grads = _found(name, x.clone().requires_grad_(), *parameters)
        assert value[1].item() == expected or (math.isnan(expected) and value[1].isnan())
        assert torch.equal(value[[0, 2]], clean[0][[0, 2]])
        if expected == -inf:
            assert all(g[1, 17] == 0 for g in grads)
        keep = torch.ones(3, 41, dtype=torch.bool)
        keep[1, 17] = False
        masked = fastelbo.log_prob(joined(*parameters), x, likelihood=name, mask=keep)
        assert masked.isfinite().all()
        for g, c in zip(torch.autograd.grad(masked.sum(), parameters), clean[1:], strict=False):
            tolerance = 4 * torch.finfo(dtype).eps
            torch.testing.assert_close(g[keep], c[keep], rtol=tolerance, atol=tolerance)
            assert g[1, 17] == 0


@every_likelihood
@pytest.mark.parametrize("kind", COUNTS, ids=str)
def test_negative_integers_have_probability_0(name, kind):
    x, parameters = _inputs(name, (3, 5))
    x = x.to(kind)
    x[1, 2] = -1
    value = fastelbo.log_prob(joined(*parameters), x, likelihood=name)
    assert value[1] == -inf and value[[0, 2]].isfinite().all()


@every_likelihood
def test_types_that_do_not_fit(name):
    _, parameters = _inputs(name, (3, 5))
    for kind, came in ((torch.bool, "bool"), (torch.int8, "int8"), (torch.complex64, "complex64")):
        with pytest.raises(TypeError, match=rf"x must be .*(int64|bool).*; got {came}"):
            fastelbo.log_prob(joined(*parameters), torch.ones(3, 5).to(kind), likelihood=name)
    for kind in COUNTS:
        with pytest.raises(TypeError, match=r"x must be a float type, uint8 \(read as x / 255\) or bool; got int"):
            fastelbo.bernoulli_log_prob(parameters[0], torch.ones(3, 5, dtype=kind))


@pytest.mark.parametrize("count, name", [(1, "nb"), (3, "nb"), (2, "zinb"), (2, "poisson")])
def test_another_number_of_tensors(count, name):
    recon = joined(*[torch.zeros(2, 3)] * count)
    came = {1: "one tensor", 2: "a pair", 3: "three tensors"}[count]
    with pytest.raises(ValueError, match=rf'recon must be .* for likelihood "{name}"; got {came}'):
        fastelbo.log_prob(recon, torch.ones(2, 3), likelihood=name)
    for function in (likelihood_mean, likelihood_sample):
        with pytest.raises(ValueError, match=f"recon must hold the parameters .* got {count} tensors"):
            function(recon, name)


def test_the_third_tensor_is_named():
    zeros = torch.zeros(2, 3)
    for third, error, message in (
        (
            torch.zeros(2, 4),
            ValueError,
            r"the third tensor of recon must broadcast to the shape \(2, 3\).*got \(2, 4\)",
        ),
        (zeros.long(), TypeError, "the third tensor of recon must be float32, .*; got int64"),
        (zeros.double(), TypeError, "the third tensor of recon is float64 but the first is float32"),
        (None, TypeError, "recon must be a tensor, or a tuple of two or three tensors"),
    ):
        with pytest.raises(error, match=message):
            fastelbo.log_prob((zeros, zeros, third), torch.ones(2, 3), likelihood="zinb")
    with pytest.raises(TypeError, match="recon must be a tensor, or a tuple of two or three tensors"):
        fastelbo.log_prob((zeros,) * 4, torch.ones(2, 3), likelihood="zinb")
