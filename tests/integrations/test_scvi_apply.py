"""`apply()` of scvi-tools' distributions, and of what else benchmarks/count_models.py builds, against the packages."""

import copy
import logging
import warnings
from contextlib import contextmanager, nullcontext
from functools import cache
from unittest import mock

import pytest
import torch

pytest.importorskip("scvi", reason="scvi-tools is not installed: make test-integrations installs it")

import pyro
from scvi import distributions
from torch.distributions import NegativeBinomial as TorchNegativeBinomial

import fastelbo
from benchmarks import count_models
from fastelbo.integrations.scvi import apply

pytestmark = pytest.mark.filterwarnings("ignore:::scvi", "ignore:::lightning", "ignore:::anndata", "ignore:::mudata")
logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)

GENES = 100


@contextmanager
def seen():
    """The calls of fastelbo.log_prob: the likelihood, and the shapes of its parameters."""
    calls, log_prob = [], fastelbo.log_prob

    def spy(recon, x, *, likelihood, **options):
        calls.append((likelihood, [tuple(t.shape) for t in recon]))
        return log_prob(recon, x, likelihood=likelihood, **options)

    with mock.patch.object(fastelbo, "log_prob", spy):
        yield calls


# ----------------------------------------------------------------------------------------------------------------------
# The models.

# The likelihoods of a loss, by the name of the model
GAINS = {
    "SCVI, nb": ["scvi_nb"],
    "SCVI, zinb": ["scvi_zinb"],
    "CondSCVI": ["scvi_nb"],
    "LinearSCVI": ["scvi_nb"],
    "ContrastiveVI": ["scvi_zinb", "scvi_zinb"],
    "SCANVI": ["scvi_zinb"],
    "SCANVI, no labelled cells": ["scvi_zinb"],
    "MRVI": ["scvi_nb"],
    "SCVIVA": ["nb_mean"],
    "SCVIVA, nb": ["scvi_nb"],
    "GIMVI": ["scvi_zinb", "scvi_nb"],
    "JointEmbeddingSCVI": ["scvi_zinb"],
    "Decipher": ["nb_logits"],
    "TOTALVI": ["scvi_nb", "scvi_nb_mixture"],
    "MULTIVI": ["scvi_zinb"],
    "POISSONVI": ["nb_mean"],
    "RNAStereoscope": ["nb_logits"],
    "SpatialStereoscope": ["nb_logits"],
    "METHYLVI": ["beta_binomial"],
    "AUTOZI": ["scvi_zinb", "scvi_nb"],
    "DestVI": ["scvi_nb"],
    "cell2location": ["nb_mean"],
    "cell2location, reference": ["nb_mean"],
    "CellBender": ["nb_mean"],
}
UNCHANGED = ["SysVI", "AmortizedLDA", "RESOLVI", "VELOVI", "SCAR"]
CLASSES = ["SCVI, class", "LinearSCVI, class", "SCANVI, class"]  # test_scvi.py


def test_every_model_of_the_benchmark_is_here():
    assert {*GAINS, *UNCHANGED, *CLASSES} == set(count_models.models())


def build(name: str, genes: int = GENES) -> count_models.Case:
    torch.manual_seed(0)
    pyro.clear_param_store()
    try:
        with warnings.catch_warnings(), mock.patch.object(count_models, "LOCATIONS", 60):
            warnings.simplefilter("ignore")
            return count_models.models(genes)[name]()
    except count_models.Missing as error:
        pytest.skip(str(error))


