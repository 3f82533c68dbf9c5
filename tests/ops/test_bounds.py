"""`bound_loss` against the papers' formulas in plain autograd; parameters that differ per sample; masked KLs."""

import math
from dataclasses import dataclass
from itertools import product

import paper
import pytest
import torch
import torch.nn.functional as F
from numpy.polynomial.hermite_e import hermegauss
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.func import functional_call
from toys import log_normal

import fastelbo
from fastelbo import Posterior, bound_loss, bound_parts, gaussian_kl, rsample
from fastelbo.losses import LossParts

B, D, M = 4, 6, 3
every_case = pytest.mark.parametrize("case", paper.CASES, ids=paper.CASE_IDS)


pytestmark = pytest.mark.usefixtures("double")


def assert_close(actual: list[Tensor], expected: list[Tensor], rtol: float = 1e-10) -> None:
    for a, e in zip(actual, expected, strict=True):
        assert (a - e).abs().max() <= rtol * e.abs().max() + 1e-14


@dataclass
class Setting:
    """paper.Setting, whose q may depend on z."""

    log_joint: object
    q: tuple[Tensor, Tensor]
    q_fixed: tuple[Tensor, Tensor]
    z: Tensor


class OneLayer(nn.Module):
    """A categorical likelihood, which the library has not."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.decoder = nn.Linear(D, 2 * M), nn.Linear(M, D * 5)

    def q(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.encoder(F.one_hot(x, 5).sum(-1) + 0.1 * x).chunk(2, -1)

    def log_p(self, z: Tensor, x: Tensor) -> Tensor:
        logits = self.decoder(z).unflatten(-1, (D, 5)).log_softmax(-1)
        return logits.gather(-1, x.expand(*z.shape[:-1], D).unsqueeze(-1)).sum((-1, -2))


def by_paper(setting, case, encoder: list, decoder: list, upstream: Tensor) -> list[Tensor]:
    name, options, _ = case
    bound, for_encoder, for_decoder = paper.ESTIMATORS[name](setting, **options)
    grads = [
        torch.autograd.grad(-part, p, upstream, retain_graph=True)
        for part, p in ((for_encoder, encoder), (for_decoder, decoder))
    ]
    return [-bound.detach(), *grads[0], *grads[1]]


def by_bound_loss(loss: Tensor, encoder: list, decoder: list, upstream: Tensor) -> list[Tensor]:
    return [loss.detach(), *torch.autograd.grad(loss, [*encoder, *decoder], upstream)]


@every_case
def test_one_layer(case):
    name, options, K = case
    model, x = OneLayer(), torch.randint(0, 5, (B, D))
    encoder, decoder = list(model.encoder.parameters()), list(model.decoder.parameters())
    eps, upstream = torch.randn(K, B, M), torch.randn(B)
    mu, logvar = model.q(x)
    posterior = rsample(mu, logvar, K, eps=eps)
    loss = bound_loss(model.log_p(posterior.z, x), posterior, estimator=name, reduction="none", **options)

    mu, logvar = model.q(x)
    z = mu + torch.exp(0.5 * logvar) * eps
    zero = torch.zeros(M)
    setting = paper.Setting(lambda z: model.log_p(z, x) + log_normal(z, zero, zero), (mu, logvar), z)
    assert_close(by_bound_loss(loss, encoder, decoder, upstream), by_paper(setting, case, encoder, decoder, upstream))


class TwoLayers(nn.Module):
    """q(z2 | x) q(z1 | z2), p(z2) p(z1 | z2) p(x | z1)."""

    def __init__(self) -> None:
        super().__init__()
        self.q2, self.q1 = nn.Linear(D, 2 * M), nn.Sequential(nn.Linear(M, 8), nn.Tanh(), nn.Linear(8, 4))
        self.p1, self.px = nn.Linear(M, 4), nn.Linear(2, D)

    def encoder(self) -> list[Tensor]:
        return [*self.q2.parameters(), *self.q1.parameters()]

    def decoder(self) -> list[Tensor]:
        return [*self.p1.parameters(), *self.px.parameters()]

    def fixed_q1(self, z2: Tensor) -> tuple[Tensor, Tensor]:
        """q(z1 | z2) as a function of z2 alone."""
        return functional_call(self.q1, {k: p.detach() for k, p in self.q1.named_parameters()}, z2).chunk(2, -1)

    def log_p(self, z1: Tensor, x: Tensor) -> Tensor:
        return log_normal(x, self.px(z1), torch.zeros(D))

    def posteriors(self, x: Tensor, eps2: Tensor, eps1: Tensor, name: str) -> tuple[list[Posterior], Tensor | None]:
        mu2, logvar2 = self.q2(x).chunk(2, -1)
        q2 = rsample(mu2, logvar2, len(eps2), eps=eps2)
        z2 = rsample(mu2, logvar2, len(eps2), eps=eps2).z if name == "dreg" else q2.z
        mu1, logvar1 = self.q1(z2).chunk(2, -1)
        prior_mu, prior_logvar = self.p1(q2.z).chunk(2, -1)
        q1 = rsample(mu1, logvar1, batch_dims=2, prior_mu=prior_mu, prior_logvar=prior_logvar, eps=eps1)
        if name not in ("stl", "dreg"):
            return [q1, q2], None
        log_q1 = log_normal(q1.z.detach(), *self.fixed_q1(q2.z))
        return [q1, q2], log_q1.detach() - log_q1


@every_case
def test_two_layers(case):
    name, options, K = case
    model, x = TwoLayers(), torch.randn(B, D)
    eps2, eps1, upstream = torch.randn(K, B, M), torch.randn(K, B, 2), torch.randn(B)
    posteriors, correction = model.posteriors(x, eps2, eps1, name)
    log_p = model.log_p(posteriors[0].z, x)
    loss = bound_loss(log_p, posteriors, estimator=name, log_ratio=correction, reduction="none", **options)

    mu2, logvar2 = model.q2(x).chunk(2, -1)
    z2 = mu2 + torch.exp(0.5 * logvar2) * eps2
    mu1, logvar1 = model.q1(z2).chunk(2, -1)
    z = torch.cat([mu1 + torch.exp(0.5 * logvar1) * eps1, z2], -1)

    def log_joint(z: Tensor) -> Tensor:
        z1, z2 = z.split([2, M], -1)
        prior = log_normal(z1, *model.p1(z2).chunk(2, -1)) + log_normal(z2, torch.zeros(M), torch.zeros(M))
        return model.log_p(z1, x) + prior

    def join(of_z1: tuple[Tensor, Tensor], of_z2: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        both = [torch.cat([a, b.expand(K, B, M)], -1) for a, b in zip(of_z1, of_z2, strict=True)]
        return both[0], both[1]

    above = z2.detach() if name == "rws" else z2  # the wake phase has no path derivative
    q = join(model.q1(above).chunk(2, -1), (mu2, logvar2))
    fixed = join(model.fixed_q1(z2), (mu2.detach(), logvar2.detach()))
    setting = Setting(log_joint, q, fixed, z)
    parameters = model.encoder(), model.decoder()
    assert_close(by_bound_loss(loss, *parameters, upstream), by_paper(setting, case, *parameters, upstream))


class Exact(TwoLayers):
    """z2 ~ N(0, 1), z1 ~ N(a z2, s), x ~ N(b z1, t), all of one dimension: the posteriors are linear in z2 and x."""

    def __init__(self) -> None:
        super().__init__()
        self.q2, self.q1 = nn.Linear(1, 2), nn.Linear(2, 2)
        a, s, b, t = self.numbers = 0.7, 0.6, 1.3, 0.4
        # x | z2 ~ N(a b z2, b^2 s + t): the posterior of z2; z1 | z2, x has the prior N(a z2, s)
        v = b * b * s + t
        variance2 = 1 / (1 + (a * b) ** 2 / v)
        variance1 = 1 / (1 / s + b * b / t)
        with torch.no_grad():
            self.q2.weight.copy_(torch.tensor([[variance2 * a * b / v], [0.0]]))
            self.q2.bias.copy_(torch.tensor([0.0, math.log(variance2)]))
            self.q1.weight.copy_(torch.tensor([[variance1 * a / s, variance1 * b / t], [0.0, 0.0]]))
            self.q1.bias.copy_(torch.tensor([0.0, math.log(variance1)]))

    def log_evidence(self, x: Tensor) -> Tensor:
        a, s, b, t = self.numbers
        return log_normal(x, torch.zeros(1), torch.tensor([math.log((a * b) ** 2 + b * b * s + t)]))


@pytest.mark.parametrize("name", ["stl", "dreg"])
def test_exact_posteriors_have_no_variance(name):
    model, x, K = Exact(), torch.randn(B, 1), 5
    a, s, b, t = model.numbers
    mu2, logvar2 = model.q2(x).chunk(2, -1)
    eps2 = torch.randn(K, B, 1)
    q2, again = (rsample(mu2, logvar2, K, eps=eps2) for _ in range(2))
    q1_of = nn.Linear.forward
    mu1, logvar1 = q1_of(model.q1, torch.cat([again.z, x.expand(K, B, 1)], -1)).chunk(2, -1)
    q1 = rsample(mu1, logvar1, batch_dims=2, prior_mu=a * q2.z, prior_logvar=torch.tensor(math.log(s)), seed=1)
    log_q1 = log_normal(q1.z.detach(), *model.fixed_q1(torch.cat([q2.z, x.expand(K, B, 1)], -1)))
    log_p = log_normal(x, b * q1.z, torch.tensor([math.log(t)]))
    log_w = (log_p + q1.log_ratio + q2.log_ratio).detach()
    torch.testing.assert_close(log_w, model.log_evidence(x).expand(K, B), rtol=0, atol=1e-12)
    found = {}
    for estimator in (name, "iwae"):
        loss = bound_loss(log_p, [q1, q2], estimator=estimator, log_ratio=log_q1.detach() - log_q1, reduction="none")
        found[estimator] = torch.autograd.grad(loss, model.encoder(), torch.randn(B), retain_graph=True)
    assert all(gradient.abs().max() < 1e-12 for gradient in found[name])
    assert found["iwae"][0].abs().max() > 1e-3


@every_case
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("plain", [False, True])
def test_equals_multi_sample_loss(case, reduction, plain):
    name, options, K = case
    leaves = [t.requires_grad_() for t in (torch.randn(B, M), torch.randn(B, M), torch.randn(K, B, D))]
    x, eps = torch.rand(B, D), torch.randn(K, B, M)
    upstream = torch.randn((B,) if reduction == "none" else ())
    options = {"estimator": name, "reduction": reduction, **options}

    def run(function) -> list[Tensor]:
        posterior = rsample(leaves[0], leaves[1], K, eps=eps, prior_mu=torch.ones(M))
        recon = leaves[2] * posterior.z.sum(-1, keepdim=True)
        parts = function(recon, posterior)
        grads = torch.autograd.grad(parts.loss, leaves, upstream)
        return [*(p.detach() for p in parts), *grads]

    def ours(recon: Tensor, posterior: Posterior) -> LossParts:
        log_p = fastelbo.log_prob(recon, x)
        if plain:
            with fastelbo.reference_mode():
                return bound_parts(log_p, [posterior], **options)
        return bound_parts(log_p, posterior, **options)

    theirs = run(lambda recon, posterior: fastelbo.multi_sample_parts(recon, x, posterior, **options))
    assert_close(run(ours), theirs, 1e-12)


@pytest.mark.parametrize("name", ["elbo", "stl", "iwae", "dreg"])
@pytest.mark.parametrize("weight", [0.3, 1.7])
def test_an_annealed_bound_has_an_unbiased_gradient(name, weight):
    """The expectation over eps, by Gauss-Hermite quadrature, of the estimator, and the gradient of the bound's."""
    K, order = 2, 60
    nodes, weights = map(torch.from_numpy, hermegauss(order))
    points = torch.tensor(list(product(nodes.tolist(), repeat=K))).mT.unsqueeze(-1)  # [K, N, 1]
    mass = torch.tensor(list(product((weights / weights.sum()).tolist(), repeat=K))).prod(1)
    q = [torch.tensor([0.4]).requires_grad_(), torch.tensor([-0.7]).requires_grad_()]

    def loss(estimator: str) -> Tensor:
        mu, logvar = (t.expand(points.shape[1], 1) for t in q)
        posterior = rsample(mu, logvar, K, eps=points)
        log_p = -0.5 * (1.3 - posterior.z.squeeze(-1)).square()
        return bound_loss(log_p, posterior, estimator=estimator, kl_weight=weight, reduction="none")

    target = "elbo" if name in ("elbo", "stl") else "iwae"
    expected = torch.autograd.grad(loss(target), q, mass)
    for w in (weight, torch.tensor(weight)):
        weight = w
        assert_close(list(torch.autograd.grad(loss(name), q, mass)), list(expected), 1e-6)


