"""fastelbo.integrations.scvi against scvi-tools' own classes. `make test-integrations` has the environment for it."""

import functools
import importlib.util
import inspect
import logging
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("scvi", reason="scvi-tools is not installed: make test-integrations installs it")

import scvi
from scvi.distributions import _negative_binomial
from scvi.distributions._utils import DistributionConcatenator, subset_distribution
from scvi.module import LDVAE, SCANVAE, VAE

from fastelbo.integrations.scvi import SCANVI, SCVI, FusedLDVAE, FusedSCANVAE, FusedVAE, LinearSCVI

pytestmark = pytest.mark.filterwarnings("ignore")  # of lightning and scvi: no GPU, few workers, small batches
logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)

CELLS, GENES, BATCHES, LABELS = 40, 30, 2, 3
LIKELIHOODS = ("nb", "zinb", "poisson", "normal")
DISPERSIONS = ("gene", "gene-batch", "gene-label", "gene-cell")


# ----------------------------------------------------------------------------------------------------------------------
# The module.


def modules(gene_likelihood="zinb", classes=(VAE, FusedVAE), **options) -> tuple[VAE, FusedVAE]:
    """scvi's module and the fused one, with the same parameters."""
    options = {
        "n_input": GENES,
        "n_batch": BATCHES,
        "n_labels": LABELS,
        "n_hidden": 16,
        "n_latent": 4,
        "gene_likelihood": gene_likelihood,
        "library_log_means": np.log([[60.0, 80.0]]),
        "library_log_vars": np.array([[0.3, 0.5]]),
        **options,
    }
    plain, fused = (cls(**options) for cls in classes)
    fused.load_state_dict(plain.state_dict())
    return plain, fused


def cells(dtype=torch.float32, **more) -> dict[str, torch.Tensor]:
    x = torch.poisson(torch.distributions.Gamma(0.5, 0.2).sample((CELLS, GENES))).to(dtype)
    x[0], x[1, 0] = 0, 1000
    x[0, 1] = 1  # scvi takes the logarithm of the sum
    batch, labels = (torch.randint(0, n, (CELLS, 1)) for n in (BATCHES, LABELS))
    return {"X": x, "batch": batch, "labels": labels, **more}


def step(module: VAE, tensors: dict[str, torch.Tensor], **options):
    """The outputs of a forward pass after its backward."""
    torch.manual_seed(1)
    module.zero_grad()
    *_, outputs = module(tensors, **options)
    outputs.loss.backward()
    return outputs


@pytest.fixture
def double(monkeypatch):
    """scvi's one_hot(...).float() keeps it from float64."""
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)


@pytest.fixture
def without_eps(monkeypatch):
    """scvi's own functions of a negative binomial, without the 1e-8 that they add to mu and theta."""
    for name in ("log_nb_positive", "log_zinb_positive"):
        function = getattr(_negative_binomial, name)

        def exact(x, mu, theta, *others, eps, function=function, **more):
            return function(x, mu, theta, *others, eps=1e-300, **more)  # 0 would put x = 0 in neither of scvi's cases

        monkeypatch.setattr(_negative_binomial, name, exact)


def assert_same(plain: VAE, fused: FusedVAE, tensors: dict[str, torch.Tensor], rtol: float, **options) -> None:
    """Outputs and gradients, to `rtol` of the largest: gradients of biases before a batch norm are rounding."""
    a, b = (step(module, tensors, **options) for module in (plain, fused))
    assert torch.allclose(a.loss, b.loss, rtol=rtol, atol=0)
    for part in ("reconstruction_loss", "kl_local", "kl_global"):
        of_a, of_b = getattr(a, part), getattr(b, part)
        assert of_a.keys() == of_b.keys()
        for key in of_a:
            assert of_a[key].shape == of_b[key].shape
            torch.testing.assert_close(of_b[key], of_a[key], rtol=rtol, atol=rtol * float(a.loss))
    assert a.extra_metrics.keys() == b.extra_metrics.keys() and a.n_obs_minibatch == b.n_obs_minibatch
    largest = max(float(p.grad.abs().max()) for p in plain.parameters() if p.grad is not None)
    for (name, p), q in zip(plain.named_parameters(), fused.parameters(), strict=True):
        if p.grad is None:
            assert q.grad is None or not q.grad.any(), name
        else:
            torch.testing.assert_close(
                q.grad, p.grad, rtol=rtol, atol=rtol * largest, msg=lambda m, n=name: f"{n}: {m}"
            )


