"""Keeping a few of K samples: the gradient is unbiased, exactly, and the bound is that of all samples."""

import math
import socket
from collections.abc import Callable

import paper
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from oracle import peak
from torch import Tensor, nn
from toys import D, LearnedVariance, M, ThreeParameters, dense, leave_group, model_of

import fastelbo
from fastelbo import VAE, Kept
from fastelbo.estimators import ESTIMATORS
from fastelbo.losses import kept, split_recon
from fastelbo.models.kept_samples import check_repeats

B, SEED = 5, 3
CASES = [case for case in paper.CASES if case[0] not in ("elbo", "stl")]
every_case = pytest.mark.parametrize(
    "case", CASES, ids=[i for i in paper.CASE_IDS if not i.startswith(("elbo", "stl"))]
)
every_reduction = pytest.mark.parametrize("reduction", ["mean", "sum", "none"])


def flat(weights: Tensor) -> Tensor:
    return weights.mT.reshape(-1)  # datum by datum


def threshold(w: Tensor, n: int) -> float:
    """c, by bisection: sum min(1, w / c) = n. w [N], of which more than n are positive."""
    low, high = 0.0, w.sum().item()
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if (w / middle).clamp(max=1).sum() > n else (low, middle)
    return high


def integral(function: Callable[[float], list[Tensor]], weights: Tensor, keep: int) -> list[Tensor]:
    """Of function(u) over u in [0, 1): the choice of samples changes only where a point passes the end of a weight."""
    w, n = flat(weights), keep * weights.shape[1]
    edges = torch.tensor([], dtype=torch.float64)
    if (w > 0).sum() > n:
        c = threshold(w, n)
        by_chance = w[w < c * (1 - 1e-9)]  # those with w >= c are kept whatever u is
        edges = torch.cumsum(by_chance / c, 0) % 1
    edges = torch.cat([torch.tensor([0.0, 1.0], dtype=torch.float64), edges]).sort().values
    parts = [
        [(b - a) * t for t in function(float((a + b) / 2))]
        for a, b in zip(edges[:-1].tolist(), edges[1:].tolist(), strict=True)
        if b - a > 1e-12
    ]
    return [torch.stack(terms).sum(0) for terms in zip(*parts, strict=True)]


def assert_close(actual: list[Tensor], expected: list[Tensor], rtol: float = 1e-9) -> None:
    for a, e in zip(actual, expected, strict=True):
        assert (a - e).abs().max() <= rtol * e.abs().max() + 1e-15, ((a - e).abs().max() / e.abs().max()).item()


def log_weights(model: VAE, x: Tensor, K: int) -> Tensor:
    with torch.no_grad():
        recon, posterior = model(x, K, seed=SEED)
        return fastelbo.log_prob(recon, x, likelihood=model.likelihood) + posterior.log_ratio


def full(model: VAE, x: Tensor, case, reduction: str, upstream: Tensor) -> list[Tensor]:
    """The loss, and the gradients of encoder and decoder parameters, of all samples."""
    name, options, K = case
    recon, posterior = model(x, K, seed=SEED)
    options = {"likelihood": model.likelihood, "estimator": name, "reduction": reduction, **options}
    loss = fastelbo.multi_sample_loss(recon, x, posterior, **options)
    return [loss.detach(), *torch.autograd.grad(loss, list(model.parameters()), upstream)]


def by_functions(model: VAE, x: Tensor, case, reduction: str, upstream: Tensor, chosen: Kept) -> list[Tensor]:
    """The same of kept samples, as docs/kept_samples.md writes the loop."""
    name, options, K = case
    log_w = log_weights(model, x, K)
    mu, logvar = model.encode(x)
    posterior = fastelbo.rsample(mu, logvar, kept=chosen, seed=SEED)
    log_p = fastelbo.log_prob(model.decode(posterior.z), x[chosen.datum], likelihood=model.likelihood)
    options = {"estimator": name, "reduction": reduction, **options}
    loss = fastelbo.kept_loss(log_p, posterior, chosen, log_w, **options)
    return [loss.detach(), *torch.autograd.grad(loss, list(model.parameters()), upstream)]


def upstream_of(reduction: str) -> Tensor:
    return torch.randn((B,) if reduction == "none" else (), dtype=torch.float64)


# ----------------------------------------------------------------------------------------------------------------------
# The choice of samples.


def spread(K: int, batch: int, scale: float = 3.0) -> Tensor:
    torch.manual_seed(K)
    return scale * torch.randn(K, batch, dtype=torch.float64)


