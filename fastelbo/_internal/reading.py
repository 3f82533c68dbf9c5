"""What a parser raises on a damaged file."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def reading(path: Path, kind: str) -> Iterator[None]:
    """Turn what a parser raises on a damaged file into a ValueError that names the file and its kind."""
    try:
        with warnings.catch_warnings(action="ignore"):
            yield
    except MemoryError:
        raise
    except Exception as error:
        # an error of the system itself passes; zipfile raises OSErrors too, for wrong offsets in the file
        if isinstance(error, OSError) and error.filename is not None:
            raise
        said = (str(error).splitlines() or [""])[0]
        raise ValueError(f"{path} is damaged, or no {kind} ({type(error).__name__}: {said})") from error
