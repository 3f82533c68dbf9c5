"""The same bits for any number of threads: values and all gradients of every public function.

torch shares out a sum from 32,768 elements on, and a BLAS its products when it likes. So the shapes are around that
number, with few columns, few rows, and rows that no vector divides.
"""

import inspect
import math
import subprocess
import sys
from collections.abc import Callable, Iterator

import pytest
import torch
from contracts import FUNCTIONS, SEED, Function, K, _counts, _kept, _mask, _r, _unit
from oracle import gradients, leaves_of, tensors_of
from torch import Tensor, nn

import fastelbo
from fastelbo import PPCA, VAE, Posterior, distributions
from fastelbo.likelihoods import LIKELIHOODS

THREADS = (2, 3, 8)
SIZES = [
    ((33_000, 1), torch.float32),
    ((1, 33_000), torch.float64),
    ((64, 784), torch.float32),
    ((64, 784), torch.bfloat16),
    ((1000, 36), torch.float32),
    ((2, 40_000), torch.float64),
    ((5000, 3), torch.bfloat16),
]
PCA_SIZES = [
    ((64, 784), torch.float32),
    ((64, 784), torch.float64),
    ((1, 33_000), torch.float64),
    ((33_000, 3), torch.float64),
]


def _posterior(mu: Tensor, logvar: Tensor, *prior: Tensor) -> Posterior:
    return fastelbo.rsample(mu, logvar, K, seed=SEED, **dict(zip(("prior_mu", "prior_logvar"), prior, strict=False)))


def _latent(b: int, d: int) -> list[Tensor]:
    return [_r(b, d), 0.5 * _r(b, d)]


def _one_number(b: int, d: int) -> list[Tensor]:
    """Posterior, and a prior of one number each."""
    return [*_latent(b, d), _r(), 0.5 * _r(1)]


def _elbo(**options: object) -> Callable[..., object]:
    def call(mean: Tensor, mu: Tensor, logvar: Tensor, beta: Tensor, *prior: Tensor) -> object:
        given = dict(zip(("prior_mu", "prior_logvar"), prior, strict=False)) | options
        if given.get("kl_mask"):
            given["kl_mask"] = _mask(mu) > 0
        x = mean.detach().flip(0)
        return tuple(fastelbo.elbo_parts(mean, x, mu, logvar, likelihood="gaussian", beta=beta, **given))

    return call


def _bound(estimator: str, reduction: str) -> Callable[..., object]:
    """Of two latent layers, the upper one with a prior of one number."""

    def call(log_p: Tensor, mu: Tensor, logvar: Tensor, prior_mu: Tensor, prior_logvar: Tensor, weight: Tensor):
        layers = [_posterior(mu, logvar, prior_mu, prior_logvar), _posterior(logvar, mu)]
        weight = 1.0 if estimator == "rws" else weight
        options = {"estimator": estimator, "kl_weight": weight, "reduction": reduction}
        return tuple(fastelbo.bound_parts(log_p, layers, **options))

    return call


def _of_kept(reduction: str) -> Callable[..., object]:
    def call(log_w: Tensor, mu: Tensor, logvar: Tensor, prior_mu: Tensor, prior_logvar: Tensor):
        kept = fastelbo.keep_samples(log_w.detach(), 2, u=0.3)
        q = fastelbo.rsample(mu, logvar, kept=kept, prior_mu=prior_mu, prior_logvar=prior_logvar, seed=SEED)
        log_p = q.z.flatten(1)[:, 0].to(q.log_ratio.dtype)
        options = {"estimator": "dreg", "reduction": reduction}
        return fastelbo.kept_loss(log_p, q, kept, log_w.detach(), **options), kept.scale

    return call


class _Given(nn.Module):
    def __init__(self, *tensors: Tensor) -> None:
        super().__init__()
        self.tensors = tensors

    def forward(self, *_: Tensor) -> tuple[Tensor, ...]:
        return self.tensors


class _Half(nn.Module):
    def forward(self, z: Tensor) -> Tensor:
        return 0.5 * z


