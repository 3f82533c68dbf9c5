"""What the distributions share: a row of `fastelbo.likelihoods` as a torch Distribution."""

import functools
import math
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, ClassVar, Self

import torch
from torch import Tensor
from torch.distributions import Distribution, constraints
from torch.distributions.utils import lazy_property

from fastelbo import likelihoods
from fastelbo._internal import arguments, domains, ordered
from fastelbo._internal.arguments import checked
from fastelbo.losses import drawn_once, join_recon, likelihood_mean, log_prob

_PYRO = "pyro.distributions.torch_distribution"  # looked up, never imported: Pyro is there if the user has imported it

# of a domain: what is drawn, and what log_prob takes
_DOMAINS: dict[likelihoods.Domain, tuple[constraints.Constraint, constraints.Constraint]] = {
    "[0, 1]": (constraints.boolean, constraints.unit_interval),
    "reals": (constraints.real, constraints.real),
    "counts": (constraints.nonnegative_integer, constraints.nonnegative),
}


@functools.cache
def _with_pyro(cls: type) -> type:
    """The class with Pyro's methods, under the same name."""
    mixin = sys.modules[_PYRO].TorchDistributionMixin
    if issubclass(cls, mixin):
        return cls
    body = {"__module__": cls.__module__, "__qualname__": cls.__qualname__, "__doc__": cls.__doc__, "_plain": cls}
    return type(cls.__name__, (cls, mixin), body)


def torch_s(name: str, doc: str) -> Tensor:
    """The property of this name of `of_torch()`."""
    return property(lambda self: getattr(self.of_torch(), name), doc=doc)  # type: ignore[return-value]


