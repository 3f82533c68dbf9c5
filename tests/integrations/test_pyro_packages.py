"""`apply()` of cell2location and of CellBender against Pyro's and CellBender's formulas, in equal models.

CellBender is not installed here: a module of its name has a class that computes its formulas.
"""

import importlib
import sys
from contextlib import nullcontext
from types import ModuleType
from typing import ClassVar
from unittest import mock

import pytest
import torch

pytest.importorskip("pyro", reason="Pyro is not installed: make test-integrations installs it")

import pyro
from pyro import distributions as dist
from pyro.distributions import constraints
from pyro.infer import SVI, Trace_ELBO, TraceEnum_ELBO, config_enumerate
from pyro.infer.autoguide import AutoNormal
from torch import Tensor

import fastelbo
from fastelbo.integrations import cell2location
from fastelbo.integrations._replaced import Applied

B, G = 12, 20


@pytest.fixture(autouse=True)
def _double():
    torch.set_default_dtype(torch.float64)
    pyro.clear_param_store()
    yield
    torch.set_default_dtype(torch.float32)


def counts(mean: float = 3.0) -> Tensor:
    return torch.poisson(mean * torch.rand(B, G))


def loss_and_gradients(model, guide, elbo, x, context) -> tuple[list[Tensor], list[list[tuple[int, ...]]]]:
    """And the shapes of the parameters of fastelbo.log_prob, of every call."""
    with context(), mock.patch.object(fastelbo, "log_prob", wraps=fastelbo.log_prob) as log_prob:
        pyro.clear_param_store()
        torch.manual_seed(1)
        loss = elbo.differentiable_loss(model, guide, x)
        parameters = [p for _, p in sorted(pyro.get_param_store().named_parameters())]
        found = [loss, *torch.autograd.grad(loss, parameters)]
    return found, [[tuple(t.shape) for t in call.args[0]] for call in log_prob.call_args_list]


# ----------------------------------------------------------------------------------------------------------------------
# cell2location.


def of_genes(x: Tensor) -> None:
    """alpha [1, G], as in the regression model of cell types; of cell2location's own model it is [B, G]."""
    with pyro.plate("genes", G, dim=-1):
        alpha = pyro.sample("alpha", dist.Gamma(2.0, 1.0).expand([1, G]))
        mean = pyro.sample("mean", dist.LogNormal(0.0, 1.0).expand([1, G]))
    with pyro.plate("cells", 5 * B, dim=-2, subsample=torch.arange(B)):  # which scales log p
        depth = pyro.sample("depth", dist.LogNormal(torch.zeros(B, 1), 1.0))
        pyro.sample("x", dist.GammaPoisson(alpha, alpha / (depth * mean)), obs=x)


def of_cells_and_genes(x: Tensor) -> None:
    batch = torch.nn.functional.one_hot(torch.arange(B) % 2).to(x)
    alpha = pyro.sample("alpha", dist.Gamma(2.0, 1.0).expand([2, G]).to_event(2))
    mean = pyro.sample("mean", dist.LogNormal(0.0, 1.0).expand([1, G]).to_event(2))
    with pyro.plate("cells", B, dim=-2):
        depth = pyro.sample("depth", dist.LogNormal(torch.zeros(B, 1), 1.0))
        of_cell = batch @ alpha
        pyro.sample("x", dist.GammaPoisson(of_cell, of_cell / (depth * mean)).mask(x < 4), obs=x)


@pytest.mark.parametrize("model, alpha", [(of_genes, (1, G)), (of_cells_and_genes, (B, G))])
def test_gamma_poisson_in_a_step(model, alpha):
    x = counts()
    results = []
    for context in (nullcontext, cell2location.apply):
        torch.manual_seed(0)
        guide = AutoNormal(model)
        results.append(loss_and_gradients(model, guide, Trace_ELBO(), x, context))
    (plain, none), (fused, calls) = results
    torch.testing.assert_close(fused, plain, rtol=1e-11, atol=1e-11)
    assert len(plain) == 7 and not none and calls[0][0] == alpha  # not expanded to cells


