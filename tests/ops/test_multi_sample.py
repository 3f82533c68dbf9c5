"""multi_sample_loss and VAE.loss: every estimator against its paper, and what each is known for."""

import math
from itertools import pairwise

import paper
import pytest
import torch
import torch.distributions as td
from oracle import assert_backward_repeats, gradients
from paper import CASE_IDS, CASES, Setting
from torch import Tensor
from toys import D, M, linear_gaussian, model_of

import fastelbo
from fastelbo import VAE
from fastelbo.estimators import ESTIMATORS

every_case = pytest.mark.parametrize("case", CASES, ids=CASE_IDS)
every_reduction = pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
B = 3
GATED = ("stl", "dreg", "rws")
CHUNK = 4000  # draws at a time


def setting(model: VAE, x: Tensor, eps: Tensor) -> Setting:
    """The same model written out with torch.distributions."""
    mu, logvar = model.encoder(x).chunk(2, 1)

    def log_joint(z: Tensor) -> Tensor:
        recon = model.decoder(z)
        if model.likelihood == "gaussian":
            log_p = td.Normal(recon, torch.ones_like(recon)).log_prob(x)
        else:
            log_p = td.Bernoulli(logits=recon, validate_args=False).log_prob(x)
        return log_p.sum(-1) + td.Normal(0.0, 1.0).log_prob(z).sum(-1)

    return Setting(log_joint, (mu, logvar), mu + torch.exp(0.5 * logvar) * eps)


def by_paper(case, model: VAE, x: Tensor, eps: Tensor, reduction: str, upstream: Tensor) -> list[Tensor]:
    """Minus the bound, then the gradients of encoder and decoder parameters."""
    name, options, _ = case
    bound, for_encoder, for_decoder = paper.ESTIMATORS[name](setting(model, x, eps), **options)

    def reduced(t: Tensor) -> Tensor:
        return {"mean": t.mean(), "sum": t.sum(), "none": t}[reduction]

    grads = []
    for target, module in ((for_encoder, model.encoder), (for_decoder, model.decoder)):
        grads += torch.autograd.grad(-reduced(target), list(module.parameters()), upstream, retain_graph=True)
    return [-reduced(bound).detach(), *grads]


def by_fastelbo(case, model: VAE, x: Tensor, eps: Tensor, reduction: str, upstream: Tensor) -> list[Tensor]:
    name, options, _ = case
    recon, posterior = model(x, len(eps), eps=eps)
    loss = fastelbo.multi_sample_loss(
        recon, x, posterior, likelihood=model.likelihood, estimator=name, reduction=reduction, **options
    )
    parameters = [*model.encoder.parameters(), *model.decoder.parameters()]
    return [loss.detach(), *torch.autograd.grad(loss, parameters, upstream.to(loss.dtype))]


def draw(K: int, dtype: torch.dtype = torch.float64, batch: int = B) -> tuple[Tensor, Tensor]:
    x, eps = torch.rand(batch, D, dtype=torch.float64), torch.randn(K, batch, M, dtype=torch.float64)
    return x.to(dtype), eps.to(dtype)


def upstream_of(reduction: str) -> Tensor:
    return torch.randn((B,) if reduction == "none" else (), dtype=torch.float64)


def relative(a: Tensor, b: Tensor) -> float:
    return ((a.double() - b).abs().max() / b.abs().max()).item()


@pytest.mark.parametrize("likelihood", ["bernoulli", "gaussian"])
@every_case
@every_reduction
def test_gradient_is_the_papers(case, reduction, likelihood):
    """Encoder and decoder parameters apart, relative error below 1e-10 in float64."""
    model, (x, eps), upstream = model_of(likelihood=likelihood), draw(case[2]), upstream_of(reduction)
    expected = by_paper(case, model, x, eps, reduction, upstream)
    actual = by_fastelbo(case, model, x, eps, reduction, upstream)
    assert max(relative(a, e) for a, e in zip(actual, expected, strict=True)) < 1e-10
    with fastelbo.reference_mode():
        twin = by_fastelbo(case, model, x, eps, reduction, upstream)
    assert max(relative(a, e) for a, e in zip(twin, expected, strict=True)) < 1e-10


