"""Maximum likelihood for probabilistic PCA: the closed form and EM, over batches and over processes. All in float64.

Batches [n, D] are read as often as a method needs: once for "eig", once and then once per step for "em". What is kept
between them are sums about a mean (Chan, Golub & LeVeque 1983), so that nothing cancels where the mean is large.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from itertools import islice, pairwise
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from fastelbo import reference
from fastelbo._internal.ops import call
from fastelbo._internal.progress import progress
from fastelbo.likelihoods import LOG_2PI
from fastelbo.ppca import algebra, missing
from fastelbo.reference import read_data

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

Batch = tuple[Tensor, Tensor | None]  # rows [n, D], and their weights [n], float64, positive; None is 1 each
Batches = Callable[[], Iterable[Batch]]  # a new pass over the data at every call
Parameters = tuple[Tensor, Tensor, Tensor]  # W, b, log s2; float64
Step = tuple[float, Parameters]  # mean log p(x) per row, and the parameters that have it
PIECE_ELEMENTS = 1 << 24  # of the data, converted to float64 at a time

_op = torch.ops.fastelbo


class Fit(NamedTuple):
    """Parameters, float64, and how they were found."""

    W: Tensor  # [D, M]: orthogonal columns in order of falling length, the largest entry of each positive
    b: Tensor  # [D]
    log_sigma2: Tensor  # []
    report: FitReport


class FitReport(NamedTuple):
    """How a fit went."""

    method: str  # "eig" or "em"
    rows: int  # N
    converged: bool  # "eig" always
    # mean log p(x) per row in nats, with the rows' weights: of the parameters before every step and at the end; of
    # "eig", at the end alone
    log_likelihood: tuple[float, ...]


def advice(found: Fit) -> str:
    """What to do about a fit that did not converge."""
    history = found.report.log_likelihood
    steps = len(history) - 1
    rose = f": log p(x) rose by {history[-1] - history[-2]:.1e} nats per row in the last one" if steps else ""
    return (
        f"EM did not converge in {steps} steps{rose}. Raise max_iter or tol. If cells are missing, first try fewer "
        f"components than {found.W.shape[1]}, or a floor of sigma2, here {float(found.log_sigma2.exp()):.2g}: too many "
        "components fit noise, and log p(x) of held-out rows is then lower. If the scales of the columns differ, "
        "standardize the columns"
    )


class RankError(ValueError):
    """As many components as the data have dimensions: the likelihood has no maximum."""


class Group:
    """Collective operations over the processes of a torch.distributed group; None is one process alone."""

    def __init__(self, group: ProcessGroup | None) -> None:
        kind: Any = getattr(dist, "ProcessGroup", ())
        if group is not None and not isinstance(group, kind):
            raise TypeError(f"group must be a torch.distributed group or None; got {type(group).__name__}")
        self.group = group
        self.size = 1 if group is None else dist.get_world_size(group)

    @contextmanager
    def together(self) -> Iterator[None]:
        """An error that one process raises in the block is raised in all, so that none waits for another forever."""
        error: Exception | None = None
        try:
            yield
        except Exception as e:
            error = e
        if self.largest(error is not None):
            raise error or ValueError("X is refused by another process of the group, which says why")

    def sum(self, *tensors: Tensor) -> None:
        """In place: the sums over all processes, bit by bit the same in each."""
        if self.group is not None:
            for t in tensors:
                dist.all_reduce(t, group=self.group)

    def largest(self, value: int) -> int:
        """The largest of the processes' values."""
        if self.group is None:
            return value
        t = torch.tensor(int(value), device=self._device())
        dist.all_reduce(t, dist.ReduceOp.MAX, group=self.group)
        return int(t)

    def same(self, *tensors: Tensor) -> None:
        """In place: the tensors of the first process, in every process."""
        if self.group is not None:
            for t in tensors:
                dist.broadcast(t, group=self.group, group_src=0)

    def gather(self, rows: Tensor, count: int) -> Tensor:
        """The rows [n, D] of all processes, of which this one has n and the longest `count`."""
        if self.group is None:
            return rows
        counts = [torch.zeros((), dtype=torch.int64, device=rows.device) for _ in range(self.size)]
        dist.all_gather(counts, torch.tensor(len(rows), device=rows.device), group=self.group)
        padded = torch.cat([rows, rows.new_zeros(count - len(rows), rows.shape[1])])
        parts = [torch.empty_like(padded) for _ in range(self.size)]
        dist.all_gather(parts, padded, group=self.group)
        return torch.cat([part[: int(n)] for part, n in zip(parts, counts, strict=True)])

    def _device(self) -> torch.device:
        cuda = dist.get_backend(self.group) == "nccl"
        return torch.device("cuda", torch.cuda.current_device()) if cuda else torch.device("cpu")


