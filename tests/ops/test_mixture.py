"""Mixtures of diagonal Gaussians: against torch's distributions, scikit-learn and 50 digits; weights, edges, memory."""

import math
from itertools import product

import mpmath
import pytest
import torch
import torch.distributions as td
from oracle import DTYPES, HALF_TYPES, check, gradients, peak, upstream_for
from sklearn.mixture import GaussianMixture
from torch import Tensor

import fastelbo

N, C, M = 9, 5, 4
every_way = pytest.mark.parametrize("per_dimension", [False, True], ids=["joint", "per dimension"])


def mixture(n=(N,), c: int = C, m: int = M, weights=None, dtype: torch.dtype = torch.float64) -> list[Tensor | None]:
    """z, mu, logvar and the log weights of this shape, which need gradients."""
    n = n if isinstance(n, tuple) else (n,)
    drawn = [torch.randn(*n, m), torch.randn(c, m), 0.7 * torch.randn(c, m)]
    drawn += [] if weights is None else [torch.randn(weights)]
    found = [t.to(dtype).requires_grad_() for t in drawn]
    return [*found, None] if weights is None else found


def call(per_dimension: bool):
    return lambda *given: fastelbo.mixture_log_prob(*given, per_dimension=per_dimension)


def of_torch(z: Tensor, mu: Tensor, logvar: Tensor, log_weights: Tensor, per_dimension: bool) -> Tensor:
    """By torch.distributions; it normalizes the weights, which ours are not."""
    total = torch.logsumexp(log_weights, -1)
    components = td.Normal(mu, torch.exp(0.5 * logvar))
    if per_dimension:
        choice = td.Categorical(logits=log_weights.unsqueeze(-2))
        components = td.Normal(mu.mT, torch.exp(0.5 * logvar).mT)
        return td.MixtureSameFamily(choice, components).log_prob(z) + total.unsqueeze(-1)
    choice = td.Categorical(logits=log_weights)
    return td.MixtureSameFamily(choice, td.Independent(components, 1)).log_prob(z) + total


@every_way
@pytest.mark.parametrize(
    "weights", [None, (C,), (N, C), (1, C), (N, 1), (1, 1), (3, 1, C), (3, N, C), (3, 1, 1), (1, N, C)], ids=str
)
@pytest.mark.usefixtures("double")
def test_values_and_gradients_are_those_of_torch_distributions(weights, per_dimension):
    z, mu, logvar, log_weights = inputs = mixture((3, N), weights=weights)
    found = fastelbo.mixture_log_prob(*inputs, per_dimension=per_dimension)
    whole = torch.full((C,), -math.log(C)) if log_weights is None else log_weights
    expected = of_torch(z, mu, logvar, whole.expand(*whole.shape[:-1], C), per_dimension)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    upstream, leaves = upstream_for([found]), [t for t in inputs if t is not None]
    ours, theirs = (gradients([o], leaves, upstream) for o in (found, expected))
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


@pytest.mark.usefixtures("double")
def test_scores_of_scikit_learn():
    x = torch.randn(200, M) + 3 * torch.randint(0, 2, (200, 1))
    fitted = GaussianMixture(3, covariance_type="diag", random_state=0).fit(x.numpy())
    means, variances, weights = map(torch.from_numpy, (fitted.means_, fitted.covariances_, fitted.weights_))
    found = fastelbo.mixture_log_prob(x, means, variances.log(), weights.log())
    torch.testing.assert_close(found, torch.from_numpy(fitted.score_samples(x.numpy())), rtol=1e-12, atol=1e-12)


