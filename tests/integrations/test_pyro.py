"""fastelbo.distributions in Pyro's models, and fastelbo's losses against Pyro's. `make test-integrations` has Pyro."""

import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

pytest.importorskip("pyro", reason="pyro-ppl is not installed: make test-integrations installs it")

import pyro
import pyro.distributions as dist
from pyro import poutine
from pyro.distributions.torch_distribution import TorchDistributionMixin
from pyro.infer import (
    MCMC,
    NUTS,
    SVI,
    Predictive,
    RenyiELBO,
    Trace_ELBO,
    TraceEnum_ELBO,
    TraceMeanField_ELBO,
    config_enumerate,
)
from torch import Tensor, nn

import fastelbo
from fastelbo import distributions as fd
from fastelbo.losses import join_recon

K, B, D, M = 4, 6, 7, 3
ROOT = Path(__file__).parent.parent.parent


@pytest.fixture(autouse=True)
def _clean():
    pyro.clear_param_store()
    pyro.enable_validation(True)


# ----------------------------------------------------------------------------------------------------------------------
# A VAE in Pyro, with Pyro's distributions or ours.

Observed = Callable[..., dist.TorchDistribution]

# likelihood: (our distribution, Pyro's, the number of parameters)
OBSERVED: dict[str, tuple[Observed, Observed, int]] = {
    "bernoulli": (fd.Bernoulli, lambda logits: dist.Bernoulli(logits=logits, validate_args=False), 1),
    "gaussian": (fd.Gaussian, lambda m, lv: dist.Normal(m, torch.exp(0.5 * lv)), 2),
    "laplace": (fd.Laplace, lambda m, s: dist.Laplace(m, torch.exp(s)), 2),
    "student_t": (fd.StudentT, lambda m, s, r: dist.StudentT(torch.exp(r), m, torch.exp(s)), 3),
    "poisson": (fd.Poisson, lambda log_rate: dist.Poisson(torch.exp(log_rate)), 1),
    "nb": (fd.NegativeBinomial, lambda m, th: dist.NegativeBinomial(torch.exp(th), logits=m - th), 2),
    "zinb": (
        fd.ZeroInflatedNegativeBinomial,
        lambda m, th, pi: dist.ZeroInflatedNegativeBinomial(torch.exp(th), logits=m - th, gate_logits=pi),
        3,
    ),
}
every_likelihood = pytest.mark.parametrize("likelihood", OBSERVED)


class PyroVAE(nn.Module):
    """p(z) = N(m, s^2), learned; q(z | x) and p(x | z) by linear maps. `ours`: whose distributions they are."""

    def __init__(self, likelihood: str) -> None:
        super().__init__()
        self.likelihood, self.ours = likelihood, False
        self.encoder = nn.Linear(D, 2 * M)
        self.decoder = nn.Linear(M, D * OBSERVED[likelihood][2])
        self.prior_mu, self.prior_logvar = (nn.Parameter(0.3 * torch.randn(M)) for _ in range(2))
        self.double()

    def posterior(self, x: Tensor) -> tuple[Tensor, Tensor]:
        mu, logvar = self.encoder(x).chunk(2, dim=-1)
        return mu, logvar

    def recon(self, z: Tensor) -> tuple[Tensor, ...]:
        return self.decoder(z).chunk(OBSERVED[self.likelihood][2], dim=-1)

    def gaussian(self, mu: Tensor, logvar: Tensor) -> dist.TorchDistribution:
        return fd.Gaussian(mu, logvar) if self.ours else dist.Normal(mu, torch.exp(0.5 * logvar)).to_event(1)

    def model(self, x: Tensor) -> None:
        pyro.module("vae", self)
        fused, plain, _ = OBSERVED[self.likelihood]
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", self.gaussian(self.prior_mu, self.prior_logvar))
            px = fused(*self.recon(z)) if self.ours else plain(*self.recon(z)).to_event(1)
            pyro.sample("x", px, obs=x)

    def guide(self, x: Tensor) -> None:
        pyro.module("vae", self)
        with pyro.plate("data", len(x)):
            pyro.sample("z", self.gaussian(*self.posterior(x)))

    def gradients(self) -> dict[str, Tensor]:
        """The gradients that a loss has left; they are then zero again."""
        grads = {name: p.grad.clone() for name, p in self.named_parameters()}
        self.zero_grad()
        return grads


def data(likelihood: str) -> Tensor:
    x = torch.rand(B, D, dtype=torch.float64)
    return x if likelihood in ("bernoulli", "gaussian", "laplace", "student_t") else torch.floor(4 * x)


