"""fastelbo.integrations.pythae against Pythae's own classes. `make test-integrations` has the environment for it."""

import math

import pytest
import torch

pytest.importorskip("pythae", reason="pythae is not installed: make test-integrations installs it")

from pythae import models
from pythae.models import AutoModel
from pythae.pipelines import TrainingPipeline
from pythae.trainers import BaseTrainerConfig, CoupledOptimizerTrainerConfig
from torch import Tensor
from torch.distributions import Normal

from fastelbo.integrations import pythae as fused

B, EVENT, M, K, L = 7, (1, 4, 5), 3, 6, 2
NAMES = fused.__all__
OPTIONS = {
    "BetaVAE": {"beta": 3.5},
    "BetaTCVAE": {"alpha": 0.8, "beta": 3.0, "gamma": 1.2, "use_mss": False},
    "CIWAE": {"number_samples": K, "beta": 0.3},
    "DisentangledBetaVAE": {"beta": 3.0, "C": 2.0, "warmup_epoch": 7},
    "HVAE": {"n_lf": 2, "eps_lf": 0.1},
    "INFOVAE_MMD": {"alpha": 0.3, "lbd": 2.0},
    "IWAE": {"number_samples": K},
    "MIWAE": {"number_gradient_estimates": K, "number_samples": L},
    "PIWAE": {"number_gradient_estimates": K, "number_samples": L},
    "VAE_IAF": {"hidden_size": 8},
    "VAMP": {"number_components": 4, "linear_scheduling_steps": 10},
}
BOUNDS = {"loss", "encoder_loss", "decoder_loss"}  # which are not Pythae's in these:
WEIGHTED = ["IWAE", "CIWAE", "MIWAE", "PIWAE"]

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning")


def pair(name: str, recon: str = "bce", dtype: torch.dtype = torch.float64) -> list[models.VAE]:
    """Pythae's model and the fused one, with the same parameters."""
    torch.manual_seed(0)
    kind = getattr(models, f"{name}_Config" if "_" in name else f"{name}Config")
    config = kind(input_dim=EVENT, latent_dim=M, reconstruction_loss=recon, **OPTIONS.get(name, {}))
    plain, ours = (getattr(module, name)(config).to(dtype) for module in (models, fused))
    ours.load_state_dict(plain.state_dict())
    return [plain, ours]


def data(name: str, rows: int = B) -> Tensor:
    """Pythae's HVAE refuses other values than 0 and 1."""
    x = torch.rand(rows, *EVENT)
    return x.round() if name == "HVAE" else x


def step(model: models.VAE, x: Tensor) -> tuple[dict[str, Tensor], list[Tensor | None]]:
    torch.manual_seed(3)
    model.zero_grad()
    out = model({"data": x}, epoch=4)
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
    for x in (2 * torch.rand(B, *EVENT) - 1, 255 * torch.rand(B, *EVENT)):
        for model in pair(name):
            with pytest.raises((ValueError, RuntimeError), match=r"must lie in \[0, 1\]|between 0 and 1|the support"):
                step(model, x)


@pytest.mark.parametrize("recon", ["bce", "mse"])
@pytest.mark.parametrize("name", NAMES)
def test_loss_parts_and_gradients(name: str, recon: str, double: None) -> None:
    x = data(name)
    (theirs, their_grads), (ours, our_grads) = (step(model, x) for model in pair(name, recon))
    close(our_grads, their_grads)
    assert set(ours) == set(theirs)
    for key in theirs:
        if name not in WEIGHTED or key not in BOUNDS:
            close(ours[key], theirs[key])


def test_stratified_weights_are_those_of_the_paper(monkeypatch, double: None) -> None:
    """Pythae's own matrix has rows of other sums than 1."""
    N, others = 20, B - 1
    matrix = torch.full((B, B), 1 / others).fill_diagonal_(1 / N)
    matrix[torch.arange(B), torch.arange(B) - 1] = (N - others) / (N * others)
    assert matrix.sum(1).allclose(torch.ones(B))
    plain, ours = pair("BetaTCVAE")
    plain.use_mss = ours.use_mss = True
    assert not plain._log_importance_weight_matrix(B, N).exp().sum(1).allclose(torch.ones(B), rtol=0.05)
    monkeypatch.setattr(plain, "_log_importance_weight_matrix", lambda batch, size: matrix.log())
    x, found = data("BetaTCVAE"), []
    for model in (plain, ours):
        torch.manual_seed(3)
        loss = model({"data": x}, dataset_size=N).loss
        found.append([loss, *torch.autograd.grad(loss, list(model.parameters()))])
    close(found[1], found[0])


