"""fastelbo.distributions against torch.distributions: log_prob, shapes, samples, moments, errors, and the KL."""

import copy
import math
import pickle
import re
from collections.abc import Callable, Sequence
from typing import ClassVar, NamedTuple

import pytest
import torch
import torch.distributions as td
from torch import Tensor
from torch.distributions import constraints
from torch.nn.functional import logsigmoid

import fastelbo
from fastelbo import distributions as fd
from fastelbo.distributions import base
from fastelbo.likelihoods import LIKELIHOODS

K, B, D = 5, 4, 3


def normal(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64)


def counts(*shape: int) -> Tensor:
    return torch.randint(0, 5, shape).double()


class ZeroInflated(td.Distribution):
    """The mixture of zero and torch's NegativeBinomial, by its definition."""

    arg_constraints: ClassVar = {}

    def __init__(self, log_mean: Tensor, log_theta: Tensor, zero_logits: Tensor) -> None:
        self.counts, self.zero_logits = negative_binomial(log_mean, log_theta), zero_logits
        super().__init__(torch.broadcast_shapes(self.counts.batch_shape, zero_logits.shape), validate_args=False)

    def log_prob(self, value: Tensor) -> Tensor:
        nb = logsigmoid(-self.zero_logits) + self.counts.log_prob(value)
        return torch.where(value == 0, torch.logaddexp(logsigmoid(self.zero_logits), nb), nb)

    @property
    def mean(self) -> Tensor:
        return self.counts.mean * torch.sigmoid(-self.zero_logits)

    @property
    def variance(self) -> Tensor:
        second = (self.counts.variance + self.counts.mean.square()) * torch.sigmoid(-self.zero_logits)
        return second - self.mean.square()


def negative_binomial(log_mean: Tensor, log_theta: Tensor) -> td.NegativeBinomial:
    return td.NegativeBinomial(log_theta.exp(), logits=log_mean - log_theta, validate_args=False)


def mixture(mean1: Tensor, mean2: Tensor, theta: Tensor, logits: Tensor) -> td.MixtureSameFamily:
    mean1, mean2, theta, logits = torch.broadcast_tensors(mean1, mean2, theta, logits)
    which = td.Categorical(logits=torch.stack([logits, torch.zeros_like(logits)], -1))
    each = negative_binomial(torch.stack([mean1, mean2], -1).log(), theta.log()[..., None])
    return td.MixtureSameFamily(which, each, validate_args=False)


class BetaBinomial(td.Distribution):
    """Pyro's: torch's Binomial under its Beta."""

    arg_constraints: ClassVar = {}

    def __init__(self, concentration1: Tensor, concentration0: Tensor, n: Tensor | int) -> None:
        self.beta, self.n = td.Beta(concentration1, concentration0), n
        super().__init__(torch.broadcast_shapes(self.beta.batch_shape, torch.as_tensor(n).shape), validate_args=False)

    def log_prob(self, value: Tensor) -> Tensor:
        a, b, n = self.beta.concentration1, self.beta.concentration0, torch.as_tensor(self.n, dtype=value.dtype)

        def log_beta(a: Tensor, b: Tensor) -> Tensor:
            return torch.lgamma(a) + torch.lgamma(b) - torch.lgamma(a + b)

        ways = -torch.log1p(n) - log_beta(value + 1, n - value + 1)
        return ways + log_beta(value + a, n - value + b) - log_beta(a, b)

    @property
    def mean(self) -> Tensor:
        return self.beta.mean * self.n

    @property
    def variance(self) -> Tensor:
        return self.beta.variance * self.n * (self.beta.concentration0 + self.beta.concentration1 + self.n)


class Case(NamedTuple):
    ours: Callable[..., td.Distribution]  # of parameters, with event_dims and validate_args
    torch: Callable[..., td.Distribution]  # without event dimensions
    parameters: list[Callable[..., Tensor]]  # of a shape
    data: Callable[..., Tensor]  # of a shape
    smooth: bool = True  # in x


def unit(*shape: int) -> Tensor:
    return torch.rand(shape, dtype=torch.float64) * 0.9 + 0.05


def scale(*shape: int) -> Tensor:
    return unit(*shape) + 0.3


