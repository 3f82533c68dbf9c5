"""The number of components chosen by the data: scikit-learn's choices, the models' own BIC, and known numbers.

`python tests/ppca/test_choice.py` prints the table of docs/ppca.md.
"""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.base import clone
from sklearn.decomposition import PCA
from sklearn.decomposition._pca import _assess_dimension
from torch import Tensor

import fastelbo.sklearn
from fastelbo import PPCA
from fastelbo.ppca import RankError, choice

F64 = torch.float64
PAGE = Path(__file__).parents[2] / "docs/ppca.md"
SHAPES = [(200, 8), (60, 20), (21, 20), (20, 20), (12, 30), (3, 5)]  # the covariance, and the Gram matrix


def draw(N: int, D: int, M: int, sigma2: float, ratio: float, seed: int = 0) -> Tensor:
    """Of a covariance whose M largest eigenvalues are 4 ratio sigma2 .. ratio sigma2, the others sigma2."""
    g = torch.Generator().manual_seed(seed)
    U = torch.linalg.qr(torch.randn(D, M, dtype=F64, generator=g))[0]
    values = sigma2 * torch.linspace(4 * ratio, ratio, M, dtype=F64)
    z, e = (torch.randn(N, k, dtype=F64, generator=g) for k in (M, D))
    return z @ (U * (values - sigma2).sqrt()).T + math.sqrt(sigma2) * e


def mixed(N: int, D: int, seed: int = 0) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    return torch.randn(N, D, dtype=F64, generator=g) @ torch.randn(D, D, dtype=F64, generator=g)


def spectrum(x: Tensor) -> Tensor:
    """[R]"""
    values = torch.linalg.eigvalsh(torch.cov(x.T, correction=0)).flip(0)
    return values[: min(x.shape[1], len(x) - 1)]


# ----------------------------------------------------------------------------------------------------------------------
# Formulas.


@pytest.mark.parametrize("N, D", SHAPES)
def test_the_evidence_is_that_of_scikit_learn(N, D):
    values = spectrum(mixed(N, D))
    padded = np.zeros(D)
    padded[: len(values)] = values
    expected = [_assess_dimension(padded, M, N) for M in range(1, len(values))]
    np.testing.assert_allclose(choice.evidence(values, N, D), expected, rtol=1e-12)


@pytest.mark.parametrize("N, D", SHAPES)
@pytest.mark.parametrize("min_sigma2", [0.0, 5.0])
def test_bic_is_that_of_the_models(N, D, min_sigma2):
    x = mixed(N, D)
    expected = [PPCA(M).fit(x, min_sigma2=min_sigma2).bic(x) for M in range(1, len(spectrum(x)))]
    np.testing.assert_allclose(choice.bic(spectrum(x), N, D, min_sigma2), expected, rtol=1e-9)
    m = PPCA("bic").fit(x, min_sigma2=min_sigma2)
    assert m.n_components == int(np.argmin(expected)) + 1


@pytest.mark.parametrize("N, D", [(200, 8), (60, 20), (21, 20), (20, 20)])  # as scikit-learn has it
def test_evidence_chooses_as_mle_of_scikit_learn(N, D):
    for seed in range(5):
        x = draw(N, D, 3, 0.5, 4.0, seed)
        assert PPCA("evidence").fit(x).n_components == min(PCA("mle").fit(x).n_components_, len(spectrum(x)) - 1)


@pytest.mark.parametrize("N, D", SHAPES)
@pytest.mark.parametrize("fraction", [1e-9, 0.3, 0.5, 0.9, 0.99, 1 - 1e-9])
def test_a_fraction_chooses_as_scikit_learn(N, D, fraction):
    x = mixed(N, D)
    expected = PCA(fraction, svd_solver="full").fit(x).n_components_
    assert PPCA(fraction).fit(x).n_components == min(expected, len(spectrum(x)) - 1)


