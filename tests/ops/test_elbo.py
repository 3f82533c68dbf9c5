"""elbo_loss against its twin: reductions, beta, free bits, masks, samples, parts, and what a backward may not do."""

import copy
from itertools import combinations

import pytest
import torch
from cases import REPRESENTATIVE_IDS, REPRESENTATIVES, draw, joined
from oracle import DTYPES, HALF_TYPES, assert_backward_repeats, check, gradients
from torch import Tensor

import fastelbo

some_likelihoods = pytest.mark.parametrize("likelihood", REPRESENTATIVES, ids=REPRESENTATIVE_IDS)
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
every_reduction = pytest.mark.parametrize("reduction", ["mean", "sum", "none"])


def elbo(parts: tuple[int, ...] = (0,), **options):
    """(recon, x, second, third, fourth, mu, logvar, mask, beta) -> the chosen ones of loss, log-likelihood and KL."""

    def call(recon, x, second, third, fourth, mu, logvar, mask=None, beta=1.0):
        given = joined(recon, second, third, fourth)
        result = fastelbo.elbo_parts(given, x, mu, logvar, mask=mask, beta=beta, **options)
        return [result[i] for i in parts]

    return call


def inputs_for(
    likelihood=("bernoulli", False), samples=None, dtype=torch.float32, x_dtype=None, shape=(6, 3, 11)
) -> list[Tensor | None]:
    """recon, x, second, third, fourth, mu, logvar; x requires no gradient, as in training."""
    recon, x, second, third, fourth = draw(likelihood, shape, samples, dtype, x_dtype)
    latent = [torch.randn(shape[0], 2, 5, dtype=torch.float64).to(dtype).requires_grad_() for _ in range(2)]
    return [recon, x.detach(), second, third, fourth, *latent]


@some_likelihoods
@every_dtype
@every_reduction
def test_values_and_gradients(likelihood, dtype, reduction):
    for samples in (None, 1, 4):
        for x_dtype in (None, torch.uint8):
            inputs = inputs_for(likelihood, samples, dtype, x_dtype)
            call = elbo((0, 1, 2), likelihood=likelihood[0], reduction=reduction)
            check(call, *inputs, label=f"K={samples}, x {x_dtype}, all parts")
            call = elbo((0,), likelihood=likelihood[0], reduction=reduction)
            check(call, *inputs, label=f"K={samples}, x {x_dtype}, loss alone")


@every_reduction
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_gradient_of_the_data(reduction, dtype):
    for likelihood in (("bernoulli", False), ("gaussian", True), ("zinb", False)):
        for samples in (None, 3):
            inputs = inputs_for(likelihood, samples, dtype)
            inputs[1].requires_grad_()
            check(elbo(likelihood=likelihood[0], reduction=reduction), *inputs, label=f"{likelihood}, K={samples}")


@every_reduction
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16], ids=str)
@pytest.mark.parametrize("free_bits", [0.0, 0.6])
def test_beta(reduction, dtype, free_bits):
    options = {"reduction": reduction, "free_bits": free_bits}
    for samples in (None, 3):
        inputs = inputs_for(samples=samples, dtype=dtype)
        for beta in (0.0, 0.3, 4, -1.0):
            check(elbo((0, 1, 2), **options), *inputs, None, beta, label=f"beta {beta}")
            check(elbo(**options), *inputs, None, beta, label=f"beta {beta}")
            for learned in (False, True):
                tensor = torch.tensor(float(beta), dtype=dtype, requires_grad=learned)
                label = f"beta tensor {beta}, requires_grad={learned}"
                check(elbo((0, 1, 2), **options), *inputs, None, tensor, label=label)
                check(elbo(**options), *inputs, None, tensor, label=label)


@every_reduction
@pytest.mark.parametrize("free_bits", [0.05, 0.6, 50.0])
def test_free_bits(reduction, free_bits):
    for parts in ((0,), (0, 1, 2), (0, 2), (2,)):
        inputs = inputs_for(samples=2)
        with torch.no_grad():
            inputs[5].mul_(torch.linspace(0, 2, 10).reshape(2, 5))
            inputs[6].mul_(0.3)
        check(elbo(parts, reduction=reduction, free_bits=free_bits), *inputs, label=f"parts {parts}")


@some_likelihoods
@every_reduction
def test_mask(likelihood, reduction):
    keep = torch.rand(6, 3, 11) < 0.7
    for samples in (None, 3):
        for mask in (keep, keep * torch.rand(6, 3, 11), keep[0], keep[:, :, :1]):
            inputs = inputs_for(likelihood, samples)
            with torch.no_grad():
                inputs[0].masked_fill_(~mask.expand(6, 3, 11).bool(), float("nan"))
            check(elbo((0, 1), likelihood=likelihood[0], reduction=reduction), *inputs, mask)
            check(elbo((0,), likelihood=likelihood[0], reduction=reduction), *inputs, mask)


