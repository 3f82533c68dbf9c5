"""Data sets that need no download, and arrays from files, split into a training and a held-out part."""

import hashlib
import io
import math
import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from importlib.util import find_spec
from pathlib import Path
from typing import IO, Any, NamedTuple
from zipfile import ZipFile

import torch
from torch import Tensor

from fastelbo import likelihoods, reference
from fastelbo.commands import files
from fastelbo.likelihoods import Domain
from fastelbo.losses import likelihood_sample

PATCH = 8  # side of an image patch, in pixels
HEADER = 1 << 16  # bytes; numpy refuses headers of more than 10000
PIECE = 1 << 20  # bytes that are read at a time
HELD_OUT = 0.1  # of data that come in one part: the fraction that is held out


class Dataset(NamedTuple):
    """x [N, *event] (float32, bool or an integer type) and, where there are any, labels [N] of both parts."""

    train: Tensor
    held_out: Tensor
    train_labels: Tensor | None
    held_out_labels: Tensor | None
    likelihood: str
    source: str  # the name or the path that it comes from, of the held-out part where they are two


Part = tuple[Tensor, Tensor | None]  # x and labels


def _digits() -> Part:
    """1797 handwritten digits of 8 x 8 pixels, in [0, 1]."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    return torch.from_numpy(digits.images).float() / 16, torch.from_numpy(digits.target)


def _patches() -> Part:
    """8480 grey patches of 8 x 8 pixels that tile two photographs, each with mean 0 and its contrast normalized.

    (p - mean(p)) / sqrt(var(p) + 10) on grey levels of 0 to 255 (Coates, Lee & Ng 2011).
    """
    from sklearn.datasets import load_sample_images

    tiles = []
    for image in load_sample_images().images:
        grey = torch.tensor(image, dtype=torch.float64).mean(2)
        tiles.append(grey.unfold(0, PATCH, PATCH).unfold(1, PATCH, PATCH).reshape(-1, PATCH, PATCH))
    patches = torch.cat(tiles)
    variance, mean = torch.var_mean(patches, (1, 2), keepdim=True)
    return ((patches - mean) / torch.sqrt(variance + 10)).float(), None


def counts_model(cells: int = 2000, genes: int = 200, rank: int = 4, seed: int = 0) -> tuple[Tensor, Tensor]:
    """log_mean [cells, genes] and log_theta [genes], float64, of the negative binomial that "counts" are drawn from.

    log mean = log s_n + b_d + z_n w_d, of library size s_n, a gene's b_d and w_d, and z_n ~ N(0, I) of `rank`
    dimensions; log theta is uniform between -1 and 2.
    """
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, dtype=torch.float64, generator=generator)

    log_library, gene = 0.4 * normal(cells, 1), 1.2 * normal(genes) - 1.2
    log_mean = log_library + gene + normal(cells, rank) @ (0.5 * normal(rank, genes))
    return log_mean, 3 * torch.rand(genes, dtype=torch.float64, generator=generator) - 1


def _counts() -> Part:
    """Counts of `counts_model`: 2000 cells, 200 genes, 69 % zeros."""
    drawn = likelihood_sample(counts_model(), "nb", generator=torch.Generator().manual_seed(1))
    return drawn.to(torch.int32), None


class BuiltIn(NamedTuple):
    """A data set that needs no file."""

    read: Callable[[], Part]
    domain: Domain
    generated: str | None = None  # from what, if it is not measured


_MODEL = "negative binomial, log means of rank 4, a library size per cell, a theta per gene"
BUILT_IN = {
    "digits": BuiltIn(_digits, "[0, 1]"),
    "patches": BuiltIn(_patches, "reals"),
    "counts": BuiltIn(_counts, "counts", _MODEL),
}
FILES = (".npy", ".npz", ".h5ad")


def _check_memory(needed: int) -> None:
    if 2 * needed > os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"):  # the parts are copies
        raise MemoryError(f"{needed / 1e9:.1f} GB, twice that in use, are more than this machine's memory")


class _Array:
    """An array in the .npy format: the constructor reads the header, `read` the data."""

    def __init__(self, file: IO[bytes]) -> None:
        import numpy as np

        head = io.BytesIO(file.read(HEADER))
        version = np.lib.format.read_magic(head)
        if version not in ((1, 0), (2, 0)):
            raise ValueError(f"version {version} of the format, which plain arrays do not need")
        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        self.shape, self._fortran, self.dtype = read(head)
        self.bytes = math.prod(self.shape) * self.dtype.itemsize
        self._file, self._start = file, head.read()

    def read(self) -> Any:
        """The array. Memory is allocated for the bytes that come, not for the size that the header states."""
        import numpy as np

        _check_memory(self.bytes)
        content = bytearray(self._start)
        while len(content) <= self.bytes and (piece := self._file.read(PIECE)):
            content += piece
        if len(content) != self.bytes:
            found = "more" if len(content) > self.bytes else f"{len(content)} bytes"
            raise ValueError(f"its header tells of {self.shape} of {self.dtype}, {self.bytes} bytes; {found} follow it")
        # a byte of a bool is 0 or 1; in a file it may be any
        x = np.frombuffer(content, np.uint8) != 0 if self.dtype == np.bool_ else np.frombuffer(content, self.dtype)
        return x.reshape(self.shape[::-1]).T if self._fortran else x.reshape(self.shape)


def _chosen(names: Sequence[str], path: Path) -> str:
    """The data among the arrays of an .npz file: the one named x, or the only one besides the labels y."""
    names = [name for name in names if name != "y"]
    if "x" not in names and len(names) != 1:
        raise ValueError(f"data must be the array x of {path} where it holds several; it holds {', '.join(names)}")
    return "x" if "x" in names else names[0]


def _check_array(dtype: Any, shape: tuple[int, ...], path: Path) -> None:
    if dtype.kind not in "biuf":
        raise TypeError(f"data must be floating, integers or bool; {path} holds {dtype}")
    if len(shape) < 2 or shape[0] < 2 or 0 in shape:
        raise ValueError(f"data must be [N, *event] with N of 2 or more and no empty event; {path} holds {shape}")


def _as_tensor(array: Any) -> Tensor:
    """Floats as float32; uint8 and bool as they are; integers in the smallest type of `reference.COUNTS` that holds
    their type, but uint64 in int64, where its largest numbers are negative."""
    import numpy as np

    if array.dtype.kind == "f":
        return torch.from_numpy(np.asarray(array, np.float32))
    if array.dtype in (np.uint8, np.bool_):
        return torch.from_numpy(array)
    held = (t for t in (np.int16, np.int32) if np.can_cast(array.dtype, t))
    return torch.from_numpy(np.ascontiguousarray(array, next(held, np.int64)))


def _annotated(path: Path) -> Part:
    """The matrix X of an AnnData file, dense or sparse."""
    if find_spec("anndata") is None:
        raise ValueError(f"anndata is needed to read {path}: pip install anndata")
    import anndata  # type: ignore[import-not-found]

    with path.open("rb"), files.reading(path, "AnnData file"):
        X = anndata.read_h5ad(path).X
    if X is None:
        raise ValueError(f"data must be the matrix X of {path}; it has none")
    _check_array(X.dtype, X.shape, path)
    with files.reading(path, "AnnData file that fits in memory"):
        _check_memory(math.prod(X.shape) * X.dtype.itemsize)
        return _as_tensor(X.toarray() if hasattr(X, "toarray") else X), None


PARTS = ("_train", "_test")  # how Keras names the arrays of an .npz file that is split already: x_train, y_train, ...


def _arrays(path: Path, opened: Sequence[IO[bytes]], kind: str) -> Part:
    """The arrays x and, where there is a second file, its labels."""
    import numpy as np

    with files.reading(path, kind):
        x, *labels = map(_Array, opened)
    _check_array(x.dtype, x.shape, path)
    for y in labels:
        if y.shape != x.shape[:1]:
            raise ValueError(f"labels y must be [{x.shape[0]}]; {path} holds {y.shape}")
        if y.dtype.kind not in "biuf":
            raise TypeError(f"labels y must be numbers; {path} holds {y.dtype}")
    with files.reading(path, kind), np.errstate(over="ignore", invalid="ignore"):
        read = _as_tensor(x.read())
        numbers = [y.read().astype(np.float64 if y.dtype.kind == "f" else np.int64) for y in labels]
        return read, torch.from_numpy(numbers[0]) if numbers else None


def _plain(path: Path) -> list[Part]:
    """The arrays of an .npy or .npz file, or of both parts of one that is split already."""
    kind = f"{path.suffix} file of plain arrays"
    with path.open("rb") as file, ExitStack() as stack:
        if path.suffix == ".npy":
            return [_arrays(path, [file], kind)]
        with files.reading(path, kind):
            archive = stack.enter_context(ZipFile(file))
            names = [name.removesuffix(".npy") for name in archive.namelist() if name.endswith(".npy")]
        split = {f"x{part}" for part in PARTS} <= set(names)
        found = []
        for part in PARTS if split else ("",):
            wanted = [f"x{part}" if split else _chosen(names, path), *({f"y{part}"} & set(names))]
            with files.reading(path, kind):  # no other member is decompressed
                opened = [stack.enter_context(archive.open(f"{name}.npy")) for name in wanted]
            found.append(_arrays(path, opened, kind))
        return found


def _parts(name: str, argument: str) -> list[Part]:
    """The data of a file, or the two parts of one that is split already."""
    path = Path(name)
    if path.suffix not in FILES:
        built_in = f"one of {', '.join(BUILT_IN)}, or " if argument == "data" else ""
        raise ValueError(f"{argument} must be {built_in}an .npy, .npz or .h5ad file; got {name!r}")
    return [_annotated(path)] if path.suffix == ".h5ad" else _plain(path)


def _domain(x: Tensor, annotated: bool) -> Domain:
    """What data from a file look like; floats are taken for counts where they are whole and `annotated`."""
    if x.dtype in reference.COUNTS or (annotated and bool(((x >= 0) & (x == x.floor())).all())):
        return "counts"
    return "[0, 1]" if not x.is_floating_point() or bool(((x >= 0) & (x <= 1)).all()) else "reals"


def _check_values(x: Tensor, likelihood: str, missing: bool) -> None:
    domain = likelihoods.get(likelihood).domain
    if x.dtype in reference.COUNTS and domain != "counts":
        found = str(x.dtype).removeprefix("torch.")
        raise TypeError(f"data must be floating, uint8 or bool for likelihood {likelihood!r}; they are {found}: counts")
    if x.dtype == torch.bool and domain == "counts":
        raise TypeError(f"data must be floating or integers for likelihood {likelihood!r}; they are bool")
    if missing or x.dtype in (torch.uint8, torch.bool):
        return
    if not x.isfinite().all():
        raise ValueError(f"data must be finite; {int((~x.isfinite()).sum())} of {x.numel()} values are not")
    objection = likelihoods.objection("data", x.min().item(), x.max().item(), likelihood)
    if objection is not None:
        raise ValueError(objection)


def load(
    name: str,
    likelihood: str | None = None,
    *,
    test_data: str | None = None,
    seed: int = 0,
    missing: bool = False,
) -> Dataset:
    """Load a data set and split it, always in the same way for the same seed: a tenth is held out.

    Args:
        name: "digits" (8 x 8 images in [0, 1], labels), "patches" (8 x 8 patches of photographs, normalized), "counts"
            (generated: see `counts_model`), or the path of a file. An .npy or .npz file: an array [N, *event],
            floating, bool, uint8 (x / 255 where the likelihood is not one of counts) or other integers (counts); of an
            .npz file the array x, and labels y where there are any. An .npz file with x_train and x_test, such as
            Keras's mnist.npz, is split as it says. An .h5ad file of AnnData: its matrix X.
        likelihood: "bernoulli" if None, but "gaussian" for patches and for floating data outside [0, 1], and "nb" for
            integers besides uint8 and for whole numbers in an .h5ad file.
        test_data: the path of a file of the held-out part; all of `name` is then trained on.
        seed: of the split.
        missing: floating data may hold any value, NaN for missing cells too.

    Raises:
        ValueError, TypeError: an unknown name or likelihood, a damaged file, an array of another type or shape, values
            that are not finite or outside the likelihood's range; an .h5ad file without anndata to read it.
        OSError: no file of that name, or the system cannot read it.
    """
    domain: Domain
    if name in BUILT_IN:
        parts, domain = [BUILT_IN[name].read()], BUILT_IN[name].domain
    else:
        parts = _parts(name, "data")
        domain = _domain(parts[0][0], name.endswith(".h5ad"))
    if test_data is not None:
        parts = [parts[0], _parts(test_data, "test_data")[-1]]
    (x, labels), (held_out, _) = parts[0], parts[-1]
    if held_out.shape[1:] != x.shape[1:] or held_out.dtype != x.dtype:
        what = [f"{t.dtype} of shape {tuple(t.shape[1:])}".removeprefix("torch.") for t in (x, held_out)]
        raise ValueError(f"held-out data must be like the training data, {what[0]}; they are {what[1]}")
    likelihood = likelihoods.DEFAULTS[domain] if likelihood is None else likelihood
    for each, _ in parts:
        _check_values(each, likelihood, missing)
    if len(parts) == 1:
        count = min(max(round(HELD_OUT * len(x)), 1), len(x) - 1)
        order = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))
        parts = [(x[i], None if labels is None else labels[i]) for i in (order[count:], order[:count])]
    (train, train_labels), (test, test_labels) = parts
    return Dataset(train, test, train_labels, test_labels, likelihood, test_data or name)


def fingerprint(dataset: Dataset) -> dict[str, Any]:
    """The shape, dtype and likelihood of the data, and a hash of those from a file: to recognize the data of a run."""
    x = dataset.train
    found = {
        "shape": (len(x) + len(dataset.held_out), *x.shape[1:]),
        "dtype": str(x.dtype).removeprefix("torch."),
        "likelihood": dataset.likelihood,
    }
    if dataset.source not in BUILT_IN:  # those are the same everywhere but for rounding
        content = hashlib.sha256()
        for part in (x, dataset.held_out):
            content.update(part.contiguous().numpy().data)
        found["content"] = content.hexdigest()
    return found


def check_unchanged(dataset: Dataset, before: Mapping[str, Any]) -> None:
    """ValueError where the data are not those whose fingerprint is `before`."""
    changes = [
        key if key == "content" else f"{key} {before.get(key)} -> {value}"
        for key, value in fingerprint(dataset).items()
        if before.get(key) != value
    ]
    if changes:
        raise ValueError(f"data {dataset.source} are not what the run was trained on; changed: {', '.join(changes)}")
