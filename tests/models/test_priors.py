"""Priors of which only the density is known: values and gradients against the formulas in plain PyTorch, in float64."""

import copy
import math
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from toys import log_normal

import fastelbo
from fastelbo import VAE, Objective
from fastelbo.models.kept_samples import kept_parts

B, D, M, C, K = 5, 6, 3, 4, 7
pytestmark = pytest.mark.usefixtures("double")


class Mixture(nn.Module):
    """A mixture of four Gaussians; with a condition, its means move by a linear map of it."""

    def __init__(self, conditional: bool = False) -> None:
        super().__init__()
        self.mu, self.logvar = nn.Parameter(0.5 * torch.randn(4, M)), nn.Parameter(0.3 * torch.randn(4, M))
        self.logits = nn.Parameter(torch.randn(4))
        self.shift = nn.Linear(C, M) if conditional else None

    def moved(self, z: Tensor, condition: Tensor | None) -> Tensor:
        return z if condition is None else z - 0.3 * self.shift(condition)

    def log_prob(self, z: Tensor, condition: Tensor | None = None) -> Tensor:
        each = log_normal(self.moved(z, condition).unsqueeze(-2), self.mu, self.logvar)
        return torch.logsumexp(each + F.log_softmax(self.logits, 0), -1)

    def sample(self, n: int, condition: Tensor | None = None) -> Tensor:
        which = torch.distributions.Categorical(logits=self.logits).sample((n,))
        z = self.mu[which] + torch.exp(0.5 * self.logvar[which]) * torch.randn(n, M)
        return z if condition is None else z + 0.3 * self.shift(condition)


class Joined(nn.Module):
    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(inputs, 8), nn.Tanh(), nn.Linear(8, outputs))

    def forward(self, *inputs: Tensor) -> Tensor:
        return self.body(torch.cat(inputs, -1))


def setting(conditional: bool, **options: object) -> tuple[VAE, Tensor, Tensor | None]:
    torch.manual_seed(0)
    extra = C if conditional else 0
    model = VAE(Joined(D + extra, 2 * M), Joined(M + extra, D), prior=Mixture(conditional), **options)
    return model, torch.rand(B, D), torch.randn(B, C) if conditional else None


