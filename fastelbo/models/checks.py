"""What encoders and decoders return, and what contradicts a likelihood: data, last layers that miss its parameters.

Values are read in eager mode and on the CPU alone: nothing waits for a device, and what is compiled is not checked.
Layers are known by the graph that autograd has recorded, whatever the modules are called.
"""

import math
import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastelbo import likelihoods, reference
from fastelbo._internal import domains
from fastelbo._internal.arguments import ORDINALS
from fastelbo.losses import Recon, split_recon

_BOUNDS = {
    **dict.fromkeys(("Sigmoid", "Hardsigmoid", "Softmax"), (0.0, 1.0)),
    **dict.fromkeys(("Tanh", "Softsign", "Erf"), (-1.0, 1.0)),
    **dict.fromkeys(("Relu", "Softplus", "Exp", "Abs"), (0.0, math.inf)),
    **dict.fromkeys(("LogSigmoid", "LogSoftmax"), (-math.inf, 0.0)),
    "Silu": (-0.28, math.inf),
    "Gelu": (-0.17, math.inf),
    "Mish": (-0.31, math.inf),
    "Hardswish": (-0.375, math.inf),
}
_VIEWS = {"View", "UnsafeView", "ReshapeAlias", "ToCopy"}
_PICKS = {"Permute", "Transpose", "T", "Squeeze", "Unsqueeze", "Split", "Unbind", "Slice", "Select", "Clone", "Alias"}
_POINTWISE = {*_BOUNDS, "LeakyRelu", "Elu", "Celu", "Hardtanh", "Clamp", "Mul", "Add"} - {"Softmax", "LogSoftmax"}
_LOGITS = ("logits", "zero_logits", "mixture_logits", "log_rate", "log_mean")
_LOG_SCALES = ("logvar", "log_scale", "log_theta")
REACH = 2.0  # a logit, or the logarithm of a mean, takes values on both sides of 0, at least as far as this
UNREACHED = 0.1  # of the data's variance: what may lie beyond the means that a decoder can return, as noise


def check_batch(checked: int, x: Tensor, mask: Tensor | None, likelihood: str, recon: Recon, loss: Tensor) -> int:
    """Refuse NaN in x, and in a model's first batch, and the first with a graph, what contradicts the likelihood.

    Args:
        checked: what this returned of the batch before; 0 for the first.

    Returns:
        1 after a batch without a graph, 2 after one with it.

    Raises:
        ValueError: with what was found, and the way out.
    """
    _check_nan(x, mask, loss)
    if not checked:
        domains.check_data(x, likelihood, mask)
    parameters = split_recon(recon)
    level = 1 + parameters[0].requires_grad
    if checked >= level:
        return checked
    check_decoder(parameters, x, likelihood, mask)
    if not checked and likelihood == "bernoulli":
        _warn_of_probabilities(parameters[0].detach())
    return level


def _check_nan(x: Tensor, mask: Tensor | None, loss: Tensor) -> None:
    if not domains.readable(loss) or not x.is_floating_point() or not loss.isnan().any():
        return
    missing = x.isnan()
    if mask is not None:
        missing = missing & (mask != 0)
    if missing.any():
        where = "" if mask is None else " where mask is not 0"
        raise ValueError(f"x holds NaN in {int(missing.sum())} places{where}; give mask=~x.isnan() to leave them out")


def _warn_of_probabilities(logits: Tensor) -> None:
    if logits.numel() < 64 or not domains.readable(logits):
        return
    low, high = logits.aminmax()
    if 0 <= low < high <= 1:
        warnings.warn(
            f"every number that the decoder returned is in [0, 1], from {low:.3g} to {high:.3g}, as if it were a "
            "probability; likelihood 'bernoulli' takes logits: leave out the sigmoid, or take 'bernoulli_probs'",
            stacklevel=6,
        )


def _name(node: Any) -> str:
    return str(node.name()).split("Backward")[0]


def _source(node: Any, passed: set[str]) -> Any:
    """The node that computed a tensor's values: what merely arranges them is passed."""
    while node is not None and _name(node) in passed:
        node = node.next_functions[0][0]
    return node


def _bounds(t: Tensor) -> tuple[str, float, float, int] | None:
    """Of the layer that computed t: its name, between what its results lie, and over how many they sum to 1 (or 0)."""
    node = _source(t.grad_fn, _VIEWS | _PICKS)
    if node is None:
        return None
    name = _name(node)
    if name in ("Hardtanh", "Clamp"):
        ends = [getattr(node, f"_saved_{end}", None) for end in ("min_val", "max_val", "min", "max")]
        if any(isinstance(end, Tensor) for end in ends):
            return None
        low, high = (next((float(e) for e in ends[i::2] if e is not None), s * math.inf) for i, s in ((0, -1), (1, 1)))
        return (name, low, high, 0) if low > -math.inf or high < math.inf else None
    if name in ("Elu", "Celu"):
        return name, -node._saved_alpha * getattr(node, "_saved_scale", 1.0), math.inf, 0
    if name == "Div":  # x / (1 + |x|)
        below = node.next_functions[1][0]
        if below is None or _name(below) != "Add" or (above := below.next_functions[0][0]) is None:
            return None
        name = "Softsign" if _name(above) == "Abs" else name
    if name not in _BOUNDS:
        return None
    summed = 0
    if name == "Softmax":
        dim, result = node._saved_dim, node._saved_result
        summed = result.shape[dim - 2**64 if dim >= 2**63 else dim]
    return name, *_BOUNDS[name], summed


