"""The progress bar of everything that may take long."""

from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

import torch

_T = TypeVar("_T")


def progress(
    steps: Iterable[_T], label: str, unit: str, total: int, size: Callable[[_T], int] = lambda _: 1
) -> Iterator[_T]:
    """The same steps. A bar tells of them on stderr where that is a terminal, after two seconds.

    Args:
        unit: what is counted; `total` of them in all, `size(step)` in a step.
    """
    if torch.compiler.is_compiling():
        yield from steps
        return
    try:
        from tqdm import tqdm
    except ImportError:  # it comes with fastelbo[train]
        yield from steps
        return
    with tqdm(total=total, desc=label, unit=unit, delay=2.0, disable=None, leave=False) as bar:
        for step in steps:
            yield step
            bar.update(size(step))
