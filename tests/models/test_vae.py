"""VAE, likelihoods and data: shapes, the folding of K, and losses against the float64 formulas."""

import math
import warnings

import pytest
import torch
from torch import Tensor, nn
from toys import LearnedVariance, M, ThreeParameters, dense

import fastelbo
from fastelbo import likelihoods, reference
from fastelbo._internal import domains
from fastelbo.losses import likelihood_mean, likelihood_sample
from fastelbo.models.vae import VAE

B, K = 5, 3


def convolutional() -> VAE:
    torch.manual_seed(0)
    encoder = nn.Conv2d(1, 2 * 2, 2, stride=2)
    return VAE(encoder, nn.ConvTranspose2d(2, 1, 2, stride=2)).double()


CASES = {
    "dense": (dense, (2, 3), (M,)),
    "conv": (convolutional, (1, 6, 4), (2, 3, 2)),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("num_samples", [None, 1, K])
def test_shapes(case, num_samples):
    make, event, latent = CASES[case]
    model, lead = make(), () if num_samples is None else (num_samples,)
    recon, posterior = model(torch.rand(B, *event).double(), num_samples)
    assert recon.shape == (*lead, B, *event)
    assert posterior.z.shape == (*lead, B, *latent)
    assert posterior.kl.shape == (B,) and posterior.log_ratio.shape == (*lead, B)
    assert model.reconstruct(torch.rand(B, *event).double()).shape == (B, *event)
    assert model.sample(7).shape == model.sample(7, mean=True).shape == (7, *event)


@pytest.mark.parametrize("case", CASES)
def test_decode_folds_k_and_b_in_order(case):
    make, event, latent = CASES[case]
    model = make()
    model.encode(torch.rand(B, *event).double())
    z = torch.randn(K, B, *latent).double()
    loop = torch.stack([model.decoder(z[k]) for k in range(K)])
    torch.testing.assert_close(model.decode(z), loop, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(model.decode(z[1]), loop[1], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("shape, full", [((), False), ((2, 3), False), ((1, 2, 3), False), ((), True)])
@pytest.mark.parametrize("num_samples", [1, K])
def test_pair_decoder_broadcasts_and_folds(shape, full, num_samples):
    model = dense(LearnedVariance(shape, full), "gaussian")
    x, eps = torch.randn(B, 2, 3).double(), torch.randn(num_samples, B, M).double()
    loss = model.loss(x, objective="iwae", num_samples=num_samples, eps=eps)
    mu, logvar = model.encode(x)
    log_w = []
    for k in range(num_samples):
        z = mu + torch.exp(logvar / 2) * eps[k]
        mean, lv = model.decoder(z)
        log_p = torch.distributions.Normal(mean, torch.exp(lv / 2).expand_as(mean)).log_prob(x).sum((1, 2))
        prior, posterior = torch.distributions.Normal(0.0, 1.0), torch.distributions.Normal(mu, torch.exp(logvar / 2))
        log_w.append(log_p + (prior.log_prob(z) - posterior.log_prob(z)).sum(1))
    expected = -(torch.logsumexp(torch.stack(log_w), 0) - math.log(num_samples)).mean()
    torch.testing.assert_close(loss, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("num_samples", [1, K])
@pytest.mark.parametrize("beta, free_bits", [(1.0, 0.0), (0.5, 0.0), (2.0, 0.1)])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_elbo_and_its_gradients(num_samples, beta, free_bits, reduction):
    model = dense()
    x = torch.rand(B, 2, 3).double()
    eps = torch.randn(*((K,) if num_samples > 1 else ()), B, M).double()

    def expected() -> Tensor:
        mu, logvar = model.encode(x)
        z = mu + torch.exp(logvar / 2) * eps
        logits = model.decoder(z.reshape(-1, M)).reshape(*z.shape[:-1], 2, 3)
        log_p = torch.distributions.Bernoulli(logits=logits, validate_args=False).log_prob(x).sum((-1, -2))
        log_p = log_p.mean(0) if num_samples > 1 else log_p
        q = torch.distributions.Normal(mu, torch.exp(logvar / 2))
        kl = torch.distributions.kl_divergence(q, torch.distributions.Normal(0.0, 1.0))
        kl = torch.where(kl.mean(0) >= free_bits, kl, free_bits)
        loss = beta * kl.sum(1) - log_p
        return {"mean": loss.mean(), "sum": loss.sum(), "none": loss}[reduction]

    options = {"num_samples": num_samples, "beta": beta, "free_bits": free_bits, "reduction": reduction}
    parts = model.parts(x, eps=eps, **options)
    torch.testing.assert_close(parts.loss, expected(), rtol=1e-10, atol=1e-10)
    assert parts.kl.shape == (B,) and parts.log_likelihood.shape == eps.shape[:-1]
    weight = torch.rand_like(parts.loss)
    parameters = list(model.parameters())
    ours = torch.autograd.grad(parts.loss, parameters, weight)
    torch.testing.assert_close(ours, torch.autograd.grad(expected(), parameters, weight), rtol=1e-9, atol=1e-10)


def test_iwae_bound_lies_above_the_elbo_and_is_per_datum():
    model, x = dense(), torch.rand(B, 2, 3).double()
    eps = torch.randn(50, B, M).double()
    bound = -model.loss(x, objective="iwae", num_samples=50, reduction="none", eps=eps)
    log_p, kl = model.parts(x, "iwae", num_samples=50, eps=eps)[1:]
    assert bound.shape == (B,) and (bound > log_p.mean(0) - kl).all()
    alone = -model.loss(x[2:3], objective="iwae", num_samples=50, reduction="none", eps=eps[:, 2:3])
    torch.testing.assert_close(alone, bound[2:3], rtol=1e-12, atol=0)


def test_noise_is_reproducible_by_seed_and_by_generator():
    model, x = dense(), torch.rand(B, 2, 3).double()
    assert model.loss(x, seed=3) == model.loss(x, seed=3) != model.loss(x, seed=4)
    first, second = (model.loss(x, generator=torch.Generator().manual_seed(5)) for _ in range(2))
    assert first == second
    torch.manual_seed(6)
    before = model.loss(x)
    assert model.loss(x) != before
    torch.manual_seed(6)
    assert model.loss(x) == before
    draws = [model.sample(4, generator=torch.Generator().manual_seed(7)) for _ in range(2)]
    assert torch.equal(*draws)


def test_ciwae_weighs_the_elbo_by_one_half_where_nothing_else_is_said():
    model, x = dense(), torch.rand(B, 2, 3).double()
    options = {"objective": "ciwae", "num_samples": K, "eps": torch.randn(K, B, M).double()}
    half, whole = (model.loss(x, beta=beta, **options) for beta in (0.5, 1.0))
    assert model.loss(x, **options) == half != whole


def test_encoder_may_return_a_pair():
    class Pair(nn.Module):
        def __init__(self, whole: nn.Module) -> None:
            super().__init__()
            self.whole = whole

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            out = self.whole(x)
            return out[:, :M], out[:, M:]

    halved, x = dense(), torch.rand(B, 2, 3).double()
    pair = VAE(Pair(halved.encoder), halved.decoder)
    assert pair.loss(x, seed=1) == halved.loss(x, seed=1)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.bool])
def test_integer_data(dtype):
    model = dense().float()
    x = torch.randint(0, 256 if dtype == torch.uint8 else 2, (B, 2, 3)).to(dtype)
    as_float = x.float() / 255 if dtype == torch.uint8 else x.float()
    for objective in ("elbo", "iwae"):
        options = {"objective": objective, "num_samples": 2, "seed": 1}
        torch.testing.assert_close(model.loss(x, **options), model.loss(as_float, **options), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(model.reconstruct(x), model.reconstruct(as_float))


@pytest.mark.parametrize("name", likelihoods.LIKELIHOODS)
def test_likelihood_draws_have_the_mean_and_density_of_the_reference(name):
    generator, row = torch.Generator().manual_seed(0), likelihoods.get(name)
    first = torch.tensor([0.2, 0.5, 0.9], dtype=torch.float64).expand(100_000, 3)
    positive = {"nb_mixture": (1.4, 0.5, 0.3), "beta_binomial": (1.4, 9.0)}
    second = 0.7 if name in ("nb_mean", "zinb_mean", "gamma_poisson") else -0.7
    values = positive.get(name, (second, 0.3))[: len(row.parameters) - 1]
    others = torch.tensor(values, dtype=torch.float64).unbind()
    recon = (first, *others) if others else first
    draws = likelihood_sample(recon, name, generator=generator)
    error = draws.std(0).max().item() / math.sqrt(len(draws))
    torch.testing.assert_close(draws.mean(0), likelihood_mean(recon, name)[0], rtol=0, atol=4 * error)
    # the mean of log p over draws from p is minus its entropy
    score = reference.log_prob([first, *others], draws, likelihood=name).mean()

    def by_sum(most: int) -> float:
        """Over all x that matter."""
        x = torch.arange(most + 1.0, dtype=torch.float64)[:, None].expand(-1, 3)
        log_p = row.log_prob(x, first[: most + 1], *others)
        return torch.special.entr(log_p.exp()).sum().item()

    entropy = {
        "gaussian": lambda: 3 * 0.5 * (likelihoods.LOG_2PI + 1 - 0.7),
        "laplace": lambda: 3 * (1 + math.log(2) - 0.7),
        "student_t": lambda: 3 * (torch.distributions.StudentT(others[1].exp()).entropy().item() - 0.7),
    }.get(name, lambda: by_sum(500 if row.domain == "counts" else 1))()
    assert abs(score.item() + entropy) < 0.02


# ----------------------------------------------------------------------------------------------------------------------
# Counts: three parameters, and integers.


@pytest.mark.parametrize(
    "log_theta, zero_logits, full", [((2, 3), (2, 3), True), ((), (2, 3), False), ((2, 3), (), False)]
)
@pytest.mark.parametrize("num_samples", [1, K])
def test_a_decoder_of_three_tensors(log_theta, zero_logits, full, num_samples):
    model = dense(ThreeParameters(log_theta, zero_logits, full), "zinb")
    x, eps = torch.randint(0, 5, (B, 2, 3)), torch.randn(num_samples, B, M).double()
    mu, logvar = model.encode(x)
    z = mu + torch.exp(logvar / 2) * eps
    log_w = []
    for k in range(num_samples):
        log_mean, theta, zeros = model.decoder(z[k])
        log_p = likelihoods.get("zinb").log_prob(x.double(), log_mean, theta, zeros).sum((1, 2))
        prior, posterior = torch.distributions.Normal(0.0, 1.0), torch.distributions.Normal(mu, torch.exp(logvar / 2))
        log_w.append(log_p + (prior.log_prob(z[k]) - posterior.log_prob(z[k])).sum(1))
    expected = -(torch.logsumexp(torch.stack(log_w), 0) - math.log(num_samples)).mean()
    loss = model.loss(x, objective="iwae", num_samples=num_samples, eps=eps)
    torch.testing.assert_close(loss, expected, rtol=1e-10, atol=1e-10)
    parameters = list(model.parameters())
    ours, theirs = (torch.autograd.grad(t, parameters, retain_graph=True) for t in (loss, expected))
    assert [g.shape for g in ours] == [p.shape for p in parameters]
    torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-10)
    recon = model(x, num_samples, eps=eps).recon
    assert len(recon) == 3 and recon[0].shape == (num_samples, B, 2, 3)
    assert recon[1].shape == log_theta and recon[2].shape == (recon[0].shape if full else zero_logits)
    torch.testing.assert_close(model.reconstruct(x), likelihood_mean(model.decoder(mu), "zinb"))
    assert model.sample(7).shape == model.sample(7, mean=True).shape == (7, 2, 3)
    for proposal in ("posterior", "prior"):
        found = model.log_marginal(x, 40, chunk_size=7, proposal=proposal, seed=3)
        whole = model.log_marginal(x.double(), 40, proposal=proposal, seed=3)
        torch.testing.assert_close(found.log_prob, whole.log_prob, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("dtype", [torch.uint8, *reference.COUNTS, torch.float32])
@pytest.mark.parametrize("name", ["poisson", "nb", "zinb"])
def test_the_encoder_sees_the_counts_themselves(dtype, name):
    seen = []

    class Encoder(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            seen.append(x)
            return super().forward(x.flatten(1))

    three = ThreeParameters((2, 3), (), False)

    class Decoder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.three = three

        def forward(self, z: Tensor):
            given = self.three(z)[: len(likelihoods.get(name).parameters)]
            return given if len(given) > 1 else given[0]

    model = VAE(Encoder(6, 2 * M), Decoder(), name).float()
    x = torch.randint(0, 100, (B, 2, 3))
    losses = [model.loss(data, num_samples=2, seed=1) for data in (x.to(dtype), x.float())]
    torch.testing.assert_close(*losses)
    assert all(t.dtype == torch.float32 and torch.equal(t, x.float()) for t in seen)


class _Exported(nn.Module):
    """torch.export takes modules: one method of a VAE."""

    def __init__(self, model: VAE, method: str, *args: int) -> None:
        super().__init__()
        self.model, self.method, self.args = model, method, args

    def forward(self, t: Tensor):
        out = getattr(self.model, self.method)(t, *self.args)
        return out if self.method != "forward" else (out.recon, *out.posterior[:3])


@pytest.mark.filterwarnings("error:.*side effects")
@pytest.mark.parametrize("strict", [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.parametrize("method, args", [("decode", ()), ("forward", ()), ("forward", (K,)), ("reconstruct", ())])
@pytest.mark.parametrize("kind", ["dense", "conv", "pair", "full pair", "three"])
def test_export_with_a_batch_of_any_size(kind, method, args, strict):
    if kind == "conv":
        model, event, latent = convolutional(), (1, 6, 4), (2, 3, 2)
    else:
        decoder = {
            "dense": lambda: None,
            "three": lambda: ThreeParameters((2, 3), (2, 3), True),
        }.get(kind, lambda: LearnedVariance((2, 3), kind == "full pair"))()
        likelihood = {"dense": "bernoulli", "three": "zinb"}.get(kind, "gaussian")
        model, event, latent = dense(decoder, likelihood), (2, 3), (M,)
    model.encode(torch.rand(1, *event).double())
    module, shape = _Exported(model, method, *args), latent if method == "decode" else event
    batch = {0: torch.export.Dim("batch")}
    program = torch.export.export(module, (torch.rand(B, *shape).double(),), dynamic_shapes=(batch,), strict=strict)
    for size in (1, 2, B, 16):
        t = torch.rand(size, *shape).double()
        torch.manual_seed(1)
        expected = module(t)
        torch.manual_seed(1)
        torch.testing.assert_close(program.module()(t), expected)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"objective": "elboo"}, "objective must be one of elbo, stl, iwae, .*; got 'elboo'"),
        ({"objective": "iwae", "beta": 0.5}, "beta has no effect"),
        ({"objective": "iwae", "beta": torch.tensor(1.0)}, "beta has no effect"),
        ({"objective": "iwae", "free_bits": 0.1}, "free_bits has no effect"),
        ({"alpha": 0.5}, "alpha has no effect"),
        ({"objective": "iwae", "groups": 2}, "groups has no effect"),
        ({"objective": "dreg", "alpha": 0.5}, "alpha has no effect"),
        ({"objective": "ciwae", "free_bits": 0.5}, "free_bits has no effect"),
        ({"objective": "miwae", "groups": 2, "num_samples": 3}, "groups must divide the number of samples K=3; got 2"),
        ({"num_samples": 0}, "num_samples must be at least 1"),
        ({"seed": 1, "generator": torch.Generator()}, "exclude each other"),
    ],
)
def test_loss_options_that_do_not_fit(options, message):
    with pytest.raises(ValueError, match=message):
        dense().loss(torch.rand(B, 2, 3).double(), **options)


def test_shapes_that_do_not_fit():
    model = dense()
    with pytest.raises(ValueError, match="latent_shape is not known yet"):
        model.sample(2)
    model.latent_shape = (M,)
    assert model.sample(2).shape == (2, 2, 3)
    with pytest.raises(ValueError, match=r"with latent=\(4,\); got \(5, 3\)"):
        model.decode(torch.randn(B, 3).double())
    with pytest.raises(ValueError, match='likelihood must be one of "bernoulli"'):
        VAE(model.encoder, model.decoder, "binomial")
    with pytest.raises(TypeError, match=r"x must be a float type, uint8 \(read as x / 255\) or bool; got int64"):
        model.encode(torch.zeros(B, 2, 3, dtype=torch.int64))
    with pytest.raises(TypeError, match="x must be counts: a float type, uint8, int16, int32 or int64; got bool"):
        VAE(model.encoder, model.decoder, "poisson").encode(torch.zeros(B, 2, 3, dtype=torch.bool))
    with pytest.raises(ValueError, match=r"even size on dim 1.*got a tensor \(5, 3\)"):
        VAE(nn.Linear(6, 3), model.decoder).encode(torch.rand(B, 6))
    with pytest.raises(ValueError, match=r"decoder must return \[15, \*event\]"):
        dense(nn.Flatten(0)).loss(torch.rand(B, 2, 3).double(), num_samples=K)
    with pytest.raises(TypeError, match=r"decoder must return a tensor, or a tuple .*; got a tuple of Tensor, tuple"):
        dense(nn.LSTM(M, 3)).loss(torch.rand(B, 2, 3).double())


class Halved(nn.Module):
    """After which nothing says that a sigmoid came before, but the numbers."""

    def forward(self, x: Tensor) -> Tensor:
        return x / 2


@pytest.mark.parametrize("options", [{}, {"objective": "iwae", "num_samples": 8, "keep": 4}], ids=str)
def test_probabilities_given_as_logits_are_said_once(options):
    x = torch.rand(8, 16)
    decoders = {
        "sigmoid": nn.Sequential(nn.Linear(2, 16), Halved(), nn.Sigmoid(), Halved()),
        "logits": nn.Linear(2, 16),
        "zeros": nn.Sequential(nn.Linear(2, 16), nn.Threshold(1e9, 0.0)),
    }
    for name, decoder in decoders.items():
        for likelihood in ("bernoulli", "bernoulli_probs"):
            if (name, likelihood) == ("logits", "bernoulli_probs"):
                continue
            model = VAE(nn.Linear(16, 4), decoder, likelihood)
            with warnings.catch_warnings(record=True) as told:
                warnings.simplefilter("always")
                model.loss(x, **options), model.loss(x, **options)
            found = [str(w.message) for w in told]
            assert len(found) == ((name, likelihood) == ("sigmoid", "bernoulli")), (name, found)
            assert all("takes logits: leave out the sigmoid, or take 'bernoulli_probs'" in text for text in found)


# ----------------------------------------------------------------------------------------------------------------------
# What contradicts: data, the decoder's last layer, the encoder's halves, latent_shape.


def flat(last: nn.Module | None = None, likelihood: str = "bernoulli", **options) -> VAE:
    decoder = nn.Linear(2, 16) if last is None else nn.Sequential(nn.Linear(2, 16), last)
    return VAE(nn.Linear(16, 4), decoder, likelihood, **options)


class Scaled(nn.Module):
    """A decoder of every parameter of a likelihood, of which one ends in a layer."""

    def __init__(self, likelihood: str, name: str, layer: nn.Module) -> None:
        super().__init__()
        self.names, self.name, self.layer = likelihoods.get(likelihood).parameters, name, layer
        self.parts = nn.ModuleList(nn.Linear(2, 16) for _ in self.names)

    def forward(self, z: Tensor) -> tuple[Tensor, ...]:
        parts = [part(z) for part in self.parts]
        return tuple(self.layer(t) if n == self.name else t for n, t in zip(self.names, parts, strict=True))


UNIT = torch.rand(8, 16)
OUTSIDE = {"images in [-1, 1]": 2 * UNIT - 1, "bytes as floats": 255 * UNIT, "one below": UNIT.clone()}
OUTSIDE["one below"][5, 3] = -0.01


@pytest.mark.parametrize("likelihood", ["bernoulli", "bernoulli_probs"])
@pytest.mark.parametrize("kind", OUTSIDE)
def test_data_outside_of_the_unit_interval_are_refused(kind, likelihood):
    x, refusal = OUTSIDE[kind], rf"x must lie in \[0, 1\] for likelihood '{likelihood}'; it goes from"
    last = nn.Sigmoid() if likelihood == "bernoulli_probs" else None
    for options in ({}, {"objective": "iwae", "num_samples": 8}, {"objective": "dreg", "num_samples": 8, "keep": 2}):
        model = flat(last, likelihood)
        for _ in range(2):  # not only once
            with pytest.raises(ValueError, match=refusal):
                model.loss(x, **options)
        with torch.no_grad(), pytest.raises(ValueError, match=refusal):
            flat(last, likelihood).loss(x, **options)
        assert model.loss(UNIT, **options).isfinite()
        assert model.loss(x, mask=(x >= 0) & (x <= 1), **options).isfinite()
    recon, q = flat(last, likelihood)(UNIT, 3, seed=1)
    domains._calls.clear()
    calls = {
        "log_prob": lambda x, **o: fastelbo.log_prob(recon, x, likelihood=likelihood, **o),
        "elbo_loss": lambda x, **o: fastelbo.elbo_loss(recon, x, q.mu, q.logvar, likelihood=likelihood, **o),
        "iwae_loss": lambda x, **o: fastelbo.iwae_loss(recon, x, q.log_ratio, likelihood=likelihood, **o),
        "multi_sample_loss": lambda x, **o: fastelbo.multi_sample_loss(recon, x, q, likelihood=likelihood, **o),
    }
    for call in calls.values():
        assert call(UNIT).isfinite().all() and call(x, mask=(x >= 0) & (x <= 1)).isfinite().all()
        with pytest.raises(ValueError, match=refusal):
            call(x)


@pytest.mark.parametrize(
    "likelihood, x, message",
    [
        (
            "poisson",
            torch.full((8, 16), -1.0),
            "x must be counts, at least 0, for likelihood 'poisson'; the lowest is -1",
        ),
        ("poisson", torch.full((8, 16), -1, dtype=torch.int32), "x must be counts"),
        ("gaussian", torch.full((8, 16), math.inf), "x must be finite; it goes from inf to inf"),
    ],
)
def test_other_domains(likelihood, x, message):
    with pytest.raises(ValueError, match=message):
        flat(likelihood=likelihood).loss(x)


def test_rounding_leaves_the_unit_interval():
    assert flat().loss(UNIT * (1 + 2e-5) / UNIT.max()).isfinite()


SQUASHING = {
    "Sigmoid": nn.Sigmoid(),
    "Tanh": nn.Tanh(),
    "Relu": nn.ReLU(),
    "Softplus": nn.Softplus(),
    "Softmax": nn.Softmax(1),
    "Hardtanh": nn.Hardtanh(),
    "Hardtanh of six": nn.ReLU6(),
    "Hardsigmoid": nn.Hardsigmoid(),
    "Softsign": nn.Softsign(),
    "Elu": nn.ELU(),
    "Elu of self-normalizing nets": nn.SELU(),
    "Celu": nn.CELU(),
    "Silu": nn.SiLU(),
    "Gelu": nn.GELU(),
    "Mish": nn.Mish(),
    "Hardswish": nn.Hardswish(),
    "LogSigmoid": nn.LogSigmoid(),
    "LogSoftmax": nn.LogSoftmax(1),
}


def data_of(likelihood: str) -> Tensor:
    return torch.poisson(3 * UNIT) if likelihoods.get(likelihood).domain == "counts" else UNIT


@pytest.mark.parametrize("kind", SQUASHING)
@pytest.mark.parametrize("options", [{}, {"objective": "iwae", "num_samples": 8, "keep": 4}], ids=["", "keep"])
def test_a_last_layer_that_reaches_no_logits_is_refused(kind, options):
    layer, name = SQUASHING[kind], kind.split()[0]
    for likelihood in ("bernoulli", "poisson", "nb", "zinb"):
        row = likelihoods.get(likelihood)
        for parameter in {row.parameters[0], *row.parameters} & {"logits", "log_rate", "log_mean", "zero_logits"}:
            decoder = Scaled(likelihood, parameter, layer)
            if len(row.parameters) == 1:
                decoder = nn.Sequential(nn.Linear(2, 16), layer, nn.Unflatten(1, (4, 4)), nn.Flatten())
            model = VAE(nn.Linear(16, 4), decoder, likelihood)
            refusal = rf"decoder ends in {name}, with {parameter} in .* leave {name} out"
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                with torch.no_grad():  # an evaluation before, such as Lightning's, has no graph
                    model.loss(data_of(likelihood), **options)
            with pytest.raises(ValueError, match=refusal):
                model.loss(data_of(likelihood), **options)


@pytest.mark.parametrize("layer", [nn.Sigmoid(), nn.Softplus(), nn.ReLU(), nn.Softmax(1)], ids=repr)
@pytest.mark.parametrize("likelihood", ["gaussian", "laplace", "student_t", "nb"])
def test_a_scale_where_its_logarithm_is_due_is_refused(likelihood, layer):
    name = likelihoods.get(likelihood).parameters[1]
    model = VAE(nn.Linear(16, 4), Scaled(likelihood, name, layer), likelihood)
    with pytest.raises(ValueError, match=rf"{name} in .*, as of a logarithm: leave"):
        model.loss(data_of(likelihood))


@pytest.mark.parametrize(
    "layer, x, refused",
    [
        (nn.Sigmoid(), UNIT, False),
        (nn.Sigmoid(), (255 * UNIT).byte(), False),
        (nn.Sigmoid(), (UNIT > 0.5).float() + 0.1 * torch.randn(8, 16), False),  # the noise is the likelihood's
        (nn.Sigmoid(), 2 * UNIT - 1, True),
        (nn.Sigmoid(), 255 * UNIT, True),
        (nn.Sigmoid(), torch.randn(8, 16), True),
        (nn.Tanh(), 2 * UNIT - 1, False),
        (nn.Tanh(), 3 * torch.randn(8, 16), True),
        (nn.ReLU(), 9 * UNIT, False),
        (nn.ReLU(), torch.randn(8, 16), True),
        (nn.Softplus(), -UNIT, True),
        (nn.Hardtanh(-3, 3), torch.randn(8, 16), False),
        (nn.Softmax(1), UNIT, True),
        (nn.Softmax(1), torch.softmax(torch.randn(8, 16), 1), False),
    ],
)
@pytest.mark.parametrize("likelihood", ["gaussian", "laplace"])
def test_a_mean_has_to_reach_the_data(layer, x, refused, likelihood):
    for model in (flat(layer, likelihood), VAE(nn.Linear(16, 4), Scaled(likelihood, "mean", layer), likelihood)):
        if refused:
            with pytest.raises(ValueError, match=r"decoder ends in .* with mean in"):
                model.loss(x)
            left = (x >= 0) & (x <= 0.5)
            if left.any() and not isinstance(layer, nn.Softmax):
                model.loss(x, mask=left)
        else:
            model.loss(x).backward()


def test_what_reaches_is_taken():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for last in (None, nn.LeakyReLU(), nn.PReLU(), nn.Hardtanh(-9, 9), nn.Tanhshrink(), nn.Identity()):
            flat(last).loss(UNIT).backward()
        VAE(nn.Linear(16, 4), Function(lambda z: 5 * torch.tanh(z.repeat(1, 8)))).loss(UNIT).backward()
        VAE(nn.Linear(16, 4), Function(lambda z: z.repeat(1, 8).clamp(max=10))).loss(UNIT).backward()
        flat(nn.Sigmoid(), "bernoulli_probs").loss(UNIT).backward()


class Function(nn.Module):
    def __init__(self, function) -> None:
        super().__init__()
        self.function = function

    def forward(self, z: Tensor) -> Tensor:
        return self.function(z)


def test_probabilities_have_to_be_some():
    for last in (None, nn.Tanh(), nn.Softplus()):
        model = flat(last, "bernoulli_probs")
        with torch.no_grad():
            (model.decoder if last is None else model.decoder[0]).weight.mul_(9)
        refusal = r"probabilities in \[0, 1\] for likelihood 'bernoulli_probs'; they go"
        for options in ({}, {"objective": "iwae", "num_samples": 8, "keep": 4}):
            with pytest.raises(ValueError, match=refusal):
                model.loss(UNIT, **options)
        domains._calls.clear()
        recon = model(UNIT, 3).recon
        with pytest.raises(ValueError, match=refusal):
            fastelbo.log_prob(recon, UNIT, likelihood="bernoulli_probs")
        inside = ((recon >= 0) & (recon <= 1)).all(0)
        assert fastelbo.log_prob(recon, UNIT, likelihood="bernoulli_probs", mask=inside).isfinite().all()


class Encoder(nn.Module):
    def __init__(self, *layers: nn.Module, pair: bool = False) -> None:
        super().__init__()
        self.layers, self.pair = nn.Sequential(*layers), pair

    def forward(self, x: Tensor):
        out = self.layers(x)
        return out.chunk(2, -1) if self.pair else out


def by_rows(*layers: nn.Module, **options) -> VAE:
    """x [B, 6, 8], latents [6, 2]."""
    return VAE(Encoder(*layers, pair=options.pop("pair", False)), nn.Linear(2, 8), **options)


@pytest.mark.parametrize(
    "layers",
    [
        (nn.Linear(8, 4),),
        (nn.Linear(8, 4, bias=False),),
        (nn.Linear(8, 4), nn.LayerNorm(4)),
        (nn.Linear(8, 4), nn.LeakyReLU(), nn.Dropout(0.1)),
        (nn.TransformerEncoderLayer(8, 2, 8, batch_first=True), nn.Linear(8, 4)),
    ],
    ids=["linear", "without bias", "norm", "activation", "transformer"],
)
def test_one_tensor_is_not_halved_along_rows(layers):
    x, refusal = (
        torch.rand(5, 6, 8),
        r"one tensor \(5, 6, 4\), which would be halved on dim 1: return out.chunk\(2, -1\)",
    )
    with pytest.raises(ValueError, match=refusal):
        by_rows(*layers).loss(x)
    stated = by_rows(*layers, latent_shape=(6, 2))
    with pytest.raises(ValueError, match=r"latent_shape=\(6, 2\) that was given; got \(3, 4\), half of one tensor"):
        stated.loss(x)
    by_rows(*layers, pair=True, latent_shape=(6, 2)).loss(x).backward()
    assert by_rows(*layers, latent_shape=(3, 4)).encode(x)[0].shape == (5, 3, 4)


def test_channels_are_halved():
    for encoder, event, latent in (
        (nn.Conv1d(6, 4, 3), (6, 8), (2, 6)),
        (nn.Conv2d(1, 4, 2, 2), (1, 6, 4), (2, 3, 2)),
        (nn.Sequential(nn.Flatten(), nn.Linear(48, 24), nn.Unflatten(1, (4, 6))), (6, 8), (2, 6)),
        (nn.Sequential(nn.Linear(8, 6), nn.Conv1d(6, 4, 1)), (6, 8), (2, 6)),
        (Encoder(nn.Linear(8, 4), Transposed()), (6, 8), (2, 6)),
    ):
        assert VAE(encoder, nn.Linear(1, 1)).encode(torch.rand(5, *event))[0].shape == (5, *latent)


class Transposed(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.mT


def test_a_latent_shape_that_was_given_stays():
    model, x = flat(latent_shape=(3,)), UNIT
    refusal = r"encoder must return latents of the latent_shape=\(3,\) that was given; got \(2,\)"
    for call in (model.encode, model.forward, model.loss, model.reconstruct):
        with pytest.raises(ValueError, match=refusal):
            call(x)
    assert model.latent_shape == (3,)
    other = flat()
    other.encode(x)
    model.load_state_dict(other.state_dict())
    assert model.latent_shape == (3,)
    learned = convolutional()  # of pictures of any size
    for size in ((6, 4), (8, 8)):
        learned.loss(torch.rand(2, 1, *size).double())
        assert learned.latent_shape == (2, size[0] // 2, size[1] // 2)


def test_what_is_compiled_or_traced_is_not_looked_at():
    x = 255 * UNIT
    model = flat(nn.Tanh())
    torch.compile(model.loss, backend="eager", fullgraph=True)(x)
    torch.func.vmap(lambda x: fastelbo.log_prob(torch.zeros(2, 16), x))(x.unflatten(0, (4, 2)))
    with pytest.raises(ValueError, match="x must lie"):
        model.loss(x)
