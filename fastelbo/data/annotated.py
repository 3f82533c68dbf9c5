"""Matrices in .h5ad files of AnnData, dense or sparse, without reading them whole."""

from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from fastelbo._internal.reading import reading
from fastelbo.data import files
from fastelbo.data.files import Part, check_array, dense
from fastelbo.data.rows import Chunks, Dense, Index, Ranges, Rows, Sparse, Values

TRANSPOSED = 1 << 22  # values of a matrix by columns that are put by rows at a time


def annotated(path: Path, layer: str | None = None) -> Part:
    """The matrix X of an .h5ad file, or that of a layer; `raw` is that of adata.raw where no layer is called so."""
    if find_spec("h5py") is None:
        raise ValueError(f"h5py is needed to read {path}: pip install h5py")
    import h5py

    with path.open("rb"), reading(path, "AnnData file"):
        try:
            file = h5py.File(path, "r")
        except BlockingIOError:  # another process has it open
            file = h5py.File(path, "r", locking=False)
        layers = {"X": "X"} | {name: f"layers/{name}" for name in file.get("layers", ())}
        for place in ("raw/X", "raw.X"):  # the latter before anndata 0.7
            layers.setdefault("raw", place) if place in file else None
        there = {k: v for k, v in layers.items() if v in file and file[v].attrs.get("encoding-type") != "null"}
    wanted = layer or "X"
    if wanted not in there:
        names = ", ".join(there) or "none"
        raise ValueError(f"data must be X or a --layer of {path}, which has: {names}; got {wanted!r}")
    with reading(path, "AnnData file"):
        found = file[there[wanted]]
        kind = found.attrs.get("encoding-type", found.attrs.get("h5sparse_format", "array"))
        kind = kind.decode() if isinstance(kind, bytes) else str(kind)
        is_sparse = isinstance(found, h5py.Group)
        shape = tuple(found.attrs.get("shape", found.attrs.get("h5sparse_shape", ()))) if is_sparse else found.shape
        dtype = (found["data"] if is_sparse else found).dtype
    check_array(dtype, tuple(map(int, shape)), path)
    for dataset in (found[name] for name in ("data", "indices", "indptr")) if is_sparse else (found,):
        _check_filters(dataset, path)
    with reading(path, "AnnData file"):
        rows = _sparse(found, path, tuple(map(int, shape)), "csc" in kind) if is_sparse else _dense(found)
    return Part(rows, annotated=True)


def _check_filters(dataset: Any, path: Path) -> None:
    """Raises: ValueError: a compression that needs a plugin."""
    import h5py

    stored = dataset.id.get_create_plist()
    names = [stored.get_filter(i) for i in range(stored.get_nfilters())]
    if find_spec("hdf5plugin") is not None:
        import hdf5plugin as hdf5plugin  # type: ignore[import-not-found]  # registers its filters
    if missing := [str(each[-1].decode() or each[0]) for each in names if not h5py.h5z.filter_avail(each[0])]:
        raise ValueError(
            f"hdf5plugin is needed to read {path}, compressed by {', '.join(missing)}: pip install hdf5plugin"
        )


def _mapped(dataset: Any) -> Values | Chunks | None:
    """A dataset in the mapped file; None where it has to be decompressed."""
    length, size, path = len(dataset), dataset.dtype.itemsize, Path(dataset.file.filename)
    if (
        dataset.id.get_create_plist().get_nfilters()
        or dataset.external
        or dataset.is_virtual
        or dataset.file.userblock_size
    ):
        return None
    if (offset := dataset.id.get_offset()) is not None:
        return np.memmap(path, dataset.dtype, "r", offset, dataset.shape)
    if dataset.ndim != 1 or dataset.chunks is None:
        return None
    (chunk,) = dataset.chunks
    at: list[tuple[int, int]] = []
    dataset.id.chunk_iter(lambda info: at.append((info.chunk_offset[0], info.byte_offset)))
    at.sort()
    starts = np.array([byte for _, byte in at], np.int64)
    if [first for first, _ in at] != list(range(0, length, chunk)) or len(set((starts % size).tolist())) != 1:
        return None
    shift = int(starts[0]) % size
    mapped = np.memmap(path, dataset.dtype, "r", shift, (path.stat().st_size - shift) // size)
    return Chunks(mapped, (starts - shift) // size, chunk, length)


def _dense(dataset: Any) -> Dense:
    size = dataset.size * dataset.dtype.itemsize
    if size <= files.WHOLE:
        return dense(dataset[()])
    mapped = _mapped(dataset)
    return dense(mapped) if isinstance(mapped, np.memmap) else Dense(Ranges(dataset), (dataset.chunks or (1,))[0])


def _sparse(group: Any, path: Path, shape: tuple[int, ...], by_columns: bool) -> Rows:
    data, indices, indptr = (group[name] for name in ("data", "indices", "indptr"))
    ends = indptr[()].astype(np.int64)
    if len(ends) != shape[by_columns] + 1:
        raise ValueError(f"its sparse matrix of shape {shape} has {len(ends)} ends of rows")
    if len(data) * (data.dtype.itemsize + indices.dtype.itemsize) <= files.WHOLE:
        from scipy.sparse import csc_array

        values, numbers = data[()], indices[()]
        if by_columns:
            stored = Sparse(values, numbers, ends, shape[0])._stored(slice(0, shape[1]))  # checked
            whole = csc_array((np.arange(len(values)), stored.columns, ends), shape).tocsr()
            values, numbers, ends = values[whole.data], whole.indices, whole.indptr.astype(np.int64)
        return Sparse(values, numbers, ends, shape[1], resident=True)
    if by_columns:
        return _by_rows(Sparse(Ranges(data), Ranges(indices), ends, shape[0]), shape, path)
    values, numbers = _mapped(data), _mapped(indices)
    if values is None or numbers is None:
        block = (data.chunks or (1,))[0] * len(ends) // max(1, len(data))  # rows of a chunk
        return Sparse(Ranges(data), Ranges(indices), ends, shape[1], max(1, block))
    return Sparse(values, numbers, ends, shape[1])


def _by_rows(columns: Sparse, shape: tuple[int, ...], path: Path) -> Sparse:
    """A matrix stored by columns, by rows: in temporary files."""

    def pieces() -> Iterator[tuple[Index, Values, Index]]:
        """Rows in ascending order, values and columns of a piece of the matrix."""
        first = 0
        while first < shape[1]:
            last = int(np.searchsorted(columns.indptr, columns.indptr[first] + TRANSPOSED, "right")) - 1
            last = min(max(last, first + 1), shape[1])
            stored = columns._stored(slice(first, last))
            assert stored.columns is not None and stored.counts is not None
            order = np.argsort(stored.columns, kind="stable")
            yield stored.columns[order], stored.values[order], np.repeat(np.arange(first, last), stored.counts)[order]
            first = last

    counts = np.zeros(shape[0] + 1, np.int64)
    for rows, _, _ in pieces():
        counts[1:] += np.bincount(rows, minlength=shape[0])
    ends = counts.cumsum()
    free, total = ends[:-1].copy(), int(ends[-1])
    values, numbers = (
        np.memmap(files.scratch(path, total * dtype.itemsize), dtype, "r+", shape=total)
        for dtype in (columns.dtype, np.dtype(np.int32))
    )
    for rows, part, of in pieces():
        count = np.bincount(rows, minlength=shape[0])
        at = free[rows] + np.arange(len(rows)) - (count.cumsum() - count)[rows]
        values[at], numbers[at] = part, of
        free += count
    return Sparse(values, numbers, ends, shape[1])