def of_mpmath(z: Tensor, mu: Tensor, logvar: Tensor, log_weights: Tensor) -> list[list[float]]:
    """log p [N], and its gradients by z [N, M], by mu, logvar [C, M] and log_weights [C] of the sum of log p."""
    with mpmath.workdps(50):
        z, mu, lv, w = (mpmath.matrix(t.detach().tolist()) for t in (z, mu, logvar, log_weights))
        n, c, m = z.rows, mu.rows, z.cols
        log_p, by_z = [], mpmath.matrix(n, m)
        by_mu, by_lv, by_w = mpmath.matrix(c, m), mpmath.matrix(c, m), mpmath.matrix(c, 1)
        for i in range(n):
            terms = []
            for k in range(c):
                squares = [(z[i, j] - mu[k, j]) ** 2 * mpmath.exp(-lv[k, j]) + lv[k, j] for j in range(m)]
                terms.append(w[k] - (mpmath.fsum(squares) + m * mpmath.log(2 * mpmath.pi)) / 2)
            top = max(terms)
            total = top + mpmath.log(mpmath.fsum(mpmath.exp(t - top) for t in terms))
            log_p.append(total)
            for k in range(c):
                share = mpmath.exp(terms[k] - total)
                by_w[k] += share
                for j in range(m):
                    pull = (z[i, j] - mu[k, j]) * mpmath.exp(-lv[k, j])
                    by_z[i, j] -= share * pull
                    by_mu[k, j] += share * pull
                    by_lv[k, j] += share * ((z[i, j] - mu[k, j]) * pull - 1) / 2
        return [[float(v) for v in values] for values in (log_p, by_z, by_mu, by_lv, by_w)]


@pytest.mark.parametrize("scale", [1e-6, 1e-3, 1.0, 1e3, 1e6])
@pytest.mark.parametrize("distance", [0.0, 1.0, 1e4])
@pytest.mark.usefixtures("double")
def test_against_fifty_digits(scale, distance):
    """Means beside an offset that is large against the scale, where squares of sums would cancel."""
    mu = 1 + scale * torch.randn(3, M)
    z = mu[[0, 1, 2, 1]] + scale * (torch.randn(4, M) + distance)
    logvar = 2 * math.log(scale) + 0.5 * torch.randn(3, M)
    inputs = [t.requires_grad_() for t in (z, mu, logvar, torch.randn(3))]
    found = fastelbo.mixture_log_prob(*inputs)
    ours = [found, *torch.autograd.grad(found.sum(), inputs)]
    # a rounding of the largest term moves a responsibility by as much
    rtol = 1e-12 if distance < 10 else 1e-15 * found.abs().max().item()
    for a, e in zip(ours, of_mpmath(*inputs), strict=True):
        exact = torch.tensor(e).view(a.shape)
        torch.testing.assert_close(a, exact, rtol=rtol, atol=rtol * exact.abs().max().item())


@every_way
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e6])
def test_far_points_are_finite(dtype, scale, per_dimension):
    z, mu, logvar, _ = mixture(dtype=dtype)
    z = ((z.detach() + 1e4) * scale).requires_grad_()
    mu = (mu.detach() * scale).requires_grad_()
    logvar = (logvar.detach() + 2 * math.log(scale)).requires_grad_()
    found = fastelbo.mixture_log_prob(z, mu, logvar, per_dimension=per_dimension)
    assert (found < -1e6).all() and found.isfinite().all()
    assert all(g.isfinite().all() for g in torch.autograd.grad(found.sum(), (z, mu, logvar)))


@every_way
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_shapes(dtype, per_dimension):
    """Tails of vectors, of tiles of components, of blocks of rows and of dimensions, and more of each than one."""
    few = [(1, 1, 1), (2, 1, 3), (1, 33, 1), (17, 3, 5), (63, 32, 2), (65, 31, 7), (129, 2, 17), (30, 70, 41)]
    for n, c, m in few + ([(1030, 5, 3)] if dtype == torch.float32 else []):
        for weights in ((c,), (n, c)):
            inputs = mixture(n, c, m, weights, dtype)
            check(call(per_dimension), *inputs, label=f"N={n} C={c} M={m}")


@every_way
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("weights", [(6,), (7, 6), (3, 1, 6), (2, 1, 7, 6), (2, 3, 1, 6), (2, 3, 7, 6), (1, 3, 1, 1)])
def test_weights_that_broadcast_and_strides(weights, dtype, per_dimension):
    z, mu, logvar, log_weights = mixture((2, 3, 7), 6, 4, weights, dtype)
    check(call(per_dimension), z, mu, logvar, log_weights, label="as it is")
    # laid out backwards, one component after the other, every second number
    for lay in (lambda t: t.mT.contiguous().mT, lambda t: t.repeat_interleave(2, -1)[..., ::2]):
        laid = [lay(t.detach()).requires_grad_() if t.dim() > 1 else t for t in (z, mu, logvar, log_weights)]
        check(call(per_dimension), *laid, label="laid out otherwise")
    whole = log_weights.detach().expand(2, 3, 7, 6).requires_grad_()
    check(call(per_dimension), z, mu, logvar, whole, label="expanded")