@pytest.mark.parametrize("keep", [1, 2, 5, 8, 9])
@pytest.mark.parametrize("batch", [1, 4])
@pytest.mark.parametrize("scale", [0.1, 3.0, 20.0])
def test_every_sum_is_unbiased(keep, batch, scale):
    """sum_i scale_i w_i f_i has the expectation sum w f for the f that are 1 at one sample: that is every f."""
    log_w = spread(9, batch, scale)
    weights = torch.softmax(log_w, 0)

    def kept_weights(u: float) -> list[Tensor]:
        chosen = fastelbo.keep_samples(log_w, keep, u=u)
        assert chosen.sample.shape == (keep * batch,) and chosen.scale.dtype == torch.float64
        at = chosen.datum * 9 + chosen.sample
        assert (at.diff() > 0).all(), "each is kept once, in the order of the data"
        return [torch.zeros(9 * batch, dtype=torch.float64).index_add(0, at, chosen.scale * flat(weights)[at])]

    (mean,) = integral(kept_weights, weights, keep)
    torch.testing.assert_close(mean, flat(weights), rtol=1e-9, atol=2e-12)  # the integral leaves out as much


def test_the_threshold():
    log_w, keep = spread(50, 10), 4
    w, chosen = flat(torch.softmax(log_w, 0)), fastelbo.keep_samples(log_w, keep, u=0.3)
    c = threshold(w, keep * 10)
    expected = torch.maximum(c / w[chosen.datum * 50 + chosen.sample], torch.ones(()).double())
    torch.testing.assert_close(chosen.scale, expected, rtol=1e-12, atol=0)
    assert 1 < (chosen.scale == 1).sum() < keep * 10
    everything = (w >= c).nonzero().flatten()
    assert torch.isin(everything, chosen.datum * 50 + chosen.sample).all()
    # systematic: of every datum its share of the n, or the whole number above or below it
    share = torch.where(w < c, w / c, 0.0).view(10, 50).sum(1)
    by_chance = torch.zeros(10).double().index_add(0, chosen.datum, (chosen.scale > 1).double())
    assert ((by_chance - share).abs() < 1).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_keeping_all(dtype):
    log_w = spread(7, B).to(dtype)
    for u in (0.0, 0.5, 1 - 2**-53):
        chosen = fastelbo.keep_samples(log_w, 7, u=u)
        assert torch.equal(chosen.datum * 7 + chosen.sample, torch.arange(7 * B))
        torch.testing.assert_close(chosen.scale, torch.ones(7 * B).double(), rtol=1e-12, atol=0)


@pytest.mark.parametrize("keep", [1, 3, 6])
@pytest.mark.parametrize("u", [0.01, 0.25, 0.99])
def test_equal_weights(keep, u):
    chosen = fastelbo.keep_samples(torch.zeros(6, 4), keep, u=u)
    torch.testing.assert_close(chosen.scale, torch.full((keep * 4,), 6 / keep).double(), rtol=1e-12, atol=0)
    assert torch.equal(chosen.datum.bincount(minlength=4), torch.full((4,), keep))
    assert len(set(zip(chosen.sample.tolist(), chosen.datum.tolist(), strict=True))) == keep * 4


def test_one_weight_of_one():
    log_w = torch.full((6, 3), -1e4).double()
    log_w[4, 0] = log_w[0, 1] = log_w[5, 2] = 0
    chosen = fastelbo.keep_samples(log_w, 1, u=0.7)
    assert chosen.sample.tolist() == [4, 0, 5] and chosen.datum.tolist() == [0, 1, 2]
    assert (chosen.scale == 1).all()
    more = fastelbo.keep_samples(log_w, 3, u=0.7)  # than weigh anything in float64
    assert len(more.sample) == 9 and (more.scale == 1).sum() == 3 and (more.scale == 0).sum() == 6
    padded = more.scale == 0
    assert set(zip(more.sample[padded].tolist(), more.datum[padded].tolist(), strict=True)) <= {(4, 0), (0, 1), (5, 2)}


def test_weights_of_zero_are_never_kept():
    log_w = spread(6, 3)
    log_w[1:4] = -math.inf
    log_w[:, 2] = -math.inf  # nothing there weighs anything
    for keep in (1, 2, 4):
        for u in torch.linspace(0, 0.999, 23).tolist():
            chosen = fastelbo.keep_samples(log_w, keep, u=u)
            assert len(chosen.sample) == 3 * keep
            assert (log_w[chosen.sample, chosen.datum] > -math.inf).all()
            assert (chosen.scale > 0).sum() == min(3 * keep, 6)
    nothing = fastelbo.keep_samples(torch.full((6, 3), -math.inf), 2)
    assert (nothing.scale == 0).all() and len(nothing.sample) == 6


@pytest.mark.parametrize("wrong", [math.nan, math.inf])
def test_nan_comes_through(wrong):
    log_w = spread(6, 3)
    log_w[2, 1] = wrong
    for keep in (1, 3, 6):
        chosen = fastelbo.keep_samples(log_w, keep)
        assert chosen.scale.isnan().all() and len(chosen.scale) == 3 * keep
        assert ((chosen.sample >= 0) & (chosen.sample < 6) & (chosen.datum >= 0) & (chosen.datum < 3)).all()


