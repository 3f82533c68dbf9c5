"""log_prob of the distributions of other packages, computed by fastelbo while it is replaced."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.distributions import Distribution

import fastelbo
from fastelbo import reference
from fastelbo._internal import ops

# log p of a distribution and a value; None where it is to be computed as before
LogProb = Callable[[Any, Tensor], Tensor | None]

INTEGERS = (torch.uint8, *reference.COUNTS)
FLOATS = (torch.float32, torch.float64)  # half types are computed in themselves elsewhere


def unexpanded(t: Tensor) -> Tensor:
    """What a distribution expanded to t: the kernel sums its gradient. Of theta [B, G] it is [G]."""
    base = None if torch.compiler.is_compiling() else t._base
    if base is None or 0 not in t.stride() or base.dim() > t.dim() or base.requires_grad != t.requires_grad:
        return t
    shapes = zip(reversed(base.shape), reversed(t.shape), strict=False)
    if base.storage_offset() != t.storage_offset() or not all(a in (1, b) for a, b in shapes):
        return t
    return base if base.expand(t.shape).stride() == t.stride() else t


def fits(first: Tensor, *others: Tensor) -> bool:
    """Whether the kernels take these parameters."""
    dtype, device = first.dtype, first.device
    # where twins compute, the distribution's own formula does as well
    return (
        dtype in FLOATS and all(t.dtype == dtype and t.device == device for t in others) and not ops.takes_twins(first)
    )


def elements(likelihood: str, parameters: Sequence[Tensor], x: Tensor) -> Tensor | None:
    """log p of every element, in the broadcast shape; None where the kernels do not take what is given."""
    dtype, device = parameters[0].dtype, parameters[0].device
    if not fits(*parameters) or x.device != device or not (x.dtype == dtype or x.dtype in INTEGERS):
        return None
    shape = torch.broadcast_shapes(x.shape, *(t.shape for t in parameters))
    if x.shape not in (shape, shape[1:]):
        x = x.expand(shape)
    first, *others = map(unexpanded, parameters)
    recon = (first if x.shape == shape else first.expand(shape), *others)
    return fastelbo.log_prob(recon, x, likelihood=likelihood, reduce=False)


def is_counts(x: Tensor) -> bool:
    """Whole, not negative and finite, by three short passes; torch's check of the support takes ten times as long."""
    if not x.is_floating_point() or x.numel() == 0 or torch._C._are_functorch_transforms_active():
        return False
    return x.amin().item() >= 0 and x.frac().sum().item() == 0  # of infinity that is NaN


def validate(px: Distribution, x: Tensor) -> None:
    """As the distributions of counts do it; torch's check is left out of what passes it."""
    if px._validate_args and not (x.shape == px.batch_shape + px.event_shape and is_counts(x)):
        px._validate_sample(x)


class Replaced:
    """log_prob of some classes, replaced between the first `begin` and the last `end`."""

    def __init__(self, fused: Mapping[Any, LogProb]) -> None:
        self._fused, self._on = fused, 0
        self._own: dict[Any, Any] = {}  # what stood in the classes themselves: some inherit log_prob

    def begin(self) -> Applied:
        if not self._on:
            for of, fused in self._fused.items():
                self._own[of] = vars(of).get("log_prob")
                of.log_prob = self._log_prob(of.log_prob, fused)
        self._on += 1
        return Applied(self)

    def end(self) -> None:
        self._on -= 1
        if self._on:
            return
        for of, own in self._own.items():
            if own is None:
                del of.log_prob
            else:
                of.log_prob = own

    @staticmethod
    def _log_prob(plain: Callable[[Any, Tensor], Tensor], fused: LogProb) -> Callable[[Any, Tensor], Tensor]:
        @functools.wraps(plain)
        def log_prob(self: Any, value: Tensor) -> Tensor:
            found = fused(self, value) if isinstance(value, Tensor) else None
            return plain(self, value) if found is None else found

        return log_prob


class Applied:
    """What an `apply` returns: a context manager; `undo` ends it, once."""

    def __init__(self, replaced: Replaced) -> None:
        self._replaced: Replaced | None = replaced

    def undo(self) -> None:
        """log_prob is again what it was, unless another `apply` is still on."""
        if self._replaced is not None:
            self._replaced.end()
        self._replaced = None

    def __enter__(self) -> Applied:
        return self

    def __exit__(self, *_: object) -> None:
        self.undo()
