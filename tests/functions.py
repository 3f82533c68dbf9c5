"""Every public function as (function of tensors, tensors): what the tests of autograd and of threads go through."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

import fastelbo


class Function(NamedTuple):
    call: Callable[..., object]  # -> tensor or tuple of tensors
    make: Callable[[int, int], list[Tensor]]  # (B, D) -> inputs, in float64, that may be differentiated


K, SEED = 3, 5


def _r(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64)


def _unit(*shape: int) -> Tensor:
    return torch.rand(shape, dtype=torch.float64) * 0.9 + 0.05


def _mask(x: Tensor) -> Tensor:
    """Weights, a third of them 0, that depend on nothing but the shape."""
    index = torch.arange(x.numel(), device=x.device).reshape(x.shape)
    return (index % 3).to(x.dtype) * 0.7


def _counts(like: Tensor) -> Tensor:
    """0 to 3, by the shape alone."""
    return torch.arange(like.numel(), device=like.device).reshape(like.shape) % 4


def _kept(mu: Tensor) -> fastelbo.Kept:
    """Twice as many rows as data, in no order, some of them twice, by the shape alone."""
    index = torch.arange(2 * len(mu), device=mu.device)
    return fastelbo.Kept(index * 5 % 4, index * 7 % max(1, len(mu) - 1), torch.ones_like(index))


def _elbo(reduction: str, **options):
    def call(mean, logvar_x, x, mu, logvar, beta):
        return tuple(
            fastelbo.elbo_loss(
                (mean, logvar_x),
                x,
                mu,
                logvar,
                likelihood="gaussian",
                beta=beta,
                reduction=reduction,
                return_parts=True,
                **options,
            )
        )

    return call


def _iwae(reduction: str):
    def call(logits, x, log_ratio):
        return tuple(fastelbo.iwae_loss(logits, x, log_ratio, reduction=reduction, return_parts=True))

    return call


def _elbo_inputs(b: int, d: int) -> list[Tensor]:
    beta = torch.tensor(0.7, dtype=torch.float64)
    return [_r(K, b, d), 0.5 * _r(K, b, d), _r(b, d), _r(b, d), 0.5 * _r(b, d), beta]


FUNCTIONS = {
    "bernoulli_log_prob": Function(fastelbo.bernoulli_log_prob, lambda b, d: [_r(K, b, d), _unit(b, d)]),
    "bernoulli_probs": Function(
        lambda p, x: fastelbo.log_prob(p, x, likelihood="bernoulli_probs"), lambda b, d: [_unit(b, d), _unit(b, d)]
    ),
    "gaussian_log_prob": Function(fastelbo.gaussian_log_prob, lambda b, d: [_r(K, b, d), _r(b, d), 0.5 * _r(K, b, d)]),
    "gaussian_log_prob, one logvar": Function(
        lambda m, x, lv: fastelbo.gaussian_log_prob(m, x, lv, mask=_mask(x)), lambda b, d: [_r(b, d), _r(b, d), _r()]
    ),
    "laplace": Function(
        lambda m, x, s: fastelbo.log_prob((m, s), x, likelihood="laplace"),
        lambda b, d: [_r(b, d) + 3, _r(b, d) - 3, 0.5 * _r(b, d)],
    ),
    "poisson": Function(
        lambda rate, x: fastelbo.log_prob(rate, x, likelihood="poisson"), lambda b, d: [_r(K, b, d), 5 * _unit(b, d)]
    ),
    "nb": Function(
        lambda m, t, x: fastelbo.log_prob((m, t), x, likelihood="nb"),
        lambda b, d: [_r(b, d), 2 * _r(b, d), 5 * _unit(b, d)],
    ),
    "zinb, a theta for each element": Function(
        lambda m, t, p, x: fastelbo.log_prob((m, t, p), x, likelihood="zinb", mask=_mask(x)),
        lambda b, d: [_r(K, b, d), 2 * _r(d), _r(K, b, d), 5 * _unit(b, d)],
    ),
    "gaussian_kl": Function(fastelbo.gaussian_kl, lambda b, d: [_r(b, d) for _ in range(4)]),
    "gaussian_kl, free bits": Function(
        lambda mu, lv: fastelbo.gaussian_kl(mu, lv, free_bits=0.4), lambda b, d: [_r(b, d), 0.5 * _r(b, d)]
    ),
    "rsample, seed": Function(
        lambda *given: fastelbo.rsample(
            *given[:2], K, prior_mu=given[2], prior_logvar=given[3], seed=SEED, first_sample=2
        )[:3],
        lambda b, d: [_r(b, d) for _ in range(4)],
    ),
    "rsample, eps": Function(
        lambda mu, lv, eps: fastelbo.rsample(mu, lv, K, eps=eps)[:3], lambda b, d: [_r(b, d), _r(b, d), _r(K, b, d)]
    ),
    "rsample_kept, seed": Function(
        lambda *given: fastelbo.rsample_kept(
            *given[:2], _kept(given[0]), prior_mu=given[2], prior_logvar=given[3], seed=SEED
        )[:3],
        lambda b, d: [_r(b, d) for _ in range(4)],
    ),
    "log_mean_exp": Function(lambda w: fastelbo.log_mean_exp(w, 1), lambda b, d: [_r(b, d, 2)]),
    "elbo_loss mean": Function(_elbo("mean"), _elbo_inputs),
    "elbo_loss sum, free bits": Function(_elbo("sum", free_bits=0.4), _elbo_inputs),
    "elbo_loss none": Function(_elbo("none"), _elbo_inputs),
    "elbo_loss, mask": Function(
        lambda r, x, mu, lv: fastelbo.elbo_loss(r, x, mu, lv, mask=_mask(x)),
        lambda b, d: [_r(b, d), _unit(b, d), _r(b, d), _r(b, d)],
    ),
    "elbo_loss, learned prior": Function(
        lambda r, x, mu, lv, mu_p, lv_p: fastelbo.elbo_loss(
            r, x, mu, lv, prior_mu=mu_p, prior_logvar=lv_p, free_bits=0.1, return_parts=True
        ),
        lambda b, d: [_r(b, d), _unit(b, d), _r(b, d), 0.5 * _r(b, d), _r(d), 0.5 * _r(d)],
    ),
    "elbo_loss, a scale for each element": Function(
        lambda m, s, x, mu, lv: fastelbo.elbo_loss((m, s), x, mu, lv, likelihood="gaussian"),
        lambda b, d: [_r(K, b, d), 0.5 * _r(d), _r(b, d), _r(b, d), 0.5 * _r(b, d)],
    ),
    "elbo_loss, three parameters": Function(
        lambda m, t, p, mu, lv: fastelbo.elbo_loss((m, t, p), _counts(m), mu, lv, likelihood="zinb"),
        lambda b, d: [_r(b, d), 2 * _r(d), _r(), _r(b, d), 0.5 * _r(b, d)],
    ),
    "iwae_loss, one scale": Function(
        lambda m, s, x, ratio: fastelbo.iwae_loss((m, s), x, ratio, likelihood="gaussian", mask=_mask(x)),
        lambda b, d: [_r(K, b, d), 0.5 * _r(), _r(b, d), _r(K, b)],
    ),
    "iwae_loss mean": Function(_iwae("mean"), lambda b, d: [_r(K, b, d), _unit(b, d), _r(K, b)]),
    "iwae_loss none": Function(_iwae("none"), lambda b, d: [_r(K, b, d), _unit(b, d), _r(K, b)]),
    "multi_sample_loss, ciwae": Function(
        lambda logits, x, mu, lv, eps: fastelbo.multi_sample_loss(
            logits, x, fastelbo.rsample(mu, lv, K, eps=eps), estimator="ciwae", reduction="sum"
        ),
        lambda b, d: [_r(K, b, d), _unit(b, d), _r(b, d), _r(b, d), _r(K, b, d)],
    ),
    "multi_sample_loss, vr": Function(
        lambda logits, x, mu, lv, eps: fastelbo.multi_sample_loss(
            logits, x, fastelbo.rsample(mu, lv, K, eps=eps), estimator="vr", alpha=-0.7, reduction="none"
        ),
        lambda b, d: [_r(K, b, d), _unit(b, d), _r(b, d), _r(b, d), _r(K, b, d)],
    ),
    "ppca_log_prob": Function(
        lambda x, W, b: fastelbo.ppca_log_prob(x, W, b, b.mean()), lambda n, d: [_r(n, d), _r(d, 2), _r(d)]
    ),
    "ppca_log_prob, missing": Function(
        lambda x, W, b: fastelbo.ppca_log_prob(x, W, b, b.mean(), observed=_mask(x) > 0),
        lambda n, d: [_r(n, d), _r(d, 2), _r(d)],
    ),
    "iwae_loss, pair and mask": Function(
        lambda m, s, x, ratio: fastelbo.iwae_loss((m, s), x, ratio, likelihood="gaussian", mask=_mask(x)),
        lambda b, d: [_r(K, b, d), 0.5 * _r(K, b, d), _r(b, d), _r(K, b)],
    ),
}
