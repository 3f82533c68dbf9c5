"""Objectives: what they read and refuse, their defaults, and that they are the losses of their names."""

import copy
import dataclasses
import pickle
import re

import pytest
import torch

import fastelbo
from fastelbo import Objective, estimators
from fastelbo.models.objective import OBJECTIVES

B, K, M, D = 5, 6, 3, 4
NUMBERS = {
    "elbo": {"beta": 0.7, "free_bits": 0.1},
    "vr": {"alpha": 0.3},
    "ciwae": {"beta": 0.2},
    "miwae": {"groups": 2},
}
every_objective = pytest.mark.parametrize("name", OBJECTIVES)


def latents(samples: int | None) -> tuple[torch.Tensor, torch.Tensor, fastelbo.Posterior]:
    torch.manual_seed(0)
    mu, logvar = torch.randn(2, B, M, dtype=torch.float64).requires_grad_().unbind()
    posterior = fastelbo.rsample(mu, logvar, samples, seed=1)
    return torch.cat([posterior.z, posterior.z[..., :1]], -1), torch.rand(B, D, dtype=torch.float64), posterior


@every_objective
def test_is_the_loss_of_its_name(name):
    recon, x, posterior = latents(K)
    objective = Objective(name, num_samples=K, **NUMBERS.get(name, {}))
    parts = objective.parts(recon, x, posterior, reduction="none")
    if name == "elbo":
        expected = fastelbo.elbo_parts(recon, x, posterior.mu, posterior.logvar, reduction="none", **NUMBERS[name])
    else:
        options = {"estimator": name, "reduction": "none", **NUMBERS.get(name, {})}
        expected = fastelbo.multi_sample_parts(recon, x, posterior, **options)
    for ours, theirs in zip(parts, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0)
    assert torch.equal(objective.loss(recon, x, posterior, reduction="none"), parts.loss)


def test_the_plain_elbo_draws_no_dimension_of_samples():
    assert Objective("elbo").draws is None and Objective("elbo", num_samples=2).draws == 2
    assert Objective("iwae").draws == 1


def test_defaults_are_written_once():
    assert Objective("elbo").beta == 1.0 and Objective("ciwae").beta == 0.5 and Objective("iwae").beta is None
    assert Objective("elbo") == Objective("elbo", beta=1)
    recon, x, posterior = latents(K)
    ours = Objective("ciwae", num_samples=K).loss(recon, x, posterior)
    assert ours == fastelbo.multi_sample_loss(recon, x, posterior, estimator="ciwae")


def test_is_a_value():
    one, other = Objective("ciwae", num_samples=50, beta=0.5), Objective("ciwae", num_samples=50)
    assert one == other and hash(one) == hash(other) and {one: 1}[other] == 1
    assert one != Objective("ciwae", num_samples=50, beta=0.4)
    assert pickle.loads(pickle.dumps(one)) == copy.deepcopy(one) == one
    assert dataclasses.replace(one, beta=0.1).beta == 0.1
    with pytest.raises(dataclasses.FrozenInstanceError):
        one.beta = 0.3


@pytest.mark.parametrize("as_tensor", [False, True])
def test_numbers_beside_it_take_the_place_of_its_own(as_tensor):
    recon, x, posterior = latents(K)
    objective = Objective("elbo", num_samples=K, beta=0.1, free_bits=0.2)
    beta = torch.tensor(0.7, dtype=torch.float64) if as_tensor else 0.7
    options = {"beta": 0.7, "free_bits": 0.2}
    expected = fastelbo.elbo_loss(recon, x, posterior.mu, posterior.logvar, **options)
    torch.testing.assert_close(objective.loss(recon, x, posterior, beta=beta), expected)
    renyi = Objective("vr", num_samples=K)
    expected = fastelbo.multi_sample_loss(recon, x, posterior, estimator="vr", alpha=0.4)
    torch.testing.assert_close(renyi.loss(recon, x, posterior, alpha=0.4), expected)


def test_a_learned_beta_gets_its_gradient():
    recon, x, posterior = latents(None)
    beta = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)
    parts = Objective("elbo").parts(recon, x, posterior, beta=beta)
    (grad,) = torch.autograd.grad(parts.loss, beta)
    torch.testing.assert_close(grad, parts.kl.mean())


@pytest.mark.parametrize(
    "name, options, error, message",
    [
        ("elb", {}, ValueError, "objective must be one of elbo, .*; got 'elb'"),
        ("iwae", {"beta": 0.5}, ValueError, "beta has no effect with objective 'iwae': leave it out; got 0.5"),
        ("vr", {"free_bits": 0.1}, ValueError, "free_bits has no effect with objective 'vr'"),
        ("elbo", {"groups": 2}, ValueError, "groups has no effect with objective 'elbo'"),
        ("elbo", {"free_bits": -1.0}, ValueError, "free_bits must be at least 0; got -1.0"),
        ("ciwae", {"beta": 1.5}, ValueError, r"beta, .* must be in \[0, 1\]; got 1.5"),
        ("vr", {"alpha": float("inf")}, ValueError, "alpha must be finite; got inf"),
        ("miwae", {"num_samples": 5, "groups": 2}, ValueError, "groups must divide .* K=5; got 2"),
        ("rws", {}, ValueError, "estimator 'rws' needs at least 2 samples"),
        ("elbo", {"num_samples": 0}, ValueError, "num_samples must be at least 1; got 0"),
        ("elbo", {"num_samples": 2.0}, TypeError, "num_samples must be an int; got float"),
        ("elbo", {"beta": torch.tensor(1.0)}, TypeError, "beta must be a float in an Objective; give a tensor to VAE"),
        (None, {}, TypeError, "name must be a str; got None"),
    ],
)
def test_refuses(name, options, error, message):
    with pytest.raises(error, match=message):
        Objective(name, **options)


def test_refuses_numbers_beside_it_that_it_does_not_read():
    recon, x, posterior = latents(K)
    objective = Objective("iwae", num_samples=K)
    with pytest.raises(ValueError, match="beta has no effect with objective 'iwae'"):
        objective.loss(recon, x, posterior, beta=torch.tensor(0.5))
    with pytest.raises(ValueError, match=re.escape("beta, the weight of the ELBO in 'ciwae', must be in [0, 1]")):
        Objective("ciwae", num_samples=K).loss(recon, x, posterior, beta=2.0)


@every_objective
def test_kept_samples_need_weights(name):
    objective = Objective(name, num_samples=K)
    if name in ("elbo", "stl"):
        with pytest.raises(ValueError, match=f"keep has no use with '{name}'"):
            objective.check_keep(2)
        return
    objective.check_keep(K)
    with pytest.raises(ValueError, match=f"keep must be at most num_samples={K}; got {K + 1}"):
        objective.check_keep(K + 1)
    assert objective.row == estimators.estimator(name, K, alpha=0.0, beta=0.5, groups=1)
