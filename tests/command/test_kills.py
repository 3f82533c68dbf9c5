"""A command that is killed at any moment leaves whole files, and the next one ends as if nothing had happened.

FASTELBO_KILLS: how many kills at random moments, over all commands and files of data.
"""

import os
import random
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
from annotated import write_h5ad
from runs import assert_same_run, check_files, said, train
from test_files import SMALL, Child, names

pytestmark = pytest.mark.usefixtures("no_pictures")

KILLS = int(os.environ.get("FASTELBO_KILLS", "9"))
EPOCHS = 12
DATA = ("dense", "mapped", "sparse")
COMMANDS = ("train", "evaluate", "sample")
KINDS = [(command, data) for command in COMMANDS for data in DATA]


def write_data(folder: Path, data: str) -> Path:
    numbers = np.random.default_rng(0)
    path = folder / ("x.h5ad" if data == "sparse" else "x.npy")
    if data == "sparse":
        write_h5ad(path, numbers.poisson(0.3, (200, 30)).astype(np.float32), chunks=(101,))
    else:
        np.save(path, numbers.random((200, 8, 8), np.float32))
    return path


class Undisturbed(NamedTuple):
    folder: Path  # with the data, the run, and what was drawn from it
    evaluation: str  # what `evaluate` printed
    seconds: dict[str, float]  # that each command took, in a process like those that are killed

    def arguments(self, command: str, folder: Path) -> list[object]:
        """Of a command that trains or draws in a folder, by a run in `self.folder` if need be."""
        data = next(self.folder.glob("x.*"))
        return {
            "train": ["train", "--data", data, "--epochs", EPOCHS, *SMALL, "--out", folder / "run"],
            "evaluate": ["evaluate", folder / "run", "--samples", 3000, "--json"],
            "sample": ["sample", folder / "run", "--n", 20_000, "--out", folder / "samples.npy"],
        }[command]


KEPT: dict[str, Undisturbed] = {}


@pytest.fixture
def undisturbed(monkeypatch, tmp_path_factory) -> Callable[[str], Undisturbed]:
    """The commands that nobody kills, each once, with the reader that the data are to have."""

    def found(data: str) -> Undisturbed:
        if data != "dense":
            monkeypatch.setattr("fastelbo.data.files.WHOLE", 0)  # no file is small
        if data not in KEPT:
            folder = tmp_path_factory.mktemp(data)
            write_data(folder, data)
            plain = Undisturbed(folder, "", {})
            for command in COMMANDS:
                start = time.perf_counter()
                status, error = Child(*plain.arguments(command, folder)).end()
                plain.seconds[command] = time.perf_counter() - start
                assert status == 0 and not error, error
            KEPT[data] = plain._replace(evaluation=said(*plain.arguments("evaluate", folder)))
        return KEPT[data]

    return found


def contents(folder: Path) -> dict[str, bytes]:
    return {name: (folder / name).read_bytes() for name in names(folder)}


def go_on(whole: Undisturbed, command: str, folder: Path) -> None:
    """The next command after a kill, to its end; the folder then holds what it would hold without."""
    if command == "train":
        epoch = check_files(folder / "run")
        train(*(["--resume", "--out", folder / "run"] if epoch else whole.arguments("train", folder)[1:]))
        assert_same_run(folder / "run", whole.folder / "run")
        assert names(folder / "run") == names(whole.folder / "run")
        return
    run, drawn = whole.folder / "run", folder / "samples.npy"
    before = contents(run)
    if command == "evaluate":
        assert said(*whole.arguments("evaluate", whole.folder)) == whole.evaluation
    else:
        expected = (whole.folder / "samples.npy").read_bytes()
        assert not drawn.exists() or drawn.read_bytes() == expected
        said("sample", run, *whole.arguments("sample", folder)[2:])
        assert drawn.read_bytes() == expected and names(folder) == ["samples.npy"]
    assert contents(run) == before


def start(whole: Undisturbed, command: str, folder: Path, before: Callable[[], object] = lambda: None) -> Child:
    arguments = whole.arguments(command, folder)
    if command != "train":
        arguments[1] = whole.folder / "run"
    return Child(*arguments, before=before)


@pytest.mark.parametrize(
    "kill, command, data",
    [(n, *KINDS[n % len(KINDS)]) for n in range(KILLS)],
    ids=[f"{'-'.join(KINDS[n % len(KINDS)])}-{n}" for n in range(KILLS)],
)
def test_killed_at_a_random_moment(tmp_path, undisturbed, kill, command, data):
    whole = undisturbed(data)
    child = start(whole, command, tmp_path)
    time.sleep(random.Random(kill).uniform(0, whole.seconds[command]))
    os.kill(child.process.pid, signal.SIGKILL)
    status, error = child.end()
    assert status in (-signal.SIGKILL, 0) and not error, error  # 0: it was faster than the one that was timed
    go_on(whole, command, tmp_path)


@pytest.mark.parametrize("data", DATA)
@pytest.mark.parametrize(
    "command, call, number",
    [
        *(("train", call, number) for call in ("fsync", "replace") for number in (1, 2, 3, 5)),
        *(("sample", call, 1) for call in ("fsync", "replace")),
    ],
)
def test_killed_while_a_file_is_written(tmp_path, undisturbed, command, call, number, data):
    """In the nth call of its kind: config.json, metrics.csv, then checkpoints."""
    whole, calls, real = undisturbed(data), [], getattr(os, call)

    def killed(*arguments, **options):
        calls.append(arguments)
        if len(calls) == number:
            os.kill(os.getpid(), signal.SIGKILL)
        return real(*arguments, **options)

    status, error = start(whole, command, tmp_path, lambda: setattr(os, call, killed)).end()
    assert status == -signal.SIGKILL and not error, error
    go_on(whole, command, tmp_path)
