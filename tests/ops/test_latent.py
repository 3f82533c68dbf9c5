"""gaussian_kl and rsample: values and gradients, priors, free bits, noise of one's own or from a seed."""

import math
from collections.abc import Sequence
from contextlib import nullcontext
from itertools import combinations

import mpmath
import paper
import pytest
import torch
import torch.distributions as td
from oracle import DTYPES, FLOOR, HALF_TYPES, check, compute_dtype, gradients, tensors_of
from torch import Tensor
from toys import log_normal

import fastelbo
from fastelbo import reference

every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
PRIORS = {"standard": (False, False), "mean": (True, False), "variance": (False, True), "both": (True, True)}
every_path = pytest.mark.parametrize("path", [nullcontext, fastelbo.reference_mode], ids=["op", "twin"])
every_prior = pytest.mark.parametrize("prior", PRIORS)


def latent(shape: tuple[int, ...], dtype: torch.dtype = torch.float32, prior: str = "standard") -> list[Tensor | None]:
    """mu, logvar, prior_mu, prior_logvar, all requiring a gradient."""
    present = (True, True, *PRIORS[prior])
    return [torch.randn(shape, dtype=torch.float64).to(dtype).requires_grad_() if p else None for p in present]


def sample(samples: int | None, seed: int | None = None, first: int = 0, outputs: tuple[int, ...] = (0, 1, 2)):
    """(mu, logvar, prior_mu, prior_logvar, eps) -> the chosen ones of z, kl, log_ratio, log_q."""

    def call(mu, logvar, prior_mu, prior_logvar, eps):
        prior = {"prior_mu": prior_mu, "prior_logvar": prior_logvar}
        noise = {"eps": eps} if seed is None else {"seed": seed, "first_sample": first}
        result = fastelbo.rsample(mu, logvar, samples, **prior, **noise)
        return [result[i] for i in outputs]

    return call


def drawn(seed: int, samples: int | None, shape: tuple[int, ...], first: int = 0) -> Tensor:
    """The noise itself: samples of N(0, I), exactly."""
    zero = torch.zeros(shape)
    return fastelbo.rsample(zero, zero, samples, seed=seed, first_sample=first).z


# ----------------------------------------------------------------------------------------------------------------------
# KL


@every_dtype
@every_prior
def test_kl(dtype, prior):
    for shape in ((6, 20), (4, 2, 3, 5), (9,), (1, 1), (0, 4), (3, 0), (2, 700), (600, 3)):
        check(fastelbo.gaussian_kl, *latent(shape, dtype, prior), label=str(shape))


@every_prior
def test_kl_tails(prior):
    for size in (*range(1, 71), *range(510, 515), 1025, 4096):
        check(fastelbo.gaussian_kl, *latent((3, size), torch.float32, prior), label=f"M={size}")


@every_dtype
@every_prior
@pytest.mark.parametrize("free_bits", [0.05, 0.5, 100.0])
def test_free_bits(dtype, prior, free_bits):
    for shape in ((7, 12), (3, 2, 4), (5, 600), (6,)):
        inputs = latent(shape, dtype, prior)
        with torch.no_grad():  # from dimensions that say nothing to busy ones
            inputs[0].mul_(torch.linspace(0, 2, inputs[0][0].numel()).reshape(inputs[0][0].shape).to(dtype))
            inputs[1].mul_(0.3)
        check(lambda *given: fastelbo.gaussian_kl(*given, free_bits=free_bits), *inputs, label=str(shape))


def test_free_bits_formula():
    """The mean over the batch is sum_j max(lambda, mean_b KL_bj), the floor in each datum (Kingma et al. 2016)."""
    mu, logvar = torch.randn(2, 8, 10, dtype=torch.float64) * torch.linspace(0, 1.5, 10)
    per_dimension = td.kl_divergence(td.Normal(mu, torch.exp(logvar / 2)), td.Normal(0.0, 1.0)).mean(0)
    result = fastelbo.gaussian_kl(mu, logvar, free_bits=0.4)
    torch.testing.assert_close(result.mean(), per_dimension.clamp(min=0.4).sum())
    assert 0 < (per_dimension < 0.4).sum() < 10


