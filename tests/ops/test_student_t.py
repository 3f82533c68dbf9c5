"""Student's t against mpmath and scipy, its limits, and its twin's second derivatives."""

import math
from itertools import product

import mpmath
import pytest
import torch
from oracle import check
from scipy import stats
from torch import Tensor

import fastelbo
from fastelbo.likelihoods import LIKELIHOODS, LOG_DF_LIMIT
from fastelbo.losses import likelihood_sample

inf, nan = float("inf"), float("nan")
DFS = tuple(10.0**e for e in (-1, -0.5, 0, 0.5, 1, 1.3, 2, 3, 4, 5, 6))
SCALES = (-30.0, -3.0, 0.0, 0.7, 5.0)
XS = (0.0, 1e-8, -0.01, 0.3, -1.0, 2.5, -30.0, 1e4, -1e9)
MEAN = 0.25
every_float = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)


def log_prob(mean: Tensor, log_scale: Tensor, log_df: Tensor, x: Tensor) -> Tensor:
    """log p of each element: a row holds one."""
    rows = [t[:, None] for t in (mean, log_scale, log_df)]
    return fastelbo.log_prob(tuple(rows), x[:, None], likelihood="student_t")


def grid(dfs, scales, xs, mean: float = MEAN, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """mean, log_scale, log_df and x of every combination; they require gradients."""
    rows = [(mean, s, math.log(df), mean + x) for df, s, x in product(dfs, scales, xs)]
    return [column.clone().requires_grad_() for column in torch.tensor(rows, dtype=dtype).T]


def with_gradients(inputs: list[Tensor]) -> list[Tensor]:
    value = log_prob(*inputs)
    return [value.detach(), *torch.autograd.grad(value.sum(), inputs)]


def exactly(mean: float, log_scale: float, log_df: float, x: float) -> tuple[list[mpmath.mpf], list[mpmath.mpf]]:
    """log p and its gradients, and how large the terms of each are."""
    m, s, r, x = map(mpmath.mpf, (mean, log_scale, log_df, x))
    nu, distance = mpmath.exp(r), x - m
    q = (distance * mpmath.exp(-s)) ** 2 / nu
    share, log1p = q / (1 + q), mpmath.log1p(q)
    step = mpmath.loggamma((nu + 1) / 2) - mpmath.loggamma(nu / 2) - mpmath.log(nu / 2) / 2
    psi = nu / 2 * (mpmath.digamma((nu + 1) / 2) - mpmath.digamma(nu / 2)) - mpmath.mpf(1) / 2
    half_log_2pi, bend = mpmath.log(2 * mpmath.pi) / 2, (nu + 1) / 2 * log1p
    slope = (nu + 1) * share / distance if distance else mpmath.mpf(0)
    values = [step - half_log_2pi - s - bend, slope, (nu + 1) * share - 1, psi + nu / 2 * (share - log1p) + share / 2]
    of_df = psi + nu / 2 * (log1p - share) + share / 2
    return [*values, -slope], [
        abs(step) + half_log_2pi + abs(s) + bend, abs(slope), (nu + 1) * share + 1, of_df, abs(slope)
    ]  # fmt: skip


def errors(inputs: list[Tensor]) -> Tensor:
    """Of log p and each gradient, the largest error relative to the terms of each element."""
    found = torch.stack(with_gradients(inputs), 1).tolist()
    largest = [0.0] * 5
    with mpmath.workdps(120):
        for element, values in zip(torch.stack(inputs, 1).tolist(), found, strict=True):
            for i, (value, exact, size) in enumerate(zip(values, *exactly(*element), strict=True)):
                error = float(abs(value - exact) / size) if size else abs(value)
                largest[i] = max(largest[i], error if error == error else inf)
    return torch.tensor(largest)


@every_float
def test_values_and_gradients_to_the_last_digits(dtype):
    assert (errors(grid(DFS, SCALES, XS, dtype=dtype)) < 16 * torch.finfo(dtype).eps).all()


def test_agrees_with_scipy():
    """Which is off by 5e-12 at 1e4 degrees of freedom."""
    inputs = grid(DFS, SCALES, XS)
    mean, scale, df, x = (t.detach().numpy() for t in (inputs[0], inputs[1].exp(), inputs[2].exp(), inputs[3]))
    expected = stats.t.logpdf(x, df, mean, scale)
    torch.testing.assert_close(log_prob(*inputs).detach(), torch.from_numpy(expected), rtol=1e-11, atol=1e-11)


def test_where_a_square_over_or_underflows():
    """t^2, q and exp(-s) leave the range of float64; neither log p nor a gradient does."""
    inputs = grid((1e-8, 0.5, 30.0, 1e12), (-700.0, -400.0, 0.0, 400.0), (1e-150, 1.0, -1e150, 1e250), mean=0.0)
    assert (errors(inputs)[[0, 2, 3]] < 1e-13).all()
    slope, exact = (t.where(t.abs() > 1e-300, 0.0) for t in (with_gradients(inputs)[1], _slopes(inputs)))
    torch.testing.assert_close(slope, exact, rtol=1e-12, atol=0)


def _slopes(inputs: list[Tensor]) -> Tensor:
    return torch.tensor([float(exactly(*e)[0][1]) for e in torch.stack(inputs, 1).tolist()], dtype=torch.float64)


@every_float
@pytest.mark.parametrize("log_df", [-200.0, -3.0, 1.0, 40.0, 200.0])
def test_x_at_the_mean_of_any_scale(dtype, log_df):
    scales = torch.tensor([-1e5, -746.0, -100.0, 0.0, 100.0, 1e5], dtype=dtype)
    mean = torch.full_like(scales, 0.25)
    inputs = [t.requires_grad_() for t in (mean, scales, torch.full_like(scales, log_df), mean.clone())]
    value, by_mean, by_scale, by_df, by_x = with_gradients(inputs)
    top = value + scales
    torch.testing.assert_close(top, top[3].expand(6), rtol=1e-6, atol=2e5 * torch.finfo(dtype).eps)
    assert (by_mean == 0).all() and (by_x == 0).all() and (by_scale == -1).all() and (by_df == by_df[0]).all()


@every_float
@pytest.mark.parametrize("log_df", [40.0, 60.0, LOG_DF_LIMIT, 200.0, inf])
def test_the_gaussian_is_left(dtype, log_df):
    mean, log_scale, _, x = inputs = grid((1.0,), SCALES[2:], XS[:6], dtype=dtype)
    inputs[2] = torch.full_like(x, log_df).requires_grad_()
    value, by_mean, by_scale, by_df, by_x = with_gradients(inputs)
    gaussian = fastelbo.log_prob((mean[:, None], 2 * log_scale[:, None]), x[:, None], likelihood="gaussian")
    grads = torch.autograd.grad(gaussian.sum(), (mean, log_scale, x))
    four = {"rtol": 4 * torch.finfo(dtype).eps, "atol": 4 * torch.finfo(dtype).eps}
    torch.testing.assert_close([value, by_mean, by_scale, by_x], [gaussian, grads[0], grads[1], grads[2]], **four)
    square = ((x - mean) * torch.exp(-log_scale)).square().double()
    leading = 0.25 * torch.exp(torch.tensor(-log_df).double()) * (1 + 2 * square - square.square())
    leading = leading if log_df <= LOG_DF_LIMIT else torch.zeros_like(leading)
    rtol, tiny = (1e-4, 1e-19) if dtype == torch.float32 else (1e-8, 1e-34)
    torch.testing.assert_close(by_df.double(), leading, rtol=rtol, atol=tiny)


@every_float
def test_beyond_the_limits_log_df_counts_as_they_do(dtype):
    for log_df in (-inf, -1e4, -81.0, 81.0, 1e4, inf):
        inputs = grid((1.0,), SCALES, XS, dtype=dtype)
        inputs[2] = torch.full_like(inputs[3], log_df).requires_grad_()
        found = with_gradients(inputs)
        inputs[2] = inputs[2].detach().clamp(-LOG_DF_LIMIT, LOG_DF_LIMIT).requires_grad_()
        expected = with_gradients(inputs)
        expected[3] = torch.zeros_like(expected[3])
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
        twin = LIKELIHOODS["student_t"].log_prob(inputs[3], *inputs[:3])
        torch.testing.assert_close(found[0], twin.detach(), rtol=1e-5, atol=1e-5)


@every_float
def test_infinity_and_nan(dtype):
    for mean, x in ((0.0, inf), (0.0, -inf), (inf, 0.0)):
        inputs = [torch.tensor([[v]], dtype=dtype, requires_grad=True) for v in (mean, 0.5, 1.0, x)]
        check(lambda m, s, r, x: fastelbo.log_prob((m, s, r), x, likelihood="student_t"), *inputs)
        assert log_prob(*(t[0] for t in inputs)) == -inf
    for i in range(4):
        values = [0.1, 0.5, 1.0, 0.1]
        values[i] = nan
        inputs = [torch.tensor([v], dtype=dtype, requires_grad=True) for v in values]
        assert all(t.isnan() for t in with_gradients(inputs))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_second_derivatives_of_the_twin(dtype):
    """All are finite; where log_df is large, those by the others are the Gaussian's and those by it vanish."""
    for dfs in (DFS, (1e-30, 1e-10), (math.exp(40.0), math.exp(79.0))):
        inputs = grid(dfs, SCALES[1:], XS[:8], dtype=dtype)
        value = LIKELIHOODS["student_t"].log_prob(inputs[3], *inputs[:3])
        first = torch.autograd.grad(value.sum(), inputs, create_graph=True)
        second = [torch.autograd.grad(g.sum(), inputs, retain_graph=True) for g in first]
        assert all(t.isfinite().all() for row in second for t in row)
        if dfs[0] > 1e10:
            scaled = torch.exp(-inputs[1])
            near = ((inputs[3] - inputs[0]) * scaled).abs() < 100
            torch.testing.assert_close(second[0][0][near], -scaled[near].square())
            assert all(t[near].abs().max() < 1e-9 for t in second[2])


def test_the_twin_is_as_exact():
    """The slope by log_df, too, where it is all that is left of large terms."""
    inputs = grid((30.0, 1e4, 1e8, 1e17), (0.0,), (0.3, -1.0, 2.5, 30.0))
    value = LIKELIHOODS["student_t"].log_prob(inputs[3], *inputs[:3])
    found = torch.autograd.grad(value.sum(), inputs)[2]
    torch.testing.assert_close(found, with_gradients(inputs)[3], rtol=1e-12, atol=0)


def test_draws_have_the_quantiles():
    n, generator = 100_000, torch.Generator().manual_seed(0)
    for df in (0.5, 1.0, 3.0, 1e9):
        parameters = torch.full((n,), 0.5).double(), torch.tensor(-0.7).double(), torch.tensor(df).double().log()
        x = likelihood_sample(parameters, "student_t", generator=generator)
        assert stats.kstest(x.numpy(), stats.t(df, 0.5, math.exp(-0.7)).cdf).pvalue > 1e-3
