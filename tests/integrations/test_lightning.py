"""fastelbo.integrations.lightning: the mixin and the module. `make test-integrations` has the environment for it."""

import copy
import logging
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("lightning", reason="lightning is not installed: make test-integrations installs it")

import lightning
from lightning.pytorch.callbacks import EMAWeightAveraging
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import fastelbo
from fastelbo import reference
from fastelbo.integrations.lightning import LightningVAE, PartsMixin

B, D, M = 8, 12, 3
logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
pytestmark = pytest.mark.filterwarnings("ignore")  # of lightning: no GPU, few workers


def model(dtype: torch.dtype = torch.float32) -> fastelbo.VAE:
    torch.manual_seed(0)
    return fastelbo.VAE(nn.Linear(D, 2 * M), nn.Linear(M, D), latent_shape=(M,)).to(dtype)


def loader(n: int = 20, dtype: torch.dtype = torch.float32) -> DataLoader:
    x = torch.rand(n, D, generator=torch.Generator().manual_seed(1), dtype=dtype)
    return DataLoader(TensorDataset(x), batch_size=B)


def trainer(**options: object) -> lightning.Trainer:
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    return lightning.Trainer(
        **({"max_epochs": 2, "accelerator": "cpu", **quiet, "enable_model_summary": False} | options)
    )


class Plain(lightning.LightningModule):
    """The loss in plain PyTorch, from the draws of fastelbo."""

    def __init__(self, vae: fastelbo.VAE) -> None:
        super().__init__()
        self.vae = vae

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        (x,) = batch
        recon, _ = self.vae(x)
        mu, logvar = self.vae.encode(x)
        bce = F.binary_cross_entropy_with_logits(recon, x, reduction="sum")
        kl = -0.5 * torch.sum(1 + logvar - mu.pow(2) - logvar.exp())
        return (bce + kl) / len(x)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), 1e-3)


@pytest.mark.parametrize("precision", ["64-true", "32-true"])
def test_training_is_that_of_the_loss_in_plain_pytorch(precision: str) -> None:
    states = []
    for wrap in (Plain, LightningVAE):
        vae = model()
        torch.manual_seed(2)
        trainer(precision=precision).fit(wrap(vae), loader(dtype=getattr(torch, f"float{precision[:2]}")))
        states.append(vae.state_dict())
    tolerance = 1e-10 if precision == "64-true" else 1e-5
    torch.testing.assert_close(states[1], states[0], rtol=tolerance, atol=tolerance)
    assert not torch.equal(states[1]["encoder.weight"], model().state_dict()["encoder.weight"].to(vae.encoder.weight))


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true"])
def test_half_precision_trains(precision: str) -> None:
    """Losses stay float32 within autocast, and follow those of float32."""
    seen = {}
    for name in ("32-true", precision):
        module = LightningVAE(model(), lr=1e-2)
        torch.manual_seed(2)
        run = trainer(precision=name, max_epochs=20)
        run.fit(module, loader())
        seen[name] = run.logged_metrics["train/loss"]
        assert seen[name].dtype == torch.float32
    torch.testing.assert_close(seen[precision], seen["32-true"], rtol=0.02, atol=0)


def test_parts_are_logged_as_means_over_the_data() -> None:
    """Batches of 8, 8 and 4: the mean of the means would be another number."""
    vae = model()
    module = LightningVAE(copy.deepcopy(vae), objective="iwae", num_samples=5, eval_samples=50)
    torch.manual_seed(4)
    (logged,) = trainer().validate(module, loader(), verbose=False)
    torch.manual_seed(4)
    total = dict.fromkeys(("loss", "log_likelihood", "kl"), 0.0)
    with torch.no_grad():
        for (x,) in loader():
            recon, q = vae(x, 5)
            log_p = reference.log_prob([recon.double()], x.double(), likelihood="bernoulli")
            total["loss"] -= float(reference.log_mean_exp(log_p + q.log_ratio, 0).sum())
            total["log_likelihood"] += float(log_p.mean(0).sum())
            total["kl"] += float(q.kl.sum())
            vae.log_marginal(x, 50)  # draws a seed
    for name, value in total.items():
        assert logged[f"val/{name}"] == pytest.approx(value / 20, rel=1e-5), name
    assert logged["val/log_marginal"] > -logged["val/loss"] - 0.5
    assert "val/log_marginal" in logged


