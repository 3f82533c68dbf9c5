"""The command among others of a shell: pipes, closed streams, interrupts, sizes beyond the machine, odd paths."""

import errno
import fcntl
import json
import os
import shutil
import subprocess
import sys
from collections import namedtuple
from collections.abc import Callable

import numpy as np
import pytest
import torch
from command.test_files import SMALL, Child, epochs_of, names, refused

import fastelbo
from fastelbo import PPCA
from fastelbo._internal.streams import flushed, say
from fastelbo.commands import cli, files
from fastelbo.commands.train import Config, Trainer

pytestmark = pytest.mark.usefixtures("no_pictures")


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """The folder of a VAE and a PPCA, which no test changes."""
    folder = tmp_path_factory.mktemp("runs")
    assert cli.main(["train", *SMALL, "--epochs", "1", "--out", str(folder / "vae")]) == 0
    assert cli.main(["train", "--model", "ppca", "--latent-dim", "2", "--out", str(folder / "ppca")]) == 0
    return folder


# ----------------------------------------------------------------------------------------------------------------------
# Streams.


def shell(line: str, **environment: str) -> tuple[int, str, str]:
    """-> status of `fastelbo` in the line, in which it is $F; stdout; stderr."""
    settings = os.environ | {"F": f"{sys.executable} -m fastelbo", "OMP_NUM_THREADS": "1", **environment}
    done = subprocess.run(
        ["bash", "-c", f"set -o pipefail; {line}"], capture_output=True, text=True, timeout=120, env=settings
    )
    return done.returncode, done.stdout, done.stderr


def test_a_pipe_that_is_closed_ends_a_run_that_can_be_resumed(tmp_path):
    out = tmp_path / "run"
    status, text, error = shell(f"$F train {' '.join(SMALL)} --epochs 100000 --out {out} | head -2")
    assert text.count("\n") == 2 and status == 2
    assert error.startswith(f"fastelbo train: error: [Errno {errno.EPIPE}] Broken pipe") and error.count("\n") == 1
    assert names(out) == ["checkpoint.pt", "config.json", "metrics.csv"]
    done = files.read_checkpoint(out)["epoch"]
    assert epochs_of(out) == list(range(1, done + 1))
    assert cli.main(["train", "--resume", "--epochs", str(done + 1), "--out", str(out)]) == 0


@pytest.mark.parametrize("unbuffered", ["", "1"])
@pytest.mark.parametrize("arguments, redirection", [("info", ">/dev/full"), ("--help", ">&-"), ("--lr", "2>/dev/full")])
def test_streams_that_take_nothing(arguments, redirection, unbuffered):
    status, text, error = shell(f"$F {arguments} {redirection}", PYTHONUNBUFFERED=unbuffered)
    assert status == 2 and text == ""
    assert error.count("\n") == (0 if "2>" in redirection else 1) and "Exception ignored" not in error


def test_a_file_does_not_get_the_place_of_a_closed_stream(runs, tmp_path):
    """What is printed on stderr must not end up in it."""
    status, text, error = shell(f"$F sample {runs / 'vae'} --n 3 --out {tmp_path / 'x.npy'} 2>&- <&-")
    assert status == 0 and text.startswith(str(tmp_path)) and error == ""
    assert np.load(tmp_path / "x.npy").shape == (3, 8, 8)


def printing_to(path: str) -> Callable[[], object]:
    return lambda: setattr(sys, "stdout", open(path, "w"))


