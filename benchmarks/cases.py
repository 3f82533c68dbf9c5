"""What is measured: an operation, its inputs, and how many times faster than each opponent fastelbo has to be."""

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.steps import Step, convolutional, dense
from fastelbo.commands.data import load
from fastelbo.estimators import ESTIMATORS

LATENT = 32  # M of every ELBO case
AT_MOST_1_3_TIMES = 1 / 1.3  # a bar on what our call costs: at most 1.3 times the opponent's
AT_MOST_1_05_TIMES = 1 / 1.05


@dataclass
class Inputs:
    tensors: dict[str, Tensor]  # the arguments; those that require a gradient are the leaves
    upstream: tuple[Tensor, ...] | None = None  # gradients of the outputs; None: the output is a scalar loss
    noise: dict[str, Tensor] = field(default_factory=dict)  # given while values are compared, drawn anew while timed
    module: Step | None = None  # a model, whose parameters are leaves too and take an optimizer's step
    optimizer: torch.optim.Optimizer | None = None

    @cached_property  # read in every timed step: walking a model takes 20 us
    def leaves(self) -> list[Tensor]:
        parameters = [] if self.module is None else list(self.module.parameters())
        return [t for t in self.tensors.values() if t.requires_grad] + parameters

    @property
    def arguments(self) -> dict[str, Any]:
        return self.tensors | ({} if self.module is None else {"module": self.module})

    def frozen(self) -> "Inputs":
        return Inputs({name: t.detach() for name, t in self.tensors.items()})

    def to(self, dtype: torch.dtype) -> "Inputs":
        """The same numbers in another floating dtype; bytes stay bytes."""

        def cast(t: Tensor) -> Tensor:
            return t.detach().to(dtype).requires_grad_(t.requires_grad) if t.is_floating_point() else t

        return Inputs(
            {name: cast(t) for name, t in self.tensors.items()},
            None if self.upstream is None else tuple(map(cast, self.upstream)),
            {name: cast(t) for name, t in self.noise.items()},
            None if self.module is None else copy.deepcopy(self.module).to(dtype),
        )


@dataclass(frozen=True)
class Case:
    name: str
    op: str  # the function that contenders implement
    make: Callable[[], Inputs]
    bars: dict[str, float] = field(default_factory=dict)  # contender -> its time divided by fastelbo's must reach this
    yardstick: str = ""  # another function, for contenders without the first
    other: Callable[[Inputs], Inputs] = lambda inputs: inputs  # what the yardstick is given
    options: dict[str, Any] = field(default_factory=dict)
    tolerance: float | None = None  # where contenders draw their own samples: what their values may differ by
    rounds: float = 1.0  # a slow case: the share of the rounds that it gets
    group: str = "losses"  # or "objectives", "models", "calls", "steps", "scaling"
    core: bool = False  # also with one thread
    quick: bool = False  # part of a quick run
    part_of: str = ""  # the case of whose time this one is a share
    contenders: tuple[str, ...] = ()  # these alone; empty: all who can
    size: int = 0  # of a "scaling" case: where it stands on the axis


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


def probabilities(batch: int, data: int) -> Inputs:
    recon = torch.sigmoid(torch.randn(batch, data)).requires_grad_()
    return Inputs({"recon": recon, "x": torch.rand(batch, data), **_latent(batch)})


def uint8(batch: int, data: int) -> Inputs:
    x = torch.randint(0, 256, (batch, data), dtype=torch.uint8)
    return Inputs({"recon": _leaf(batch, data), "x": x, **_latent(batch)})


def with_float_x(inputs: Inputs) -> Inputs:
    return Inputs(inputs.tensors | {"x": inputs.tensors["x"].float() / 255})


def iwae_probs(samples: int, batch: int, data: int, latent: int) -> Inputs:
    mu, logvar = torch.randn(batch, latent), 0.5 * torch.randn(batch, latent)
    z = mu + torch.exp(0.5 * logvar) * torch.randn(samples, batch, latent)
    recon = torch.sigmoid(0.3 * torch.randn(samples, batch, data)).requires_grad_()
    return Inputs({"recon": recon, "x": torch.rand(batch, data), "mu": mu, "logvar": logvar, "z": z})


def training(make: Callable[[], Step], batch: int, event: tuple[int, ...], latent: int) -> Inputs:
    """A learning rate of 0: all contenders see the same parameters, and Adam does its whole work."""
    module = make()
    eps = torch.randn(*((batch, latent) if module.samples is None else (module.samples, batch, latent)))
    optimizer = torch.optim.Adam(module.parameters(), lr=0.0, foreach=True)
    return Inputs({"x": torch.rand(batch, *event)}, None, {"eps": eps}, module, optimizer)


def step_loss(batch: int, event: tuple[int, ...], latent: int, samples: int | None = None) -> Inputs:
    """What the loss of a step sees: recon comes, and the gradient of z later."""
    lead = (batch,) if samples is None else (samples, batch)
    x, recon = torch.rand(batch, *event), _leaf(*lead, *event, scale=0.3)
    z = torch.randn(*lead, latent)
    return Inputs({"recon": recon, "x": x, **_latent(batch, latent)}, (torch.ones(()), z), {"eps": torch.randn_like(z)})


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


def _elbo(kind: str, make: Callable[[int, int], Inputs], batch: int, data: int, eager: float, compiled: float) -> Case:
    bars = {"eager": eager, "compile": compiled}
    name = f"ELBO {kind} [{batch} x {data}]"
    return Case(name, f"elbo_{make.__name__}", partial(make, batch, data), bars, core=True, quick=batch == 512)