def check_decoder(recon: Sequence[Tensor], x: Tensor, likelihood: str, mask: Tensor | None = None) -> None:
    """Refuse parameters of which the last layer, or a probability itself, contradicts the likelihood or the data.

    Raises:
        ValueError: the layer is named.
    """
    row = likelihoods.get(likelihood)
    for name, t in zip(row.parameters, recon, strict=False):
        if t.numel() == 0 or not domains.readable(t):
            continue
        if name == "probs":
            domains.check_probabilities(t, x, likelihood, mask)
        if (found := _bounds(t)) is None:
            continue
        layer, low, high, summed = found
        why = None
        if name in _LOGITS and (low > -REACH or high < REACH):
            why = f"any real number is due: leave {layer} out"
            if name == "logits" and low >= 0 and high <= 1:
                why += ", or take 'bernoulli_probs', which takes probabilities"
        elif name in _LOG_SCALES and low >= 0 and layer != "Clamp":
            why = f"any real number is due, as of a logarithm: leave {layer} out, or return the logarithm of its result"
        elif name in ("mean", "probs") and x.numel() and domains.readable(x):
            data = reference.read_data(x.detach(), torch.float64, row.domain)
            if mask is not None:
                data = data[(mask != 0).expand(data.shape)]
            outside = (data - data.clamp(low, high)).square().mean()
            if outside > UNREACHED * data.var(correction=0):
                why = f"the data go from {data.min():.3g} to {data.max():.3g}: leave {layer} out, or scale the data"
            elif summed > 1 and data.mean() > 2 / summed:
                why = f"its {summed} results sum to 1, where the data have the mean {data.mean():.3g}: leave it out"
        if why is not None:
            raise ValueError(
                f"decoder ends in {layer}, with {name} in [{low:g}, {high:g}], but for likelihood {likelihood!r} {why}"
            )


def check_halved(out: Tensor) -> None:
    """Refuse to halve on dim 1 an encoder's tensor [B, ..., 2 M] that a layer computed along the last dimension.

    Raises:
        ValueError: with the way to say which dimension is meant.
    """
    if torch.compiler.is_compiling() or out.dim() < 3 or out.grad_fn is None:
        return
    node = _source(out.grad_fn, _VIEWS | _POINTWISE)
    if node is None:
        return
    if _name(node) == "NativeLayerNorm":
        along_last = len(node._saved_normalized_shape) == 1
    else:
        along_last = _name(node) in ("Addmm", "Mm", "Bmm", "Linear", "MkldnnLinear") and (
            node._input_metadata[0].shape[-1] == out.shape[-1]
        )
    if along_last:
        half = (out.shape[1] // 2, *out.shape[2:])
        raise ValueError(
            f"encoder must return a pair (mu, logvar) where its last layer acts on the last of several dimensions; got "
            f"one tensor {tuple(out.shape)}, which would be halved on dim 1: return out.chunk(2, -1), or give "
            f"VAE(..., latent_shape={half}) if dim 1 is meant"
        )


def encoded(out: Any, stated_shape: tuple[int, ...] | None) -> tuple[Tensor, Tensor]:
    """(mu, logvar) of what an encoder returned, refused if their shape is not the one that was stated."""
    if isinstance(out, Tensor):
        if out.dim() < 2 or out.shape[1] % 2:
            raise ValueError(
                "encoder must return a pair (mu, logvar), or one tensor of even size on dim 1 to split in half; "
                f"got a tensor {tuple(out.shape)}"
            )
        if stated_shape is None:
            check_halved(out)
        mu, logvar = out.chunk(2, 1)
    elif isinstance(out, tuple | list) and len(out) == 2 and all(isinstance(t, Tensor) for t in out):
        mu, logvar = out
    else:
        raise TypeError(f"encoder must return a pair (mu, logvar) or one tensor; got {type(out).__name__}")
    if mu.shape != logvar.shape:
        raise ValueError(
            "encoder must return mu and logvar of the same shape [B, *latent]; "
            f"got {tuple(mu.shape)} and {tuple(logvar.shape)}"
        )
    if stated_shape is not None and tuple(mu.shape[1:]) != stated_shape:
        halved = f", half of one tensor {tuple(out.shape)} on dim 1" if isinstance(out, Tensor) else ""
        raise ValueError(
            f"encoder must return latents of the latent_shape={stated_shape} that was given; got "
            f"{tuple(mu.shape[1:])}{halved}: return a pair (mu, logvar) of that shape, or give another latent_shape"
        )
    return mu, logvar


def decoded(out: Any, size: int) -> tuple[Tensor, ...]:
    """The parameters of what a decoder returned for so many latents."""
    several = isinstance(out, tuple | list) and 2 <= len(out) <= len(ORDINALS)
    if not isinstance(out, Tensor) and not (several and all(isinstance(t, Tensor) for t in out)):
        many, kind = isinstance(out, tuple | list), type(out).__name__
        came = f"a {kind} of {', '.join(type(t).__name__ for t in out)}" if many else kind
        expected = "a tensor, or a tuple of two to four tensors such as (mean, logvar)"
        raise TypeError(f"decoder must return {expected}; got {came}")
    first, *others = split_recon(out)
    if first.dim() == 0 or first.shape[0] != size:
        raise ValueError(f"decoder must return [{size}, *event] for {size} latents; got {tuple(first.shape)}")
    return first, *others
