"""Data sets that need no download, and arrays from files, split into a training and a held-out part."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple
from zipfile import BadZipFile

import torch
from torch import Tensor

from fastelbo import likelihoods

PATCH = 8  # side of an image patch, in pixels


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


def _array(arrays: Mapping[str, Any], path: Path) -> Any:
    """The data among the arrays of an .npz file: the one named x, or the only one besides the labels y."""
    names = [name for name in arrays if name != "y"]
    if "x" not in names and len(names) != 1:
        raise ValueError(f"data must be the array x of {path} where it holds several; it holds {', '.join(names)}")
    return arrays["x" if "x" in names else names[0]]


def _file(path: Path) -> tuple[Tensor, Tensor | None]:
    import numpy as np

    try:
        loaded = np.load(path, allow_pickle=False)
        arrays = {name: loaded[name] for name in loaded.files} if path.suffix == ".npz" else {"x": loaded}
    except (ValueError, EOFError, BadZipFile) as error:
        raise ValueError(f"data cannot be read from {path}: it is no {path.suffix} file of plain arrays") from error
    x, labels = _array(arrays, path), arrays.get("y")
    if x.dtype.kind != "f" and x.dtype not in (np.uint8, np.bool_):
        raise TypeError(f"data must be floating, uint8 or bool; {path} holds {x.dtype}")
    if x.ndim < 2 or len(x) < 2 or x[0].size == 0:
        raise ValueError(f"data must be [N, *event] with N of 2 or more and no empty event; {path} holds {x.shape}")
    if labels is not None and labels.shape != (len(x),):
        raise ValueError(f"labels y must be [{len(x)}]; {path} holds {labels.shape}")
    data = torch.from_numpy(x.astype(np.float32) if x.dtype.kind == "f" else x)
    return data, None if labels is None else torch.from_numpy(labels)


def _check_range(x: Tensor, likelihood: str, missing: bool) -> None:
    if not x.is_floating_point():
        return
    if missing:
        return
    if not x.isfinite().all():
        raise ValueError(f"data must be finite; {int((~x.isfinite()).sum())} of {x.numel()} values are not")
    low, high = float(x.min()), float(x.max())
    if likelihoods.get(likelihood).unit_interval and (low < 0 or high > 1):
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
        held_out: the share of the data that is held out; at least one datum on either side.
        seed: of the split.
        missing: floating data may hold any value, NaN for missing cells too.

    Raises:
        ValueError, TypeError: an unknown name or likelihood, an array of another type or shape, values that are not
            finite or outside the likelihood's range.
        FileNotFoundError: no file of that name.
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
