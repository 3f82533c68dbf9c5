"""The likelihoods as torch Distributions whose log_prob is the fused one, and the KL between Gaussian distributions.

They work in Pyro models at once: objects that are built after `import pyro` are Pyro's distributions too.
"""

import functools
import math
import sys
from collections.abc import Sequence
from typing import Any, ClassVar, Self

import torch
from torch import Tensor
from torch import distributions as plain
from torch.distributions import Distribution, Independent, Normal, constraints, kl_divergence, register_kl
from torch.distributions.utils import lazy_property

from fastelbo import likelihoods, losses
from fastelbo._internal import ordered
from fastelbo._internal.arguments import floats as _floats
from fastelbo._internal.arguments import number, refusal, size
from fastelbo.likelihoods import LOG_2, LOG_2PI
from fastelbo.losses import drawn_once, join_recon

__all__ = [
    "Bernoulli",
    "Fused",
    "Gaussian",
    "Laplace",
    "NegativeBinomial",
    "Poisson",
    "StudentT",
    "ZeroInflatedNegativeBinomial",
    "gaussian_kl",
]

_number = number(expected="a float or a torch.Tensor")
_positive = number(lambda value: value > 0, "positive", "a float or a torch.Tensor")

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


class Fused(Distribution):
    """What the distributions of this module share: each is a likelihood of `fastelbo.log_prob`.

    Sizes: an event is the last `event_dims` dimensions, over which `log_prob` sums. batch_shape and event_shape are
    those of `torch.distributions.Independent(..., event_dims)`. Each parameter is an attribute [*batch, *event].

    Each has what the class of torch.distributions has for which it stands, with the same values. As in torch, cdf, icdf
    and enumerate_support are those of one element, event_dims=0.
    """

    likelihood: str
    _plain: ClassVar[type]  # of a class with Pyro's methods: the one without them
    # Parameters as `fastelbo.log_prob` takes them: the first [*batch, *event], the others as given. A kernel reads what
    # data share once, and sums its gradient.
    _recon: tuple[Tensor, ...]

    def __new__(cls, *args: Any, **kwargs: Any) -> Self:
        if not torch.compiler.is_compiling() and hasattr(sys.modules.get(_PYRO), "TorchDistributionMixin"):
            cls = _with_pyro(cls)  # type: ignore[arg-type]
        return super().__new__(cls)

    def __reduce__(self) -> tuple[Any, ...]:
        """The class with Pyro's methods has no name of its own: the plain one is stored."""
        return _blank, (getattr(self, "_plain", type(self)),), vars(self)

    def _init(self, likelihood: str, *given: Any, event_dims: int, validate_args: bool | None) -> None:
        names = likelihoods.get(likelihood).parameters
        first = _floats(names[0], given[0])
        others = [
            _floats(name, t) if isinstance(t, Tensor) else _full(name, t, first)
            for name, t in zip(names[1:], given[1:], strict=True)
            if t is not None
        ]
        shape = first.shape
        for name, t in zip(names[1:], others, strict=False):
            try:
                shape = torch.broadcast_shapes(shape, t.shape)
            except RuntimeError:
                raise ValueError(
                    f"{name} must broadcast with the shape {tuple(shape)} of {names[0]}; got {tuple(t.shape)}"
                ) from None
        batch = len(shape) - size("event_dims", event_dims)
        if batch < 0:
            raise ValueError(f"event_dims must be at most {len(shape)}, the dimensions of {names[0]}; got {event_dims}")
        self.likelihood, self._recon = likelihood, (ordered.expand(first, shape), *others)
        self._name_parameters()
        Distribution.__init__(self, shape[:batch], shape[batch:], validate_args=validate_args)

    def _name_parameters(self) -> None:
        first = self._recon[0]
        for name, t in zip(likelihoods.get(self.likelihood).parameters, self._recon, strict=False):
            if name != "mean":  # a property of every distribution
                setattr(self, name, ordered.expand(t, first.shape))

    def expand(self, batch_shape: Sequence[int], _instance: Self | None = None) -> Self:
        """The same distribution with this batch_shape; no memory is allocated."""
        new = type(self).__new__(type(self)) if _instance is None else _instance
        batch_shape = torch.Size(batch_shape)
        first, *others = self._recon
        first = ordered.expand(first, batch_shape + self.event_shape)
        new.likelihood, new._recon = self.likelihood, (first, *others)
        new._name_parameters()
        Distribution.__init__(new, batch_shape, self.event_shape, validate_args=False)
        new._validate_args = self._validate_args
        return new

    @constraints.dependent_property
    def support(self) -> constraints.Constraint:
        """Where draws lie; `log_prob` also takes x between 0 and 1, and fractional counts."""
        support, event_dims = _DOMAINS[likelihoods.get(self.likelihood).domain][0], len(self.event_shape)
        return constraints.independent(support, event_dims) if event_dims else support

    @property
    def mean(self) -> Tensor:
        """E[x], [*batch, *event]."""
        return losses.likelihood_mean(join_recon(*self._recon), self.likelihood)

    def _of_torch(self) -> Distribution:
        """torch's distribution of each element [*batch, *event]."""
        raise NotImplementedError(f"torch.distributions has no {type(self).__name__}")

    def _of_element(self, name: str) -> Distribution:
        found = self._of_torch()
        if getattr(type(found), name) is getattr(Distribution, name):
            raise NotImplementedError(f"torch's {type(found).__name__} has no {name}")
        if self.event_shape:
            raise NotImplementedError(
                f"{name} is defined for one element: give event_dims=0; got {len(self.event_shape)} event dimensions"
            )
        found._validate_args = self._validate_args
        return found

    @property
    def param_shape(self) -> torch.Size:
        """[*batch, *event]."""
        return self._recon[0].shape

    @property
    def mode(self) -> Tensor:
        """The x of the largest p(x), [*batch, *event]."""
        return self._of_torch().mode

    def _entropies(self) -> Tensor:
        return self._of_torch().entropy()

    def entropy(self) -> Tensor:
        """-E[log p(x)] [*batch], in nats, summed over the event."""
        return _event_sum(self._entropies(), len(self.event_shape))

    def cdf(self, value: Tensor) -> Tensor:
        """P(X <= value), of `Gaussian` and `Laplace` without event dimensions."""
        return self._of_element("cdf").cdf(value)

    def icdf(self, value: Tensor) -> Tensor:
        """The inverse of `cdf`, at values in [0, 1]."""
        return self._of_element("icdf").icdf(value)

    @property
    def has_enumerate_support(self) -> bool:  # type: ignore[override]
        """Whether `enumerate_support` works: of `Bernoulli` without event dimensions."""
        return isinstance(self, Bernoulli) and not self.event_shape

    def enumerate_support(self, expand: bool = True) -> Tensor:
        """All x, along a new first dimension [2, *batch]; with expand=False [2, 1, ...]."""
        return self._of_element("enumerate_support").enumerate_support(expand)

    def _draw(self, sample_shape: Sequence[int]) -> Tensor:
        first, *others = self._recon
        shape = self._extended_shape(torch.Size(sample_shape))
        if torch.is_grad_enabled():
            others = [ordered.expand(t, shape) for t in others]
        draw = likelihoods.get(self.likelihood).draw
        return drawn_once(lambda: draw(None, ordered.expand(first, shape), *others))

    @torch.no_grad()
    def sample(self, sample_shape: Sequence[int] = ()) -> Tensor:
        """A draw [*sample, *batch, *event] by torch's default generator, not differentiable."""
        return self._draw(sample_shape)

    def rsample(self, sample_shape: Sequence[int] = ()) -> Tensor:
        """A draw that is differentiable in the parameters: of `Gaussian` and `Laplace`."""
        if not self.has_rsample:
            raise NotImplementedError(f"{type(self).__name__} draws no reparameterized samples: take sample")
        return self._draw(sample_shape)

    def log_prob(self, value: Tensor) -> Tensor:
        """log p(value), summed over the event.

        Args:
            value: [*sample, *batch, *event], or what broadcasts to it in front of the event. What `fastelbo.log_prob`
                takes as x: also fractional data, uint8 (x / 255, or counts) and counts of an integer type. Data
                [B, *event] under parameters [K, B, *event] are read once.

        Returns:
            [*sample, *batch], in nats; float32, or float64 for float64 inputs.

        Raises:
            ValueError, TypeError: a shape or dtype that does not fit; with validate_args, data outside of the domain.
        """
        event, kind = self.event_shape, type(self).__name__
        if not isinstance(value, Tensor):
            raise refusal("value", "a torch.Tensor", value)
        batch = value.dim() - len(event)
        if batch < 0 or value.shape[batch:] != event:
            raise ValueError(f"value must end in the event_shape {tuple(event)} of {kind}; got {tuple(value.shape)}")
        own = value.shape[:batch]
        try:
            shape = torch.broadcast_shapes(own, self.batch_shape)
        except RuntimeError:
            raise ValueError(
                f"value must broadcast with the batch_shape {tuple(self.batch_shape)} of {kind} in front of its "
                f"event_shape {tuple(event)}; got {tuple(value.shape)}"
            ) from None
        # bytes of [0, 1] are read as x / 255
        if self._validate_args and value.dtype not in (torch.uint8, torch.bool):
            domain = _DOMAINS[likelihoods.get(self.likelihood).domain][1]
            if not torch._is_all_true(domain.check(value)):
                raise ValueError(f"value must be in the domain {domain!r} of {kind}; got\n{value}")
        if shape[len(shape) - len(own) :] != own:  # it repeats inside of the batch
            own = shape
        repeats, data = shape[: len(shape) - len(own)], math.prod(own)
        front = (math.prod(repeats), data) if repeats else (data,)  # [K, B] or [B]
        first, *others = self._recon
        recon = [ordered.expand(first, shape + event).reshape(front + event)]
        for t in others:
            shared = _shared(t, event)
            recon.append(ordered.expand(t, shape + event).reshape(front + event) if shared is None else shared)
        x = value.expand(own + event).reshape(data, *event)
        return losses.log_prob(join_recon(*recon), x, likelihood=self.likelihood).reshape(shape)


