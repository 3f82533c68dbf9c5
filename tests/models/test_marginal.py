"""LogMeanExp, VAE.log_marginal and the diagnostics, against what is known exactly."""

import math
from collections.abc import Callable

import pytest
import torch
from oracle import peak
from torch import Tensor
from toys import D, M, linear_gaussian, model_of

import fastelbo
from fastelbo import LogMeanExp
from fastelbo.models import marginal, pieces

inf, nan = float("inf"), float("nan")


def in_chunks(log_w: Tensor, size: int) -> LogMeanExp:
    total = LogMeanExp()
    for chunk in log_w.split(size):
        total.update(chunk)
    return total


def exact(log_w: Tensor) -> tuple[Tensor, ...]:
    """The four results from the definition, all weights at once."""
    w = torch.exp(log_w.double() - log_w.double().amax(0))
    K = len(w)
    mean = w.mean(0)
    return (
        log_w.double().amax(0) + mean.log(),
        w.sum(0).square() / w.square().sum(0),
        w.std(0) / math.sqrt(K) / mean,
        w.amax(0) / w.sum(0),
    )


@pytest.mark.parametrize("size", [1, 2, 3, 7, 50, 99, 100, 1000])
def test_any_chunking_gives_the_definition(size):
    """Also where the last chunk is shorter: the divisor is the number of samples, not chunks times their size."""
    log_w = 3 * torch.randn(100, 4, dtype=torch.float64) - 7000
    for actual, expected in zip(in_chunks(log_w, size).result(), exact(log_w), strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(in_chunks(log_w, size).result().log_prob, fastelbo.log_mean_exp(log_w))


def test_merge_is_update_with_all():
    log_w = 3 * torch.randn(100, 2, 3, dtype=torch.float64)
    whole = in_chunks(log_w, 100).result()
    left, right = in_chunks(log_w[:33], 10), in_chunks(log_w[33:], 9)
    kept = right.result()
    for total in (left.merge(right), LogMeanExp().merge(left), left.merge(LogMeanExp())):
        assert total.count == 100
        for actual, expected in zip(total.result(), whole, strict=True):
            torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)
    assert all(torch.equal(a, b) for a, b in zip(right.result(), kept, strict=True))


def test_extremes():
    columns = {
        "all impossible": [-inf, -inf, -inf, -inf],
        "one possible": [-inf, -7000.0, -inf, -inf],
        "equal": [-9000.0] * 4,
        "apart": [-60000.0, 0.0, 60000.0, -60000.0],
        "nan": [0.0, nan, 1.0, 2.0],
        "infinite": [0.0, inf, 1.0, 2.0],
    }
    log_w = torch.tensor(list(columns.values()), dtype=torch.float64).T
    for size in (1, 3, 4):
        log_p, ess, error, share = (
            dict(zip(columns, t.tolist(), strict=True)) for t in in_chunks(log_w, size).result()
        )
        assert (log_p["all impossible"], ess["all impossible"], error["all impossible"]) == (-inf, 0, inf)
        assert share["all impossible"] == 0
        assert log_p["one possible"] == pytest.approx(-7000 - math.log(4), abs=1e-9)
        assert (ess["one possible"], share["one possible"]) == (1, 1) and error["one possible"] == pytest.approx(1)
        assert (log_p["equal"], ess["equal"], error["equal"], share["equal"]) == (-9000, 4, 0, 0.25)
        assert log_p["apart"] == pytest.approx(60000 - math.log(4)) and ess["apart"] == 1
        assert all(math.isnan(t["nan"]) for t in (log_p, ess, error, share))
        assert log_p["infinite"] == inf and math.isnan(ess["infinite"])
    one = LogMeanExp().update(torch.tensor([[1.5]])).result()
    assert one.log_prob.item() == 1.5 and one.ess.item() == 1 and one.std_error.isnan().all()


def test_half_precision_weights_are_not_rounded_further():
    log_w = (-7000 + torch.randn(64, 3)).bfloat16()  # an ulp is 32 nats: the input decides, not the sum
    torch.testing.assert_close(in_chunks(log_w, 5).result().log_prob, exact(log_w)[0], rtol=1e-12, atol=0)


