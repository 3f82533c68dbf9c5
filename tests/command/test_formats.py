"""Files of data as people have them: every format, dtype, shape and form of labels is trained on, or refused with
what to do."""

import json
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, NoReturn
from zlib import crc32

import numpy as np
import pytest
from annotated import write_h5ad
from test_files import SMALL, names, refused

from fastelbo.commands import cli

Random = np.random.Generator
COUNTS = ("nb", "zinb", "poisson")


pytestmark = pytest.mark.usefixtures("no_pictures", "one_thread")

# ----------------------------------------------------------------------------------------------------------------------
# What the numbers are.


class Kind(NamedTuple):
    draw: Callable[[Random, tuple[int, ...]], np.ndarray]
    first: Callable[[np.ndarray], Any]  # row n -> the first number of its event: each row tells what the data are
    likelihood: str  # of plain arrays
    annotated: str | None = None  # of an .h5ad file, where that differs


def whole(low: int, high: int) -> Callable[[Random, tuple[int, ...]], np.ndarray]:
    return lambda numbers, shape: numbers.integers(low, high, shape).astype(float)


def uniform(numbers: Random, shape: tuple[int, ...]) -> np.ndarray:
    return numbers.random(shape)


def normal(numbers: Random, shape: tuple[int, ...]) -> np.ndarray:
    return numbers.standard_normal(shape)


def poisson(numbers: Random, shape: tuple[int, ...]) -> np.ndarray:
    return numbers.poisson(0.7, shape).astype(float)


def with_gaps(draw: Callable[..., np.ndarray], how: str = "cells") -> Callable[[Random, tuple[int, ...]], np.ndarray]:
    """NaN in a fifth of the cells, in all of some rows, or in a whole column."""

    def drawn(numbers: Random, shape: tuple[int, ...]) -> np.ndarray:
        x = draw(numbers, shape)
        if how == "column":
            x[:, -1] = np.nan
        elif how == "rows":
            x[3::7] = np.nan
        else:
            x[numbers.random(shape) < 0.2] = np.nan
        return x

    return drawn


def columns_of_all_scales(numbers: Random, shape: tuple[int, ...]) -> np.ndarray:
    return normal(numbers, shape) * np.geomspace(1e-6, 1e6, shape[-1])


BITS = Kind(whole(0, 2), lambda n: n % 2, "bernoulli")
UNIT = Kind(uniform, lambda n: (1 + n % 7) / 8, "bernoulli")
REALS = Kind(normal, lambda n: 2.5 + n % 3, "gaussian")
ZEROS = Kind(lambda _, shape: np.zeros(shape), lambda n: 0, "bernoulli")
IMAGE = Kind(whole(0, 256), lambda n: 2 + n % 200, "bernoulli", "nb")
INTEGERS = Kind(poisson, lambda n: 2 + n % 5, "nb")
WHOLE = Kind(poisson, lambda n: 2 + n % 5, "gaussian", "nb")
NEGATIVE = Kind(whole(-5, 6), lambda n: -1 - n % 3, "gaussian")
FRACTIONS = Kind(lambda numbers, shape: numbers.exponential(2, shape), lambda n: 2.5 + n % 3, "gaussian")
KINDS = {
    "image": IMAGE,
    "bits": BITS,
    "zeros": ZEROS,
    "counts": INTEGERS,
    "negative": NEGATIVE,
    "unit": UNIT,
    "reals": REALS,
    "whole": WHOLE,
    "fractions": FRACTIONS,
    "far": Kind(lambda *of: 1e4 * normal(*of) + 1e5, lambda n: 1e5 + n, "gaussian"),
    "scales": Kind(columns_of_all_scales, lambda n: -1e-6 * (1 + n % 3), "gaussian"),
    "gaps": REALS._replace(draw=with_gaps(normal)),
    "gaps_rows": REALS._replace(draw=with_gaps(normal, "rows"), first=lambda n: np.where(n % 7 == 3, np.nan, 2.5)),
    "gaps_column": REALS._replace(draw=with_gaps(normal, "column")),
    "gaps_unit": UNIT._replace(draw=with_gaps(uniform)),
    "gaps_bits": BITS._replace(draw=with_gaps(whole(0, 2))),
    "gaps_whole": WHOLE._replace(draw=with_gaps(poisson)),
}
TYPES = {
    "image": ["u1"],
    "bits": ["?", "u1", "i1", "i4", "i8", "u2", "f2", "f4", "f8", ">f4", ">i4"],
    "zeros": ["f4", "i8"],
    "counts": ["i8", "i4", "u2", "u8", ">i2"],
    "negative": ["i4", "i1", "i8", "f4"],
    "unit": ["f4", "f8", "f2", ">f4"],
    "reals": ["f4", "f8", "f2", ">f4"],
    "whole": ["f4", "f8", "f2", ">f4"],
    "fractions": ["f4"],
    "far": ["f8", "f4"],
    "scales": ["f8", "f4"],
    "gaps": ["f4", "f8", "f2", ">f4"],
    "gaps_rows": ["f4"],
    "gaps_column": ["f4"],
    "gaps_unit": ["f4", "f2"],
    "gaps_bits": ["f4"],
    "gaps_whole": ["f4"],
}


