"""A random walk over all that a call may be: op, likelihood, shapes, strides, dtypes, masks, samples, options.

A case is a function of its number alone; `oracle.check` judges its values and all of its gradients against float64.
The first CASES numbers are walked by default. FASTELBO_WALK_SECONDS=600 walks for so long instead, from number
FASTELBO_WALK_START on.

    python tests/ops/test_random_walk.py NUMBER     prints a case, and checks it
"""

import math
import os
import random
import sys
import time
from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from cases import LIKELIHOODS, MOST, ROWS, further, is_counts, joined
from oracle import DTYPES, HALF_TYPES, Call, check, compute_dtype
from torch import Tensor

import fastelbo
from fastelbo import likelihoods
from fastelbo.estimators import ESTIMATORS
from fastelbo.reference import COUNTS

CASES, PARTS = 2000, 8
SECONDS = float(os.environ.get("FASTELBO_WALK_SECONDS", "0"))
START = int(os.environ.get("FASTELBO_WALK_START", "0"))
LARGEST = 20_000  # elements of recon
LONG = ("nb_mixture", "beta_binomial")  # formulas whose twins take long: of fewer elements


class Case(NamedTuple):
    call: Call
    inputs: list[Tensor | float | None]
    options: dict[str, object]  # those of the call, to be read
    twin: Call | None = None
    shared: tuple[int, ...] = ()  # the inputs that may be the same for several data, and
    like: int = 0  # the one to which they broadcast
    roundings: float = 0  # see oracle.check; where terms cancel that no sum of the twin has as its own

    def __str__(self) -> str:
        def text(t: Tensor | float | None) -> str:
            if not isinstance(t, Tensor):
                return str(t)
            place = f"{t.dtype}".removeprefix("torch.") + f"{tuple(t.shape)} strides {t.stride()}"
            return place + f" offset {t.storage_offset()}" + " requires_grad" * t.requires_grad

        return "\n".join([str(self.options), *(f"input {i}: {text(t)}" for i, t in enumerate(self.inputs))])