@pytest.mark.parametrize("observed", [True, False], ids=["observed", "inferred"])
@pytest.mark.parametrize("dispersion", DISPERSIONS)
@pytest.mark.parametrize("gene_likelihood", LIKELIHOODS)
def test_loss_and_gradients_in_float64(double, without_eps, gene_likelihood, dispersion, observed):
    plain, fused = modules(gene_likelihood, dispersion=dispersion, use_observed_lib_size=observed)
    options = {"loss_kwargs": {"kl_weight": 0.3}}
    assert_same(plain.double(), fused.double(), cells(torch.float64), 1e-11, **options)


PAIRS = {"SCVI": (VAE, FusedVAE), "SCANVI": (SCANVAE, FusedSCANVAE), "LinearSCVI": (LDVAE, FusedLDVAE)}


@pytest.mark.parametrize("observed", [True, False], ids=["observed", "inferred"])
@pytest.mark.parametrize("dispersion", ["gene", "gene-batch"])
@pytest.mark.parametrize("gene_likelihood", ["nb", "zinb", "poisson"])
@pytest.mark.parametrize("of", ["SCANVI", "LinearSCVI"])
def test_loss_and_gradients_of_the_other_classes(double, without_eps, of, gene_likelihood, dispersion, observed):
    options = {"dispersion": dispersion, "use_observed_lib_size": observed}
    plain, fused = modules(gene_likelihood, PAIRS[of], **options)
    tensors, loss = cells(torch.float64), {"kl_weight": 0.3}
    if of == "SCANVI":
        loss |= {"labelled_tensors": {key: value[:9] for key, value in tensors.items()}, "classification_ratio": 5}
    assert_same(plain.double(), fused.double(), tensors, 1e-11, loss_kwargs=loss)


@pytest.mark.parametrize("of", PAIRS)
def test_loss_keeps_its_signature(of):
    """scvi's training plan hands kl_weight and others to a loss that has arguments of these names."""
    plain, fused = PAIRS[of]
    assert inspect.signature(fused.loss) == inspect.signature(plain.loss)
    assert "kl_weight" in inspect.signature(fused.loss).parameters


@pytest.mark.parametrize("gene_likelihood", LIKELIHOODS)
def test_scvi_eps_is_the_difference(double, gene_likelihood):
    plain, fused = modules(gene_likelihood)
    assert_same(plain.double(), fused.double(), cells(torch.float64), 1e-7)


