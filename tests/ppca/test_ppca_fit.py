"""Fits of probabilistic PCA: the closed form, EM, batches, missing cells, several processes."""

import math
import socket
from itertools import pairwise
from typing import Any

import mpmath
import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from scipy.optimize import minimize
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset
from toys import leave_group

import fastelbo
from fastelbo import PPCA
from fastelbo._internal.process_groups import Processes
from fastelbo.ppca import em
from fastelbo.ppca.data import Dataset
from fastelbo.ppca.moments import column_moments
from fastelbo.ppca.result import Parameters

F64 = torch.float64


def data(N: int, D: int, M: int, sigma: float = 0.5, offset: float = 0.0, seed: int = 0) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    W = torch.randn(D, M, dtype=F64, generator=g) * torch.linspace(2, 1, M, dtype=F64)
    e = sigma * torch.randn(N, D, dtype=F64, generator=g)
    return torch.randn(N, M, dtype=F64, generator=g) @ W.T + e + offset + torch.randn(D, dtype=F64, generator=g)


def same_model(a: PPCA, b: PPCA, rtol: float, atol: float = 0.0) -> None:
    for name in ("W", "b", "log_sigma2"):
        torch.testing.assert_close(getattr(a, name), getattr(b, name), rtol=rtol, atol=atol)


def mean_log_prob(m: PPCA, x: Tensor) -> float:
    return m.log_prob(x).detach().mean().item()


# ----------------------------------------------------------------------------------------------------------------------
# Closed form.


@pytest.mark.parametrize("N, D, M", [(300, 6, 2), (40, 12, 3), (12, 40, 3), (13, 13, 4), (2, 5, 1)])
def test_closed_form_of_tipping_and_bishop(N, D, M):
    x = data(N, D, M)
    if N == 2:
        with pytest.raises(ValueError, match="less than the rank 1 of the centered data"):
            PPCA(M).fit(x)
        return
    m = PPCA(M).fit(x)
    values, vectors = torch.linalg.eigh(torch.cov(x.T, correction=0))
    values, vectors = values.flip(0), vectors.flip(1)
    s2 = values[M:].mean()
    torch.testing.assert_close(m.log_sigma2.exp(), s2, rtol=1e-10, atol=0)
    torch.testing.assert_close(m.b, x.mean(0), rtol=1e-12, atol=1e-14)
    W = vectors[:, :M] * (values[:M] - s2).sqrt()
    torch.testing.assert_close(m.W @ m.W.T, W @ W.T, rtol=1e-8, atol=1e-10)
    gram = m.W.T @ m.W  # orthogonal columns, longest first, signs fixed
    torch.testing.assert_close(gram, torch.diag(values[:M] - s2), rtol=1e-8, atol=1e-9)
    assert (m.W.gather(0, m.W.abs().argmax(0, keepdim=True)) > 0).all()
    report = m.fit_report
    assert (report.method, report.rows, report.converged) == ("eig", N, True)
    assert report.log_likelihood[-1] == pytest.approx(mean_log_prob(m, x), rel=1e-10)