def _vae(method: str, **options: object) -> Callable[..., object]:
    """A model of no sums of its own."""

    def call(mu: Tensor, logvar: Tensor, prior_mu: Tensor, prior_logvar: Tensor) -> object:
        model = VAE(_Given(mu, logvar), _Half(), "gaussian", prior=_Given(prior_mu, prior_logvar))
        if method == "importance_weights":
            found = fastelbo.importance_weights(model, mu.detach(), K, seed=SEED)
            return found.log_w, found.z, found.normalized
        return tuple(getattr(model, method)(mu.detach(), seed=SEED, **options))

    return call


def _estimate(log_w: Tensor) -> tuple[Tensor, ...]:
    """Of two halves of the samples [K, B]."""
    both = [fastelbo.LogMeanExp().update(part) for part in log_w.chunk(2)]
    return tuple((both[0].merge(both[1]) if len(both) > 1 else both[0]).result())


def _meter(mu: Tensor, logvar: Tensor, log_w: Tensor) -> fastelbo.DiagnosticsMeter:
    return fastelbo.DiagnosticsMeter().update(_posterior(mu, logvar), log_w)


def _figures(found: fastelbo.Diagnostics) -> tuple[Tensor, ...]:
    return *found, found.collapsed


def _density(kind: type, *, likelihood: bool = True, **options: object) -> Callable[..., object]:
    def call(x: Tensor, *parameters: Tensor) -> object:
        d = kind(*parameters, validate_args=False, **options).expand(x.shape[:1])
        torch.manual_seed(SEED)
        drawn = [d.rsample((2,))] if d.has_rsample else []
        return d.log_prob(_counts(x) if "Binomial" in kind.__name__ or kind is distributions.Poisson else x), *drawn

    return call


def _kl(*parameters: Tensor) -> Tensor:
    q, p = (distributions.Gaussian(*parameters[i : i + 2], validate_args=False) for i in (0, 2))
    return distributions.gaussian_kl(q, p)