OPTIONS = {
    "logistic normal": {"latent_distribution": "ln"},
    "layers": {"n_layers": 2, "use_layer_norm": "both", "use_batch_norm": "none"},
    "covariates": {"n_continuous_cov": 2, "n_cats_per_cov": [3, 2], "encode_covariates": True},
    "embedding": {"batch_representation": "embedding"},
    "payload": {"extra_payload_autotune": True},
    "inferred library, batch norm in neither": {"use_observed_lib_size": False, "use_batch_norm": "none"},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("gene_likelihood", LIKELIHOODS)
def test_options_of_the_module(double, without_eps, gene_likelihood, options):
    plain, fused = modules(gene_likelihood, **options)
    more = {}
    if "n_continuous_cov" in options:
        more["extra_continuous_covs"] = torch.randn(CELLS, 2, dtype=torch.float64)
        more["extra_categorical_covs"] = torch.stack([torch.randint(0, n, (CELLS,)) for n in (3, 2)], dim=1)
    assert_same(plain.double(), fused.double(), cells(torch.float64, **more), 1e-11)


@pytest.mark.parametrize("gene_likelihood", ("nb", "zinb", "poisson"))
def test_size_factors(double, without_eps, gene_likelihood):
    """The decoder ends in a softplus."""
    plain, fused = modules(gene_likelihood, use_size_factor_key=True)
    tensors = cells(torch.float64, size_factor=torch.rand(CELLS, 1, dtype=torch.float64) + 0.5)
    assert_same(plain.double(), fused.double(), tensors, 1e-6)  # the fused mean has scvi's 1e-8 here


@pytest.mark.parametrize("observed", [True, False], ids=["observed", "inferred"])
@pytest.mark.parametrize("gene_likelihood", LIKELIHOODS)
def test_several_samples(gene_likelihood, observed):
    plain, fused = modules(gene_likelihood, use_observed_lib_size=observed)
    assert_same(plain, fused, cells(), 1e-5, inference_kwargs={"n_samples": 3})


class _Decoder(scvi.nn.LinearDecoderSCVI):
    """Of a user's own."""


def test_another_decoder_is_left_to_scvi():
    plain, fused = modules()
    for module in (plain, fused):
        torch.manual_seed(2)
        module.decoder = _Decoder(4, GENES, n_cat_list=[BATCHES])
    assert type(fused(cells(), compute_loss=False)[1]["px"]) is scvi.distributions.ZeroInflatedNegativeBinomial
    assert_same(plain, fused, cells(), 1e-6)


@pytest.mark.parametrize("dispersion", ("gene", "gene-batch", "gene-cell"))
def test_half_precision_under_autocast(dispersion):
    """The loss is float32, and that of the same networks in float32 to the precision of the half type."""
    _, fused = modules(dispersion=dispersion)
    tensors = cells()
    truth = step(fused, tensors).loss
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = step(fused, tensors).loss
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, truth, rtol=1e-2, atol=0)
    assert all(p.grad.isfinite().all() for p in fused.parameters() if p.grad is not None)


@pytest.mark.parametrize("gene_likelihood", ("nb", "zinb", "poisson"))
def test_the_loss_computes_no_parameter_of_scvi(gene_likelihood):
    _, fused = modules(gene_likelihood)
    px = fused(cells())[1]["px"]
    assert not {"mu", "theta", "scale", "rate"} & vars(px).keys()


# ----------------------------------------------------------------------------------------------------------------------
# The distribution that `generative` returns.


def distributions(gene_likelihood: str, dispersion: str = "gene", n_samples: int = 1):
    found = []
    tensors = cells()
    for module in modules(gene_likelihood, dispersion=dispersion):
        torch.manual_seed(1)
        outputs = module.eval()(tensors, inference_kwargs={"n_samples": n_samples}, compute_loss=False)
        found.append(outputs[1]["px"])
    return found, tensors["X"]


@pytest.mark.parametrize("n_samples", (1, 2))
@pytest.mark.parametrize("dispersion", DISPERSIONS)
@pytest.mark.parametrize("gene_likelihood", ("nb", "zinb", "poisson"))
def test_distribution_is_scvi_s_to_the_last_bit(gene_likelihood, dispersion, n_samples):
    (a, b), x = distributions(gene_likelihood, dispersion, n_samples)
    assert isinstance(b, type(a))
    names = {"nb": ["mu", "theta"], "zinb": ["mu", "theta", "zi_logits", "zi_probs"], "poisson": ["rate"]}
    for name in ["scale", "mean", "variance", *names[gene_likelihood]]:
        assert torch.equal(getattr(a, name), getattr(b, name)), name
    torch.testing.assert_close(a.log_prob(x), b.log_prob(x), rtol=1e-4, atol=1e-4)  # scvi's rounding, in float32
    assert torch.equal(a.get_normalized("scale"), b.get_normalized("scale"))
    assert a.batch_shape == b.batch_shape and a.event_shape == b.event_shape
    draws = []
    for px in (a, b):
        torch.manual_seed(2)
        draws.append(px.sample((2,)))
    assert torch.equal(*draws)
    assert repr(b) == "Fused" + repr(a)


@pytest.mark.parametrize("gene_likelihood", ("nb", "zinb"))
def test_scvi_rebuilds_the_distribution(gene_likelihood):
    (a, b), x = distributions(gene_likelihood)
    index = torch.tensor([3, 1])
    assert torch.equal(
        subset_distribution(a, index).log_prob(x[index]), subset_distribution(b, index).log_prob(x[index])
    )
    concatenator = DistributionConcatenator()
    for _ in range(2):
        concatenator.store_distribution(b)
    assert torch.equal(concatenator.get_concatenated_distributions().mean, torch.cat([a.mean, a.mean]))


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("dispersion", DISPERSIONS)
def test_parameters_asked_for_outside_of_the_mode(mode, dispersion):
    _, fused = modules(dispersion=dispersion)
    with mode():
        px = fused(cells(), compute_loss=False)[1]["px"]
    assert not any(t.requires_grad for t in (px.mu, px.theta, px.scale, px.zi_probs))


