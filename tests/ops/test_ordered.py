"""Sums in a fixed order are right, and so are their gradients; test_threads.py has their order."""

import pytest
import torch
from contracts import _r
from torch import Tensor

from fastelbo._internal import ordered
from fastelbo._internal.ordered import ordered_sum

SHAPES = [(40_001,), (300, 131), (1, 50_000), (50_000, 1), (7, 70, 77)]
LAYOUTS = {
    "contiguous": lambda t: t,
    "transposed": lambda t: t.mT.contiguous().mT if t.dim() > 1 else t,
    "a part": lambda t: t.repeat_interleave(2, -1)[..., ::2],
    "expanded": lambda t: t[..., :1].expand(t.shape),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_ordered_sum(shape, layout):
    t = LAYOUTS[layout](_r(*shape))
    for dims in [(0,), (-1,), tuple(range(len(shape)))]:
        dims = tuple(d % len(shape) for d in dims)
        torch.testing.assert_close(ordered_sum(t, *dims), t.sum(dims), rtol=1e-12, atol=1e-10)
        torch.testing.assert_close(ordered_sum(t.float(), *dims).double(), t.sum(dims), rtol=1e-6, atol=2e-3)


def test_a_sum_of_a_half_type_is_rounded_once():
    t = torch.rand(100_000).bfloat16()
    assert torch.equal(ordered_sum(t, 0), t.double().sum().bfloat16())
    assert torch.equal(ordered_sum(t.view(2, -1), 1), t.view(2, -1).double().sum(1).bfloat16())


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("size", [0, 5, 40_000])
def test_reduce(size, reduction):
    loss = _r(size).requires_grad_()
    found = ordered.reduce(loss, reduction)
    expected = loss if reduction == "none" else getattr(loss, reduction)()
    torch.testing.assert_close(found, expected, equal_nan=True)
    up = torch.randn_like(found)
    torch.testing.assert_close(*(torch.autograd.grad(f, loss, up)[0] for f in (found, expected)))


def _loss(t: Tensor, weight: Tensor, expand) -> Tensor:
    return (expand(t, weight.shape) * weight).sin().sum()


@pytest.mark.parametrize("small", [(), (1,), (77,), (70, 1), (1, 77), (7, 1, 1), (1, 1, 1)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_expand(small, dtype):
    """First and second derivatives, and those of torch.func."""
    weight, t = _r(7, 70, 77), _r(*small).to(dtype).requires_grad_()
    wide = t.detach().double().requires_grad_()
    expected = torch.autograd.grad(_loss(wide, weight, Tensor.expand), wide, create_graph=True)[0]
    found = torch.autograd.grad(_loss(t, weight, ordered.expand), t, create_graph=True)[0]
    exact = {"rtol": 1e-9, "atol": 1e-9} if dtype == torch.float64 else {}
    torch.testing.assert_close(found, expected.to(dtype), **exact)
    by_func = torch.func.grad(_loss)(t.detach(), weight, ordered.expand)
    torch.testing.assert_close(by_func, expected.to(dtype), **exact)
    if dtype == torch.float64:
        second = [torch.autograd.grad(g.square().sum(), s)[0] for g, s in ((found, t), (expected, wide))]
        torch.testing.assert_close(*second)


def test_compiled():
    def step(t: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        return ordered.reduce(ordered.expand(t, weight.shape) * weight, "mean"), ordered_sum(weight, 0)

    t, weight = torch.tensor([0.3], requires_grad=True), torch.randn(40_000)
    results = []
    for function in (step, torch.compile(step, fullgraph=True, backend="aot_eager")):
        values = function(t, weight)
        results.append([*values, torch.autograd.grad(values[0], t)[0]])
    assert all(map(torch.equal, *results))


def test_small_tensors_take_one_operation_of_torch():
    """What the order costs where it is torch's own."""
    t, loss = torch.randn(10, 3, requires_grad=True), torch.randn(100)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        ordered.expand(t[0], torch.Size((10, 3)))
        ordered_sum(loss.view(10, 10), 0), ordered.reduce(loss, "mean"), ordered.reduce(loss, "sum")
    calls = [e.name for e in profile.events() if e.cpu_parent is None]
    assert sorted(calls) == sorted(
        ["aten::select", "aten::expand", "aten::view", "aten::sum", "aten::mean", "aten::sum"]
    )