class Own(PartsMixin, lightning.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.vae = model()

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        (x,) = batch
        mu, logvar = self.vae.encode(x)
        q = fastelbo.rsample(mu, logvar)
        parts = fastelbo.elbo_parts(self.vae.decode(q.z), x, mu, logvar)
        self.last = parts
        return self.log_parts(parts, prog_bar=True)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 0.1)


def test_means_over_batches_that_begin_with_something_else() -> None:
    """Lightning takes the first length that it finds in a batch for its size."""

    class Labelled(Own):
        def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
            mu, logvar = self.vae.encode(batch[1])
            self.log_parts(fastelbo.elbo_parts(self.vae.decode(mu), batch[1], mu, logvar), "val")

    module, x = Labelled(), torch.rand(12, D)
    batches = [(torch.zeros(2), x[:8]), (torch.zeros(2), x[8:])]
    (logged,) = trainer().validate(module, DataLoader(batches, batch_size=None), verbose=False)
    with torch.no_grad():
        mu, logvar = module.vae.encode(x)
        expected = fastelbo.elbo_loss(module.vae.decode(mu), x, mu, logvar)
    assert logged["val/loss"] == pytest.approx(float(expected), rel=1e-5)


def test_the_mixin_in_a_module_of_one_s_own() -> None:
    module, run = Own(), trainer(max_epochs=1)
    run.fit(module, loader())
    logged, last = run.logged_metrics, module.last
    torch.testing.assert_close(logged["train/loss"], last.loss.detach())
    torch.testing.assert_close(logged["train/kl"] - logged["train/log_likelihood"], last.loss.detach())


SETTINGS = {
    "defaults": {},
    "a bound": {"lr": 0.02, "eval_samples": 7, "objective": "vr", "num_samples": 4, "alpha": 0.3, "keep": 2},
    2: {"objective": "iwae", "num_samples": 5, "keep": 2, "seed": 3},
    "a tensor": {"lr": 0.5, "beta": torch.full((M,), 0.5)},
}


@pytest.mark.parametrize("weights_only", [None, True])
@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_a_checkpoint_has_the_settings(settings, weights_only, tmp_path) -> None:
    module, run, path = LightningVAE(model(), **settings), trainer(max_epochs=1), tmp_path / "last.ckpt"
    run.fit(module, loader())
    run.save_checkpoint(path)
    again = LightningVAE.load_from_checkpoint(path, model=model(), weights_only=weights_only)
    found = {"lr": again.lr, "eval_samples": again.eval_samples, **again.options}
    expected = {"lr": 1e-3, "eval_samples": 0, **settings}
    assert str(found) == str(expected)
    assert again.configure_optimizers().defaults["lr"] == found["lr"]
    x, losses = torch.rand(B, D), []
    for one in (module, again):
        torch.manual_seed(5)
        losses.append(one.model.loss(x, **one.options))
    torch.testing.assert_close(*losses)
    assert LightningVAE.load_from_checkpoint(path, model=model(), lr=3.0).lr == 3.0


def test_a_checkpoint_without_networks_and_a_subclass_that_builds_them(tmp_path) -> None:
    class Built(LightningVAE):
        def __init__(self, width: int, **options: object) -> None:
            super().__init__(fastelbo.VAE(nn.Linear(D, 2 * width), nn.Linear(width, D)), **options)

    for module in (LightningVAE(model(), generator=torch.Generator()), Built(2, lr=0.3, beta=0.5)):
        run, path = trainer(max_epochs=1), tmp_path / "last.ckpt"
        run.fit(module, loader())
        run.save_checkpoint(path)
        if isinstance(module, Built):
            again = Built.load_from_checkpoint(path)
            assert (again.lr, again.options, again.model.latent_shape) == (0.3, {"beta": 0.5}, (2,))
        else:
            with pytest.raises(TypeError, match=r"model must be a fastelbo.VAE; got None: .*\(path, model="):
                LightningVAE.load_from_checkpoint(path)