def _blank(cls: type[Fused]) -> Fused:
    return cls.__new__(cls)


def _event_sum(t: Tensor, event_dims: int) -> Tensor:
    return ordered.ordered_sum(t, *range(t.dim() - event_dims, t.dim())) if event_dims else t


def _full(name: str, value: Any, like: Tensor) -> Tensor:
    return torch.full((), _number(name, value), dtype=like.dtype, device=like.device)


def _shared(t: Tensor, event: torch.Size) -> Tensor | None:
    """A parameter that data share, [*event] or 0-d; None where it differs among them."""
    if t.numel() == 1:
        return t.reshape(())
    return t.reshape(event) if t.numel() == event.numel() and t.shape[t.dim() - len(event) :] == event else None


def _log_scale(of: str, name: str, other: Any, scale: Any, validate_args: bool | None) -> Any:
    """log(scale) of the argument `scale`, which excludes the argument `name`."""
    if other is not None:
        raise ValueError(f"{of} takes {name} or scale, not both")
    if not isinstance(scale, Tensor):
        return math.log(_positive("scale", scale))
    if (Distribution._validate_args if validate_args is None else validate_args) and not torch._is_all_true(scale > 0):
        raise ValueError(f"scale must be positive; got\n{scale}")
    return torch.log(_floats("scale", scale))