def test_one_component_is_a_gaussian():
    z, mu, logvar, _ = mixture(c=1)
    expected = td.Normal(mu, torch.exp(0.5 * logvar)).log_prob(z)
    torch.testing.assert_close(fastelbo.mixture_log_prob(z, mu, logvar), expected.sum(-1), rtol=1e-12, atol=1e-12)
    found = fastelbo.mixture_log_prob(z, mu, logvar, per_dimension=True)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


@every_way
@pytest.mark.parametrize("lead", [(0,), (3, 0), (0, 3), ()], ids=str)
def test_no_points_and_a_single_one(lead, per_dimension):
    for weights in (None, (C,), (*lead, C)):
        inputs = mixture(lead, weights=weights)
        found = fastelbo.mixture_log_prob(*inputs, per_dimension=per_dimension)
        assert found.shape == (*lead, M) if per_dimension else found.shape == lead
        for t, g in zip([t for t in inputs if t is not None], gradients([found], inputs, [found]), strict=True):
            assert g.shape == t.shape and (math.prod(lead) or not g.count_nonzero())


@every_way
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("of_rows", [False, True])
def test_weights_of_zero(of_rows, dtype, per_dimension):
    """A component without weight is none: exact zeros, and for the others what they are without it."""
    z, mu, logvar, log_weights = mixture(weights=(N, C) if of_rows else (C,), dtype=dtype)
    with torch.no_grad():
        log_weights[..., [1, 3]] = -math.inf
        mu[1] = 1e4  # as far as may be
    others = [0, 2, 4]
    found = fastelbo.mixture_log_prob(z, mu, logvar, log_weights, per_dimension=per_dimension)
    left = [t.detach().clone().requires_grad_() for t in (z, mu[others], logvar[others], log_weights[..., others])]
    expected = fastelbo.mixture_log_prob(*left, per_dimension=per_dimension)
    assert torch.equal(found, expected)
    _, by_mu, by_logvar, by_weights = gradients([found], [z, mu, logvar, log_weights], upstream_for([found]))
    assert (by_mu[[1, 3]] == 0).all() and (by_logvar[[1, 3]] == 0).all() and (by_weights[..., [1, 3]] == 0).all()
    check(call(per_dimension), z, mu, logvar, log_weights)


@every_way
@pytest.mark.parametrize("of_rows", [False, True])
@pytest.mark.parametrize("shape", [(C,), (N, C), (N, 1)], ids=str)
def test_all_but_one_and_all_weights_are_zero(shape, of_rows, per_dimension):
    *_, log_weights = inputs = mixture(weights=shape)
    with torch.no_grad():
        if of_rows and len(shape) == 2:
            log_weights[2] = -math.inf
        else:
            log_weights[...] = -math.inf
    found = fastelbo.mixture_log_prob(*inputs, per_dimension=per_dimension)
    dead = torch.zeros(N, dtype=torch.bool)
    dead[2 if of_rows and len(shape) == 2 else slice(None)] = True
    assert (found[dead] == -math.inf).all() and found[~dead].isfinite().all()
    grads = torch.autograd.grad(found.sum(), inputs)
    assert all(g.isfinite().all() for g in grads)
    assert (grads[0][dead] == 0).all() and (grads[0][~dead] != 0).all()
    check(call(per_dimension), *inputs)
    with torch.no_grad():
        log_weights[...] = -math.inf
        log_weights[..., -1] = 0.3
    check(call(per_dimension), *inputs)


@every_way
def test_nan_stays_in_its_row(per_dimension):
    z, *_ = inputs = mixture(weights=(C,))
    with torch.no_grad():
        z[3, 1] = math.nan
    found = fastelbo.mixture_log_prob(*inputs, per_dimension=per_dimension)
    row = torch.arange(N) == 3
    assert found[3].isnan().any() and found[~row].isfinite().all()
    if per_dimension:
        assert found[3].isnan().tolist() == [False, True, False, False]
    (grad,) = torch.autograd.grad(found.sum(), z)
    assert grad[~row].isfinite().all() and grad[3].isnan().any()
    check(call(per_dimension), *inputs)


def test_points_at_infinity_pass_nothing_on():
    z, mu, logvar, _ = mixture()
    with torch.no_grad():
        z[2] = math.inf
    found = fastelbo.mixture_log_prob(z, mu, logvar)
    assert found[2] == -math.inf
    assert all(g.isfinite().all() for g in torch.autograd.grad(found.sum(), (z, mu, logvar)))