def test_the_kl_of_the_parts_is_that_of_all_layers():
    above = rsample(torch.randn(B, M), torch.randn(B, M), 3)
    below = rsample(torch.randn(3, B, 2), torch.randn(3, B, 2), batch_dims=2)
    parts = bound_parts(torch.randn(3, B), [above, below])
    torch.testing.assert_close(parts.kl, above.kl + below.kl.mean(0))


def test_kl_weight_learns():
    weight = torch.tensor(0.3, requires_grad=True)
    posterior = rsample(torch.randn(B, M), torch.randn(B, M), 5, seed=0)
    log_p = torch.randn(5, B)
    (gradient,) = torch.autograd.grad(bound_loss(log_p, posterior, kl_weight=weight), weight)
    w = torch.softmax(log_p + 0.3 * posterior.log_ratio, 0)
    torch.testing.assert_close(gradient, -(w * posterior.log_ratio).sum(0).mean())


@pytest.mark.parametrize("case", [c for c in paper.CASES if c[0] not in ("stl", "dreg", "rws")], ids=str)
def test_derivatives(case):
    name, options, K = case
    posterior = rsample(torch.randn(B, M), torch.randn(B, M), K, seed=0)
    inputs = torch.randn(K, B, requires_grad=True), torch.randn(K, B, requires_grad=True)

    def loss(log_p: Tensor, log_ratio: Tensor) -> Tensor:
        return bound_loss(
            log_p, posterior, log_ratio=log_ratio, kl_weight=0.7, estimator=name, reduction="none", **options
        )

    assert torch.autograd.gradcheck(loss, inputs)
    assert torch.autograd.gradgradcheck(loss, inputs)


