"""Loads the compiled library, and gives its backward ops their derivatives."""

from collections.abc import Callable
from importlib.util import find_spec
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


# Autograd key of the backward ops: reached only when a graph of the gradient is being built. The gradient is then that
# of the plain-PyTorch twin, made of differentiable operations, so that second and higher derivatives are right.
_library = torch.library.Library("fastelbo", "IMPL")


def _given(grads: list[Tensor | None]) -> list[Tensor]:
    return [g for g in grads if g is not None]


def _log_prob_backward(
    grad: Tensor,
    recon: Tensor,
    x: Tensor,
    scale: Tensor | None,
    mask: Tensor | None,
    likelihood: str,
    needs: list[bool],
) -> list[Tensor]:
    def twin(recon: Tensor, x: Tensor, scale: Tensor | None) -> Tensor:
        return reference.log_prob(recon, x, scale, mask, likelihood)

    return _given(reference.vjp(twin, [recon, x, scale], [grad], needs))


def _gaussian_kl_backward(
    grad: Tensor,
    mu: Tensor,
    logvar: Tensor,
    prior_mu: Tensor | None,
    prior_logvar: Tensor | None,
    free_bits: float,
    needs: list[bool],
) -> list[Tensor]:
    def twin(mu: Tensor, logvar: Tensor, prior_mu: Tensor | None, prior_logvar: Tensor | None) -> Tensor:
        return reference.gaussian_kl(mu, logvar, prior_mu, prior_logvar, free_bits)

    return _given(reference.vjp(twin, [mu, logvar, prior_mu, prior_logvar], [grad], needs))


def _rsample_backward(
    grad_z: Tensor | None,
    grad_kl: Tensor | None,
    grad_log_ratio: Tensor | None,
    grad_gates: Tensor | None,
    mu: Tensor,
    logvar: Tensor,
    num_samples: int | None,
    prior_mu: Tensor | None,
    prior_logvar: Tensor | None,
    seed: Tensor | None,
    eps: Tensor | None,
    first_sample: int,
    needs: list[bool],
) -> list[Tensor]:
    def twin(mu, logvar, prior_mu, prior_logvar, eps):  # type: ignore[no-untyped-def]
        return reference.rsample(mu, logvar, num_samples, prior_mu, prior_logvar, seed, eps, first_sample)

    inputs = [mu, logvar, prior_mu, prior_logvar, eps]
    return _given(reference.vjp(twin, inputs, [grad_z, grad_kl, grad_log_ratio, grad_gates], needs))


def _log_mean_exp_backward(grad: Tensor, log_w: Tensor, dim: int) -> Tensor:
    (result,) = _given(reference.vjp(lambda w: reference.log_mean_exp(w, dim), [log_w], [grad], [True]))
    return result


def _ppca_log_prob_backward(
    grad: Tensor,
    x: Tensor,
    W: Tensor,
    b: Tensor,
    log_sigma2: Tensor,
    coords: Tensor,
    rest: Tensor,
    basis: Tensor,
    triangle: Tensor,
    whiten: Tensor,
    needs: list[bool],
) -> list[Tensor]:
    return _given(reference.vjp(reference.ppca_log_prob, [x, W, b, log_sigma2], [grad], needs))


def _register(twin: Callable[..., Any]) -> None:
    op = getattr(torch.ops.fastelbo, twin.__name__).default

    def autograd(*args: Any) -> Any:
        if torch.is_grad_enabled() and any(a.requires_grad for a in args if isinstance(a, Tensor)):
            return twin(*args)
        with torch._C._AutoDispatchBelowAutograd():
            return op(*args)

    _library.impl(twin.__name__, autograd, "Autograd")


for _twin in (
    _log_prob_backward,
    _gaussian_kl_backward,
    _rsample_backward,
    _log_mean_exp_backward,
    _ppca_log_prob_backward,
):
    _register(_twin)