CASES = {
    "bernoulli": Case(fd.Bernoulli, lambda logits: td.Bernoulli(logits=logits, validate_args=False), [normal], unit),
    "bernoulli_probs": Case(
        lambda probs, **options: fd.Bernoulli(probs=probs, **options),
        lambda probs: td.Bernoulli(probs, validate_args=False),
        [unit],
        unit,
    ),
    "gaussian": Case(fd.Gaussian, lambda m, lv: td.Normal(m, torch.exp(0.5 * lv)), [normal, normal], normal),
    "gaussian of unit variance": Case(fd.Gaussian, lambda m: td.Normal(m, torch.ones_like(m)), [normal], normal),
    "gaussian by scale": Case(
        lambda m, s, **options: fd.Gaussian(m, scale=s, **options), td.Normal, [normal, scale], normal
    ),
    "laplace": Case(fd.Laplace, lambda m, s: td.Laplace(m, torch.exp(s)), [normal, normal], normal),
    "laplace of unit scale": Case(fd.Laplace, lambda m: td.Laplace(m, torch.ones_like(m)), [normal], normal),
    "laplace by scale": Case(
        lambda m, s, **options: fd.Laplace(m, scale=s, **options), td.Laplace, [normal, scale], normal
    ),
    "student_t": Case(
        fd.StudentT,
        lambda m, s, r: td.StudentT(r.exp(), m, s.exp(), validate_args=False),
        [normal, normal, lambda *shape: unit(*shape) + 1.7],
        normal,
    ),
    "poisson": Case(fd.Poisson, lambda log_rate: td.Poisson(log_rate.exp()), [normal], counts, smooth=False),
    "nb": Case(fd.NegativeBinomial, negative_binomial, [normal, normal], counts, smooth=False),
    "zinb": Case(fd.ZeroInflatedNegativeBinomial, ZeroInflated, [normal] * 3, counts, smooth=False),
    "nb_mean": Case(
        lambda m, th, **options: fd.NegativeBinomial(mean=m, theta=th, **options),
        lambda m, th: negative_binomial(m.log(), th.log()),
        [scale, scale],
        counts,
        smooth=False,
    ),
    "zinb_mean": Case(
        lambda m, th, pi, **options: fd.ZeroInflatedNegativeBinomial(mean=m, theta=th, zero_logits=pi, **options),
        lambda m, th, pi: ZeroInflated(m.log(), th.log(), pi),
        [scale, scale, normal],
        counts,
        smooth=False,
    ),
    "nb_mixture": Case(fd.NegativeBinomialMixture, mixture, [scale, scale, scale, normal], counts, smooth=False),
    "beta_binomial": Case(
        lambda a, b, **options: fd.BetaBinomial(a, b, 6, **options),
        lambda a, b: BetaBinomial(a, b, 6),
        [scale, scale],
        counts,
        smooth=False,
    ),
}
every_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES)


def parameters(case: Case, *shapes: tuple[int, ...]) -> list[Tensor]:
    """One tensor for each parameter; the last shape is also that of those behind it."""
    shapes += (shapes[-1],) * len(case.parameters)
    return [make(*shape).requires_grad_() for make, shape in zip(case.parameters, shapes, strict=False)]


def test_every_likelihood_has_a_distribution():
    likelihoods = {case.ours(*parameters(case, (B, D))).likelihood for case in CASES.values()}
    assert likelihoods == set(LIKELIHOODS) - {"nb_logits", "gamma_poisson"}  # torch's and Pyro's own


# ----------------------------------------------------------------------------------------------------------------------
# log_prob.


def compare(ours: Tensor, theirs: Tensor, inputs: Sequence[Tensor], *, retain: bool = True) -> None:
    """Values and gradients, under a random upstream gradient. A compiled graph is not retained."""
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)
    upstream = torch.randn_like(theirs)
    pairs = (torch.autograd.grad(log_p, inputs, upstream, retain_graph=retain) for log_p in (ours, theirs))
    for mine, other in zip(*pairs, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-10, atol=1e-10)


@every_case
@pytest.mark.parametrize(
    "shapes",
    [
        [(B, D)],
        [(D,)],
        [(K, B, D)],
        [(B, D), (D,)],
        [(B, D), ()],
        [(K, B, D), (B, 1)],
        [(1, D), (B, 1)],
        [(D,), (B, D)],
        [(K, 1, D), (1, D), (B, D)],
    ],
    ids=str,
)
def test_log_prob(case, shapes):
    tensors = parameters(case, *shapes)
    ours, theirs = case.ours(*tensors), td.Independent(case.torch(*tensors), 1, validate_args=False)
    assert ours.event_shape == (D,) and ours.batch_shape == theirs.batch_shape
    for value in [(B, D), (K, B, D), (2, K, B, D), (D,), (1, D), (2, 1, 1, D)]:
        x = case.data(*value).requires_grad_(case.smooth)
        compare(ours.log_prob(x), theirs.log_prob(x), [*tensors, x] if case.smooth else tensors)


@every_case
@pytest.mark.parametrize("shape", [(D, 1), (1, D), (D,)], ids=str)
def test_as_many_data_as_elements(case, shape):
    """A parameter of each datum is not taken for one of each element."""
    tensors, x = parameters(case, (D, D), shape), case.data(D, D)
    compare(case.ours(*tensors).log_prob(x), case.torch(*tensors).log_prob(x).sum(-1), tensors)


@every_case
@pytest.mark.parametrize("event_dims", [0, 2, 3])
def test_event_dims(case, event_dims):
    tensors, x = parameters(case, (K, B, D), (B, 1), (D,)), case.data(2, K, B, D)
    ours = case.ours(*tensors, event_dims=event_dims)
    theirs = td.Independent(case.torch(*tensors), event_dims, validate_args=False)
    assert (ours.batch_shape, ours.event_shape) == (theirs.batch_shape, theirs.event_shape)
    compare(ours.log_prob(x), theirs.log_prob(x), tensors)
    assert ours.support.event_dim == event_dims


@every_case
def test_independent_of_ours(case):
    tensors, x = parameters(case, (K, B, D)), case.data(K, B, D)
    fused, summed = case.ours(*tensors, event_dims=2), td.Independent(case.ours(*tensors), 1)
    assert (fused.batch_shape, fused.event_shape) == (summed.batch_shape, summed.event_shape)
    compare(fused.log_prob(x), summed.log_prob(x), tensors)


@every_case
def test_gradcheck(case):
    inputs = parameters(case, (2, B, D), (D,), (B, 1))
    if case.smooth:
        inputs.append(case.data(B, D).requires_grad_())
    x = inputs[-1] if case.smooth else case.data(B, D)
    n = len(case.parameters)

    def log_p(*tensors: Tensor) -> Tensor:
        return case.ours(*tensors[:n], validate_args=False).log_prob(tensors[n] if case.smooth else x)

    assert torch.autograd.gradcheck(log_p, inputs) and torch.autograd.gradgradcheck(log_p, inputs)


