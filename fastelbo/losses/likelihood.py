"""log p(x | recon) of every likelihood, its mean, and draws from it."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from fastelbo import likelihoods, reference
from fastelbo._internal import arguments, domains
from fastelbo._internal.arguments import ORDINALS, checked
from fastelbo._internal.ops import call
from fastelbo.losses.inputs import expand, mask_like, parameters, split_recon

_op = torch.ops.fastelbo

ROW = 64  # elements from which on a row is worth work of its own


@checked
def log_prob(
    recon: arguments.Recon,
    x: arguments.Data,
    *,
    likelihood: arguments.Likelihood = "bernoulli",
    mask: arguments.Mask | None = None,
    reduce: arguments.Flag = True,
) -> Tensor:
    """log p(x | recon) under any likelihood, summed over the event dimensions, or of every element.

    What recon holds, and log p of one element, by the likelihood:

    - "bernoulli": logits l. x l - softplus(l)
    - "bernoulli_probs": probabilities p in [0, 1]. x log p + (1 - x) log(1 - p), logarithms clamped at -100 as in
      torch's BCE
    - "gaussian": mean (unit variance) or (mean, logvar). -1/2 [(x - m)^2 exp(-lv) + lv + log 2 pi]
    - "laplace": mean (unit scale) or (mean, log_scale). -[|x - m| exp(-s) + s + log 2]
    - "student_t", of nu = exp(log_df) degrees of freedom, the Gaussian in the limit: (mean, log_scale, log_df).
      lgamma((nu + 1) / 2) - lgamma(nu / 2) - 1/2 log(nu pi) - s - (nu + 1) / 2 log(1 + [(x - m) exp(-s)]^2 / nu),
      computed without a difference of two lgammas; log_df counts as at least -80 and at most 80
    - "poisson": log_rate l. x l - exp(l) - lgamma(x + 1)
    - "nb", negative binomial of mean m = exp(log_mean) and variance m + m^2 / theta: (log_mean, log_theta).
      lgamma(x + theta) - lgamma(theta) - lgamma(x + 1) + theta log(theta / (theta + m)) + x log(m / (theta + m)),
      computed without a difference of two lgammas; log_theta counts as at most 40, where this is the Poisson
    - "zinb", zero with probability sigmoid(pi), else the former: (log_mean, log_theta, zero_logits pi).
      log sigmoid(-pi) + nb(x) where x > 0, and log[sigmoid(pi) + sigmoid(-pi) exp(nb(0))] where x = 0
    - "nb_mean": (mean, theta), and "zinb_mean": (mean, theta, zero_logits): the same of the numbers themselves, at
      least 0, and with gradients by them; docs/counts.md says which to take
    - "nb_logits": (total_count, logits), that of theta = total_count and of mean theta exp(logits), as torch's
    - "gamma_poisson": (concentration, rate), that of theta = concentration and of mean concentration / rate, as Pyro's
    - "nb_mixture": (mean1, mean2, theta, mixture_logits l). log[sigmoid(l) nb(x; mean1) + sigmoid(-l) nb(x; mean2)]
    - "beta_binomial", x successes of n trials: (concentration1 a, concentration0 b, total n).
      log C(n, x) + log B(x + a, n - x + b) - log B(a, b), without a difference of two lgammas; -inf where x > n. n is
      data, of whole numbers: an integer type or recon's, without a gradient
    - "scvi_nb", "scvi_zinb", "scvi_nb_mixture": as "nb_mean", "zinb_mean" and "nb_mixture", of every mean + 1e-8 and
      of theta + 1e-8, which scvi-tools adds within its logarithms: a mean of 0 does not end a training

    Counts x may be fractional. Of what is no count, negative or infinite, log p is -inf; of NaN it is NaN.
    Outside of [0, 1] a Bernoulli has no log p. The first 64 calls of a shape, and then every 64th, look at the values
    and refuse them, on the CPU and where nothing is compiled; so do the losses.

    Args:
        recon: [B, *event] or [K, B, *event], or a tuple of two to four tensors of which that is the first, by the
            parameters of the likelihood above. Each further tensor has the shape of the first, [*event] or is 0-d; its
            gradient is summed in that shape.
        x: [B, *event]. recon's dtype (or float32 beside half types), or uint8 (read as x / 255), or bool. Counts:
            recon's dtype (or float32), or uint8, int16, int32 or int64, read as they are.
        mask: broadcasts to x. 0 and 1, or weights of the elements' terms; an element of weight 0 is not read.
        reduce: False for log p of every element. x may then have any shape, also none, and every tensor of recon, the
            first too, any that broadcasts to that of x, or to [K, *x.shape]: parameters of rows and of columns are
            [B, 1] and [1, D].

    Returns:
        [B] or [K, B], or with reduce=False [B, *event] or [K, B, *event], in nats; float32, or float64 for float64
        inputs.

    Raises:
        ValueError, TypeError: an unknown likelihood, shapes or dtypes that do not fit.
        ValueError: x, or probabilities, outside of [0, 1] for a Bernoulli, where values are looked at.

    Reference: Kingma & Welling 2014, app. C; counts: Lopez et al. 2018 (scVI), methods.
    """
    mask = mask_like(mask, x)
    if not reduce:
        return _elements(split_recon(recon), x, likelihood, mask)
    given = parameters(recon, x)
    found: Tensor = call(_op.log_prob.default, reference.log_prob, given, x, mask, likelihood)
    domains.check_some(given[0], x, likelihood, mask)
    return found


def _elements(recon: Sequence[Tensor], x: Tensor, likelihood: str, mask: Tensor | None) -> Tensor:
    """log p of every element of x [*shape] -> [K?, *shape].

    Of rows of many elements, parameters of a row are read, and their gradients summed, as those that rows share; of
    others, all of x is one row.
    """
    sampled = [t.shape[0] for t in recon if t.dim() > x.dim()]
    samples = sampled[:1]
    whole, one_row = torch.Size((*samples, *x.shape)), x.dim() < 2 or math.prod(x.shape[1:]) < ROW
    if one_row:
        x, mask = x[None], None if mask is None else mask[None]
    event = x.shape[1:]

    def placed(t: Tensor, name: str) -> Tensor:
        own = t
        while own.dim() > len(event) and own.shape[0] == 1 and own.shape != whole:
            own = own[0]
        # beside one row of data there is nothing to share without samples
        if name != ORDINALS[0] and (t.dim() == 0 or (own.shape == event and (samples or not one_row))):
            return own
        full = expand(f"the {name} tensor of recon", t, whole, "x")
        return full.unsqueeze(len(samples)) if one_row else full

    given = [placed(t, name) for t, name in zip(recon, ORDINALS, strict=False)]
    found: Tensor = call(_op.log_prob_elements.default, reference.log_prob_elements, given, x, mask, likelihood)
    domains.check_some(given[0], x, likelihood, mask)
    return found.reshape(whole)


def _of_row(recon: arguments.Recon, likelihood: str) -> tuple[likelihoods.Likelihood, tuple[Tensor, ...]]:
    """The row of a likelihood, and its parameters."""
    row, parameters = likelihoods.get(likelihood), split_recon(recon)
    names, count = ", ".join(row.parameters), len(parameters)
    if not row.fewest <= count <= len(row.parameters):
        raise ValueError(f"recon must hold the parameters ({names}) of likelihood {likelihood!r}; got {count} tensors")
    return row, parameters


@checked
def likelihood_mean(recon: arguments.Recon, likelihood: arguments.Likelihood = "bernoulli") -> Tensor:
    """E[x | recon], the mean of the likelihood: for example sigmoid(logits), or exp(log_rate).

    Args:
        recon: [..., *event], or a tuple of two to four tensors, as in `log_prob`.
        likelihood: as in `log_prob`.

    Returns:
        [..., *event], in recon's dtype.

    Raises:
        ValueError, TypeError: an unknown likelihood, another number of parameters, or a recon that is neither a tensor
            nor a tuple of them.
    """
    row, parameters = _of_row(recon, likelihood)
    return row.mean(*parameters)


@checked
def likelihood_sample(
    recon: arguments.Recon,
    likelihood: arguments.Likelihood = "bernoulli",
    *,
    generator: arguments.Generator | None = None,
) -> Tensor:
    """A draw x ~ p(x | recon), not differentiable; arguments and errors as in `likelihood_mean`.

    Args:
        generator: the source of the noise; torch's default one if None.

    Returns:
        [..., *event], in recon's dtype.
    """
    row, parameters = _of_row(recon, likelihood)
    with torch.no_grad():
        return row.draw(generator, *parameters)


@checked
def bernoulli_log_prob(logits: arguments.Floats, x: arguments.Data, *, mask: arguments.Mask | None = None) -> Tensor:
    """Bernoulli log-likelihood from logits: sum_d [x l - softplus(l)], exact for any size of l.

    Args:
        logits: [B, *event] or [K, B, *event].
        x: [B, *event], anywhere in [0, 1]; recon's dtype, uint8 (read as x / 255) or bool.
        mask: broadcasts to x; see `log_prob`.

    Returns:
        [B] or [K, B], in nats.

    Raises:
        ValueError, TypeError: shapes or dtypes that do not fit.

    Reference: Kingma & Welling 2014, app. C.1.
    """
    return log_prob(logits, x, likelihood="bernoulli", mask=mask)


@checked
def gaussian_log_prob(
    mean: arguments.Floats,
    x: arguments.Data,
    logvar: arguments.NumberOrFloats = 0.0,
    *,
    mask: arguments.Mask | None = None,
) -> Tensor:
    """Gaussian log-likelihood: -1/2 sum_d [(x - m)^2 exp(-lv) + lv + log 2 pi]; log 2 pi is always kept.

    Args:
        mean: [B, *event] or [K, B, *event].
        x: [B, *event].
        logvar: a float, a 0-d tensor, [*event], or the shape of mean.
        mask: broadcasts to x; see `log_prob`.

    Returns:
        [B] or [K, B], in nats.

    Raises:
        ValueError, TypeError: shapes or dtypes that do not fit.

    Reference: Kingma & Welling 2014, app. C.2.
    """
    if not isinstance(logvar, Tensor):
        if logvar == 0.0:
            return log_prob(mean, x, likelihood="gaussian", mask=mask)
        logvar = torch.ones((), dtype=reference.compute_dtype(mean), device=mean.device) * logvar
    elif logvar.dim() != 0 and logvar.shape != x.shape[1:]:
        logvar = expand("logvar", logvar, mean.shape, "mean")
    return log_prob((mean, logvar), x, likelihood="gaussian", mask=mask)