def test_gamma_poisson_refuses_what_is_no_count():
    px, x = dist.GammaPoisson(torch.ones(1, G), torch.ones(B, G)), counts()
    for bad in (-1.0, 0.5, torch.inf, torch.nan):
        x[0, 0] = bad
        for context in (nullcontext, cell2location.apply):
            with context(), pytest.raises(ValueError, match="within the support"):
                px.log_prob(x)


def test_gamma_poisson_of_half_types_is_pyro_s():
    px, x = dist.GammaPoisson(torch.ones(G, dtype=torch.bfloat16), torch.ones(B, 1, dtype=torch.bfloat16)), counts()
    before = px.log_prob(x.bfloat16())
    with cell2location.apply():
        assert torch.equal(px.log_prob(x.bfloat16()), before)
    assert "log_prob" in vars(dist.GammaPoisson)


def test_steps_of_svi_follow_the_same_curve():
    x = counts().float()
    torch.set_default_dtype(torch.float32)
    curves = []
    for context in (nullcontext, cell2location.apply):
        pyro.clear_param_store()
        torch.manual_seed(0)
        svi = SVI(of_genes, AutoNormal(of_genes), pyro.optim.Adam({"lr": 0.05}), Trace_ELBO())
        with context():
            curves.append([svi.step(x) for _ in range(10)])
    assert curves[1] == pytest.approx(curves[0], rel=1e-4)


# ----------------------------------------------------------------------------------------------------------------------
# CellBender.


class NegativeBinomialPoissonConvApprox(dist.TorchDistribution):
    """NegativeBinomial(mean mu, theta alpha) + Poisson(lam): by moments a negative binomial; Poisson of small mu."""

    arg_constraints: ClassVar = {name: constraints.positive for name in ("mu", "alpha", "lam")}
    support = constraints.nonnegative_integer

    def __init__(self, mu, alpha, lam, validate_args=None):
        self.mu, self.alpha, self.lam = torch.broadcast_tensors(mu, alpha, lam)
        super().__init__(self.mu.shape, validate_args=validate_args)

    def log_prob(self, value):
        if self._validate_args:
            self._validate_sample(value)
        empty = self.mu < 1e-5 * self.lam
        mu = torch.where(empty, self.lam, self.mu)
        mean = mu + self.lam
        theta = (mean / mu) ** 2 * self.alpha
        nb = torch.lgamma(value + theta) - torch.lgamma(theta) - torch.lgamma(value + 1)
        nb = nb + theta * torch.log(theta / (theta + mean)) + value * torch.log(mean / (theta + mean))
        if torch.isnan(nb).any():
            raise ArithmeticError("NaN")
        return torch.where(empty, dist.Poisson(self.lam, validate_args=False).log_prob(value), nb)


@pytest.fixture
def applied(monkeypatch) -> Applied:
    name = "cellbender.remove_background.distributions.NegativeBinomialPoissonConvApprox"
    parts = name.split(".")
    for length in range(1, len(parts) + 1):
        monkeypatch.setitem(sys.modules, ".".join(parts[:length]), ModuleType(".".join(parts[:length])))
    monkeypatch.setattr(sys.modules[name], parts[-1], NegativeBinomialPoissonConvApprox, raising=False)
    monkeypatch.delitem(sys.modules, "fastelbo.integrations.cellbender", raising=False)
    module = importlib.import_module("fastelbo.integrations.cellbender")
    own = NegativeBinomialPoissonConvApprox.log_prob
    yield module.apply()
    assert NegativeBinomialPoissonConvApprox.log_prob is own
    sys.modules.pop("fastelbo.integrations.cellbender", None)