# ----------------------------------------------------------------------------------------------------------------------
# The likelihoods.


class Bernoulli(Fused):
    """Bernoulli: x l - softplus(l), l the logit, summed over the event; x anywhere in [0, 1].

    Args:
        logits: [*batch, *event], a floating dtype.
        probs: in place of logits, by name; log p as that of "bernoulli_probs" in `fastelbo.log_prob`.
        event_dims: the number of dimensions that log_prob sums over, from the last; 0 for none.
        validate_args: check the values of parameters and of x; torch's default if None.

    Raises:
        ValueError, TypeError: arguments that do not fit, named with what was expected and what came.

    Reference: Kingma & Welling 2014, app. C.1.
    """

    arg_constraints: ClassVar = {"logits": constraints.real, "probs": constraints.unit_interval}

    def __init__(
        self,
        logits: Tensor | None = None,
        *,
        probs: Tensor | None = None,
        event_dims: int = 1,
        validate_args: bool | None = None,
    ) -> None:
        if (logits is None) == (probs is None):
            raise ValueError(f"Bernoulli takes logits or probs; got {'neither' if probs is None else 'both'}")
        if probs is None:
            self._init("bernoulli", logits, event_dims=event_dims, validate_args=validate_args)
        else:
            self._init("bernoulli_probs", probs, event_dims=event_dims, validate_args=validate_args)

    def _of_torch(self) -> Distribution:
        return plain.Bernoulli(**{likelihoods.get(self.likelihood).parameters[0]: self._recon[0]}, validate_args=False)

    @lazy_property
    def logits(self) -> Tensor:
        """log p - log(1 - p)."""
        return torch.logit(self._recon[0])

    @lazy_property
    def probs(self) -> Tensor:
        """p, the mean."""
        return self.mean

    @property
    def variance(self) -> Tensor:
        """p (1 - p)."""
        return self.mean * (1 - self.mean)


