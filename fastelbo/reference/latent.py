"""The KL of a diagonal Gaussian, and its reparameterized samples."""

import math
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from fastelbo.likelihoods import LOG_2PI, divided
from fastelbo.reference.derivatives import backward_of
from fastelbo.reference.likelihood import compute_dtype, sum_from
from fastelbo.reference.random import draws_by_kernel, noise, normal_rows

# Terms of the series below: its second derivative, t^n / n! + ..., ends below half an ulp at |t| = 1.
_SERIES_TERMS = {torch.float32: 12, torch.float64: 19}


def exp_remainder(t: Tensor) -> Tensor:
    """exp(t) - 1 - t, by its series where the closed form cancels (|t| < 1); so are the derivatives of every order."""
    small = t.abs() < 1
    s = torch.where(small, t, 0.0)
    series = torch.zeros_like(s)
    for n in reversed(range(2, 2 + _SERIES_TERMS[t.dtype])):
        series = series * s + 1 / math.factorial(n)
    return torch.where(small, s * s * series, torch.exp(t) - (1 + t))


def kl_terms(mu: Tensor, logvar: Tensor, prior_mu: Tensor | None = None, prior_logvar: Tensor | None = None) -> Tensor:
    """1/2 [exp(t) - 1 - t + (mu - mu_p)^2 exp(-lv_p)], t = lv - lv_p: the KL of every latent dimension."""
    dtype = compute_dtype(mu)
    mu, logvar = mu.to(dtype), logvar.to(dtype)
    if prior_mu is not None:
        mu = mu - prior_mu.to(dtype)
    if prior_logvar is not None:
        mu = divided(mu, 0.5 * prior_logvar.to(dtype))
        logvar = logvar - prior_logvar.to(dtype)
    return 0.5 * (mu.square() + exp_remainder(logvar))


def gaussian_kl(
    mu: Tensor,
    logvar: Tensor,
    prior_mu: Tensor | None = None,
    prior_logvar: Tensor | None = None,
    free_bits: Tensor | None = None,
) -> Tensor:
    """KL(N(mu, exp(lv)) || N(mu_p, exp(lv_p))), summed over the latent dimensions -> [B].

    With free bits (Kingma et al. 2016, eq. 15) a dimension whose batch mean is below lambda counts lambda in every
    datum, so that the mean over B is sum_j max(lambda, mean_b KL_bj).
    """
    terms = kl_terms(mu, logvar, prior_mu, prior_logvar)
    if free_bits is not None:
        floor = free_bits.to(terms.dtype)
        below = terms.detach().mean(0) < floor  # NaN is not below the floor, but a floor of NaN is seen
        terms = torch.where(below | floor.isnan(), floor, terms)
    return sum_from(terms, 1)


gaussian_kl_backward = backward_of(gaussian_kl, ("mu", "logvar", "prior_mu", "prior_logvar"))


