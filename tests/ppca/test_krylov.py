"""The solver "krylov" against the whole spectrum: the subspace, s2, and what cannot converge."""

import math

import pytest
import scipy.sparse
import torch
from torch import Tensor

import fastelbo
from fastelbo import PPCA
from fastelbo.ppca import closed_form

F64 = torch.float64
TOL = 1e-6  # the default of fit


def rows(values: Tensor, N: int, offset: float = 0.0, seed: int = 0) -> Tensor:
    """X [N, D] in float64 whose covariance has these eigenvalues [D] to rounding."""
    g = torch.Generator().manual_seed(seed)
    D = len(values)
    U, V = (torch.linalg.qr(torch.randn(n, D, dtype=F64, generator=g))[0] for n in (N, D))
    U = torch.linalg.qr(U - U.mean(0))[0]
    return math.sqrt(N) * (U * values.sqrt()) @ V.T + offset * torch.randn(D, dtype=F64, generator=g)


SPECTRA = {
    "a model's own": torch.cat([torch.linspace(9, 3, 8, dtype=F64), torch.linspace(1.1, 0.9, 112, dtype=F64)]),
    "slowly decaying": 1 / torch.arange(1, 121, dtype=F64),
    "of seven orders": 10 ** torch.linspace(4, -3, 120, dtype=F64),
    "equal at the top": torch.cat([torch.full((8,), 5.0, dtype=F64), torch.ones(112, dtype=F64)]),
}


def off(found: PPCA, exact: PPCA) -> tuple[float, float]:
    """The sine of the largest angle between the subspaces, and the relative error of s2."""
    a, b = (torch.linalg.qr(m.W.detach().double())[0] for m in (found, exact))
    return torch.linalg.svdvals(b - a @ (a.T @ b)).max().item(), abs(
        math.expm1((found.log_sigma2 - exact.log_sigma2).item())
    )


@pytest.mark.parametrize("dtype", [torch.float32, F64], ids=str)
@pytest.mark.parametrize("offset", [0.0, 100.0])
@pytest.mark.parametrize("name", SPECTRA)
def test_the_subspace_and_the_noise_are_those_of_the_whole_spectrum(name, offset, dtype):
    x = rows(SPECTRA[name], 400, offset).to(dtype)
    exact = PPCA(8).fit(x.double(), solver="full")
    found = PPCA(8).fit(x, solver="krylov", generator=torch.Generator().manual_seed(1))
    assert found.fit_report.converged and found.fit_report.solver == "krylov" and found.W.dtype == dtype
    sine, sigma2 = off(found, exact)
    assert sine <= 1e-3 and sigma2 <= 1e-5
    torch.testing.assert_close(found.b.double(), x.double().mean(0), rtol=1e-6, atol=1e-6)
    expected = exact.fit_report.log_likelihood[-1]
    assert found.fit_report.log_likelihood[-1] == pytest.approx(expected, rel=1e-6)


def test_a_small_tol_gives_the_eigenvectors_themselves():
    x = rows(SPECTRA["slowly decaying"], 400)
    exact, found = PPCA(8).fit(x, solver="full"), PPCA(8).fit(x, solver="krylov", tol=1e-18)
    torch.testing.assert_close(found.W, exact.W, rtol=1e-7, atol=1e-8)
    torch.testing.assert_close(found.log_sigma2, exact.log_sigma2, rtol=0, atol=1e-12)
    again = PPCA(8).fit(x, solver="covariance")
    torch.testing.assert_close(again.W, exact.W, rtol=1e-7, atol=1e-8)


def test_equal_eigenvalues_at_the_cut_are_said_not_to_converge():
    """A cluster that is larger than the block: no eight of its directions are the first ones. s2 is determined."""
    values = torch.cat([torch.full((40,), 5.0, dtype=F64), torch.ones(80, dtype=F64)])
    x, found = rows(values, 400), PPCA(8)
    with pytest.warns(RuntimeWarning, match="The solver krylov did not converge.*hardly differ from the 8th on"):
        found.fit(x, solver="krylov", max_iter=30)
    assert not found.fit_report.converged
    assert off(found, PPCA(8).fit(x, solver="full"))[1] < 1e-3