@pytest.mark.parametrize("arguments", ["info", "--help", "--version", "train --help", "evaluate", "sample", "train"])
def test_a_full_disk_below_stdout(runs, tmp_path, arguments):
    command = arguments.split()
    if command[0] in ("evaluate", "sample"):
        command += [str(runs / "vae")]
        command += ["--samples", "2"] if command[0] == "evaluate" else ["--out", str(tmp_path / "x.npy")]
    elif command == ["train"]:
        command += [*SMALL, "--epochs", "3", "--out", str(tmp_path / "run")]
    status, error = Child(*command, before=printing_to("/dev/full")).end()
    name = "fastelbo" if "-" in arguments else f"fastelbo {arguments}"
    assert status == 2 and error == f"{name}: error: [Errno {errno.ENOSPC}] No space left on device: '/dev/full'\n"
    if command[0] == "sample":
        assert names(tmp_path) == ["x.npy"] and len(np.load(tmp_path / "x.npy")) == 64
    elif command[:2] == ["train", *SMALL[:1]]:
        assert epochs_of(tmp_path / "run") == [1] and files.read_checkpoint(tmp_path / "run")["epoch"] == 1


def test_a_fit_of_a_ppca_that_nobody_reads(tmp_path):
    run = Child("train", "--model", "ppca", "--out", tmp_path / "run", before=printing_to("/dev/full"))
    assert run.end()[0] == 2 and not names(tmp_path), "it is printed before it is written"


@pytest.mark.parametrize("arguments", ["info", "--version", "--lr", "train --epochs 0"])
def test_no_stdout_and_no_stderr(arguments):
    def close(*streams: str) -> Callable[[], object]:
        return lambda: [setattr(sys, name, None) for name in streams]

    bad = arguments in ("--lr", "train --epochs 0")
    assert Child(*arguments.split(), before=close("stderr")).end() == (2 if bad else 0, "")
    assert Child(*arguments.split(), before=close("stdout", "stderr")).end() == (2, "")
    closed = f"fastelbo: error: [Errno {errno.EBADF}] stdout is closed\n"
    assert Child(*arguments.split(), before=close("stdout")).end() == (2, closed)


def test_what_cannot_be_printed_is_lost_and_not_kept(tmp_path):
    with open("/dev/full", "w") as stream:
        with pytest.raises(OSError, match="/dev/full"), flushed(stream):
            print("a", file=stream)
        with flushed(stream):
            print("b", file=stream)
    with open("/dev/full", "w") as stream, pytest.raises(KeyboardInterrupt), flushed(stream):
        print("a", file=stream)
        raise KeyboardInterrupt


def test_a_line_for_a_full_disk_below_stderr(monkeypatch):
    with open("/dev/full", "w") as stream:
        monkeypatch.setattr(sys, "stderr", stream)
        say("lost")
        monkeypatch.undo()


@pytest.mark.parametrize("arguments", ["info", "train", "sample", "evaluate"])
def test_ctrl_c_anywhere(runs, tmp_path, capsys, monkeypatch, arguments):
    """In the midst of what a command does first and last: status 130 and one line."""

    def stop(*_, **__):
        raise KeyboardInterrupt

    places = {
        "info": [(fastelbo, "build_info"), (cli, "_parser")],
        "train": [
            (files, "locked"),
            (cli.data, "load"),
            (cli.pictures if hasattr(cli, "pictures") else files, "write"),
        ],
        "sample": [(fastelbo, "load"), (os, "fsync")],
        "evaluate": [(fastelbo, "load"), (fastelbo, "evaluate")],
    }
    options = {"train": [*SMALL, "--epochs", "1", "--out", tmp_path / "run"], "info": []}
    options |= {"sample": [runs / "vae", "--out", tmp_path / "x.npy"], "evaluate": [runs / "vae"]}
    for place in places[arguments]:
        with monkeypatch.context() as patched:
            patched.setattr(*place, stop)
            assert cli.main([arguments, *map(str, options[arguments])]) == 130
        error = capsys.readouterr().err
        assert error.startswith("interrupted: ") and error.count("\n") == 1
        assert not names(tmp_path)


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("of torch\nin two lines"),
        MemoryError(),
        OverflowError("too large"),
        RecursionError("a loop"),
        torch.OutOfMemoryError("of a GPU"),
    ],
    ids=repr,
)
def test_errors_of_torch_are_one_line(tmp_path, capsys, monkeypatch, error):
    def fail(*_, **__):
        raise error

    monkeypatch.setattr(Trainer, "run_epoch", fail)
    said = " ".join(str(error).split()) or "MemoryError"
    assert refused(capsys, "train", *SMALL, "--out", tmp_path) == f"fastelbo train: error: {said}\n"