def test_weights_of_zero_and_nan():
    posterior = rsample(torch.zeros(3, M), torch.zeros(3, M), 4, seed=0)
    log_p = torch.zeros(4, 3)
    log_p[:2, 0], log_p[:, 1], log_p[0, 2] = -math.inf, -math.inf, math.nan
    log_p.requires_grad_()
    loss = bound_loss(log_p, posterior, reduction="none")
    assert loss[0].isfinite() and loss[1] == math.inf and loss[2].isnan()
    (gradient,) = torch.autograd.grad(loss[:2].sum(), log_p)
    assert gradient[:2, 0].eq(0).all() and gradient[:, 1].eq(0).all()
    torch.testing.assert_close(gradient[2:, 0].sum(), torch.tensor(-1.0))


# ----------------------------------------------------------------------------------------------------------------------
# Parameters that differ per sample.


@pytest.mark.parametrize("latent", [(M,), (2, 3)], ids=str)
@pytest.mark.parametrize("prior", [False, True])
def test_one_draw_for_each_parameter(latent, prior):
    K = 5
    mu, logvar, eps = (torch.randn(K, B, *latent) for _ in range(3))
    p = [torch.randn(K, B, *latent), torch.randn(latent)] if prior else [torch.zeros(()), torch.zeros(())]
    leaves = [t.requires_grad_() for t in (mu, logvar, *p)]
    priors = {"prior_mu": p[0], "prior_logvar": p[1]} if prior else {}
    drawn = rsample(mu, logvar, batch_dims=2, eps=eps, **priors)
    z = mu + torch.exp(0.5 * logvar) * eps
    flat = lambda t: t.expand(mu.shape).flatten(2)  # noqa: E731
    ratio = log_normal(flat(z), flat(p[0]), flat(p[1])) - log_normal(flat(z), flat(mu), flat(logvar))
    kl = fastelbo.reference.kl_terms(mu, logvar, *p).flatten(2).sum(2)
    assert drawn.gates.shape == (2, K, B) and drawn.mu is mu
    upstream = [torch.randn_like(t) for t in (z, kl, ratio)]
    inputs = leaves if prior else leaves[:2]
    assert_close([t.detach() for t in drawn[:3]], [t.detach() for t in (z, kl, ratio)])
    assert_close(
        list(torch.autograd.grad(drawn[:3], inputs, upstream)),
        list(torch.autograd.grad((z, kl, ratio), inputs, upstream)),
    )