class Gaussian(Fused):
    """Gaussian with diagonal covariance: -1/2 sum [(x - m)^2 exp(-lv) + lv + log 2 pi]; reparameterized.

    Args:
        mean: [*batch, *event], a floating dtype.
        logvar: log variance; a float, or a tensor that broadcasts with mean. 0 without it and scale.
        scale: the standard deviation in place of logvar, by name alone: logvar = 2 log(scale).
        event_dims, validate_args: as in `Bernoulli`.

    Raises:
        ValueError, TypeError: arguments that do not fit, named with what was expected and what came.

    Reference: Kingma & Welling 2014, app. C.2.
    """

    arg_constraints: ClassVar = {"mean": constraints.real, "logvar": constraints.real}
    has_rsample = True

    def __init__(
        self,
        mean: Tensor,
        logvar: float | Tensor | None = None,
        *,
        scale: float | Tensor | None = None,
        event_dims: int = 1,
        validate_args: bool | None = None,
    ) -> None:
        if scale is not None:
            logvar = 2 * _log_scale("Gaussian", "logvar", logvar, scale, validate_args)
        self._init("gaussian", mean, logvar, event_dims=event_dims, validate_args=validate_args)

    def _of_torch(self) -> Distribution:
        return Normal(self.mean, self.scale, validate_args=False)

    def _entropies(self) -> Tensor:
        return 0.5 * (self.logvar + (LOG_2PI + 1))

    @lazy_property
    def logvar(self) -> Tensor:
        """lv [*batch, *event]."""
        return torch.zeros_like(self.mean)

    @property
    def loc(self) -> Tensor:
        """m, torch's name."""
        return self.mean

    @property
    def scale(self) -> Tensor:
        """exp(lv / 2), the standard deviation."""
        return torch.exp(0.5 * self.logvar)

    @property
    def variance(self) -> Tensor:
        """exp(lv)."""
        return torch.exp(self.logvar)


class Laplace(Fused):
    """Laplace: -sum [|x - m| exp(-s) + s + log 2], s the log scale; reparameterized.

    Args:
        mean: [*batch, *event], a floating dtype.
        log_scale: a float, or a tensor that broadcasts with mean. 0 without it and scale.
        scale: in place of log_scale, by name alone. The standard deviation is sqrt(2) scale.
        event_dims, validate_args: as in `Bernoulli`.

    Raises:
        ValueError, TypeError: arguments that do not fit, named with what was expected and what came.
    """

    arg_constraints: ClassVar = {"mean": constraints.real, "log_scale": constraints.real}
    has_rsample = True

    def __init__(
        self,
        mean: Tensor,
        log_scale: float | Tensor | None = None,
        *,
        scale: float | Tensor | None = None,
        event_dims: int = 1,
        validate_args: bool | None = None,
    ) -> None:
        if scale is not None:
            log_scale = _log_scale("Laplace", "log_scale", log_scale, scale, validate_args)
        self._init("laplace", mean, log_scale, event_dims=event_dims, validate_args=validate_args)

    def _of_torch(self) -> Distribution:
        return plain.Laplace(self.mean, self.scale, validate_args=False)

    def _entropies(self) -> Tensor:
        return self.log_scale + (LOG_2 + 1)

    @lazy_property
    def log_scale(self) -> Tensor:
        """s [*batch, *event]."""
        return torch.zeros_like(self.mean)

    @property
    def loc(self) -> Tensor:
        """m, torch's name."""
        return self.mean

    @property
    def scale(self) -> Tensor:
        """exp(s)."""
        return torch.exp(self.log_scale)

    @property
    def variance(self) -> Tensor:
        """2 exp(2 s)."""
        return 2 * torch.exp(2 * self.log_scale)