def test_data_and_shared_parameters_are_read_once(monkeypatch):
    seen = []

    def log_prob(recon, x, **options):
        seen.append([tuple(t.shape) for t in (*recon, x)])
        return fastelbo.log_prob(recon, x, **options)

    monkeypatch.setattr(base, "log_prob", log_prob)
    px = fd.ZeroInflatedNegativeBinomial(normal(K, B, D), normal(D), normal(1, 1, 1))
    assert px.log_prob(counts(B, D)).shape == (K, B)
    px.expand([2, K, B]).log_prob(counts(B, D))
    assert seen == [[(K, B, D), (D,), (), (B, D)], [(2 * K, B, D), (D,), (), (B, D)]]


@every_case
def test_compiled(case):
    tensors, x = parameters(case, (K, B, D), (D,), (B, 1)), case.data(B, D)

    def log_p(x: Tensor, *tensors: Tensor) -> Tensor:
        return case.ours(*tensors, validate_args=True).log_prob(x)  # looked at where nothing is compiled

    torch.compiler.reset()
    compiled = torch.compile(log_p, fullgraph=True, backend="aot_eager")
    compare(compiled(x, *tensors), log_p(x, *tensors), tensors, retain=False)


def test_compiled_for_any_size():
    """The distribution is built, expanded and drawn from in the compiled function."""

    def program(log_mean: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        px = fd.NegativeBinomial(log_mean, log_mean[0, 0], validate_args=False)
        return px.expand([K, len(x)]).log_prob(x) + px.log_prob(x), px.mean + px.variance

    torch.compiler.reset()
    compiled = torch.compile(program, fullgraph=True, backend="aot_eager")
    for batch in (4, 5, 7, 9):
        log_mean, x = normal(K, batch, D), counts(batch, D)
        torch.testing.assert_close(compiled(log_mean, x), program(log_mean, x), rtol=1e-10, atol=1e-10)


@every_case
def test_no_data(case):
    tensors = parameters(case, (0, D), (D,))
    px = case.ours(*tensors, validate_args=True)
    log_p = px.log_prob(case.data(K, 0, D))
    assert log_p.shape == (K, 0) and px.sample((2,)).shape == (2, 0, D)
    assert all((grad == 0).all() for grad in torch.autograd.grad(log_p.sum(), tensors))


@every_case
def test_vmap(case):
    tensors, x = [t.detach() for t in parameters(case, (K, B, D))], case.data(K, B, D)
    log_p = torch.func.vmap(lambda x, *tensors: case.ours(*tensors, validate_args=True).log_prob(x))(x, *tensors)
    torch.testing.assert_close(log_p, case.ours(*tensors).log_prob(x), rtol=1e-10, atol=1e-10)


def test_data_types():
    logits, log_rate = torch.randn(B, D), torch.randn(B, D)
    image, cells = torch.randint(0, 256, (B, D), dtype=torch.uint8), torch.randint(0, 9, (B, D))
    expected = td.Independent(td.Bernoulli(logits=logits, validate_args=False), 1).log_prob(image / 255)
    torch.testing.assert_close(fd.Bernoulli(logits).log_prob(image), expected)
    torch.testing.assert_close(fd.Bernoulli(logits).log_prob(image > 9), fd.Bernoulli(logits).log_prob((image > 9) / 1))
    torch.testing.assert_close(fd.Poisson(log_rate).log_prob(cells), fd.Poisson(log_rate).log_prob(cells.float()))
    assert fd.Gaussian(logits.half()).log_prob(logits.half()).dtype == torch.float32


# ----------------------------------------------------------------------------------------------------------------------
# Shapes, samples, moments.


@every_case
def test_expand(case):
    tensors, x = parameters(case, (B, D), (D,), (B, 1)), case.data(B, D)
    one = case.ours(*tensors, validate_args=False)
    many = one.expand([K, B])
    assert many.batch_shape == (K, B) and many.event_shape == (D,) and isinstance(many, type(one))
    assert many._validate_args is False and case.ours(*tensors, validate_args=True).expand([K, B])._validate_args
    assert many.sample((2,)).shape == (2, K, B, D) and many.mean.shape == many.variance.shape == (K, B, D)
    assert all(getattr(many, name).shape == (K, B, D) for name in re.findall(r"(\w+): ", repr(many)))
    compare(many.log_prob(x), one.log_prob(x).expand(K, B), tensors)
    with pytest.raises(RuntimeError):
        one.expand([B + 1])


@every_case
def test_samples_and_moments(case):
    tensors = parameters(case, (B, D), (D,), (1, D))
    ours, theirs = case.ours(*tensors), case.torch(*tensors)
    torch.testing.assert_close(ours.mean, theirs.mean, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(ours.variance, theirs.variance, rtol=1e-10, atol=1e-10)

    for shape in ((), (2,), (2, 3)):
        x = ours.sample(shape)
        assert x.shape == (*shape, B, D) and x.dtype == torch.float64 and not x.requires_grad
        assert ours.log_prob(x).shape == (*shape, B) and ours.support.check(x).all()
        with pytest.raises(NotImplementedError) if not ours.has_rsample else torch.no_grad():
            ours.rsample(shape)

    n = 100_000
    x = ours.sample((n,))
    assert ((x.mean(0) - ours.mean) / (ours.variance / n).sqrt()).abs().max() < 5
    squares = (x - ours.mean).square()
    assert ((squares.mean(0) - ours.variance) / (squares.std(0) / n**0.5)).abs().nan_to_num().max() < 5


@pytest.mark.parametrize("case", [CASES["gaussian"], CASES["gaussian by scale"], CASES["laplace"]])
def test_rsample_is_reparameterized(case):
    """x = mean + scale noise: the gradient of sum(g x) is g, and g noise d scale."""
    mean, second = parameters(case, (B, D), (D,))
    q = case.ours(mean, second)
    x = q.rsample((K,))
    spread = case.torch(mean, second).scale
    noise, g = ((x - mean) / spread).detach(), normal(K, B, D)
    found = torch.autograd.grad((g * x).sum(), (mean, second))
    expected = torch.autograd.grad((g * (mean + spread * noise)).sum(), (mean, second))
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)


def test_the_same_seed_gives_torch_s_samples():
    mean, spread = normal(B, D), scale(B, D)
    for ours, theirs in (
        (fd.Gaussian(mean, scale=spread), td.Normal(mean, spread)),
        (fd.Bernoulli(mean), td.Bernoulli(logits=mean)),
        (fd.Poisson(mean), td.Poisson(mean.exp())),
    ):
        torch.manual_seed(3)
        mine = ours.sample((K,))
        torch.manual_seed(3)
        torch.testing.assert_close(mine, theirs.sample((K,)), rtol=1e-12, atol=1e-12)


@every_case
def test_copies(case):
    tensors, x = [t.detach() for t in parameters(case, (B, D), (D,), ())], case.data(K, B, D)
    one = case.ours(*tensors)
    for other in (pickle.loads(pickle.dumps(one)), copy.copy(one), copy.deepcopy(one)):
        assert type(other) is type(one) and repr(other) == repr(one)
        assert torch.equal(other.log_prob(x), one.log_prob(x))


# ----------------------------------------------------------------------------------------------------------------------
# What torch's classes have.

OWN = {"arg_constraints", "expand", "set_default_validate_args"}  # ours name other parameters
ARGUMENTS = {
    "cdf": [(torch.linspace(-2, 2, D).double(),)],
    "icdf": [(torch.linspace(0.1, 0.9, D).double(),)],
    "enumerate_support": [(), (False,)],
    "sample": [(), ((2,),)],
    "rsample": [(), ((2,),)],
    "sample_n": [(2,)],
}


def seen(d: td.Distribution, name: str, data: Tensor) -> list[object]:
    """What an attribute is, or what a method returns or raises; of draws their shape."""
    try:
        found = getattr(d, name)
        calls = [(data,)] if name == "log_prob" else ARGUMENTS.get(name, [()])
        values = [found(*arguments) for arguments in calls] if callable(found) else [found]
    except NotImplementedError:
        return [NotImplementedError]
    if "sample" in name and callable(found):
        return [(value.shape, value.dtype) for value in values]
    return [str(value) if isinstance(value, constraints.Constraint) else value for value in values]


@pytest.mark.filterwarnings("ignore:.*sample_n")
@pytest.mark.parametrize("event_dims", [0, 1])
@every_case
def test_what_torch_s_class_has(case, event_dims):
    """Every public attribute and method, with torch's values."""
    tensors, x = [t.detach() for t in parameters(case, (B, D), (D,), (1, D))], case.data(B, D)
    ours, theirs = case.ours(*tensors, event_dims=event_dims), case.torch(*tensors)
    if isinstance(theirs, ZeroInflated | BetaBinomial | td.MixtureSameFamily):
        pytest.skip("torch has none")
    names = {name for name in dir(theirs) if not name.startswith("_")} - OWN
    assert {"entropy", "mode", "cdf", "icdf", "enumerate_support", "perplexity", "stddev"} <= names
    whole = td.Independent(theirs, event_dims, validate_args=False) if event_dims else theirs
    for name in names:
        expected = seen(whole if hasattr(td.Independent, name) else theirs, name, x)
        for found, other in zip(seen(ours, name, x), expected, strict=True):
            if isinstance(other, Tensor):
                torch.testing.assert_close(found, other, rtol=1e-10, atol=1e-10, msg=lambda m, n=name: f"{n}: {m}")
            else:
                assert found == other, name


@every_case
def test_entropy_has_torch_s_gradients_and_compiles(case):
    tensors = parameters(case, (B, D), (D,))
    theirs = td.Independent(case.torch(*tensors), 1, validate_args=False)
    try:
        expected = theirs.entropy()
    except NotImplementedError:
        return

    def entropy(*tensors: Tensor) -> Tensor:
        return case.ours(*tensors, validate_args=False).entropy()

    if not expected.requires_grad:  # of a unit scale: the mean counts for nothing
        assert torch.equal(entropy(*tensors), expected)
        return
    read = tensors[-1:]
    compare(entropy(*tensors), expected, read)
    torch.compiler.reset()
    compare(torch.compile(entropy, fullgraph=True, backend="aot_eager")(*tensors), expected, read, retain=False)


def test_entropy_and_mode_at_the_edges():
    """Scales that float32 does not hold, and the Poisson limit of the negative binomial."""
    extreme = torch.tensor([-400.0, 400.0])
    entropy = torch.tensor([-200.0, 200.0]) + 0.5 * math.log(2 * math.pi * math.e)
    torch.testing.assert_close(fd.Gaussian(extreme, extreme, event_dims=0).entropy(), entropy)
    torch.testing.assert_close(fd.Laplace(extreme, extreme, event_dims=0).entropy(), extreme + math.log(2 * math.e))
    assert fd.NegativeBinomial(torch.tensor([2.0]), 200.0).mode == 7  # floor(exp(2))


ELEMENT = "is defined for one element: give event_dims=0; got 1 event dimensions"


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: fd.Gaussian(t).cdf(t), f"cdf {ELEMENT}"),
        (lambda: fd.Laplace(t).icdf(t), f"icdf {ELEMENT}"),
        (lambda: fd.Bernoulli(t).enumerate_support(), f"enumerate_support {ELEMENT}"),
        (lambda: fd.Bernoulli(t).cdf(t), "torch's Bernoulli has no cdf"),
        (lambda: fd.Poisson(t, event_dims=0).enumerate_support(), "torch's Poisson has no enumerate_support"),
        (lambda: fd.ZeroInflatedNegativeBinomial(t, t, t).entropy(), "torch.distributions has no ZeroInflatedNeg"),
        (lambda: fd.BetaBinomial(t, t, 3).enumerate_support(), f"enumerate_support {ELEMENT}"),
        (lambda: fd.BetaBinomial(t, t, 3 * t.triu(), event_dims=0).enumerate_support(), "one total_count for all"),
    ],
)
def test_what_is_not_implemented_is_said(call, message):
    with pytest.raises(NotImplementedError, match=message):
        call()