def test_noise_of_every_sample_and_datum():
    mu, logvar = torch.zeros(50, 40, 10), torch.zeros(50, 40, 10)
    z = rsample(mu, logvar, batch_dims=2, seed=3).z
    assert torch.equal(z, rsample(mu, logvar, batch_dims=2, seed=3).z)
    assert z.unique().numel() > 0.999 * z.numel() and abs(z.mean()) < 0.02 and abs(z.std() - 1) < 0.02


@pytest.mark.parametrize(
    "options, message",
    [
        ({"num_samples": 5}, "num_samples must be None, .* with batch_dims=2.*; got num_samples=5"),
        ({"first_sample": 2}, "first_sample 0 .* with batch_dims=2.*first_sample=2"),
        ({"eps": torch.zeros(B, M)}, r"eps must have the shape \(5, 4, 3\) of mu; got \(4, 3\)"),
        ({"logvar": torch.zeros(B, M)}, r"must both be \[K, B, \*latent\].*got \(5, 4, 3\) and \(4, 3\)"),
        ({"batch_dims": 3}, "batch_dims must be 1 or 2; got 3"),
        ({"prior_mu": torch.zeros(2)}, r"prior_mu must broadcast to the shape \(5, 4, 3\) of mu"),
    ],
)
def test_errors_of_parameters_per_sample(options, message):
    with pytest.raises(ValueError, match=message):
        rsample(torch.zeros(5, B, M), **{"logvar": torch.zeros(5, B, M), "batch_dims": 2, **options})


