"""Arrays in .npy and .npz files: small ones are read whole, large ones mapped."""

import io
import math
import mmap
import os
import shutil
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any, NamedTuple
from zipfile import ZIP_STORED, ZipFile, ZipInfo

import numpy as np

from fastelbo._internal.reading import reading
from fastelbo.data.rows import Dense, Rows, Sparse, Values

WHOLE = 1 << 28  # bytes up to which an array is read whole
HEADER = 1 << 16  # bytes; numpy refuses headers of more than 10000
PARTS = ("_train", "_test")  # how Keras names the arrays of an .npz file that is split already: x_train, y_train, ...


class Part(NamedTuple):
    """Rows, and their labels as they are stored."""

    rows: Rows
    labels: Values | None = None
    annotated: bool = False  # of an .h5ad file, where whole numbers are counts whatever their type


def check_array(dtype: np.dtype[Any], shape: tuple[int, ...], path: Path) -> None:
    """Raises: ValueError, TypeError: no [N, *event] of numbers."""
    if dtype.kind not in "biuf":
        raise TypeError(f"data must be floating, integers or bool; {path} holds {dtype}: convert it, as by astype")
    if len(shape) < 2 or 0 in shape:
        more = ": reshape(-1, 1) makes rows of one number each" if len(shape) == 1 else ""
        rows = "of 1 row, or 2 or more to train on"
        raise ValueError(f"data must be [N, *event], {rows}, and no empty event; {path} holds {shape}{more}")


def _header(file: IO[bytes]) -> tuple[tuple[int, ...], bool, np.dtype[Any], int]:
    """Shape, whether it is in Fortran's order, dtype, and where the data begin."""
    start = file.tell()
    head = io.BytesIO(file.read(HEADER))
    version = np.lib.format.read_magic(head)
    if version not in ((1, 0), (2, 0), (3, 0)):
        raise ValueError(f"version {version} of the format")
    if version == (3, 0):  # as 2, for names of fields that are not in latin1
        return (1, 1), False, np.dtype([("field", "V1")]), 0
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, fortran, dtype = read(head)
    return shape, fortran, dtype, start + head.tell()


def _array(file: IO[bytes], end: int | None, path: Path, checked: bool = True) -> Values:
    """The array in an .npy file that goes to the byte `end`, or else to the end of the file, read or mapped.

    What is `checked` is refused where it holds no rows of numbers.
    """
    with reading(path, f"{path.suffix} file of plain arrays"):
        shape, fortran, dtype, start = _header(file)
    if checked or dtype.hasobject:
        check_array(dtype, shape, path)
    with reading(path, f"{path.suffix} file of plain arrays"):
        size = math.prod(shape) * dtype.itemsize
        end = file.seek(0, io.SEEK_END) if end is None else end
        if start + size != end:
            raise ValueError(f"its header tells of {shape} of {dtype}, {size} bytes; {end - start} follow it")
        order: Any = "F" if fortran else "C"
        if size > WHOLE:
            return np.memmap(file, dtype, "r", start, shape, order)
        file.seek(start)
        return np.ndarray(shape, dtype, bytearray(file.read(size)), order=order)


