"""Sparse data against the same data as a dense matrix."""

import itertools
from copy import deepcopy

import numpy as np
import pytest
import scipy.sparse as sp
import torch
from torch import Tensor

from fastelbo import PPCA
from fastelbo.ppca import sparse
from fastelbo.ppca.result import Parameters
from fastelbo.sklearn import PPCA as Estimator

F64 = torch.float64
N, D, M = 90, 40, 3


def dense(dtype: torch.dtype = F64, seed: int = 0) -> Tensor:
    """Counts, nine cells of ten of them 0, with an empty row and an empty column."""
    g = torch.Generator().manual_seed(seed)
    rate = torch.exp(torch.randn(N, M, generator=g) @ torch.randn(M, D, generator=g) / 2 - 2.5)
    x = torch.poisson(rate, generator=g)
    x[4], x[:, 7] = 0, 0
    return x.to(dtype)


FORMS = {
    "csr_matrix": lambda x: sp.csr_matrix(x.numpy()),
    "csr_array": lambda x: sp.csr_array(x.numpy()),
    "csc_matrix": lambda x: sp.csc_matrix(x.numpy()),
    "coo_matrix": lambda x: sp.coo_matrix(x.numpy()),
    "torch's CSR": lambda x: x.to_sparse_csr(),
    "torch's CSC": lambda x: x.to_sparse_csc(),
    "torch's COO": lambda x: x.to_sparse(),
}
every_form = pytest.mark.parametrize("form", FORMS)


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    monkeypatch.setattr(sparse, "TILE_ELEMENTS", 17 * D)
    monkeypatch.setattr(sparse, "PIECE_CELLS", 70)


def same(a: PPCA, b: PPCA, tol: float = 1e-9) -> None:
    for p, q in zip(a.parameters(), b.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=tol, atol=tol)


@every_form
@pytest.mark.parametrize("solver", ["full", "covariance", "krylov"])
def test_fit(form, solver):
    x = dense()
    found, expected = (PPCA(M).fit(X, solver=solver, tol=1e-18) for X in (FORMS[form](x), x))
    if solver == "krylov":
        expected = PPCA(M).fit(x, solver="full")
    same(found, expected, 1e-6 if solver == "krylov" else 1e-9)


@every_form
def test_em_weights_and_fewer_rows_than_columns(form):
    x, weight = dense(), torch.arange(N) % 3
    X = FORMS[form](x)
    generator = torch.Generator()
    a, b = (PPCA(M).fit(t, "em", generator=generator.manual_seed(1)) for t in (X, x))
    same(a, b, 1e-6)
    for solver in ("full", "krylov"):
        a, b = (PPCA(M).fit(t, sample_weight=weight, solver=solver, tol=1e-18) for t in (X, x))
        same(a, b, 1e-6 if solver == "krylov" else 1e-9)
    same(PPCA(M).fit(FORMS[form](x[:30])), PPCA(M).fit(x[:30]))


@every_form
@pytest.mark.parametrize("gradients", [False, True])
def test_what_a_model_says_of_them(form, gradients):
    """With gradients by dense tiles, without by what is shortened."""
    x = dense()
    X, model = FORMS[form](x), PPCA(M).fit(x).requires_grad_(gradients)
    numpy = form.startswith("c")
    mu, logvar = torch.randn(N, M, dtype=F64), torch.randn(N, M, dtype=F64)
    if numpy:
        mu, logvar = mu.numpy(), logvar.numpy()
    for name, others in (
        ("log_prob", ()),
        ("score_samples", ()),
        ("transform", ()),
        ("posterior", ()),
        ("elbo", (mu, logvar)),
        ("inference_gap", (mu, logvar)),
    ):
        found, expected = (getattr(model, name)(t, *others) for t in (X, x.numpy() if numpy else x))
        for a, e in zip(*(t if isinstance(t, tuple) else (t,) for t in (found, expected)), strict=True):
            assert type(a) is type(e)
            torch.testing.assert_close(torch.as_tensor(a), torch.as_tensor(e), rtol=1e-12, atol=1e-12)
            assert numpy or a.requires_grad == gradients
    assert model.score(X) == pytest.approx(model.score(x), rel=1e-12)
    assert model.bic(X) == pytest.approx(model.bic(x), rel=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, F64])
@pytest.mark.parametrize("offset", [0.0, 30.0, 1e4])
@pytest.mark.parametrize("sigma2", [1e-6, 1.0])
def test_log_prob_is_as_exact_as_that_of_dense_rows(dtype, offset, sigma2, monkeypatch):
    """Also where |x - b|^2, or what is orthogonal to W, is far smaller than |x|^2: those rows are read as tiles."""
    g = torch.Generator().manual_seed(0)
    W, b = torch.randn(D, M, dtype=F64, generator=g), torch.full((D,), offset, dtype=F64)
    model = PPCA._of(Parameters(W, b, torch.tensor(sigma2, dtype=F64).log()).to(dtype))
    x = model.sample(N, generator=g)
    x[::3] = dense(dtype, seed=1)[::3]
    calls = []
    monkeypatch.setattr(sparse.Rows, "tiles", _counted(sparse.Rows.tiles, calls))
    with torch.no_grad():
        found, as_dense = model.log_prob(x.to_sparse_csr()), model.log_prob(x)
        exact = deepcopy(model).double().log_prob(x.double())
    tol = 2e-6 if dtype == torch.float32 else 1e-11
    torch.testing.assert_close(found.double(), exact, rtol=tol, atol=0)
    torch.testing.assert_close(found, as_dense, rtol=tol, atol=0)
    if sigma2 < 1 or offset == 1e4:
        assert calls
    elif dtype == torch.float32:
        assert not calls