@pytest.mark.parametrize(
    "change, message",
    [
        ({"log_likelihood": torch.zeros(5)}, r"log_likelihood must be \[K, B\]; got \(5,\)"),
        ({"log_likelihood": torch.zeros(4, B)}, r"log_ratio of posterior must have the shape \(4, 4\)"),
        ({"log_ratio": torch.zeros(5, 1)}, r"log_ratio must have the shape \(5, 4\) of log_likelihood; got \(5, 1\)"),
        ({"posterior": ()}, "posterior must be a Posterior from rsample, or a sequence of them"),
        ({"posterior": torch.zeros(3)}, "posterior must be a Posterior from rsample, or a sequence of them"),
        ({"kl_weight": math.nan}, "kl_weight must be finite; got nan"),
        ({"kl_weight": torch.zeros(2)}, "kl_weight must be a float or a 0-d tensor"),
        ({"kl_weight": 0.5, "estimator": "rws"}, "kl_weight must be 1.0 with estimator 'rws'"),
        ({"estimator": "miwae", "groups": 2}, "groups must divide the number of samples K=5; got 2"),
        ({"reduction": "median"}, "reduction must be one of"),
    ],
)
def test_errors_of_bound_loss(change, message):
    posterior = rsample(torch.zeros(B, M), torch.zeros(B, M), 5)
    with pytest.raises((ValueError, TypeError), match=message):
        bound_loss(**{"log_likelihood": torch.zeros(5, B), "posterior": posterior, **change})
    stripped = Posterior(*posterior)
    with pytest.raises(ValueError, match="posterior must be what rsample returned, of K samples, for estimator 'dreg'"):
        bound_loss(torch.zeros(5, B), [posterior, stripped], estimator="dreg")


