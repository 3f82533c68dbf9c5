"""What is measured: an operation, its inputs, and the targets for fastelbo's time and memory."""

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.steps import Step, convolutional, dense
from fastelbo.commands.data import load
from fastelbo.estimators import ESTIMATORS
from fastelbo.likelihoods import LIKELIHOODS

LATENT = 32  # M of every ELBO case
AT_MOST_1_3_TIMES = 1 / 1.3  # of a target: fastelbo may take 1.3 times the contender's time
AT_MOST_1_05_TIMES = 1 / 1.05

# glibc's malloc. The first setting gives every tensor of 128 KiB or more back to the system as soon as it is freed; the
# second keeps the memory of all that are smaller than 1 GiB. With neither, it depends on what was allocated before.
MEMORY_RETURNED = {"MALLOC_MMAP_THRESHOLD_": str(2**17)}
MEMORY_KEPT = {"MALLOC_MMAP_THRESHOLD_": str(2**30), "MALLOC_TRIM_THRESHOLD_": str(2**30)}


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

    def to(self, dtype: torch.dtype | None = None, device: str | None = None) -> "Inputs":
        """The same numbers in another floating dtype, or on another device; bytes stay bytes."""

        def cast(t: Tensor) -> Tensor:
            wanted = dtype if t.is_floating_point() else None
            return t.detach().to(device, wanted).requires_grad_(t.requires_grad)

        module = None if self.module is None else copy.deepcopy(self.module).to(device, dtype)
        return Inputs(
            {name: cast(t) for name, t in self.tensors.items()},
            None if self.upstream is None else tuple(map(cast, self.upstream)),
            {name: cast(t) for name, t in self.noise.items()},
            module,
            None if self.optimizer is None or module is None else idle_adam(module),
        )


def idle_adam(module: Step) -> torch.optim.Optimizer:
    """A learning rate of 0: all contenders see the same parameters, and Adam does its whole work."""
    return torch.optim.Adam(module.parameters(), lr=0.0, fused=True)


@dataclass(frozen=True)
class Case:
    name: str
    op: str  # the function that contenders implement
    make: Callable[[], Inputs]
    targets: dict[str, float] = field(default_factory=dict)  # contender -> its time divided by fastelbo's, at least
    yardstick: str = ""  # another function, for contenders without the first
    other: Callable[[Inputs], Inputs] = lambda inputs: inputs  # what the yardstick is given
    options: dict[str, Any] = field(default_factory=dict)
    tolerance: float | None = None  # where contenders draw their own samples: what their values may differ by
    rounds: float = 1.0  # a slow case: the share of the rounds that it gets
    group: str = "losses"  # or "objectives", "models", "calls", "steps", "scaling", "allocator"
    core: bool = False  # also with one thread
    quick: bool = False  # part of a quick run
    part_of: str = ""  # the case of whose time this one is a share
    contenders: tuple[str, ...] = ()  # these alone; empty: all that have the operation
    size: int = 0  # of a "scaling" case: its place on the axis
    environment: dict[str, str] | None = None  # measured in a process of its own, with these variables
    target_of_copy: float = math.nan  # fastelbo's share of the copy bandwidth, at least
    target_peak_bytes: float = math.nan  # the most that fastelbo's step may hold beyond what was there before


def _leaf(*shape: int, scale: float = 1.0) -> Tensor:
    return (scale * torch.randn(shape)).requires_grad_()


def _latent(batch: int, latent: int = LATENT) -> dict[str, Tensor]:
    return {"mu": _leaf(batch, latent), "logvar": _leaf(batch, latent, scale=0.5)}


def bernoulli(batch: int, data: int) -> Inputs:
    return Inputs({"recon": _leaf(batch, data), "x": torch.rand(batch, data), **_latent(batch)})


def gaussian(batch: int, data: int, scale: tuple[int, ...] | None = None) -> Inputs:
    """scale is the log variance: one for each element of the batch, or learned in the given shape."""
    recon = {"mean": _leaf(batch, data), "scale": _leaf(*((batch, data) if scale is None else scale), scale=0.5)}
    return Inputs({**recon, "x": torch.randn(batch, data), **_latent(batch)})


def counts(likelihood: str, batch: int, genes: int) -> Inputs:
    """Counts drawn from their negative binomial, 72 % of them zeros; a theta for every gene."""
    log_mean, log_theta = 1.5 * torch.randn(batch, genes) - 1.2, torch.randn(genes)
    x = LIKELIHOODS["nb"].draw(None, log_mean, log_theta)
    parameters = {"log_mean": log_mean, "log_theta": log_theta, "zero_logits": torch.randn(batch, genes) - 1}
    if likelihood == "poisson":
        parameters = {"log_rate": log_mean}
    elif likelihood == "nb":
        del parameters["zero_logits"]
    return Inputs({**{name: t.requires_grad_() for name, t in parameters.items()}, "x": x, **_latent(batch, 10)})


