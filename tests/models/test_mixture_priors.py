"""Priors that are mixtures, the terms of the KL, the aggregated posterior: against torch's classes and the papers."""

import copy
import math

import pytest
import torch
from torch import Tensor, nn
from torch import distributions as td
from toys import log_normal

import fastelbo
from fastelbo import VAE, MixturePrior, VampPrior
from fastelbo.data import Dataset
from fastelbo.models import evaluation

B, D, M, C, K = 6, 7, 3, 5, 4
pytestmark = pytest.mark.usefixtures("double")


def halved(latent: tuple[int, ...] = (M,)) -> nn.Module:
    """Of latents of several dimensions, an encoder whose output is halved on dim 1."""
    return nn.Sequential(nn.Linear(D, 2 * math.prod(latent)), nn.Unflatten(1, (2 * latent[0], *latent[1:])))


def of_torch(prior: nn.Module) -> td.MixtureSameFamily:
    mu, logvar, log_weights = prior.components()
    parts = td.Independent(td.Normal(mu, torch.exp(0.5 * logvar)), mu.dim() - 1)
    logits = torch.zeros(len(mu)) if log_weights is None else log_weights
    return td.MixtureSameFamily(td.Categorical(logits=logits), parts)


def mixture_prior(latent: tuple[int, ...] = (M,)) -> MixturePrior:
    prior = MixturePrior(C, latent[0] if len(latent) == 1 else latent)
    with torch.no_grad():
        prior.logvar.normal_(), prior.logits.normal_()
    return prior


def vamp_prior(latent: tuple[int, ...] = (M,)) -> VampPrior:
    return VampPrior(halved(latent), torch.rand(C, D))


every_prior = pytest.mark.parametrize("make", [mixture_prior, vamp_prior])


@every_prior
@pytest.mark.parametrize("latent", [(M,), (2, 4)])
@pytest.mark.parametrize("lead", [(B,), (K, B)])
def test_log_prob_and_its_gradients_are_torch_s(make, latent, lead):
    prior = make(latent)
    z = torch.randn(*lead, *latent, requires_grad=True)
    upstream, inputs = torch.randn(lead), [z, *prior.parameters()]
    found, expected = prior.log_prob(z), of_torch(prior).log_prob(z)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    for a, e in zip(*(torch.autograd.grad(v, inputs, upstream) for v in (found, expected)), strict=True):
        torch.testing.assert_close(a, e, rtol=1e-10, atol=1e-12)


@every_prior
def test_draws_are_those_of_the_mixture(make):
    prior, n = make(), 200_000
    z = prior.sample(n)
    assert z.shape == (n, M) and not z.requires_grad and prior.sample(0).shape == (0, M)
    expected = of_torch(prior)
    error = expected.stddev / math.sqrt(n)
    assert ((z.mean(0) - expected.mean).abs() < 5 * error).all()
    entropies = -expected.log_prob(expected.sample((n,)))
    assert abs(prior.log_prob(z).mean() + entropies.mean()) < 8 * entropies.std() / math.sqrt(n)


class Plain(nn.Module):
    """The same prior by torch's classes."""

    def __init__(self, prior: nn.Module) -> None:
        super().__init__()
        self.prior = prior

    def log_prob(self, z: Tensor) -> Tensor:
        return of_torch(self.prior).log_prob(z)


@every_prior
@pytest.mark.parametrize("objective", ["elbo", "stl", "iwae", "dreg", "rws", "vr", "ciwae", "miwae"])
def test_every_objective_of_a_vae(make, objective):
    prior = make()
    encoder = prior.encoder if isinstance(prior, VampPrior) else halved()
    fused = VAE(encoder, nn.Linear(M, D), prior=prior)
    plain = VAE(encoder, fused.decoder, prior=Plain(prior))
    x, options = torch.rand(B, D), {"num_samples": K, "seed": 1, "reduction": "none"}
    options |= {"groups": 2} if objective == "miwae" else {"alpha": 0.4} if objective == "vr" else {}
    upstream, parameters = torch.randn(B), list(fused.parameters())
    assert len(parameters) == len({id(p) for p in parameters})  # the encoder's once
    values = [model.loss(x, objective, **options) for model in (fused, plain)]
    torch.testing.assert_close(*values, rtol=1e-12, atol=1e-12)
    for a, e in zip(*(torch.autograd.grad(v, parameters, upstream) for v in values), strict=True):
        assert a.any()
        torch.testing.assert_close(a, e, rtol=1e-10, atol=1e-12)
    estimates = [model.log_marginal(x, 50, seed=2).log_prob for model in (fused, plain)]
    torch.testing.assert_close(*estimates, rtol=1e-12, atol=1e-12)
    assert fused.sample(4).shape == (4, D)


def test_a_vae_of_a_vamp_prior_is_copied_and_saved_with_one_encoder():
    encoder = halved()
    model = VAE(encoder, nn.Linear(M, D), prior=VampPrior(encoder, torch.rand(C, D)))
    again = copy.deepcopy(model)
    assert again.prior.encoder is again.encoder is not encoder
    with torch.no_grad():
        for p in again.parameters():
            p.zero_()
    again.load_state_dict(model.state_dict())
    x = torch.rand(B, D)
    assert torch.equal(again.loss(x, seed=0), model.loss(x, seed=0))


