"""What `evaluate` prints of a model whose log p(x) has a closed form."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from runs import said, train
from scipy.stats import multivariate_normal

from fastelbo.commands import files

SIZE, LATENT, VARIANCE = 6, 2, 0.3
*W, SHIFT = np.random.default_rng(0).standard_normal((LATENT + 1, SIZE))
W = np.transpose(W)
COVARIANCE = W @ W.T + VARIANCE * np.eye(SIZE)
PRECISION = np.eye(LATENT) + W.T @ W / VARIANCE  # of z given x


def linear(state: dict[str, torch.Tensor], part: str, A: np.ndarray, b: np.ndarray) -> None:
    """Make the three layers of encoder or decoder v -> A v + b: [I; -I], identity and [A, -A], with ReLU between."""
    first, second, last = [name.removesuffix(".weight") for name in state if part in name and name.endswith(".weight")]
    width, inputs = state[f"{second}.weight"].shape[0], A.shape[1]
    both = np.zeros((width, inputs))
    both[:inputs], both[inputs : 2 * inputs] = np.eye(inputs), -np.eye(inputs)
    for name, weight in ((first, both), (second, np.eye(width)), (last, A @ both.T)):
        bias = b if name == last else np.zeros(width)
        for end, value in (("weight", weight), ("bias", bias)):
            assert state[f"{name}.{end}"].shape == value.shape
            state[f"{name}.{end}"] = torch.from_numpy(value).float()


@pytest.fixture
def linear_run(tmp_path, no_pictures) -> Path:
    """p(x) = N(SHIFT, COVARIANCE); q(z | x) has the mean of p(z | x), and half its variances again on top."""
    out = tmp_path / "run"
    np.save(tmp_path / "x.npy", np.random.default_rng(1).standard_normal((40, SIZE)).astype(np.float32))
    options = ["--likelihood", "gaussian", "--hidden", 2 * SIZE, "--latent-dim", LATENT]
    train("--data", tmp_path / "x.npy", *options, "--epochs", 1, "--out", out)
    saved = files.read_checkpoint(out)
    state = saved["model"]
    gain = np.linalg.solve(PRECISION, W.T) / VARIANCE
    logvar = np.log(1.5 * np.diag(np.linalg.inv(PRECISION)))
    linear(state, "encoder", np.concatenate([gain, np.zeros((LATENT, SIZE))]), np.concatenate([-gain @ SHIFT, logvar]))
    linear(state, "decoder", W, SHIFT)
    for name, value in (("log_scale", math.log(VARIANCE)), ("scaling.shift", 0.0), ("scaling.scale", 1.0)):
        for key in (key for key in state if key.endswith(name)):
            state[key] = torch.full_like(state[key], value)
    files.save_checkpoint(out / "checkpoint.pt", saved)
    return out


@pytest.mark.parametrize("rows", [1, 10, 1000])
def test_evaluate_linear_gaussian(tmp_path, linear_run, rows):
    """Within two standard errors of the closed form, in float64; what one row cannot tell is null."""
    x = np.random.default_rng(rows).multivariate_normal(SHIFT, COVARIANCE, rows).astype(np.float32)
    np.save(tmp_path / "rows.npy", x)
    options = ["--data", tmp_path / "rows.npy", "--samples", 2000, "--json"]
    found = json.loads(said("evaluate", linear_run, *options))
    exact = np.atleast_1d(multivariate_normal(SHIFT, COVARIANCE).logpdf(x.astype(np.float64)))
    assert found["rows"] == rows
    assert 0 < found["sampling_error"] < 0.05 / math.sqrt(rows), "the samples must tell something"
    assert abs(found["log_prob"] - exact.mean()) <= 2 * found["sampling_error"]
    if rows == 1:
        assert found["data_error"] is None and found["active_units"] is None
    else:
        assert found["data_error"] == pytest.approx(exact.std(ddof=1) / math.sqrt(rows), rel=0.1)
        assert found["active_units"] == LATENT
