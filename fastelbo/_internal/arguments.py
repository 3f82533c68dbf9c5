"""What every argument of the public functions must be: one table, and the decorator that checks by it.

Checked here are types, the dtype of each tensor by itself, and what needs no other argument. Shapes, devices and what
goes with what are checked by the ops (csrc/prepare/checks.h).
"""

import functools
import inspect
import math
from collections.abc import Callable
from numbers import Integral, Real
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor, nn

from fastelbo import reference
from fastelbo._internal import ops as _ops

Check = Callable[[str, Any], Any]  # (name, value) -> the value, in the type that is expected; raises what is wrong
_P = ParamSpec("_P")
_R = TypeVar("_R")

INT64 = (-(2**63), 2**63 - 1)
FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
LIKELIHOODS: tuple[str, ...] = tuple(_ops._C.build_info()["likelihoods"])
REDUCTIONS = ("mean", "sum", "none")
ORDINALS = ("first", "second", "third")  # the tensors of recon


def refusal(name: str, expected: str, value: Any) -> TypeError:
    """The error of an argument of a wrong type: "mu must be a torch.Tensor; got numpy.ndarray"."""
    kind = type(value)
    came = "None" if value is None else f"{kind.__module__}.{kind.__qualname__}".removeprefix("builtins.")
    return TypeError(f"{name} must be {expected}; got {came}")


def _tensor(*dtypes: torch.dtype) -> Check:
    allowed, strided = frozenset(dtypes), torch.strided
    *first, last = (str(dtype).removeprefix("torch.") for dtype in dtypes)
    expected = f"{', '.join(first)} or {last}" if first else last

    def check(name: str, value: Any) -> Tensor:
        if not isinstance(value, Tensor):
            raise refusal(name, "a torch.Tensor", value)
        if value.dtype not in allowed:
            raise TypeError(f"{name} must be {expected}; got {str(value.dtype).removeprefix('torch.')}")
        if value.layout is not strided:
            raise TypeError(f"{name} must be a dense tensor, of layout torch.strided; got {value.layout}")
        return value

    return check


def integer(low: int = INT64[0], expected: str = "an int") -> Check:
    def check(name: str, value: Any) -> Any:
        if type(value) is not int:
            if isinstance(value, torch.SymInt):
                return value
            if isinstance(value, bool) or not isinstance(value, Integral):
                raise refusal(name, expected, value)
            value = int(value)
        if not low <= value <= INT64[1]:
            bound = f"at least {low}" if INT64[0] < low > value else "in the range of int64"
            raise ValueError(f"{name} must be {bound}; got {value}")
        return value

    return check


def number(valid: Callable[[float], bool] | None = None, words: str = "", expected: str = "a float") -> Check:
    """A float for which `valid` holds; `words` say what that is."""

    def check(name: str, value: Any) -> Any:
        if type(value) is not float:
            if isinstance(value, torch.SymFloat | torch.SymInt):
                return value
            if isinstance(value, bool) or not isinstance(value, Real):
                raise refusal(name, expected, value)
            try:
                value = float(value)
            except OverflowError:
                raise ValueError(f"{name} must be in the range of float64; got {value}") from None
        if valid is not None and not valid(value):
            raise ValueError(f"{name} must be {words}; got {value}")
        return value

    return check


def _either(tensor: Check, other: Check) -> Check:
    return lambda name, value: (tensor if isinstance(value, Tensor) else other)(name, value)


def _scalar(name: str, value: Any) -> Tensor:
    if _floats(name, value).dim() != 0:
        raise ValueError(f"{name} must be a float or a 0-d tensor; got the shape {tuple(value.shape)}")
    return value  # type: ignore[no-any-return]


def instance(of: type, expected: str) -> Check:
    def check(name: str, value: Any) -> Any:
        if not isinstance(value, of):
            raise refusal(name, expected, value)
        return value

    return check


def one_of(names: tuple[str, ...]) -> Check:
    expected = "one of " + ", ".join(f'"{n}"' for n in names)

    def check(name: str, value: Any) -> str:
        if not isinstance(value, str):
            raise refusal(name, f"a str, {expected}", value)
        if value not in names:
            raise ValueError(f'{name} must be {expected}; got "{value}"')
        return value

    return check


def _recon(name: str, value: Any) -> Any:
    if isinstance(value, Tensor):
        return _floats(name, value)
    several = isinstance(value, tuple | list) and 2 <= len(value) <= len(ORDINALS)
    if not several or not all(isinstance(t, Tensor) for t in value):
        raise refusal(name, "a tensor, or a tuple of two or three tensors such as (mean, logvar)", value)
    _floats(name, value[0])
    for t, ordinal in zip(value[1:], ORDINALS[1:], strict=False):
        _floats(f"the {ordinal} tensor of {name}", t)
    return value


def _posteriors(name: str, value: Any) -> Any:
    if hasattr(value, "log_ratio"):
        return _posterior(name, value)
    if not isinstance(value, tuple | list) or not value:
        raise refusal(name, "a Posterior from rsample, or a sequence of them", value)
    for i, item in enumerate(value):
        _posterior(f"{name} {i}", item)
    return value


def _posterior(name: str, value: Any) -> Any:
    fields = ("z", "kl", "log_ratio", "mu", "logvar")
    for field in fields:
        if not isinstance(getattr(value, field, None), Tensor):
            raise refusal(name, f"a Posterior from rsample, with the tensors {', '.join(fields)}", value)
    return value


def _kept(name: str, value: Any) -> Any:
    if not all(isinstance(getattr(value, field, None), Tensor) for field in ("sample", "datum", "scale")):
        raise refusal(name, "a Kept from keep_samples, with the tensors sample, datum, scale", value)
    return value


