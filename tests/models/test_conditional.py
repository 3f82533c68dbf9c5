"""Conditions, masks and priors of a VAE, its state dict, `load` and `importance_weights`."""

import copy
import json
import math
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from toys import log_normal

import fastelbo
from fastelbo import VAE, VAELoss
from fastelbo.commands import cli
from fastelbo.models.kept_samples import kept_parts

B, D, M, C, K = 5, 6, 3, 4, 7
OBJECTIVES = [("elbo", 1), ("elbo", K), ("stl", K), ("iwae", K), ("dreg", K), ("rws", K)]
every_objective = pytest.mark.parametrize("objective, samples", OBJECTIVES, ids=str)


class Joined(nn.Module):
    """A network of its input and the condition."""

    def __init__(self, first: int, last: int) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(first + C, 8), nn.Tanh(), nn.Linear(8, last))

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        return self.body(torch.cat([x, condition], -1))


class Prior(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(C, 2 * M)

    def forward(self, condition: Tensor) -> tuple[Tensor, Tensor]:
        mu, logvar = self.body(condition).chunk(2, -1)
        return mu, logvar


pytestmark = pytest.mark.usefixtures("double")


def conditional() -> tuple[VAE, Tensor, Tensor, Tensor]:
    model = VAE(Joined(D, 2 * M), Joined(M, D), prior=Prior())
    return model, torch.rand(B, D), F.one_hot(torch.arange(B) % C, C).double(), torch.rand(B, D) < 0.7


def by_hand(model: VAE, x: Tensor, c: Tensor, mask: Tensor, eps: Tensor, upstream: Tensor) -> list[Tensor]:
    """Minus the iwae bound per datum, in plain PyTorch."""
    clean = torch.where(mask, x, 0.0)
    mu, logvar = model.encoder(clean, c).chunk(2, -1)
    z = mu + torch.exp(0.5 * logvar) * eps
    logits = model.decoder(z, c.expand(len(eps), *c.shape))
    terms = F.binary_cross_entropy_with_logits(logits, clean.expand_as(logits), reduction="none")
    ratio = log_normal(z, *model.prior(c)) - log_normal(z, mu, logvar)
    loss = math.log(len(eps)) - torch.logsumexp(ratio - (terms * mask).sum(-1), 0)
    return [loss.detach(), *torch.autograd.grad(loss, list(model.parameters()), upstream)]


@pytest.mark.parametrize("hole", [0.5, math.nan])
def test_condition_mask_and_prior(hole):
    model, x, c, mask = conditional()
    x = torch.where(mask, x, hole)
    eps, upstream = torch.randn(K, B, M), torch.randn(B)
    options = {"condition": c, "mask": mask, "eps": eps, "num_samples": K, "reduction": "none"}
    loss = model.loss(x, objective="iwae", **options)
    found = [loss.detach(), *torch.autograd.grad(loss, list(model.parameters()), upstream)]
    for ours, theirs in zip(found, by_hand(model, x, c, mask, eps, upstream), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)
    given = {name: options.pop(name) for name in ("condition", "mask", "eps", "reduction")}
    assert torch.equal(loss, VAELoss(model, "iwae", **options)(x, **given))


@every_objective
def test_data_count_by_themselves(objective, samples):
    """Each datum's loss is that of a batch of one: conditions go with their data, however K and B are folded."""
    model, x, c, mask = conditional()
    eps = torch.randn(*(() if (objective, samples) == ("elbo", 1) else (samples,)), B, M)
    options = {"objective": objective, "num_samples": samples, "reduction": "none"}
    whole = model.loss(x, condition=c, mask=mask, eps=eps, **options)
    for b in range(B):
        row = slice(b, b + 1)
        one = model.loss(x[row], condition=c[row], mask=mask[row], eps=eps[..., row, :], **options)
        torch.testing.assert_close(one, whole[row], rtol=1e-12, atol=1e-12)
    parts = model.parts(x, condition=c)
    expected = torch.distributions.kl_divergence(
        *(torch.distributions.Normal(m, torch.exp(0.5 * v)) for m, v in (model.encode(x, c), model.prior(c)))
    )
    torch.testing.assert_close(parts.kl, expected.sum(-1), rtol=1e-10, atol=1e-12)


def test_reconstruct_sees_what_the_mask_leaves():
    model, x, c, mask = conditional()
    found = model.reconstruct(torch.where(mask, x, math.nan), c, mask=mask)
    mu, _ = model.encoder(torch.where(mask, x, 0.0), c).chunk(2, -1)
    torch.testing.assert_close(found, torch.sigmoid(model.decoder(mu, c)), rtol=1e-12, atol=0)


@pytest.mark.parametrize("shape", [(1, D), (D,), (B, 1)], ids=str)
def test_kept_samples(shape):
    model, x, c, _ = conditional()
    mask = torch.rand(shape) < 0.7
    options = {"objective": "dreg", "num_samples": K, "condition": c, "mask": mask, "seed": 3}
    parameters, whole = list(model.parameters()), model.loss(x, **options)
    for keep in (K - 1, 2):
        torch.testing.assert_close(model.loss(x, keep=keep, **options), whole, rtol=1e-12, atol=1e-12)
    # all samples kept by the functions that keep fewer: the gradient is the whole one
    row = fastelbo.Objective("dreg", num_samples=K).row
    parts, _ = kept_parts(model, x, row, K, K, condition=c, mask=mask, reduction="mean", seed=3, generator=None)
    for ours, theirs in zip(
        torch.autograd.grad(parts.loss, parameters), torch.autograd.grad(whole, parameters), strict=True
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)


def test_marginal_likelihood_of_a_linear_model():
    """With a Gaussian likelihood of a linear decoder, p(x | c) of what the mask leaves is known."""
    decoder, prior = nn.Linear(M, D), Prior()

    class Conditioned(nn.Module):
        def forward(self, z: Tensor, condition: Tensor) -> Tensor:
            return decoder(z)

    model = VAE(Joined(D, 2 * M), Conditioned(), "gaussian", prior=prior, latent_shape=(M,))
    x, c, mask = torch.randn(B, D), torch.randn(B, C), torch.rand(B, D) < 0.7
    with torch.no_grad():
        mu, logvar = prior(c)
        found = {
            proposal: model.log_marginal(
                torch.where(mask, x, math.nan), 40_000, condition=c, mask=mask, proposal=proposal, seed=1
            )
            for proposal in ("posterior", "prior")
        }
        for b in range(B):
            W, mean = decoder.weight[mask[b]], decoder(mu[b])[mask[b]]
            covariance = W @ torch.diag(logvar[b].exp()) @ W.mT + torch.eye(len(W))
            exact = torch.distributions.MultivariateNormal(mean, covariance).log_prob(x[b, mask[b]])
            for estimate in found.values():
                assert abs(estimate.log_prob[b] - exact) < 5 * estimate.std_error[b] < 0.5
        weights = fastelbo.importance_weights(model, x, 40_000, condition=c, mask=mask, seed=1)
        same = model.log_marginal(x, 40_000, condition=c, mask=mask, seed=1)
        torch.testing.assert_close(
            torch.logsumexp(weights.log_w, 0) - math.log(40_000), same.log_prob, rtol=1e-12, atol=0
        )
        W, mean = decoder.weight[mask[0]], decoder(mu[0])[mask[0]]
        gain = (
            torch.diag(logvar[0].exp())
            @ W.mT
            @ torch.linalg.inv(W @ torch.diag(logvar[0].exp()) @ W.mT + torch.eye(len(W)))
        )
        posterior_mean = mu[0] + gain @ (x[0, mask[0]] - mean)
        torch.testing.assert_close(weights.normalized.sum(0), torch.ones(B))
        estimate = (weights.normalized[:, 0, None] * weights.z[:, 0]).sum(0)
        torch.testing.assert_close(estimate, posterior_mean, rtol=0, atol=0.06)


@pytest.mark.parametrize("learned", [False, True])
def test_a_pair_is_a_prior(learned):
    mu, logvar = torch.randn(M), torch.randn(M)
    pair = (nn.Parameter(mu), nn.Parameter(logvar)) if learned else (mu, logvar)
    model = VAE(nn.Linear(D, 2 * M), nn.Linear(M, D), prior=pair, latent_shape=(M,))
    assert {"prior.mu", "prior.logvar"} <= set(model.state_dict())
    assert len(list(model.parameters())) == (6 if learned else 4)
    other = VAE(nn.Linear(D, 2 * M), nn.Linear(M, D), prior=(torch.zeros(M), torch.zeros(M)))
    other.load_state_dict(model.state_dict())
    x, eps = torch.rand(B, D), torch.randn(B, M)
    q = model.encode(x)
    loss = fastelbo.elbo_loss(model.decode(q[0] + torch.exp(0.5 * q[1]) * eps), x, *q, prior_mu=mu, prior_logvar=logvar)
    for m in (model, other, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        torch.testing.assert_close(m.loss(x, eps=eps), loss, rtol=1e-12, atol=0)
    z = torch.randn(50_000, M, generator=torch.Generator().manual_seed(1)) * torch.exp(0.5 * logvar) + mu
    drawn = model.sample(50_000, mean=True, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(drawn, torch.sigmoid(model.decoder(z)))


def test_samples_of_a_condition():
    model, x, c, _ = conditional()
    model.encode(x, c)
    generator = torch.Generator().manual_seed(1)
    drawn = model.sample(B, c, mean=True, generator=generator)
    mu, logvar = model.prior(c)
    eps = torch.randn(B, M, generator=torch.Generator().manual_seed(1))
    expected = torch.sigmoid(model.decoder(mu + torch.exp(0.5 * logvar) * eps, c))
    torch.testing.assert_close(drawn, expected)
    mean = torch.sigmoid(model.decoder(model.encoder(x, c).chunk(2, -1)[0], c))
    torch.testing.assert_close(model.reconstruct(x, c), mean)


@pytest.mark.parametrize("options", [{}, {"objective": "iwae", "num_samples": 6, "keep": 2}], ids=str)
def test_nan_is_refused_by_name(options):
    model = VAE(nn.Linear(D, 2 * M), nn.Linear(M, D))
    x = torch.rand(B, D)
    x[1, 2] = x[3, 0] = math.nan
    with pytest.raises(ValueError, match=r"x holds NaN in 2 places; give mask=~x.isnan\(\) to leave them out"):
        model.loss(x, **options)
    mask = torch.ones(B, D, dtype=torch.bool)
    mask[1, 2] = False
    with pytest.raises(ValueError, match="x holds NaN in 1 places where mask is not 0"):
        model.loss(x, mask=mask, **options)
    assert model.loss(x, mask=~x.isnan(), **options).isfinite()
    with torch.no_grad():
        model.encoder.weight[0, 0] = math.nan
    assert model.loss(torch.rand(B, D), **options).isnan(), "that of the model is the user's own"


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda m, x, c: m.loss(x, condition=c[:2]), "Sizes|sizes|condition"),
        (
            lambda m, x, c: m.decode(torch.zeros(2, B, M), c[:2]),
            r"condition must be \[B, ...\] with B=5 from z; got \(2, 4\)",
        ),
        (lambda m, x, c: m.loss(x, condition=c, mask=torch.ones(2)), r"mask must broadcast to the shape \(5, 6\) of x"),
        (lambda m, x, c: m(x, condition=c, beta=2.0), "unexpected keyword argument 'beta'"),
    ],
)
def test_errors(call, message):
    model, x, c, _ = conditional()
    model.encode(x, c)
    with pytest.raises((ValueError, TypeError, RuntimeError), match=message):
        call(model, x, c)