def test_cdf_checks_its_value_as_torch_s():
    with pytest.raises(ValueError, match="within the support"):
        fd.Gaussian(t, event_dims=0, validate_args=True).cdf(t * torch.nan)


@pytest.mark.parametrize(
    "name", ["mean", "variance", "log_mean", "log_theta", "theta", "total_count", "logits", "probs", "mode"]
)
def test_logarithms_or_not(name):
    """Every property of both ways to build a distribution, with its gradients; the mean of one is not E[x]."""
    inputs, pi = [scale(B, D).requires_grad_(), scale(D).requires_grad_()], normal(1, D)
    logs = [t.log() for t in inputs]
    for by_logs, other, attributes in (
        (fd.NegativeBinomial(*logs), fd.NegativeBinomial(mean=inputs[0], theta=inputs[1]), None),
        (
            fd.ZeroInflatedNegativeBinomial(*logs, pi),
            fd.ZeroInflatedNegativeBinomial(zero_logits=pi, mean=inputs[0], theta=inputs[1]),
            ("mean", "variance", "log_mean", "log_theta", "theta"),
        ),
    ):
        if attributes is None or name in attributes:
            found, expected = getattr(other, name), getattr(by_logs, name)
            assert found.shape == (B, D)
            read = inputs[1:] if name.endswith("theta") or name == "total_count" else inputs[:1]
            compare(found, expected, read)