def step(case: count_models.Case, context) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """The loss, and the gradients of the parameters that have one, by their names."""
    module = copy.deepcopy(case.module)
    with pyro.get_param_store().scope({"params": {}, "constraints": {}}), context(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.manual_seed(1)
        loss = case.loss(module, case.tensors)
        loss.backward()
        named = {**dict(module.named_parameters()), **dict(pyro.get_param_store().named_parameters())}
    return loss.detach(), {name: p.grad for name, p in named.items() if p.grad is not None}


def assert_same(case: count_models.Case, rtol: float, least: float = 1e-3) -> list[tuple[str, list]]:
    """Within and without `apply`; a gradient to `rtol` of its largest element, or of `least` times the largest of all:
    those of biases before a batch norm are rounding."""
    loss, gradients = step(case, nullcontext)
    with seen() as calls:
        applied_loss, applied = step(case, count_models.applied)
    assert loss.isfinite()
    torch.testing.assert_close(applied_loss, loss, rtol=rtol, atol=0)
    assert gradients.keys() == applied.keys() and len(gradients) > 1
    largest = max(float(gradient.abs().max()) for gradient in gradients.values())
    for name, gradient in gradients.items():
        scale = max(float(gradient.abs().max()), least * largest)
        torch.testing.assert_close(
            applied[name], gradient, rtol=0, atol=rtol * scale, msg=lambda text, of=name: f"{of}: {text}"
        )
    return calls


@pytest.mark.parametrize("name", GAINS)
def test_loss_and_gradients_in_float64(name):
    """To scvi's 1e-8, which is added to the mean and to theta themselves here."""
    with count_models.double():
        calls = assert_same(build(name).to(torch.float64), 2e-7)
    assert [likelihood for likelihood, _ in calls] == GAINS[name]


@pytest.mark.parametrize("name", ["SCVI, zinb", "TOTALVI", "POISSONVI", "SpatialStereoscope", "METHYLVI"])
def test_loss_and_gradients_in_float32(name):
    calls = assert_same(build(name), 1e-5, least=1e-2)
    assert [likelihood for likelihood, _ in calls] == GAINS[name]


@pytest.mark.parametrize("name", UNCHANGED)
def test_other_models_are_unchanged(name):
    assert not assert_same(build(name, genes=GENES if name == "RESOLVI" else 20), 0)


@pytest.mark.parametrize("name", ["SCVI, nb", "SCVI, zinb", "TOTALVI", "MULTIVI", "DestVI", "RNAStereoscope"])
def test_theta_of_a_gene_is_not_expanded_to_cells(name):
    """Its gradient is summed by the kernel."""
    with seen() as calls:
        step(build(name), apply)
    for likelihood, shapes in calls:
        theta = {"scvi_nb": 1, "scvi_zinb": 1, "scvi_nb_mixture": 2, "nb_logits": 1}[likelihood]
        assert len(shapes[theta]) == 1, likelihood


# ----------------------------------------------------------------------------------------------------------------------
# The distributions.

B, G = 6, 5


@cache
def given(*shape: int, dtype=torch.float64) -> torch.Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(len(shape)), dtype=torch.float64).to(dtype) + 0.3


@cache
def counts(dtype=torch.float64) -> torch.Tensor:
    return torch.poisson(3 * given(B, G), generator=torch.Generator().manual_seed(0)).to(dtype)


KINDS = {
    "nb": lambda mean, theta, **more: distributions.NegativeBinomial(mu=mean, theta=theta, **more),
    "zinb": lambda mean, theta, **more: distributions.ZeroInflatedNegativeBinomial(
        mu=mean, theta=theta, zi_logits=mean - 1, **more
    ),
    "mixture": lambda mean, theta, **more: distributions.NegativeBinomialMixture(
        mean, 2 * mean, theta, mean - 1, **more
    ),
    "poisson": lambda mean, theta, **more: distributions.Poisson(mean * theta, **more),
    "beta-binomial": lambda mean, theta, **more: distributions.BetaBinomial(
        total_count=torch.full((B, G), 20.0).to(mean), alpha=mean, beta=theta, **more
    ),
    "torch's nb": lambda mean, theta, **more: TorchNegativeBinomial(theta, logits=mean - 1, **more),
    "torch's nb of probs": lambda mean, theta, **more: TorchNegativeBinomial(theta, probs=mean / 2, **more),
    "Pyro's nb": lambda mean, theta, **more: pyro.distributions.NegativeBinomial(theta, logits=mean - 1, **more),
}
WARN, RAISE = ("nb", "zinb", "mixture"), ("poisson", "beta-binomial", "torch's nb", "Pyro's nb")
every_kind = pytest.mark.parametrize("kind", KINDS)