def test_kl_agrees_with_torch_distributions():
    mu, logvar, prior_mu, prior_logvar = torch.randn(4, 5, 7, dtype=torch.float64)
    q, p = td.Normal(mu, torch.exp(logvar / 2)), td.Normal(prior_mu, torch.exp(prior_logvar / 2))
    expected = td.kl_divergence(q, p).sum(1)
    torch.testing.assert_close(fastelbo.gaussian_kl(mu, logvar, prior_mu, prior_logvar), expected)


def test_prior_broadcasts():
    mu, logvar, *_ = latent((4, 3, 5))
    for shape in ((5,), (3, 1), (), (1, 3, 5), (4, 1, 1)):
        prior_mu, prior_logvar = torch.randn(2, *shape).unbind()
        inputs = mu, logvar, prior_mu.requires_grad_(), prior_logvar.requires_grad_()
        check(fastelbo.gaussian_kl, *inputs, label=str(shape))
        check(sample(2), *inputs, torch.randn(2, 4, 3, 5), label=str(shape))


def _exact_kl(logvar: float) -> float:
    """1/2 [exp(t) - 1 - t] of the number as it is, to 60 digits."""
    with mpmath.workdps(60):
        t = mpmath.mpf(logvar)
        return float((mpmath.exp(t) - 1 - t) / 2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_kl_is_free_of_cancellation_and_never_negative(dtype):
    """The textbook form is wrong by 100 % at logvar = 1e-4 in float32."""
    sizes = [10.0**e for e in range(-12, 2)] + [1e-4, 1e-8, 0.3, 0.5, 0.999999, 1.0, 1.000001, 1.5, 3.0, 20.0, 80.0]
    logvar = torch.tensor([s * t for t in sizes for s in (1, -1)], dtype=dtype)[:, None]
    mu = torch.zeros_like(logvar)
    expected = torch.tensor([_exact_kl(t) for t in logvar.flatten().tolist()], dtype=torch.float64)
    ulp = torch.finfo(dtype).eps
    for kl in (fastelbo.gaussian_kl(mu, logvar), fastelbo.rsample(mu, logvar, 1, seed=0).kl):
        assert (kl >= 0).all()
        torch.testing.assert_close(kl.double(), expected, rtol=FLOOR * ulp, atol=torch.finfo(dtype).tiny)
    # a prior far away, and a posterior a hair from it
    prior = torch.full_like(logvar, 3.0)
    near = prior + logvar * 1e-3
    steps = (near.double() - prior.double()).flatten().tolist()
    expected = torch.tensor([_exact_kl(t) for t in steps], dtype=torch.float64)
    kl = fastelbo.gaussian_kl(mu, near, None, prior)
    assert (kl >= 0).all()
    torch.testing.assert_close(kl.double(), expected, rtol=FLOOR * ulp, atol=torch.finfo(dtype).tiny)


# logvar of both signs, from where exp(t) - 1 - t cancels to where it does not; the twin's series ends at 1
SIZES = [*(10.0**e for e in range(-8, 2)), 3e-6, 1e-3 / 3, 0.3, 0.5, 0.9, 0.999999, 1.0, 1.000001, 1.5, 3.0, 20.0, 30.0]


def _exact(dtype: torch.dtype) -> list[Tensor]:
    """logvar [N, 1] in the dtype, and at the numbers as they are the KL's value, first and second derivative [N]."""
    logvar = torch.tensor([s * t for t in SIZES for s in (1, -1)], dtype=dtype)
    with mpmath.workdps(60):
        ts = [mpmath.mpf(t) for t in logvar.tolist()]
        exact = [[mpmath.exp(t) - 1 - t for t in ts], [mpmath.expm1(t) for t in ts], [mpmath.exp(t) for t in ts]]
        return [logvar[:, None], *(torch.tensor([float(v / 2) for v in row], dtype=torch.float64) for row in exact)]


def _kl_of(logvar: Tensor) -> Tensor:
    return fastelbo.gaussian_kl(torch.zeros_like(logvar), logvar)


def _by_autograd(logvar: Tensor) -> list[Tensor]:
    leaf = logvar.clone().requires_grad_()
    kl = _kl_of(leaf)
    (first,) = torch.autograd.grad(kl.sum(), leaf, create_graph=True)
    return [kl, first, *torch.autograd.grad(first.sum(), leaf)]


def _by_reference(logvar: Tensor) -> list[Tensor]:
    with fastelbo.reference_mode():
        return _by_autograd(logvar)


def _by_torch_func(logvar: Tensor) -> list[Tensor]:
    def kl(t: Tensor) -> Tensor:
        return _kl_of(t[None])[0]

    def value_too(t: Tensor) -> tuple[Tensor, Tensor]:
        return (value := kl(t)), value

    first, value = torch.func.vmap(torch.func.grad(value_too, has_aux=True))(logvar)
    return [value, first, torch.func.vmap(torch.func.hessian(kl))(logvar)]


def _by_forward_mode(logvar: Tensor) -> list[Tensor]:
    ones = torch.ones_like(logvar)
    value, first = torch.func.jvp(_kl_of, (logvar,), (ones,))
    return [value, first, torch.func.jvp(lambda t: torch.func.jvp(_kl_of, (t,), (ones,))[1], (logvar,), (ones,))[1]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("way", [_by_autograd, _by_reference, _by_torch_func, _by_forward_mode])
def test_kl_derivatives_are_free_of_cancellation(way, dtype):
    """Whichever way PyTorch is asked: values, first and second derivatives have every digit of their type."""
    logvar, *expected = _exact(dtype)
    actual = [t.detach().flatten() for t in way(logvar)]
    assert (actual[0] >= 0).all()
    for what, a, e in zip(("value", "first derivative", "second derivative"), actual, expected, strict=True):
        assert a.dtype == dtype
        torch.testing.assert_close(
            a.double(), e, rtol=FLOOR * torch.finfo(dtype).eps, atol=0, msg=lambda m, what=what: f"{what}: {m}"
        )


@every_dtype
def test_kl_extremes(dtype):
    inf, nan = float("inf"), float("nan")
    mu = torch.tensor([0.0, inf, nan, 0.0, 0.0, 100.0, -60000.0], dtype=dtype)
    logvar = torch.tensor([nan, 0.0, 0.0, inf, -inf, -60000.0, 80.0], dtype=dtype)
    for kl in (fastelbo.gaussian_kl(mu, logvar), reference.gaussian_kl(mu, logvar)):
        assert kl[[0, 2]].isnan().all() and kl[[1, 4]].isposinf().all() and not kl[3].isfinite()
    check(fastelbo.gaussian_kl, mu[5:].requires_grad_(), logvar[5:].requires_grad_())


# ----------------------------------------------------------------------------------------------------------------------
# Samples


@every_dtype
@every_prior
@pytest.mark.parametrize("samples", [None, 1, 5])
def test_rsample_with_noise_of_ones_own(dtype, prior, samples):
    for shape in ((6, 20), (4, 2, 3, 5), (9,), (1, 1), (0, 4), (3, 0), (2, 700), (300, 3)):
        whole = shape if samples is None else (samples, *shape)
        eps = torch.randn(whole, dtype=torch.float64).to(dtype).requires_grad_()
        check(sample(samples), *latent(shape, dtype, prior), eps, label=str(shape))


@every_dtype
@every_prior
@pytest.mark.parametrize("samples", [None, 1, 70])
def test_rsample_from_a_seed(dtype, prior, samples):
    """The result is that of the noise which the seed stands for; the backward draws the same noise again."""
    for shape in ((6, 5), (3, 2, 7), (2, 700 if samples != 70 else 70)):
        eps = drawn(5, samples, shape, first=3).to(compute_dtype(dtype))
        seeded, given = sample(samples, seed=5, first=3), sample(samples)
        check(seeded, *latent(shape, dtype, prior), eps, twin=given, label=str(shape))


def test_rsample_tails():
    for size in (*range(1, 71), *range(510, 515), 1025):
        inputs = latent((3, size), torch.float32, "both")
        check(sample(2, seed=7), *inputs, drawn(7, 2, (3, size)), twin=sample(2), label=f"M={size}")


def test_rsample_is_plain_pytorch_on_the_same_noise():
    mu, logvar, prior_mu, prior_logvar = torch.randn(4, 5, 7, dtype=torch.float64)
    eps = torch.randn(3, 5, 7, dtype=torch.float64)
    posterior = fastelbo.rsample(mu, logvar, 3, prior_mu=prior_mu, prior_logvar=prior_logvar, eps=eps)
    q, p = td.Normal(mu, torch.exp(logvar / 2)), td.Normal(prior_mu, torch.exp(prior_logvar / 2))
    z = mu + torch.exp(logvar / 2) * eps
    torch.testing.assert_close(posterior.z, z)
    torch.testing.assert_close(posterior.log_ratio, (p.log_prob(z) - q.log_prob(z)).sum(-1))
    torch.testing.assert_close(posterior.kl, td.kl_divergence(q, p).sum(-1))
    assert posterior.mu is mu and posterior.logvar is logvar
    assert posterior.prior[0] is prior_mu and posterior.prior[1] is prior_logvar
    torch.testing.assert_close(posterior.log_q, q.log_prob(z).sum(-1))


@every_prior
@pytest.mark.parametrize("from_seed", [True, False], ids=["seed", "eps"])
def test_backward_of_every_subset_of_the_results(prior, from_seed):
    for count in (1, 2, 3, 4):
        for outputs in combinations(range(4), count):
            inputs = latent((4, 6), torch.float32, prior)
            eps = drawn(11, 3, (4, 6))
            if not from_seed:
                eps = torch.randn(3, 4, 6, requires_grad=True)
            call = sample(3, seed=11 if from_seed else None, outputs=outputs)
            check(call, *inputs, eps, twin=sample(3, outputs=outputs), label=f"outputs {outputs}")


class _Scaled(torch.autograd.Function):
    """The identity, whose gradient is multiplied by a factor."""

    @staticmethod
    def forward(ctx, t, factor):
        ctx.save_for_backward(factor)
        return t.clone()

    @staticmethod
    def backward(ctx, grad):
        return grad * ctx.saved_tensors[0], None


def plain(q: Sequence[Tensor], p: Sequence[Tensor], eps: Tensor, gates: Tensor | None = None) -> list[Tensor]:
    """z, log_ratio and log_q [...] of q, p and eps [..., M], as a textbook has them.

    With gates, the path part of the gradient (by z) times 1 + gates[0], the score part (at fixed z) times 1 + gates[1].
    """
    z = q[0] + torch.exp(0.5 * q[1]) * eps
    if gates is None:
        log_q = log_normal(z, *q)
        return [z, log_normal(z, *p) - log_q, log_q]
    z = _Scaled.apply(z, 1 + gates[0].unsqueeze(-1))
    at_z = log_normal(z.detach(), *q)
    log_q = log_normal(z, *(t.detach() for t in q)) + _Scaled.apply(at_z - at_z.detach(), 1 + gates[1])
    return [z, log_normal(z, *p) - log_q, log_q]


KEPT = fastelbo.Kept(torch.tensor([2, 0, 1, 2, 0, 1]), torch.tensor([3, 0, 3, 1, 0, 3]), torch.ones(6))


@every_path
@every_prior
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("way", ["one", "samples", "kept", "batch_dims"])
@pytest.mark.usefixtures("double")
def test_gradients_of_the_densities(path, way, gated, prior):
    """Of z, log_ratio and log_q together and one by one, as the factors of the estimators steer them."""
    K, B, M = 3, 4, 5
    lead = (K, B) if way == "batch_dims" else (B,)
    mu, logvar, *given = latent((*lead, M), torch.float64, prior)
    priors = dict(zip(("prior_mu", "prior_logvar"), given, strict=True))
    eps = torch.randn((K, B, M) if way in ("samples", "batch_dims") else (B, M), requires_grad=True)
    options = {
        "one": {"eps": eps},
        "samples": {"num_samples": K, "eps": eps},
        "kept": {"kept": KEPT, "seed": 3},
        "batch_dims": {"batch_dims": 2, "eps": eps},
    }[way]
    with path():
        found = fastelbo.rsample(mu, logvar, **options, **priors)
        seeded = drawn(3, K, (B, M))[KEPT.sample, KEPT.datum]
    inputs = [t for t in (mu, logvar, *given) if t is not None]
    if way != "kept":
        inputs.append(eps)
    else:
        eps = seeded
    four = [torch.zeros(*lead, M) if t is None else t for t in (mu, logvar, *given)]
    mu, logvar, *p = [t[KEPT.datum] for t in four] if way == "kept" else four
    shape = found.log_q.shape
    assert (found.gates is None) == (way == "one")
    factors = torch.randn(2, *shape) if gated and way != "one" else None
    expected = plain((mu, logvar), p, eps, factors)
    actual = [found.z, found.log_ratio, found.log_q]
    torch.testing.assert_close(actual, expected, rtol=1e-11, atol=1e-12)
    for chosen in ((0, 1, 2), (1, 2), (0,), (1,), (2,)):
        upstream = [torch.randn_like(expected[i]) for i in chosen]
        roots, ups = [actual[i] for i in chosen], upstream
        if factors is not None:
            roots, ups = [*roots, found.gates], [*upstream, factors]
        nothing = {"retain_graph": True, "allow_unused": True, "materialize_grads": True}
        ours = torch.autograd.grad(roots, inputs, ups, **nothing)
        theirs = torch.autograd.grad([expected[i] for i in chosen], inputs, upstream, **nothing)
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-11, msg=lambda m, c=chosen: f"{c}: {m}")


@every_path
@pytest.mark.parametrize("name", ["stl", "dreg", "rws"])
@pytest.mark.parametrize("batch_dims", [1, 2])
@pytest.mark.usefixtures("double")
def test_estimators_of_a_log_ratio_built_from_log_q(path, name, batch_dims):
    """What `Posterior.under` makes of log p(z) = -b |z|^4, in both losses; b gets the gradient of a decoder."""
    K, B, M = 6, 4, 3
    mu, logvar, b = (torch.randn(s, requires_grad=True) for s in ((B, M), (B, M), ()))
    x, eps = torch.rand(B, M), torch.randn(K, B, M)
    log_prior = lambda z: -b * z.pow(4).sum(-1)  # noqa: E731
    with path():
        if batch_dims == 1:
            q = fastelbo.rsample(mu, logvar, K, eps=eps)
        else:
            q = fastelbo.rsample(mu.expand(K, B, M), logvar.expand(K, B, M), eps=eps, batch_dims=2)
        under = q.under(log_prior(q.z))
        losses = [
            fastelbo.multi_sample_loss(q.z, x, under, estimator=name, reduction="none"),
            fastelbo.bound_loss(fastelbo.log_prob(q.z, x), under, estimator=name, reduction="none"),
        ]
    z = mu + torch.exp(0.5 * logvar) * eps

    def log_joint(z: Tensor) -> Tensor:
        return log_prior(z) + fastelbo.log_prob(z, x)

    bound, for_encoder, for_decoder = paper.ESTIMATORS[name](paper.Setting(log_joint, (mu, logvar), z))
    upstream = torch.randn(B)
    expected = [
        *torch.autograd.grad(for_encoder, (mu, logvar), upstream, retain_graph=True),
        *torch.autograd.grad(for_decoder, b, upstream, retain_graph=True),
    ]
    for loss in losses:
        torch.testing.assert_close(-loss, bound, rtol=1e-11, atol=1e-12)
        ours = torch.autograd.grad(-loss, (mu, logvar, b), upstream, retain_graph=True)
        torch.testing.assert_close(list(ours), expected, rtol=1e-10, atol=1e-12)


PRIOR_SHAPES = [(5,), (), (4, 1), (1, 5), (4, 5), (1,)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("shapes", [*zip(PRIOR_SHAPES, PRIOR_SHAPES, strict=True), ((), (4, 1)), ((1, 5), ())], ids=str)
@pytest.mark.parametrize("way", ["rsample", "gaussian_kl", "free_bits", "elbo_loss", "elbo_loss none", "kept"])
def test_gradients_of_a_prior_have_its_shape(way, shapes, dtype):
    mu, logvar, *_ = latent((4, 5), dtype)
    priors = [torch.randn(shape, dtype=dtype, requires_grad=True) for shape in shapes]
    wide = [t.detach().double().requires_grad_() for t in (mu, logvar, *priors)]
    q, p = wide[:2], [t.expand(4, 5) for t in wide[2:]]
    options = dict(zip(("prior_mu", "prior_logvar"), priors, strict=True))
    terms = td.kl_divergence(*(td.Normal(m, torch.exp(v / 2)) for m, v in (q, p)))
    if way in ("rsample", "kept"):
        kept = {"num_samples": 3} if way == "rsample" else {"kept": KEPT}
        ours = fastelbo.rsample(mu, logvar, seed=3, **kept, **options)[:4]
        eps = drawn(3, 3, (4, 5)).double()
        rows = (slice(None), slice(None)) if way == "rsample" else (KEPT.sample, KEPT.datum)
        z, log_ratio, log_q = (t[rows] for t in plain(q, p, eps))
        theirs = [z, terms.sum(1), log_ratio, log_q]
    elif way in ("gaussian_kl", "free_bits"):
        floor = 0.0 if way == "gaussian_kl" else terms.mean(0).median().item() + 0.01
        ours = [fastelbo.gaussian_kl(mu, logvar, *priors, free_bits=floor)]
        theirs = [torch.where(terms.mean(0) < floor, floor, terms).sum(1)]
    else:
        x = torch.rand(4, 6, dtype=dtype)
        reduction = "none" if way.endswith("none") else "mean"
        ours = [fastelbo.elbo_loss(x, x, mu, logvar, **options, beta=0.7, reduction=reduction)]
        log_p = fastelbo.log_prob(x.double(), x.double())
        loss = 0.7 * terms.sum(1) - log_p
        theirs = [loss if reduction == "none" else loss.mean()]
    upstream = [torch.randn_like(t) for t in theirs]
    found = torch.autograd.grad(ours, (mu, logvar, *priors), [u.to(dtype) for u in upstream])
    exact = torch.autograd.grad(theirs, wide, upstream)
    rtol, atol = (1e-4, 1e-4) if dtype == torch.float32 else (1e-10, 1e-11)
    for a, e in zip([*ours, *found], [*theirs, *exact], strict=True):
        assert a.shape == e.shape and a.dtype == dtype
        torch.testing.assert_close(a.double(), e, rtol=rtol, atol=atol)


# ----------------------------------------------------------------------------------------------------------------------
# Seeds


@pytest.mark.parametrize("seed", [0, 1, -1, 2**63 - 1, -(2**63), 0x0123456789ABCDEF])
def test_noise_is_the_documented_function_of_seed_and_index(seed):
    for samples, shape, first in (
        (None, (5, 7), 0),
        (40, (9, 13), 0),
        (3, (2, 3, 5), 2**33 + 1),
        (2, (1, 8), 2**31 - 1),
    ):
        whole = shape if samples is None else (samples, *shape)
        count = torch.Size(shape).numel()
        expected = reference.normal(torch.tensor([seed]), whole, first * count)
        noise = drawn(seed, samples, shape, first).double()
        # a few float32 ulp of the radius, which is that of the largest noise
        torch.testing.assert_close(noise, expected, rtol=8 * 2.0**-23, atol=8 * 2.0**-23)


@every_dtype
def test_chunks_are_parts_of_the_whole_to_the_bit(dtype):
    mu, logvar, prior_mu, prior_logvar = latent((5, 7), dtype, "both")
    prior = {"prior_mu": prior_mu, "prior_logvar": prior_logvar}
    whole = fastelbo.rsample(mu, logvar, 150, **prior, seed=9)
    for first, last in ((0, 1), (1, 64), (63, 65), (64, 150), (149, 150)):
        chunk = fastelbo.rsample(mu, logvar, last - first, **prior, seed=9, first_sample=first)
        assert torch.equal(chunk.z, whole.z[first:last])
        assert torch.equal(chunk.log_ratio, whole.log_ratio[first:last])
        assert torch.equal(chunk.kl, whole.kl)


def test_one_sample_with_and_without_its_dimension():
    mu, logvar, *_ = latent((5, 7))
    without, with_one = fastelbo.rsample(mu, logvar, seed=2), fastelbo.rsample(mu, logvar, 1, seed=2)
    assert torch.equal(without.z, with_one.z[0]) and torch.equal(without.log_ratio, with_one.log_ratio[0])
    assert torch.equal(without.kl, with_one.kl)


def test_seed_may_be_a_tensor_of_any_one_element_shape():
    mu, logvar, *_ = latent((5, 7))
    expected = fastelbo.rsample(mu, logvar, 3, seed=123).z
    for seed in (torch.tensor(123), torch.tensor([123]), torch.tensor([[123]])):
        assert torch.equal(fastelbo.rsample(mu, logvar, 3, seed=seed).z, expected)


def test_same_noise_for_every_dtype():
    noise = drawn(4, 3, (5, 7))
    for dtype in DTYPES:
        zero = torch.zeros(5, 7, dtype=dtype)
        assert torch.equal(fastelbo.rsample(zero, zero, 3, seed=4).z, noise.to(dtype))


@pytest.mark.parametrize("dtype", [torch.float32, *HALF_TYPES], ids=str)
def test_noise_is_not_saved(dtype):
    """What is kept for the backward: mu, logvar, the prior and 8 bytes."""
    inputs = latent((20, 30), dtype, "both")
    sizes: list[int] = []

    def pack(t: Tensor) -> Tensor:
        sizes.append(t.numel() * t.element_size())
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        outputs = tensors_of(sample(100, seed=1)(*inputs, None))
    assert sum(sizes) <= 8 + sum(t.numel() * t.element_size() for t in inputs)
    assert all(g.isfinite().all() for g in gradients(outputs, inputs, [torch.ones_like(o) for o in outputs]))


def test_gradient_of_the_prior_logvar_overflows_no_sooner_than_the_kl():
    mu = torch.full((1, 1), 1.3 * math.sqrt(torch.finfo(torch.float32).max))
    prior_logvar = torch.zeros(1, 1, requires_grad=True)
    kl = fastelbo.gaussian_kl(mu, torch.zeros(1, 1), torch.zeros(1, 1), prior_logvar)
    (grad,) = torch.autograd.grad(kl, prior_logvar)
    half = 0.5 * mu.double().square().item()
    assert kl.item() == pytest.approx(half, rel=1e-6) and grad.item() == pytest.approx(-half, rel=1e-6)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"grad_z": torch.zeros(3, 4, 3)}, "grad_z must have the shape"),
        ({"grad_z": torch.zeros(3, 4, 2, dtype=torch.float64)}, "grad_z is float64"),
        ({"grad_kl": torch.zeros(3)}, "grad_kl must have the shape"),
        ({"grad_log_ratio": torch.zeros(4, 3)}, "grad_log_ratio must have the shape"),
        ({"grad_log_ratio": torch.zeros(3, 4).half()}, "grad_log_ratio must be float32"),
        ({"grad_log_q": torch.zeros(4, 3)}, "grad_log_q must have the shape"),
        ({"grad_gates": torch.zeros(2, 4, 3)}, "grad_gates must have the shape"),
        ({"logvar": torch.zeros(4, 3)}, "logvar must have the shape"),
        ({"seed": None}, "either seed or eps"),
    ],
    ids=lambda v: v if isinstance(v, str) else next(iter(v)),
)
def test_rsample_backward_refuses(change, message):
    arguments = {
        "grad_z": torch.zeros(3, 4, 2),
        "grad_kl": None,
        "grad_log_ratio": None,
        "grad_log_q": None,
        "grad_gates": None,
        "mu": torch.zeros(4, 2),
        "logvar": torch.zeros(4, 2),
        "num_samples": 3,
        "prior_mu": None,
        "prior_logvar": None,
        "seed": torch.zeros(1, dtype=torch.int64),
        "eps": None,
        "sample": None,
        "datum": None,
        "first_sample": 0,
        "needs": [True, True, False, False, False],
    }
    with pytest.raises((ValueError, TypeError), match=message):
        torch.ops.fastelbo._rsample_backward(**(arguments | change))


@pytest.mark.parametrize("grad", [torch.zeros(3), torch.zeros(4, dtype=torch.float64), torch.zeros(4).half()], ids=str)
def test_backwards_of_kl_and_log_mean_exp_refuse_a_gradient_of_another_shape_or_type(grad):
    t = torch.zeros(4, 2)
    with pytest.raises((ValueError, TypeError), match="grad must"):
        torch.ops.fastelbo._gaussian_kl_backward(grad, t, t, None, None, None, [True, True, False, False])
    with pytest.raises((ValueError, TypeError), match="grad must"):
        torch.ops.fastelbo._log_mean_exp_backward(grad, t, 1)
