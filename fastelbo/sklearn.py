"""Probabilistic PCA as a scikit-learn estimator. fastelbo itself does not import this module, nor scikit-learn.

from fastelbo.sklearn import PPCA

make_pipeline(StandardScaler(), PPCA(8)).fit(X).score(X)  # mean log p(x), nats
PPCA(8, method="em").fit(X_with_nan).impute(X_with_nan)
"""

from __future__ import annotations

import warnings
from copy import deepcopy
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from sklearn.base import BaseEstimator, ClassNamePrefixFeaturesOutMixin, TransformerMixin
from sklearn.exceptions import ConvergenceWarning
from sklearn.utils import Tags, check_array, check_random_state
from sklearn.utils.metaestimators import available_if
from sklearn.utils.validation import check_is_fitted, validate_data

from fastelbo.ppca import data, model
from fastelbo.ppca.closed_form import automatic, of_moments
from fastelbo.ppca.moments import Moments
from fastelbo.ppca.result import variance

__all__ = ["PPCA"]

Array = NDArray[np.floating]
DTYPES = (np.float64, np.float32)


class PPCA(ClassNamePrefixFeaturesOutMixin, TransformerMixin, BaseEstimator):  # type: ignore[misc]
    """Probabilistic PCA, x = W z + b + e with z ~ N(0, I) and e ~ N(0, s2 I): `fastelbo.PPCA` as an estimator.

    X is an array or a table [N, D] of numbers; integers are read as they are, uint8 too. float32 stays float32.

    What differs from `sklearn.decomposition.PCA`: `transform` gives the posterior mean E[z | x], in units of the prior
    N(0, I) and shrunk towards 0 by the noise, and not the projection on `components_`. Variances are those of maximum
    likelihood: they divide by N, not N - 1, and s2 is the mean over D - M directions, also of fewer rows than columns.

    Overfitting: with missing cells, too many components fit the noise of the few cells that a row has, s2 falls towards
    0, and EM takes long. Of scikit-learn's digits (1,797 rows, D = 64) with 60 % of the cells hidden, 39 % of the rows
    have no more cells than 24 components. The mean squared error of `impute` in the hidden cells, where the means of
    the columns have 18.9:

        n_components                     12     16     24    24, min_noise_variance=4
        error                          12.8   14.4   38.6    10.3
        steps of EM                      27     73  1,000    33
        score, of the rows of the fit -63.8  -61.7  -54.1   -62.9
        score, of held-out rows       -65.5  -64.7   -225   -63.8

    The 1,000 steps did not converge, with s2 = 0.01. `score` in a GridSearchCV over n_components thus keeps away from
    24. For `impute`, better choose by the error in observed cells that are hidden on purpose: here it prefers 12 to 16
    components, and those 24 with a floor of s2 to both. Any floor from 2 to 8 has an error of at most 11 here.

    Args:
        n_components: M, latent dimensions; less than D. For "eig" also what chooses M: a fraction in (0, 1) of the
            variance, "bic" or "evidence", as of `fastelbo.PPCA`; scikit-learn's name "mle" is "evidence".
        method: "eig", the closed form, or "em", which also takes NaN for missing cells. See `fastelbo.PPCA.fit`.
        max_iter, tol: "em" ends after so many steps, or when less than tol nats per row seem left to gain.
        min_noise_variance: the least s2, in units of the squared data.
        random_state: of the start of "em".

    Attributes:
        components_: [M, D], orthonormal rows, longest column of W first, the largest entry of each positive, as
            scikit-learn's. A row is 0 if its component has no more variance than the noise.
        explained_variance_: [M], of the data along each component: |W_m|^2 + s2, as maximum likelihood has it.
        explained_variance_ratio_: [M], its share of the trace of `get_covariance`.
        singular_values_: [M], of the centered data: sqrt(N explained_variance_).
        noise_variance_: s2.
        mean_: [D], b.
        n_components_, n_features_in_, n_samples_: M, D, and N: of rows whose weight is not 0.
        feature_names_in_: the names of the columns of a table.
        n_iter_: steps of "em"; 1 for "eig".
        converged_: whether "em" or the solver "krylov" did.
        model_: the `fastelbo.PPCA`, for what it offers beyond: posterior, samples, ELBO.

    Reference: Tipping & Bishop 1999.
    """

    solver = "auto"  # pickles of earlier versions have none

    def __init__(
        self,
        n_components: int | float | str = 1,
        *,
        method: str = "eig",
        solver: str = "auto",
        max_iter: int = 1000,
        tol: float = 1e-6,
        min_noise_variance: float = 0.0,
        random_state: int | np.random.RandomState | None = None,
    ) -> None:
        self.n_components = n_components
        self.method = method
        self.solver = solver
        self.max_iter = max_iter
        self.tol = tol
        self.min_noise_variance = min_noise_variance
        self.random_state = random_state

    def __sklearn_tags__(self) -> Tags:
        tags = super().__sklearn_tags__()
        tags.input_tags.allow_nan = self.method == "em"
        tags.input_tags.sparse = True
        tags.transformer_tags.preserves_dtype = [dtype.__name__ for dtype in DTYPES]
        return tags

    @property
    def _n_features_out(self) -> int:
        return len(self.components_)

    # ------------------------------------------------------------------------------------------------------------------
    # Fitting.

    def fit(self, X: ArrayLike, y: None = None, sample_weight: ArrayLike | None = None) -> PPCA:
        """Maximum likelihood.

        Args:
            X: [N, D], N at least 2; NaN is a missing cell for method "em".
            y: ignored.
            sample_weight: [N], at least 0: a row of weight 2 counts as two equal rows. None is 1 each.

        Raises:
            ValueError: NaN for method "eig", infinity, fewer than 2 rows, n_components not less than the rank, which is
                judged after scaling the columns.
            TypeError: masked cells for method "eig".

        Warns:
            sklearn.exceptions.ConvergenceWarning: "em" did not converge, with what to do.
        """
        X = self._validated(X, self.method == "em", ensure_min_samples=2, ensure_min_features=2)
        N, D = X.shape
        if sample_weight is not None:
            N = int(torch.count_nonzero(data.weights_of(sample_weight, N, torch.device("cpu"))))  # type: ignore[arg-type]
        fitted, solver = self._unfitted(), self.solver
        if self.method == "eig" and solver == "auto" and automatic(N, D, fitted.asked) == "full":
            solver = "full"
        if self.method == "eig" and (solver == "covariance" or (solver == "full" and N > D)):
            return self._update(None, X, sample_weight)
        seed = int(check_random_state(self.random_state).randint(2**31 - 1))
        options: Any = {"max_iter": self.max_iter, "tol": self.tol, "min_sigma2": self._least(), "solver": solver}
        options |= {"sample_weight": sample_weight, "generator": torch.Generator().manual_seed(seed)}
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", ".* did not converge", RuntimeWarning)
            fitted.fit(X, self.method, **options)
        if fitted.fit_report and not fitted.fit_report.converged:
            warnings.warn(model.advice(fitted), ConvergenceWarning, stacklevel=2)
        return self._set(fitted, None)

    @available_if(lambda self: self.method == "eig")  # type: ignore[untyped-decorator]
    def partial_fit(self, X: ArrayLike, y: None = None, sample_weight: ArrayLike | None = None) -> PPCA:
        """The fit of all rows of this call and of those before it, exactly; for method "eig".

        The D by D scatter matrix is kept in between, as by a `fit` of more than D rows, from which this may go on too.
        A call takes O(N D^2 + D^3).

        Args:
            X: [N, D], without NaN; of the first call, with a rank above n_components.
            y: ignored.
            sample_weight: as of `fit`.

        Raises:
            ValueError: as `fit`; after a `fit` of at most D rows. The estimator is then as before.
        """
        first = not hasattr(self, "model_")
        if not first and self._moments is None:
            raise ValueError(
                f"partial_fit cannot go on from a fit of at most D={self.n_features_in_} rows, which keeps no scatter "
                "matrix: let a clone begin with partial_fit"
            )
        X = self._validated(X, False, reset=first, ensure_min_features=2 if first else 1)
        return self._update(None if first else self._moments, X, sample_weight)

    def _update(self, before: Moments | None, X: Array, sample_weight: ArrayLike | None) -> PPCA:
        """The fit of the rows, and of those that the moments are of."""
        dtype = torch.float64 if X.dtype == np.float64 else torch.float32
        if before:
            dtype = torch.promote_types(dtype, next(self.model_.parameters()).dtype)
        moments = deepcopy(before) or Moments(X.shape[1], torch.device("cpu"))
        for batch in data.rows_of(X, sample_weight):
            moments.update(*batch)
        fitted, solver = self._unfitted(), "covariance" if self.solver == "covariance" else "full"
        parameters, fitted.fit_report = of_moments(moments, fitted.asked, self._least(), solver)
        fitted.load_state_dict(parameters.to(dtype)._asdict())
        return self._set(fitted, moments)

    def _unfitted(self) -> model.PPCA:
        return model.PPCA("evidence" if self.n_components == "mle" else self.n_components)

    def _least(self) -> float:
        return float(variance("min_noise_variance", self.min_noise_variance))

    def _validated(self, X: ArrayLike, missing: bool, dtype: Any = DTYPES, **options: object) -> Array:
        """X as scikit-learn checks it; NaN for masked cells, which it would read under the mask."""
        if np.ma.is_masked(X):
            if not missing:
                raise TypeError('X must have no masked cells for method "eig"; method="em" takes them as missing')
            masked: Any = X
            X = masked.astype(masked.dtype if masked.dtype.kind == "f" else np.float64).filled(np.nan)
        finite = "allow-nan" if missing else True
        found: Array = validate_data(self, X, accept_sparse="csr", dtype=dtype, ensure_all_finite=finite, **options)
        return found

    def _set(self, fitted: model.PPCA, moments: Moments | None) -> PPCA:
        W, b, log_sigma2 = (t.detach().numpy() for t in fitted.parameters())
        lengths = np.linalg.norm(W, axis=0)
        report = fitted.fit_report
        assert report is not None
        self.model_ = fitted
        self._moments = moments
        self.components_ = np.divide(W, lengths, out=np.zeros_like(W), where=lengths > 0).T
        self.noise_variance_ = float(np.exp(log_sigma2))
        self.explained_variance_ = lengths**2 + self.noise_variance_
        self.explained_variance_ratio_ = self.explained_variance_ / ((lengths**2).sum() + len(b) * self.noise_variance_)
        self.n_samples_ = report.rows
        self.singular_values_ = np.sqrt(self.n_samples_ * self.explained_variance_)
        self.mean_ = b
        self.n_components_ = len(lengths)
        self.converged_ = report.converged
        self.n_iter_ = max(1, len(report.log_likelihood) - 1)
        return self

    # ------------------------------------------------------------------------------------------------------------------
    # The fitted model. Results are of the dtype of the data of the fit.

    def _fitted(self) -> model.PPCA:
        check_is_fitted(self)
        return self.model_

    def _data(self, X: ArrayLike, missing: bool | None = None) -> Array:
        missing = self.method == "em" if missing is None else missing
        return self._validated(X, missing, dtype=self.mean_.dtype, reset=False)

    def transform(self, X: ArrayLike) -> Array:
        """The posterior mean E[z | x]. X: [N, D], for "em" with NaN for missing cells -> [N, M].

        A fit by "eig" does this for missing cells too by `transform(impute(X))`, which is the same exactly.
        """
        return self._fitted().transform(self._data(X))

    def inverse_transform(self, X: ArrayLike) -> Array:
        """E[x | z] = W z + b. X: z [N, M] -> [N, D]."""
        fitted = self._fitted()
        if np.ma.is_masked(X):
            raise TypeError("X must have no masked cells: every coordinate of z is needed")
        return fitted.inverse_transform(check_array(X, dtype=self.mean_.dtype))

    def impute(self, X: ArrayLike, return_std: bool = False) -> Array | tuple[Array, Array]:
        """X [N, D] with every NaN replaced by its expectation given the row's other cells, whatever the method.

        With return_std, also its standard deviation [N, D], 0 of observed cells; see `fastelbo.PPCA.impute`.
        """
        return self._fitted().impute(self._data(X, missing=True), return_std)

    def score_samples(self, X: ArrayLike) -> Array:
        """log p(x), nats; of a row with NaN cells, log p of its other cells. X: [N, D], for "em" with NaN -> [N]."""
        return self._fitted().log_prob(self._data(X))

    def score(self, X: ArrayLike, y: None = None) -> float:
        """The mean of log p(x) over the rows, nats. X: as of `score_samples`."""
        return self._fitted().score(self._data(X))

    def get_covariance(self) -> Array:
        """W W' + s2 I [D, D]: the covariance of p(x)."""
        W, *_ = (t.detach().numpy() for t in self._fitted().parameters())
        covariance: Array = W @ W.T + self.noise_variance_ * np.eye(len(W), dtype=W.dtype)
        return covariance

    def get_precision(self) -> Array:
        """The inverse of `get_covariance` [D, D], from the components."""
        check_is_fitted(self)
        U, s2 = self.components_, self.noise_variance_
        precision: Array = (U.T * (1 / self.explained_variance_ - 1 / s2)) @ U + np.eye(U.shape[1], dtype=U.dtype) / s2
        return precision