MORE = {
    "elbo_loss, a beta per dimension": Function(_elbo(), lambda b, d: [_r(b, d), *_latent(b, d), _unit(d)]),
    "elbo_loss, a beta [1]": Function(_elbo(reduction="sum"), lambda b, d: [_r(b, d), *_latent(b, d), _unit(1)]),
    "elbo_loss, kl_mask": Function(_elbo(kl_mask=True), lambda b, d: [_r(b, d), *_latent(b, d), _unit(1)[0]]),
    "elbo_loss, a prior of one number": Function(
        _elbo(free_bits=0.1), lambda b, d: [_r(b, d), *_latent(b, d), _unit(1)[0], _r(1), 0.5 * _r()]
    ),
    "elbo_loss, all of these": Function(
        _elbo(kl_mask=True), lambda b, d: [_r(b, d), *_latent(b, d), _unit(d), _r(), 0.5 * _r(1)]
    ),
    "ELBOLoss.forward": Function(
        lambda r, x, mu, lv, mu_p: fastelbo.ELBOLoss(beta=0.3)(r, x, mu, lv, prior_mu=mu_p),
        lambda b, d: [_r(b, d), _unit(b, d), *_latent(b, d), _r(1)],
    ),
    "IWAELoss.forward": Function(fastelbo.IWAELoss(), lambda b, d: [_r(K, b, d), _unit(b, d), _r(K, b)]),
    "gaussian_kl, a prior of one number": Function(
        lambda *given: fastelbo.gaussian_kl(*given, mask=_mask(given[0]) > 0), _one_number
    ),
    "gaussian_kl, of every dimension": Function(lambda *given: fastelbo.gaussian_kl(*given, reduce=False), _one_number),
    "gaussian_log_prob, a logvar of every datum": Function(
        fastelbo.gaussian_log_prob, lambda b, d: [_r(K, b, d), _r(b, d), 0.5 * _r(b, 1)]
    ),
    "rsample, a prior of one number": Function(lambda *given: _posterior(*given)[:3], _one_number),
    "rsample, a prior for every dimension": Function(
        lambda *given: _posterior(*given)[:3], lambda b, d: [*_latent(b, d), _r(d), 0.5 * _r(d)]
    ),
    "rsample, batch_dims": Function(
        lambda mu, lv, mu_p: fastelbo.rsample(mu, lv, prior_mu=mu_p, seed=SEED, batch_dims=2)[:3],
        lambda b, d: [_r(K, b, d), 0.5 * _r(K, b, d), _r(b, d)],
    ),
    "rsample, kept, a prior of one number": Function(
        lambda mu, lv, mu_p, lv_p: fastelbo.rsample(
            mu, lv, kept=_kept(mu), prior_mu=mu_p, prior_logvar=lv_p, seed=SEED
        )[:3],
        _one_number,
    ),
    **{
        f"bound_loss, {estimator} {reduction}": Function(
            _bound(estimator, reduction), lambda b, d: [_r(K, b), *_one_number(b, d), _unit(1)[0]]
        )
        for estimator, reduction in (("iwae", "mean"), ("dreg", "sum"), ("rws", "none"))
    },
    "bound_loss, many samples": Function(
        lambda log_p, mu, lv, weight: tuple(
            fastelbo.bound_parts(
                log_p.mT,
                fastelbo.rsample(mu.mT[..., None], lv.mT[..., None], seed=SEED, batch_dims=2),
                kl_weight=weight,
            )
        ),
        lambda b, d: [_r(b, d), *_latent(b, d), _unit(1)[0]],
    ),
    "keep_samples": Function(lambda w: tuple(fastelbo.keep_samples(w, 1, u=0.6)), lambda b, d: [3 * _r(d + 1, b)]),
    "kept_loss, mean": Function(_of_kept("mean"), lambda b, d: [_r(K, b), *_one_number(b, d)]),
    "kept_loss, sum": Function(_of_kept("sum"), lambda b, d: [_r(K, b), *_one_number(b, d)]),
    "estimator_weights": Function(
        lambda w: fastelbo.estimator_weights(w, estimator="miwae"), lambda b, d: [3 * _r(d, b)]
    ),
    "VAE.loss": Function(_vae("parts", beta=0.3), _one_number),
    "VAE.loss, keep": Function(_vae("parts", objective="iwae", num_samples=9, keep=2), _one_number),
    "VAE.loss, vr": Function(_vae("parts", objective="vr", num_samples=K), _one_number),
    "VAE.log_marginal": Function(_vae("log_marginal", num_samples=7), _one_number),
    "importance_weights ImportanceWeights.normalized": Function(_vae("importance_weights"), _one_number),
    "LogMeanExp.update LogMeanExp.merge LogMeanExp.result": Function(_estimate, lambda b, d: [3 * _r(b, d)]),
    "diagnostics Diagnostics.collapsed": Function(
        lambda mu, lv, log_w: _figures(fastelbo.diagnostics(_posterior(mu, lv, mu[0]), log_w)),
        lambda b, d: [*_latent(b, d), _r(K, b)],
    ),
    "DiagnosticsMeter.update DiagnosticsMeter.merge DiagnosticsMeter.result": Function(
        lambda mu, lv, log_w: _figures(_meter(mu, lv, log_w).merge(_meter(lv, mu, log_w)).result()),
        lambda b, d: [*_latent(b, d), _r(K, b)],
    ),
    "distributions.Bernoulli.log_prob": Function(
        _density(distributions.Bernoulli), lambda b, d: [_unit(b, d), _r(1, d)]
    ),
    "distributions.Gaussian.log_prob": Function(
        _density(distributions.Gaussian), lambda b, d: [_r(b, d), _r(1, d), 0.5 * _r()]
    ),
    "distributions.Laplace.log_prob": Function(
        _density(distributions.Laplace), lambda b, d: [_r(b, d), _r(b, 1).expand(b, d).clone(), 0.5 * _r(b, 1)]
    ),
    "distributions.Poisson.log_prob": Function(_density(distributions.Poisson), lambda b, d: [_r(b, d), _r(d)]),
    "distributions.NegativeBinomial.log_prob": Function(
        _density(distributions.NegativeBinomial), lambda b, d: [_r(b, d), _r(d), _r(b, 1)]
    ),
    "distributions.ZeroInflatedNegativeBinomial.log_prob": Function(
        _density(distributions.ZeroInflatedNegativeBinomial), lambda b, d: [_r(b, d), _r(d), _r(), _r(b, 1)]
    ),
    "distributions.Fused.entropy": Function(
        lambda *parameters: distributions.Gaussian(*parameters, validate_args=False).entropy(),
        lambda b, d: [_r(b, d), 0.5 * _r(d)],
    ),
    "distributions.gaussian_kl": Function(_kl, lambda b, d: [_r(b, d), 0.5 * _r(d), _r(d), 0.5 * _r(b, 1)]),
}


