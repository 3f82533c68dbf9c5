"""Rows of files and arrays as tensors: the same rows whatever the format, in memory that does not grow, and what one
pass finds of them."""

import pickle
import subprocess
import sys
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from annotated import write_h5ad
from numpy.typing import NDArray
from scipy import sparse
from torch.utils.data import DataLoader

from fastelbo import PPCA, reference
from fastelbo.commands import data
from fastelbo.data import Dataset, dataset, files, open_dataset, rows
from fastelbo.data.built_in import BUILT_IN, counts_model

N, D = 300, 7
X = np.random.default_rng(0).poisson(0.6, (N, D)).astype(np.float32)

Write = Callable[[Path, NDArray], object]


def _csr(compression: str | None = None, chunks: tuple[int, ...] | None = None, layout: str = "csr") -> Write:
    return lambda path, x: write_h5ad(path, x, layout=layout, compression=compression, chunks=chunks)


FORMATS: dict[str, tuple[str, Write]] = {
    "npy": (".npy", np.save),
    "fortran": (".npy", lambda path, x: np.save(path, np.asfortranarray(x))),
    "npz": (".npz", lambda path, x: np.savez(path, x=x, other=np.zeros(3))),
    "npz compressed": (".npz", lambda path, x: np.savez_compressed(path, x=x)),
    "scipy": (".npz", lambda path, x: sparse.save_npz(path, sparse.csr_matrix(x))),
    "dense": (".h5ad", _csr(layout="dense")),
    "dense chunks": (".h5ad", _csr(layout="dense", chunks=(40, 3))),
    "dense gzip": (".h5ad", _csr("gzip", (40, 3), "dense")),
    "csr": (".h5ad", _csr()),
    "csr chunks": (".h5ad", _csr(chunks=(50,))),
    "csr gzip": (".h5ad", _csr("gzip", (50,))),
    "csc": (".h5ad", _csr(layout="csc")),
    "csc gzip": (".h5ad", _csr("gzip", (50,), "csc")),
}
BLOCKS = {"fortran": 100, "dense chunks": 40, "dense gzip": 40, "csr gzip": 15}  # of large files


@pytest.fixture(params=FORMATS)
def file(request, tmp_path) -> tuple[str, Path]:
    suffix, write = FORMATS[request.param]
    write(tmp_path / f"x{suffix}", X)
    return request.param, tmp_path / f"x{suffix}"


@pytest.fixture(params=["small", "large"])
def large(request, monkeypatch) -> bool:
    """What is read whole, and what is mapped or read by blocks; every piece and window is small then."""
    if request.param == "large":
        monkeypatch.setattr(files, "WHOLE", 0)
        monkeypatch.setattr(rows, "PIECE_ELEMENTS", 40)
        monkeypatch.setattr("fastelbo.data.annotated.TRANSPOSED", 64)
        monkeypatch.setattr(dataset, "WINDOW", 100 * D * 4)
    return request.param == "large"


def test_every_format_gives_the_same_rows(file, large):
    kind, path = file
    found = open_dataset(path)
    index = np.random.default_rng(1).permutation(N)[:90]
    assert found.shape == (N, D) and len(found) == N and found.dtype == torch.float32
    assert np.array_equal(found[:], X) and np.array_equal(found[index], X[index]) and np.array_equal(found[4], X[4])
    assert np.array_equal(found[torch.tensor([2, 2, -1])], X[[2, 2, -1]]) and np.array_equal(found[30:4:-7], X[30:4:-7])
    assert np.array_equal(found[X[:, 0] > 1], X[X[:, 0] > 1]) and found[5:5].shape == (0, D)
    with pytest.raises(IndexError, match="index must be of 300 rows; got 300"):
        found[N]
    some = found.subset(index).subset(torch.arange(0, 90, 2))
    assert np.array_equal(some[:], X[index][::2]) and np.array_equal(some[3:9], X[index][::2][3:9])
    assert np.array_equal(torch.cat(list(some.batches(8))), some[:])
    assert np.array_equal(found.astype(torch.int16)[:], X.astype(np.int16))
    assert found.block == (BLOCKS.get(kind, 1) if large else 1)
    assert np.array_equal(pickle.loads(pickle.dumps(some))[:], some[:])


