"""Data as a caller gives them, as tensors: one array, or the batches of one process or of several."""

import math
import warnings
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from fastelbo._internal.process_groups import Processes
from fastelbo.ppca.choice import Components
from fastelbo.ppca.result import check_components
from fastelbo.ppca.sparse import Rows

Batch = tuple[Tensor, Tensor]  # rows [n, D] in a dtype of their own, and their weights [n]: float64, positive
AnyBatch = tuple[Tensor | Rows, Tensor]  # the same, dense or sparse
PIECE_ELEMENTS = 1 << 24  # of the data, converted to float64 at a time

# ----------------------------------------------------------------------------------------------------------------------
# One array.


def _is_array(X: Any) -> bool:
    return hasattr(X, "__array__") or hasattr(X, "toarray")


def _kind(X: Any) -> str:
    return f"{type(X).__name__} of {X.dtype}" if hasattr(X, "dtype") else type(X).__name__


def _from_numpy(X: Any) -> Tensor:
    """A tensor of anything that numpy makes an array of, also of what torch refuses: a table, negative strides, a byte
    order that is not the machine's. The masked cells of a masked array become NaN."""
    import numpy as np  # which torch does without

    if np.ma.is_masked(X):
        if X.dtype.kind in "bu":
            X = X / np.float32(255 if X.dtype == np.uint8 else 1)
        if X.dtype.kind != "f":  # their fill value would be read
            raise TypeError(f"a masked array must be floating, uint8 or bool; got {X.dtype}")
        X = X.filled(np.nan)
    a = np.asarray(X)
    usable = a.dtype.isnative and all(stride >= 0 for stride in a.strides)
    with warnings.catch_warnings():
        # such as of a file opened by numpy.memmap, which is not to be copied: nothing here writes to X
        warnings.filterwarnings("ignore", "The given NumPy array is not writable")
        return torch.as_tensor(a if usable else a.astype(a.dtype.newbyteorder("="), order="C"), device="cpu")


def _numbers(X: Any, name: str, shape: str) -> Tensor:
    if hasattr(X, "toarray") or (isinstance(X, Tensor) and X.layout is not torch.strided):
        raise TypeError(f"{name} must be dense; got a sparse {_kind(X)}: give {name}.toarray() or {name}.to_dense()")
    try:
        return X if isinstance(X, Tensor) else _from_numpy(X) if _is_array(X) else torch.as_tensor(X, device="cpu")
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(f"{name} must be a tensor or an array of numbers {shape}; got {_kind(X)}") from error


def matrix(X: Any, name: str, shape: str = "[N, D]") -> Tensor:
    """A tensor or an array as a matrix of a dtype that the model reads; without a copy, where that can be."""
    x = _numbers(X, name, shape)
    if not x.is_floating_point() and x.dtype not in (torch.uint8, torch.bool):
        raise TypeError(f"{name} must be floating, uint8 (read as x / 255) or bool; got {x.dtype}")
    if x.dim() != 2:
        raise ValueError(f"{name} must be {shape}; got {tuple(x.shape)}")
    return x


def weighted(X: object, sample_weight: object, name: str = "X") -> AnyBatch:
    """The rows of X [N, D], dense or sparse, whose weight is not 0, and their weights; None is 1 each."""
    rows = Rows.of(X)
    read = matrix(X if rows is None else rows.values.new_zeros(0, rows.shape[1]), name)
    x = read.detach() if rows is None else rows
    w = weights_of(sample_weight, len(x), x.device)
    if w is None:
        return x, torch.ones((), dtype=torch.float64, device=x.device).expand(len(x))
    return (x, w) if bool(w.all()) else (x[w > 0], w[w > 0])


def weights_of(sample_weight: object, N: int, device: torch.device) -> Tensor | None:
    """[N], float64; None: all the same."""
    if sample_weight is None:
        return None
    w = _numbers(sample_weight, "sample_weight", "[N]")
    if w.shape != (N,):
        raise ValueError(f"sample_weight must be [N] with N={N} from X; got {tuple(w.shape)}")
    w = w.detach().to(device, torch.float64)
    if not bool((w.isfinite() & (w >= 0)).all()):
        raise ValueError("sample_weight must be finite and at least 0")
    if not bool(w.any()):
        raise ValueError(f"sample_weight must have a weight that is not zero; all {len(w)} are")
    return w


def dense(batches: Iterable[AnyBatch]) -> Iterator[Batch]:
    """The same rows, dense."""
    for x, weight in batches:
        if isinstance(x, Tensor):
            yield x, weight
        else:
            yield from ((tile, weight[a:b]) for a, b, tile in x.tiles())