# ----------------------------------------------------------------------------------------------------------------------
# Masked and unreduced KLs.


@pytest.mark.parametrize("shape", [(B, 5, 1), (5, M), (B, 5, M)], ids=str)
def test_masked_kl(shape):
    inputs = [torch.randn(*s, requires_grad=True) for s in ((B, 5, M), (B, 5, M), (M,), (5, M))]
    mu, logvar, prior_mu, prior_logvar = inputs
    mask, upstream = torch.rand(shape) < 0.6, torch.randn(B, 5, M)
    q, p = (torch.distributions.Normal(m, torch.exp(0.5 * v)) for m, v in ((mu, logvar), (prior_mu, prior_logvar)))
    terms = torch.distributions.kl_divergence(q, p) * mask
    for reduce in (True, False):
        found = gaussian_kl(*inputs, mask=mask, reduce=reduce)
        expected = terms.flatten(1).sum(1) if reduce else terms
        weights = upstream[:, 0, 0] if reduce else upstream
        assert_close(
            [found.detach(), *torch.autograd.grad(found, inputs, weights)],
            [expected.detach(), *torch.autograd.grad(expected, inputs, weights, retain_graph=True)],
        )


def test_what_is_masked_is_not_read():
    mask = torch.rand(B, 5, M) < 0.6
    mu, logvar = (torch.where(mask, torch.randn(B, 5, M), math.nan).requires_grad_() for _ in range(2))
    for reduce in (True, False):
        value = gaussian_kl(mu, logvar, torch.ones(M), torch.zeros(M), mask=mask, reduce=reduce)
        grads = torch.autograd.grad(value.sum(), (mu, logvar))
        assert value.isfinite().all() and all(g.isfinite().all() and g[~mask].eq(0).all() for g in grads)


def test_derivatives_of_the_kl():
    mask = torch.rand(B, 5, M) < 0.6
    inputs = tuple(torch.randn(B, 5, M, requires_grad=True) for _ in range(4))
    for options in ({"reduce": False}, {"mask": mask}, {"mask": mask, "reduce": False}):
        function = lambda *t, options=options: gaussian_kl(*t, **options)  # noqa: E731
        assert torch.autograd.gradcheck(function, inputs)
        assert torch.autograd.gradgradcheck(function, inputs)