class _Gated(torch.autograd.Function):
    """The identity on z, log_ratio and log_q, with one more output, `gates`: zeros [2, K, B].

    The gradient that comes back for `gates` are two factors of each sample: by how much the path and the score gradient
    of an estimator differ from those in the total gradient (csrc/math/estimator.h).
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(
        z: Tensor,
        log_ratio: Tensor,
        log_q: Tensor,
        mu: Tensor,
        logvar: Tensor,
        p_mu: Tensor | None,
        p_lv: Tensor | None,
    ) -> tuple[Tensor, ...]:
        return z.clone(), log_ratio.clone(), log_q.clone(), log_ratio.new_zeros(2, *log_ratio.shape)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        z, _, _, *parameters = inputs
        ctx.save_for_backward(z, *parameters)
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, grad_z: Any, grad_log_ratio: Any, grad_log_q: Any, gates: Any) -> Any:  # type: ignore[override]
        """The path gradient times 1 + gates[0], the score gradient times 1 + gates[1]."""
        if gates is None:
            return grad_z, grad_log_ratio, grad_log_q, None, None, None, None
        z, mu, logvar, p_mu, p_lv = ctx.saved_tensors

        def by_element(row: Tensor) -> Tensor:
            return row.reshape(row.shape + (1,) * (z.dim() - row.dim()))

        path, score = map(by_element, gates)
        if grad_z is not None:
            grad_z = grad_z * (1 + path)
        if grad_log_ratio is None and grad_log_q is None:
            return grad_z, None, None, None, None, None, None
        of_log_p = torch.zeros_like(path) if grad_log_ratio is None else by_element(grad_log_ratio)
        of_minus_log_q = of_log_p if grad_log_q is None else of_log_p - by_element(grad_log_q)
        by_q = divided(z - mu, logvar)  # -d log q / dz
        by_p = z if p_mu is None else z - p_mu
        by_p = by_p if p_lv is None else divided(by_p, p_lv)
        through_z = path * (of_minus_log_q * by_q - of_log_p * by_p)
        scores = of_minus_log_q * score
        grad_mu = (-scores * by_q).sum_to_size(mu.shape)
        grad_logvar = (0.5 * scores * (1 - (z - mu) * by_q)).sum_to_size(mu.shape)
        through_z = through_z if grad_z is None else grad_z + through_z
        return through_z, grad_log_ratio, grad_log_q, grad_mu, grad_logvar, None, None


def rsample(
    mu: Tensor,
    logvar: Tensor,
    prior_mu: Tensor | None = None,
    prior_logvar: Tensor | None = None,
    num_samples: int | None = None,
    seed: Tensor | None = None,
    eps: Tensor | None = None,
    sample: Tensor | None = None,
    datum: Tensor | None = None,
    first_sample: int = 0,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """z = mu + exp(lv/2) eps [K?, B, *latent], its KL [B], log p(z) - log q(z | x) and log q(z | x) [K?, B], and gates
    [2, K, B]; of chosen samples the rows (sample[i], datum[i]) alone: z [n, *latent], [n] and [2, n]."""
    dtype, shape = compute_dtype(mu), mu.shape
    kl = gaussian_kl(mu, logvar, prior_mu, prior_logvar)
    given = [None if t is None else t.to(dtype) for t in (mu, logvar, prior_mu, prior_logvar)]
    lead = 1 if num_samples is None else 2
    if sample is not None and datum is not None:
        assert seed is not None
        given = [None if t is None else t.expand(shape).index_select(0, datum) for t in given]
        draw = torch.ops.fastelbo._normal_rows if draws_by_kernel(seed) else normal_rows
        eps = draw(seed, sample * shape[0] + datum, math.prod(shape[1:])).reshape(len(sample), *shape[1:])
    elif eps is None:
        assert seed is not None
        eps = noise(seed, (1 if num_samples is None else num_samples, *shape), first_sample)
        eps = eps[0] if num_samples is None else eps
    m, lv, m_p, lv_p = given
    assert m is not None and lv is not None and eps is not None
    e = eps.to(dtype)
    z = m + torch.exp(0.5 * lv) * e
    distance = z if m_p is None else z - m_p
    if lv_p is not None:
        distance = divided(distance, 0.5 * lv_p)
    terms = 0.5 * (e.square() - distance.square() + (lv if lv_p is None else lv - lv_p))
    log_ratio, log_q = sum_from(terms, lead), sum_from(-0.5 * (e.square() + (lv + LOG_2PI)), lead)
    if num_samples is None and sample is None:
        return z.to(mu.dtype), kl, log_ratio, log_q, log_ratio.new_empty(0)
    gates = log_ratio.new_zeros(2, *log_ratio.shape)
    if forward_ad._current_level < 0:  # estimators have no forward-mode derivative
        z, log_ratio, log_q, gates = _Gated.apply(z, log_ratio, log_q, m, lv, m_p, lv_p)  # type: ignore[no-untyped-call]
    return z.to(mu.dtype), kl, log_ratio, log_q, gates


rsample_backward = backward_of(rsample, ("mu", "logvar", "prior_mu", "prior_logvar", "eps"), upstream=5)
