"""Figures that are what they say: of which rows, in which units, and where there are none."""

import json
import math
from pathlib import Path
from typing import Any

import matplotlib.image
import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from runs import said, train

from fastelbo import VAE
from fastelbo.commands import files, pictures
from fastelbo.data import Dataset
from fastelbo.nets import build_model

SMALL = ("--hidden", 16, "--latent-dim", 2)


def run(folder: Path, name: str, x: NDArray[Any], *options: object) -> Path:
    np.save(folder / f"{name}.npy", x)
    train("--data", folder / f"{name}.npy", *SMALL, *options, "--out", folder / name)
    return folder / name


def evaluated(*arguments: object) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(said("evaluate", *arguments, "--samples", 200, "--json"))
    return found


@pytest.mark.usefixtures("no_pictures")
@pytest.mark.parametrize("likelihood", ["gaussian", "laplace"])
@pytest.mark.parametrize(
    "shift, scale",
    [(1e5, 1e4), (np.linspace(-5, 5, 7), 10.0 ** np.arange(-6, 8, 2))],
    ids=["far", "columns of mixed scale"],
)
def test_any_scale_is_fitted_as_standardized_data(tmp_path, likelihood, shift, scale):
    """log p(x), in nats of the data, is that of the fit of standardized data less the log determinant."""
    numbers = np.random.default_rng(0)
    y = numbers.standard_normal((300, 3)) @ numbers.standard_normal((3, 7)) + numbers.standard_normal((300, 7))
    x = (shift + scale * y).astype(np.float32)
    options = ("--likelihood", likelihood, "--epochs", 5)
    ours = run(tmp_path, "x", x, *options)
    scaling = files.read_checkpoint(ours)["model"]
    shift_, scale_ = (scaling[f"scaling.{name}"].double().numpy() for name in ("shift", "scale"))
    theirs = run(tmp_path, "y", ((x.astype(np.float64) - shift_) / scale_).astype(np.float32), *options)
    found, expected = evaluated(ours), evaluated(theirs)
    assert found["log_prob"] == pytest.approx(expected["log_prob"] - np.log(scale_).sum(), abs=0.01 * 7)
    bits = expected["bits_per_dim"] + np.log2(scale_).mean()
    assert found["bits_per_dim"] == pytest.approx(bits, abs=0.02)
    assert found["bits_per_dim"] == pytest.approx(-found["log_prob"] / (7 * math.log(2)))
    said("sample", ours, "--n", 2000, "--out", tmp_path / "drawn.npy")
    drawn = np.load(tmp_path / "drawn.npy")
    assert (np.abs(np.log(drawn.std(0) / x.std(0))) < 0.7).all()
    assert (np.abs(drawn.mean(0) - x.mean(0)) < 0.5 * x.std(0)).all()


@pytest.mark.usefixtures("no_pictures")
def test_bits_per_dimension(tmp_path):
    """Of pixels from 0 to 255: log 255 nats more for each than of x / 255. Of grey values under a Bernoulli: none."""
    x = np.random.default_rng(0).integers(0, 256, (60, 4, 4), np.uint8)
    bytes_, floats = (
        evaluated(run(tmp_path, f"{values.dtype}", values, "--likelihood", "gaussian", "--epochs", 2))
        for values in (x, (x / 255).astype(np.float32))
    )
    assert bytes_["log_prob"] == pytest.approx(floats["log_prob"], rel=1e-4)
    assert bytes_["bits_per_dim"] == pytest.approx(floats["bits_per_dim"] + math.log2(255), rel=1e-4)
    grey = run(tmp_path, "grey", x, "--epochs", 1)
    assert evaluated(grey)["bits_per_dim"] is None
    assert "none  a Bernoulli is no density of values between 0 and 1" in said("evaluate", grey, "--samples", 2)
    binary = evaluated(run(tmp_path, "binary", (x > 127).astype(np.uint8), "--epochs", 1))
    assert binary["bits_per_dim"] == pytest.approx(-binary["log_prob"] / (16 * math.log(2)))
    assert 0.9 < binary["bits_per_dim"] < 1.5, "fair coins"