def array(kind: str, dtype: str, shape: tuple[int, ...]) -> np.ndarray:
    numbers = np.random.default_rng(crc32(f"{kind} {shape}".encode()))
    x = KINDS[kind].draw(numbers, shape)
    x.reshape(len(x), -1)[:, 0] = KINDS[kind].first(np.arange(len(x)))
    return x.astype(dtype)


# ----------------------------------------------------------------------------------------------------------------------
# Which file holds them.

LABELS: dict[str, Callable[[int], np.ndarray]] = {
    "numbers": lambda n: np.arange(n) % 10,
    "floats": lambda n: np.arange(n) / 4,
    "bool": lambda n: np.arange(n) % 2 == 0,
    "column": lambda n: np.arange(n)[:, None] % 10,
    "strings": lambda n: np.array([f"type {i % 3}" for i in range(n)]),
    "bytes": lambda n: np.array([f"type {i % 3}".encode() for i in range(n)]),
    "one_hot": lambda n: np.eye(10, dtype=np.float32)[np.arange(n) % 10],
    "objects": lambda n: np.array([f"type {i % 3}" for i in range(n)], object),
    "too_few": lambda n: np.arange(n - 1),
    "gaps": lambda n: np.where(np.arange(n) % 3 == 0, np.nan, 1.0),
    "complex": lambda n: np.arange(n) * 1j,
}
LEFT_OUT = {"objects", "too_few", "complex"}
HELD_OUT = 5  # rows of x_test, in a file that is split already


def write_archive(save: Callable[..., None], split: bool, path: Path, x: np.ndarray, labels: str | None) -> None:
    parts = {"_train": x, "_test": x[:HELD_OUT]} if split else {"": x}
    arrays = {f"x{part}": values for part, values in parts.items()}
    if labels is not None:
        arrays |= {f"y{part}": LABELS[labels](len(values)) for part, values in parts.items()}
    save(path, **arrays)


def write_layer(path: Path, x: np.ndarray, _: str | None) -> None:
    """x as the layer "counts", beside a matrix X of other values."""
    write_h5ad(path, np.random.default_rng(0).standard_normal(x.shape), layers={"other": -x.astype(float), "counts": x})


def annotated(path: Path, x: np.ndarray, _: str | None, **options: Any) -> None:
    write_h5ad(path, x, **options)