@pytest.mark.parametrize("make", [lambda x: x, lambda x: (x,), lambda x: [x, torch.zeros(len(x))]])
def test_predict_over_any_batches(make) -> None:
    x = torch.rand(2, B, D)
    out = trainer().predict(LightningVAE(model()), DataLoader([make(batch) for batch in x], batch_size=None))
    torch.testing.assert_close([one.posterior.mu for one in out], [model().encode(batch)[0] for batch in x])


def test_two_processes(tmp_path) -> None:
    """DDP over two processes of half the data each: the weights of one process with whole batches."""
    program = tmp_path / "program.py"
    program.write_text(
        "import sys, torch, lightning\n"
        "sys.path.insert(0, sys.argv[1])\n"
        "from tests.integrations.test_lightning import Fixed, loader, trainer\n"
        "module = Fixed()\n"
        "trainer(max_epochs=1, devices=2, strategy='ddp', use_distributed_sampler=True).fit(module, loader(16))\n"
        "if module.global_rank == 0: torch.save(module.model.state_dict(), sys.argv[2])\n"
    )
    root, out = Path(__file__).parent.parent.parent, tmp_path / "state.pt"
    done = subprocess.run([sys.executable, program, root, out], capture_output=True, text=True, cwd=root, timeout=200)
    assert done.returncode == 0, done.stderr[-2000:]
    whole = Fixed()
    whole.trainer = None
    trainer(max_epochs=1).fit(whole, DataLoader(loader(16).dataset, batch_size=16))
    torch.testing.assert_close(torch.load(out), whole.model.state_dict(), rtol=1e-5, atol=1e-6)


def vae_of(checkpoint: Path, latent_shape: tuple[int, ...] | None = None) -> fastelbo.VAE:
    """A model that has seen nothing but the checkpoint, if there is one."""
    vae = fastelbo.VAE(nn.Linear(D, 2 * M), nn.Linear(M, D), latent_shape=latent_shape)
    return LightningVAE.load_from_checkpoint(checkpoint, model=vae).model if checkpoint.exists() else vae


@pytest.mark.parametrize("precision", ["32-true", "bf16-true", "bf16-mixed"])
@pytest.mark.parametrize("averaged", [False, True])
def test_checkpoints_bring_the_latent_shape(tmp_path, precision: str, averaged: bool) -> None:
    """That of a model that has learned it in training. An average that began before the first batch has not."""
    path = tmp_path / "model.ckpt"
    run = trainer(precision=precision, callbacks=[EMAWeightAveraging()] if averaged else [])
    run.fit(LightningVAE(vae_of(path)), loader())
    run.save_checkpoint(path)
    fresh = vae_of(path)
    if averaged:
        with pytest.raises(ValueError, match=r"give VAE\(\.\.\., latent_shape="):
            fresh.sample(2)
        fresh = vae_of(path, (M,))
    assert fresh.latent_shape == (M,) and fresh.sample(2).shape == (2, D)


def test_safetensors(tmp_path) -> None:
    """By a state dict and by the model."""
    safetensors = pytest.importorskip("safetensors.torch", reason="safetensors is not installed")
    for latent in ((M,), (2, 3)):
        trained, path = fastelbo.VAE(nn.Linear(D, 2 * M), nn.Linear(M, D), latent_shape=latent), tmp_path / "model"
        by_state, by_model = (fastelbo.VAE(nn.Linear(D, 2 * M), nn.Linear(M, D)) for _ in range(2))
        safetensors.save_file(trained.state_dict(), path)
        by_state.load_state_dict(safetensors.load_file(path))
        safetensors.save_model(trained, path)
        safetensors.load_model(by_model, path)
        assert by_state.latent_shape == by_model.latent_shape == latent


class Fixed(LightningVAE):
    """Without noise, so that the two processes need not share one stream."""

    def __init__(self) -> None:
        super().__init__(model(), beta=0.5)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        (x,) = batch
        return self.log_parts(self.model.parts(x, eps=torch.zeros(len(x), M), **self.options))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 0.1)
