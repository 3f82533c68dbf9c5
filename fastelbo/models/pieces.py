"""Data with their conditions, by rows and in pieces that stay in the cache."""

import math
from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import TYPE_CHECKING, Annotated

import torch
from torch import Tensor

from fastelbo._internal import arguments
from fastelbo._internal.arguments import Condition
from fastelbo.losses import expand

# Elements of recon that are decoded at a time. On a CPU few enough that they and the decoder's hidden layers stay in
# the cache, which is up to twice as fast; on other devices enough to keep them busy.
PIECE_ELEMENTS = {"cpu": 1 << 18, "other": 1 << 25}
FIRST_ROWS = 16  # of which the size of a row is learned

if TYPE_CHECKING:
    from fastelbo.data import Dataset

    Rows = Tensor | Dataset
else:
    _dataset = arguments.instance(torch.utils.data.Dataset, "a torch.Tensor or a fastelbo.data.Dataset")
    Rows = Annotated[Tensor, arguments.either(arguments.Data.__metadata__[0], _dataset)]

BATCH = 500  # data that are encoded at a time
BATCH_ELEMENTS = 1 << 24  # at most, of those


def given(condition: Condition | None) -> tuple[Condition, ...]:
    """The further argument of a module, if there is one."""
    return () if condition is None else (condition,)


def _each(function: Callable[[Tensor], Tensor], condition: Condition | None) -> Condition | None:
    if condition is None or isinstance(condition, Tensor):
        return None if condition is None else function(condition)
    return tuple(map(function, condition))


def fold(condition: Condition | None, lead: tuple[int, ...]) -> Condition | None:
    """The condition [B, ...] of latents whose leading dimensions, [B] or [K, B], are folded."""

    def each(t: Tensor) -> Tensor:
        if t.dim() == 0 or t.shape[0] != lead[-1]:
            raise ValueError(f"condition must be [B, ...] with B={lead[-1]} from z; got {tuple(t.shape)}")
        return t.expand(*lead, *t.shape[1:]).flatten(0, 1) if len(lead) == 2 else t

    return _each(each, condition)


def rows_of(condition: Condition | None, datum: Tensor) -> Condition | None:
    """The condition of the data [n]."""
    return _each(lambda t: t.index_select(0, datum), condition)


def rows_between(condition: Condition | None, start: int, end: int) -> Condition | None:
    """The condition of the data from start to end."""
    return _each(lambda t: t[start:end], condition)


def cut(start: int, end: int, elements: int, device: torch.device) -> list[tuple[int, int]]:
    """start to end in pieces that stay in the cache, each step of so many elements."""
    piece = max(1, PIECE_ELEMENTS.get(device.type, PIECE_ELEMENTS["other"]) // max(1, elements))
    count = max(1, round((end - start) / piece))
    return list(pairwise(start + (end - start) * i // count for i in range(count + 1)))  # of nearly equal size


def blocks_of(
    x: Tensor, condition: Condition | None, mask: Tensor | None
) -> Iterator[tuple[Tensor, Condition | None, Tensor | None]]:
    """x [B, *event] with its condition and mask, cut along B so that each block stays in the cache."""
    if x.dim() == 0:  # the model says what is wrong
        yield x, condition, mask
        return
    fold(condition, (len(x),))  # refuses one of another number of rows
    whole = None if mask is None else expand("mask", mask, x.shape, "x")
    for a, b in cut(0, len(x), x.numel() // max(1, len(x)), x.device):
        yield x[a:b], rows_between(condition, a, b), None if whole is None else whole[a:b]


def by_rows(function: Callable[[int, int], Tensor], n: int) -> Tensor:
    """function(first, last) [last - first, ...] of rows 0 to n, in pieces and put into one tensor."""
    if n < 2 * FIRST_ROWS or torch.compiler.is_compiling():
        return function(0, n)
    found = function(0, FIRST_ROWS)
    whole = found.new_empty(n, *found.shape[1:])
    whole[:FIRST_ROWS] = found
    for a, b in cut(FIRST_ROWS, n, found[0].numel(), found.device):
        whole[a:b] = function(a, b)
    return whole


def batch_size(x: Rows, num_samples: int = 1) -> int:
    """How many data are encoded at a time, decoded num_samples times each."""
    return max(1, min(math.ceil(BATCH / num_samples), BATCH_ELEMENTS // max(1, math.prod(x.shape[1:]))))


def mask_of(x: Tensor) -> Tensor | None:
    """The cells of x that are not missing; None where all are there."""
    there = ~x.isnan() if x.is_floating_point() else None
    return None if there is None or bool(there.all()) else there


def masked(x: Rows) -> Iterator[tuple[Tensor, Tensor | None]]:
    """Batches, each with its `mask_of`."""
    size = batch_size(x)
    for batch in x.split(size) if isinstance(x, Tensor) else x.batches(size):
        yield batch, mask_of(batch)