def test_other_weights():
    """Negative ones count by their size; log_w is then only a shape."""
    weights = torch.tensor([[-4.0, 1.0], [0.0, 2.0]])
    chosen = fastelbo.keep_samples(torch.zeros(2, 2), 1, weights=weights, u=0.4)
    # c = 3: w = 4 is kept for sure, 1 and 2 lie on [0, 3], where the point is at 0.4 * 3
    assert chosen.datum.tolist() == [0, 1] and chosen.sample.tolist() == [0, 1]
    assert chosen.scale.tolist() == [1, 1.5]
    assert fastelbo.keep_samples(torch.zeros(2, 2), 1, weights=weights, u=0.3).scale.tolist() == [1, 3]
    assert len(fastelbo.keep_samples(torch.zeros(4, 0), 2).sample) == 0


def test_the_uniform_number():
    log_w = spread(50, 10)
    first, second = (fastelbo.keep_samples(log_w, 4, generator=torch.Generator().manual_seed(5)) for _ in range(2))
    assert all(map(torch.equal, first, second))
    torch.manual_seed(5)
    assert all(map(torch.equal, fastelbo.keep_samples(log_w, 4), first))
    assert not all(map(torch.equal, fastelbo.keep_samples(log_w, 4), first))
    number = torch.tensor(0.3, dtype=torch.float64)
    assert all(map(torch.equal, fastelbo.keep_samples(log_w, 4, u=0.3), fastelbo.keep_samples(log_w, 4, u=number)))


def test_what_is_refused():
    log_w = spread(6, 3)
    for call, message in (
        (lambda: fastelbo.keep_samples(log_w, 7), r"keep must be at most K=6 from log_w; got 7"),
        (lambda: fastelbo.keep_samples(log_w, 0), r"keep must be at least 1; got 0"),
        (lambda: fastelbo.keep_samples(log_w[0], 1), r"log_w must be \[K, B\]; got \(3,\)"),
        (lambda: fastelbo.keep_samples(log_w, 1, weights=log_w[:3]), r"weights must have the shape \(6, 3\) of log_w"),
        (lambda: fastelbo.keep_samples(log_w, 1, u=1.0), r"u must be in \[0, 1\); got 1.0"),
        (
            lambda: fastelbo.keep_samples(log_w, 1, u=0.5, generator=torch.Generator()),
            "u and generator exclude each other",
        ),
        (lambda: fastelbo.estimator_weights(log_w, estimator="stl"), "keep has no use with 'stl'"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
    mu = torch.zeros(3, 2)
    for sample, datum in (([0, 0], [0, 3]), ([0, 0], [-1, 0]), ([-1, 0], [0, 0]), ([2**62, 0], [0, 0])):
        index = torch.tensor(sample), torch.tensor(datum)
        with pytest.raises(IndexError, match=r"(sample|datum) must be in \[0, "):
            fastelbo.rsample(mu, mu, kept=Kept(*index, torch.ones(2)), seed=1)
    chosen = fastelbo.keep_samples(log_w, 2)
    posterior = fastelbo.rsample(mu, mu, kept=chosen, seed=1)
    with pytest.raises(ValueError, match=r"log_likelihood must be \[n\] with n=6 from kept; got \(3,\)"):
        fastelbo.kept_loss(torch.zeros(3), posterior, chosen, log_w)
    with pytest.raises(ValueError, match="posterior must be of the kept samples"):
        fastelbo.kept_loss(torch.zeros(6), fastelbo.rsample(mu, mu, 6), chosen, log_w)


# ----------------------------------------------------------------------------------------------------------------------
# The samples, drawn again.


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("latent", [(), (1,), (7,), (50,), (3, 5), (1100,)], ids=str)
@pytest.mark.parametrize("seed", [3, -(2**63)])
def test_the_rows_are_those_of_all_samples(dtype, latent, seed):
    K = 9
    mu, logvar, p_mu, p_logvar = (torch.randn(B, *latent).to(dtype) for _ in range(4))
    chosen = fastelbo.keep_samples(spread(K, B), 3)
    whole = fastelbo.rsample(mu, logvar, K, prior_mu=p_mu, prior_logvar=p_logvar, seed=seed)
    rows = fastelbo.rsample(mu, logvar, kept=chosen, prior_mu=p_mu, prior_logvar=p_logvar, seed=seed)
    at = chosen.sample, chosen.datum
    assert torch.equal(rows.z, whole.z[at]) and torch.equal(rows.log_ratio, whole.log_ratio[at])
    assert torch.equal(rows.kl, whole.kl)
    assert rows.gates.shape == (2, 3 * B) and not rows.gates.any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("gated", [False, True])
def test_their_gradient_is_that_of_all_samples(dtype, gated):
    """With upstream gradients of 0 for those that are not kept."""
    K, latent = 9, 130
    leaves = [torch.randn(B, latent).to(dtype).requires_grad_() for _ in range(4)]
    sample, datum = torch.tensor([5, 0, 8, 5, 2, 2, 7]), torch.tensor([4, 0, 1, 3, 4, 0, 4])
    rows = fastelbo.rsample(
        *leaves[:2], kept=Kept(sample, datum, sample), prior_mu=leaves[2], prior_logvar=leaves[3], seed=SEED
    )
    whole = fastelbo.rsample(*leaves[:2], K, prior_mu=leaves[2], prior_logvar=leaves[3], seed=SEED)
    up_z, up_ratio, up_gates = torch.randn(7, latent).to(dtype), torch.randn(7), torch.randn(2, 7)
    up = [up_z, up_ratio.to(rows.log_ratio.dtype), up_gates.to(rows.gates.dtype)]
    ups = [torch.zeros_like(t) for t in (whole.z, whole.log_ratio, whole.gates)]
    ups[0][sample, datum], ups[1][sample, datum], ups[2][:, sample, datum] = up
    count = 3 if gated else 2
    ours = torch.autograd.grad([rows.z, rows.log_ratio, rows.gates][:count], leaves, up[:count])
    theirs = torch.autograd.grad([whole.z, whole.log_ratio, whole.gates][:count], leaves, ups[:count])
    eps = torch.finfo(dtype).eps
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=2 * eps, atol=8 * eps)
    assert not ours[0][2].any() and not ours[1][2].any(), "nothing of datum 2 is kept"


def test_the_gradient_is_the_same_for_any_number_of_threads():
    mu, logvar = (torch.randn(64, 300).requires_grad_() for _ in range(2))
    chosen = fastelbo.keep_samples(spread(40, 64), 8)
    up = torch.randn(8 * 64, 300), torch.randn(8 * 64)
    found, before = [], torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            rows = fastelbo.rsample(mu, logvar, kept=chosen, seed=SEED)
            found.append([rows.z, *torch.autograd.grad([rows.z, rows.log_ratio], [mu, logvar], up)])
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for other in found[1:] for a, b in zip(found[0], other, strict=True))