@every_way
def test_scales_beyond_the_range(per_dimension):
    """Of a variance whose inverse overflows, and a difference of 0."""
    z, mu, logvar, _ = mixture(dtype=torch.float32)
    with torch.no_grad():
        logvar[0] = -200
        z[0] = mu[0]
    found = fastelbo.mixture_log_prob(z, mu, logvar, per_dimension=per_dimension)
    exact = fastelbo.mixture_log_prob(*(t.double() for t in (z, mu, logvar)), per_dimension=per_dimension)
    torch.testing.assert_close(found.double(), exact, rtol=1e-6, atol=1e-6)
    assert found[0].min() > 10


@pytest.mark.parametrize("dtype", HALF_TYPES, ids=str)
@every_way
def test_half_types_compute_in_float32(dtype, per_dimension):
    inputs = mixture(weights=(N, C), dtype=dtype)
    found = fastelbo.mixture_log_prob(*inputs, per_dimension=per_dimension)
    wide = [t.detach().float().requires_grad_() for t in inputs]
    expected = fastelbo.mixture_log_prob(*wide, per_dimension=per_dimension)
    assert torch.equal(found, expected)
    up = upstream_for([found])
    for a, e in zip(gradients([found], inputs, up), gradients([expected], wide, up), strict=True):
        assert a.dtype == dtype and torch.equal(a, e.to(dtype))
    mixed = [inputs[0], *wide[1:]]
    found = fastelbo.mixture_log_prob(*mixed, per_dimension=per_dimension)
    assert [g.dtype for g in gradients([found], mixed, up)] == [dtype, *[torch.float32] * 3]


@every_way
@pytest.mark.parametrize("weights", [(200,), (300, 200), (3, 1, 200), (100, 200)], ids=str)
def test_every_subset_of_gradients_has_the_same_bits(weights, per_dimension):
    """In one pass over the pairs or in two, and with as many threads as there are."""
    lead = (3, 100) if weights[0] in (3, 100) else (300,)
    inputs = mixture(lead, 200, 6, weights, torch.float32)
    upstream = None
    whole: list[Tensor] = []
    for threads in (1, 2, 3, 8):
        torch.set_num_threads(threads)
        for wanted in product([True, False], repeat=4):
            if not any(wanted):
                continue
            leaves = [t.detach().requires_grad_(w) for t, w in zip(inputs, wanted, strict=True)]
            found = fastelbo.mixture_log_prob(*leaves, per_dimension=per_dimension)
            upstream = upstream or upstream_for([found])
            grads = iter(gradients([found], leaves, upstream))
            given = [found, *(next(grads) if w else None for w in wanted)]
            whole = whole or given
            for i, (a, e) in enumerate(zip(given, whole, strict=True)):
                assert a is None or torch.equal(a, e), f"{i} of {wanted} with {threads} threads"


@pytest.mark.parametrize("n, c, m, limit", [(20_000, 20_000, 10, 8e6), (200_000, 20, 10, 2e6)])
def test_memory_is_that_of_rows_and_components(n, c, m, limit):
    torch.set_num_threads(2)
    inputs = mixture(n, c, m, (c,), torch.float32)
    up = torch.randn(n)
    own = 4 * (sum(t.numel() for t in inputs) + n)  # the gradients and the result

    def step() -> None:
        torch.autograd.grad(fastelbo.mixture_log_prob(*inputs), inputs, up)

    assert peak(step) - own < limit


def test_memory_holds_no_array_of_all_pairs_where_weights_broadcast():
    """Of [K, 1, C] and of expanded ones, half types too, and their gradient."""
    torch.set_num_threads(2)
    for dtype, shape in product((torch.float32, torch.bfloat16), ((4, 1, 3000), (500, 3000), (4, 500, 1))):
        z, mu, logvar, log_weights = inputs = mixture((4, 500), 3000, 2, shape, dtype)
        held = peak(lambda i=inputs: torch.autograd.grad(fastelbo.mixture_log_prob(*i).sum(), i))
        assert held < 4 * 4 * 500 * 3000 if shape[0] == 4 else held < 3 * 8 * 500 * 3000
        expanded = log_weights.detach().expand(4, 500, 3000)
        assert peak(lambda: fastelbo.mixture_log_prob(z, mu, logvar, expanded)) < 4 * 4 * 500 * 3000  # noqa: B023
