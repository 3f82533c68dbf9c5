"""The model: parameters, densities, posterior, and `fit`."""

import math
import warnings
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeVar, overload

import torch
from torch import Tensor, nn

from fastelbo._internal import ordered
from fastelbo._internal.arguments import Count, Flag, Generator, Size, checked, number, one_of
from fastelbo._internal.process_groups import Processes
from fastelbo.ppca import data, density, intervals
from fastelbo.ppca.choice import Components, shown
from fastelbo.ppca.closed_form import SOLVERS, eig
from fastelbo.ppca.em import em
from fastelbo.ppca.result import FitReport, Parameters, Variance, check_components
from fastelbo.ppca.shortened import by_rows

if TYPE_CHECKING:
    import numpy.typing as npt
    from torch.distributed import ProcessGroup

    Array = Tensor | npt.NDArray[Any]
    Rows = Array | torch.utils.data.Dataset[Tensor]
    Data = Rows | Iterable[Array | Sequence[Array]]  # of `fit`: one array, or batches
    Columns = Sequence[int] | Array  # numbers, or a mask

METHODS = ("eig", "em")
Method = Annotated[str, one_of(METHODS)]
Solver = Annotated[str, one_of(SOLVERS)]
Tolerance = Annotated[float, number(lambda value: value >= 0, "at least 0")]
# the kind of an array: what a method returns is of the kind that it was called with
_Array = TypeVar("_Array", Tensor, "npt.NDArray[Any]")