def droplets(x: Tensor) -> None:
    chi = torch.softmax(pyro.param("chi", torch.linspace(-1, 1, G)), 0)
    ambient = torch.softmax(pyro.param("ambient", torch.linspace(2, 0, G)), 0)
    phi = pyro.sample("phi", dist.Gamma(4.0, 8.0))
    with pyro.plate("droplets", B):
        depth = pyro.sample("depth", dist.LogNormal(torch.full((B,), 4.0), 0.3))[:, None]
        y = pyro.sample("y", dist.Bernoulli(0.4))[..., None]
        mu, lam = y * depth * chi + 1e-10, 20 * ambient.expand(B, G) + 1e-10
        assert y.shape == (2, 1, 1) and mu.shape == (2, B, G)
        px = NegativeBinomialPoissonConvApprox(mu, 1 / phi + 1e-10, lam)
        pyro.sample("x", px.to_event(1), obs=x)


@config_enumerate(default="parallel")
def of_droplets(x: Tensor) -> None:
    phi = pyro.param("phi_loc", torch.tensor(0.5), constraint=constraints.positive)
    pyro.sample("phi", dist.Gamma(4.0, 4 / phi))
    logit, mean = (pyro.param(name, torch.linspace(-1, 1, B)) for name in ("logit", "mean"))
    with pyro.plate("droplets", B):
        pyro.sample("depth", dist.LogNormal(4 + mean, 0.3))
        pyro.sample("y", dist.Bernoulli(logits=logit))


def test_cellbender_s_likelihood_in_a_step_that_enumerates_cells(applied):
    """Of empty droplets mu is 1e-10."""
    x, elbo = counts(), TraceEnum_ELBO(max_plate_nesting=1)
    with applied:
        fused, calls = loss_and_gradients(droplets, of_droplets, elbo, x, nullcontext)
    plain, none = loss_and_gradients(droplets, of_droplets, elbo, x, nullcontext)
    torch.testing.assert_close(fused, plain, rtol=1e-10, atol=1e-10)
    assert len(plain) == 6 and all(gradient.any() for gradient in plain) and not none
    assert calls == [[(2, B, G), (2, B, G)]]


def test_cellbender_s_likelihood_from_no_background_to_no_cell(applied):
    """Where theta passes 1e6, CellBender's gradient by mu has no digits in float64 either."""
    ratio = torch.cat([torch.logspace(-12, -5.1, 14), torch.logspace(-3, 4, 15)])[:, None]
    parameters = [t.requires_grad_() for t in (2 * ratio, torch.tensor(0.7), torch.full_like(ratio, 2.0))]
    x = torch.arange(6.0)
    values = []
    for context in (applied, nullcontext()):
        with context:
            value = NegativeBinomialPoissonConvApprox(*parameters).log_prob(x)
        values.append([value, *torch.autograd.grad(value.sum(), parameters)])
    torch.testing.assert_close(*values, rtol=1e-5, atol=1e-5)


def test_cellbender_s_moments_have_two_derivatives(applied):
    """With a background and without, of one alpha for all."""
    applied.undo()
    parameters = [torch.rand(3, 4) + 0.1, torch.rand(3, 4) + 0.1, torch.tensor(0.7)]
    parameters[0][1] *= 1e-9
    inputs = [t.requires_grad_() for t in parameters]
    mean, theta = sys.modules["fastelbo.integrations.cellbender"]._Moments.apply(*inputs)
    upstream = torch.rand(2, 3, 4)
    found = torch.autograd.grad((mean, theta), inputs, tuple(upstream), retain_graph=True)
    # those of the formula itself
    again = torch.autograd.grad((mean, theta), inputs, tuple(upstream), create_graph=True)
    torch.testing.assert_close(found, again, rtol=1e-12, atol=1e-12)
    assert all(t.any() for t in torch.autograd.grad(sum(t.square().sum() for t in again), inputs))


def test_cellbender_names_what_is_not_a_number(applied):
    mu, one = torch.ones(B, G), torch.ones(())
    mu[0, 0] = torch.nan
    px = NegativeBinomialPoissonConvApprox(mu, one, one, validate_args=False)
    with applied, pytest.raises(ArithmeticError, match="NaN"):
        px.log_prob(counts())
