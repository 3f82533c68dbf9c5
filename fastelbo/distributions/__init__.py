"""The likelihoods as torch Distributions whose log_prob is the fused one, and the KL between Gaussian distributions.

They work in Pyro models at once: objects that are built after `import pyro` are Pyro's distributions too.
"""

import math
from typing import Annotated, Any, ClassVar

import torch
from torch import Tensor
from torch import distributions as plain
from torch.distributions import Distribution, Independent, Normal, constraints, kl_divergence, register_kl
from torch.distributions.utils import lazy_property

from fastelbo import losses, reference
from fastelbo._internal import ordered
from fastelbo._internal.arguments import (
    FLOATS,
    Floats,
    NumberOrFloats,
    Size,
    checked,
    either,
    floats,
    integer,
    number,
    refusal,
    tensor,
)
from fastelbo.distributions.base import Fused, MeanAndTheta, blank, broadcast, event_sum, torch_s
from fastelbo.likelihoods import LOG_2, LOG_2PI

__all__ = [
    "Bernoulli",
    "BetaBinomial",
    "Fused",
    "Gaussian",
    "Laplace",
    "NegativeBinomial",
    "NegativeBinomialMixture",
    "Poisson",
    "StudentT",
    "ZeroInflatedNegativeBinomial",
    "gaussian_kl",
]

_blank = blank  # its name in older pickles

_Positive = Annotated[
    float | Tensor, either(floats, number(lambda value: value > 0, "positive", "a float or a torch.Tensor"))
]
_NotNegative = Annotated[
    float | Tensor, either(floats, number(lambda value: value >= 0, "at least 0", "a float or a torch.Tensor"))
]
_Total = Annotated[
    int | Tensor,
    either(tensor(*FLOATS, torch.uint8, *reference.COUNTS), integer(0, "an int or a torch.Tensor")),
]


def _log_scale(of: str, name: str, other: float | Tensor | None, scale: float | Tensor) -> Any:
    """log(scale) of the argument `scale`, which excludes the argument `name`."""
    if other is not None:
        raise ValueError(f"{of} takes {name} or scale, not both")
    return torch.log(scale) if isinstance(scale, Tensor) else math.log(scale)


# ----------------------------------------------------------------------------------------------------------------------
# The likelihoods.


