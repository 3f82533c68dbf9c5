"""Types of arguments that say what an argument must be, and the decorator that checks by them.

`Count = Annotated[int, integer(1)]`: the check stands in the annotation of a parameter. Checked here are types, the
dtype of each tensor by itself, and what needs no other argument. Shapes, devices and what goes with what are checked by
the ops (csrc/prepare/checks.h).
"""

import functools
import inspect
import math
from collections.abc import Callable
from numbers import Integral, Real
from typing import Annotated, Any, ParamSpec, TypeVar, get_args

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
ORDINALS = ("first", "second", "third", "fourth")  # the tensors of recon


def refusal(name: str, expected: str, value: Any) -> TypeError:
    """The error of an argument of a wrong type: "mu must be a torch.Tensor; got numpy.ndarray"."""
    kind = type(value)
    came = "None" if value is None else f"{kind.__module__}.{kind.__qualname__}".removeprefix("builtins.")
    return TypeError(f"{name} must be {expected}; got {came}")


def tensor(*dtypes: torch.dtype) -> Check:
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


def either(tensor: Check, other: Check) -> Check:
    return lambda name, value: (tensor if isinstance(value, Tensor) else other)(name, value)


def _scalar(name: str, value: Any) -> Tensor:
    if floats(name, value).dim() != 0:
        raise ValueError(f"{name} must be a float or a 0-d tensor; got the shape {tuple(value.shape)}")
    return value  # type: ignore[no-any-return]


def instance(of: type | tuple[type, ...], expected: str) -> Check:
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
        return floats(name, value)
    several = isinstance(value, tuple | list) and 2 <= len(value) <= len(ORDINALS)
    if not several or not all(isinstance(t, Tensor) for t in value):
        raise refusal(name, "a tensor, or a tuple of two to four tensors such as (mean, logvar)", value)
    floats(name, value[0])
    for t, ordinal in zip(value[1:], ORDINALS[1:], strict=False):
        # of some likelihoods the last one is data
        (floats if ordinal == ORDINALS[1] else _floats_or_counts)(f"the {ordinal} tensor of {name}", t)
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


def _shape(name: str, value: Any) -> tuple[int, ...]:
    if not isinstance(value, tuple | list):
        raise refusal(name, "a tuple of ints", value)
    return tuple(size(f"every number of {name}", n) for n in value)


def _count_or_shape(name: str, value: Any) -> Any:
    return _shape(name, value) if isinstance(value, tuple | list) else count(name, value)


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
        floats(f"every tensor of {name}", t)
    return value


def _batch_dims(name: str, value: Any) -> int:
    if count(name, value) > 2:
        raise ValueError(f"{name} must be 1 or 2; got {value}")
    return int(value)


floats = tensor(*FLOATS)
_floats_or_counts = tensor(*FLOATS, torch.uint8, *reference.COUNTS)  # the total of a beta-binomial is data
size = integer(0)
count = integer(1)
generator = instance(torch.Generator, "a torch.Generator")
module = instance(nn.Module, "an nn.Module")
not_negative = number(lambda value: value >= 0, "at least 0")

Flag = Annotated[bool, instance(bool, "a bool")]
Text = Annotated[str, instance(str, "a str")]  # a name that a table of its own knows
Size = Annotated[int, size]
Count = Annotated[int, count]
Integer = Annotated[int, integer()]
BatchDims = Annotated[int, _batch_dims]
Float = Annotated[float, number()]
Number = Annotated[float | Tensor, either(_scalar, number(expected="a float or a 0-d tensor"))]
NotNegative = Annotated[
    float | Tensor, either(_scalar, number(lambda value: value >= 0, "at least 0", "a float or a 0-d tensor"))
]
# not math.isfinite: torch's compiler takes no number that varies as its argument
Finite = Annotated[
    float | Tensor,
    either(_scalar, number(lambda value: -math.inf < value < math.inf, "finite", "a float or a 0-d tensor")),
]
Fraction = Annotated[
    float | Tensor, either(_scalar, number(lambda value: 0 <= value < 1, "in [0, 1)", "a float or a 0-d tensor"))
]
NumberOrFloats = Annotated[float | Tensor, either(floats, number(expected="a float or a torch.Tensor"))]
Floats = Annotated[Tensor, floats]
Anything = Annotated[Tensor, instance(Tensor, "a torch.Tensor")]
# the likelihood takes a part of these types
Data = Annotated[Tensor, tensor(*FLOATS, torch.uint8, torch.bool, *reference.COUNTS)]
Mask = Annotated[Tensor, tensor(*FLOATS, torch.uint8, torch.bool)]
BoolMask = Annotated[Tensor, tensor(torch.bool)]
Observed = Annotated[Tensor, instance(Tensor, "a bool torch.Tensor")]
Seed = Annotated[int | Tensor, either(tensor(torch.int64), integer(expected="an int or an int64 tensor"))]
Generator = Annotated[torch.Generator, generator]
Likelihood = Annotated[str, one_of(LIKELIHOODS)]
Reduction = Annotated[str, one_of(REDUCTIONS)]
Recon = Annotated[Tensor | tuple[Tensor, ...], _recon]  # the parameters of a likelihood
AnyPosterior = Annotated[Any, _posterior]
AnyPosteriors = Annotated[Any, _posteriors]
AnyKept = Annotated[Any, _kept]
Prior = Annotated[nn.Module | tuple[Tensor, Tensor], _prior]
Module = Annotated[nn.Module, module]
Condition = Annotated[Tensor | tuple[Tensor, ...], _condition]
Shape = Annotated[tuple[int, ...], _shape]
CountOrShape = Annotated[int | tuple[int, ...], _count_or_shape]


def _check_of(annotation: Any) -> Check | None:
    """The check that an annotation holds, by itself or in a union with None."""
    for part in (annotation, *get_args(annotation)):
        if hasattr(part, "__metadata__"):
            check: Check = part.__metadata__[0]
            return check
    return None


def checked(function: Callable[_P, _R]) -> Callable[_P, _R]:
    """The function, whose arguments are checked by their annotations before it is called. A default is taken unseen."""
    parameters = inspect.signature(function).parameters.values()
    rows = {p.name: (p.name, p.default, _check_of(p.annotation)) for p in parameters}
    positional = tuple(rows[p.name] for p in parameters if p.kind is not p.KEYWORD_ONLY)

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        # every loss pays for this: values are put in place only where a check has converted one
        for (name, default, check), value in zip(positional, args, strict=False):  # of too many the function tells
            if check is not None and value is not default and check(name, value) is not value:
                rows_of_args = zip(positional, args, strict=False)
                taken = [v if c is None or v is d else c(n, v) for (n, d, c), v in rows_of_args]
                args = (*taken, *args[len(taken) :])
                break
        for name, value in kwargs.items():
            if name in rows:
                name, default, check = rows[name]
                if check is not None and value is not default:
                    taken = check(name, value)
                    if taken is not value:
                        kwargs[name] = taken
        return function(*args, **kwargs)

    return call  # type: ignore[return-value]


def typed_as(forward: Callable[_P, _R]) -> Callable[[Callable[..., object]], Callable[_P, _R]]:
    """For type checkers alone: a module's call has the type of its forward, in place of nn.Module's."""
    raise NotImplementedError