class OneTensor(nn.Module):
    def forward(self) -> Tensor:
        return torch.zeros(M)


def test_a_prior_that_returns_no_pair():
    model = VAE(nn.Linear(D, 2 * M), nn.Linear(M, D), prior=OneTensor())
    with pytest.raises(TypeError, match=r"prior must return a pair of tensors \(mu, logvar\); got Tensor"):
        model.loss(torch.rand(B, D))


@pytest.mark.parametrize("options", [{}, {"objective": "dreg", "num_samples": 4}], ids=str)
def test_compiles_in_one_graph(options):
    torch._dynamo.reset()
    model, x, c, mask = conditional()
    model.encode(x, c)
    whole = VAELoss(model, **{"objective": "elbo", **options})
    found, compiled = [], (torch.compile(f, fullgraph=True, backend="aot_eager") for f in (model.loss, whole))
    for loss, given in zip((model.loss, *compiled), (options, options, {}), strict=True):
        value = loss(x, condition=c, mask=mask, seed=torch.tensor([3]), **given)
        found.append([value.detach(), *torch.autograd.grad(value, list(model.parameters()))])
    for other in found[1:]:
        torch.testing.assert_close(other, found[0], rtol=1e-10, atol=1e-12)


# ----------------------------------------------------------------------------------------------------------------------
# State dicts, and `load`.