@every_case
@every_reduction
def test_float32_is_as_good_as_eager_pytorch(case, reduction):
    """Over many draws, the error is at most twice that of the paper's formula in float32."""
    model, wide = model_of(torch.float32), model_of()
    ours, eager = [], []
    for _ in range(10):
        (x, eps), upstream = draw(case[2], torch.float32), upstream_of(reduction)
        exact = by_paper(case, wide, x.double(), eps.double(), reduction, upstream)
        actual = by_fastelbo(case, model, x, eps, reduction, upstream)
        plain = by_paper(case, model, x, eps, reduction, upstream.float())
        ours.append([relative(a, e) for a, e in zip(actual, exact, strict=True)])
        eager.append([relative(a, e) for a, e in zip(plain, exact, strict=True)])
    ours, eager = torch.tensor(ours).mean(0), torch.tensor(eager).mean(0)
    assert (ours <= 2 * eager + 1e-7).all(), (ours / eager).tolist()


def test_every_estimator_is_tested():
    assert set(ESTIMATORS) == set(paper.ESTIMATORS) == {name for name, _, _ in CASES}


@every_case
@pytest.mark.parametrize("upstream", [1.0, 0.3])
def test_backward_repeats(case, upstream):
    model, (x, eps) = model_of(torch.float32), draw(case[2], torch.float32)
    recon, posterior = model(x, len(eps), eps=eps)
    loss = fastelbo.multi_sample_loss(recon, x, posterior, estimator=case[0], **case[1])
    assert_backward_repeats(loss, list(model.parameters()), upstream)


@every_case
@every_reduction
def test_prior_parameters_go_with_the_decoder(case, reduction):
    """A learned prior is part of p(x, z): its gradient has the weights a."""
    name, options, K = case
    torch.manual_seed(2)
    mu, logvar, p_mu, p_logvar = (torch.randn(B, M, dtype=torch.float64).mul_(0.5).requires_grad_() for _ in range(4))
    x, eps = draw(K)
    decoder = model_of().decoder
    posterior = fastelbo.rsample(mu, logvar, K, prior_mu=p_mu, prior_logvar=p_logvar, eps=eps)
    recon = decoder(posterior.z)
    options = {"estimator": name, "reduction": reduction, **options}
    loss = fastelbo.multi_sample_loss(recon, x, posterior, **options)
    upstream = upstream_of(reduction)
    actual = torch.autograd.grad(loss, [mu, logvar, p_mu, p_logvar], upstream)

    def log_joint(z: Tensor) -> Tensor:
        prior = td.Normal(p_mu, torch.exp(0.5 * p_logvar)).log_prob(z).sum(-1)
        return td.Bernoulli(logits=decoder(z), validate_args=False).log_prob(x).sum(-1) + prior

    written = Setting(log_joint, (mu, logvar), mu + torch.exp(0.5 * logvar) * eps)
    _, for_encoder, for_decoder = paper.ESTIMATORS[name](written, **case[1])
    expected = []
    for target, wanted in ((for_encoder, [mu, logvar]), (for_decoder, [p_mu, p_logvar])):
        reduced = {"mean": target.mean(), "sum": target.sum(), "none": target}[reduction]
        expected += torch.autograd.grad(-reduced, wanted, upstream, retain_graph=True)
    assert max(relative(a, e) for a, e in zip(actual, expected, strict=True)) < 1e-10


