"""A VAE under torch.func and torch.jit: vmap, ensembles, gradients with outputs beside them, traces; refusals."""

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, stack_module_state, vmap
from toys import D, M, model_of

import fastelbo
from fastelbo import VAE, VAELoss

B, K, GROUPS = 5, 3, 4


def outputs(output) -> list[Tensor]:
    recon, q = output
    return [recon, q.z, q.kl, q.log_ratio, q.log_q, q.mu, q.logvar]


@pytest.mark.parametrize("samples", [None, K])
def test_vmap_over_batches(samples):
    model, x = model_of(), torch.rand(GROUPS, B, D).double()
    eps = torch.randn(GROUPS, *(() if samples is None else (samples,)), B, M).double()
    found = vmap(lambda x, eps: model(x, samples, eps=eps))(x, eps)
    assert type(found.posterior) is fastelbo.Posterior and found.posterior.prior == ()
    for i in range(GROUPS):
        for ours, theirs in zip(outputs(found), outputs(model(x[i], samples, eps=eps[i])), strict=True):
            torch.testing.assert_close(ours[i], theirs, rtol=1e-12, atol=1e-12)


def test_vmap_over_a_learned_prior_and_with_draws():
    prior = nn.Parameter(torch.randn(M).double()), nn.Parameter(torch.randn(M).double())
    model = VAE(model_of().encoder, model_of().decoder, prior=prior)
    x = torch.rand(GROUPS, B, D).double()
    found = vmap(lambda x: model(x, K), randomness="different")(x)
    assert [t.shape for t in found.posterior.prior] == [(GROUPS, M)] * 2
    assert not torch.equal(found.posterior.z[0], found.posterior.z[1])
    same = vmap(lambda x: model(x, K, seed=torch.tensor([3])))(x)
    for i in range(GROUPS):
        torch.testing.assert_close(same.posterior.kl[i], model(x[i], K).posterior.kl, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("objective", ["elbo", "iwae", "dreg", "rws"])
def test_an_ensemble_is_trained_at_once(objective):
    """stack_module_state and functional_call over vmap: every member's gradient is its own."""
    members = [copy.deepcopy(model_of()) for _ in range(GROUPS)]
    for i, member in enumerate(members):
        with torch.no_grad():
            for p in member.parameters():
                p.mul_(1 + 0.1 * i)
    losses = [VAELoss(member, objective, num_samples=K) for member in members]
    x, eps = torch.rand(B, D).double(), torch.randn(GROUPS, K, B, M).double()
    parameters, buffers = stack_module_state(losses)

    def loss(parameters: dict[str, Tensor], buffers: dict[str, Tensor], eps: Tensor) -> Tensor:
        return functional_call(losses[0], (parameters, buffers), (x,), {"eps": eps})

    grads = vmap(grad(loss))(parameters, buffers, eps)
    for i, alone in enumerate(losses):
        expected = torch.autograd.grad(alone(x, eps=eps[i]), list(alone.parameters()))
        for (name, _), theirs in zip(alone.named_parameters(), expected, strict=True):
            torch.testing.assert_close(grads[name][i], theirs, rtol=1e-10, atol=1e-12)


def test_gradients_with_an_output_beside_them():
    model, x, eps = model_of(), torch.rand(B, D).double(), torch.randn(B, M).double()
    parameters = {name: p.detach() for name, p in model.named_parameters()}

    def loss(parameters: dict[str, Tensor]) -> tuple[Tensor, fastelbo.LossParts]:
        output = functional_call(model, parameters, (x,), {"eps": eps})
        parts = fastelbo.Objective("elbo").parts(output.recon, x, output.posterior)
        return parts.loss, (parts, output)

    grads, (parts, output) = grad(loss, has_aux=True)(parameters)
    whole = model.parts(x, eps=eps)
    torch.testing.assert_close(parts.kl, whole.kl)
    torch.testing.assert_close(output.posterior.z, model(x, eps=eps).posterior.z)
    expected = torch.autograd.grad(whole.loss, list(model.parameters()))
    torch.testing.assert_close(list(grads.values()), list(expected))


def test_gradients_of_every_datum():
    model, x, eps = model_of(), torch.rand(B, D).double(), torch.randn(B, M).double()
    parameters = {name: p.detach() for name, p in model.named_parameters()}
    whole = VAELoss(model)

    def loss(parameters: dict[str, Tensor], x: Tensor, eps: Tensor) -> Tensor:
        named = {f"vae.{name}": p for name, p in parameters.items()}
        return functional_call(whole, named, (x[None],), {"eps": eps[None]})

    each = vmap(grad(loss), in_dims=(None, 0, 0))(parameters, x, eps)
    for b in range(B):
        expected = torch.autograd.grad(model.loss(x[b : b + 1], eps=eps[b : b + 1]), list(model.parameters()))
        for ours, theirs in zip(each.values(), expected, strict=True):
            torch.testing.assert_close(ours[b], theirs, rtol=1e-10, atol=1e-12)


@pytest.mark.filterwarnings("ignore")  # of torch.jit, which is old
@pytest.mark.parametrize("samples", [None, K])
def test_a_trace_is_the_model(samples):
    model, x = model_of(), torch.rand(B, D).double()
    eps = torch.randn(*(() if samples is None else (samples,)), B, M).double()
    model.encode(x)

    class Traced(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, x: Tensor, eps: Tensor) -> tuple[Tensor, ...]:
            return tuple(outputs(self.model(x, samples, eps=eps)))

    traced = torch.jit.trace(Traced(), (x, eps))
    other = torch.rand(B, D).double()
    for ours, theirs in zip(traced(other, eps), outputs(model(other, samples, eps=eps)), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


def test_kept_samples_say_no_in_one_sentence():
    model, x = model_of(), torch.rand(B, D).double()
    loss = VAELoss(model, "iwae", num_samples=8)
    parameters = {name: p.detach() for name, p in loss.named_parameters()}
    with pytest.raises(NotImplementedError, match=r"through kept samples has no graph .*torch\.func.*leave keep out"):
        grad(lambda p: functional_call(loss, p, (x,), {"keep": 2, "seed": 1}))(parameters)