def _objective(name: str) -> Case:
    bars = {"its iwae": AT_MOST_1_05_TIMES} if name == "dreg" else {}
    make = partial(objective, 50, 100, 784, 50)
    title = f"{name} step K=50 B=100 D=784 M=50"
    return Case(title, f"{name} step", make, bars, next(iter(bars), ""), rounds=0.3, group="objectives")


def _steps() -> list[Case]:
    models: list[tuple[str, Callable[[], Step], int, tuple[int, ...], int, int | None]] = [
        ("dense 8 x 8, B=64 M=8", partial(dense, 8, 8, 256), 64, (8, 8), 8, None),
        ("dense 28 x 28, B=128 M=32", partial(dense, 28, 32, 512), 128, (28, 28), 32, None),
        ("convolutional 28 x 28, B=64 M=16", partial(convolutional, 16), 64, (1, 28, 28), 16, None),
        ("dense 28 x 28, IWAE K=10 B=64 M=32", partial(dense, 28, 32, 512, 10), 64, (28, 28), 32, 10),
    ]
    found = []
    for name, make, batch, event, latent, samples in models:
        whole = f"training step, {name}"
        inputs = partial(training, make, batch, event, latent)
        found.append(Case(whole, "step", inputs, rounds=0.5, group="steps", quick="8 x 8" in name))
        alone = partial(step_loss, batch, event, latent, samples)
        two = ("eager", "fastelbo")
        found.append(
            Case(
                f"{whole}: loss alone",
                "step loss",
                alone,
                group="steps",
                part_of=whole,
                contenders=two,
                rounds=0.5,
                quick="8 x 8" in name,
            )
        )
    return found


def _scaling() -> list[Case]:
    def case(axis: str, size: int, op: str, make: Callable[[], Inputs]) -> Case:
        three = ("eager", "compile", "fastelbo")
        return Case(f"{axis}={size}", op, make, group="scaling", rounds=0.2, contenders=three, size=size)

    return [
        *(
            case("ELBO Bernoulli D=784, B", n, "elbo_bernoulli", partial(bernoulli, n, 784))
            for n in (16, 64, 256, 1024, 4096)
        ),
        *(
            case("ELBO Bernoulli B=128, D", n, "elbo_bernoulli", partial(bernoulli, 128, n))
            for n in (16, 64, 256, 1024, 4096, 16384)
        ),
        *(case("IWAE B=32 D=784, K", n, "iwae", partial(iwae, n, 32, 784)) for n in (1, 4, 16, 64, 256)),
    ]


CASES = [
    _elbo("Bernoulli", bernoulli, 64, 64, 2.0, 2.0),
    _elbo("Bernoulli", bernoulli, 128, 784, 3.0, 3.0),
    _elbo("Bernoulli", bernoulli, 512, 784, 6.0, 5.0),
    _elbo("Bernoulli", bernoulli, 1024, 3072, 6.0, 2.5),
    _elbo("Gaussian, full logvar", gaussian, 512, 784, 3.0, 1.8),
    Case(
        "ELBO Bernoulli, x as uint8 [1024 x 3072]",
        "elbo_uint8",
        partial(uint8, 1024, 3072),
        {"float x": 1.15},
        "float x",
        with_float_x,
        quick=True,
    ),
    Case(
        "ELBO Bernoulli, bfloat16 [512 x 784]",
        "elbo_bernoulli",
        lambda: bernoulli(512, 784).to(torch.bfloat16),
        {"eager": 5.0, "float32": 1.0},
        "float32",
        lambda inputs: inputs.to(torch.float32),
    ),
    Case("ELBO Bernoulli from probabilities [512 x 784]", "elbo_probs", partial(probabilities, 512, 784)),
    Case(
        "rsample K=50 B=100 M=50",
        "rsample",
        partial(rsample, 50, 100, 50),
        {"eager": 6.0, "compile": 5.0},
        options={"num_samples": 50},
        core=True,
        quick=True,
    ),
    Case(
        "IWAE K=50 B=100 D=784",
        "iwae",
        partial(iwae, 50, 100, 784),
        {"eager": 4.5, "compile": 1.8},
        rounds=0.5,
        core=True,
        quick=True,
    ),
    Case(
        "IWAE from probabilities K=50 B=100 D=784 M=50", "iwae_probs", partial(iwae_probs, 50, 100, 784, 50), rounds=0.3
    ),
    Case(
        "Bernoulli kernel, value and gradient [512 x 784]",
        "kernel",
        lambda: Inputs({**bernoulli(512, 784).tensors, **_latent(512, 1)}).frozen(),
        {"torch.exp": 1.0},
        "exp",
        core=True,
        quick=True,
    ),
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
            group="models",
        )
        for chunk in (25, 100, 500)
    ),
    Case(
        "PPCA log_prob N=2000 D=784 M=32",
        "ppca",
        partial(ppca, 2000, 784, 32),
        {"eager": 1.2, "distributions": 2.0},
        rounds=0.3,
        group="models",
    ),
    Case(
        "PPCA score_samples N=2000 D=3072 M=32",
        "ppca_score",
        partial(ppca, 2000, 3072, 32, train=False),
        {"sklearn": 10.0},
        rounds=0.2,
        group="models",
    ),
    Case(
        "call cost [8 x 16]",
        "elbo_bernoulli",
        partial(bernoulli, 8, 16),
        {"one BCE": AT_MOST_1_3_TIMES},
        "bce",
        group="calls",
        core=True,
        quick=True,
    ),
    *_steps(),
    *_scaling(),
]
