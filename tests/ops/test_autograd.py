"""Derivatives of every order, and the ways PyTorch has to ask for them: autograd, torch.func, forward mode, compile."""

from functools import partial

import pytest
import torch
from functions import FUNCTIONS, K
from oracle import gradients, tensors_of, upstream_for
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad
from torch.library import opcheck

import fastelbo

every_function = pytest.mark.parametrize("name", FUNCTIONS)
B, D = 2, 3
ops = torch.ops.fastelbo


def leaves(name: str, b: int = B, d: int = D, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    return [t.to(dtype).requires_grad_() for t in FUNCTIONS[name].make(b, d)]


def scalar(name: str):
    """All results of a function, mixed into one number with fixed weights."""

    def call(*inputs: Tensor) -> Tensor:
        outputs = tensors_of(FUNCTIONS[name].call(*inputs))
        return sum((o * torch.linspace(0.5, 1.5, o.numel(), dtype=o.dtype).reshape(o.shape)).sum() for o in outputs)

    return call


# ----------------------------------------------------------------------------------------------------------------------
# Finite differences


@every_function
def test_gradcheck(name):
    # the noise of a seed has float32 resolution, but is a constant: nothing is lost in the differences
    assert torch.autograd.gradcheck(FUNCTIONS[name].call, leaves(name), fast_mode=False)


@every_function
def test_gradgradcheck(name):
    assert torch.autograd.gradgradcheck(FUNCTIONS[name].call, leaves(name))


@every_function
def test_a_graph_of_the_gradient_changes_nothing(name):
    """create_graph=True takes another path; its first derivatives agree, and the second are the twin's."""
    inputs = leaves(name)
    plain = torch.autograd.grad(scalar(name)(*inputs), inputs)
    first = torch.autograd.grad(scalar(name)(*inputs), inputs, create_graph=True)
    second = torch.autograd.grad(sum(g.square().sum() for g in first), inputs, materialize_grads=True)
    with fastelbo.reference_mode():
        expected = torch.autograd.grad(scalar(name)(*inputs), inputs, create_graph=True)
        expected2 = torch.autograd.grad(sum(g.square().sum() for g in expected), inputs, materialize_grads=True)
    # what is drawn from a seed has float32 resolution in the kernel
    close = {"rtol": 1e-5, "atol": 1e-5} if "seed" in name else {"rtol": 1e-9, "atol": 1e-9}
    for a, b, c in zip(plain, first, expected, strict=True):
        torch.testing.assert_close(a, c, **close)
        torch.testing.assert_close(b, c, **close)
    for a, b in zip(second, expected2, strict=True):
        torch.testing.assert_close(a, b, **close)


# ----------------------------------------------------------------------------------------------------------------------
# torch.func and forward mode


@every_function
def test_torch_func(name):
    """grad, vmap(grad), jvp and hessian run, and agree with autograd of the twin."""
    inputs = [t.detach() for t in leaves(name)]
    call = scalar(name)
    (grad,) = [torch.func.grad(call)(*inputs)]
    again = [t.clone().requires_grad_() for t in inputs]
    close = {"rtol": 1e-5, "atol": 1e-5} if "seed" in name else {"rtol": 1e-9, "atol": 1e-9}
    (expected,) = torch.autograd.grad(call(*again), again[:1])
    torch.testing.assert_close(grad, expected, **close)

    stack = [torch.stack([t, 0.5 * t, 0.9 * t]) for t in inputs]
    per_item = torch.func.vmap(torch.func.grad(call))(*stack)
    for i in range(3):
        torch.testing.assert_close(per_item[i], torch.func.grad(call)(*(t[i] for t in stack)))

    tangent = torch.randn_like(inputs[0])
    _, directional = torch.func.jvp(lambda t: call(t, *inputs[1:]), (inputs[0],), (tangent,))
    torch.testing.assert_close(directional, (expected * tangent).sum(), **close)

    hessian = torch.func.hessian(call)(*inputs)
    with fastelbo.reference_mode():
        expected = torch.autograd.functional.hessian(lambda t: call(t, *inputs[1:]), inputs[0])
    torch.testing.assert_close(hessian, expected)


@every_function
def test_forward_mode(name):
    inputs = [t.detach() for t in leaves(name)]
    tangents = [torch.randn_like(t) for t in inputs]
    with forward_ad.dual_level():
        duals = [forward_ad.make_dual(t, v) for t, v in zip(inputs, tangents, strict=True)]
        directional = forward_ad.unpack_dual(scalar(name)(*duals)).tangent
    grads = torch.autograd.grad(scalar(name)(*(again := [t.requires_grad_() for t in inputs])), again)
    expected = sum((g * v).sum() for g, v in zip(grads, tangents, strict=True))
    torch.testing.assert_close(directional, expected, rtol=1e-5, atol=1e-5)


# ----------------------------------------------------------------------------------------------------------------------
# What PyTorch asks of a registered op


def _op_calls() -> dict[str, tuple]:
    def r(*shape: int) -> Tensor:
        return torch.randn(shape, requires_grad=True)

    def plain(*shapes: tuple[int, ...], dtype: torch.dtype = torch.float32) -> list[Tensor]:
        return [torch.randn(shape, dtype=dtype) for shape in shapes]

    wide = partial(plain, dtype=torch.float64)
    mu, seed = r(4, 5), torch.tensor([3])
    kept = torch.tensor([2, 0, 0, 1, 2, 5]), torch.tensor([3, 0, 0, 1, 3, 1])
    x, mask = torch.rand(4, 6), torch.rand(4, 6) < 0.5
    need = [True] * 5
    return {
        "rsample seed": (ops.rsample.default, (mu, r(4, 5), 3, None, r(4, 5), seed, None, 1)),
        "rsample eps": (ops.rsample.default, (mu, r(4, 5), None, r(4, 5), None, None, r(4, 5), 0)),
        "rsample_kept": (ops._rsample_kept.default, (mu, r(4, 5), None, r(4, 5), *kept, seed)),
        "gaussian_kl": (ops.gaussian_kl.default, (mu, r(4, 5), None, r(4, 5), 0.3)),
        "log_prob": (ops.log_prob.default, (r(3, 4, 6), x, None, None, mask, "bernoulli")),
        "log_prob pair": (ops.log_prob.default, (r(4, 6), r(4, 6), r(4, 6), None, None, "gaussian")),
        "log_prob, shared by rows": (ops.log_prob.default, (r(3, 4, 6), r(4, 6), r(6), None, None, "gaussian")),
        "log_prob, one number": (ops.log_prob.default, (r(4, 6), r(4, 6), r(), None, mask, "laplace")),
        "log_mean_exp": (ops.log_mean_exp.default, (r(4, 5), 1)),
        "elbo_loss": (
            ops.elbo_loss.default,
            (r(3, 4, 6), x, mu, r(4, 5), None, None, None, None, mask, 0.5, None, 0.0, "bernoulli", "mean"),
        ),
        "elbo_loss beta": (
            ops.elbo_loss.default,
            (r(4, 6), x, mu, r(4, 5), r(4, 5), r(4, 5), r(6), None, None, 1.0, r(), 0.1, "laplace", "none"),
        ),
        "multi_sample_loss": (
            ops.multi_sample_loss.default,
            (r(4, 4, 6), x, r(4, 4), None, None, None, mask, "bernoulli", [0.3, 0.5, 2, 1, 0, 1], "sum"),
        ),
        "multi_sample_loss pair": (
            ops.multi_sample_loss.default,
            (r(3, 4, 6), x, r(3, 4), None, r(3, 4, 6), None, None, "gaussian", [0, 0, 1, 1, 0, 1], "none"),
        ),
        "multi_sample_loss gates": (
            ops.multi_sample_loss.default,
            (r(3, 4, 6), x, r(3, 4), r(2, 3, 4), r(), None, None, "gaussian", [0, 0, 1, 0, 1, 0], "mean"),
        ),
        "backward of log_prob": (
            ops._log_prob_backward.default,
            (r(3, 4), r(3, 4, 6), r(4, 6), r(6), None, mask, "gaussian", [True, False, True, False]),
        ),
        "multi_sample_weights": (ops._multi_sample_weights.default, (r(4, 3), [0.3, 0.5, 2, 0, 1, 0])),
        "backward of gaussian_kl": (
            ops._gaussian_kl_backward.default,
            (r(4), mu, r(4, 5), r(4, 5), None, 0.0, [True, False, True, False]),
        ),
        "backward of rsample": (
            ops._rsample_backward.default,
            (r(3, 4, 5), r(4), None, None, mu, r(4, 5), 3, None, None, seed, None, 0, [True] * 2 + [False] * 3),
        ),
        "backward of rsample, gates": (
            ops._rsample_backward.default,
            (r(3, 4, 5), r(4), r(3, 4), r(2, 3, 4), mu, r(4, 5), 3, None, r(4, 5), None, r(3, 4, 5), 0, need),
        ),
        "backward of rsample_kept": (
            ops._rsample_kept_backward.default,
            (r(6, 5), None, None, mu, r(4, 5), None, None, *kept, seed, [True, True, False, False]),
        ),
        "backward of rsample_kept, gates": (
            ops._rsample_kept_backward.default,
            (r(6, 5), r(6), r(2, 6), mu, r(4, 5), r(4, 5), None, *kept, seed, [True, True, True, False]),
        ),
        "backward of log_mean_exp": (ops._log_mean_exp_backward.default, (r(4), r(4, 5), 1)),
        "ppca_log_prob": (ops.ppca_log_prob.default, (r(4, 6), r(6, 2), r(6), r())),
        "backward of ppca_log_prob": (
            ops._ppca_log_prob_backward.default,
            (r(4), r(4, 6), r(6, 2), r(6), r(), *wide((4, 2), (4,), (6, 2), (2, 2), (2, 2)), need[:4]),
        ),
        "ppca_factor": (ops._ppca_factor.default, plain((6, 2), ())),
        "ppca_project": (ops._ppca_project.default, (x, *wide((6, 2)), *plain((6,)))),
        "ppca_rest": (ops._ppca_rest.default, (x, *wide((6, 2)), *plain((6,)), *wide((4, 2), (4,)))),
        "ppca_residual": (
            ops._ppca_residual.default,
            (x, *wide((6, 2)), *plain((6,)), *wide((4, 2), (4, 2), (4,)), need[:3]),
        ),
        "ppca_residual, sums": (
            ops._ppca_residual.default,
            (x, *wide((6, 2)), *plain((6,)), *wide((4, 2), (4, 2), (4,)), [False, True, True]),
        ),
    }


@pytest.mark.parametrize("name", _op_calls())
def test_opcheck(name):
    torch.manual_seed(0)
    op, args = _op_calls()[name]
    opcheck(op, args)


def test_every_op_is_checked():
    registered = {n.split("::")[1] for n in torch._C._dispatch_get_all_op_names() if n.startswith("fastelbo::")}
    checked = {op.name().split("::")[1] for op, _ in _op_calls().values()}
    # the forward ops with gradients are not called by users: autograd calls them below itself
    # and _scale_ only on CUDA devices
    assert registered - checked == {
        "_elbo_loss_forward",
        "_multi_sample_loss_forward",
        "_ppca_log_prob_forward",
        "_scale_",
    }


@pytest.mark.parametrize("fake", [False, True], ids=["meta", "fake"])
def test_shapes_and_dtypes_without_data(fake):
    """Meta and fake tensors give what real ones give, in every dtype."""
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        for name, function in FUNCTIONS.items():
            inputs = [t.to(dtype) for t in function.make(4, 5)]
            real = tensors_of(function.call(*inputs))
            if fake:
                with FakeTensorMode() as mode:
                    empty = tensors_of(function.call(*(mode.from_tensor(t) for t in inputs)))
            else:
                empty = tensors_of(function.call(*(t.to("meta") for t in inputs)))
            for r, e in zip(real, empty, strict=True):
                assert (r.shape, r.dtype, r.stride()) == (e.shape, e.dtype, e.stride()), (name, dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_leaves_the_losses_alone(dtype):
    """Half inputs are taken as they are, float32 comes out; float32 inputs are not rounded."""
    for name in FUNCTIONS:
        for given in (dtype, torch.float32):
            inputs = leaves(name, 4, 5, given)
            expected = tensors_of(FUNCTIONS[name].call(*inputs))
            with torch.autocast("cpu", dtype=dtype):
                actual = tensors_of(FUNCTIONS[name].call(*inputs))
            assert all(torch.equal(a, e) and a.dtype == e.dtype for a, e in zip(actual, expected, strict=True)), name


def test_no_grad_and_inference_mode_give_the_same_values():
    for name, function in FUNCTIONS.items():
        inputs = leaves(name)
        expected = tensors_of(function.call(*inputs))
        for mode in (torch.no_grad, torch.inference_mode):
            with mode():
                actual = tensors_of(function.call(*inputs))
            assert all(torch.equal(a, e) and not a.requires_grad for a, e in zip(actual, expected, strict=True)), name


# ----------------------------------------------------------------------------------------------------------------------
# torch.compile


def _training_step(recon, scale, x, mu, logvar, beta):
    posterior = fastelbo.rsample(mu, logvar, K, prior_mu=torch.zeros_like(mu), seed=torch.tensor([4]))
    elbo = fastelbo.elbo_loss((recon, scale), x, mu, logvar, likelihood="gaussian", beta=beta, return_parts=True)
    bound = fastelbo.iwae_loss(recon, x, posterior.log_ratio, likelihood="laplace", reduction="none")
    kl = fastelbo.gaussian_kl(posterior.z[0].tanh(), logvar, free_bits=0.1)
    fit = fastelbo.bernoulli_log_prob(recon * 2, x.sigmoid(), mask=x > 0)
    return elbo.loss, elbo.log_likelihood, elbo.kl, bound, kl, fastelbo.log_mean_exp(fit), posterior.z


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiled_graph(dynamic):
    """One graph of all functions, without breaks: values and gradients are those of eager calls."""
    compiled = torch.compile(_training_step, fullgraph=True, dynamic=dynamic)
    for b, d in ((4, 5), (6, 9)) if dynamic else ((4, 5),):
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
        return fastelbo.elbo_loss(recon, x, mu, logvar, beta=number, return_parts=True)

    def beta_of_a_module(self, recon, x, mu, logvar, number):
        return self.criterion(recon, x, mu, logvar)

    def free_bits(self, recon, x, mu, logvar, number):
        return fastelbo.elbo_loss(recon, x, mu, logvar, free_bits=number, reduction="none", return_parts=True)

    def free_bits_of_the_kl(self, recon, x, mu, logvar, number):
        return fastelbo.gaussian_kl(mu, logvar, mu[0] * logvar[0], free_bits=number)

    def options_of_a_vae(self, recon, x, mu, logvar, number):
        return self.vae.loss(x, beta=1 - number, free_bits=number, seed=torch.tensor([3]), return_parts=True)

    def ciwae(self, recon, x, mu, logvar, number, estimator="ciwae", option="beta"):
        posterior = fastelbo.rsample(mu, logvar, K, seed=torch.tensor([3]))
        recon = recon + posterior.z.sum(2, keepdim=True)
        options = {"estimator": estimator, option: number, "return_parts": True}
        return fastelbo.multi_sample_loss(recon, x, posterior, **options)

    def vr(self, recon, x, mu, logvar, number):
        return self.ciwae(recon, x, mu, logvar, 2 * number, "vr", "alpha")

    def logvar_of_a_gaussian(self, recon, x, mu, logvar, number):
        return fastelbo.gaussian_log_prob(recon, x, number)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("option", [name for name in vars(_Calls) if name[0] != "_"])
def test_numbers_that_change_from_call_to_call_need_no_new_graph(option, dtype):
    """torch compiles a float as a constant and, once it has changed, as a variable: two graphs for any values."""
    if option == "vr" and torch.__version__ < "2.13":
        pytest.skip("torch 2.11 compiles a graph for every alpha")
    calls = _Calls(5, 7).to(dtype)
    shapes = (K, 4, 5), (4, 5), (4, 7), (4, 7)
    inputs = [(0.7 * torch.randn(s)).to(dtype).requires_grad_(i != 1) for i, s in enumerate(shapes)]
    leaves = [*inputs, *calls.parameters()]
    call, counter = getattr(calls, option), CompileCounterWithBackend("aot_eager")
    torch._dynamo.reset()
    compiled = torch.compile(call, fullgraph=True, backend=counter)
    losses = set()
    for number in torch.linspace(0.2, 0.87, 15).tolist():
        calls.criterion.beta = number
        expected, actual = tensors_of(call(*inputs, number)), tensors_of(compiled(*inputs, number))
        upstream = upstream_for(expected)
        for a, e in zip(actual, expected, strict=True):
            torch.testing.assert_close(a, e)
        for a, e in zip(gradients(actual, leaves, upstream), gradients(expected, leaves, upstream), strict=True):
            torch.testing.assert_close(a, e)
        losses.add(actual[0].sum().item())
    assert counter.frame_count <= 2 and len(losses) == 15
