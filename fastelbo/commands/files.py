"""The files of a run: written atomically, checked when they are read, in a folder that one process locks."""

import csv
import errno
import fcntl
import glob
import io
import json
import math
import os
import secrets
import signal
import threading
import tomllib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from itertools import islice
from pathlib import Path
from stat import S_ISREG
from typing import Any
from zipfile import ZIP_STORED, ZipFile

import torch

from fastelbo._internal.reading import reading as reading
from fastelbo._internal.streams import say

CHECKPOINT = "checkpoint of fastelbo"
CONTENT = {"model_kind": str, "config": dict, "data": dict, "model": dict}  # of every checkpoint; a model adds its own
_PARTIAL = ".{}.partial"  # the end of the name of a file that is being written, by the process of 6 hexadecimal digits
_NO_LOCKS = (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOTSUP, errno.ENOSYS)  # what flock says where there are none


# ----------------------------------------------------------------------------------------------------------------------
# Writing.


@contextmanager
def uninterrupted() -> Iterator[None]:
    """Ctrl-C waits for the end of the block. Blocks nest. Only the main thread gets Ctrl-C: no effect in others."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    pending: list[int] = []
    before = signal.signal(signal.SIGINT, lambda number, _: pending.append(number))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
    if pending:
        signal.raise_signal(signal.SIGINT)


def _clean(folder: Path, name: str) -> None:
    """Remove what processes that were killed have left of files of a name, a pattern."""
    for left in folder.glob(name + _PARTIAL.format("[0-9a-f]" * 8)):
        try:
            os.kill(int(left.suffixes[-2][1:7], 16), 0)
        except ProcessLookupError:
            left.unlink(missing_ok=True)
        except OSError:  # another user's
            pass


def write_pieces(path: Path, pieces: Iterable[bytes]) -> None:
    """Write a file atomically: readers find the old content or the new one. Several processes may write one file.

    Raises:
        OSError: as the system has it, with the path.
        What `pieces` raise, and KeyboardInterrupt. Then, too, what was there before is left as it was.
    """
    partial = path.with_name(path.name + _PARTIAL.format(f"{os.getpid():06x}{secrets.token_hex(1)}"))
    _clean(path.parent, glob.escape(path.name))
    try:
        with suppress(FileNotFoundError):  # a device or a link to itself would be replaced, too
            if not S_ISREG(path.stat().st_mode):
                raise OSError(errno.EEXIST, "There is something that is no file")
        with partial.open("xb") as file:
            file.writelines(pieces)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except BaseException as error:
        with suppress(OSError):
            partial.unlink()
        if isinstance(error, OSError):
            raise OSError(error.errno, error.strerror, str(path)) from error
        raise


def write(path: Path, content: bytes) -> None:
    """`write_pieces` of one piece, for which Ctrl-C waits."""
    with uninterrupted():
        write_pieces(path, [content])


@contextmanager
def appended(path: Path, content: bytes) -> Iterator[None]:
    """Append to a file; undo that if not all of it can be written, or the block raises.

    Raises:
        OSError: as the system has it, with the path.
    """
    with path.open("ab", buffering=0) as file:
        size = file.tell()
        try:
            try:
                while content:
                    content = content[file.write(content) :]
            except OSError as error:
                raise OSError(error.errno, error.strerror, str(path)) from error
            yield
        except BaseException:
            file.truncate(size)
            raise


def csv_bytes(columns: Sequence[str], rows: Iterable[Mapping[str, float]], *, header: bool) -> bytes:
    """Rows of a CSV file, under its header if that is wanted."""
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, columns)
    if header:
        writer.writeheader()
    writer.writerows(rows)
    return text.getvalue().encode()


def save_config(path: Path, kind: str, config: Mapping[str, Any]) -> None:
    """Write the options of a run atomically, as JSON: for people, and for other programs.

    Raises:
        OSError: as `write`.
    """
    write(path, (json.dumps({"model": kind, **config}, indent=2) + "\n").encode())


def read_config(path: Path, names: Mapping[str, str]) -> dict[str, Any]:
    """The options in a TOML file, or in the config.json of a run; null is an option that is not set.

    Args:
        names: of every name that an option may have there, the one that it gets.

    Raises:
        OSError: the system cannot read it.
        ValueError: it is damaged, or has an option that is not among the names, or one by two names.
    """
    kind = "JSON" if path.suffix == ".json" else "TOML"
    with path.open("rb") as file, reading(path, f"{kind} file"):
        found: dict[str, Any] = json.load(file) if kind == "JSON" else tomllib.load(file)
        if not isinstance(found, dict):
            raise ValueError("no table of options")
    if foreign := [name for name in found if name not in names]:
        there = dict.fromkeys(names.values())
        raise ValueError(f"{path} has no option {', '.join(foreign)}: there are {', '.join(there)}")
    named: dict[str, str] = {}  # by what name an option is there
    for name in (name for name, value in found.items() if value is not None):
        if (other := named.setdefault(names[name], name)) != name:
            raise ValueError(f"{path} has {other} and {name}, which are one option: leave one out")
    return {option: found[name] for option, name in named.items()}


def save_checkpoint(path: Path, state: Mapping[str, Any]) -> None:
    """Write a checkpoint atomically; it loads with torch.load(weights_only=True).

    Raises:
        OSError: as `write`.
    """
    content = io.BytesIO()  # torch.save turns what a file raises into a RuntimeError
    torch.save(dict(state), content)
    write(path, content.getvalue())


# ----------------------------------------------------------------------------------------------------------------------
# Reading.


def read_checkpoint(path: Path) -> dict[str, Any]:
    """The content of a checkpoint; the path is that of the file, or of the folder of a run.

    Raises:
        OSError: there is none, or the system cannot read it.
        ValueError: it is damaged, or another kind of file.
    """
    path = path / "checkpoint.pt" if path.is_dir() else path
    if not path.exists():
        raise FileNotFoundError(f"no run to go on from: there is no {path}")
    with path.open("rb") as file, reading(path, CHECKPOINT):
        with ZipFile(file) as archive:
            # torch.load compares no check sums and trusts the sizes in the file
            for member in archive.infolist():
                if member.compress_type != ZIP_STORED or member.file_size != member.compress_size:
                    raise ValueError(f"{member.filename} is compressed")
            if broken := archive.testzip():
                raise ValueError(f"{broken} has another check sum")
        file.seek(0)
        state: dict[str, Any] = torch.load(file, map_location="cpu", weights_only=True)
        missing = [name for name, kind in CONTENT.items() if not isinstance(state.get(name), kind)]
        if missing:
            raise ValueError(f"without {', '.join(missing)}")
    return state


def read_history(path: Path, columns: Sequence[str], epochs: int) -> list[dict[str, float]]:
    """The first rows of a metrics.csv, one per epoch.

    Raises:
        OSError: the system cannot read it.
        ValueError: a row of them is missing or damaged.
    """
    with path.open(newline="") as file, reading(path, f"metrics.csv with the {epochs} epochs of the checkpoint"):
        reader = csv.DictReader(file)
        rows = [{name: json.loads(row[name]) for name in columns} for row in islice(reader, epochs)]
        if [row["epoch"] for row in rows] != list(range(1, epochs + 1)):
            raise ValueError(f"the epochs of its rows are not 1 to {epochs}")
        if not all(math.isfinite(value) for row in rows for value in row.values()):
            raise ValueError("a figure is not finite")
        return rows


# ----------------------------------------------------------------------------------------------------------------------
# The folder of a run.


def _lock(path: Path) -> int:
    """Lock a file -> its descriptor; BlockingIOError if another process has locked it.

    Where the file system has no locks it says so, and the file stays without.
    """
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.path.samestat(os.fstat(descriptor), path.stat()):
                return descriptor
        except FileNotFoundError:
            pass
        except BaseException as error:
            if isinstance(error, OSError) and error.errno in _NO_LOCKS:
                say(f"{path.parent} cannot be locked ({error.strerror}): start no other run there meanwhile")
                return descriptor
            os.close(descriptor)
            raise
        os.close(descriptor)  # the owner of the file has removed it in the meantime: lock its successor


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Lock the folder against other processes. It is created if there is none, and removed if it stays empty.

    Raises:
        BlockingIOError: another process has locked it.
        OSError: it cannot be made or written to.
    """
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    lock = folder / ".lock"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        try:
            descriptor = _lock(lock)
        except BlockingIOError:
            raise BlockingIOError(f"another run is writing to {folder}: write to another directory") from None
        try:
            _clean(folder, "*")
            yield
        finally:
            with suppress(OSError):
                lock.unlink()
            os.close(descriptor)
    finally:
        with suppress(OSError):  # the first one that is not empty
            for path in made:
                path.rmdir()
