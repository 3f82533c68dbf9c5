"""Strided and expanded inputs: the results of contiguous ones, without copies of the large tensors."""

import math
import os
from itertools import product

import pytest
import torch
from cases import REPRESENTATIVE_IDS, REPRESENTATIVES, draw, further, holds, joined
from contracts import FUNCTIONS
from oracle import allocated, check, evaluate, tensors_of, upstream_for
from torch import Tensor
from torch.nn import functional as F

import fastelbo

LAYOUTS = {
    "contiguous": lambda t: t.contiguous(),
    "transposed": lambda t: t.transpose(-1, -2).contiguous().transpose(-1, -2),
    "channels last": lambda t: t.movedim(-3, -1).contiguous().movedim(-1, -3),
    "batch last": lambda t: t.movedim(-4, -1).contiguous().movedim(-1, -4),
    "sliced": lambda t: F.pad(t, (2, 1, 1, 0))[..., 1:, 2:-1],
    "every second": lambda t: t.repeat_interleave(2, -1)[..., ::2],
    "reversed twice": lambda t: t.flip(-1).flip(-1).mT.mT,
}
SHAPE = (5, 3, 6, 7)  # [B, C, H, W]
some_likelihoods = pytest.mark.parametrize("likelihood", REPRESENTATIVES, ids=REPRESENTATIVE_IDS)


def lay(t: Tensor | None, layout: str) -> Tensor | None:
    if t is None:
        return None
    with torch.no_grad():
        laid = LAYOUTS[layout](t)
    assert torch.equal(laid, t)
    return laid.detach().requires_grad_(t.requires_grad)


def elbo(likelihood: str, reduction: str = "none"):
    def call(recon, x, second, third, fourth, mask, mu, logvar):
        given = joined(recon, second, third, fourth)
        return fastelbo.elbo_loss(given, x, mu, logvar, likelihood=likelihood, mask=mask, reduction=reduction)

    return call


def iwae(likelihood: str, reduction: str = "none"):
    def call(recon, x, second, third, fourth, mask, log_ratio):
        given = joined(recon, second, third, fourth)
        return fastelbo.iwae_loss(given, x, log_ratio, likelihood=likelihood, mask=mask, reduction=reduction)

    return call


@pytest.mark.parametrize("layout", LAYOUTS)
@some_likelihoods
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_layouts(likelihood, layout, dtype):
    """One layout for all inputs, and a different one for each."""
    name = likelihood[0]
    for samples in (None, 3):
        drawn = draw(likelihood, SHAPE, samples, dtype)
        mask = (torch.rand(SHAPE) < 0.7).float()
        mu, logvar = (torch.randn(5, 1, 4, 2, dtype=dtype, requires_grad=True) for _ in range(2))
        log_ratio = torch.randn(3, 5, dtype=dtype).requires_grad_()
        others = [*list(LAYOUTS)[list(LAYOUTS).index(layout) :], *LAYOUTS]
        for chosen in ([layout] * 6, others):
            laid = [lay(t, kind) for t, kind in zip((*drawn, mask), chosen, strict=False)]
            latent = lay(mu, chosen[5]), lay(logvar, chosen[0])
            check(elbo(name, "mean"), *laid, *latent, label=f"elbo mean, {chosen[:6]}")
            if samples:
                check(elbo(name), *laid, *latent, label=f"elbo none, {chosen[:6]}")
                ratio = log_ratio.detach().T.contiguous().T.requires_grad_()
                check(iwae(name), *laid, ratio, label=f"iwae none, {chosen[:6]}")
                check(iwae(name, "sum"), *laid, ratio, label=f"iwae sum, {chosen[:6]}")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@some_likelihoods