def _pca(method: str, *, gaps: bool = False, **options: object) -> Callable[..., object]:
    def call(W: Tensor, b: Tensor, log_sigma2: Tensor, *arrays: Tensor) -> object:
        m = PPCA(W.shape[1], len(W), dtype=W.dtype)
        m._parameters.update(W=W, b=b, log_sigma2=log_sigma2)
        if gaps:
            arrays = (torch.where(_mask(arrays[0]) > 0, arrays[0], math.nan), *arrays[1:])
        found = getattr(m, method.split()[0])(*arrays, **options)
        return torch.tensor(found, dtype=torch.float64) if method.startswith("score") else found

    return call


def _components(n: int, d: int) -> int:
    """Few where there are many rows; else more than a LAPACK keeps to itself."""
    return 2 if d < 10 else 5 if n == 1 else 40


def _data(n: int, d: int) -> list[Tensor]:
    return [_r(d, _components(n, d)), _r(d), _r(), _r(n, d)]


def _with_latent(n: int, d: int) -> list[Tensor]:
    return [*_data(n, d), *_latent(n, _components(n, d))]


PCA = {
    "ppca_log_prob": Function(lambda W, b, s, x: fastelbo.ppca_log_prob(x, W, b, s), _data),
    "ppca_log_prob, missing": Function(
        lambda W, b, s, x: fastelbo.ppca_log_prob(x, W, b, s, observed=_mask(x) > 0), _data
    ),
    **{f"PPCA.{name}": Function(_pca(name), _with_latent) for name in ("elbo", "inference_gap")},
    **{f"PPCA.{name}": Function(_pca(name), _data) for name in ("score PPCA.bic", "posterior PPCA.transform")},
    "PPCA.log_prob PPCA.score_samples, missing": Function(_pca("log_prob", gaps=True), _data),
    "PPCA.impute, missing": Function(_pca("impute", gaps=True, return_std=True), _data),
    "PPCA.score, return_std": Function(_pca("score", return_std=True), _data),
    "PPCA.predict": Function(_pca("predict", columns=[2, 0]), _data),
    "PPCA.predict, missing": Function(_pca("predict", gaps=True, columns=[2, 0]), _data),
    "PPCA.inverse_transform": Function(
        _pca("inverse_transform"), lambda n, d: [*_data(n, d)[:3], *_latent(n, _components(n, d))[:1]]
    ),
}

TABLE = {name: row for name, row in FUNCTIONS.items() if name not in PCA} | MORE


@pytest.fixture(autouse=True)
def _threads_afterwards():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def _results(function: Function, inputs: list[Tensor], threads: int) -> list[Tensor]:
    """Values and gradients."""
    torch.set_num_threads(threads)
    torch.manual_seed(1)
    leaves = leaves_of(inputs)
    outputs = tensors_of(function.call(*leaves))
    return [*outputs, *gradients(outputs, leaves, [torch.randn(o.shape) for o in outputs])]


@pytest.mark.parametrize("name", [*TABLE, *PCA])
def test_any_number_of_threads_gives_the_same_bits(name):
    function = (TABLE | PCA)[name]
    for shape, dtype in PCA_SIZES if name in PCA else SIZES:
        torch.manual_seed(1)
        inputs = [t.to(dtype).requires_grad_() for t in function.make(*shape)]
        expected = _results(function, inputs, 1)
        for threads in THREADS:
            for i, (a, e) in enumerate(zip(_results(function, inputs, threads), expected, strict=True)):
                same = torch.equal(a.nan_to_num(), e.nan_to_num())
                assert same, f"{shape} {dtype}: tensor {i} {tuple(a.shape)} with {threads} threads"


ONE_RUNTIME = """
import os, re, torch, fastelbo

def threads_after(call, allowed):
    torch.set_num_threads(allowed)
    call(x)
    return len(os.listdir("/proc/self/task")) - before

def fused(x):
    fastelbo.gaussian_kl(x, x)

x = torch.randn(512, 784)
before = len(os.listdir("/proc/self/task"))
print(threads_after(fused, 1), threads_after(fused, 3), threads_after(torch.exp, 3), threads_after(fused, 3))
print(len(set(re.findall(r"/.*lib(?:g|i|)omp.*", open("/proc/self/maps").read()))))
"""