class Bernoulli(Fused):
    """Bernoulli: x l - softplus(l), l the logit, summed over the event; x anywhere in [0, 1].

    Args:
        logits: [*batch, *event], a floating dtype.
        probs: in place of logits, by name; log p as that of "bernoulli_probs" in `fastelbo.log_prob`.
        event_dims: the number of dimensions that log_prob sums over, from the last; 0 for none.
        validate_args: check the values of parameters and of x; torch's default if None. Parameters are looked at by
            the first log_prob or sample; see `Fused`.

    Raises:
        ValueError, TypeError: arguments that do not fit, named with what was expected and what came.

    Reference: Kingma & Welling 2014, app. C.1.
    """

    arg_constraints: ClassVar = {"logits": constraints.real, "probs": constraints.unit_interval}

    @checked
    def __init__(
        self,
        logits: Floats | None = None,
        *,
        probs: Floats | None = None,
        event_dims: Size = 1,
        validate_args: bool | None = None,
    ) -> None:
        if (logits is None) == (probs is None):
            raise ValueError(f"Bernoulli takes logits or probs; got {'neither' if probs is None else 'both'}")
        likelihood, given = ("bernoulli_probs", probs) if logits is None else ("bernoulli", logits)
        super().__init__(likelihood, given, event_dims=event_dims, validate_args=validate_args)  # type: ignore[arg-type]

    def of_torch(self) -> Distribution:
        """torch's Bernoulli."""
        given = {"logits" if self.likelihood == "bernoulli" else "probs": self._recon[0]}
        return plain.Bernoulli(**given, validate_args=False)

    @lazy_property
    def logits(self) -> Tensor:
        """log p - log(1 - p)."""
        return torch.logit(self._recon[0])

    @lazy_property
    def probs(self) -> Tensor:
        """p, the mean."""
        return self.mean

    @property
    def has_enumerate_support(self) -> bool:  # type: ignore[override]
        """Whether `enumerate_support` works: without event dimensions."""
        return not self.event_shape


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

    arg_constraints: ClassVar = {"mean": constraints.real, "logvar": constraints.real, "scale": constraints.positive}
    has_rsample = True
    loc = torch_s("loc", "m, torch's name.")
    scale = torch_s("scale", "exp(lv / 2), the standard deviation.")

    @checked
    def __init__(
        self,
        mean: Floats,
        logvar: NumberOrFloats | None = None,
        *,
        scale: _Positive | None = None,
        event_dims: Size = 1,
        validate_args: bool | None = None,
    ) -> None:
        if scale is not None:
            logvar = 2 * _log_scale("Gaussian", "logvar", logvar, scale)
        super().__init__("gaussian", mean, logvar, event_dims=event_dims, validate_args=validate_args)
        if isinstance(scale, Tensor):
            self._scale = scale

    def of_torch(self) -> Distribution:
        """torch's Normal."""
        return Normal(self.mean, torch.exp(0.5 * self.logvar), validate_args=False)

    def _entropies(self) -> Tensor:
        return 0.5 * (self.logvar + (LOG_2PI + 1))

    @lazy_property
    def logvar(self) -> Tensor:
        """lv [*batch, *event]."""
        return torch.zeros_like(self.mean)


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

    arg_constraints: ClassVar = {"mean": constraints.real, "log_scale": constraints.real, "scale": constraints.positive}
    has_rsample = True
    loc = torch_s("loc", "m, torch's name.")
    scale = torch_s("scale", "exp(s).")

    @checked
    def __init__(
        self,
        mean: Floats,
        log_scale: NumberOrFloats | None = None,
        *,
        scale: _Positive | None = None,
        event_dims: Size = 1,
        validate_args: bool | None = None,
    ) -> None:
        if scale is not None:
            log_scale = _log_scale("Laplace", "log_scale", log_scale, scale)
        super().__init__("laplace", mean, log_scale, event_dims=event_dims, validate_args=validate_args)
        if isinstance(scale, Tensor):
            self._scale = scale

    def of_torch(self) -> Distribution:
        """torch's Laplace."""
        return plain.Laplace(self.mean, torch.exp(self.log_scale), validate_args=False)

    def _entropies(self) -> Tensor:
        return self.log_scale + (LOG_2 + 1)

    @lazy_property
    def log_scale(self) -> Tensor:
        """s [*batch, *event]."""
        return torch.zeros_like(self.mean)


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
    _others: ClassVar = {"mean": "loc"}
    log_scale: Tensor
    log_df: Tensor
    mean = torch_s("mean", "loc where nu > 1, elsewhere NaN.")
    scale = torch_s("scale", "exp(log_scale).")
    df = torch_s("df", "nu.")

    @checked
    def __init__(
        self,
        mean: Floats,
        log_scale: NumberOrFloats,
        log_df: NumberOrFloats,
        *,
        event_dims: Size = 1,
        validate_args: bool | None = None,
    ) -> None:
        super().__init__("student_t", mean, log_scale, log_df, event_dims=event_dims, validate_args=validate_args)

    def of_torch(self) -> Distribution:
        """torch's StudentT."""
        return plain.StudentT(torch.exp(self.log_df), self._recon[0], torch.exp(self.log_scale), validate_args=False)

    @property
    def loc(self) -> Tensor:
        """The centre."""
        return self._recon[0]


