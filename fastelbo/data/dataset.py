"""Rows as tensors: one by one, in batches, or shuffled."""

import math
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from itertools import chain, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Generator, Tensor

from fastelbo._internal.arguments import count
from fastelbo._internal.reading import reading
from fastelbo.data.annotated import annotated
from fastelbo.data.files import Part, check_array, dense, plain
from fastelbo.data.rows import Index, Rows, Sparse
from fastelbo.data.summary import Summary, dtype_of, numpy_type, summarize

FILES = (".npy", ".npz", ".h5ad")
WINDOW = 1 << 27  # bytes of the rows that are shuffled together where they are read by blocks


class Dataset(torch.utils.data.Dataset[Tensor]):
    """Data [N, *event] in memory or in a file, read when they are asked for; a batch is made dense, never the file.

    `dataset[i]` is a datum, `dataset[a:b]` and `dataset[index]` are rows [n, *event]; `torch.utils.data.DataLoader` and
    `fastelbo.PPCA.fit` take it, and `batches` is a loader without processes.

    Args:
        source: a tensor or an array [N, *event] of floats, integers or bool, or a matrix of scipy.sparse.
        dtype: of the batches; by default float32 for floats, uint8 and bool as they are, and the smallest of int16,
            int32 and int64 that holds the type of other integers.

    Attributes:
        dtype: of the batches.
        labels: a numpy array [N] of those that are stored beside the data, or None.
        annotated: whether they are from an .h5ad file, where whole numbers are counts whatever their type.

    Raises:
        ValueError, TypeError: no [N, *event] of numbers.
    """

    def __init__(self, source: Any, dtype: torch.dtype | None = None) -> None:
        if not isinstance(source, Part):
            if isinstance(source, Tensor):
                source = source.detach().cpu()
                source = (source.float() if source.dtype == torch.bfloat16 else source).numpy()
            matrix = source.tocsr() if hasattr(source, "tocsr") else None
            array = np.asarray(source) if matrix is None else matrix
            check_array(array.dtype, array.shape, Path("source"))
            if matrix is None:
                source = Part(dense(array))
            else:
                source = Part(Sparse(matrix.data, matrix.indices, matrix.indptr, array.shape[1], resident=True))
        self._rows: Rows = source.rows
        self._numbers: Index | None = None  # of the rows that are taken; all if None
        self.annotated = source.annotated
        self._place: tuple[str, str | None, int] | None = None  # path, layer and part, to be opened again
        self.labels = source.labels
        self.dtype = dtype or dtype_of(self._rows.dtype)

    def __len__(self) -> int:
        return self._rows.shape[0] if self._numbers is None else len(self._numbers)

    @property
    def shape(self) -> tuple[int, ...]:
        """[N, *event]."""
        return (len(self), *self._rows.shape[1:])

    @property
    def block(self) -> int:
        """Consecutive rows that are read together where the data are shuffled; 1 where each row is read by itself."""
        return min(self._rows.block, self._window())

    @property
    def resident(self) -> bool:
        """Whether the data are in memory."""
        return self._rows.resident

    def __getitem__(self, index: int | slice | Sequence[int] | Tensor | Index) -> Tensor:
        if isinstance(index, slice):
            start, stop, step = index.indices(len(self))
            if step != 1 or self._numbers is not None:
                return self._read(np.arange(start, stop, step))
            return self._read(slice(start, max(start, stop)))
        at = np.asarray(index)
        at = np.flatnonzero(at) if at.dtype == np.bool_ else at.astype(np.int64)
        n = len(self)
        if at.size and not -n <= at.min() <= at.max() < n:
            raise IndexError(f"index must be of {n} rows; got {index}")
        found = self._read(np.where(at < 0, at + n, at).reshape(-1))
        return found if at.ndim else found[0]

    def __getitems__(self, index: Sequence[int]) -> list[Tensor]:
        """What a DataLoader asks for: the rows of a batch, read at once."""
        return list(self._read(np.asarray(index, np.int64)))

    def _read(self, index: Index | slice) -> Tensor:
        with self._reading():
            return self._tensor(self._rows.read(index if self._numbers is None else self._numbers[index]))

    def _reading(self) -> AbstractContextManager[None]:
        """What a damaged file raises, with its name."""
        return nullcontext() if self._place is None else reading(Path(self._place[0]), "file of data")

    def _ask(self, index: Index) -> None:
        self._rows.ask(index if self._numbers is None else self._numbers[index])

    def _tensor(self, array: NDArray[Any]) -> Tensor:
        if array.dtype == np.bool_:  # a byte of a bool is 0 or 1; in a file it may be any
            array = array.view(np.uint8) != 0
        if self.dtype == torch.bool:
            array = array != 0
        native = np.ascontiguousarray(array, numpy_type(self.dtype))
        own = native.flags.owndata and native.flags.writeable  # nobody else's memory
        return torch.from_numpy(native if own else native.copy())

    def subset(self, index: Tensor | Index) -> "Dataset":
        """Some of the rows, in the order of their numbers in `index` [n]; nothing is read."""
        at = np.asarray(index, np.int64)
        numbers = at if self._numbers is None else self._numbers[at]
        return self._with(_numbers=numbers, labels=None if self.labels is None else self.labels[at])

    def astype(self, dtype: torch.dtype) -> "Dataset":
        """The same rows with batches of another type."""
        return self._with(dtype=dtype)

    def _with(self, **changes: Any) -> "Dataset":
        found = object.__new__(Dataset)
        vars(found).update(vars(self), **changes)
        return found

    def order(self, generator: Generator | None = None) -> Tensor:
        """The rows [N] in a random order, all orders alike; where block > 1, blocks of neighbours come in random order,
        and the rows are shuffled within as many blocks as fit in 128 MiB.

        generator: on the CPU; torch's default one if None.
        """
        n, block = len(self), self.block
        if block == 1:
            return torch.randperm(n, generator=generator)
        number = torch.arange(n) if self._numbers is None else torch.from_numpy(self._numbers)
        blocks = torch.randperm(self._rows.shape[0] // block + 1, generator=generator)[number // block]
        windows = blocks.argsort(stable=True).split(self._window())
        return torch.cat([window[torch.randperm(len(window), generator=generator)] for window in windows])

    def _window(self) -> int:
        """Rows that are shuffled together where they are read by blocks."""
        row = math.prod(self.shape[1:]) * max(self._rows.dtype.itemsize, self.dtype.itemsize)
        return max(1, WINDOW // max(1, row))

    def batches(self, size: int, order: Tensor | None = None) -> "Batches":
        """Batches [n, *event] of at most `size` rows, as often as they are iterated over.

        Args:
            size: B.
            order: the rows in the order of their numbers, as `order` gives it; from the first to the last if None.
        """
        return Batches(self, count("size", size), order)

    def summary(self, scaled: Tensor | Index | None = None) -> Summary:
        """One pass over all rows.

        scaled: the numbers of the rows whose mean and standard deviation are wanted; all if None.

        Raises:
            ValueError: of a subset, which is summarized with what it is a part of.
        """
        if self._numbers is not None:
            raise ValueError("summary is of all rows: call it before subset")
        with self._reading():
            return summarize(self._rows, self.annotated, None if scaled is None else np.asarray(scaled, np.int64))

    def __getstate__(self) -> dict[str, Any]:
        """Without what is in a file: a process that is sent this opens it again."""
        return {k: v for k, v in vars(self).items() if self._place is None or k != "_rows"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        if self._place is not None:
            path, layer, part = self._place
            self._rows = _opened(Path(path), layer)[part].rows


class Batches:
    """An iterable of batches that starts anew each time. Of a file, the next one is read in the meantime."""

    def __init__(self, dataset: Dataset, size: int, order: Tensor | None) -> None:
        self.dataset, self.size, self.order = dataset, size, order

    def __len__(self) -> int:
        return math.ceil((len(self.dataset) if self.order is None else len(self.order)) / self.size)

    def __iter__(self) -> Iterator[Tensor]:
        if self.order is None:  # of blocks, as many batches are read at a time as fit in a window
            several = 1 if self.dataset.block == 1 else max(1, self.dataset._window() // self.size)
            step = self.size * several
            for found in self._read(slice(a, a + step) for a in range(0, len(self.dataset), step)):
                yield from found.split(self.size)
        elif self.dataset.block == 1:
            yield from self._read(iter(self.order.split(self.size)))
        else:
            yield from self._of_windows(self.order.split(self.dataset._window()))

    def _of_windows(self, windows: Sequence[Tensor]) -> Iterator[Tensor]:
        """What is read by blocks: of the rows that are shuffled together, each block is read once."""
        places = deque[Tensor]()

        def ascending() -> Iterator[Tensor]:
            for window in windows:
                rows, place = window.sort()
                places.append(place)
                yield rows

        rest = torch.empty(0)  # rows that do not fill a batch
        for found in self._read(ascending()):
            shuffled = torch.empty_like(found)
            shuffled[places.popleft()] = found
            lacking = self.size - len(rest) if len(rest) else 0
            if lacking:
                rest = torch.cat([rest, shuffled[:lacking]])
                if len(rest) < self.size:
                    continue
                yield rest
            rest = shuffled[:0]
            for batch in shuffled[lacking:].split(self.size):
                if len(batch) == self.size:
                    yield batch
                else:
                    rest = batch.clone()
        if len(rest):
            yield rest

    def _read(self, parts: Iterator[Any]) -> Iterator[Tensor]:
        """The rows of every part. Of a file, a part is asked for while the one before is read, and read while the one
        before that is used."""
        if self.dataset.resident:
            yield from map(self.dataset.__getitem__, parts)
            return

        def read(part: Any, following: Any) -> Tensor:
            if isinstance(following, Tensor):
                self.dataset._ask(following.numpy())
            return self.dataset[part]

        with ThreadPoolExecutor(1) as reader:
            coming = deque[Future[Tensor]]()
            for part, following in pairwise(chain(parts, [None])):
                coming.append(reader.submit(read, part, following))
                if len(coming) > 1:
                    yield coming.popleft().result()
            for last in coming:
                yield last.result()


def _opened(path: Path, layer: str | None) -> list[Part]:
    if path.suffix not in FILES:
        raise ValueError(f"data must be an .npy, .npz or .h5ad file; got {str(path)!r}")
    return [annotated(path, layer)] if path.suffix == ".h5ad" else plain(path, layer)


def open_parts(path: str | Path, *, layer: str | None = None) -> list[Dataset]:
    """The data of a file as `open_dataset` has them, or the training and the test part of one that is split already."""
    found = []
    for number, part in enumerate(_opened(Path(path), layer)):
        dataset = Dataset(part)
        dataset._place = str(Path(path).resolve()), layer, number
        found.append(dataset)
    return found


def open_dataset(path: str | Path, *, layer: str | None = None) -> Dataset:
    """The data of a file, in memory that does not grow with it.

    .npy: mapped. .npz: the array x, or the only one besides the labels y; mapped where it is stored, and unpacked into
    a temporary file where it is compressed; also a matrix of scipy.sparse.save_npz. .h5ad of AnnData: the matrix X,
    dense or sparse; needs h5py. One stored by columns is put by rows in temporary files. Any row is read by itself, but
    where chunks are compressed, or an .npy file is in Fortran's order, they are read by blocks: see `Dataset.order`.
    What takes at most 256 MiB is read whole.

    Args:
        path: of the file. An .npz file with x_train and x_test, such as Keras's mnist.npz, gives x_train.
        layer: of an .h5ad file, in place of X; "raw" is that of adata.raw. Of an .npz file, the name of the array.

    Raises:
        ValueError, TypeError: a damaged file, no array of numbers [N, *event], or no such layer.
        OSError: the system cannot read it, or has no room to unpack it.
    """
    return open_parts(path, layer=layer)[0]