@every_case
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_types(case, dtype):
    """The loss is float32; gradients are those of float32 arithmetic on the same inputs, rounded once."""
    name, options, K = case
    mu, logvar = (torch.randn(B, M).to(dtype).requires_grad_() for _ in range(2))
    x, eps = draw(K, dtype)
    recon = torch.randn(K, B, D).to(dtype).requires_grad_()
    grad_z = torch.randn(K, B, M).to(dtype)
    results = []
    for wide in (False, True):
        leaves = [t.detach().float().requires_grad_() if wide else t for t in (mu, logvar, recon)]
        posterior = fastelbo.rsample(*leaves[:2], K, eps=eps.float() if wide else eps)
        loss = fastelbo.multi_sample_loss(leaves[2], x.float() if wide else x, posterior, estimator=name, **options)
        roots = [loss, posterior.z]
        results.append([loss, *torch.autograd.grad(roots, leaves, [torch.ones(()), grad_z.to(posterior.z.dtype)])])
    assert results[0][0].dtype == torch.float32
    torch.testing.assert_close(results[0][0], results[1][0], rtol=2e-6, atol=2e-6)
    for half, full in zip(results[0][1:], results[1][1:], strict=True):
        assert half.dtype == dtype
        assert relative(half, full.double()) < 2 * torch.finfo(dtype).eps


# ----------------------------------------------------------------------------------------------------------------------
# Derivatives of the derivatives, torch.func, torch.compile


@every_case
def test_a_graph_of_the_gradient(case):
    """create_graph=True: first derivatives as ever; the derivative of the estimator is that of finite differences."""
    name, options, K = case
    x, eps = draw(K)
    mu, logvar = (torch.randn(B, M, dtype=torch.float64).requires_grad_() for _ in range(2))
    decoder = model_of().decoder

    def estimate(mu: Tensor, logvar: Tensor, create_graph: bool = True) -> tuple[Tensor, ...]:
        posterior = fastelbo.rsample(mu, logvar, K, eps=eps)
        loss = fastelbo.multi_sample_loss(decoder(posterior.z), x, posterior, estimator=name, **options)
        return torch.autograd.grad(loss, [mu, logvar], create_graph=create_graph)

    for a, b in zip(estimate(mu, logvar), estimate(mu, logvar, create_graph=False), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)
    assert torch.autograd.gradcheck(estimate, [mu, logvar])


@every_case
def test_torch_func_gives_per_datum_gradients(case):
    name, options, K = case
    model, (x, eps) = model_of(), draw(K)

    def loss(mu: Tensor, logvar: Tensor, x: Tensor, eps: Tensor) -> Tensor:
        posterior = fastelbo.rsample(mu[None], logvar[None], K, eps=eps[:, None])
        recon = model.decoder(posterior.z)
        return fastelbo.multi_sample_loss(recon, x[None], posterior, estimator=name, **options)

    mu, logvar = (t.detach().requires_grad_() for t in model.encode(x))
    per_datum = torch.func.vmap(torch.func.grad(loss, argnums=(0, 1)), in_dims=(0, 0, 0, 1))(mu, logvar, x, eps)
    posterior = fastelbo.rsample(mu, logvar, K, eps=eps)
    whole = fastelbo.multi_sample_loss(
        model.decoder(posterior.z), x, posterior, estimator=name, reduction="sum", **options
    )
    for a, e in zip(per_datum, torch.autograd.grad(whole, [mu, logvar]), strict=True):
        torch.testing.assert_close(a, e, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    "name, backend",
    [*((name, "aot_eager") for name in ESTIMATORS), pytest.param("dreg", "inductor", marks=pytest.mark.slow)],
)
def test_compiled_step_is_the_eager_one(name, backend):
    model, (x, eps) = model_of(torch.float32), draw(8, torch.float32)

    def step(x: Tensor, eps: Tensor) -> Tensor:
        return model.loss(x, objective=name, num_samples=8, eps=eps, **({"groups": 2} if name == "miwae" else {}))

    parameters = list(model.parameters())
    expected = step(x, eps)
    expected_grads = torch.autograd.grad(expected, parameters)
    torch._dynamo.reset()
    actual = torch.compile(step, fullgraph=True, backend=backend)(x, eps)
    torch.testing.assert_close(actual, expected)
    for a, e in zip(torch.autograd.grad(actual, parameters), expected_grads, strict=True):
        torch.testing.assert_close(a, e)