class Poisson(Fused):
    """Poisson: sum [x l - exp(l) - lgamma(x + 1)], l the log rate; x may be fractional.

    Args:
        log_rate: [*batch, *event], a floating dtype.
        event_dims, validate_args: as in `Bernoulli`.

    Raises:
        ValueError, TypeError: arguments that do not fit, named with what was expected and what came.
    """

    arg_constraints: ClassVar = {"log_rate": constraints.real}
    rate = torch_s("rate", "exp(l), the mean.")

    @checked
    def __init__(self, log_rate: Floats, *, event_dims: Size = 1, validate_args: bool | None = None) -> None:
        super().__init__("poisson", log_rate, event_dims=event_dims, validate_args=validate_args)

    def of_torch(self) -> Distribution:
        """torch's Poisson."""
        return plain.Poisson(self.mean, validate_args=False)


def _by_logs(
    of: str, log_mean: Any, log_theta: Any, mean: Any, theta: Any
) -> tuple[bool, tuple[Tensor, float | Tensor]]:
    """Whether the logarithms were given, and the two arguments of the pair that was."""
    pairs = {"log_mean": log_mean, "log_theta": log_theta}, {"mean": mean, "theta": theta}
    given = [name for pair in pairs for name, t in pair.items() if t is not None]
    for pair in pairs:
        if given == list(pair):
            return pair is pairs[0], tuple(pair.values())  # type: ignore[return-value]
    raise ValueError(f"{of} takes log_mean and log_theta, or mean and theta; got {', '.join(given) or 'neither'}")


class NegativeBinomial(MeanAndTheta):
    """Negative binomial of mean m and variance m + m^2 / theta, as "nb" or "nb_mean" in `fastelbo.log_prob`.

    Args:
        log_mean: log m [*batch, *event], a floating dtype.
        log_theta: the log of the inverse dispersion; a float, or a tensor that broadcasts with log_mean. A gradient of
            a tensor [*event] is summed by the kernel.
        mean, theta: in place of both logarithms, by name; at least 0.
        event_dims, validate_args: as in `Bernoulli`.

    Raises:
        ValueError, TypeError: arguments that do not fit, named with what was expected and what came.

    Reference: Lopez et al. 2018 (scVI), methods.
    """

    arg_constraints: ClassVar = {
        "log_mean": constraints.real,
        "log_theta": constraints.real,
        "mean": constraints.nonnegative,
        "theta": constraints.nonnegative,
    }
    logits = torch_s("logits", "log m - log theta.")
    probs = torch_s("probs", "m / (m + theta).")

    @checked
    def __init__(
        self,
        log_mean: Floats | None = None,
        log_theta: NumberOrFloats | None = None,
        *,
        mean: Floats | None = None,
        theta: _NotNegative | None = None,
        event_dims: Size = 1,
        validate_args: bool | None = None,
    ) -> None:
        by_logs, given = _by_logs("NegativeBinomial", log_mean, log_theta, mean, theta)
        super().__init__("nb" if by_logs else "nb_mean", *given, event_dims=event_dims, validate_args=validate_args)

    def of_torch(self) -> Distribution:
        """torch's NegativeBinomial."""
        return plain.NegativeBinomial(self.theta, logits=self.log_mean - self.log_theta, validate_args=False)

    @property
    def total_count(self) -> Tensor:
        """theta, torch's name."""
        return self.theta  # type: ignore[no-any-return]

    @property
    def mode(self) -> Tensor:  # type: ignore[override]
        """floor(m - m / theta), or 0; for theta too large for its dtype the Poisson's."""
        mean, ratio = self._mean_and_ratio()
        return (mean - ratio).floor().clamp(min=0)

    @property
    def variance(self) -> Tensor:  # type: ignore[override]
        """m + m^2 / theta."""
        mean, ratio = self._mean_and_ratio()
        return mean * (1 + ratio)


