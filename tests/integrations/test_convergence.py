"""Short trainings by each package alone and with fastelbo, with other draws: they end at the same loss.

The losses before and after are the package's own, computed by its own classes in both cases.
"""

import logging
import statistics
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastelbo

SEEDS = 4
N, D, M = 96, 20, 3
Losses = tuple[float, float]  # before and after
logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
pytestmark = pytest.mark.filterwarnings("ignore")  # of the packages: no GPU, few workers, small batches


def patterns(*event: int) -> Tensor:
    """[N, *event] of 0 and 1: four patterns with one pixel in ten wrong."""
    generator = torch.Generator().manual_seed(0)
    pattern, wrong = torch.rand(4, *event, generator=generator), torch.rand(N, *event, generator=generator)
    return ((pattern < 0.4).repeat(N // 4, *[1] * len(event)) ^ (wrong < 0.1)).float()


def draws(fused: bool, seed: int) -> int:
    """The seed of a training, which is not that of the other training of the same initial weights."""
    return 10 * (SEEDS * fused + seed + 1)


def train(module: nn.Module, loss: Callable[[], Tensor], steps: int, lr: float) -> None:
    optimizer = torch.optim.Adam(module.parameters(), lr)
    for _ in range(steps):
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()


@torch.no_grad()
def judged(loss: Callable[[], Tensor | float], times: int = 5) -> float:
    """The loss, with the same noise before and after."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return statistics.fmean(float(loss()) for _ in range(times))


PYTHAE: dict[str, dict[str, float]] = {
    "VAE": {},
    "BetaVAE": {"beta": 2.0},
    "DisentangledBetaVAE": {"beta": 2.0, "C": 3.0},
    "VAMP": {"number_components": 4},
    "IWAE": {"number_samples": 6},
    "CIWAE": {"number_samples": 6},
    "MIWAE": {"number_gradient_estimates": 3, "number_samples": 2},
    "PIWAE": {"number_gradient_estimates": 3, "number_samples": 2},
}


def pythae(name: str, fused: bool, seed: int) -> Losses:
    from pythae import models

    from fastelbo.integrations import pythae as ours

    torch.manual_seed(seed)
    x = patterns(1, 4, 5)
    config = getattr(models, f"{name}Config")(
        input_dim=x.shape[1:], latent_dim=M, reconstruction_loss="bce", **PYTHAE[name]
    )
    plain, trained = (getattr(kind, name)(config) for kind in (models, ours if fused else models))

    def loss(model: nn.Module) -> Tensor:
        return model({"data": x}, epoch=1).loss

    plain.load_state_dict(trained.state_dict())
    before = judged(partial(loss, plain))
    torch.manual_seed(draws(fused, seed))
    train(trained, partial(loss, trained), steps=60, lr=2e-3)
    plain.load_state_dict(trained.state_dict())
    return before, judged(partial(loss, plain))


def scvi(name: str, fused: bool, seed: int) -> Losses:
    import anndata
    from scvi import model, settings

    from fastelbo.integrations import scvi as ours

    plain, trained = getattr(model, name), getattr(ours if fused else model, name)
    data = anndata.AnnData((patterns(D) * 5).numpy())
    models = []
    for kind in (plain, trained):
        settings.seed = seed
        kind.setup_anndata(data)
        models.append(kind(data, n_hidden=16, n_latent=M, dropout_rate=0.0, use_batch_norm="none"))
        models[-1].is_trained_ = True

    def loss() -> float:
        return -models[0].get_elbo()

    before = judged(loss)
    settings.seed = draws(fused, seed)
    quiet = {"enable_progress_bar": False, "logger": False, "enable_checkpointing": False, "early_stopping": False}
    rate = {"plan_kwargs": {"lr": 0.02, "n_epochs_kl_warmup": None}} if name == "SCVI" else {"lr": 0.02}
    models[1].train(max_epochs=25, accelerator="cpu", batch_size=N // 3, train_size=1.0, **rate, **quiet)
    models[0].module.load_state_dict(models[1].module.state_dict())
    models[0].module.eval()
    return before, judged(loss)


def diffusers(fused: bool, seed: int) -> Losses:
    from diffusers.models.autoencoders import autoencoder_kl, vae

    from fastelbo.integrations.diffusers import DiagonalGaussianDistribution

    torch.manual_seed(seed)
    x = patterns(1, 4, 4)[: N // 3]
    model = autoencoder_kl.AutoencoderKL(
        1, 1, ("DownEncoderBlock2D",), ("UpDecoderBlock2D",), (8,), latent_channels=2, norm_num_groups=4
    )

    def loss(ours: bool) -> Tensor:
        kind = DiagonalGaussianDistribution if ours else vae.DiagonalGaussianDistribution
        q = kind(model.encoder(x) if model.quant_conv is None else model.quant_conv(model.encoder(x)))
        z, kl = q.sample_with_kl() if ours else (q.sample(), q.kl())
        return 10 * (model.decode(z).sample - x).square().sum() / len(x) + kl.mean()

    before = judged(partial(loss, False))
    torch.manual_seed(draws(fused, seed))
    train(model, partial(loss, fused), steps=12, lr=0.02)
    return before, judged(partial(loss, False))


def lightning(fused: bool, seed: int) -> Losses:
    import lightning

    from fastelbo.integrations.lightning import LightningVAE

    class Plain(lightning.LightningModule):
        def __init__(self, model: fastelbo.VAE) -> None:
            super().__init__()
            self.model = model

        def training_step(self, x: Tensor, _: int = 0) -> Tensor:
            mu, logvar = self.model.encoder(x).chunk(2, 1)
            logits = self.model.decoder(mu + torch.exp(0.5 * logvar) * torch.randn_like(mu))
            bce = F.binary_cross_entropy_with_logits(logits, x, reduction="sum")
            return (bce - 0.5 * (1 + logvar - mu.square() - logvar.exp()).sum()) / len(x)

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.Adam(self.parameters(), 0.05)

    torch.manual_seed(seed)
    x = patterns(D)
    model = fastelbo.VAE(nn.Linear(D, 2 * M), nn.Linear(M, D))
    plain = Plain(model)
    before = judged(partial(plain.training_step, x))
    torch.manual_seed(draws(fused, seed))
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    trainer = lightning.Trainer(max_epochs=30, accelerator="cpu", enable_model_summary=False, **quiet)
    trainer.fit(LightningVAE(model, lr=0.05) if fused else plain, torch.utils.data.DataLoader(x, N // 2, shuffle=True))
    return before, judged(partial(plain.training_step, x))


def pyro(fused: bool, seed: int) -> Losses:
    import pyro
    from pyro import distributions, infer

    pyro.clear_param_store()
    torch.manual_seed(seed)
    x = patterns(D)
    encoder, decoder = nn.Linear(D, 2 * M), nn.Linear(M, D)

    def gaussian(ours: bool, mu: Tensor, logvar: Tensor) -> Any:
        if ours:
            return fastelbo.distributions.Gaussian(mu, logvar)
        return distributions.Normal(mu, torch.exp(0.5 * logvar)).to_event(1)

    def model(ours: bool) -> None:
        pyro.module("decoder", decoder)
        with pyro.plate("data", N):
            logits = decoder(pyro.sample("z", gaussian(ours, torch.zeros(M), torch.zeros(M))))
            plain = distributions.Bernoulli(logits=logits).to_event(1)
            pyro.sample("x", fastelbo.distributions.Bernoulli(logits) if ours else plain, obs=x)

    def guide(ours: bool) -> None:
        pyro.module("encoder", encoder)
        with pyro.plate("data", N):
            pyro.sample("z", gaussian(ours, *encoder(x).chunk(2, 1)))

    elbo = infer.Trace_ELBO()

    def loss() -> float:
        return elbo.loss(model, guide, False) / N

    before = judged(loss)
    torch.manual_seed(draws(fused, seed))
    svi = infer.SVI(model, guide, pyro.optim.Adam({"lr": 0.05}), elbo)
    for _ in range(40):
        svi.step(fused)
    return before, judged(loss)


def torch_geometric(fused: bool, seed: int) -> Losses:
    from torch_geometric import nn as plain

    from fastelbo.integrations import torch_geometric as ours

    class Encoder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.mu, self.logstd = plain.GCNConv(D, M), plain.GCNConv(D, M)

        def forward(self, x: Tensor, edges: Tensor) -> tuple[Tensor, Tensor]:
            return self.mu(x, edges), self.logstd(x, edges)

    torch.manual_seed(seed)
    x, node = patterns(D), torch.arange(N)  # a node has edges to those of its pattern
    edges = torch.cat([torch.stack([node, (node + 4 * step) % N]) for step in (1, 2, 5)], 1)
    other = torch.cat([torch.stack([node, (node + step) % N]) for step in (1, 2, 7)], 1)
    nets = Encoder()

    def loss(model: nn.Module) -> Tensor:
        z = model.encode(x, edges)
        return model.recon_loss(z, edges, other) + model.kl_loss() / N

    judge, trained = plain.VGAE(nets), (ours if fused else plain).VGAE(nets)
    before = judged(partial(loss, judge))
    torch.manual_seed(draws(fused, seed))
    train(trained, partial(loss, trained), steps=40, lr=0.05)
    return before, judged(partial(loss, judge))


ADAPTERS: dict[str, Callable[[bool, int], Losses]] = {
    **{f"pythae {name}": partial(pythae, name) for name in PYTHAE},
    **{f"scvi {name}": partial(scvi, name) for name in ("SCVI", "PEAKVI")},
    "diffusers": diffusers,
    "lightning": lightning,
    "pyro": pyro,
    "torch_geometric": torch_geometric,
}


@pytest.mark.parametrize("adapter", ADAPTERS)
def test_trainings_end_at_the_same_loss(adapter: str) -> None:
    """The means over four pairs differ by less than six standard errors, which Student's t with three degrees of
    freedom passes once in a hundred; one error is less than a twentieth of what is learned."""
    package = adapter.split()[0]
    pytest.importorskip(package, reason=f"{package} is not installed: make test-integrations installs it")
    pairs = [[ADAPTERS[adapter](fused, seed) for fused in (False, True)] for seed in range(SEEDS)]
    differences = [with_fastelbo - alone for (_, alone), (_, with_fastelbo) in pairs]
    learned = statistics.fmean(before - alone for (before, alone), _ in pairs)
    error = statistics.stdev(differences) / SEEDS**0.5
    assert abs(statistics.fmean(differences)) < 6 * error < 0.3 * learned
