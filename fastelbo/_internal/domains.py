"""Data, and probabilities, outside of the domain of a likelihood.

Values are read in eager mode and on the CPU alone: nothing waits for a device, and what is compiled is not checked.
"""

import torch
from torch import Tensor

from fastelbo import likelihoods

# All of x costs a sixth of `elbo_loss` with its backward: a function that is called at every step looks at the first
# calls of a likelihood and a shape, and then at every 64th.
FIRST, INTERVAL = 64, 64
_calls: dict[tuple[str, torch.Size], int] = {}
_UNIT = {name for name, row in likelihoods.LIKELIHOODS.items() if row.domain == "[0, 1]"}


def readable(t: Tensor) -> bool:
    """Whether the values of t can be read: nothing traces, and nothing has to be waited for."""
    return t.device.type == "cpu" and untraced(t)


def untraced(t: Tensor) -> bool:
    """Whether t has values: nothing traces it, or transforms what is done with it."""
    return (
        not torch.compiler.is_compiling()
        and not torch._C._are_functorch_transforms_active()
        and not torch._C._is_tracing()
        and torch._C._len_torch_dispatch_stack() == 0
        and not torch._C._dispatch_keys(t).has(torch._C.DispatchKey.Python)
    )


def check_data(x: Tensor, likelihood: str, mask: Tensor | None = None) -> None:
    """Refuse data outside of the domain, where mask is not 0. NaN is no matter of this.

    Raises:
        ValueError: with the range of x.
    """
    counts = likelihoods.get(likelihood).domain == "counts"
    if not readable(x) or not (x.is_floating_point() or counts) or x.dtype == torch.bool or x.numel() == 0:
        return
    x = x.detach()
    objection = likelihoods.objection("x", *_range_of(x), likelihood)
    if objection is not None and mask is not None:
        objection = likelihoods.objection("x", *_range_of(x.masked_fill(mask == 0, 0)), likelihood)
    if objection is not None:
        raise ValueError(objection)


def check_some(first: Tensor, x: Tensor, likelihood: str, mask: Tensor | None = None) -> None:
    """`check_data` under a Bernoulli, and its probabilities, at some calls. Of what is no count, log p is -inf: the
    loss tells.
    """
    if likelihood not in _UNIT or torch.compiler.is_compiling():
        return
    key = likelihood, x.shape
    if len(_calls) > 1000 and key not in _calls:
        _calls.clear()
    calls = _calls[key] = _calls.get(key, 0) + 1
    if calls <= FIRST or calls % INTERVAL == 0:
        check_data(x, likelihood, mask)
        if likelihoods.get(likelihood).parameters == ("probs",):
            check_probabilities(first, x, likelihood, mask)


def check_probabilities(t: Tensor, x: Tensor, likelihood: str, mask: Tensor | None) -> None:
    """Refuse probabilities t of x outside of [0, 1], where mask is not 0.

    Raises:
        ValueError: with the range of t.
    """
    if not readable(t) or t.numel() == 0:
        return
    low, high = _range_of(t.detach())
    if (low < 0 or high > 1) and mask is not None:
        if t.shape[-x.dim() :] != x.shape:  # kept rows, of which the mask is another
            return
        low, high = _range_of(t.detach().masked_fill(mask == 0, 0.5))
    if low < 0 or high > 1:
        raise ValueError(
            f"recon must be probabilities in [0, 1] for likelihood {likelihood!r}; they go from {low:.3g} to "
            f"{high:.3g}: end the decoder in a sigmoid, or take 'bernoulli', which takes logits"
        )


def _range_of(t: Tensor) -> tuple[float, float]:
    low, high = t.aminmax() if t.is_contiguous() else (t.amin(), t.amax())  # aminmax copies
    return low.item(), high.item()
