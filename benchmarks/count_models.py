"""Training steps of models of counts, of scvi-tools and others, with and without `fastelbo.integrations.*.apply`:

    .venv-integrations/bin/python -m benchmarks.count_models [--models SCVI MRVI...] [--threads 1 2] [--seconds 6]

A step is zero_grad, forward, loss, backward and Adam's fused step, with the default networks, on one batch of 128 cells
and 4,000 genes, float32; of cell2location 2,000 locations and 2,000 genes, of CellBender 256 barcodes and 10,000 genes.
The contenders take turns in one process, in random order: the model as it is, the model within every `apply`, or of
fastelbo's class in a case named so, and the model with a likelihood that costs nothing, which no `apply` can beat.
Figures are medians of the ratios within a round. Before the first step, the losses of the first two are compared.
"""

import argparse
import copy
import importlib
import inspect
import logging
import os
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext, redirect_stdout
from functools import partial
from operator import attrgetter
from statistics import median
from typing import Any, NamedTuple
from unittest import mock

import anndata
import mudata
import numpy as np
import pandas as pd
import pyro
import scvi
import torch
from pyro.infer import Trace_ELBO, TraceEnum_ELBO
from pyro.infer.autoguide import AutoGuide
from scvi import distributions
from torch import Tensor, nn
from torch.distributions import Distribution

from benchmarks.machine import DISTURBED, facts, others_share
from benchmarks.scvi_step import ADAM, BATCH, counts
from benchmarks.turns import Step, measured
from fastelbo.integrations.scvi import FusedLDVAE, FusedSCANVAE, FusedVAE

GENES = 4000
LABELS = 8
LOCATIONS, CELL_TYPES, BARCODES = 2000, 20, 256  # of cell2location, and of CellBender
LOSS = {"kl_weight": 0.5, "n_obs": BATCH}  # what the training plans hand to the losses that accept it

Context = Callable[[], AbstractContextManager[Any]]
Patch = tuple[type, str, Callable[..., Tensor]]  # a class, its method, and what takes its place


class Missing(Exception):
    """The package is not installed, or this version of it lacks the model."""


class Case(NamedTuple):
    module: nn.Module
    tensors: Any
    loss: Callable[[nn.Module, Any], Tensor]
    likelihood: tuple[Patch, ...]  # so that it costs nothing
    fused: nn.Module | None = None  # in the place of `apply`: the same module, of fastelbo's class

    def to(self, dtype: torch.dtype) -> "Case":
        fused = None if self.fused is None else self.fused.to(dtype)
        return self._replace(module=self.module.to(dtype), tensors=cast(self.tensors, dtype), fused=fused)


def cast(nested: Any, dtype: torch.dtype) -> Any:
    if isinstance(nested, dict):
        return {key: cast(value, dtype) for key, value in nested.items()}
    if isinstance(nested, list | tuple):
        return type(nested)(cast(value, dtype) for value in nested)
    return nested.to(dtype) if torch.is_tensor(nested) and nested.is_floating_point() else nested


@contextmanager
def double() -> Iterator[None]:
    """float64 throughout, for `Case.to(torch.float64)`: scvi's modules make float32 tensors here and there."""
    with mock.patch.object(Tensor, "float", Tensor.double):
        torch.set_default_dtype(torch.float64)
        try:
            yield
        finally:
            torch.set_default_dtype(torch.float32)


# ----------------------------------------------------------------------------------------------------------------------
# Likelihoods that cost nothing.


