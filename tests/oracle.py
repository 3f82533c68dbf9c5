"""The accuracy rule, once: how an op is compared with its float64 twin.

The twin is the same public call within `fastelbo.reference_mode()`. Evaluated in float64 on the same (rounded) inputs
it is the truth; evaluated in the inputs' own dtype it is eager PyTorch. Element by element, the op's error may be twice
that of eager PyTorch, plus a floor:

    FLOOR ulp of the compute dtype (float32, or float64 for float64 inputs) of the magnitude, and
    for a result of a half type, one ulp of that type of the result itself.

The magnitude of a value is the sum of its |terms|; that of a gradient is the largest of its tensor, and for a parameter
that data share the sum of its |terms|, where that is larger: 9000 terms of one rounding may cancel. An element of eager
PyTorch may be right by luck: where the rule fails, the error of eager PyTorch is the largest of up to SAMPLES
evaluations in which every intermediate result is off by up to one ulp at random. That says nothing of the roundings
inside a factorization, which differ from LAPACK to LAPACK: there the rule is one of condition, `changes` below.

Where eager PyTorch is not finite, the op must give the same infinity or NaN; elsewhere it must be finite.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

import fastelbo
from fastelbo.likelihoods import LIKELIHOODS

FLOOR = 4.0
SAMPLES = 16  # in float64 an error below half an ulp rounds to none: about one draw in two
HALF_TYPES = (torch.bfloat16, torch.float16)
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)

Call = Callable[..., Any]
_SUMS = (torch.sum, torch.mean, Tensor.sum, Tensor.mean)


def _accurate_bernoulli(x: Tensor, logits: Tensor) -> Tensor:
    """torch's binary_cross_entropy_with_logits subtracts a log sigmoid from the logit; this loses no digits."""
    return x * logsigmoid(logits) + (1 - x) * logsigmoid(-logits)


class _SumsOfMagnitudes(TorchFunctionMode):
    """Every sum and mean is taken over |terms|."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func in _SUMS:
            args = (args[0].abs(), *args[1:])
        return func(*args, **(kwargs or {}))


class _RandomRounding(TorchDispatchMode):
    """Every intermediate result, in the backward too, is off by up to one ulp at random. Probabilities stay below 1."""

    def __init__(self, eps: float) -> None:
        super().__init__()
        self.eps = eps

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        exact = func is torch.ops.aten._to_copy.default or any(r.alias_info for r in func._schema.returns)
        return result if exact else tree_map_only(Tensor, self._off, result)

    def _off(self, t: Tensor) -> Tensor:
        if not t.is_floating_point() or t.is_meta:  # the checks of arguments run on meta tensors
            return t
        off = t * (1 + self.eps * (2 * torch.rand_like(t) - 1))
        return torch.where(t.abs() <= 1, off.clamp(-1, 1), off)


@contextmanager
def reference_mode(exact: bool) -> Iterator[None]:
    """The twins; `exact`: the more accurate ones where torch's own function is not good enough to be the truth."""
    before = dict(LIKELIHOODS)
    if exact:
        LIKELIHOODS["bernoulli"] = LIKELIHOODS["bernoulli"]._replace(log_prob=_accurate_bernoulli)
    try:
        with fastelbo.reference_mode():
            yield
    finally:
        LIKELIHOODS.update(before)


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def tensors_of(result: Any) -> list[Tensor]:
    return [result] if isinstance(result, Tensor) else [t for t in result if t is not None]


def leaves_of(inputs: Sequence[Any], dtype: torch.dtype | None = None) -> list[Any]:
    """New leaves with the values, strides and requires_grad of the inputs; floating tensors in `dtype` if given."""

    def leaf(t: Any) -> Any:
        if not isinstance(t, Tensor) or not t.is_floating_point():
            return t
        fresh = t.detach() if dtype is None else t.detach().to(dtype)
        return fresh.requires_grad_(t.requires_grad)

    return [leaf(t) for t in inputs]


def upstream_for(outputs: Sequence[Tensor]) -> list[Tensor]:
    return [torch.randn(o.shape, dtype=torch.float64).to(o.dtype) for o in outputs]


def gradients(outputs: Sequence[Tensor], inputs: Sequence[Any], upstream: Sequence[Tensor]) -> list[Tensor]:
    """Gradients for the inputs that require one; zeros where no output depends on it."""
    wanted = [t for t in inputs if isinstance(t, Tensor) and t.requires_grad]
    pairs = [(o, u) for o, u in zip(outputs, upstream, strict=True) if o.requires_grad]
    if not pairs or not wanted:
        return [torch.zeros_like(t) for t in wanted]
    roots, grads = [o for o, _ in pairs], [u.to(o.dtype) for o, u in pairs]
    return list(torch.autograd.grad(roots, wanted, grads, allow_unused=True, materialize_grads=True))