@every_reduction
@pytest.mark.parametrize("free_bits", [0.0, 0.5])
def test_every_subset_of_the_parts(reduction, free_bits):
    for count in (1, 2, 3):
        for parts in combinations(range(3), count):
            call = elbo(parts, likelihood="gaussian", reduction=reduction, free_bits=free_bits)
            check(call, *inputs_for(("gaussian", True), 3), None, 0.7, label=f"parts {parts}")


def test_only_what_requires_a_gradient_gets_one():
    for chosen in range(32):
        inputs = inputs_for(("gaussian", True), 2)
        for i, t in enumerate(t for t in inputs if t is not None):
            t.requires_grad_(bool(chosen >> i & 1))
        for reduction in ("mean", "none"):
            check(elbo(likelihood="gaussian", reduction=reduction), *inputs, label=f"subset {chosen:05b}, {reduction}")


@every_dtype
@every_reduction
def test_degenerate_shapes(dtype, reduction):
    for shape in ((0, 5), (1, 1), (1,), (5,), (3, 0)):
        for samples in (None, 1):
            recon, x, *_ = draw(("bernoulli", False), shape, samples, dtype)
            for latent in ((), (1,), (0,), (3, 2)):
                mu, logvar = (torch.randn(shape[0], *latent, dtype=dtype, requires_grad=True) for _ in range(2))
                call = elbo((0, 1, 2), reduction=reduction)
                check(call, recon, x, None, None, None, mu, logvar, label=f"{shape}, K={samples}, latent {latent}")


def test_large_rows_and_many_rows():
    for shape in ((2, 20_000), (3000, 3), (130, 600)):
        for reduction in ("mean", "none"):
            check(elbo(reduction=reduction), *inputs_for(shape=shape, samples=2), label=f"{shape} {reduction}")


def test_same_tensor_in_two_places():
    """Its gradient is the sum of both."""

    def call(t):
        return fastelbo.elbo_loss((t, t), t, t, t, likelihood="gaussian")

    check(call, torch.randn(6, 9, requires_grad=True))
    check(lambda t, x: fastelbo.elbo_loss(t, x, t, t), torch.randn(6, 9, requires_grad=True), torch.rand(6, 9))


@pytest.mark.parametrize("dtype", HALF_TYPES, ids=str)
def test_mixed_precision_inputs(dtype):
    """Half-type recon beside float32 latents and data, and the other way round."""
    recon, x, *_ = draw(("bernoulli", False), (6, 33), 2, dtype, torch.float32)
    latent = [torch.randn(6, 5, requires_grad=True) for _ in range(2)]
    for reduction in ("mean", "none"):
        check(elbo(reduction=reduction), recon, x, None, None, None, *latent)
        half = [t.detach().to(dtype).requires_grad_() for t in latent]
        check(elbo(reduction=reduction), recon.detach().float().requires_grad_(), x, None, None, None, *half)


# ----------------------------------------------------------------------------------------------------------------------
# What a backward may not do


def losses(reduction: str, free_bits: float = 0.0):
    """The inputs, and the loss as a function of them that does not copy them."""
    inputs = inputs_for(("gaussian", True), 3)
    return inputs, lambda: elbo(likelihood="gaussian", reduction=reduction, free_bits=free_bits)(*inputs)[0]


@every_reduction
@pytest.mark.parametrize("upstream", [1.0, 0.3])
def test_second_backward_equals_the_first(reduction, upstream):
    """Also when the first one's results were overwritten by the user."""
    inputs, loss_of = losses(reduction)
    wanted = [t for t in inputs if t is not None and t.requires_grad]
    loss = loss_of()
    assert_backward_repeats(loss, wanted, upstream)


@every_reduction
def test_grad_may_be_changed_in_place_between_steps(reduction):
    """`.grad` is the user's: clipping it must not change what a later backward adds to it."""
    inputs, loss_of = losses(reduction)
    wanted = [t for t in inputs if t is not None and t.requires_grad]
    loss = loss_of().sum()
    loss.backward(retain_graph=True)
    once = [t.grad.clone() for t in wanted]
    for t in wanted:
        t.grad.mul_(0.5)
    loss.backward()
    for t, g in zip(wanted, once, strict=True):
        torch.testing.assert_close(t.grad, 1.5 * g, rtol=1e-6, atol=0)


