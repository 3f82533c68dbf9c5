"""The data of a run: what they are, and a training and a held-out part."""

import hashlib
import os
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch

from fastelbo import likelihoods
from fastelbo.data.built_in import BUILT_IN
from fastelbo.data.dataset import FILES, Dataset, open_parts
from fastelbo.data.summary import Summary, joined, objection

HELD_OUT = 0.1  # of data that come in one part: the fraction that is held out
UNRESOLVED = 1e-5  # of its mean: a column's deviation, of which float32 leaves two digits


class Split(NamedTuple):
    """Both parts of the data."""

    train: Dataset
    held_out: Dataset
    likelihood: str
    source: str  # the name or the path that it comes from, of the held-out part where they are two
    summary: Summary  # of both; the scale is that of the training part
    contents: list[str]  # the hash of the file, or of each part that comes by itself
    remarks: list[str]  # on what they look like, and what was left out


def _datasets(name: str, argument: str, layer: str | None, remarks: list[str]) -> list[Dataset]:
    """The data of a name or a file, or the two parts of one that is split already."""
    if name in BUILT_IN and argument == "data":
        x, labels = BUILT_IN[name].read()
        dataset = Dataset(x)
        dataset.labels = None if labels is None else labels.numpy()
        return [dataset]
    if Path(name).suffix not in FILES:
        built_in = f"one of {', '.join(BUILT_IN)}, or " if argument == "data" else ""
        raise ValueError(f"{argument} must be {built_in}an .npy, .npz or .h5ad file; got {name!r}")
    with warnings.catch_warnings(record=True, action="always") as caught:
        found = open_parts(name, layer=layer)
    remarks += [str(warning.message) for warning in caught]
    return found


def _decided(
    found: Summary, name: str, likelihood: str | None, fractions: bool, remarks: list[str]
) -> tuple[str, torch.dtype]:
    """The likelihood, and the type of the batches."""
    if found.log_normalized:
        remarks.append(
            f"{name} looks like log-normalized counts: their logarithms have lost what likelihoods of counts need; "
            "--layer NAME takes the counts, if the .h5ad file has them in a layer ('raw' is that of adata.raw)"
        )
    far = (found.std < UNRESOLVED * found.mean.abs()) & (found.std > 1e-12 * found.mean.abs())
    if found.dtype not in ("float32", "float16") and bool(far.any()):
        remarks.append(
            f"{int(far.sum())} columns of {name} vary by less than {UNRESOLVED} of their mean, of which float32 leaves "
            "two digits: subtract an offset first"
        )
    likelihood = likelihood or likelihoods.DEFAULTS[found.domain]
    if (wrong := objection(found, likelihood, fractions)) is not None:
        raise ValueError(f"{name}: {wrong}")
    return likelihood, found.dtype_for(likelihoods.get(likelihood).domain)


def load(
    name: str,
    likelihood: str | None = None,
    *,
    test_data: str | None = None,
    layer: str | None = None,
    fractions: bool = False,
    seed: int = 0,
) -> Split:
    """Load a data set and split it, always in the same way for the same seed: a tenth is held out.

    One pass reads all of it; memory does not grow with a file.

    Args:
        name: "digits" (8 x 8 images in [0, 1], labels), "patches" (8 x 8 patches of photographs, normalized), "counts"
            (generated: see `fastelbo.data.built_in.counts_model`), or the path of a file of
            `fastelbo.data.open_dataset`. An .npz file with x_train and x_test is split as it says.
        likelihood: by default what `fastelbo.data.Summary.domain` says: "bernoulli" for binary data, images of uint8
            (x / 255) and floats in [0, 1], "nb" for counts, "gaussian" for other data.
        test_data: the path of a file of the held-out part; all of `name` is then trained on.
        layer: see `fastelbo.data.open_dataset`.
        fractions: counts may be fractional.
        seed: of the split.

    Raises:
        ValueError, TypeError: an unknown name or likelihood, a damaged file, an array of another type or shape, values
            that are infinite or outside the likelihood's range; an .h5ad file without h5py to read it.
        OSError: no file of that name, or the system cannot read it.
    """
    remarks: list[str] = []
    parts = _datasets(name, "data", layer, remarks)
    if test_data is not None:
        same = Path(test_data).suffix == Path(name).suffix
        parts = [parts[0], _datasets(test_data, "test_data", layer if same else None, remarks)[-1]]
    train, held_out = parts[0], parts[-1]
    if len(parts) == 2:
        both = train.summary(), held_out.summary(torch.empty(0))
        kinds = ["floats" if found.dtype.startswith("float") else "integers" for found in both]
        mixed = kinds[0] != kinds[1] or any(found.image for found in both)
        if held_out.shape[1:] != train.shape[1:] or (
            mixed and both[0].dtype != both[1].dtype and not (both[0].binary and both[1].binary)
        ):
            what = [f"{found.dtype} of shape {found.shape[1:]}" for found in both]
            raise ValueError(f"held-out data must be like the training data, {what[0]}; they are {what[1]}")
        summary, contents = joined(*both), [found.content for found in both]
    else:
        n = len(train)
        if n < 2:
            raise ValueError(f"data must have 2 rows or more, to train on one and hold out another; {name} has {n}")
        count = min(max(round(HELD_OUT * n), 1), n - 1)
        order = torch.randperm(n, generator=torch.Generator().manual_seed(seed))
        index = order[count:], order[:count]
        summary = train.summary(index[0])
        contents = [summary.content]
        # blocks are of neighbours
        train, held_out = (train.subset(i if train.block == 1 else i.sort().values) for i in index)
    likelihood, dtype = _decided(summary, name, likelihood, fractions, remarks)
    train, held_out = train.astype(dtype), held_out.astype(dtype)
    return Split(train, held_out, likelihood, test_data or name, summary, contents, remarks)


