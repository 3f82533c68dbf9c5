"""The files of the command: damaged, foreign and changed ones, interrupted and concurrent runs, full disks."""

import errno
import io
import json
import multiprocessing
import os
import resource
import signal
import struct
import sys
import tempfile
import time
import tracemalloc
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fastelbo.commands import cli, data, files, pictures, train
from fastelbo.commands.train import Config
from fastelbo.data import open_dataset

pytestmark = pytest.mark.usefixtures("no_pictures")

SMALL = ["--hidden", "8", "--latent-dim", "2"]
FUZZ = settings(
    max_examples=300,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)


def array(n: int = 40, d: int = 5, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).random((n, d)).astype(np.float32)


def refused(capsys, *arguments: object) -> str:
    """The one line that a command ends with."""
    with pytest.raises(SystemExit) as stopped:
        cli.main([str(a) for a in arguments])
    error = capsys.readouterr().err
    assert stopped.value.code == 2 and error.count("\n") == 1, error
    return error


class Child:
    """The command in a process of its own; forked, since imports would take seconds."""

    def __init__(self, *arguments: object, before: Callable[[], object] = lambda: None) -> None:
        self.stderr = tempfile.TemporaryFile("w+")  # noqa: SIM115  end() closes it
        self.process = multiprocessing.get_context("fork").Process(target=self._main, args=(arguments, before))
        self.process.start()

    def _main(self, arguments: tuple[object, ...], before: Callable[[], object]) -> None:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        torch.set_num_threads(1)
        with self.stderr, open(os.devnull, "w") as sys.stdout:
            sys.stderr = self.stderr
            before()
            status = cli.main([str(a) for a in arguments])
        sys.exit(status)

    def end(self) -> tuple[int | None, str]:
        """-> exit status and what was said on stderr."""
        self.process.join(60)
        self.process.kill()
        with self.stderr:
            self.stderr.seek(0)
            return self.process.exitcode, self.stderr.read()


def epochs_of(out: Path) -> list[int]:
    return [int(line.split(",")[0]) for line in (out / "metrics.csv").read_text().splitlines()[1:]]


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


# ----------------------------------------------------------------------------------------------------------------------
# Processes: two runs in one folder, interrupts, limits.


def test_two_runs_do_not_share_a_folder(tmp_path, capsys):
    out = tmp_path / "run"
    first = Child("train", *SMALL, "--epochs", 1_000_000, "--out", out)
    try:
        while not (out / "checkpoint.pt").exists():
            assert first.process.is_alive(), first.end()
            time.sleep(0.05)
        for options in ([], ["--resume"]):
            error = refused(capsys, "train", *options, "--out", out)
            assert error == f"fastelbo train: error: another run is writing to {out}: write to another directory\n"
        os.kill(first.process.pid, signal.SIGINT)
    finally:
        status, error = first.end()
    assert status == 130 and error == f"interrupted: --resume --out {out} goes on after the last whole epoch\n"
    assert names(out) == ["checkpoint.pt", "config.json", "metrics.csv"]
    assert epochs_of(out) == list(range(1, files.read_checkpoint(out)["epoch"] + 1))


@pytest.mark.parametrize(
    "model, module, name", [("vae", torch, "save"), ("vae", os, "fsync"), ("vae", os, "replace"), ("ppca", os, "fsync")]
)
def test_ctrl_c_while_a_checkpoint_is_written(tmp_path, model, module, name):
    """It comes in the first call that is made for the checkpoint, metrics.csv being there."""
    out, real = tmp_path / "run", getattr(module, name)

    def interrupted(*args, **kwargs):
        if (out / "metrics.csv").exists():
            setattr(module, name, real)
            os.kill(os.getpid(), signal.SIGINT)
        return real(*args, **kwargs)

    options = [*SMALL, "--epochs", 3] if model == "vae" else ["--latent-dim", 2]
    run = Child("train", "--model", model, *options, "--out", out, before=lambda: setattr(module, name, interrupted))
    status, error = run.end()
    assert status == 130 and error.count("\n") == 1, error
    assert names(out) == ["checkpoint.pt", "config.json", "metrics.csv"]
    state = files.read_checkpoint(out)
    if model == "ppca":
        assert error == f"interrupted: the model is in {out}, its pictures are not all there\n"
    else:
        assert "--resume" in error and state["epoch"] == 1 and epochs_of(out) == [1]
        assert cli.main(["train", "--resume", "--out", str(out)]) == 0
        assert epochs_of(out) == [1, 2, 3]