# ----------------------------------------------------------------------------------------------------------------------
# What the estimators are known for


@pytest.mark.parametrize("seed", range(3))
def test_zero_variance_where_q_is_the_posterior(seed):
    model, x, log_p = linear_gaussian()
    recon, posterior = model(x, 7, seed=seed)
    log_w = fastelbo.gaussian_log_prob(recon, x) + posterior.log_ratio
    torch.testing.assert_close(log_w, log_p.expand(7, B), rtol=0, atol=1e-9)
    largest = {}
    for name in ESTIMATORS:
        options = {"groups": 7} if name == "miwae" else {"alpha": 0.5} if name == "vr" else {}
        recon, posterior = model(x, 7, seed=seed)
        loss = fastelbo.multi_sample_loss(recon, x, posterior, likelihood="gaussian", estimator=name, **options)
        torch.testing.assert_close(loss, -log_p.mean(), rtol=0, atol=1e-9)
        if name != "elbo":  # whose KL is in closed form there
            assert torch.equal(model.loss(x, objective=name, num_samples=7, seed=seed, **options), loss)
        grads = torch.autograd.grad(loss, list(model.encoder.parameters()))
        largest[name] = max(g.abs().max().item() for g in grads)
    assert largest["stl"] < 1e-9 and largest["dreg"] < 1e-9
    assert all(largest[name] > 1e-2 for name in largest if name not in ("stl", "dreg")), largest


def encoder_gradients(name: str, K: int, repeats: int, seed: int = 0) -> Tensor:
    """Gradients [repeats, 2 M] for mu and logvar of one datum, of independent draws; q is a little off."""
    model, x, _ = linear_gaussian()
    mu, logvar = (t[:1].detach() + 0.1 for t in model.encode(x))
    grads = []
    for chunk in range(0, repeats, CHUNK):
        leaves = [t.expand(CHUNK, M).clone().requires_grad_() for t in (mu, logvar)]
        posterior = fastelbo.rsample(*leaves, K, seed=1_000_000 * seed + chunk)
        loss = fastelbo.multi_sample_loss(
            model.decoder(posterior.z),
            x[:1].expand(CHUNK, D),
            posterior,
            likelihood="gaussian",
            estimator=name,
            reduction="sum",
        )
        grads.append(torch.cat(torch.autograd.grad(loss, leaves), 1))
    return torch.cat(grads)


@pytest.mark.parametrize("pair", [("iwae", "dreg"), ("elbo", "stl")])
def test_expectations_are_equal(pair):
    """E[iwae gradient] = E[dreg gradient], as for elbo and stl: a z-test on independent draws."""
    a, b = (encoder_gradients(name, K=5, repeats=100_000, seed=i) for i, name in enumerate(pair))
    z = (a.mean(0) - b.mean(0)) / torch.sqrt((a.var(0) + b.var(0)) / len(a))
    assert z.abs().max() < 4.5, z  # 8 numbers: p = 5e-5
    wrong = encoder_gradients("rws", K=5, repeats=100_000)  # the test sees a difference where there is one
    assert ((a.mean(0) - wrong.mean(0)) / torch.sqrt((a.var(0) + wrong.var(0)) / len(a))).abs().max() > 10


def test_signal_to_noise_ratios():
    """Rainforth et al. 2018: iwae's falls as 1 / sqrt(K). Tucker et al. 2019: dreg's grows as sqrt(K)."""

    def ratio(name: str, K: int) -> float:
        grads = encoder_gradients(name, K, repeats=20_000)
        return (grads.mean(0).norm() / grads.var(0).sum().sqrt()).item()

    for small, large in ((4, 32), (32, 256)):
        assert ratio("dreg", large) > 1.5 * ratio("dreg", small)
        assert ratio("iwae", large) < 0.8 * ratio("iwae", small)


