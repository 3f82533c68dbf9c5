"""log_prob, bernoulli_log_prob and gaussian_log_prob: values and gradients, masks, shapes and extremes."""

import math
from itertools import product

import pytest
import torch
import torch.distributions as td
from cases import (
    LIKELIHOOD_IDS,
    LIKELIHOODS,
    REPRESENTATIVE_IDS,
    REPRESENTATIVES,
    ROWS,
    draw,
    further,
    holds,
    is_counts,
    joined,
)
from oracle import DTYPES, HALF_TYPES, allocated, check, gradients
from torch import Tensor
from torch.nn.functional import logsigmoid

import fastelbo
from fastelbo import likelihoods
from fastelbo._internal import domains
from fastelbo.losses import likelihood_mean, likelihood_sample
from fastelbo.reference import COUNTS, read_data

every_likelihood = pytest.mark.parametrize("likelihood", LIKELIHOODS, ids=LIKELIHOOD_IDS)
some_likelihoods = pytest.mark.parametrize("likelihood", REPRESENTATIVES, ids=REPRESENTATIVE_IDS)
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
LONG = ("nb_mixture", "beta_binomial")  # formulas whose twins take long
inf, nan = float("inf"), float("nan")


def log_prob(name: str):
    """(recon, x, second, third, fourth, mask) -> log p under the likelihood of that name."""

    def call(
        recon: Tensor,
        x: Tensor,
        second: Tensor | None = None,
        third: Tensor | None = None,
        fourth: Tensor | None = None,
        mask: Tensor | None = None,
    ) -> Tensor:
        return fastelbo.log_prob(joined(recon, second, third, fourth), x, likelihood=name, mask=mask)

    return call


def test_every_compiled_likelihood_has_a_twin_and_a_row():
    names = set(fastelbo.build_info()["likelihoods"])
    assert names == {*likelihoods.LIKELIHOODS, *likelihoods.SHIFTED}, "compiled likelihoods and their twins differ"
    assert names - {*likelihoods.SHIFTED} == set(ROWS), "compiled likelihoods and the rows of tests/cases.py differ"


@pytest.mark.parametrize("name", [*ROWS, *likelihoods.SHIFTED])
def test_rows_agree_with_the_compiled_likelihoods(name):
    """The parameters and the domain, as far as the op's own messages tell of them."""
    row, recon, op = likelihoods.get(name), torch.rand(2, 3), torch.ops.fastelbo.log_prob
    with pytest.raises(ValueError) as error:
        op([recon] * 5, recon, None, name)  # more than there may be
    expected = f"({', '.join(row.parameters)})" if len(row.parameters) > 1 else "one tensor"
    assert f"recon must be {expected}" in str(error.value)
    assert ("may be left out" in str(error.value)) == (row.fewest < len(row.parameters))
    if row.domain == "counts":
        op([recon] * row.fewest, torch.ones(2, 3, dtype=torch.int64), None, name)
    refused = torch.ones(2, 3, dtype=torch.bool if row.domain == "counts" else torch.int64)
    with pytest.raises(TypeError) as by_python:
        read_data(refused, torch.float32, row.domain)
    with pytest.raises(TypeError) as by_op:
        op([recon] * row.fewest, refused, None, name)
    assert str(by_op.value).startswith(str(by_python.value))


def test_mean_and_sample_take_the_parameters_of_the_likelihood():
    for function in (likelihood_mean, likelihood_sample):
        with pytest.raises(ValueError, match=r"recon must hold the parameters \(logits\) of .*'bernoulli'; got 2"):
            function((torch.ones(2), torch.ones(2)), "bernoulli")


DISTRIBUTIONS = {
    "bernoulli": lambda r, s: td.Bernoulli(logits=r, validate_args=False),
    "bernoulli_probs": lambda r, s: td.Bernoulli(probs=r, validate_args=False),
    "gaussian": lambda r, s: td.Normal(r, 1.0 if s is None else torch.exp(s / 2)),
    "laplace": lambda r, s: td.Laplace(r, 1.0 if s is None else torch.exp(s)),
    "poisson": lambda r, s: td.Poisson(torch.exp(r)),
    "nb": lambda r, s: td.NegativeBinomial(torch.exp(s), logits=r - s),
    "nb_mean": lambda r, s: td.NegativeBinomial(s, logits=r.log() - s.log()),
}