WRONG = {
    "no components": (lambda: MixturePrior(0, M), ValueError, "components must be at least 1; got 0"),
    "half a dimension": (lambda: MixturePrior(C, 1.5), TypeError, "latent must be an int"),
    "bytes": (
        lambda: VampPrior(halved(), torch.zeros(C, D, dtype=torch.uint8)),
        TypeError,
        "pseudo_inputs must be float32.*got uint8",
    ),
    "one number": (lambda: VampPrior(halved(), torch.zeros(C)), ValueError, r"pseudo_inputs must be \[C, \*event\]"),
    "another latent": (lambda: mixture_prior().log_prob(torch.zeros(B, M + 1)), ValueError, r"latent=\(3,\); got"),
    "mu": (
        lambda: fastelbo.total_correlation(torch.zeros(B, M), torch.zeros(B, 2), torch.zeros(B, M), 9),
        ValueError,
        r"mu and logvar must be \[B, M\]",
    ),
    "z": (
        lambda: fastelbo.total_correlation(torch.zeros(B, 2), torch.zeros(B, M), torch.zeros(B, M), 9),
        ValueError,
        r"z must be \[B, M\] or \[K, B, M\] with \[B, M\]=\(6, 3\) from mu; got \(6, 2\)",
    ),
    "few data": (
        lambda: fastelbo.total_correlation(*torch.zeros(3, B, M), B - 1, weights="mss"),
        ValueError,
        'dataset_size must be at least B=6, and B at least 2, for weights="mss"; got 5',
    ),
    "weights": (
        lambda: fastelbo.total_correlation(*torch.zeros(3, B, M), 9, weights="mwss"),
        ValueError,
        'weights must be one of "mws", "mss"; got',
    ),
    "points": (
        lambda: fastelbo.aggregated_posterior(VAE(halved(), nn.Linear(M, D)), torch.rand(B, D)).terms(B + 1),
        ValueError,
        "num_points must be at most N=6; got 7",
    ),
    "no data": (
        lambda: fastelbo.aggregated_posterior(VAE(halved(), nn.Linear(M, D)), torch.rand(0, D)),
        ValueError,
        r"data must be \[N, \*event\] with N of 1 or more",
    ),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_what_does_not_fit_is_refused(wrong):
    call, error, message = WRONG[wrong]
    with pytest.raises(error, match=message):
        call()


# ----------------------------------------------------------------------------------------------------------------------
# The terms of the KL.


def by_the_paper(z: Tensor, mu: Tensor, logvar: Tensor, N: int, weights: str) -> list[Tensor]:
    """Chen et al. 2018, eq. 5 and app. C, datum by datum: z [B, M]."""
    size = len(z)
    rows = []
    for i in range(size):
        log_q = log_normal(z[i, :, None], mu[..., None], logvar[..., None])  # [B, M]: of every x, of every dimension
        others = size - 1
        w = torch.full((size,), 1 / (N * size))
        if weights == "mss":
            w = torch.full((size,), 1 / others)
            w[i], w[i - 1] = 1 / N, (N - others) / (N * others)
            assert w.sum() == pytest.approx(1)
        joint = torch.logsumexp(log_q.sum(1) + w.log(), 0)
        product = torch.logsumexp(log_q + w.log()[:, None], 0).sum()
        prior = log_normal(z[i], torch.zeros(M), torch.zeros(M))
        rows.append(torch.stack([log_q[i].sum() - joint, joint - product, product - prior]))
    return list(torch.stack(rows).mean(0))


@pytest.mark.parametrize("weights", ["mws", "mss"])
@pytest.mark.parametrize("size, N", [(2, 2), (2, 9), (3, 3), (B, 1000)])
def test_the_terms_are_those_of_the_paper(weights, size, N):
    mu, logvar = (torch.randn(size, M, requires_grad=True) for _ in range(2))
    q = fastelbo.rsample(mu, logvar, K, seed=1)
    found = fastelbo.total_correlation(q.z, mu, logvar, N, weights=weights)
    each = [by_the_paper(z, mu, logvar, N, weights) for z in q.z]
    expected = [sum(terms) / K for terms in zip(*each, strict=True)]
    torch.testing.assert_close(list(found), expected, rtol=1e-12, atol=1e-12)
    averaged = -q.log_ratio.mean()
    torch.testing.assert_close(sum(found), averaged, rtol=1e-12, atol=1e-12)
    upstream = torch.randn(3)
    values = [sum(u * t for u, t in zip(upstream, terms, strict=True)) for terms in (found, expected)]
    for a, e in zip(*(torch.autograd.grad(v, (mu, logvar), retain_graph=True) for v in values), strict=True):
        torch.testing.assert_close(a, e, rtol=1e-10, atol=1e-12)
    one = fastelbo.total_correlation(q.z[0], mu, logvar, N, weights=weights)
    torch.testing.assert_close(list(one), each[0], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("weights", ["mws", "mss"])
def test_the_terms_have_derivatives_and_compile(weights):
    def terms(z: Tensor, mu: Tensor, logvar: Tensor) -> tuple[Tensor, ...]:
        return tuple(fastelbo.total_correlation(z, mu, logvar, 20, weights=weights))

    inputs = [torch.randn(3, 2, requires_grad=True) for _ in range(3)]
    assert torch.autograd.gradcheck(terms, inputs) and torch.autograd.gradgradcheck(terms, inputs)
    compiled = torch.compile(terms, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*inputs), terms(*inputs))


def test_log_weights_are_not_rounded_to_half_precision():
    given = [t.bfloat16() for t in torch.randn(3, B, M)]
    found = fastelbo.total_correlation(*given, 60_000)
    expected = fastelbo.total_correlation(*(t.float() for t in given), 60_000)
    assert all(torch.equal(a, e) and a.dtype == torch.float32 for a, e in zip(found, expected, strict=True))


# ----------------------------------------------------------------------------------------------------------------------
# The aggregated posterior.

LOGVAR = (-1.0, -0.5, -2.0)


def linear_gaussian(N: int) -> tuple[VAE, Tensor, Tensor]:
    """q(z | x) = N(A x, diag exp(LOGVAR)) of x ~ N(0, I): q(z) = N(0, A A' + diag exp(LOGVAR)), the covariance."""
    encoder = nn.Linear(D, 2 * M)
    A = torch.randn(M, D) / 2
    with torch.no_grad():
        encoder.weight.copy_(torch.cat([A, torch.zeros(M, D)]))
        encoder.bias.copy_(torch.cat([torch.zeros(M), torch.tensor(LOGVAR)]))
    x = torch.randn(N, D)
    return VAE(encoder, nn.Linear(M, D), "gaussian"), x, A @ A.T + torch.diag(torch.tensor(LOGVAR).exp())


def test_a_linear_gaussian_encoder():
    model, x, S = linear_gaussian(10_000)
    found = fastelbo.aggregated_posterior(model, x).terms(seed=1)
    log_det = torch.logdet(S)
    expected = (
        (log_det - sum(LOGVAR)) / 2,
        (torch.trace(S) - M - log_det) / 2,
        (torch.diag(S).log().sum() - log_det) / 2,
    )
    for estimate, exact in zip(found, expected, strict=True):
        assert estimate.std_error < 0.05 and abs(estimate.value - exact) < 3 * estimate.std_error


def test_log_prob_of_the_aggregate():
    model, x, _ = linear_gaussian(30)
    q = fastelbo.aggregated_posterior(model, x)
    again = fastelbo.aggregated_posterior(model, Dataset(x, dtype=torch.float64))
    assert torch.equal(q.mu, again.mu) and not q.mu.requires_grad
    z = torch.randn(K, B, M)
    each = log_normal(z[..., None, :, None], q.mu[..., None], q.logvar[..., None]) - math.log(30)  # [K, B, N, M]
    joint = torch.logsumexp(each.sum(-1) + (M - 1) * math.log(30), -1)
    torch.testing.assert_close(q.log_prob(z), joint, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(q.log_prob(z, per_dimension=True), torch.logsumexp(each, -2), rtol=1e-12, atol=1e-12)
    with pytest.raises(ValueError, match=r"z must be \[..., \*latent\] with latent=\(3,\)"):
        q.log_prob(z[..., :2])


@pytest.mark.parametrize("prior", ["none", "pair", "mixture"])
def test_mutual_information_and_marginal_kl_add_up_to_the_averaged_kl(prior):
    model, x, _ = linear_gaussian(200)
    if prior == "pair":
        model.prior = VAE(model.encoder, model.decoder, prior=(torch.ones(M), torch.full((M,), 0.3))).prior
    elif prior == "mixture":
        model.prior = mixture_prior()
    found = fastelbo.aggregated_posterior(model, x).terms(seed=3)
    kl = -model(x, seed=3).posterior.log_ratio.mean()
    assert found.mutual_information.value + found.marginal_kl.value == pytest.approx(kl.item(), rel=1e-12)
    assert fastelbo.aggregated_posterior(model, x).terms(1).marginal_kl.std_error is None


def test_evaluate_has_the_terms_of_the_aggregate(monkeypatch):
    model, x, _ = linear_gaussian(100)
    expected = fastelbo.aggregated_posterior(model, x).terms(seed=5)
    found = fastelbo.evaluate(model, x, 10, seed=5)
    assert [found.mutual_information, found.marginal_kl, found.total_correlation] == [t.value for t in expected]
    monkeypatch.setattr(evaluation, "AGGREGATED", 30)  # of every fourth datum, whatever the batches are
    monkeypatch.setattr("fastelbo.models.pieces.BATCH", 7)
    some = fastelbo.evaluate(model, x, 10, seed=5)
    expected = fastelbo.aggregated_posterior(model, x[::4]).terms(seed=5)
    assert some.mutual_information == pytest.approx(expected.mutual_information.value, rel=1e-12)