def test_moments_have_gradients_at_zero():
    mean = torch.zeros(B, D, dtype=torch.float64, requires_grad=True)
    for px in (
        fd.NegativeBinomial(mean=mean, theta=half),
        fd.ZeroInflatedNegativeBinomial(mean=mean, theta=half, zero_logits=0.0),
    ):
        slope = 1 - 0.5 * isinstance(px, fd.ZeroInflatedNegativeBinomial)
        for moment in (px.mean, px.variance):
            (grad,) = torch.autograd.grad(moment.sum(), mean)
            assert (moment == 0).all() and (grad == slope).all()


@pytest.mark.parametrize("event_dims", [0, 1])
@pytest.mark.parametrize("dtype", [torch.int64, torch.int16, torch.uint8, torch.float64], ids=str)
def test_total_counts_are_data(event_dims, dtype):
    """They broadcast, and have no gradient."""
    a, b, x = scale(D).requires_grad_(), scale(B, 1).requires_grad_(), counts(K, B, D)
    for n in (torch.randint(4, 9, (B, D)), torch.randint(4, 9, (B, 1)), torch.tensor(7)):
        ours = fd.BetaBinomial(a, b, n.to(dtype), event_dims=event_dims, validate_args=True)
        theirs = td.Independent(BetaBinomial(a, b, n), event_dims, validate_args=False)
        compare(ours.log_prob(x), theirs.log_prob(x), [a, b])
        torch.testing.assert_close((ours.mean, ours.variance), (theirs.mean, theirs.variance))
        draws = ours.sample((K,))
        assert ours.total_count.dtype == dtype and ours.support.check(draws).all() and (draws <= n).all()
        assert not ours.support.check(draws + 9).any()


def test_a_beta_binomial_is_enumerated():
    px = fd.BetaBinomial(scale(B, 1), scale(D), 6, event_dims=0, validate_args=True)
    x = px.enumerate_support()
    assert px.has_enumerate_support and x.shape == (7, B, D) and px.enumerate_support(expand=False).shape == (7, 1, 1)
    torch.testing.assert_close(px.log_prob(x).exp().sum(0), torch.ones_like(px.mean))


def test_repr_names_what_was_given():
    assert repr(fd.NegativeBinomial(t, 0.5)) == "NegativeBinomial(log_mean: torch.Size([4, 3]), log_theta: 0.5)"
    assert repr(fd.NegativeBinomial(mean=t, theta=t[0])) == (
        "NegativeBinomial(mean: torch.Size([4, 3]), theta: torch.Size([4, 3]))"
    )
    px = fd.BetaBinomial(t, t, 6)
    assert repr(px) == (
        "BetaBinomial(concentration1: torch.Size([4, 3]), concentration0: torch.Size([4, 3]), total_count: 6)"
    )