def dense(array: Values) -> Dense:
    """An array as rows."""
    if not isinstance(array, np.memmap):
        return Dense(np.ascontiguousarray(array), resident=True)
    across = not array.flags.c_contiguous and len(array) > 1  # a row lies on as many pages as it has numbers
    return Dense(array, max(1, mmap.PAGESIZE // array.itemsize) if across else 1)


def scratch(path: Path, size: int = 0, content: IO[bytes] | None = None) -> IO[bytes]:
    """A temporary file for what `path` holds: of so many bytes, or of a content. It lasts as long as its map, whose
    pages are no memory of the process's own.

    Raises:
        OSError: there is no room. A write to a map of more bytes than there are would end the process.
    """
    file = tempfile.TemporaryFile()  # noqa: SIM115
    try:
        if size:
            os.posix_fallocate(file.fileno(), 0, size)
        if content is not None:
            shutil.copyfileobj(content, file, 1 << 20)
    except OSError as error:
        if error.errno is None:  # of zipfile
            raise
        why = f"{error.strerror}, to unpack {path}: TMPDIR names another folder"
        raise OSError(error.errno, why, tempfile.gettempdir()) from error
    file.seek(0)
    return file


def _spooled(archive: ZipFile, member: ZipInfo, path: Path) -> tuple[IO[bytes], int | None]:
    """A member of an archive as a file, and its end there: in memory, where it lies, or unpacked into a temporary file.

    Its check sum is compared.
    """
    if member.file_size <= WHOLE:
        return io.BytesIO(archive.read(member)), None
    with archive.open(member) as source:
        if member.compress_type == ZIP_STORED:
            while source.read(1 << 20):
                pass
            file: Any = archive.fp
            file.seek(member.header_offset + 26)
            name, extra = file.read(2), file.read(2)
            start = member.header_offset + 30 + int.from_bytes(name, "little") + int.from_bytes(extra, "little")
            opened = path.open("rb")
            opened.seek(start)
            return opened, start + member.file_size
        return scratch(path, content=source), None


def _chosen(names: list[str], layer: str | None, path: Path) -> str:
    """The data among the arrays of an .npz file: the one named `layer` or x, or the only one besides the labels y."""
    if layer is not None:
        if layer not in names:
            raise ValueError(f"layer must be an array of {path}: {', '.join(names)}; got {layer!r}")
        return layer
    names = [name for name in names if name != "y"]
    if "x" not in names and len(names) != 1:
        raise ValueError(
            f"data must be the array x of {path}, or that of --layer; it holds {', '.join(names) or 'none'}"
        )
    return "x" if "x" in names else names[0]


def _labels(archive: ZipFile, name: str, n: int, path: Path) -> Values | None:
    """They colour pictures, no more: what cannot be read is left out, with a warning."""
    if f"{name}.npy" not in archive.namelist():
        return None
    try:
        with reading(path, "file of plain labels"):
            y = _array(*_spooled(archive, archive.getinfo(f"{name}.npy"), path), path, checked=False)
        return labels_of(y, n)
    except (ValueError, TypeError) as error:
        warnings.warn(f"labels {name} of {path} are left out, which colour pictures: {error}", stacklevel=2)
        return None


def labels_of(y: Values, n: int) -> Values:
    """Labels [n] of what a file holds for n data: [n], [n, 1] or one-hot [n, C]. ValueError: anything else."""
    if y.ndim == 2 and y.shape[1] == 1:
        y = y[:, 0]
    if y.ndim == 2 and y.dtype.kind in "biuf" and y.shape[1] and bool(((y != 0).sum(1) == 1).all()):
        y = y.argmax(1)
    if y.shape != (n,) or y.dtype.kind not in "biufUS":
        raise ValueError(f"they must be [{n}], [{n}, 1] or one-hot, numbers or strings; they are {y.dtype} {y.shape}")
    return y


def plain(path: Path, layer: str | None = None) -> list[Part]:
    """The array of an .npy or .npz file, or both parts of one that is split already."""
    kind = f"{path.suffix} file of plain arrays"
    with path.open("rb") as file:
        if path.suffix == ".npy":
            if layer is not None:
                raise ValueError(f"layer must be left out but for .h5ad and .npz files; got {layer!r} for {path}")
            return [Part(dense(_array(file, None, path)))]
        with reading(path, kind):
            archive = ZipFile(file)
            names = [name.removesuffix(".npy") for name in archive.namelist() if name.endswith(".npy")]
        if {"data", "shape", "format"} <= set(names) and layer is None:
            return [Part(_scipy(path))]
        split = layer is None and {f"x{part}" for part in PARTS} <= set(names)
        return list(_parts(archive, names, PARTS if split else ("",), layer, path))


def _parts(archive: ZipFile, names: list[str], parts: tuple[str, ...], layer: str | None, path: Path) -> Iterator[Part]:
    for part in parts:
        name = f"x{part}" if part else _chosen(names, layer, path)
        with reading(path, f"{path.suffix} file of plain arrays"):  # no other member is decompressed
            opened = _spooled(archive, archive.getinfo(f"{name}.npy"), path)
        rows = dense(_array(*opened, path))
        yield Part(rows, _labels(archive, f"y{part}", rows.shape[0], path))


def _scipy(path: Path) -> Rows:
    """What scipy.sparse.save_npz wrote."""
    from scipy.sparse import load_npz

    with reading(path, ".npz file of a sparse matrix"):
        matrix = load_npz(path).tocsr()
    check_array(matrix.dtype, matrix.shape, path)
    return Sparse(matrix.data, matrix.indices, matrix.indptr, matrix.shape[1], resident=True)