@every_reduction
@pytest.mark.parametrize("free_bits", [0.0, 0.5])
def test_inputs_and_results_are_never_overwritten(reduction, free_bits):
    inputs, loss_of = losses(reduction, free_bits)
    present = [t for t in inputs if t is not None]
    before, versions = [t.detach().clone() for t in present], [t._version for t in present]
    loss = loss_of()
    value = loss.detach().clone()
    (loss * 0.1).sum().backward()
    assert torch.equal(loss.detach(), value)
    for t, b, v in zip(present, before, versions, strict=True):
        assert torch.equal(t, b) and t._version == v


@every_reduction
def test_an_input_that_was_changed_before_the_backward_is_noticed(reduction):
    """As by every op of PyTorch: the gradient would be wrong."""
    for changed in (0, 2, 5):
        inputs, loss_of = losses(reduction)
        loss = loss_of().sum()
        with torch.no_grad():
            inputs[changed].add_(1)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()


@every_reduction
def test_no_two_gradients_share_memory(reduction):
    inputs, loss_of = losses(reduction)
    grads = gradients([loss_of()], inputs, [torch.ones_like(loss_of())])
    assert len({g.untyped_storage().data_ptr() for g in grads}) == len(grads)


def test_expanded_and_strided_upstream_gradients():
    """sum().backward() sends a gradient of stride 0; a slice of a larger one has stride 2."""
    for upstream in (torch.tensor(0.7).expand(6), torch.randn(12)[::2], torch.randn(6, 2)[:, 1]):
        for parts in ((0,), (1,), (2,)):
            inputs, _ = losses("none")
            outputs = [elbo(parts, likelihood="gaussian", reduction="none")(*inputs)[0] for _ in range(2)]
            up = upstream if parts != (1,) else torch.stack([upstream] * 3, 1).T
            ups = up, up.clone(memory_format=torch.contiguous_format)
            strided, dense = (gradients([o], inputs, [u]) for o, u in zip(outputs, ups, strict=True))
            for a, b in zip(strided, dense, strict=True):
                assert torch.equal(a, b)


def test_module_form():
    recon, x, scale, _, _, mu, logvar = inputs_for(("gaussian", True), 3)
    mask = torch.rand(6, 3, 11) < 0.5
    options = {"likelihood": "gaussian", "beta": 0.3, "free_bits": 0.2, "reduction": "none"}
    expected = fastelbo.elbo_parts((recon, scale), x, mu, logvar, mask=mask, **options)
    module = fastelbo.ELBOLoss(**options)
    actual = module((recon, scale), x, mu, logvar, mask)
    assert torch.equal(actual, expected.loss) and isinstance(expected, fastelbo.LossParts)
    assert "gaussian" in repr(module) and "0.3" in repr(module)


def _elbo_inputs(dtype: torch.dtype = torch.float32, device: str = "cpu") -> list[Tensor]:
    return [torch.randn(4, d).to(device, dtype) for d in (6, 6, 5, 5)]


def test_a_tensor_beta_goes_where_the_module_goes():
    module = fastelbo.ELBOLoss("gaussian", beta=torch.tensor(0.3))
    assert list(module.state_dict()) == [] and list(module.parameters()) == []
    inputs = _elbo_inputs(torch.float64)
    expected = fastelbo.elbo_loss(*inputs, likelihood="gaussian", beta=torch.tensor(0.3).double())
    copied = copy.deepcopy(module).to(torch.float64)
    assert copied.beta.dtype == torch.float64 and torch.equal(copied(*inputs), expected)
    assert module.beta.dtype == torch.float32, "a copy is a copy"
    assert module.to("meta").beta.device.type == "meta"
    assert module(*_elbo_inputs(device="meta")).device.type == "meta"


def test_a_parameter_beta_is_learned():
    beta = torch.nn.Parameter(torch.tensor(0.3))
    module = fastelbo.ELBOLoss("gaussian", beta=beta)
    assert list(module.parameters()) == [beta] and list(module.state_dict()) == ["beta"]
    inputs = _elbo_inputs()
    module(*inputs).backward()
    torch.testing.assert_close(beta.grad, fastelbo.gaussian_kl(*inputs[2:]).mean())
    copied = copy.deepcopy(module).to(torch.float64)
    assert isinstance(copied.beta, torch.nn.Parameter) and copied.beta.dtype == torch.float64


def test_gradient_to_a_tensor_beta():
    """To the caller's own tensor, after a move of the module too."""
    inputs = _elbo_inputs()
    for move in (torch.float32, torch.float64):
        beta = torch.tensor(0.3, requires_grad=True)
        module = fastelbo.ELBOLoss("gaussian", beta=beta).to(move)
        module(*(t.to(move) for t in inputs)).backward()
        torch.testing.assert_close(beta.grad, fastelbo.gaussian_kl(*inputs[2:]).mean())