def test_rows_of_whole_vectors(likelihood, dtype):
    """Rows that CUDA kernels read eight elements at a time, and rows that start off such a boundary."""
    name = likelihood[0]
    types = [t for t in (None, torch.float32, torch.uint8, torch.bool) if holds(t, name)]
    for shape, x_dtype in product(((9, 8), (2, 24), (1, 4104)), types):
        mu, logvar = (torch.randn(shape[0], 3, dtype=dtype, requires_grad=True) for _ in range(2))
        for samples in (None, 3):
            recon, x, second, third, fourth = draw(likelihood, shape, samples, dtype, x_dtype)
            drawn = recon, x.detach(), second, third, fourth
            off = [None if t is None else F.pad(t.detach(), (1, 7))[..., 1:-7] for t in drawn]
            off = [t if t is None else t.requires_grad_(d.requires_grad) for t, d in zip(off, drawn, strict=True)]
            for given in (drawn, off):
                check(elbo(name, "mean"), *given, None, mu, logvar, label=f"elbo {shape}, {samples}, x {x_dtype}")
                if samples:
                    ratio = torch.randn(3, shape[0], dtype=dtype).requires_grad_()
                    check(iwae(name, "mean"), *given, None, ratio, label=f"iwae {shape}, x {x_dtype}")


@pytest.mark.parametrize("layout", ["transposed", "sliced", "every second", "reversed twice", "expanded"])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_every_function_gives_what_it_gives_for_contiguous_inputs(name, layout):
    """To the bit on the CPU, but for LAPACK; CUDA's kernels sum the vectors of a contiguous row in another order."""
    exact = "ppca" not in name and "FASTELBO_CUDA_HOST" not in os.environ
    function = FUNCTIONS[name]
    dense = [t.float() for t in function.make(4, 21)]
    if layout == "expanded":
        strided = [t[:1].expand(t.shape) if t.dim() > 1 else t for t in dense]
        dense = [t.contiguous() for t in strided]
    else:
        strided = [lay(t, layout if t.dim() > 1 else "every second") if t.dim() else t for t in dense]
    inputs = [[t.detach().requires_grad_() for t in given] for given in (dense, strided)]
    upstream = upstream_for(tensors_of(function.call(*dense)))
    results = [evaluate(function.call, given, upstream) for given in inputs]
    for i, (a, e) in enumerate(zip(*results, strict=True)):
        if exact:
            assert torch.equal(a, e), f"tensor {i}"
        else:
            torch.testing.assert_close(a, e, rtol=1e-5, atol=1e-5)


EXPANSIONS = {
    "over samples": lambda t: t[:1].expand_as(t),
    "over the batch": lambda t: t[:, :1].expand_as(t),
    "over rows": lambda t: t[..., :1, :].expand_as(t),
    "over columns": lambda t: t[..., :1].expand_as(t),
    "one number": lambda t: t[(0,) * t.dim()].expand(t.shape),
}


@pytest.mark.parametrize("how", EXPANSIONS)
@some_likelihoods
def test_expanded_inputs(likelihood, how):
    name, expand = likelihood[0], EXPANSIONS[how]
    drawn = draw(likelihood, SHAPE, 3)

    def with_expanded(index: int):
        """The input is expanded inside the call, so that the gradient of what it was expanded from is compared too."""

        def call(*inputs):
            given, log_ratio = list(inputs[:-1]), inputs[-1]
            given[index] = expand(given[1][None]).squeeze(0) if index == 1 else expand(given[index])
            recon, x, second, third, fourth = given
            recon = joined(recon, second, third, fourth)
            return (
                fastelbo.log_prob(recon, x, likelihood=name),
                fastelbo.iwae_loss(recon, x, log_ratio, likelihood=name, reduction="none"),
            )

        return call

    for index in range(2 + len(further(likelihood))):
        check(with_expanded(index), *drawn, torch.randn(3, 5, requires_grad=True), label=f"input {index}")


def test_allocations_are_seen():
    assert allocated(lambda: torch.empty(1000) + 1) >= 8000


