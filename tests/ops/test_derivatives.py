"""Derivatives of every order, and the ways PyTorch has to ask for them: autograd, torch.func, forward mode."""

from itertools import product

import pytest
import torch
from cases import ROWS
from contracts import FUNCTIONS
from oracle import tensors_of
from torch import Tensor
from torch.autograd import forward_ad

import fastelbo
from fastelbo.likelihoods import LIKELIHOODS

every_function = pytest.mark.parametrize("name", FUNCTIONS)
B, D = 2, 3


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
    close = {"rtol": 1e-5, "atol": 1e-5} if FUNCTIONS[name].drawn else {"rtol": 1e-9, "atol": 1e-9}
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
    close = {"rtol": 1e-5, "atol": 1e-5} if FUNCTIONS[name].drawn else {"rtol": 1e-9, "atol": 1e-9}
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
# Second derivatives over the range of a dtype

DATA = {"reals": (0.0, 1.0, -3.0, 1e3), "[0, 1]": (0.0, 0.3, 1.0), "counts": (0.0, 1e-3, 1.0, 5.0, 1e3, 1e10)}
SIZES = (0.0, 1e-30, 1.0, 17.0, 40.0, 80.0, 89.0, 104.0, 500.0, 710.0, 746.0, 1e4, 1e20)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("likelihood", LIKELIHOODS)
def test_second_derivatives_are_numbers_where_the_first_are_finite(likelihood, dtype):
    row = LIKELIHOODS[likelihood]
    sizes = [*SIZES, torch.finfo(dtype).max / 4]
    values = [s * v for s in (1, -1) for v in sizes]
    if likelihood == "bernoulli_probs":
        values = [0.0, 1e-30, 1e-3, 0.5, 0.999, 1.0]
    ranges = [values] * len(row.parameters)
    if ROWS[likelihood].recon(torch.tensor(-1.0)) > 0 and row.domain == "counts":
        # no mean or theta is negative, and second derivatives have quotients by its cube
        positive = [0.0, torch.finfo(dtype).tiny ** 0.3, 1e-3, *sizes[2:]]
        ranges = [values if "logits" in p else positive for p in row.parameters]
    if len(ranges) == 4:
        ranges = [of[::2] for of in ranges]
    if row.data:
        ranges[-1] = [7.0, 1e3]
    columns = torch.tensor(list(product(DATA[row.domain], *ranges)), dtype=dtype)
    x, *parameters = columns.unbind(1)
    data = parameters[len(parameters) - row.data :]
    parameters = [p.clone().requires_grad_() for p in parameters[: len(parameters) - row.data]]
    log_p = row.log_prob(x, *parameters, *data)
    first = torch.autograd.grad(log_p.sum(), parameters, create_graph=True)
    finite = torch.stack([log_p, *first]).isfinite().all(0)
    assert finite.any()
    for gradient in first:
        for second in torch.autograd.grad(gradient.sum(), parameters, retain_graph=True, materialize_grads=True):
            wrong = finite & second.isnan()
            assert not wrong.any(), columns[wrong][:3].tolist()


@pytest.mark.parametrize("zero_logit", [-800.0, -90.0, -3.0, 0.0, 2.0, 90.0, 800.0])
@pytest.mark.parametrize("log_theta", [-300.0, -1.0, 4.0])
def test_second_derivatives_of_zinb_at_zero(zero_logit, log_theta):
    """Those of log(sigmoid(pi) + sigmoid(-pi) exp(nb)), by mpmath's differences with 800 digits."""
    mpmath = pytest.importorskip("mpmath")
    log_mean = 0.5

    def log_p(m, t, pi):
        m, t, pi = (mpmath.mpf(v) for v in (m, t, pi))
        nb = -mpmath.exp(t) * mpmath.log1p(mpmath.exp(m - t))
        return mpmath.log((mpmath.exp(pi) + mpmath.exp(nb)) / (1 + mpmath.exp(pi)))

    point = torch.tensor([log_mean, log_theta, zero_logit], dtype=torch.float64)
    call = LIKELIHOODS["zinb"].log_prob
    found = torch.func.hessian(lambda p: call(torch.zeros((), dtype=p.dtype), *p))(point)
    with mpmath.workdps(800):
        h, at = mpmath.mpf(10) ** -40, point.tolist()

        def shifted(*moves):
            return log_p(*[mpmath.mpf(v) + h * sum(s for j, s in moves if j == i) for i, v in enumerate(at)])

        for i, j in product(range(3), repeat=2):
            corners = [a * b * shifted((i, a), (j, b)) for a in (1, -1) for b in (1, -1)]
            exact = float(mpmath.fsum(corners) / (4 * h * h))
            assert found[i, j].item() == pytest.approx(exact, rel=1e-9, abs=1e-15)