@pytest.mark.parametrize("recon", ["bce", "mse"])
@pytest.mark.parametrize("name", WEIGHTED)
def test_losses_are_the_bounds(name: str, recon: str, double: None) -> None:
    """Of the log weights of Pythae's model. Its own losses are less, by at most log of the number of samples."""
    x = torch.rand(B, *EVENT)
    plain, ours = pair(name, recon)
    seen: list[Tensor] = []
    original = plain.loss_function

    def loss_function(*tensors: Tensor) -> object:
        seen.extend(t.detach() for t in tensors)
        return original(*tensors)

    plain.loss_function = loss_function
    theirs, ours_out = step(plain, x)[0], step(ours, x)[0]
    probs, _, mu, log_var, z = seen
    expanded = x.view(B, *(1 for _ in z.shape[1:-1]), -1).expand_as(probs)
    if recon == "bce":
        log_p = -torch.nn.functional.binary_cross_entropy(probs, expanded, reduction="none").sum(-1)
    else:
        log_p = -0.5 * (expanded - probs).square().sum(-1)
    log_w = log_p + (Normal(0, 1).log_prob(z) - Normal(mu, (0.5 * log_var).exp()).log_prob(z)).sum(-1)

    def iwae(log_w: Tensor) -> Tensor:  # over the dimension after the data
        return -(torch.logsumexp(log_w, 1) - math.log(log_w.shape[1])).mean()

    expected = {"loss": iwae(log_w)}
    if name == "CIWAE":
        expected = {"loss": 0.3 * -log_w.mean() + 0.7 * iwae(log_w)}
    if name == "PIWAE":
        expected = {"encoder_loss": iwae(log_w), "decoder_loss": iwae(log_w.flatten(1))}
    for key, bound in expected.items():
        close(ours_out[key], bound)
        assert 0 < ours_out[key] - theirs[key] < math.log(K * L)


@pytest.mark.parametrize("recon", ["bce", "mse"])
@pytest.mark.parametrize("name", ["VAE", "VAMP"])
def test_get_nll_estimates_what_pythae_s_does(name: str, recon: str, double: None) -> None:
    """Other draws: equal within what 4,000 samples leave of Monte Carlo noise."""
    plain, ours = pair(name, recon)
    x = torch.rand(4, *EVENT)
    with torch.no_grad():
        expected = plain.get_nll(x, 4000, 500)
    assert abs(ours.get_nll(x, 4000, 3) - expected) < 0.03


def test_get_nll_is_of_gaussian_posteriors() -> None:
    """It is that of the VAE where Pythae's is, and else Pythae's."""
    for name in set(NAMES) - {"VAMP"}:
        theirs = getattr(models, name).get_nll
        assert getattr(fused, name).get_nll is (fused.VAE.get_nll if theirs is models.VAE.get_nll else theirs)


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
    x = data(name)
    for who, model in enumerate(pair(name, recon, torch.float32)):
        model.save(str(tmp_path / f"{who}"))
        for cls in (getattr(models, name), getattr(fused, name)):
            again = cls.load_from_folder(str(tmp_path / f"{who}"))
            assert type(again) is cls and again.model_config == model.model_config
            if cls is type(model):
                torch.testing.assert_close(step(again, x)[0].loss, step(model, x)[0].loss)


@pytest.mark.parametrize("name", NAMES)
def test_training_from_one_seed_is_the_same(name: str, tmp_path) -> None:
    """Two epochs by Pythae's pipeline: weights and evaluation losses; then files, read by either class."""
    generator = torch.Generator().manual_seed(1)
    data = (torch.rand(64, *EVENT, generator=generator) < 0.3).float()
    folders = {}
    plain, ours = pair(name, dtype=torch.float32)
    for who, model in (("plain", plain), ("ours", ours)):
        rates = {"learning_rate": 1e-2}
        kind: type[BaseTrainerConfig] = BaseTrainerConfig
        if name == "PIWAE":
            rates = {"encoder_learning_rate": 1e-2, "decoder_learning_rate": 1e-2}
            kind = CoupledOptimizerTrainerConfig
        config = kind(
            **rates,
            output_dir=str(tmp_path / who),
            num_epochs=2,
            per_device_train_batch_size=16,
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