def pieces(x: Tensor | Rows, weight: Tensor) -> Iterator[AnyBatch]:
    """A batch in pieces of rows that are small in float64; none of no rows."""
    if isinstance(x, Rows):
        yield from ((piece, weight[a:b]) for a, b, piece in x.pieces())
        return
    size = max(1, PIECE_ELEMENTS // max(1, x.shape[1]))
    for start in range(0, len(x), size):
        yield x[start : start + size], weight[start : start + size]


# ----------------------------------------------------------------------------------------------------------------------
# What a model is fitted to.


def batches_of(X: Any) -> Any:
    """X; of a `fastelbo.data.Dataset` its rows [n, D] in batches."""
    if not (isinstance(X, torch.utils.data.Dataset) and hasattr(X, "batches")):
        return X
    dataset: Any = X
    if not dataset.dtype.is_floating_point and (dataset.annotated or dataset.dtype not in (torch.uint8, torch.bool)):
        dataset = dataset.astype(torch.float32)  # counts, read as they are

    class Batches:
        def __iter__(self) -> Iterator[Tensor]:
            size = max(1, PIECE_ELEMENTS // max(1, math.prod(dataset.shape[1:])))
            return (batch.flatten(1) for batch in dataset.batches(size))

    return Batches()


def rows_of(X: Any, sample_weight: object) -> Iterable[Batch]:
    """The rows of one array or sparse matrix X [N, D] whose weight is not 0, with their weights, dense, in pieces."""
    return dense(pieces(*weighted(X, sample_weight)))


def _batches(X: Any, anew: str, sample_weight: Any) -> Callable[[], Iterable[AnyBatch]]:
    """X, an array or an iterable of batches, as a function that starts a new pass over the data; anew: what asks for
    several, or nothing."""
    X = batches_of(X)
    if _is_array(X):
        rows = weighted(X, sample_weight)
        return lambda: [rows]
    if sample_weight is not None:
        raise TypeError(f"sample_weight must be None unless X is one array; X is {type(X).__name__}")
    if not isinstance(X, Iterable) or isinstance(X, str | bytes):
        raise TypeError(f"X must be a tensor, an array, or an iterable of batches; got {type(X).__name__}")
    if anew and iter(X) is X:
        raise TypeError(
            f"X must be an iterable that starts anew each time for {anew}, such as a DataLoader; "
            f"got the iterator {type(X).__name__}, which can be read only once"
        )

    def batches() -> Iterator[AnyBatch]:
        for batch in X:
            # a DataLoader of a TensorDataset gives lists: data, and labels
            batch = batch[0] if isinstance(batch, tuple | list) else batch
            if (rows := Rows.of(batch)) is None and (batch := _numbers(batch, "a batch of X", "[n, D]")).dim() < 2:
                raise ValueError(
                    f"X must be one array, or an iterable of batches [n, D]; got {type(X).__name__} of single rows: "
                    "give numpy.asarray(X), or torch.stack(X) of tensors"
                )
            yield weighted(batch if rows is None else rows, None, "a batch of X")

    return batches


def _has_missing(x: Tensor, method: str, cells: int) -> bool:
    """Whether cells of x, a piece of a batch that has so many, are NaN.

    Raises:
        ValueError: a value that the method does not take, or squares whose sum leaves the range of float64.
    """
    if not x.is_floating_point() or x.numel() == 0:
        return False
    largest = max(-float(x.amin()), float(x.amax()))  # one pass each, without a tensor of absolute values
    missing = math.isnan(largest)
    if missing:
        largest = float(x.nan_to_num(0.0, math.inf, -math.inf).abs().max())
    if largest == math.inf or (missing and method == "eig"):
        expected, got = "" if method == "eig" else " or NaN", "infinity" if largest == math.inf else "NaN"
        raise ValueError(
            f'X must be finite{expected} for method "{method}"; "em" takes NaN for missing cells; got {got}'
        )
    if largest > math.sqrt(torch.finfo(torch.float64).max / cells) / 2:
        raise ValueError(f"X must have squares in the range of float64; its largest is {largest:.1e}: scale the data")
    return missing


class Dataset:
    """The rows that a model is fitted to: batches, read as often as a method needs, of one process or of several.

    Attributes, of all processes together, once the first pass has ended:
        D, N: columns and rows.
        missing: whether cells are.
        dtype: of the parameters.
        device: of this process's rows.
    """

    def __init__(
        self,
        X: object,
        sample_weight: object,
        method: str,
        n_components: Components,
        processes: Processes,
        solver: str = "auto",
    ) -> None:
        self.method, self.n_components, self.processes = method, n_components, processes
        anew = 'method "em"' if method == "em" else 'solver "krylov"' if solver == "krylov" else ""
        with processes.together():
            self._batches = _batches(X, anew, sample_weight)
        # what is known before the first pass: whether there may be another one, and of how many rows
        shape = getattr(X, "shape", None)
        self.again = shape is not None or not isinstance(X, Iterator)
        self.is_array = _is_array(X) and processes.group is None
        self.rows = math.inf if shape is None or processes.group is not None else int(shape[0])
        processes.agree("n_components", n_components)

    def first_pass(self) -> Iterator[AnyBatch]:
        """The rows in pieces that are small in float64, checked.

        Raises:
            ValueError, in every process: rows that the method does not take; fewer than 2; processes that differ in
                columns; as many components as columns.
        """
        D, N, total, missing, double = None, 0, 0.0, False, False
        self.device = self.processes.device
        with self.processes.together():
            for x, weight in self._batches():
                D = D or x.shape[1]
                if x.shape[1] != D:
                    raise ValueError(f"every batch of X must be [n, {D}], as the first one; got {tuple(x.shape)}")
                N, total, double = N + len(x), total + float(weight.sum()), double or x.dtype == torch.float64
                self.device = x.device
                for piece, w in pieces(x, weight):
                    cells = piece if isinstance(piece, Tensor) else piece.values
                    missing |= _has_missing(cells, self.method, math.prod(x.shape))
                    yield piece, w
        self.D = self.processes.agree("the number of columns of X", D) or 0
        rows, totals, gaps, doubles = zip(*self.processes.gather((N, total, missing, double)), strict=True)
        self.N = sum(rows)
        if self.N < 2:
            raise ValueError(f"X must hold at least 2 rows; got {self.N or 'none'}")
        check_components(self.n_components, self.D)
        self._mean_weight = sum(totals) / self.N
        self.missing, self.dtype = any(gaps), torch.float64 if any(doubles) else torch.float32

    def pieces(self) -> Iterator[AnyBatch]:
        """Another pass, also in pieces; the mean of all weights is 1."""
        with self.processes.together():
            for x, weight in self._batches():
                yield from pieces(x, weight / self._mean_weight)