def log_p(kind, x, mean, theta, **options):
    """log p and its gradients, or the error."""
    mean, theta = (t.clone().requires_grad_() for t in (mean, theta))
    try:
        value = KINDS[kind](mean, theta, **options).log_prob(x)
    except (TypeError, ValueError, RuntimeError) as error:
        return type(error), str(error)
    return [value.detach(), *torch.autograd.grad(value.sum(), [mean, theta])]


def assert_as_before(*arguments, rtol=1e-6, **options):
    before = log_p(*arguments, **options)
    with apply(), seen() as calls:
        found = log_p(*arguments, **options)
    if isinstance(before, tuple):
        assert found == before
    else:
        torch.testing.assert_close(found, before, rtol=rtol, atol=rtol)
    return calls


@every_kind
@pytest.mark.parametrize("theta", [(G,), (1, G), (B, 1), (B, G), ()], ids=str)
def test_theta_of_any_shape(kind, theta):
    assert assert_as_before(kind, counts(), given(B, G), given(*theta))


@every_kind
def test_further_samples_of_the_parameters_or_of_x(kind):
    assert assert_as_before(kind, counts(), given(3, B, G), given(G), validate_args=False)
    assert assert_as_before(kind, counts().expand(2, B, G), given(B, G), given(G), validate_args=False)
    assert assert_as_before(kind, counts()[0], given(B, G), given(G), validate_args=False)
    assert assert_as_before(kind, counts()[0, 0], given(), given())


@every_kind
@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.int16, torch.uint8], ids=str)
def test_integers(kind, dtype):
    assert assert_as_before(kind, counts(dtype), given(B, G), given(G))


@every_kind
@pytest.mark.parametrize(
    "x, mean, theta",
    [
        (torch.bfloat16, torch.bfloat16, torch.bfloat16),
        (torch.float64, torch.float32, torch.float32),
        (torch.float32, torch.float64, torch.float64),
        (torch.int8, torch.float64, torch.float64),
        (torch.float64, torch.float32, torch.float64),
    ],
    ids=str,
)
def test_other_types_are_computed_as_before(kind, x, mean, theta):
    converted = mean != theta and kind not in ("nb", "zinb", "mixture")
    arguments = counts(x), given(B, G, dtype=mean), given(G, dtype=theta)
    calls = assert_as_before(kind, *arguments, rtol=1e-6 if converted else 0)
    assert converted or not calls


@every_kind
def test_of_views_the_tensor_that_was_expanded_is_found(kind):
    """And no other that shares its memory."""
    base = given(2 * G)
    square = given(G, G)
    x, mean = counts()[:G], given(B, G)[:G]
    for theta in (base[:G], base[::2], base[:G].view(1, G), square.t(), square[1], square.t()[:1]):
        assert_as_before(kind, x, mean, theta, validate_args=False)
    expanded = given(G).expand(B, G)
    found = assert_as_before(kind, counts(), given(B, G), expanded)
    assert found


@every_kind
def test_under_transforms_of_torch(kind):
    def per_cell(x, mean, theta):
        return KINDS[kind](mean, theta, validate_args=False).log_prob(x)

    if kind == "beta-binomial":
        pytest.skip("Its total has a row per cell here")
    arguments = counts(), given(B, G), given(G)
    results = []
    for context in (nullcontext, apply):
        with context():
            _, tangent = torch.func.jvp(lambda mean: per_cell(counts(), mean, given(G)), (given(B, G),), (given(B, G),))
            gradient = torch.func.grad(lambda mean: per_cell(counts(), mean, given(G)).sum())(given(B, G))
            results.append([torch.vmap(per_cell, (0, 0, None))(*arguments), tangent, gradient])
    torch.testing.assert_close(*results, rtol=1e-6, atol=1e-6)


