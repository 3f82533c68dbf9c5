"""log p of every element: `log_prob(reduce=False)` against the float64 twin, over shapes, dtypes, masks and layouts."""

import math

import pytest
import torch
from cases import REPRESENTATIVES, ROWS
from torch import Tensor

import fastelbo
from fastelbo import distributions, likelihoods, reference

LIKELIHOODS = [
    (name, n) for name, row in likelihoods.LIKELIHOODS.items() for n in range(row.fewest, len(row.parameters) + 1)
]
MANY = [(name, len(likelihoods.get(name).parameters)) for name, _ in REPRESENTATIVES] + [("zinb", 3)]
FEW = [("bernoulli", 1), ("nb", 2), ("beta_binomial", 3), ("nb_mixture", 4)]
# x, then the parameters, for K = 3 samples, B rows and D columns
SHAPES = {
    "full": ((5, 70), [(5, 70)] * 4),
    "samples": ((5, 70), [(3, 5, 70), (70,), (3, 5, 70), (5, 70)]),
    "rows and columns": ((5, 70), [(5, 1), (1, 70), (), (5, 70)]),
    "columns and rows": ((5, 70), [(70,), (5, 1), (1, 1), (5, 1)]),
    "samples of rows": ((5, 70), [(3, 5, 1), (70,), (1, 5, 70), ()]),
    "short rows": ((90, 3), [(90, 3), (3,), (90, 1), (3,)]),
    "samples of short rows": ((90, 3), [(3, 90, 3), (3,), (3, 1, 1), (90, 1)]),
    "images": ((4, 2, 6, 8), [(4, 2, 6, 8), (6, 1), (4, 1, 1, 1), (8,)]),
    "one row": ((200,), [(200,), (), (200,), ()]),
    "samples of one row": ((200,), [(3, 200), (200,), (3, 1), (200,)]),
    "one number": ((), [(), (), (), ()]),
    "samples of one number": ((), [(3,), (), (3,), (3,)]),
    "nothing": ((0, 70), [(0, 70), (70,), (), (0, 70)]),
    "long": ((2, 5000), [(2, 1), (5000,), (), (5000,)]),
}


def data(likelihood: str, shape: tuple[int, ...]) -> Tensor:
    domain = likelihoods.get(likelihood).domain
    if domain == "counts":
        return torch.poisson(torch.full(shape, 1.5))
    return torch.rand(shape) if domain == "[0, 1]" else torch.randn(shape)


def made(
    likelihood: str, count: int, shapes: list[tuple[int, ...]], dtype: torch.dtype = torch.float32
) -> list[Tensor]:
    """Of the size of 1, and totals of some more than there are counts."""
    row = likelihoods.get(likelihood)
    found = [torch.randn(shape, dtype=dtype) for shape in shapes[:count]]
    positive = ROWS[likelihood].recon(torch.tensor(-1.0)) > 0
    if likelihood == "bernoulli_probs":
        found[0] = torch.sigmoid(found[0])
    elif positive:
        found = [t if "logits" in name else t.exp() for name, t in zip(row.parameters, found, strict=False)]
    if row.data:
        found[-1] = (found[-1] + 19).round()
    return found


def learned(likelihood: str, parameters: list[Tensor]) -> list[Tensor]:
    """All but data, as leaves."""
    return [t.requires_grad_() for t in parameters[: len(parameters) - likelihoods.get(likelihood).data]]


def twin(parameters: list[Tensor], x: Tensor, likelihood: str, mask: Tensor | None = None) -> Tensor:
    """By the formula of one element, in float64."""
    samples = [t.shape[0] for t in parameters if t.dim() > x.dim()]
    shape = (*samples[:1], *x.shape)
    wide = [t.double().expand(shape) for t in parameters]
    weight = torch.ones((), dtype=torch.float64) if mask is None else mask.double()
    seen = (weight != 0).expand(shape)
    wide = [torch.where(seen, t, 0.5) for t in wide]
    found = likelihoods.get(likelihood).log_prob(torch.where(seen, x.double().expand(shape), 0.5), *wide)
    return torch.where(seen, found * weight, 0.0)