class ZeroInflatedNegativeBinomial(MeanAndTheta):
    """Zero with probability sigmoid(zero_logits), else `NegativeBinomial`.

    Args:
        log_mean, log_theta: of the negative binomial, as there.
        zero_logits: a float, or a tensor that broadcasts with the mean.
        mean, theta: in place of both logarithms, by name: of the negative binomial too. The attribute `mean` is E[x].
        event_dims, validate_args: as in `Bernoulli`.

    Raises:
        ValueError, TypeError: arguments that do not fit, named with what was expected and what came.

    Reference: Lopez et al. 2018 (scVI), methods.
    """

    arg_constraints: ClassVar = NegativeBinomial.arg_constraints | {"zero_logits": constraints.real}
    zero_logits: Tensor

    @checked
    def __init__(
        self,
        log_mean: Floats | None = None,
        log_theta: NumberOrFloats | None = None,
        zero_logits: NumberOrFloats | None = None,
        *,
        mean: Floats | None = None,
        theta: _NotNegative | None = None,
        event_dims: Size = 1,
        validate_args: bool | None = None,
    ) -> None:
        by_logs, given = _by_logs("ZeroInflatedNegativeBinomial", log_mean, log_theta, mean, theta)
        if zero_logits is None:
            raise refusal("zero_logits", "a float or a torch.Tensor", None)
        likelihood = "zinb" if by_logs else "zinb_mean"
        super().__init__(likelihood, *given, zero_logits, event_dims=event_dims, validate_args=validate_args)

    @property
    def variance(self) -> Tensor:  # type: ignore[override]
        """m (1 - p) [1 + m / theta + m p], p the probability of an inflated zero."""
        mean, ratio = self._mean_and_ratio()
        return self.mean * (1 + ratio + mean * torch.sigmoid(self.zero_logits))


class NegativeBinomialMixture(Fused):
    """sigmoid(l) NB(x; mean1, theta) + sigmoid(-l) NB(x; mean2, theta), l the mixture logit, of one theta.

    Args:
        mean1: the mean of the first `NegativeBinomial` [*batch, *event], a floating dtype; at least 0.
        mean2: of the second; a float, or a tensor that broadcasts with mean1; at least 0.
        theta: their inverse dispersion, as mean2.
        mixture_logits: l; a float, or a tensor that broadcasts with mean1.
        event_dims, validate_args: as in `Bernoulli`.

    Raises:
        ValueError, TypeError: arguments that do not fit, named with what was expected and what came.

    Reference: Gayoso et al. 2021 (totalVI), methods.
    """

    arg_constraints: ClassVar = {
        **dict.fromkeys(("mean1", "mean2", "theta"), constraints.nonnegative),
        "mixture_logits": constraints.real,
    }
    mean1: Tensor
    mean2: Tensor
    theta: Tensor
    mixture_logits: Tensor

    @checked
    def __init__(
        self,
        mean1: Floats,
        mean2: _NotNegative,
        theta: _NotNegative,
        mixture_logits: NumberOrFloats,
        *,
        event_dims: Size = 1,
        validate_args: bool | None = None,
    ) -> None:
        others = mean2, theta, mixture_logits
        super().__init__("nb_mixture", mean1, *others, event_dims=event_dims, validate_args=validate_args)

    @property
    def variance(self) -> Tensor:  # type: ignore[override]
        """p v1 + (1 - p) v2 + p (1 - p) (mean1 - mean2)^2, p = sigmoid(l) and v = m + m^2 / theta."""
        p, q = torch.sigmoid(self.mixture_logits), torch.sigmoid(-self.mixture_logits)
        first, second = (mean * (1 + mean / self.theta) for mean in (self.mean1, self.mean2))
        return p * first + q * second + p * q * (self.mean1 - self.mean2).square()