def test_bernoulli_has_probs_and_logits():
    logits = normal(B, D)
    torch.testing.assert_close(fd.Bernoulli(logits).probs, torch.sigmoid(logits))
    torch.testing.assert_close(fd.Bernoulli(probs=torch.sigmoid(logits)).logits, logits)


# ----------------------------------------------------------------------------------------------------------------------
# Errors.

# torch.compile turns validation off for the process: where values are checked, that is asked for
t, negative = torch.ones(B, D), -torch.ones(B, D)
ERRORS = {
    "neither": (lambda: fd.Bernoulli(), "Bernoulli takes logits or probs; got neither"),
    "both": (lambda: fd.Bernoulli(t, probs=t), "Bernoulli takes logits or probs; got both"),
    "a number": (lambda: fd.Bernoulli(0.5), "logits must be a torch.Tensor; got float"),
    "integers": (lambda: fd.Poisson(t.long()), "log_rate must be float32, .*; got int64"),
    "no number": (lambda: fd.NegativeBinomial(t, "a"), "log_theta must be a float or a torch.Tensor; got str"),
    "shapes": (
        lambda: fd.Gaussian(t, torch.ones(2)),
        r"logvar must broadcast with the shape \(4, 3\) of mean; got \(2",
    ),
    "event_dims": (lambda: fd.Poisson(t, event_dims=3), "event_dims must be at most 2, .* of log_rate; got 3"),
    "negative event_dims": (lambda: fd.Poisson(t, event_dims=-1), "event_dims must be at least 0; got -1"),
    "scale by position": (lambda: fd.Gaussian(t, None, t), "positional argument"),
    "two spreads": (lambda: fd.Gaussian(t, t, scale=t), "Gaussian takes logvar or scale, not both"),
    "two scales": (lambda: fd.Laplace(t, 0.0, scale=2.0), "Laplace takes log_scale or scale, not both"),
    "negative number": (lambda: fd.Gaussian(t, scale=-1.0), "scale must be positive; got -1.0"),
    "neither pair": (
        lambda: fd.NegativeBinomial(),
        "NegativeBinomial takes log_mean and log_theta, or mean and theta; got neither",
    ),
    "both pairs": (lambda: fd.NegativeBinomial(t, t, mean=t, theta=t), "; got log_mean, log_theta, mean, theta"),
    "of both pairs": (
        lambda: fd.ZeroInflatedNegativeBinomial(t, None, t, theta=t),
        "ZeroInflatedNegativeBinomial takes log_mean and log_theta, or mean and theta; got log_mean, theta",
    ),
    "half a pair": (lambda: fd.NegativeBinomial(mean=t), "or mean and theta; got mean"),
    "no zero_logits": (lambda: fd.ZeroInflatedNegativeBinomial(t, t), "zero_logits must be a float .*; got None"),
    "negative theta": (lambda: fd.NegativeBinomial(mean=t, theta=-1.0), "theta must be at least 0; got -1.0"),
    "half a trial": (lambda: fd.BetaBinomial(t, t, 1.5), "total_count must be an int or a torch.Tensor; got float"),
    "total with a gradient": (
        lambda: fd.BetaBinomial(t, t, t.clone().requires_grad_()),
        "total_count is data, and must not require a gradient",
    ),
    "more than the total": (
        lambda: fd.BetaBinomial(t, t, 3, validate_args=True).log_prob(4 * t),
        "value must be in the domain Interval.* of BetaBinomial; got",
    ),
    "bytes more than the total": (
        lambda: fd.BetaBinomial(t, t, 3, validate_args=True).log_prob((4 * t).to(torch.uint8)),
        "value must be in the domain Interval.* of BetaBinomial; got",
    ),
    "no tensor": (lambda: fd.Bernoulli(t).log_prob(1.0), "value must be a torch.Tensor; got float"),
    "event": (
        lambda: fd.Bernoulli(t).log_prob(t[:, :2]),
        r"value must end in the event_shape \(3,\) of Bern.*\(4, 2\)",
    ),
    "0-d": (
        lambda: fd.Bernoulli(t).log_prob(t[0, 0]),
        r"value must end in the event_shape \(3,\) of Bernoulli; got \(\)",
    ),
    "batch": (
        lambda: fd.Bernoulli(t).log_prob(t[:2]),
        r"value must broadcast with the batch_shape \(4,\) of Bernoulli",
    ),
    "grey": (
        lambda: fd.Bernoulli(t, validate_args=True).log_prob(2 * t),
        "value must be in the domain .*Interval.* of Bernoulli; got",
    ),
    "negative count": (
        lambda: fd.NegativeBinomial(t, t, validate_args=True).log_prob(negative),
        "value must be in the domain .*of Neg",
    ),
    "NaN in x": (
        lambda: fd.Gaussian(t, validate_args=True).log_prob(t * torch.nan),
        "value must be in the domain .*Real.* of Gaussian",
    ),
    "integers as data": (lambda: fd.Gaussian(t).log_prob(t.long()), "x must be"),
    "q": (lambda: fd.gaussian_kl(t, t), "q must be a Gaussian, a Normal or an Independent of them; got torch.Tensor"),
    "p": (lambda: fd.gaussian_kl(fd.Gaussian(t), fd.Laplace(t)), "p must be a Gaussian, .*; got .*Laplace"),
    "events": (
        lambda: fd.gaussian_kl(fd.Gaussian(t), td.Normal(t, t)),
        r"p must have the event_shape \(3,\) of q; got",
    ),
    "batches": (
        lambda: fd.gaussian_kl(fd.Gaussian(t), fd.Gaussian(t[:3])),
        r"p must broadcast with .*\(4,\) of q; got",
    ),
}


