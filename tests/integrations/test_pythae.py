"""fastelbo.integrations.pythae against Pythae's own classes. `make test-integrations` has the environment for it."""

import math

import pytest
import torch

pytest.importorskip("pythae", reason="pythae is not installed: make test-integrations installs it")

from pythae import models
from pythae.models import AutoModel
from pythae.pipelines import TrainingPipeline
from pythae.trainers import BaseTrainerConfig
from torch import Tensor

from fastelbo.integrations import pythae as fused

B, EVENT, M, K = 7, (1, 4, 5), 3, 6
NAMES = ["VAE", "BetaVAE", "VAMP", "IWAE"]
OPTIONS = {"BetaVAE": {"beta": 3.5}, "VAMP": {"number_components": 4, "linear_scheduling_steps": 10}}
OPTIONS["IWAE"] = {"number_samples": K}

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning")


def pair(name: str, recon: str = "bce", dtype: torch.dtype = torch.float64) -> list[models.VAE]:
    """Pythae's model and the fused one, with the same parameters."""
    torch.manual_seed(0)
    config = getattr(models, f"{name}Config")(
        input_dim=EVENT, latent_dim=M, reconstruction_loss=recon, **OPTIONS.get(name, {})
    )
    plain, ours = getattr(models, name)(config).to(dtype), getattr(fused, name)(config).to(dtype)
    ours.load_state_dict(plain.state_dict())
    return [plain, ours]


def step(model: models.VAE, x: Tensor, **more: object) -> tuple[dict[str, Tensor], list[Tensor]]:
    torch.manual_seed(3)
    model.zero_grad()
    out = model({"data": x}, **more)
    out.loss.backward()
    return out, [p.grad for p in model.parameters()]


def close(actual: object, expected: object) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-10)


