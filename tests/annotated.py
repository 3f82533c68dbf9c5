"""Files of AnnData by h5py alone, laid out as anndata 0.12 writes them."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from scipy import sparse

Matrix = Any  # a numpy array, or a matrix of scipy.sparse


def _mark(item: Any, kind: str, version: str = "0.1.0") -> Any:
    item.attrs["encoding-type"], item.attrs["encoding-version"] = kind, version
    return item


def _strings(group: h5py.Group, name: str, values: Any) -> None:
    _mark(group.create_dataset(name, data=values, dtype=h5py.string_dtype()), "string-array", "0.2.0")


def _frame(parent: h5py.Group, name: str, size: int, prefix: str) -> None:
    """A data frame of no columns."""
    group = _mark(parent.create_group(name), "dataframe", "0.2.0")
    group.attrs["_index"], group.attrs["column-order"] = "_index", np.empty(0, h5py.string_dtype())
    _strings(group, "_index", np.array([f"{prefix}{n}" for n in range(size)], object))


def _compressed(X: Matrix, layout: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """data, indices and indptr. Of an array by hand: scipy has no float16 and no foreign byte order."""
    if sparse.issparse(X):
        found = X.tocsr() if layout == "csr" else X.tocsc()
        return found.data, found.indices, found.indptr
    lines = X if layout == "csr" else X.T
    line, index = np.nonzero(lines)  # NaN is not zero
    ends = np.cumsum(np.bincount(line, minlength=len(lines)))
    return lines[line, index], index.astype(np.int32), np.concatenate([[0], ends]).astype(np.int64)


def _matrix(parent: h5py.Group, name: str, X: Matrix, layout: str, options: dict[str, Any]) -> None:
    if layout == "dense":
        dense = X.toarray() if sparse.issparse(X) else np.asarray(X)
        if dense.dtype.kind in "OSU":
            _strings(parent, name, dense.astype(object))
        else:
            _mark(parent.create_dataset(name, data=dense, **options), "array", "0.2.0")
        return
    group = _mark(parent.create_group(name), f"{layout}_matrix")
    group.attrs["shape"] = np.array(X.shape, np.int64)
    for part, values in zip(("data", "indices", "indptr"), _compressed(X, layout), strict=True):
        group.create_dataset(part, data=values, maxshape=(None,), **options)


def write_h5ad(
    path: Path,
    X: Matrix | None,
    *,
    layers: Mapping[str, Matrix] | None = None,
    raw: Matrix | None = None,
    layout: str = "csr",
    compression: str | None = None,
    chunks: Any = None,
) -> None:
    """Write X [N, D], layers of its shape, and raw [N, any number].

    Args:
        X: None: a file of layers alone.
        layout: "csr", "csc" or "dense", of all the matrices.
        compression, chunks: as `h5py.Group.create_dataset` takes them, for every array of the matrices.
    """
    rows, columns = next(each for each in (X, *(layers or {}).values()) if each is not None).shape
    options = {"compression": compression, "chunks": chunks}
    with h5py.File(path, "w") as file:
        _mark(file, "anndata")
        _frame(file, "obs", rows, "cell")
        _frame(file, "var", columns, "gene")
        for name in ("obsm", "varm", "obsp", "varp", "layers", "uns"):
            _mark(file.create_group(name), "dict")
        if X is not None:
            _matrix(file, "X", X, layout, options)
        for name, layer in (layers or {}).items():
            _matrix(file["layers"], name, layer, layout, options)
        if raw is not None:
            group = _mark(file.create_group("raw"), "raw")
            _matrix(group, "X", raw, layout, options)
            _frame(group, "var", raw.shape[1], "gene")
            _mark(group.create_group("varm"), "dict")
