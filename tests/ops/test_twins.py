"""Every op, private ones too, against its twin in fastelbo/reference, called alike."""

import math

import pytest
import torch
from contracts import op_calls
from torch import Tensor
from torch.testing import assert_close

import fastelbo
from fastelbo import PPCA, reference
from fastelbo._internal import ops as _ops

ops = torch.ops.fastelbo


def r(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64)


def test_every_op_has_a_twin():
    names = {n.split("::")[1] for n in torch._C._dispatch_get_all_op_names() if n.startswith("fastelbo::")}
    assert names
    assert [name for name in names if not callable(getattr(reference, name.lstrip("_"), None))] == []


def compare(name: str, *args: object, rtol: float = 1e-9, atol: float = 1e-11) -> None:
    """The op and its twin, without a graph."""
    with torch.no_grad():
        ours = getattr(ops, name).default(*args)
        theirs = getattr(reference, name.lstrip("_"))(*args)
    ours, theirs = (list(out) if isinstance(out, tuple | list) else [out] for out in (ours, theirs))
    assert len(ours) == len(theirs)
    for i, (a, b) in enumerate(zip(ours, theirs, strict=True)):
        if a is None or b is None:
            assert a is b, f"{name}, result {i}: one of them is None"
        else:
            assert_close(a, b.detach(), rtol=rtol, atol=atol, msg=lambda m, i=i: f"{name}, result {i}: {m}")


def cast(t: object, dtype: torch.dtype) -> object:
    """Tensors of floats, those in lists too, in another type, without a graph."""
    if isinstance(t, list):
        return [cast(item, dtype) for item in t]
    return t.detach().to(dtype) if isinstance(t, Tensor) and t.is_floating_point() else t


# of arguments that belong together, in the type that they were computed in: below
APART = tuple(name for name in op_calls() if "ppca" in name or name == "backward of mixture_log_prob")


@pytest.mark.parametrize("call", [name for name in op_calls() if name not in APART])
def test_op(call):
    torch.manual_seed(0)
    op, args = op_calls()[call]
    noise = call == "normal_rows"  # of float32 resolution; the other twins take their noise from it
    compare(
        op.name().split("::")[1],
        *(cast(a, torch.float64) for a in args),
        atol=2e-6 if noise else 1e-11,
        rtol=2e-6 if noise else 1e-9,
    )


@pytest.mark.parametrize("call", [name for name in op_calls() if "ppca" not in name and "backward" not in name])
def test_twins_of_half_inputs_compute_in_float32(call):
    op, args = op_calls()[call]
    twin = getattr(reference, op.name().split("::")[1].lstrip("_"))
    half = [cast(a, torch.float16) for a in args]
    wide = [cast(a, torch.float32) for a in half]
    found, expected = (out if isinstance(out, tuple) else (out,) for out in (twin(*half), twin(*wide)))
    for a, e in zip(found, expected, strict=True):
        assert a is e is None or torch.equal(a, e.to(a.dtype))


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("needs", [0b11111111, 0b01010101], ids=["all", "some"])
def test_losses_with_gradients(reduction, needs):
    mu, x, number = r(4, 5), r(4, 6), torch.tensor(0.7)
    latent = (mu, r(4, 5), r(5), r(4, 5))
    mask = torch.rand(4, 6) < 0.7
    options = (mask, number, number / 2)
    compare("elbo_loss", [r(3, 4, 6), r(6)], x, *latent, *options, "gaussian", reduction, needs)
    for estimator in ((None, None, 1, [1, 0, 1]), (number / 2, number, 2, [0, 1, 0])):
        args = ([r(4, 4, 6), r()], x, r(4, 4), r(2, 4, 4), None, *estimator)
        compare("multi_sample_loss", *args, "laplace", reduction, needs & 0b110011)
    counts = torch.randint(0, 5, (4, 6))
    args = ([r(4, 4, 6), r(6), r(4, 4, 6)], counts, r(4, 4), r(2, 4, 4), None, None, None, 1, [1, 0, 1])
    compare("multi_sample_loss", *args, "zinb", reduction, needs & 0b110111)
    compare("elbo_loss", [r(4, 4, 6), r(), r(6)], counts, *latent, *options, "zinb", reduction, needs)