def learned_prior(batch: int, data: int) -> Inputs:
    prior = {"prior_mu": _leaf(LATENT), "prior_logvar": _leaf(LATENT, scale=0.5)}
    return Inputs(bernoulli(batch, data).tensors | prior)


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
    module = make()
    eps = torch.randn(*((batch, latent) if module.samples is None else (module.samples, batch, latent)))
    return Inputs({"x": torch.rand(batch, *event)}, None, {"eps": eps}, module, idle_adam(module))


def kept_training(make: Callable[[], Step], batch: int, event: tuple[int, ...], latent: int) -> Inputs:
    inputs = training(make, batch, event, latent)
    return replace(inputs, noise={"seed": torch.zeros((), dtype=torch.int64)})


def of_all_samples(inputs: Inputs) -> Inputs:
    """The noise of all samples is given, where `kept_training` gives a seed."""
    assert inputs.module is not None and inputs.module.samples is not None
    x, latent = inputs.tensors["x"], inputs.module.vae._latent_shape()
    eps = torch.randn(inputs.module.samples, len(x), *latent, dtype=x.dtype, device=x.device)
    return replace(inputs, noise={"eps": eps})


def step_loss(batch: int, event: tuple[int, ...], latent: int, samples: int | None = None) -> Inputs:
    """The tensors that the loss of a step reads: recon, and the gradient of z that a decoder would return."""
    lead = (batch,) if samples is None else (samples, batch)
    x, recon = torch.rand(batch, *event), _leaf(*lead, *event, scale=0.3)
    z = torch.randn(*lead, latent)
    return Inputs({"recon": recon, "x": x, **_latent(batch, latent)}, (torch.ones(()), z), {"eps": torch.randn_like(z)})


def objective(samples: int, batch: int, data: int, latent: int) -> Inputs:
    """Sampling and loss without the decoder between them: recon and the gradient of z are given."""
    return Inputs(
        {"recon": _leaf(samples, batch, data, scale=0.3), "x": torch.rand(batch, data), **_latent(batch, latent)},
        (torch.ones(()), torch.randn(samples, batch, latent)),
        {"eps": torch.randn(samples, batch, latent)},
    )


def held_out_digits() -> Inputs:
    return Inputs({"x": load("digits").held_out[:]})


def ppca(rows: int, data: int, latent: int, *, train: bool = True) -> Inputs:
    """Data drawn from the model. The columns of W are orthogonal, as sklearn's PCA requires."""
    W = torch.linalg.qr(torch.randn(data, latent))[0] * torch.linspace(4, 2, latent)
    b, log_sigma2 = torch.randn(data), torch.tensor(-0.5)
    x = torch.randn(rows, latent) @ W.mT + b + torch.exp(0.5 * log_sigma2) * torch.randn(rows, data)
    parameters = {name: t.requires_grad_(train) for name, t in (("W", W), ("b", b), ("log_sigma2", log_sigma2))}
    return Inputs({"x": x, **parameters}, (torch.randn(rows),) if train else None)


def mixture(points: int, components: int, latent: int, *, per_dimension: bool = False) -> Inputs:
    parts = {"z": (points, latent), "mu": (components, latent), "logvar": (components, latent)}
    leaves = {name: _leaf(*shape, scale=0.5 if name == "logvar" else 1.0) for name, shape in parts.items()}
    upstream = torch.randn(points, latent) if per_dimension else torch.randn(points)
    return Inputs({**leaves, "log_weights": _leaf(components)}, (upstream,))


def _elbo(kind: str, make: Callable[[int, int], Inputs], batch: int, data: int, eager: float, compiled: float) -> Case:
    targets = {"eager": eager, "compile": compiled}
    name = f"ELBO {kind} [{batch} x {data}]"
    return Case(name, f"elbo_{make.__name__}", partial(make, batch, data), targets, core=True, quick=batch == 512)


def _own_shape(kind: str, op: str, make: Callable[[], Inputs]) -> Case:
    """A parameter smaller than recon, whose gradient is summed without being written at recon's size."""
    three, gradient = ("eager", "compile", "fastelbo"), 4 * 512 * 784
    return Case(f"ELBO {kind} [512 x 784]", op, make, target_peak_bytes=1.2 * gradient, contenders=three)


def _objective(
    name: str, batch: int = 100, latent: int = 50, rounds: float = 0.3, contenders: tuple[str, ...] = ()
) -> Case:
    targets = {"its iwae": AT_MOST_1_05_TIMES} if name == "dreg" else {}
    make = partial(objective, 50, batch, 784, latent)
    title = f"{name} step K=50 B={batch} D=784 M={latent}"
    other = next(iter(targets), "")
    return Case(title, f"{name} step", make, targets, other, rounds=rounds, group="objectives", contenders=contenders)


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