@pytest.mark.parametrize("prior", [False, True])
@pytest.mark.parametrize("samples", [None, 3])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_elbo_with_masked_kl_and_weights_of_dimensions(samples, reduction, prior):
    lead = (B,) if samples is None else (samples, B)
    recon, x = torch.randn(*lead, D, requires_grad=True), torch.rand(B, D)
    mu, logvar, weights = (torch.randn(*s, requires_grad=True) for s in ((B, M), (B, M), (M,)))
    p_mu, p_logvar = (torch.randn(s, requires_grad=True) if prior else torch.zeros(s) for s in ((B, M), (M,)))
    kl_mask = torch.rand(B, M) < 0.6
    upstream = torch.randn((B,) if reduction == "none" else ())
    for beta in (0.3, weights):
        options = {"kl_mask": kl_mask, "beta": beta, "reduction": reduction}
        options |= {"prior_mu": p_mu, "prior_logvar": p_logvar} if prior else {}
        parts = fastelbo.elbo_parts(recon, x, mu, logvar, **options)
        log_p = -F.binary_cross_entropy_with_logits(recon, x.expand_as(recon), reduction="none").sum(-1)
        t = logvar - p_logvar
        terms = 0.5 * ((mu - p_mu).square() * torch.exp(-p_logvar) + t.exp() - 1 - t) * kl_mask
        loss = (beta * terms).sum(1) - (log_p if samples is None else log_p.mean(0))
        expected = {"mean": loss.mean(), "sum": loss.sum(), "none": loss}[reduction]
        inputs = [t for t in (recon, mu, logvar, p_mu, p_logvar, beta) if isinstance(t, Tensor) and t.requires_grad]
        assert_close(
            [parts.loss.detach(), parts.kl.detach(), *torch.autograd.grad(parts.loss, inputs, upstream)],
            [expected.detach(), terms.sum(1).detach(), *torch.autograd.grad(expected, inputs, upstream)],
        )


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda t: gaussian_kl(t, t, free_bits=0.5, reduce=False), "free_bits must be 0 with a mask or with reduce"),
        (lambda t: gaussian_kl(t, t, mask=torch.ones(2).bool()), r"mask must broadcast to the shape \(4, 3\) of mu"),
        (lambda t: gaussian_kl(t, t, mask=torch.ones(B, M)), "mask must be bool; got float64"),
        (lambda t: gaussian_kl(t, t, torch.zeros(2), reduce=False), "prior_mu must broadcast"),
        (lambda t: gaussian_kl(t, t[:2], reduce=False), "logvar must"),
        (lambda t: fastelbo.elbo_loss(t, t, t, t, beta=torch.ones(2)), r"beta must broadcast to the shape \(3,\)"),
        (
            lambda t: fastelbo.elbo_loss(t, t, t, t, beta=torch.ones(3), free_bits=1.0),
            "free_bits must be 0 with kl_mask",
        ),
    ],
)
def test_errors_of_the_kl(call, message):
    with pytest.raises((ValueError, TypeError), match=message):
        call(torch.zeros(B, M))


# ----------------------------------------------------------------------------------------------------------------------
# Compilers.


def bound_of_two_layers(mu2: Tensor, logvar2: Tensor, weights: Tensor, seed: Tensor) -> Tensor:
    q2 = rsample(mu2, logvar2, 4, seed=seed)
    q1 = rsample(q2.z @ weights, q2.z, batch_dims=2, prior_mu=q2.z, seed=seed + 1)
    log_p = -q1.z.square().sum(-1)
    return bound_loss(log_p, [q1, q2], estimator="dreg", kl_weight=0.7)


def masked_elbo(mu: Tensor, logvar: Tensor, weights: Tensor, seed: Tensor) -> Tensor:
    mask = mu > 0
    kl = gaussian_kl(mu, logvar, mask=mask, reduce=False).sum()
    return kl + fastelbo.elbo_loss(mu, torch.sigmoid(mu.detach()), mu, logvar, kl_mask=mask, beta=weights[0])


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
@pytest.mark.parametrize("function", [bound_of_two_layers, masked_elbo])
def test_compiles_in_one_graph(function, backend):
    torch._dynamo.reset()
    inputs = [torch.randn(B, M, requires_grad=True) for _ in range(2)] + [torch.randn(M, M, requires_grad=True)]
    seed = torch.tensor([5])
    results = []
    for f in (function, torch.compile(function, fullgraph=True, backend=backend)):
        loss = f(*inputs, seed)
        results.append([loss.detach(), *torch.autograd.grad(loss, inputs)])
    assert_close(*results)