@pytest.mark.parametrize("criterion", ["bic", "evidence", 0.5])
def test_equal_eigenvalues(criterion):
    """Of each other, and all: their difference is no number for a logarithm."""
    for values in ([3.0, 3.0, 1.0, 1.0], [1.0] * 4, [2.0, 2.0]):
        assert 1 <= choice.choose(torch.tensor(values, dtype=F64), 50, 6, criterion) < len(values)
    found = choice.evidence(torch.ones(4, dtype=F64), 50, 4)
    assert found.isfinite().all() and found.argmax() == 0


# ----------------------------------------------------------------------------------------------------------------------
# Known numbers.

SETTINGS = [  # D, M, N, sigma2, the least of the M eigenvalues in units of sigma2
    (5, 2, 100, 1.0, 4.0),
    (10, 1, 500, 2.0, 2.0),
    (10, 3, 100, 0.5, 5.0),
    (10, 5, 1000, 1.0, 2.0),
    (20, 4, 200, 1.0, 2.0),
    (20, 4, 200, 1.0, 5.0),
    (20, 15, 2000, 1.0, 2.5),
    (30, 2, 1500, 4.0, 2.0),
    (30, 6, 300, 1.0, 3.0),
    (50, 10, 500, 1.0, 2.0),
    (50, 20, 2500, 0.25, 2.5),
    (100, 10, 5000, 1.0, 2.0),
]


def chosen() -> list[tuple[int, int]]:
    """M of every setting by BIC and by the evidence."""
    found = []
    for D, M, N, sigma2, ratio in SETTINGS:
        x = draw(N, D, M, sigma2, ratio)
        found.append((PPCA("bic").fit(x).n_components, PPCA("evidence").fit(x).n_components))
    return found


def table(found: list[tuple[int, int]]) -> str:
    """As docs/ppca.md has it."""
    lines = ["| D | N | sigma² | least eigenvalue / sigma² | M | by BIC | by evidence |", "|---|" + 6 * "---|"]
    for (D, M, N, sigma2, ratio), choices in zip(SETTINGS, found, strict=True):
        shown = [f"{m}" if m == M else f"**{m}**" for m in choices]
        lines.append(f"| {D} | {N:,} | {sigma2:g} | {ratio:g} | {M} | {shown[0]} | {shown[1]} |")
    return "\n".join(lines)


def test_the_true_number_is_found():
    """And docs/ppca.md has the table."""
    assert all(N >= 10 * D and ratio >= 2 for D, _, N, _, ratio in SETTINGS)
    found = chosen()
    right = sum(m == M for (_, M, *_), choices in zip(SETTINGS, found, strict=True) for m in choices)
    assert len(SETTINGS) == 12 and right >= 22
    assert table(found) in PAGE.read_text()


# ----------------------------------------------------------------------------------------------------------------------
# The model that chooses.