class PPCA(nn.Module):
    """Probabilistic PCA: x = W z + b + e, z ~ N(0, I), e ~ N(0, s2 I).

    p(x) = N(b, W W' + s2 I), p(z | x) = N(G^-1 W'(x - b), s2 G^-1), G = W'W + s2 I. `fit` finds the maximum of the
    likelihood, or `log_prob` trains it like any module, alone or as part of one.

    Data are [N, D]: floating, uint8 (read as x / 255) or bool; NaN is a missing cell where a method says so. A torch
    tensor gives torch tensors, which carry gradients; a numpy array, or what numpy makes one of, such as a pandas
    DataFrame, gives numpy arrays. The masked cells of a masked array are missing. Sparse matrices, of scipy or torch's
    CSR, are read by `fit`, `log_prob`, `score`, `posterior`, `transform`, `elbo` and `inference_gap`; the memory beside
    them does not grow with D N. Where no gradient is asked for, a method takes O(M) for each cell that is there.

    Args:
        n_components: M, latent dimensions; less than D. Or what chooses M in a `fit` by "eig", from 1 to the rank of
            the data less 1: a fraction in (0, 1) of the variance, of which the components have more; "bic", the lowest
            `bic`; "evidence", the highest probability of the data by Laplace's approximation (Minka 2000).
        n_features: D. Without it, `W [D, M]`, `b [D]` and `log_sigma2 []` are None until `fit` or `load_state_dict`;
            with it, they start at random, 0 and 0.
        dtype, device: of the parameters; torch's defaults if None. `fit` takes those of its data.

    Attributes:
        n_components: M; before the first fit of a model that chooses, what chooses.
        criterion: what chooses M in every `fit`; None of a number.
        fit_report: `FitReport` of the last `fit`; None before.

    Reference: Tipping & Bishop 1999.
    """

    n_components: int
    criterion: float | str | None = None
    W: nn.Parameter | None
    b: nn.Parameter | None
    log_sigma2: nn.Parameter | None
    fit_report: FitReport | None

    @checked
    def __init__(
        self,
        n_components: Components,
        n_features: Count | None = None,
        *,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
            raise TypeError(f"dtype must be a floating torch.dtype or None; got {dtype!r}")
        self.n_components = n_components  # type: ignore[assignment]
        if not isinstance(n_components, int):
            self.criterion = n_components
        self.fit_report = None
        for name in Parameters._fields:
            self.register_parameter(name, None)
        if n_features is not None:
            if not isinstance(n_components, int):
                raise ValueError(f"n_components must be an int where n_features is given; got {shown(n_components)}")
            check_components(n_components, n_features)
            W = torch.randn(n_features, n_components, dtype=dtype, device=device) / math.sqrt(n_components)
            self._set(Parameters(W, W.new_zeros(n_features), W.new_zeros(())))

    def extra_repr(self) -> str:
        return f"n_components={self.n_components}, n_features={None if self.W is None else len(self.W)}"

    def _set(self, values: Parameters) -> None:
        """New values; the parameters stay the same objects where shape, dtype and device do."""
        for name, value in values._asdict().items():
            old = getattr(self, name)
            if old is not None and (old.shape, old.dtype, old.device) == (value.shape, value.dtype, value.device):
                old.copy_(value)  # of `fit`, which records no graph
            else:
                setattr(self, name, nn.Parameter(value.clone()))

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        if self.W is None and prefix + "W" in state_dict:
            W = state_dict[prefix + "W"]
            if self.criterion is not None:
                self.n_components = W.shape[1]
            if W.shape[1] != self.n_components:
                raise ValueError(f"n_components is {self.n_components}, but the checkpoint has {W.shape[1]}")
            self._set(Parameters(*(torch.empty_like(state_dict[prefix + name]) for name in Parameters._fields)))
        super()._load_from_state_dict(state_dict, prefix, *args)

    def _values(self, like: object = None) -> Parameters:
        """The parameters; without their gradients where `like` is an array, whose results have none."""
        if self.W is None or self.b is None or self.log_sigma2 is None:
            raise RuntimeError("PPCA has no parameters yet: call fit, load_state_dict, or give n_features")
        found = Parameters(self.W, self.b, self.log_sigma2)
        return found if like is None or isinstance(like, Tensor) else Parameters(*(t.detach() for t in found))

    @staticmethod
    def _of(parameters: Parameters) -> "PPCA":
        model = PPCA(parameters.W.shape[1])
        model._set(parameters)
        return model

    @property
    def asked(self) -> Components:
        """The number of components, or what chooses it in every `fit`."""
        return self.n_components if self.criterion is None else self.criterion

    @property
    def n_parameters(self) -> int:
        """Free parameters: D M - M (M - 1) / 2 of W (a rotation of z changes nothing), D of b, 1 of s2."""
        D, M = self._values().W.shape
        return D * M - M * (M - 1) // 2 + D + 1

    # ------------------------------------------------------------------------------------------------------------------
    # Arguments, and results of their kind.

    def _array(self, x: object, name: str, letter: str, size: int) -> Tensor:
        W = self._values().W
        t = data.matrix(x, name, f"[N, {letter}]")
        if t.shape[1] != size:
            raise ValueError(f"{name} must be [N, {letter}] with {letter}={size}; got {tuple(t.shape)}")
        if t.device != W.device:
            raise ValueError(f"{name} must be on {W.device} like the model; got {t.device}")
        if t.is_floating_point() and (t.dtype == torch.float64) != (W.dtype == torch.float64):
            raise TypeError(f"{name} is {t.dtype} but the model is {W.dtype}: convert one (model.double(), x.float())")
        return t

    def _data(self, x: object) -> tuple[Tensor, Parameters]:
        parameters = self._values(x)
        return self._array(x, "x", "D", len(parameters.W)), parameters

    def _latent(self, t: object, name: str) -> Tensor:
        """[N, M], in the model's dtype."""
        return self._array(t, name, "M", self.n_components).to(self._values().W.dtype)

    def _with_latents(self, x: object, mu: object, logvar: object) -> tuple[Tensor, Tensor, Tensor, Parameters]:
        x_, parameters = self._data(x)
        if density.has_nan(x_):
            raise ValueError(f"x must not be NaN here; {int(x_.isnan().sum())} of {x_.numel()} cells are")
        latents = self._latent(mu, "mu"), self._latent(logvar, "logvar")
        for name, t in zip(("mu", "logvar"), latents, strict=True):
            if len(t) != len(x_):
                raise ValueError(f"{name} must be [N, M] with N={len(x_)} from x; got {tuple(t.shape)}")
        return x_, *latents, parameters

    @staticmethod
    def _as(like: _Array, result: Tensor) -> _Array:
        return result if isinstance(like, Tensor) else result.detach().numpy()

    # ------------------------------------------------------------------------------------------------------------------
    # The model.

    @by_rows
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
        return self._as(x, density.log_prob(*self._data(x)))

    score_samples = log_prob

    @overload
    def score(self, x: "Rows", return_std: Literal[False] = False) -> float: ...
    @overload
    def score(self, x: "Rows", return_std: Literal[True]) -> tuple[float, float]: ...
    @overload
    def score(self, x: "Rows", return_std: bool) -> float | tuple[float, float]: ...
    @torch.no_grad()
    @checked
    def score(self, x: "Rows", return_std: Flag = False) -> float | tuple[float, float]:
        """The mean of log p(x) over the rows, nats.

        Args:
            x: [N, D], NaN for missing cells, or a `fastelbo.data.Dataset`.
            return_std: True: the mean, and its standard error by the choice of rows, the deviation of log p(x) between
                rows divided by sqrt(N); NaN of one row. log p(x) of a row has no error, given the parameters; how far
                these are off is not part of it.
        """
        batches = data.batches_of(x)
        parts: list[Any] = [self.log_prob(batch) for batch in ([x] if batches is x else batches)]
        values = torch.cat([(t if isinstance(t, Tensor) else torch.from_numpy(t)).double() for t in parts])
        mean = ordered.reduce(values, "mean")
        if not return_std:
            return float(mean)
        variance = ordered.ordered_sum((values - mean).square(), 0) / (len(values) - 1)
        return float(mean), float((variance / len(values)).sqrt())

    def bic(self, x: "Rows", *, score: float | None = None) -> float:
        """-2 sum log p(x) + n_parameters log N: of all M, the lowest is the choice (Schwarz 1978). x: as in `score`."""
        score, N = self.score(x) if score is None else score, _rows(x)
        return -2 * N * score + self.n_parameters * math.log(N)

    @by_rows
    def posterior(self, x: _Array) -> tuple[_Array, _Array]:
        """p(z | x) = N(mean, covariance): mean G^-1 W'(x - b), covariance s2 G^-1.

        Args:
            x: [N, D]. NaN: a missing cell; W and G are then those of the row's observed cells.

        Returns:
            mean [N, M]; covariance [M, M], the same for all rows, or [N, M, M], one for each row, complete ones too,
            where x has a missing cell.

        Raises:
            as `log_prob`.

        Reference: Tipping & Bishop 1999, eq. 6 (where s2^-1 M is the precision).
        """
        mean, covariance = density.posterior(*self._data(x))
        return self._as(x, mean), self._as(x, covariance)

    def transform(self, x: _Array) -> _Array:
        """The posterior mean E[z | x]. x: [N, D], NaN for missing cells -> [N, M]. Raises as `log_prob`."""
        return self.posterior(x)[0]

    def inverse_transform(self, z: _Array) -> _Array:
        """E[x | z] = W z + b. z: [N, M] -> [N, D]. Raises as `log_prob`."""
        z_ = self._latent(z, "z")
        return self._as(z, density.decode(z_, self._values(z)).to(z_.dtype))

    @overload
    def impute(self, x: _Array, return_std: Literal[False] = False) -> _Array: ...
    @overload
    def impute(self, x: _Array, return_std: Literal[True]) -> tuple[_Array, _Array]: ...
    @overload
    def impute(self, x: _Array, return_std: bool) -> _Array | tuple[_Array, _Array]: ...
    @checked
    def impute(self, x: _Array, return_std: Flag = False) -> _Array | tuple[_Array, _Array]:
        """x with every NaN replaced by its expectation given the row's other cells.

        E[x_d | x_o] = w_d' E[z | x_o] + b_d, with the standard deviation sqrt(w_d' Cov(z | x_o) w_d + s2) =
        sqrt(s2 (1 + w_d' G_o^-1 w_d)), where W_o and G_o are those of the observed cells. If the model holds, 90 % of
        the cells lie within 1.645 standard deviations; they leave out how far the parameters are off.

        Args:
            x: [N, D]. NaN: a missing cell. Rows that have one cost O(N D M^2) and memory O(N D); with gradients,
                O(N M^2 + N D).
            return_std: whether the standard deviations are returned too.

        Returns:
            [N, D], of x's dtype; with return_std also the standard deviations [N, D], in units of x, of the model's
            dtype, 0 of observed cells.

        Raises:
            as `log_prob`.

        Reference: Bishop 2006, eq. 2.115.
        """
        filled, std = intervals.impute(*self._data(x), return_std)
        return self._as(x, filled) if std is None else (self._as(x, filled), self._as(x, std))

    def predict(self, x: _Array, columns: "Columns") -> tuple[_Array, _Array]:
        """p(x_c | x_o) = N(mean, covariance) of some columns c given the row's other cells o.

        mean W_c E[z | x_o] + b_c, covariance W_c Cov(z | x_o) W_c' + s2 I.

        Args:
            x: [N, D]. What lies in the columns is not looked at; NaN elsewhere: a missing cell.
            columns: L of them, a sequence of ints from 0 to D - 1, or a bool mask [D].

        Returns:
            mean [N, L] and covariance [N, L, L], in units of x and their squares, in the order of columns. Without
            missing cells elsewhere, the covariance is the same for all rows.

        Raises:
            as `log_prob`; ValueError, TypeError: columns that are none, twice there or beyond D, or no columns.

        Reference: Bishop 2006, eq. 2.115.
        """
        x_, parameters = self._data(x)
        mean, covariance = intervals.conditional(x_, intervals.columns_of(columns, len(parameters.W)), parameters)
        return self._as(x, mean), self._as(x, covariance)

    @torch.no_grad()
    @checked
    def sample(self, n: Size, *, generator: Generator | None = None) -> Tensor:
        """n draws x = W z + b + e -> [n, D]; the noise is of `generator`, on the model's device, or torch's own."""
        parameters = self._values()
        W, _, log_sigma2 = parameters
        z, e = (torch.randn(n, k, dtype=W.dtype, device=W.device, generator=generator) for k in W.shape[::-1])
        return density.decode(z, parameters).to(W.dtype) + torch.exp(0.5 * log_sigma2) * e

    @by_rows
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
        return self._as(x, density.elbo(*self._with_latents(x, mu, logvar)))

    @by_rows
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
        return self._as(x, density.inference_gap(*self._with_latents(x, mu, logvar)))

    # ------------------------------------------------------------------------------------------------------------------
    # Fitting.

    @torch.no_grad()
    @checked
    def fit(
        self,
        X: "Data",
        method: Method = "eig",
        *,
        max_iter: Count = 1000,
        tol: Tolerance = 1e-6,
        min_sigma2: Variance = 0.0,
        group: "ProcessGroup | None" = None,
        generator: Generator | None = None,
        sample_weight: "Array | None" = None,
        solver: Solver = "auto",
    ) -> "PPCA":
        """Maximum likelihood; W gets orthogonal columns, longest first, whatever the method.

        Args:
            X: [N, D], or an iterable of batches [n, D] (or of lists that start with one, as DataLoaders give), or a
                `fastelbo.data.Dataset`, so that the data need not fit in memory. NaN is a missing cell for "em".
            method: "eig", the closed form, by a solver. "em" takes O(N D M) per step, with missing cells O(N D M^2) and
                D M^2 / 2 sums in memory.
            max_iter, tol: "em" ends after so many steps, or when less than tol nats per row seem left to gain;
                "krylov" after so many passes, or when s2 is within tol of the maximum's, relative, and the subspace
                within sqrt(tol), the sine of the largest angle.
            min_sigma2: the least s2, in units of the squared data. With missing cells, it keeps many components from
                fitting the noise of the few cells that a row has; `fastelbo.sklearn.PPCA` has an example in figures.
            group: a torch.distributed group, such as `torch.distributed.group.WORLD`, whose processes hold a part of
                the rows each, or none. All get the same parameters.
            generator: of the start of "em", on the CPU; torch's default one if None.
            sample_weight: [N], at least 0, if X is one array: a row of weight 2 counts as two equal rows.
            solver: of "eig". "full" has all eigenvalues, in one pass: O(N D^2 + D^3) with more than D rows, O(N^2 D)
                else. "covariance" does so by the D by D covariance alone, without scaling the columns: a third of the
                time for D^3. "krylov" takes O(N D M) per pass and no D by D matrix: the first M eigenvectors, by block
                Krylov iterations. "auto" is "krylov" from 1,000 rows and columns on, if M is at most a fifth of them
                and X can be read again; else "full". Of a dense array of at most 5,000 rows or columns, it goes on to
                "full" where "krylov" has taken as long and did not converge.

        Returns:
            self, with a new `fit_report`.

        Warns:
            RuntimeWarning: "em" or "krylov" did not converge, with what to do.

        Raises:
            ValueError: a shape, NaN or infinity where it is not allowed, fewer than 2 rows, M not less than D or than
                the rank of the data (s2 would be 0 and the likelihood unbounded), a column that is never observed; "em"
                of a model that chooses M, for which all eigenvalues are needed.
            TypeError: a dtype or kind of X.
            With a group, an error in the rows of one process is raised in all processes.

        Reference: Tipping & Bishop 1999, sec. 3.2, app. B; "krylov": Musco & Musco 2015.
        """
        n_components = self.asked
        if method == "em" and solver != "auto":
            raise ValueError(f'solver must be "auto" for method "em", which has none; got {solver!r}')
        dataset = data.Dataset(X, sample_weight, method, n_components, Processes(group), solver)
        if not isinstance(n_components, int):
            got = shown(n_components)
            if method == "em":
                raise ValueError(
                    f'n_components must be an int for method "em"; "eig" finds what {got} needs; got {got}'
                )
            if solver == "krylov":
                raise ValueError(
                    f'n_components must be an int for solver "krylov"; "full" finds what {got} needs; got {got}'
                )
        if method == "eig":
            parameters, self.fit_report = eig(dataset, min_sigma2, solver, max_iter, tol, generator)
        else:
            parameters, self.fit_report = em(dataset, min_sigma2, max_iter, tol, generator)
        dataset.processes.broadcast(*parameters)
        self._set(parameters.to(dataset.dtype))
        self.n_components = parameters.W.shape[1]
        if not self.fit_report.converged:
            warnings.warn(advice(self), RuntimeWarning, stacklevel=4)  # beyond the frames of the two decorators
        return self

    def fit_transform(self, X: _Array, method: str = "eig", **options: object) -> _Array:
        """`fit` with its options, then `transform` of the same X, which must be one array here."""
        return self.fit(X, method, **options).transform(X)  # type: ignore[arg-type]


def _rows(x: Any) -> int:
    return int(x.shape[0]) if hasattr(x, "shape") else len(x)  # sparse matrices of scipy have no length


def advice(model: PPCA) -> str:
    """What to do about a fit that did not converge."""
    assert model.fit_report is not None and model.log_sigma2 is not None
    if model.fit_report.solver == "krylov":
        return (
            "The solver krylov did not converge. Raise max_iter or tol, or take solver 'full'. Where eigenvalues of "
            f"the covariance hardly differ from the {model.n_components}th on, the components are not determined"
        )
    M, history, s2 = model.n_components, model.fit_report.log_likelihood, math.exp(model.log_sigma2.item())
    rose = f": log p(x) rose by {history[-1] - history[-2]:.1e} nats per row in the last one" if history[1:] else ""
    return (
        f"EM did not converge in {len(history) - 1} steps{rose}. Raise max_iter or tol. If cells are missing, first "
        f"try fewer components than {M}, or a floor of sigma2, here {s2:.2g}: too many components fit noise, and "
        "log p(x) of held-out rows is then lower. If the scales of the columns differ, standardize the columns"
    )