@pytest.mark.parametrize("error", [AssertionError, KeyError, AttributeError, IndexError])
def test_errors_of_ours_keep_their_traceback(tmp_path, monkeypatch, error):
    def fail(*_, **__):
        raise error

    monkeypatch.setattr(Trainer, "run_epoch", fail)
    with pytest.raises(error):
        cli.main(["train", *SMALL, "--out", str(tmp_path)])


# ----------------------------------------------------------------------------------------------------------------------
# Locks.


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOTSUP, errno.ENOSYS])
def test_a_file_system_without_locks(tmp_path, capsys, monkeypatch, number):
    def flock(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", flock)
    assert cli.main(["train", *SMALL, "--epochs", "1", "--out", str(tmp_path / "run")]) == 0
    error = capsys.readouterr().err
    assert error.startswith(f"{tmp_path / 'run'} cannot be locked ({os.strerror(number)}): ") and error.count("\n") == 1
    assert names(tmp_path / "run") == ["checkpoint.pt", "config.json", "metrics.csv"]


def test_other_errors_of_a_lock_are_errors(tmp_path, capsys, monkeypatch):
    def flock(*_):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(fcntl, "flock", flock)
    assert "Input/output error" in refused(capsys, "train", *SMALL, "--out", tmp_path / "run")


# ----------------------------------------------------------------------------------------------------------------------
# Sizes.


@pytest.mark.parametrize("net", ["mlp", "conv"])
@pytest.mark.parametrize("option, value", [("latent-dim", 10**13), ("hidden", 10**7), ("hidden", 2**62)])
def test_models_beyond_memory(tmp_path, capsys, net, option, value):
    error = refused(capsys, "train", "--net", net, f"--{option}", value, "--out", tmp_path / "run")
    assert f"{option.replace('-', '_')}={value}" in error and "latent_dim=" in error and "hidden=" in error
    assert " GB; there are " in error and not names(tmp_path)


def test_a_model_that_just_fits(monkeypatch):
    """Its weights four times, to the byte."""
    model = Trainer(Config(hidden=8, latent_dim=2)).model
    needed = 16 * sum(p.numel() for p in model.parameters())
    monkeypatch.setattr(os, "sysconf", {"SC_PAGE_SIZE": 1, "SC_PHYS_PAGES": needed}.__getitem__)
    Trainer(Config(hidden=8, latent_dim=2, device="cpu"))
    monkeypatch.setattr(os, "sysconf", {"SC_PAGE_SIZE": 1, "SC_PHYS_PAGES": needed - 1}.__getitem__)
    with pytest.raises(ValueError, match=r"latent_dim=2 and hidden=8 must fit in memory: .* GB; there are .* GB"):
        Trainer(Config(hidden=8, latent_dim=2, device="cpu"))


@pytest.mark.parametrize("model", ["vae", "ppca"])
def test_samples_beyond_the_disk(runs, tmp_path, capsys, monkeypatch, model):
    for n in (10**15, 2**63 - 1):
        error = refused(capsys, "sample", runs / model, "--n", n, "--out", tmp_path / "x.npy")
        assert f"n must be smaller: {n} samples of shape" in error and f"disk are free in {tmp_path}" in error
    assert "n must be in the range of int64" in refused(capsys, "sample", runs / model, "--n", 10**30)
    free = namedtuple("Usage", "total used free")(0, 0, 5 * 64 * 4)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: free)
    refused(capsys, "sample", runs / model, "--n", 6, "--out", tmp_path / "x.npy")
    assert not names(tmp_path)
    assert cli.main(["sample", str(runs / model), "--n", "5", "--out", str(tmp_path / "x.npy")]) == 0