class Fused(Distribution):
    """What the distributions of this module share: each is a likelihood of `fastelbo.log_prob`.

    Sizes: an event is the last `event_dims` dimensions, over which `log_prob` sums. batch_shape and event_shape are
    those of `torch.distributions.Independent(..., event_dims)`. Each parameter is an attribute [*batch, *event].

    Each has what the class of torch.distributions has for which it stands, with the same values. As in torch, cdf, icdf
    and enumerate_support are those of one element, event_dims=0.

    validate_args: the errors are torch's, and parameters are looked at by the first log_prob or sample, not by the
    constructor. log_prob looks at its result, which is finite only of valid numbers, and at the numbers themselves
    where it is not finite, or where a bad one would not show. Nothing is looked at in compiled graphs and under the
    transforms of torch.func.
    """

    likelihood: str
    _others: ClassVar[dict[str, str]] = {}  # parameters of the likelihood that have another name here
    # parameters of which log p may be finite where they are invalid
    _unseen: ClassVar[tuple[str, ...]] = ()
    _scale: Tensor | None = None  # the argument of which a parameter is the logarithm
    _valid = False  # whether the parameters were looked at
    _plain: ClassVar[type]  # of a class with Pyro's methods: the one without them
    # Parameters as `fastelbo.log_prob` takes them: the first [*batch, *event], the others as given. A kernel reads what
    # data share once, and sums its gradient.
    _recon: tuple[Tensor, ...]

    def __new__(cls, *args: Any, **kwargs: Any) -> Self:
        if not torch.compiler.is_compiling() and hasattr(sys.modules.get(_PYRO), "TorchDistributionMixin"):
            cls = _with_pyro(cls)  # type: ignore[arg-type]
        return super().__new__(cls)

    def __init__(
        self,
        likelihood: str,
        first: Tensor,
        *others: float | Tensor | None,
        event_dims: int,
        validate_args: bool | None,
    ) -> None:
        names, shape, recon = likelihoods.get(likelihood).parameters, first.shape, [first]
        for name, t in zip(names[1:], others, strict=False):
            if t is not None:
                recon.append(t if isinstance(t, Tensor) else torch.full((), t, dtype=first.dtype, device=first.device))
                shape = broadcast(name, recon[-1].shape, shape, f"the shape {tuple(shape)} of {names[0]}")
        batch = len(shape) - event_dims
        if batch < 0:
            raise ValueError(f"event_dims must be at most {len(shape)}, the dimensions of {names[0]}; got {event_dims}")
        recon[0] = ordered.expand(first, shape)
        self.likelihood, self._recon = likelihood, tuple(recon)
        for name, t in zip(names, recon, strict=False):
            if name != "mean":  # a property of every distribution
                setattr(self, self._others.get(name, name), ordered.expand(t, shape))
        super().__init__(shape[:batch], shape[batch:], validate_args=False)  # torch's would read all parameters
        if validate_args is None:
            del self._validate_args  # the default, also where it changes
        else:
            self._validate_args = validate_args

    def _given(self) -> Iterator[tuple[str, Tensor]]:
        """The parameters that were given, by their names here."""
        for name, t in zip(likelihoods.get(self.likelihood).parameters, self._recon, strict=False):
            yield self._others.get(name, name), t

    def __repr__(self) -> str:
        """As torch's, of the parameters that were given."""
        shown = (f"{name}: {t if t.numel() == 1 else self.param_shape}" for name, t in self._given())
        return f"{type(self).__name__}({', '.join(shown)})"

    def __reduce__(self) -> tuple[Any, ...]:
        """The class with Pyro's methods has no name of its own: the plain one is stored."""
        return blank, (getattr(self, "_plain", type(self)),), vars(self)

    def expand(self, batch_shape: Sequence[int], _instance: Self | None = None) -> Self:
        """The same distribution with this batch_shape; no memory is allocated."""
        new = type(self).__new__(type(self)) if _instance is None else _instance
        first, *others = self._recon
        first = ordered.expand(first, torch.Size(batch_shape) + self.event_shape)
        Fused.__init__(new, self.likelihood, first, *others, event_dims=len(self.event_shape), validate_args=False)
        new._validate_args = self._validate_args
        new._scale, new._valid = self._scale, self._valid
        return new

    @constraints.dependent_property
    def support(self) -> constraints.Constraint:
        """Where draws lie; `log_prob` also takes x between 0 and 1, and fractional counts."""
        support, event_dims = _DOMAINS[likelihoods.get(self.likelihood).domain][0], len(self.event_shape)
        return constraints.independent(support, event_dims) if event_dims else support

    @property
    def param_shape(self) -> torch.Size:
        """[*batch, *event]."""
        return self._recon[0].shape

    @property
    def mean(self) -> Tensor:
        """E[x], [*batch, *event]."""
        return likelihood_mean(join_recon(*self._recon), self.likelihood)

    # What torch's class has.

    def of_torch(self) -> Distribution:
        """torch's distribution of each element [*batch, *event]."""
        raise NotImplementedError(f"torch.distributions has no {type(self).__name__}")

    mode = torch_s("mode", "The x of the largest p(x), [*batch, *event].")
    variance = torch_s("variance", "E[(x - mean)^2], [*batch, *event].")

    def _entropies(self) -> Tensor:
        return self.of_torch().entropy()

    def entropy(self) -> Tensor:
        """-E[log p(x)] [*batch], in nats, summed over the event."""
        return event_sum(self._entropies(), len(self.event_shape))

    def _refuse_events(self, name: str) -> None:
        if event_dims := len(self.event_shape):
            raise NotImplementedError(
                f"{name} is defined for one element: give event_dims=0; got {event_dims} event dimensions"
            )

    def _of_element(self, name: str) -> Any:
        """The method of torch's distribution of one element."""
        found = self.of_torch()
        if getattr(type(found), name) is getattr(Distribution, name):
            raise NotImplementedError(f"torch's {type(found).__name__} has no {name}")
        self._refuse_events(name)
        found._validate_args = self._validate_args
        return getattr(found, name)

    def cdf(self, value: Tensor) -> Tensor:
        """P(X <= value), of `Gaussian` and `Laplace` without event dimensions."""
        return self._of_element("cdf")(value)  # type: ignore[no-any-return]

    def icdf(self, value: Tensor) -> Tensor:
        """The inverse of `cdf`, at values in [0, 1]."""
        return self._of_element("icdf")(value)  # type: ignore[no-any-return]

    def enumerate_support(self, expand: bool = True) -> Tensor:
        """All x, along a new first dimension [n, *batch], of `Bernoulli` and of `BetaBinomial` where it has one total
        count; with expand=False [n, 1, ...]."""
        return self._of_element("enumerate_support")(expand)  # type: ignore[no-any-return]

    # What is looked at with validate_args.

    def _domain(self) -> constraints.Constraint:
        """Where log_prob takes x."""
        return _DOMAINS[likelihoods.get(self.likelihood).domain][1]

    def _refuse_parameters(self) -> None:
        """torch's error of a parameter that violates its constraint."""
        given = self._given() if self._scale is None else (("scale", self._scale), *self._given())
        for name, t in given:
            constraint = self.arg_constraints[name]
            if not torch._is_all_true(constraint.check(t)):
                what = f"parameter {name} ({type(t).__name__} of shape {tuple(t.shape)}) of distribution {self!r}"
                raise ValueError(
                    f"Expected {what} to satisfy the constraint {constraint!r}, but found invalid values:\n{t}"
                ) from None

    def _refuse(self, value: Tensor) -> None:
        """That, or the error of a value outside of the domain."""
        self._refuse_parameters()
        domain = self._domain()
        if not _is_picture(value, domain) and not torch._is_all_true(domain.check(value)):
            message = f"value must be in the domain {domain!r} of {type(self).__name__}; got\n{value}"
            raise ValueError(message) from None

    def _look_at(self, names: Iterable[str]) -> None:
        """Refuse invalid parameters, if one of these names may be invalid."""
        if not all(_surely(self.arg_constraints[name], t) for name, t in self._given() if name in names):
            self._refuse_parameters()

    def _looked_at(self, value: Tensor, log_prob: Callable[[], Tensor]) -> Tensor:
        """log_prob(), unless a parameter or the value are invalid: what its result would not tell is read before."""
        domain = self._domain()
        if not self._valid:
            self._look_at(self._unseen)
        if domain is constraints.unit_interval and not _is_picture(value, domain) and not _surely(domain, value):
            self._refuse(value)
        try:
            log_p = log_prob()
        except (ValueError, RuntimeError):
            self._refuse(value)  # in these words, if it was for the values
            raise
        if log_p.numel() == 0 or not math.isfinite(log_p.detach().sum().item()):
            self._refuse(value)
        self._valid = True
        return log_p

    # Draws, and log p.

    def _draw(self, sample_shape: Sequence[int]) -> Tensor:
        if self._validate_args and not self._valid and domains.untraced(self._recon[0]):
            self._look_at(self.arg_constraints)
            self._valid = True
        shape = self._extended_shape(torch.Size(sample_shape))
        recon = [ordered.expand(t, shape) for t in self._recon]
        return drawn_once(lambda: likelihoods.get(self.likelihood).draw(None, *recon))

    @torch.no_grad()
    def sample(self, sample_shape: Sequence[int] = ()) -> Tensor:
        """A draw [*sample, *batch, *event] by torch's default generator, not differentiable."""
        return self._draw(sample_shape)

    def rsample(self, sample_shape: Sequence[int] = ()) -> Tensor:
        """A draw that is differentiable in the parameters: of `Gaussian` and `Laplace`."""
        if not self.has_rsample:
            raise NotImplementedError(f"{type(self).__name__} draws no reparameterized samples: take sample")
        return self._draw(sample_shape)

    @checked
    def log_prob(self, value: arguments.Anything) -> Tensor:
        """log p(value), summed over the event.

        Args:
            value: [*sample, *batch, *event], or what broadcasts to it in front of the event. What `fastelbo.log_prob`
                takes as x: also fractional data, uint8 (x / 255, or counts) and counts of an integer type. Data
                [B, *event] under parameters [K, B, *event] are read once.

        Returns:
            [*sample, *batch], in nats; float32, or float64 for float64 inputs.

        Raises:
            ValueError, TypeError: a shape or dtype that does not fit; with validate_args, parameters outside of their
                constraints, or data outside of the domain.
        """
        event, kind = self.event_shape, type(self).__name__
        batch = value.dim() - len(event)
        if batch < 0 or value.shape[batch:] != event:
            raise ValueError(f"value must end in the event_shape {tuple(event)} of {kind}; got {tuple(value.shape)}")
        like = f"the batch_shape {tuple(self.batch_shape)} of {kind} in front of its event_shape {tuple(event)}"
        shape = broadcast("value", value.shape[:batch], self.batch_shape, like)
        if self._validate_args and domains.untraced(value) and domains.untraced(self._recon[0]):
            return self._looked_at(value, lambda: self._log_prob(value, shape))
        return self._log_prob(value, shape)

    def _log_prob(self, value: Tensor, shape: torch.Size) -> Tensor:
        """log p [*shape] of a value that fits."""
        event = self.event_shape
        own = value.shape[: value.dim() - len(event)]
        if shape[len(shape) - len(own) :] != own:  # it repeats inside of the batch
            own = shape
        if not event:
            return self._of_elements(value.expand(own), shape)
        front = math.prod(shape[: len(shape) - len(own)]), math.prod(own)  # K, B
        first, *others = self._recon
        recon = [ordered.expand(first, shape + event).reshape(front + event)]
        for t in others:
            shared = _shared(t, event)
            recon.append(ordered.expand(t, shape + event).reshape(front + event) if shared is None else shared)
        x = value.expand(own + event).reshape(front[1], *event)
        return log_prob(join_recon(*recon), x, likelihood=self.likelihood).reshape(shape)

    def _of_elements(self, x: Tensor, shape: torch.Size) -> Tensor:
        """log p [*shape] of data x whose shape ends that."""
        lead = shape[: len(shape) - x.dim()]

        def folded(t: Tensor) -> Tensor:
            own = t.shape[t.dim() - x.dim() :] if x.dim() else torch.Size()
            return t if t.dim() <= x.dim() else ordered.expand(t, lead + own).reshape(math.prod(lead), *own)

        recon = join_recon(*map(folded, self._recon))
        return log_prob(recon, x, likelihood=self.likelihood, reduce=False).reshape(shape)


