"""The likelihoods: for each, its parameters, the domain of x, log p in plain PyTorch, its mean, and how to draw x.

A row has a counterpart in C++, csrc/likelihoods/NAME.h, with the same name, parameters and domain.
"""

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

LOG_2 = math.log(2.0)
LOG_2PI = math.log(2.0 * math.pi)

Domain = Literal["reals", "[0, 1]", "counts"]


class Likelihood(NamedTuple):
    """p(x | parameters) of one element. The functions take tensors that broadcast to the first parameter.

    A parameter behind the first `fewest` may be left out; its default is that of `log_prob`.
    """

    parameters: tuple[str, ...]
    fewest: int  # the number of parameters that must be there
    domain: Domain  # of x; uint8 data are counts there, and mean x / 255 elsewhere
    log_prob: Callable[..., Tensor]  # (x, *parameters) -> log p of each element
    mean: Callable[..., Tensor]  # (*parameters) -> E[x]
    draw: Callable[..., Tensor]  # (generator or None, *parameters) -> x
    data: int = 0  # how many of the last parameters are data: without a gradient


# ----------------------------------------------------------------------------------------------------------------------
# Bernoulli.


def _bernoulli(x: Tensor, logits: Tensor) -> Tensor:
    """x l - softplus(l), l the logit."""
    return -F.binary_cross_entropy_with_logits(logits, x, reduction="none")


def _bernoulli_probs(x: Tensor, probs: Tensor) -> Tensor:
    """x log p + (1 - x) log(1 - p), each logarithm clamped at -100."""
    return -F.binary_cross_entropy(probs, x, reduction="none")


def _draw_bernoulli(generator: Generator | None, logits: Tensor) -> Tensor:
    return torch.bernoulli(torch.sigmoid(logits), generator=generator)


def _draw_bernoulli_probs(generator: Generator | None, probs: Tensor) -> Tensor:
    return torch.bernoulli(probs, generator=generator)


# ----------------------------------------------------------------------------------------------------------------------
# Gaussian and Laplace: unit scale without the second parameter.


def divided(difference: Tensor, log_scale: Tensor) -> Tensor:
    """difference exp(-log_scale). A difference of exactly 0 is 0 beside any finite scale, and so are its derivatives
    by the scale: exp(-log_scale) may overflow, and 0 times infinity is NaN."""
    lowest = 1 - math.log(torch.finfo(log_scale.dtype).max)
    return difference * torch.exp(-torch.where((difference == 0) & (log_scale < lowest), lowest, log_scale))


def _gaussian(x: Tensor, mean: Tensor, logvar: Tensor | None = None) -> Tensor:
    """-1/2 [(x - m)^2 exp(-lv) + lv + log 2 pi]; lv = 0 by default. The square is that of the scaled difference: it
    overflows where log p does."""
    if logvar is None:
        return -0.5 * ((x - mean).square() + LOG_2PI)
    return -0.5 * (divided(x - mean, 0.5 * logvar).square() + logvar + LOG_2PI)


def _draw_gaussian(generator: Generator | None, mean: Tensor, logvar: Tensor | None = None) -> Tensor:
    noise = torch.randn(mean.shape, dtype=mean.dtype, device=mean.device, generator=generator)
    return mean + (noise if logvar is None else torch.exp(0.5 * logvar) * noise)


def _laplace(x: Tensor, mean: Tensor, log_scale: Tensor | None = None) -> Tensor:
    """-[|x - m| exp(-s) + s + log 2]; s = 0 by default."""
    distance = (x - mean).abs()
    return -(distance + LOG_2 if log_scale is None else divided(distance, log_scale) + log_scale + LOG_2)


def _draw_laplace(generator: Generator | None, mean: Tensor, log_scale: Tensor | None = None) -> Tensor:
    first, second = (torch.empty_like(mean).exponential_(generator=generator) for _ in range(2))
    noise = first - second
    return mean + (noise if log_scale is None else torch.exp(log_scale) * noise)


