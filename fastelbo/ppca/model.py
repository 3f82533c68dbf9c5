"""The model: parameters, densities, posterior, and `fit`."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Generator, Tensor, nn

from fastelbo._internal import arguments, ordered
from fastelbo._internal.ordered import ordered_sum
from fastelbo.likelihoods import LOG_2PI
from fastelbo.losses import gaussian_kl
from fastelbo.ppca import algebra, fit, missing
from fastelbo.ppca.algebra import product
from fastelbo.ppca.density import ppca_log_prob
from fastelbo.ppca.fit import Fit, FitReport
from fastelbo.reference import compute_dtype, read_data

if TYPE_CHECKING:
    import numpy.typing as npt
    from torch.distributed import ProcessGroup

    Array = Tensor | npt.NDArray[Any]
    Data = Array | Iterable[Array | Sequence[Array]]  # of `fit`: one array, or batches

METHODS = ("eig", "em")
# the kind of an array: what a method returns is of the kind that it was called with
_Array = TypeVar("_Array", Tensor, "npt.NDArray[Any]")
_method = arguments.one_of(METHODS)
variance = arguments.number(lambda value: 0 <= value < math.inf, "at least 0 and finite")


def _is_array(X: Any) -> bool:
    return isinstance(X, Tensor) or hasattr(X, "__array__") or _is_sparse(X)


def _is_sparse(X: Any) -> bool:
    return X.layout is not torch.strided if isinstance(X, Tensor) else hasattr(X, "toarray")


def _from_numpy(X: Any) -> Tensor:
    """A tensor of anything that numpy makes an array of, also of what torch refuses: a table, negative strides, a byte
    order that is not the machine's. The masked cells of a masked array become NaN."""
    import numpy as np  # which torch does without

    if isinstance(X, np.ma.MaskedArray):
        if np.ma.is_masked(X) and X.dtype.kind in "bu":
            X = X / np.float32(255 if X.dtype == np.uint8 else 1)
        if np.ma.is_masked(X) and X.dtype.kind != "f":  # their fill value would be read
            raise TypeError(f"a masked array must be floating, uint8 or bool; got {X.dtype}")
        a = X.filled(np.nan) if np.ma.is_masked(X) and X.dtype.kind == "f" else X.filled()
    else:
        a = np.asarray(X)
    usable = a.dtype.isnative and all(stride >= 0 for stride in a.strides)
    with warnings.catch_warnings():
        # such as of a file opened by numpy.memmap, which is not to be copied: nothing here writes to X
        warnings.filterwarnings("ignore", "The given NumPy array is not writable")
        return torch.as_tensor(a if usable else a.astype(a.dtype.newbyteorder("="), order="C"), device="cpu")


def _numbers(X: Any, name: str, shape: str) -> Tensor:
    if _is_sparse(X):
        raise TypeError(f"{name} must be dense; got a sparse {_kind(X)}: give {name}.toarray() or {name}.to_dense()")
    try:
        return X if isinstance(X, Tensor) else _from_numpy(X) if _is_array(X) else torch.as_tensor(X, device="cpu")
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(f"{name} must be a tensor or an array of numbers {shape}; got {_kind(X)}") from error


def _tensor(X: Any, name: str, shape: str = "[N, D]") -> Tensor:
    """A tensor or an array as a matrix of a dtype that the model reads."""
    x = _numbers(X, name, shape)
    if not x.is_floating_point() and x.dtype not in (torch.uint8, torch.bool):
        raise TypeError(f"{name} must be floating, uint8 (read as x / 255) or bool; got {x.dtype}")
    if x.dim() != 2:
        raise ValueError(f"{name} must be {shape}; got {tuple(x.shape)}")
    return x


def _kind(X: Any) -> str:
    return f"{type(X).__name__} of {X.dtype}" if hasattr(X, "dtype") else type(X).__name__


