"""Likelihoods of counts against mpmath, scipy and themselves: accuracy over the whole range, limits, draws."""

import math
from collections.abc import Callable
from contextlib import nullcontext
from itertools import product

import mpmath
import pytest
import torch
from cases import ROWS, draw, is_counts, joined
from oracle import check
from scipy import stats
from torch import Tensor

import fastelbo
from fastelbo.likelihoods import LOG_THETA_LIMIT, SCVI_ADDED, SHIFTED
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


def _by_numbers(exact: Callable[..., Exact]) -> Callable[..., Exact]:
    """Of the mean and theta: the gradients by their logarithms over them."""

    def formula(x: mpmath.mpf, mean: mpmath.mpf, theta: mpmath.mpf, *others: mpmath.mpf) -> Exact:
        of_logs = exact(x, mpmath.log(mean), mpmath.log(theta), *others)
        return tuple([v, m / mean, t / theta, *rest] for v, m, t, *rest in of_logs)  # type: ignore[return-value]

    return formula


def _nb_logits(x: mpmath.mpf, theta: mpmath.mpf, logit: mpmath.mpf) -> Exact:
    """The gradients: by theta, by the logit, by x."""
    (value, by_mean, by_theta, by_x), (size, of_mean, of_theta, of_x) = _nb(
        x, logit + mpmath.log(theta), mpmath.log(theta)
    )
    return [value, (by_theta + by_mean) / theta, by_mean, by_x], [
        size,
        (of_theta + of_mean) / theta,
        of_mean,
        of_x + abs(logit) + abs(mpmath.log(theta)),
    ]


def _gamma_poisson(x: mpmath.mpf, concentration: mpmath.mpf, rate: mpmath.mpf) -> Exact:
    """The gradients: by the concentration, by the rate, by x."""
    (value, by_theta, by_logit, by_x), (size, of_theta, of_logit, of_x) = _nb_logits(
        x, concentration, -mpmath.log(rate)
    )
    return [value, by_theta, -by_logit / rate, by_x], [size, of_theta, of_logit / rate, of_x]


def _nb_mixture(x: mpmath.mpf, mean1: mpmath.mpf, mean2: mpmath.mpf, theta: mpmath.mpf, logit: mpmath.mpf) -> Exact:
    """The gradients: by the means, by theta, by the mixture logit, by x."""
    (a, *of_a), (size_a, *sizes_a) = FORMULAS["nb_mean"](x, mean1, theta)
    (b, *of_b), (size_b, *sizes_b) = FORMULAS["nb_mean"](x, mean2, theta)
    prior, rest = 1 / (1 + mpmath.exp(-logit)), 1 / (1 + mpmath.exp(logit))
    w = 1 / (1 + mpmath.exp(-logit - a + b))
    v = 1 / (1 + mpmath.exp(logit + a - b))
    grads = [w * of_a[0], v * of_b[0], w * of_a[1] + v * of_b[1], w - prior, w * of_a[2] + v * of_b[2]]
    # a responsibility has the error of the exponent; below exp(-87) it may be 0
    off = 1 + abs(logit) + size_a + size_b
    w, v = w + mpmath.exp(-70), v + mpmath.exp(-70)
    sizes = [
        w * abs(of_a[0]) * v * off + w * sizes_a[0],
        v * abs(of_b[0]) * w * off + v * sizes_b[0],
        w * v * off * (abs(of_a[1]) + abs(of_b[1])) + w * sizes_a[1] + v * sizes_b[1],
        w * v * off + abs(w - prior) * max(1, abs(logit)),
        w * v * off * (abs(of_a[2]) + abs(of_b[2])) + w * sizes_a[2] + v * sizes_b[2],
    ]
    value = mpmath.log(prior * mpmath.exp(a) + rest * mpmath.exp(b))
    return [value, *grads], [size_a + size_b + abs(mpmath.log(prior)) + abs(mpmath.log(rest)), *sizes]