@pytest.mark.parametrize("function", [bound_of_two_layers, masked_elbo])
def test_exports(function):
    class Module(nn.Module):
        def forward(self, *args: Tensor) -> Tensor:
            return function(*args)

    args = (torch.randn(B, M), torch.randn(B, M), torch.randn(M, M), torch.tensor([5]))
    program = torch.export.export(Module(), args)
    torch.testing.assert_close(program.module()(*args), function(*args))


def dreg_of_a_likelihood(mu: Tensor, logvar: Tensor, weights: Tensor, seed: Tensor) -> Tensor:
    q = rsample(mu, logvar, 4, seed=seed)
    return fastelbo.multi_sample_loss(q.z @ weights, torch.sigmoid(mu.detach()), q, estimator="dreg")


@pytest.mark.parametrize("function", [bound_of_two_layers, masked_elbo, dreg_of_a_likelihood])
def test_compiles_with_dynamic_shapes(function):
    """dynamic=True makes inputs of the graph also of the numbers that are the functions' defaults."""
    torch._dynamo.reset()
    compiled = torch.compile(function, fullgraph=True, dynamic=True, backend="aot_eager")
    seed = torch.tensor([5])
    for batch in (B, 2):
        inputs = [torch.randn(n, M, requires_grad=True) for n in (batch, batch, M)]
        results = [
            [loss, *torch.autograd.grad(loss, inputs)] for loss in (f(*inputs, seed) for f in (function, compiled))
        ]
        assert_close(*results)


old_torch = pytest.mark.skipif(torch.__version__ < "2.13", reason="torch 2.11 compiles a graph for every alpha")


@pytest.mark.parametrize("estimator", [pytest.param("vr", marks=old_torch), "ciwae", "iwae", "dreg"])
def test_annealed_numbers_compile_once(estimator):
    """kl_weight, alpha and beta are inputs of the graph, once they have changed."""

    def step(mu: Tensor, number: float) -> Tensor:
        q = rsample(mu, 0.1 * mu, 4, seed=1)
        options = {"vr": {"alpha": number}, "ciwae": {"beta": number}}.get(estimator, {"kl_weight": number})
        return bound_loss(-q.z.square().sum(-1), q, estimator=estimator, **options)

    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(step, fullgraph=True, backend=counter)
    for number in (0.1, 0.2, 0.3, 0.4, 0.6):
        mu = torch.randn(B, M, requires_grad=True)
        results = [[loss, *torch.autograd.grad(loss, mu)] for loss in (f(mu, number) for f in (step, compiled))]
        assert_close(*results)
    assert counter.frame_count <= 2


# ----------------------------------------------------------------------------------------------------------------------
# torch.func.


@pytest.mark.parametrize("estimator", ["iwae", "stl", "dreg"])
def test_bound_under_torch_func(estimator):
    weights, eps = torch.randn(4, B), torch.randn(4, B, M)

    def loss(mu: Tensor) -> Tensor:
        q = rsample(mu, 0.1 * mu, 4, eps=eps)
        return bound_loss(-weights * q.z.square().sum(-1), q, estimator=estimator, kl_weight=0.3)

    mu = torch.randn(5, B, M, requires_grad=True)
    expected = torch.stack([torch.autograd.grad(loss(one), one)[0] for one in mu.unbind()])
    assert_close([torch.func.vmap(torch.func.grad(loss))(mu)], [expected])
    assert_close([torch.func.vmap(loss)(mu)], [torch.stack([loss(one) for one in mu])])
    if estimator == "iwae":
        _, tangent = torch.func.jvp(loss, (mu[0],), (torch.ones_like(mu[0]),))
        assert_close([tangent], [expected[0].sum()])