FORMATS: dict[str, tuple[str, Callable[[Path, np.ndarray, str | None], None], list[str]]] = {
    "npy": (".npy", lambda path, x, _: np.save(path, x), []),
    "fortran": (".npy", lambda path, x, _: np.save(path, np.asfortranarray(x)), []),
    "npz": (".npz", partial(write_archive, np.savez, False), []),
    "npz_compressed": (".npz", partial(write_archive, np.savez_compressed, False), []),
    "npz_split": (".npz", partial(write_archive, np.savez, True), []),
    "h5ad_dense": (".h5ad", partial(annotated, layout="dense"), []),
    "h5ad_dense_gzip": (".h5ad", partial(annotated, layout="dense", compression="gzip"), []),
    "h5ad_csr": (".h5ad", partial(annotated, layout="csr"), []),
    "h5ad_csr_gzip": (".h5ad", partial(annotated, layout="csr", compression="gzip", chunks=(7,)), []),
    "h5ad_csc": (".h5ad", partial(annotated, layout="csc"), []),
    "h5ad_layer": (".h5ad", write_layer, ["--layer", "counts"]),
}


# ----------------------------------------------------------------------------------------------------------------------
# The cases.


class Case(NamedTuple):
    format: str
    kind: str
    dtype: str
    shape: tuple[int, ...] = (40, 5)
    labels: str | None = None
    options: tuple[str, ...] = ()
    expected: str | None = None  # the likelihood; by default the data decide
    message: str | None = None  # of the refusal: it contains the way out
    rows: bool = False  # evaluate the whole file, and one row of it, too

    @property
    def id(self) -> str:
        shape = "x".join(map(str, self.shape))
        dtype = self.dtype.replace(">", "be_").replace("?", "bool")
        rest = [self.labels and f"labels_{self.labels}", *(option.strip("-") for option in self.options)]
        return "-".join([self.format, self.kind, dtype, shape, *filter(None, rest)])

    @property
    def likelihood(self) -> str:
        kind = KINDS[self.kind]
        decided = kind.annotated if self.format.startswith("h5ad") and kind.annotated else kind.likelihood
        return self.expected or decided


def cases() -> dict[str, Case]:
    every = [(kind, dtype) for kind, dtypes in TYPES.items() for dtype in dtypes]
    few = [("image", "u1"), ("bits", "?"), ("counts", "i8"), ("unit", "f4"), ("reals", "f4"), ("gaps", "f8")]
    found = [Case(name, *each, rows=name in ("npy", "h5ad_csr")) for name in ("npy", "h5ad_csr") for each in every]
    found += [Case(name, *each) for name in FORMATS if name not in ("npy", "h5ad_csr") for each in few]
    found += [Case("h5ad_dense", "bits", dtype) for dtype in TYPES["bits"][1:]]
    found += [Case("h5ad_csc", "whole", dtype, rows=True) for dtype in TYPES["whole"]]
    found += [Case("h5ad_dense", "whole", "f4", rows=True), Case("npz", "whole", "f4", rows=True)]

    images = [(40, 6, 5), (40, 8, 8, 3), (40, 3, 8, 8), (40, 1, 8, 8), (2, 6, 5), (2, 8, 8, 3), (2, 3, 8, 8)]
    for shape in [(2, 5), (40, 1), (2, 1), *images]:
        found += [Case("npy", *each, shape) for each in few[:5]]
        found += [Case(name, *few[len(shape) % 2 * 4], shape) for name in ("fortran", "npz_split")]
        if len(shape) == 2:
            names = ("h5ad_dense", "h5ad_csr", "h5ad_csc")
            found += [Case(name, *each, shape, rows=True) for name in names for each in few[2:5:2]]
    convolutions = ("--net", "conv")
    found += [
        Case("npy", "image", "u1", (40, *event), options=convolutions) for event in [(8, 8), (8, 8, 3), (3, 8, 8)]
    ]
    found += [Case("npy", "reals", "f4", (40, *event), options=convolutions) for event in [(8, 8, 1), (1, 8, 8)]]

    for labels in LABELS:
        found += [Case("npz", *each, labels=labels) for each in (few[0], few[4])]
        found += [Case("npz_split", "image", "u1", (40, 8, 8), labels=labels)]

    def chosen(likelihood: str, *others: str) -> dict[str, Any]:
        return {"options": ("--likelihood", likelihood, *others), "expected": likelihood}

    found += [
        Case("npy", "image", "u1", **chosen("nb")),
        Case("npy", "image", "u1", **chosen("gaussian")),
        Case("npy", "counts", "i8", **chosen("gaussian")),
        Case("npy", "bits", "i8", **chosen("nb")),
        Case("npy", "bits", "f4", **chosen("gaussian")),
        Case("npy", "whole", "f4", **chosen("poisson")),
        Case("npy", "gaps", "f4", **chosen("laplace")),
        Case("npy", "far", "f8", **chosen("laplace")),
        Case("h5ad_csr", "counts", "i8", **chosen("zinb")),
        Case("h5ad_csr", "whole", "f4", **chosen("gaussian")),
        Case("npy", "reals", "f4", **chosen("bernoulli"), message="gaussian"),
        Case("npy", "negative", "i4", **chosen("nb"), message="gaussian"),
        Case("h5ad_csr", "reals", "f4", **chosen("poisson"), message="gaussian"),
        Case("npy", "reals", "f4", **chosen("nb", "--fractions"), message="gaussian"),
    ]
    for name in ("npy", "h5ad_csr"):
        found += [Case(name, "fractions", "f4", **chosen(each), message="--fractions") for each in COUNTS]
        found += [Case(name, "fractions", "f4", **chosen(each, "--fractions")) for each in COUNTS]
    found += [Case("npy", "unit", "f4", **chosen("nb"), message="--fractions")]
    by_id = {case.id: case for case in found}
    assert len(by_id) == len(found)
    return by_id