# ----------------------------------------------------------------------------------------------------------------------
# Student's t.

# B_2k / (2k (2k - 1)), of Stirling's series of lgamma: the remainder at a = 10 is 2e-17
STIRLING = (1 / 12, -1 / 360, 1 / 1260, -1 / 1680, 1 / 1188, -691 / 360360, 1 / 156, -3617 / 122400)

# of log(1 + q) / q for q < 1/20: the remainder is 1e-19
LOG1P = [(-1) ** k / (k + 1) for k in range(14)]

# Beyond it on either side, log_df counts as this: the Gaussian is left above, and below log p hardly depends on x.
LOG_DF_LIMIT = 80.0


def _series(x: Tensor, coefficients: Sequence[float]) -> Tensor:
    """c0 + c1 x + c2 x^2 + ..."""
    total = torch.zeros_like(x)
    for coefficient in reversed(coefficients):
        total = coefficient + x * total
    return total


def _half_step(log_a: Tensor) -> Tensor:
    """lgamma(a + 1/2) - lgamma(a) - 1/2 log a, by the difference of Stirling's series where a > 10."""
    large = log_a > math.log(10)
    w = torch.exp(-torch.where(large, log_a, math.log(10)))
    coefficients = [(2.0 ** (1 - 2 * k) - 2) * c for k, c in enumerate(STIRLING, 1)]
    small = torch.where(large, 0.0, log_a)
    a = torch.exp(small)
    direct = torch.lgamma(a + 0.5) - torch.lgamma(a + 1) + 0.5 * small  # lgamma(a) = lgamma(a + 1) - log a
    return torch.where(large, w * _series(w.square(), coefficients), direct)


def _student_t(x: Tensor, mean: Tensor, log_scale: Tensor, log_df: Tensor) -> Tensor:
    """With nu = exp(log_df), s = log_scale, t = (x - mean) exp(-s) and q = t^2 / nu:
    lgamma((nu + 1) / 2) - lgamma(nu / 2) - 1/2 log(nu pi) - s - (nu + 1) / 2 log(1 + q).

    Where q is small, nu / 2 log(1 + q) is t^2 / 2 times a series in q: its derivative by log_df is no difference of
    large terms where nu is large. Where 1 is lost beside q, which may overflow, log(1 + q) is log q.
    """
    log_df = torch.where(log_df > LOG_DF_LIMIT, LOG_DF_LIMIT, log_df)  # NaN stays
    log_df = torch.where(log_df < -LOG_DF_LIMIT, -LOG_DF_LIMIT, log_df)
    difference = x - mean
    far = 2 * (difference.abs().log() - log_scale) - log_df > 1 - math.log(torch.finfo(x.dtype).eps)
    log_q = 2 * (torch.where(far, difference, 1.0).abs().log() - log_scale) - log_df
    bounded = torch.where(far, 0.0, difference)
    t, q = divided(bounded, log_scale), divided(bounded, log_scale + 0.5 * log_df).square()
    small = q < 0.05
    series = torch.where(small, t, 0.0).square() * _series(torch.where(small, q, 0.0), LOG1P)
    bend = 0.5 * (torch.where(small, series, torch.exp(log_df) * torch.log1p(q)) + torch.log1p(q))
    bend = torch.where(far, 0.5 * (torch.exp(log_df) + 1) * log_q, bend)
    return _half_step(log_df - LOG_2) - (0.5 * LOG_2PI + log_scale) - bend


def _draw_student_t(generator: Generator | None, mean: Tensor, log_scale: Tensor, log_df: Tensor) -> Tensor:
    """Gaussian whose variance is exp(2 s) over a Gamma of mean 1 and shape nu / 2."""
    gamma = _draw_gamma(generator, log_df - LOG_2, mean)
    return _draw_gaussian(generator, mean, 2 * log_scale - torch.log(gamma).to(mean.dtype))


