"""Probabilistic PCA: densities and posteriors against scipy, torch.distributions and sklearn; arguments; accuracy."""

import math
import subprocess
import sys
import warnings

import mpmath as mp
import numpy as np
import pytest
import torch
from oracle import FLOOR, changes, check, evaluate, peak
from scipy.sparse import csr_matrix
from scipy.stats import multivariate_normal
from sklearn.decomposition import PCA
from torch import Tensor
from torch.distributions import LowRankMultivariateNormal, MultivariateNormal, kl_divergence

import fastelbo
from fastelbo import PPCA, reference

F64 = torch.float64
SHAPES = [(1, 2, 1), (3, 5, 2), (47, 16, 3), (49, 241, 17), (100, 480, 16), (7, 700, 33)]


def roundings(M: int) -> int:
    """Of the inputs, how many roundings the error of log p and its gradients may amount to.

    x - b is one, and its product with the basis one. Gram-Schmidt takes from a column its parts along the M others,
    twice where that leaves little: at most 2 M roundings of half an ulp of the column. The sums themselves are taken in
    several lanes and blocks, whose roundings add up to less than one.
    """
    return M + 2


def parameters(D: int, M: int, sigma: float = 0.6, dtype: torch.dtype = F64) -> tuple[Tensor, Tensor, Tensor]:
    return torch.randn(D, M, dtype=dtype), torch.randn(D, dtype=dtype), torch.tensor(2 * math.log(sigma), dtype=dtype)


def model(D: int, M: int, **options) -> PPCA:
    W, b, log_sigma2 = parameters(D, M, **options)
    m = PPCA(M, D, dtype=W.dtype)
    m.load_state_dict({"W": W, "b": b, "log_sigma2": log_sigma2})
    return m


def covariance(m: PPCA) -> Tensor:
    return m.W @ m.W.T + m.log_sigma2.exp() * torch.eye(len(m.W), dtype=m.W.dtype)


def with_gaps(x: Tensor, share: float = 0.3) -> Tensor:
    return torch.where(torch.rand(x.shape) < share, math.nan, x)


# ----------------------------------------------------------------------------------------------------------------------
# Density.


@pytest.mark.parametrize("N, D, M", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, F64])
@pytest.mark.parametrize("x_grad", [False, True])  # another kernel
def test_shapes(N, D, M, dtype, x_grad):
    """Values and gradients of every input, for every tail of the register blocks, tiles and row blocks."""
    W, b, log_sigma2 = (t.requires_grad_() for t in parameters(D, M, dtype=dtype))
    x = torch.randn(N, D, dtype=dtype, requires_grad=x_grad)
    check(fastelbo.ppca_log_prob, x, W, b, log_sigma2, roundings=roundings(W.shape[1]))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.uint8, torch.bool])
def test_data_types(dtype):
    W, b, log_sigma2 = (t.requires_grad_() for t in parameters(300, 5, dtype=torch.float32))
    x = (torch.rand(50, 300) * 200).to(dtype) if dtype != torch.bool else torch.rand(50, 300) < 0.5
    check(fastelbo.ppca_log_prob, x, W, b, log_sigma2, roundings=roundings(W.shape[1]))


def test_half_parameters():
    W, b, log_sigma2 = (t.bfloat16().requires_grad_() for t in parameters(30, 5))
    x = torch.randn(50, 30).bfloat16().requires_grad_()
    check(fastelbo.ppca_log_prob, x, W, b, log_sigma2, roundings=roundings(5))


def test_strides():
    W, b, log_sigma2 = parameters(40, 3, dtype=torch.float32)
    for x in (
        torch.randn(40, 20).T,
        torch.randn(20, 80)[:, ::2],
        torch.randn(1, 40).expand(20, 40),
        torch.randn(0, 40),
    ):
        inputs = x.requires_grad_(), W.T.contiguous().T.requires_grad_(), b, log_sigma2
        check(fastelbo.ppca_log_prob, *inputs, roundings=roundings(3))


@pytest.mark.parametrize("N, D, M", SHAPES)
def test_density_against_scipy_and_torch(N, D, M):
    m, x = model(D, M), torch.randn(N, D, dtype=F64) * 3
    found = m.log_prob(x).detach()
    with torch.no_grad():
        C = covariance(m)
        low_rank = LowRankMultivariateNormal(m.b, m.W, m.log_sigma2.exp().expand(D)).log_prob(x)
    scipy = multivariate_normal(m.b.detach().numpy(), C.numpy(), allow_singular=False).logpdf(x.numpy())
    torch.testing.assert_close(found, low_rank, rtol=1e-10, atol=0)
    torch.testing.assert_close(found, torch.as_tensor(scipy).reshape(N), rtol=1e-10, atol=0)