def by_pyro(vae: PyroVAE, elbo: pyro.infer.elbo.ELBO, x: Tensor, *, ours: bool) -> tuple[float, dict[str, Tensor]]:
    vae.ours = ours
    torch.manual_seed(7)
    return elbo.loss_and_grads(vae.model, vae.guide, x), vae.gradients()


def compare(one: tuple[object, dict[str, Tensor]], other: tuple[object, dict[str, Tensor]]) -> None:
    torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10)
    assert all(grad.abs().max() > 1e-3 for grad in one[1].values())


ELBOS = {
    "Trace_ELBO": Trace_ELBO(),
    "Trace_ELBO of K": Trace_ELBO(num_particles=K, vectorize_particles=True, max_plate_nesting=1),
    "TraceMeanField_ELBO": TraceMeanField_ELBO(),
    "TraceMeanField_ELBO of K": TraceMeanField_ELBO(num_particles=K, vectorize_particles=True, max_plate_nesting=1),
    "RenyiELBO of 0": RenyiELBO(alpha=0, num_particles=K, vectorize_particles=True, max_plate_nesting=1),
    "RenyiELBO of 0.6": RenyiELBO(alpha=0.6, num_particles=K, vectorize_particles=True, max_plate_nesting=1),
    "RenyiELBO by particle": RenyiELBO(alpha=0, num_particles=K),
}


@every_likelihood
@pytest.mark.parametrize("elbo", ELBOS.values(), ids=ELBOS)
def test_our_distributions_in_pyro_s_losses(likelihood, elbo):
    vae, x = PyroVAE(likelihood), data(likelihood)
    compare(by_pyro(vae, elbo, x, ours=True), by_pyro(vae, elbo, x, ours=False))


# ----------------------------------------------------------------------------------------------------------------------
# fastelbo's own losses, on the noise that Pyro draws.


def of_fastelbo(vae: PyroVAE, x: Tensor, num_samples: int | None, loss: Callable[..., Tensor]):
    torch.manual_seed(7)
    mu, logvar = vae.posterior(x)
    eps = torch.randn(*(() if num_samples is None else (num_samples,)), B, M, dtype=torch.float64)
    prior = {"prior_mu": vae.prior_mu, "prior_logvar": vae.prior_logvar}
    posterior = fastelbo.rsample(mu, logvar, num_samples, eps=eps, **prior)
    value = loss(join_recon(*vae.recon(posterior.z)), x, posterior)
    value.backward()
    return value.item(), vae.gradients()


@every_likelihood
@pytest.mark.parametrize("alpha", [0.0, 0.6, -1.0])
@pytest.mark.parametrize("ours", [False, True])
@pytest.mark.parametrize("by_parts", [False, True])
def test_k_sample_losses_are_renyi_elbo(likelihood, alpha, ours, by_parts):
    vae, x = PyroVAE(likelihood), data(likelihood)
    options = {"reduction": "sum"} | ({"estimator": "vr", "alpha": alpha} if alpha else {"estimator": "iwae"})

    def loss(recon, x, q):
        if by_parts:
            return fastelbo.bound_loss(fastelbo.log_prob(recon, x, likelihood=likelihood), q, **options)
        return fastelbo.multi_sample_loss(recon, x, q, likelihood=likelihood, **options)

    fused = of_fastelbo(vae, x, K, loss)
    elbo = RenyiELBO(alpha=alpha, num_particles=K, vectorize_particles=True, max_plate_nesting=1)
    compare(fused, by_pyro(vae, elbo, x, ours=ours))


@every_likelihood
@pytest.mark.parametrize("num_samples", [None, K])
@pytest.mark.parametrize("ours", [False, True])
def test_elbo_loss_is_trace_mean_field_elbo(likelihood, num_samples, ours):
    vae, x = PyroVAE(likelihood), data(likelihood)

    def loss(recon, x, q):
        prior = q.prior_options
        return fastelbo.elbo_loss(recon, x, q.mu, q.logvar, **prior, likelihood=likelihood, reduction="sum")

    elbo = TraceMeanField_ELBO(
        num_particles=num_samples or 1, vectorize_particles=num_samples is not None, max_plate_nesting=1
    )
    compare(of_fastelbo(vae, x, num_samples, loss), by_pyro(vae, elbo, x, ours=ours))


@every_likelihood
def test_elbo_by_monte_carlo_is_trace_elbo(likelihood):
    vae, x = PyroVAE(likelihood), data(likelihood)
    options = {"likelihood": likelihood, "reduction": "sum", "estimator": "elbo"}
    fused = of_fastelbo(vae, x, K, lambda recon, x, q: fastelbo.multi_sample_loss(recon, x, q, **options))
    elbo = Trace_ELBO(num_particles=K, vectorize_particles=True, max_plate_nesting=1)
    compare(fused, by_pyro(vae, elbo, x, ours=False))


