"""Whole training steps with a mixture in the loss, and the aggregated posterior of many data:

    python -m benchmarks.mixture_steps [--threads 1 2] [--seconds 10]

A VampPrior of 500 pseudo-inputs on a VAE of 28 x 28 pixels (B = 100, M = 40, two hidden layers of 300), and a
beta-TCVAE of 16 x 16 pixels (B = 2048, M = 10, two hidden layers of 256). A step is zero_grad, forward, loss, backward
and Adam's fused step. The contenders differ in the mixtures alone, which the others build as [N, C, M].
"""

import argparse
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn

import fastelbo
from benchmarks.machine import DISTURBED, facts, others_share
from benchmarks.plain import plain_mixture
from benchmarks.turns import Step, measured, report

Mixture = Callable[..., Tensor]


def networks(pixels: int, width: int, latent: int) -> tuple[nn.Module, nn.Module]:
    def layers(first: int, last: int) -> nn.Module:
        body = [nn.Linear(first, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU()]
        return nn.Sequential(*body, nn.Linear(width, last))

    torch.manual_seed(0)
    return layers(pixels, 2 * latent), layers(latent, pixels)


def vamp_prior(mixture: Mixture) -> tuple[nn.Module, Callable[[], Tensor]]:
    encoder, decoder = networks(784, 300, 40)
    model = nn.ModuleList([encoder, decoder])
    model.pseudo_inputs = nn.Parameter(torch.rand(500, 784))
    x, log_weights = torch.rand(100, 784).round(), torch.full((500,), -6.2146)

    def loss() -> Tensor:
        q = fastelbo.rsample(*encoder(x).chunk(2, 1))
        mu, logvar = encoder(model.pseudo_inputs).chunk(2, 1)
        under = q.under(mixture(q.z, mu, logvar, log_weights))
        return (under.kl - fastelbo.bernoulli_log_prob(decoder(q.z), x)).mean()

    return model, loss


def beta_tc(mixture: Mixture) -> tuple[nn.Module, Callable[[], Tensor]]:
    encoder, decoder = networks(256, 256, 10)
    x, log_weights = torch.rand(2048, 256), torch.full((2048,), -18.6)

    def loss() -> Tensor:
        q = fastelbo.rsample(*encoder(x).chunk(2, 1))
        log_q = mixture(q.z, q.mu, q.logvar, log_weights)
        log_qs = mixture(q.z, q.mu, q.logvar, log_weights, per_dimension=True).sum(1)
        return (-q.log_ratio + 5 * (log_q - log_qs) - fastelbo.bernoulli_log_prob(decoder(q.z), x)).mean()

    return nn.ModuleList([encoder, decoder]), loss


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--seconds", type=float, default=10, help="per step and number of threads (default: 10)")
    arguments = parser.parse_args()
    contenders = {
        "fastelbo": fastelbo.mixture_log_prob,
        "eager": plain_mixture,
        "compile": torch.compile(plain_mixture, dynamic=False),
    }
    print(facts())
    share = others_share()
    for threads in arguments.threads:
        torch.set_num_threads(threads)
        for name, build in (("VampPrior", vamp_prior), ("beta-TCVAE", beta_tc)):
            steps: dict[str, Step] = {}
            for contender, mixture in contenders.items():
                model, loss = build(mixture)
                optimizer = torch.optim.Adam(model.parameters(), 1e-3, fused=True)

                def step(optimizer=optimizer, loss=loss) -> None:  # type: ignore[no-untyped-def]
                    optimizer.zero_grad()
                    loss().backward()
                    optimizer.step()

                steps[contender] = step
            report(f"{name}, {threads} threads", measured(steps, arguments.seconds), "fastelbo")
        z, mu, logvar = torch.randn(3, 50_000, 10)
        for per_dimension in (False, True):
            start = time.perf_counter()
            fastelbo.mixture_log_prob(z, mu, logvar, per_dimension=per_dimension)
            label = f"50,000 points of 50,000 components, M = 10, {'per dimension, ' * per_dimension}{threads} threads"
            print(f"| {label} | {time.perf_counter() - start:.2f} s |", flush=True)
    busy = 100 * share()
    print(f"\nother processes took {busy:.1f} % of the machine" + " (disturbed)" * (busy > DISTURBED))


if __name__ == "__main__":
    main()