@pytest.fixture
def double(monkeypatch):
    """The identity matrix of VAMP's pseudo-inputs, and the draws of the IWAE, in float64."""
    torch.set_default_dtype(torch.float64)
    monkeypatch.setattr(torch, "float", torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("name", NAMES)
def test_data_outside_of_the_unit_interval_are_refused(name: str, double: None) -> None:
    epoch = {"epoch": 4} if name == "VAMP" else {}
    for x in (2 * torch.rand(B, *EVENT) - 1, 255 * torch.rand(B, *EVENT)):
        for model in pair(name):
            with pytest.raises((ValueError, RuntimeError), match=r"must lie in \[0, 1\]|between 0 and 1"):
                step(model, x, **epoch)


@pytest.mark.parametrize("recon", ["bce", "mse"])
@pytest.mark.parametrize("name", NAMES)
def test_loss_parts_and_gradients(name: str, recon: str, double: None) -> None:
    x = torch.rand(B, *EVENT)
    epoch = {"epoch": 4} if name == "VAMP" else {}
    (theirs, their_grads), (ours, our_grads) = (step(model, x, **epoch) for model in pair(name, recon))
    close(our_grads, their_grads)
    for key in ("recon_loss", "reg_loss", "recon_x", "z"):
        close(ours[key], theirs[key])
    if name != "IWAE":
        close(ours.loss, theirs.loss)


@pytest.mark.parametrize("recon", ["bce", "mse"])
def test_the_loss_of_the_iwae_is_the_bound(recon: str, double: None) -> None:
    """Computed from the log weights of Pythae's model; its own loss is less, by at most log K."""
    x = torch.rand(B, *EVENT)
    plain, ours = pair("IWAE", recon)
    seen: list[Tensor] = []
    original = type(plain).loss_function

    def loss_function(self: models.IWAE, recon_x: Tensor, x: Tensor, mu: Tensor, log_var: Tensor, z: Tensor) -> object:
        # one sample at a time, whose "loss" is minus its log weight
        for k in range(K):
            for b in range(B):
                self.n_samples = 1
                one = [t[b : b + 1, k : k + 1] for t in (recon_x, mu, log_var, z)]
                seen.append(-original(self, one[0], x[b : b + 1], *one[1:])[0].detach())
        self.n_samples = K
        return original(self, recon_x, x, mu, log_var, z)

    plain.loss_function = loss_function.__get__(plain)
    theirs, ours_out = step(plain, x)[0].loss, step(ours, x)[0].loss
    log_w = torch.stack(seen).view(K, B)
    close(ours_out, -(torch.logsumexp(log_w, 0) - math.log(K)).mean())
    assert 0 < ours_out - theirs < math.log(K)


@pytest.mark.parametrize("recon", ["bce", "mse"])
@pytest.mark.parametrize("name", NAMES)
def test_get_nll_estimates_what_pythae_s_does(name: str, recon: str, double: None) -> None:
    """Other draws: equal within what 4,000 samples leave of Monte Carlo noise."""
    plain, ours = pair(name, recon)
    x = torch.rand(4, *EVENT)
    with torch.no_grad():
        expected = plain.get_nll(x, 4000, 500)
    assert abs(ours.get_nll(x, 4000, 3) - expected) < 0.03


def test_get_nll_takes_exactly_n_samples(double: None) -> None:
    """The mean of single-sample estimates is an ELBO, below that of many."""
    ours = pair("VAE")[1]
    x = torch.rand(1, *EVENT).expand(3000, *EVENT)
    torch.manual_seed(0)
    one, many = ours.get_nll(x, 1, 1000), ours.get_nll(x[:3], 1000, 3)
    with torch.no_grad():
        elbo = -torch.stack([ours({"data": x}).loss for _ in range(4)]).mean()
    assert abs(one - elbo) < 0.1 and many > one


@pytest.mark.parametrize("recon", ["bce", "mse"])
@pytest.mark.parametrize("name", NAMES)
def test_saved_models_keep_their_settings(name: str, recon: str, tmp_path) -> None:
    """Of ours and of Pythae's, read by ours and by Pythae's; the loss reads the settings."""
    x = torch.rand(B, *EVENT)
    for who, model in enumerate(pair(name, recon, torch.float32)):
        model.save(str(tmp_path / f"{who}"))
        for cls in (getattr(models, name), getattr(fused, name)):
            again = cls.load_from_folder(str(tmp_path / f"{who}"))
            assert type(again) is cls and again.model_config == model.model_config
            if cls is type(model):
                epoch = {"epoch": 4} if name == "VAMP" else {}
                torch.testing.assert_close(step(again, x, **epoch)[0].loss, step(model, x, **epoch)[0].loss)


@pytest.mark.parametrize("name", NAMES)
def test_training_from_one_seed_is_the_same(name: str, tmp_path) -> None:
    """Two epochs by Pythae's pipeline: weights and evaluation losses; then files, read by either class."""
    generator = torch.Generator().manual_seed(1)
    data = (torch.rand(64, *EVENT, generator=generator) < 0.3).float()
    folders = {}
    plain, ours = pair(name, dtype=torch.float32)
    for who, model in (("plain", plain), ("ours", ours)):
        config = BaseTrainerConfig(
            output_dir=str(tmp_path / who),
            num_epochs=2,
            per_device_train_batch_size=16,
            learning_rate=1e-2,
            no_cuda=True,
            keep_best_on_train=True,
            seed=5,
        )
        TrainingPipeline(training_config=config, model=model)(train_data=data)
        (folders[who],) = (tmp_path / who).glob("*/final_model")
    states = [torch.load(folders[who] / "model.pt")["model_state_dict"] for who in ("plain", "ours")]
    torch.testing.assert_close(states[1], states[0], rtol=2e-3, atol=2e-4)
    assert any(not torch.equal(states[0][key], before) for key, before in pair(name)[0].state_dict().items())
    assert type(AutoModel.load_from_folder(str(folders["ours"]))) is getattr(models, name)
    again = getattr(fused, name).load_from_folder(str(folders["plain"]))
    assert type(again) is getattr(fused, name)
    torch.testing.assert_close(again.state_dict(), states[0])