def test_ctrl_c_is_held_back_in_a_block_and_then_given():
    reached, before = [], signal.signal(signal.SIGINT, signal.default_int_handler)  # tests in the background ignore it
    with pytest.raises(KeyboardInterrupt), files.uninterrupted():
        with files.uninterrupted():
            signal.raise_signal(signal.SIGINT)
            reached.append("inner")
        reached.append("outer")
    assert reached == ["inner", "outer"] and signal.getsignal(signal.SIGINT) is signal.default_int_handler
    signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize("model", ["vae", "ppca"])
def test_an_interrupted_run_without_a_checkpoint_does_not_advise_to_resume(tmp_path, capsys, monkeypatch, model):
    def stop(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(train.Trainer, "run_epoch", stop)
    monkeypatch.setattr("fastelbo.commands.ppca.PPCA.fit", stop)
    assert cli.main(["train", "--model", model, "--out", str(tmp_path / "run")]) == 130
    error = capsys.readouterr().err
    assert (
        error
        == {
            "vae": "interrupted: no epoch was finished, so that there is nothing to resume\n",
            "ppca": "interrupted: no model was written\n",
        }[model]
    )
    assert not (tmp_path / "run/checkpoint.pt").exists()


@pytest.mark.parametrize("model", ["vae", "ppca"])
def test_a_full_disk_leaves_nothing_half_written(tmp_path, model):
    """No file may grow beyond 4 KiB: the table of metrics fits, the checkpoint does not."""
    out = tmp_path / "run"
    options = [*SMALL, "--epochs", 3] if model == "vae" else ["--latent-dim", 8]
    limit = resource.RLIMIT_FSIZE, (4096, 4096)
    run = Child("train", "--model", model, *options, "--out", out, before=lambda: resource.setrlimit(*limit))
    status, error = run.end()
    assert status == 2
    assert error == f"fastelbo train: error: [Errno {errno.EFBIG}] File too large: '{out / 'checkpoint.pt'}'\n"
    assert set(names(out)) == {"config.json", "metrics.csv"} and (out / "metrics.csv").read_bytes().endswith(b"\n")
    assert model == "ppca" or epochs_of(out) == []


def test_a_disk_that_becomes_full_leaves_the_epoch_before(tmp_path, capsys, monkeypatch):
    real, calls = os.fsync, []

    def full(descriptor):
        calls.append(descriptor)
        if len(calls) == 5:  # config.json, metrics.csv, then checkpoints
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(descriptor)

    monkeypatch.setattr(os, "fsync", full)
    error = refused(capsys, "train", *SMALL, "--epochs", 5, "--out", tmp_path)
    assert f"No space left on device: '{tmp_path / 'checkpoint.pt'}'" in error
    assert names(tmp_path) == ["checkpoint.pt", "config.json", "metrics.csv"]
    assert files.read_checkpoint(tmp_path)["epoch"] == 2 and epochs_of(tmp_path) == [1, 2]
    assert cli.main(["train", "--resume", "--out", str(tmp_path)]) == 0 and epochs_of(tmp_path) == [1, 2, 3, 4, 5]


def test_a_row_is_appended_whole_or_not_at_all(tmp_path):
    """A limit in the middle of the row, in a process that survives it."""
    path = tmp_path / "table.csv"
    path.write_bytes(b"a,b\n")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (7, before[1]))
    try:
        with pytest.raises(OSError, match=r"table\.csv"), files.appended(path, b"1,2\n3,4\n"):
            raise AssertionError("not reached")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert path.read_bytes() == b"a,b\n"