def _beta_binomial(x: mpmath.mpf, a: mpmath.mpf, b: mpmath.mpf, n: mpmath.mpf) -> Exact:
    """The gradients: by the concentrations, by x."""
    y, s = n - x, a + b

    def rising(k: mpmath.mpf, z: mpmath.mpf) -> mpmath.mpf:
        return mpmath.loggamma(k + z) - mpmath.loggamma(z) - k * mpmath.log(z)

    def steep(k: mpmath.mpf, z: mpmath.mpf) -> mpmath.mpf:
        return mpmath.digamma(k + z) - mpmath.digamma(z)

    choose = mpmath.loggamma(n + 1) - mpmath.loggamma(x + 1) - mpmath.loggamma(y + 1)
    odds = [x * mpmath.log(a / s), y * mpmath.log(b / s)]
    risings = [rising(x, a), rising(y, b), -rising(n, s)]
    psi = [mpmath.digamma(x + 1), mpmath.digamma(y + 1), mpmath.digamma(x + a), mpmath.digamma(y + b)]
    values = [
        choose + sum(odds) + sum(risings),
        steep(x, a) - steep(n, s),
        steep(y, b) - steep(n, s),
        psi[1] - psi[0] + psi[2] - psi[3],
    ]
    terms = [
        abs(choose) + sum(map(abs, odds)) + sum(map(abs, risings)),
        steep(x, a) + steep(n, s),
        steep(y, b) + steep(n, s),
        sum(max(abs(p), 1) for p in psi),
    ]
    return values, terms