@pytest.mark.parametrize(("call", "message"), ERRORS.values(), ids=ERRORS)
def test_errors(call, message):
    with pytest.raises((ValueError, TypeError), match=f"(?s){message}"):
        call()


# of a constraint: what violates it
INVALID = {
    constraints.real: [math.nan],
    constraints.unit_interval: [math.nan, -1e-6, 1 + 1e-6],
    constraints.nonnegative: [math.nan, -1e-40, -3.0],
    constraints.positive: [math.nan, 0.0, -1e-40, -3.0],
}


@every_case
@pytest.mark.parametrize("event_dims", [0, 1])
def test_an_invalid_parameter_is_found(case, event_dims):
    """One among many, beside any x, in torch's words; by the first log_prob or sample, not by the constructor."""
    shape = (2, 3, 17)
    x = case.data(*shape[1:])
    tensors = [t.detach() for t in parameters(case, shape)]
    one = case.ours(*tensors)
    names = [name for name, _ in one._given()]
    if one._scale is not None:
        names[1] = "scale"
    for i, valid in enumerate(tensors):
        for value in INVALID[one.arg_constraints[names[i]]]:
            bad = valid.clone()
            bad[1, 2, torch.randint(0, 17, ())] = value
            px = case.ours(*tensors[:i], bad, *tensors[i + 1 :], event_dims=event_dims, validate_args=True)
            for call in (lambda px=px: px.log_prob(x), px.expand((4, *px.batch_shape)).sample):
                with pytest.raises(ValueError, match=rf"Expected parameter {names[i]} \(Tensor of shape .* constraint"):
                    call()


@every_case
@pytest.mark.parametrize("event_dims", [0, 1])
def test_an_invalid_value_is_found(case, event_dims):
    px = case.ours(*parameters(case, (2, 3, 17)), event_dims=event_dims, validate_args=True)
    domain = base._DOMAINS[LIKELIHOODS[px.likelihood].domain][1]
    for value in (*INVALID[domain], *([7.0] if isinstance(px, fd.BetaBinomial) else [])):
        x = case.data(3, 17)
        x[1, torch.randint(0, 17, ())] = value
        with pytest.raises(ValueError, match=f"value must be in the domain .* of {type(px).__name__}; got\n"):
            px.log_prob(x)
        px.log_prob(case.data(3, 17))


def test_what_a_finite_result_does_not_tell_is_looked_at():
    """Also where nothing is read."""
    assert fd.BetaBinomial(t, t, 2.5 * t, validate_args=False).log_prob(t).isfinite().any()
    with pytest.raises(ValueError, match="Expected parameter total_count"):
        fd.BetaBinomial(t, t, 2.5 * t, validate_args=True).log_prob(t)
    with pytest.raises(ValueError, match="Expected parameter log_rate"):
        fd.Poisson(t * torch.nan, validate_args=True).log_prob(torch.zeros(0, B, D))


def test_infinite_results_of_valid_arguments_are_returned():
    assert fd.Poisson(-math.inf * t, validate_args=True).log_prob(t).isneginf().all()
    assert fd.NegativeBinomial(mean=0 * t, theta=t, validate_args=True).log_prob(t).isneginf().all()


def test_the_default_of_validation_may_change():
    bad, before = fd.Poisson(t * torch.nan), td.Distribution._validate_args
    try:
        td.Distribution.set_default_validate_args(True)
        with pytest.raises(ValueError, match="Expected parameter"):
            bad.log_prob(t)
        td.Distribution.set_default_validate_args(False)
        assert bad.log_prob(t).isnan().all()
    finally:
        td.Distribution.set_default_validate_args(before)


def test_nothing_is_checked_without_validate_args():
    assert fd.Gaussian(t * torch.nan, validate_args=False).log_prob(t).isnan().all()
    assert (fd.Poisson(t, validate_args=False).log_prob(negative) == -torch.inf).all()
    assert fd.Gaussian(t, scale=negative, validate_args=False).log_prob(t).isnan().all()


# ----------------------------------------------------------------------------------------------------------------------
# The KL.


def gaussian(mu: Tensor, spread: Tensor) -> fd.Gaussian:
    return fd.Gaussian(mu, scale=spread)


def independent(mu: Tensor, spread: Tensor) -> td.Independent:
    return td.Independent(td.Normal(mu, spread), 1)


KINDS = {
    "ours": gaussian,
    "torch": independent,
    "Independent of ours": lambda mu, spread: td.Independent(fd.Gaussian(mu, scale=spread, event_dims=0), 1),
}


@pytest.mark.parametrize("p", KINDS.values(), ids=KINDS)
@pytest.mark.parametrize("q", KINDS.values(), ids=KINDS)
@pytest.mark.parametrize("shapes", [[(B, D)] * 2, [(B, D), (D,)], [(D,), (K, B, D)], [(K, 1, D), (B, D)]], ids=str)
def test_kl(q, p, shapes):
    inputs = [make(*shape).requires_grad_() for shape in shapes for make in (normal, scale)]
    theirs = td.kl_divergence(independent(*inputs[:2]), independent(*inputs[2:]))
    ours, other = q(*inputs[:2]), p(*inputs[2:])
    compare(fd.gaussian_kl(ours, other), theirs, inputs)
    compare(td.kl_divergence(ours, other), theirs, inputs)


