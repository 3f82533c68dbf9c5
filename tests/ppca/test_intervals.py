"""Standard deviations of imputed cells, conditional densities of columns: the dense Gaussian's, and their coverage."""

import math

import numpy as np
import pytest
import torch
from oracle import peak
from torch import Tensor
from torch.autograd import gradcheck

import fastelbo.sklearn
from fastelbo import PPCA
from fastelbo.ppca import intervals

F64 = torch.float64
NAN = math.nan


def model(D: int, M: int, sigma: float = 0.4, dtype: torch.dtype = F64) -> PPCA:
    m = PPCA(M, D, dtype=dtype)
    values = {"W": torch.randn(D, M), "b": torch.randn(D), "log_sigma2": torch.tensor(2 * math.log(sigma))}
    m.load_state_dict(values)
    return m


def rows(N: int, D: int, share: float = 0.4) -> Tensor:
    """The first is complete, of the second nothing is observed."""
    x = torch.randn(N, D, dtype=F64)
    x = torch.where(torch.rand(N, D) < share, NAN, x)
    x[0], x[1] = torch.randn(D, dtype=F64), NAN
    return x


def dense(m: PPCA, row: Tensor, chosen: Tensor, observed: Tensor) -> tuple[Tensor, Tensor]:
    """Of the Gaussian N(b, W W' + s2 I): mean and covariance of the chosen cells given those that are observed."""
    W, b, s2 = m.W.detach(), m.b.detach(), m.log_sigma2.detach().exp()
    C = W @ W.T + s2 * torch.eye(len(W), dtype=F64)
    gain = torch.linalg.solve(C[observed][:, observed], C[observed][:, chosen]).T
    return b[chosen] + gain @ (row - b)[observed], C[chosen][:, chosen] - gain @ C[observed][:, chosen]


def close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)


# ----------------------------------------------------------------------------------------------------------------------
# Against the dense formulas.


@pytest.mark.parametrize("D, M", [(2, 1), (8, 3), (5, 4), (40, 11)])
def test_deviations_of_imputed_cells(D, M):
    m, x = model(D, M), rows(30, D)
    with torch.no_grad():
        filled, std = m.impute(x, return_std=True)
        assert torch.equal(filled, m.impute(x)) and torch.equal(m.impute(x, False), filled)
    assert filled.shape == std.shape == x.shape
    for row, mean, deviation in zip(x, filled, std, strict=True):
        hidden = row.isnan()
        expected, covariance = dense(m, row, hidden.nonzero().flatten(), ~hidden)
        close(mean[hidden], expected)
        close(deviation[hidden], covariance.diagonal().sqrt())
        assert torch.equal(mean[~hidden], row[~hidden]) and not deviation[~hidden].any()


@pytest.mark.parametrize("missing", [False, True])
@pytest.mark.parametrize("columns", [[0], [6, 2, 3], list(range(7)), list(range(8))], ids=len)
def test_predict_is_the_conditional_normal(columns, missing):
    m, x = model(8, 3), rows(20, 8) if missing else torch.randn(20, 8, dtype=F64)
    with torch.no_grad():
        mean, covariance = m.predict(x, columns)
    assert mean.shape == (20, len(columns)) and covariance.shape == (20, len(columns), len(columns))
    assert torch.equal(covariance, covariance.mT)
    chosen = torch.tensor(columns)
    for n, row in enumerate(x):
        observed = ~row.isnan()
        observed[chosen] = False
        expected = dense(m, row, chosen, observed)
        close(mean[n], expected[0])
        close(covariance[n], expected[1])


def test_what_lies_in_the_columns_is_not_looked_at():
    m, x = model(6, 2), torch.randn(9, 6, dtype=F64)
    expected = m.predict(x, [1, 4])
    for value in (NAN, math.inf, -math.inf, 3.0):
        x[:, [1, 4]] = value
        found = m.predict(x, [1, 4])
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_columns_of_every_kind():
    m, x = model(6, 2), rows(9, 6)
    expected = m.predict(x, [1, 4])
    mask = [d in (1, 4) for d in range(6)]
    kinds = [(1, 4), range(1, 5, 3), torch.tensor([1, 4]), np.array([1, 4]), np.array([1, 4], np.uint8)]
    for columns in (*kinds, [np.int64(1), 4], mask, torch.tensor(mask), np.array(mask)):
        assert all(torch.equal(a, b) for a, b in zip(m.predict(x, columns), expected, strict=True))
    mean, covariance = m.predict(x, [4, 1])
    close(mean, expected[0].flip(1))
    close(covariance, expected[1].flip(1, 2))