FORMULAS = {
    "poisson": _poisson,
    "nb": _nb,
    "zinb": _zinb,
    "nb_mean": _by_numbers(_nb),
    "nb_logits": _nb_logits,
    "gamma_poisson": _gamma_poisson,
    "zinb_mean": _by_numbers(_zinb),
    "nb_mixture": _nb_mixture,
    "beta_binomial": _beta_binomial,
}
LOGS = ("poisson", "nb", "zinb")  # of which the mean and theta are given
TOTALS = (1, 2, 5, 30, 1000)
GRIDS = {
    "poisson": list(product(XS, MEANS)),
    "nb": list(product(XS, MEANS, THETAS)),
    "zinb": list(product((0, 0.5, 3, 1e3), (1e-3, 1, 300), THETAS[::3], ZERO_LOGITS)),
    "nb_logits": [(x, theta, math.log(mean / theta)) for x, mean, theta in product(XS, MEANS, THETAS)],
    "gamma_poisson": [(x, theta, theta / mean) for x, mean, theta in product(XS, MEANS, THETAS)],
    "nb_mixture": list(product((0, 0.5, 3, 1e3), (1e-3, 1, 300), (0.5, 1.01), THETAS[::3], ZERO_LOGITS)),
    "beta_binomial": [
        (x, a, b, n)
        for n in (0, *TOTALS)
        for x in {0, 0.5, 1, n // 3, n - 1, n}
        if 0 <= x <= n
        for a in THETAS
        for b in THETAS[::3]
    ],
}
GRIDS |= {"nb_mean": GRIDS["nb"], "zinb_mean": GRIDS["zinb"]}


def _columns(name: str, dtype: torch.dtype) -> list[Tensor]:
    """x and the parameters, one element a row."""
    x, *others = torch.tensor(GRIDS[name], dtype=torch.float64).T
    columns = [x, *(t.log() if i < 2 and name in LOGS else t for i, t in enumerate(others))]
    return [c.to(dtype).requires_grad_(c is not others[-1] or name != "beta_binomial") for c in columns]


def _found(name: str, x: Tensor, *parameters: Tensor) -> list[Tensor]:
    value = fastelbo.log_prob(joined(*parameters), x, likelihood=name)
    wanted = [t for t in (*parameters, x) if t.requires_grad]
    return [value.detach(), *torch.autograd.grad(value.sum(), wanted)]


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
@pytest.mark.parametrize("name", ["poisson", "nb", "zinb", "nb_mean", "zinb_mean"])
def test_means_and_thetas_at_the_edges_of_their_range(name, dtype):
    """x, the mean and theta small and large, each beside each. Gradients of less than 1 are as exact as those of 1."""
    edges = EDGES[dtype]
    logs = [*product(edges, edges), (-1e10, -1e10), (-30.0, -40.0), (-20.0, -30.0), (-24.0, -26.0), (-24.0, -24.0)]
    counts = (*FEW, 1, 3, 1e3)
    if name == "poisson":
        rows = [(x, log) for x in (*counts, 1e12, 1e20) for log in (*edges, 5.0, 57.0, 80.0)]
    else:
        rows = [(x, *pair) for x in (0, *counts) for pair in logs if x >= 1 or pair[1] > -1e3]
    if name not in LOGS:
        rows = [(x, math.exp(mean), math.exp(theta)) for x, mean, theta in rows if mean > -1e3]
    rows = [(*row, -1.5) if name.startswith("zinb") else row for row in rows]
    columns = [c.clone().requires_grad_() for c in torch.tensor(rows, dtype=torch.float64).to(dtype).T]
    found, info = [t.tolist() for t in _found(name, *columns)], torch.finfo(dtype)
    wrong = []
    with mpmath.workdps(120 if dtype == torch.float32 else 350):
        for i, row in enumerate(zip(*(c.tolist() for c in columns), strict=True)):
            values, terms = FORMULAS[name](*map(mpmath.mpf, row))
            for j, (exact, size) in enumerate(zip(values, terms, strict=True)):
                if abs(exact) > info.max:
                    assert found[j][i] == math.copysign(inf, exact)
                    continue
                nothing = info.tiny if name in LOGS else info.tiny**0.8  # quotients of theta and the mean are bounded
                allowed = 4 * info.eps * float(max(size, abs(exact), int(j > 0))) + nothing
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
    sizes = (-80.0, -45.0, -20.0, 20.0, 42.0, 80.0)
    # 1 / theta^2 of the twin's gradient must not overflow in float32
    if name in ("nb_logits", "gamma_poisson", "beta_binomial"):
        sizes = (-40.0, -20.0, 20.0, 42.0)
    for log_mean in sizes:
        x, (first, *others) = _inputs(name, (4, 20), dtype)
        mean = log_mean if name in LOGS else math.exp(log_mean)
        given = [torch.full_like(first, mean).requires_grad_(), *others]
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
    """Of three elements."""
    log_mean, log_theta, logits = [0.2, 1.5, -1.0], [-0.7, 0.5, 3.0], [-1.0, 0.4, 2.0]
    mean, theta = ([math.exp(v) for v in values] for values in (log_mean, log_theta))
    given = {
        "poisson": [log_mean],
        "nb": [log_mean, log_theta],
        "zinb": [log_mean, log_theta, logits],
        "nb_mean": [mean, theta],
        "nb_logits": [theta, logits],
        "gamma_poisson": [theta, mean],
        "zinb_mean": [mean, theta, logits],
        "nb_mixture": [mean, [4.0, 0.7, 0.1], theta, logits],
        "beta_binomial": [mean, theta, [12.0, 30.0, 2.0]],
    }[name]
    return tuple(torch.tensor(values).to(dtype) for values in given)


def _moments(name: str, parameters: list[Tensor]) -> tuple[Tensor, Tensor]:
    """The mean and the variance."""
    first, *others = parameters
    if name in LOGS:
        first, others = first.exp(), [t.exp() if i == 0 else t for i, t in enumerate(others)]
    if name == "beta_binomial":
        b, n = others
        p, s = first / (first + b), first + b
        return n * p, n * p * (1 - p) * (s + n) / (s + 1)
    if name == "poisson":
        return first, first
    if name == "nb_logits":
        first, others = first * others[0].exp(), [first]
    if name == "gamma_poisson":
        first, others = first / others[0], [first]
    if name == "nb_mixture":
        second, theta, logits = others
        w = torch.sigmoid(logits)
        mean = w * first + (1 - w) * second
        squares = [m + m**2 / theta + m**2 for m in (first, second)]
        return mean, w * squares[0] + (1 - w) * squares[1] - mean**2
    variance = first + first**2 / others[0]
    if len(others) == 1:
        return first, variance
    keep = torch.sigmoid(-others[1])
    return keep * first, keep * (variance + (1 - keep) * first**2)


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
    wide = [t.double() for t in parameters]
    mean, variance = _moments(name, wide)
    zero = torch.zeros(3).double()
    p0 = fastelbo.log_prob(joined(*wide), zero, likelihood=name, reduce=False).exp()
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


def _rounding(name: str, x: Tensor, parameters: list[Tensor]) -> Tensor:
    """The relative error of the gradients in units of eps [..., D], where a compiler fuses other products in the loop
    for another kind of x. The responsibilities of a mixture have that of a difference of two log p."""
    if name != "nb_mixture":
        return torch.ones(x.shape)
    first, second, theta, _, counts = (t.detach().double().reshape(-1, 1) for t in (*parameters, x))
    a, b = (fastelbo.log_prob((mean, theta), counts, likelihood="nb_mean").abs() for mean in (first, second))
    return (1 + a + b).view_as(x)


def _assert_rounded(found: Tensor, expected: Tensor, units: Tensor | int) -> None:
    """Equal but for so many eps, relative, or absolute where that is more; of one dtype and shape."""
    assert (found.dtype, found.shape) == (expected.dtype, expected.shape)
    allowed = units * torch.finfo(found.dtype).eps * expected.double().abs().clamp_min(1)
    off = (found.double() - expected.double()).abs() - allowed
    assert (off <= 0).all(), f"{off.max():.1e} beyond what is allowed"


@every_likelihood
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_integers_are_the_counts_themselves(name, dtype):
    x, parameters = _inputs(name, (6, 300), dtype)
    x = x.round().clamp(max=30_000).to(torch.int64)
    x[0, :4] = torch.tensor([0, 1, 255, 32_767])
    learned = [t for t in parameters if t.requires_grad]
    if len(learned) < len(parameters):  # of so many trials
        parameters[-1] = parameters[-1] + 33_000
    compute = torch.float64 if dtype == torch.float64 else torch.float32
    expected, units = _found(name, x.to(compute).requires_grad_(), *parameters)[:-1], _rounding(name, x, parameters)
    for kind in (*COUNTS, torch.uint8):
        data = x.to(kind)
        if kind == torch.uint8:
            expected = _found(name, data.to(compute).requires_grad_(), *parameters)[:-1]
            units = _rounding(name, data, parameters)
        for laid in (data, data.T.contiguous().T):
            value = fastelbo.log_prob(joined(*parameters), laid, likelihood=name)
            found = [value.detach(), *torch.autograd.grad(value.sum(), learned)]
            _assert_rounded(found[0], expected[0], 16)
            for a, b in zip(found[1:], expected[1:], strict=True):
                _assert_rounded(a, b, 16 * units)


@every_likelihood
def test_integers_that_no_float_holds(name):
    for x in (torch.tensor([2**24 + 1, 2**31 - 1], dtype=torch.int32), torch.tensor([2**40 + 1, 2**24 + 1])):
        for dtype in (torch.float32, torch.float64):
            values = {"nb_mixture": (15.0, 7.0, 2.0, 0.3), "beta_binomial": (15.0, 2.0, 2.0**41)}
            values = values.get(name, (15.0, 2.0, 0.3))[: len(_parameters(name))]
            parameters = [torch.full((2,), t, dtype=dtype) for t in values]
            value = fastelbo.log_prob(joined(*parameters), x, likelihood=name)
            expected = fastelbo.log_prob(joined(*parameters), x.to(dtype), likelihood=name)
            torch.testing.assert_close(value, expected, rtol=0, atol=0)


@every_likelihood
@every_float
def test_what_is_no_count_has_probability_0(name, dtype):
    """-inf with a gradient of 0, in a row of others too; NaN stays NaN; under a mask neither is read."""
    for bad, expected in ((-1.0, -inf), (-0.5, -inf), (-inf, -inf), (inf, -inf), (nan, nan)):
        x, parameters = _inputs(name, (3, 41), dtype)
        clean, units = _found(name, x.clone().requires_grad_(), *parameters), _rounding(name, x, parameters)
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
        learned = [t for t in parameters if t.requires_grad]
        for g, c in zip(torch.autograd.grad(masked.sum(), learned), clean[1:], strict=False):
            _assert_rounded(g[keep], c[keep], 4 * units[keep])
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


@pytest.mark.parametrize(
    "count, name",
    [(1, "nb"), (3, "nb"), (2, "zinb"), (2, "poisson"), (4, "zinb_mean"), (3, "nb_mixture"), (2, "beta_binomial")],
)
def test_another_number_of_tensors(count, name):
    recon = joined(*[torch.zeros(2, 3)] * count)
    came = {1: "one tensor", 2: "a pair", 3: "three tensors", 4: "four tensors"}[count]
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
        (None, TypeError, "recon must be a tensor, or a tuple of two to four tensors"),
    ):
        with pytest.raises(error, match=message):
            fastelbo.log_prob((zeros, zeros, third), torch.ones(2, 3), likelihood="zinb")
    with pytest.raises(TypeError, match="recon must be a tensor, or a tuple of two to four tensors"):
        fastelbo.log_prob((zeros,) * 5, torch.ones(2, 3), likelihood="zinb")