def test_score_samples_is_that_of_sklearn():
    """With the same W and sigma2: the fits differ, since sklearn divides the covariance by N - 1 (it is no maximum)."""
    x = np.random.default_rng(0).normal(size=(200, 30)) @ np.random.default_rng(1).normal(size=(30, 30))
    theirs = PCA(5).fit(x)
    ours = PPCA(5, 30, dtype=F64)
    s2 = theirs.noise_variance_
    W = theirs.components_.T * np.sqrt(theirs.explained_variance_ - s2)
    ours.load_state_dict(
        {"W": torch.tensor(W), "b": torch.tensor(theirs.mean_), "log_sigma2": torch.tensor(s2, dtype=F64).log()}
    )
    found = ours.score_samples(x)
    assert isinstance(found, np.ndarray)
    np.testing.assert_allclose(found, theirs.score_samples(x), rtol=1e-10)
    assert ours.score(x) == pytest.approx(theirs.score(x), rel=1e-10)
    mean = ours.transform(x)  # PPCA shrinks the projection: (Lambda - s2)^1/2 / Lambda of it
    shrunk = theirs.transform(x) * np.sqrt(theirs.explained_variance_ - s2) / theirs.explained_variance_
    np.testing.assert_allclose(mean, shrunk, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("sigma", [1e-2, 1e-3])
def test_accuracy_far_from_the_origin(sigma):
    """|x - b| far below |b|, and sigma far below |W|: 1e-4 relative is asked for."""
    W, b, log_sigma2 = parameters(784, 32, sigma, torch.float32)
    b = b + 1e4
    x = (torch.randn(200, 32) @ W.T + sigma * torch.randn(200, 784)).double() + b.double()
    x = x.float()
    with torch.no_grad():
        exact = reference.ppca_log_prob(x.double(), W.double(), b.double(), log_sigma2.double())
    error = (fastelbo.ppca_log_prob(x, W, b, log_sigma2) - exact).abs() / exact.abs()
    assert error.max() < 1e-6


@pytest.mark.parametrize("x_grad", [False, True])
def test_gradients_where_sigma_is_small(x_grad):
    """e is a hundredth of x - b: a gradient made of differences of sums of x - b would lose these digits."""
    W, b, log_sigma2 = (t.requires_grad_() for t in parameters(300, 8, 1e-2, torch.float32))
    x = (torch.randn(100, 8) @ W.detach().T + 1e-2 * torch.randn(100, 300) + b.detach()).requires_grad_(x_grad)
    check(fastelbo.ppca_log_prob, x, W, b, log_sigma2, roundings=roundings(W.shape[1]))


def exactly(x: Tensor, W: Tensor, b: Tensor, log_sigma2: Tensor, upstream: Tensor) -> list[Tensor]:
    """log N(x; b, C) and the gradients of its sum weighted by `upstream`, from the D by D matrix, to 60 digits."""
    X, W_, g = (mp.matrix(t.double().tolist()) for t in (x, W, upstream))
    D, s2 = len(W), mp.exp(log_sigma2.item())
    C = W_ * W_.T + s2 * mp.eye(D)
    inverse, constant = C**-1, D * mp.log(2 * mp.pi) + mp.log(mp.det(C))
    R = X - mp.ones(len(x), 1) * mp.matrix(b.double().tolist()).T
    U = R * inverse  # rows r' C^-1
    G = mp.diag(list(g))
    norms = [mp.fdot(U[n, :], U[n, :]) - sum(inverse[d, d] for d in range(D)) for n in range(len(x))]
    found = (
        mp.matrix([-(constant + mp.fdot(R[n, :], U[n, :])) / 2 for n in range(len(x))]),
        -G * U,
        U.T * G * (U * W_) - sum(g) * inverse * W_,
        U.T * g,
        mp.matrix([s2 * mp.fdot(g, norms) / 2]),
    )
    shapes = (x.shape[:1], x.shape, W.shape, b.shape, ())
    return [torch.tensor([float(v) for v in m], dtype=F64).reshape(s) for m, s in zip(found, shapes, strict=True)]


@pytest.mark.parametrize("dtype", [torch.float32, F64])
@pytest.mark.parametrize("alike", [None, 1e-5], ids=["", "columns alike"])
@pytest.mark.parametrize("digits", range(1, 9))
def test_accuracy_where_sigma_is_small(digits, alike, dtype):
    """Data of the model for sigma = 1e-1 .. 1e-8, also with columns of W that differ by 1e-5, against exact figures.

    The error is the largest of a tensor: one of W = Q R is one of all its elements.
    """
    mp.mp.dps, sigma = 60, 10.0**-digits
    W, b, log_sigma2 = parameters(12, 3, sigma)
    if alike:
        W[:, 1] = W[:, 0] + alike * torch.randn(12, dtype=F64)
    x = torch.randn(5, 3, dtype=F64) @ W.T + b + sigma * torch.randn(5, 12, dtype=F64)
    inputs = [t.to(dtype).requires_grad_() for t in (x, W, b, log_sigma2)]
    upstream = torch.randn(5, dtype=F64).to(dtype)
    wide = [t.detach().double().requires_grad_() for t in inputs]
    exact = exactly(*wide, upstream)
    condition = changes(reference.ppca_log_prob, wide, [upstream.double()])
    ours, twins = (evaluate(f, inputs, [upstream]) for f in (fastelbo.ppca_log_prob, reference.ppca_log_prob))
    inner, outer = torch.finfo(F64).eps, torch.finfo(dtype).eps  # of the arithmetic, and of the results
    for i, name in enumerate(("log p", "x", "W", "b", "log_sigma2")):
        assert ours[i].dtype == twins[i].dtype
        error = (ours[i] - exact[i]).abs().max()
        allowed = roundings(3) * inner * condition[i].max() + FLOOR * outer * exact[i].abs().max()
        assert error <= allowed, f"{name}: {error / allowed:.2f} of what is allowed"
    # and the twin itself loses a digit per factor of 10 in sigma, not two: that is what rounding x - b costs
    for a, e in zip(twins if dtype == F64 else [], exact, strict=False):
        assert (a - e).abs().max() < 1e3 * torch.finfo(F64).eps / sigma * e.abs().max()


def test_nan_and_infinity():
    W, b, log_sigma2 = parameters(20, 3, dtype=torch.float32)
    x = torch.randn(6, 20)
    x[1, 3], x[2, 4], x[4, 0] = math.nan, math.inf, -math.inf
    found = fastelbo.ppca_log_prob(x, W, b, log_sigma2)
    assert found.isfinite().tolist() == [True, False, False, True, False, True]
    assert torch.equal(found[[0, 3, 5]], fastelbo.ppca_log_prob(x[[0, 3, 5]], W, b, log_sigma2))
    W[0, 0] = math.nan
    assert fastelbo.ppca_log_prob(x, W, b, log_sigma2).isnan().all()


# ----------------------------------------------------------------------------------------------------------------------
# Posterior, ELBO, gap.


def test_posterior_covariance_is_s2_over_G():
    """By conditioning the joint Gaussian of (z, x); many texts print the inverse of it, or the precision."""
    m, x = model(6, 2, sigma=0.3), torch.randn(9, 6, dtype=F64)
    with torch.no_grad():
        C = covariance(m)
        gain = m.W.T @ torch.linalg.inv(C)
        mean, cov = m.posterior(x)
        torch.testing.assert_close(mean, (x - m.b) @ gain.T, rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(cov, torch.eye(2, dtype=F64) - gain @ m.W, rtol=1e-10, atol=1e-12)
        G = m.W.T @ m.W + m.log_sigma2.exp() * torch.eye(2, dtype=F64)
        torch.testing.assert_close(cov, m.log_sigma2.exp() * torch.linalg.inv(G), rtol=1e-10, atol=0)
    assert torch.equal(m.transform(x), mean)


def test_elbo_and_gap_make_log_prob():
    m, x = model(12, 4), torch.randn(20, 12, dtype=F64)
    mu, logvar = torch.randn(20, 4, dtype=F64), torch.randn(20, 4, dtype=F64)
    elbo, gap = m.elbo(x, mu, logvar), m.inference_gap(x, mu, logvar)
    assert (gap > 0).all()
    torch.testing.assert_close(elbo + gap, m.log_prob(x), rtol=1e-10, atol=0)
    mean, cov = m.posterior(x)
    for n in range(3):  # and both are what they say
        q = MultivariateNormal(mu[n], torch.diag(logvar[n].exp()))
        torch.testing.assert_close(gap[n], kl_divergence(q, MultivariateNormal(mean[n], cov)), rtol=1e-10, atol=0)
    m.elbo(x, mu.requires_grad_(), logvar).sum().backward()
    assert m.W.grad.isfinite().all() and mu.grad.isfinite().all()


def test_elbo_by_sampling():
    m, x = model(5, 2), torch.randn(3, 5, dtype=F64)
    mu, logvar = torch.randn(3, 2, dtype=F64), torch.randn(3, 2, dtype=F64) - 1
    q = fastelbo.rsample(mu, logvar, 200_000, seed=1)
    with torch.no_grad():
        terms = fastelbo.log_prob(
            (m.inverse_transform(q.z.flatten(0, 1)).unflatten(0, (-1, 3)), m.log_sigma2.expand(200_000, 3, 5)),
            x,
            likelihood="gaussian",
        )
        error = terms.std(0) / math.sqrt(len(terms))
        assert ((terms.mean(0) - q.kl - m.elbo(x, mu, logvar)).abs() < 4.5 * error).all()


def test_log_marginal_of_a_vae_with_this_decoder():
    """The importance-sampled log p(x) agrees with the exact one, within the standard error that it states."""
    m, x = model(10, 3), torch.randn(30, 10, dtype=F64)

    class Decoder(torch.nn.Module):
        def forward(self, z):
            return m.inverse_transform(z), m.log_sigma2.expand(len(z), 10)

    class Encoder(torch.nn.Module):  # a little beside the posterior
        def forward(self, x):
            mean, cov = m.posterior(x)
            return mean + 0.1, (cov.diagonal().log() + 0.3).expand_as(mean)

    vae = fastelbo.VAE(Encoder(), Decoder(), "gaussian").double()
    found = vae.log_marginal(x, 20_000, seed=0)
    off = (found.log_prob - m.log_prob(x)) / found.std_error
    assert off.abs().max() < 4.5 and off.square().mean() < 3


def test_sample_has_the_moments_of_the_model():
    m = model(4, 2)
    x = m.sample(200_000, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(torch.cov(x.T), covariance(m).detach(), rtol=0.05, atol=0.05)
    torch.testing.assert_close(x.mean(0), m.b.detach(), rtol=0, atol=0.03)
    assert torch.equal(x[:5], m.sample(200_000, generator=torch.Generator().manual_seed(0))[:5])


def test_n_parameters_and_bic():
    m, x = model(7, 3), torch.randn(50, 7, dtype=F64)
    assert m.n_parameters == 7 * 3 - 3 + 7 + 1
    assert m.bic(x) == pytest.approx(-2 * m.log_prob(x).sum().item() + m.n_parameters * math.log(50))


def test_bic_finds_the_number_of_components():
    x = model(20, 4, sigma=0.5).sample(2000)
    scores = {M: PPCA(M).fit(x).bic(x) for M in range(1, 9)}
    assert min(scores, key=scores.get) == 4


# ----------------------------------------------------------------------------------------------------------------------
# Missing cells.


def test_missing_cells_against_scipy():
    m = model(8, 3)
    x = with_gaps(torch.randn(40, 8, dtype=F64))
    x[3], x[5] = math.nan, torch.randn(8, dtype=F64)  # nothing observed, and everything
    C, found = covariance(m).detach(), m.log_prob(x).detach()
    mean, cov = (t.detach() for t in m.posterior(x))
    for n, row in enumerate(x):
        o = ~row.isnan()
        if not o.any():
            assert found[n] == 0 and torch.equal(mean[n], torch.zeros(3, dtype=F64))
            torch.testing.assert_close(cov[n], torch.eye(3, dtype=F64))
            continue
        expected = multivariate_normal(m.b.detach()[o].numpy(), C[o][:, o].numpy()).logpdf(row[o].numpy())
        assert float(found[n]) == pytest.approx(float(expected), rel=1e-10)
        gain = m.W.detach()[o].T @ torch.linalg.inv(C[o][:, o])
        torch.testing.assert_close(mean[n], gain @ (row[o] - m.b.detach()[o]), rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(cov[n], torch.eye(3, dtype=F64) - gain @ m.W.detach()[o], rtol=1e-9, atol=1e-12)


def test_functional_derivatives_of_missing_cells():
    """torch.func of the op beside the same of torch's densities, row by row, of the observed cells alone."""
    x, o = torch.randn(4, 5, dtype=F64), torch.rand(4, 5) < 0.7
    inputs = parameters(5, 2)

    def ours(W, b, log_sigma2):
        return fastelbo.ppca_log_prob(x, W, b, log_sigma2, observed=o)

    def theirs(W, b, log_sigma2):
        C = W @ W.T + log_sigma2.exp() * torch.eye(5, dtype=F64)
        rows = [
            MultivariateNormal(b[i], C[i][:, i], validate_args=False).log_prob(r[i])
            for r, i in zip(x, cells, strict=True)
        ]
        return torch.stack(rows)

    cells = [row.nonzero().flatten() for row in o]
    assert all(len(i) > 0 for i in cells) and not o.all()
    for of in (torch.func.jacrev, torch.func.hessian, lambda f, n: torch.func.grad(lambda *t: f(*t).sum(), n)):
        torch.testing.assert_close(of(ours, (0, 1, 2))(*inputs), of(theirs, (0, 1, 2))(*inputs), rtol=1e-9, atol=1e-9)


def test_missing_cells_of_complete_rows_change_nothing():
    m, x = model(30, 5), torch.randn(40, 30, dtype=F64)
    every = fastelbo.ppca_log_prob(x, m.W, m.b, m.log_sigma2, observed=torch.ones_like(x, dtype=torch.bool))
    torch.testing.assert_close(every, m.log_prob(x), rtol=1e-12, atol=0)


def test_arrays_with_missing_cells_do_not_load_the_compiler_of_torch():
    """Its import takes a second. Recomputation for the gradient needs it, and an array has no gradient."""
    code = """
import sys, numpy, fastelbo
x = numpy.random.randn(20, 6)
x[0, 0] = numpy.nan
m = fastelbo.PPCA(2).fit(x, "em")
m.log_prob(x), m.transform(x), m.impute(x), m.score(x), m.posterior(x)
assert m.W.requires_grad
print("torch._dynamo" in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], text=True, capture_output=True)
    assert done.stdout == "False\n", done.stderr


def test_missing_cells_have_gradients_of_their_own_rows_alone():
    m, x = model(8, 3), torch.randn(10, 8, dtype=F64)
    gaps = x.clone()
    gaps[4, 2], gaps[7] = math.nan, math.nan
    inputs = (m.W, m.b, m.log_sigma2)
    up = torch.randn(10, dtype=F64)
    found = torch.autograd.grad(m.log_prob(gaps), inputs, up)
    observed = ~gaps.isnan()
    expected = torch.autograd.grad(fastelbo.ppca_log_prob(x, *inputs, observed=observed), inputs, up)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


def test_impute_is_the_conditional_mean():
    m = model(8, 3, sigma=0.4)
    x = with_gaps(torch.randn(20, 8, dtype=F64))
    filled, C = m.impute(x).detach(), covariance(m).detach()
    assert torch.equal(filled[~x.isnan()], x[~x.isnan()])
    for row, full in zip(x, filled, strict=True):
        o = ~row.isnan()
        gain = C[~o][:, o] @ torch.linalg.inv(C[o][:, o])
        torch.testing.assert_close(full[~o], m.b.detach()[~o] + gain @ (row - m.b.detach())[o], rtol=1e-9, atol=1e-12)
    assert isinstance(m.impute(x.numpy()), np.ndarray)


def test_memory_of_missing_cells_does_not_hold_D_times_M_squared():
    """N = 20, D = 20,000, M = 30: the products W_di W_dj alone would be 74 MB."""
    m = model(20_000, 30)
    x = with_gaps(torch.randn(20, 20_000, dtype=F64))

    assert peak(lambda: m.log_prob(x).sum().backward()) < 60e6


# ----------------------------------------------------------------------------------------------------------------------
# Arguments.


def test_numpy_in_numpy_out():
    x = np.random.default_rng(0).normal(size=(50, 6))
    m = PPCA(2).fit(x)
    assert m.W.dtype == F64 and m.fit_report.rows == 50
    z = m.transform(x)
    for found in (z, m.inverse_transform(z), m.log_prob(x), *m.posterior(x), m.elbo(x, z, z), m.inference_gap(x, z, z)):
        assert isinstance(found, np.ndarray) and found.dtype == np.float64
    np.testing.assert_allclose(m.fit_transform(x), z)
    assert isinstance(m.transform(torch.from_numpy(x)), Tensor)
    assert PPCA(2).fit(x.astype(np.float32)).transform(x.astype(np.float32)).dtype == np.float32


class Table:
    """What a pandas DataFrame is to us: numpy makes an array of it, read-only, and torch does not take it."""

    def __init__(self, a: np.ndarray) -> None:
        self.a, self.dtypes = a, [a.dtype] * a.shape[1]

    def __len__(self) -> int:
        return len(self.a)

    def __array__(self, dtype=None, copy=None) -> np.ndarray:
        view = self.a.view()
        view.flags.writeable = False
        return view


def test_arrays_of_every_kind():
    x = np.random.default_rng(0).normal(size=(50, 6))
    m = PPCA(np.int64(2)).fit(x)
    backwards = np.ascontiguousarray(x[::-1, ::-1])[::-1, ::-1]
    for same in (Table(x), backwards, x.astype(">f8"), np.asfortranarray(x), np.ma.masked_array(x)):
        for method in ("eig", "em"):
            found = PPCA(2).fit(same, method, generator=torch.Generator().manual_seed(0))
            expected = PPCA(2).fit(x, method, generator=torch.Generator().manual_seed(0))
            torch.testing.assert_close(found.W, expected.W, rtol=1e-6, atol=1e-6)  # sums of another order
            torch.testing.assert_close(found.log_sigma2, expected.log_sigma2, rtol=1e-9, atol=0)
        assert isinstance(m.transform(same), np.ndarray)
        np.testing.assert_allclose(m.log_prob(same), m.log_prob(x), rtol=1e-12)
        assert m.bic(same) == pytest.approx(m.bic(x), rel=1e-12)


@pytest.mark.parametrize("kind", [np.float64, np.uint8, np.bool_])
def test_the_masked_cells_of_an_array_are_missing(kind):
    rng = np.random.default_rng(0)
    x = rng.random((40, 6))
    x = x < 0.5 if kind == np.bool_ else (200 * x).astype(kind)
    mask = rng.random(x.shape) < 0.2
    gaps = np.where(mask, np.nan, x / np.float32(255) if kind == np.uint8 else x.astype(np.float64))
    wide = torch.float64 if kind == np.float64 else torch.float32
    m = model(6, 2).to(wide)
    masked, gaps = np.ma.masked_array(x, mask), torch.as_tensor(gaps).to(wide).numpy()
    for name in ("log_prob", "transform", "impute"):
        np.testing.assert_array_equal(getattr(m, name)(masked), getattr(m, name)(gaps))
    found, expected = (PPCA(2).fit(t, "em", max_iter=3, generator=torch.Generator()) for t in (masked, gaps))
    assert torch.equal(found.W, expected.W)
    with pytest.raises(ValueError, match='X must be finite for method "eig"'):
        PPCA(2).fit(masked)


@pytest.mark.parametrize("scale", [1e20, 1e-20])
def test_float32_data_of_any_scale(scale):
    """Their squares are no numbers in float32."""
    x = torch.randn(60, 7) @ torch.randn(7, 7)
    small, large = (PPCA(2).fit(t) for t in (x, x * scale))
    z = torch.randn(60, 2)
    torch.testing.assert_close(large.transform(x * scale), small.transform(x), rtol=1e-3, atol=1e-4)
    for of in ("elbo", "inference_gap"):
        found, expected = getattr(large, of)(x * scale, z, z), getattr(small, of)(x, z, z)
        shift = 7 * math.log(scale) if of == "elbo" else 0.0
        torch.testing.assert_close(found + shift, expected, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(large.log_prob(x * scale) + 7 * math.log(scale), small.log_prob(x), rtol=1e-4, atol=1e-3)
    assert large.sample(5).isfinite().all() and large.posterior(x * scale)[1].isfinite().all()


@pytest.mark.parametrize("x_grad", [False, True])
def test_any_number_of_threads_gives_the_same_bits(x_grad):
    W, b, log_sigma2 = (t.requires_grad_() for t in parameters(300, 70))
    x, upstream = torch.randn(40_000, 300, dtype=F64, requires_grad=x_grad), torch.randn(40_000, dtype=F64)
    found = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        found.append(evaluate(fastelbo.ppca_log_prob, [x, W, b, log_sigma2], [upstream]))
    torch.set_num_threads(1)
    for other in found[1:]:
        assert all(torch.equal(a, e) for a, e in zip(other, found[0], strict=True))


def test_checkpoint():
    m, x = model(9, 2), torch.randn(5, 9, dtype=F64)
    fresh = PPCA(2)
    assert fresh.W is None and not list(fresh.parameters())
    fresh.load_state_dict(m.state_dict())
    assert torch.equal(fresh.log_prob(x), m.log_prob(x))
    with pytest.raises(ValueError, match="n_components is 3, but the checkpoint has 2"):
        PPCA(3).load_state_dict(m.state_dict())


@pytest.mark.parametrize("method, gaps", [("eig", False), ("em", False), ("em", True)])
@pytest.mark.parametrize("rows", [5, 60])
def test_a_default_device_changes_nothing(method, gaps, rows):
    """Of the default device "meta", a tensor without a device of its own would have no values."""
    x = np.random.default_rng(0).normal(size=(rows, 6))
    if gaps:
        x[::3, 1] = math.nan

    def found():
        generator = torch.Generator().manual_seed(0)
        options = {"sample_weight": np.ones(rows), "max_iter": 2} if method == "em" else {}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)
            m = PPCA(2).fit(x, method, generator=generator, **options)
        again = PPCA(2)
        again.load_state_dict(m.state_dict())
        z = again.transform(x)
        draw = again.sample(3, generator=generator).numpy()
        return z, again.log_prob(x), again.inverse_transform(z), again.impute(x), again.posterior(x)[1], draw

    expected = found()
    with torch.device("meta"):
        for ours, theirs in zip(found(), expected, strict=True):
            np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize("method", ["eig", "em"])
def test_a_mapped_file_is_not_copied(method, tmp_path):
    """Memory of tensors and of arrays that is no file's, beside a file of 128 MB that is opened for reading."""
    code = f"""
import threading, time, warnings
import numpy as np, torch
from fastelbo import PPCA
from fastelbo.ppca import data
data.PIECE_ELEMENTS = 1 << 18
warnings.simplefilter("ignore", RuntimeWarning)
x = np.memmap({str(tmp_path / "x")!r}, np.float32, "w+", shape=(1 << 21, 16))
for i in range(0, len(x), 1 << 17):
    x[i : i + (1 << 17)] = np.random.default_rng(i).standard_normal((1 << 17, 16), np.float32)
x = np.memmap({str(tmp_path / "x")!r}, np.float32, "r", shape=x.shape)
def used():
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("RssAnon")) / 2**10
PPCA(2).fit(x[:1000], {method!r}, max_iter=2)
before, most, done = used(), [0.0], threading.Event()
def watch():
    while not done.wait(0.001):
        most[0] = max(most[0], used())
watcher = threading.Thread(target=watch)
watcher.start()
PPCA(2).fit(x, {method!r}, max_iter=2)
done.set()
watcher.join()
print(most[0] - before)
"""
    done = subprocess.run([sys.executable, "-c", code], text=True, capture_output=True)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) < 100


def test_fit_keeps_the_parameters_of_an_optimizer():
    m = PPCA(2, 6)
    before = list(m.parameters())
    m.fit(torch.randn(50, 6))
    assert all(a is b for a, b in zip(before, m.parameters(), strict=True))


@pytest.mark.parametrize(
    "call, error, message",
    [
        (lambda m, x: PPCA(0), ValueError, "n_components must be at least 1; got 0"),
        (lambda m, x: PPCA(5, 5), ValueError, r"n_components must be less than the number of columns D=5; got 5"),
        (lambda m, x: PPCA(2).log_prob(x), RuntimeError, "no parameters yet"),
        (lambda m, x: m.log_prob(x[:, :4]), ValueError, r"x must be \[N, D\] with D=5; got \(9, 4\)"),
        (lambda m, x: m.log_prob(x[0]), ValueError, r"x must be \[N, D\]; got \(5,\)"),
        (lambda m, x: m.log_prob(x.float()), TypeError, "x is torch.float32 but the model is torch.float64"),
        (lambda m, x: m.log_prob(x.long()), TypeError, "x must be floating, uint8 .* or bool; got torch.int64"),
        (lambda m, x: m.inverse_transform(x), ValueError, r"z must be \[N, M\] with M=2; got \(9, 5\)"),
        (lambda m, x: m.elbo(x * math.nan, x[:, :2], x[:, :2]), ValueError, "x must not be NaN here; 45 of 45 cells"),
        (lambda m, x: m.elbo(x, x[:3, :2], x[:, :2]), ValueError, r"mu must be \[N, M\] with N=9 from x; got \(3, 2\)"),
        (lambda m, x: PPCA("3"), ValueError, 'n_components must be an int, a fraction .*; got "3"'),
        (lambda m, x: PPCA(True), TypeError, "n_components must be an int, a fraction .*; got bool"),
        (lambda m, x: PPCA(2, 5.0), TypeError, "n_features must be an int; got float"),
        (lambda m, x: PPCA(2, 5, dtype=torch.int32), TypeError, "dtype must be a floating torch.dtype"),
        (lambda m, x: PPCA(2, 5, dtype="float32"), TypeError, "dtype must be a floating torch.dtype"),
        (lambda m, x: m.log_prob("a"), TypeError, "x must be a tensor or an array of numbers .*; got str"),
        (lambda m, x: m.score(None), TypeError, "x must be a tensor or an array of numbers .*; got NoneType"),
        (lambda m, x: m.bic(None), TypeError, "x must be a tensor or an array of numbers .*; got NoneType"),
        (lambda m, x: m.posterior(np.array(["a"])), TypeError, "x must be a tensor or an array .* of <U1"),
        (lambda m, x: m.transform(np.array([[None]])), TypeError, "x must be a tensor or an array .* of object"),
        (lambda m, x: m.impute(x + 0j), TypeError, "x must be floating, .*; got torch.complex128"),
        (lambda m, x: m.transform(x.numpy() + 0j), TypeError, "x must be floating, .*; got torch.complex128"),
        (lambda m, x: m.inverse_transform({}), TypeError, "z must be a tensor or an array .*; got dict"),
        (lambda m, x: m.elbo(x, None, None), TypeError, "mu must be a tensor or an array .*; got NoneType"),
        (lambda m, x: m.inference_gap(x, x[:, :2], 3.0), ValueError, r"logvar must be \[N, M\]; got \(\)"),
        (lambda m, x: m.sample(1.5), TypeError, "n must be an int; got float"),
        (lambda m, x: m.sample(-1), ValueError, "n must be at least 0; got -1"),
        (lambda m, x: m.sample(2, generator=3), TypeError, "generator must be a torch.Generator; got int"),
        (lambda m, x: m.fit(x, "em", generator=3), TypeError, "generator must be a torch.Generator; got int"),
        (lambda m, x: m.fit(x, "em", tol="x"), TypeError, "tol must be a float; got str"),
        (lambda m, x: m.fit(x, "em", tol=math.nan), ValueError, "tol must be at least 0; got nan"),
        (lambda m, x: m.fit(x, "em", max_iter=1.5), TypeError, "max_iter must be an int; got float"),
        (lambda m, x: m.fit(x, group="all"), TypeError, "group must be a torch.distributed group or None; got str"),
        (lambda m, x: m.fit(None), TypeError, "X must be a tensor, an array, or an iterable of batches; got NoneType"),
        (lambda m, x: m.fit("abc"), TypeError, "X must be a tensor, an array, or an iterable of batches; got str"),
        (lambda m, x: m.fit(["abc"]), TypeError, "a batch of X must be a tensor or an array .*; got str"),
        (lambda m, x: m.fit(x.tolist()), ValueError, r"batches \[n, D\]; got list of single rows: give numpy.asarray"),
        (lambda m, x: m.fit(list(x.numpy())), ValueError, r"got list of single rows"),
        (lambda m, x: m.impute(x.to_sparse()), TypeError, r"x must be dense; got a sparse Tensor .* x.to_dense"),
        (
            lambda m, x: m.impute(csr_matrix(x.numpy())),
            TypeError,
            r"x must be dense; got a sparse csr_matrix .*toarray",
        ),
        (lambda m, x: m.fit(x, sample_weight=["a"] * 9), TypeError, "sample_weight must be a tensor .*numbers"),
        (lambda m, x: m.fit(x * 1e160), ValueError, "squares in the range of float64; .*scale the data"),
        (lambda m, x: m.fit(x * 1e160, "em"), ValueError, "squares in the range of float64; .*scale the data"),
        (lambda m, x: m.fit(x + 0j), TypeError, "X must be floating, .*; got torch.complex128"),
        (lambda m, x: m.fit(x, 3), TypeError, 'method must be a str, one of "eig", "em"; got int'),
        (lambda m, x: m.fit(x, "svd"), ValueError, 'method must be one of "eig", "em"; got "svd"'),
        (lambda m, x: m.fit(x, "em", max_iter=0), ValueError, "max_iter must be at least 1; got 0"),
        (lambda m, x: m.fit(3), TypeError, "X must be a tensor, an array, or an iterable of batches; got int"),
        (lambda m, x: m.fit(iter([x]), "em"), TypeError, "which can be read only once"),
        (lambda m, x: m.fit([x, x[:, :3]]), ValueError, r"every batch of X must be \[n, 5\].*got \(9, 3\)"),
        (lambda m, x: m.fit(x[:1]), ValueError, "X must hold at least 2 rows; got 1"),
        (lambda m, x: m.fit([]), ValueError, "X must hold at least 2 rows; got none"),
        (lambda m, x: PPCA(7).fit(x), ValueError, "n_components must be less than the number of columns D=5; got 7"),
        (lambda m, x: m.fit(x * math.nan), ValueError, 'X must be finite for method "eig"; "em" takes NaN'),
        (lambda m, x: m.fit(x * math.inf, "em"), ValueError, "X must be finite or NaN"),
        (lambda m, x: fastelbo.ppca_log_prob(x, m.W, m.b[:2], m.log_sigma2), ValueError, r"b must be \[D\] with D=5"),
        (lambda m, x: fastelbo.ppca_log_prob(x, m.W, m.b, m.b), ValueError, "log_sigma2 must be a 0-d tensor"),
        (
            lambda m, x: fastelbo.ppca_log_prob(x, m.W, m.b, m.log_sigma2, observed=x),
            ValueError,
            r"observed must be a bool tensor of the shape \(9, 5\) of x",
        ),
        (
            lambda m, x: fastelbo.ppca_log_prob(x, m.W, m.b, m.log_sigma2, observed=x[:1] > 0),
            ValueError,
            r"observed must be a bool tensor of the shape \(9, 5\) of x; got torch.bool \(1, 5\)",
        ),
        (
            lambda m, x: fastelbo.ppca_log_prob(x, m.W, m.b, m.log_sigma2, observed=True),
            TypeError,
            "observed must be a bool torch.Tensor; got bool",
        ),
    ],
)
def test_errors(call, error, message):
    with pytest.raises(error, match=message):
        call(model(5, 2), torch.randn(9, 5, dtype=F64))


def test_compile():
    m, x = model(9, 2), torch.randn(5, 9, dtype=F64)
    compiled = torch.compile(lambda x: m.log_prob(x), fullgraph=True, dynamic=False, backend="aot_eager")
    torch.testing.assert_close(compiled(x), m.log_prob(x))
    with torch.no_grad():
        x[2, 3] = math.nan
    assert compiled(x)[2].isnan()


@pytest.mark.slow
def test_a_hundred_thousand_columns():
    """D = 100,000, M = 64, N = 1000 in float32: a D by D matrix would be 40 GB. The data, a model's, are 0.4 GB."""
    code = """
import resource, torch
from fastelbo import PPCA
torch.manual_seed(0)
x = torch.empty(1000, 100_000).normal_().addmm_(torch.randn(1000, 64), torch.randn(64, 100_000))
def used():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
before = used()
m = PPCA(64).fit(x)
assert m.fit_report.converged and m.fit_report.solver == "krylov"
loss = -m.log_prob(x).mean()
loss.backward()
assert m.W.grad.isfinite().all() and loss.isfinite()
print(used() - before)
"""
    done = subprocess.run([sys.executable, "-c", code], text=True, capture_output=True)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) < 2.0