def by_hand(model: VAE, x: Tensor, c: Tensor | None, eps: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """log p(x | z), log p(z), log q(z | x) [K, B], and log q with constant parameters."""
    given = () if c is None else (c,)
    mu, logvar = model.encoder(x, *given).chunk(2, -1)
    z = mu + torch.exp(0.5 * logvar) * eps
    logits = model.decoder(z, *(t.expand(len(eps), *t.shape) for t in given))
    log_p = -F.binary_cross_entropy_with_logits(logits, x.expand_as(logits), reduction="none").sum(-1)
    return (
        log_p,
        model.prior.log_prob(z, *given),
        log_normal(z, mu, logvar),
        log_normal(z, mu.detach(), logvar.detach()),
    )


def gradients(value: Tensor, model: VAE, upstream: Tensor) -> list[Tensor]:
    return list(torch.autograd.grad(value, list(model.parameters()), upstream, retain_graph=True))


@pytest.mark.parametrize("samples", [1, K])
@pytest.mark.parametrize("beta", [1.0, 0.3, torch.tensor(0.3)], ids=str)
@pytest.mark.parametrize("conditional", [False, True])
def test_the_elbo(conditional, beta, samples):
    model, x, c = setting(conditional)
    eps, upstream = torch.randn(samples, B, M), torch.randn(B)
    given = eps if samples > 1 else eps[0]
    parts = model.parts(x, num_samples=samples, condition=c, beta=beta, eps=given, reduction="none")
    log_p, log_prior, log_q, _ = by_hand(model, x, c, eps)
    kl = (log_q - log_prior).mean(0)
    for ours, theirs in ((parts.loss, beta * kl - log_p.mean(0)), (parts.kl, kl)):
        torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-11)
        torch.testing.assert_close(
            torch.autograd.grad(ours, model.prior.mu, upstream, retain_graph=True),
            torch.autograd.grad(theirs, model.prior.mu, upstream, retain_graph=True),
        )
    torch.testing.assert_close(parts.log_likelihood, log_p if samples > 1 else log_p[0], rtol=1e-11, atol=1e-11)
    ours = gradients(parts.loss, model, upstream)
    torch.testing.assert_close(ours, gradients(beta * kl - log_p.mean(0), model, upstream), rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("conditional", [False, True])
@pytest.mark.parametrize("name", ["iwae", "dreg", "stl", "rws", "vr", "elbo"])
def test_the_estimators(name, conditional):
    """The coefficients a on log p(x | z) and log p(z), b on the path, c on the score, as the papers write them."""
    model, x, c = setting(conditional)
    eps, upstream = torch.randn(K, B, M), torch.randn(B)
    options = {"alpha": 0.4} if name == "vr" else {}
    objective = Objective(name, num_samples=K, **options)
    loss = model.loss(x, objective, condition=c, eps=eps, reduction="none")
    log_p, log_prior, log_q, log_q_fixed = by_hand(model, x, c, eps)
    log_w = log_p + log_prior - log_q
    a = torch.softmax((1 - objective.alpha) * log_w, 0).detach()
    bound = torch.logsumexp((1 - objective.alpha) * log_w, 0) - math.log(K)
    bound = log_w.mean(0) if name in ("stl", "elbo") else bound / (1 - objective.alpha)
    torch.testing.assert_close(-loss, bound, rtol=1e-11, atol=1e-11)
    ours = gradients(-loss, model, upstream)
    if name in ("iwae", "vr", "elbo"):
        torch.testing.assert_close(ours, gradients(bound, model, upstream), rtol=1e-9, atol=1e-11)
        return
    a = torch.full_like(a, 1 / K) if name == "stl" else a
    path = {"stl": a, "dreg": a.square(), "rws": torch.zeros_like(a)}[name]
    score = {"stl": 0.0, "dreg": 0.0, "rws": -1.0}[name] * a
    encoder = list(model.encoder.parameters())
    through_z = (path * (log_p + log_prior - log_q_fixed)).sum(0)
    at_z = (score * -(log_q - log_q_fixed)).sum(0)  # its value is 0: of log q, what changes at fixed z
    expected = torch.autograd.grad(through_z + at_z, encoder, upstream, retain_graph=True)
    expected += torch.autograd.grad(
        (a * (log_p + log_prior)).sum(0), list(model.parameters())[len(encoder) :], upstream, retain_graph=True
    )
    for p, ours_, theirs in zip(model.parameters(), ours, expected, strict=True):
        torch.testing.assert_close(ours_, theirs, rtol=1e-9, atol=1e-11, msg=str(p.shape))


@pytest.mark.parametrize("name", ["iwae", "dreg", "rws"])
@pytest.mark.parametrize("conditional", [False, True])
def test_kept_samples(name, conditional):
    """All kept by the functions that keep fewer: the whole one."""
    model, x, c = setting(conditional)
    objective = Objective(name, num_samples=K)
    whole = model.parts(x, objective, condition=c, seed=3)
    options = {"mask": None, "reduction": "mean", "seed": 3, "generator": None}
    parts, _ = kept_parts(model, x, objective.row, K, K, condition=c, **options)
    for ours, theirs in zip(parts, whole, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
    one = torch.ones(())
    ours, theirs = gradients(parts.loss, model, one), gradients(whole.loss, model, one)
    torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)
    fewer = model.parts(x, objective, condition=c, seed=3, keep=2)
    torch.testing.assert_close(fewer.loss, whole.loss, rtol=1e-12, atol=1e-12)
    with torch.no_grad():
        torch.testing.assert_close(model.parts(x, objective, condition=c, seed=3, keep=2), fewer)


def test_second_derivatives():
    model, x, _ = setting(False)
    eps = torch.randn(K, B, M)

    def curvature(loss: Tensor) -> list[Tensor]:
        (first,) = torch.autograd.grad(loss, model.encoder.body[2].weight, create_graph=True)
        return list(torch.autograd.grad(first.square().sum(), list(model.parameters())))

    log_p, log_prior, log_q, _ = by_hand(model, x, None, eps)
    expected = -(torch.logsumexp(log_p + log_prior - log_q, 0) - math.log(K)).mean()
    ours = curvature(model.loss(x, "iwae", num_samples=K, eps=eps))
    torch.testing.assert_close(ours, curvature(expected), rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("name", ["elbo", "iwae", "dreg"])
def test_a_density_that_is_the_standard_normal(name):
    """The Monte Carlo KL in place of the analytic one is all that changes; at large means too, in float32."""

    class Standard(nn.Module):
        def log_prob(self, z: Tensor) -> Tensor:
            return log_normal(z, torch.zeros(M), torch.zeros(M))

    model, x, _ = setting(False)
    other = VAE(model.encoder, model.decoder, prior=Standard())
    plain = VAE(model.encoder, model.decoder)
    recon, posterior = plain(x, K, seed=3)
    expected = fastelbo.multi_sample_loss(recon, x, posterior, estimator=name)
    torch.testing.assert_close(other.loss(x, name, num_samples=K, seed=3), expected)
    mu, logvar = torch.full((B, M), 3e3, dtype=torch.float32), torch.full((B, M), -9.0, dtype=torch.float32)
    drawn = fastelbo.rsample(mu, logvar, K, seed=3)
    exact = Standard().log_prob(drawn.z.double()) - drawn.log_q.double()
    far = drawn.under(Standard().log_prob(drawn.z.double()))
    torch.testing.assert_close(far.log_ratio, exact, rtol=1e-12, atol=0)
    assert far.prior[0].shape == far.kl.shape == (K, B) and torch.equal(far.kl, -far.log_ratio)


@pytest.mark.parametrize("conditional", [False, True])
def test_log_marginal_and_importance_weights(conditional):
    model, x, c = setting(conditional)
    with torch.no_grad():
        found = {p: model.log_marginal(x, 40_000, proposal=p, condition=c, seed=1) for p in ("posterior", "prior")}
    error = torch.sqrt(found["posterior"].std_error.square() + found["prior"].std_error.square())
    assert (error < 0.2).all()
    assert ((found["posterior"].log_prob - found["prior"].log_prob).abs() < 5 * error).all()
    weights = fastelbo.importance_weights(model, x, 50, condition=c, seed=1)
    mu, logvar = model.encode(x, c)
    given = () if c is None else (c,)
    logits = model.decode(weights.z, c)
    expected = (
        fastelbo.log_prob(logits, x) + model.prior.log_prob(weights.z, *given) - log_normal(weights.z, mu, logvar)
    )
    torch.testing.assert_close(weights.log_w, expected.detach(), rtol=1e-10, atol=1e-10)
    state = torch.get_rng_state()
    again = [model.log_marginal(x, 100, proposal="prior", condition=c, seed=1).log_prob for _ in range(2)]
    assert torch.equal(*again) and torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("conditional", [False, True])
def test_samples(conditional):
    model, _, c = setting(conditional, latent_shape=(M,))
    drawn = [model.sample(B, c, mean=True, generator=torch.Generator().manual_seed(s)) for s in (1, 1, 2)]
    assert torch.equal(drawn[0], drawn[1]) and not torch.equal(drawn[0], drawn[2])
    torch.manual_seed(1)
    first = model.sample(B, c)
    assert first.shape == (B, D) and not torch.equal(model.sample(B, c), first)
    torch.manual_seed(1)
    assert torch.equal(model.sample(B, c), first)
    if conditional:
        return
    mean = model.sample(100_000, mean=True).mean(0)
    z = model.prior.sample(100_000)
    torch.testing.assert_close(mean, torch.sigmoid(model.decoder(z)).mean(0), rtol=0, atol=0.01)


def test_it_travels_with_the_model():
    model, x, _ = setting(False)
    loss, state = model.loss(x, seed=1), model.state_dict()
    assert {"prior.mu", "prior.logvar", "prior.logits"} <= set(state)
    other = setting(False)[0]
    with torch.no_grad():
        other.prior.mu.add_(1)
    other.load_state_dict(state)
    for same in (other, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(same.loss(x, seed=1), loss)


@pytest.mark.parametrize("options", [{}, {"objective": "dreg", "num_samples": 4}], ids=str)
def test_compiles_in_one_graph(options):
    torch._dynamo.reset()
    model, x, c = setting(True)
    model.encode(x, c)
    found = []
    for loss in (model.loss, torch.compile(model.loss, fullgraph=True, backend="aot_eager")):
        value = loss(x, condition=c, seed=torch.tensor([3]), **options)
        found.append([value.detach(), *gradients(value, model, torch.ones(()))])
    torch.testing.assert_close(found[1], found[0], rtol=1e-10, atol=1e-12)


class Wrong(nn.Module):
    def __init__(self, result: object) -> None:
        super().__init__()
        self.result = result

    def log_prob(self, z: Tensor) -> object:
        return self.result(z)


@pytest.mark.parametrize(
    "prior, error, message",
    [
        (Wrong(lambda z: 3.0), TypeError, "log_prob of the prior must be a tensor; got float"),
        (Wrong(lambda z: z), ValueError, r"log_prior must be \(5,\), a number for each sample; got \(5, 3\)"),
        (Wrong(lambda z: z.sum()), ValueError, r"log_prior must be \(5,\), a number for each sample; got \(\)"),
    ],
)
def test_a_density_that_is_none(prior, error, message):
    with pytest.raises(error, match=message):
        VAE(Joined(D, 2 * M), Joined(M, D), prior=prior).loss(torch.rand(B, D))


def test_what_needs_a_kl_per_dimension_is_refused():
    model, x, _ = setting(False)
    for call in (
        lambda: model.loss(x, free_bits=0.1),
        lambda: model.loss(x, Objective("elbo", free_bits=0.1, num_samples=3)),
        lambda: model.loss(x, free_bits=torch.tensor(0.1)),
    ):
        with pytest.raises(ValueError, match=r"free_bits must be 0: .* has no KL per dimension"):
            call()
    with pytest.raises(
        ValueError, match=r"beta must be a float or a 0-d tensor: .* has no KL per dimension; .* \(5,\)"
    ):
        model.loss(x, beta=torch.ones(B))
    output = model(x)
    for call in (fastelbo.diagnostics, fastelbo.DiagnosticsMeter().update, lambda p: p.prior_options):
        with pytest.raises(ValueError, match=r"posterior must be under a Gaussian prior: .* has no KL per dimension"):
            call(output.posterior)