# ----------------------------------------------------------------------------------------------------------------------
# A number added to means and thetas, as scvi-tools does.

SHIFTS = {"scvi_nb": ("nb_mean", 2), "scvi_zinb": ("zinb_mean", 2), "scvi_nb_mixture": ("nb_mixture", 3)}


def _shift(name: str, parameters: list[Tensor]) -> list[Tensor]:
    return [t + SCVI_ADDED if i < SHIFTS[name][1] else t for i, t in enumerate(parameters)]


@pytest.mark.parametrize("name", SHIFTED)
def test_shifted_names_are_the_plain_ones_of_larger_numbers(name):
    """Values, gradients, and second derivatives; means and thetas of the size of what is added, too."""
    of, count = SHIFTS[name]
    x, parameters = _inputs(of, (3, 40), torch.float64)
    with torch.no_grad():
        for t in parameters[:count]:
            t[0] *= 1e-8
            t[1, ::3] = 0
    results = []
    for likelihood, shifted in ((name, parameters), (of, _shift(name, parameters))):
        value = fastelbo.log_prob(joined(*shifted), x, likelihood=likelihood, reduce=False)
        first = torch.autograd.grad(value.sum(), parameters, create_graph=True)
        second = torch.autograd.grad(sum((1 + i) * g.sum() for i, g in enumerate(first)), parameters)
        plain = torch.autograd.grad(fastelbo.log_prob(joined(*shifted), x, likelihood=likelihood).sum(), parameters)
        results.append([value, *first, *second, *plain])
    torch.testing.assert_close(*results, rtol=1e-14, atol=1e-13)