# ----------------------------------------------------------------------------------------------------------------------
# The loss by functions.


@every_case
@every_reduction
def test_estimators_stay_unbiased(case, reduction):
    """The bound is that of all samples; the gradients of encoder and decoder, integrated over u, are theirs."""
    name, options, K = case
    model, x, upstream = model_of(), torch.rand(B, D, dtype=torch.float64), upstream_of(reduction)
    expected = full(model, x, case, reduction, upstream)
    weights = fastelbo.estimator_weights(log_w := log_weights(model, x, K), estimator=name, **options)
    for keep in {1, min(3, K)}:
        several = []

        def at(u: float, keep: int = keep, several: list[Tensor] = several) -> list[Tensor]:
            chosen = fastelbo.keep_samples(log_w, keep, weights=weights, u=u)
            loss, *grads = by_functions(model, x, case, reduction, upstream, chosen)
            torch.testing.assert_close(loss, expected[0], rtol=1e-12, atol=1e-12)
            several.append(grads[0])
            return grads

        assert_close(integral(at, weights, keep), expected[1:])
        if 1 < K > keep and name != "vr":
            assert len(several) > 3 and not torch.allclose(several[0], several[1], rtol=1e-3), "each is another one"


@every_case
def test_keeping_all_is_the_full_gradient(case):
    model, x, upstream = model_of(), torch.rand(B, D, dtype=torch.float64), upstream_of("none")
    chosen = fastelbo.keep_samples(log_weights(model, x, case[2]), case[2])
    assert_close(by_functions(model, x, case, "none", upstream, chosen), full(model, x, case, "none", upstream))


@every_case
def test_the_weights_are_the_gradient_of_the_bound(case):
    name, options, K = case
    log_w = spread(K, B).requires_grad_()
    row = ESTIMATORS[name].make(**options)
    bound = fastelbo.reference.bound(log_w, row.elbo_weight, row.alpha, row.groups)
    expected = torch.autograd.grad(bound.sum(), log_w)[0]
    torch.testing.assert_close(fastelbo.estimator_weights(log_w, estimator=name, **options), expected)