# every likelihood in one shape, those of every kind in two, and of as many parameters as there may be in the others
WIDE = {"full": LIKELIHOODS, "samples": MANY, "rows and columns": MANY}
CASES = [(*case, shapes) for shapes in SHAPES for case in WIDE.get(shapes, FEW)]


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("likelihood, count, shapes", CASES)
def test_values_and_gradients(likelihood, count, shapes, masked):
    torch.manual_seed(0)
    x, parameters = data(likelihood, SHAPES[shapes][0]), made(likelihood, count, SHAPES[shapes][1])
    mask = None
    if masked:
        mask = torch.where(torch.rand(x.shape) < 0.3, 0.0, torch.rand(x.shape))
        x = torch.where(mask == 0, math.nan, x)
    counts = likelihoods.get(likelihood).domain == "counts"
    leaves = learned(likelihood, parameters) + ([] if counts or not x.numel() else [x.requires_grad_()])
    recon = parameters[0] if count == 1 else tuple(parameters)
    found = fastelbo.log_prob(recon, x, likelihood=likelihood, mask=mask, reduce=False)
    wide, wide_x = [t.detach().double() for t in parameters], x.detach().double().requires_grad_()
    wanted = [*learned(likelihood, wide), wide_x][: len(leaves)]
    expected = twin(wide, wide_x, likelihood, mask)
    assert found.shape == expected.shape and found.dtype == torch.float32
    torch.testing.assert_close(found.double(), expected, rtol=2e-5, atol=2e-5)
    upstream = torch.randn_like(found)
    grads = torch.autograd.grad(found, leaves, upstream)
    wanted = torch.autograd.grad(expected, wanted, upstream.double(), allow_unused=True)
    for ours, theirs in zip(grads, wanted, strict=True):
        theirs = torch.zeros_like(ours).double() if theirs is None else theirs
        scale = float(theirs.abs().max()) if theirs.numel() else 0.0
        torch.testing.assert_close(ours.double(), theirs, rtol=1e-4, atol=1e-5 * (1 + scale))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("likelihood, count", LIKELIHOODS)
def test_dtypes(likelihood, count, dtype):
    torch.manual_seed(0)
    x, parameters = data(likelihood, (6, 90)).to(dtype), made(likelihood, count, [(6, 90), (90,), (6, 1), (90,)], dtype)
    leaves = learned(likelihood, parameters)
    found = fastelbo.log_prob(tuple(parameters) if count > 1 else parameters[0], x, likelihood=likelihood, reduce=False)
    wide = [t.detach().double() for t in parameters]
    wanted = learned(likelihood, wide)
    expected = twin(wide, x, likelihood)
    assert found.dtype == (dtype if dtype == torch.float64 else torch.float32)
    tight = 1e-10 if dtype == torch.float64 else 2e-5
    torch.testing.assert_close(found.double(), expected, rtol=tight, atol=tight)
    upstream = torch.randn_like(found)
    wanted = torch.autograd.grad(expected, wanted, upstream.double())
    rounding = 1e-9 if dtype == torch.float64 else 2e-2
    for ours, theirs in zip(torch.autograd.grad(found, leaves, upstream), wanted, strict=True):
        assert ours.dtype == dtype
        torch.testing.assert_close(ours.double(), theirs, rtol=rounding, atol=rounding)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int32, torch.int64])
def test_integers(dtype):
    x, log_mean = torch.randint(0, 9, (5, 80)).to(dtype), torch.randn(5, 80)
    found = fastelbo.log_prob((log_mean, torch.zeros(())), x, likelihood="nb", reduce=False)
    assert torch.equal(found, fastelbo.log_prob((log_mean, torch.zeros(())), x.float(), likelihood="nb", reduce=False))


@pytest.mark.parametrize("likelihood, count", LIKELIHOODS)
def test_it_sums_to_log_prob(likelihood, count):
    x, parameters = data(likelihood, (5, 700)), made(likelihood, count, [(5, 700)] * 4)
    recon = parameters[0] if count == 1 else tuple(parameters)
    whole = fastelbo.log_prob(recon, x, likelihood=likelihood)
    torch.testing.assert_close(
        fastelbo.log_prob(recon, x, likelihood=likelihood, reduce=False).double().sum(1).float(), whole
    )