# ----------------------------------------------------------------------------------------------------------------------
# Counts of parameters of rows and of columns.


def zero_inflated(m: Tensor, th: Tensor, logits: Tensor) -> dist.TorchDistribution:
    return dist.ZeroInflatedDistribution(dist.GammaPoisson(th, th / m), gate_logits=logits)


def mixture(m: Tensor, th: Tensor, logits: Tensor) -> dist.TorchDistribution:
    m, th, logits = torch.broadcast_tensors(m, th, logits)
    which = dist.Categorical(logits=torch.stack([logits, torch.zeros_like(logits)], -1))
    th, means = th[..., None], torch.stack([m, 3 * m], -1)
    return dist.MixtureSameFamily(which, dist.GammaPoisson(th.expand(means.shape), th / means))


# (ours, Pyro's) of mean [..., B, 1], theta [1, D] and logits [1, D]
COUNTS: dict[str, tuple[Observed, Observed]] = {
    "nb": (
        lambda m, th, _, **options: fd.NegativeBinomial(mean=m, theta=th, **options),
        lambda m, th, _: dist.GammaPoisson(th, th / m),
    ),
    "nb by logarithms": (
        lambda m, th, _, **options: fd.NegativeBinomial(m.log(), th.log(), **options),
        lambda m, th, _: dist.NegativeBinomial(th, logits=m.log() - th.log()),
    ),
    "zinb": (
        lambda m, th, pi, **options: fd.ZeroInflatedNegativeBinomial(mean=m, theta=th, zero_logits=pi, **options),
        zero_inflated,
    ),
    "zinb by logarithms": (
        lambda m, th, pi, **options: fd.ZeroInflatedNegativeBinomial(m.log(), th.log(), pi, **options),
        lambda m, th, pi: dist.ZeroInflatedNegativeBinomial(th, logits=m.log() - th.log(), gate_logits=pi),
    ),
    "nb_mixture": (lambda m, th, pi, **options: fd.NegativeBinomialMixture(m, 3 * m, th, pi, **options), mixture),
    "beta_binomial": (
        lambda m, th, _, **options: fd.BetaBinomial(m, th, 9, **options),
        lambda m, th, _: dist.BetaBinomial(m, th, 9),
    ),
}


@pytest.mark.parametrize("counts", COUNTS)
@pytest.mark.parametrize("event_dims", [0, 1])
@pytest.mark.parametrize("particles", [1, K])
def test_steps_on_counts_of_rows_and_columns(counts, event_dims, particles):
    """Two steps of SVI, a latent size of each row among them: losses, and parameters behind them."""
    x = torch.poisson(3 * torch.rand(B, D, dtype=torch.float64)).clamp(max=9)
    start = {name: torch.randn(shape).double() for name, shape in (("loc", (B, 1)), ("pi", (1, D)))}
    start["th"] = torch.rand(1, D).double() + 0.5
    fused, plain = COUNTS[counts]

    def rows():
        return pyro.plate("rows", B, dim=-2 + event_dims)

    def model(ours):
        th = pyro.param("th", start["th"].clone(), constraint=dist.constraints.positive)
        logits = pyro.param("pi", start["pi"].clone())
        with rows():
            z = pyro.sample("z", dist.LogNormal(torch.zeros(()).double(), 1.0))
            m = z[..., None] if event_dims else z
            if event_dims:
                px = fused(m, th, logits) if ours else plain(m.expand(*m.shape[:-1], D), th, logits).to_event(1)
                pyro.sample("x", px, obs=x)
            else:
                with pyro.plate("columns", D, dim=-1):
                    px = fused(m, th, logits, event_dims=0) if ours else plain(m, th, logits)
                    pyro.sample("x", px, obs=x)

    def guide(ours):
        loc = pyro.param("loc", start["loc"].clone())
        with rows():
            pyro.sample("z", dist.LogNormal(loc[:, 0] if event_dims else loc, 0.3))

    seen = []
    for ours in (True, False):
        pyro.clear_param_store()
        torch.manual_seed(3)
        elbo = Trace_ELBO(num_particles=particles, vectorize_particles=True, max_plate_nesting=2 - event_dims)
        svi = SVI(model, guide, pyro.optim.SGD({"lr": 1e-3}), elbo)
        losses = [svi.step(ours) for _ in range(2)]
        seen.append((losses, {name: value.detach().clone() for name, value in pyro.get_param_store().items()}))
    torch.testing.assert_close(*seen, rtol=1e-9, atol=1e-10)
    moved = {name for name, value in seen[0][1].items() if (value - start[name]).abs().max() > 1e-5}
    assert moved == ({"loc", "th", "pi"} if "zinb" in counts or "mixture" in counts else {"loc", "th"})


