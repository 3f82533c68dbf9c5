"""Shapes, dtypes, layouts and values that nobody thought of: hypothesis chooses them, the twin judges."""

import torch
from cases import LIKELIHOODS, draw, joined
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import DTYPES, check, compute_dtype
from torch import Tensor

import fastelbo

settings.register_profile("fastelbo", deadline=None, max_examples=60, derandomize=True, print_blob=True)
settings.load_profile("fastelbo")

sizes = st.one_of(st.integers(1, 9), st.sampled_from([15, 16, 17, 31, 33, 64, 130]))
shapes = st.builds(lambda b, event: (b, *event), st.integers(0, 5), st.lists(sizes, max_size=3).map(tuple)).filter(
    lambda s: torch.Size(s).numel() < 20_000
)
samples = st.one_of(st.none(), st.integers(1, 4))
dtypes = st.sampled_from(DTYPES)
seeds = st.integers(-(2**63), 2**63 - 1)
reductions = st.sampled_from(["mean", "sum", "none"])
layouts = st.lists(st.sampled_from(["contiguous", "permuted", "padded", "stepped"]), min_size=4, max_size=4)


def lay(t: Tensor | None, layout: str) -> Tensor | None:
    """The same values in other strides."""
    if t is None or t.dim() == 0:
        return t
    laid = t.detach()
    if layout == "permuted":
        order = list(reversed(range(t.dim())))
        laid = laid.permute(order).contiguous().permute(order)
    elif layout == "padded":
        laid = torch.cat([laid, laid], -1)[..., : t.shape[-1]]
    elif layout == "stepped":
        laid = laid.repeat_interleave(3, -1)[..., ::3]
    return laid.requires_grad_(t.requires_grad)


def make_mask(kind: str | None, shape: tuple[int, ...]) -> Tensor | None:
    if kind is None:
        return None
    keep = torch.rand(shape) < 0.6
    return {"bool": keep, "weights": keep * torch.rand(shape), "row": keep[..., :1]}[kind]


masks = st.sampled_from([None, None, "bool", "weights", "row"])


@given(st.sampled_from(LIKELIHOODS), shapes, samples, dtypes, masks, layouts, st.booleans(), seeds)
def test_log_prob(likelihood, shape, k, dtype, mask, layout, bytes_, seed):
    torch.manual_seed(seed % 2**31)
    drawn = draw(likelihood, shape, k, dtype, torch.uint8 if bytes_ else None)
    recon, x, second, third = (lay(t, kind) for t, kind in zip(drawn, layout, strict=True))

    def call(recon, x, second, third, mask):
        return fastelbo.log_prob(joined(recon, second, third), x, likelihood=likelihood[0], mask=mask)

    check(call, recon, x, second, third, make_mask(mask, shape))


@given(st.sampled_from(LIKELIHOODS), shapes, samples, dtypes, masks, layouts, reductions, st.booleans(), seeds)
def test_losses(likelihood, shape, k, dtype, mask, layout, reduction, parts, seed):
    torch.manual_seed(seed % 2**31)
    drawn = draw(likelihood, shape, k, dtype)
    recon, x, second, third = (lay(t, kind) for t, kind in zip(drawn, layout, strict=True))
    options = {"likelihood": likelihood[0], "reduction": reduction, "return_parts": parts}
    mu, logvar = (lay(torch.randn(shape[0], 2, 5, dtype=dtype).requires_grad_(), layout[3]) for _ in range(2))

    def elbo(recon, x, second, third, mask, mu, logvar):
        given = joined(recon, second, third)
        return fastelbo.elbo_loss(given, x, mu, logvar, mask=mask, beta=0.7, free_bits=0.1 * parts, **options)

    def iwae(recon, x, second, third, mask, log_ratio):
        return fastelbo.iwae_loss(joined(recon, second, third), x, log_ratio, mask=mask, **options)

    check(elbo, recon, x, second, third, make_mask(mask, shape), mu, logvar)
    if k is not None:
        log_ratio = lay(torch.randn(k, shape[0], dtype=dtype).requires_grad_(), layout[3])
        check(iwae, recon, x, second, third, make_mask(mask, shape), log_ratio)


@given(shapes, samples, dtypes, layouts, st.booleans(), st.booleans(), seeds, st.integers(0, 2**20))
def test_rsample(shape, k, dtype, layout, with_mu, with_logvar, seed, first):
    torch.manual_seed(seed % 2**31)
    present = (True, True, with_mu, with_logvar)
    inputs = [
        lay(torch.randn(shape, dtype=dtype).requires_grad_(), kind) if p else None
        for p, kind in zip(present, layout, strict=True)
    ]
    zero = torch.zeros(shape)
    eps = fastelbo.rsample(zero, zero, k, seed=seed, first_sample=first).z.to(compute_dtype(dtype))

    def seeded(mu, logvar, prior_mu, prior_logvar, _):
        prior = {"prior_mu": prior_mu, "prior_logvar": prior_logvar}
        return fastelbo.rsample(mu, logvar, k, **prior, seed=seed, first_sample=first)[:3]

    def given_noise(mu, logvar, prior_mu, prior_logvar, eps):
        return fastelbo.rsample(mu, logvar, k, prior_mu=prior_mu, prior_logvar=prior_logvar, eps=eps)[:3]

    check(seeded, *inputs, eps, twin=given_noise)
    check(fastelbo.gaussian_kl, *inputs)


finite = st.floats(-1e4, 1e4, width=32)


@given(st.lists(finite, min_size=1, max_size=40), st.floats(0, 1, width=32))
def test_bernoulli_of_any_logits(logits, x):
    recon = torch.tensor(logits, dtype=torch.float32, requires_grad=True)
    data = torch.full((len(logits),), x)
    check(fastelbo.bernoulli_log_prob, recon, data)
    assert (fastelbo.bernoulli_log_prob(recon, data) <= 0).all()


@given(st.lists(st.tuples(finite, st.floats(-60, 60, width=32)), min_size=1, max_size=40))
def test_kl_is_never_negative(pairs):
    mu, logvar = torch.tensor(pairs, dtype=torch.float32).T.requires_grad_()
    assert (fastelbo.gaussian_kl(mu, logvar) >= 0).all()
    check(fastelbo.gaussian_kl, mu.detach().requires_grad_(), logvar.detach().requires_grad_())


weights = st.one_of(finite, st.just(float("-inf")))


@given(st.integers(1, 40).flatmap(lambda n: st.lists(weights, min_size=n, max_size=n)), finite)
def test_log_mean_exp_lies_between_mean_and_maximum(weights, shift):
    log_w = torch.tensor(weights, dtype=torch.float64, requires_grad=True)
    value = fastelbo.log_mean_exp(log_w)
    check(fastelbo.log_mean_exp, log_w)
    assert value <= log_w.max() + 1e-9
    assert value >= log_w.mean() - 1e-9 * log_w.abs().max().clamp(max=1e4)
    torch.testing.assert_close(fastelbo.log_mean_exp(log_w + shift), value + shift, rtol=1e-12, atol=1e-10)