CASES = cases()


# ----------------------------------------------------------------------------------------------------------------------


def strict(text: str) -> Any:
    """JSON as the standard has it."""

    def constant(name: str) -> NoReturn:
        raise AssertionError(f"{name} is no JSON")

    return json.loads(text, parse_constant=constant)


def train(path: Path, out: Path, *options: object) -> int:
    small = ["--epochs", 1, *SMALL, *options]
    return cli.main([str(each) for each in ("train", "--data", path, *small, "--out", out)])


def evaluated(capsys, *arguments: object) -> dict[str, Any]:
    capsys.readouterr()
    assert cli.main([str(each) for each in ("evaluate", *arguments, "--samples", 3, "--json")]) == 0
    return strict(capsys.readouterr().out)


def refused_training(capsys, path: Path, message: str, *options: object) -> None:
    """In one line that contains the way out, before anything is written."""
    before = names(path.parent)
    error = refused(capsys, "train", "--data", path, "--epochs", 1, *SMALL, *options, "--out", path.parent / "run")
    assert re.search(message, error) and not re.search("Traceback|Error:", error), error
    assert names(path.parent) == before


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_files_as_people_have_them(tmp_path, capsys, case):
    suffix, write, options = FORMATS[case.format]
    path, out = tmp_path / f"x{suffix}", tmp_path / "run"
    x = array(case.kind, case.dtype, case.shape)
    write(path, x, case.labels)
    if case.message is not None:
        refused_training(capsys, path, case.message, *options, *case.options)
        return
    assert train(path, out, *options, *case.options) == 0
    said = "".join(capsys.readouterr())
    assert "log-normalized" not in said and (case.labels not in LEFT_OUT or "labels" in said), said
    assert strict((out / "config.json").read_text())["likelihood"] == case.likelihood
    found = evaluated(capsys, out)
    held_out = HELD_OUT if case.format == "npz_split" else max(len(x) // 10, 1)
    held_out = min(held_out, len(x))
    assert found["rows"] == held_out and isinstance(found["log_prob"], float)
    if held_out == 1:
        assert found["data_error"] is None and found["active_units"] is None
    if case.rows:
        whole = evaluated(capsys, out, "--data", path)
        assert whole["rows"] == len(x) and whole["data"] == str(path) and isinstance(whole["data_error"], float)
        row = tmp_path / f"row{suffix}"
        write(row, x[:1], None)
        one = evaluated(capsys, out, "--data", row)
        assert one["rows"] == 1 and one["data"] == str(row) and isinstance(one["log_prob"], float)
        assert one["data_error"] is None and one["active_units"] is None


def infinite(dtype: str, value: float = np.inf) -> np.ndarray:
    x = array("reals", dtype, (40, 5))
    x[7, 2] = value
    return x


def dense(x: np.ndarray | None, **options: Any) -> Callable[[Path], None]:
    return lambda path: write_h5ad(path, x, layout="dense", **options)


def csr(x: np.ndarray) -> Callable[[Path], None]:
    return lambda path: write_h5ad(path, x)


def plain(x: np.ndarray) -> Callable[[Path], None]:
    """As the suffix says."""
    return lambda path: np.save(path, x) if path.suffix == ".npy" else np.savez(path, x=x)


NUMBERS, ROWS, EVENTS, FINITE = (
    r"float|integer|number",
    r"\b(2|two) (rows )?or more|at least (2|two)",
    r"\[N, ",
    r"finite",
)
X = array("reals", "f4", (40, 5))
STRINGS = np.array([["a", "b"]] * 40)
REFUSED: dict[str, tuple[Callable[[Path], None], str]] = {
    "objects.npy": (plain(X.astype(object)), NUMBERS),
    "objects.npz": (plain(X.astype(object)), NUMBERS),
    "complex.npy": (plain(X * 1j), NUMBERS),
    "complex.npz": (plain(X * 1j), NUMBERS),
    "complex.h5ad": (dense(X * 1j), NUMBERS),
    "strings.npy": (plain(STRINGS), NUMBERS),
    "strings.npz": (plain(STRINGS), NUMBERS),
    "strings.h5ad": (dense(STRINGS), NUMBERS),
    "bytes.npy": (plain(STRINGS.astype("S")), NUMBERS),
    "dates.npy": (plain(np.arange(80).reshape(40, 2).astype("M8[D]")), NUMBERS),
    "dates.npz": (plain(np.arange(80).reshape(40, 2).astype("M8[D]")), NUMBERS),
    "durations.npy": (plain(np.arange(80).reshape(40, 2).astype("m8[s]")), NUMBERS),
    "structured.npy": (plain(np.zeros((40, 1), [("a", "f4"), ("b", "i8")])), NUMBERS),
    "structured.npz": (plain(np.zeros((40, 1), [("a", "f4"), ("b", "i8")])), NUMBERS),
    "no_rows.npy": (plain(X[:0]), ROWS),
    "no_rows.npz": (plain(X[:0]), ROWS),
    "no_rows.h5ad": (csr(X[:0]), ROWS),
    "one_row.npy": (plain(X[:1]), ROWS),
    "one_row.npz": (plain(X[:1]), ROWS),
    "one_row.h5ad": (csr(X[:1]), ROWS),
    "one_row_dense.h5ad": (dense(X[:1]), ROWS),
    "flat.npy": (plain(X[:, 0]), EVENTS),
    "flat.npz": (plain(X[:, 0]), EVENTS),
    "scalar.npy": (plain(X[0, 0]), EVENTS),
    "no_columns.npy": (plain(X[:, :0]), r"empty|" + EVENTS),
    "no_columns.npz": (plain(X[:, :0]), r"empty|" + EVENTS),
    "no_columns.h5ad": (csr(X[:, :0]), r"empty|" + EVENTS),
    "no_pixels.npy": (plain(np.zeros((40, 8, 0), np.uint8)), r"empty|" + EVENTS),
    "inf_f4.npy": (plain(infinite("f4")), FINITE),
    "inf_f2.npy": (plain(infinite("f2")), FINITE),
    "inf_f8.npy": (plain(infinite("f8", -np.inf)), FINITE),
    "inf_big_endian.npy": (plain(infinite(">f4")), FINITE),
    "inf.npz": (plain(infinite("f4")), FINITE),
    "inf_dense.h5ad": (dense(infinite("f4")), FINITE),
    "inf_csr.h5ad": (csr(infinite("f4")), FINITE),
    "inf_csc.h5ad": (lambda path: write_h5ad(path, infinite("f8"), layout="csc"), FINITE),
    "layers_alone.h5ad": (dense(None, layers={"counts": X}), r"--layer.*\bcounts|counts\b.*--layer"),
    "several.npz": (lambda path: np.savez(path, a=X, b=X), r"\bx\b.*a, b"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_files_that_are_refused(tmp_path, capsys, name):
    write, message = REFUSED[name]
    write(tmp_path / name)
    refused_training(capsys, tmp_path / name, f"(?=.*{re.escape(name)})(?=.*({message}))")


def test_layers_that_are_not_there(tmp_path, capsys):
    write_h5ad(tmp_path / "x.h5ad", X, layers={"spliced": X, "unspliced": X})
    refused_training(capsys, tmp_path / "x.h5ad", r"spliced, unspliced", "--layer", "counts")
    write_h5ad(tmp_path / "none.h5ad", X)
    refused_training(capsys, tmp_path / "none.h5ad", "layer", "--layer", "counts")
    np.save(tmp_path / "x.npy", X)
    refused_training(capsys, tmp_path / "x.npy", r"layer.*\.h5ad", "--layer", "counts")


@pytest.mark.parametrize("format", ["npy", "npz", "h5ad_dense", "h5ad_csr", "h5ad_csc"])
@pytest.mark.parametrize("dtype", ["f4", "f8"])
def test_log_normalized_counts_are_recognized(tmp_path, capsys, format, dtype):
    """They are modelled as they stand; the layer of the counts is a flag away."""
    numbers = np.random.default_rng(0)
    counts = numbers.poisson(0.2, (60, 50))
    counts[:, 0] += 1 + np.arange(60) % 4
    x = np.log1p(counts / counts.sum(1, keepdims=True) * 1e4).astype(dtype)
    suffix, write, _ = FORMATS[format]
    path = tmp_path / f"x{suffix}"
    if suffix == ".h5ad":
        write_h5ad(path, x, layers={"counts": counts}, raw=x, layout=format.removeprefix("h5ad_"))
    else:
        write(path, x, None)
    assert train(path, tmp_path / "run") == 0
    said = capsys.readouterr().out
    assert "log-normalized counts" in said and "--layer" in said
    assert strict((tmp_path / "run/config.json").read_text())["likelihood"] == "gaussian"
    if suffix == ".h5ad":
        assert train(path, tmp_path / "counts", "--layer", "counts") == 0
        assert "log-normalized" not in capsys.readouterr().out
        assert strict((tmp_path / "counts/config.json").read_text())["likelihood"] == "nb"


def test_held_out_data_of_a_file_of_their_own(tmp_path, capsys):
    """After --test-data that file is what evaluate takes by default: every row, and be it one."""
    for n, size in enumerate((1, 7)):
        np.save(tmp_path / "x.npy", X)
        np.save(tmp_path / "test.npy", X[:size])
        assert train(tmp_path / "x.npy", tmp_path / f"{n}", "--test-data", tmp_path / "test.npy") == 0
        found = evaluated(capsys, tmp_path / f"{n}")
        assert found["rows"] == size and found["data"] == str(tmp_path / "test.npy")
        assert (found["data_error"] is None) == (size == 1)
        assert cli.main(["evaluate", str(tmp_path / f"{n}"), "--samples", "3"]) == 0
        assert not re.search(r"\bnan\b|\binf\b|None", capsys.readouterr().out)
