"""Sums in a fixed order, so that no number of threads changes their bits.

torch shares out the sums of a tensor of SHARED elements or more: the terms, where the result is one number; else the
numbers, some to each thread, and how a number's terms are added then depends on its neighbours. The sum of a contiguous
row is a thread's own, whatever the others do.
"""

import math
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

SHARED = 1 << 15  # at::internal::GRAIN_SIZE
ROW = 1 << 12


def _is_shared(t: Tensor) -> bool:
    return t.device.type == "cpu" and t.numel() >= SHARED


def _row_sums(rows: Tensor) -> Tensor:
    """[n, size], contiguous -> [n]; rounded to a half type once."""
    wide, sums = torch.promote_types(rows.dtype, torch.float32), rows
    while len(sums) == 1 and _is_shared(sums):
        sums = torch.nn.functional.pad(sums, (0, -sums.shape[1] % ROW)).view(-1, ROW).sum(1, dtype=wide).unsqueeze(0)
    return sums.sum(1).to(rows.dtype)


def ordered_sum(t: Tensor, *dims: int) -> Tensor:
    """The sum over these dimensions, at least one, which do not stay."""
    if not _is_shared(t):
        return t.sum(dims)
    kept = [d for d in range(t.dim()) if d not in dims]
    shape = [t.shape[d] for d in kept]
    return _row_sums(t.permute(*kept, *dims).reshape(math.prod(shape), -1).contiguous()).view(shape)


def reduce(loss: Tensor, reduction: str) -> Tensor:
    """The loss [B] by "mean", "sum" or "none"."""
    if reduction == "none":
        return loss
    if not _is_shared(loss):
        return loss.mean() if reduction == "mean" else loss.sum()
    total = ordered_sum(loss, 0)
    return total / len(loss) if reduction == "mean" else total


class _Expand(torch.autograd.Function):
    @staticmethod
    def forward(t: Tensor, shape: torch.Size) -> Tensor:
        return t.expand(shape)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, torch.Size], output: Tensor) -> None:
        ctx.shape = inputs[0].shape

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        padded = (1,) * (grad.dim() - len(ctx.shape)) + tuple(ctx.shape)
        repeated = [d for d, size in enumerate(padded) if size != grad.shape[d]]
        return ordered_sum(grad, *repeated).view(ctx.shape), None


def expand(t: Tensor, shape: torch.Size) -> Tensor:
    """t.expand(shape), whose gradient is summed in a fixed order."""
    result = t.expand(shape)
    if not (t.requires_grad and torch.is_grad_enabled() and _is_shared(result)):
        return result
    if torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0:
        return result
    return _Expand.apply(t, shape)  # type: ignore[no-any-return, no-untyped-call]
