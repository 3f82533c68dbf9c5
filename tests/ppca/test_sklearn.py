"""fastelbo.sklearn: the checks of scikit-learn itself, and equality with its PCA and with fastelbo.PPCA."""

import math
import pickle
import warnings

import numpy as np
import pandas as pd
import pytest
import torch
from sklearn.base import clone
from sklearn.datasets import load_digits
from sklearn.decomposition import PCA
from sklearn.exceptions import ConvergenceWarning, NotFittedError
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GridSearchCV
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.utils.estimator_checks import parametrize_with_checks

import fastelbo
from fastelbo.sklearn import PPCA

ROWS = [(200, 8), (10, 30)]  # the covariance, the Gram matrix


@parametrize_with_checks([PPCA(), PPCA(method="em")])
def test_checks_of_scikit_learn(estimator, check):
    check(estimator)


def data(N: int = 200, D: int = 8, M: int = 3, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return rng.normal(size=(N, M)) @ rng.normal(size=(M, D)) + 0.3 * rng.normal(size=(N, D)) + rng.normal(size=D)


def gaps(X: np.ndarray, share: float = 0.2) -> np.ndarray:
    return np.where(np.random.default_rng(1).random(X.shape) < share, np.nan, X)


def assert_same(a: PPCA, b: PPCA, rtol: float) -> None:
    for name in ("components_", "explained_variance_", "noise_variance_", "mean_"):
        np.testing.assert_allclose(getattr(a, name), getattr(b, name), rtol=rtol, atol=rtol)


# ----------------------------------------------------------------------------------------------------------------------
# Equality with scikit-learn's PCA.


@pytest.mark.parametrize(
    "method, solver, rtol",
    [("eig", "full", 1e-9), ("eig", "covariance", 1e-9), ("eig", "krylov", 1e-6), ("em", "auto", 1e-4)],
)
@pytest.mark.parametrize("N, D", ROWS)
def test_the_same_as_pca(N, D, method, solver, rtol):
    """Variances of PCA divide by N - 1: it sees data that are that much closer to their mean."""
    X = data(N, D)
    center = X.mean(0)
    other = PCA(3, svd_solver="full").fit(center + (X - center) * math.sqrt((N - 1) / N))
    other.noise_variance_ *= (min(N, D) - 3) / (D - 3)  # the sum of the other eigenvalues by the number of directions
    ours = PPCA(3, method=method, solver=solver, tol=1e-13, max_iter=5000, random_state=0).fit(X)
    np.testing.assert_allclose(ours.components_, other.components_, rtol=rtol, atol=rtol)  # signs too
    np.testing.assert_allclose(ours.components_ @ ours.components_.T, np.eye(3), atol=1e-12)
    for name in ("mean_", "noise_variance_", "explained_variance_"):
        np.testing.assert_allclose(getattr(ours, name), getattr(other, name), rtol=rtol, atol=1e-12)
    np.testing.assert_allclose(ours.get_covariance(), other.get_covariance(), rtol=rtol, atol=rtol)
    np.testing.assert_allclose(ours.get_precision(), np.linalg.inv(other.get_covariance()), rtol=100 * rtol, atol=rtol)
    ratio = other.explained_variance_ / X.var(0).sum()
    np.testing.assert_allclose(ours.explained_variance_ratio_, ratio, rtol=rtol)
    np.testing.assert_allclose(ours.singular_values_, np.linalg.svd(X - center)[1][:3], rtol=rtol)
    assert ours.n_samples_ == N == other.n_samples_
    new = data(20, D, seed=3)
    np.testing.assert_allclose(ours.score_samples(new), other.score_samples(new), rtol=rtol)
    assert ours.score(new) == pytest.approx(other.score(new), rel=rtol)
    # E[z | x] is the projection, whitened and shrunk by the noise
    scale = np.sqrt(other.explained_variance_ - other.noise_variance_) / other.explained_variance_
    np.testing.assert_allclose(ours.transform(new), other.transform(new) * scale, rtol=rtol, atol=rtol)


def test_inverse_transform_and_the_model_beneath():
    X = data()
    m = PPCA(3).fit(X)
    z = m.transform(X)
    W, b = m.model_.W.detach().numpy(), m.model_.b.detach().numpy()
    np.testing.assert_allclose(m.inverse_transform(z), z @ W.T + b, rtol=1e-12)
    assert isinstance(m.model_, fastelbo.PPCA) and m.model_.posterior(X)[1].shape == (3, 3)


def test_integers_are_numbers():
    X = np.random.default_rng(0).integers(0, 256, (60, 6)).astype(np.uint8)
    for integers in (X, X.astype(np.int64), X % 2 == 0):
        assert_same(PPCA(2).fit(integers), PPCA(2).fit(integers.astype(float)), 0.0)
    assert PPCA(2).fit(X).mean_.max() > 50


@pytest.mark.parametrize("method", ["eig", "em"])
def test_float32_stays(method):
    X = data().astype(np.float32)
    m = PPCA(2, method=method, random_state=0).fit(X)
    for found in (m.components_, m.mean_, m.transform(X), m.score_samples(X), m.get_covariance(), m.impute(X)):
        assert found.dtype == np.float32
    np.testing.assert_allclose(m.score(X), PPCA(2).fit(X.astype(float)).score(X.astype(float)), rtol=1e-5)


def test_a_component_without_variance_of_its_own():
    """Of an isotropic spectrum no component is longer than the noise."""
    X = np.concatenate([np.eye(4), -np.eye(4)])
    m = PPCA(2).fit(X)
    assert np.isfinite(m.components_).all()
    np.testing.assert_allclose(m.get_covariance(), np.eye(4) / 4, atol=1e-12)


# ----------------------------------------------------------------------------------------------------------------------
# The rest of scikit-learn.


def test_pipeline_search_clone_and_pickle():
    X, y = load_digits(return_X_y=True)
    X = X[:400]
    pipe = make_pipeline(StandardScaler(), PPCA(10), LogisticRegression(max_iter=500)).fit(X, y[:400])
    assert pipe.score(X, y[:400]) > 0.9
    Z = data(150, 10, M=4)
    for method in ("eig", "em"):
        search = GridSearchCV(PPCA(method=method, random_state=0), {"n_components": [1, 2, 4, 6, 8]}, cv=3).fit(Z)
        assert search.best_params_ == {"n_components": 4}
    m = search.best_estimator_
    again = pickle.loads(pickle.dumps(m))
    assert np.array_equal(again.score_samples(Z), m.score_samples(Z))
    fresh = clone(m)
    assert fresh.get_params() == m.get_params()
    with pytest.raises(NotFittedError):
        fresh.transform(Z)


@pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")
@pytest.mark.parametrize("method", [{"method": "em"}, {"solver": "krylov"}], ids=str)
def test_every_parameter_survives_clone_and_pickle(method):
    settings = {"n_components": 2, "max_iter": 7, "tol": 0.1, "min_noise_variance": 0.5, "random_state": 4} | method
    m = PPCA(**settings).fit(data())
    settings = PPCA().get_params() | settings
    assert settings == m.get_params()
    assert {name for name, value in settings.items() if value == getattr(PPCA(), name)} < {"method", "solver"}
    again = pickle.loads(pickle.dumps(m))
    assert clone(m).get_params() == again.get_params() == settings
    assert_same(clone(again).fit(data()), m, 0.0)


@pytest.mark.parametrize("method", ["eig", "em"])
def test_tables(method):
    X = pd.DataFrame(data(), columns=list("abcdefgh"), index=range(1000, 1200))
    m = PPCA(2, method=method, random_state=0).set_output(transform="pandas")
    z = m.fit_transform(X)
    assert list(z.columns) == ["ppca0", "ppca1"] == list(m.get_feature_names_out()) and z.index.equals(X.index)
    assert list(m.feature_names_in_) == list("abcdefgh") and m.n_features_in_ == 8 and m.n_components_ == 2
    np.testing.assert_allclose(z.to_numpy(), PPCA(2, method=method, random_state=0).fit_transform(X.to_numpy()))
    with pytest.raises(ValueError, match="feature names"):
        m.transform(X[list("hgfedcba")])


def test_random_state():
    X = gaps(data())
    a, b = (PPCA(2, method="em", max_iter=3, random_state=4) for _ in range(2))
    c = PPCA(2, method="em", max_iter=3, random_state=np.random.RandomState(4))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        for m in (a, b, c):
            m.fit(X)
    assert_same(a, b, 0.0)
    assert_same(a, c, 0.0)
    assert a.n_iter_ == 3


@pytest.mark.parametrize("N, D", ROWS)
@pytest.mark.parametrize("method", ["eig", "em"])
def test_a_default_device_changes_nothing(N, D, method):
    X, weight = data(N, D), np.arange(1, N + 1)
    expected = PPCA(2, method=method, random_state=0).fit(X, sample_weight=weight)
    with torch.device("meta"):
        found = PPCA(2, method=method, random_state=0).fit(X, sample_weight=weight)
        assert_same(found, expected, 0.0)
        assert np.array_equal(found.impute(X), expected.impute(X)) and found.score(X) == expected.score(X)


# ----------------------------------------------------------------------------------------------------------------------
# partial_fit and weights.


@pytest.mark.parametrize("weighted", [False, True])
def test_partial_fit_is_fit(weighted):
    X = data(300, 6) + 1e3
    weight = np.random.default_rng(2).integers(0, 4, 300) if weighted else np.ones(300)
    whole = PPCA(2).fit(X, sample_weight=weight)
    parts, after = PPCA(2), PPCA(2).fit(X[:50], sample_weight=weight[:50])
    for start, stop in [(0, 50), (50, 51), (51, 300)]:
        parts.partial_fit(X[start:stop], sample_weight=weight[start:stop])
        if start:
            after.partial_fit(X[start:stop], sample_weight=weight[start:stop])
    for m in (parts, after):
        for name in ("components_", "explained_variance_", "noise_variance_", "mean_"):
            np.testing.assert_allclose(getattr(m, name), getattr(whole, name), rtol=1e-10, atol=1e-12)
    near = X - 1e3  # without the digits that a mean of 1,000 takes
    parts = PPCA(2).partial_fit(near[:100]).partial_fit(near[100:])
    assert_same(parts, PPCA(2).fit(near), 1e-12)


def test_partial_fit_refuses_what_it_cannot_do_and_stays_as_it_was():
    X = data(100, 6)
    assert not hasattr(PPCA(method="em"), "partial_fit")
    with pytest.raises(ValueError, match=r"less than the rank \d of the centered data \[3 rows\]"):
        PPCA(2).partial_fit(X[:3])
    m = PPCA(2).fit(X[:6])
    with pytest.raises(ValueError, match="partial_fit cannot go on from a fit of at most D=6 rows"):
        m.partial_fit(X)
    m = PPCA(2).partial_fit(X)
    before = m.score_samples(X)
    with pytest.raises(ValueError, match="NaN"):
        m.partial_fit(gaps(X))
    with pytest.raises(ValueError, match="n_components must be less than the number of columns D=6; got 6"):
        m.set_params(n_components=6).partial_fit(X[:9])
    assert np.array_equal(m.set_params(n_components=2).score_samples(X), before)
    assert_same(m.partial_fit(X[:9]), PPCA(2).fit(np.concatenate([X, X[:9]])), 1e-12)


@pytest.mark.parametrize("N, D", ROWS)
@pytest.mark.parametrize("method, missing", [("eig", False), ("em", False), ("em", True)])
def test_weights_are_repeated_rows(N, D, method, missing):
    X = gaps(data(N, D), 0.1) if missing else data(N, D)
    weight = np.random.default_rng(2).integers(0, 4, N)
    a, b, c = (PPCA(2, method=method, random_state=0, tol=1e-12, max_iter=2000) for _ in range(3))
    a.fit(X, sample_weight=weight)
    b.fit(np.repeat(X, weight, axis=0))
    c.fit(X, sample_weight=weight / 7)  # their scale is free
    for m in (b, c):
        assert_same(a, m, 1e-9 if method == "eig" else 1e-4)
    if method == "em":
        np.testing.assert_allclose(
            a.model_.fit_report.log_likelihood[:5], b.model_.fit_report.log_likelihood[:5], rtol=1e-9
        )


@pytest.mark.parametrize("scale", [1e-300, 1e-3, 1e300])
@pytest.mark.parametrize("method", ["eig", "em"])
def test_the_scale_of_weights_is_free(method, scale):
    X = 1e6 * data()
    weight = np.random.default_rng(2).integers(1, 4, len(X))
    whole = PPCA(2, method=method, random_state=0, tol=1e-12).fit(np.repeat(X, weight, axis=0))
    scaled = weight * (scale / weight.sum())
    found = [PPCA(2, method=method, random_state=0, tol=1e-12).fit(X, sample_weight=scaled)]
    if method == "eig":
        parts = PPCA(2).partial_fit(X[:99], sample_weight=scaled[:99])
        found.append(parts.partial_fit(X[99:], sample_weight=scaled[99:]))
    for m in found:
        for name in ("components_", "explained_variance_", "noise_variance_", "mean_"):
            rtol = 1e-9 if method == "eig" else 1e-4
            np.testing.assert_allclose(getattr(m, name), getattr(whole, name), rtol=rtol, atol=1e-4)


@pytest.mark.parametrize("dtype", [float, np.float32, int])
def test_masked_cells_are_missing(dtype):
    X = (100 * data()).astype(dtype)
    hidden = np.isnan(gaps(X.astype(float)))
    masked = np.ma.MaskedArray(np.where(hidden, 10_000, X).astype(dtype), hidden)
    missing = masked.astype(masked.dtype if dtype is not int else float).filled(np.nan)
    options = {"method": "em", "random_state": 0}
    a, b = (PPCA(2, **options).fit(x) for x in (masked, missing))
    assert_same(a, b, 0.0)
    for name in ("transform", "impute", "score_samples"):
        assert np.array_equal(getattr(a, name)(masked), getattr(a, name)(missing))
    assert a.score(masked) == a.score(missing)
    eig = PPCA(2).fit(np.ma.MaskedArray(X, False))
    assert np.array_equal(eig.impute(masked), eig.impute(missing))
    for use in (PPCA(2).fit, PPCA(2).partial_fit, eig.partial_fit, eig.transform, eig.score, eig.score_samples):
        with pytest.raises(TypeError, match='X must have no masked cells for method "eig"; method="em" takes them'):
            use(masked)
    with pytest.raises(TypeError, match="no masked cells"):
        eig.inverse_transform(masked[:, :2])


@pytest.mark.parametrize("dtype", [float, int])
def test_masked_weights_are_refused(dtype):
    weight = np.ma.MaskedArray(np.ones(200, dtype), np.arange(200) == 3)
    for m in (PPCA(2), PPCA(2, method="em")):
        with pytest.raises((TypeError, ValueError), match="sample_weight must be"):
            m.fit(data(), sample_weight=weight)


def test_a_wrong_weight_or_floor_is_refused():
    X = data()
    with pytest.raises(ValueError, match="sample_weight must be finite and at least 0"):
        PPCA(2).fit(X, sample_weight=-np.ones(200))
    for method in ("eig", "em"):
        with pytest.raises(ValueError, match="min_noise_variance must be at least 0 and finite; got -1"):
            PPCA(2, method=method, min_noise_variance=-1.0).fit(X)
    m = PPCA(2, min_noise_variance=7.0).fit(X)
    assert m.noise_variance_ == pytest.approx(7.0)
    assert_same(m, PPCA(2, min_noise_variance=7.0).partial_fit(X[:50]).partial_fit(X[50:]), 1e-12)


# ----------------------------------------------------------------------------------------------------------------------
# Missing cells, convergence.


def test_missing_cells_are_those_of_the_model():
    truth = data(300)
    X = gaps(truth)
    ours = PPCA(3, method="em", random_state=0).fit(X)
    seed = int(np.random.RandomState(0).randint(2**31 - 1))
    other = fastelbo.PPCA(3).fit(X, "em", generator=torch.Generator().manual_seed(seed))
    assert np.array_equal(ours.transform(X), other.transform(X))
    assert np.array_equal(ours.score_samples(X), other.log_prob(X)) and ours.score(X) == other.score(X)
    assert np.array_equal(ours.impute(X), other.impute(X))
    hidden = np.isnan(X)
    assert np.mean((ours.impute(X) - truth)[hidden] ** 2) < 0.3 * truth.var()
    exact = PPCA(3).fit(truth)
    with pytest.raises(ValueError, match="NaN"):
        exact.transform(X)
    # that of the observed cells alone
    np.testing.assert_allclose(exact.transform(exact.impute(X)), exact.model_.transform(X), rtol=1e-9, atol=1e-9)


def test_no_convergence_has_a_warning():
    X = gaps(data())
    with pytest.warns(ConvergenceWarning, match=r"did not converge in 2 steps: log p\(x\) rose by .* Raise max_iter"):
        PPCA(3, method="em", max_iter=2, random_state=0).fit(X)
    with pytest.warns(RuntimeWarning, match="did not converge in 2 steps") as found:
        fastelbo.PPCA(3).fit(X, "em", max_iter=2)
    assert found[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        PPCA(3, method="em", random_state=0).fit(X)
        fastelbo.PPCA(3).fit(X, "em")


def test_a_floor_of_the_noise_keeps_many_components_from_fitting_it():
    """The case of the docstring: without it, 24 components are worse than the means of the columns."""
    X = load_digits().data
    hidden = np.random.default_rng(0).random(X.shape) < 0.6
    seen = np.where(hidden, np.nan, X)
    options = {"method": "em", "random_state": 0}

    def error(m: PPCA) -> float:
        return float(np.mean((m.fit(seen).impute(seen) - X)[hidden] ** 2))

    means = np.mean((np.nanmean(seen, 0) - X)[hidden.any(1)] ** 2, where=hidden[hidden.any(1)])
    with pytest.warns(ConvergenceWarning, match="fewer components than 24"):
        free = error(PPCA(24, max_iter=30, **options))
    few = error(PPCA(12, **options))
    floored = PPCA(24, min_noise_variance=4.0, **options)
    assert error(floored) < 0.85 * few < 0.6 * means < means < 0.8 * free
    assert floored.noise_variance_ == pytest.approx(4.0) and floored.n_iter_ < 50
