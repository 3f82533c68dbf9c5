"""What the losses take, brought into the shapes and types that the ops take."""

from typing import Any, cast

import torch
from torch import Tensor

from fastelbo import reference
from fastelbo._internal import ordered
from fastelbo._internal.arguments import ORDINALS
from fastelbo.estimators import Estimator

_CPU = torch.device("cpu")
Recon = Tensor | tuple[Tensor, ...]


def expand(name: str, t: Tensor, shape: torch.Size, like: str) -> Tensor:
    """t, broadcast to the shape; its gradient is summed in a fixed order."""
    if t.dim() == len(shape) and t.shape == shape:  # sizes are compared only if they pair up: each becomes a guard
        return t
    if t.requires_grad:  # the terms of a half type's gradient are rounded once, as their sum
        t = t.to(torch.promote_types(t.dtype, torch.float32))
    try:
        return ordered.expand(t, shape)
    except RuntimeError:
        raise ValueError(f"{name} must broadcast to the shape {tuple(shape)} of {like}; got {tuple(t.shape)}") from None


def split_recon(recon: Any) -> tuple[Tensor, ...]:
    """The parameters of the likelihood: recon is one tensor, or a tuple of tensors such as (mean, logvar)."""
    return (recon,) if isinstance(recon, Tensor) else tuple(recon)


def join_recon(first: Tensor, *others: Tensor) -> Recon:
    """The inverse of `split_recon`."""
    return cast(Recon, (first, *others)) if others else first


def parameters(recon: Any, x: Tensor) -> list[Tensor]:
    """The parameters, each in a shape that the ops take: that of the first, that of one datum, or 0-d."""
    if isinstance(recon, Tensor):
        return [recon]
    first, *others = recon
    event = x.shape[1:]
    shaped = [first]
    for ordinal, t in zip(ORDINALS[1:], others, strict=False):
        fits = t.dim() == 0 or t.shape == event
        shaped.append(t if fits else expand(f"the {ordinal} tensor of recon", t, first.shape, "the first"))
    return shaped


def mask_like(mask: Tensor | None, x: Tensor) -> Tensor | None:
    return None if mask is None else expand("mask", mask, x.shape, "x")


def weighted(weight: float | Tensor, kl: Tensor) -> Tensor:
    """weight kl; a weight of 0 leaves nothing of an infinite KL, nor a gradient (0 times infinity is NaN)."""
    if isinstance(weight, Tensor):
        return weight * torch.where(kl.isinf() & (weight == 0), 0.0, kl)
    # torch 2.15 compiles a graph for each float of which a comparison is in the graph
    return weight * (kl if weight != 0 else torch.where(kl.isinf(), 0.0, kl))


def compiling() -> bool:
    """Whether torch.compile traces this call: then a float may be an input of the graph, and a draw may be repeated."""
    return torch.compiler.is_dynamo_compiling()


def number(value: float | Tensor, default: float, like: Tensor) -> Tensor | None:
    """A number as the ops take it: a 0-d tensor, or None of the default.

    Of a float it lies on the CPU, where host code reads it without a wait; in a compiled graph, of which a float may be
    an input, on the device: Inductor's CUDA graphs take no CPU tensor.
    """
    if isinstance(value, Tensor):
        return value
    if compiling():
        return torch.ones((), dtype=reference.compute_dtype(like), device=like.device) * value
    return None if value == default else torch.scalar_tensor(value, dtype=torch.float64, device=_CPU)


def bound_numbers(row: Estimator, like: Tensor) -> tuple[Tensor | None, Tensor | None, int, list[float]]:
    """An estimator as the ops take it: elbo_weight, alpha, groups, and the three coefficients of the gradient."""
    coefficients = [row.path, row.path_weight, row.score]
    return number(row.elbo_weight, 0.0, like), number(row.alpha, 0.0, like), row.groups, coefficients
