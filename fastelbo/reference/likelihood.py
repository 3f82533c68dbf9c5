"""log p(x | recon)."""

from collections.abc import Sequence

import torch
from torch import Tensor

from fastelbo import likelihoods
from fastelbo.likelihoods import Domain
from fastelbo.reference.derivatives import backward_of


def compute_dtype(t: Tensor) -> torch.dtype:
    return torch.float64 if t.dtype == torch.float64 else torch.float32


COUNTS = (torch.int16, torch.int32, torch.int64)  # dtypes of x that hold counts alone


def read_data(x: Tensor, dtype: torch.dtype, domain: Domain = "reals") -> Tensor:
    """x in the compute type: counts as they are; other data with bool as 0 and 1, and uint8 as x / 255.

    Raises:
        TypeError: bool for counts, or counts of 16 bits or more for other data.
    """
    if domain == "counts":
        if x.dtype == torch.bool:
            raise TypeError("x must be counts: a float type, uint8, int16, int32 or int64; got bool")
        return x.to(dtype)
    if x.dtype in COUNTS:
        found = str(x.dtype).removeprefix("torch.")
        raise TypeError(f"x must be a float type, uint8 (read as x / 255) or bool; got {found}")
    return x.to(dtype) / 255 if x.dtype == torch.uint8 else x.to(dtype)


def sum_from(t: Tensor, dim: int) -> Tensor:
    """Sum over the dimensions from dim on; over none of them, t itself (torch's sum over no dimensions sums all)."""
    return t.sum(list(range(dim, t.dim()))) if t.dim() > dim else t


def log_prob_elements(
    parameters: Sequence[Tensor], x: Tensor, mask: Tensor | None = None, likelihood: str = "bernoulli"
) -> Tensor:
    """log p(x | parameters) of every element -> [K?, B, *event].

    parameters: the first [K?, B, *event]; the others have its shape, [*event] or are 0-d. x [B, *event].
    """
    recon, *others = parameters
    dtype, row = compute_dtype(recon), likelihoods.get(likelihood)
    recon, x = recon.to(dtype), read_data(x, dtype, row.domain)
    numbers = len(row.parameters) - 1 - row.data  # of the others; behind them is data
    for t in others[:numbers]:
        if not t.is_floating_point():
            raise TypeError(f"recon must hold floating parameters; got {str(t.dtype).removeprefix('torch.')}")
    others = [t.to(dtype) for t in others]
    weight = None
    if mask is not None:
        weight = mask.to(dtype).expand(x.shape)
        # a masked cell is replaced before the maths, so that its NaN reaches neither value nor gradient
        keep = weight != 0
        x = torch.where(keep, x, 0.5)
        recon = torch.where(keep, recon, 0.5)
        fills = [0.5] * numbers + [1.0] * row.data  # totals above x, however it is rounded
        others = [torch.where(keep, t, fill) for t, fill in zip(others, fills, strict=False)]
    terms = row.log_prob(x.expand(recon.shape), recon, *others)
    return terms if weight is None else terms * weight


def log_prob(
    parameters: Sequence[Tensor], x: Tensor, mask: Tensor | None = None, likelihood: str = "bernoulli"
) -> Tensor:
    """The same, summed over the event dimensions -> [K?, B]."""
    return sum_from(log_prob_elements(parameters, x, mask, likelihood), parameters[0].dim() - x.dim() + 1)


log_prob_elements_backward = backward_of(log_prob_elements, ("parameters", "x"))
log_prob_backward = backward_of(log_prob, ("parameters", "x"))
