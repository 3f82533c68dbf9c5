"""The public functions. Each checks the types of its arguments, brings them into the shapes that an op takes, and calls
the op, which checks the rest.

Sizes: B batch, K samples, M latent dimensions, D data dimensions (all event dimensions together). Values are in nats.
Half and bfloat16 inputs: arithmetic, sums and returned losses are float32, gradients have the input's type.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, Generic, Literal, NamedTuple, TypedDict, TypeVar, Unpack, cast, overload

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from fastelbo import estimators, likelihoods, reference
from fastelbo._internal import domains, ordered
from fastelbo._internal.arguments import ORDINALS, checked
from fastelbo._internal.ops import call, takes_twins
from fastelbo._internal.ordered import ordered_sum, reduce

Recon = Tensor | tuple[Tensor, Tensor] | tuple[Tensor, Tensor, Tensor]
_Result = TypeVar("_Result")  # of a loss module: Tensor or LossParts, by return_parts

_op = torch.ops.fastelbo


class Posterior(NamedTuple):
    """Samples of q(z | x) with what the losses need of them."""

    z: Tensor  # [K?, B, *latent]
    kl: Tensor  # [B], or [K, B] with batch_dims=2: KL(q || prior)
    log_ratio: Tensor  # [K?, B]: log p(z) - log q(z | x)
    mu: Tensor  # [B, *latent], or [K, B, *latent] with batch_dims=2: as given
    logvar: Tensor  # likewise
    prior_mu: Tensor | None  # as given
    prior_logvar: Tensor | None  # as given
    # [2, K, B] zeros, for `multi_sample_loss`. The "gradient" that an estimator sends back for them are the factors by
    # which its path and score gradients differ from those in the total gradient (csrc/math/estimator.h).
    gates: Tensor | None = None


class LossParts(NamedTuple):
    """A loss and what it is made of. All three are differentiable."""

    loss: Tensor  # scalar, or [B] with reduction="none"
    log_likelihood: Tensor  # [B], or [K, B]
    kl: Tensor  # [B]


class Prior(TypedDict, total=False):
    """A prior as the functions take it; without entries, N(0, I)."""

    prior_mu: Tensor
    prior_logvar: Tensor


class LossOptions(TypedDict, total=False):
    """Options of every loss."""

    likelihood: str
    mask: Tensor | None
    reduction: str


class ElboOptions(LossOptions, total=False):
    """Options of `elbo_loss`."""

    prior_mu: Tensor | None
    prior_logvar: Tensor | None
    beta: float | Tensor
    free_bits: float
    kl_mask: Tensor | None


class MultiSampleOptions(LossOptions, total=False):
    """Options of `multi_sample_loss`."""

    estimator: str
    alpha: float
    beta: float
    groups: int


def _varies(number: float) -> bool:
    """Whether `number` is an input of the graph that is being compiled: an op takes its numbers as constants of it."""
    return torch.compiler.is_dynamo_compiling() and not torch.fx.experimental.symbolic_shapes.has_static_value(number)


def bound_varies(row: estimators.Estimator) -> bool:
    """Whether a number of the bound is an input of the graph; then plain PyTorch computes the bound."""
    return row.is_gradient and (_varies(row.elbo_weight) or _varies(row.alpha))


def _as_tensor(number: float, like: Tensor) -> Tensor:
    """The number as a 0-d tensor, in the type in which `like` is computed."""
    dtype, device = reference.compute_dtype(like), like.device
    if _varies(number):  # torch's compiler reads such a number as a tensor in a product, as a constant in `full`
        return torch.ones((), dtype=dtype, device=device) * number
    return torch.full((), number, dtype=dtype, device=device)


def expand(name: str, t: Tensor, shape: torch.Size, like: str) -> Tensor:
    if t.dim() == len(shape) and t.shape == shape:  # sizes are compared only if they pair up: each becomes a guard
        return t
    if t.requires_grad:  # the terms of a half type's gradient are rounded once, as their sum
        t = t.to(torch.promote_types(t.dtype, torch.float32))
    try:
        return ordered.expand(t, shape)
    except RuntimeError:
        raise ValueError(f"{name} must broadcast to the shape {tuple(shape)} of {like}; got {tuple(t.shape)}") from None


def split_recon(recon: Recon) -> tuple[Tensor, ...]:
    """The parameters of the likelihood: recon is one tensor, or a tuple of tensors such as (mean, logvar)."""
    if isinstance(recon, Tensor):
        return (recon,)
    return tuple(recon)


def join_recon(first: Tensor, *others: Tensor) -> Recon:
    """The inverse of `split_recon`."""
    return cast(Recon, (first, *others)) if others else first


def _parameters(recon: Recon, x: Tensor) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """The parameters, each in a shape that the ops take: that of the first, that of one datum, or 0-d."""
    if isinstance(recon, Tensor):
        return recon, None, None
    first, *others = split_recon(recon)
    event = x.shape[1:]
    names = (f"the {ordinal} tensor of recon" for ordinal in ORDINALS[1:])
    shaped: list[Tensor | None] = [
        t if t.dim() == 0 or t.shape == event else expand(name, t, first.shape, "the first")
        for name, t in zip(names, others, strict=False)
    ]
    shaped += [None] * (2 - len(shaped))
    return first, shaped[0], shaped[1]


def weighted(weight: float | Tensor, kl: Tensor) -> Tensor:
    """weight kl; a weight of 0 leaves nothing of an infinite KL, nor a gradient (0 times infinity is NaN)."""
    return weight * torch.where(kl.isinf() & (weight == 0), 0.0, kl)


def _mask(mask: Tensor | None, x: Tensor) -> Tensor | None:
    return None if mask is None else expand("mask", mask, x.shape, "x")


def _save(ctx: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE


def drawn_once(draw: Callable[[], Tensor]) -> Tensor:
    """draw(), which torch's partitioner, while compiling, must not compute again in the backward: it would be another
    draw there."""
    if not torch.compiler.is_dynamo_compiling():
        return draw()
    save = partial(create_selective_checkpoint_contexts, _save)
    drawn: Tensor = checkpoint(draw, use_reentrant=False, context_fn=save)
    return drawn


def seed_tensor(seed: int | Tensor | None, generator: torch.Generator | None, device: torch.device) -> Tensor:
    """int64 [1] on the device: the seed as a tensor, or one drawn from the generator (torch's default one if None)."""
    if seed is None:
        options: dict[str, Any] = {"dtype": torch.int64, "device": device, "generator": generator}
        return drawn_once(lambda: torch.randint(-(2**63), 2**63 - 1, (1,), **options))
    if generator is not None:
        raise ValueError("seed and generator exclude each other: give one of them")
    return seed if isinstance(seed, Tensor) else torch.full((1,), seed, dtype=torch.int64, device=device)


@checked
def rsample(
    mu: Tensor,
    logvar: Tensor,
    num_samples: int | None = None,
    *,
    prior_mu: Tensor | None = None,
    prior_logvar: Tensor | None = None,
    seed: int | Tensor | None = None,
    generator: torch.Generator | None = None,
    eps: Tensor | None = None,
    first_sample: int = 0,
    batch_dims: int = 1,
) -> Posterior:
    """Reparameterized samples of a diagonal Gaussian, with their KL and log ratio, in one pass.

    z = mu + exp(logvar / 2) eps, eps ~ N(0, I). The noise is a function of (seed, linear index in [K, B, M]) and is
    regenerated in the backward: only the 8 bytes of the seed are kept. The noise has float32 resolution in every dtype.

    Args:
        mu, logvar: [B, *latent], a floating dtype. Mean and log variance of q(z | x).
        num_samples: K. None draws one sample without the K dimension.
        prior_mu, prior_logvar: broadcast to mu; N(0, I) without them.
        seed: an int, or an int64 tensor with one element on mu's device. None: the seed is drawn from `generator`, so
            that `torch.manual_seed` reproduces the samples. A graph compiled with an activation_memory_budget of 0
            draws it again in the backward: give the seed there, as a tensor.
        generator: the source of the seed; torch's default one if None.
        eps: [K?, B, *latent]. The noise, in place of a seed; the result is then that of plain PyTorch on this noise.
        first_sample: index of the first of these K samples in a longer run that is drawn in chunks.
        batch_dims: 2 for mu and logvar of [K, B, *latent], which differ per sample: the lower layer of a hierarchical
            model, or a prior that depends on the sample of the layer above. Each is drawn from once; num_samples and
            first_sample do not apply, and kl is [K, B].

    Returns:
        Posterior(z [K?, B, *latent] in mu's dtype, kl [B], log_ratio [K?, B], mu, logvar, prior_mu, prior_logvar,
        gates): the first three are differentiable. gates [2, K, B] is 0 and is for `multi_sample_loss` alone: through
        it come the factors by which an estimator's path and score gradients differ from the total gradient.

    Raises:
        ValueError, TypeError: shapes or dtypes that do not fit, named with what was expected and what came.

    Reference: Kingma & Welling 2014, sec. 2.4 and app. B; noise: Salmon et al. 2011 (Philox 4x32-10).
    """
    p_mu = None if prior_mu is None else expand("prior_mu", prior_mu, mu.shape, "mu")
    p_logvar = None if prior_logvar is None else expand("prior_logvar", prior_logvar, mu.shape, "mu")
    if batch_dims == 2:
        return _rsample_each(mu, logvar, p_mu, p_logvar, num_samples, seed, generator, eps, first_sample)._replace(
            mu=mu, logvar=logvar, prior_mu=prior_mu, prior_logvar=prior_logvar
        )
    if eps is None and seed is None and reference.exports_to_onnx():  # no seed can be drawn there, but noise can
        eps = torch.randn_like(mu.expand(mu.shape if num_samples is None else (num_samples, *mu.shape)))
    if eps is None:
        key = seed_tensor(seed, generator, mu.device)
    elif seed is not None or generator is not None:
        raise ValueError("eps and seed (or generator) exclude each other: give one of them")
    else:
        key = None
    if first_sample and first_sample > (limit := 2**63 // max(1, mu.numel()) - (num_samples or 1)):
        raise ValueError(f"first_sample must be at most {limit}: noise has 2^63 elements; got {first_sample}")
    z, kl, log_ratio, gates = call(
        _op.rsample.default, reference.rsample, mu, logvar, num_samples, p_mu, p_logvar, key, eps, first_sample
    )
    return Posterior(z, kl, log_ratio, mu, logvar, prior_mu, prior_logvar, None if num_samples is None else gates)


def _rsample_each(
    mu: Tensor,
    logvar: Tensor,
    prior_mu: Tensor | None,
    prior_logvar: Tensor | None,
    num_samples: int | None,
    seed: int | Tensor | None,
    generator: torch.Generator | None,
    eps: Tensor | None,
    first_sample: int,
) -> Posterior:
    """`rsample` of one draw for each of mu [K, B, *latent]: K and B are folded, and the draw's K is 1."""
    if num_samples is not None:
        raise ValueError(f"num_samples must be None with batch_dims=2: mu holds the K samples; got {num_samples}")
    if first_sample:
        raise ValueError(f"first_sample must be 0 with batch_dims=2; got {first_sample}")
    if mu.dim() < 3 or logvar.shape != mu.shape:
        raise ValueError(
            "mu and logvar must both be [K, B, *latent] with batch_dims=2; "
            f"got {tuple(mu.shape)} and {tuple(logvar.shape)}"
        )
    if eps is not None and eps.shape != mu.shape:
        raise ValueError(f"eps must have the shape {tuple(mu.shape)} of mu; got {tuple(eps.shape)}")
    flat = [None if t is None else t.flatten(0, 1) for t in (mu, logvar, prior_mu, prior_logvar, eps)]
    assert flat[0] is not None and flat[1] is not None
    noise = None if flat[4] is None else flat[4].unsqueeze(0)
    drawn = rsample(
        flat[0],
        flat[1],
        1,
        prior_mu=flat[2],
        prior_logvar=flat[3],
        seed=seed,
        generator=generator,
        eps=noise,
    )
    lead = mu.shape[:2]
    gates = None if drawn.gates is None else drawn.gates.view(2, *lead)
    return drawn._replace(
        z=drawn.z.view(mu.shape), kl=drawn.kl.view(lead), log_ratio=drawn.log_ratio.view(lead), gates=gates
    )


def _unmasked(t: Tensor | None, mask: Tensor) -> Tensor | None:
    return None if t is None else torch.where(mask, t, 0)


@checked
def gaussian_kl(
    mu: Tensor,
    logvar: Tensor,
    prior_mu: Tensor | None = None,
    prior_logvar: Tensor | None = None,
    *,
    free_bits: float = 0.0,
    mask: Tensor | None = None,
    reduce: bool = True,
) -> Tensor:
    """KL divergence of a diagonal Gaussian from a diagonal Gaussian prior.

    1/2 sum_j [exp(t) - 1 - t + (mu - mu_p)^2 exp(-lv_p)], t = lv - lv_p; free of cancellation and never negative.

    Args:
        mu, logvar: [B, *latent], a floating dtype.
        prior_mu, prior_logvar: broadcast to mu; N(0, I) without them.
        free_bits: floor lambda in nats for the batch mean of every dimension's KL; per datum, a dimension below it
            counts lambda, so that the mean over B is sum_j max(lambda, mean_b KL_bj). Not with a mask or reduce=False.
        mask: bool, broadcasts to mu. Where it is False nothing is read, and the KL is 0: padding in sequences.
        reduce: False for the KL of every dimension, for a capacity or weights of your own.

    Returns:
        [B], or [B, *latent] with reduce=False, in nats; float32, or float64 for float64 inputs.

    Raises:
        ValueError, TypeError: shapes or dtypes that do not fit, free_bits with a mask or with reduce=False.

    Reference: Kingma & Welling 2014, app. B; free bits: Kingma et al. 2016, eq. 15.
    """
    p_mu = None if prior_mu is None else expand("prior_mu", prior_mu, mu.shape, "mu")
    p_logvar = None if prior_logvar is None else expand("prior_logvar", prior_logvar, mu.shape, "mu")
    if (mask is not None or not reduce) and free_bits > 0:
        raise ValueError(f"free_bits must be 0 with a mask or with reduce=False; got {free_bits}")
    if mask is not None:  # two standard normals have a KL of 0, whose gradient is 0
        where = expand("mask", mask, mu.shape, "mu")
        mu, logvar = torch.where(where, mu, 0), torch.where(where, logvar, 0)
        p_mu, p_logvar = _unmasked(p_mu, where), _unmasked(p_logvar, where)
    if not reduce:  # every element as a row
        rows = [None if t is None else t.reshape(-1, 1) for t in (mu, logvar, p_mu, p_logvar)]
        return call(_op.gaussian_kl.default, reference.gaussian_kl, *rows, 0.0).view(mu.shape)
    if _varies(free_bits) and free_bits > 0:
        gaussian_kl(mu, logvar, p_mu, p_logvar, free_bits=0.0)  # checks the arguments; the compiler drops the result
        return reference.gaussian_kl(mu, logvar, p_mu, p_logvar, _as_tensor(free_bits, mu))
    return call(_op.gaussian_kl.default, reference.gaussian_kl, mu, logvar, p_mu, p_logvar, free_bits)


@checked
def log_prob(recon: Recon, x: Tensor, *, likelihood: str = "bernoulli", mask: Tensor | None = None) -> Tensor:
    """log p(x | recon) under any likelihood, summed over the event dimensions.

    What recon holds, and log p of one element, by the likelihood:

    - "bernoulli": logits l. x l - softplus(l)
    - "bernoulli_probs": probabilities p in [0, 1]. x log p + (1 - x) log(1 - p), logarithms clamped at -100 as in
      torch's BCE
    - "gaussian": mean (unit variance) or (mean, logvar). -1/2 [(x - m)^2 exp(-lv) + lv + log 2 pi]
    - "laplace": mean (unit scale) or (mean, log_scale). -[|x - m| exp(-s) + s + log 2]
    - "poisson": log_rate l. x l - exp(l) - lgamma(x + 1)
    - "nb", negative binomial of mean m = exp(log_mean) and variance m + m^2 / theta: (log_mean, log_theta).
      lgamma(x + theta) - lgamma(theta) - lgamma(x + 1) + theta log(theta / (theta + m)) + x log(m / (theta + m)),
      computed without a difference of two lgammas; log_theta counts as at most 40, where this is the Poisson
    - "zinb", zero with probability sigmoid(pi), else the former: (log_mean, log_theta, zero_logits pi).
      log sigmoid(-pi) + nb(x) where x > 0, and log[sigmoid(pi) + sigmoid(-pi) exp(nb(0))] where x = 0

    Counts x may be fractional. Of what is no count, negative or infinite, log p is -inf; of NaN it is NaN.
    Outside of [0, 1] a Bernoulli has no log p. The first 64 calls of a shape, and then every 64th, look at the values
    and refuse them, on the CPU and where nothing is compiled; so do the losses.

    Args:
        recon: [B, *event] or [K, B, *event], or a tuple of two or three tensors of which that is the first, by the
            parameters of the likelihood above. Each further tensor has the shape of the first, [*event] or is 0-d; its
            gradient is summed in that shape.
        x: [B, *event]. recon's dtype (or float32 beside half types), or uint8 (read as x / 255), or bool. Counts:
            recon's dtype (or float32), or uint8, int16, int32 or int64, read as they are.
        mask: broadcasts to x. 0 and 1, or weights of the elements' terms; an element of weight 0 is not read.

    Returns:
        [B] or [K, B], in nats; float32, or float64 for float64 inputs.

    Raises:
        ValueError, TypeError: an unknown likelihood, shapes or dtypes that do not fit.
        ValueError: x, or probabilities, outside of [0, 1] for a Bernoulli, where values are looked at.

    Reference: Kingma & Welling 2014, app. C; counts: Lopez et al. 2018 (scVI), methods.
    """
    first, second, third = _parameters(recon, x)
    found = call(_op.log_prob.default, reference.log_prob, first, x, second, third, _mask(mask, x), likelihood)
    domains.check_some(first, x, likelihood, mask)
    return found


def _of_row(recon: Recon, likelihood: str) -> tuple[likelihoods.Likelihood, tuple[Tensor, ...]]:
    """The row of a likelihood, and its parameters."""
    row, parameters = likelihoods.get(likelihood), split_recon(recon)
    names, count = ", ".join(row.parameters), len(parameters)
    if not row.fewest <= count <= len(row.parameters):
        raise ValueError(f"recon must hold the parameters ({names}) of likelihood {likelihood!r}; got {count} tensors")
    return row, parameters


@checked
def likelihood_mean(recon: Recon, likelihood: str = "bernoulli") -> Tensor:
    """E[x | recon], the mean of the likelihood: for example sigmoid(logits), or exp(log_rate).

    Args:
        recon: [..., *event], or a tuple of two or three tensors, as in `log_prob`.
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
    recon: Recon, likelihood: str = "bernoulli", *, generator: torch.Generator | None = None
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
def bernoulli_log_prob(logits: Tensor, x: Tensor, *, mask: Tensor | None = None) -> Tensor:
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
def gaussian_log_prob(mean: Tensor, x: Tensor, logvar: float | Tensor = 0.0, *, mask: Tensor | None = None) -> Tensor:
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
        logvar = _as_tensor(logvar, mean)
    elif logvar.dim() != 0 and logvar.shape != x.shape[1:]:
        logvar = expand("logvar", logvar, mean.shape, "mean")
    return log_prob((mean, logvar), x, likelihood="gaussian", mask=mask)


@checked
def log_mean_exp(log_w: Tensor, dim: int = 0) -> Tensor:
    """log (1/K) sum_k exp(log w_k) along one dimension, stably.

    Args:
        log_w: any shape, a floating dtype; K is its size along `dim`.
        dim: the dimension that is averaged.

    Returns:
        log_w's shape without `dim`; float32, or float64 for float64 inputs. Where every weight is -inf the value is
        -inf and the gradient 0.

    Raises:
        ValueError, IndexError: K = 0, or a dimension out of range.

    Reference: Burda et al. 2016, eq. 8.
    """
    return call(_op.log_mean_exp.default, reference.log_mean_exp, log_w, dim)


@overload
def elbo_loss(
    recon: Recon,
    x: Tensor,
    mu: Tensor,
    logvar: Tensor,
    *,
    return_parts: Literal[False] = False,
    **options: Unpack[ElboOptions],
) -> Tensor: ...


@overload
def elbo_loss(
    recon: Recon, x: Tensor, mu: Tensor, logvar: Tensor, *, return_parts: Literal[True], **options: Unpack[ElboOptions]
) -> LossParts: ...


@overload
def elbo_loss(
    recon: Recon, x: Tensor, mu: Tensor, logvar: Tensor, *, return_parts: bool, **options: Unpack[ElboOptions]
) -> Tensor | LossParts: ...


@checked
def elbo_loss(
    recon: Recon,
    x: Tensor,
    mu: Tensor,
    logvar: Tensor,
    *,
    prior_mu: Tensor | None = None,
    prior_logvar: Tensor | None = None,
    likelihood: str = "bernoulli",
    beta: float | Tensor = 1.0,
    free_bits: float = 0.0,
    mask: Tensor | None = None,
    kl_mask: Tensor | None = None,
    reduction: str = "mean",
    return_parts: bool = False,
) -> Tensor | LossParts:
    """The loss of a VAE: minus the evidence lower bound, value and gradient in one pass.

    loss_b = -mean_k log p(x_b | z_kb) + beta KL(q(z | x_b) || p(z)), reduced over B, never averaged over D.

    Args:
        recon, x, likelihood, mask: as in `log_prob`. recon may carry K samples in front.
        mu, logvar: [B, *latent]. The encoder's output.
        prior_mu, prior_logvar: broadcast to mu, learned or not; N(0, I) without them.
        beta: weight of the KL; a float or a 0-d tensor on the device (Higgins et al. 2017), or a tensor that broadcasts
            to [*latent], of one weight per dimension.
        free_bits: floor in nats for each dimension's mean KL; see `gaussian_kl`.
        kl_mask: bool, broadcasts to mu: where it is False, the KL is 0; see `gaussian_kl`.
        reduction: "mean" (over B), "sum" or "none".
        return_parts: also return log p(x | z) and the KL (without beta and free bits) per datum.

    Returns:
        A scalar, or [B] with reduction="none". With return_parts, LossParts(loss, log_likelihood [K?, B], kl [B]).
        float32, or float64 for float64 inputs.

    Raises:
        ValueError, TypeError: unknown names, shapes or dtypes that do not fit.

    Note:
        The gradient is computed with the value and multiplied by the upstream one later: where it overflows by itself
        it stays infinite, also under an upstream gradient of 1e-30. reduction="none" multiplies first.

    Reference: Kingma & Welling 2014, eq. 10.
    """
    first, second, third = _parameters(recon, x)
    per_dimension = isinstance(beta, Tensor) and beta.dim() > 0
    if kl_mask is not None or per_dimension:  # the likelihood by the op, the KL beside it
        if free_bits > 0:
            raise ValueError(f"free_bits must be 0 with kl_mask or with a beta per dimension; got {free_bits}")
        fit = elbo_loss(
            *(recon, x, torch.zeros_like(mu), torch.zeros_like(logvar)),
            likelihood=likelihood,
            beta=0.0,
            mask=mask,
            reduction=reduction,
            return_parts=True,
        )
        terms = gaussian_kl(mu, logvar, prior_mu, prior_logvar, mask=kl_mask, reduce=False)
        beta = beta if isinstance(beta, Tensor) else _as_tensor(beta, terms)
        beta = ordered.expand(expand("beta", beta.to(terms.dtype), terms.shape[1:], "one latent"), terms.shape)
        kl = ordered_sum(terms.flatten(1), 1)
        if takes_twins(mu):  # whose backward multiplies infinities by 0
            latents = reference.weighted_latents(beta, terms, mu, logvar, prior_mu, prior_logvar)
            terms = gaussian_kl(*latents, mask=kl_mask, reduce=False)  # type: ignore[arg-type]
        penalty = reduce(ordered_sum(weighted(beta, terms).flatten(1), 1), reduction)
        loss = fit.loss + penalty.to(fit.loss.dtype)
        return LossParts(loss, fit.log_likelihood, kl) if return_parts else loss
    if torch.compiler.is_dynamo_compiling():
        if not isinstance(beta, Tensor) and _varies(beta):
            beta = _as_tensor(beta, first)
        if _varies(free_bits) and free_bits > 0:  # the likelihood by the op, the KL with its floor beside it
            options: ElboOptions = {"likelihood": likelihood, "mask": mask, "reduction": reduction}
            options |= {"prior_mu": prior_mu, "prior_logvar": prior_logvar, "beta": 0.0, "free_bits": 0.0}
            fit = elbo_loss(recon, x, mu, logvar, return_parts=True, **options)
            kl = gaussian_kl(mu, logvar, prior_mu, prior_logvar, free_bits=free_bits)
            penalty = reduce(weighted(beta, kl), reduction)
            return LossParts(fit.loss + penalty, *fit[1:]) if return_parts else fit.loss + penalty
    weight, weight_tensor = (1.0, beta) if isinstance(beta, Tensor) else (beta, None)
    parts = call(
        _op.elbo_loss.default,
        reference.elbo_loss,
        first,
        x,
        mu,
        logvar,
        None if prior_mu is None else expand("prior_mu", prior_mu, mu.shape, "mu"),
        None if prior_logvar is None else expand("prior_logvar", prior_logvar, mu.shape, "mu"),
        second,
        third,
        _mask(mask, x),
        weight,
        weight_tensor,
        free_bits,
        likelihood,
        reduction,
    )
    domains.check_some(first, x, likelihood, mask)
    return LossParts(*parts) if return_parts else parts[0]


@overload
def iwae_loss(
    recon: Recon, x: Tensor, log_ratio: Tensor, *, return_parts: Literal[False] = False, **options: Unpack[LossOptions]
) -> Tensor: ...


@overload
def iwae_loss(
    recon: Recon, x: Tensor, log_ratio: Tensor, *, return_parts: Literal[True], **options: Unpack[LossOptions]
) -> LossParts: ...


@overload
def iwae_loss(
    recon: Recon, x: Tensor, log_ratio: Tensor, *, return_parts: bool, **options: Unpack[LossOptions]
) -> Tensor | LossParts: ...


@checked
def iwae_loss(
    recon: Recon,
    x: Tensor,
    log_ratio: Tensor,
    *,
    likelihood: str = "bernoulli",
    mask: Tensor | None = None,
    reduction: str = "mean",
    return_parts: bool = False,
) -> Tensor | LossParts:
    """Minus the importance-weighted bound, value and gradient in one pass.

    loss_b = -log mean_k exp(log p(x_b | z_kb) + log_ratio_kb), reduced over B; the mean over k is per datum.

    Args:
        recon: [K, B, *event] (or a tuple, as in `log_prob`), x, likelihood, mask: as in `log_prob`.
        log_ratio: [K, B]. log p(z) - log q(z | x), from `rsample`.
        reduction: "mean" (over B), "sum" or "none".
        return_parts: also return log p(x | z) and minus the mean log ratio, the samples' estimate of the KL.

    Returns:
        A scalar, or [B] with reduction="none"; with return_parts, LossParts(loss, log_likelihood [K, B], kl [B]).

    Raises:
        ValueError, TypeError: unknown names, shapes or dtypes that do not fit.

    Reference: Burda et al. 2016, eq. 8 and 13.
    """
    first, second, third = _parameters(recon, x)
    loss, log_likelihood = call(
        _op.multi_sample_loss.default,
        reference.multi_sample_loss,
        first,
        x,
        log_ratio,
        None,
        second,
        third,
        _mask(mask, x),
        likelihood,
        list(estimators.ESTIMATORS["iwae"].make()),
        reduction,
    )
    domains.check_some(first, x, likelihood, mask)
    if not return_parts:
        return loss
    return LossParts(loss, log_likelihood, ordered_sum(log_ratio.to(log_likelihood.dtype), 0) / -log_ratio.shape[0])


def steered(row: estimators.Estimator, name: str, posteriors: Sequence[Posterior]) -> Tensor | None:
    """The gates [2, K, B] of the posteriors, as one tensor that gives each its gradient; None if none are needed."""
    if row.is_gradient:
        return None
    if forward_ad._current_level >= 0:
        raise NotImplementedError(
            f"estimator {name!r} has no forward-mode derivative: it is no gradient of its bound; take 'iwae' or 'elbo'"
        )
    found = [p.gates for p in posteriors if p.gates is not None]
    if len(found) < len(posteriors):
        raise ValueError(f"posterior must come from rsample for estimator {name!r}; this one has gates=None")
    return found[0] if len(found) == 1 else torch.stack(found).sum(0)


def mean_kl(posterior: Posterior) -> Tensor:
    """The analytic KL [B]; a mean over K where it differs per sample."""
    kl = posterior.kl
    return ordered_sum(kl, 0) / len(kl) if kl.dim() == 2 else kl


@overload
def multi_sample_loss(
    recon: Recon,
    x: Tensor,
    posterior: Posterior,
    *,
    return_parts: Literal[False] = False,
    **options: Unpack[MultiSampleOptions],
) -> Tensor: ...


@overload
def multi_sample_loss(
    recon: Recon, x: Tensor, posterior: Posterior, *, return_parts: Literal[True], **options: Unpack[MultiSampleOptions]
) -> LossParts: ...


@overload
def multi_sample_loss(
    recon: Recon, x: Tensor, posterior: Posterior, *, return_parts: bool, **options: Unpack[MultiSampleOptions]
) -> Tensor | LossParts: ...


@checked
def multi_sample_loss(
    recon: Recon,
    x: Tensor,
    posterior: Posterior,
    *,
    likelihood: str = "bernoulli",
    estimator: str = "iwae",
    alpha: float = 0.0,
    beta: float = 0.5,
    groups: int = 1,
    mask: Tensor | None = None,
    reduction: str = "mean",
    return_parts: bool = False,
) -> Tensor | LossParts:
    """Minus a K-sample bound with the gradient estimator of your choice, value and gradient in one pass.

    With log w_k = log p(x | z_k) + log p(z_k) - log q(z_k | x), all K samples in one backward pass:

    - "elbo": mean_k log w_k: the KL by Monte Carlo too (Kingma & Welling 2014, eq. 6)
    - "stl": the same without the score term: zero variance where q is the posterior (Roeder et al. 2017)
    - "iwae": log mean_k w_k (Burda et al. 2016)
    - "dreg": the same bound; the encoder's gradient doubly reparameterized, which is unbiased and whose signal-to-noise
      ratio grows with K where iwae's falls (Tucker et al. 2019). With K = 1 it is "stl".
    - "rws": the same bound for the decoder; the encoder minimizes KL(p(z | x) || q), the wake phase of reweighted
      wake-sleep (Bornschein & Bengio 2015). Needs K of 2 or more.
    - "vr": 1/(1 - alpha) log mean_k w_k^(1 - alpha), a Renyi bound (Li & Turner 2016): alpha = 0 is iwae, 1 (by
      continuity) elbo; a negative alpha goes above the bound of iwae.
    - "ciwae": beta elbo + (1 - beta) iwae (Rainforth et al. 2018)
    - "miwae": iwae inside each of `groups` groups of K / groups consecutive samples, averaged (Rainforth et al. 2018)

    Args:
        recon: [K, B, *event] (or a tuple, as in `log_prob`), decoded from posterior.z.
        x, likelihood, mask: as in `log_prob`.
        posterior: from `rsample` with num_samples.
        estimator: a name above; for "stl", "dreg" and "rws" see the note.
        alpha: of "vr". beta: the weight of the ELBO in "ciwae". groups: of "miwae". Other estimators ignore them.
        reduction: "mean" (over B), "sum" or "none".
        return_parts: also return log p(x | z) and the analytic KL.

    Returns:
        A scalar, or [B] with reduction="none", in nats: minus the bound, whatever the gradient. With return_parts,
        LossParts(loss, log_likelihood [K, B], kl [B]).

    Raises:
        ValueError, TypeError: unknown names, shapes or dtypes that do not fit, groups that do not divide K.
        NotImplementedError: "stl", "dreg" or "rws" in forward-mode AD.

    Note:
        "stl", "dreg" and "rws" scale the gradients that reach posterior.z and posterior.log_ratio. The gradient of
        another term of the same loss that reads these two would be scaled with them: compute that term from samples of
        its own (`rsample` with the same seed gives the same ones). The gradients of posterior.kl, mu and logvar are not
        scaled.
    """
    first, second, third = _parameters(recon, x)
    log_ratio = posterior.log_ratio
    if log_ratio.dim() != 2:
        raise ValueError(
            "posterior must hold K samples, log_ratio [K, B]: draw it with rsample(mu, logvar, num_samples); "
            f"got log_ratio {tuple(log_ratio.shape)}"
        )
    row = estimators.estimator(estimator, log_ratio.shape[0], alpha=alpha, beta=beta, groups=groups)
    gates = steered(row, estimator, [posterior])
    args = first, x, log_ratio, gates, second, third, _mask(mask, x), likelihood
    if bound_varies(row):
        iwae = list(estimators.ESTIMATORS["iwae"].make())
        call(_op.multi_sample_loss.default, reference.multi_sample_loss, *args, iwae, reduction)  # as in gaussian_kl
        log_likelihood = log_prob(recon, x, likelihood=likelihood, mask=mask)
        log_w = log_likelihood + log_ratio.to(log_likelihood.dtype)
        loss = reduce(-reference.bound(log_w, row.elbo_weight, row.alpha, row.groups), reduction)
    else:
        numbers = [float(number) for number in row]
        loss, log_likelihood = call(
            _op.multi_sample_loss.default, reference.multi_sample_loss, *args, numbers, reduction
        )
    domains.check_some(first, x, likelihood, mask)
    return LossParts(loss, log_likelihood, mean_kl(posterior)) if return_parts else loss


class ELBOLoss(torch.nn.Module, Generic[_Result]):
    """`elbo_loss` as a module: the constructor takes the options, each call the tensors.

    A tensor beta is a buffer that moves with the module and is not in its state_dict; an nn.Parameter is learned.
    """

    @overload
    def __init__(
        self: "ELBOLoss[Tensor]",
        likelihood: str = "bernoulli",
        *,
        beta: float | Tensor = 1.0,
        free_bits: float = 0.0,
        reduction: str = "mean",
        return_parts: Literal[False] = False,
    ) -> None: ...

    @overload
    def __init__(
        self: "ELBOLoss[LossParts]",
        likelihood: str = "bernoulli",
        *,
        beta: float | Tensor = 1.0,
        free_bits: float = 0.0,
        reduction: str = "mean",
        return_parts: Literal[True],
    ) -> None: ...

    @overload
    def __init__(
        self: "ELBOLoss[Tensor | LossParts]",
        likelihood: str = "bernoulli",
        *,
        beta: float | Tensor = 1.0,
        free_bits: float = 0.0,
        reduction: str = "mean",
        return_parts: bool,
    ) -> None: ...

    @checked
    def __init__(
        self,
        likelihood: str = "bernoulli",
        *,
        beta: float | Tensor = 1.0,
        free_bits: float = 0.0,
        reduction: str = "mean",
        return_parts: bool = False,
    ) -> None:
        super().__init__()
        self.likelihood, self.free_bits = likelihood, free_bits
        self.beta: float | Tensor
        if isinstance(beta, Tensor) and not isinstance(beta, torch.nn.Parameter):
            # a buffer moves with the module; like the other options it is the constructor's, and not in the state_dict
            self.register_buffer("beta", beta, persistent=False)
        else:
            self.beta = beta
        self.reduction, self.return_parts = reduction, return_parts

    if TYPE_CHECKING:

        def __call__(
            self,
            recon: Recon,
            x: Tensor,
            mu: Tensor,
            logvar: Tensor,
            mask: Tensor | None = None,
            *,
            prior_mu: Tensor | None = None,
            prior_logvar: Tensor | None = None,
        ) -> _Result: ...

    def forward(
        self,
        recon: Recon,
        x: Tensor,
        mu: Tensor,
        logvar: Tensor,
        mask: Tensor | None = None,
        *,
        prior_mu: Tensor | None = None,
        prior_logvar: Tensor | None = None,
    ) -> _Result:
        """See `elbo_loss`."""
        result = elbo_loss(
            recon,
            x,
            mu,
            logvar,
            prior_mu=prior_mu,
            prior_logvar=prior_logvar,
            likelihood=self.likelihood,
            beta=self.beta,
            free_bits=self.free_bits,
            mask=mask,
            reduction=self.reduction,
            return_parts=self.return_parts,
        )
        return cast(_Result, result)

    def extra_repr(self) -> str:
        return f"{self.likelihood!r}, beta={self.beta}, free_bits={self.free_bits}, reduction={self.reduction!r}"


class IWAELoss(torch.nn.Module, Generic[_Result]):
    """`iwae_loss` as a module: the constructor takes the options, each call the tensors."""

    @overload
    def __init__(
        self: "IWAELoss[Tensor]",
        likelihood: str = "bernoulli",
        *,
        reduction: str = "mean",
        return_parts: Literal[False] = False,
    ) -> None: ...

    @overload
    def __init__(
        self: "IWAELoss[LossParts]",
        likelihood: str = "bernoulli",
        *,
        reduction: str = "mean",
        return_parts: Literal[True],
    ) -> None: ...

    @overload
    def __init__(
        self: "IWAELoss[Tensor | LossParts]",
        likelihood: str = "bernoulli",
        *,
        reduction: str = "mean",
        return_parts: bool,
    ) -> None: ...

    @checked
    def __init__(self, likelihood: str = "bernoulli", *, reduction: str = "mean", return_parts: bool = False) -> None:
        super().__init__()
        self.likelihood, self.reduction, self.return_parts = likelihood, reduction, return_parts

    if TYPE_CHECKING:

        def __call__(self, recon: Recon, x: Tensor, log_ratio: Tensor, mask: Tensor | None = None) -> _Result: ...

    def forward(self, recon: Recon, x: Tensor, log_ratio: Tensor, mask: Tensor | None = None) -> _Result:
        """See `iwae_loss`."""
        result = iwae_loss(
            recon,
            x,
            log_ratio,
            likelihood=self.likelihood,
            mask=mask,
            reduction=self.reduction,
            return_parts=self.return_parts,
        )
        return cast(_Result, result)

    def extra_repr(self) -> str:
        return f"{self.likelihood!r}, reduction={self.reduction!r}"