def test_the_latent_shape_travels(tmp_path):
    def new() -> VAE:
        return VAE(nn.Linear(D, 2 * M), nn.Linear(M, D))

    trained, fresh, other = new(), new(), new()
    with pytest.raises(ValueError, match="latent_shape is not known yet"):
        fresh.sample(2)
    trained.encode(torch.rand(B, D))
    torch.save(trained.state_dict(), tmp_path / "state.pt")
    fresh.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    assert fresh.latent_shape == (M,) and fresh.sample(2).shape == (2, D)
    old = {name: t for name, t in trained.state_dict().items() if name != "_extra_state"}
    assert not any(other.load_state_dict(old)) and other.latent_shape is None
    nested = nn.ModuleDict({"vae": new()})
    nested.load_state_dict({f"vae.{name}": t for name, t in trained.state_dict().items()})
    assert nested["vae"].latent_shape == (M,)
    assert all(isinstance(t, Tensor) for t in trained.state_dict().values())


def test_load(tmp_path):
    torch.set_default_dtype(torch.float32)
    small = ["--epochs", "1", "--hidden", "16", "--latent-dim", "2", "--seed", "3"]
    assert cli.main(["train", *small, "--out", str(tmp_path / "vae")]) == 0
    assert cli.main(["train", "--model", "ppca", "--latent-dim", "3", "--out", str(tmp_path / "ppca")]) == 0
    vae, ppca = (fastelbo.load(tmp_path / name) for name in ("vae", "ppca"))
    assert isinstance(vae, VAE) and isinstance(ppca, fastelbo.PPCA) and not vae.training
    assert vae.sample(3).shape == (3, 8, 8) and ppca.n_components == 3
    assert torch.equal(vae.encoder[1].weight, fastelbo.load(str(tmp_path / "vae/checkpoint.pt")).encoder[1].weight)
    configs = [json.loads((tmp_path / name / "config.json").read_text()) for name in ("vae", "ppca")]
    assert configs[0]["model"] == "vae" and configs[0]["hidden"] == 16 and configs[0]["seed"] == 3
    assert configs[1]["model"] == "ppca" and configs[1]["latent_dim"] == 3
    with pytest.raises(FileNotFoundError):
        fastelbo.load(tmp_path)
    (tmp_path / "checkpoint.pt").write_bytes(b"nothing")
    with pytest.raises(ValueError, match="damaged"):
        fastelbo.load(tmp_path)
