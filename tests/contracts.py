"""The tables of what the library promises to be called with; a test that must hold for all goes through one of them.

FUNCTIONS     every public function as a function of tensors that may be differentiated: values, gradients of any order,
              layouts, modes, threads, devices, compilers
op_calls()    every registered op, private ones too, as it is called below the public functions: opcheck, twins
public()      every public name that takes arguments, with good ones by name: types and errors

What differs from likelihood to likelihood is in cases.py.
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn

import fastelbo

ops = torch.ops.fastelbo


class Function(NamedTuple):
    call: Callable[..., object]  # -> tensor or tuple of tensors
    make: Callable[[int, int], list[Tensor]]  # (B, D) -> inputs, in float64, that may be differentiated
    roundings: int = 0  # of the inputs that an error may amount to, where a LAPACK has a part: see oracle.check
    drawn: bool = False  # from a seed: the kernels' noise has the resolution of float32, the twins' that of float64


B, K, D, M, SEED = 4, 3, 6, 5, 5


def _r(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64)


def _batch(b: int) -> int:
    """Of the functions that take every pair of a batch."""
    return min(max(b, 2), 4000)


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


def _posterior(log_ratio: Tensor) -> fastelbo.Posterior:
    """One that holds a log ratio [K, B]."""
    none = log_ratio.new_zeros(log_ratio.shape[1])
    return fastelbo.Posterior(none, none, log_ratio, log_ratio, none, none)


def _elbo(reduction: str, **options):
    def call(mean, logvar_x, x, mu, logvar, beta):
        return tuple(
            fastelbo.elbo_parts(
                (mean, logvar_x),
                x,
                mu,
                logvar,
                likelihood="gaussian",
                beta=beta,
                reduction=reduction,
                **options,
            )
        )

    return call


def _iwae(reduction: str):
    def call(logits, x, log_ratio):
        return tuple(fastelbo.iwae_parts(logits, x, log_ratio, reduction=reduction))

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
    "student_t": Function(
        lambda m, x, s, r: fastelbo.log_prob((m, s, r), x, likelihood="student_t"),
        lambda b, d: [_r(K, b, d), _r(b, d), 0.5 * _r(b, d), _r(d)],
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
    "nb_mean": Function(
        lambda m, t, x: fastelbo.log_prob((m, t), x, likelihood="scvi_nb"),
        lambda b, d: [3 * _unit(K, b, d), 2 * _unit(d), 5 * _unit(b, d)],
    ),
    "nb_mixture": Function(
        lambda m, n, t, p, x: fastelbo.log_prob((m, n, t, p), x, likelihood="nb_mixture", mask=_mask(x)),
        lambda b, d: [3 * _unit(b, d), _unit(b, d), 2 * _unit(d), _r(b, d), 5 * _unit(b, d)],
    ),
    "beta_binomial": Function(
        lambda a, c, x: fastelbo.log_prob((a, c, _counts(x) + 5), x, likelihood="beta_binomial"),
        lambda b, d: [2 * _unit(K, b, d), 2 * _unit(d), 4 * _unit(b, d)],
    ),
    "nb of every element, of rows and columns": Function(
        lambda m, t, x: fastelbo.log_prob((m, t), x, likelihood="nb", reduce=False),
        lambda b, d: [_r(b, 1), 2 * _r(1, d), 5 * _unit(b, d)],
    ),
    "gaussian of every element": Function(
        lambda m, s, x: fastelbo.log_prob((m, s), x, likelihood="gaussian", mask=_mask(x), reduce=False),
        lambda b, d: [_r(K, b, d), 0.5 * _r(d), _r(b, d)],
    ),
    "gaussian_kl": Function(fastelbo.gaussian_kl, lambda b, d: [_r(b, d) for _ in range(4)]),
    "gaussian_kl, free bits": Function(
        lambda mu, lv: fastelbo.gaussian_kl(mu, lv, free_bits=0.4), lambda b, d: [_r(b, d), 0.5 * _r(b, d)]
    ),
    "rsample, seed": Function(
        lambda *given: fastelbo.rsample(
            *given[:2], K, prior_mu=given[2], prior_logvar=given[3], seed=SEED, first_sample=2
        )[:4],
        lambda b, d: [_r(b, d) for _ in range(4)],
        drawn=True,
    ),
    "rsample, a prior for each dimension": Function(
        lambda mu, lv, mu_p, lv_p: fastelbo.rsample(mu, lv, K, prior_mu=mu_p, prior_logvar=lv_p, seed=SEED)[:4],
        lambda b, d: [_r(b, d), _r(b, d), _r(d), _r()],
        drawn=True,
    ),
    "rsample, eps": Function(
        lambda mu, lv, eps: fastelbo.rsample(mu, lv, K, eps=eps)[:4], lambda b, d: [_r(b, d), _r(b, d), _r(K, b, d)]
    ),
    "rsample, kept": Function(
        lambda *given: fastelbo.rsample(
            *given[:2], kept=_kept(given[0]), prior_mu=given[2], prior_logvar=given[3], seed=SEED
        )[:4],
        lambda b, d: [_r(b, d) for _ in range(4)],
        drawn=True,
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
        lambda r, x, mu, lv, mu_p, lv_p: fastelbo.elbo_parts(
            r, x, mu, lv, prior_mu=mu_p, prior_logvar=lv_p, free_bits=0.1
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
    "multi_sample_loss, a learned alpha": Function(
        lambda logits, x, ratio, alpha: fastelbo.multi_sample_loss(
            logits, x, _posterior(ratio), estimator="vr", alpha=alpha, reduction="none"
        ),
        lambda b, d: [_r(K, b, d), _unit(b, d), _r(K, b), 0.5 + _unit()],
    ),
    "bound_loss, a learned beta": Function(
        lambda log_p, ratio, beta: fastelbo.bound_loss(log_p, _posterior(ratio), estimator="ciwae", beta=beta),
        lambda b, d: [_r(K, b), _r(K, b), _unit()],
    ),
    "multi_sample_loss, miwae": Function(
        lambda logits, x, mu, lv, eps: fastelbo.multi_sample_loss(
            logits, x, fastelbo.rsample(mu, lv, 2 * K, eps=eps), estimator="miwae", groups=K
        ),
        lambda b, d: [_r(2 * K, b, d), _unit(b, d), _r(b, d), _r(b, d), _r(2 * K, b, d)],
    ),
    "mixture_log_prob": Function(fastelbo.mixture_log_prob, lambda b, d: [_r(b, d), _r(7, d), 0.5 * _r(7, d), _r(7)]),
    "mixture_log_prob, weights of rows": Function(
        fastelbo.mixture_log_prob, lambda b, d: [_r(b, d), _r(7, d), 0.5 * _r(7, d), _r(b, 7)]
    ),
    "mixture_log_prob, samples of each dimension": Function(
        lambda z, mu, lv, w: fastelbo.mixture_log_prob(z, mu, lv, w, per_dimension=True),
        lambda b, d: [_r(2, b, d), _r(3, d), 0.5 * _r(3, d), _r(b, 3)],
    ),
    "mixture_log_prob, one weight": Function(
        fastelbo.mixture_log_prob, lambda b, d: [_r(K, b, d), _r(3, d), 0.5 * _r(3, d), _r(K, 1, 1)]
    ),
    "total_correlation": Function(
        lambda z, mu, lv: fastelbo.total_correlation(z, mu, lv, 50),
        lambda b, d: [_r(K, _batch(b), d), _r(_batch(b), d), _r(_batch(b), d)],
    ),
    "total_correlation, stratified": Function(
        lambda z, mu, lv: fastelbo.total_correlation(z, mu, lv, 500_000, weights="mss"),
        lambda b, d: [_r(_batch(b), d), _r(_batch(b), d), _r(_batch(b), d)],
    ),
    "ppca_log_prob": Function(fastelbo.ppca_log_prob, lambda n, d: [_r(n, d), _r(d, 2), _r(d), _r()], roundings=2 + 2),
    "ppca_log_prob, missing": Function(
        lambda x, W, b, s: fastelbo.ppca_log_prob(x, W, b, s, observed=_mask(x) > 0),
        lambda n, d: [_r(n, d), _r(d, 2), _r(d), _r()],
        roundings=2 + 2,
    ),
    "iwae_loss, pair and mask": Function(
        lambda m, s, x, ratio: fastelbo.iwae_loss((m, s), x, ratio, likelihood="gaussian", mask=_mask(x)),
        lambda b, d: [_r(K, b, d), 0.5 * _r(K, b, d), _r(b, d), _r(K, b)],
    ),
}


def op_calls() -> dict[str, tuple]:
    """By name, (op, arguments)."""

    def r(*shape: int) -> Tensor:
        return torch.randn(shape, requires_grad=True)

    def p(*shape: int) -> Tensor:
        return torch.rand(shape).add(0.1).requires_grad_()

    def plain(*shapes: tuple[int, ...], dtype: torch.dtype = torch.float32) -> list[Tensor]:
        return [torch.randn(shape, dtype=dtype) for shape in shapes]

    wide = partial(plain, dtype=torch.float64)
    mu, seed = r(4, 5), torch.tensor([3])
    kept = torch.tensor([2, 0, 0, 1, 2, 5]), torch.tensor([3, 0, 0, 1, 3, 1])
    x, mask = torch.rand(4, 6), torch.rand(4, 6) < 0.5
    need = [True] * 5
    mixture = (mu, r(6, 5), r(6, 5))
    csr = (torch.tensor([0, 2, 2, 5]), torch.tensor([0, 4, 1, 2, 5], dtype=torch.int32), torch.rand(5))
    later, first3 = (None, r(3, 4, 5), None, None, 0, need), (0, [True] * 3 + [False] * 2)
    return {
        "rsample seed": (ops.rsample.default, (mu, r(4, 5), None, r(4, 5), 3, seed, None, None, None, 1)),
        "rsample eps": (ops.rsample.default, (mu, r(4, 5), r(5), None, None, None, r(4, 5), None, None, 0)),
        "rsample kept": (ops.rsample.default, (mu, r(4, 5), None, r(4, 5), None, seed, None, *kept, 0)),
        "normal_rows": (ops._normal_rows.default, (seed, kept[0], 5)),
        "gaussian_kl": (ops.gaussian_kl.default, (mu, r(4, 5), None, r(4, 5), torch.tensor(0.3))),
        "log_prob": (ops.log_prob.default, ([r(3, 4, 6)], x, mask, "bernoulli")),
        "log_prob pair": (ops.log_prob.default, ([r(4, 6), r(4, 6)], r(4, 6), None, "gaussian")),
        "log_prob, shared by rows": (ops.log_prob.default, ([r(3, 4, 6), r(6)], r(4, 6), None, "gaussian")),
        "log_prob, one number": (ops.log_prob.default, ([r(4, 6), r()], r(4, 6), mask, "laplace")),
        "log_prob, four tensors": (
            ops.log_prob.default,
            ([p(3, 4, 6), p(3, 4, 6), p(6), r(3, 4, 6)], x, mask, "scvi_nb_mixture"),
        ),
        "log_prob_elements, a total of rows": (
            ops.log_prob_elements.default,
            ([p(4, 6), p(), torch.randint(3, 9, (6,))], 2 * x, None, "beta_binomial"),
        ),
        "backward of log_prob, a total": (
            ops._log_prob_backward.default,
            (
                r(3, 4),
                [p(3, 4, 6), p(6), torch.randint(3, 9, (6,))],
                2 * x,
                mask,
                "beta_binomial",
                [True, True, False, False, False],
            ),
        ),
        "log_prob_elements": (ops.log_prob_elements.default, ([r(3, 4, 6), r(6)], r(4, 6), mask, "gaussian")),
        "log_prob_elements, one number": (ops.log_prob_elements.default, ([r(4, 6), r()], x, None, "laplace")),
        "backward of log_prob_elements": (
            ops._log_prob_elements_backward.default,
            (r(3, 4, 6), [r(3, 4, 6), r(6)], r(4, 6), mask, "gaussian", [True, True, False, False, True]),
        ),
        "log_mean_exp": (ops.log_mean_exp.default, (r(4, 5), 1)),
        "elbo_loss": (
            ops.elbo_loss.default,
            ([r(3, 4, 6)], x, mu, r(4, 5), None, None, mask, torch.tensor(0.5), None, "bernoulli", "mean"),
        ),
        "elbo_loss beta": (
            ops.elbo_loss.default,
            ([r(4, 6), r(6)], x, mu, r(4, 5), r(4, 5), r(), None, r(), torch.tensor(0.1), "laplace", "none"),
        ),
        "elbo_loss with gradients": (
            ops.elbo_loss.default,
            (
                [a.detach() for a in (r(4, 6), r(6))],
                x,
                mu.detach(),
                x[:, :5],
                None,
                x[0, :5],
                mask,
                None,
                None,
                "gaussian",
                "sum",
                0b10110011,
            ),
        ),
        "multi_sample_loss": (
            ops.multi_sample_loss.default,
            ([r(4, 4, 6)], x, r(4, 4), None, mask, r(), torch.tensor(0.5), 2, [1, 0, 1], "bernoulli", "sum"),
        ),
        "multi_sample_loss pair": (
            ops.multi_sample_loss.default,
            ([r(3, 4, 6), r(3, 4, 6)], x, r(3, 4), None, None, None, None, 1, [1, 0, 1], "gaussian", "none"),
        ),
        "multi_sample_loss gates": (
            ops.multi_sample_loss.default,
            ([r(3, 4, 6), r()], x, r(3, 4), r(2, 3, 4), None, None, None, 1, [0, 1, 0], "gaussian", "mean"),
        ),
        "multi_sample_loss with gradients": (
            ops.multi_sample_loss.default,
            ([x.expand(3, 4, 6), x[0]], x, x[:3, :4], None, mask, None, None, 1, [0, 1, 0], "gaussian", "sum", 0b10011),
        ),
        "minus_bound": (ops.minus_bound.default, (r(4, 3), r(2, 4, 3), None, r(), 2, [0, 1, 0])),
        "backward of log_prob": (
            ops._log_prob_backward.default,
            (r(3, 4), [r(3, 4, 6), r(6)], r(4, 6), mask, "gaussian", [True, True, False, False, False]),
        ),
        "multi_sample_weights": (ops._multi_sample_weights.default, (r(4, 3), None, r(), 2, [0, 1, 0], True)),
        "backward of gaussian_kl": (
            ops._gaussian_kl_backward.default,
            (r(4), mu, r(4, 5), r(4, 5), None, None, [True, False, True, False]),
        ),
        "backward of rsample": (
            ops._rsample_backward.default,
            (r(3, 4, 5), r(4), *[None] * 3, mu, r(4, 5), None, None, 3, seed, *[None] * 3, 0, [True] * 2 + [False] * 3),
        ),
        "backward of rsample, gates": (
            ops._rsample_backward.default,
            (*(r(3, 4, 5), r(4), r(3, 4), r(3, 4), r(2, 3, 4), mu, r(4, 5), None, r(5), 3), *later),
        ),
        "backward of rsample, kept": (
            ops._rsample_backward.default,
            (r(6, 5), *[None] * 4, mu, r(4, 5), *[None] * 3, seed, None, *kept, 0, [True] * 2 + [False] * 3),
        ),
        "backward of rsample, kept gates": (
            ops._rsample_backward.default,
            (*(r(6, 5), r(4), r(6), r(6), r(2, 6)), mu, r(4, 5), r(4, 5), None, None, seed, None, *kept, *first3),
        ),
        "backward of log_mean_exp": (ops._log_mean_exp_backward.default, (r(4), r(4, 5), 1)),
        "mixture_log_prob": (ops.mixture_log_prob.default, (r(3, 4, 5), r(6, 5), r(6, 5), r(4, 6), False)),
        "mixture_log_prob, even weights": (ops.mixture_log_prob.default, (mu, r(2, 5), r(2, 5), None, True)),
        "backward of mixture_log_prob": (
            ops._mixture_log_prob_backward.default,
            (r(4), *mixture, r(6), False, fastelbo.mixture_log_prob(*mixture), need[:4]),
        ),
        "ppca_log_prob": (ops.ppca_log_prob.default, (r(4, 6), r(6, 2), r(6), r())),
        "backward of ppca_log_prob": (
            ops._ppca_log_prob_backward.default,
            (r(4), r(4, 6), r(6, 2), r(6), r(), *wide((4, 2), (4,), (6, 2), (2, 2), (2, 2)), need[:4]),
        ),
        "ppca_factor": (ops._ppca_factor.default, plain((6, 2), ())),
        "ppca_invert": (ops._ppca_invert.default, tuple(w @ w.mT for w in wide((4, 2, 5)))),
        "ppca_project": (ops._ppca_project.default, (x, *wide((6, 2)), *plain((6,)))),
        "ppca_rest": (ops._ppca_rest.default, (x, *wide((6, 2)), *plain((6,)), *wide((4, 2), (4,)))),
        "ppca_residual": (
            ops._ppca_residual.default,
            (x, *wide((6, 2)), *plain((6,)), *wide((4, 2), (4, 2), (4,)), need[:3]),
        ),
        "ppca_residual, sums": (
            ops._ppca_residual.default,
            (x, *wide((6, 2)), *plain((6,)), *wide((4, 2), (4, 2), (4,)), [False, True, True]),
        ),
        "csr_matmul": (ops._csr_matmul.default, (*csr, *plain((6, 2)))),
        "csr_matmul_t": (ops._csr_matmul_t.default, (*csr, *wide((3, 2)), 6)),
    }


def public() -> dict[str, tuple[Callable[..., object], dict[str, object]]]:
    """Everything public that takes arguments, with good ones for those that have no default."""
    r = torch.randn
    mu, logvar, recon, x = r(B, M), r(B, M), r(K, B, D), torch.rand(B, D)
    posterior, log_w = fastelbo.rsample(mu, logvar, K), r(K, B)
    q, kept = {"mu": mu, "logvar": logvar}, fastelbo.keep_samples(log_w, 2)
    p = {"recon": recon, "x": x}
    vae = fastelbo.VAE(nn.Linear(D, 2 * M), nn.Linear(M, D), latent_shape=(M,))
    scaling = fastelbo.Scaling(torch.zeros(M), torch.ones(M))
    return {
        "rsample": (fastelbo.rsample, {**q, "num_samples": K}),
        "gaussian_kl": (fastelbo.gaussian_kl, q),
        "log_prob": (fastelbo.log_prob, p),
        "bernoulli_log_prob": (fastelbo.bernoulli_log_prob, {"logits": recon, "x": x}),
        "gaussian_log_prob": (fastelbo.gaussian_log_prob, {"mean": recon, "x": x}),
        "log_mean_exp": (fastelbo.log_mean_exp, {"log_w": log_w}),
        "elbo_loss": (fastelbo.elbo_loss, {**p, **q}),
        "elbo_parts": (fastelbo.elbo_parts, {**p, **q}),
        "iwae_loss": (fastelbo.iwae_loss, {**p, "log_ratio": log_w}),
        "iwae_parts": (fastelbo.iwae_parts, {**p, "log_ratio": log_w}),
        "multi_sample_loss": (fastelbo.multi_sample_loss, {**p, "posterior": posterior}),
        "multi_sample_parts": (fastelbo.multi_sample_parts, {**p, "posterior": posterior}),
        "bound_loss": (fastelbo.bound_loss, {"log_likelihood": log_w, "posterior": posterior}),
        "bound_parts": (fastelbo.bound_parts, {"log_likelihood": log_w, "posterior": posterior}),
        "keep_samples": (fastelbo.keep_samples, {"log_w": log_w, "keep": 2}),
        "kept_loss": (
            fastelbo.kept_loss,
            {
                "log_likelihood": r(2 * B),
                "posterior": fastelbo.rsample(mu, logvar, kept=kept, seed=3),
                "kept": kept,
                "log_w": log_w,
            },
        ),
        "estimator_weights": (fastelbo.estimator_weights, {"log_w": log_w}),
        "evaluate": (fastelbo.evaluate, {"model": vae, "x": x, "num_samples": K}),
        "Scaling": (fastelbo.Scaling, {"shift": mu[0], "scale": mu[0].exp()}),
        "Scaling.forward": (scaling.forward, {"x": mu}),
        "Scaling.inverse": (scaling.inverse, {"recon": (mu, mu), "likelihood": "gaussian"}),
        "importance_weights": (fastelbo.importance_weights, {"model": vae, "x": x, "num_samples": K}),
        "mixture_log_prob": (fastelbo.mixture_log_prob, {"z": mu, "mu": r(2, M), "logvar": r(2, M)}),
        "total_correlation": (
            fastelbo.total_correlation,
            {"z": mu, "mu": mu, "logvar": mu, "dataset_size": 10},
        ),
        "MixturePrior": (fastelbo.MixturePrior, {"components": 3, "latent": M}),
        "VampPrior": (fastelbo.VampPrior, {"encoder": vae.encoder, "pseudo_inputs": x}),
        "AggregatedPosterior": (fastelbo.AggregatedPosterior, {"mu": mu, "logvar": mu}),
        "AggregatedPosterior.log_prob": (fastelbo.AggregatedPosterior(mu, mu).log_prob, {"z": mu}),
        "AggregatedPosterior.terms": (fastelbo.AggregatedPosterior(mu, mu).terms, {}),
        "aggregated_posterior": (fastelbo.aggregated_posterior, {"model": vae, "data": x}),
        "ppca_log_prob": (fastelbo.ppca_log_prob, {"x": r(B, D), "W": r(D, 2), "b": r(D), "log_sigma2": r(())}),
        "diagnostics": (fastelbo.diagnostics, {"posterior": posterior}),
        "DiagnosticsMeter.update": (fastelbo.DiagnosticsMeter().update, {"posterior": posterior}),
        "DiagnosticsMeter.merge": (fastelbo.DiagnosticsMeter().merge, {"other": fastelbo.DiagnosticsMeter()}),
        "ELBOLoss": (fastelbo.ELBOLoss, {}),
        "ELBOLoss.forward": (fastelbo.ELBOLoss().forward, {**p, **q}),
        "IWAELoss": (fastelbo.IWAELoss, {}),
        "IWAELoss.forward": (fastelbo.IWAELoss().forward, {**p, "log_ratio": log_w}),
        "LogMeanExp.update": (fastelbo.LogMeanExp().update, {"log_w": log_w}),
        "LogMeanExp.merge": (fastelbo.LogMeanExp().merge, {"other": fastelbo.LogMeanExp()}),
        "VAE": (fastelbo.VAE, {"encoder": vae.encoder, "decoder": vae.decoder}),
        "VAE.encode": (vae.encode, {"x": x}),
        "VAE.decode": (vae.decode, {"z": mu}),
        "VAE.forward": (vae.forward, {"x": x}),
        "VAE.reconstruct": (vae.reconstruct, {"x": x}),
        "VAE.sample": (vae.sample, {"n": 2}),
        "VAE.loss": (vae.loss, {"x": x}),
        "VAE.parts": (vae.parts, {"x": x}),
        "VAELoss": (fastelbo.VAELoss, {"vae": vae}),
        "VAELoss.forward": (fastelbo.VAELoss(vae), {"x": x}),
        "Objective": (fastelbo.Objective, {"name": "miwae"}),
        "Objective.parts": (fastelbo.Objective("iwae").parts, {**p, "posterior": posterior}),
        "Objective.loss": (fastelbo.Objective("iwae").loss, {**p, "posterior": posterior}),
        "Objective.estimator": (fastelbo.Objective("iwae").estimator, {}),
        "Objective.check_keep": (fastelbo.Objective("iwae", num_samples=K).check_keep, {"keep": 2}),
        "VAE.log_marginal": (vae.log_marginal, {"x": x, "num_samples": K}),
    }