@pytest.mark.parametrize(
    "error, message, call",
    [
        (ValueError, "at least one sample", lambda: LogMeanExp().result()),
        (ValueError, "k of at least 1", lambda: LogMeanExp().update(torch.empty(0, 3))),
        (ValueError, "k of at least 1", lambda: LogMeanExp().update(torch.tensor(1.0))),
        (
            TypeError,
            "log_w must be float32, .* got int64",
            lambda: LogMeanExp().update(torch.ones(2, 3).long()),
        ),
        (ValueError, r"log_w must be \[k, 3\]", lambda: in_chunks(torch.ones(2, 3), 1).update(torch.ones(2, 4))),
    ],
)
def test_accumulator_arguments(error, message, call):
    with pytest.raises(error, match=message):
        call()


# ----------------------------------------------------------------------------------------------------------------------
# log_marginal


def off_posterior() -> tuple:
    """A model whose log p(x) is known, and whose q is wider than the posterior."""
    model, x, log_p = linear_gaussian()
    with torch.no_grad():
        model.encoder.bias[M:] += 0.5
    return model, x, log_p


def test_exact_posterior_gives_log_p_from_one_sample():
    model, x, log_p = linear_gaussian()
    for K in (1, 2, 7):
        found = model.log_marginal(x, K)
        torch.testing.assert_close(found.log_prob, log_p, rtol=0, atol=1e-9)
        torch.testing.assert_close(found.ess, torch.full_like(log_p, K), rtol=1e-9, atol=0)
        torch.testing.assert_close(found.max_weight, torch.full_like(log_p, 1 / K), rtol=1e-9, atol=0)
    assert (found.std_error < 1e-6).all()


def test_standard_error_is_that_of_repetition():
    """Over 300 seeds, the spread of the estimate is the standard error that each reports; the mean is log p(x)."""
    model, x, log_p = off_posterior()
    found = [model.log_marginal(x, 500, seed=seed) for seed in range(300)]
    estimates, errors = torch.stack([f.log_prob for f in found]), torch.stack([f.std_error for f in found])
    torch.testing.assert_close(estimates.std(0), errors.mean(0), rtol=0.15, atol=0)  # 300 draws: 4 % standard error
    bias = estimates.mean(0) + 0.5 * errors.square().mean(0) - log_p  # the bound's own bias, to second order
    assert (bias.abs() < 4 * errors.mean(0) / math.sqrt(300)).all()


def test_both_proposals_agree_where_both_converge():
    model, x, _ = off_posterior()
    x = model.decoder.bias.detach() + 0.3 * (x - model.decoder.bias.detach())  # where the prior has samples
    posterior, prior = (model.log_marginal(x, 200_000, proposal=p, seed=1) for p in ("posterior", "prior"))
    error = torch.sqrt(posterior.std_error.square() + prior.std_error.square())
    assert (error < 0.05).all() and ((posterior.log_prob - prior.log_prob).abs() < 4 * error).all()
    assert (prior.ess < posterior.ess).all()


@pytest.mark.parametrize("proposal", ["posterior", "prior"])
def test_chunks_draw_the_same_samples(proposal):
    model, x = model_of(), torch.rand(3, D, dtype=torch.float64)
    whole = model.log_marginal(x, 100, chunk_size=100, proposal=proposal, seed=5)
    for chunk in (1, 7, 33, 64, None):
        cut = model.log_marginal(x, 100, chunk_size=chunk, proposal=proposal, seed=5)
        for a, e in zip(cut, whole, strict=True):
            torch.testing.assert_close(a, e, rtol=1e-9, atol=1e-9)
    other = model.log_marginal(x, 100, proposal=proposal, seed=6)
    assert (other.log_prob != whole.log_prob).all()
    torch.manual_seed(3)
    first = model.log_marginal(x, 10, proposal=proposal)
    torch.manual_seed(3)
    again = model.log_marginal(x, 10, chunk_size=3, proposal=proposal)
    torch.testing.assert_close(again.log_prob, first.log_prob, rtol=1e-9, atol=1e-9)