class BetaBinomial(Fused):
    """Beta-binomial: the successes in n trials whose probability is Beta(a, b), log C(n, x) + log B(x + a, n - x + b)
    - log B(a, b).

    Args:
        concentration1: a [*batch, *event], a floating dtype; positive.
        concentration0: b; a float, or a tensor that broadcasts with concentration1; positive.
        total_count: n, data without a gradient; an int, or a tensor of integers or floats that broadcasts with
            concentration1.
        event_dims, validate_args: as in `Bernoulli`.

    Raises:
        ValueError, TypeError: arguments that do not fit, named with what was expected and what came.
    """

    arg_constraints: ClassVar = {
        "concentration1": constraints.positive,
        "concentration0": constraints.positive,
        "total_count": constraints.nonnegative_integer,
    }
    _others: ClassVar = {"total": "total_count"}
    _unseen = ("total_count",)  # of a fractional one log p may be finite
    concentration1: Tensor
    concentration0: Tensor
    total_count: Tensor

    @checked
    def __init__(
        self,
        concentration1: Floats,
        concentration0: _Positive,
        total_count: _Total,
        *,
        event_dims: Size = 1,
        validate_args: bool | None = None,
    ) -> None:
        if not isinstance(total_count, Tensor):  # an integer, which a half type may not hold
            total_count = torch.full((), total_count, dtype=torch.int64, device=concentration1.device)
        elif total_count.requires_grad:
            raise ValueError("total_count is data, and must not require a gradient; got requires_grad=True")
        others = concentration0, total_count
        super().__init__("beta_binomial", concentration1, *others, event_dims=event_dims, validate_args=validate_args)

    @property
    def variance(self) -> Tensor:  # type: ignore[override]
        """n p (1 - p) (s + n) / (s + 1), s = a + b and p = a / s."""
        total = self.concentration1 + self.concentration0
        p, q = self.concentration1 / total, self.concentration0 / total
        return self.total_count * p * q * ((total + self.total_count) / (total + 1))

    @constraints.dependent_property
    def support(self) -> constraints.Constraint:
        """From 0 to n; `log_prob` also takes fractional counts."""
        support, event_dims = constraints.integer_interval(0, self.total_count), len(self.event_shape)
        return constraints.independent(support, event_dims) if event_dims else support

    def _domain(self) -> constraints.Constraint:
        return constraints.interval(0, self._recon[2])

    @property
    def has_enumerate_support(self) -> bool:  # type: ignore[override]
        """Whether `enumerate_support` works: without event dimensions."""
        return not self.event_shape

    def enumerate_support(self, expand: bool = True) -> Tensor:
        """0 to n, along a new first dimension [n + 1, *batch], where n is the same everywhere."""
        self._refuse_events("enumerate_support")
        n = int(self.total_count.max())
        if not (self.total_count == n).all():
            raise NotImplementedError("enumerate_support takes one total_count for all elements")
        x = torch.arange(n + 1, dtype=self.concentration1.dtype, device=self.concentration1.device)
        x = x.view(-1, *(1 for _ in self.batch_shape))
        return x.expand(-1, *self.batch_shape) if expand else x


# ----------------------------------------------------------------------------------------------------------------------
# The KL: that of Gaussians by the fused kernel, and every one that torch has.


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
        batch = broadcast("p", p.batch_shape, batch, f"the batch_shape {tuple(batch)} of q")
    rows = (math.prod(batch), *event)
    return losses.gaussian_kl(*(ordered.expand(t, batch + event).reshape(rows) for t in tensors)).reshape(batch)


def _elements(d: Distribution) -> Distribution:
    """torch's distribution of the elements of d."""
    if isinstance(d, Independent):
        return _elements(d.base_dist)
    return d.of_torch() if isinstance(d, Fused) else d


def _registered_kl(q: Distribution, p: Distribution) -> Tensor:
    try:
        return gaussian_kl(q, p)
    except TypeError:  # not both are Gaussian
        if len(q.event_shape) != len(p.event_shape):
            raise NotImplementedError from None
        return event_sum(kl_divergence(_elements(q), _elements(p)), len(q.event_shape))


# Each class with which torch has a KL of one of ours. Not Distribution: Pyro has KL(Delta, Distribution).
_OTHERS = (
    "Bernoulli Beta Binomial ContinuousBernoulli Exponential Gamma Gumbel Independent Laplace Normal Pareto Poisson"
    " Uniform"
)

register_kl(Fused, Fused)(_registered_kl)
for _other in (getattr(plain, name) for name in _OTHERS.split()):
    register_kl(Fused, _other)(_registered_kl)
    register_kl(_other, Fused)(_registered_kl)