@pytest.mark.skipif(
    not torch._C._dispatch_has_kernel_for_dispatch_key("fastelbo::_scale_", "CPU"),
    reason="_scale_ has a CUDA kernel alone; test_cuda_host.py runs it here",
)
def test_scale():
    a = r(5, 3)
    b, factor = a.clone(), torch.tensor(0.7, dtype=torch.float64)
    ops._scale_(a, factor)
    reference.scale_(b, factor)
    assert_close(a, b)


@pytest.mark.parametrize("weights", [None, (6,), (4, 6), (3, 1, 6)], ids=str)
@pytest.mark.parametrize("per_dimension", [False, True])
def test_backward_of_mixture_log_prob(weights, per_dimension):
    z, log_weights = r(3, 4, 5), None if weights is None else r(*weights)
    args = z, r(6, 5), r(6, 5), log_weights, per_dimension
    log_prob = reference.mixture_log_prob(*args)
    for needs in ([True] * 4, [True, False, False, False], [False, True, False, True], [False, False, False, True]):
        if weights is None and not any(needs[:3]):
            continue
        compare("_mixture_log_prob_backward", torch.randn_like(log_prob), *args, log_prob, needs)


# ----------------------------------------------------------------------------------------------------------------------
# Probabilistic PCA: arguments that belong together.


@pytest.mark.parametrize("factor", [ops._ppca_factor.default, reference.ppca_factor], ids=["op", "twin"])
@pytest.mark.parametrize("shape", [(17, 4), (5, 7), (6, 3)], ids=str)
@pytest.mark.parametrize("dependent", [False, True])
def test_ppca_factor(factor, shape, dependent):
    """What both must give: more is not determined."""
    W, log_sigma2 = r(*shape), torch.tensor(-0.4, dtype=torch.float64)
    if dependent:
        W[:, 1] = -2 * W[:, 0]
    basis, triangle, whiten = factor(W, log_sigma2)
    assert_close(basis @ triangle, W)
    assert torch.equal(triangle, triangle.triu()) and torch.equal(whiten, whiten.triu())
    eye = torch.eye(shape[1], dtype=torch.float64)
    assert_close(whiten.mT @ (triangle @ triangle.mT + log_sigma2.exp() * eye) @ whiten, eye)
    overlap = basis.mT @ basis
    kept = overlap.diagonal() > 0.5  # a column may be 0
    assert_close(overlap, torch.diag(kept.double()))
    assert kept.sum() >= min(shape[0], shape[1] - dependent)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.uint8])
def test_ppca(dtype):
    N, D, M = 50, 17, 4
    x = torch.randint(0, 256, (N, D), dtype=torch.uint8) if dtype == torch.uint8 else r(N, D).to(dtype)
    W, b, log_sigma2 = r(D, M), r(D), torch.tensor(-1.3, dtype=torch.float64)
    basis, _, _ = reference.ppca_factor(W, log_sigma2)
    compare("_ppca_project", x, basis, b)
    compare("_ppca_project", x, r(D, 3), b)
    coords, square = reference.ppca_project(x, basis, b)
    compare("_ppca_rest", x, basis, b, coords, square)
    for needs in ([True] * 3, [False, True, True], [False, True, False]):
        compare("_ppca_residual", x, basis, b, coords, r(N, M), r(N), needs)
    if dtype != torch.float32:  # float32 data with a float64 model are for EM alone
        log_prob, coords, rest, *factors = ops._ppca_log_prob_forward(x, W, b, log_sigma2)
        twin = reference.ppca_log_prob_forward(x, W, b, log_sigma2)
        assert_close(log_prob, twin[0], rtol=1e-9, atol=0)
        assert_close(rest, twin[2], rtol=1e-9, atol=0)
        for a, b_ in zip((coords, *factors), (twin[1], *twin[3:]), strict=True):
            assert_close(a.abs(), b_.abs(), rtol=1e-9, atol=1e-11)  # signs of columns are free
        saved, needs = (coords, rest, *factors), [dtype != torch.uint8, True, True, True]
        compare("_ppca_log_prob_backward", r(N), x, W, b, log_sigma2, *saved, needs, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("columns", [torch.int32, torch.int64])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.uint8, torch.bool])