def load_all(
    name: str, likelihood: str, before: Mapping[str, Any], *, layer: str | None = None, fractions: bool = False
) -> tuple[Dataset, str]:
    """Every row of a data set and its hash, read in the units of the data whose fingerprint is `before`; of a file that
    is split already, its test part. Raises: as `load`."""
    dataset = _datasets(name, "data", layer, [])[-1]
    found = dataset.summary()
    if before["dtype"] == "uint8" and found.dtype == "uint8":
        found = found._replace(binary=False)  # a dark image
    if before.get("stored", "float32")[:3] in ("int", "uin") and before["dtype"] != "uint8":
        found = found._replace(annotated=True)  # bytes are whole numbers, no pixels
    if before["dtype"] == "bool" and not found.binary:
        raise ValueError(f"data must be 0 and 1 as in training; {name} goes from {found.low:g} to {found.high:g}")
    return dataset.astype(_decided(found, name, likelihood, fractions, [])[1]), found.content


def beside(config: Any, folder: Path) -> dict[str, str]:
    """The files of a run as they lie from its folder: both may move together."""
    names = {name: getattr(config, name, None) for name in ("data", "test_data")}
    return {k: os.path.relpath(v, folder.resolve()) for k, v in names.items() if v is not None and v not in BUILT_IN}


def located(name: str, path: str, saved: Mapping[str, Any], folder: Path) -> str:
    """Where the data of the run in a folder are now: where they were from the folder, or where they were.

    Args:
        name: "data" or "test_data".
        saved: the fingerprint.

    Raises:
        FileNotFoundError: at neither place.
    """
    beside: str | None = saved.get("beside", {}).get(name)
    for place in (os.path.normpath(folder.resolve() / beside), path) if beside else (path,):
        if place in BUILT_IN or Path(place).exists():
            return place
    flag = f"--{name.replace('_', '-')} FILE"
    raise FileNotFoundError(f"the data of the run are no longer at {path}: train --resume {flag} says where they are")


def fingerprint(split: Split) -> dict[str, Any]:
    """The shape, dtype and likelihood of the data, and a hash of those from a file: to recognize the data of a run."""
    found = {
        "shape": split.summary.shape,
        "dtype": str(split.train.dtype).removeprefix("torch."),
        "likelihood": split.likelihood,
        "stored": split.summary.dtype,
    }
    if split.source not in BUILT_IN:  # those are the same everywhere but for rounding
        found |= {"content": split.summary.content, "contents": split.contents}
    return found


def _content(split: Split) -> str:
    """The hash by which earlier versions knew the data."""
    content = hashlib.sha256()
    for part in (split.train, split.held_out):
        for batch in part.batches(1024):
            content.update(batch.numpy().data)
    return content.hexdigest()


def check_unchanged(split: Split, before: Mapping[str, Any]) -> None:
    """ValueError where the data are not those whose fingerprint is `before`."""
    now = {key: value for key, value in fingerprint(split).items() if key not in ("stored", "contents")}
    if "content" in before and "beside" not in before:
        now["content"] = _content(split)
    changes = [
        key if key == "content" else f"{key} {before.get(key)} -> {value}"
        for key, value in now.items()
        if before.get(key) != value
    ]
    if changes:
        raise ValueError(f"data {split.source} are not what the run was trained on; changed: {', '.join(changes)}")