def test_an_imputed_cell_is_a_predicted_one():
    m, x = model(7, 3), rows(12, 7)
    x[:, 2] = NAN
    filled, std = m.impute(x, return_std=True)
    mean, covariance = m.predict(x, [2])
    close(filled[:, 2], mean[:, 0])
    close(std[:, 2], covariance[:, 0, 0].sqrt())


@pytest.mark.parametrize("dtype", [torch.uint8, torch.bool])
def test_other_data(dtype):
    m, x = model(6, 2, dtype=torch.float32), (torch.rand(9, 6) < 0.5).to(dtype)
    wide = x.float() / 255 if dtype == torch.uint8 else x.float()
    for found, expected in zip(m.predict(x, [3]), m.predict(wide, [3]), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)
    filled, std = m.impute(x, return_std=True)
    assert torch.equal(filled, x) and std.dtype == torch.float32 and not std.any()


@pytest.mark.parametrize("kind", [np.float32, np.float64])
def test_numpy_in_numpy_out(kind):
    m = model(6, 2, dtype=torch.float64 if kind == np.float64 else torch.float32)
    x = rows(9, 6).numpy().astype(kind)
    tensors = (*m.impute(torch.from_numpy(x), return_std=True), *m.predict(torch.from_numpy(x), [1, 4]))
    for found, expected in zip((*m.impute(x, return_std=True), *m.predict(x, [1, 4])), tensors, strict=True):
        assert isinstance(found, np.ndarray) and found.dtype == kind and expected.requires_grad
        np.testing.assert_array_equal(found, expected.detach().numpy())
    masked = np.ma.masked_array(np.nan_to_num(x), np.isnan(x))
    np.testing.assert_array_equal(m.impute(masked, return_std=True)[1], m.impute(x, return_std=True)[1])


def test_no_rows():
    m, x = model(6, 2), torch.empty(0, 6, dtype=F64)
    assert [t.shape for t in m.impute(x, return_std=True)] == [(0, 6), (0, 6)]
    assert [t.shape for t in m.predict(x, [1, 4])] == [(0, 2), (0, 2, 2)]


def test_the_estimator_of_scikit_learn():
    x = rows(60, 6)[2:].numpy()
    m = fastelbo.sklearn.PPCA(2, method="em", random_state=0).fit(x)
    for found, expected in zip(m.impute(x, return_std=True), m.model_.impute(x, True), strict=True):
        np.testing.assert_array_equal(found, expected)
    np.testing.assert_array_equal(m.impute(x), m.impute(x, return_std=True)[0])


# ----------------------------------------------------------------------------------------------------------------------
# Gradients, memory.


@pytest.mark.parametrize("of", ["impute", "predict", "predict, missing"])
def test_gradients(of):
    x, hidden = torch.randn(4, 5, dtype=F64, requires_grad=True), torch.rand(4, 5) < 0.4
    hidden[0], hidden[1] = False, True
    start = model(5, 2)

    def found(x: Tensor, W: Tensor, b: Tensor, log_sigma2: Tensor) -> tuple[Tensor, ...]:
        m = PPCA(2, 5, dtype=F64)
        m._parameters.update(W=W, b=b, log_sigma2=log_sigma2)
        x = x if of == "predict" else torch.where(hidden, NAN, x)
        return m.impute(x, return_std=True) if of == "impute" else m.predict(x, [3, 0])

    assert gradcheck(found, (x, *start.parameters()))


def test_pieces_of_rows(monkeypatch):
    m, x = model(9, 3), rows(50, 9)

    def found() -> list[Tensor]:
        filled, std = m.impute(x, return_std=True)
        up = torch.linspace(1, 2, x.numel(), dtype=F64).view_as(x)
        return [filled, std, *torch.autograd.grad((up * (filled + std)).sum(), list(m.parameters()))]

    expected = found()
    monkeypatch.setattr(intervals, "PIECE_ELEMENTS", 1)  # 16 rows
    for a, b in zip(found(), expected, strict=True):
        close(a, b)