def test_masks_and_priors():
    """What the caller selects by row: the mask and a prior with its gradient."""
    K, keep = 7, 2
    torch.manual_seed(4)
    mu, logvar, p_mu, p_logvar = (torch.randn(B, M, dtype=torch.float64).mul_(0.5).requires_grad_() for _ in range(4))
    decoder, x, mask = model_of().decoder, torch.rand(B, D, dtype=torch.float64), torch.rand(B, D) < 0.6
    leaves, prior = [mu, logvar, p_mu, p_logvar], {"prior_mu": p_mu, "prior_logvar": p_logvar, "seed": SEED}
    whole = fastelbo.rsample(mu, logvar, K, **prior)
    recon = decoder(whole.z)
    for estimator in ("iwae", "dreg", "rws"):
        loss = fastelbo.multi_sample_loss(recon, x, whole, mask=mask, estimator=estimator)
        expected = torch.autograd.grad(loss, leaves, retain_graph=True)
        log_w = (fastelbo.log_prob(recon, x, mask=mask) + whole.log_ratio).detach()

        def at(u: float, estimator: str = estimator, log_w: Tensor = log_w) -> list[Tensor]:
            chosen = fastelbo.keep_samples(log_w, keep, u=u)
            rows = fastelbo.rsample(mu, logvar, kept=chosen, **prior)
            log_p = fastelbo.log_prob(decoder(rows.z), x[chosen.datum], mask=mask[chosen.datum])
            loss = fastelbo.kept_loss(log_p, rows, chosen, log_w, estimator=estimator)
            return list(torch.autograd.grad(loss, leaves))

        assert_close(integral(at, torch.softmax(log_w, 0), keep), list(expected))


def test_a_weight_of_nan_gives_a_gradient_of_nan():
    model, x = model_of(), torch.rand(B, D, dtype=torch.float64)
    log_w = log_weights(model, x, 7)
    log_w[3, 1] = math.nan
    mu, logvar = (t.detach().requires_grad_() for t in model.encode(x))
    chosen = fastelbo.keep_samples(log_w, 2)
    rows = fastelbo.rsample(mu, logvar, kept=chosen, seed=SEED)
    loss = fastelbo.kept_loss(
        fastelbo.log_prob(model.decode(rows.z), x[chosen.datum]), rows, chosen, log_w, reduction="none"
    )
    assert loss.isnan().tolist() == [False, True, False, False, False]
    grads = torch.autograd.grad(loss[0], [mu, *model.decoder.parameters()])
    assert all(g.isnan().any() for g in grads)


def test_a_second_derivative_is_refused():
    model, x = model_of(), torch.rand(B, D, dtype=torch.float64)
    loss = model.loss(x, objective="iwae", num_samples=7, keep=2)
    with pytest.raises(NotImplementedError, match="the gradient through kept samples has no graph"):
        torch.autograd.grad(loss, list(model.parameters()), create_graph=True)


def test_the_parts_compile():
    model, x, K = model_of(torch.float32), torch.rand(B, D), 9
    log_w = log_weights(model, x, K)

    def step(x: Tensor, log_w: Tensor, u: Tensor) -> Tensor:
        chosen = fastelbo.keep_samples(log_w, 3, u=u)
        rows = fastelbo.rsample(*model.encode(x), kept=chosen, seed=torch.tensor([SEED]))
        log_p = fastelbo.log_prob(model.decode(rows.z), x.index_select(0, chosen.datum))
        return fastelbo.kept_loss(log_p, rows, chosen, log_w, estimator="dreg")

    torch._dynamo.reset()
    compiled, parameters = torch.compile(step, fullgraph=True, backend="aot_eager"), list(model.parameters())
    for u in (0.2, 0.9):
        results = []
        for call in (step, compiled):
            loss = call(x, log_w, torch.tensor(u, dtype=torch.float64))
            results.append([loss, *torch.autograd.grad(loss, parameters)])
        torch.testing.assert_close(results[1], results[0])


# ----------------------------------------------------------------------------------------------------------------------
# VAE.loss(keep=...).