def test_a_mixture_of_two_thetas_is_left_to_scvi():
    """Its constructor makes a tuple of the second, which log_prob does not take."""
    px = distributions.NegativeBinomialMixture(given(B, G), given(B, G), given(G), given(B, G), theta2=given(B, G))
    with apply(), seen() as calls, pytest.raises(TypeError):
        px.log_prob(counts())
    px.theta2 = px.theta2[1]
    before = px.log_prob(counts())
    with apply():
        assert torch.equal(px.log_prob(counts()), before)
    assert not calls


@pytest.mark.parametrize("bad", [-1.0, 0.5, float("nan"), float("inf")])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=["fused", "as before"])
@pytest.mark.parametrize("kind", WARN)
def test_scvi_warns_of_what_is_no_count_once_at_every_call(kind, dtype, bad):
    x = counts(dtype).clone()
    for validate in (True, False):
        numbers = []
        for context in (nullcontext, apply):
            px = KINDS[kind](given(B, G, dtype=dtype), given(G, dtype=dtype), validate_args=validate)
            with context(), warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                px.log_prob(x)
                x[0, 0], kept = bad, x[0, 0].clone()
                for _ in range(2):
                    px.log_prob(x)
                x[0, 0] = kept
            numbers.append(["within the support" in str(warning.message) for warning in caught])
        assert numbers[0] == numbers[1] == [True] * (2 if validate or kind != "nb" else 0)


@pytest.mark.parametrize("bad", [-1.0, 0.5, float("nan"), float("inf")])
@pytest.mark.parametrize("kind", RAISE)
def test_others_raise_of_what_is_no_count(kind, bad):
    x = counts().clone()
    x[0, 0] = bad
    for found in (x, x[:, :2]):  # of no count, of another shape
        assert isinstance(log_p(kind, found, given(B, G), given(G), validate_args=True), tuple)
        assert not assert_as_before(kind, found, given(B, G), given(G), validate_args=True)
    x[0, 0] = 1
    assert_as_before(kind, x, given(B, G), given(G), validate_args=True)


# ----------------------------------------------------------------------------------------------------------------------
# On and off.

CLASSES_OF_COUNTS = [
    distributions.NegativeBinomial,
    distributions.ZeroInflatedNegativeBinomial,
    distributions.NegativeBinomialMixture,
    distributions.Poisson,
    distributions.BetaBinomial,
    TorchNegativeBinomial,
]
INHERIT = {distributions.Poisson, distributions.BetaBinomial}


def is_on() -> bool:
    with seen() as calls:
        KINDS["poisson"](given(B, G), given(G)).log_prob(counts())
        KINDS["Pyro's nb"](given(B, G), given(G)).log_prob(counts())
    assert len(calls) in (0, 2)
    return bool(calls)


@pytest.fixture(autouse=True)
def _off_again():
    own = [vars(of).get("log_prob") for of in CLASSES_OF_COUNTS]
    yield
    assert [vars(of).get("log_prob") for of in CLASSES_OF_COUNTS] == own


def test_classes_that_inherit_log_prob_inherit_it_again():
    for _ in range(2):
        assert not is_on()
        with apply():
            assert is_on() and all("log_prob" in vars(of) for of in CLASSES_OF_COUNTS)
        assert {of for of in CLASSES_OF_COUNTS if "log_prob" not in vars(of)} == INHERIT


def test_within_one_another_the_outer_one_stays_on():
    with apply():
        with apply():
            assert is_on()
        assert is_on()
    assert not is_on()


def test_a_call_outlasts_a_block():
    applied = apply()
    with apply() as inner:
        inner.undo()
        assert is_on()
    assert is_on()
    applied.undo()
    assert not is_on()


def test_undone_twice_is_undone_once():
    outer, inner = apply(), apply()
    inner.undo()
    inner.undo()
    assert is_on()
    outer.undo()
    outer.undo()
    assert not is_on()
    with apply():
        assert is_on()


def test_an_exception_undoes_it():
    with pytest.raises(ZeroDivisionError), apply():
        raise ZeroDivisionError
    assert not is_on()