class StudentT(Fused):
    """Student's t of nu = exp(log_df) degrees of freedom, as "student_t" in `fastelbo.log_prob`; reparameterized.

    Args:
        mean: [*batch, *event], a floating dtype: the centre, `loc`, which is the mean where nu > 1.
        log_scale: a float, or a tensor that broadcasts with mean.
        log_df: as log_scale. It counts as at least -80 and at most 80, where this is the Gaussian.
        event_dims, validate_args: as in `Bernoulli`.

    Raises:
        ValueError, TypeError: arguments that do not fit, named with what was expected and what came.
    """

    arg_constraints: ClassVar = {"loc": constraints.real, "log_scale": constraints.real, "log_df": constraints.real}
    has_rsample = True

    def __init__(
        self,
        mean: Tensor,
        log_scale: float | Tensor,
        log_df: float | Tensor,
        *,
        event_dims: int = 1,
        validate_args: bool | None = None,
    ) -> None:
        self._init("student_t", mean, log_scale, log_df, event_dims=event_dims, validate_args=validate_args)

    def _of_torch(self) -> Distribution:
        return plain.StudentT(self.df, self.loc, self.scale, validate_args=False)

    @property
    def mean(self) -> Tensor:
        """loc where nu > 1, elsewhere NaN."""
        return self._of_torch().mean

    @property
    def loc(self) -> Tensor:
        """The centre."""
        return self._recon[0]

    @property
    def scale(self) -> Tensor:
        """exp(log_scale)."""
        return torch.exp(self.log_scale)

    @property
    def df(self) -> Tensor:
        """nu."""
        return torch.exp(self.log_df)

    @property
    def variance(self) -> Tensor:
        """exp(2 log_scale) nu / (nu - 2) where nu > 2, infinite down to 1, and then NaN."""
        return self._of_torch().variance


class Poisson(Fused):
    """Poisson: sum [x l - exp(l) - lgamma(x + 1)], l the log rate; x may be fractional.

    Args:
        log_rate: [*batch, *event], a floating dtype.
        event_dims, validate_args: as in `Bernoulli`.

    Raises:
        ValueError, TypeError: arguments that do not fit, named with what was expected and what came.
    """

    arg_constraints: ClassVar = {"log_rate": constraints.real}

    def __init__(self, log_rate: Tensor, *, event_dims: int = 1, validate_args: bool | None = None) -> None:
        self._init("poisson", log_rate, event_dims=event_dims, validate_args=validate_args)

    def _of_torch(self) -> Distribution:
        return plain.Poisson(self.rate, validate_args=False)

    @property
    def rate(self) -> Tensor:
        """exp(l), the mean."""
        return self.mean

    @property
    def variance(self) -> Tensor:
        """exp(l)."""
        return self.mean


class NegativeBinomial(Fused):
    """Negative binomial of mean m = exp(log_mean) and variance m + m^2 / theta, as "nb" in `fastelbo.log_prob`.

    Args:
        log_mean: [*batch, *event], a floating dtype.
        log_theta: the log of the inverse dispersion; a float, or a tensor that broadcasts with log_mean. A gradient of
            a tensor [*event] is summed by the kernel.
        event_dims, validate_args: as in `Bernoulli`.

    Raises:
        ValueError, TypeError: arguments that do not fit, named with what was expected and what came.

    Reference: Lopez et al. 2018 (scVI), methods.
    """

    arg_constraints: ClassVar = {"log_mean": constraints.real, "log_theta": constraints.real}
    log_mean: Tensor
    log_theta: Tensor

    def __init__(
        self, log_mean: Tensor, log_theta: float | Tensor, *, event_dims: int = 1, validate_args: bool | None = None
    ) -> None:
        self._init("nb", log_mean, log_theta, event_dims=event_dims, validate_args=validate_args)

    def _of_torch(self) -> Distribution:
        return plain.NegativeBinomial(self.total_count, logits=self.logits, validate_args=False)

    @property
    def total_count(self) -> Tensor:
        """theta."""
        return torch.exp(self.log_theta)

    @property
    def logits(self) -> Tensor:
        """log m - log theta."""
        return self.log_mean - self.log_theta

    @property
    def probs(self) -> Tensor:
        """m / (m + theta)."""
        return torch.sigmoid(self.logits)

    @property
    def mode(self) -> Tensor:
        """floor(m - m / theta), or 0; for theta too large for its dtype the Poisson's."""
        return (self.mean - torch.exp(self.logits)).floor().clamp(min=0)

    @property
    def variance(self) -> Tensor:
        """m + m^2 / theta."""
        return self.mean * (1 + torch.exp(self.logits))