def test_log_marginal_is_the_iwae_bound():
    """The same seed, the same samples: minus the loss, for a ragged chunk as well."""
    model, x = model_of(), torch.rand(3, D, dtype=torch.float64)
    bound = -model.loss(x, objective="iwae", num_samples=50, seed=9, reduction="none")
    torch.testing.assert_close(model.log_marginal(x, 50, chunk_size=7, seed=9).log_prob, bound, rtol=1e-6, atol=1e-6)


def test_encoder_runs_once_and_nothing_is_recorded():
    model, x = model_of(), torch.rand(3, D, dtype=torch.float64)
    calls = {"encoder": 0, "decoder": 0}
    for name in calls:
        hook = lambda *_, name=name: calls.__setitem__(name, calls[name] + 1)  # noqa: E731
        getattr(model, name).register_forward_hook(hook)
    assert not model.log_marginal(x, 20, chunk_size=3).log_prob.requires_grad
    assert calls == {"encoder": 1, "decoder": 7}
    assert torch.is_grad_enabled()
    for _ in marginal.log_weights(model, x, 4, chunk_size=2):
        assert torch.is_grad_enabled(), "a suspended generator must not leave gradients switched off"


def test_decoders_that_return_pairs_and_integer_data():
    for likelihood in ("gaussian", "laplace"):
        model = model_of(likelihood=likelihood)
        plain = model.decoder
        for second in (torch.tensor(0.3), torch.randn(D)):
            model.decoder = torch.nn.Sequential(plain, Pair(second.double()))
            for proposal in ("posterior", "prior"):
                x = torch.rand(3, D, dtype=torch.float64)
                found = model.log_marginal(x, 5, proposal=proposal, seed=1).log_prob
                assert found.shape == (3,) and found.isfinite().all()
    x = torch.randint(0, 256, (3, D), dtype=torch.uint8)
    a, b = (model_of().log_marginal(t, 5, seed=1).log_prob for t in (x, x.double() / 255))
    torch.testing.assert_close(a, b)


class Pair(torch.nn.Module):
    def __init__(self, second: Tensor) -> None:
        super().__init__()
        self.second = second

    def forward(self, mean: Tensor) -> tuple[Tensor, Tensor]:
        return mean, self.second


def test_memory_does_not_grow_with_the_samples():
    """In the same chunks: what 9,000 samples more would take is 3 MB in recon alone."""
    model, x = model_of(), torch.rand(4, D, dtype=torch.float64)
    few, many = (peak(lambda k=k: model.log_marginal(x, k, chunk_size=500)) for k in (1000, 10_000))
    assert many < few + 1e4, (few, many)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"num_samples": 0}, "num_samples must be at least 1; got 0"),
        ({"num_samples": 5, "chunk_size": 0}, "chunk_size must be at least 1; got 0"),
        ({"num_samples": 5, "proposal": "q"}, "proposal must be one of posterior, prior; got 'q'"),
        ({"num_samples": 5, "seed": 1, "generator": torch.Generator()}, "exclude each other"),
    ],
)
def test_log_marginal_arguments(options, message):
    with pytest.raises(ValueError, match=message):
        model_of().log_marginal(torch.rand(3, D, dtype=torch.float64), **options)


# ----------------------------------------------------------------------------------------------------------------------
# Diagnostics


