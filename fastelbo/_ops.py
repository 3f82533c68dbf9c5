"""Loads the compiled library, and gives its backward ops their derivatives."""

from collections.abc import Callable
from importlib.util import find_spec
from inspect import signature
from typing import Any

import torch
from torch import Tensor

from fastelbo import reference

_REBUILD = "rebuild it: pip install --no-build-isolation --force-reinstall --no-deps ."

if find_spec("fastelbo._C") is None:
    raise ImportError("fastelbo's compiled library is not built here; build it: pip install --no-build-isolation .")
try:
    from fastelbo import _C as _C
except ImportError as error:
    raise ImportError(f"fastelbo was not built against this PyTorch ({torch.__version__}); {_REBUILD}") from error

_BUILT_AGAINST = _C.build_info()["torch"]
if torch.__version__.split(".")[:2] != _BUILT_AGAINST.split(".")[:2]:
    raise ImportError(
        f"fastelbo was built against PyTorch {_BUILT_AGAINST}, but this is PyTorch {torch.__version__}; {_REBUILD}"
    )

KERNEL_DEVICES = frozenset(["cpu", "meta", *(["cuda"] if _C.build_info()["cuda"] else [])])


def check(op: Callable[..., Any], args: tuple[Any, ...]) -> None:
    """The op's own checks of its arguments, on stand-ins without data: for calls that its twin is going to serve."""

    def stand_in(a: Any) -> Any:
        if not isinstance(a, Tensor):
            return a
        return torch.empty(a.shape, dtype=a.dtype, device="meta", requires_grad=a.requires_grad)

    with torch._C._DisableFuncTorch(), torch._C._AutoDispatchBelowAutograd():
        op(*map(stand_in, args))


# Autograd key of the private ops: reached only when a graph of the gradient is being built. The result is then that of
# the plain-PyTorch twin, made of differentiable operations, so that second and higher derivatives are right.
_library = torch.library.Library("fastelbo", "IMPL")


def _register(name: str, differentiable: Callable[..., Any]) -> None:
    op = getattr(torch.ops.fastelbo, name).default

    def autograd(*args: Any) -> Any:
        if torch.is_grad_enabled() and any(a.requires_grad for a in args if isinstance(a, Tensor)):
            return differentiable(*args)
        with torch._C._AutoDispatchBelowAutograd():
            return op(*args)

    _library.impl(name, autograd, "Autograd")


def _register_backward(name: str, twin: Callable[..., Any]) -> None:
    """The op's gradient as the vector-Jacobian product of its forward's twin.

    The schema binds one to the other: arguments grad_... are the upstream gradients, the names of what the op returns
    are the inputs whose gradients they are, and every argument of the twin is one of the op.
    """
    schema = getattr(torch.ops.fastelbo, name).default._schema
    arguments, wanted = [a.name for a in schema.arguments], [r.name for r in schema.returns]
    read = signature(twin).parameters

    def gradient(*args: Any) -> Any:
        given = dict(zip(arguments, args, strict=True))
        grads = [g for n, g in given.items() if n.startswith("grad")]
        needs = given.get("needs", [True])

        def function(*inputs: Tensor | None) -> Any:
            return twin(**{n: a for n, a in given.items() if n in read} | dict(zip(wanted, inputs, strict=True)))

        found = reference.vjp(function, [given[n] for n in wanted], grads, needs)
        return found[0] if len(found) == 1 else tuple(found)

    _register(name, gradient)


_register("_multi_sample_weights", reference.multi_sample_weights)
for _name, _twin in {
    "_log_prob_backward": reference.log_prob,
    "_gaussian_kl_backward": reference.gaussian_kl,
    "_rsample_backward": reference.rsample,
    "_log_mean_exp_backward": reference.log_mean_exp,
    "_ppca_log_prob_backward": reference.ppca_log_prob,
}.items():
    _register_backward(_name, _twin)