def evaluate(call: Call, inputs: Sequence[Any], upstream: Sequence[Tensor]) -> list[Tensor]:
    """Values, then gradients."""
    outputs = tensors_of(call(*inputs))
    shapes = [tuple(o.shape) for o in outputs], [tuple(u.shape) for u in upstream]
    assert shapes[0] == shapes[1], f"the twin's results have the shapes {shapes[0]}, the op's {shapes[1]}"
    return [*outputs, *gradients(outputs, inputs, upstream)]


def assert_accurate(
    actual: Tensor,
    eager: Tensor,
    exact: Tensor,
    magnitude: Tensor,
    what: str = "result",
    sampled: Iterable[Tensor] = (),
) -> None:
    """`actual` is as good as the rule at the top of this file asks; `sampled`: eager's errors by random rounding."""
    assert actual.dtype == eager.dtype, f"{what}: dtype {actual.dtype}, expected {eager.dtype}"
    assert actual.shape == eager.shape, f"{what}: shape {tuple(actual.shape)}, expected {tuple(eager.shape)}"
    if actual.numel() == 0:
        return
    a, e, exact, magnitude = (t.detach().double() for t in (actual, eager, exact, magnitude))
    finite = e.isfinite()
    torch.testing.assert_close(a[~finite], e[~finite], rtol=0, atol=0, equal_nan=True, msg=lambda m: f"{what}: {m}")
    assert a[finite].isfinite().all(), f"{what}: not finite where eager PyTorch is"
    compute = torch.finfo(compute_dtype(actual.dtype))
    floor = FLOOR * compute.eps * magnitude + compute.tiny
    if actual.dtype in HALF_TYPES:
        half = torch.finfo(actual.dtype)
        floor = floor + half.eps * exact.abs().clamp(min=half.tiny)
    error, eager_error = (a - exact).abs(), (e - exact).abs()
    wrong = finite & (a != exact) & (error > 2 * eager_error + floor)
    samples = iter(sampled)
    while wrong.any() and (sample := next(samples, None)) is not None:
        eager_error = torch.maximum(eager_error, sample)
        wrong &= error > 2 * eager_error + floor
    if wrong.any():
        allowed = 2 * eager_error + floor
        at = int(torch.where(wrong, error / allowed, 0.0).argmax())
        a, e, exact, error, allowed = (t.flatten()[at].item() for t in (a, e, exact, error, allowed))
        raise AssertionError(
            f"{what}, element {at} of {tuple(actual.shape)} {actual.dtype}: {a!r}, exactly {exact!r}, eager {e!r}; "
            f"the error is {error:.3g}, {allowed:.3g} is allowed"
        )


def _sum_of_magnitudes(twin: Call, inputs: list[Any], index: int, like: int, upstream: Sequence[Tensor]) -> Tensor:
    """Of the gradient of inputs[index], which broadcasts to inputs[like]: the sum of the |terms| of each element."""
    small = inputs[index]
    full = small.detach().expand(inputs[like].shape).clone().requires_grad_()
    outputs = tensors_of(twin(*inputs[:index], full, *inputs[index + 1 :]))
    return gradients(outputs, [full], upstream)[0].abs().sum_to_size(small.shape)