def test_shuffled_reading(file, large):
    _, path = file
    found = open_dataset(path).subset(np.arange(3, N, 2))
    order = found.order(torch.Generator().manual_seed(0))
    assert sorted(order.tolist()) == list(range(len(found))) and order.tolist() != list(range(len(found)))
    assert torch.equal(order, found.order(torch.Generator().manual_seed(0)))
    if found.block == 1:  # as the command has always shuffled
        assert torch.equal(order, torch.randperm(len(found), generator=torch.Generator().manual_seed(0)))
    batches = found.batches(32, order)
    for _ in range(2):
        read = list(batches)
        assert [len(batch) for batch in read] == [32, 32, 32, 32, 21] and len(batches) == 5
        assert np.array_equal(torch.cat(read), found[order])


def test_blocks_are_shuffled_within_windows(tmp_path, monkeypatch):
    """Each window is of whole blocks, and the rows of a block do not stay together."""
    monkeypatch.setattr(files, "WHOLE", 0)
    monkeypatch.setattr(dataset, "WINDOW", 3 * 15 * D * 4)
    FORMATS["csr gzip"][1](tmp_path / "x.h5ad", X)
    found = open_dataset(tmp_path / "x.h5ad")
    order = found.order(torch.Generator().manual_seed(0))
    for window in order.split(45):
        blocks = (window // 15).unique()
        assert len(blocks) <= 4 and (window.diff().abs() == 1).double().mean() < 0.2
    assert len((order // 15)[:45].unique()) == 3


def test_a_loader_takes_it(file, large):
    _, path = file
    found = open_dataset(path)
    assert np.array_equal(torch.cat(list(DataLoader(found, 64))), X)
    assert np.array_equal(torch.cat(list(DataLoader(found, 64, num_workers=1, multiprocessing_context="fork"))), X)


def test_ppca_is_fitted_in_a_stream(file, large, monkeypatch):
    monkeypatch.setattr("fastelbo.ppca.data.PIECE_ELEMENTS", 50 * D)
    expected, found = PPCA(2).fit(torch.from_numpy(X)), PPCA(2).fit(open_dataset(file[1]))
    torch.testing.assert_close(found.W @ found.W.mT, expected.W @ expected.W.mT)
    assert found.score(open_dataset(file[1])) == pytest.approx(expected.score(torch.from_numpy(X)), rel=1e-5)
    assert found.bic(open_dataset(file[1])) == pytest.approx(expected.bic(torch.from_numpy(X)), rel=1e-5)


def test_memory_does_not_grow_with_the_file(tmp_path):
    """40 MB of .npy, and a sparse matrix of 1.6 GB if it were dense: batches, one pass and a shuffled one."""
    numbers = np.random.default_rng(0)
    np.save(tmp_path / "x.npy", numbers.random((10_000, 1000), dtype=np.float32))
    write_h5ad(tmp_path / "x.h5ad", sparse.random(20_000, 20_000, 1e-4, format="csr", dtype=np.float32, rng=numbers))
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(files, "WHOLE", 0)
        for name in ("x.npy", "x.h5ad"):
            tracemalloc.start()
            found = open_dataset(tmp_path / name)
            found.summary(np.arange(0, len(found), 2))
            for number, batch in enumerate(found.batches(64, found.order())):
                assert batch.shape == (64, found.shape[1])
                if number == 20:
                    break
            assert tracemalloc.get_traced_memory()[1] < 30e6, name
            tracemalloc.stop()


def test_entries_that_are_stored_twice_count_as_their_sum(tmp_path):
    """And zeros that are stored as zeros; the hash is that of the same matrix in order."""
    plain = sparse.csr_matrix(([2.0, 3.0, 1.0], ([0, 0, 2], [1, 4, 0])), (3, 5))
    with h5py.File(tmp_path / "x.h5ad", "w") as file:
        group = file.create_group("X")
        group.attrs["encoding-type"], group.attrs["shape"] = "csr_matrix", (3, 5)
        group["indptr"], group["data"] = [0, 4, 4, 5], np.array([3, 1, 0, 1, 1], np.float32)
        group["indices"] = np.array([4, 1, 2, 1, 0], np.int32)
    found, expected = open_dataset(tmp_path / "x.h5ad"), Dataset(plain.astype(np.float32))
    assert np.array_equal(found[:], plain.toarray()) and np.array_equal(expected[:], plain.toarray())
    assert found.summary().high == 3 and not found.summary().binary
    assert found.summary().content == expected.summary().content
    assert np.allclose(found.summary().mean, plain.toarray().mean(0))


@pytest.mark.parametrize("large", [False, True])
def test_columns_whose_rows_are_in_no_order(tmp_path, monkeypatch, large):
    """By columns too, an entry keeps its value, and zeros that are stored change nothing."""
    monkeypatch.setattr(files, "WHOLE", 0 if large else 1 << 28)
    with h5py.File(tmp_path / "x.h5ad", "w") as file:
        group = file.create_group("X")
        group.attrs["encoding-type"], group.attrs["shape"] = "csc_matrix", (4, 2)
        group["indptr"], group["indices"] = [0, 3, 5], np.array([3, 0, 1, 2, 1], np.int32)
        group["data"] = np.array([5, 7, 0, 2, 9], np.float32)
    expected = np.array([[7, 0], [0, 9], [0, 2], [5, 0]], np.float32)
    found = open_dataset(tmp_path / "x.h5ad")
    for _ in range(2):  # a summary leaves what is in memory as it was
        assert np.array_equal(found[:], expected) and np.array_equal(found[[3, 0]], expected[[3, 0]])
        assert found.summary().high == 9 and np.allclose(found.summary().mean, expected.mean(0))
    matrix = sparse.csr_matrix((np.array([1.0, 2.0]), np.array([1, 0]), np.array([0, 2])), (1, 2))
    Dataset(matrix).summary()
    assert matrix.indices.tolist() == [1, 0], "nor is the caller's matrix changed"


def test_a_chunk_larger_than_a_window(tmp_path, monkeypatch):
    """What is made dense at a time stays small."""
    monkeypatch.setattr(files, "WHOLE", 0)
    monkeypatch.setattr(dataset, "WINDOW", 50 * D * 4)
    for layout, chunks in (("csr", (1_000,)), ("dense", (N, D))):
        path = tmp_path / f"{layout}.h5ad"
        write_h5ad(path, X, layout=layout, compression="gzip", chunks=chunks)
        found = open_dataset(path)
        assert found.block == 50
        order = found.order(torch.Generator().manual_seed(0))
        assert np.array_equal(torch.cat(list(found.batches(16, order))), X[order])
        assert np.array_equal(torch.cat(list(found.batches(16))), X)


def test_blocks_of_a_subset_are_those_of_the_file(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "WHOLE", 0)
    monkeypatch.setattr(dataset, "WINDOW", 40 * D * 4)
    write_h5ad(tmp_path / "x.h5ad", X, layout="dense", compression="gzip", chunks=(40, D))
    numbers = np.flatnonzero(np.random.default_rng(0).random(N) < 0.8)
    found = open_dataset(tmp_path / "x.h5ad").subset(numbers)
    order = found.order(torch.Generator().manual_seed(0))
    assert sorted(order.tolist()) == list(range(len(numbers)))
    blocks = [np.unique(numbers[window] // 40) for window in order.split(40)]
    assert sum(map(len, blocks)) <= 2 * 8, "a block is in two windows at most"


def test_a_last_row_without_values_at_the_end_of_a_page(tmp_path):
    data_, ends = np.ones(1024, np.float32), np.array([0, 1024, 1024])
    data_.tofile(tmp_path / "data")
    mapped = np.memmap(tmp_path / "data", np.float32, "r")
    found = rows.Sparse(mapped, np.arange(1024), ends, 1024)
    found.ask(np.array([0, 1]))
    assert found.read(np.array([1, 0])).sum(1).tolist() == [0, 1024]


@pytest.mark.parametrize("large", [False, True])
def test_a_matrix_in_another_file(tmp_path, monkeypatch, large):
    monkeypatch.setattr(files, "WHOLE", 0 if large else 1 << 28)
    write_h5ad(tmp_path / "x.h5ad", X, layout="dense")
    with h5py.File(tmp_path / "link.h5ad", "w") as file:
        file["X"] = h5py.ExternalLink("x.h5ad", "X")
        file["pad"] = np.full(10_000, 7.0, np.float32)
    assert np.array_equal(open_dataset(tmp_path / "link.h5ad")[:], X)


def test_a_file_that_is_open_elsewhere(tmp_path):
    """In another process, that may write, and in this one."""
    path = tmp_path / "x.h5ad"
    write_h5ad(path, X)
    with h5py.File(path, "r"):
        assert np.array_equal(open_dataset(path)[:], X)
    opened = "import h5py, sys; file = h5py.File(sys.argv[1], 'a'); print(1, flush=True); input()"
    command = [sys.executable, "-c", opened, str(path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdout.readline() == b"1\n"
        assert np.array_equal(open_dataset(path)[:], X)
        other.communicate(b"\n")


@pytest.mark.parametrize("kind", ["csr", "csc", "coo", "dia", "bsr"])
def test_every_matrix_of_scipy(tmp_path, kind):
    sparse.save_npz(tmp_path / "x.npz", sparse.csr_matrix(X).asformat(kind))
    assert np.array_equal(open_dataset(tmp_path / "x.npz")[:], X)
    assert np.array_equal(Dataset(sparse.csr_matrix(X).asformat(kind))[[3, 1]], X[[3, 1]])


def test_batches_are_the_caller_s_own():
    x = torch.ones(6, 2)
    for batch in Dataset(x).batches(4):
        batch.zero_()
    assert x.sum() == 12
    with pytest.raises(ValueError, match="size must be at least 1; got 0"):
        Dataset(x).batches(0)
    with pytest.raises(IndexError, match="index must be of 6 rows"):
        Dataset(x)[[0, -7]]
    assert Dataset(x.bfloat16())[0].dtype == torch.float32 and Dataset(x)[torch.tensor(3)].shape == (2,)
    with pytest.raises(ValueError, match="summary is of all rows"):
        Dataset(x).subset([0, 1]).summary()


def test_a_ppca_of_counts(tmp_path):
    """Bytes of an .h5ad file are counts, those of an array are pixels."""
    write_h5ad(tmp_path / "x.h5ad", X.astype(np.uint8))
    expected = PPCA(2).fit(torch.from_numpy(X)).W
    for found in (open_dataset(tmp_path / "x.h5ad"), Dataset(X.astype(np.int64))):
        torch.testing.assert_close(PPCA(2).fit(found).W.abs(), expected.abs(), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(PPCA(2).fit(Dataset(X.astype(np.uint8))).W.abs(), expected.abs() / 255)


# ----------------------------------------------------------------------------------------------------------------------
# The summary.


@pytest.mark.parametrize("scaled", [None, np.arange(0, N, 3)], ids=["all", "some"])
@pytest.mark.parametrize("gaps", [False, True])
def test_one_pass_finds_what_numpy_finds(file, large, scaled, gaps):
    kind, path = file
    x = np.where(X == 1, 1e5 + np.float32(0.25), X)
    if gaps:
        x[np.random.default_rng(2).random(x.shape) < 0.1] = np.nan
        x[3, 2] = np.inf
    FORMATS[kind][1](path, x)
    found = open_dataset(path).summary(scaled)
    there = np.isfinite(x)
    assert (found.shape, found.dtype) == ((N, D), "float32")
    assert (found.low, found.high) == (0, 1e5 + 0.25) and not found.whole and not found.binary
    assert found.missing == np.isnan(x).sum() and found.infinite == gaps
    part = np.where(there, x, np.nan).astype(np.float64)[slice(None) if scaled is None else scaled]
    assert np.array_equal(found.cells, (~np.isnan(part)).sum(0))
    assert np.allclose(found.mean, np.nanmean(part, 0), rtol=1e-12)
    assert np.allclose(found.std, np.nanstd(part, 0), rtol=1e-9)


def test_the_scale_of_columns_that_lie_far_from_0():
    """Without cancellation: a deviation of 1e-3 beside a mean of 1e6, in float64."""
    x = 1e6 + 1e-3 * np.random.default_rng(0).standard_normal((5000, 3))
    found = Dataset(x).summary()
    assert np.allclose(found.std, x.std(0), rtol=1e-6)


def test_columns_have_scales_of_their_own_and_pixels_share_one():
    numbers = np.random.default_rng(0)
    x = numbers.standard_normal((100, 2, 3)) * np.array([1e-6, 1.0, 1e6]) + 3
    shift, scale = Dataset(x.reshape(100, 6)).summary().scale()
    assert np.allclose(shift, x.reshape(100, 6).mean(0)) and np.allclose(scale, x.reshape(100, 6).std(0), rtol=1e-6)
    shift, scale = Dataset(x).summary().scale()
    assert shift.shape == scale.shape == () and np.allclose([shift, scale], [x.mean(), x.std()])
    bytes_ = numbers.integers(0, 256, (50, 5), np.uint8)
    shift, scale = Dataset(bytes_).summary().scale()
    assert np.allclose([shift, scale], [(bytes_ / 255).mean(), (bytes_ / 255).std()])
    constant = Dataset(np.full((50, 2), 0.1, np.float32) + np.array([0, 7], np.float32)).summary().scale()[1]
    assert constant.tolist() == [1, 1]


def test_the_hash_is_of_the_values_that_a_model_sees(tmp_path):
    def content(x: NDArray) -> str:
        return Dataset(x).summary().content

    assert content(X) == content(np.asfortranarray(X.astype(np.float64))) == content(X.astype(">f4"))
    other = X.copy()
    other[-1, -1] = np.nextafter(other[-1, -1], np.float32(9))
    assert content(X) != content(other) and content(X) != content(X[::-1])


@pytest.mark.parametrize("dtype", [bool, np.uint8, np.int64, np.float16, np.float32, np.float64])
def test_binary_data_of_every_type(dtype):
    found = Dataset((X > 0).astype(dtype)).summary()
    assert found.domain == "[0, 1]" and found.binary
    assert found.dtype_for("[0, 1]") == (torch.float32 if np.dtype(dtype).kind == "f" else torch.bool)
    assert found.dtype_for("counts") in (torch.float32, torch.uint8, *reference.COUNTS)


# ----------------------------------------------------------------------------------------------------------------------
# What the command makes of them.


@pytest.mark.parametrize("name", BUILT_IN)
def test_built_in_data(name):
    first, second = data.load(name), data.load(name)
    train, held_out = first.train[:], first.held_out[:]
    assert torch.equal(train, second.train[:]) and torch.equal(held_out, second.held_out[:])
    assert not torch.equal(held_out, data.load(name, seed=1).held_out[:])
    if name == "counts":
        x = torch.cat([train, held_out])
        assert x.shape == (2000, 200) and x.dtype == torch.int32 and first.likelihood == "nb"
        assert 0.68 < (x == 0).double().mean() < 0.7 and x.min() == 0
        log_mean, log_theta = counts_model()
        assert log_theta.shape == (200,) and -1 < log_theta.min() < log_theta.max() < 2
        spread = (log_mean.exp() + log_mean.mul(2).exp() / log_theta.exp()).sum(0).sqrt()
        assert ((x.double().sum(0) - log_mean.exp().sum(0)).abs() < 5 * spread).all()
        return
    assert train.shape[1:] == (8, 8) and train.dtype == torch.float32
    assert len(train) + len(held_out) == {"digits": 1797, "patches": 8480}[name]
    if name == "digits":
        assert train.min() == 0 and train.max() == 1
        ones = train[torch.from_numpy(first.train.labels == 0)].mean(0)
        assert ones[3:5, 3:5].max() < 0.3 < ones[3:5, 1:3].max()  # labels follow their images: zeros are hollow


def test_data_from_files(tmp_path):
    x = np.random.default_rng(0).integers(0, 256, (20, 3, 2), dtype=np.uint8)
    np.save(tmp_path / "x.npy", x)
    np.savez(tmp_path / "x.npz", x=x / 255.0, y=np.arange(20))
    from_npy, from_npz = (data.load(str(tmp_path / f"x.{kind}")) for kind in ("npy", "npz"))
    assert from_npy.train.dtype == torch.uint8 and from_npz.train.dtype == torch.float32
    torch.testing.assert_close(from_npy.train[:] / 255, from_npz.train[:])
    both = np.concatenate([from_npz.train.labels, from_npz.held_out.labels])
    assert sorted(both.tolist()) == list(range(20)) and len(from_npz.held_out) == 2
    torch.testing.assert_close(from_npz.held_out[:], torch.from_numpy(x)[from_npz.held_out.labels] / 255)


@pytest.mark.parametrize(
    "x, likelihood, error, message",
    [
        (np.full((4, 2), 1.5), "bernoulli", ValueError, r"must lie in \[0, 1\] .* from 1.5 to 1.5"),
        (np.full((4, 2), np.nan), "gaussian", ValueError, "a value that is not missing; all are NaN"),
        (np.array([[1, 2], [3, -4]]), "nb", ValueError, "must be counts, at least 0, for likelihood 'nb'.* is -4"),
        (np.array([[1, 2], [3, -0.5]]), "zinb", ValueError, "must be counts, whole numbers, .* --fractions"),
        (np.full((4, 2), np.uint64(2**63)), None, ValueError, r"counts of at most 2\*\*53"),
        (1e-50 * np.arange(8.0).reshape(4, 2) + 1e-50, None, ValueError, "range of float32; the largest is 8e-50"),
        (np.full((4, 2), np.inf), "poisson", ValueError, "must be finite, .* 8 of 8 values are infinite"),
        (np.zeros((4, 2), np.complex64), None, TypeError, "floating, integers or bool; .* holds complex64"),
        (np.zeros(4), None, ValueError, r"\[N, \*event\]"),
        (np.zeros((4, 2)), "binomial", ValueError, "likelihood must be one of"),
    ],
)
def test_data_that_do_not_fit(tmp_path, x, likelihood, error, message):
    np.save(tmp_path / "x.npy", x)
    with pytest.raises(error, match=message):
        data.load(str(tmp_path / "x.npy"), likelihood)


@pytest.mark.parametrize("dtype", ["i1", "i2", "u2", "i4", "u4", "i8", "u8", ">i4", ">u2", "u1"])
@pytest.mark.parametrize("fortran", [False, True])
def test_integers_from_files_are_counts(tmp_path, dtype, fortran):
    x = np.random.default_rng(0).integers(0, 100, (20, 7)).astype(dtype)
    np.save(tmp_path / "x.npy", np.asfortranarray(x) if fortran else x)
    for likelihood in (None, "zinb"):
        found = data.load(str(tmp_path / "x.npy"), likelihood)
        assert found.likelihood == (likelihood or ("bernoulli" if dtype == "u1" else "nb"))
        both = torch.cat([found.train[:], found.held_out[:]])
        assert both.dtype in (*reference.COUNTS, torch.uint8)
        assert sorted(both.tolist()) == sorted(x.tolist())
    np.save(tmp_path / "whole.npy", x.astype(np.float32))
    assert data.load(str(tmp_path / "whole.npy")).likelihood == "gaussian"
    assert data.load(str(tmp_path / "whole.npy"), "nb").train.dtype == torch.float32


COUNTS_MATRIX = np.random.default_rng(0).poisson(0.5, (20, 7))


@pytest.mark.parametrize("layout", ["dense", "csr", "csc"])
@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.int64, np.uint16, np.uint8])
def test_annotated_data(tmp_path, layout, dtype):
    write_h5ad(tmp_path / "x.h5ad", COUNTS_MATRIX.astype(dtype), layout=layout)
    found = data.load(str(tmp_path / "x.h5ad"))
    assert found.likelihood == "nb" and len(found.held_out) == 2
    assert sorted(torch.cat([found.train[:], found.held_out[:]]).tolist()) == sorted(COUNTS_MATRIX.tolist())


@pytest.mark.parametrize(
    "X, likelihood, error, message",
    [
        (np.full((4, 2), 0.3), None, None, "bernoulli"),
        (np.full((4, 2), 1.5), None, None, "gaussian"),  # normalized: no counts any more
        (np.full((4, 2), -1.0), "nb", ValueError, "must be counts, at least 0"),
        (None, None, ValueError, r"data must be X or a --layer of .*, which has: counts; got 'X'"),
        (np.zeros((1, 2)), None, ValueError, "data must have 2 rows or more"),
    ],
)
def test_annotated_data_that_are_no_counts(tmp_path, X, likelihood, error, message):
    write_h5ad(tmp_path / "x.h5ad", X, layers={} if X is not None else {"counts": COUNTS_MATRIX}, layout="dense")
    if error is None:
        assert data.load(str(tmp_path / "x.h5ad"), likelihood).likelihood == message
        return
    with pytest.raises(error, match=message):
        data.load(str(tmp_path / "x.h5ad"), likelihood)


def test_annotated_data_need_h5py(tmp_path, monkeypatch):
    with pytest.raises(FileNotFoundError):
        data.load(str(tmp_path / "x.h5ad"))
    (tmp_path / "x.h5ad").write_bytes(b"no HDF5")
    with pytest.raises(ValueError, match=r"x\.h5ad is damaged, or no AnnData file"):
        data.load(str(tmp_path / "x.h5ad"))
    monkeypatch.setattr("fastelbo.data.annotated.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"h5py is needed to read .*x\.h5ad: pip install h5py"):
        data.load(str(tmp_path / "x.h5ad"))


def test_files_that_do_not_fit(tmp_path):
    (tmp_path / "x.npy").write_bytes(b"not an array")
    with pytest.raises(ValueError, match=r"is damaged, or no \.npy file"):
        data.load(str(tmp_path / "x.npy"))
    with pytest.raises(FileNotFoundError):
        data.load(str(tmp_path / "missing.npy"))
    with pytest.raises(ValueError, match="data must be one of digits, patches"):
        data.load("mnist")
    np.savez(tmp_path / "two.npz", a=np.zeros((3, 2)), b=np.zeros((3, 2)))
    with pytest.raises(ValueError, match="it holds a, b"):
        data.load(str(tmp_path / "two.npz"))