@pytest.mark.parametrize("kind", ["sliced", "transposed", "channels last", "every second"])
def test_no_copies_of_large_tensors(kind):
    """A strided call allocates what a contiguous one does: the results, the gradients and small change."""
    shape, samples = (16, 8, 32, 32), 4

    def bytes_of(layout: str, step) -> int:
        recon, x, scale, *_ = (lay(t, layout) for t in draw(("gaussian", True), shape, samples))
        mask = lay(torch.ones(shape, dtype=torch.bool), layout)
        return allocated(lambda: step(recon, x.detach(), scale, mask))

    def forward(recon, x, scale, mask):
        with torch.no_grad():
            fastelbo.log_prob((recon, scale), x, likelihood="gaussian", mask=mask)

    def log_prob(recon, x, scale, mask):
        fastelbo.log_prob((recon, scale), x, likelihood="gaussian", mask=mask).sum().backward()

    def elbo_loss(recon, x, scale, mask):
        mu = torch.zeros(16, 2)
        fastelbo.elbo_loss((recon, scale), x, mu, mu, likelihood="gaussian", mask=mask).backward()

    def iwae_loss(recon, x, scale, mask):
        fastelbo.iwae_loss((recon, scale), x, torch.zeros(4, 16), likelihood="gaussian", mask=mask).backward()

    small = 64 * 1024
    assert bytes_of(kind, forward) < small
    gradient = 4 * samples * 16 * 8 * 32 * 32
    for step in (log_prob, elbo_loss, iwae_loss):
        assert bytes_of("contiguous", step) < 2 * gradient + small, step.__name__
        assert bytes_of(kind, step) < 2 * gradient + small, step.__name__


def test_no_copies_of_expanded_or_converted_inputs():
    recon = torch.randn(1, 64, 4096).expand(50, 64, 4096)
    for x in (torch.rand(1, 4096).expand(64, 4096), torch.randint(0, 256, (64, 4096), dtype=torch.uint8)):
        assert allocated(lambda x=x: fastelbo.bernoulli_log_prob(recon, x)) < 64 * 1024
    half = torch.randn(64, 4096, dtype=torch.bfloat16)
    assert allocated(lambda: fastelbo.bernoulli_log_prob(half, half.float().sigmoid())) < 2 * 4 * 64 * 4096 + 64 * 1024


def test_more_elements_than_32_bits_can_count():
    """One number, expanded: 2^31 elements and some, without their memory."""
    size = 2**31 + 4097
    logits, x = torch.zeros(1, 1).expand(1, size), torch.ones(1, 1, dtype=torch.bool).expand(1, size)
    value = fastelbo.bernoulli_log_prob(logits, x).item()
    assert value == pytest.approx(size * math.log(0.5), rel=1e-6)


# Nine event dimensions of which no two merge in the order in which recon lies.
MANY = (2, 2, 3, 2, 2, 3, 2, 2, 2)


def _shuffled(t: Tensor, lead: int) -> Tensor:
    """The same numbers, with the event dimensions in another order in memory."""
    order = [*range(lead), *(lead + d for d in (4, 0, 6, 2, 8, 1, 5, 3, 7))]
    back = [order.index(d) for d in range(t.dim())]
    return t.detach().permute(order).contiguous().permute(back).requires_grad_(t.requires_grad)


@pytest.mark.parametrize("samples", [None, 2])
@pytest.mark.parametrize("likelihood", [("gaussian", False), ("gaussian", True), ("zinb", False)], ids=str)
def test_more_dimensions_than_a_view_has(samples, likelihood):
    recon, x, second, third, fourth = draw(likelihood, (2, *MANY), samples)
    recon = _shuffled(recon, 1 if samples is None else 2)
    assert not recon.is_contiguous() and x.is_contiguous()
    mask = (torch.rand(1, 2, 1, 3, 1, 2, 1, 2, 1, 2) > 0.3).expand(2, *MANY)
    for with_mask in (None, mask):
        latent = (torch.randn(2, 3, requires_grad=True) for _ in range(2))
        check(elbo(likelihood[0]), recon, x, second, third, fourth, with_mask, *latent)
    if samples is not None:
        check(iwae(likelihood[0]), recon, x, second, third, fourth, mask, torch.randn(samples, 2, requires_grad=True))


@pytest.mark.parametrize("num_samples", [None, 2])
def test_latents_with_more_dimensions_than_a_view_has(num_samples):
    mu = torch.randn(2, *MANY, requires_grad=True)
    logvar = _shuffled(torch.randn(2, *MANY, requires_grad=True), 1)
    prior_mu = torch.randn(1, 2, 1, 3, 1, 2, 1, 2, 1, 2).expand(2, *MANY)
    eps = torch.randn(*(() if num_samples is None else (num_samples,)), 2, *MANY)

    def call(mu, logvar, prior_mu, eps):
        return fastelbo.rsample(mu, logvar, num_samples, prior_mu=prior_mu, eps=eps)[:3]

    check(call, mu, logvar, prior_mu, eps)
    check(fastelbo.gaussian_kl, mu, logvar, prior_mu)