def check(
    call: Call,
    *inputs: Any,
    twin: Call | None = None,
    label: str = "",
    shared: Sequence[int] | Mapping[int, int] = (),
    like: int = 0,
    roundings: float = 0.0,
) -> None:
    """Values and all gradients of `call(*inputs)` against `twin(*inputs)` (or the same call) in reference mode.

    The upstream gradients are random and differ from element to element. Gradients are taken for the inputs that
    require one. `shared`: the indices of inputs that broadcast to the one of index `like`, or to those of a mapping.
    `roundings`: of a result that a LAPACK has a part in, how many roundings of the inputs the error may amount to,
    where that is more than eager's.
    """
    twin = twin or call
    leaves, wide = leaves_of(inputs), partial(leaves_of, inputs, torch.float64)
    outputs = tensors_of(call(*leaves))
    upstream = upstream_for(outputs)
    actual = [*outputs, *gradients(outputs, leaves, upstream)]
    with reference_mode(exact=False):
        eager = evaluate(twin, leaves_of(inputs), upstream)
    with reference_mode(exact=True):
        exact = evaluate(twin, wide(), upstream)
        with _SumsOfMagnitudes():
            magnitudes = [
                torch.maximum(m.abs(), x.abs()) for m, x in zip(tensors_of(twin(*wide())), exact, strict=False)
            ]
    magnitudes += [
        x.abs().nan_to_num(0.0, 0.0, 0.0).max().expand(x.shape) if x.numel() else x for x in exact[len(outputs) :]
    ]
    wanted = [i for i, t in enumerate(inputs) if isinstance(t, Tensor) and t.requires_grad]
    for index in shared:
        if index in wanted:
            with reference_mode(exact=True):
                whole = shared[index] if isinstance(shared, Mapping) else like
                terms = _sum_of_magnitudes(twin, wide(), index, whole, upstream)
            at = len(outputs) + wanted.index(index)
            magnitudes[at] = torch.maximum(magnitudes[at], terms)
    random_runs: list[list[Tensor]] = []

    def sampled(index: int) -> Iterator[Tensor]:
        for i in range(SAMPLES):
            if len(random_runs) == i:
                eps = max(torch.finfo(compute_dtype(o.dtype)).eps for o in outputs)
                with reference_mode(exact=True), _RandomRounding(eps):
                    random_runs.append(evaluate(twin, wide(), upstream))
            yield (random_runs[i][index].double() - exact[index]).detach().abs().nan_to_num()
        if roundings:
            eps = torch.finfo(compute_dtype(outputs[0].dtype)).eps
            with reference_mode(exact=True):
                yield roundings / 2 * eps * changes(twin, wide(), upstream)[index]

    names = [f"gradient of input {i}" for i in wanted]
    names = [*(f"output {i}" for i in range(len(outputs))), *names]
    for i, name in enumerate(names):
        if i < len(outputs):
            assert actual[i].requires_grad == eager[i].requires_grad, f"{label} {name}: requires_grad is wrong"
        what = f"{label} {name}".strip()
        assert_accurate(actual[i], eager[i], exact[i], magnitudes[i], what, sampled(i))


def changes(function: Call, inputs: Sequence[Any], upstream: Sequence[Tensor]) -> list[Tensor]:
    """The condition of values and gradients, float64 inputs: the largest change of each tensor, per relative error of
    the inputs, in SAMPLES draws of such errors.

    The result of a backward stable algorithm is that of inputs which are off by a few roundings (Higham 2002, sec. 1.6
    and 19.3), whatever the order of its sums. The errors drawn here are 1e-9: far above float64's own, small enough for
    the change to be linear in them.
    """
    off = 2.0**-30
    exact = evaluate(function, leaves_of(inputs), upstream)
    largest = [0.0] * len(exact)
    for _ in range(SAMPLES):
        drawn = [
            t.detach() * (1 + off * (2 * torch.rand_like(t) - 1))
            if isinstance(t, Tensor) and t.is_floating_point()
            else t
            for t in inputs
        ]
        for d, t in zip(drawn, inputs, strict=True):
            if isinstance(t, Tensor) and t.requires_grad:
                d.requires_grad_()
        found = evaluate(function, drawn, upstream)
        pairs = zip(largest, found, exact, strict=True)
        largest = [max(m, float((a - e).detach().abs().max())) for m, a, e in pairs]
    return [torch.full_like(e, m / off).detach() for m, e in zip(largest, exact, strict=True)]


def allocated(function: Callable[[], Any]) -> int:
    """Bytes that `function` allocates for tensors, whether it frees them or not."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        function()
    events = profile.profiler.kineto_results.events()
    return sum(max(e.nbytes(), 0) for e in events if e.name() == "[memory]")


def peak(function: Callable[[], Any]) -> int:
    """Bytes of tensors that exist at a time, above those before, at most."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        function()
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    held = torch.tensor([e.nbytes() for e in sorted(events, key=lambda e: e.start_ns())]).cumsum(0)
    return int(held.max())


def assert_backward_repeats(loss: Tensor, inputs: Sequence[Tensor], upstream: float) -> None:
    """A second and a third backward are right, also when the first one's results were overwritten by the user."""
    up = torch.full_like(loss, upstream)
    first = torch.autograd.grad(loss, inputs, up, retain_graph=True)
    kept = [g.clone() for g in first]
    for g in first:
        g.mul_(-3).add_(1)
    second = torch.autograd.grad(loss, inputs, 2 * up, retain_graph=True)
    third = torch.autograd.grad(loss, inputs, up)
    for a, b, c in zip(kept, second, third, strict=True):
        torch.testing.assert_close(b, 2 * a, rtol=1e-6, atol=0)
        assert torch.equal(c, a)