def weighted(X: object, sample_weight: object) -> fit.Batch:
    """The rows of X [N, D] whose weight is not 0, and their weights [n], float64; None is 1 each."""
    x = _tensor(X, "X").detach()
    if sample_weight is None:
        return x, None
    w = _numbers(sample_weight, "sample_weight", "[N]")
    if w.shape != x.shape[:1]:
        raise ValueError(f"sample_weight must be [N] with N={len(x)} from X; got {tuple(w.shape)}")
    w = w.detach().to(x.device, torch.float64)
    if not bool((w.isfinite() & (w >= 0)).all()):
        raise ValueError("sample_weight must be finite and at least 0")
    if not bool(w.any()):
        raise ValueError(f"sample_weight must have a weight that is not zero; all {len(w)} are")
    return (x, w) if bool(w.all()) else (x[w > 0], w[w > 0])


def _fit_batches(X: Any, method: str, sample_weight: Any) -> fit.Batches:
    """X, an array or an iterable of batches, as a function that starts a new pass over the data."""
    if _is_array(X):
        rows = weighted(X, sample_weight)
        return lambda: [rows]
    if sample_weight is not None:
        raise TypeError(f"sample_weight must be None unless X is one array; X is {type(X).__name__}")
    if not isinstance(X, Iterable) or isinstance(X, str | bytes):
        raise TypeError(f"X must be a tensor, an array, or an iterable of batches; got {type(X).__name__}")
    if method == "em" and iter(X) is X:
        raise TypeError(
            f'X must be an iterable that starts anew each time for method "em", such as a DataLoader; '
            f"got the iterator {type(X).__name__}, which can be read only once"
        )

    def batches() -> Iterator[fit.Batch]:
        D = None
        for batch in X:
            # a DataLoader of a TensorDataset gives lists: data, and labels
            rows = _numbers(batch[0] if isinstance(batch, tuple | list) else batch, "a batch of X", "[n, D]")
            if rows.dim() < 2:
                raise ValueError(
                    f"X must be one array, or an iterable of batches [n, D]; got {type(X).__name__} of single rows: "
                    "give numpy.asarray(X), or torch.stack(X) of tensors"
                )
            x = _tensor(rows, "a batch of X").detach()
            D = x.shape[1] if D is None else D
            if x.shape[1] != D:
                raise ValueError(f"every batch of X must be [n, {D}], as the first one; got {tuple(x.shape)}")
            yield x, None

    return batches