def test_bounds_grow_with_k_toward_log_p():
    """Burda et al. 2016, theorem 1, on a model whose log p(x) is known and whose q is not the posterior."""
    model, x, log_p = linear_gaussian()
    with torch.no_grad():
        model.encoder.bias[M:] += 1.0  # too wide
    means, errors = [], []
    for K in (1, 2, 5, 20, 100):
        bounds = torch.stack([-model.loss(x, objective="iwae", num_samples=K, seed=s).detach() for s in range(400)])
        means.append(bounds.mean().item()), errors.append(bounds.std().item() / math.sqrt(len(bounds)))
    for i in range(4):
        assert means[i] + 3 * errors[i] < means[i + 1] + 3 * errors[i + 1]
        assert means[i] < means[i + 1]
    assert means[-1] < log_p.mean() + 4 * errors[-1] and log_p.mean() - means[-1] < 0.1 < log_p.mean() - means[0]


def test_order_of_the_bounds():
    """On the same samples: elbo <= ciwae <= iwae, elbo <= miwae <= iwae, and vr falls with alpha."""
    model, (x, eps) = model_of(), draw(8)

    def bound(name: str, **options: float) -> Tensor:
        recon, posterior = model(x, 8, eps=eps)
        return -fastelbo.multi_sample_loss(recon, x, posterior, estimator=name, reduction="none", **options)

    elbo, iwae = bound("elbo"), bound("iwae")
    for between in (bound("ciwae"), bound("miwae", groups=2)):
        assert (elbo < between).all() and (between < iwae).all()
    ladder = [bound("vr", alpha=alpha) for alpha in (-3.0, -1.0, 0.0, 0.5, 0.999, 1.0, 2.0)]
    assert all((a > b).all() for a, b in pairwise(ladder))
    torch.testing.assert_close(ladder[2], iwae)
    torch.testing.assert_close(ladder[5], elbo)
    for same in (bound("stl") - elbo, bound("dreg") - iwae, bound("rws") - iwae):
        torch.testing.assert_close(same, torch.zeros(B, dtype=torch.float64))
    torch.testing.assert_close(bound("miwae", groups=8), elbo)
    torch.testing.assert_close(bound("miwae", groups=1), iwae)


@every_reduction
@pytest.mark.parametrize("name", ESTIMATORS)
def test_impossible_samples(name, reduction):
    """Weights of -inf: no NaN where the bound is an average of weights; all -inf is a bound of -inf."""
    mu, logvar, recon = torch.randn(B, M), torch.randn(B, M), torch.randn(8, B, D)
    leaves = [t.requires_grad_() for t in (mu, logvar, recon)]
    x = torch.rand(B, D)
    drawn = fastelbo.rsample(mu, logvar, 8, seed=0)
    impossible = torch.zeros(8, B)
    impossible[:, 1], impossible[:3, 2] = -torch.inf, -torch.inf
    posterior = drawn._replace(log_ratio=drawn.log_ratio + impossible)
    options = {"groups": 2} if name == "miwae" else {}
    loss = fastelbo.multi_sample_loss(recon, x, posterior, estimator=name, reduction="none", **options)
    by_mean = name in ("elbo", "stl", "ciwae")
    assert loss[1] == torch.inf and loss[0].isfinite() and (loss[2] == torch.inf if by_mean else loss[2].isfinite())
    loss = fastelbo.multi_sample_loss(recon, x, posterior, estimator=name, reduction=reduction, **options)
    grads = gradients([loss], leaves, [torch.ones_like(loss)])
    assert all(g.isfinite().all() for g in grads)
    if name not in ("elbo", "stl", "ciwae"):
        assert all((g[1] == 0).all() for g in grads[:2]) and (grads[2][:, 1] == 0).all()