@pytest.mark.parametrize("lanes", [1, 16, 37, 100])
def test_sparse_products(columns, dtype, lanes):
    """Also of a part of the rows, whose first starts beyond 0, and of rows with none and with many cells."""
    N, D = 150, 700
    x = torch.randint(0, 256, (N, D)).to(dtype) if dtype in (torch.uint8, torch.bool) else r(N, D).to(dtype)
    keep = torch.rand(N, D) < torch.linspace(0, 1, N)[:, None]
    row, column = keep.nonzero().T
    starts = torch.searchsorted(row, torch.arange(N + 1))[3:]
    args = starts, column.to(columns), x[keep]
    compare("_csr_matmul", *args, r(D, lanes))
    compare("_csr_matmul_t", *args, r(N - 3, lanes), D)
    single = r(D, lanes).float()
    assert_close(ops._csr_matmul(*args, single), reference.csr_matmul(*args, single), rtol=1e-4, atol=1e-4)


def low_rank(dtype: torch.dtype = torch.float32) -> Tensor:
    return (r(300, 3) @ r(3, 12) + 0.3 * r(300, 12) + 5).to(dtype)


def used_ops(function) -> set[str]:
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        function()
    return {e.name.split("::")[1] for e in profile.events() if e.name.startswith("fastelbo::")}


@pytest.mark.parametrize("way", ["reference mode", "device without kernels"])
def test_em_takes_the_twins_where_the_functions_do(way, monkeypatch):
    x = low_rank()

    def fit() -> PPCA:
        return PPCA(3).fit(x, "em", generator=torch.Generator().manual_seed(0))

    assert {"_ppca_factor", "_ppca_project", "_ppca_rest", "_ppca_residual"} <= used_ops(fit)
    ours = fit()
    monkeypatch.setattr(_ops, "check", lambda *_: None)  # the op on stand-ins
    if way == "reference mode":
        with fastelbo.reference_mode():
            assert used_ops(fit) == set()
            twin = fit()
    else:
        monkeypatch.setattr(reference.random, "KERNEL_DEVICES", {"meta"})
        assert used_ops(fit) == set()
        twin = fit()
    assert ours.fit_report is not None and twin.fit_report is not None
    assert_close(ours.fit_report.log_likelihood, twin.fit_report.log_likelihood, rtol=1e-9, atol=0)
    for name, p in ours.named_parameters():
        assert_close(p, twin.get_parameter(name), rtol=1e-5, atol=1e-5)


# ----------------------------------------------------------------------------------------------------------------------
# Noise.


def test_noise_in_float32(monkeypatch):
    """Where a device has no float64: the same noise, off by no more than float32's resolution of the radius."""
    seed, shape = torch.tensor([11]), (1 << 17, 2)
    corners = (0, 1, 2**30 - 1, 2**31 - 1, 2**31, 2**32 - 2, 2**32 - 1)
    ends = torch.tensor([[a, b, b, a] for a in corners for b in corners])  # words that philox might give
    draws = [(shape, reference.philox), ((2 * len(ends), 2), lambda *_: ends)]
    for size, philox in draws:
        monkeypatch.setattr(reference.random, "philox", philox)
        exact = reference.normal(seed, size)
        with monkeypatch.context() as patch:
            patch.setattr(reference.random, "noise_dtype", lambda device: torch.float32)
            ours = reference.normal(seed, size)
        assert exact.dtype == torch.float64 and ours.dtype == torch.float32
        radius = exact.square().sum(1, keepdim=True).sqrt()
        assert ((ours - exact).abs() <= 2 * torch.finfo(torch.float32).eps * radius).all()
    assert radius.max() == pytest.approx(math.sqrt(66 * math.log(2)))
    assert radius.min() == pytest.approx(2.0**-16, rel=1e-9)


def test_the_type_of_the_noise():
    assert reference.noise_dtype(torch.device("cpu")) == torch.float64
    # no such device here: as one that refuses float64
    assert reference.noise_dtype(torch.device("mps")) == torch.float32
