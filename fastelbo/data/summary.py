"""What one pass over the data finds: their range, their domain, their scale, and a hash to know them again."""

import hashlib
import warnings
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from fastelbo import likelihoods
from fastelbo.data.rows import Index, Piece, Rows, Values
from fastelbo.likelihoods import Domain
from fastelbo.reference import COUNTS

FLOAT32 = torch.finfo(torch.float32).max
LOOKED_AT = 1000  # rows whose sums tell log-normalized counts
EQUAL_SUMS = 1e-2  # relative: what rounding to half precision leaves


def dtype_of(stored: np.dtype[Any]) -> torch.dtype:
    """float32 for floats, uint8 and bool as they are, and the smallest of the types of counts that holds other
    integers; uint64 is in int64, where its largest numbers are negative."""
    if stored.kind == "f":
        return torch.float32
    if stored.itemsize == 1 and stored.kind in "bu":
        return torch.bool if stored.kind == "b" else torch.uint8
    return next((t for t in COUNTS if np.can_cast(stored, numpy_type(t))), torch.int64)


def numpy_type(dtype: torch.dtype) -> np.dtype[Any]:
    return torch.empty(0, dtype=dtype).numpy().dtype


class Summary(NamedTuple):
    """Of data [N, *event], or of two parts of them."""

    shape: tuple[int, ...]  # [N, *event]
    dtype: str  # as stored
    low: float  # the lowest of the finite values
    high: float  # the highest
    missing: int  # cells that are NaN
    infinite: int  # cells that are
    whole: bool  # every finite value is a whole number
    binary: bool  # every finite value is 0 or 1
    log_normalized: bool  # log(1 + x) of counts that were scaled to the same sum for every row
    annotated: bool  # from an .h5ad file
    content: str  # a hash of the values as a model sees them
    cells: Tensor  # [*event]: how many are there, in the rows that the scale is of
    mean: Tensor  # [*event]: of those
    std: Tensor  # [*event]: of those

    @property
    def domain(self) -> Domain:
        """bool and {0, 1} are binary data; non-negative integers are counts, but uint8 is an image, x / 255; in an
        .h5ad file whole numbers are counts whatever their type."""
        if self.binary or (self.dtype == "uint8" and not self.annotated):
            return "[0, 1]"
        if self.whole and self.low >= 0 and (self.annotated or self.dtype[:3] in ("int", "uin")):
            return "counts"
        return "[0, 1]" if self.low >= 0 and self.high <= 1 else "reals"

    @property
    def image(self) -> bool:
        """Whether they are bytes that are read as x / 255."""
        return self.dtype == "uint8" and not self.binary and not self.annotated

    def dtype_for(self, domain: Domain) -> torch.dtype:
        """The type of the batches for a likelihood of that domain."""
        kind = np.dtype(self.dtype)
        if kind.kind == "f":
            return dtype_of(kind)
        if self.binary and domain != "counts":
            return torch.bool
        if self.dtype == "uint8" and (self.image or domain == "counts"):
            return torch.uint8
        if domain != "counts":
            return torch.float32
        return torch.uint8 if kind.kind == "b" else dtype_of(kind)

    def scale(self) -> tuple[Tensor, Tensor]:
        """Shift and scale that standardize x, float64, 0-d or [*event].

        Columns of a matrix have their own, since they may be in any units; pixels of an image, and what lies in [0, 1],
        share one. A column that does not vary keeps its scale.
        """
        shift, std = self.mean, self.std
        if len(self.shape) > 2 or self.image or (self.low >= 0 and self.high <= 1):
            weight = self.cells / self.cells.sum().clamp_min(1)
            shift = (weight * self.mean).sum()
            std = (weight * (self.std.square() + (self.mean - shift).square())).sum().sqrt()
        if self.image:
            shift, std = shift / 255, std / 255
        least = (1e-7 * shift.abs()).clamp_min(torch.finfo(torch.float32).tiny)  # float32 holds no smaller one
        return shift, torch.where(std > least, std, 1.0)


def _tensor(x: Values) -> Tensor:
    with warnings.catch_warnings(action="ignore"):  # nothing here writes to a map
        return torch.from_numpy(x)


