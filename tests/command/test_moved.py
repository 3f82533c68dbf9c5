"""A run whose data, or whose folder, lie elsewhere when it goes on."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from annotated import write_h5ad
from runs import assert_same_run, said, train
from test_files import SMALL, array, names, refused

pytestmark = pytest.mark.usefixtures("no_pictures")

COUNTS = np.random.default_rng(0).poisson(0.5, (40, 7)).astype(np.float32)
WRITE: dict[str, Callable[[Path, np.ndarray], None]] = {
    ".npy": np.save,
    ".npz": lambda path, x: np.savez(path, x=x, y=np.arange(40)),
    ".h5ad": write_h5ad,
}
suffixes = pytest.mark.parametrize("suffix", WRITE)


def write(path: Path, *, changed: bool = False) -> Path:
    x = COUNTS if path.suffix == ".h5ad" else array()
    WRITE[path.suffix](path, x[::-1] if changed else x)
    return path


def begin(folder: Path, suffix: str, *options: object) -> tuple[Path, Path]:
    """Two epochs in folder/run, of the data folder/x; beside it the run that stays, of four, in "stayed" -> both."""
    data, out = folder / "work" / f"x{suffix}", folder / "work/run"
    data.parent.mkdir(parents=True)
    write(data)
    train("--data", data, *options, "--epochs", 2, *SMALL, "--out", out)
    stayed = folder / "stayed"
    shutil.copytree(out, stayed)
    train("--resume", "--epochs", 4, "--out", stayed)
    return data, out


def move(path: Path, to: Path) -> Path:
    to.parent.mkdir(parents=True, exist_ok=True)
    return path.rename(to)


def contents(folder: Path) -> dict[str, bytes]:
    return {name: (folder / name).read_bytes() for name in names(folder)}


def test_the_run_that_stays_is_one_that_was_not_stopped(tmp_path):
    data, _ = begin(tmp_path, ".npy")
    train("--data", data, "--epochs", 4, *SMALL, "--out", tmp_path / "whole")
    assert_same_run(tmp_path / "whole", tmp_path / "stayed")


@suffixes
@pytest.mark.parametrize("moved", ["data", "run", "both"])
def test_resumed_after_a_move(tmp_path, capsys, suffix, moved):
    data, out = begin(tmp_path, suffix)
    options: list[object] = []
    if moved != "data":
        out = move(out, tmp_path / "archive/2024/run")
    if moved != "run":
        data = move(data, tmp_path / "disk" / f"renamed{suffix}")
        before = contents(out)
        for command in (["train", "--resume", "--epochs", 4, "--out", out], ["evaluate", out, "--samples", 2]):
            error = refused(capsys, *command)
            assert "--data" in error and f"x{suffix}" in error, error
        assert contents(out) == before
        options = ["--data", data]
    train("--resume", *options, "--epochs", 3, "--out", out)
    train("--resume", "--epochs", 4, "--out", out)  # where the data are now has been said
    assert_same_run(out, tmp_path / "stayed")
    arguments = ["evaluate", "--data", data, "--samples", 5]
    assert said(*arguments, out) == said(*arguments, tmp_path / "stayed")


@suffixes
@pytest.mark.parametrize("given", [False, True])
def test_a_folder_of_data_and_run_is_moved_as_a_whole(tmp_path, suffix, given):
    data, out = begin(tmp_path, suffix)
    arguments = ["--samples", 5, "--json"]
    expected = json.loads(said("evaluate", out, *arguments))
    whole = move(tmp_path / "work", tmp_path / "elsewhere/deeper/work")
    found = json.loads(said("evaluate", whole / "run", *arguments))
    assert found == expected | {"data": str(whole / data.name)}
    train("--resume", *(["--data", whole / data.name] if given else []), "--epochs", 4, "--out", whole / "run")
    assert_same_run(whole / "run", tmp_path / "stayed")


def test_a_folder_with_held_out_data_is_moved_as_a_whole(tmp_path):
    np.save(tmp_path / "test.npy", array(7, seed=1))
    (tmp_path / "a/work").mkdir(parents=True)
    held_out = move(tmp_path / "test.npy", tmp_path / "a/work/test.npy")
    np.save(tmp_path / "a/work/x.npy", array())
    options = ["--data", tmp_path / "a/work/x.npy", "--test-data", held_out, *SMALL]
    train(*options, "--epochs", 2, "--out", tmp_path / "a/work/run")
    train(*options, "--epochs", 4, "--out", tmp_path / "stayed")
    whole = move(tmp_path / "a/work", tmp_path / "b/work")
    train("--resume", "--epochs", 4, "--out", whole / "run")
    assert_same_run(whole / "run", tmp_path / "stayed")


def test_a_relative_path_is_found_from_any_folder(tmp_path, monkeypatch):
    np.save(tmp_path / "x.npy", array())
    monkeypatch.chdir(tmp_path)
    train("--data", "x.npy", "--epochs", 2, *SMALL, "--out", "run")
    train("--data", "x.npy", "--epochs", 4, *SMALL, "--out", "stayed")
    (tmp_path / "other").mkdir()
    monkeypatch.chdir(tmp_path / "other")
    train("--resume", "--epochs", 4, "--out", "../run")
    assert_same_run(tmp_path / "run", tmp_path / "stayed")


@suffixes
def test_other_content_is_refused(tmp_path, capsys, suffix):
    """Wherever it lies: under the old name, or under the one that is given."""
    data, out = begin(tmp_path, suffix)
    before, other = contents(out), write(tmp_path / f"other{suffix}", changed=True)
    error = refused(capsys, "train", "--resume", "--data", other, "--epochs", 4, "--out", out)
    assert str(other) in error and "content" in error
    other.replace(data)
    error = refused(capsys, "train", "--resume", "--epochs", 4, "--out", out)
    assert str(data) in error and "content" in error
    assert contents(out) == before


def test_the_same_content_in_another_file_is_taken(tmp_path):
    """Content decides: a copy, in another order of memory and another container."""
    data, out = begin(tmp_path, ".npy")
    np.savez_compressed(tmp_path / "copy.npz", x=np.asfortranarray(np.load(data)))
    data.unlink()
    train("--resume", "--data", tmp_path / "copy.npz", "--epochs", 4, "--out", out)
    assert_same_run(out, tmp_path / "stayed")