@pytest.mark.parametrize("likelihood", [which for which in LIKELIHOODS if which[0] in DISTRIBUTIONS], ids=str)
def test_agrees_with_torch_distributions(likelihood):
    recon, x, second, *_ = draw(likelihood, (5, 7), 3, torch.float64, requires_grad=False)
    second = None if second is None else second.clamp(max=5)  # NegativeBinomial subtracts two lgammas of theta
    expected = DISTRIBUTIONS[likelihood[0]](recon, second).log_prob(x).sum(-1)
    torch.testing.assert_close(log_prob(likelihood[0])(recon, x, second), expected)


@every_likelihood
@every_dtype
def test_values_and_gradients(likelihood, dtype):
    types = [t for t in (None, torch.uint8, torch.bool, *COUNTS) if holds(t, likelihood[0])]
    for samples, x_dtype in product((None, 1, 4), types):
        check(
            log_prob(likelihood[0]),
            *draw(likelihood, (6, 3, 25), samples, dtype, x_dtype),
            label=f"K={samples}, x {x_dtype}",
        )


@every_likelihood
@pytest.mark.parametrize("dtype", HALF_TYPES, ids=str)
def test_float32_data_beside_half_parameters(likelihood, dtype):
    for samples in (None, 4):
        check(log_prob(likelihood[0]), *draw(likelihood, (6, 3, 25), samples, dtype, torch.float32))


@every_likelihood
def test_only_what_requires_a_gradient_gets_one(likelihood):
    drawn = draw(likelihood, (4, 33), 3)
    given = [t for t in drawn if t is not None and t.requires_grad]
    for chosen in range(2 ** len(given)):
        for i, t in enumerate(given):
            t.requires_grad_(bool(chosen >> i & 1))
        check(log_prob(likelihood[0]), *drawn, label=f"subset {chosen:b}")


@every_dtype
@pytest.mark.parametrize("samples", [None, 3])
def test_gaussian_logvar_forms(dtype, samples):
    mean, x, full, *_ = draw(("gaussian", True), (4, 3, 5), samples, dtype)
    event = full.detach()[(0,) * (full.dim() - 2)].requires_grad_()
    scalar = full.detach().flatten()[0].requires_grad_()
    for logvar in (full, event, scalar):
        check(fastelbo.gaussian_log_prob, mean, x, logvar, label=f"logvar {tuple(logvar.shape)}")
    for number in (0.0, -0.7, 2):
        check(lambda m, y, lv=number: fastelbo.gaussian_log_prob(m, y, lv), mean, x, label=f"logvar {number}")


def test_named_functions_are_log_prob():
    recon, x, *_ = draw(("bernoulli", False), (4, 9), 2)
    assert torch.equal(fastelbo.bernoulli_log_prob(recon, x), fastelbo.log_prob(recon, x, likelihood="bernoulli"))
    mean, x, logvar, *_ = draw(("gaussian", True), (4, 9), 2)
    expected = fastelbo.log_prob((mean, logvar), x, likelihood="gaussian")
    assert torch.equal(fastelbo.gaussian_log_prob(mean, x, logvar), expected)


# ----------------------------------------------------------------------------------------------------------------------
# Masks


def _masks(shape: tuple[int, ...]) -> dict[str, Tensor]:
    keep = torch.rand(shape) < 0.6
    return {
        "bool": keep,
        "0/1": keep.float(),
        "uint8": keep.to(torch.uint8),
        "weights": torch.rand(shape) * 3 * keep,
        "half weights": (torch.rand(shape) * 3 * keep).to(torch.float16),
        "all": torch.ones(shape, dtype=torch.bool),
        "nothing": torch.zeros(shape, dtype=torch.bool),
        "per event": keep[0],
        "per datum": keep[:, :1, :1],
    }


@some_likelihoods
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_mask(likelihood, dtype):
    for samples in (None, 3):
        drawn = draw(likelihood, (5, 4, 9), samples, dtype)
        for kind, mask in _masks((5, 4, 9)).items():
            check(log_prob(likelihood[0]), *drawn, mask, label=f"{kind} mask, K={samples}")