def test_memory_does_not_hold_a_matrix_of_every_row():
    """N = 20,000, M = 40: the matrices [N, M, M] alone would be 256 MB; nor D M^2, for D = 20,000 128 MB."""
    for N, D, M in ((20_000, 50, 40), (20, 20_000, 40)):
        m, x = model(D, M), rows(N, D)
        with torch.no_grad():
            assert peak(lambda m=m, x=x: m.impute(x, return_std=True)) < 120e6


# ----------------------------------------------------------------------------------------------------------------------
# Coverage.


@pytest.mark.parametrize("share", [0.1, 0.3, 0.5, 0.8])
def test_nine_tenths_of_the_cells_are_in_intervals_of_90_percent(share):
    N, D, M = 4000, 20, 3
    torch.manual_seed(0)
    x = torch.randn(N, M, dtype=F64) @ torch.randn(M, D, dtype=F64) + 0.7 * torch.randn(N, D, dtype=F64)
    hidden = torch.rand(N, D) < share
    gaps = x.masked_fill(hidden, NAN)
    m = PPCA(M).fit(gaps, "em", generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        filled, std = m.impute(gaps, return_std=True)
    within = ((x - filled).abs() < 1.645 * std) & hidden
    coverage = within.sum() / hidden.sum()
    off = within.sum(1) - coverage * hidden.sum(1)  # cells of a row depend on each other, rows do not
    assert off.square().sum().sqrt() / hidden.sum() < 0.005
    assert 0.88 < coverage < 0.92


# ----------------------------------------------------------------------------------------------------------------------
# The standard error of the score.


def test_the_standard_error_of_the_score():
    m, x = model(6, 2), rows(40, 6)
    values = m.log_prob(x).detach()
    mean, error = m.score(x, return_std=True)
    assert mean == m.score(x) == m.score(x, False) and isinstance(error, float)
    assert error == pytest.approx(values.numpy().std(ddof=1) / math.sqrt(40), rel=1e-12)
    assert math.isnan(m.score(x[:1], return_std=True)[1])


# ----------------------------------------------------------------------------------------------------------------------
# Errors.

KINDS = "columns must be a sequence of ints or a bool mask"


@pytest.mark.parametrize(
    "call, error, message",
    [
        (lambda m, x: m.impute(x, 1), TypeError, "return_std must be a bool; got int"),
        (lambda m, x: m.score(x, return_std="std"), TypeError, "return_std must be a bool; got str"),
        (lambda m, x: m.predict(x, 3), TypeError, rf"{KINDS} \[D\]; got int"),
        (lambda m, x: m.predict(x, None), TypeError, rf"{KINDS} \[D\]; got None"),
        (lambda m, x: m.predict(x, "12"), TypeError, rf"{KINDS} \[D\]; got str"),
        (lambda m, x: m.predict(x, torch.tensor(3)), TypeError, rf"{KINDS} \[D\]; got torch.Tensor"),
        (lambda m, x: m.predict(x, [1.0]), TypeError, rf"{KINDS} \[D\]; got one with float"),
        (lambda m, x: m.predict(x, ["a"]), TypeError, rf"{KINDS} \[D\]; got one with str"),
        (lambda m, x: m.predict(x, [1, True]), TypeError, rf"{KINDS} \[D\]; got one with bool"),
        (lambda m, x: m.predict(x, [[1]]), TypeError, rf"{KINDS} \[D\]; got one with list"),
        (lambda m, x: m.predict(x, [0, 5]), ValueError, "columns must be from 0 to 4; got 5"),
        (lambda m, x: m.predict(x, [-1]), ValueError, "columns must be from 0 to 4; got -1"),
        (lambda m, x: m.predict(x, [2, 2]), ValueError, r"columns must name every column once; got \[2, 2\]"),
        (lambda m, x: m.predict(x, []), ValueError, "columns must name at least one column; got none"),
        (lambda m, x: m.predict(x, [False] * 5), ValueError, "columns must name at least one column; got none"),
        (
            lambda m, x: m.predict(x, [True] * 4),
            ValueError,
            r"columns must be a bool mask \[D\] with D=5; got 4 values",
        ),
        (lambda m, x: m.predict(x[:, :4], [1]), ValueError, r"x must be \[N, D\] with D=5; got \(9, 4\)"),
        (lambda m, x: PPCA(2).predict(x, [1]), RuntimeError, "no parameters yet"),
    ],
)
def test_errors(call, error, message):
    with pytest.raises(error, match=message):
        call(model(5, 2), torch.randn(9, 5, dtype=F64))