@pytest.mark.parametrize("model", ["vae", "ppca"])
def test_samples_in_pieces(runs, tmp_path, monkeypatch, model):
    """Those of one piece are what the model draws; more come from the same generator, whole and in order."""
    loaded = fastelbo.load(runs / model)
    generator = torch.Generator().manual_seed(3)
    for pieces in (1, 3):
        monkeypatch.setattr(cli, "PIECE", (100, 1 << 25) if pieces == 1 else (1000, 35 * 64))
        arguments = ["sample", runs / model, "--n", 100, "--seed", 3, "--out", tmp_path / "x.npy"]
        assert cli.main([*map(str, arguments)]) == 0
        sizes = [100] if pieces == 1 else [35, 35, 30]
        generator.manual_seed(3)
        expected = torch.cat([loaded.sample(n, generator=generator) for n in sizes]).numpy()
        found = np.load(tmp_path / "x.npy")
        assert np.array_equal(found, expected) and found.dtype == expected.dtype
        np.save(tmp_path / "y.npy", expected)
        assert (tmp_path / "x.npy").read_bytes() == (tmp_path / "y.npy").read_bytes()


def test_samples_that_are_cut_short(runs, tmp_path, capsys, monkeypatch):
    """By Ctrl-C or a full disk, after some pieces are written: the file of before stays."""
    (tmp_path / "x.npy").write_text("before")
    monkeypatch.setattr(cli, "PIECE", (10, 1 << 25))
    real, arguments = PPCA.sample, ["sample", runs / "ppca", "--out", tmp_path / "x.npy"]
    for error in (KeyboardInterrupt(), OSError(errno.ENOSPC, "No space left on device")):
        calls = []

        def stop(*args, error=error, calls=calls, **options):
            calls.append(1)
            if len(calls) == 4:
                raise error
            return real(*args, **options)

        monkeypatch.setattr(PPCA, "sample", stop)
        if isinstance(error, OSError):
            assert f"No space left on device: '{tmp_path / 'x.npy'}'" in refused(capsys, *arguments)
        else:
            assert cli.main([*map(str, arguments)]) == 130
            assert capsys.readouterr().err == "interrupted: nothing was written\n"
        assert names(tmp_path) == ["x.npy"] and (tmp_path / "x.npy").read_text() == "before"


# ----------------------------------------------------------------------------------------------------------------------
# Paths.


def test_a_link_to_itself(runs, tmp_path, capsys):
    for name in ("x.npy", "x.npz", "x.toml", "x.json", "x"):
        (tmp_path / name).symlink_to(name)
    loop, out = tmp_path / "x", tmp_path / "run"
    for arguments in (
        *(["train", "--data", f"{loop}{kind}", "--out", out] for kind in (".npy", ".npz")),
        ["train", "--test-data", f"{loop}.npy", "--data", f"{loop}.npy", "--out", out],
        *(["train", "--config", f"{loop}{kind}", "--out", out] for kind in (".toml", ".json")),
        *(["train", "--model", model, "--out", path] for model in ("vae", "ppca") for path in (loop, loop / "below")),
        ["train", "--resume", "--out", loop],
        *([command, path] for command in ("evaluate", "sample") for path in (loop, loop / "checkpoint.pt")),
        ["evaluate", runs / "vae", "--data", f"{loop}.npy"],
        *(["sample", runs / "vae", "--out", path] for path in (loop, loop / "below.npy")),
    ):
        assert str(loop) in refused(capsys, *arguments)
    assert names(tmp_path) == ["x", "x.json", "x.npy", "x.npz", "x.toml"] and loop.is_symlink()


def test_what_is_no_file_is_not_replaced(runs, tmp_path, capsys):
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_text("")
    for path in ("fifo", "folder", "file/x.npy", "none/x.npy"):
        error = refused(capsys, "sample", runs / "vae", "--out", tmp_path / path)
        assert str((tmp_path / path).parent) in error
    assert names(tmp_path) == ["fifo", "file", "folder"] and (tmp_path / "fifo").is_fifo()


