"""torch.compile: every op by opcheck, every function in one graph, and numbers that change without a new graph."""

import pytest
import torch
from contracts import FUNCTIONS, K, op_calls
from oracle import gradients, tensors_of, upstream_for
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.library import opcheck

import fastelbo

QUICK = ("test_schema", "test_autograd_registration", "test_faketensor")


@pytest.mark.parametrize("name", op_calls())
def test_opcheck(name):
    opcheck(*op_calls()[name], test_utils=QUICK)


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=pytest.mark.slow if n.startswith("backward") else []) for n in op_calls()]
)
def test_opcheck_of_graphs_with_any_shapes(name):
    """Backwards are compiled by test_one_graph, too."""
    opcheck(*op_calls()[name], test_utils="test_aot_dispatch_dynamic")


def test_every_op_is_checked():
    registered = {n.split("::")[1] for n in torch._C._dispatch_get_all_op_names() if n.startswith("fastelbo::")}
    checked = {op.name().split("::")[1] for op, _ in op_calls().values()}
    # autograd calls these two: the latter on CUDA devices alone
    assert registered - checked == {
        "_ppca_log_prob_forward",
        "_scale_",
    }


INDUCTOR = (  # a row of each op
    *("bernoulli_log_prob", "gaussian_kl", "rsample, seed", "rsample, kept", "log_mean_exp"),
    *("elbo_loss mean", "iwae_loss mean", "multi_sample_loss, ciwae", "mixture_log_prob", "ppca_log_prob"),
)


@pytest.mark.parametrize(
    "name, backend",
    [
        *((name, "aot_eager") for name in FUNCTIONS),
        *(pytest.param(name, "inductor", marks=pytest.mark.slow) for name in INDUCTOR),
    ],
)
def test_one_graph(name, backend):
    """Without breaks: values and gradients are those of eager calls."""
    torch._dynamo.reset()
    call = FUNCTIONS[name].call
    compiled = torch.compile(call, fullgraph=True, backend=backend)
    inputs = [t.float().requires_grad_() for t in FUNCTIONS[name].make(4, 5)]
    expected, actual = tensors_of(call(*inputs)), tensors_of(compiled(*inputs))
    upstream = upstream_for(expected)
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, e)
    for a, e in zip(gradients(actual, inputs, upstream), gradients(expected, inputs, upstream), strict=True):
        torch.testing.assert_close(a, e)


def _training_step(recon, scale, x, mu, logvar, beta):
    posterior = fastelbo.rsample(mu, logvar, K, prior_mu=torch.zeros_like(mu), seed=torch.tensor([4]))
    elbo = fastelbo.elbo_parts((recon, scale), x, mu, logvar, likelihood="gaussian", beta=beta)
    bound = fastelbo.iwae_loss(recon, x, posterior.log_ratio, likelihood="laplace", reduction="none")
    kl = fastelbo.gaussian_kl(posterior.z[0].tanh(), logvar, free_bits=0.1)
    fit = fastelbo.bernoulli_log_prob(recon * 2, x.sigmoid(), mask=x > 0)
    return elbo.loss, elbo.log_likelihood, elbo.kl, bound, kl, fastelbo.log_mean_exp(fit), posterior.z


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_graph_of_several_functions_and_any_shape(backend):
    torch._dynamo.reset()
    compiled = torch.compile(_training_step, fullgraph=True, dynamic=True, backend=backend)
    for b, d in ((4, 5), (6, 9)):
        shapes = (K, b, d), (K, b, d), (b, d), (b, 7), (b, 7), ()
        inputs = [torch.randn(s).requires_grad_(i != 2) for i, s in enumerate(shapes)]
        expected = tensors_of(_training_step(*inputs))
        upstream = upstream_for(expected)
        expected_grads = gradients(expected, inputs, upstream)
        actual = tensors_of(compiled(*inputs))
        for a, e in zip(actual, expected, strict=True):
            torch.testing.assert_close(a, e)
        for a, e in zip(gradients(actual, inputs, upstream), expected_grads, strict=True):
            torch.testing.assert_close(a, e)


class _Calls(nn.Module):
    """Every option that is a number and may change from step to step: `number` is its value."""

    def __init__(self, d: int, latent: int) -> None:
        super().__init__()
        self.criterion = fastelbo.ELBOLoss(reduction="sum", free_bits=0.1)
        self.vae = fastelbo.VAE(nn.Linear(d, 2 * latent), nn.Linear(latent, d))

    def beta(self, recon, x, mu, logvar, number):
        return fastelbo.elbo_parts(recon, x, mu, logvar, beta=number)

    def beta_of_a_module(self, recon, x, mu, logvar, number):
        return self.criterion(recon, x, mu, logvar)

    def free_bits(self, recon, x, mu, logvar, number):
        return fastelbo.elbo_parts(recon, x, mu, logvar, free_bits=number, reduction="none")

    def free_bits_of_the_kl(self, recon, x, mu, logvar, number):
        return fastelbo.gaussian_kl(mu, logvar, mu[0] * logvar[0], free_bits=number)

    def options_of_a_vae(self, recon, x, mu, logvar, number):
        return self.vae.parts(x, beta=1 - number, free_bits=number, seed=torch.tensor([3]))

    def ciwae(self, recon, x, mu, logvar, number, estimator="ciwae", option="beta"):
        posterior = fastelbo.rsample(mu, logvar, K, seed=torch.tensor([3]))
        recon = recon + posterior.z.sum(2, keepdim=True)
        options = {"estimator": estimator, option: number}
        return fastelbo.multi_sample_parts(recon, x, posterior, **options)

    def vr(self, recon, x, mu, logvar, number):
        return self.ciwae(recon, x, mu, logvar, 2 * number, "vr", "alpha")

    def logvar_of_a_gaussian(self, recon, x, mu, logvar, number):
        return fastelbo.gaussian_log_prob(recon, x, number)


@pytest.mark.parametrize("dtype", [torch.float32, pytest.param(torch.float64, marks=pytest.mark.slow)], ids=str)
@pytest.mark.parametrize("option", [name for name in vars(_Calls) if name[0] != "_"])
def test_numbers_that_change_from_call_to_call_need_no_new_graph(option, dtype):
    """torch compiles a float as a constant and, once it has changed, as a variable: two graphs for any values."""
    if option == "vr" and torch.__version__ < "2.13":
        pytest.skip("torch 2.11 compiles a graph for every alpha")
    calls = _Calls(5, 7).to(dtype)
    shapes = (K, 4, 5), (4, 5), (4, 7), (4, 7)
    inputs = [(0.7 * torch.randn(s)).to(dtype).requires_grad_(i != 1) for i, s in enumerate(shapes)]
    inputs[1].sigmoid_()
    leaves = [*inputs, *calls.parameters()]
    call, counter = getattr(calls, option), CompileCounterWithBackend("aot_eager")
    torch._dynamo.reset()
    compiled = torch.compile(call, fullgraph=True, backend=counter)
    losses = set()
    for number in torch.linspace(0.2, 0.87, 6).tolist():
        calls.criterion.beta = number
        expected, actual = tensors_of(call(*inputs, number)), tensors_of(compiled(*inputs, number))
        upstream = upstream_for(expected)
        for a, e in zip(actual, expected, strict=True):
            torch.testing.assert_close(a, e)
        for a, e in zip(gradients(actual, leaves, upstream), gradients(expected, leaves, upstream), strict=True):
            torch.testing.assert_close(a, e)
        losses.add(actual[0].sum().item())
    assert counter.frame_count <= 2 and len(losses) == 6