def _counted(tiles, calls):
    def counted(self, where=None):
        for tile in tiles(self, where):
            calls.append(tile)
            yield tile

    return counted


def test_a_row_s_gradients():
    x, model = dense(), PPCA(M).fit(dense())
    grads = []
    for X in (x, x.to_sparse_csr()):
        model.zero_grad()
        model.log_prob(X).mean().backward()
        grads.append([p.grad for p in model.parameters()])
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


def test_batches_of_sparse_rows():
    x = dense()
    batches = [sp.csr_matrix(part.numpy()) for part in x.split(25)]
    same(PPCA(M).fit(batches), PPCA(M).fit(x))
    same(PPCA(M).fit(batches, solver="krylov", tol=1e-18), PPCA(M).fit(x), 1e-6)


def test_the_caller_s_matrix_is_not_changed_where_a_cell_is_there_twice():
    x = dense()
    X = sp.csr_matrix(x.numpy())
    data, indices, indptr = (np.concatenate([t, t[-1:]]) for t in (X.data, X.indices, X.indptr))
    indptr = np.concatenate([X.indptr[:-1], [X.nnz + 1]])
    twice = sp.csr_matrix((data, indices, indptr), shape=X.shape)
    before = twice.data.copy(), twice.indices.copy(), twice.indptr.copy()
    summed = torch.from_numpy(twice.toarray())
    same(PPCA(M).fit(twice), PPCA(M).fit(summed))
    for a, b in zip((twice.data, twice.indices, twice.indptr), before, strict=True):
        np.testing.assert_array_equal(a, b)


def test_columns_in_any_order():
    x = dense()
    csr = x.to_sparse_csr()
    starts, columns, values = csr.crow_indices(), csr.col_indices().clone(), csr.values().clone()
    for a, b in itertools.pairwise(starts.tolist()):
        columns[a:b], values[a:b] = columns[a:b].flip(0), values[a:b].flip(0)
    falling = torch.sparse_csr_tensor(starts, columns, values, x.shape, check_invariants=False)
    for solver in ("full", "krylov"):
        same(PPCA(M).fit(falling, solver=solver, tol=1e-18), PPCA(M).fit(x), 1e-6)
    far = torch.sparse_csr_tensor(starts, columns + D, values, x.shape, check_invariants=False)
    with pytest.raises(ValueError, match="a sparse matrix must have columns from 0 to 39"):
        PPCA(M).fit(far)


def test_what_is_refused():
    x = dense()
    model = PPCA(M).fit(x)
    with pytest.raises(TypeError, match=r"X must be floating, uint8 .* or bool; got torch.int64"):
        PPCA(M).fit(sp.csr_matrix(x.long().numpy()))
    x[3, 3] = torch.nan
    with pytest.raises(ValueError, match='X must be finite for method "eig"'):
        PPCA(M).fit(sp.csr_matrix(x.numpy()))
    with pytest.raises(ValueError, match="x must have no NaN where it is sparse"):
        model.posterior(sp.csr_matrix(x.numpy()))
    with pytest.raises(ValueError, match=r"x must be \[N, D\] with D=40"):
        model.log_prob(sp.csr_matrix(x[:, :5].numpy()))
    with pytest.raises(TypeError, match="unexpected keyword argument 'mask'"):
        model.log_prob(sp.csr_matrix(x.numpy()), mask=None)


@pytest.mark.parametrize("kind", [sp.csr_matrix, sp.csr_array, sp.csc_matrix])
@pytest.mark.parametrize("solver", ["auto", "full", "covariance", "krylov"])
def test_the_estimator(kind, solver):
    x = dense().numpy()
    options = {"solver": solver, "tol": 1e-18, "random_state": 0}
    found, expected = (Estimator(M, **options).fit(X) for X in (kind(x.astype(np.int64)), x))
    np.testing.assert_allclose(found.components_, expected.components_, rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(found.transform(kind(x)), expected.transform(x), rtol=1e-6, atol=1e-6)
    assert found.score(kind(x)) == pytest.approx(expected.score(x), rel=1e-6) and found.converged_
    two = Estimator(M, **options).partial_fit(kind(x[:50])).partial_fit(kind(x[50:]))
    np.testing.assert_allclose(two.components_, expected.components_, rtol=1e-6, atol=1e-6)