def keep(name: str, value: Any) -> Any:
    if isinstance(value, str) and value != "auto":
        raise ValueError(f'{name} must be an int or "auto"; got "{value}"')
    return value if isinstance(value, str) else count(name, value)


def _shape(name: str, value: Any) -> tuple[int, ...]:
    if not isinstance(value, tuple | list):
        raise refusal(name, "a tuple of ints", value)
    return tuple(size(f"every number of {name}", n) for n in value)


def _condition(name: str, value: Any) -> Any:
    several = isinstance(value, tuple | list) and len(value) > 0 and all(isinstance(t, Tensor) for t in value)
    if not isinstance(value, Tensor) and not several:
        raise refusal(name, "a tensor, or a tuple of tensors", value)
    return tuple(value) if several else value


def _prior(name: str, value: Any) -> Any:
    if isinstance(value, nn.Module):
        return value
    if not isinstance(value, tuple | list) or len(value) != 2 or not all(isinstance(t, Tensor) for t in value):
        raise refusal(name, "an nn.Module, or a pair of tensors (mu, logvar)", value)
    for t in value:
        _floats(f"every tensor of {name}", t)
    return value


def _batch_dims(name: str, value: Any) -> int:
    if count(name, value) > 2:
        raise ValueError(f"{name} must be 1 or 2; got {value}")
    return int(value)


_floats = _tensor(*FLOATS)
_number = number(expected="a float or a 0-d tensor")
_data = _tensor(*FLOATS, torch.uint8, torch.bool, *reference.COUNTS)  # the likelihood takes a part of them
_mask = _tensor(*FLOATS, torch.uint8, torch.bool)
_text = instance(str, "a str")
_flag = instance(bool, "a bool")
_module = instance(nn.Module, "an nn.Module")
size = integer(0)
count = integer(1)
generator = instance(torch.Generator, "a torch.Generator")
not_negative = number(lambda value: value >= 0, "at least 0")

# An argument by its name, or by the function's and its own where two functions mean different things by one name.
# None is taken where it is the default.
TABLE: dict[str, Check] = {
    **dict.fromkeys(("mu", "logvar", "prior_mu", "prior_logvar", "eps", "z", "log_ratio", "log_w"), _floats),
    **dict.fromkeys(("log_likelihood", "weights"), _floats),
    **dict.fromkeys(("logits", "mean", "W", "b", "log_sigma2"), _floats),
    "gaussian_log_prob.logvar": _either(_floats, number(expected="a float or a torch.Tensor")),
    "x": _data,
    "mask": _mask,
    "observed": instance(Tensor, "a bool torch.Tensor"),
    "recon": _recon,
    "posterior": _posterior,
    "bound_loss.posterior": _posteriors,
    # not math.isfinite: torch's compiler takes no number that varies as its argument
    "bound_loss.kl_weight": _either(
        _scalar, number(lambda value: -math.inf < value < math.inf, "finite", "a float or a 0-d tensor")
    ),
    "kept": _kept,
    "likelihood": one_of(LIKELIHOODS),
    "reduction": one_of(REDUCTIONS),
    **dict.fromkeys(("estimator", "objective", "proposal"), _text),  # their tables know the names
    "u": _either(_scalar, number(lambda value: 0 <= value < 1, "in [0, 1)", "a float or a 0-d tensor")),
    "beta": _either(_scalar, _number),
    **dict.fromkeys((f"{name}.beta" for name in ("elbo_loss", "VAE.loss")), _either(_floats, _number)),
    **dict.fromkeys(
        (f"{name}.beta" for name in ("multi_sample_loss", "bound_loss", "kept_loss", "estimator_weights")), number()
    ),
    **dict.fromkeys(("gaussian_kl.mask", "kl_mask"), _tensor(torch.bool)),
    "reduce": _flag,
    "batch_dims": _batch_dims,
    "alpha": number(),
    "free_bits": not_negative,
    **dict.fromkeys(("num_samples", "chunk_size", "keep"), count),
    "VAE.loss.keep": keep,
    **dict.fromkeys(("first_sample", "n"), size),
    **dict.fromkeys(("dim", "groups"), integer()),
    "seed": _either(_tensor(torch.int64), integer(expected="an int or an int64 tensor")),
    "generator": generator,
    "return_parts": _flag,
    "VAE.sample.mean": _flag,
    **dict.fromkeys(("encoder", "decoder", "model"), _module),
    "condition": _condition,
    "prior": _prior,
    "latent_shape": _shape,
}


def _check_of(function: Callable[..., Any], name: str) -> Check:
    if name == "self":
        return lambda name, value: value
    return TABLE.get(f"{function.__qualname__}.{name}") or TABLE[name]


def checked(function: Callable[_P, _R]) -> Callable[_P, _R]:
    """The function, whose arguments are checked by the table before it is called. A default is taken unseen."""
    parameters = inspect.signature(function).parameters.values()
    rows = {p.name: (p.name, p.default, _check_of(function, p.name)) for p in parameters}
    positional = tuple(rows[p.name] for p in parameters if p.kind is not p.KEYWORD_ONLY)

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        # every loss pays for this: values are put in place only where a check has converted one
        for i, value in enumerate(args):
            if i == len(positional):
                break  # the function says what is wrong
            name, default, check = positional[i]
            if value is not default:
                taken = check(name, value)
                if taken is not value:
                    args = (*args[:i], taken, *args[i + 1 :])
        for name, value in kwargs.items():
            if name in rows:
                name, default, check = rows[name]
                if value is not default:
                    taken = check(name, value)
                    if taken is not value:
                        kwargs[name] = taken
        return function(*args, **kwargs)

    return call  # type: ignore[return-value]