@pytest.mark.parametrize("counts", COUNTS)
def test_counts_are_drawn_at_a_site(counts):
    """Within plates, of shapes and moments that are Pyro's."""
    m, th, logits = torch.rand(B, 1) + 0.5, torch.rand(1, D) + 0.5, torch.randn(1, D)
    ours, theirs = COUNTS[counts][0](m, th, logits, event_dims=0), COUNTS[counts][1](m, th, logits)
    with pyro.plate("samples", K, dim=-3), pyro.plate("rows", B, dim=-2), pyro.plate("columns", D, dim=-1):
        x = pyro.sample("x", ours)
    assert x.shape == (K, B, D) and ours.support.check(x).all()
    torch.testing.assert_close(ours.mean, theirs.mean.expand(B, D), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(ours.variance, theirs.variance.expand(B, D), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(ours.log_prob(x), theirs.log_prob(x), rtol=1e-4, atol=1e-4)


def test_bad_parameters_at_a_site_are_refused():
    def model():
        with pyro.plate("rows", B, dim=-2), pyro.plate("columns", D, dim=-1):
            px = fd.NegativeBinomial(mean=torch.full((B, 1), -1.0), theta=torch.ones(1, D), event_dims=0)
            pyro.sample("x", px, obs=torch.ones(B, D))

    with pytest.raises(ValueError, match=r"(?s)site 'x'.*Expected parameter mean .* of distribution NegativeBinomial"):
        poutine.trace(model).get_trace().log_prob_sum()


# ----------------------------------------------------------------------------------------------------------------------
# What Pyro asks of a distribution.


def test_objects_are_pyro_s_and_keep_their_class():
    px = fd.Poisson(torch.zeros(B, D))
    for one in (px, px.expand([K, B]), px.expand_by([K])):
        assert isinstance(one, TorchDistributionMixin) and isinstance(one, fd.Poisson)
    assert px.event_dim == 1 and px.shape((2,)) == (2, B, D) and px().shape == (B, D)
    assert px.expand_by([K]).batch_shape == (K, B) and px.to_event(1).event_shape == (B, D)
    assert px.to_event(1).log_prob(px()).shape == () and repr(px) == "Poisson(log_rate: torch.Size([6, 7]))"


@pytest.mark.parametrize("kind", ["mask", "scale", "obs_mask", "subsample"])
def test_masks_scales_and_plates(kind):
    """The same program with Pyro's distributions gives the same log p, site by site."""
    logits, x = torch.randn(B, D, dtype=torch.float64), data("bernoulli").round()
    observed = torch.arange(B) % 2 == 0

    def program(px):
        if kind == "mask":
            with pyro.plate("data", B):
                pyro.sample("x", px.mask(observed), obs=x)
        elif kind == "scale":
            with pyro.plate("data", B), poutine.scale(scale=0.3):
                pyro.sample("x", px, obs=x)
        elif kind == "obs_mask":
            with pyro.plate("data", B):
                pyro.sample("x", px, obs=x, obs_mask=observed)
        else:
            with pyro.plate("data", 10 * B, subsample_size=B):
                pyro.sample("x", px, obs=x)

    sums = []
    for px in (fd.Bernoulli(logits), dist.Bernoulli(logits=logits).to_event(1)):
        torch.manual_seed(1)
        sums.append(poutine.trace(program).get_trace(px).log_prob_sum())
    torch.testing.assert_close(*sums, rtol=1e-10, atol=1e-10)


def test_kl_with_pyro_s_distributions():
    mu, spread = torch.randn(B, D), torch.rand(B, D) + 0.3
    ours, theirs = fd.Gaussian(mu, scale=spread), dist.Normal(mu, spread).to_event(1)
    prior = dist.Normal(torch.zeros(D), torch.ones(D)).to_event(1)
    expected = torch.distributions.kl_divergence(theirs, prior)
    for q in (ours, theirs):
        torch.testing.assert_close(fd.gaussian_kl(q, prior), expected)
        torch.testing.assert_close(torch.distributions.kl_divergence(q, fd.Gaussian(torch.zeros(D))), expected)
    torch.testing.assert_close(torch.distributions.kl_divergence(ours, prior), expected)
    masked = torch.distributions.kl_divergence(ours.mask(torch.arange(B) < 2), prior.expand([B]).mask(True))
    torch.testing.assert_close(masked, expected * (torch.arange(B) < 2))


def test_compiled_beside_pyro():
    """torch.compile sees the plain class: what the compiled function returns is a tensor."""
    log_p = torch.compile(lambda logits, x: fd.Bernoulli(logits, validate_args=False).log_prob(x), fullgraph=True)
    logits, x = torch.randn(K, B, D), torch.rand(B, D)
    torch.testing.assert_close(log_p(logits, x), fd.Bernoulli(logits).log_prob(x))


def test_svi_learns_and_predictive_draws():
    vae, x = PyroVAE("nb"), data("nb")
    vae.ours = True
    svi = SVI(vae.model, vae.guide, pyro.optim.Adam({"lr": 0.05}), TraceMeanField_ELBO())
    losses = [svi.step(x) for _ in range(60)]
    assert sum(losses[-10:]) < 0.9 * sum(losses[:10])
    unobserved = poutine.uncondition(vae.model)
    draws = Predictive(unobserved, guide=vae.guide, num_samples=5, return_sites=["x"])(x)["x"]
    assert draws.shape == (5, B, D) and (draws == draws.round()).all() and (draws >= 0).all()


def test_mcmc_with_a_latent_of_ours():
    """z ~ N(0, I), x | z ~ N(z, I), x = 1: the posterior is N(1/2, I/2)."""

    def model():
        z = pyro.sample("z", fd.Gaussian(torch.zeros(2, dtype=torch.float64)))
        pyro.sample("x", fd.Gaussian(z), obs=torch.ones(2, dtype=torch.float64))

    mcmc = MCMC(NUTS(model, jit_compile=False), num_samples=300, warmup_steps=100, disable_progbar=True)
    mcmc.run()
    z = mcmc.get_samples()["z"]
    assert (z.mean(0) - 0.5).abs().max() < 0.2 and (z.var(0) - 0.5).abs().max() < 0.2


@pytest.mark.parametrize("infer", [{}, {"enumerate": "parallel"}])
def test_a_latent_is_enumerated(infer):
    """The exact log p(x) of a mixture, whatever the seed."""
    logits, x = torch.randn(B, dtype=torch.float64), data("gaussian")[:, 0]

    def loss(bernoulli):
        @config_enumerate
        def model():
            with pyro.plate("data", B):
                z = pyro.sample("z", bernoulli(logits), infer=dict(infer))
                pyro.sample("x", dist.Normal(2 * z, 1.0), obs=x)

        return TraceEnum_ELBO(max_plate_nesting=1).loss(model, lambda: None)

    log_p = [
        log_z + dist.Normal(mean, 1.0).log_prob(x)
        for log_z, mean in (
            (torch.nn.functional.logsigmoid(logits), 2.0),
            (torch.nn.functional.logsigmoid(-logits), 0.0),
        )
    ]
    expected = -torch.logaddexp(*log_p).sum().item()
    for bernoulli in (lambda logits: fd.Bernoulli(logits, event_dims=0), lambda logits: dist.Bernoulli(logits=logits)):
        assert loss(bernoulli) == pytest.approx(expected, rel=1e-10)


def test_a_delta_s_kl_is_pyro_s():
    v, p = torch.randn(B, D), fd.Gaussian(torch.zeros(D))
    with warnings.catch_warnings(action="error"):
        kl = torch.distributions.kl_divergence(dist.Delta(v, event_dim=1), p)
    torch.testing.assert_close(kl, -p.log_prob(v))


def test_a_pickle_is_read_with_and_without_pyro(tmp_path):
    px, x = fd.Poisson(torch.randn(B, D)), data("poisson").float()
    torch.save((px, x), tmp_path / "px.pt")
    again, _ = torch.load(tmp_path / "px.pt", weights_only=False)
    assert type(again) is type(px) and torch.equal(again.log_prob(x), px.log_prob(x))
    program = f"""
import sys, torch, fastelbo
px, x = torch.load({str(tmp_path / "px.pt")!r}, weights_only=False)
assert "pyro" not in sys.modules and type(px) is fastelbo.distributions.Poisson
before = px.log_prob(x)
import pyro
after = fastelbo.distributions.Poisson(px.log_rate)  # of the class that was imported before Pyro
assert isinstance(after, pyro.distributions.torch_distribution.TorchDistributionMixin)
assert torch.equal(after.log_prob(x), before)
pyro.poutine.trace(lambda: pyro.sample("x", after, obs=x)).get_trace()
"""
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, text=True, capture_output=True)
    assert done.returncode == 0, done.stderr