def at_u(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """VAE.loss chooses by this u."""
    keep_samples = kept.keep_samples

    def choose(u: float) -> None:
        def at(log_w: Tensor, keep: int, *, weights: Tensor, generator: None) -> Kept:
            return keep_samples(log_w, keep, weights=weights, u=u)

        monkeypatch.setattr(kept, "keep_samples", at)

    return choose


DECODERS = {
    "bernoulli": (lambda: None, "bernoulli"),
    "one scale": (lambda: LearnedVariance(()), "gaussian"),
    "a scale for each element": (lambda: LearnedVariance((2, 3)), "laplace"),
    "a scale that broadcasts": (lambda: LearnedVariance((1, 2, 3)), "gaussian"),
    "a scale of every row": (lambda: LearnedVariance((), full=True), "gaussian"),
    "three tensors": (lambda: ThreeParameters((2, 3), (), True), "zinb"),
    "three tensors, shared": (lambda: ThreeParameters((), (2, 3), False), "zinb"),
}


@pytest.mark.parametrize("decoder", DECODERS)
@pytest.mark.parametrize("objective", ["iwae", "dreg"])
def test_loss_of_any_likelihood(decoder, objective, monkeypatch):
    make, likelihood = DECODERS[decoder]
    model, K, keep = dense(make(), likelihood), 6, 2
    x = torch.randint(0, 5, (B, 2, 3)) if likelihood == "zinb" else torch.rand(B, 2, 3).double()
    parameters, options = list(model.parameters()), {"objective": objective, "num_samples": K, "seed": SEED}
    parts = model.parts(x, **options)
    expected = torch.autograd.grad(parts.loss, parameters)
    recon, posterior = model(x, K, seed=SEED)
    weights = torch.softmax(fastelbo.log_prob(recon, x, likelihood=likelihood) + posterior.log_ratio, 0).detach()
    choose = at_u(monkeypatch)

    def at(u: float) -> list[Tensor]:
        choose(u)
        ours = model.parts(x, keep=keep, **options)
        for a, b in zip(ours, parts, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
        assert ours.loss.requires_grad and ours.kl.requires_grad and not ours.log_likelihood.requires_grad
        grads = torch.autograd.grad(ours.loss, parameters)
        assert [g.shape for g in grads] == [p.shape for p in parameters]
        return list(grads)

    assert_close(integral(at, weights, keep), list(expected))
    assert len(split_recon(recon)) in (1, 2, 3)


@every_case
@every_reduction
def test_loss_of_every_objective(case, reduction, monkeypatch):
    name, options, K = case
    model, x = model_of(), torch.rand(B, D, dtype=torch.float64)
    given = {"objective": name, "num_samples": K, "reduction": reduction, "seed": SEED, **options}
    whole, parameters = model.loss(x, **given), list(model.parameters())
    upstream = torch.rand_like(whole)
    expected = torch.autograd.grad(whole, parameters, upstream)
    weights, choose = fastelbo.estimator_weights(log_weights(model, x, K), estimator=name, **options), at_u(monkeypatch)

    def at(u: float) -> list[Tensor]:
        choose(u)
        loss = model.loss(x, keep=min(2, K), **given)
        torch.testing.assert_close(loss, whole, rtol=1e-12, atol=1e-12)
        return list(torch.autograd.grad(loss, parameters, upstream))

    assert_close(integral(at, weights, min(2, K)), list(expected))


@pytest.mark.parametrize("batch", [1, B])
@pytest.mark.parametrize("K", [1, 2, 40])
def test_float32(batch, K):
    model, x = model_of(torch.float32), torch.rand(batch, D)
    options = {"objective": "iwae", "num_samples": K, "seed": SEED}
    torch.testing.assert_close(model.loss(x, keep=1, **options), model.loss(x, **options), rtol=2e-6, atol=2e-6)
    all_kept = torch.autograd.grad(model.loss(x, keep=K, **options), list(model.parameters()))
    torch.testing.assert_close(all_kept, torch.autograd.grad(model.loss(x, **options), list(model.parameters())))


def test_a_generator_reproduces_loss_and_gradient():
    model, x = model_of(), torch.rand(B, D).double()
    options = {"objective": "iwae", "num_samples": 9, "keep": 2}

    def found() -> list[Tensor]:
        loss = model.loss(x, generator=torch.Generator().manual_seed(SEED), **options)
        return [loss, *torch.autograd.grad(loss, list(model.parameters()))]

    first, _, again = found(), torch.rand(3), found()
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


def test_the_encoder_runs_once_and_the_decoder_with_a_graph_over_n_rows():
    model, x, K, keep = model_of(torch.float32), torch.rand(B, D), 5000 * 11, 4
    seen: dict[nn.Module, list[tuple[int, bool]]] = {model.encoder: [], model.decoder: []}
    for module, calls in seen.items():
        module.register_forward_hook(lambda m, args, out, calls=calls: calls.append((len(out), out.requires_grad)))
    model.loss(x, objective="iwae", num_samples=K, keep=keep).backward()
    assert seen[model.encoder] == [(B, True)]
    *without, last = seen[model.decoder]
    assert last == (keep * B, True) and len(without) > 1
    assert sum(rows for rows, _ in without) == K * B and not any(graph for _, graph in without)
    with torch.no_grad():
        model.loss(x, objective="iwae", num_samples=K, keep=keep)
    assert sum(rows for rows, _ in seen[model.decoder]) == 2 * K * B + keep * B, "without gradients, no second run"


def test_memory_does_not_grow_with_the_number_of_samples():
    """But for some float64 numbers per weight: each would have 8 KB in z alone."""
    latent, data, batch = 2000, 784, 4
    torch.manual_seed(0)
    model = VAE(nn.Linear(data, 2 * latent), nn.Linear(latent, data))
    x = torch.rand(batch, data)

    def step(K: int) -> int:
        return peak(lambda: model.loss(x, objective="iwae", num_samples=K, keep=4, seed=SEED).backward())

    step(200)
    few, many = step(500), step(5000)
    assert many - few < 25 * 8 * batch * 4500 + 1e5, (few, many)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast(dtype):
    """The copies of weights that the pass without a graph makes are not those of the pass with one."""
    model, x = model_of(torch.float32), torch.rand(B, D)
    options = {"objective": "iwae", "num_samples": 9, "seed": SEED}
    parameters, results = list(model.parameters()), []
    for keep in (None, 8):
        with torch.autocast("cpu", dtype=dtype):
            loss = model.loss(x, keep=keep, **options)
        results.append(torch.autograd.grad(loss, parameters))
    assert torch.is_autocast_cache_enabled()
    for a, b in zip(*results, strict=True):  # 8 of 9 are kept: the gradient is nearly the same
        assert (a - b).abs().max() < 0.1 * a.abs().max() > 0


class Custom(nn.Module):
    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(M, 6), module, nn.Linear(6, D))

    def forward(self, z: Tensor) -> Tensor:
        return self.body(z)


@pytest.mark.parametrize("module", [nn.Dropout(0.1), nn.AlphaDropout(0.1), nn.BatchNorm1d(6), nn.RReLU()], ids=repr)
def test_a_decoder_whose_runs_differ_is_refused(module):
    model, x = (
        VAE(nn.Sequential(nn.Linear(D, 6), nn.Dropout(0.1), nn.Linear(6, 2 * M)), Custom(module)),
        torch.rand(B, D),
    )
    kind = type(module).__name__
    with pytest.raises(ValueError, match=rf"decoder\.body\.1, a {kind} in training mode.*decoder\.body\.1\.eval\(\)"):
        model.loss(x, objective="iwae", num_samples=8, keep=2)
    module.eval()  # and dropout in the encoder, which runs once, is as good as ever
    model.loss(x, objective="iwae", num_samples=8, keep=2).backward()


def test_modules_that_hold_dropout_themselves():
    layer = nn.TransformerEncoderLayer(M, 2, 8, dropout=0.1)
    for module, name in (
        (nn.GRU(M, 6, 2, dropout=0.1), "decoder, a GRU"),
        (layer, r"decoder\.self_attn, a MultiheadAttention"),
        (
            nn.utils.parametrizations.spectral_norm(nn.Linear(M, D)),
            r"decoder\.parametrizations\.weight\.0, a _Spectral",
        ),
    ):
        with pytest.raises(ValueError, match=f"two runs of {name}"):
            check_repeats(module)
        check_repeats(module.eval())


class Body(nn.Module):
    """A decoder around a function that no module's name tells of."""

    def __init__(self, function: Callable[[nn.Module, Tensor], Tensor]) -> None:
        super().__init__()
        self.first, self.last, self.function, self.runs = nn.Linear(M, 6), nn.Linear(6, D), function, 0

    def forward(self, z: Tensor) -> Tensor:
        self.runs += 1
        return self.last(self.function(self, self.first(z)))


DIFFERENT = {
    "dropout": lambda self, h: nn.functional.dropout(h, 0.1),
    "noise": lambda self, h: h + 0.1 * torch.randn_like(h),
    "a state": lambda self, h: h * (1 + 0.1 * self.runs),
    "other rows": lambda self, h: h / h.std(0),
    "the number of rows": lambda self, h: h + len(h) / 100,
    "gradients": lambda self, h: h if torch.is_grad_enabled() else h.round(),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", DIFFERENT)
def test_runs_that_differ_unseen_by_name_are_refused(kind, dtype):
    torch.manual_seed(0)
    model, x = VAE(nn.Linear(D, 2 * M), Body(DIFFERENT[kind])), torch.rand(16, D, dtype=dtype)
    with torch.no_grad():
        model.decoder.last.weight.mul_(20)
    options = {"objective": "iwae", "num_samples": 8}
    with pytest.raises(ValueError, match=r"two runs differ: log p of the kept samples changed by .* leave keep out"):
        model.to(dtype).loss(x, keep=2, **options)
    model.loss(x, **options).backward()
    same = VAE(model.encoder, Body(lambda self, h: h)).to(dtype)
    same.loss(x, keep=2, **options).backward()


def test_both_forms_of_spectral_norm_are_refused_and_taken_in_eval():
    for norm in (nn.utils.spectral_norm, nn.utils.parametrizations.spectral_norm):
        model, x = VAE(nn.Linear(D, 2 * M), nn.Sequential(nn.Linear(M, 6), norm(nn.Linear(6, D)))), torch.rand(B, D)
        with pytest.raises(ValueError, match=r"two runs of decoder\.1.*, a .* in training mode"):
            model.loss(x, objective="iwae", num_samples=8, keep=2)
        model.decoder.eval()
        model.loss(x, objective="iwae", num_samples=8, keep=2).backward()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, None], ids=str)
