"""Data sets that need no download, and arrays from files, split into a training and a held-out part."""

import hashlib
import io
import math
import os
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import IO, Any, NamedTuple
from zipfile import ZipFile

import torch
from torch import Tensor

from fastelbo import likelihoods
from fastelbo.commands import files

PATCH = 8  # side of an image patch, in pixels
HEADER = 1 << 16  # bytes; numpy refuses headers of more than 10000
PIECE = 1 << 20  # bytes that are read at a time


class Dataset(NamedTuple):
    """x [N, *event] (float32, uint8 or bool) and, where there are any, labels [N] of both parts."""

    train: Tensor
    held_out: Tensor
    train_labels: Tensor | None
    held_out_labels: Tensor | None
    likelihood: str


def _digits() -> tuple[Tensor, Tensor | None]:
    """1797 handwritten digits of 8 x 8 pixels, in [0, 1]."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    return torch.from_numpy(digits.images).float() / 16, torch.from_numpy(digits.target)


def _patches() -> tuple[Tensor, Tensor | None]:
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


BUILT_IN = {"digits": (_digits, "bernoulli"), "patches": (_patches, "gaussian")}


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

        if 2 * self.bytes > os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"):  # the parts are copies
            raise MemoryError(f"{self.bytes / 1e9:.1f} GB, twice that in use, are more than this machine's memory")
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


def _file(path: Path) -> tuple[Tensor, Tensor | None]:
    import numpy as np

    kind = f"{path.suffix} file of plain arrays"
    labels = None
    with path.open("rb") as file, ExitStack() as stack:
        if path.suffix == ".npz":
            with files.reading(path, kind):
                archive = stack.enter_context(ZipFile(file))
                members = {m.filename.removesuffix(".npy"): m for m in archive.infolist() if m.filename[-4:] == ".npy"}
            wanted = [_chosen(list(members), path), *(name for name in members if name == "y")]
            with files.reading(path, kind):  # no other member is decompressed
                x, *labelled = [_Array(stack.enter_context(archive.open(members[name]))) for name in wanted]
            labels = labelled[0] if labelled else None
        else:
            with files.reading(path, kind):
                x = _Array(file)
        if x.dtype.kind != "f" and x.dtype not in (np.uint8, np.bool_):
            raise TypeError(f"data must be floating, uint8 or bool; {path} holds {x.dtype}")
        if len(x.shape) < 2 or x.shape[0] < 2 or x.bytes == 0:
            raise ValueError(f"data must be [N, *event] with N of 2 or more and no empty event; {path} holds {x.shape}")
        if labels is not None and labels.shape != x.shape[:1]:
            raise ValueError(f"labels y must be [{x.shape[0]}]; {path} holds {labels.shape}")
        if labels is not None and labels.dtype.kind not in "biuf":
            raise TypeError(f"labels y must be numbers; {path} holds {labels.dtype}")
        with files.reading(path, kind), np.errstate(over="ignore", invalid="ignore"):
            array = x.read()
            data = torch.from_numpy(np.asarray(array, np.float32) if x.dtype.kind == "f" else array)
            if labels is None:
                return data, None
            return data, torch.from_numpy(labels.read().astype(np.float64 if labels.dtype.kind == "f" else np.int64))


def _check_range(x: Tensor, likelihood: str, missing: bool) -> None:
    if not x.is_floating_point():
        return
    if missing:
        return
    if not x.isfinite().all():
        raise ValueError(f"data must be finite; {int((~x.isfinite()).sum())} of {x.numel()} values are not")
    low, high = float(x.min()), float(x.max())
    if likelihoods.get(likelihood).domain == "[0, 1]" and (low < 0 or high > 1):
        raise ValueError(
            f"data must lie in [0, 1] for likelihood {likelihood!r}; it goes from {low:.4g} to {high:.4g} "
            "(scale it, store it as uint8, or take likelihood 'gaussian')"
        )


def load(
    name: str, likelihood: str | None = None, *, held_out: float = 0.1, seed: int = 0, missing: bool = False
) -> Dataset:
    """Load a data set and split it, always in the same way for the same seed.

    Args:
        name: "digits" (8 x 8 images in [0, 1], labels), "patches" (8 x 8 patches of photographs, normalized), or
            the path of an .npy or .npz file: an array [N, *event], floating, uint8 (read as x / 255) or bool; of an
            .npz file the array x, and labels y where there are any.
        likelihood: "bernoulli" if None, but "gaussian" for patches and for floating data outside [0, 1].
        held_out: the fraction of the data that is held out; at least one datum on either side.
        seed: of the split.
        missing: floating data may hold any value, NaN for missing cells too.

    Raises:
        ValueError, TypeError: an unknown name or likelihood, a damaged file, an array of another type or shape, values
            that are not finite or outside the likelihood's range.
        OSError: no file of that name, or the system cannot read it.
    """
    if name in BUILT_IN:
        read, default = BUILT_IN[name]
        x, labels = read()
    elif (path := Path(name)).suffix in (".npy", ".npz"):
        x, labels = _file(path)
        inside = not x.is_floating_point() or bool(((x >= 0) & (x <= 1)).all())
        default = "bernoulli" if inside else "gaussian"
    else:
        raise ValueError(f"data must be one of {', '.join(BUILT_IN)}, or an .npy or .npz file; got {name!r}")
    likelihood = default if likelihood is None else likelihood
    _check_range(x, likelihood, missing)

    if not 0 < held_out < 1:
        raise ValueError(f"held_out must lie between 0 and 1; got {held_out}")
    count = min(max(round(held_out * len(x)), 1), len(x) - 1)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))
    test, train = order[:count], order[count:]
    if labels is None:
        return Dataset(x[train], x[test], None, None, likelihood)
    return Dataset(x[train], x[test], labels[train], labels[test], likelihood)


def fingerprint(name: str, dataset: Dataset) -> dict[str, Any]:
    """The shape, dtype and likelihood of the data, and a hash of those from a file: to recognize the data of a run."""
    x = dataset.train
    found = {
        "shape": (len(x) + len(dataset.held_out), *x.shape[1:]),
        "dtype": str(x.dtype).removeprefix("torch."),
        "likelihood": dataset.likelihood,
    }
    if name not in BUILT_IN:  # those are the same everywhere but for rounding
        content = hashlib.sha256()
        for part in (x, dataset.held_out):
            content.update(part.contiguous().numpy().data)
        found["content"] = content.hexdigest()
    return found


def check_unchanged(name: str, dataset: Dataset, before: Mapping[str, Any]) -> None:
    """ValueError where the data are not those whose fingerprint is `before`."""
    now = fingerprint(name, dataset)
    changes = [
        key if key == "content" else f"{key} {before.get(key)} -> {value}"
        for key, value in now.items()
        if before.get(key) != value
    ]
    if changes:
        raise ValueError(f"data {name} are not what the run was trained on; changed: {', '.join(changes)}")
