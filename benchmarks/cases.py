"""What is measured: an operation, its inputs, and how many times faster than each opponent fastelbo has to be."""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from fastelbo.data import load
from fastelbo.estimators import ESTIMATORS

LATENT = 32  # M of every ELBO case
AT_MOST_1_3_TIMES = 1 / 1.3  # a bar on what our call costs: at most 1.3 times the opponent's
AT_MOST_1_05_TIMES = 1 / 1.05


@dataclass
class Inputs:
    tensors: dict[str, Tensor]  # the arguments; those that require a gradient are the leaves
    upstream: tuple[Tensor, ...] | None = None  # gradients of the outputs; None: the output is a scalar loss
    noise: dict[str, Tensor] = field(default_factory=dict)  # given while values are compared, drawn anew while timed

    def double(self) -> "Inputs":
        def wide(t: Tensor) -> Tensor:
            return t.detach().double().requires_grad_(t.requires_grad)

        return Inputs(
            {name: wide(t) for name, t in self.tensors.items()},
            None if self.upstream is None else tuple(map(wide, self.upstream)),
            {name: wide(t) for name, t in self.noise.items()},
        )


@dataclass(frozen=True)
class Case:
    name: str
    op: str  # the function that contenders implement
    make: Callable[[], Inputs]
    bars: dict[str, float]  # contender -> its time divided by fastelbo's must reach this
    yardstick: str = ""  # another function, for contenders without the first
    options: dict[str, Any] = field(default_factory=dict)
    tolerance: float | None = None  # where contenders draw their own samples: what their values may differ by
    rounds: float = 1.0  # a slow case: the share of the rounds that it gets


def _leaf(*shape: int, scale: float = 1.0) -> Tensor:
    return (scale * torch.randn(shape)).requires_grad_()


def _latent(batch: int, latent: int = LATENT) -> dict[str, Tensor]:
    return {"mu": _leaf(batch, latent), "logvar": _leaf(batch, latent, scale=0.5)}


def bernoulli(batch: int, data: int) -> Inputs:
    return Inputs({"recon": _leaf(batch, data), "x": torch.rand(batch, data), **_latent(batch)})


def gaussian(batch: int, data: int) -> Inputs:
    recon = {"mean": _leaf(batch, data), "scale": _leaf(batch, data, scale=0.5)}
    return Inputs({**recon, "x": torch.randn(batch, data), **_latent(batch)})


def rsample(samples: int, batch: int, latent: int) -> Inputs:
    upstream = (torch.randn(samples, batch, latent), torch.randn(batch), torch.randn(samples, batch))
    return Inputs(_latent(batch, latent), upstream, {"eps": torch.randn(samples, batch, latent)})


def iwae(samples: int, batch: int, data: int) -> Inputs:
    recon = _leaf(samples, batch, data)
    return Inputs({"recon": recon, "x": torch.rand(batch, data), "log_ratio": _leaf(samples, batch)})


def _elbo(kind: str, make: Callable[[int, int], Inputs], batch: int, data: int, eager: float, compiled: float) -> Case:
    bars = {"eager": eager, "compile": compiled}
    return Case(f"ELBO {kind} [{batch} x {data}]", f"elbo_{make.__name__}", partial(make, batch, data), bars)


def objective(samples: int, batch: int, data: int, latent: int) -> Inputs:
    """Sampling and loss around a decoder that is not there: it gives recon, and later the gradient of z."""
    return Inputs(
        {"recon": _leaf(samples, batch, data, scale=0.3), "x": torch.rand(batch, data), **_latent(batch, latent)},
        (torch.ones(()), torch.randn(samples, batch, latent)),
        {"eps": torch.randn(samples, batch, latent)},
    )


def held_out_digits() -> Inputs:
    return Inputs({"x": load("digits").held_out})


def ppca(rows: int, data: int, latent: int, *, train: bool = True) -> Inputs:
    """Data of the very model. sklearn's PCA knows orthogonal columns alone."""
    W = torch.linalg.qr(torch.randn(data, latent))[0] * torch.linspace(4, 2, latent)
    b, log_sigma2 = torch.randn(data), torch.tensor(-0.5)
    x = torch.randn(rows, latent) @ W.mT + b + torch.exp(0.5 * log_sigma2) * torch.randn(rows, data)
    parameters = {name: t.requires_grad_(train) for name, t in (("W", W), ("b", b), ("log_sigma2", log_sigma2))}
    return Inputs({"x": x, **parameters}, (torch.randn(rows),) if train else None)


def _objective(name: str) -> Case:
    bars = {"its iwae": AT_MOST_1_05_TIMES} if name == "dreg" else {}
    make = partial(objective, 50, 100, 784, 50)
    return Case(f"{name} step K=50 B=100 D=784 M=50", f"{name} step", make, bars, next(iter(bars), ""))


CASES = [
    _elbo("Bernoulli", bernoulli, 64, 64, 2.0, 2.0),
    _elbo("Bernoulli", bernoulli, 128, 784, 3.0, 3.0),
    _elbo("Bernoulli", bernoulli, 512, 784, 4.5, 4.0),
    _elbo("Bernoulli", bernoulli, 1024, 3072, 6.0, 2.5),
    _elbo("Gaussian, full logvar", gaussian, 512, 784, 3.0, 1.8),
    Case(
        "rsample K=50 B=100 M=50",
        "rsample",
        partial(rsample, 50, 100, 50),
        {"eager": 4.0, "compile": 5.0},
        options={"num_samples": 50},
    ),
    Case("IWAE K=50 B=100 D=784", "iwae", partial(iwae, 50, 100, 784), {"eager": 3.5, "compile": 1.4}),
    *map(_objective, ESTIMATORS),
    *(
        Case(
            f"log_marginal of the digits model, K=5000, chunks of {chunk}",
            "log_marginal",
            held_out_digits,
            {"eager": 1.3},
            options={"num_samples": 5000, "chunk_size": chunk},
            tolerance=2e-3,
            rounds=0.1,
        )
        for chunk in (25, 100, 500)
    ),
    Case(
        "PPCA log_prob N=2000 D=784 M=32",
        "ppca",
        partial(ppca, 2000, 784, 32),
        {"eager": 1.2, "distributions": 2.0},
    ),
    Case(
        "PPCA score_samples N=2000 D=3072 M=32",
        "ppca_score",
        partial(ppca, 2000, 3072, 32, train=False),
        {"sklearn": 10.0},
        rounds=0.2,
    ),
    Case("call cost [8 x 16]", "elbo_bernoulli", partial(bernoulli, 8, 16), {"one BCE": AT_MOST_1_3_TIMES}, "bce"),
]