# ----------------------------------------------------------------------------------------------------------------------
# Counts. x may be fractional; log p of a negative x is -inf, and that of NaN is NaN.

# Beyond it, log theta counts as this: log p differs there from that of the Poisson by about x^2 / 2e17.
LOG_THETA_LIMIT = 40.0


def _counts(log_p: Callable[..., Tensor], x: Tensor, *parameters: Tensor) -> Tensor:
    """log_p(x, *parameters); -inf where x is negative or infinite."""
    outside = (x < 0) | (x == torch.inf)
    return torch.where(outside, -torch.inf, log_p(torch.where(outside, 0.0, x), *parameters))


def _of_log_mean(log_p: Callable[..., Tensor], x: Tensor, log_mean: Tensor, *others: Tensor) -> Tensor:
    """The same, where x = 0 is certain at log_mean = -inf."""
    finite = torch.where((x == 0) & (log_mean == -torch.inf), -1e4, log_mean)  # exp is 0, and x log_mean too
    return _counts(log_p, x, finite, *others)


def _poisson(x: Tensor, log_rate: Tensor) -> Tensor:
    """x l - exp(l) - lgamma(x + 1), l the log rate."""
    return _of_log_mean(lambda x, log_rate: x * log_rate - torch.exp(log_rate) - torch.lgamma(x + 1), x, log_rate)


def stirling_tail(a: Tensor) -> Tensor:
    """S(a) = lgamma(a) - (a - 1/2) log a + a - 1/2 log 2 pi, by Stirling's series where a > 10."""
    large = a > 10
    w = 1 / torch.where(large, a, 10.0)
    small = torch.where(large, 1.0, a)
    direct = torch.lgamma(small) - (small - 0.5) * torch.log(small) + (small - 0.5 * LOG_2PI)
    return torch.where(large, w * _series(w.square(), STIRLING), direct)


def _log_rising(x: Tensor, a: Tensor) -> Tensor:
    """lgamma(a + x) - lgamma(a) - x log a, of the size of x^2 / a where a is large."""
    a = torch.where((x == 0) & (a < 1e-15), 1.0, a)  # 0 for every a, and 1 / a^2, of its second derivative, overflows
    return (x + (a - 0.5)) * torch.log1p(x / a) - x + (stirling_tail(x + a) - stirling_tail(a))


def _nb_terms(x: Tensor, log_mean: Tensor, log_theta: Tensor) -> Tensor:
    log_theta = torch.where(log_theta > LOG_THETA_LIMIT, LOG_THETA_LIMIT, log_theta)  # NaN reaches the gradient too
    theta = torch.exp(log_theta)
    log1p_ratio = -F.logsigmoid(log_theta - log_mean)  # log(1 + mean / theta)
    return _log_rising(x, theta) + (x * log_mean - (x + theta) * log1p_ratio - torch.lgamma(x + 1))


def _nb(x: Tensor, log_mean: Tensor, log_theta: Tensor) -> Tensor:
    """Negative binomial with mean m = exp(log_mean) and variance m + m^2 / theta, l = log_mean:
    (x + theta - 1/2) log(1 + x / theta) - x - (x + theta) log(1 + m / theta) + x l + S(x + theta) - S(theta)
    - lgamma(x + 1). No two lgammas are subtracted, which would lose all digits where theta is large.
    """
    return _of_log_mean(_nb_terms, x, log_mean, log_theta)


def _log_add_exp(a: Tensor, b: Tensor) -> Tensor:
    """log(exp(a) + exp(b)); torch.logaddexp has NaN second derivatives where exp(|a - b|) overflows."""
    high, low = torch.where(a > b, a, b), torch.where(a > b, b, a)
    return high - F.logsigmoid(torch.where(low == -torch.inf, 1e4, high - low))