@pytest.mark.usefixtures("no_pictures")
def test_bits_of_the_cells_that_are_there(tmp_path):
    x = np.random.default_rng(0).standard_normal((60, 5)).astype(np.float32)
    x[:, 1:][np.random.default_rng(1).random((60, 4)) < 0.4] = np.nan
    out = run(tmp_path, "x", x, "--epochs", 1)
    found = evaluated(out, "--data", tmp_path / "x.npy")
    assert found["bits_per_dim"] == pytest.approx(-60 * found["log_prob"] / (np.isfinite(x).sum() * math.log(2)))
    assert "of the cells missing and masked" in train("--resume", "--out", out)


@pytest.mark.usefixtures("no_pictures")
def test_every_row_of_a_file_is_scored_and_the_file_named(tmp_path):
    numbers = np.random.default_rng(0)
    x, path = numbers.random((50, 6), np.float32), tmp_path / "other.npy"
    out = run(tmp_path, "x", x, "--epochs", 1)
    np.save(path, numbers.random((37, 6), np.float32))
    found = evaluated(out, "--data", path)
    assert (found["rows"], found["data"], found["held_out"]) == (37, str(path), False)
    assert said("evaluate", out, "--data", path, "--samples", 2).startswith(f"{path}: 37 data, 2 samples each")
    assert "x.npy: 50 data (training saw most of them)" in said(
        "evaluate", out, "--data", tmp_path / "x.npy", "--samples", 2
    )
    found = evaluated(out)
    assert (found["rows"], found["held_out"]) == (5, True)
    out = run(tmp_path, "y", x, "--epochs", 1, "--test-data", path)
    found = evaluated(out)
    assert (found["rows"], found["data"], found["held_out"]) == (37, str(path), True)
    rows = [evaluated(out, "--data", tmp_path / "x.npy", "--seed", s)["log_prob"] for s in (0, 0, 1)]
    assert rows[0] == rows[1] != rows[2]


@pytest.mark.usefixtures("no_pictures")
def test_a_dark_image_is_read_as_in_training(tmp_path, capsys):
    """Bytes of 0 and 1 alone are binary data by themselves, but x / 255 for a model of images, and the other way round
    an error."""
    x = np.random.default_rng(0).integers(0, 256, (40, 4, 4), np.uint8)
    dark = (x[:1] > 127).astype(np.uint8)
    out = run(tmp_path, "x", x, "--epochs", 1)
    np.save(tmp_path / "dark.npy", dark)
    np.save(tmp_path / "floats.npy", (dark / 255).astype(np.float32))
    found, expected = (evaluated(out, "--data", tmp_path / f"{name}.npy") for name in ("dark", "floats"))
    assert found["log_prob"] == pytest.approx(expected["log_prob"], rel=1e-5)
    out = run(tmp_path, "binary", (x > 127).astype(np.uint8), "--epochs", 1)
    with pytest.raises(SystemExit):
        evaluated(out, "--data", tmp_path / "x.npy")
    assert "data must be 0 and 1 as in training" in capsys.readouterr().err


@pytest.mark.usefixtures("no_pictures")
def test_a_file_of_another_type_is_read_in_the_units_of_training(tmp_path):
    numbers = np.random.default_rng(0)
    x = numbers.integers(0, 200, (40, 5))
    out = run(tmp_path, "x", x.astype(np.int16), "--likelihood", "gaussian", "--epochs", 1)
    found = []
    for dtype in (np.int16, np.uint8, np.float64):
        np.save(tmp_path / "again.npy", x.astype(dtype))
        found.append(evaluated(out, "--data", tmp_path / "again.npy"))
    assert found[0] == found[1] == found[2]
    out = run(tmp_path, "bits", numbers.integers(0, 2, (40, 5)).astype(np.float32), "--epochs", 1)
    for dtype in (bool, np.uint8, np.int64, np.float32):
        np.save(tmp_path / "again.npy", numbers.integers(0, 2, (9, 5)).astype(dtype))
        assert evaluated(out, "--data", tmp_path / "again.npy")["rows"] == 9