def test_the_closed_form_is_a_stationary_point_and_gradient_training_reaches_it():
    x = data(200, 7, 2)
    best = PPCA(2).fit(x)
    grads = torch.autograd.grad(best.log_prob(x).mean(), list(best.parameters()))
    assert max(g.abs().max() for g in grads) < 1e-10
    torch.manual_seed(0)
    m = PPCA(2, 7, dtype=F64)
    optimizer = torch.optim.LBFGS(m.parameters(), max_iter=300, line_search_fn="strong_wolfe", tolerance_change=0)

    def closure():
        optimizer.zero_grad()
        loss = -m.log_prob(x).mean()
        loss.backward()
        return loss

    optimizer.step(closure)
    assert mean_log_prob(m, x) == pytest.approx(mean_log_prob(best, x), rel=1e-9)
    torch.testing.assert_close(m.W @ m.W.T, best.W @ best.W.T, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("method", ["eig", "em"])
@pytest.mark.parametrize("kind", ["zeros", "copies", "rank"])
def test_what_has_no_maximum_says_so(method, kind):
    x = {
        "zeros": torch.ones(20, 6, dtype=F64),
        "copies": torch.randn(3, 6, dtype=F64).repeat(10, 1),  # rank 2
        "rank": torch.randn(30, 3, dtype=F64) @ torch.randn(3, 6, dtype=F64),
    }[kind]
    M = {"zeros": 1, "copies": 2, "rank": 3}[kind]
    with pytest.raises(ValueError, match=r"n_components must be less than the rank \d of the centered data"):
        PPCA(M).fit(x, method)
    if M > 1:  # one component less, and there is one
        m = PPCA(M - 1).fit(x)
        assert math.isfinite(m.score(x))


@pytest.mark.parametrize("method", ["eig", "em"])
def test_constant_columns(method):
    x = data(100, 8, 2)
    x[:, 3] = 5.0
    m = PPCA(2).fit(x, method)
    assert math.isfinite(m.score(x)) and m.b[3].item() == pytest.approx(5.0, abs=1e-12)
    assert m.W[3].abs().max() < 1e-6


@pytest.mark.parametrize("N, D", [(500, 8), (6, 30)])
def test_a_large_mean_costs_no_digits(N, D):
    """The covariance of the raw sums would be 1e16 times the true one."""
    x = data(N, D, 2, sigma=0.01)
    far = x + 1e6
    a, b = PPCA(2).fit(x), PPCA(2).fit(far)
    torch.testing.assert_close(a.W @ a.W.T, b.W @ b.W.T, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(a.log_sigma2, b.log_sigma2, rtol=1e-5, atol=0)
    c = PPCA(2).fit(far, "em", tol=1e-10)
    torch.testing.assert_close(c.log_sigma2, a.log_sigma2, rtol=1e-3, atol=0)


def exact(x: Tensor, M: int) -> tuple[float, list[float]]:
    """s2 and the largest eigenvalues, in 60 digits."""
    with mpmath.workdps(60):
        X = mpmath.matrix(x.tolist())
        N, D = x.shape
        for j in range(D):
            mean = sum(X[:, j]) / N
            for i in range(N):
                X[i, j] -= mean
        values = sorted(mpmath.eigsy(X.T * X / N, eigvals_only=True), reverse=True)
        return float(sum(values[M:]) / (D - M)), [float(value) for value in values[:M]]


@pytest.mark.parametrize("method", ["eig", "em"])
@pytest.mark.parametrize("scale", [1e-7, 1e7, 4e7, 1e10])
@pytest.mark.parametrize("N, D, M", [(300, 4, 1), (300, 4, 2), (5, 9, 2)])
def test_columns_of_other_scales(method, scale, N, D, M):
    x = torch.randn(N, D, dtype=F64, generator=torch.Generator().manual_seed(0))
    x[:, 1] *= scale
    m = PPCA(M).fit(x, method, tol=1e-13, generator=torch.Generator().manual_seed(0))
    s2, values = exact(x, M)
    assert m.log_sigma2.exp().item() == pytest.approx(s2, rel=1e-6)
    found = m.W.detach().square().sum(0) + s2
    torch.testing.assert_close(found, torch.tensor(values, dtype=F64), rtol=1e-5, atol=0)


@pytest.mark.parametrize("method", ["eig", "em"])
@pytest.mark.parametrize("offset", [0.0, 1e6])
@pytest.mark.parametrize("N", [300, 5])
def test_the_rank_is_that_of_the_columns_whatever_their_scales(method, offset, N):
    x = torch.randn(N, 6, dtype=F64, generator=torch.Generator().manual_seed(0))
    x[:, 1] *= 1e7
    x[:, 2:] = x[:, :1] * torch.tensor([1.0, -2.0, 0.5, 3.0], dtype=F64)  # rank 2
    x += offset
    with pytest.raises(ValueError, match=r"less than the rank 2 of .* to rounding, .* standardize the columns"):
        PPCA(2).fit(x, method)


def test_with_missing_cells_the_message_names_the_scales():
    x = gaps(data(300, 5, 2), 0.2)
    x[:, 1] *= 1e9
    with pytest.warns(RuntimeWarning, match=r"did not converge .* standardize the columns"):
        PPCA(2).fit(x, "em")


def test_float32_data_are_fitted_in_float64():
    x = data(400, 10, 3).float()
    m = PPCA(3).fit(x)
    exact = PPCA(3).fit(x.double())
    assert m.W.dtype == torch.float32
    torch.testing.assert_close(m.W.double(), exact.W, rtol=1e-6, atol=1e-6)


def test_uint8_data():
    x = (torch.rand(60, 9) * 255).to(torch.uint8)
    same_model(PPCA(2).fit(x), PPCA(2).fit(x.float() / 255), 1e-4, 1e-6)
    PPCA(2).fit(x, "em", max_iter=5)


# ----------------------------------------------------------------------------------------------------------------------
# EM.


@pytest.mark.parametrize("N, D, M", [(200, 6, 2), (15, 40, 3)])
def test_em_rises_to_the_closed_form(N, D, M):
    x = data(N, D, M)
    m = PPCA(M).fit(x, "em", tol=1e-12, max_iter=5000, generator=torch.Generator().manual_seed(0))
    history = m.fit_report.log_likelihood
    assert m.fit_report.converged
    assert all(b >= a - 1e-10 for a, b in pairwise(history))
    assert history[-1] == pytest.approx(mean_log_prob(m, x), rel=1e-10)
    best = PPCA(M).fit(x)
    assert history[-1] == pytest.approx(best.fit_report.log_likelihood[-1], rel=1e-8)
    same_model(m, best, 1e-3, 1e-3)


@pytest.mark.parametrize("sigma", [1e-4, 1e-3, 0.03, 0.3, 1.0])
@pytest.mark.parametrize("N, D, M, components", [(300, 20, 3, 3), (300, 20, 3, 6), (40, 100, 4, 4), (500, 200, 5, 10)])
def test_em_ends_at_the_maximum_however_small_sigma_is(N, D, M, components, sigma):
    """Within 1e-6 nats per row; also where components beyond those of the data find nothing but noise."""
    x = data(N, D, M, sigma)
    m, best = PPCA(components).fit(x, "em"), PPCA(components).fit(x)
    report = m.fit_report
    assert report.converged and len(report.log_likelihood) < 100
    assert report.log_likelihood[-1] == pytest.approx(mean_log_prob(m, x), abs=1e-9)
    assert mean_log_prob(m, x) > mean_log_prob(best, x) - 1e-6
    rounding = 1e-15 * D * x.var(0).sum().item() / sigma**2  # of |x|^2 / s2
    assert all(b >= a - rounding for a, b in pairwise(report.log_likelihood))


@pytest.mark.parametrize("sigma", [1e-4, 1e-3, 0.03, 0.3, 1.0])
@pytest.mark.parametrize("N, D, M, share", [(300, 10, 2, 0.25), (100, 20, 3, 0.5)])
def test_em_with_missing_cells_ends_at_a_maximum(N, D, M, share, sigma):
    """From where it ends, L-BFGS on the exact density of the observed cells gains less than 1e-6 nats per row."""
    x = gaps(data(N, D, M, sigma), share)
    m = PPCA(M).fit(x, "em")
    observed, parameters = ~x.isnan(), list(m.parameters())

    def objective(flat):
        leaf = torch.tensor(flat, requires_grad=True)
        W, b, log_sigma2 = (t.view_as(p) for t, p in zip(leaf.split([D * M, D, 1]), parameters, strict=True))
        loss = -fastelbo.ppca_log_prob(x, W, b, log_sigma2, observed=observed).mean()
        return loss.item(), torch.autograd.grad(loss, leaf)[0].numpy()

    start = torch.cat([p.detach().flatten() for p in parameters]).numpy()
    options = {"maxiter": 20_000, "maxfun": 20_000, "ftol": 1e-15, "gtol": 1e-9, "maxcor": 30}
    best = minimize(objective, start, jac=True, method="L-BFGS-B", options=options)
    report = m.fit_report
    assert report.converged and all(b >= a - 1e-9 for a, b in pairwise(report.log_likelihood))
    assert report.log_likelihood[-1] > -best.fun - 1e-6


def test_em_says_when_it_did_not_converge():
    with pytest.warns(RuntimeWarning, match=r"did not converge in 3 steps: log p\(x\) rose by 1.4e-01 nats per row"):
        m = PPCA(10).fit(data(500, 200, 5), "em", max_iter=3)
    assert not m.fit_report.converged and len(m.fit_report.log_likelihood) == 4


def test_a_fall_of_the_likelihood_ends_em_at_the_best_step(monkeypatch):
    x = data(50, 6, 2)
    values = -9.0, -7.0, -8.0, -3.0
    steps = [(value, Parameters(x[i : i + 1].T, x[i], x[i, 0])) for i, value in enumerate(values)]
    monkeypatch.setattr(em, "complete_steps", lambda *_: iter(steps))
    with pytest.warns(RuntimeWarning, match="did not converge"):
        m = PPCA(1).fit(x, "em")
    assert m.fit_report.log_likelihood == (-9.0, -7.0) and not m.fit_report.converged
    assert torch.equal(m.b, x[1])


@pytest.mark.parametrize("N, rank", [(5, 4), (200, 6)])
@pytest.mark.parametrize("more", [0, 1])
def test_em_with_as_many_components_as_the_rank(N, rank, more):
    x = data(N, 20, rank, sigma=0.0)
    with pytest.raises(ValueError, match=rf"n_components must be less than the rank {rank} "):
        PPCA(rank + more).fit(x, "em")


@pytest.mark.parametrize("N, D", [(200, 8), (15, 40)])
@pytest.mark.parametrize("method, missing", [("eig", False), ("em", False), ("em", True)])
def test_a_floor_of_sigma2_gives_the_maximum_above_it(N, D, method, missing):
    """There, W and b are stationary, and a larger sigma2 is worse. A floor that is below sigma2 changes nothing."""
    x = gaps(data(N, D, 3), 0.2) if missing else data(N, D, 3)

    def fitted(floor: float) -> PPCA:
        g = torch.Generator().manual_seed(0)
        return PPCA(3).fit(x, method, min_sigma2=floor, tol=1e-12, max_iter=5000, generator=g)

    free = fitted(0.0)
    s2 = free.log_sigma2.exp().item()
    same_model(fitted(0.5 * s2), free, 0.0)
    m = fitted(4 * s2)
    assert m.fit_report.converged and m.log_sigma2.exp().item() == pytest.approx(4 * s2, rel=1e-12)
    assert all(b >= a - 1e-9 for a, b in pairwise(m.fit_report.log_likelihood))
    assert m.fit_report.log_likelihood[-1] == pytest.approx(mean_log_prob(m, x), rel=1e-9)
    W, b, log_sigma2 = torch.autograd.grad(m.log_prob(x).mean(), list(m.parameters()))
    assert max(W.abs().max(), b.abs().max()) < (1e-10 if method == "eig" else 1e-4)
    assert log_sigma2 < -0.1
    for other in (PPCA(3).fit(x, method, min_sigma2=floor) for floor in (3.9 * s2, 4.1 * s2)):
        assert (other.fit_report.log_likelihood[-1] > m.fit_report.log_likelihood[-1]) == (
            other.log_sigma2 < m.log_sigma2
        )


@pytest.mark.parametrize("N, D", [(200, 6), (10, 30)])
@pytest.mark.parametrize("method, missing", [("eig", False), ("em", False), ("em", True)])
def test_weights_are_repeated_rows(N, D, method, missing):
    x = gaps(data(N, D, 2), 0.1) if missing else data(N, D, 2)
    weight = torch.randint(0, 4, (N,))
    options = {"tol": 1e-12, "max_iter": 3000}
    a, b = (
        PPCA(2).fit(t, method, sample_weight=w, generator=torch.Generator().manual_seed(0), **options)
        for t, w in ((x, weight), (x.repeat_interleave(weight, 0), None))
    )
    same_model(a, b, 1e-9, 1e-9) if method == "eig" else same_model(a, b, 1e-5, 1e-5)
    assert a.fit_report.rows == (weight > 0).sum() and b.fit_report.rows == weight.sum()
    assert a.fit_report.log_likelihood[-1] == pytest.approx(b.fit_report.log_likelihood[-1], rel=1e-9)
    options |= {"sample_weight": weight, "generator": torch.Generator().manual_seed(0)}
    assert torch.equal(PPCA(2).fit_transform(x, method, **options), a.transform(x))


@pytest.mark.parametrize("total", [1e-300, 1e-8, 0.5, 1e8, 1e300])
@pytest.mark.parametrize("N, D", [(200, 6), (10, 30)])
@pytest.mark.parametrize("method, missing", [("eig", False), ("em", False), ("em", True)])
def test_weights_have_a_ratios_meaning(N, D, method, missing, total):
    x = 1e5 * (gaps(data(N, D, 2), 0.1) if missing else data(N, D, 2))
    weight = torch.randint(0, 4, (N,), generator=torch.Generator().manual_seed(0))
    options = {"tol": 1e-12, "max_iter": 3000}
    a, b = (
        PPCA(2).fit(t, method, sample_weight=w, generator=torch.Generator().manual_seed(0), **options)
        for t, w in ((x, weight.double() * (total / int(weight.sum()))), (x.repeat_interleave(weight, 0), None))
    )
    same_model(a, b, 1e-9, 1e-4) if method == "eig" else same_model(a, b, 1e-5, 1)
    assert a.fit_report.log_likelihood[-1] == pytest.approx(b.fit_report.log_likelihood[-1], rel=1e-9)


def test_a_column_that_only_a_row_of_the_least_weight_has():
    x = data(50, 5, 1)
    x[1:, 3] = math.nan
    weight = torch.ones(50, dtype=F64)
    weight[0] = 1e-310
    mean, _ = column_moments(Dataset(x, weight, "em", 1, Processes(None)))
    assert mean[3].item() == pytest.approx(x[0, 3].item())


def test_bad_floors_and_weights():
    x = data(20, 4, 1)
    with pytest.raises(ValueError, match="min_sigma2 must be at least 0 and finite; got -1"):
        PPCA(1).fit(x, min_sigma2=-1.0)
    for weight, message in [
        (torch.ones(7), r"sample_weight must be \[N\] with N=20 from X; got \(7,\)"),
        (-torch.ones(20), "sample_weight must be finite and at least 0"),
        (torch.full((20,), math.nan), "sample_weight must be finite"),
        (torch.zeros(20), "sample_weight must have a weight that is not zero; all 20 are"),
    ]:
        with pytest.raises(ValueError, match=message):
            PPCA(1).fit(x, sample_weight=weight)
    with pytest.raises(TypeError, match="sample_weight must be None unless X is one array; X is list"):
        PPCA(1).fit([x], sample_weight=torch.ones(20))


def test_em_is_reproducible():
    x = data(100, 6, 2)
    a, b = (PPCA(2).fit(x, "em", max_iter=5, generator=torch.Generator().manual_seed(3)) for _ in range(2))
    same_model(a, b, 0.0)


def gaps(x: Tensor, share: float = 0.25) -> Tensor:
    missing = torch.rand(x.shape, generator=torch.Generator().manual_seed(1)) < share
    return torch.where(missing, math.nan, x)


def test_em_with_missing_cells():
    """Monotone; stationary for the exact observed-data likelihood; nearer to the truth than filling in means."""
    truth = data(400, 8, 2)
    x = gaps(truth)
    x[7] = math.nan  # a row without any cell
    m = PPCA(2).fit(x, "em", tol=1e-12, max_iter=3000)
    history = m.fit_report.log_likelihood
    assert m.fit_report.converged
    assert all(b >= a - 1e-10 for a, b in pairwise(history))
    assert history[-1] == pytest.approx(mean_log_prob(m, x), rel=1e-9)
    grads = torch.autograd.grad(m.log_prob(x).mean(), list(m.parameters()))
    assert max(g.abs().max() for g in grads) < 1e-4
    hidden = x.isnan()
    filled = torch.where(hidden, x.nanmean(0), x)
    error, naive = ((t - truth)[hidden].square().mean() for t in (m.impute(x), filled))
    assert error < 0.35 * naive


def test_missing_cells_that_are_none_change_nothing():
    """The same steps, by normal equations for every column or in one."""
    x = data(60, 7, 2)
    nearly = torch.cat([x, torch.full((1, 7), math.nan, dtype=F64)])
    a, b = (
        PPCA(2).fit(t, "em", tol=1e-13, max_iter=4000, generator=torch.Generator().manual_seed(0)) for t in (x, nearly)
    )
    same_model(a, b, 1e-4, 1e-5)


def test_missing_cells_far_from_the_origin():
    x = gaps(data(200, 6, 2, sigma=0.05))
    options = {"method": "em", "max_iter": 200}
    a, b = (PPCA(2).fit(t, generator=torch.Generator().manual_seed(0), **options) for t in (x, x + 1e5))
    torch.testing.assert_close(a.W @ a.W.T, b.W @ b.W.T, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(a.log_sigma2, b.log_sigma2, rtol=1e-4, atol=1e-4)


def test_a_column_that_is_never_observed():
    x = data(50, 6, 2)
    x[:, 4] = math.nan
    with pytest.raises(ValueError, match="X must have an observed cell in every column; none in 4"):
        PPCA(2).fit(x, "em")


# ----------------------------------------------------------------------------------------------------------------------
# Batches.


@pytest.mark.parametrize("method", ["eig", "em"])
@pytest.mark.parametrize("N, D", [(200, 6), (10, 30)])
@pytest.mark.parametrize("missing", [False, True])
def test_batches_give_what_the_whole_gives(method, N, D, missing):
    if missing and method == "eig":
        return
    x = gaps(data(N, D, 2), 0.1) if missing else data(N, D, 2)
    options = {"method": method} | ({"max_iter": 30} if method == "em" else {})

    def fit(X):
        return PPCA(2).fit(X, generator=torch.Generator().manual_seed(0), **options)

    whole = fit(x)
    same_model(whole, fit(x.split(7)), 1e-7, 1e-9)
    same_model(whole, fit(DataLoader(TensorDataset(x, torch.arange(N)), batch_size=9)), 1e-7, 1e-9)
    same_model(whole, fit([part.numpy() for part in x.split(N - 1)]), 1e-7, 1e-9)


def test_eig_takes_an_iterator():
    x = data(100, 5, 2)
    same_model(PPCA(2).fit(iter(x.split(9))), PPCA(2).fit(x), 1e-9, 1e-10)


# ----------------------------------------------------------------------------------------------------------------------
# Several processes.


def _worker(
    rank: int, size: int, port: int, shards: list[Tensor], method: str, folder: str, weights=None, components=2
) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=size)
    torch.manual_seed(rank)  # the processes must agree all the same
    options = {"max_iter": 25} if method == "em" else {}
    if weights is not None:
        options["sample_weight"] = weights[rank]
    X: Any = shards[rank]
    if method == "krylov":
        method, options["solver"], options["tol"] = "eig", "krylov", 1e-18
        X = X.to_sparse_csr() if rank % 2 else X
    m = PPCA(components).fit(X, method, group=dist.group.WORLD, **options)
    torch.save((m.state_dict(), m.fit_report), f"{folder}/{rank}.pt")
    leave_group()


@pytest.mark.parametrize(
    "method, N, D, sizes, missing",
    [
        ("eig", 90, 6, [50, 40], False),
        ("eig", 90, 6, [80, 0, 10], False),
        ("eig", 12, 20, [9, 0, 3], False),
        ("krylov", 90, 6, [50, 40], False),  # the rows of every other process are sparse
        ("krylov", 90, 30, [40, 0, 20, 30], False),
        ("em", 90, 6, [50, 40], False),
        ("em", 90, 6, [80, 0, 10], True),
    ],
)
def test_processes_give_what_one_gives(tmp_path, method, N, D, sizes, missing):
    x = gaps(data(N, D, 2, offset=100.0)) if missing else data(N, D, 2, offset=100.0)
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    mp.start_processes(
        _worker, (len(sizes), port, list(x.split(sizes)), method, str(tmp_path)), len(sizes), start_method="fork"
    )
    found = [torch.load(tmp_path / f"{rank}.pt", weights_only=False) for rank in range(len(sizes))]
    for state, report in found[1:]:
        assert report == found[0][1]
        assert all(torch.equal(state[name], found[0][0][name]) for name in state)
    state, report = found[0]
    assert report.rows == N
    torch.manual_seed(0)  # the start of EM is that of the first process
    alone = PPCA(2).fit(x, "em", max_iter=25) if method == "em" else PPCA(2).fit(x)
    for name, value in alone.state_dict().items():
        torch.testing.assert_close(state[name], value, rtol=1e-7, atol=1e-9)
    assert np.allclose(report.log_likelihood, alone.fit_report.log_likelihood, rtol=1e-9)


@pytest.mark.parametrize("total", [1e-300, 0.01, 1e300])
@pytest.mark.parametrize(
    "method, D, missing", [("eig", 6, False), ("eig", 90, False), ("em", 6, False), ("em", 6, True)]
)
def test_weights_of_processes_have_a_ratios_meaning(tmp_path, method, D, missing, total):
    x = 1e3 * (gaps(data(60, D, 2), 0.2) if missing else data(60, D, 2))
    weight = torch.randint(1, 4, (60,), generator=torch.Generator().manual_seed(0))
    weights = (weight.double() * (total / int(weight.sum()))).split([40, 20])
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    arguments = 2, port, list(x.split([40, 20])), method, str(tmp_path), weights
    mp.start_processes(_worker, arguments, 2, start_method="fork")
    state, report = torch.load(tmp_path / "0.pt", weights_only=False)
    torch.manual_seed(0)
    repeated = x.repeat_interleave(weight, 0)
    alone = PPCA(2).fit(repeated, method, **({"max_iter": 25} if method == "em" else {}))
    for name, value in alone.state_dict().items():
        torch.testing.assert_close(state[name], value, rtol=1e-7, atol=1e-6)
    assert np.allclose(report.log_likelihood, alone.fit_report.log_likelihood, rtol=1e-9)


def _bad_worker(
    rank: int, size: int, port: int, shards: list, method: str, folder: str, components: tuple[int, int] = (2, 2)
) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=size)
    try:
        PPCA(components[rank]).fit(shards[rank], method, group=dist.group.WORLD)
        told = "nothing"
    except (ValueError, TypeError) as error:
        told = str(error)
    torch.save(told, f"{folder}/{rank}.pt")
    leave_group()


@pytest.mark.parametrize("method", ["eig", "em"])
@pytest.mark.parametrize("kind", ["infinite", "complex", "later batch", "no array"])
def test_bad_rows_of_one_process_raise_in_all(tmp_path, method, kind):
    x = data(40, 6, 2)
    bad, message = {
        "infinite": (torch.where(x > 2, math.inf, x), "X must be finite"),
        "complex": (x + 0j, "X must be floating"),
        "later batch": ([x[:9], x[:9, :4]], "every batch of X must be"),
        "no array": (None, "X must be a tensor"),
    }[kind]
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    mp.start_processes(_bad_worker, (2, port, [x, bad], method, str(tmp_path)), 2, start_method="fork")
    told = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    assert told[0].startswith("X is refused by another process") and told[1].startswith(message)


@pytest.mark.parametrize("N, D", [(100, 6), (20, 30)])
def test_processes_choose_one_number_of_components(tmp_path, N, D):
    x = data(N, D, 2)
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    options = (2, port, list(x.split([N - 7, 7])), "eig", str(tmp_path), None, "evidence")
    mp.start_processes(_worker, options, 2, start_method="fork")
    expected = PPCA("evidence").fit(x)
    for rank in range(2):
        state, _ = torch.load(tmp_path / f"{rank}.pt", weights_only=False)
        torch.testing.assert_close(state["W"], expected.W.detach(), rtol=1e-7, atol=1e-6)


@pytest.mark.parametrize("method", ["eig", "em"])
@pytest.mark.parametrize("others", [(2, 3), (2, "bic")])
def test_processes_with_other_numbers_of_components_all_say_so(tmp_path, method, others):
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    options = (2, port, [data(40, 6, 2)] * 2, method, str(tmp_path), others)
    mp.start_processes(_bad_worker, options, 2, start_method="fork")
    for rank, M in enumerate(others):
        have = f"they have 2 to {others[1]}, this one {M}"
        expected = f"n_components must be the same in every process of the group; {have}"
        assert torch.load(tmp_path / f"{rank}.pt") == expected


def test_public_names():
    assert fastelbo.PPCA is PPCA and fastelbo.FitReport is type(PPCA(1).fit(data(20, 4, 1)).fit_report)
