"""The noise: Philox against its published vectors, and the statistics of what comes out, with fixed seeds.

A bound of SIGMAS standard deviations of the estimator is crossed by chance once in 15 000 tests.
"""

import math

import pytest
import scipy.stats
import torch
from torch import Tensor

import fastelbo
from fastelbo import reference

SIGMAS = 4.0
SEEDS = [0, 1, 20_000, -(2**40) + 7]


def noise(seed: int, *shape: int, first_sample: int = 0) -> Tensor:
    """[K, B, M] standard normal numbers, in float64."""
    zero = torch.zeros(shape[1:])
    return fastelbo.rsample(zero, zero, shape[0], seed=seed, first_sample=first_sample).z.double()


def correlation(a: Tensor, b: Tensor) -> float:
    """In standard deviations of the estimator, which is 1 / sqrt(n) for independent numbers."""
    return torch.corrcoef(torch.stack([a.flatten(), b.flatten()]))[0, 1].item() * math.sqrt(a.numel())


def assert_independent(a: Tensor, b: Tensor) -> None:
    """Neither the numbers nor their squares are correlated: the two of a Box-Muller pair share their radius."""
    assert abs(correlation(a, b)) < SIGMAS
    assert abs(correlation(a.square(), b.square())) < SIGMAS
    assert abs(correlation(a, b.square())) < SIGMAS


# ----------------------------------------------------------------------------------------------------------------------
# Philox


def philox(counter: list[int], key: list[int]) -> list[int]:
    """Philox 4x32-10 as in Salmon et al. 2011, in Python integers, with all of its counter."""
    (c0, c1, c2, c3), (k0, k1), low = counter, key, 0xFFFFFFFF
    for _ in range(10):
        p0, p1 = 0xD2511F53 * c0, 0xCD9E8D57 * c2
        c0, c1, c2, c3 = p1 >> 32 ^ c1 ^ k0, p1 & low, p0 >> 32 ^ c3 ^ k1, p0 & low
        k0, k1 = k0 + 0x9E3779B9 & low, k1 + 0xBB67AE85 & low
    return [c0, c1, c2, c3]


