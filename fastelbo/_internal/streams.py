"""What a command says: on streams that may be closed, full, or no longer read."""

import errno
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import TextIO


@contextmanager
def flushed(stream: TextIO) -> Iterator[None]:
    """What was printed is out at the end of the block; OSError where it cannot be, and no second one at exit."""
    try:
        yield
    finally:
        stopped = isinstance(sys.exception(), KeyboardInterrupt)
        try:
            stream.flush()
        except OSError as error:
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
            if not stopped:
                raise OSError(error.errno, error.strerror, stream.name) from error


@contextmanager
def printing() -> Iterator[None]:
    """A block that prints: see `flushed`. A stderr that is closed swallows; a stdout that is closed is an OSError."""
    while (descriptor := os.open(os.devnull, os.O_RDWR)) <= 2:  # or a file would get the place of a closed stream
        pass
    os.close(descriptor)
    if sys.stderr is None:
        sys.stderr = open(os.devnull, "w")  # noqa: SIM115
    if sys.stdout is None:
        raise OSError(errno.EBADF, "stdout is closed")
    with flushed(sys.stdout):
        yield


def say(line: str) -> None:
    """A line on stderr, as far as that takes one."""
    with suppress(OSError), flushed(sys.stderr):
        print(line, file=sys.stderr)