class MeanAndTheta(Fused):
    """Counts of a mean and an inverse dispersion theta, by their logarithms or by themselves."""

    def _logs(self, i: int) -> Tensor:
        return ordered.expand(torch.log(self._recon[i]), self.param_shape)

    @lazy_property
    def log_mean(self) -> Tensor:
        """log m."""
        return self._logs(0)

    @lazy_property
    def log_theta(self) -> Tensor:
        """log theta."""
        return self._logs(1)

    @lazy_property
    def theta(self) -> Tensor:
        """The inverse dispersion."""
        return ordered.expand(torch.exp(self._recon[1]), self.param_shape)

    def _mean_and_ratio(self) -> tuple[Tensor, Tensor]:
        """m, and m / theta: without their logarithms where they are given, whose gradient at 0 is infinite."""
        if self.likelihood.endswith("_mean"):
            return self._recon[0], self._recon[0] / self.theta
        return torch.exp(self.log_mean), torch.exp(self.log_mean - self.log_theta)


def blank(cls: type[Fused]) -> Fused:
    """An object whose attributes a pickle sets."""
    return cls.__new__(cls)


def broadcast(name: str, shape: torch.Size, other: torch.Size, like: str) -> torch.Size:
    """The shape to which both broadcast; what is refused is the argument `name`."""
    try:
        return torch.broadcast_shapes(shape, other)  # type: ignore[no-any-return]
    except RuntimeError:
        raise ValueError(f"{name} must broadcast with {like}; got {tuple(shape)}") from None