@pytest.mark.usefixtures("no_pictures")
def test_held_out_data_of_another_type(tmp_path):
    x = np.random.default_rng(0).poisson(3.0, (40, 5))
    np.save(tmp_path / "test.npy", x[:7].astype(np.int32))
    out = run(tmp_path, "x", x[7:].astype(np.int64), "--epochs", 1, "--test-data", tmp_path / "test.npy")
    (tmp_path / "x.npy").unlink()  # what training saw is not needed any more
    assert evaluated(out)["rows"] == 7
    np.save(tmp_path / "x.npy", x[7:])
    assert "33 data (training saw most of them)" in said("evaluate", out, "--data", tmp_path / "x.npy", "--samples", 2)


@pytest.mark.usefixtures("no_pictures")
def test_half_precision_keeps_the_scale_of_images(tmp_path):
    x = (1000 + np.random.default_rng(0).standard_normal((400, 3, 3))).astype(np.float32)
    bounds = []
    for options in ((), ("--amp", "bf16")):
        out = run(tmp_path, f"x{len(options)}", x, "--epochs", 4, *options)
        bounds.append(evaluated(out)["log_prob"])
    assert bounds[1] == pytest.approx(bounds[0], abs=0.3)


@pytest.mark.usefixtures("no_pictures")
def test_one_held_out_row_is_no_collapse(tmp_path):
    x = np.random.default_rng(0).random((4, 6), np.float32)
    np.save(tmp_path / "x.npy", x)
    text = train("--data", tmp_path / "x.npy", *SMALL, "--epochs", 7, "--out", tmp_path / "run")
    assert "?/2 units active" in text and "collapse" not in text
    text = said("evaluate", tmp_path / "run", "--samples", 2)
    assert "no standard error by the choice of data" in text and "unknown  of 2" in text
    found = json.loads(said("evaluate", tmp_path / "run", "--samples", 1, "--json"))
    assert found["sampling_error"] is None and found["data_error"] is None and found["active_units"] is None


# ----------------------------------------------------------------------------------------------------------------------
# Pictures.


def test_pictures_of_any_size(tmp_path, monkeypatch):
    """512 dimensions are no wider than 40, and no more rows than are shown are encoded, in pieces."""
    assert pictures.kl_per_dimension(torch.rand(512), tmp_path / "kl.png").exists()
    assert matplotlib.image.imread(tmp_path / "kl.png").shape[1] < 2000
    monkeypatch.setattr(pictures, "ROWS", 100)
    monkeypatch.setattr("fastelbo.models.pieces.BATCH", 30)
    model, seen = build_model((5,), 3, 8, "gaussian"), []
    real = VAE.encode
    monkeypatch.setattr(VAE, "encode", lambda self, x, **options: seen.append(len(x)) or real(self, x, **options))
    held_out = Dataset(torch.randn(450, 5))
    part = held_out.subset(torch.arange(0, 450, math.ceil(450 / pictures.ROWS)))
    mu, kl = pictures._posterior(model, part)
    assert mu.shape == (90, 3) and kl.shape == (3,) and seen == [30, 30, 30]


@pytest.mark.parametrize("kind", ["strings", "many strings", "many numbers", "one-hot"])
def test_labels_of_every_kind_colour_the_latents(tmp_path, kind):
    x = np.random.default_rng(0).random((300, 6), np.float32)
    y = {
        "strings": np.array(["CD4$ $x_{", "_a", "c"] * 100),
        "many strings": np.array([f"type {n % 60}" for n in range(300)]),
        "many numbers": np.linspace(0, 1, 300)[:, None],
        "one-hot": np.eye(4)[np.arange(300) % 4],
    }[kind]
    np.savez(tmp_path / "x.npz", x=x, y=y)
    text = train("--data", tmp_path / "x.npz", *SMALL, "--epochs", 1, "--out", tmp_path / "run")
    assert "latent_plane.png" in text and "left out" not in text
