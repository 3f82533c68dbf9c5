"""The contenders. Each is one entry in CONTENDERS: its name and its function for each operation that it has."""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

import fastelbo
from benchmarks.packages import DISTRIBUTIONS, PYRO, PYTHAE, SKLEARN
from benchmarks.plain import PLAIN, digits_model, mixture_by_products, one_bce
from benchmarks.steps import Step
from fastelbo import reference
from fastelbo.estimators import ESTIMATORS
from fastelbo.losses import join_recon

# options of the estimators that have any, in the benchmarks
OPTIONS: dict[str, dict[str, Any]] = {"vr": {"alpha": 0.5}, "ciwae": {"beta": 0.5}, "miwae": {"groups": 5}}


def fused_objective(
    estimator: str, recon: Tensor, x: Tensor, mu: Tensor, logvar: Tensor, eps: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    drawn = fastelbo.rsample(mu, logvar, len(recon), eps=eps)
    return fastelbo.multi_sample_loss(recon, x, drawn, estimator=estimator, **OPTIONS.get(estimator, {})), drawn.z


def reference_objective(*args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
    with fastelbo.reference_mode():
        return fused_objective(*args, **kwargs)


def fused_step(x: Tensor, module: Step, eps: Tensor | None = None) -> Tensor:
    objective = {} if module.samples is None else {"objective": "iwae", "num_samples": module.samples}
    loss: Tensor = module.vae.loss(x, eps=eps, **objective)
    return loss


def fused_kept_step(x: Tensor, module: Step, seed: Tensor | None = None) -> Tensor:
    """The seed fixes noise and choice of samples, so that the gradient can be compared."""
    generator = None if seed is None else torch.Generator(x.device).manual_seed(int(seed))
    assert module.samples is not None
    loss: Tensor = module.vae.loss(
        x, objective="iwae", num_samples=module.samples, keep=module.keep, generator=generator
    )
    return loss


def fused_step_loss(recon: Tensor, x: Tensor, mu: Tensor, logvar: Tensor, eps: Tensor | None = None) -> Any:
    if recon.dim() > x.dim():
        return fused_objective("iwae", recon, x, mu, logvar, eps)
    drawn = fastelbo.rsample(mu, logvar, eps=eps)
    return fastelbo.elbo_loss(recon, x, mu, logvar), drawn.z


def fused_iwae_probs(recon: Tensor, x: Tensor, mu: Tensor, logvar: Tensor, z: Tensor) -> Tensor:
    log_ratio = 0.5 * ((z - mu).square() * torch.exp(-logvar) - z.square() + logvar).sum(-1)
    return fastelbo.iwae_loss(recon, x, log_ratio, likelihood="bernoulli_probs")


def kernel_with_gradient(recon: Tensor, x: Tensor, mu: Tensor, logvar: Tensor) -> tuple[Tensor, Tensor]:
    """The op without autograd, with the gradient of recon: checks, new tensors, kernel and a KL of one dimension."""
    none = dict.fromkeys(("prior_mu", "prior_logvar", "mask", "beta", "free_bits"))
    options = {"likelihood": "bernoulli", "reduction": "mean", "needs": 1}  # the first bit: of the first parameter
    with torch._C._AutoDispatchBelowAutograd():
        loss, _, _, gradient, *_ = torch.ops.fastelbo.elbo_loss.default([recon], x, mu, logvar, **none, **options)
    return loss, gradient


def fused_gaussian(mean: Tensor, scale: Tensor, x: Tensor, mu: Tensor, logvar: Tensor) -> Tensor:
    loss: Tensor = fastelbo.elbo_loss((mean, scale), x, mu, logvar, likelihood="gaussian")
    return loss


def fused_counts(likelihood: str, *, x: Tensor, mu: Tensor, logvar: Tensor, **parameters: Tensor) -> Tensor:
    loss: Tensor = fastelbo.elbo_loss(join_recon(*parameters.values()), x, mu, logvar, likelihood=likelihood)
    return loss


def judged_kernel(recon: Tensor, x: Tensor, mu: Tensor, logvar: Tensor) -> tuple[Tensor, Tensor]:
    with torch.enable_grad(), fastelbo.reference_mode():
        leaf = recon.detach().requires_grad_()
        loss = fastelbo.elbo_loss(leaf, x, mu, logvar)
    return loss.detach(), torch.autograd.grad(loss, leaf)[0]


def with_reference(function: Callable[..., Any]) -> Callable[..., Any]:
    def call(*args: Any, **kwargs: Any) -> Any:
        with fastelbo.reference_mode():
            return function(*args, **kwargs)

    return call


def judged_log_marginal(x: Tensor, num_samples: int, chunk_size: int) -> Tensor:
    with fastelbo.reference_mode():
        return copy.deepcopy(digits_model()).double().log_marginal(x.double(), num_samples, seed=0).log_prob


FASTELBO: dict[str, Callable[..., Any]] = {
    "elbo_bernoulli": fastelbo.elbo_loss,
    "elbo_uint8": fastelbo.elbo_loss,
    "elbo_probs": partial(fastelbo.elbo_loss, likelihood="bernoulli_probs"),
    "elbo_gaussian": fused_gaussian,
    "elbo_learned_prior": fastelbo.elbo_loss,
    **{f"elbo_{name}": partial(fused_counts, name) for name in ("poisson", "nb", "zinb")},
    "rsample": lambda mu, logvar, num_samples, eps=None: fastelbo.rsample(mu, logvar, num_samples, eps=eps)[:3],
    "iwae": fastelbo.iwae_loss,
    "iwae_probs": fused_iwae_probs,
    "kernel": kernel_with_gradient,
    "step": fused_step,
    "kept step": fused_kept_step,
    "step loss": fused_step_loss,
    **{f"{name} step": partial(fused_objective, name) for name in ESTIMATORS},
    "log_marginal": lambda x, num_samples, chunk_size: (
        digits_model().log_marginal(x, num_samples, chunk_size=chunk_size).log_prob
    ),
    "mixture": fastelbo.mixture_log_prob,
    "mixture per dimension": partial(fastelbo.mixture_log_prob, per_dimension=True),
    "ppca": fastelbo.ppca_log_prob,
    "ppca_score": fastelbo.ppca_log_prob,
}

# Computed in float64 to judge the others.
JUDGE: dict[str, Callable[..., Any]] = {
    **{
        op: with_reference(FASTELBO[op])
        for op in (
            *("elbo_bernoulli", "elbo_uint8", "elbo_probs", "elbo_gaussian", "elbo_learned_prior"),
            *("elbo_poisson", "elbo_nb", "elbo_zinb"),
            *("iwae", "iwae_probs", "step", "kept step", "step loss"),
        )
    },
    "step of all samples": with_reference(fused_step),
    "kernel": judged_kernel,
    "rsample": with_reference(FASTELBO["rsample"]),
    "bce": one_bce,
    "exp": lambda recon, **_: torch.exp(recon),
    **{op: with_reference(fastelbo.elbo_loss) for op in ("float x", "float32")},
    **{f"{name} step": with_reference(partial(fused_objective, name)) for name in ESTIMATORS},
    "its iwae": with_reference(partial(fused_objective, "iwae")),
    "log_marginal": judged_log_marginal,
    "mixture": reference.mixture_log_prob,
    "mixture per dimension": partial(reference.mixture_log_prob, per_dimension=True),
    "ppca": reference.ppca_log_prob,
    "ppca_score": reference.ppca_log_prob,
}


@dataclass(frozen=True)
class Contender:
    name: str
    functions: dict[str, Callable[..., Any]]  # op -> function of the case's tensors and options
    mode: str = ""  # through torch.compile of this mode, anew for each case and number of threads

    def function(self, op: str) -> Callable[..., Any]:
        function = self.functions[op]
        return torch.compile(function, dynamic=False, mode=self.mode) if self.mode else function


def _without(functions: dict[str, Callable[..., Any]], *ops: str) -> dict[str, Callable[..., Any]]:
    return {op: f for op, f in functions.items() if op not in ops}


SUBJECT = "fastelbo"  # the one that is compared with all others, and that the targets are for
EAGER, COMPILE, TUNED = "eager", "compile", "max-autotune"

CONTENDERS = [
    Contender(EAGER, PLAIN),
    Contender(COMPILE, _without(PLAIN, "log_marginal"), mode="default"),
    Contender(TUNED, _without(PLAIN, "log_marginal"), mode="max-autotune-no-cudagraphs"),
    # Without rsample: the reference draws the noise of the kernels bit by bit, which is slow in plain PyTorch.
    Contender("reference", {op: JUDGE[op] for op in ("elbo_bernoulli", "elbo_gaussian", "iwae")}),
    Contender("distributions", DISTRIBUTIONS),
    Contender("pythae", PYTHAE),
    Contender("pyro", PYRO),
    Contender("sklearn", SKLEARN),
    Contender("matrix products", {"mixture": mixture_by_products}),
    Contender("matrix products compiled", {"mixture": mixture_by_products}, mode="default"),
    # Other operations that are timed beside fastelbo: yardsticks for its time.
    Contender("one BCE", {"bce": one_bce}),
    Contender("its iwae", {"its iwae": partial(fused_objective, "iwae")}),
    Contender("all samples", {"step of all samples": fused_step}),
    Contender("torch.exp", {"exp": lambda recon, **_: torch.exp(recon)}),
    Contender("float x", {"float x": fastelbo.elbo_loss}),
    Contender("float32", {"float32": fastelbo.elbo_loss}),
    Contender("fastelbo compiled", _without(FASTELBO, "log_marginal", "kernel", "ppca_score"), mode="default"),
    Contender(SUBJECT, FASTELBO),
]
