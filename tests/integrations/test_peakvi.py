"""The fused PEAKVI against scvi-tools' own. `make test-integrations` has the environment for it."""

import logging
from collections.abc import Iterator

import numpy as np
import pytest
import torch

pytest.importorskip("scvi", reason="scvi-tools is not installed: make test-integrations installs it")

import anndata
import scvi
from scvi.module import PEAKVAE
from torch import Tensor

from fastelbo.integrations.scvi import PEAKVI, FusedPEAKVAE

CELLS, REGIONS = 12, 30
logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
pytestmark = pytest.mark.filterwarnings("ignore")  # of lightning and scvi: no GPU, few workers, small batches


@pytest.fixture
def double(monkeypatch) -> Iterator[None]:
    """scvi's (x > 0).float() keeps it from float64."""
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("depth", [True, False])
@pytest.mark.parametrize("factors", [True, False])
def test_loss_parts_and_gradients(depth: bool, factors: bool, double: None) -> None:
    torch.manual_seed(0)
    options = {"n_batch": 2, "n_hidden": 8, "n_latent": 3, "model_depth": depth, "region_factors": factors}
    plain, fused = PEAKVAE(REGIONS, **options), FusedPEAKVAE(REGIONS, **options)
    fused.load_state_dict(plain.state_dict())
    batch = torch.randint(0, 2, (CELLS, 1))
    tensors: dict[str, Tensor] = {"X": torch.poisson(torch.full((CELLS, REGIONS), 0.7)), "batch": batch}
    results = []
    for module in (plain, fused):
        torch.manual_seed(1)
        *_, out = module(tensors, loss_kwargs={"kl_weight": 0.3})
        out.loss.backward()
        gradients = [p.grad for p in module.parameters() if p.grad is not None]
        results.append([out.loss, out.reconstruction_loss_sum, out.kl_local_sum, *gradients])
    torch.testing.assert_close(results[1], results[0], rtol=1e-10, atol=1e-10)
    assert len(results[0]) > 10


def test_training_from_one_seed_is_the_same(tmp_path) -> None:
    generator = np.random.default_rng(0)
    adata = anndata.AnnData((generator.random((200, REGIONS)) < 0.3).astype("float32"))
    models = []
    for cls in (scvi.model.PEAKVI, PEAKVI):
        scvi.settings.seed = 1
        cls.setup_anndata(adata)
        model = cls(adata, n_hidden=8, n_latent=3)
        model.train(max_epochs=3, accelerator="cpu", enable_progress_bar=False, logger=False)
        models.append(model)
    latents = [torch.tensor(model.get_latent_representation()) for model in models]
    torch.testing.assert_close(latents[1], latents[0], rtol=1e-2, atol=1e-3)
    models[1].save(str(tmp_path / "model"))
    again = scvi.model.PEAKVI.load(str(tmp_path / "model"), adata, accelerator="cpu")
    np.testing.assert_allclose(again.get_latent_representation(), latents[1].numpy(), rtol=1e-5)


def test_saved_models_keep_their_settings(tmp_path) -> None:
    adata = anndata.AnnData((np.random.default_rng(0).random((40, REGIONS)) < 0.3).astype("float32"))
    PEAKVI.setup_anndata(adata)
    model = PEAKVI(adata, n_hidden=8, n_latent=3, model_depth=False, region_factors=False, latent_distribution="ln")
    model.train(max_epochs=1, accelerator="cpu", enable_progress_bar=False, logger=False)
    model.save(str(tmp_path / "model"), save_anndata=True)
    again = PEAKVI.load(str(tmp_path / "model"), accelerator="cpu")
    assert type(again.module) is FusedPEAKVAE and str(again.module) == str(model.module)
    assert again.init_params_ == model.init_params_ and again.module.region_factors is None
    losses = []
    for one in (model, again):
        scvi.settings.seed = 1
        losses.append(one.get_latent_representation(give_mean=False))
    assert np.array_equal(*losses)
