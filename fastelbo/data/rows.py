"""Rows of arrays that need not fit in memory: read by their numbers, or in pieces from the first to the last."""

import mmap
from collections.abc import Iterator
from contextlib import suppress
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

PIECE_ELEMENTS = 1 << 20  # of a piece: what stays in the cache
READ_ELEMENTS = 1 << 25  # at most, that are read at a time

Index = NDArray[np.int64]
Values = NDArray[Any]


class Piece(NamedTuple):
    """Consecutive rows as they are stored."""

    rows: int
    values: Values  # [rows, *event]; of a sparse matrix [n], and then the two below
    columns: Values | None = None  # [n]
    counts: Index | None = None  # [rows]: how many of the values each row has


class Rows(Protocol):
    """[N, *event]."""

    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    block: int  # consecutive rows that cost as much as one: 1 where any row is read by itself
    resident: bool  # whether they are in memory

    def ask(self, index: Index) -> None:
        """Tell that these rows will be read."""
        ...

    def read(self, index: Index | slice) -> Values:
        """The rows [n, *event] of these numbers, in their order; a slice has no step."""
        ...

    def pieces(self) -> Iterator[Piece]:
        """All rows."""
        ...


def _spans(rows: int, elements: int, block: int = 1) -> Iterator[slice]:
    """0 to `rows` in spans of PIECE_ELEMENTS, of so many elements a row; of whole blocks where these are larger."""
    most = READ_ELEMENTS // max(1, elements)
    step = max(1, PIECE_ELEMENTS // max(1, elements), min(block, most))
    return (slice(start, min(start + step, rows)) for start in range(0, rows, step))


def _ask(mapped: Any, first: Index, count: Index | int) -> None:
    """Ask the system for the pages of a mapped file that hold `count` items from `first` on, for each of them: it reads
    them side by side, and in the meantime. What it refuses is read later."""
    shift, size = mapped.offset % mmap.ALLOCATIONGRANULARITY, mapped.strides[0]
    for start, end in zip((shift + first * size).tolist(), (shift + (first + count) * size).tolist(), strict=True):
        page = start - start % mmap.PAGESIZE
        with suppress(OSError, ValueError):
            mapped._mmap.madvise(mmap.MADV_WILLNEED, page, end - page)


class Dense:
    """An array, in memory or mapped, or `Ranges` of an HDF5 dataset."""

    def __init__(self, array: Any, block: int = 1, resident: bool = False) -> None:
        self.array, self.block, self.resident = array, block, resident
        self.shape, self.dtype = tuple(array.shape), array.dtype

    def ask(self, index: Index) -> None:
        if isinstance(self.array, np.memmap) and self.array.flags.c_contiguous:
            _ask(self.array, index, 1)

    def read(self, index: Index | slice) -> Values:
        return np.asarray(self.array[index])

    def pieces(self) -> Iterator[Piece]:
        elements = int(np.prod(self.shape[1:]))
        for span in _spans(len(self.array), elements, self.block):
            read = self.read(span)
            for part in _spans(len(read), elements):
                yield Piece(part.stop - part.start, read[part])


class Sparse:
    """A matrix in CSR form, of vectors as in `Dense`; indptr is in memory. A batch is made dense, never the matrix."""

    def __init__(
        self, data: Any, indices: Any, indptr: Index, columns: int, block: int = 1, resident: bool = False
    ) -> None:
        if (
            len(indptr) == 0
            or indptr[0] != 0
            or (np.diff(indptr) < 0).any()
            or indptr[-1] > min(map(len, (data, indices)))
        ):
            raise ValueError("the rows of its sparse matrix do not lie one behind the other")
        self.data, self.indices, self.indptr = data, indices, indptr
        self.shape: tuple[int, ...] = (len(indptr) - 1, columns)
        self.dtype = data.dtype
        self.block, self.resident = block, resident

    def _stored(self, index: Index | slice) -> Piece:
        if isinstance(index, slice):
            ends = self.indptr[index.start : index.stop + 1]
            at: Any = slice(int(ends[0]), int(ends[-1]))
            counts = np.diff(ends)
        else:
            first = self.indptr[index]
            counts = self.indptr[index + 1] - first
            at = np.repeat(first - (np.cumsum(counts) - counts), counts) + np.arange(counts.sum())
        values, columns = np.asarray(self.data[at]), np.asarray(self.indices[at])
        if len(columns) and not 0 <= columns.min() <= columns.max() < self.shape[1]:
            raise ValueError(f"its sparse matrix has a column {columns.max()} of {self.shape[1]}, counted from 0")
        return Piece(len(counts), values, columns, counts)

    def _matrix(self, piece: Piece) -> Any:
        """As scipy has it."""
        from scipy.sparse import csr_array

        taken = {np.dtype(np.bool_): np.uint8, np.dtype(np.float16): np.float32}  # what scipy does without
        values = piece.values.astype(taken.get(self.dtype, self.dtype.newbyteorder("=")))
        assert piece.counts is not None
        indptr = np.concatenate([[0], np.cumsum(piece.counts)])
        return csr_array((values, piece.columns, indptr), (piece.rows, self.shape[1]))

    def _canonical(self, piece: Piece) -> Piece:
        """Columns in ascending order, each once, with no zeros: what `read` gives, without its zeros."""
        assert piece.columns is not None and piece.counts is not None
        follows = np.ones(len(piece.columns) + 1, bool)
        follows[np.cumsum(piece.counts)] = follows[0] = False  # where rows begin
        if piece.values.all() and not (follows[1:-1] & (np.diff(piece.columns) <= 0)).any():
            return piece
        matrix = self._matrix(piece).copy()  # it is put in order in place
        matrix.sum_duplicates()
        matrix.eliminate_zeros()
        return Piece(piece.rows, matrix.data.astype(self.dtype), matrix.indices, np.diff(matrix.indptr))

    def ask(self, index: Index) -> None:
        first = self.indptr[index]
        for vector in (self.data, self.indices):
            if isinstance(vector, np.memmap):
                _ask(vector, first, self.indptr[index + 1] - first)
            elif isinstance(vector, Chunks):
                vector.ask(first)

    def read(self, index: Index | slice) -> Values:
        return np.asarray(self._matrix(self._stored(index)).toarray().astype(self.dtype, copy=False))

    def pieces(self) -> Iterator[Piece]:
        for span in _spans(self.shape[0], int(self.indptr[-1]) // max(1, self.shape[0]), self.block):
            yield self._canonical(self._stored(span))


# ----------------------------------------------------------------------------------------------------------------------
# What HDF5 stores, as an array that is indexed along its first dimension.


class Ranges:
    """A dataset whose chunks can only be read whole: each is read once for all its rows that are wanted."""

    def __init__(self, dataset: Any) -> None:
        self.dataset, self.shape, self.dtype = dataset, dataset.shape, dataset.dtype
        self.chunk = dataset.chunks[0] if dataset.chunks else PIECE_ELEMENTS  # rows

    def __len__(self) -> int:
        return int(self.shape[0])

    def __getitem__(self, index: Index | slice) -> Values:
        if isinstance(index, slice):
            return np.asarray(self.dataset[index])
        order = np.argsort(index, kind="stable")
        at, found = index[order], np.empty((len(index), *self.shape[1:]), self.dtype)
        for part in np.split(np.arange(len(at)), np.flatnonzero(np.diff(at // self.chunk)) + 1) if len(at) else ():
            first, last = at[part[0]], at[part[-1]]
            found[order[part]] = self.dataset[first : last + 1][at[part] - first]
        return found


class Chunks:
    """A dataset of one dimension whose chunks are stored as they are: read from the mapped file."""

    def __init__(self, mapped: Values, starts: Index, chunk: int, length: int) -> None:
        self.mapped, self.starts, self.chunk = mapped, starts, chunk  # starts: of the chunks, in elements
        self.shape, self.dtype = (length,), mapped.dtype

    def __len__(self) -> int:
        return self.shape[0]

    def ask(self, first: Index) -> None:
        """Tell that items from `first` on will be read: of each, the rest of the page."""
        chunk, rest = np.divmod(first[first < len(self)], self.chunk)
        _ask(self.mapped, self.starts[chunk] + rest, 1)

    def __getitem__(self, index: Index | slice) -> Values:
        if not isinstance(index, slice):
            chunk, rest = np.divmod(index, self.chunk)
            return np.asarray(self.mapped[self.starts[chunk] + rest])
        parts, at = [np.empty(0, self.dtype)], index.start
        while at < index.stop:
            chunk, rest = divmod(at, self.chunk)
            count = min(self.chunk - rest, index.stop - at)
            parts.append(self.mapped[self.starts[chunk] + rest :][:count])
            at += count
        return np.concatenate(parts)