def test_an_error_of_log_prob_undoes_nothing():
    with apply():
        with pytest.raises(ValueError, match="within the support"):
            KINDS["poisson"](given(B, G), given(G)).log_prob(-counts() - 1)
        assert is_on()


def test_a_model_trains_and_is_saved(tmp_path):
    """What is saved within `apply` is scvi's own."""
    import scvi

    adata = scvi.data.synthetic_iid(batch_size=64, n_genes=20)
    scvi.model.SCVI.setup_anndata(adata, batch_key="batch")
    with apply(), seen() as calls, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = scvi.model.SCVI(adata, n_hidden=8, n_latent=2)
        model.train(max_epochs=2, accelerator="cpu", enable_progress_bar=False, logger=False)
        elbo = float(model.get_elbo())
        model.save(tmp_path / "model", save_anndata=True)
    assert len(calls) > 2
    loaded = scvi.model.SCVI.load(tmp_path / "model", accelerator="cpu")
    assert float(loaded.get_elbo()) == pytest.approx(elbo, rel=0.1)  # of other draws


# ----------------------------------------------------------------------------------------------------------------------
# Mixtures of Gaussians.


def test_differential_abundance_of_mrvi_is_that_of_fastelbo_s_mixtures():
    cls, adata = count_models.model_class("TorchMRVI", "MRVI"), count_models.cells(GENES, 60)
    cls.setup_anndata(adata, sample_key="sample")
    model = cls(adata)
    model.is_trained_ = True
    plain = model.differential_abundance(adata)
    with apply(), mock.patch.object(fastelbo, "mixture_log_prob", wraps=fastelbo.mixture_log_prob) as mixture:
        fused = model.differential_abundance(adata)
    assert mixture.call_count >= 4  # samples
    values = (torch.from_numpy(found["log_probs"].values) for found in (fused, plain))
    torch.testing.assert_close(*values, rtol=1e-5, atol=1e-5)


def gaussians(loc: torch.Tensor, scale: torch.Tensor, kind=torch.distributions.Normal):
    cats = torch.distributions.Categorical(logits=torch.linspace(-1, 1, loc.shape[-2], dtype=loc.dtype))
    return torch.distributions.MixtureSameFamily(cats, torch.distributions.Independent(kind(loc, scale), 1))


@pytest.mark.parametrize("lead", [(7,), (3, 7)])
def test_mixtures_of_gaussians(lead):
    loc, scale = given(5, 4).detach().log().requires_grad_(), given(5, 4).detach().requires_grad_()
    z = torch.randn(*lead, 4, dtype=torch.float64, requires_grad=True)
    values = []
    for context in (nullcontext, apply):
        with context():
            values.append(gaussians(loc, scale).log_prob(z))
    torch.testing.assert_close(*values, rtol=1e-12, atol=1e-12)
    assert "MixtureLogProb" in values[1].grad_fn.name() and "MixtureLogProb" not in values[0].grad_fn.name()
    upstream = torch.randn(lead, dtype=torch.float64)
    grads = [torch.autograd.grad(v, (z, loc, scale), upstream) for v in values]
    torch.testing.assert_close(*grads, rtol=1e-10, atol=1e-12)


def test_other_mixtures_are_torch_s():
    """Components of each cell, of half types, and of other families."""
    cells, z = given(7, 5, 4), torch.randn(7, 4, dtype=torch.float64)
    half = [t.detach().bfloat16() for t in (cells[0], cells[0])]
    cases = [
        (gaussians(cells, cells), z),
        (gaussians(*half), z.bfloat16()),
        (gaussians(cells[0], cells[0], torch.distributions.Laplace), z),
    ]
    for px, value in cases:
        before = px.log_prob(value)
        with apply(), mock.patch.object(fastelbo, "mixture_log_prob", side_effect=AssertionError):
            assert torch.equal(px.log_prob(value), before)
    with apply(), pytest.raises(ValueError, match="within the support"):
        gaussians(cells[0], cells[0]).log_prob(z * torch.nan)