class _Moments:
    """Count, mean and sum of squares about the mean of every column, without cancellation (Chan et al. 1983)."""

    def __init__(self, event: tuple[int, ...]) -> None:
        self.count = np.zeros(event)
        self.mean, self.spread = np.zeros(event), np.zeros(event)

    def add(self, count: Any, mean: Any, spread: Any) -> None:
        total = self.count + count
        share = np.divide(count, total, out=np.zeros_like(self.mean), where=total > 0)
        step = mean - self.mean
        self.spread += spread + step * step * self.count * share
        self.mean += step * share
        self.count = total

    def add_dense(self, x: Values, whole: bool) -> None:
        t = _tensor(x).double()
        if whole:
            spread, mean = torch.var_mean(t, 0, correction=0)
            self.add(float(len(t)), mean.numpy(), (spread * len(t)).numpy())
            return
        there = t.isfinite()
        count = there.sum(0)
        mean = torch.where(there, t, 0.0).sum(0) / count.clamp_min(1)
        self.add(count.double().numpy(), mean.numpy(), torch.where(there, t - mean, 0.0).square().sum(0).numpy())

    def add_sparse(self, values: Values, columns: Values, rows: int) -> None:
        there, size = np.isfinite(values), len(self.mean)
        v = np.where(there, values, 0.0).astype(np.float64)
        count = rows - np.bincount(columns[~there], minlength=size)
        total, squares = (np.bincount(columns, w, size) for w in (v, v * v))
        mean = total / np.maximum(count, 1)
        self.add(count, mean, np.maximum(squares - mean * total, 0.0))


class Pass:
    """The summary of rows, piece by piece."""

    def __init__(self, rows: Rows, scaled: Values) -> None:
        """scaled: [N], bool: the rows that the scale is of."""
        self.shape, self.dtype, self.scaled = rows.shape, rows.dtype, scaled
        self.low, self.high = np.inf, -np.inf
        self.missing = self.infinite = self.zeros = self.first = 0
        self.whole = self.binary = True
        self.hashes = [hashlib.sha256() for _ in range(3)]
        self.sums: list[float] = []  # of exp(x) - 1 of the first rows
        self.moments = _Moments(self.shape[1:])

    def add(self, piece: Piece) -> None:
        x = piece.values
        if self.dtype == np.bool_:  # a byte of a bool is 0 or 1; in a file it may be any
            x = (x.view(np.uint8) != 0).view(np.uint8)
        types: Any = numpy_type(dtype_of(self.dtype)), np.int32, np.int64  # the values as a model sees them
        for hashed, array, kind in zip(self.hashes, (x, piece.columns, piece.counts), types, strict=True):
            if array is not None:
                hashed.update(np.ascontiguousarray(array, kind).view(np.uint8).data)
        x = x.astype(self._taken(), copy=False)
        if piece.columns is not None and len(x) < piece.rows * self.shape[1]:
            self.low, self.high = min(self.low, 0.0), max(self.high, 0.0)
            self.zeros += piece.rows * self.shape[1] - len(x)
        there = self._range(x)
        self.zeros += int(x.size - np.count_nonzero(x))
        if len(self.sums) < LOOKED_AT and self.low >= 0 and x.dtype.kind == "f":
            self._sum(x, piece)
        scaled = self.scaled[self.first : self.first + piece.rows]
        self.first += piece.rows
        if not scaled.any():
            return
        if piece.columns is None:
            self.moments.add_dense(x if scaled.all() else x[scaled], there)
        else:
            assert piece.counts is not None
            chosen = np.repeat(scaled, piece.counts)
            self.moments.add_sparse(x[chosen], piece.columns[chosen], int(scaled.sum()))

    def _taken(self) -> Any:
        """The type that torch computes with."""
        if self.dtype.kind == "f":
            return np.float64 if self.dtype.itemsize > 4 else np.float32
        if self.dtype.kind == "b":
            return np.uint8
        if self.dtype.itemsize == 1:
            return self.dtype
        return np.float64 if self.dtype.kind == "u" and self.dtype.itemsize == 8 else np.int64

    def _range(self, x: Values) -> bool:
        """Whether all values are finite."""
        if x.size == 0:
            return True
        low, high = (float(t) for t in torch.aminmax(_tensor(x)))
        there = bool(np.isfinite(low) and np.isfinite(high))
        if not there:
            found = np.isfinite(x)
            missing = int(np.isnan(x).sum())
            self.missing += missing
            self.infinite += int(x.size - found.sum()) - missing
            if not found.any():
                return False
            low, high = float(np.min(x, where=found, initial=np.inf)), float(np.max(x, where=found, initial=-np.inf))
        self.low, self.high = min(self.low, low), max(self.high, high)
        if self.whole and x.dtype.kind == "f":
            self.whole = not bool(np.any((x != np.floor(x)) & np.isfinite(x)))
        self.binary &= self.whole and self.low >= 0 and self.high <= 1
        return there

    def _sum(self, x: Values, piece: Piece) -> None:
        terms = np.expm1(x, dtype=np.float64)
        if piece.counts is None:
            sums = terms.reshape(len(x), -1).sum(1)
        else:
            sums = np.bincount(np.repeat(np.arange(piece.rows), piece.counts), terms, piece.rows)
        self.sums += sums[: LOOKED_AT - len(self.sums)].tolist()

    def result(self, annotated: bool) -> Summary:
        sums = np.array([value for value in self.sums if value > 0])
        equal = len(sums) > 1 and bool(np.isfinite(sums).all()) and np.ptp(sums) < EQUAL_SUMS * sums.mean()
        cells = float(np.prod(self.shape))
        moments = self.moments
        return Summary(
            self.shape,
            self.dtype.newbyteorder("=").name,
            float(self.low),
            float(self.high),
            self.missing,
            self.infinite,
            self.whole,
            self.binary,
            bool(equal and not self.whole and self.low >= 0 and 2 * self.zeros > cells),
            annotated,
            hashlib.sha256(b"".join(hashed.digest() for hashed in self.hashes)).hexdigest(),
            torch.from_numpy(moments.count),
            torch.from_numpy(moments.mean),
            torch.from_numpy(np.sqrt(moments.spread / np.maximum(moments.count, 1))),
        )