def _pieces(x: Tensor, weight: Tensor | None) -> Iterator[Batch]:
    """x [n, D] and its weights in pieces of rows that are small in float64."""
    size = max(1, PIECE_ELEMENTS // max(1, x.shape[1]))
    for start in range(0, len(x), size):
        yield x[start : start + size], None if weight is None else weight[start : start + size]


def _read(batches: Batches, group: Group) -> Iterator[Batch]:
    """One pass over the data."""
    with group.together():
        for batch in batches():
            yield from _pieces(*batch)


def _weights(x: Tensor, weight: Tensor | None) -> Tensor:
    return torch.ones(len(x), dtype=torch.float64, device=x.device) if weight is None else weight


class Moments:
    """Rows, sum of their weights, mean, variance and, where it is asked for, covariance, of batches and of processes.

    Weights have a ratio's meaning: what is summed is a share of their sum, so that neither small nor large ones leave
    float64's range.
    """

    def __init__(self, D: int, device: torch.device, covariance: bool = False) -> None:
        self.rows, self.count = torch.zeros(2, dtype=torch.float64, device=device)
        self.mean = torch.zeros(D, dtype=torch.float64, device=device)
        self.square = torch.zeros((), dtype=torch.float64, device=device)  # trace of the covariance
        self.covariance = torch.zeros(D, D, dtype=torch.float64, device=device) if covariance else None

    def __setstate__(self, state: dict[str, Any]) -> None:
        if "scatter" in state:  # of an older pickle: the sums
            scatter = state.pop("scatter")
            state["covariance"] = None if scatter is None else scatter / state["count"]
            state["square"] = state["square"] / state["count"]
        self.__dict__.update(state)

    def update(self, x: Tensor, weight: Tensor | None = None) -> None:
        for piece, w in _pieces(x, weight):
            r = read_data(piece, torch.float64)
            n = torch.full_like(self.count, len(r)) if w is None else w.sum()
            mean = r.mean(0) if w is None else (w / n) @ r
            count = self.count + n
            old, new = self.count / count, n / count
            r = (r - mean) * (new / len(r) if w is None else (w / count)[:, None]).sqrt()
            delta = mean - self.mean
            self.mean = self.mean + delta * new
            self.square = old * self.square + r.square().sum() + old * new * delta.square().sum()
            if self.covariance is not None:
                self.covariance.mul_(old).addmm_(r.mT, r).addr_(old * new * delta, delta)
            self.count = count
            self.rows = self.rows + len(r)

    def reduce(self, group: Group) -> None:
        """In place: the moments of the rows of all processes."""
        if group.group is None:
            return
        ours = self.count.clone()
        group.sum(self.rows, self.count)
        share = ours / self.count if self.rows > 0 else ours
        mean = share * self.mean
        group.sum(mean)
        delta = self.mean - mean
        self.square = share * (self.square + delta.square().sum())
        if self.covariance is not None:
            self.covariance.addr_(delta, delta).mul_(share)
            group.sum(self.covariance)
        group.sum(self.square)
        self.mean = mean


def _relative(batches: Batches, mean_weight: float) -> Batches:
    """The same rows, with weights of mean 1."""
    if mean_weight == 1:
        return batches
    return lambda: ((x, _weights(x, w) / mean_weight) for x, w in batches())


def _features(first: Tensor | None, group: Group) -> tuple[int, torch.device]:
    """D and the device: of the data, or of other processes where this one has none."""
    D = group.largest(0 if first is None else first.shape[1])
    if D == 0:
        raise ValueError("X must hold at least 2 rows; got none")
    if group.largest(first is not None and first.shape[1] != D):
        found = "none" if first is None else first.shape[1]
        raise ValueError(f"X must have the same number of columns in every process; one has {D}, this one {found}")
    return D, group._device() if first is None and group.group is not None else first.device  # type: ignore[union-attr]


def _check_count(count: int, rank: int, n_components: int) -> None:
    if count < 2:
        raise ValueError(f"X must hold at least 2 rows; got {count}")
    if rank <= n_components:
        raise RankError(
            f"n_components must be less than the rank {rank} of the centered data [{count} rows]; got {n_components}: "
            "to rounding, sigma2 would be 0 and the likelihood without a maximum; if the scales of the columns differ, "
            "standardize the columns"
        )


def check_components(n_components: int, D: int) -> None:
    """ValueError unless at least one direction is left for the noise."""
    if n_components >= D:
        raise ValueError(f"n_components must be less than the number of columns D={D}; got {n_components}")


def _check_finite(x: Tensor, what: str) -> None:
    if x.is_floating_point():
        bad = sum(int((~piece.isfinite()).sum()) for piece, _ in _pieces(x, None))
        if bad:
            raise ValueError(f"X must be finite for method {what}; {bad} values are not")
        _check_squares(x)


def _check_squares(x: Tensor) -> None:
    """ValueError where a sum of squares of finite cells, NaN aside, would leave the range of float64."""
    if x.dtype == torch.float64 and x.numel():
        largest = max(float(torch.nan_to_num(piece, 0.0).abs().max()) for piece, _ in _pieces(x, None))
        if largest > math.sqrt(torch.finfo(torch.float64).max / x.numel()) / 2:
            raise ValueError(
                f"X must have squares in the range of float64; its largest value is {largest:.1e}: scale the data"
            )


def canonical(W: Tensor) -> Tensor:
    """W turned so that its columns are orthogonal, longest first, the largest entry of each positive: W W' stays."""
    _, turn = torch.linalg.eigh(W.mT @ W)
    W = W @ turn.flip(1)
    return W * torch.where(W.gather(0, W.abs().argmax(0, keepdim=True)) < 0, -1.0, 1.0)


def _log_likelihood(values: Tensor, rest: Tensor, s2: Tensor, D: int) -> float:
    """Mean log p(x) of the best W for s2, from the M largest eigenvalues and the sum of the others."""
    top = values.maximum(s2)
    log_det = torch.log(top).sum() + (D - len(top)) * torch.log(s2)
    return float(-0.5 * (D * LOG_2PI + log_det + (values / top).sum() + rest / s2))


def of_moments(moments: Moments, n_components: int, min_sigma2: float) -> Fit:
    """The closed form: s2 is the mean of the D - M smallest eigenvalues of the covariance, W = U (Lambda - s2 I)^1/2.

    Reference: Tipping & Bishop 1999, eq. 7 and 8.
    """
    assert moments.covariance is not None
    N, D = int(moments.rows), len(moments.mean)
    check_components(n_components, D)
    deviation = torch.diagonal(moments.covariance).sqrt()
    inverse = _inverse(deviation, moments.mean, N)
    scaled, turn = torch.linalg.eigh(moments.covariance * inverse * inverse[:, None])
    _check_count(N, _rank(scaled.flip(0), N, D), n_components)
    # of a factor of the covariance: columns that are far smaller than others keep their digits
    top, lengths, _ = torch.linalg.svd(deviation[:, None] * turn * scaled.clamp_min(0).sqrt())
    return _closed_form(lengths.square(), top[:, :n_components], moments.mean, N, min_sigma2)


def _inverse(deviation: Tensor, mean: Tensor, N: int) -> Tensor:
    """1 / deviation [D]; 0 of columns that are constant but for the rounding of their mean."""
    rounding = math.sqrt(N) * torch.finfo(torch.float64).eps * mean.abs()
    return torch.where(deviation > rounding, 1 / deviation, 0.0)


def _closed_form(values: Tensor, top: Tensor, mean: Tensor, N: int, min_sigma2: float) -> Fit:
    """Of the eigenvalues, falling, without those that are 0 if need be, and of the first M vectors [D, M]."""
    D, M = top.shape
    rest = values[M:].sum()
    s2 = (rest / (D - M)).clamp_min(min_sigma2)
    W = canonical(top * torch.sqrt((values[:M] - s2).clamp_min(0)))
    log_likelihood = _log_likelihood(values[:M], rest, s2, D)
    return Fit(W, mean, torch.log(s2), FitReport("eig", N, True, (log_likelihood,)))


def eig(batches: Batches, n_components: int, group: Group, min_sigma2: float) -> Fit:
    """The closed form, over batches and processes.

    With more than D rows the D by D covariance is summed over the batches; else the rows are kept, in their dtype, and
    the N by N Gram matrix gives the same eigenvalues.

    Reference: Gram matrix: Bishop 2006, sec. 12.1.4.
    """
    kept: list[Batch] = []  # rows, as long as they are at most D
    moments: Moments | None = None
    first, count = None, 0
    with group.together():
        for x, weight in batches():
            _check_finite(x, '"eig"; "em" takes NaN for missing cells')
            first = x if first is None else first
            count += len(x)
            if moments is None and count <= x.shape[1]:
                kept.append((x, weight))
                continue
            moments = moments or Moments(x.shape[1], x.device, covariance=True)
            for batch in (*kept, (x, weight)):
                moments.update(*batch)
            kept.clear()
    D, device = _features(first, group)
    check_components(n_components, D)
    total = torch.tensor(float(count), dtype=torch.float64, device=device)
    group.sum(total)
    N = int(total)
    if N > D:
        if moments is None:
            moments = Moments(D, device, covariance=True)
            for batch in kept:
                moments.update(*batch)
        moments.reduce(group)
        fit = of_moments(moments, n_components, min_sigma2)
    else:
        double = group.largest(any(rows.dtype == torch.float64 for rows, _ in kept))
        dtype = torch.float64 if double else torch.float32
        local = torch.cat([read_data(r, dtype) for r, _ in kept] or [torch.zeros(0, D, dtype=dtype, device=device)])
        weights = torch.cat([_weights(*batch) for batch in kept] or [total.new_zeros(0)])
        longest = group.largest(len(local))
        X, w = group.gather(local, longest), group.gather(weights[:, None], longest).flatten()
        values, top, mean = _small_gram(X, w, n_components)
        fit = _closed_form(values, top, mean, N, min_sigma2)
    group.same(*fit[:3])
    return fit


def _rank(values: Tensor, N: int, D: int) -> int:
    return int((values > values[0] * max(N, D) * torch.finfo(torch.float64).eps).sum()) if values[0] > 0 else 0


def _small_gram(X: Tensor, w: Tensor, n_components: int) -> tuple[Tensor, Tensor, Tensor]:
    """Eigenvalues of the covariance of X [N, D] with weights w [N], N <= D, that can be other than 0; its first M
    vectors; the mean."""
    N, D = X.shape
    size = max(1, PIECE_ELEMENTS // max(1, N))
    share = w / w.sum()
    mean = torch.cat([share @ part.double() for part in X.split(size, 1)])

    def centered() -> Iterator[Tensor]:
        for part, center in zip(X.split(size, 1), mean.split(size), strict=True):
            yield (part.double() - center) * share.sqrt()[:, None]

    gram, R = torch.zeros(2, N, N, dtype=torch.float64, device=X.device)
    for r, center in zip(centered(), mean.split(size), strict=True):
        scaled = r * _inverse(torch.linalg.vector_norm(r, dim=0), center, N)
        gram.addmm_(scaled, scaled.mT)
        R = torch.linalg.qr(torch.cat([R, r.mT]), mode="r")[1]
    _check_count(N, _rank(torch.linalg.eigvalsh(gram).flip(0), N, D) if N else 0, n_components)
    _, lengths, vectors = torch.linalg.svd(R)
    vectors = vectors.mT[:, :n_components] / lengths[:n_components]
    return lengths.square(), torch.cat([r.mT @ vectors for r in centered()]), mean


class _Sums:
    """Of complete rows r = x - b, for a basis Z [D, L] of orthonormal columns: the weighted sums of e c', c c' and
    |e|^2, where c = Z'r and e = r - Z c."""

    def __init__(self, Z: Tensor, b: Tensor) -> None:
        self.Z, self.b = Z, b
        self.cross = torch.zeros_like(Z)
        self.second = Z.new_zeros(Z.shape[1], Z.shape[1])
        self.rest = Z.new_zeros(())

    def update(self, x: Tensor, weight: Tensor | None) -> None:
        """Three passes over x [n, D], in its own dtype."""
        w = _weights(x, weight)
        coords, square = call(_op._ppca_project.default, reference.ppca_project, x, self.Z, self.b)
        rest = call(_op._ppca_rest.default, reference.ppca_rest, x, self.Z, self.b, coords, square)
        cross_alone = [False, True, False]
        residual = _op._ppca_residual.default, reference.ppca_residual
        _, cross, _ = call(*residual, x, self.Z, self.b, coords, coords, w, cross_alone)
        assert cross is not None
        self.rest += w @ rest
        self.cross += cross
        self.second += (coords if weight is None else coords * w[:, None]).mT @ coords


def _complete(
    batches: Batches, W: Tensor, b: Tensor, N: int, n_components: int, min_sigma2: float, group: Group
) -> Iterator[Step]:
    """Of the subspaces that steps reach, the best parameters.

    The M step of EM turns span W into span S W, S the covariance of the data. Given the span, the scale of W and s2 are
    maximized exactly (the closed form for the M by M covariance of the coordinates): EM changes them by a factor of
    1 - O(s2) per step. The next span is the best one within the present one, S times it, and the direction in which it
    moved last, so that steps are conjugate: log p(x) rises by more than a step of EM would make it.

    Reference: Tipping & Bishop 1999, app. B; parameter expansion: Liu, Rubin & Wu 1998; Knyazev 2001.
    """
    D, M = len(b), n_components
    while True:
        basis, _, _ = call(_op._ppca_factor.default, reference.ppca_factor, W, W.new_zeros(()))
        sums = _Sums(basis, b)
        for piece in _read(batches, group):
            sums.update(*piece)
        group.sum(sums.cross, sums.second, sums.rest)
        second = sums.second / N
        vectors = torch.linalg.eigh(second)[1].flip(1)
        # not eigh's values, whose errors are those of the largest: near the end, the rest of the span holds little
        values = (vectors * (second @ vectors)).sum(0).clamp_min(0)
        values, vectors = torch.cat([values, sums.rest.reshape(1) / N]), vectors[:, :M]
        # squares of lengths, whose rounding is that of the data
        rounding = (max(N, D) * torch.finfo(torch.float64).eps) ** 2 * (values[0] + b.square().sum())
        _check_count(N, min(int((values > rounding).sum()), N - 1), M)
        # s2 is the mean over the directions that are left; of those in the span too where they are below it
        s2 = torch.stack([values[k:].sum() / (D - k) for k in range(M + 1)])
        s2 = s2[(values[:M] > s2[1:]).sum()].clamp_min(min_sigma2)
        lengths = torch.sqrt((values[:M] - s2).clamp_min(0))
        U = sums.Z @ vectors
        yield _log_likelihood(values[:M], values[M:].sum(), s2, D), (U * lengths, b, torch.log(s2))
        W = torch.cat([U, sums.cross @ vectors, sums.Z[:, M:] @ vectors[M:]], 1)


class _MissingSums:
    """Of rows with missing cells, weighted, for every column d: the normal equations of its row of W and of b; and the
    first two moments of z."""

    def __init__(self, W: Tensor, b: Tensor, log_sigma2: Tensor) -> None:
        self.W, self.b, self.log_s2 = W, b, log_sigma2
        D, M = W.shape
        self.i, self.j, self.where = algebra.pairs(M + 1, W.device)
        self.A = W.new_zeros(D, len(self.i))  # sum over n that have d of E[(z, 1) (z, 1)']
        self.S = W.new_zeros(D, M + 1)  # sum of (x - b) (m, 1)
        self.squares = W.new_zeros(D)
        self.z = W.new_zeros(len(self.i))  # sum over n that have any cell of E[(z, 1) (z, 1)']
        self.log_prob, self.cells = (torch.zeros_like(log_sigma2) for _ in range(2))

    def update(self, x: Tensor, weight: Tensor | None) -> None:
        M = self.W.shape[1]
        size = max(16, (1 << 21) // (M * M))
        for part, w in zip(x.split(size), _weights(x, weight).split(size), strict=True):
            observed = ~part.isnan()
            found = missing.rows(part, self.W, self.b, self.log_s2, observed)
            z = torch.cat([found.mean, found.mean.new_ones(len(part), 1)], 1)
            second = z.unsqueeze(2) * z.unsqueeze(1)
            second[:, :M, :M] += torch.exp(self.log_s2) * found.inverse
            second = second[:, self.i, self.j]
            cells = observed * w[:, None]
            self.A += cells.mT @ second
            self.z += (observed.any(1) * w) @ second
            self.S += found.centered.mT @ (z * w[:, None])
            self.squares += w @ found.centered.square()
            self.log_prob += w @ found.log_prob
            self.cells += cells.sum()

    def step(self, group: Group) -> tuple[Tensor, Tensor, Tensor]:
        """The next W, b and log s2: the M step for z ~ N(mu, K), of which the same model with N(0, I) is returned."""
        group.sum(self.A, self.S, self.squares, self.z, self.log_prob, self.cells)
        solution = torch.linalg.solve(self.A[:, self.where], self.S)
        W, shift = solution[:, :-1], solution[:, -1]
        moments = self.z[self.where] / self.z[-1]
        mu = moments[:-1, -1]
        K = torch.linalg.cholesky_ex(moments[:-1, :-1] - torch.outer(mu, mu))[0]
        log_s2 = torch.log((self.squares - (solution * self.S).sum(1)).sum() / self.cells)
        return W @ K, self.b + shift + W @ mu, log_s2


def _incomplete(
    batches: Batches,
    W: Tensor,
    b: Tensor,
    log_sigma2: Tensor,
    N: int,
    min_sigma2: float,
    floor: Tensor,
    group: Group,
) -> Iterator[Step]:
    """Two steps of parameter-expanded EM, and an extrapolation of them wherever log p(x) does not fall by it.

    Reference: missing cells: Ilin & Raiko 2010, sec. 3; extrapolation: Varadhan & Roland 2008 (S3); Liu, Rubin & Wu
    1998.
    """

    least = math.log(min_sigma2) if min_sigma2 > 0 else -math.inf

    def step(parameters: Parameters) -> tuple[float, Parameters]:
        sums = _MissingSums(*parameters)
        for piece in _read(batches, group):
            sums.update(*piece)
        W, b, log_s2 = sums.step(group)
        return float(sums.log_prob) / N, (W, b, log_s2.clamp_min(least))

    def change(new: Parameters, old: Parameters) -> Parameters:
        return new[0] - old[0], new[1] - old[1], new[2] - old[2]

    def length(p: Parameters, log_s2: Tensor) -> float:
        # in the units of the likelihood: what moves x by less than sigma counts little, whatever the size of W
        moved = (p[0].square().sum() + p[1].square().sum()) * torch.exp(-log_s2)
        return math.sqrt(float(moved + 0.5 * len(b) * p[2].square()))

    first: Parameters = (W, b, log_sigma2.clamp_min(least))
    before, second = step(first)
    yield before, first
    while True:
        if not min(first[2], second[2]) > floor:  # NaN too
            _check_count(N, W.shape[1], W.shape[1])
        middle, third = step(second)
        r = change(second, first)
        v = change(change(third, second), r)
        far = max(length(r, third[2]) / max(length(v, third[2]), 1e-300), 1.0)
        trial = tuple(p + 2 * far * dp + far**2 * ddp for p, dp, ddp in zip(first, r, v, strict=True))
        first = (trial[0], trial[1], trial[2].clamp_min(least))
        value, second = step(first)
        if not value >= middle:
            first = third
            value, second = step(third)
        yield value, first


def _column_means(batches: Batches, group: Group) -> tuple[Tensor, Tensor, int, float, bool]:
    """Of observed cells: mean [D], mean variance; rows, their mean weight; and whether cells are missing."""
    first, missing = None, False
    moments: Moments | None = None
    total = [0.0, 0.0]  # rows, and their weight
    with group.together():
        for x, weight in batches():
            first = x if first is None else first
            total = [total[0] + len(x), total[1] + (len(x) if weight is None else float(weight.sum()))]
            moments = moments or Moments(x.shape[1], x.device)
            if x.is_floating_point():
                for piece, _ in _pieces(x, None):
                    missing |= bool(piece.isnan().any())
                    if piece.isinf().any():
                        raise ValueError('X must be finite or NaN (a missing cell) for method "em"; it holds infinity')
                _check_squares(x)
            if not missing:
                moments.update(x, weight)
    D, device = _features(first, group)
    moments = moments or Moments(D, device)
    rows, weights = torch.tensor(total, dtype=torch.float64, device=device)
    group.sum(rows, weights)
    N, mean_weight = int(rows), float(weights / rows) if rows else 1.0
    if not group.largest(missing):
        moments.reduce(group)
        return moments.mean, moments.square / D, N, mean_weight, False
    # a second pass, by column; sums about the first row's values, where there are any
    seen, mean, square = (torch.zeros(D, dtype=torch.float64, device=device) for _ in range(3))
    for piece, weight in _read(_relative(batches, mean_weight), group):
        cells = ~piece.isnan() * _weights(piece, weight)[:, None]
        n = cells.sum(0)
        r = torch.nan_to_num(read_data(piece, torch.float64))
        local = (r * (cells / torch.where(n > 0, n, 1.0))).sum(0)
        square += ((r - local).square() * cells).sum(0)
        total_n = seen + n
        delta, share = local - mean, n / torch.where(total_n > 0, total_n, 1.0)
        square += delta.square() * seen * share
        mean += delta * share
        seen = total_n
    sums, ours = seen * mean, seen.clone()
    group.sum(seen, sums)
    if (never := torch.nonzero(seen == 0).flatten().tolist()) != []:
        raise ValueError(f"X must have an observed cell in every column; none in {', '.join(map(str, never))}")
    center = sums / seen
    square += ours * (mean - center).square()
    group.sum(square)
    return center, square.sum() / seen.sum(), N, mean_weight, True


def _settled(history: list[float], tol: float) -> bool:
    """Whether less than tol is left to gain, if the gains go on falling no slower than in the last three steps."""
    gains = [b - a for a, b in pairwise(history[-4:])]
    if len(gains) < 3:
        return False
    if gains[2] <= 1e-14 * abs(history[-1]):  # rounding errors
        return True
    ratio = max(gains[1] / gains[0], gains[2] / gains[1])
    return ratio < 1 and gains[2] * ratio / (1 - ratio) < tol


def em(
    batches: Batches,
    n_components: int,
    group: Group,
    *,
    max_iter: int,
    tol: float,
    min_sigma2: float,
    generator: torch.Generator | None,
) -> Fit:
    """Expectation maximization, accelerated, O(N D M) per step; with missing cells O(N D M^2).

    It ends when less than `tol` nats per row seem left to gain. log p(x) never falls from one step to the next but by
    rounding; should it, the step before is the result, and the report says that it did not converge.
    """
    b, variance, N, mean_weight, missing = _column_means(batches, group)
    batches = _relative(batches, mean_weight)
    D = len(b)
    check_components(n_components, D)
    rank = n_components + 1 if float(variance) > 0 else 0  # no more is known before the fit
    _check_count(N, rank, n_components)
    columns = n_components if missing else min(3 * n_components, D)
    device = "cpu" if generator is None else generator.device  # not torch's default device
    W = torch.randn(D, columns, dtype=torch.float64, device=device, generator=generator)
    W = W.to(b.device) * torch.sqrt(variance / (2 * n_components))
    group.same(W, b, variance)
    if missing:
        floor = torch.log(variance) + math.log(D * torch.finfo(torch.float64).eps)
        steps = _incomplete(batches, W, b, torch.log(variance / 2), N, min_sigma2, floor, group)
    else:
        steps = _complete(batches, W, b, N, n_components, min_sigma2, group)
    history: list[float] = []
    converged = False
    for value, found in progress(islice(steps, max_iter + 1), "EM", "step", max_iter + 1):
        # the exponent of log p(x) is known as well as squares of the data are in units of s2
        rounding = torch.finfo(torch.float64).eps * D * (abs(value) + D * float(variance / torch.exp(found[2])))
        if history and not value >= history[-1] - rounding:
            break
        history.append(value)
        best = found
        if converged := _settled(history, tol):
            break
    fit = Fit(canonical(best[0]), *best[1:], FitReport("em", N, converged, tuple(history)))
    group.same(*fit[:3])
    return fit