def test_a_picture_that_cannot_be_written(tmp_path, monkeypatch):
    from matplotlib.figure import Figure

    monkeypatch.setattr(os, "fsync", lambda _: (_ for _ in ()).throw(OSError(errno.ENOSPC, "No space left on device")))
    with pytest.raises(OSError, match=r"a\.png"):
        pictures._save(Figure(), tmp_path / "a.png")
    assert not names(tmp_path)


def test_folders_that_cannot_be_written_to(tmp_path, capsys, monkeypatch):
    (tmp_path / "file").write_text("")
    for out in (tmp_path / "file", tmp_path / "file/below"):
        assert str(tmp_path / "file") in refused(capsys, "train", "--out", out)
    real = os.open

    def read_only(path, flags, *rest, **kwargs):
        if flags & os.O_CREAT:
            raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(path))
        return real(path, flags, *rest, **kwargs)

    monkeypatch.setattr(os, "open", read_only)
    for model in ("vae", "ppca"):
        error = refused(capsys, "train", "--model", model, "--out", tmp_path / "new/run")
        assert "Read-only file system" in error and str(tmp_path / "new/run") in error
    assert names(tmp_path) == ["file"]


def test_several_processes_that_are_no_group_are_refused(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    for model, word in (("vae", "RANK expected"), ("ppca", "model 'ppca' takes one process here; torchrun, by WORLD")):
        assert word in refused(capsys, "train", "--model", model, "--out", tmp_path / "run")
    assert not names(tmp_path)
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert cli.main(["train", *SMALL, "--epochs", "1", "--out", str(tmp_path / "run")]) == 0


def test_files_of_a_killed_process_are_taken_away(tmp_path):
    left = (".lock", "checkpoint.pt.fffffeab.partial", "metrics.csv.ffffffff.partial")
    for name in (*left, "mine.partial"):
        (tmp_path / name).write_bytes(b"")
    with files.locked(tmp_path):
        assert names(tmp_path) == [".lock", "mine.partial"]
    assert names(tmp_path) == ["mine.partial"]


# ----------------------------------------------------------------------------------------------------------------------
# Options.


@pytest.mark.parametrize("value", ["nan", "inf", "-inf", "-1"])
@pytest.mark.parametrize("option", ["beta", "free_bits", "alpha", "lr"])
def test_floats_out_of_range(tmp_path, capsys, option, value):
    objective = "vr" if option == "alpha" else "elbo"
    flag = f"--{option.replace('_', '-')}={value}"
    arguments = ["train", "--objective", objective, flag, "--out", tmp_path / "run"]
    if (option, value) == ("alpha", "-1"):  # Li & Turner 2016, sec. 3.2: any order
        assert cli.main([*map(str, arguments), *SMALL, "--epochs", "1"]) == 0
        return
    error = refused(capsys, *arguments)
    assert f"{option} must be" in error and error.endswith(f"got {float(value)}\n")
    assert not names(tmp_path)


@pytest.mark.parametrize("value", [2**63, -(2**63) - 1, 10**30])
def test_integers_out_of_range(tmp_path, capsys, value):
    for option in ("seed", "batch-size", "samples", "latent-dim"):
        error = refused(capsys, "train", f"--{option}={value}", "--out", tmp_path / "run")
        assert f"got {value}" in error
    assert "seed must be" in refused(capsys, "train", "--model", "ppca", f"--seed={value}", "--out", tmp_path / "run")
    assert "seed must be" in refused(capsys, "evaluate", tmp_path, f"--seed={value}")
    assert not names(tmp_path)


# ----------------------------------------------------------------------------------------------------------------------
# Resuming: the data, and the history.


def test_changed_data_are_refused(tmp_path, capsys):
    x, out = array(), tmp_path / "run"
    path = tmp_path / "x.npy"
    np.save(path, x)
    arguments = ["train", *SMALL, "--data", path, "--epochs", 2, "--out", out]
    assert cli.main([*map(str, arguments)]) == 0
    before = (out / "checkpoint.pt").read_bytes(), (out / "metrics.csv").read_bytes()
    dataset, others = data.load(str(path)), []
    for part in (dataset.train, dataset.held_out):
        other = x.copy()
        row = np.flatnonzero((x == part[0].numpy()).all(1))
        other[row, 2] = np.nextafter(other[row, 2], np.float32(2))
        others.append(other)
    for changed, what in (
        (array(d=6), "changed: shape (40, 5) -> (40, 6), content"),
        (array(n=41), "changed: shape (40, 5) -> (41, 5), content"),
        *((other, "changed: content") for other in others),
        ((255 * x).astype(np.uint8), "changed: dtype float32 -> uint8, content"),
    ):
        np.save(path, changed)
        said = f"data {path} are not what the run was trained on; {what}\n"
        assert refused(capsys, "train", "--resume", "--epochs", 3, "--out", out).endswith(said)
        assert refused(capsys, "evaluate", out, "--samples", 2).endswith(said)
    assert before == ((out / "checkpoint.pt").read_bytes(), (out / "metrics.csv").read_bytes())
    np.save(tmp_path / "other.npy", other)
    assert cli.main(["evaluate", str(out), "--samples", "2", "--data", str(tmp_path / "other.npy")]) == 0
    np.save(path, np.asfortranarray(x.astype(np.float64)))  # the same data, as the model sees them
    assert cli.main(["train", "--resume", "--epochs", "3", "--out", str(out)]) == 0 and epochs_of(out) == [1, 2, 3]


def test_changed_data_of_a_ppca_are_not_taken_for_held_out_ones(tmp_path, capsys):
    np.save(tmp_path / "x.npy", array())
    arguments = ["train", "--model", "ppca", "--latent-dim", 2, "--data", tmp_path / "x.npy", "--out", tmp_path / "run"]
    assert cli.main([*map(str, arguments)]) == 0
    assert cli.main(["evaluate", str(tmp_path / "run")]) == 0
    np.save(tmp_path / "x.npy", array(seed=1))
    assert "changed: content" in refused(capsys, "evaluate", tmp_path / "run")


def test_a_checkpoint_does_not_grow_with_the_history(tmp_path):
    sizes = []

    def note(_):
        sizes.append((tmp_path / "checkpoint.pt").stat().st_size)

    config = Config(hidden=8, latent_dim=2, epochs=20, batch_size=1617)
    train.fit(train.prepare(config, tmp_path), tmp_path, note)
    assert len(sizes) == 20 and max(sizes) == min(sizes)


@pytest.mark.parametrize(
    "damage",
    [
        lambda lines: lines[:2],
        lambda lines: [*lines[:2], lines[2].replace("2,", "7,", 1), *lines[3:]],
        lambda lines: [lines[0].replace("train_elbo", "elbo"), *lines[1:]],
        lambda lines: [*lines[:2], lines[2][:25], *lines[3:]],
        lambda lines: [*lines[:2], "2," + ",".join(["NaN"] * lines[0].count(",")), *lines[3:]],
        lambda lines: ["\0\n"],
        lambda lines: [],
    ],
)
def test_a_damaged_history_is_refused(tmp_path, capsys, damage):
    table = tmp_path / "metrics.csv"
    assert cli.main(["train", *SMALL, "--epochs", "3", "--out", str(tmp_path)]) == 0
    whole = table.read_text().splitlines()
    table.write_text("\n".join(damage(whole)))
    assert str(table) in refused(capsys, "train", "--resume", "--epochs", 4, "--out", tmp_path)
    table.unlink()
    assert str(table) in refused(capsys, "train", "--resume", "--epochs", 4, "--out", tmp_path)
    table.write_text("\n".join([*whole, "4,", ""]))  # beyond the checkpoint
    assert cli.main(["train", "--resume", "--epochs", "4", "--out", str(tmp_path)]) == 0
    assert table.read_text().splitlines()[:4] == whole and epochs_of(tmp_path) == [1, 2, 3, 4]


# ----------------------------------------------------------------------------------------------------------------------
# Damaged and foreign files of data.


def npy(x: np.ndarray) -> bytes:
    content = io.BytesIO()
    np.save(content, x)
    return content.getvalue()


def npz(members: dict[str, bytes], method: int = zipfile.ZIP_DEFLATED) -> bytes:
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w", method) as archive:
        for name, member in members.items():
            archive.writestr(name, member)
    return content.getvalue()


def lying(shape: tuple[int, ...], dtype: str = "<f4", body: bytes = b"\0" * 160) -> bytes:
    header = f"{{'descr': '{dtype}', 'fortran_order': False, 'shape': {shape}, }}".ljust(117).encode() + b"\n"
    return b"\x93NUMPY\1\0" + struct.pack("<H", len(header)) + header + body


X = npy(array())
TERABYTES = lying((2**38, 4))
BAD_FILES = {
    "npz.npy": npz({"x.npy": X}),
    "npy.npz": X,
    "empty.npy": b"",
    "empty.npz": b"",
    "text.npy": b"1,2\n3,4\n",
    "text.npz": npz({"x.npy": b"1,2\n"}),
    "no_array.npz": npz({"x": X, "y.txt": b"1"}),
    "no_member.npz": npz({}),
    "only_labels.npz": npz({"y.npy": npy(np.arange(40))}),
    "several.npz": npz({"a.npy": X, "b.npy": X}),
    "short.npy": X[:-1],
    "long.npy": X + b"\0",
    "terabytes.npy": TERABYTES,
    "terabytes.npz": npz({"x.npy": TERABYTES}),
    "negative.npy": lying((-40, -1)),
    "huge_header.npy": b"\x93NUMPY\2\0" + struct.pack("<I", 2**32 - 1) + X[10:],
    "nested_header.npy": lying((40, 1)).replace(b"(40, 1)", b"(" * 7),
    "structured.npy": npy(np.zeros(40, [("a", "f4"), ("b", "f4")])),
    "complex.npy": npy(np.zeros((40, 2), complex)),
    "objects.npz": npz({"x.npy": lying((40, 1), "|O")}),
    "method.npz": npz({"x.npy": X}).replace(b"PK\1\2\x14\3\x14\0\0\0\x08\0", b"PK\1\2\x14\3\x14\0\0\0\x63\0"),
    "encrypted.npz": npz({"x.npy": X}).replace(b"PK\1\2\x14\3\x14\0\0\0", b"PK\1\2\x14\3\x14\0\1\0"),
}


def test_labels_that_lie_about_their_size_are_left_out(tmp_path):
    path = tmp_path / "x.npz"
    path.write_bytes(npz({"x.npy": X, "y.npy": lying((2**40,), "<i8")}))
    found = data.load(str(path))
    assert found.train.labels is None and "labels y" in found.remarks[0]


@pytest.mark.parametrize("name", BAD_FILES)
def test_bad_files_of_data(tmp_path, capsys, name):
    path = tmp_path / name
    path.write_bytes(BAD_FILES[name])
    tracemalloc.start()
    try:
        error = refused(capsys, "train", "--data", path, "--out", tmp_path / "run")
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert str(path) in error and names(tmp_path) == [name]
    assert peak < 50e6  # modules that are imported here, too


def central(content: bytes, name: bytes, offset: int, value: int) -> bytes:
    """An archive with another 32-bit number in the directory's entry of a member, counted from the entry's start."""
    at = content.rindex(name) - 46
    assert content[at : at + 4] == b"PK\1\2"
    return content[: at + offset] + struct.pack("<I", value) + content[at + offset + 4 :]


def test_sizes_that_an_archive_makes_up(tmp_path, capsys):
    """The header of the array and the directory of the archive agree on 4 GB, of which 160 bytes are there."""
    member = lying((10**9, 1))
    claimed = len(member) - 160 + 4 * 10**9
    for method in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        path = tmp_path / f"{method}.npz"
        path.write_bytes(central(npz({"x.npy": member}, method), b"x.npy", 24, claimed))
        tracemalloc.start()
        try:
            with pytest.raises(ValueError, match=path.name):
                data.load(str(path))
            assert tracemalloc.get_traced_memory()[1] < 10e6
        finally:
            tracemalloc.stop()


def test_other_members_are_not_decompressed(tmp_path):
    """Twenty gigabytes beside x, by the archive's word; the bytes of that member are not even deflated ones."""
    content = npz({"x.npy": X, "big.npy": bytes(1000)})
    at = content.rindex(b"big.npy", 0, content.index(b"PK\1\2")) + len(b"big.npy")
    content = content[:at] + b"\xff" * 4 + content[at + 4 :]
    path = tmp_path / "x.npz"
    path.write_bytes(central(content, b"big.npy", 24, 2**32 - 2))
    with zipfile.ZipFile(path) as archive, pytest.raises(zipfile.zlib.error):
        archive.read("big.npy")
    assert len(data.load(str(path)).train) == 36


def test_what_numpy_writes_is_read(tmp_path):
    """Every dtype, order and container gives what numpy itself reads."""
    generator = np.random.default_rng(0)
    kinds = [">f8", "<f2", "<f4", np.longdouble, np.uint8, np.bool_]
    for n, dtype in enumerate(kinds):
        for order in "CF":
            x = np.asarray(generator.integers(0, 2, (30, 3, 2)), dtype, order=order)
            y = np.arange(30, dtype=">u2")
            np.save(tmp_path / f"{n}{order}.npy", x)
            np.savez(tmp_path / f"{n}{order}.npz", x=x, y=y, other=np.zeros(1, object))
            np.savez_compressed(tmp_path / f"{n}{order}c.npz", x, y=y)
            for name in (f"{n}{order}.npy", f"{n}{order}.npz", f"{n}{order}c.npz"):
                found = open_dataset(tmp_path / name)
                expected, labels = x.astype(np.float32) if x.dtype.kind == "f" else x, found.labels
                assert np.array_equal(found[:].numpy(), expected) and found[:].numpy().dtype == expected.dtype
                assert name.endswith(".npy") == (labels is None)
                assert labels is None or labels.tolist() == y.tolist()
    with pytest.raises(ValueError, match=r"in the range of float32; they go from 0 to 1e\+300"):
        np.save(tmp_path / "large.npy", np.where(np.arange(60).reshape(30, 2) == 7, 1e300, 0.0))
        data.load(str(tmp_path / "large.npy"))


mutations = st.lists(
    st.tuples(  # how, where, and bytes
        st.sampled_from(["flip", "set", "cut", "insert", "delete"]),
        st.floats(0, 1, exclude_max=True),
        st.binary(max_size=4),
    ),
    min_size=1,
    max_size=3,
)


def mutated(content: bytes, changes: list[tuple[str, float, bytes]], end: int | None = None) -> bytes:
    """The content after some changes in its first `end` bytes."""
    for how, place, new in changes:
        at = int(place * (len(content) if end is None else min(end, len(content))))
        if how == "flip":
            content = content[:at] + bytes([content[at] ^ 1 << len(new)]) + content[at + 1 :] if content else content
        elif how == "set":
            content = content[:at] + new + content[at + len(new) :]
        elif how == "cut":
            content = content[:at] if len(new) == 4 else content
        elif how == "insert":
            content = content[:at] + new + content[at:]
        else:
            content = content[:at] + content[at + len(new) :]
    return content


def loaded(path: Path, content: bytes) -> torch.Tensor | None:
    """The data, or None where they are refused in a way that is allowed, without much memory."""
    path.write_bytes(content)
    tracemalloc.start()
    try:
        dataset = open_dataset(path)
        dataset.summary()
        return dataset[:]
    except (ValueError, TypeError, OSError) as error:
        assert str(path) in str(error)
        return None
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 10e6, "more memory than any of these files needs"


@FUZZ
@given(changes=mutations, header=st.booleans())
def test_mutated_npy(tmp_path, changes, header):
    found = loaded(tmp_path / "x.npy", mutated(X, changes, 128 if header else None))
    assert found is None or found.numel() * 2 <= 40 * 5 * 4  # at least two bytes each


@pytest.mark.filterwarnings("ignore:labels y")  # a damaged member of labels is left out
@FUZZ
@given(changes=mutations)
def test_mutated_npz(tmp_path, changes):
    found = loaded(tmp_path / "x.npz", mutated(npz({"x.npy": X, "y.npy": npy(np.arange(40))}), changes))
    assert found is None or np.array_equal(found.numpy(), array()), "check sums tell damage"


@FUZZ
@given(changes=mutations)
def test_mutated_npy_in_a_sound_npz(tmp_path, changes):
    loaded(tmp_path / "x.npz", npz({"x.npy": mutated(X, changes, 140)}))


# ----------------------------------------------------------------------------------------------------------------------
# Damaged and foreign checkpoints.


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> bytes:
    out = tmp_path_factory.mktemp("run")
    train.fit(train.prepare(Config(hidden=8, latent_dim=2, epochs=1), out), out)
    return (out / "checkpoint.pt").read_bytes()


def same(a, b) -> bool:
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


@FUZZ
@given(changes=mutations)
def test_mutated_checkpoint(tmp_path, checkpoint, changes):
    path = tmp_path / "checkpoint.pt"
    path.write_bytes(mutated(checkpoint, changes))
    try:
        state = files.read_checkpoint(path)
    except (ValueError, TypeError, OSError) as error:
        assert str(path) in str(error)
        return
    assert same(state, torch.load(io.BytesIO(checkpoint), weights_only=True)), "check sums tell damage"


def foreign() -> dict[str, bytes]:
    def saved(value: object, **options) -> bytes:
        content = io.BytesIO()
        torch.save(value, content, **options)
        return content.getvalue()

    return {
        "empty": b"",
        "text": b"no checkpoint",
        "json": json.dumps({"config": {}}).encode(),
        "npy": X,
        "npz": npz({"x.npy": X}),
        "png": b"\x89PNG\r\n\x1a\n" + bytes(100),
        "pickle": b"\x80\x04K\x01.",
        "legacy": saved({"a": torch.zeros(3)}, _use_new_zipfile_serialization=False),
        "tensor": saved(torch.zeros(3)),
        "list": saved([1, 2]),
        "dict": saved({"model": {}}),
        "code": saved(Path("x")),
        "compressed": npz({"archive/data.pkl": b"\x80\x02}."}),
    }


@pytest.mark.parametrize("name", foreign())
def test_foreign_checkpoints(tmp_path, capsys, name):
    path = tmp_path / "checkpoint.pt"
    path.write_bytes(foreign()[name])
    for command in (["evaluate", path], ["evaluate", tmp_path], ["train", "--resume", "--out", tmp_path]):
        assert f"{path} is damaged, or no checkpoint of fastelbo" in refused(capsys, *command)
    assert names(tmp_path) == ["checkpoint.pt"]


@pytest.mark.parametrize(
    "part, value",
    [
        ("config", {}),
        ("config", {"hidden": "8"}),
        ("config", {"hidden": 10**7, "latent_dim": 2, "likelihood": "bernoulli", "data": "digits"}),
        ("config", {"unknown": 1}),
        ("data", {}),
        ("model", {}),
        ("model", {"W": torch.zeros(())}),
        ("epoch", None),
        ("epoch", "many"),
    ],
)
@pytest.mark.parametrize("kind", ["vae", "ppca"])
def test_checkpoints_with_parts_that_do_not_fit(tmp_path, capsys, checkpoint, kind, part, value):
    state = torch.load(io.BytesIO(checkpoint), weights_only=True)
    files.save_checkpoint(tmp_path / "checkpoint.pt", state | {"model_kind": kind, part: value})
    assert "checkpoint of fastelbo" in refused(capsys, "evaluate", tmp_path, "--samples", 2)