def test_parameters_have_gradients():
    """A loss of a user's own, from scvi's parameters."""
    gradients = []
    tensors = cells()
    for module in modules():
        torch.manual_seed(1)
        module.zero_grad()
        px = module(tensors, compute_loss=False)[1]["px"]
        (-px.log_prob(tensors["X"]).mean()).backward()
        gradients.append([p.grad for p in module.parameters() if p.grad is not None])
    assert len(gradients[0]) == len(gradients[1])
    for p, q in zip(*gradients, strict=True):
        torch.testing.assert_close(p, q)


# ----------------------------------------------------------------------------------------------------------------------
# The model.


@pytest.fixture(scope="module")
def adata():
    return scvi.data.synthetic_iid(batch_size=100, n_genes=50)


def setup(cls, data):
    labels = {} if not issubclass(cls, scvi.model.SCANVI) else {"unlabeled_category": "label_0"}
    cls.setup_anndata(data, batch_key="batch", labels_key="labels", **labels)


def trained(cls, adata, epochs=5, **options):
    data = adata.copy()
    setup(cls, data)
    scvi.settings.seed = 0
    model = cls(data, n_hidden=32, n_latent=5, **options)
    train = {"train_size": 0.8, "check_val_every_n_epoch": 1, "enable_progress_bar": False, "logger": None}
    model.train(max_epochs=epochs, accelerator="cpu", batch_size=64, **train)
    return model


@pytest.mark.parametrize("options", [{}, {"use_observed_lib_size": False, "dispersion": "gene-batch"}], ids=str)
@pytest.mark.parametrize("gene_likelihood", LIKELIHOODS)
def test_training_follows_the_same_curve(adata, gene_likelihood, options):
    """In float32; the curves part as rounding grows from step to step."""
    a, b = (trained(cls, adata, gene_likelihood=gene_likelihood, **options) for cls in (scvi.model.SCVI, SCVI))
    assert type(b.module) is FusedVAE
    assert a.history.keys() == b.history.keys()
    for key, values in a.history.items():
        np.testing.assert_allclose(b.history[key].to_numpy(float), values.to_numpy(float), rtol=1e-4, err_msg=key)


PLAIN_SCVI, PLAIN_SCANVI, PLAIN_LINEAR = scvi.model.SCVI, scvi.model.SCANVI, scvi.model.LinearSCVI
EXCHANGED = [(SCVI, SCVI), (SCVI, PLAIN_SCVI), (PLAIN_SCVI, SCVI)]
EXCHANGED += [(SCANVI, SCANVI), (SCANVI, PLAIN_SCANVI), (PLAIN_SCANVI, SCANVI)]
EXCHANGED += [(LinearSCVI, LinearSCVI), (LinearSCVI, PLAIN_LINEAR), (PLAIN_LINEAR, LinearSCVI)]


@pytest.mark.parametrize("write, read", EXCHANGED, ids=lambda cls: cls.__module__.split(".")[0] + "." + cls.__name__)
def test_saved_models_are_exchanged(adata, tmp_path, write, read):
    model = trained(write, adata, epochs=2)
    assert type(model.module) is write._module_cls
    model.save(tmp_path / "model", save_anndata=True)
    loaded = read.load(tmp_path / "model", accelerator="cpu")
    assert type(loaded) is read and type(loaded.module) is read._module_cls
    assert np.array_equal(model.get_latent_representation(), loaded.get_latent_representation())
    loaded.train(max_epochs=1, accelerator="cpu", enable_progress_bar=False, logger=None)