class PPCA(nn.Module):
    """Probabilistic PCA: x = W z + b + e, z ~ N(0, I), e ~ N(0, s2 I).

    p(x) = N(b, W W' + s2 I), p(z | x) = N(G^-1 W'(x - b), s2 G^-1), G = W'W + s2 I. `fit` finds the maximum of the
    likelihood, or `log_prob` trains it like any module, alone or as part of one.

    Data are [N, D]: floating, uint8 (read as x / 255) or bool; NaN is a missing cell where a method says so. A torch
    tensor gives torch tensors, which carry gradients; a numpy array, or what numpy makes one of, such as a pandas
    DataFrame, gives numpy arrays. The masked cells of a masked array are missing.

    Args:
        n_components: M, latent dimensions; less than D.
        n_features: D. Without it, `W [D, M]`, `b [D]` and `log_sigma2 []` are None until `fit` or `load_state_dict`;
            with it, they start at random, 0 and 0.
        dtype, device: of the parameters; torch's defaults if None. `fit` takes those of its data.

    Attributes:
        fit_report: `FitReport` of the last `fit`; None before.

    Reference: Tipping & Bishop 1999.
    """

    W: nn.Parameter | None
    b: nn.Parameter | None
    log_sigma2: nn.Parameter | None
    fit_report: FitReport | None

    def __init__(
        self,
        n_components: int,
        n_features: int | None = None,
        *,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        self.n_components = arguments.count("n_components", n_components)
        if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
            raise TypeError(f"dtype must be a floating torch.dtype or None; got {dtype!r}")
        self.fit_report = None
        for name in ("W", "b", "log_sigma2"):
            self.register_parameter(name, None)
        if n_features is not None:
            D, M = arguments.count("n_features", n_features), self.n_components
            fit.check_components(M, D)
            W = torch.randn(D, M, dtype=dtype, device=device) / math.sqrt(M)
            self._set(W, W.new_zeros(D), W.new_zeros(()))

    def extra_repr(self) -> str:
        return f"n_components={self.n_components}, n_features={None if self.W is None else len(self.W)}"

    def _set(self, W: Tensor, b: Tensor, log_sigma2: Tensor) -> None:
        """New values; the parameters stay the same objects where shape, dtype and device do."""
        for name, value in (("W", W), ("b", b), ("log_sigma2", log_sigma2)):
            old = getattr(self, name)
            if old is not None and (old.shape, old.dtype, old.device) == (value.shape, value.dtype, value.device):
                with torch.no_grad():
                    old.copy_(value)
            else:
                setattr(self, name, nn.Parameter(value.clone()))

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        if self.W is None and prefix + "W" in state_dict:
            W = state_dict[prefix + "W"]
            if W.shape[1] != self.n_components:
                raise ValueError(f"n_components is {self.n_components}, but the checkpoint has {W.shape[1]}")
            self._set(*(torch.empty_like(state_dict[prefix + name]) for name in ("W", "b", "log_sigma2")))
        super()._load_from_state_dict(state_dict, prefix, *args)

    def _parameters_(self) -> tuple[Tensor, Tensor, Tensor]:
        if self.W is None or self.b is None or self.log_sigma2 is None:
            raise RuntimeError("PPCA has no parameters yet: call fit, load_state_dict, or give n_features")
        return self.W, self.b, self.log_sigma2

    @property
    def n_parameters(self) -> int:
        """Free parameters: D M - M (M - 1) / 2 of W (a rotation of z changes nothing), D of b, 1 of s2."""
        D, M = self._parameters_()[0].shape
        return D * M - M * (M - 1) // 2 + D + 1

    # ------------------------------------------------------------------------------------------------------------------
    # Arguments, and results of their kind.

    def _array(self, x: Any, name: str, columns: tuple[str, int]) -> Tensor:
        W = self._parameters_()[0]
        letter, size = columns
        t = _tensor(x, name, f"[N, {letter}]")
        if t.shape[1] != size:
            raise ValueError(f"{name} must be [N, {letter}] with {letter}={size}; got {tuple(t.shape)}")
        if t.device != W.device:
            raise ValueError(f"{name} must be on {W.device} like the model; got {t.device}")
        if t.is_floating_point() and (t.dtype == torch.float64) != (W.dtype == torch.float64):
            raise TypeError(f"{name} is {t.dtype} but the model is {W.dtype}: convert one (model.double(), x.float())")
        return t

    def _data(self, x: Any, missing: bool = False) -> Tensor:
        t = self._array(x, "x", ("D", len(self._parameters_()[0])))
        if not missing and t.is_floating_point() and not torch.compiler.is_compiling() and bool(t.isnan().any()):
            raise ValueError(f"x must not be NaN here; {int(t.isnan().sum())} of {t.numel()} cells are")
        return t

    @staticmethod
    def _as(like: _Array, function: Callable[[], Tensor]) -> _Array:
        """The function's tensor as a tensor, or as an array without a gradient where `like` is one."""
        if isinstance(like, Tensor):
            return function()
        with torch.no_grad():
            return function().numpy()

    # ------------------------------------------------------------------------------------------------------------------
    # The model.

    def log_prob(self, x: _Array) -> _Array:
        """log p(x), nats; of a row with NaN cells, log p of its other cells, exactly.

        Args:
            x: [N, D]. NaN: a missing cell. Inside torch.compile it gives NaN; there, call `fastelbo.ppca_log_prob`
                with `observed`.

        Returns:
            [N]; float32, or float64 for a float64 model. 0 where a whole row is missing.

        Raises:
            ValueError, TypeError, RuntimeError: shapes or dtypes that do not fit; no parameters yet.

        Reference: Tipping & Bishop 1999, eq. 4 and 11.
        """
        x_ = self._data(x, missing=True)
        return self._as(x, partial(self._log_prob, x_))

    def _log_prob(self, x: Tensor) -> Tensor:
        found = ppca_log_prob(x, *self._parameters_())
        if torch.compiler.is_compiling() or not x.is_floating_point() or not bool(found.isnan().any()):
            return found
        rows = x.isnan().any(1)
        exact = missing.log_prob(x[rows], *self._parameters_(), ~x[rows].isnan())
        # complete rows go through the op anew: a gradient of 0 times NaN is NaN
        complete = ppca_log_prob(x[~rows], *self._parameters_())
        return torch.zeros_like(found).index_put((rows,), exact).index_put((~rows,), complete)

    score_samples = log_prob

    def score(self, x: Array) -> float:
        """The mean of log p(x) over the rows, nats. x: [N, D], NaN for missing cells."""
        with torch.no_grad():
            return float(self._log_prob(self._data(x, missing=True)).double().mean())

    def bic(self, x: Array) -> float:
        """-2 sum log p(x) + n_parameters log N: over the M, the lowest is the choice (Schwarz 1978). x: [N, D]."""
        score = self.score(x)
        return -2 * len(x) * score + self.n_parameters * math.log(len(x))

    def posterior(self, x: _Array) -> tuple[_Array, _Array]:
        """p(z | x) = N(mean, covariance): mean G^-1 W'(x - b), covariance s2 G^-1.

        Args:
            x: [N, D]. NaN: a missing cell; W and G are then those of the row's observed cells.

        Returns:
            mean [N, M]; covariance [M, M], the same for all rows, or [N, M, M] where x has a missing cell.

        Raises:
            as `log_prob`.

        Reference: Tipping & Bishop 1999, eq. 6 (where s2^-1 M is the precision).
        """
        x_ = self._data(x, missing=True)
        if isinstance(x, Tensor):
            return self._posterior(x_)
        with torch.no_grad():
            mean, covariance = self._posterior(x_)
        return mean.numpy(), covariance.numpy()

    def _posterior(self, x: Tensor) -> tuple[Tensor, Tensor]:
        W, b, log_sigma2 = self._parameters_()
        if not torch.compiler.is_compiling() and x.is_floating_point() and bool(x.isnan().any()):
            mean, inverse, *_ = missing.rows(x, W, b, log_sigma2, ~x.isnan())
        else:
            mean, inverse, _ = algebra.posterior(x, W.double(), b.double(), log_sigma2.double())
        return mean.to(W.dtype), (torch.exp(log_sigma2.double()) * inverse).to(W.dtype)

    def transform(self, x: _Array) -> _Array:
        """The posterior mean E[z | x]. x: [N, D], NaN for missing cells -> [N, M]. Raises as `log_prob`."""
        x_ = self._data(x, missing=True)
        return self._as(x, lambda: self._posterior(x_)[0])

    def inverse_transform(self, z: _Array) -> _Array:
        """E[x | z] = W z + b. z: [N, M] -> [N, D]. Raises as `log_prob`."""
        z_ = self._latent(z, "z")
        return self._as(z, lambda: self._of_latent(z_).to(z_.dtype))

    def _of_latent(self, z: Tensor) -> Tensor:
        """W z + b, float64 [N, D]"""
        W, b, _ = self._parameters_()
        mean = product(z.double(), W.double().mT)
        return mean + ordered.expand(b.double(), mean.shape)

    def impute(self, x: _Array) -> _Array:
        """x [N, D] with every NaN replaced by its expectation given the row's other cells. Raises as `log_prob`."""
        x_ = self._data(x, missing=True)

        def filled() -> Tensor:
            return torch.where(x_.isnan(), self._of_latent(self._posterior(x_)[0]).to(x_.dtype), x_)

        return self._as(x, filled) if x_.is_floating_point() else x

    @torch.no_grad()
    def sample(self, n: int, *, generator: Generator | None = None) -> Tensor:
        """n draws x = W z + b + e -> [n, D]; the noise is of `generator`, on the model's device, or torch's own."""
        W, _, log_sigma2 = self._parameters_()
        n = arguments.size("n", n)
        if generator is not None:
            arguments.generator("generator", generator)
        z, e = (torch.randn(n, k, dtype=W.dtype, device=W.device, generator=generator) for k in W.shape[::-1])
        return self._of_latent(z).to(W.dtype) + torch.exp(0.5 * log_sigma2) * e

    def elbo(self, x: _Array, mu: _Array, logvar: _Array) -> _Array:
        """E_q[log p(x | z)] - KL(q || p(z)) in closed form, for q = N(mu, diag exp(logvar)).

        -1/2 [D log(2 pi s2) + (|x - b - W mu|^2 + sum_j exp(lv_j) |W_j|^2) / s2] - KL(q || N(0, I)).

        Args:
            x: [N, D], without NaN.
            mu, logvar: [N, M].

        Returns:
            [N], nats: at most `log_prob(x)`; `inference_gap` is the difference.

        Raises:
            as `log_prob`; ValueError for NaN.

        Reference: Lucas et al. 2019, sec. 3.
        """
        x_, m, lv = self._data(x), self._latent(mu, "mu", x), self._latent(logvar, "logvar", x)
        return self._as(x, partial(self._elbo, x_, m, lv))

    def _latent(self, t: Any, name: str, x: Any = None) -> Tensor:
        """[N, M], in the model's dtype."""
        found = self._array(t, name, ("M", self.n_components))
        if x is not None and len(found) != len(x):
            raise ValueError(f"{name} must be [N, M] with N={len(x)} from x; got {tuple(found.shape)}")
        return found.to(self._parameters_()[0].dtype)

    def _elbo(self, x: Tensor, mu: Tensor, logvar: Tensor) -> Tensor:
        W, _, log_sigma2 = self._parameters_()
        log_s2 = ordered.expand(log_sigma2.double(), x.shape[:1])
        e = read_data(x, torch.float64) - self._of_latent(mu)
        square = ordered_sum(e.square(), 1) + ordered_sum(self._spread(logvar), 1)
        fit = -0.5 * (len(W) * (LOG_2PI + log_s2) + square * torch.exp(-log_s2))
        return fit.to(compute_dtype(W)) - gaussian_kl(mu, logvar)

    def _spread(self, logvar: Tensor) -> Tensor:
        """exp(lv_j) |W_j|^2, float64 [N, M]"""
        squares = ordered_sum(self._parameters_()[0].double().square(), 0)
        return torch.exp(logvar.double()) * ordered.expand(squares, logvar.shape)

    def inference_gap(self, x: _Array, mu: _Array, logvar: _Array) -> _Array:
        """KL(q || p(z | x)) for q = N(mu, diag exp(logvar)): `log_prob` - `elbo`, by a formula of its own.

        1/2 [(sum_j exp(lv_j) G_jj + (mu - m)' G (mu - m)) / s2 - M - sum_j lv_j + M log s2 - log |G|], m = E[z | x].

        Args:
            x: [N, D], without NaN.
            mu, logvar: [N, M].

        Returns:
            [N], nats, never negative but for rounding.

        Raises:
            as `log_prob`; ValueError for NaN.

        Reference: Kingma & Welling 2014, eq. 1; Gaussians: Bishop 2006, app. B.
        """
        x_, m, lv = self._data(x), self._latent(mu, "mu", x), self._latent(logvar, "logvar", x)
        return self._as(x, partial(self._gap, x_, m, lv))

    def _gap(self, x: Tensor, mu: Tensor, logvar: Tensor) -> Tensor:
        W, b, log_sigma2 = self._parameters_()
        W_, lv, log_s2 = W.double(), logvar.double(), ordered.expand(log_sigma2.double(), x.shape[:1])
        mean, _, log_det = algebra.posterior(x, W_, b.double(), log_sigma2.double())
        off = mu.double() - mean
        # G = W'W + s2 I
        square = ordered_sum(product(off, W_.mT).square(), 1) + ordered_sum(self._spread(logvar), 1)
        rest = ordered_sum(torch.exp(lv) + off.square() - lv, 1) + self.n_components * (log_s2 - 1)
        gap: Tensor = square * torch.exp(-log_s2) + rest - ordered.expand(log_det, x.shape[:1])
        return (0.5 * gap).to(compute_dtype(W))

    # ------------------------------------------------------------------------------------------------------------------
    # Fitting.

    @torch.no_grad()
    def fit(
        self,
        X: Data,
        method: str = "eig",
        *,
        max_iter: int = 1000,
        tol: float = 1e-6,
        min_sigma2: float = 0.0,
        group: ProcessGroup | None = None,
        generator: Generator | None = None,
        sample_weight: Array | None = None,
    ) -> PPCA:
        """Maximum likelihood; W gets orthogonal columns, longest first, whatever the method.

        Args:
            X: [N, D], or an iterable of batches [n, D] (or of lists that start with one, as DataLoaders give), so that
                the data need not fit in memory. NaN is a missing cell for "em".
            method: "eig", the closed form, takes one pass: O(N D^2) with more than D rows, O(N^2 D) else. "em" takes
                O(N D M) per step, with missing cells O(N D M^2) and D M^2 / 2 sums in memory.
            max_iter, tol: "em" ends after so many steps, or when less than tol nats per row seem left to gain.
            min_sigma2: the least s2, in units of the squared data. With missing cells, it keeps many components from
                fitting the noise of the few cells that a row has; `fastelbo.sklearn.PPCA` has an example in figures.
            group: a torch.distributed group, such as `torch.distributed.group.WORLD`, whose processes hold a part of
                the rows each, or none. All get the same parameters.
            generator: of the start of "em", on the CPU; torch's default one if None.
            sample_weight: [N], at least 0, if X is one array: a row of weight 2 counts as two equal rows.

        Returns:
            self, with a new `fit_report`.

        Warns:
            RuntimeWarning: "em" did not converge, with what to do.

        Raises:
            ValueError: a shape, NaN or infinity where it is not allowed, fewer than 2 rows, M not less than D or than
                the rank of the data (s2 would be 0 and the likelihood unbounded), a column that is never observed.
            TypeError: a dtype or kind of X.
            With a group, an error in the rows of one process is raised in all processes.

        Reference: Tipping & Bishop 1999, sec. 3.2, app. B.
        """
        found = self._fit(X, method, max_iter, tol, min_sigma2, group, generator, sample_weight)
        if not found.report.converged:
            warnings.warn(fit.advice(found), RuntimeWarning, stacklevel=3)  # beyond the frame of no_grad
        return self

    def _fit(
        self,
        X: Any,
        method: str,
        max_iter: int,
        tol: float,
        min_sigma2: float,
        group: ProcessGroup | None,
        generator: Generator | None,
        sample_weight: Any,
    ) -> Fit:
        _method("method", method)
        max_iter, tol = arguments.count("max_iter", max_iter), arguments.not_negative("tol", tol)
        min_sigma2 = variance("min_sigma2", min_sigma2)
        if generator is not None:
            arguments.generator("generator", generator)
        seen: list[torch.dtype] = []
        over = fit.Group(group)
        with over.together():
            source = _fit_batches(X, method, sample_weight)
        most, least = over.largest(self.n_components), -over.largest(-self.n_components)
        if most != least:
            raise ValueError(
                f"n_components must be the same in every process of the group; they have {least} to {most}, "
                f"this one {self.n_components}"
            )

        def batches() -> Iterator[fit.Batch]:
            for x, weight in source():
                if x.dtype not in seen:
                    seen.append(x.dtype)
                yield x, weight

        if method == "eig":
            found = fit.eig(batches, self.n_components, over, min_sigma2)
        else:
            options: Any = {"max_iter": max_iter, "tol": tol, "min_sigma2": min_sigma2, "generator": generator}
            found = fit.em(batches, self.n_components, over, **options)
        double = over.largest(torch.float64 in seen)
        dtype = torch.float64 if double else torch.float32
        self._take(found, dtype)
        return found

    def _take(self, found: Fit, dtype: torch.dtype) -> None:
        self._set(found.W.to(dtype), found.b.to(dtype), found.log_sigma2.to(dtype))
        self.fit_report = found.report

    def fit_transform(
        self,
        X: _Array,
        method: str = "eig",
        *,
        max_iter: int = 1000,
        tol: float = 1e-6,
        min_sigma2: float = 0.0,
        group: ProcessGroup | None = None,
        generator: Generator | None = None,
        sample_weight: Array | None = None,
    ) -> _Array:
        """`fit`, then `transform` of the same X, which must be one array here."""
        options: Any = {"max_iter": max_iter, "tol": tol, "min_sigma2": min_sigma2, "sample_weight": sample_weight}
        self.fit(X, method, group=group, generator=generator, **options)
        return self.transform(X)