def test_the_threads_are_those_of_torch():
    """A second OpenMP would have threads of its own, and a number of them that torch does not set."""
    done = subprocess.run(
        [sys.executable, "-c", f"import torch; torch.set_num_threads(1)\n{ONE_RUNTIME}"], text=True, capture_output=True
    )
    assert done.stdout.split() == ["0", "2", "2", "2", "1"], done.stderr


# ---------------------------------------------------------------------------------------------------------------------
# Nothing is left out.

NO_SUMS = {
    "AggregatedPosterior.log_prob": "mixture_log_prob",
    "AggregatedPosterior.terms": "mixture_log_prob, and means in float64",
    "MixturePrior.components": "no sums",
    "VampPrior.components": "a module of the user's",
    "aggregated_posterior": "a module of the user's",
    "build_info": "no numbers",
    "load": "no numbers",
    "reference_mode": "no numbers",
    "reference": "plain PyTorch, which keeps no order",
    "DiagnosticsMeter.all_reduce": "merge, in the order of the processes",
    "distributions.Fused.log_prob": "that of the classes below it",
    "PPCA.asked": "no numbers",
    "PPCA.fit": "the same to rounding, as docs/limits.md says",
    "PPCA.fit_transform": "the same to rounding, as docs/limits.md says",
    "PPCA.sample": "inverse_transform, and noise",
    "PPCA.n_parameters": "no sums",
    "Objective.check_keep": "no numbers",
    "Objective.draws": "no numbers",
    "Objective.estimator": "no numbers",
    "Objective.loss": "the losses",
    "Objective.parts": "the losses",
    "Objective.row": "no numbers",
    "Posterior.prior_options": "no sums",
    "Posterior.under": "no sums",
    "Scaling.forward": "no sums",
    "Scaling.inverse": "no sums",
    "evaluate": "VAE.log_marginal, and means in float64 over batches in their order",
    "VAE.forward": "modules of the user's, and rsample",
    "VAELoss.forward": "VAE.loss",
    "VAE.encode": "a module of the user's",
    "VAE.decode": "a module of the user's",
    "VAE.reconstruct": "a module of the user's",
    "VAE.sample": "a module of the user's",
}
OF_MODULES = {"extra_repr", "get_extra_state", "set_extra_state"}
OF_DISTRIBUTIONS = {  # element by element
    *("expand", "sample", "rsample", "support", "mean", "variance", "logits", "probs", "logvar", "log_scale"),
    *("cdf", "icdf", "enumerate_support", "has_enumerate_support", "mode", "param_shape", "loc", "scale"),
    *("total_count", "rate", "df", "of_torch"),
}


def _public() -> Iterator[str]:
    for name in fastelbo.__all__:
        module = getattr(fastelbo, name)
        nested = [f"{name}.{n}" for n in module.__all__] if hasattr(module, "__all__") else [name]
        for path in nested:
            found = module if path == name else getattr(module, path.split(".")[1])
            if not inspect.isclass(found):
                yield path
                continue
            rest = OF_DISTRIBUTIONS if path.startswith("distributions.") else OF_MODULES
            for n, f in vars(found).items():
                if not n.startswith("_") and n not in rest and (inspect.isfunction(f) or isinstance(f, property)):
                    yield f"{path}.{n}"


def test_every_public_function_is_walked():
    walked = {word for name in (*TABLE, *PCA) for word in name.split(",")[0].split()}
    of_likelihoods = {"bernoulli": "bernoulli_log_prob", "gaussian": "gaussian_log_prob"}
    of_likelihoods |= {"zinb_mean": "nb_mean", "nb_logits": "nb_mean", "gamma_poisson": "nb_mean"}  # the same sums
    if walked >= {of_likelihoods.get(name, name) for name in LIKELIHOODS}:
        walked.add("log_prob")
    walked |= {name.replace("loss", "parts") for name in walked}  # of which the loss is the first
    public = set(_public())
    assert sorted(public - walked - set(NO_SUMS)) == []
    assert set(NO_SUMS) <= public - walked, "of these there is nothing, or a row"