class Free(torch.autograd.Function):
    """Zeros, with gradients of zero, so that the rest of the backward pass is what it was."""

    @staticmethod
    def forward(ctx: Any, shape: torch.Size, *parameters: Tensor) -> Tensor:
        ctx.save_for_backward(*parameters)
        return parameters[0].new_zeros(()).expand(shape)

    @staticmethod
    def backward(ctx: Any, _: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        needed = zip(ctx.saved_tensors, ctx.needs_input_grad[1:], strict=True)
        return None, *(torch.zeros_like(parameter) if needs else None for parameter, needs in needed)


def free(*names: str, event_dims: int = 0) -> Callable[[Distribution, Tensor], Tensor]:
    """log_prob of a distribution whose parameters have these names."""
    getters = [attrgetter(name) for name in names]

    def log_prob(self: Distribution, value: Tensor) -> Tensor:
        parameters = [get(self) for get in getters]
        batch = self.batch_shape + self.event_shape or torch.broadcast_shapes(*(p.shape for p in parameters))
        shape = torch.broadcast_shapes(value.shape, batch)
        return Free.apply(shape[: len(shape) - event_dims], *parameters)

    return log_prob


def free_method(self: nn.Module, x: Tensor, *parameters: Tensor, **_: object) -> Tensor:
    """A module's reconstruction loss per cell."""
    return Free.apply(x.shape[:-1], *parameters)


def free_elements(self: nn.Module, x: Tensor, target: Tensor, *others: Tensor) -> Tensor:
    return Free.apply(x.shape, x, *others)


NB: Patch = (distributions.NegativeBinomial, "log_prob", free("mu", "theta"))
ZINB: Patch = (distributions.ZeroInflatedNegativeBinomial, "log_prob", free("mu", "theta", "zi_logits"))
NB_MIXTURE: Patch = (
    distributions.NegativeBinomialMixture,
    "log_prob",
    free("mu1", "mu2", "theta1", "mixture_logits"),
)
POISSON: Patch = (torch.distributions.Poisson, "log_prob", free("rate"))
PYRO_POISSON: Patch = (pyro.distributions.Poisson, "log_prob", free("rate"))
TORCH_NB: Patch = (torch.distributions.NegativeBinomial, "log_prob", free("total_count", "logits"))
BETA_BINOMIAL: Patch = (distributions.BetaBinomial, "log_prob", free("mu", "gamma"))
NB_POISSON = free("mu", "alpha", "lam")  # CellBender's, where it is installed
GAMMA_POISSON: Patch = (pyro.distributions.GammaPoisson, "log_prob", free("concentration", "rate"))
BINOMIAL: Patch = (torch.distributions.Binomial, "log_prob", free("probs"))
MIXTURE: Patch = (
    torch.distributions.MixtureSameFamily,
    "log_prob",
    free("mixture_distribution.probs", "component_distribution.loc", "component_distribution.scale"),
)


@contextmanager
def applied() -> Iterator[None]:
    """Every `apply` whose package is installed."""
    with ExitStack() as stack:
        for name in ("scvi", "cell2location", "cellbender"):
            try:
                module = importlib.import_module(f"fastelbo.integrations.{name}")
            except ModuleNotFoundError:
                continue
            stack.enter_context(module.apply())
        yield


@contextmanager
def patched(patches: tuple[Patch, ...]) -> Iterator[None]:
    with ExitStack() as stack:
        for owner, name, replacement in patches:
            stack.enter_context(mock.patch.object(owner, name, replacement))
        yield


# ----------------------------------------------------------------------------------------------------------------------
# The models.


def model_class(*names: str) -> Any:
    for name in names:
        for package in (scvi.model, scvi.external):
            found = getattr(package, name, None)
            if found is not None:
                return found
    raise Missing(f"scvi-tools {scvi.__version__} has no {names[0]}")


def cells(genes: int, number: int = BATCH) -> anndata.AnnData:
    """Counts, with what one model or another asks for beside them."""
    rng = np.random.default_rng(0)
    obs = {
        "label": pd.Categorical([f"type {i % LABELS}" for i in range(number)]),
        "sample": pd.Categorical([f"sample {i % 4}" for i in range(number)]),
        "half": pd.Categorical(["first" if i % 2 else "second" for i in range(number)]),
    }
    adata = anndata.AnnData(counts(number, genes).numpy(), pd.DataFrame(obs, [f"cell {i}" for i in range(number)]))
    adata.var_names = [f"gene {i}" for i in range(genes)]
    adata.obsm["spatial"] = rng.random((number, 2), np.float32)
    return adata


def of_module(module: nn.Module, tensors: Any, *likelihood: Patch, **options: object) -> Case:
    """The loss is that of scvi's TrainingPlan; `options` are further arguments of the module's loss."""
    accepted = inspect.signature(module.loss).parameters
    arguments = {name: value for name, value in LOSS.items() if name in accepted} | options

    def loss(module: nn.Module, tensors: Any) -> Tensor:
        return module(tensors, loss_kwargs=arguments)[2].loss  # type: ignore[no-any-return]

    return Case(module.train(), tensors, loss, likelihood)


def batch_of(model: Any, adata: Any, size: int = BATCH, **options: Any) -> dict[str, Tensor]:
    loader = model._make_data_loader(model._validate_anndata(adata), batch_size=size, shuffle=False, **options)
    return next(iter(loader))  # type: ignore[no-any-return]


def of_model(model: Any, adata: Any, *likelihood: Patch, **options: object) -> Case:
    return of_module(model.module, batch_of(model, adata), *likelihood, **options)


def of_pyro(model: Any, adata: Any, *likelihood: Patch, size: int = BATCH) -> Case:
    module = model.module.train()
    for part in (module.model, module.guide):
        if hasattr(part, "n_obs"):
            part.n_obs = size  # set by scvi's training plan
    arguments = module._get_fn_args_from_batch(batch_of(model, adata, size))
    if isinstance(module.guide, AutoGuide):  # makes its parameters at its first call, which a copy could not
        module, arguments = module.to(torch.get_default_dtype()), cast(arguments, torch.get_default_dtype())
        module.guide(*arguments[0], **arguments[1])
        pyro.clear_param_store()
    elbo = Trace_ELBO()

    def loss(module: nn.Module, arguments: Any) -> Tensor:
        return elbo.differentiable_loss(module.model, module.guide, *arguments[0], **arguments[1])  # type: ignore[no-any-return]

    return Case(module, arguments, loss, likelihood)


def plain(name: str, genes: int, *likelihood: Patch, setup: dict[str, Any] | None = None, **options: Any) -> Case:
    """A model whose data set and constructor need nothing but the counts, and columns of `obs` for `setup`."""
    cls, adata = model_class(name), cells(genes)
    cls.setup_anndata(adata, **setup or {})
    return of_model(cls(adata, **options), adata, *likelihood)


def pyro_plain(name: str, genes: int, *likelihood: Patch) -> Case:
    cls, adata = model_class(name), cells(genes)
    cls.setup_anndata(adata)
    return of_pyro(cls(adata), adata, *likelihood)


def of_class(build: Callable[[], Case], fused: type[nn.Module]) -> Case:
    """As the case, with fastelbo's class, which adds methods alone, in the place of scvi's."""
    case = build()
    module = copy.deepcopy(case.module)
    module.__class__ = fused
    return case._replace(fused=module)


def scanvi(genes: int, labelled: bool = True) -> Case:
    """`labelled`: with the classifier's loss of the same cells."""
    cls, adata = model_class("SCANVI"), cells(genes)
    cls.setup_anndata(adata, labels_key="label", unlabeled_category="unknown")
    case = of_model(cls(adata), adata, ZINB)
    arguments = {"kl_weight": LOSS["kl_weight"], "classification_ratio": 50}

    def loss(module: nn.Module, tensors: Any) -> Tensor:
        more = {"labelled_tensors": tensors} if labelled else {}
        return module(tensors, loss_kwargs=arguments | more)[2].loss  # type: ignore[no-any-return]

    return case._replace(loss=loss)


def contrastive(genes: int) -> Case:
    """A batch is 128 cells of either data set."""
    cls, adata = model_class("ContrastiveVI"), cells(genes, 2 * BATCH)
    cls.setup_anndata(adata)
    model, indices = cls(adata), np.arange(2 * BATCH)
    halves = {"background": indices[:BATCH], "target": indices[BATCH:]}
    return of_module(model.module, {name: batch_of(model, adata, indices=i) for name, i in halves.items()}, ZINB)


def mrvi(genes: int) -> Case:
    cls, adata = model_class("TorchMRVI", "MRVI"), cells(genes)
    cls.setup_anndata(adata, sample_key="sample")
    return of_model(cls(adata), adata, NB)


def scviva(genes: int, likelihood: Patch, **options: Any) -> Case:
    cls, adata = model_class("SCVIVA"), cells(genes)
    adata.obsm["X_scVI"] = np.random.default_rng(0).standard_normal((BATCH, 10)).astype(np.float32)
    keys = {"sample_key": "half", "labels_key": "label"}
    cls.preprocessing_anndata(adata, k_nn=20, **keys)
    cls.setup_anndata(adata, **keys)
    return of_model(cls(adata, **options), adata, likelihood)


def gimvi(genes: int) -> Case:
    """A batch is 128 cells of either data set; the spatial one has a quarter of the genes."""
    cls, sequenced = model_class("GIMVI"), cells(genes)
    spatial = sequenced[:, : genes // 4].copy()
    for adata in (sequenced, spatial):
        cls.setup_anndata(adata)
    model = cls(sequenced, spatial)
    tensors = [next(iter(loader)) for loader in model._make_scvi_dls([sequenced, spatial], BATCH)]

    def loss(module: nn.Module, tensors: Any) -> Tensor:
        total: Any = 0
        for mode, part in enumerate(tensors):
            where = {"mode": mode}
            arguments = {"kl_weight": LOSS["kl_weight"]} | where
            total += module(part, inference_kwargs=where, generative_kwargs=where, loss_kwargs=arguments)[2].loss
        return total / (2 * BATCH)  # type: ignore[no-any-return]

    return Case(model.module.train(), tensors, loss, (ZINB, NB))


def totalvi(genes: int, proteins: int = 150) -> Case:
    cls, adata = model_class("TOTALVI"), cells(genes)
    adata.obsm["protein"] = counts(BATCH, proteins).numpy() + 1  # one that is 0 everywhere would be masked
    cls.setup_anndata(adata, protein_expression_obsm_key="protein")
    return of_model(cls(adata, empirical_protein_background_prior=False), adata, NB, NB_MIXTURE)


def multivi(genes: int) -> Case:
    """As many regions as genes."""
    cls = model_class("MULTIVI")
    mdata = mudata.MuData({"rna": cells(genes), "atac": cells(genes)})
    mdata["atac"].var_names = [f"region {i}" for i in range(genes)]
    mdata.update()
    cls.setup_mudata(mdata, modalities={"rna_layer": "rna", "atac_layer": "atac"})
    accessibility: Patch = (cls._module_cls, "get_reconstruction_loss_accessibility", free_method)
    return of_model(cls(mdata, n_genes=genes, n_regions=genes), mdata, ZINB, accessibility)


def methylvi(regions: int) -> Case:
    cls, adata = model_class("METHYLVI"), cells(regions)
    rng = np.random.default_rng(0)
    adata.layers["cov"] = adata.X + rng.poisson(5, adata.shape).astype(np.float32)
    adata.layers["mc"] = rng.binomial(adata.layers["cov"].astype(int), 0.7).astype(np.float32)
    mdata = mudata.MuData({"mCG": adata})
    options = {"methylation_contexts": ["mCG"], "modalities": {"batch_key": "mCG"}}
    cls.setup_mudata(mdata, mc_layer="mc", cov_layer="cov", batch_key="half", **options)
    return of_model(cls(mdata), mdata, BETA_BINOMIAL)


def autozi(genes: int) -> Case:
    cls = model_class("AUTOZI")
    return plain("AUTOZI", genes, (cls._module_cls, "get_reconstruction_loss", free_method))


def of_spots(single_cell: str, spatial: str, genes: int, likelihood: Patch, **options: Any) -> Case:
    """A model of spots, which takes the parameters of one of single cells that was trained before."""
    cls, adata = model_class(single_cell), cells(genes)
    cls.setup_anndata(adata, labels_key="label")
    trained = cls(adata, **options)
    trained.is_trained_ = True
    cls, spots = model_class(spatial), cells(genes)
    cls.setup_anndata(spots)
    return of_model(cls.from_rna_model(spots, trained), spots, likelihood)


def sysvi(genes: int) -> Case:
    cls, adata = model_class("SysVI"), cells(genes)
    adata.X = np.log1p(adata.X)
    cls.setup_anndata(adata, batch_key="half")
    return of_model(cls(adata), adata, (nn.GaussianNLLLoss, "forward", free_elements))


def lda(genes: int) -> Case:
    words = scvi.module._amortizedlda.CategoricalBoW
    return pyro_plain("AmortizedLDA", genes, (words, "log_prob", free("logits", event_dims=1)))


def resolvi(genes: int) -> Case:
    cls, adata = model_class("RESOLVI"), cells(genes)
    cls.setup_anndata(adata, prepare_data_kwargs={"spatial_rep": "spatial"})
    return of_pyro(cls(adata), adata, PYRO_POISSON)


def velovi(genes: int) -> Case:
    cls, adata = model_class("VELOVI"), cells(genes)
    for layer in ("spliced", "unspliced"):
        adata.layers[layer] = (adata.X + 1) / (adata.X.max(0) + 1)  # a gene that is 0 everywhere makes it fail
    cls.setup_anndata(adata, spliced_layer="spliced", unspliced_layer="unspliced")
    return of_model(cls(adata), adata, MIXTURE)


def scar(genes: int) -> Case:
    profile = np.full((1, genes), 1 / genes, np.float32)
    return plain("SCAR", genes, BINOMIAL, ambient_profile=profile)


def cell2location_class(name: str) -> Any:
    try:
        import fastelbo.integrations.cell2location  # noqa: F401, I001  first: without it the other cannot be imported
        import cell2location.models
    except ModuleNotFoundError:
        raise Missing("cell2location is not installed") from None
    return getattr(cell2location.models, name)


def tissue(genes: int) -> anndata.AnnData:
    adata = cells(genes, LOCATIONS)
    adata.obs["cell type"] = pd.Categorical([f"type {i % CELL_TYPES}" for i in range(LOCATIONS)])
    return adata


def locations(genes: int) -> Case:
    cls, adata = cell2location_class("Cell2location"), tissue(genes)
    cls.setup_anndata(adata, batch_key="sample")
    expression = np.random.default_rng(0).gamma(1, 1, (genes, CELL_TYPES)).astype(np.float32)
    states = pd.DataFrame(expression, adata.var_names, [f"type {i}" for i in range(CELL_TYPES)])
    model = cls(adata, cell_state_df=states, N_cells_per_location=8, detection_alpha=20)
    return of_pyro(model, adata, GAMMA_POISSON, size=LOCATIONS)


def signatures(genes: int) -> Case:
    """cell2location's regression model of cell types."""
    cls, adata = cell2location_class("RegressionModel"), tissue(genes)
    cls.setup_anndata(adata, batch_key="sample", labels_key="cell type")
    return of_pyro(cls(adata), adata, GAMMA_POISSON, size=LOCATIONS)


def cellbender(genes: int) -> Case:
    """Half of the barcodes are empty droplets. Networks and options are those of its command line."""
    try:
        from cellbender.remove_background.distributions import NegativeBinomialPoissonConvApprox as approximate
        from cellbender.remove_background.model import RemoveBackgroundPyroModel
        from cellbender.remove_background.vae.decoder import Decoder
        from cellbender.remove_background.vae.encoder import CompositeEncoder, EncodeNonZLatents, EncodeZ
    except ModuleNotFoundError:
        raise Missing("CellBender is not installed") from None
    cell, empty, crossover, latent, hidden = 5000.0, 200.0, 1000.0, 64, [512]
    generator = torch.Generator().manual_seed(0)
    profile = torch.softmax(1.5 * torch.randn(genes, generator=generator), 0)
    x = torch.poisson(torch.tensor([cell, empty]).repeat(BARCODES // 2)[:, None] * profile, generator=generator)
    others = EncodeNonZLatents(
        n_genes=genes,
        z_dim=latent,
        log_count_crossover=float(np.log(crossover)),
        prior_log_cell_counts=np.log1p(cell),
        empty_log_count_threshold=np.log1p(2 * empty),
        prior_logit_cell_prob=0.0,
        input_transform="log_normalize",
    )
    plain = {"use_batch_norm": False, "use_layer_norm": False, "input_transform": "normalize"}
    module = RemoveBackgroundPyroModel(
        model_type="full",
        encoder=CompositeEncoder({"z": EncodeZ(genes, hidden, output_dim=latent, **plain), "other": others}),
        decoder=Decoder(latent, hidden_dims=hidden, output_dim=genes, use_batch_norm=True, use_layer_norm=False),
        dataset_obj_priors={
            "cell_counts": cell,
            "d_std": 0.2,
            "empty_counts": empty,
            "d_empty_std": 0.1,
            "cell_logit": 0.0,
            "chi_ambient": profile,
            "chi_bar": profile,
        },
        n_analyzed_genes=genes,
        n_droplets=BARCODES,
        analyzed_gene_names=np.arange(genes),
        empty_UMI_threshold=int(2 * empty),
        log_counts_crossover=float(np.log(crossover)),
        use_cuda=False,
    )
    elbo = TraceEnum_ELBO(max_plate_nesting=1)

    def loss(module: nn.Module, x: Tensor) -> Tensor:
        return elbo.differentiable_loss(module.model, module.guide, x)  # type: ignore[no-any-return]

    return Case(module.train(), x, loss, ((approximate.NegativeBinomialPoissonConvApprox, "log_prob", NB_POISSON),))


def models(genes: int = GENES) -> dict[str, Callable[[], Case]]:
    """What builds a module, a batch of it and the loss, by the name of the model. May raise Missing."""
    labels = {"labels_key": "label"}
    linear = partial(plain, "LinearSCVI", genes, NB)
    zinb = partial(plain, "SCVI", genes, ZINB, gene_likelihood="zinb")
    return {
        "SCVI, nb": partial(plain, "SCVI", genes, NB, gene_likelihood="nb"),
        "SCVI, zinb": zinb,
        "SCVI, class": partial(of_class, zinb, FusedVAE),
        "CondSCVI": partial(plain, "CondSCVI", genes, NB, setup=labels),
        "LinearSCVI": linear,
        "LinearSCVI, class": partial(of_class, linear, FusedLDVAE),
        "ContrastiveVI": partial(contrastive, genes),
        "SCANVI": partial(scanvi, genes),
        "SCANVI, class": partial(of_class, partial(scanvi, genes), FusedSCANVAE),
        "SCANVI, no labelled cells": partial(scanvi, genes, labelled=False),
        "MRVI": partial(mrvi, genes),
        "SCVIVA": partial(scviva, genes, POISSON),
        "SCVIVA, nb": partial(scviva, genes, NB, gene_likelihood="nb"),
        "GIMVI": partial(gimvi, genes),
        "JointEmbeddingSCVI": partial(plain, "JointEmbeddingSCVI", genes, ZINB),
        "Decipher": partial(pyro_plain, "Decipher", genes, TORCH_NB),
        "TOTALVI": partial(totalvi, genes),
        "MULTIVI": partial(multivi, genes),
        "POISSONVI": partial(plain, "POISSONVI", genes, POISSON),
        "RNAStereoscope": partial(plain, "RNAStereoscope", genes, TORCH_NB, setup=labels),
        "SpatialStereoscope": partial(of_spots, "RNAStereoscope", "SpatialStereoscope", genes, TORCH_NB),
        "METHYLVI": partial(methylvi, genes),
        "AUTOZI": partial(autozi, genes),
        "DestVI": partial(of_spots, "CondSCVI", "DestVI", genes, NB, prior="mog", num_classes_mog=10),
        "SysVI": partial(sysvi, genes),
        "AmortizedLDA": partial(lda, genes),
        "RESOLVI": partial(resolvi, genes),
        "VELOVI": partial(velovi, genes),
        "SCAR": partial(scar, genes),
        "cell2location": partial(locations, genes // 2),
        "cell2location, reference": partial(signatures, genes // 2),
        "CellBender": partial(cellbender, genes * 5 // 2),
    }


def parameters(module: nn.Module) -> list[nn.Parameter]:
    """Of the module, and those that Pyro keeps elsewhere, which are there after the first loss."""
    found = dict.fromkeys(module.parameters())  # tensors hash by identity
    return list(found | dict.fromkeys(p for _, p in pyro.get_param_store().named_parameters()))


# ----------------------------------------------------------------------------------------------------------------------
# What is measured.


class Turns:
    """Enters the contexts of a contender when its turn begins, rather than at every step."""

    def __init__(self) -> None:
        self.stack, self.current = ExitStack(), ""

    def take(self, name: str, *contexts: Context) -> None:
        if self.current != name:
            self.stack.close()
            for context in contexts:
                self.stack.enter_context(context())
            self.current = name


def steps_of(case: Case, contexts: dict[str, Context], turns: Turns) -> tuple[dict[str, Step], dict[str, float]]:
    """The steps, and the first losses from one seed, by contender."""
    steps, losses = {}, {}

    def contender(name: str, context: Context) -> tuple[Step, float]:
        state = {"params": {}, "constraints": {}}  # Pyro's parameters go by name, and the copies' are the same
        take = partial(turns.take, name, partial(pyro.get_param_store().scope, state), context)
        take()
        fused = case.fused if name == "fastelbo" else None
        module = copy.deepcopy(case.module if fused is None else fused)
        torch.manual_seed(1)
        first = case.loss(module, case.tensors).item()
        optimizer = torch.optim.Adam(parameters(module), fused=True, **ADAM)

        def step() -> None:
            take()
            optimizer.zero_grad()
            case.loss(module, case.tensors).backward()
            optimizer.step()

        return step, first

    for name, context in contexts.items():
        steps[name], losses[name] = contender(name, context)
    return steps, losses


def row(name: str, times: dict[str, list[float]]) -> str:
    def ratio(a: str, b: str) -> float:
        return median(x / y for x, y in zip(times[a], times[b], strict=True))

    share = f"{100 * (1 - ratio('ceiling', 'scvi')):.0f} %"
    gain, ceiling = f"{ratio('scvi', 'fastelbo'):.2f}x", f"{ratio('scvi', 'ceiling'):.2f}x"
    return f"| {name} | {share} | {gain} | {ceiling} | {median(times['fastelbo']):.2f} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=[""], help="those whose name contains one of these")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--seconds", type=float, default=6, help="per model and number of threads (default: 6)")
    parser.add_argument("--without", action="store_true", help="without fastelbo: to try the benchmark itself")
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore")
    for name in ("lightning.pytorch", "lightning.fabric", "scvi"):
        logging.getLogger(name).setLevel(logging.ERROR)

    allocator = {name: value for name, value in os.environ.items() if name.startswith("MALLOC_")}
    versions = {"scvi-tools": scvi.__version__, "pyro-ppl": pyro.__version__, "anndata": anndata.__version__}
    print(facts() | versions | {"allocator": allocator or "default"})
    print(f"\nB = {BATCH}, {GENES} genes, default networks, float32")
    failed, share = [], others_share()
    for threads in arguments.threads:
        torch.set_num_threads(threads)
        print(
            f"\n| {threads} thread{'s' * (threads > 1)} | likelihood's share | fastelbo | ceiling | ms with fastelbo |"
        )
        print("|---|---|---|---|---|")
        for name, build in models().items():
            if not any(part.lower() in name.lower() for part in arguments.models):
                continue
            torch.manual_seed(0)
            pyro.clear_param_store()
            turns = Turns()
            try:
                with redirect_stdout(sys.stderr):  # some print
                    case = build()
                if arguments.without:
                    case = case._replace(fused=None)
                as_it_is = arguments.without or case.fused is not None
                contexts: dict[str, Context] = {"scvi": nullcontext, "fastelbo": nullcontext if as_it_is else applied}
                contexts["ceiling"] = partial(patched, case.likelihood)
                steps, losses = steps_of(case, contexts, turns)
                if abs(losses["scvi"] - losses["fastelbo"]) > 1e-4 * abs(losses["scvi"]):
                    raise ValueError(f"the losses differ: {losses['scvi']} and {losses['fastelbo']}")
                if losses["ceiling"] == losses["scvi"]:
                    raise ValueError("the likelihood is not where it is replaced")
                print(row(name, measured(steps, arguments.seconds)), flush=True)
            except Missing as error:
                print(f"| {name} | skipped: {error} ||||", flush=True)
            except Exception as error:  # the others are measured all the same
                failed.append(name)
                print(f"| {name} | {type(error).__name__}: {' '.join(str(error).split())[:200]} ||||", flush=True)
            finally:
                turns.take("")
    busy = 100 * share()
    print(f"\nother processes took {busy:.1f} % of the machine" + " (disturbed)" * (busy > DISTURBED))
    if failed:
        sys.exit(f"failed: {', '.join(sorted(set(failed)))}")


if __name__ == "__main__":
    main()