@pytest.mark.parametrize("options", [[], ["--latent-dim", "1"], ["--method", "em"]])
def test_a_ppca_of_one_column(tmp_path, capsys, options):
    for shape in ((40, 1), (40, 1, 1)):
        np.save(tmp_path / "x.npy", np.random.default_rng(0).normal(size=shape))
        arguments = ["train", "--model", "ppca", "--data", tmp_path / "x.npy", *options, "--out", tmp_path / "new/run"]
        assert f"at least two columns for a PPCA, which needs them; {tmp_path / 'x.npy'} has one" in refused(
            capsys, *arguments
        )
        assert names(tmp_path) == ["x.npy"]


# ----------------------------------------------------------------------------------------------------------------------
# Options from a file.


@pytest.mark.parametrize("kind", ["toml", "json"])
def test_options_by_the_names_of_their_flags(tmp_path, kind):
    entries = {"samples": 3, "objective": "iwae", "latent-dim": 2, "hidden": 8, "batch-size": 500, "epochs": 1}
    lines = (f"{name} = {json.dumps(value)}" for name, value in entries.items())
    (tmp_path / f"run.{kind}").write_text(json.dumps(entries) if kind == "json" else "\n".join(lines))
    assert cli.main(["train", "--config", str(tmp_path / f"run.{kind}"), "--out", str(tmp_path / "run")]) == 0
    config = files.read_checkpoint(tmp_path / "run")["config"]
    assert [config[name] for name in ("num_samples", "latent_dim", "batch_size")] == [3, 2, 500]


def test_an_option_by_two_names(tmp_path, capsys):
    path = tmp_path / "run.json"
    for entries in ({"samples": 2, "num_samples": 2}, {"batch-size": 9, "batch_size": 8}):
        path.write_text(json.dumps(entries))
        one, other = entries
        error = refused(capsys, "train", "--config", path, "--out", tmp_path / "run")
        assert error.endswith(f"{path} has {one} and {other}, which are one option: leave one out\n")
    path.write_text(json.dumps({"samples": None, "num_samples": 1, "epochs": 1, "hidden": 8}))
    assert cli.main(["train", "--config", str(path), "--out", str(tmp_path / "run")]) == 0


@pytest.mark.parametrize(
    "entry, message",
    [
        ('lr = "abc"', "lr must be a float; got str"),
        ("epochs = 2.5", "epochs must be an int; got float"),
        ("epochs = true", "epochs must be an int; got bool"),
        ("lr = true", "lr must be a float; got bool"),
        ("samples = [1]", "num_samples must be an int; got list"),
        ("data = 5", "data must be a str; got int"),
        ("data = true", "data must be a str; got bool"),
        ("test_data = [1]", "test_data must be a str; got list"),
        ("likelihood = 3", "likelihood must be a str, one of "),
        ("objective = ['elbo']", "objective must be a str, one of "),
        ("[data]\nx = 1", "data must be a str; got dict"),
        ("[hidden]\nx = 1", "hidden must be an int; got dict"),
        ("model = 3", "is of another model"),
        ("seed = 1979-05-27", "seed must be an int; got datetime.date"),
        ("lr = nan", "lr must be positive and finite; got nan"),
        (f"epochs = {10**30}", f"got {10**30}"),
    ],
)
def test_entries_of_a_wrong_type(tmp_path, capsys, entry, message):
    (tmp_path / "run.toml").write_text(entry)
    assert message in refused(capsys, "train", "--config", tmp_path / "run.toml", "--out", tmp_path / "new/run")
    assert names(tmp_path) == ["run.toml"]


def test_entries_of_a_wrong_type_for_a_ppca(tmp_path, capsys):
    for entry, message in (("data = 5", "data must be a str; got int"), ("method = 1", "method must be a str, one of")):
        (tmp_path / "run.toml").write_text(entry)
        arguments = ["train", "--model", "ppca", "--config", tmp_path / "run.toml", "--out", tmp_path / "run"]
        assert message in refused(capsys, *arguments)
    assert names(tmp_path) == ["run.toml"]