@pytest.mark.parametrize("name", ESTIMATORS)
def test_large_log_weights_with_bfloat16_inputs(name):
    """log w near -7000, where a bfloat16 ulp is 32 nats: bound and weights are those of float64 on the same inputs."""
    torch.manual_seed(0)
    K, d = 8, 10_000
    recon = (torch.randn(1, 2, d) + 0.02 * torch.randn(K, 2, d)).bfloat16()
    x = torch.rand(2, d).bfloat16()
    results = []
    for dtype in (torch.bfloat16, torch.float64):
        leaf = recon.to(dtype).requires_grad_()
        mu, logvar, eps = (torch.zeros(2, 3), torch.zeros(2, 3), torch.randn(K, 2, 3, generator=torch.manual_seed(1)))
        posterior = fastelbo.rsample(mu.to(dtype), logvar.to(dtype), K, eps=eps.bfloat16().to(dtype))
        options = {"groups": 2} if name == "miwae" else {}
        loss = fastelbo.multi_sample_parts(leaf, x.to(dtype), posterior, estimator=name, reduction="sum", **options)
        assert -9000 < loss.log_likelihood.mean() < -6000
        (grad,) = torch.autograd.grad(loss.loss, leaf)
        results.append((loss.loss.double(), grad.double().abs().sum(2)))
    torch.testing.assert_close(results[0][0], results[1][0], rtol=1e-6, atol=0)
    torch.testing.assert_close(results[0][1], results[1][1], rtol=2e-2, atol=1e-3 * results[1][1].max().item())


# ----------------------------------------------------------------------------------------------------------------------
# Arguments


@pytest.mark.parametrize(
    "K, options, message",
    [
        (8, {"estimator": "iwea"}, "estimator must be one of elbo, stl, iwae, dreg, rws, vr, ciwae, miwae; got 'iwea'"),
        (8, {"estimator": "miwae", "groups": 3}, "groups must divide the number of samples K=8; got 3"),
        (8, {"estimator": "miwae", "groups": 0}, "groups must divide the number of samples K=8; got 0"),
        (8, {"estimator": "vr", "alpha": math.inf}, "alpha must be finite; got inf"),
        (8, {"estimator": "ciwae", "beta": 1.5}, r"must be in \[0, 1\]; got 1.5"),
        (1, {"estimator": "rws"}, r"'rws' needs at least 2 samples"),
        (None, {}, r"posterior must hold K samples, log_ratio \[K, B\].*got log_ratio \(3,\)"),
    ],
)
def test_arguments_that_do_not_fit(K, options, message):
    mu = torch.randn(B, M)
    posterior = fastelbo.rsample(mu, mu, K, seed=0)
    recon = torch.randn(K or 1, B, D)
    with pytest.raises(ValueError, match=message):
        fastelbo.multi_sample_loss(recon, torch.rand(B, D), posterior, **options)


@pytest.mark.parametrize("name", GATED)
def test_what_the_gated_estimators_cannot_do_raises(name):
    mu, x = torch.randn(B, M), torch.rand(B, D)
    posterior = fastelbo.rsample(mu, mu, 8, seed=0)
    with pytest.raises(ValueError, match="posterior must be what rsample returned"):
        fastelbo.multi_sample_loss(torch.randn(8, B, D), x, fastelbo.Posterior(*posterior), estimator=name)

    def loss(mu: Tensor) -> Tensor:
        drawn = fastelbo.rsample(mu, mu, 8, seed=0)
        return fastelbo.multi_sample_loss(drawn.z.repeat(1, 1, 3)[..., :D], x, drawn, estimator=name)

    with pytest.raises(NotImplementedError, match=r"no forward-mode derivative.*take 'iwae' or 'elbo'"):
        torch.func.jvp(loss, (mu,), (mu,))


def test_one_posterior_serves_several_losses():
    """Backward by backward, each estimator steers its own gradient only."""
    model, (x, eps) = model_of(), draw(8)
    recon, posterior = model(x, 8, eps=eps)
    losses = {n: fastelbo.multi_sample_loss(recon, x, posterior, estimator=n) for n in ("dreg", "iwae", "rws")}
    for name, loss in losses.items():
        together = torch.autograd.grad(loss, list(model.parameters()), retain_graph=True)
        alone = by_fastelbo((name, {}, 8), model, x, eps, "mean", torch.ones(()))[1:]
        for a, e in zip(together, alone, strict=True):
            torch.testing.assert_close(a, e)