class Draw:
    """What a case is drawn with: choices from `self.random`, numbers from torch's generator."""

    def __init__(self, number: int) -> None:
        self.random = random.Random(number)
        torch.manual_seed(number)
        self.dtype = self.any_of(*DTYPES, torch.float32, torch.float32)
        self.row = self.any_of(*LIKELIHOODS)
        self.likelihood = self.row[0]
        self.B = self.any_of(0, 1, 2, 3, 4, 5, 5, 40)
        largest = LARGEST // 8 if self.likelihood in LONG else LARGEST
        self.event = self.sizes(4, largest // max(self.B, 1))
        most = max(largest // max(self.B * torch.Size(self.event).numel(), 1), 1)
        self.K = min(self.any_of(1, 2, 3, 4, 6, 20, 70), most)

    def any_of(self, *choices):
        return self.random.choice(choices)

    def chance(self, probability: float) -> bool:
        return self.random.random() < probability

    def sizes(self, most_dims: int, most_elements: int) -> tuple[int, ...]:
        found: tuple[int, ...] = ()
        for _ in range(self.random.randint(0, most_dims)):
            small = self.random.randint(1, 9)
            size = self.any_of(small, small, small, 0 if self.chance(0.1) else 1, 16, 17, 33, 64, 130, 700, 4100)
            if torch.Size((*found, size)).numel() <= most_elements:
                found = (*found, size)
        return found

    def lie(self, shape: tuple[int, ...]) -> tuple[int, Callable[[Tensor], Tensor]]:
        """How many numbers a tensor in a drawn layout has, and the tensor on them: any strides, any offset."""
        order = list(range(len(shape)))[::-1]
        if self.chance(0.4):
            self.random.shuffle(order)
        gaps, expands, overlaps = self.chance(0.3), self.chance(0.2), self.chance(0.1)
        step, strides = 1, [0] * len(shape)
        for dim in order:
            step *= self.any_of(1, 2, 3) if gaps else 1
            strides[dim] = 0 if expands and self.chance(0.4) else step
            step = step + 1 if overlaps else step * max(shape[dim], 1)
            step += self.any_of(0, 1, 2) if gaps else 0
        offset = self.any_of(0, 0, 0, 1, 3, 7)
        last = sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True)) if 0 not in shape else 0
        return offset + last + 1, lambda flat: flat.as_strided(shape, strides, offset)

    def tensor(
        self,
        shape: tuple[int, ...],
        values: Callable[[Tensor], Tensor] = lambda noise: noise,
        dtype: torch.dtype | None = None,
        grad: bool | None = None,
    ) -> Tensor:
        """values(standard normal noise); it requires a gradient if `grad`, by default in nine of ten."""
        count, view = self.lie(shape)
        flat = values(torch.randn(count, dtype=torch.float64)).to(dtype or self.dtype)
        return view(flat).requires_grad_(self.chance(0.9) if grad is None else grad)

    def broadcast(self, whole: tuple[int, ...], shape: tuple[int, ...], *values: Callable[[Tensor], Tensor]) -> Tensor:
        """One of `shape`, which is going to be expanded to `whole`. Then it is float32 beside half types.

        Its gradient is a sum that PyTorch makes of the expanded one. In half types that one is rounded, in eager
        PyTorch as well, and which of the two is nearer to the truth is luck.
        """
        return self.tensor(shape, *values, dtype=self.dtype if shape == whole else compute_dtype(self.dtype))

    def samples(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        return (self.K, *shape)

    def parameters(self, sampled: bool) -> list[Tensor | None]:
        """recon, and the further parameters where there are any, None elsewhere: in any shape that broadcasts."""
        row, full = ROWS[self.likelihood], (self.B, *self.event)
        size = self.any_of(1.0, 1.0, 0.05, 5.0)
        whole = self.samples(full) if sampled else full
        recon = self.tensor(whole, lambda noise: row.recon(size * noise))
        drawn = further(self.row)
        others = [
            self.broadcast(whole, self.any_of(whole, whole, full, self.event, ()), values)
            for values in drawn[: len(drawn) - likelihoods.get(self.likelihood).data]
        ]
        for values in drawn[len(others) :]:
            shape, kind = self.any_of(whole, full, self.event, ()), self.any_of(None, None, *COUNTS)
            kind = kind or (self.dtype if shape == whole else compute_dtype(self.dtype))
            others.append(self.tensor(shape, values, kind, False))
        return [recon, *others, None, None, None][:4]

    def data(self) -> tuple[Tensor, Tensor | None]:
        """x and its mask; what lies under a weight of 0 may be NaN."""
        shape, row = (self.B, *self.event), ROWS[self.likelihood]
        counts = is_counts(self.likelihood)
        kind = self.any_of("same", "same", "float", "uint8", "counts" if counts else "bool")
        if kind == "uint8":
            most = MOST if likelihoods.get(self.likelihood).data else 255
            x = self.tensor(shape, lambda noise: (60 * noise + 128).clamp(0, most), torch.uint8, False)
        elif kind == "bool":
            x = self.tensor(shape, lambda noise: noise > 0, torch.bool, False)
        elif kind == "counts":
            x = self.tensor(shape, row.x, self.any_of(*COUNTS), False)
        else:
            dtype = torch.float32 if kind == "float" and self.dtype in HALF_TYPES else self.dtype
            x = self.tensor(shape, row.x, dtype, self.chance(0.4))
        if self.chance(0.5):
            return x, None
        ones = (1,) * len(self.event)
        of = self.any_of(shape, shape, shape, self.event, (self.B, *ones), (1, *self.event), ())
        kind = self.any_of(torch.bool, torch.uint8, torch.float32, torch.float64, torch.bfloat16)
        keep = self.any_of(0.0, 0.3, 0.3, 1.0)
        mask = self.tensor(of, lambda noise: noise.abs() * (noise > keep - 0.5), kind, False)
        if x.is_floating_point() and self.chance(0.2):
            x = torch.where(mask != 0, x.detach(), torch.nan).requires_grad_(x.requires_grad)
        return x, mask

    def latent(self, count: int, shape: tuple[int, ...], spread: float = 1.0) -> list[Tensor]:
        return [self.tensor(shape, lambda noise: spread * noise) for _ in range(count)]

    def prior(self, shape: tuple[int, ...]) -> list[Tensor | None]:
        def one() -> Tensor | None:
            return self.broadcast(shape, self.any_of(shape, shape, shape[1:], ())) if self.chance(0.4) else None

        return [one(), one()]

    def number(self, value: float) -> float | Tensor:
        """A number of a loss: a float, or in a third of the cases a 0-d tensor near it, learned or not."""
        if self.chance(0.67):
            return value
        off = self.any_of(0.0, 0.1)
        return self.tensor((), lambda noise: value + off * noise, self.any_of(*DTYPES))

    def reduction(self) -> str:
        return self.any_of("mean", "sum", "none")

    def parts(self, count: int) -> list[int]:
        """Which results are looked at and have an upstream gradient; the loss alone in half of the cases."""
        return [0] if self.chance(0.5) else sorted(self.random.sample(range(count), self.random.randint(1, count)))


def _of(result: Tensor, *inputs: Tensor | None) -> Tensor:
    """All results of an op require a gradient where one does; here a result does where its own inputs do."""
    return result if any(t is not None and t.requires_grad for t in inputs) else result.detach()


def _log_q(posterior: fastelbo.Posterior, *inputs: Tensor | None) -> Tensor:
    """log q(z | x) without its constant, next to which the other terms may leave little.

    z - mu is free of mu: without the noise's and logvar's gradient there is none.
    """
    size = torch.Size(posterior.mu.shape[posterior.kl.dim() :]).numel()
    return _of(posterior.log_q + 0.5 * math.log(2 * math.pi) * size, *inputs)


def log_prob(d: Draw) -> Case:
    options = {"likelihood": d.likelihood}

    def call(recon, second, third, fourth, x, mask):
        return fastelbo.log_prob(joined(recon, second, third, fourth), x, mask=mask, **options)

    return Case(call, [*d.parameters(d.chance(0.6)), *d.data()], options)


def elbo_loss(d: Draw) -> Case:
    options = {"likelihood": d.likelihood, "reduction": d.reduction(), "free_bits": d.any_of(0.0, 0.0, 0.2, 1.0)}
    parts, beta = d.parts(3), d.number(d.any_of(1.0, 0.0, 0.7, -2.0))
    shape = (d.B, *d.sizes(3, 2000))

    def call(recon, second, third, fourth, x, mask, mu, logvar, prior_mu, prior_logvar, beta):
        prior = {"prior_mu": prior_mu, "prior_logvar": prior_logvar}
        loss = fastelbo.elbo_parts(
            joined(recon, second, third, fourth), x, mu, logvar, **prior, mask=mask, beta=beta, **options
        )
        kl = _of(loss.kl, mu, logvar, prior_mu, prior_logvar)
        results = [loss.loss, _of(loss.log_likelihood, recon, second, third, fourth, x), kl]
        return [results[i] for i in parts]

    inputs = [*d.parameters(d.chance(0.6)), *d.data(), *d.latent(2, shape), *d.prior(shape), beta]
    return Case(call, inputs, options | {"parts": parts}, shared=(8, 9), like=6)


def iwae_loss(d: Draw) -> Case:
    options = {"likelihood": d.likelihood, "reduction": d.reduction()}
    parts = d.parts(3)

    def call(recon, second, third, fourth, x, mask, log_ratio):
        loss = fastelbo.iwae_parts(joined(recon, second, third, fourth), x, log_ratio, mask=mask, **options)
        results = [loss.loss, _of(loss.log_likelihood, recon, second, third, fourth, x), loss.kl]
        return [results[i] for i in parts]

    return Case(call, [*d.parameters(True), *d.data(), *d.latent(1, (d.K, d.B), 3)], options | {"parts": parts})


def _estimator(d: Draw) -> tuple[dict[str, object], list[float | Tensor]]:
    """The options of an estimator that are no inputs, and its alpha and beta."""
    name = d.any_of(*(e for e in ESTIMATORS if ESTIMATORS[e].fewest <= d.K))
    options = {"reduction": d.reduction(), "estimator": name}
    options["groups"] = d.any_of(*(g for g in range(1, d.K + 1) if d.K % g == 0))
    numbers = {"alpha": d.any_of(-0.7, 0.0, 0.5, 1.0, 2.0), "beta": d.any_of(0.0, 0.3, 1.0)}
    return options, [d.number(v) if n in ESTIMATORS[name].options else v for n, v in numbers.items()]


def multi_sample_loss(d: Draw) -> Case:
    """Drawn and judged together with rsample. z is a result of its own: it has the upstream gradient of a decoder."""
    options, numbers = _estimator(d)
    options["likelihood"] = d.likelihood
    parts, K = d.parts(5), d.K
    shape = (d.B, *d.sizes(2, max(2000 // K, 1)))

    def call(recon, second, third, fourth, x, mask, mu, logvar, prior_mu, prior_logvar, eps, alpha, beta):
        posterior = fastelbo.rsample(mu, logvar, K, prior_mu=prior_mu, prior_logvar=prior_logvar, eps=eps)
        loss = fastelbo.multi_sample_parts(
            joined(recon, second, third, fourth), x, posterior, mask=mask, alpha=alpha, beta=beta, **options
        )
        kl = _of(loss.kl, mu, logvar, prior_mu, prior_logvar)
        log_likelihood = _of(loss.log_likelihood, recon, second, third, fourth, x)
        results = [loss.loss, log_likelihood, kl, posterior.z, posterior.log_ratio]
        return [results[i] for i in parts]

    latent = [*d.latent(2, shape), *d.prior(shape), *d.latent(1, d.samples(shape))]
    return Case(
        call, [*d.parameters(True), *d.data(), *latent, *numbers], options | {"parts": parts}, shared=(8, 9), like=6
    )


def bound_loss(d: Draw) -> Case:
    """Of any log p(x | z), with parameters of q that may differ per sample."""
    options, numbers = _estimator(d)
    batch_dims = d.any_of(1, 1, 2)
    draws = {"batch_dims": 2} if batch_dims == 2 else {"num_samples": d.K}
    whole = (d.K, d.B, *(d.sizes(2, max(2000 // d.K, 1)) or (1,)))
    shape = whole if batch_dims == 2 else whole[1:]
    parts = d.parts(5)
    weight = 1.0 if options["estimator"] == "rws" else d.number(d.any_of(1.0, 0.0, 0.4))
    extra = d.tensor((d.K, d.B)) if d.chance(0.5) else None

    def call(log_p, mu, logvar, prior_mu, prior_logvar, eps, extra, alpha, beta, weight):
        q = fastelbo.rsample(mu, logvar, prior_mu=prior_mu, prior_logvar=prior_logvar, eps=eps, **draws)
        numbers = {"alpha": alpha, "beta": beta, "kl_weight": weight, "log_ratio": extra}
        loss = fastelbo.bound_parts(log_p, q, **numbers, **options)
        kl = _of(loss.kl, mu, logvar, prior_mu, prior_logvar)
        results = [loss.loss, kl, q.z, q.log_ratio, _log_q(q, mu, logvar, eps)]
        return [results[i] for i in parts]

    latent = [*d.latent(2, shape), *d.prior(shape), *d.latent(1, whole)]
    inputs = [*d.latent(1, (d.K, d.B), 3), *latent, extra, *numbers, weight]
    return Case(call, inputs, options | {"parts": parts, "batch_dims": batch_dims}, shared=(3, 4), like=1)


def rsample(d: Draw) -> Case:
    way = d.any_of("one", "samples", "kept", "batch_dims")
    shape = (d.B, *d.sizes(3, 2000))
    K = {"one": None, "samples": d.K, "kept": d.K, "batch_dims": None}[way]
    if way == "batch_dims":  # [K, B, *latent], of one latent dimension or more
        shape = (d.any_of(1, 2, 3), d.B, *(shape[1:] or (1,)))
    draws = {"batch_dims": 2} if way == "batch_dims" else {"num_samples": K}
    parts, seed, first = d.parts(4), d.random.randrange(-(2**63), 2**63), d.random.randrange(2 ** d.any_of(1, 20, 40))
    source = {"seed": seed} if way == "batch_dims" else {"seed": seed, "first_sample": first}
    zero = torch.zeros(shape, dtype=compute_dtype(d.dtype))
    noise = fastelbo.rsample(zero, zero, **source, **draws).z
    count = d.any_of(0, 1, 5, 30) if d.B else 0
    rows = [torch.tensor([d.random.randrange(n) for _ in range(count)], dtype=torch.int64) for n in (d.K, d.B or 1)]
    kept = fastelbo.Kept(*rows, torch.ones(count))

    def sample(options: Callable[[Tensor], dict[str, object]]) -> Call:
        def call(mu, logvar, prior_mu, prior_logvar, eps):
            prior, given = {"prior_mu": prior_mu, "prior_logvar": prior_logvar}, options(eps)
            p = fastelbo.rsample(mu, logvar, **prior, **given)
            drawn = [p.z, p.log_ratio, _log_q(p, logvar, eps)]
            if way == "kept" and "kept" not in given:  # the twin draws all
                drawn = [t[kept.sample, kept.datum] for t in drawn]
            z, log_ratio, log_q = drawn
            kl = _of(p.kl, mu, logvar, prior_mu, prior_logvar)
            results = [_of(z, mu, logvar, eps), kl, log_ratio, log_q]
            return [results[i] for i in parts]

        return call

    inputs = [*d.latent(2, shape), *d.prior(shape)]
    by_noise = sample(lambda eps: {"eps": eps, **draws})
    read = {"K": K, "way": way, "parts": parts}
    if way != "kept" and d.chance(0.5):
        return Case(by_noise, [*inputs, d.tensor(noise.shape)], read | {"noise": "eps"}, shared=(2, 3))
    by_seed = sample(lambda _: {**source, **({"kept": kept} if way == "kept" else draws)})
    return Case(by_seed, [*inputs, noise], read | {"seed": seed, "first": first, "rows": rows}, by_noise, shared=(2, 3))


def gaussian_kl(d: Draw) -> Case:
    options = {"free_bits": d.any_of(0.0, 0.0, 0.3)}
    shape = (d.B, *d.sizes(4, 5000))

    def call(*latent):
        return fastelbo.gaussian_kl(*latent, **options)

    return Case(call, [*d.latent(2, shape, d.any_of(1.0, 1.0, 0.01, 4.0)), *d.prior(shape)], options, shared=(2, 3))


def log_mean_exp(d: Draw) -> Case:
    shape = tuple(s or 1 for s in (d.K, *d.sizes(3, 5000)))
    options = {"dim": d.random.randrange(-len(shape), len(shape))}
    return Case(lambda log_w: fastelbo.log_mean_exp(log_w, **options), d.latent(1, shape, d.any_of(1, 30)), options)


def mixture_log_prob(d: Draw) -> Case:
    options = {"per_dimension": d.chance(0.4)}
    M, C, lead = d.any_of(1, 2, 3, 5, 9, 17, 40), d.any_of(1, 2, 3, 31, 32, 33, 70), d.sizes(3, 200)
    M = min(M, max(1, LARGEST // (C * max(1, math.prod(lead)))))
    components = d.latent(2, (C, M))
    weights = None
    if d.chance(0.7):
        whole = tuple(1 if d.chance(0.3) else size for size in lead)
        weights = d.tensor((*whole[d.random.randint(0, len(whole)) :], 1 if d.chance(0.1) else C))

    def call(*given):
        return fastelbo.mixture_log_prob(*given, **options)

    z = d.tensor((*lead, M))
    return Case(call, [z, *components, weights], options, roundings=4)


OPS = (log_prob, log_prob, elbo_loss, elbo_loss, iwae_loss, multi_sample_loss, multi_sample_loss)
OPS = (*OPS, bound_loss, rsample, rsample, gaussian_kl, log_mean_exp, mixture_log_prob)


def case_of(number: int) -> Case:
    draw = Draw(number)
    op = draw.any_of(*OPS)
    case = op(draw)
    return case._replace(options={"op": op.__name__, **case.options})


def _shared(case: Case) -> dict[int, int]:
    """Among them the parameters of a mixture: by one logit the terms have either sign, and one rounding of it."""
    found = dict.fromkeys(case.shared, case.like)
    if case.options.get("likelihood") == "nb_mixture":
        recon, *others = case.inputs[:4]
        found |= {i + 1: 0 for i, t in enumerate(others) if t.shape != recon.shape}
    return found


def judge(number: int) -> None:
    case = case_of(number)
    # the gradient by data is a sum over samples, which the data cannot be expanded to
    of_samples = "likelihood" in case.options and case.inputs[4].dim() < case.inputs[0].dim()
    try:
        check(case.call, *case.inputs, twin=case.twin, shared=_shared(case), roundings=case.roundings or of_samples)
    except Exception as error:
        repeat = f"python tests/ops/test_random_walk.py {number}"
        raise AssertionError(f"case {number} of the random walk; to repeat it: {repeat}\n{case}\n{error}") from error


@pytest.mark.skipif(SECONDS > 0, reason="FASTELBO_WALK_SECONDS says how long to walk")
@pytest.mark.parametrize("part", range(PARTS))
def test_the_first_cases(part):
    for number in range(part, CASES, PARTS):
        judge(number)


@pytest.mark.skipif(SECONDS == 0, reason="FASTELBO_WALK_SECONDS is not set")
def test_as_long_as_it_is_asked_to(capsys):
    """Every failure is shown, not the first alone."""
    number, end, failures = START, time.monotonic() + SECONDS, []
    while time.monotonic() < end:
        try:
            judge(number)
        except AssertionError as error:
            failures.append(str(error))
        number += 1
    with capsys.disabled():
        print(f"\n{number - START} cases, {START} to {number - 1}")
    assert not failures, f"{len(failures)} cases failed:\n\n" + "\n\n".join(failures)


def test_a_failure_says_how_to_repeat_it(monkeypatch):
    """The op alone, not its twin, is off by 1e-5 of its value."""
    right = fastelbo.log_prob

    def wrong(recon, x, **options):
        result = right(recon, x, **options)
        return result if fastelbo._internal.ops._mode.blocks else result * (1 + 1e-5)

    monkeypatch.setattr(fastelbo, "log_prob", wrong)
    number = next(n for n in range(1000) if case_of(n).options["op"] == "log_prob" and case_of(n).inputs[0].numel())
    with pytest.raises(AssertionError, match=f"python tests/ops/test_random_walk.py {number}"):
        judge(number)


if __name__ == "__main__":
    for argument in sys.argv[1:]:
        print(case_of(int(argument)))
        judge(int(argument))
