"""Whole training steps of other packages with and without fastelbo, in the environment of `make test-integrations`:

    .venv-integrations/bin/python -m benchmarks.package_steps [--threads 1 2] [--only NAME...]

A step is zero_grad, forward, loss, backward and the optimizer's step, with the package's default networks. Contenders
take turns in one process, in random order; times are medians over rounds, and a ratio is the median of the ratios
within a round. benchmarks/scvi_step.py measures SCVI in more detail. Prints the table of docs/adapters.md.
"""

import argparse
import copy
import logging
import os
import warnings
from collections.abc import Callable
from functools import partial
from importlib.metadata import version
from statistics import median

import pyro
import torch
import torch.nn.functional as F
from diffusers.models.autoencoders import autoencoder_kl, vae
from pyro import distributions as dist
from pyro.infer import SVI, RenyiELBO, Trace_ELBO
from pythae import models
from scvi.module import PEAKVAE
from torch import Tensor, nn
from torch_geometric.nn import VGAE, GCNConv

import fastelbo
import fastelbo.distributions as fd
from benchmarks.machine import DISTURBED, facts, others_share
from benchmarks.scvi_step import steps_of
from benchmarks.turns import Step, measured
from fastelbo.integrations import diffusers as fused_diffusers
from fastelbo.integrations import pythae as fused_pythae
from fastelbo.integrations import torch_geometric as fused_geometric
from fastelbo.integrations.scvi import FusedPEAKVAE

B = 128
EVENT = (1, 28, 28)
Steps = dict[str, Step]  # "fastelbo", and the package as it is


def optimized(module: nn.Module, loss: Callable[[], Tensor]) -> Step:
    optimizer = torch.optim.Adam(module.parameters(), 1e-3, fused=True)

    def step() -> None:
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()

    return step


def images() -> Tensor:
    return (torch.rand(B, *EVENT, generator=torch.Generator().manual_seed(0)) < 0.3).float()


def networks(M: int, width: int) -> nn.ModuleDict:
    encoder = nn.Sequential(nn.Linear(784, width), nn.ReLU(), nn.Linear(width, 2 * M))
    return nn.ModuleDict(
        {"encoder": encoder, "decoder": nn.Sequential(nn.Linear(M, width), nn.ReLU(), nn.Linear(width, 784))}
    )


def script() -> Steps:
    """The VAE of PyTorch's examples: 784-400-20, a sigmoid, and sums."""
    x, nets = images().flatten(1), networks(20, 400)

    def before(nets: nn.ModuleDict) -> Tensor:
        mu, logvar = nets["encoder"](x).chunk(2, 1)
        recon = torch.sigmoid(nets["decoder"](mu + torch.randn_like(mu) * torch.exp(0.5 * logvar)))
        kl = -0.5 * torch.sum(1 + logvar - mu.pow(2) - logvar.exp())
        return F.binary_cross_entropy(recon, x, reduction="sum") + kl

    def after(nets: nn.ModuleDict) -> Tensor:
        mu, logvar = nets["encoder"](x).chunk(2, 1)
        recon = nets["decoder"](fastelbo.rsample(mu, logvar).z)
        return fastelbo.elbo_loss(recon, x, mu, logvar, reduction="sum")

    losses = {"fastelbo": after, "as it is": before}
    copies = {name: copy.deepcopy(nets) for name in losses}
    return {name: optimized(copies[name], partial(loss, copies[name])) for name, loss in losses.items()}


def of_pythae(name: str, **options: object) -> Steps:
    x, steps = images(), {}
    for who, module in (("fastelbo", fused_pythae), ("as it is", models)):
        config = getattr(models, f"{name}Config")(input_dim=EVENT, latent_dim=16, reconstruction_loss="bce", **options)
        model = getattr(module, name)(config)
        steps[who] = optimized(model, lambda model=model: model({"data": x}).loss)
    return steps


