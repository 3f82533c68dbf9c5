"""Data of any scale: the networks see standardized data, and every figure is of the data themselves."""

import copy
import math

import pytest
import torch
from torch import nn

import fastelbo
from fastelbo import VAE, Scaling
from fastelbo.nets import LearnedScale, build_model

D, M, B = 6, 2, 8
SHIFT = torch.tensor([0.0, 1e5, -3.0, 1e-6, 7.0, 0.0], dtype=torch.float64)
SCALE = torch.tensor([1.0, 1e4, 1e-6, 1e6, 2.0, 1e-3], dtype=torch.float64)


class Parameters(nn.Module):
    """As many parameters as a likelihood has, all of them of every element."""

    def __init__(self, count: int) -> None:
        super().__init__()
        self.layer = nn.Linear(M, count * D)

    def forward(self, z: torch.Tensor) -> torch.Tensor | tuple[torch.Tensor, ...]:
        found = self.layer(z).unflatten(1, (-1, D)).unbind(1)
        return found if len(found) > 1 else found[0]


def models(likelihood: str, decoder: nn.Module, scale: torch.Tensor = SCALE) -> tuple[VAE, VAE]:
    """The same networks, with the scaling and without."""
    torch.manual_seed(0)
    plain = VAE(nn.Linear(D, 2 * M), nn.Sequential(nn.Linear(M, M), decoder), likelihood).double()
    scaled = VAE(copy.deepcopy(plain.encoder), copy.deepcopy(plain.decoder), likelihood, scaling=Scaling(SHIFT, scale))
    return scaled, plain


CASES = [("gaussian", 1), ("gaussian", 2), ("laplace", 1), ("laplace", 2), ("student_t", 3)]


@pytest.mark.parametrize("likelihood, count", CASES)
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("scale", [SCALE, SCALE[1]], ids=["columns", "one"])
def test_log_p_is_that_of_standardized_data_less_the_log_determinant(likelihood, count, masked, scale):
    scaled, plain = models(likelihood, Parameters(count), scale)
    y = torch.randn(B, D, dtype=torch.float64)
    x, log_scale = SHIFT + scale * y, scale.log().expand(D)
    mask = torch.rand(B, D) < 0.7 if masked else None
    lost = (log_scale if mask is None else mask * log_scale).expand(B, D).sum(1)
    for method in (
        lambda model, x: -model.loss(x, mask=mask, seed=1, reduction="none"),
        lambda model, x: -model.loss(x, "iwae", num_samples=5, mask=mask, seed=1, reduction="none"),
        lambda model, x: model.log_marginal(x, 9, mask=mask, seed=1).log_prob,
    ):
        torch.testing.assert_close(method(scaled, x), method(plain, y) - lost, rtol=1e-9, atol=1e-8)
    for ours, theirs in zip(scaled.encode(x, mask=mask), plain.encode(y, mask=mask), strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("likelihood, count", CASES)
def test_samples_and_reconstructions_are_in_the_units_of_the_data(likelihood, count):
    scaled, plain = models(likelihood, Parameters(count))
    scaled.encode(SHIFT[None]), plain.encode(SHIFT[None])
    for mean in (False, True):
        ours, theirs = (m.sample(5, mean=mean, generator=torch.Generator().manual_seed(0)) for m in (scaled, plain))
        torch.testing.assert_close(ours, SHIFT + SCALE * theirs, rtol=1e-9, atol=1e-12)
    y = torch.randn(B, D, dtype=torch.float64)
    torch.testing.assert_close(scaled.reconstruct(SHIFT + SCALE * y), SHIFT + SCALE * plain.reconstruct(y))


def test_gradients_are_those_of_standardized_data():
    scaled, plain = models("gaussian", Parameters(2))
    y = torch.randn(B, D, dtype=torch.float64)
    scaled.loss(SHIFT + SCALE * y, seed=1).backward()
    plain.loss(y, seed=1).backward()
    for ours, theirs in zip(scaled.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-7, atol=1e-8)


def test_a_learned_scalar_variance_becomes_one_per_column():
    scaled, plain = models("gaussian", nn.Sequential(nn.Linear(M, D), LearnedScale()))
    y = torch.randn(B, D, dtype=torch.float64)
    expected = plain.loss(y, seed=1) + SCALE.log().sum()
    torch.testing.assert_close(scaled.loss(SHIFT + SCALE * y, seed=1), expected)


def test_a_mean_in_half_precision_is_turned_back_in_float32():
    scaling = Scaling(torch.tensor(1000.0), torch.tensor(1.0))
    mean, logvar = scaling.inverse((torch.tensor([0.25], dtype=torch.bfloat16), torch.tensor(0.0)), "gaussian")
    assert mean.item() == 1000.25 and mean.dtype == logvar.dtype == torch.float32


def test_it_travels_with_the_model(tmp_path):
    model = build_model((D,), M, 8, "gaussian", scaling=Scaling(SHIFT.float(), SCALE.float()))
    torch.save(model, tmp_path / "model.pt")
    again = torch.load(tmp_path / "model.pt", weights_only=False)
    assert torch.equal(again.scaling.scale, model.scaling.scale) and {"scaling.shift", "scaling.scale"} <= set(
        again.state_dict()
    )
    x = (SHIFT + SCALE * torch.randn(B, D)).float()
    assert torch.equal(again.loss(x, seed=1), model.loss(x, seed=1))
    compiled = torch.compile(model.loss, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x, seed=1), model.loss(x, seed=1))


@pytest.mark.parametrize(
    "make, error, message",
    [
        (lambda: Scaling(SHIFT, 0 * SCALE), ValueError, "scale positive and finite"),
        (lambda: Scaling(SHIFT * math.nan, SCALE), ValueError, "shift must be finite"),
        (lambda: VAE(nn.Identity(), nn.Identity(), scaling=Scaling(SHIFT, SCALE)), ValueError, "of the reals"),
        (
            lambda: VAE(nn.Identity(), nn.Identity(), "gaussian", scaling=SHIFT),
            TypeError,
            "scaling must be a fastelbo.",
        ),
    ],
)
def test_what_it_refuses(make, error, message):
    with pytest.raises(error, match=message):
        make()


def test_it_is_public():
    assert fastelbo.Scaling is Scaling