def test_weights_batches_and_bytes():
    x = rows(SPECTRA["a model's own"], 400, 3.0)
    weight = torch.rand(400, dtype=F64) + 0.1
    options = {"solver": "krylov", "tol": 1e-18}
    a, b = (PPCA(8).fit(x, sample_weight=weight, **o) for o in (options, {"solver": "full"}))
    torch.testing.assert_close(a.W, b.W, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(a.b, b.b, rtol=1e-10, atol=1e-10)
    whole, batches = (PPCA(8).fit(X, **options) for X in (x, list(x.split(70))))
    torch.testing.assert_close(batches.W, whole.W, rtol=1e-6, atol=1e-7)
    pixels = (x.clamp(0, 1) * 255).byte()
    a, b = (PPCA(8).fit(pixels, solver=solver, tol=1e-10) for solver in ("krylov", "full"))
    assert off(a, b)[0] < 1e-4
    dataset = fastelbo.data.Dataset(x) if hasattr(fastelbo, "data") else None
    if dataset is not None:
        torch.testing.assert_close(PPCA(8).fit(dataset, **options).W, whole.W.float(), rtol=1e-3, atol=1e-4)


def test_fewer_rows_than_columns():
    x = rows(SPECTRA["a model's own"], 400).T.contiguous()[:60]
    exact, found = PPCA(5).fit(x, solver="full"), PPCA(5).fit(x, solver="krylov")
    sine, sigma2 = off(found, exact)
    assert sine <= 1e-3 and sigma2 <= 1e-5


def test_data_without_noise_are_refused():
    x = torch.randn(300, 5, dtype=F64) @ torch.randn(5, 50, dtype=F64)
    with pytest.raises(ValueError, match="n_components must be less than the rank 5 of the centered data"):
        PPCA(5).fit(x, solver="krylov")


def test_auto_is_krylov_for_few_components_of_large_data(monkeypatch):
    x = rows(SPECTRA["a model's own"], 400)

    def solver(X: object, M: int = 8) -> str | None:
        return PPCA(M).fit(X).fit_report.solver

    assert solver(x) == "full"
    monkeypatch.setattr(closed_form, "LARGE", 120)
    assert solver(x) == "krylov" and solver(list(x.split(100))) == "krylov"
    assert solver(x, 25) == "full"  # many components
    assert solver(x[:100]) == "full"  # few rows
    assert solver(iter(x.split(100))) == "full"  # which can be read once


def test_auto_goes_on_to_full_where_krylov_does_not_converge(monkeypatch):
    """But for what "full" would hold in memory: sparse data, batches."""
    monkeypatch.setattr(closed_form, "LARGE", 120)
    x = rows(torch.cat([torch.full((40,), 5.0, dtype=F64), torch.ones(80, dtype=F64)]), 400)
    found, exact = PPCA(8).fit(x), PPCA(8).fit(x, solver="full")
    assert found.fit_report.solver == "full" and found.fit_report.converged
    assert all(torch.equal(p, q) for p, q in zip(found.parameters(), exact.parameters(), strict=True))
    for X in (scipy.sparse.csr_array(x), list(x.split(100))):
        with pytest.warns(RuntimeWarning, match="The solver krylov did not converge"):
            PPCA(8).fit(X, max_iter=30)
    monkeypatch.setattr(closed_form, "MODERATE", 119)
    with pytest.warns(RuntimeWarning, match="The solver krylov did not converge"):
        PPCA(8).fit(x, max_iter=30)


def test_what_is_no_solver_and_what_cannot_be_read_again():
    x = rows(SPECTRA["a model's own"], 400)
    with pytest.raises(ValueError, match='solver must be one of "auto", "full", "covariance", "krylov"'):
        PPCA(8).fit(x, solver="arpack")
    with pytest.raises(ValueError, match='solver must be "auto" for method "em"'):
        PPCA(8).fit(x, "em", solver="krylov")
    with pytest.raises(TypeError, match='starts anew each time for solver "krylov"'):
        PPCA(8).fit(iter([x]), solver="krylov")


def test_the_generator_decides_the_start():
    x = rows(SPECTRA["slowly decaying"], 400).float()
    a, b = (PPCA(8).fit(x, solver="krylov", generator=torch.Generator().manual_seed(3)) for _ in range(2))
    assert all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))