class ZeroInflatedNegativeBinomial(Fused):
    """Zero with probability sigmoid(zero_logits), else `NegativeBinomial`.

    Args:
        log_mean, log_theta: of the negative binomial, as there.
        zero_logits: a float, or a tensor that broadcasts with log_mean.
        event_dims, validate_args: as in `Bernoulli`.

    Raises:
        ValueError, TypeError: arguments that do not fit, named with what was expected and what came.

    Reference: Lopez et al. 2018 (scVI), methods.
    """

    arg_constraints: ClassVar = {
        "log_mean": constraints.real,
        "log_theta": constraints.real,
        "zero_logits": constraints.real,
    }
    log_mean: Tensor
    log_theta: Tensor
    zero_logits: Tensor

    def __init__(
        self,
        log_mean: Tensor,
        log_theta: float | Tensor,
        zero_logits: float | Tensor,
        *,
        event_dims: int = 1,
        validate_args: bool | None = None,
    ) -> None:
        self._init("zinb", log_mean, log_theta, zero_logits, event_dims=event_dims, validate_args=validate_args)

    @property
    def variance(self) -> Tensor:
        """m (1 - p) [1 + m / theta + m p], p the probability of an inflated zero."""
        m = torch.exp(self.log_mean)
        return self.mean * (1 + torch.exp(self.log_mean - self.log_theta) + m * torch.sigmoid(self.zero_logits))


# ----------------------------------------------------------------------------------------------------------------------
# The KL.


def _moments(name: str, d: Distribution) -> tuple[Tensor, Tensor]:
    """Mean and log variance [*batch, *event] of a Gaussian distribution."""
    if isinstance(d, Gaussian):
        return d.mean, d.logvar
    if isinstance(d, Normal):
        return d.loc, 2 * torch.log(d.scale)
    if isinstance(d, Independent):
        return _moments(name, d.base_dist)
    raise refusal(name, "a Gaussian, a Normal or an Independent of them", d)


def gaussian_kl(q: Distribution, p: Distribution | None = None) -> Tensor:
    """KL(q || p) of Gaussian distributions with diagonal covariances, by the fused kernel of `fastelbo.gaussian_kl`.

    1/2 sum [exp(t) - 1 - t + (mu - mu_p)^2 exp(-lv_p)], t = lv - lv_p, summed over the event. It is also what
    `torch.distributions.kl_divergence` returns where one of the two is a `Gaussian` of this module; of others it
    returns torch's.

    Args:
        q, p: `Gaussian`, torch.distributions.Normal (logvar = 2 log(scale)) or Independent of them, of one event_shape;
            Pyro's are among them. p is N(0, I) if None.

    Returns:
        The broadcast batch_shape, in nats; float32, or float64 for float64 parameters.

    Raises:
        TypeError: another distribution.
        ValueError: event_shapes that differ, or batch_shapes that do not broadcast.

    Reference: Kingma & Welling 2014, app. B.
    """
    tensors: tuple[Tensor, ...] = _moments("q", q)
    batch, event = q.batch_shape, q.event_shape
    if p is not None:
        tensors += _moments("p", p)
        if p.event_shape != event:
            raise ValueError(f"p must have the event_shape {tuple(event)} of q; got {tuple(p.event_shape)}")
        try:
            batch = torch.broadcast_shapes(batch, p.batch_shape)
        except RuntimeError:
            raise ValueError(
                f"p must broadcast with the batch_shape {tuple(batch)} of q; got {tuple(p.batch_shape)}"
            ) from None
    rows = (math.prod(batch), *event)
    return losses.gaussian_kl(*(ordered.expand(t, batch + event).reshape(rows) for t in tensors)).reshape(batch)


def _elements(d: Distribution) -> Distribution:
    """torch's distribution of the elements of d."""
    if isinstance(d, Independent):
        return _elements(d.base_dist)
    return d._of_torch() if isinstance(d, Fused) else d


def _registered_kl(q: Distribution, p: Distribution) -> Tensor:
    try:
        return gaussian_kl(q, p)
    except TypeError:  # not both are Gaussian
        if len(q.event_shape) != len(p.event_shape):
            raise NotImplementedError from None
        return _event_sum(kl_divergence(_elements(q), _elements(p)), len(q.event_shape))


register_kl(Fused, Fused)(_registered_kl)
# Each class with which torch has a KL of one of ours. Not Distribution: Pyro has KL(Delta, Distribution).
for _other in (
    Independent,
    plain.Bernoulli,
    plain.Beta,
    plain.Binomial,
    plain.ContinuousBernoulli,
    plain.Exponential,
    plain.Gamma,
    plain.Gumbel,
    plain.Laplace,
    Normal,
    plain.Pareto,
    plain.Poisson,
    plain.Uniform,
):
    register_kl(Fused, _other)(_registered_kl)
    register_kl(_other, Fused)(_registered_kl)
