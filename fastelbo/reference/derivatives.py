"""The twins of the backward ops are vector-Jacobian products of their forward's twins."""

from collections.abc import Callable, Sequence
from functools import wraps
from inspect import signature
from typing import Any

import torch
from torch import Tensor

MOST_PARAMETERS = 4  # of a likelihood; an op returns a gradient for each


def vjp(
    function: Callable[..., Any],
    inputs: Sequence[Tensor | None],
    grads: Sequence[Tensor | None],
    needs: Sequence[bool],
) -> list[Tensor | None]:
    """Gradients of sum_i <grads_i, function(*inputs)_i> for the inputs that need one, as a differentiable graph.

    Every input is made a new node of the graph first: two inputs may be the same tensor, or depend on each other.
    """

    def node(t: Tensor | None, need: bool) -> Tensor | None:
        if t is None or not (need or t.requires_grad):
            return t
        return t.view_as(t) if t.requires_grad else t.detach().requires_grad_()

    with torch.enable_grad():
        nodes = [node(t, need) for t, need in zip(inputs, needs, strict=True)]
        outputs = function(*nodes)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        pairs = [(o, g) for o, g in zip(outputs, grads, strict=True) if g is not None and o.requires_grad]
        wanted = [n for n, need in zip(nodes, needs, strict=True) if need and n is not None]
        found = torch.autograd.grad(
            [o for o, _ in pairs],
            wanted,
            [g.to(o.dtype) for o, g in pairs],
            create_graph=True,
            allow_unused=True,
            materialize_grads=True,
        )
    results = iter(found)
    return [next(results) if need and n is not None else None for n, need in zip(nodes, needs, strict=True)]


def _slots(value: Any) -> list[Tensor | None]:
    """A tensor as the one slot in which its gradient is returned; a list of parameters as all there may be."""
    return [*value, *[None] * (MOST_PARAMETERS - len(value))] if isinstance(value, list | tuple) else [value]


def _gradients(
    function: Callable[..., Any],
    values: dict[str, Any],
    inputs: Sequence[str],
    grads: Sequence[Any],
    needs: Sequence[bool],
) -> list[Tensor | None]:
    """`vjp` of function(**values) for those inputs, slot by slot."""
    slots = [_slots(values.get(name)) for name in inputs]

    def call(*nodes: Tensor | None) -> Any:
        left, given = list(nodes), dict(values)
        for name, slot in zip(inputs, slots, strict=True):
            own, left = left[: len(slot)], left[len(slot) :]
            given[name] = [t for t in own if t is not None] if isinstance(values.get(name), list | tuple) else own[0]
        return function(**given)

    return vjp(call, [t for slot in slots for t in slot], grads, needs)


def backward_of(twin: Callable[..., Any], inputs: Sequence[str], upstream: int = 1) -> Callable[..., Any]:
    """The twin of a backward op. Its arguments: the upstream gradients, those of `twin`, and which of the `inputs` need
    a gradient. Its results: the gradients of the `inputs`, None where not needed.
    """
    names = list(signature(twin).parameters)

    def backward(*args: Any) -> Any:
        grads, values = args[:upstream], dict(zip(names, args[upstream:], strict=False))
        needs = args[-1] if isinstance(args[-1], list) and isinstance(args[-1][0], bool) else [True] * len(inputs)
        found = _gradients(twin, values, inputs, grads, needs)
        return found[0] if len(found) == 1 else tuple(found)

    return backward


def with_gradients(*inputs: str) -> Callable[[Callable[..., tuple[Tensor, ...]]], Callable[..., Any]]:
    """The twin of an op that returns a loss, its parts, and the gradients of the loss by those `inputs` that its last
    argument, a mask of bits, asks for; the arguments in front are those of the function."""

    def decorate(twin: Callable[..., tuple[Tensor, ...]]) -> Callable[..., Any]:
        names = list(signature(twin).parameters)

        @wraps(twin)
        def forward(*args: Any, needs: int = 0) -> Any:
            if len(args) > len(names):
                *args, needs = args  # type: ignore[assignment]
            values, outputs = dict(zip(names, args, strict=False)), twin(*args)
            slots = sum(len(_slots(values.get(name))) for name in inputs)
            if not needs:
                return (*outputs, *[None] * slots)
            wanted = [bool(needs >> i & 1) for i in range(slots)]
            ones = [torch.ones_like(outputs[0])]
            return (*outputs, *_gradients(lambda **given: twin(**given)[0], values, inputs, ones, wanted))

        return forward

    return decorate