def _zero_inflated(terms: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """`terms` of counts that are zero with probability sigmoid(zero_logits), the last argument, too."""

    def log_p(x: Tensor, *parameters: Tensor) -> Tensor:
        *given, zero_logits = parameters
        nb = terms(x, *given)
        return torch.where(x > 0, nb, _log_add_exp(zero_logits, nb)) + F.logsigmoid(-zero_logits)

    return log_p


def _zinb(x: Tensor, log_mean: Tensor, log_theta: Tensor, zero_logits: Tensor) -> Tensor:
    """Zero with probability sigmoid(pi), pi the zero logit, else negative binomial:
    log sigmoid(-pi) + nb where x > 0, and log(sigmoid(pi) + sigmoid(-pi) exp(nb)) where x = 0.
    """
    return _of_log_mean(_zero_inflated(_nb_terms), x, log_mean, log_theta, zero_logits)


# The largest theta of the negative binomials that take it as it is.
THETA_LIMIT = math.exp(LOG_THETA_LIMIT)


def _times_log(x: Tensor, t: Tensor) -> Tensor:
    """x log t. At x = 0 its derivatives by t are 0, where 1 / t^2 overflows too; that by x is log t."""
    fixed = t.detach().clamp(min=torch.finfo(t.dtype).tiny)
    return x * torch.log(torch.where((x == 0) & (t < 1e-15), fixed, t))


def _nb_mean_terms(x: Tensor, mean: Tensor, theta: Tensor) -> Tensor:
    """As `_nb_terms`, with log(1 + mean / theta) as a difference of logarithms where that is large."""
    invalid = (mean < 0) | (theta < 0)
    theta = torch.where(theta > THETA_LIMIT, THETA_LIMIT, theta)
    steep = mean > theta
    far = torch.log(torch.where(steep, mean + theta, 1.0)) - torch.log(torch.where(steep & (theta > 0), theta, 1.0))
    near = torch.log1p(torch.where(steep, 0.0, mean) / torch.where(steep | (theta == 0), 1.0, theta))
    log1p_ratio = torch.where(steep, far, near)
    value = _log_rising(x, theta) + (_times_log(x, mean) - (x + theta) * log1p_ratio - torch.lgamma(x + 1))
    value = torch.where((x > 0) & ((mean == 0) | (theta == 0)), -torch.inf, value)
    return torch.where(invalid, torch.nan, value)


def _nb_mean(x: Tensor, mean: Tensor, theta: Tensor, added: float = 0.0) -> Tensor:
    """`_nb` of the mean and theta themselves, `added` to both."""
    return _counts(_nb_mean_terms, x, mean + added, theta + added)


def _nb_logits(x: Tensor, total_count: Tensor, logits: Tensor) -> Tensor:
    """`_nb` of theta, the total count, and of the logit l of a success, with softplus(l) for log(1 + mean / theta)."""

    def log_p(x: Tensor, theta: Tensor, logits: Tensor) -> Tensor:
        theta = torch.where(theta > THETA_LIMIT, THETA_LIMIT, theta)
        x_log_mean = _times_log(x, theta) + x * logits
        return _log_rising(x, theta) + (x_log_mean + (x + theta) * F.logsigmoid(-logits) - torch.lgamma(x + 1))

    return _counts(log_p, x, torch.where(total_count < 0, torch.nan, total_count), logits)


def _gamma_poisson(x: Tensor, concentration: Tensor, rate: Tensor) -> Tensor:
    """`_nb` of theta, the concentration a, and the mean a / b, b the rate, with log(1 + 1 / b) for
    log(1 + mean / theta)."""

    def log_p(x: Tensor, theta: Tensor, rate: Tensor) -> Tensor:
        theta = torch.where(theta > THETA_LIMIT, THETA_LIMIT, theta)
        steep = rate < 1
        far = torch.log1p(torch.where(steep, rate, 1.0)) - torch.log(torch.where(steep, rate, 1.0))
        near = torch.log1p(1 / torch.where(steep, 1.0, rate))
        x_log_mean = _times_log(x, theta) - _times_log(x, rate)
        return _log_rising(x, theta) + (x_log_mean - (x + theta) * torch.where(steep, far, near) - torch.lgamma(x + 1))

    positive = (torch.where(t < 0, torch.nan, t) for t in (concentration, rate))
    return _counts(log_p, x, *positive)


def _zinb_mean(x: Tensor, mean: Tensor, theta: Tensor, zero_logits: Tensor, added: float = 0.0) -> Tensor:
    """`_zinb` of the mean and theta themselves, `added` to both."""
    return _counts(_zero_inflated(_nb_mean_terms), x, mean + added, theta + added, zero_logits)


def _nb_mixture(
    x: Tensor, mean1: Tensor, mean2: Tensor, theta: Tensor, mixture_logits: Tensor, added: float = 0.0
) -> Tensor:
    """log[sigmoid(l) NB(x; mean1, theta) + sigmoid(-l) NB(x; mean2, theta)], l the mixture logit."""

    def log_p(x: Tensor, mean1: Tensor, mean2: Tensor, theta: Tensor, mixture_logits: Tensor) -> Tensor:
        first, second = _nb_mean_terms(x, mean1, theta), _nb_mean_terms(x, mean2, theta)
        return _log_add_exp(mixture_logits + first, second) + F.logsigmoid(-mixture_logits)

    return _counts(log_p, x, mean1 + added, mean2 + added, theta + added, mixture_logits)


# ----------------------------------------------------------------------------------------------------------------------
# Counts of a known number of trials.


def _times_log1p(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """x log(1 + a / b). At x = 0 its derivatives by a and b are 0, where 1 / b^2 overflows too."""
    fixed = (x == 0) & (b < 1e-15)
    return x * torch.log1p(torch.where(fixed, a.detach(), a) / torch.where(fixed, b.detach(), b))


def _beta_binomial(x: Tensor, concentration1: Tensor, concentration0: Tensor, total: Tensor) -> Tensor:
    """log C(n, x) + log B(x + a, n - x + b) - log B(a, b), n the total. lgammas are subtracted as
    in `_nb_terms`; what is left are logarithms of a / s and b / s, s = a + b.
    """

    def log_p(x: Tensor, a: Tensor, b: Tensor, total: Tensor) -> Tensor:
        impossible = x > total
        x = torch.where(impossible, 0.0, x)
        n, s = torch.where(impossible, 0.0, total), a + b
        rest = n - x
        odds = -(_times_log1p(x, b, a) + _times_log1p(rest, a, b))  # x log(a / s) + (n - x) log(b / s)
        rising = _log_rising(x, a) + _log_rising(rest, b) - _log_rising(n, s)
        value = rising + odds + (torch.lgamma(n + 1) - torch.lgamma(x + 1) - torch.lgamma(rest + 1))
        return torch.where(impossible, -torch.inf, value)

    positive = (torch.where(t > 0, t, torch.nan) for t in (concentration1, concentration0))
    return _counts(log_p, x, *positive, total.to(x.dtype))


# ----------------------------------------------------------------------------------------------------------------------
# Means, and draws.


def _exp(log_mean: Tensor, log_theta: Tensor | None = None) -> Tensor:
    return torch.exp(log_mean)


def _mean_of_zinb(log_mean: Tensor, log_theta: Tensor, zero_logits: Tensor) -> Tensor:
    return torch.sigmoid(-zero_logits) * torch.exp(log_mean)


def _mean_of_zinb_mean(mean: Tensor, theta: Tensor, zero_logits: Tensor) -> Tensor:
    return torch.sigmoid(-zero_logits) * mean


def _draw_poisson(generator: Generator | None, log_rate: Tensor) -> Tensor:
    return torch.poisson(torch.exp(log_rate), generator=generator)


def _draw_gamma(generator: Generator | None, log_shape: Tensor, like: Tensor) -> Tensor:
    """Gamma of mean 1 and shape exp(log_shape), in the shape of `like`; in float32 for half types, of which torch
    draws none."""
    wide = torch.promote_types(like.dtype, torch.float32)
    shape = torch.exp(log_shape.to(wide).clamp(max=LOG_THETA_LIMIT)).expand(like.shape)
    return torch._standard_gamma(shape, generator=generator) / shape


def _draw_nb(generator: Generator | None, log_mean: Tensor, log_theta: Tensor) -> Tensor:
    """Poisson whose rate is Gamma of mean exp(log_mean) and shape theta."""
    gamma = _draw_gamma(generator, log_theta, log_mean)
    return torch.poisson(gamma * torch.exp(log_mean.to(gamma.dtype)), generator=generator).to(log_mean.dtype)


def _draw_nb_mean(generator: Generator | None, mean: Tensor, theta: Tensor) -> Tensor:
    gamma = _draw_gamma(generator, torch.log(theta.to(torch.promote_types(theta.dtype, torch.float32))), mean)
    return torch.poisson(gamma * mean, generator=generator).to(mean.dtype)


def _mean_of_nb_logits(total_count: Tensor, logits: Tensor) -> Tensor:
    return total_count * torch.exp(logits)


def _draw_nb_logits(generator: Generator | None, total_count: Tensor, logits: Tensor) -> Tensor:
    return _draw_nb_mean(generator, _mean_of_nb_logits(total_count, logits), total_count)


def _mean_of_gamma_poisson(concentration: Tensor, rate: Tensor) -> Tensor:
    return concentration / rate


def _draw_gamma_poisson(generator: Generator | None, concentration: Tensor, rate: Tensor) -> Tensor:
    return _draw_nb_mean(generator, concentration / rate, concentration)


def _draw_zero(generator: Generator | None, zero_logits: Tensor, counts: Tensor) -> Tensor:
    zeros = torch.bernoulli(torch.sigmoid(zero_logits).expand(counts.shape), generator=generator)
    return torch.where(zeros == 1, 0.0, counts)


def _draw_zinb(generator: Generator | None, log_mean: Tensor, log_theta: Tensor, zero_logits: Tensor) -> Tensor:
    return _draw_zero(generator, zero_logits, _draw_nb(generator, log_mean, log_theta))


def _draw_zinb_mean(generator: Generator | None, mean: Tensor, theta: Tensor, zero_logits: Tensor) -> Tensor:
    return _draw_zero(generator, zero_logits, _draw_nb_mean(generator, mean, theta))


def _mean_of_nb_mixture(mean1: Tensor, mean2: Tensor, theta: Tensor, mixture_logits: Tensor) -> Tensor:
    return mean2 + torch.sigmoid(mixture_logits) * (mean1 - mean2)


def _draw_nb_mixture(
    generator: Generator | None, mean1: Tensor, mean2: Tensor, theta: Tensor, mixture_logits: Tensor
) -> Tensor:
    first = torch.bernoulli(torch.sigmoid(mixture_logits).expand(mean1.shape), generator=generator)
    return _draw_nb_mean(generator, torch.where(first == 1, mean1, mean2), theta)


def _mean_of_beta_binomial(concentration1: Tensor, concentration0: Tensor, total: Tensor) -> Tensor:
    return concentration1 / (concentration1 + concentration0) * total


def _draw_beta_binomial(
    generator: Generator | None, concentration1: Tensor, concentration0: Tensor, total: Tensor
) -> Tensor:
    wide = torch.promote_types(concentration1.dtype, torch.float32)
    first, second = (
        torch._standard_gamma(t.to(wide).expand(concentration1.shape), generator=generator)
        for t in (concentration1, concentration0)
    )
    count = total.to(wide).expand(concentration1.shape)
    return torch.binomial(count, first / (first + second), generator=generator).to(concentration1.dtype)


def _first(mean: Tensor, *others: Tensor) -> Tensor:
    return mean


LIKELIHOODS = {
    "bernoulli": Likelihood(("logits",), 1, "[0, 1]", _bernoulli, torch.sigmoid, _draw_bernoulli),
    "bernoulli_probs": Likelihood(("probs",), 1, "[0, 1]", _bernoulli_probs, _first, _draw_bernoulli_probs),
    "gaussian": Likelihood(("mean", "logvar"), 1, "reals", _gaussian, _first, _draw_gaussian),
    "laplace": Likelihood(("mean", "log_scale"), 1, "reals", _laplace, _first, _draw_laplace),
    "student_t": Likelihood(("mean", "log_scale", "log_df"), 3, "reals", _student_t, _first, _draw_student_t),
    "poisson": Likelihood(("log_rate",), 1, "counts", _poisson, _exp, _draw_poisson),
    "nb": Likelihood(("log_mean", "log_theta"), 2, "counts", _nb, _exp, _draw_nb),
    "zinb": Likelihood(("log_mean", "log_theta", "zero_logits"), 3, "counts", _zinb, _mean_of_zinb, _draw_zinb),
    "nb_mean": Likelihood(("mean", "theta"), 2, "counts", _nb_mean, _first, _draw_nb_mean),
    "nb_logits": Likelihood(("total_count", "logits"), 2, "counts", _nb_logits, _mean_of_nb_logits, _draw_nb_logits),
    "gamma_poisson": Likelihood(
        ("concentration", "rate"), 2, "counts", _gamma_poisson, _mean_of_gamma_poisson, _draw_gamma_poisson
    ),
    "zinb_mean": Likelihood(
        ("mean", "theta", "zero_logits"), 3, "counts", _zinb_mean, _mean_of_zinb_mean, _draw_zinb_mean
    ),
    "nb_mixture": Likelihood(
        ("mean1", "mean2", "theta", "mixture_logits"), 4, "counts", _nb_mixture, _mean_of_nb_mixture, _draw_nb_mixture
    ),
    "beta_binomial": Likelihood(
        ("concentration1", "concentration0", "total"),
        3,
        "counts",
        _beta_binomial,
        _mean_of_beta_binomial,
        _draw_beta_binomial,
        data=1,
    ),
}

# scvi-tools adds it to means and to theta: names of likelihoods that do so too
SCVI_ADDED = 1e-8
SHIFTED = {
    f"scvi_{name}": LIKELIHOODS[of]._replace(log_prob=partial(LIKELIHOODS[of].log_prob, added=SCVI_ADDED))
    for name, of in (("nb", "nb_mean"), ("zinb", "zinb_mean"), ("nb_mixture", "nb_mixture"))
}


# of data of a domain, where nobody names one
DEFAULTS: dict[Domain, str] = {"[0, 1]": "bernoulli", "reals": "gaussian", "counts": "nb"}


ROUNDING = 1e-4  # by so much data may leave [0, 1]: resized pictures do


def objection(name: str, low: float, high: float, likelihood: str) -> str | None:
    """What is wrong with data from low to high under a likelihood; None where nothing is, or where they are NaN."""
    domain = get(likelihood).domain
    if domain == "[0, 1]" and (low < -ROUNDING or high > 1 + ROUNDING):
        return (
            f"{name} must lie in [0, 1] for likelihood {likelihood!r}; it goes from {low:.4g} to {high:.4g} "
            "(scale it, store it as uint8, or take likelihood 'gaussian')"
        )
    if math.isinf(low) or math.isinf(high):
        return f"{name} must be finite; it goes from {low:.4g} to {high:.4g}"
    if domain == "counts" and low < 0:
        return (
            f"{name} must be counts, at least 0, for likelihood {likelihood!r}; the lowest is {low:.4g} "
            "(take likelihood 'gaussian')"
        )
    return None


def get(name: str) -> Likelihood:
    """The row of a likelihood.

    Raises:
        ValueError: an unknown name; the message lists the valid ones.
    """
    found = LIKELIHOODS.get(name) or SHIFTED.get(name)
    if found is None:
        raise ValueError(f"likelihood must be one of {', '.join((*LIKELIHOODS, *SHIFTED))}; got {name!r}")
    return found
