"""Every function without data, under autocast, and where no gradient is recorded; a Posterior where functions are
transformed or traced."""

import pytest
import torch
from contracts import FUNCTIONS
from oracle import tensors_of
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import grad, vmap

import fastelbo
from fastelbo import Posterior


@pytest.mark.parametrize("fake", [False, True], ids=["meta", "fake"])
def test_shapes_and_dtypes_without_data(fake):
    """Meta and fake tensors give what real ones give, in every dtype."""
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        for name, function in FUNCTIONS.items():
            inputs = [t.to(dtype) for t in function.make(4, 5)]
            real = tensors_of(function.call(*inputs))
            if fake:
                with FakeTensorMode() as mode:
                    empty = tensors_of(function.call(*(mode.from_tensor(t) for t in inputs)))
            else:
                empty = tensors_of(function.call(*(t.to("meta") for t in inputs)))
            for r, e in zip(real, empty, strict=True):
                assert (r.shape, r.dtype, r.stride()) == (e.shape, e.dtype, e.stride()), (name, dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_leaves_the_losses_alone(dtype):
    """Half inputs are taken as they are, float32 comes out; float32 inputs are not rounded."""
    for name in FUNCTIONS:
        for given in (dtype, torch.float32):
            inputs = [t.to(given).requires_grad_() for t in FUNCTIONS[name].make(4, 5)]
            expected = tensors_of(FUNCTIONS[name].call(*inputs))
            with torch.autocast("cpu", dtype=dtype):
                actual = tensors_of(FUNCTIONS[name].call(*inputs))
            assert all(torch.equal(a, e) and a.dtype == e.dtype for a, e in zip(actual, expected, strict=True)), name


def test_no_grad_and_inference_mode_give_the_same_values():
    for name, function in FUNCTIONS.items():
        inputs = [t.requires_grad_() for t in function.make(4, 5)]
        expected = tensors_of(function.call(*inputs))
        for mode in (torch.no_grad, torch.inference_mode):
            with mode():
                actual = tensors_of(function.call(*inputs))
            assert all(torch.equal(a, e) and not a.requires_grad for a, e in zip(actual, expected, strict=True)), name


# ----------------------------------------------------------------------------------------------------------------------
# rsample and its Posterior under torch.func and torch.jit.

B, M, K, GROUPS = 3, 4, 5, 6
CASES = ["one", "samples", "batch_dims"]


def options_of(case: str) -> tuple[tuple[int, ...], tuple[int, ...], dict[str, int]]:
    """The shapes of mu and of eps, and the options of rsample."""
    return {
        "one": ((B, M), (B, M), {}),
        "samples": ((B, M), (K, B, M), {"num_samples": K}),
        "batch_dims": ((K, B, M), (K, B, M), {"batch_dims": 2}),
    }[case]


def drawn(case: str, mu: Tensor, logvar: Tensor, prior_mu: Tensor, **noise: Tensor) -> Posterior:
    return fastelbo.rsample(mu, logvar, prior_mu=prior_mu, prior_logvar=0.1 * prior_mu, **noise, **options_of(case)[2])


def flat(posterior: Posterior) -> list[Tensor]:
    return [*posterior[:6], *posterior.prior]


def assert_same(actual: Posterior, expected: Posterior) -> None:
    assert type(actual) is Posterior
    torch.testing.assert_close(flat(actual), flat(expected), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.usefixtures("double")
def test_vmap_over_a_draw(case):
    """With and without noise of one's own; the prior may be shared."""
    shape, noise, _ = options_of(case)
    mu, logvar, eps = torch.randn(GROUPS, *shape), torch.randn(GROUPS, *shape), torch.randn(GROUPS, *noise)
    prior = torch.randn(M)
    found = vmap(lambda mu, logvar, eps: drawn(case, mu, logvar, prior, eps=eps))(mu, logvar, eps)
    for i in range(GROUPS):
        one = Posterior(*(t[i] for t in found[:6]), tuple(t[i] for t in found.prior))
        assert_same(one, drawn(case, mu[i], logvar[i], prior, eps=eps[i]))


@pytest.mark.parametrize("case", CASES)
@pytest.mark.usefixtures("double")
def test_vmap_over_draws_from_a_seed(case):
    """Every seed has its own noise; torch's generator is asked as vmap's `randomness` says."""
    mu, logvar, prior = torch.randn(options_of(case)[0]), torch.randn(options_of(case)[0]), torch.zeros(M)
    seeds = torch.arange(GROUPS)[:, None]
    found = vmap(lambda seed: drawn(case, mu, logvar, prior, seed=seed))(seeds)
    with fastelbo.reference_mode():
        for i in range(GROUPS):
            one = Posterior(*(t[i] for t in found[:6]), tuple(t[i] for t in found.prior))
            assert_same(one, drawn(case, mu, logvar, prior, seed=seeds[i]))
    for randomness, equal in (("different", False), ("same", True)):
        torch.manual_seed(1)
        z = vmap(lambda mu: drawn(case, mu, logvar, prior).z, randomness=randomness)(mu.expand(GROUPS, *mu.shape))
        assert torch.equal(z[0], z[1]) == equal
        assert z.unique().numel() == mu.numel() * (K if case == "samples" else 1) * (1 if equal else GROUPS)
    with pytest.raises(RuntimeError, match="randomness"):
        vmap(lambda mu: drawn(case, mu, logvar, prior).z)(mu.expand(GROUPS, *mu.shape))


@pytest.mark.parametrize("estimator", ["iwae", "dreg", "rws"])
@pytest.mark.usefixtures("double")
def test_a_posterior_beside_a_gradient(estimator):
    """torch.func.grad with has_aux: the Posterior comes out as it went in, and the gradient is autograd's."""
    mu, logvar, prior = (torch.randn(B, M, requires_grad=True) for _ in range(3))
    x, eps = torch.rand(B, M), torch.randn(K, B, M)

    def loss(mu: Tensor, logvar: Tensor, prior: Tensor) -> tuple[Tensor, Posterior]:
        posterior = drawn("samples", mu, logvar, prior, eps=eps)
        return fastelbo.multi_sample_loss(posterior.z, x, posterior, estimator=estimator), posterior

    value, expected = loss(mu, logvar, prior)
    grads, posterior = grad(loss, argnums=(0, 1, 2), has_aux=True)(mu, logvar, prior)
    assert_same(posterior, expected)
    torch.testing.assert_close(grads, torch.autograd.grad(value, (mu, logvar, prior)), rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.filterwarnings("ignore")  # of torch.jit, which is old
@pytest.mark.usefixtures("double")
def test_a_trace_that_returns_a_posterior(case):
    """What is traced returns it with an empty prior or a pair, and is right for other inputs and a seed that is one."""
    shape, noise, options = options_of(case)

    def inputs() -> tuple[Tensor, ...]:
        return torch.randn(shape), torch.randn(shape), torch.randn(M), torch.randn(noise), torch.randint(9, (1,))

    def standard(mu: Tensor, logvar: Tensor, prior: Tensor, eps: Tensor, seed: Tensor) -> Posterior:
        return fastelbo.rsample(mu, logvar, eps=eps, **options)

    def by_eps(mu: Tensor, logvar: Tensor, prior: Tensor, eps: Tensor, seed: Tensor) -> Posterior:
        return drawn(case, mu, logvar, prior, eps=eps)

    def by_seed(mu: Tensor, logvar: Tensor, prior: Tensor, eps: Tensor, seed: Tensor) -> Posterior:
        return drawn(case, mu, logvar, prior, seed=seed)

    for function in (standard, by_eps, by_seed):
        traced = torch.jit.trace(function, inputs())
        given = inputs()
        found, expected = traced(*given), function(*given)
        torch.testing.assert_close(list(tensors_in(found)), flat(expected), rtol=1e-12, atol=1e-12)


def tensors_in(value: object) -> list[Tensor]:
    return [value] if isinstance(value, Tensor) else [t for v in value for t in tensors_in(v)]