def event_sum(t: Tensor, event_dims: int) -> Tensor:
    """The sum over the last event_dims dimensions."""
    return ordered.ordered_sum(t, *range(t.dim() - event_dims, t.dim())) if event_dims else t


def _shared(t: Tensor, event: torch.Size) -> Tensor | None:
    """A parameter that data share, [*event] or 0-d; None where it differs among them."""
    if t.numel() == 1:
        return t.reshape(())
    return t.reshape(event) if t.numel() == event.numel() and t.shape[t.dim() - len(event) :] == event else None


def _is_picture(value: Tensor, domain: constraints.Constraint) -> bool:
    """Whether value is read as x / 255."""
    return value.dtype in (torch.uint8, torch.bool) and domain is constraints.unit_interval


def _surely(constraint: constraints.Constraint, t: Tensor) -> bool:
    """Whether all of t satisfies the constraint, by one pass over it or two; False also where that does not tell."""
    t = t.detach()
    if t.numel() == 0:
        return True
    if constraint is constraints.real:
        return math.isfinite(t.sum().item())
    # not aminmax, which is slower than both; NaN is the lowest and the highest
    if constraint is constraints.unit_interval:
        return bool(t.amin().item() >= 0 and t.amax().item() <= 1)
    if constraint is constraints.positive:
        return bool(t.amin().item() > 0)
    if constraint is constraints.nonnegative or not t.is_floating_point():
        return bool(t.amin().item() >= 0)
    return bool(torch._is_all_true(constraint.check(t)))