def test_saved_models_keep_their_settings(adata, tmp_path):
    options = {"gene_likelihood": "zinb", "dispersion": "gene-label", "latent_distribution": "ln", "n_layers": 2}
    options |= {"dropout_rate": 0.3, "use_observed_lib_size": False, "encode_covariates": True}
    model = trained(SCVI, adata, epochs=1, **options)
    model.save(tmp_path / "model", save_anndata=True)
    loaded = SCVI.load(tmp_path / "model", accelerator="cpu")
    assert loaded.init_params_ == model.init_params_ and str(loaded.module) == str(model.module)
    for name in ("gene_likelihood", "dispersion", "latent_distribution", "use_observed_lib_size"):
        assert getattr(loaded.module, name) == options[name]
    assert seeded(lambda m: m.get_elbo())(loaded) == seeded(lambda m: m.get_elbo())(model)


def seeded(method):
    @functools.wraps(method)
    def call(model):
        scvi.settings.seed = 1
        return method(model)

    return call


EXACT = 0.0  # no loss enters


def by_group(model, **options):
    return model.differential_expression(groupby="labels", group1="label_0", **options).select_dtypes("number")


def by_importance(model):
    """Probabilities from 5,000 draws, whose weights contain a loss: a few of them fall differently."""
    options = {"weights": "importance", "importance_weighting_kwargs": {"n_mc_samples": 20}}
    return by_group(model, **options)[["proba_m1", "proba_m2"]]


# name: the method of a model, and the tolerance
METHODS = {
    "latent representation": (lambda m: m.get_latent_representation(), EXACT),
    "latent samples": (lambda m: m.get_latent_representation(give_mean=False), EXACT),
    "library size": (lambda m: m.get_latent_library_size(give_mean=False), EXACT),
    "normalized expression": (lambda m: m.get_normalized_expression(library_size="latent"), EXACT),
    "of another batch": (lambda m: m.get_normalized_expression(transform_batch="batch_1", n_samples=2), EXACT),
    "posterior predictive samples": (lambda m: m.posterior_predictive_sample(n_samples=2).todense(), EXACT),
    "likelihood parameters": (lambda m: np.stack([*m.get_likelihood_parameters().values()]), EXACT),
    "feature correlation matrix": (lambda m: m.get_feature_correlation_matrix(n_samples=2), EXACT),
    "differential expression": (by_group, EXACT),
    "differential expression by importance": (by_importance, 2e-3),
    "ELBO": (lambda m: m.get_elbo(), 1e-5),
    "marginal log-likelihood": (lambda m: m.get_marginal_ll(n_mc_samples=6, n_mc_samples_per_pass=3), 1e-5),
    "reconstruction error": (lambda m: m.get_reconstruction_error()["reconstruction_loss"], 1e-5),
}


@pytest.mark.parametrize("observed", [True, False], ids=["observed", "inferred"])
@pytest.mark.parametrize("gene_likelihood", ("nb", "zinb"))
def test_methods_agree(adata, gene_likelihood, observed, subtests):
    plain = trained(scvi.model.SCVI, adata, epochs=2, gene_likelihood=gene_likelihood, use_observed_lib_size=observed)
    data = plain.adata.copy()
    SCVI.setup_anndata(data, batch_key="batch", labels_key="labels")
    fused = SCVI(data, n_hidden=32, n_latent=5, gene_likelihood=gene_likelihood, use_observed_lib_size=observed)
    fused.module.load_state_dict(plain.module.state_dict())
    fused.module.eval()
    fused.is_trained_ = True
    for name, (method, tolerance) in METHODS.items():
        with subtests.test(name):
            a, b = (np.asarray(seeded(method)(model), dtype=float) for model in (plain, fused))
            np.testing.assert_allclose(b, a, rtol=tolerance, atol=tolerance)


SOME = ("posterior predictive samples", "ELBO", "marginal log-likelihood", "differential expression by importance")