@pytest.mark.parametrize(
    ("counter", "key", "words"),
    [
        ([0] * 4, [0] * 2, [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
        ([0xFFFFFFFF] * 4, [0xFFFFFFFF] * 2, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
        (
            [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
            [0xA4093822, 0x299F31D0],
            [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
        ),
    ],
)
def test_philox_here_gives_the_published_vectors(counter, key, words):
    """The known answers of Random123 (kat_vectors, philox4x32 10)."""
    assert philox(counter, key) == words


@pytest.mark.parametrize("seed", [0, -1, 0x0123456789ABCDEF, -(2**63)])
@pytest.mark.parametrize("counter", [0, 1, 2**32 - 1, 2**32, 0x123456789ABCDEF])
def test_philox_of_the_reference(seed, counter):
    """64 bits of counter and key; the other half of the counter is 0."""
    key = [seed & 0xFFFFFFFF, seed >> 32 & 0xFFFFFFFF]
    expected = philox([counter & 0xFFFFFFFF, counter >> 32, 0, 0], key)
    assert reference.philox(torch.tensor([seed]), torch.tensor([counter]))[0].tolist() == expected


def test_a_number_by_hand():
    """Element e is number e mod 4 of counter e // 4: r cos t, r sin t of the words (a, b), then of (c, d)."""
    seed, first = 77, 1001
    values = noise(seed, 1, 1, 8, first_sample=first).flatten().tolist()
    for e, value in enumerate(values, start=8 * first):
        words = philox([e // 4, 0, 0, 0], [seed, 0])
        a, b = words[:2] if e % 4 < 2 else words[2:]
        r, t = math.sqrt(-2 * math.log((a + 0.5) * 2.0**-32)), 2 * math.pi * b * 2.0**-32
        assert value == pytest.approx(r * (math.sin(t) if e % 2 else math.cos(t)), abs=1e-6)


# ----------------------------------------------------------------------------------------------------------------------
# Statistics


@pytest.mark.parametrize("seed", SEEDS)
def test_moments(seed):
    z = noise(seed, 10, 100, 1000)
    n = z.numel()
    # mean, variance of z^p for p = 1..4
    for power, mean, variance in ((1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96)):
        assert abs(z.pow(power).mean().item() - mean) < SIGMAS * math.sqrt(variance / n), f"moment {power}"


@pytest.mark.parametrize("seed", SEEDS)
def test_kolmogorov_smirnov(seed):
    z = noise(seed, 4, 50, 1000)
    assert scipy.stats.kstest(z.flatten().numpy(), "norm").pvalue > 1e-3
    for lane in range(4):
        assert scipy.stats.kstest(z.flatten()[lane::4].numpy(), "norm").pvalue > 1e-3


def test_tails():
    """As many numbers beyond 3, 4 and 4.7 as there should be, and none beyond what 32 bits can give."""
    z = noise(3, 40, 100, 1000)
    for bound in (3.0, 4.0, 4.7):
        for side in (z > bound, z < -bound):
            expected = z.numel() * scipy.stats.norm.sf(bound)
            assert abs(side.sum().item() - expected) < SIGMAS * math.sqrt(expected), bound
    assert z.abs().max() < math.sqrt(66 * math.log(2)) + 1e-6


@pytest.mark.parametrize("seed", SEEDS)
def test_lanes_are_independent(seed):
    lanes = noise(seed, 1, 400, 1000).reshape(-1, 4).T
    for i in range(4):
        for j in range(i):
            assert_independent(lanes[i], lanes[j])


@pytest.mark.parametrize("seed", SEEDS)
def test_neighbours_are_independent(seed):
    z = noise(seed, 8, 50, 501)
    for lag in (1, 2, 3, 4, 8, 501):
        assert_independent(z.flatten()[lag:], z.flatten()[:-lag])
    for k in range(1, 8):
        assert_independent(z[k], z[0])
    assert_independent(z[:, 1:], z[:, :-1])


@pytest.mark.parametrize("other", [1, 2, 3, 4, 2**16, 2**32, 2**33, -1])
def test_seeds_are_independent(other):
    for seed in (0, 12345):
        a, b = noise(seed, 2, 100, 501), noise(seed + other, 2, 100, 501)
        assert_independent(a, b)
        assert_independent(a.flatten()[1:], b.flatten()[:-1])
        assert_independent(a.flatten()[4:], b.flatten()[:-4])


def test_signs_of_a_counter_are_all_there():
    """The 16 sign patterns of the four numbers of a counter are equally frequent."""
    signs = (noise(6, 1, 400, 1000).reshape(-1, 4) > 0).long() @ torch.tensor([1, 2, 4, 8])
    assert scipy.stats.chisquare(torch.bincount(signs, minlength=16).numpy()).pvalue > 1e-3


# ----------------------------------------------------------------------------------------------------------------------
# Where seeds come from


def draw(**options) -> Tensor:
    mu = torch.zeros(4, 5)
    return fastelbo.rsample(mu, mu, 3, **options).z


def test_manual_seed_reproduces_and_calls_differ():
    torch.manual_seed(1)
    first, second = draw(), draw()
    assert not torch.equal(first, second)
    torch.manual_seed(1)
    assert torch.equal(draw(), first) and torch.equal(draw(), second)


def test_generator_is_used_and_advances():
    generator = torch.Generator().manual_seed(5)
    state = torch.get_rng_state()
    first, second = draw(generator=generator), draw(generator=generator)
    assert torch.equal(torch.get_rng_state(), state), "the default generator was touched"
    assert not torch.equal(first, second)
    assert torch.equal(draw(generator=torch.Generator().manual_seed(5)), first)


def test_calls_of_one_compiled_graph_differ():
    """Two identical calls in one graph are two draws, and so are two runs of the graph; manual_seed reproduces them."""

    def two(mu):
        return fastelbo.rsample(mu, mu, 2).z, fastelbo.rsample(mu, mu, 2).z

    compiled = torch.compile(two, fullgraph=True)
    mu = torch.zeros(4, 5)
    torch.manual_seed(3)
    a, b = compiled(mu)
    c, d = compiled(mu)
    draws = [a, b, c, d]
    assert all(not torch.equal(draws[i], draws[j]) for i in range(4) for j in range(i))
    torch.manual_seed(3)
    again = [*compiled(mu), *compiled(mu)]
    assert all(torch.equal(x, y) for x, y in zip(again, draws, strict=True))


@pytest.mark.parametrize("samples, first", [(None, 0), (3, 0), (3, 5)])
def test_every_path_draws_the_kernel_s_noise(samples, first):
    """Under torch.func and with a graph of the gradient, float64 agrees to its own rounding."""
    mu, logvar = torch.randn(2, 3, 5, dtype=torch.float64).requires_grad_().unbind()

    def f(mu, logvar):
        drawn = fastelbo.rsample(mu, logvar, samples, seed=7, first_sample=first)
        return drawn.z.sin().sum() + drawn.log_ratio.square().sum()

    expected = torch.autograd.grad(f(mu, logvar), (mu, logvar))
    graphs = torch.autograd.grad(f(mu, logvar), (mu, logvar), create_graph=True)
    functional = torch.func.grad(f, (0, 1))(mu.detach(), logvar.detach())
    with fastelbo.reference_mode():
        twin = torch.autograd.grad(f(mu, logvar), (mu, logvar))
    for found in (graphs, functional, twin):
        for a, e in zip(found, expected, strict=True):
            torch.testing.assert_close(a, e, rtol=1e-12, atol=1e-12)


# ----------------------------------------------------------------------------------------------------------------------
# A compiled backward has the noise of its forward, whatever the partitioner computes again

RECOMPUTED = [{"activation_memory_budget": 0.3}, {"activation_memory_budget": 0.7}, {"aggressive_recomputation": True}]


def _by_rsample(mu, logvar):
    z = fastelbo.rsample(mu, logvar, 3).z
    return z.sin().sum(), z


def _by_a_distribution(mu, logvar):
    z = fastelbo.distributions.Gaussian(mu, logvar).rsample((3,))
    return z.sin().sum(), z


@pytest.mark.slow
@pytest.mark.parametrize("draw", [_by_rsample, _by_a_distribution])
@pytest.mark.parametrize(
    ("backend", "config"), [*(("aot_eager", c) for c in RECOMPUTED), ("inductor", RECOMPUTED[0])], ids=str
)
def test_recomputed_gradients_have_the_noise_of_the_forward(backend, draw, config):
    """d sin(z) / d logvar = cos(z) (z - mu) / 2; a second call draws anew, without a graph too."""
    torch._dynamo.reset()
    mu, logvar = (torch.randn(8, 5).requires_grad_() for _ in range(2))
    with torch._functorch.config.patch(**config):
        compiled = torch.compile(draw, backend=backend)
        loss, z = compiled(mu, logvar)
        (found,) = torch.autograd.grad(loss, logvar)
        again = compiled(mu, logvar)[1]
        with torch.no_grad():
            others = [compiled(mu, logvar)[1] for _ in range(2)]
    z = z.detach()
    torch.testing.assert_close(found, (z.cos() * (z - mu.detach()) / 2).sum(0))
    draws = [z, again.detach(), *others]
    assert all(not torch.equal(draws[i], draws[j]) for i in range(4) for j in range(i))