@pytest.mark.parametrize("likelihood", ["bernoulli", "gaussian"])
def test_rounding_is_no_difference(dtype, likelihood):
    """Of large decoders, whose products depend on the number of rows, at any size of log p."""
    torch.manual_seed(0)
    for scale in (0.1, 1.0, 10.0):
        decoder = nn.Sequential(nn.Linear(8, 300), nn.ReLU(), nn.Linear(300, 300), nn.Tanh(), nn.Linear(300, 784))
        with torch.no_grad():
            for p in decoder.parameters():
                p.mul_(scale)
        model = VAE(nn.Linear(784, 16), decoder, likelihood)
        for keep in (1, 5, 16):
            with torch.autocast("cpu", dtype or torch.bfloat16, enabled=dtype is not None):
                model.loss(torch.rand(13, 784), objective="dreg", num_samples=24, keep=keep)


def test_what_differs_in_no_run_is_taken():
    for module in (nn.Dropout(0.0), nn.LayerNorm(6), nn.GELU(), nn.Identity()):
        model = VAE(nn.Linear(D, 2 * M), Custom(module))
        model.loss(torch.rand(B, D), objective="iwae", num_samples=8, keep=2).backward()


@pytest.mark.parametrize(
    "options, message",
    [
        ({"objective": "elbo", "num_samples": 8}, "keep has no use with 'elbo': its samples all have the weight 1/K"),
        ({"objective": "stl", "num_samples": 8}, "keep has no use with 'stl'"),
        ({"num_samples": 3}, "keep must be at most num_samples=3; got 4"),
        ({"num_samples": 8, "eps": torch.zeros(8, B, M)}, "eps and keep exclude each other"),
        ({"num_samples": 8, "keep": "auto"}, "keep must be an int; got str"),
        ({"num_samples": 8, "keep": 0}, "keep must be at least 1; got 0"),
        (
            {"num_samples": 8, "objective": "vr", "alpha": torch.tensor(0.5, requires_grad=True)},
            "keep takes no learned number: the weights have no graph",
        ),
        ({"num_samples": 8, "objective": "miwae", "groups": 3}, "groups must divide the number of samples K=8"),
    ],
)
def test_options_of_the_loss(options, message):
    with pytest.raises((ValueError, TypeError), match=message):
        model_of().loss(torch.rand(B, D).double(), **{"objective": "iwae", "keep": 4, **options})