def _kept_steps() -> list[Case]:
    flat = (28, 28)
    models: list[tuple[str, Callable[[], Step], int, tuple[int, ...], int, float | None]] = [
        ("dense 28 x 28, IWAE K=50 keep=8 B=100 M=50", partial(dense, 28, 50, 200, 50, 8), 100, flat, 50, 1.7),
        ("dense 28 x 28, IWAE K=200 keep=16 B=100 M=50", partial(dense, 28, 50, 200, 200, 16), 100, flat, 50, 2.2),
        (
            "convolutional 28 x 28, IWAE K=50 keep=8 B=20 M=16",
            partial(convolutional, 16, 50, 8),
            20,
            (1, 28, 28),
            16,
            None,
        ),
    ]
    return [
        Case(
            f"training step, {name}",
            "kept step",
            partial(kept_training, make, batch, event, latent),
            {} if least is None else {"eager": least, "compile": least},
            yardstick="step of all samples",
            # log p of 784 pixels in float32 moves a weight by 1e-4 of itself, and in convolutions gradients cancel
            tolerance=5e-3 if "convolutional" in name else None,
            other=of_all_samples,
            rounds=0.3,
            group="steps",
            contenders=("eager", "compile", "all samples", "fastelbo"),
        )
        for name, make, batch, event, latent, least in models
    ]


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


def _allocator(title: str, environment: dict[str, str]) -> Case:
    make, two = partial(bernoulli, 1024, 3072), ("eager", "fastelbo")
    return Case(title, "elbo_bernoulli", make, group="allocator", contenders=two, environment=environment)


CASES = [
    _elbo("Bernoulli", bernoulli, 64, 64, 2.0, 2.0),
    _elbo("Bernoulli", bernoulli, 128, 784, 3.0, 3.0),
    _elbo("Bernoulli", bernoulli, 512, 784, 6.0, 5.0),
    _elbo("Bernoulli", bernoulli, 1024, 3072, 6.0, 2.5),
    _elbo("Gaussian, full logvar", gaussian, 512, 784, 3.0, 1.8),
    _own_shape("Gaussian, logvar of every pixel", "elbo_gaussian", partial(gaussian, 512, 784, (784,))),
    _own_shape("Gaussian, one logvar", "elbo_gaussian", partial(gaussian, 512, 784, ())),
    *(
        Case(
            f"ELBO {likelihood} [128 x 4000]",
            f"elbo_{likelihood}",
            partial(counts, likelihood, 128, 4000),
            {} if least is None else {"eager": least, "compile": least},
            core=True,
            target_peak_bytes=(gradients + 0.3) * 4 * 128 * 4000,  # and the sums of 32 chunks of rows
        )
        for likelihood, least, gradients in (("poisson", None, 1), ("nb", 4.0, 1), ("zinb", 5.0, 2))
    ),
    _own_shape("Bernoulli, learned prior", "elbo_learned_prior", partial(learned_prior, 512, 784)),
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
        "mixture N=2048 C=2048 M=10",
        "mixture",
        partial(mixture, 2048, 2048, 10),
        {"eager": 40.0, "compile": 10.0, "matrix products": 3.0, "matrix products compiled": 1.5},
        rounds=0.1,
        core=True,
    ),
    Case(
        "mixture per dimension N=2048 C=2048 M=10",
        "mixture per dimension",
        partial(mixture, 2048, 2048, 10, per_dimension=True),
        {"eager": 20.0, "compile": 4.0},
        rounds=0.1,
        contenders=("eager", "compile", "fastelbo"),
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
    *_kept_steps(),
    *_scaling(),
    _allocator("freed memory returned to the system", MEMORY_RETURNED),
    _allocator("glibc's choice", {}),
    _allocator("freed memory kept", MEMORY_KEPT),
]

COLUMNS = 2**16  # 1024 rows of so many logits are 256 MB
ON_CUDA: dict[str, Any] = {"contenders": ("eager", "compile", "max-autotune", "its iwae", "fastelbo"), "rounds": 0.75}
CUDA_CASES = [
    Case(
        f"ELBO Bernoulli [1024 x {COLUMNS}]",
        "elbo_bernoulli",
        partial(bernoulli, 1024, COLUMNS),
        {"compile": 1.4, "eager": 4.0},
        target_of_copy=0.85,
        quick=True,
        **ON_CUDA,
    ),
    Case("ELBO Bernoulli [512 x 784]", "elbo_bernoulli", partial(bernoulli, 512, 784), quick=True, **ON_CUDA),
    Case(f"ELBO Bernoulli [1024 x {COLUMNS}], x uint8", "elbo_uint8", partial(uint8, 1024, COLUMNS), **ON_CUDA),
    Case(
        f"ELBO Bernoulli [1024 x {COLUMNS}], bfloat16",
        "elbo_bernoulli",
        lambda: bernoulli(1024, COLUMNS).to(torch.bfloat16),
        **ON_CUDA,
    ),
    Case(
        "ELBO zinb [1024 x 20000]",
        "elbo_zinb",
        partial(counts, "zinb", 1024, 20_000),
        {"eager": 3.0, "compile": 1.2},
        **ON_CUDA,
    ),
    Case("IWAE K=50 B=512 D=784", "iwae", partial(iwae, 50, 512, 784), {"compile": 1.3}, **ON_CUDA),
    Case(
        "rsample K=50 B=4096 M=64",
        "rsample",
        partial(rsample, 50, 4096, 64),
        {"compile": 1.5},
        options={"num_samples": 50},
        **ON_CUDA,
    ),
    *(_objective(name, 512, 64, **ON_CUDA) for name in ("iwae", "dreg")),
]
CASES_OF = {"cpu": CASES, "cuda": CUDA_CASES}