@pytest.mark.parametrize("cls, parent", [(SCANVI, PLAIN_SCANVI), (LinearSCVI, PLAIN_LINEAR)], ids=["SCANVI", "Linear"])
def test_methods_of_the_other_classes_agree(cls, parent, subtests):
    adata = scvi.data.synthetic_iid(batch_size=15, n_genes=10)
    plain = trained(parent, adata, epochs=1)
    fused = trained(cls, adata, epochs=1)
    fused.module.load_state_dict(plain.module.state_dict())
    for name in SOME:
        with subtests.test(name):
            method, tolerance = METHODS[name]
            a, b = (np.asarray(seeded(method)(model), dtype=float) for model in (plain, fused))
            np.testing.assert_allclose(b, a, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("parent", [SCVI, PLAIN_SCVI], ids=["fused", "plain"])
def test_fused_scanvi_starts_from_either(adata, parent):
    model = trained(parent, adata, epochs=1)
    scanvi = SCANVI.from_scvi_model(model, unlabeled_category="label_0", labels_key="labels")
    assert type(scanvi.module) is FusedSCANVAE
    assert torch.equal(scanvi.module.px_r, model.module.px_r)
    scanvi.train(max_epochs=1, accelerator="cpu", enable_progress_bar=False, logger=None)
    assert len(scanvi.predict()) == model.adata.n_obs


def test_minified_data(adata):
    results = []
    for cls in (scvi.model.SCVI, SCVI):
        model = trained(cls, adata, epochs=1)
        scvi.settings.seed = 1
        qzm, qzv = model.get_latent_representation(return_dist=True)
        model.adata.obsm["X_latent_qzm"], model.adata.obsm["X_latent_qzv"] = qzm, qzv
        model.minify_adata()
        scvi.settings.seed = 1
        results.append(model.get_normalized_expression().to_numpy())
        with pytest.raises(ValueError, match="minified"):
            model.get_elbo()
    np.testing.assert_allclose(results[1], results[0], rtol=1e-3)


def test_scanvi_starts_from_it(adata):
    model = trained(SCVI, adata, epochs=1)
    scanvi = scvi.model.SCANVI.from_scvi_model(model, unlabeled_category="label_0", labels_key="labels")
    scanvi.train(max_epochs=1, accelerator="cpu", enable_progress_bar=False, logger=None)
    assert len(scanvi.predict()) == model.adata.n_obs


def test_query_data_are_mapped(adata):
    """scArches: a reference model takes data of a new batch."""
    model = trained(SCVI, adata, epochs=1)
    query = scvi.data.synthetic_iid(batch_size=50, n_genes=50)
    query.obs["batch"] = "new"
    mapped = SCVI.load_query_data(query, model, accelerator="cpu")
    assert type(mapped.module) is FusedVAE
    mapped.train(max_epochs=1, accelerator="cpu", enable_progress_bar=False, logger=None)
    assert mapped.get_latent_representation().shape == (len(query), 5)


def test_scvi_s_own_class_takes_the_module(adata, monkeypatch):
    monkeypatch.setattr(scvi.model.SCVI, "_module_cls", FusedVAE)
    assert type(trained(scvi.model.SCVI, adata, epochs=1).module) is FusedVAE


# ----------------------------------------------------------------------------------------------------------------------
# Example and benchmark, in small.

ROOT = Path(__file__).parents[2]


def test_example(tmp_path, monkeypatch, capsys):
    spec = importlib.util.spec_from_file_location("scvi_counts", ROOT / "examples/scvi_counts.py")
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    for name, value in {"CELLS": 300, "GENES": 60, "EPOCHS": 3, "LOG10_THETA": (0, 7)}.items():
        monkeypatch.setattr(example, name, value)
    monkeypatch.setattr(sys, "argv", ["scvi_counts.py", str(tmp_path)])
    assert example.main() == 0
    of_scvi, of_fastelbo = map(float, re.search(r"1e\+07 +(\S+) +(\S+)", capsys.readouterr().out).groups())
    assert of_scvi > 1 and of_fastelbo < 1e-3
    assert (tmp_path / "scvi_counts.png").stat().st_size > 10_000


def test_benchmark(monkeypatch, capsys):
    from benchmarks import scvi_step

    options = ["--genes", "50", "--threads", "1", "--seconds", "0.1", "--cells", "256", "--no-compile"]
    monkeypatch.setattr(sys, "argv", ["scvi_step", *options])
    scvi_step.main()
    lines = re.findall(r"^\| (\w+).*\| fastelbo .*\(\d+\.\d+x\) \|$", capsys.readouterr().out, re.M)
    assert lines == ["step", "step", "epoch", "epoch"]