# ----------------------------------------------------------------------------------------------------------------------
# Gradient accumulation, and several processes.


def test_accumulated_gradients_add_up():
    model, halves = model_of(torch.float64), torch.rand(2, B, D).double()
    parameters, options = list(model.parameters()), {"objective": "dreg", "num_samples": 9, "keep": 2}
    expected = [torch.zeros_like(p) for p in parameters]
    for i, x in enumerate(halves):
        torch.manual_seed(i)
        for total, g in zip(expected, torch.autograd.grad(model.loss(x, **options), parameters), strict=True):
            total += g
    for i, x in enumerate(halves):
        torch.manual_seed(i)
        model.loss(x, **options).backward()
    for p, e in zip(parameters, expected, strict=True):
        torch.testing.assert_close(p.grad, e, rtol=1e-12, atol=1e-15)


LOSS = fastelbo.Objective("dreg", num_samples=9)


def _parallel(rank: int, port: int, shards: list[Tensor], folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    found = []
    for accumulated in (False, True):
        wrapped = nn.parallel.DistributedDataParallel(fastelbo.VAELoss(model_of(torch.float64), LOSS))
        torch.manual_seed(rank)
        if accumulated:
            with wrapped.no_sync():
                wrapped(shards[rank], keep=2).backward()
        wrapped(shards[rank], keep=2).backward()
        found.append([p.grad for p in wrapped.parameters()])
    torch.save(found, f"{folder}/{rank}.pt")
    leave_group()


def test_two_processes_average_their_gradients(tmp_path):
    """DistributedDataParallel sees the pass with a graph alone; each process chooses samples of its own."""
    torch.manual_seed(7)
    shards = list(torch.rand(2, B, D).double())
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    mp.start_processes(_parallel, (port, shards, str(tmp_path)), 2, start_method="fork")
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    for ours, theirs in zip(first, second, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
    for found, steps in zip(first, (1, 2), strict=True):
        expected = None
        for rank in range(2):
            module = fastelbo.VAELoss(model_of(torch.float64), LOSS)
            torch.manual_seed(rank)
            for _ in range(steps):
                module(shards[rank], keep=2).backward()
            grads = [p.grad / 2 for p in module.parameters()]
            expected = grads if expected is None else [a + b for a, b in zip(expected, grads, strict=True)]
        assert_close(found, expected, 1e-12)