@pytest.mark.parametrize("likelihood, count", LIKELIHOODS)
def test_derivatives_of_the_first_and_second_order(likelihood, count):
    torch.manual_seed(0)
    x = data(likelihood, (2, 3)).double().clamp(0.2, 3.0) if likelihood != "laplace" else torch.randn(2, 3).double() + 5
    parameters = made(likelihood, count, [(2, 3), (3,), (2, 1), (3,)], torch.float64)
    leaves = learned(likelihood, parameters)
    mask = torch.tensor([[1.0, 0.0, 2.0], [0.5, 1.0, 0.0]])

    def function(*recon: Tensor) -> Tensor:
        given = (*recon, *parameters[len(recon) :])
        return fastelbo.log_prob(
            given[0] if count == 1 else given,
            x.clamp(max=1.0 if "bern" in likelihood else 9.0),
            likelihood=likelihood,
            mask=mask,
            reduce=False,
        )

    torch.autograd.gradcheck(function, leaves)
    torch.autograd.gradgradcheck(function, leaves)


@pytest.mark.parametrize("shapes", ["rows and columns", "samples", "short rows", "one number"])
def test_compiled(shapes):
    torch.manual_seed(0)
    x, (mean, logvar, _) = data("gaussian", SHAPES[shapes][0]), made("gaussian", 3, SHAPES[shapes][1])

    def function(mean: Tensor, logvar: Tensor, x: Tensor) -> Tensor:
        return fastelbo.log_prob((mean, logvar), x, likelihood="gaussian", reduce=False).sin().sum()

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    results = []
    for call in (function, compiled):
        leaves = [t.detach().requires_grad_() for t in (mean, logvar)]
        value = call(*leaves, x)
        results.append([value, *torch.autograd.grad(value, leaves)])
    torch.testing.assert_close(*results)


def test_layouts():
    """Permuted parameters and data give the same bits as contiguous ones."""
    mean, logvar, x = torch.randn(70, 6).T, torch.randn(6, 140)[:, ::2], torch.randn(70, 6).T
    found = fastelbo.log_prob((mean, logvar), x, likelihood="gaussian", reduce=False)
    assert torch.equal(
        found,
        fastelbo.log_prob(
            (mean.contiguous(), logvar.contiguous()), x.contiguous(), likelihood="gaussian", reduce=False
        ),
    )


def test_an_upstream_gradient_of_nothing_leaves_nothing():
    """NaN that reaches a masked element, and zeros beside infinite gradients."""
    logits, x = torch.randn(3, 80, requires_grad=True), torch.rand(3, 80)
    mask = torch.rand(3, 80) < 0.5
    found = fastelbo.log_prob(logits, x, mask=mask, reduce=False)
    upstream = torch.where(mask, torch.randn(3, 80), math.nan)
    (grad,) = torch.autograd.grad(found, logits, upstream)
    assert grad.isfinite().all() and (grad[~mask] == 0).all() and (grad[mask] != 0).all()


@pytest.mark.parametrize(
    "recon, x, message",
    [
        (torch.randn(5, 7), torch.rand(5, 8), "the first tensor of recon must broadcast to the shape \\(5, 8\\) of x"),
        ((torch.randn(5, 8), torch.randn(6, 1)), torch.rand(5, 8), "the second tensor of recon must broadcast"),
        (torch.randn(2, 3, 5, 8), torch.rand(5, 8), "the first tensor of recon must broadcast"),
    ],
)
def test_what_does_not_broadcast(recon, x, message):
    with pytest.raises(ValueError, match=message):
        fastelbo.log_prob(recon, x, likelihood="gaussian", reduce=False)


@pytest.mark.parametrize(
    "own, batch", [((6, 5), (6, 5)), ((4, 6, 5), (5,)), ((5,), (6, 5)), ((), (6, 1)), ((2, 1, 5), (6, 1))]
)
def test_distributions_without_event(own, batch):
    torch.manual_seed(0)
    x = torch.poisson(torch.full(own, 2.0))
    log_mean, log_theta = torch.randn(batch, requires_grad=True), torch.randn(batch[-1:], requires_grad=True)
    ours = distributions.NegativeBinomial(log_mean, log_theta, event_dims=0)
    found, expected = ours.log_prob(x), ours.of_torch().log_prob(x)
    assert found.shape == expected.shape
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    upstream = torch.randn_like(found)
    for a, b in zip(*(torch.autograd.grad(t, (log_mean, log_theta), upstream) for t in (found, expected)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)


def test_the_twin_is_the_reference():
    x, mean, logvar = torch.randn(4, 70), torch.randn(4, 70), torch.randn(70)
    with fastelbo.reference_mode():
        found = fastelbo.log_prob((mean, logvar), x, likelihood="gaussian", reduce=False)
    assert torch.equal(found, reference.log_prob_elements([mean, logvar], x, None, "gaussian"))