@pytest.mark.parametrize("asked", ["bic", "evidence", 0.5, np.float32(0.5), np.str_("bic")])
def test_a_fit_is_that_with_the_number_and_a_refit_chooses_again(asked):
    few, many = draw(400, 12, 2, 0.5, 4.0), draw(400, 12, 7, 0.5, 4.0)
    m = PPCA(asked)
    assert m.n_components == m.criterion == asked and m.W is None
    found = []
    for x in (few, many, few):
        m.fit(x)
        expected = PPCA(m.n_components).fit(x)
        assert type(m.n_components) is int and expected.criterion is None and m.criterion == asked
        assert m.fit_report == expected.fit_report
        for a, b in zip(m.parameters(), expected.parameters(), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
        assert m.transform(x).shape == (400, m.n_components)
        found.append(m.n_components)
    assert found[0] == found[2] < found[1]
    if isinstance(asked, str):
        assert found[:2] == [2, 7]


def test_few_rows_batches_and_arrays():
    x = draw(15, 40, 2, 0.1, 90.0)
    for same in (x, x.numpy(), [x[:5], x[5:]]):
        assert PPCA("evidence").fit(same).n_components == 2
    x = draw(400, 12, 3, 0.5, 4.0)
    for same in (x, x.numpy(), x.float(), [x[:5], x[5:]]):
        for criterion in choice.CRITERIA:
            assert PPCA(criterion).fit(same).n_components == 3


def test_states_and_pickles():
    x = draw(300, 8, 3, 0.5, 4.0)
    m = PPCA("bic").fit(x)
    for fresh in (PPCA("bic"), PPCA(3), PPCA(0.1)):
        fresh.load_state_dict(m.state_dict())
        assert fresh.n_components == 3 and torch.equal(fresh.log_prob(x), m.log_prob(x))
    with pytest.raises(ValueError, match="n_components is 2, but the checkpoint has 3"):
        PPCA(2).load_state_dict(m.state_dict())
    old = PPCA(3).fit(x)
    assert "criterion" not in vars(old) and old.fit(x).n_components == 3  # as of a pickle before there were criteria


@pytest.mark.parametrize("N, D", [(300, 8), (15, 40)])
def test_the_estimator_of_scikit_learn(N, D):
    x = draw(N, D, 2, 0.1, 40.0).numpy()
    for asked, name in (("mle", "evidence"), ("evidence", "evidence"), ("bic", "bic"), (0.7, 0.7)):
        m = clone(fastelbo.sklearn.PPCA(asked)).fit(x)
        assert m.n_components == asked and m.n_components_ == PPCA(name).fit(x).n_components
        assert m.transform(x).shape == (N, m.n_components_) and m.model_.criterion == name
    if N > D:
        m = fastelbo.sklearn.PPCA("bic").partial_fit(x[:100]).partial_fit(x[100:])
        assert m.n_components_ == 2


EXPECTED = 'n_components must be an int, a fraction in \\(0, 1\\), "bic" or "evidence"; got '


@pytest.mark.parametrize(
    "call, error, message",
    [
        (lambda x: PPCA("mle"), ValueError, EXPECTED + '"mle"'),
        (lambda x: PPCA(1.0), ValueError, EXPECTED + "1.0"),
        (lambda x: PPCA(0.0), ValueError, EXPECTED + "0.0"),
        (lambda x: PPCA(math.nan), ValueError, EXPECTED + "nan"),
        (lambda x: PPCA(None), TypeError, EXPECTED + "None"),
        (lambda x: PPCA(np.True_), TypeError, EXPECTED + "numpy.bool"),
        (lambda x: PPCA(torch.tensor(2)), TypeError, EXPECTED + "torch.Tensor"),
        (lambda x: PPCA(-1), ValueError, "n_components must be at least 1; got -1"),
        (lambda x: PPCA("bic", 5), ValueError, 'n_components must be an int where n_features is given; got "bic"'),
        (lambda x: PPCA("bic", n_features=5), ValueError, "n_components must be an int where n_features is given"),
        (lambda x: PPCA(0.5).fit(x, "em"), ValueError, 'n_components must be an int for method "em"; .*; got 0.5'),
        (lambda x: PPCA("bic").fit(x, "em"), ValueError, 'an int for method "em"; "eig" finds what .*; got "bic"'),
        (lambda x: PPCA("bic").transform(x), RuntimeError, "no parameters yet"),
        (lambda x: PPCA("bic").fit(x[:, :1]), ValueError, 'less than the number of columns D=1; got "bic"'),
        (lambda x: PPCA("bic").fit(x[:2]), RankError, 'less than the rank 1 of the centered data .*; got "bic"'),
        (lambda x: PPCA(0.5).fit(x[:, :1] * x[:1]), RankError, "less than the rank 1 of the centered data .*; got 0.5"),
        (lambda x: fastelbo.sklearn.PPCA("aic").fit(x.numpy()), ValueError, EXPECTED + '"aic"'),
        (
            lambda x: fastelbo.sklearn.PPCA("mle", method="em").fit(x.numpy()),
            ValueError,
            'n_components must be an int for method "em"',
        ),
    ],
)
def test_errors(call, error, message):
    with pytest.raises(error, match=message):
        call(mixed(30, 5))


if __name__ == "__main__":
    print(table(chosen()))
