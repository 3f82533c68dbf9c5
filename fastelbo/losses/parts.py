"""A loss and what it is made of."""

from collections.abc import Callable
from functools import wraps
from typing import NamedTuple, ParamSpec

from torch import Tensor

_P = ParamSpec("_P")


class LossParts(NamedTuple):
    """A loss and what it is made of. All three are differentiable."""

    loss: Tensor  # scalar, or [B] with reduction="none"
    log_likelihood: Tensor  # [B], or [K, B]
    kl: Tensor  # [B]


def loss_of(parts: Callable[_P, LossParts], name: str) -> Callable[_P, Tensor]:
    """The function of this name that takes the arguments of `parts` and returns the loss alone."""

    @wraps(parts)
    def loss(*args: _P.args, **kwargs: _P.kwargs) -> Tensor:
        return parts(*args, **kwargs)[0]

    loss.__name__ = loss.__qualname__ = name
    return loss