@pytest.mark.parametrize("name", SHIFTED)
def test_shifted_names_in_the_losses_the_mean_and_draws(name):
    of, _ = SHIFTS[name]
    x, parameters = _inputs(of, (3, 40), torch.float64)
    mu, log_ratio = torch.zeros(3, 2).double(), torch.zeros(1, 3).double()
    recon, plain = joined(*parameters), joined(*_shift(name, parameters))
    several, plain_several = (
        joined(*(t[None] for t in parameters)),
        joined(*(t[None] for t in _shift(name, parameters))),
    )
    for loss, a, b, rest in (
        (fastelbo.elbo_loss, recon, plain, (mu, mu)),
        (fastelbo.iwae_loss, several, plain_several, (log_ratio,)),
    ):
        torch.testing.assert_close(
            loss(a, x, *rest, likelihood=name), loss(b, x, *rest, likelihood=of), rtol=1e-14, atol=0
        )
    assert torch.equal(likelihood_mean(recon, name), likelihood_mean(recon, of))
    draws = [likelihood_sample(recon, of, generator=torch.Generator().manual_seed(0)) for of in (name, of)]
    assert torch.equal(*draws)


@pytest.mark.parametrize("name", [*SHIFTED, "beta_binomial"])
def test_new_names_compile(name):
    of = SHIFTS[name][0] if name in SHIFTS else name
    x, parameters = _inputs(of, (3, 40))
    learned = [t for t in parameters if t.requires_grad]

    def function(*parameters: Tensor) -> Tensor:
        return fastelbo.log_prob(parameters, x, likelihood=name).sin().sum()

    results = []
    for call in (function, torch.compile(function, fullgraph=True, backend="aot_eager")):
        value = call(*parameters)
        results.append([value, *torch.autograd.grad(value, learned)])
    torch.testing.assert_close(*results)


# ----------------------------------------------------------------------------------------------------------------------
# Means and thetas of 0, and below.


