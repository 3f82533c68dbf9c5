"""`fastelbo.evaluate`: the figures of `log_marginal` and `PPCA.log_prob`, over data of any size."""

import math

import pytest
import torch

import fastelbo
from fastelbo import PPCA
from fastelbo.data import Dataset
from fastelbo.models import pieces
from fastelbo.nets import build_model

N, D = 23, 6


@pytest.mark.parametrize("gaps", [False, True])
def test_a_vae_on_a_tensor_and_on_a_data_set(monkeypatch, gaps):
    monkeypatch.setattr(pieces, "BATCH", 5)
    torch.manual_seed(0)
    model, x = build_model((D,), 2, 8, "gaussian"), torch.randn(N, D)
    if gaps:
        x[::3, 1:4] = math.nan
    found = fastelbo.evaluate(model, x, 3000, seed=1)
    again = fastelbo.evaluate(model, Dataset(x), 3000, seed=1, chunk_size=700)
    assert [*found] == pytest.approx([*again], rel=1e-5, abs=1e-6)
    expected = model.log_marginal(x, 3000, mask=~x.isnan(), seed=2)
    cells = int((~x.isnan()).sum())
    assert abs(found.log_prob - expected.log_prob.mean()) < 6 * found.sampling_error
    assert found.data_error == pytest.approx(expected.log_prob.std().item() / math.sqrt(N), rel=0.05)
    assert found.sampling_error == pytest.approx(expected.std_error.square().sum().sqrt().item() / N, rel=0.2)
    assert found.bits_per_dim == pytest.approx(-N * found.log_prob / (cells * math.log(2)))
    assert found.elbo < found.log_prob and (found.rows, found.latent_dim) == (N, 2) and 1 < found.ess < 3000


def test_a_ppca():
    x = torch.randn(N, D)
    model = PPCA(2).fit(x)
    found = fastelbo.evaluate(model, Dataset(x))
    assert found.log_prob == pytest.approx(model.score(x)) and found.elbo is None and found.sampling_error is None
    assert found.bits_per_dim == pytest.approx(-found.log_prob / (D * math.log(2)))


def test_what_it_refuses():
    with pytest.raises(TypeError, match=r"model must be a fastelbo.VAE or fastelbo.PPCA; got torch"):
        fastelbo.evaluate(torch.nn.Linear(2, 2), torch.rand(3, 2))
    with pytest.raises(ValueError, match="num_samples must be at least 1; got 0"):
        fastelbo.evaluate(PPCA(1), torch.rand(3, 2), 0)