@some_likelihoods
@pytest.mark.parametrize("poison", [nan, inf, -inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_nothing_leaks_from_masked_cells(likelihood, poison, dtype):
    call, keep = log_prob(likelihood[0]), torch.rand(5, 37) < 0.6
    clean = draw(likelihood, (5, 37), 3, dtype)
    upstream = [torch.randn(3, 5)]
    for mask in (keep, keep.float(), keep * torch.rand(5, 37)):
        expected = call(*clean, mask)
        expected_grads = gradients([expected], clean, upstream)
        poisoned = [None if t is None else torch.where(keep, t.detach(), poison) for t in clean]
        for t, c in zip(poisoned, clean, strict=True):
            if t is not None:
                t.requires_grad_(c.requires_grad)
        actual = call(*poisoned, mask)
        assert torch.equal(actual, expected)
        for a, e in zip(gradients([actual], poisoned, upstream), expected_grads, strict=True):
            assert torch.equal(a, e)
            assert (a.masked_select(~keep) == 0).all()


# ----------------------------------------------------------------------------------------------------------------------
# Sizes


@some_likelihoods
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_every_vector_tail(likelihood, dtype):
    sizes = (*range(1, 71), *range(509, 516), 1023, 1025, 4095, 4096, 4097, 5000, 8193)
    # of some a third, with every remainder by a vector's size
    for size in sizes[:: 3 if likelihood[0] in LONG else 1]:
        check(log_prob(likelihood[0]), *draw(likelihood, (3, size), 2, dtype), label=f"D={size}")


@some_likelihoods
def test_masked_and_half_tails(likelihood):
    for size in (*range(1, 35), 511, 513, 4097):
        drawn = draw(likelihood, (2, size), dtype=torch.bfloat16)
        check(log_prob(likelihood[0]), *drawn, torch.rand(2, size) < 0.5, label=f"D={size}")


@some_likelihoods
@every_dtype
@pytest.mark.parametrize(
    "shape", [(0, 5), (0,), (1,), (7,), (4, 0), (4, 3, 0), (1, 1), (3, 1, 1), (2, 1, 3, 1, 2)], ids=str
)
def test_degenerate_shapes(likelihood, dtype, shape):
    for samples in (None, 1, 2):
        check(log_prob(likelihood[0]), *draw(likelihood, shape, samples, dtype), label=f"K={samples}")


# ----------------------------------------------------------------------------------------------------------------------
# Extremes


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_bernoulli_is_exact_at_any_logit(dtype):
    logits = torch.tensor([1e4, -1e4, 1e4, -1e4, 100.0, -100.0, 0.0, -0.0, 3e38, -3e38], dtype=dtype)
    x = torch.tensor([1.0, 0.0, 0.0, 1.0, 0.0, 1.0, 1.0, 0.0, 1.0, 0.0], dtype=dtype)
    half = torch.tensor(0.5, dtype=dtype).log().item()
    value = torch.tensor([0.0, 0.0, -1e4, -1e4, -100.0, -100.0, half, half, 0.0, 0.0], dtype=dtype)
    slope = torch.tensor([0.0, 0.0, -1.0, 1.0, -1.0, 1.0, 0.5, -0.5, 0.0, 0.0], dtype=dtype)
    logits.requires_grad_()
    result = fastelbo.bernoulli_log_prob(logits, x)
    torch.testing.assert_close(result, value, rtol=torch.finfo(dtype).eps, atol=1e-40)
    torch.testing.assert_close(gradients([result], [logits], [torch.ones(10)])[0], slope, rtol=0, atol=1e-40)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_bernoulli_over_the_range_of_logits(dtype):
    """One element a row: the value and the slope are right relative to themselves, however small they are."""
    logits = torch.linspace(-80, 80, 4001, dtype=torch.float64).to(dtype).requires_grad_()
    wide, four_ulp = logits.detach().double(), 4 * torch.finfo(dtype).eps
    for x in (0.0, 1.0):
        result = fastelbo.bernoulli_log_prob(logits, torch.full((4001,), x, dtype=dtype))
        (slope,) = gradients([result], [logits], [torch.ones(4001)])
        away = wide if x == 1 else -wide
        torch.testing.assert_close(result.double(), logsigmoid(away), rtol=four_ulp, atol=0)
        torch.testing.assert_close(slope.double(), (2 * x - 1) * torch.sigmoid(-away), rtol=four_ulp, atol=0)


@every_dtype
@pytest.mark.parametrize("size", [48, 700])
def test_rows_of_good_and_of_bad_reconstructions(dtype, size):
    """All elements of a row are about as likely: sums of tiny terms keep their digits, as in eager PyTorch."""
    x = (torch.rand(161, size) < 0.5).to(dtype)
    logits = torch.linspace(-40, 40, 161)[:, None] + torch.randn(161, size)
    logits = (logits * (2 * x - 1)).to(dtype).requires_grad_()
    check(fastelbo.bernoulli_log_prob, logits, x, label="logits")
    probs = torch.logspace(-7, -0.1, 161)[:, None] * (0.5 + 0.5 * torch.rand(161, size))
    probs = torch.where(x == 1, 1 - probs, probs).to(dtype).requires_grad_()
    check(log_prob("bernoulli_probs"), probs, x, label="probabilities")


@every_dtype
def test_bernoulli_probs_at_the_ends(dtype):
    """The logarithms are clamped at -100, as in torch's binary_cross_entropy."""
    tiny = torch.finfo(torch.float32).smallest_normal
    for p in (0.0, tiny, 1e-30, 1e-10, 1e-3, 0.5, 0.999, 1 - 2.0**-24, 1.0):
        recon = torch.full((3,), p, dtype=torch.float64).to(dtype).requires_grad_()
        inside = recon.detach().tolist()[0] not in (0.0, 1.0)
        x = torch.tensor([0.0, 0.25, 1.0], dtype=dtype, requires_grad=inside)
        check(log_prob("bernoulli_probs"), recon, x, label=f"p={p}")
    # torch's derivative by the data forgets the clamp
    x = torch.tensor([0.25, 0.25], dtype=dtype, requires_grad=True)
    result = log_prob("bernoulli_probs")(torch.tensor([0.0, 1.0], dtype=dtype), x)
    assert gradients([result], [x], [torch.ones(2)])[0].tolist() == [-100.0, 100.0]


@pytest.mark.parametrize("name", ["gaussian", "laplace"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_scales_of_any_size(name, dtype):
    for scale in (-80.0, -30.0, -1e-6, 0.0, 30.0, 80.0):
        recon, x, *_ = draw((name, False), (4, 20), dtype=dtype)
        check(log_prob(name), recon, x, torch.full((4, 20), scale, dtype=dtype, requires_grad=True), label=f"{scale}")


@every_likelihood
@every_dtype
def test_nan_comes_through(likelihood, dtype):
    clean = draw(likelihood, (3, 40), 2, dtype)
    for which, t in enumerate(clean):
        if t is None:
            continue
        inputs = [None if c is None else c.detach().clone() for c in clean]
        inputs[which].select(-1, 17).select(-1, 1).fill_(nan)  # datum 1, element 17
        for c, i in zip(clean, inputs, strict=True):
            if i is not None:
                i.requires_grad_(c.requires_grad)
        result = log_prob(likelihood[0])(*inputs)
        assert result[..., 1].isnan().all() and result[..., [0, 2]].isfinite().all()
        # the gradient by x may do without it, that by another parameter too: log p of a zinb is a sum where x > 0
        grad = torch.autograd.grad(result.sum(), inputs[which if which != 1 and t.requires_grad else 0])[0]
        assert grad[:, 1, 17].isnan().all()
        assert grad.isfinite().sum() == grad.numel() - grad.shape[0]


@every_dtype
def test_infinity_comes_through(dtype):
    """At an infinite logit torch's formula meets inf - inf; the limit is as good, a finite number is not."""
    logits = torch.tensor([inf, -inf, inf, -inf], dtype=dtype)
    x = torch.tensor([0.0, 1.0, 1.0, 0.0], dtype=dtype)
    result = fastelbo.bernoulli_log_prob(logits, x)
    assert ((result[:2] == -inf) | result[:2].isnan()).all()
    assert ((result[2:] == 0) | result[2:].isnan()).all()
    for name in ("gaussian", "laplace"):
        recon = torch.tensor([inf, -inf, 1.0, 1.0], dtype=dtype, requires_grad=True)
        check(log_prob(name), recon, torch.tensor([0.0, 0.0, inf, -inf], dtype=dtype), label=name)
        assert log_prob(name)(recon[:1], recon[:1]).isnan()


def test_unknown_values_outside_the_unit_interval_are_nan(monkeypatch):
    """Where the values are not looked at, as in most calls."""
    monkeypatch.setattr(domains, "_calls", {})
    monkeypatch.setattr(domains, "FIRST", 0)
    probs = torch.tensor([-0.1, 1.1, 0.5])
    assert log_prob("bernoulli_probs")(probs, torch.tensor([0.5, 0.5, 0.5])).isnan().tolist() == [True, True, False]


# ----------------------------------------------------------------------------------------------------------------------
# Bytes of x


def test_every_byte_is_read_as_the_nearest_float_to_a_255th_of_it():
    x = torch.arange(256, dtype=torch.uint8)
    for dtype in (torch.float32, torch.float64):
        # the gradient of a Laplace is 0 where mean and x are the same number, and nowhere else
        mean = (x.to(dtype) / 255).requires_grad_()
        for n in (256, 100, 7):  # whole vectors, and tails
            for data in (x[None, :n], x.repeat_interleave(2)[None, : 2 * n : 2]):
                value = fastelbo.log_prob(mean[None, :n], data, likelihood="laplace").sum()
                (grad,) = torch.autograd.grad(value, mean)
                assert grad.count_nonzero() == 0, f"{dtype} n={n}"


@some_likelihoods
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_a_byte_means_the_same_however_it_lies(likelihood, dtype):
    """A count, or its 255th: in a row, strided, and under a mask of ones, within the rounding of one sum."""
    x = torch.arange(256, dtype=torch.uint8).repeat(3, 1)
    recon, _, *others = draw(likelihood, (3, 256), None, dtype)
    others = [t if t is None or t.requires_grad else t + 255 for t in others]  # trials: no fewer than successes
    call, ones = log_prob(likelihood[0]), torch.ones(3, 256, dtype=torch.uint8)
    strided = x.repeat_interleave(2, -1)[..., ::2]
    as_float = x.to(torch.float64 if dtype == torch.float64 else torch.float32) / (
        1 if is_counts(likelihood[0]) else 255
    )
    wanted = [t for t in (recon, *others) if t is not None and t.requires_grad]

    def found(data: Tensor, mask: Tensor | None) -> list[Tensor]:
        value = call(recon, data, *others, mask)
        return [value, *torch.autograd.grad(value.sum(), wanted)]

    eps = torch.finfo(torch.float64 if dtype == torch.float64 else torch.float32).eps
    for mask in (None, ones):
        expected = found(as_float, mask)
        for data in (x, strided):
            value, *grads = found(data, mask)
            torch.testing.assert_close(value, expected[0], rtol=16 * eps, atol=0)
            for grad, other in zip(grads, expected[1:], strict=True):
                torch.testing.assert_close(grad, other, rtol=16 * eps, atol=4 * eps)


@pytest.mark.parametrize("logit", [1e4, 20.0, 10.0])
def test_log_prob_of_white_pixels_is_not_positive(logit):
    white, logits = torch.full((1, 784), 255, dtype=torch.uint8), torch.full((1, 784), logit)
    exact = -784 * torch.log1p(torch.exp(torch.tensor(-logit, dtype=torch.float64)))
    value = fastelbo.bernoulli_log_prob(logits, white).double()
    torch.testing.assert_close(value, exact.expand(1), rtol=1e-6, atol=0)


# ----------------------------------------------------------------------------------------------------------------------
# Near the largest number


def test_gradient_of_a_gaussian_scale_overflows_no_sooner_than_its_value():
    largest = torch.finfo(torch.float32).max
    mean, logvar = torch.zeros(1, 1, requires_grad=True), torch.zeros(1, 1, requires_grad=True)
    x = torch.full((1, 1), 1.3 * math.sqrt(largest))  # (x - m)^2 overflows, its half does not
    value = fastelbo.gaussian_log_prob(mean, x, logvar)
    (grad,) = torch.autograd.grad(value, logvar)
    half = 0.5 * x.double().square().item()
    assert value.item() == pytest.approx(-half, rel=1e-6) and grad.item() == pytest.approx(half, rel=1e-6)


# ----------------------------------------------------------------------------------------------------------------------
# The private backward op checks what it is given


@pytest.mark.parametrize(
    "change, message",
    [
        ({"parameters": [torch.zeros(4, 8)] * 2}, "recon must be one tensor"),
        ({"parameters": []}, "recon must be one tensor for likelihood .*; got no tensor"),
        ({"grad": torch.zeros(5)}, "grad must have the shape"),
        ({"grad": torch.zeros(4, dtype=torch.float64)}, "grad must be float32"),
        ({"mask": torch.zeros(4, 7)}, "mask must have the shape"),
        ({"parameters": [torch.zeros(4, 7)]}, "recon must be"),
        ({"likelihood": "cauchy"}, "likelihood must be one of"),
    ],
    ids=str,
)
def test_log_prob_backward_refuses(change, message):
    arguments = {
        "grad": torch.zeros(4),
        "parameters": [torch.zeros(4, 8)],
        "x": torch.zeros(4, 8),
        "mask": None,
        "likelihood": "bernoulli",
        "needs": [True, False, False, False, False],
    }
    with pytest.raises((ValueError, TypeError), match=message):
        torch.ops.fastelbo._log_prob_backward(**(arguments | change))
    if not isinstance(change.get("likelihood"), str):
        with pytest.raises((ValueError, TypeError), match=message):
            given = arguments | change
            meta = {n: t.to("meta") if isinstance(t, Tensor) else t for n, t in given.items()}
            meta["parameters"] = [t.to("meta") for t in given["parameters"]]
            torch.ops.fastelbo._log_prob_backward(**meta)


# ----------------------------------------------------------------------------------------------------------------------
# Parameters that rows share


SHARED = [likelihood for likelihood in REPRESENTATIVES if further(likelihood)]
shared_shapes = pytest.mark.parametrize("shape", ["event", "one number"])


def _shared(recon: Tensor, lead: int, shape: str, requires_grad: bool = True) -> Tensor:
    size = recon.shape[lead:] if shape == "event" else ()
    return (0.3 * torch.randn(size, dtype=torch.float64)).to(recon.dtype).requires_grad_(requires_grad)


def _reduced(drawn: Tensor, lead: int, shape: str) -> Tensor:
    """The first datum's, or its first number, as a parameter of its own."""
    first = drawn.detach()[(0,) * lead]
    return (first if shape == "event" else first.flatten()[0]).clone().requires_grad_(drawn.requires_grad)


@pytest.mark.parametrize("likelihood", SHARED, ids=lambda v: v[0])
@shared_shapes
@every_dtype
@pytest.mark.parametrize("samples", [None, 3])
def test_a_parameter_in_a_shape_of_its_own(likelihood, shape, dtype, samples):
    """Fewer rows than chunks and more, and rows of several segments; values and gradients of every function."""
    for batch, event in ((2, (3, 5)), (70, (7,)), (2, (4200,)))[: 2 if likelihood[0] in LONG else 3]:
        recon, x, *others = draw(likelihood, (batch, *event), samples, dtype)
        given, lead = [t for t in others if t is not None], 1 if samples is None else 2
        mask = torch.rand(batch, *event) > 0.3
        # the further parameter that keeps the shape of the first
        for whole in range(1 if event == (4200,) else len(given)):
            some = [t if i == whole and len(given) > 1 else _reduced(t, lead, shape) for i, t in enumerate(given)]
            some += [None] * (3 - len(some))
            check(log_prob(likelihood[0]), recon, x, *some, label=f"{batch}", shared=(2, 3, 4))
            check(log_prob(likelihood[0]), recon, x, *some, mask, label=f"{batch}, mask", shared=(2, 3, 4))
        if len(given) > 1:
            others = [_reduced(t, lead, shape) for t in given] + [None] * (3 - len(given))
            check(log_prob(likelihood[0]), recon, x, *others, label=f"{batch}, all", shared=(2, 3, 4))


@shared_shapes
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("samples", [None, 3])
@pytest.mark.parametrize("likelihood", [("gaussian", True), ("zinb", False)], ids=lambda v: v[0])
def test_objectives_with_a_parameter_in_a_shape_of_its_own(likelihood, shape, reduction, samples):
    for batch, event in ((40, (6, 5)), (5, (4200,))):
        recon, x, *others = draw(likelihood, (batch, *event), samples)
        x, lead = x.detach(), 1 if samples is None else 2
        second, third, fourth = (None if t is None else _reduced(t, lead, shape) for t in others)
        latent = [torch.randn(batch, 3, requires_grad=True) for _ in range(4)]

        def elbo(recon, x, second, third, fourth, mu, logvar, prior_mu, prior_logvar):
            return fastelbo.elbo_loss(
                joined(recon, second, third, fourth),
                x,
                mu,
                logvar,
                prior_mu=prior_mu,
                prior_logvar=prior_logvar,
                likelihood=likelihood[0],
                reduction=reduction,
            )

        def iwae(recon, x, second, third, fourth, log_ratio):
            given = joined(recon, second, third, fourth)
            return fastelbo.iwae_loss(given, x, log_ratio, likelihood=likelihood[0], reduction=reduction)

        check(elbo, recon, x, second, third, fourth, *latent)
        if samples:
            check(iwae, recon, x, second, third, fourth, torch.randn(samples, batch, requires_grad=True))
            few = [t.detach()[:, :2].requires_grad_() for t in (recon, torch.randn(samples, batch))]
            check(iwae, few[0], x[:2], second, third, fourth, few[1], label="few data")


@shared_shapes
def test_a_shared_parameter_beside_data_that_are_walked_in_another_order(shape):
    recon, x, *_ = draw(("gaussian", True), (40, 3, 5, 4))
    recon = recon.detach().contiguous(memory_format=torch.channels_last).requires_grad_()
    second = _shared(recon, 1, shape)
    if shape == "event":
        second = second.detach().permute(1, 2, 0).contiguous().permute(2, 0, 1).requires_grad_()
    check(log_prob("gaussian"), recon, x, second)
    check(log_prob("gaussian"), recon, x, torch.zeros(()).expand(3, 5, 4).requires_grad_())


@shared_shapes
def test_gradients_that_rows_share_have_the_same_bits_for_any_number_of_threads(shape):
    torch.manual_seed(1)
    recon, x = torch.randn(3, 300, 500, requires_grad=True), torch.randn(300, 500)
    second = _shared(recon, 2, shape)
    before, found = torch.get_num_threads(), []
    for threads in (1, 2, 3, 8):
        torch.set_num_threads(threads)
        loss = fastelbo.iwae_loss((recon, second), x, torch.zeros(3, 300), likelihood="gaussian")
        value = fastelbo.log_prob((recon, second), x, likelihood="gaussian").sum()
        found.append([*torch.autograd.grad(loss, second), *torch.autograd.grad(value, second)])
    torch.set_num_threads(before)
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


@shared_shapes
def test_many_equal_gradients_that_rows_share_add_up(shape):
    """The roundings of a sum of equal numbers all go the same way."""
    recon, x = torch.zeros(300, 700, 1), torch.full((700, 1), 0.3)
    second = torch.zeros((1,) if shape == "event" else (), requires_grad=True)
    (grad,) = torch.autograd.grad(fastelbo.log_prob((recon, second), x, likelihood="gaussian").sum(), second)
    exact = 300 * 700 * 0.5 * (x[0, 0].double().item() ** 2 - 1)
    assert grad.item() == pytest.approx(exact, rel=5e-7)


@shared_shapes
def test_no_gradient_of_full_size_is_made_for_a_parameter_that_rows_share(shape):
    recon, x, mu = torch.randn(512, 784, requires_grad=True), torch.randn(512, 784), torch.randn(512, 32)
    second = _shared(recon, 1, shape)

    def step():
        fastelbo.elbo_loss((recon, second), x, mu, mu, likelihood="gaussian").backward()

    step()
    recon.grad = second.grad = None
    assert allocated(step) < 1.2 * recon.numel() * recon.element_size()