def test_kl_without_a_prior_and_without_an_event():
    inputs = mu, spread = normal(B, D).requires_grad_(), scale(B, D).requires_grad_()
    zeros, ones = torch.zeros_like(mu), torch.ones_like(mu)
    compare(fd.gaussian_kl(gaussian(*inputs)), td.kl_divergence(independent(*inputs), independent(zeros, ones)), inputs)
    theirs = td.kl_divergence(td.Normal(mu, spread), td.Normal(zeros, ones))
    scalars = fd.Gaussian(mu, scale=spread, event_dims=0)
    compare(fd.gaussian_kl(td.Normal(mu, spread)), theirs, inputs)
    compare(td.kl_divergence(scalars, td.Normal(zeros, ones)), theirs, inputs)
    compare(td.kl_divergence(td.Normal(mu, spread), fd.Gaussian(zeros, event_dims=0)), theirs, inputs)
    compare(fd.gaussian_kl(fd.Gaussian(mu, event_dims=2)), 0.5 * mu.square().sum(), [mu])


def test_kl_gradcheck_and_compiled():
    inputs = [make(*shape).requires_grad_() for shape in ((B, D), (D,)) for make in (normal, scale)]

    def kl(mu, spread, p_mu, p_spread):
        q = fd.Gaussian(mu, scale=spread, validate_args=False)
        return fd.gaussian_kl(q, td.Independent(td.Normal(p_mu, p_spread, validate_args=False), 1, validate_args=False))

    assert torch.autograd.gradcheck(kl, inputs) and torch.autograd.gradgradcheck(kl, inputs)
    torch.compiler.reset()
    compiled = torch.compile(kl, fullgraph=True, backend="aot_eager")
    compare(compiled(*inputs), kl(*inputs), inputs, retain=False)


def test_kl_of_others_is_not_implemented():
    """By torch's contract: Pyro falls back on samples then."""
    with pytest.raises(NotImplementedError):
        td.kl_divergence(gaussian(t, t), td.Independent(td.Cauchy(t, t), 1))


OURS = {
    td.Bernoulli: (CASES["bernoulli"], CASES["bernoulli_probs"]),
    td.Normal: (CASES["gaussian"],),
    td.Laplace: (CASES["laplace"],),
    td.Poisson: (CASES["poisson"],),
    td.NegativeBinomial: (CASES["nb"],),
}
half = torch.full((D,), 0.5, dtype=torch.float64)
OTHERS = {
    td.Beta: td.Beta(2 + half, 3 * half),
    td.Binomial: td.Binomial(3, half),
    td.ContinuousBernoulli: td.ContinuousBernoulli(0.3 * half),
    td.Exponential: td.Exponential(half),
    td.Gamma: td.Gamma(2 + half, half),
    td.Gumbel: td.Gumbel(half, 2 * half),
    td.Pareto: td.Pareto(half, 3 + half),
    td.Uniform: td.Uniform(-half, half),
}
PAIRS = [pair for pair in td.kl._KL_REGISTRY if set(pair) & set(OURS) and not set(pair) & {fd.Fused, td.Independent}]


def of_kind(kind: type) -> list[tuple[td.Distribution, td.Distribution]]:
    """Of each way to build it, ours and torch's; where none of ours stands for it, torch's twice."""
    if kind not in OURS:
        return [(OTHERS[kind], OTHERS[kind])]
    found = []
    for case in OURS[kind]:
        tensors = parameters(case, (D,))
        found.append((case.ours(*tensors, event_dims=0), case.torch(*tensors)))
    return found


@pytest.mark.parametrize("pair", PAIRS, ids=lambda pair: " ".join(kind.__name__ for kind in pair))
def test_every_kl_that_torch_has(pair):
    for q, q_torch in of_kind(pair[0]):
        for p, p_torch in of_kind(pair[1]):
            expected = td.kl_divergence(q_torch, p_torch)
            summed = td.kl_divergence(td.Independent(q_torch, 1), td.Independent(p_torch, 1))
            for one, other in ((q, p), (q, p_torch), (q_torch, p)):
                torch.testing.assert_close(td.kl_divergence(one, other), expected, rtol=1e-10, atol=1e-10)
                kl = td.kl_divergence(td.Independent(one, 1), td.Independent(other, 1))
                torch.testing.assert_close(kl, summed, rtol=1e-10, atol=1e-10)


def test_kl_of_events():
    """Ours with an event, torch's as Independent of it, and Independent of ours."""
    q, p, p_torch = (make(normal(K, B, D)) for make in (fd.Poisson, fd.Poisson, lambda m: td.Poisson(m.exp())))
    p = fd.Poisson(p_torch.rate.log())
    expected = td.kl_divergence(td.Poisson(q.rate), p_torch).sum(-1)
    for other in (p, td.Independent(p_torch, 1), td.Independent(fd.Poisson(p.log_rate, event_dims=0), 1)):
        torch.testing.assert_close(td.kl_divergence(q, other), expected, rtol=1e-10, atol=1e-10)
    nested = td.Independent(q, 1)
    kl = td.kl_divergence(nested, fd.Poisson(p.log_rate, event_dims=2))
    torch.testing.assert_close(kl, expected.sum(-1), rtol=1e-10, atol=1e-10)
    for one, other in ((q, p_torch), (fd.NegativeBinomial(t, t), fd.NegativeBinomial(t, t))):
        with pytest.raises(NotImplementedError):
            td.kl_divergence(one, other)