def test_diagnostics_over_batches_are_those_of_all_data():
    mu = torch.randn(100, 4) * torch.tensor([1.0, 0.5, 0.05, 0.0]) + torch.tensor([0.0, 1000.0, 3.0, 1.0])
    logvar, log_w = 0.3 * torch.randn(100, 4), 2 * torch.randn(6, 100)
    drawn = fastelbo.rsample(mu, logvar, 6, seed=0)
    whole = fastelbo.diagnostics(drawn, log_w)
    meter = fastelbo.DiagnosticsMeter()
    for i in range(0, 100, 33):
        part = fastelbo.rsample(mu[i : i + 33], logvar[i : i + 33], 6, seed=0)
        meter.update(part, log_w[:, i : i + 33])
    kl = 0.5 * (mu.double().square() + logvar.double().exp() - 1 - logvar.double())
    w = torch.softmax(log_w.double(), 0)
    for found in (whole, meter.result()):
        torch.testing.assert_close(found.kl, kl.mean(0), rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(found.mu_variance, mu.double().var(0, correction=0), rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(found.ess, (1 / w.square().sum(0)).mean(), rtol=1e-9, atol=0)
        assert found.active_units == 2 and found.collapsed.tolist() == [False, False, True, True]
    assert fastelbo.diagnostics(drawn).ess.isnan()
    torch.testing.assert_close(whole.kl.sum(), drawn.kl.double().mean(), rtol=1e-6, atol=0)
    with pytest.raises(ValueError, match="at least one datum"):
        fastelbo.DiagnosticsMeter().result()


def test_diagnostics_of_a_general_prior():
    mu, logvar, p_mu, p_logvar = (torch.randn(9, 3) for _ in range(4))
    drawn = fastelbo.rsample(mu, logvar, 2, prior_mu=p_mu, prior_logvar=p_logvar[:1].expand(9, 3))
    torch.testing.assert_close(fastelbo.diagnostics(drawn).kl.sum(), drawn.kl.double().mean(), rtol=1e-5, atol=0)


@pytest.mark.parametrize(
    "log_w, error, message",
    [
        (torch.zeros(6, 5), ValueError, r"log_w must be \[K, B\] with B=9 from posterior; got \(6, 5\)"),
        (torch.zeros(9), ValueError, r"log_w must be \[K, B\] with B=9 from posterior; got \(9,\)"),
        (torch.zeros(9, 2), ValueError, r"log_w must be \[K, B\] with B=9 from posterior; got \(9, 2\)"),
        (torch.zeros(2, 6, 9), ValueError, r"log_w must be \[K, B\] with B=9 from posterior; got \(2, 6, 9\)"),
        (torch.zeros(0, 9), ValueError, r"log_w must be .* k of at least 1; got \(0, 9\)"),
        (torch.zeros(6, 9, dtype=torch.int64), TypeError, "log_w must be .*float.*int64"),
    ],
)
def test_diagnostics_refuse_weights_of_other_data(log_w, error, message):
    """And a refused batch leaves the figures as they were."""
    mu, logvar = torch.randn(9, 3), torch.randn(9, 3)
    drawn, good = fastelbo.rsample(mu, logvar, 6), torch.randn(6, 9)
    with pytest.raises(error, match=message):
        fastelbo.diagnostics(drawn, log_w)
    meter = fastelbo.DiagnosticsMeter().update(drawn, good)
    before = meter.result()
    with pytest.raises(error, match=message):
        meter.update(drawn, log_w)
    for a, e in zip(meter.result(), before, strict=True):
        assert torch.equal(a, e)


# ----------------------------------------------------------------------------------------------------------------------
# Pieces: what comes out does not depend on them, and beside it nothing grows with the data.


def conditional() -> tuple[fastelbo.VAE, Callable[[int], dict[str, Tensor]]]:
    """Of one batch, with a condition and a mask of its own for every datum."""

    class Joined(torch.nn.Linear):
        def forward(self, t: Tensor, condition: Tensor) -> Tensor:
            return super().forward(torch.cat([t, condition], 1))

    torch.manual_seed(0)
    model = fastelbo.VAE(Joined(D + 3, 2 * M), Joined(M + 3, D), latent_shape=(M,)).double()

    def options(n: int) -> dict[str, Tensor]:
        return {"condition": torch.randn(n, 3).double(), "mask": torch.rand(n, D) < 0.8}

    return model, options


@pytest.mark.parametrize("n", [31, 32, 33, 200])
def test_pieces_change_nothing(n, monkeypatch):
    model, options = conditional()
    x, given = torch.rand(n, D).double(), options(n)
    drawn = fastelbo.rsample(torch.randn(n, 3), torch.randn(n, 3), 6, prior_mu=torch.randn(3))

    def found() -> dict[str, Tensor]:
        with torch.no_grad():
            results = {"reconstruct": model.reconstruct(x, **given)}
        generator = torch.Generator().manual_seed(1)
        results["sample"] = model.sample(n, given["condition"], mean=True, generator=generator)
        for proposal in ("posterior", "prior"):
            estimate = model.log_marginal(x, 20, proposal=proposal, seed=1, **given)
            results |= {f"{proposal} {name}": t for name, t in estimate._asdict().items()}
        weights = fastelbo.importance_weights(model, x, 20, seed=1, **given)
        results |= {"log_w": weights.log_w, "z": weights.z}
        plain = fastelbo.VAE(torch.nn.Linear(D, 2 * M), torch.nn.Linear(M, D)).double()
        for p in plain.parameters():
            torch.nn.init.constant_(p, 0.1)
        results["one prior"] = plain.log_marginal(x, 20, proposal="prior", seed=1).log_prob
        figures = fastelbo.diagnostics(drawn, 3 * log_w)._asdict()
        return results | {f"diagnostics {name}": t for name, t in figures.items()}

    log_w = torch.randn(6, n)
    whole = found()
    torch.testing.assert_close(whole["reconstruct"], model.reconstruct(x, **given).detach(), rtol=1e-12, atol=1e-12)
    monkeypatch.setitem(pieces.PIECE_ELEMENTS, "cpu", 7 * D)
    seen: list[int] = []
    handle = model.decoder.register_forward_hook(lambda module, args, out: seen.append(len(out)))
    for name, t in found().items():
        torch.testing.assert_close(t, whole[name], rtol=1e-9, atol=1e-9, msg=lambda m, name=name: f"{name}: {m}")
    handle.remove()
    assert max(seen) <= max(16, 31 if n < 32 else 0)


def test_draws_in_pieces_are_those_of_the_likelihood():
    model = fastelbo.VAE(torch.nn.Linear(1, 2), torch.nn.Linear(1, 1), "poisson", latent_shape=(1,))
    torch.nn.init.zeros_(model.decoder.weight), torch.nn.init.constant_(model.decoder.bias, 1.0)
    drawn = model.sample(600_000, generator=torch.Generator().manual_seed(0))
    assert drawn.shape == (600_000, 1) and abs(drawn.mean().item() - math.e) < 0.02
    assert abs(drawn.var().item() - math.e) < 0.03


def test_a_condition_of_another_number_of_rows_is_refused_as_a_whole():
    model, options = conditional()
    for rows in (99, 101):
        with torch.no_grad():
            for call in (
                lambda c: model.sample(100, c),
                lambda c: model.reconstruct(torch.rand(100, D).double(), c),
                lambda c: model.log_marginal(torch.rand(100, D).double(), 3, condition=c),
            ):
                with pytest.raises(ValueError, match=rf"condition must be \[B, ...\] with B=100 .*; got \({rows}, 3\)"):
                    call(options(rows)["condition"])


class Wide(torch.nn.Sequential):
    """From one size to another by way of a hidden layer."""

    def __init__(self, first: int, last: int) -> None:
        super().__init__(torch.nn.Linear(first, 1000), torch.nn.ReLU(), torch.nn.Linear(1000, last))


def test_memory_beside_the_result_does_not_grow_with_the_data():
    """Latents of 4 numbers, weights and estimates may; recon and hidden layers of 2,000 data more would be 14 MB."""
    model = fastelbo.VAE(Wide(784, 8), Wide(4, 784))
    few, many = torch.rand(1000, 784), torch.rand(3000, 784)
    model.encode(few[:2])
    calls = {
        "sample": (lambda x: model.sample(len(x)), 784),
        "reconstruct": (model.reconstruct, 784),
        "log_marginal": (lambda x: model.log_marginal(x, 2), 0),
        "log_marginal, prior": (lambda x: model.log_marginal(x, 2, proposal="prior"), 0),
    }
    with torch.no_grad():
        for name, (call, result) in calls.items():
            sizes = [peak(lambda x=x, call=call: call(x)) - 4 * result * len(x) for x in (few, many)]
            assert sizes[1] - sizes[0] < 4e6, (name, sizes)
    drawn = [fastelbo.rsample(torch.zeros(n, 50), torch.zeros(n, 50), 3) for n in (20_000, 100_000)]
    sizes = [peak(lambda p=p: fastelbo.diagnostics(p, p.log_ratio)) for p in drawn]
    assert sizes[1] - sizes[0] < 4e6, sizes  # pieces are of nearly equal size