def summarize(rows: Rows, annotated: bool = False, scaled: Index | None = None) -> Summary:
    """One pass over the rows; scaled: the numbers of those that the mean and the deviation are of, all if None."""
    chosen = np.ones(rows.shape[0], bool)
    if scaled is not None:
        chosen[:] = False
        chosen[scaled] = True
    found = Pass(rows, chosen)
    with np.errstate(over="ignore", invalid="ignore"):  # what leaves the range of float32 is refused by its range
        for piece in rows.pieces():
            found.add(piece)
    return found.result(annotated)


def joined(first: Summary, second: Summary) -> Summary:
    """Of two parts: the scale is that of the first."""
    return first._replace(
        shape=(first.shape[0] + second.shape[0], *first.shape[1:]),
        dtype=np.result_type(first.dtype, second.dtype).name,
        low=min(first.low, second.low),
        high=max(first.high, second.high),
        missing=first.missing + second.missing,
        infinite=first.infinite + second.infinite,
        whole=first.whole and second.whole,
        binary=first.binary and second.binary,
        content=hashlib.sha256((first.content + second.content).encode()).hexdigest(),
    )


def objection(found: Summary, likelihood: str, fractions: bool = False) -> str | None:
    """What is wrong with the data under a likelihood; None where nothing is.

    fractions: whether counts may be fractional.
    """
    if found.infinite:
        cells = float(np.prod(found.shape))
        return (
            f"data must be finite, or NaN where they are missing; {found.infinite} of {cells:.0f} values are infinite"
        )
    if found.missing == np.prod(found.shape):
        return "data must have a value that is not missing; all are NaN"
    row = likelihoods.get(likelihood)
    if row.domain == "counts" and not found.whole and not fractions:
        return (
            f"data must be counts, whole numbers, for likelihood {likelihood!r}; they are fractions "
            "(--layer takes the counts of an .h5ad file, likelihood 'gaussian' any data; --fractions takes these)"
        )
    if row.domain == "counts" and found.high > 2**53:
        return f"data must be counts of at most 2**53, beyond which float64 skips some; the largest is {found.high:.4g}"
    if max(-found.low, found.high) > FLOAT32:
        return f"data must be in the range of float32; they go from {found.low:.4g} to {found.high:.4g}: scale them"
    if 0 < max(-found.low, found.high) < torch.finfo(torch.float32).tiny:
        return f"data must be in the range of float32; the largest is {max(-found.low, found.high):.4g}: scale them"
    low, high = (0.0, 1.0) if found.image and row.domain != "counts" else (found.low, found.high)
    return likelihoods.objection("data", low, high, likelihood)