def pythae_nll() -> Steps:
    x, steps = images()[:10], {}
    for who, module in (("fastelbo", fused_pythae), ("as it is", models)):
        config = models.VAEConfig(input_dim=EVENT, latent_dim=16, reconstruction_loss="bce")
        model = module.VAE(config)

        def estimate(model: models.VAE = model) -> None:
            with torch.no_grad():
                model.get_nll(x, n_samples=1000, batch_size=100)

        steps[who] = estimate
    return steps


def of_pyro(num_particles: int, leave: bool) -> Steps:
    """Distributions of fastelbo in SVI, or a loss of fastelbo in its place."""
    x, nets, steps = images().flatten(1), networks(20, 400), {}
    many = {"num_particles": num_particles, "vectorize_particles": True, "max_plate_nesting": 1}
    elbo = Trace_ELBO() if num_particles == 1 else RenyiELBO(alpha=0, **many)

    def loss(nets: nn.ModuleDict) -> Tensor:
        mu, logvar = nets["encoder"](x).chunk(2, 1)
        q = fastelbo.rsample(mu, logvar, num_particles)
        return fastelbo.multi_sample_loss(nets["decoder"](q.z), x, q, reduction="sum")

    def svi(nets: nn.ModuleDict, name: str, fused: bool) -> Step:
        def gaussian(mu: Tensor, logvar: Tensor) -> dist.TorchDistribution:
            return fd.Gaussian(mu, logvar) if fused else dist.Normal(mu, torch.exp(0.5 * logvar)).to_event(1)

        def model() -> None:
            pyro.module(name, nets)
            with pyro.plate("data", B):
                z = pyro.sample("z", gaussian(torch.zeros(20), torch.zeros(20)))
                logits = nets["decoder"](z)
                px = fd.Bernoulli(logits) if fused else dist.Bernoulli(logits=logits).to_event(1)
                pyro.sample("x", px, obs=x)

        def guide() -> None:
            pyro.module(name, nets)
            with pyro.plate("data", B):
                pyro.sample("z", gaussian(*nets["encoder"](x).chunk(2, 1)))

        return SVI(model, guide, pyro.optim.Adam({"lr": 1e-3, "fused": True}), elbo).step

    ours, theirs = copy.deepcopy(nets), copy.deepcopy(nets)
    steps["fastelbo"] = optimized(ours, partial(loss, ours)) if leave else svi(ours, "ours", True)
    steps["as it is"] = svi(theirs, "theirs", False)
    return steps


def peakvi(regions: int) -> Steps:
    x = (torch.rand(B, regions, generator=torch.Generator().manual_seed(0)) < 0.1).float()
    tensors, steps = {"X": x, "batch": torch.zeros(B, 1, dtype=torch.long)}, {}
    for who, kind in (("fastelbo", FusedPEAKVAE), ("as it is", PEAKVAE)):
        module = kind(regions, n_batch=1)
        steps[who] = optimized(module, lambda module=module: module(tensors)[2].loss)
    return steps


def scvi_counts() -> Steps:
    found = steps_of("nb", 4000, False)
    return {"fastelbo": found["fastelbo"], "as it is": found["scvi"]}


def of_diffusers() -> Steps:
    """An AutoencoderKL of 2.6 million parameters on images [8, 3, 32, 32]."""
    x, steps = torch.rand(8, 3, 32, 32), {}
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    nets = autoencoder_kl.AutoencoderKL(block_out_channels=(32, 64), norm_num_groups=8, **blocks)

    def loss(nets: nn.Module, kind: type) -> Tensor:
        autoencoder_kl.DiagonalGaussianDistribution = kind
        posterior = nets.encode(x).latent_dist
        recon = nets.decode(posterior.sample()).sample
        return F.mse_loss(recon, x, reduction="sum") / 8 + 1e-6 * posterior.kl().mean()

    for who, module in (("fastelbo", fused_diffusers), ("as it is", vae)):
        ours = copy.deepcopy(nets)
        steps[who] = optimized(ours, partial(loss, ours, module.DiagonalGaussianDistribution))
    return steps


class GraphEncoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.mu, self.logstd = GCNConv(1433, 32), GCNConv(32, 16), GCNConv(32, 16)

    def forward(self, x: Tensor, edges: Tensor) -> tuple[Tensor, Tensor]:
        hidden = self.first(x, edges).relu()
        return self.mu(hidden, edges), self.logstd(hidden, edges)


def vgae() -> Steps:
    """A graph of the size of Cora: 2,708 nodes with 1,433 features, 10,556 edges."""
    generator = torch.Generator().manual_seed(0)
    x = (torch.rand(2708, 1433, generator=generator) < 0.01).float()
    edges, steps = torch.randint(0, 2708, (2, 10_556), generator=generator), {}

    def loss(model: VGAE) -> Tensor:
        z = model.encode(x, edges)
        return model.recon_loss(z, edges) + model.kl_loss() / 2708

    for who, kind in (("fastelbo", fused_geometric.VGAE), ("as it is", VGAE)):
        model = kind(GraphEncoder())
        steps[who] = optimized(model, partial(loss, model))
    return steps


CASES: dict[str, Callable[[], Steps]] = {
    "PyTorch's example VAE [128 x 784]": script,
    "Pythae VAE [128 x 784]": partial(of_pythae, "VAE"),
    "Pythae IWAE, K = 10": partial(of_pythae, "IWAE", number_samples=10),
    "Pythae VAMP": partial(of_pythae, "VAMP"),
    "Pythae get_nll, 1,000 samples": pythae_nll,
    "Pyro Trace_ELBO, distributions": partial(of_pyro, 1, False),
    "Pyro Trace_ELBO, a loss in its place": partial(of_pyro, 1, True),
    "Pyro RenyiELBO K = 10, distributions": partial(of_pyro, 10, False),
    "Pyro RenyiELBO K = 10, a loss in its place": partial(of_pyro, 10, True),
    "scvi-tools SCVI nb, 4,000 genes": scvi_counts,
    "scvi-tools PEAKVI, 10,000 regions": partial(peakvi, 10_000),
    "PyTorch Geometric VGAE, 2,708 nodes": vgae,
    "diffusers AutoencoderKL [8 x 3 x 32 x 32]": of_diffusers,
}
PACKAGES = ("pythae", "pyro-ppl", "scvi-tools", "torch_geometric", "diffusers")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--only", nargs="+", default=[""], help="cases whose name contains one of these")
    parser.add_argument("--seconds", type=float, default=6, help="per case and number of threads (default: 6)")
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore")
    for name in ("lightning.pytorch", "pythae", "scvi"):
        logging.getLogger(name).setLevel(logging.ERROR)

    allocator = {name: value for name, value in os.environ.items() if name.startswith("MALLOC_")}
    print(facts() | {name: version(name) for name in PACKAGES} | {"allocator": allocator or "default"})
    columns = [f"{n} thread{'s' * (n > 1)}" for n in arguments.threads]
    print(f"\n| whole step | {' | '.join(columns)} | ms with fastelbo |\n|{'---|' * (len(columns) + 2)}")
    share = others_share()
    for case, make in CASES.items():
        if not any(part.lower() in case.lower() for part in arguments.only):
            continue
        torch.manual_seed(0)
        pyro.clear_param_store()
        steps, cells = make(), []
        for threads in arguments.threads:
            torch.set_num_threads(threads)
            times = measured(steps, arguments.seconds)
            ratio = median(b / a for a, b in zip(times["fastelbo"], times["as it is"], strict=True))
            cells.append((f"{ratio:.2f}x", f"{median(times['fastelbo']):.2f}"))
        print(f"| {case} | {' | '.join(c[0] for c in cells)} | {', '.join(c[1] for c in cells)} |", flush=True)
    busy = 100 * share()
    print(f"\nother processes took {busy:.1f} % of the machine" + " (disturbed)" * (busy > DISTURBED))


if __name__ == "__main__":
    main()