@every_float
def test_what_a_mean_or_theta_of_0_makes_impossible(dtype):
    zero, one, far = (torch.full((1,), v, dtype=dtype) for v in (0.0, 1.0, -1e4))
    others = {"nb_mean": (), "zinb_mean": (far,), "nb_mixture": (far,), "scvi_nb": (), "scvi_zinb": (far,)}
    for name, rest in others.items():
        for mean, theta in ((zero, one), (one, zero), (zero, zero)):
            given = (mean, *((mean,) if name == "nb_mixture" else ()), theta, *rest)
            value = fastelbo.log_prob(given, one, likelihood=name, reduce=False).item()
            at_zero = fastelbo.log_prob(given, zero, likelihood=name, reduce=False).item()
            assert at_zero == pytest.approx(0, abs=1e-6)
            if not name.startswith("scvi"):
                assert value == -inf
            elif mean is zero and theta is one:  # m / (1 + m)^2
                assert value == pytest.approx(math.log(SCVI_ADDED), rel=1e-6)
            else:
                assert -60 < value < math.log(2e-8)


@every_float
def test_a_negative_mean_or_theta_is_nan(dtype):
    plain = {"nb_mean": 2, "nb_logits": 1, "gamma_poisson": 2, "zinb_mean": 2, "nb_mixture": 3}
    for name, count in (plain | {n: SHIFTS[n][1] for n in SHIFTED}).items():
        of = SHIFTS[name][0] if name in SHIFTS else name
        for bad in range(count):
            x, parameters = _inputs(of, (3, 41), dtype)
            with torch.no_grad():
                parameters[bad][1, 17] = -0.5
            value, *_ = _found(name, x, *parameters)
            assert value[1].isnan() and value[[0, 2]].isfinite().all()
            with fastelbo.reference_mode():
                assert fastelbo.log_prob(joined(*parameters), x, likelihood=name)[1].isnan()


@every_float
@pytest.mark.parametrize("logit, kept", [(1e4, 0), (-1e4, 1)])
def test_a_certain_component_of_a_mixture_is_all_of_it(dtype, logit, kept):
    x, (mean1, mean2, theta, logits) = _inputs("nb_mixture", (3, 41), dtype)
    with torch.no_grad():
        logits.fill_(logit)
    value = fastelbo.log_prob((mean1, mean2, theta, logits), x, likelihood="nb_mixture", reduce=False)
    means = mean1, mean2
    expected = fastelbo.log_prob((means[kept], theta), x, likelihood="nb_mean", reduce=False)
    assert torch.equal(value, expected)
    grads = torch.autograd.grad(value.sum(), (means[kept], theta, means[1 - kept], logits))
    assert not torch.cat([g.flatten() for g in grads[2:]]).any()
    for a, b in zip(grads[:2], torch.autograd.grad(expected.sum(), (means[kept], theta)), strict=True):
        # the compiler contracts the products of either kernel in its own way
        torch.testing.assert_close(a, b, rtol=4 * torch.finfo(dtype).eps, atol=0)


# ----------------------------------------------------------------------------------------------------------------------
# The total of a beta-binomial.

SHAPES_OF_TOTAL = {"whole": (2, 5, 70), "row": (5, 70), "event": (70,), "one number": ()}
every_total = pytest.mark.parametrize("shape", SHAPES_OF_TOTAL)


def _trials(*shape: int) -> tuple[Tensor, Tensor, Tensor]:
    """x, which is 0 and the total too, and the concentrations of K = 2 samples."""
    a, b = (torch.exp(torch.randn(2, *shape, dtype=torch.float64)).requires_grad_() for _ in range(2))
    return torch.randint(0, 10, shape).double(), a, b


@every_total
@pytest.mark.parametrize("kind", [torch.uint8, *COUNTS, torch.float32, torch.float64], ids=str)
def test_totals_of_any_type_and_shape(shape, kind):
    x, a, b = (t.detach().float() for t in _trials(5, 70))
    if kind == torch.float64:
        x, a, b = x.double(), a.double(), b.double()
    total = torch.randint(9, 14, SHAPES_OF_TOTAL[shape])
    mask = torch.rand(5, 70) < 0.7
    a, b = a.requires_grad_(), b.requires_grad_()
    for options in ({}, {"mask": mask}, {"reduce": False}, {"mask": mask, "reduce": False}):
        found = []
        for given in (total.to(kind), total.to(a.dtype).expand(2, 5, 70)):
            value = fastelbo.log_prob((a, b, given), x, likelihood="beta_binomial", **options)
            found.append([value, *torch.autograd.grad(value.sum(), (a, b))])
        torch.testing.assert_close(*found)
    laid = total.to(kind).mT.contiguous().mT if total.dim() > 1 else total.to(kind)
    expected = fastelbo.log_prob((a, b, total.to(kind)), x, likelihood="beta_binomial")
    torch.testing.assert_close(fastelbo.log_prob((a, b, laid), x, likelihood="beta_binomial"), expected)


@pytest.mark.parametrize(
    "shapes", [((5, 1), (70,), (5, 1)), ((70,), (5, 1), (1, 70)), ((2, 5, 1), (), (5, 70)), ((), (1, 70), (2, 1, 70))]
)
def test_totals_of_rows_and_columns(shapes):
    x = torch.randint(0, 10, (5, 70))
    a, b = (torch.exp(torch.randn(shape, dtype=torch.float64)).requires_grad_() for shape in shapes[:2])
    total = torch.randint(9, 14, shapes[2])
    found = fastelbo.log_prob((a, b, total), x, likelihood="beta_binomial", reduce=False)
    with fastelbo.reference_mode():
        expected = fastelbo.log_prob((a, b, total), x, likelihood="beta_binomial", reduce=False)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    upstream = torch.randn_like(found)
    for ours, theirs in zip(*(torch.autograd.grad(t, (a, b), upstream) for t in (found, expected)), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("path", [nullcontext, fastelbo.reference_mode], ids=["op", "twin"])
@pytest.mark.parametrize("reduce", [True, False])
def test_a_total_is_data(path, reduce):
    ones = torch.ones(2, 3)

    def call(total: Tensor) -> None:
        fastelbo.log_prob((ones, ones, total), ones, likelihood="beta_binomial", reduce=reduce)

    with path():
        for total in (ones.clone().requires_grad_(), torch.ones(()).requires_grad_()):
            with pytest.raises(ValueError, match="the third tensor of recon is data, and must not require a gradient"):
                call(total)
        for kind, came in ((torch.bool, "bool"), (torch.complex64, "complex64"), (torch.int8, "int8")):
            with pytest.raises(TypeError, match=f"the third tensor of recon must be .*; got {came}"):
                call(ones.to(kind))


@every_float
def test_more_successes_than_trials_are_impossible(dtype):
    """-inf with gradients of 0, in a row of others too; the ends are possible."""
    x, total = torch.tensor([[4.0, 0.0, 5.0, 6.0]], dtype=dtype), torch.tensor([[5, 5, 5, 5]])
    a, b = (torch.full((1, 4), v, dtype=dtype, requires_grad=True) for v in (0.7, 2.0))
    value = fastelbo.log_prob((a, b, total), x, likelihood="beta_binomial", reduce=False)
    assert value[0, :3].isfinite().all() and value[0, 3] == -inf
    for grad in torch.autograd.grad(value.sum(), (a, b)):
        assert grad[0, 3] == 0 and grad[0, :3].isfinite().all() and grad[0, :3].all()
    assert fastelbo.log_prob((a, b, total), x, likelihood="beta_binomial").item() == -inf


@pytest.mark.parametrize(
    "name", ["nb_mean", "nb_logits", "gamma_poisson", "zinb_mean", "nb_mixture", "beta_binomial", *SHIFTED]
)
def test_finite_differences(name):
    of = SHIFTS[name][0] if name in SHIFTS else name
    parameters = [t.requires_grad_() for t in _parameters(of)]
    if name == "beta_binomial":
        parameters[-1].requires_grad_(False)
    x = torch.tensor([0.0, 2.0, 1.0]).double()

    def call(*parameters: Tensor) -> Tensor:
        return fastelbo.log_prob(parameters, x, likelihood=name, reduce=False)

    assert torch.autograd.gradcheck(call, parameters)
    assert torch.autograd.gradgradcheck(call, parameters)
