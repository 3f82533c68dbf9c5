"""Training and the command: figures, files, resuming, and errors of one line."""

import csv
import json
import os
import shutil
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import fastelbo
from fastelbo import PPCA
from fastelbo.commands import cli, pictures, train
from fastelbo.commands import ppca as commands_ppca
from fastelbo.commands.data import load
from fastelbo.commands.ppca import METRICS as METRICS_OF_PPCA
from fastelbo.commands.train import LATENT_METRICS, METRICS, Config, Trainer
from fastelbo.data.built_in import counts_model
from fastelbo.models import pieces
from fastelbo.nets import build_model

pytestmark = pytest.mark.usefixtures("one_thread")

TIMES = {"ms_per_step", "loss_share"}
PICTURES = ("curves", "reconstructions", "prior_samples", "latent_plane", "kl_per_dimension")
SMALL = {"hidden": 16, "latent_dim": 2, "epochs": 4}


def rows(out: Path) -> list[dict[str, float]]:
    with (out / "metrics.csv").open(newline="") as file:
        return [{k: float(v) for k, v in row.items()} for row in csv.DictReader(file)]


def untimed(history: list[dict[str, float]]) -> list[dict[str, float]]:
    return [{k: v for k, v in row.items() if k not in TIMES} for row in history]


def run(config: Config, out: Path, *, resume: bool = False, stop_after: int | None = None) -> Trainer:
    def stop(row):
        if row["epoch"] == stop_after:
            raise KeyboardInterrupt

    trainer = train.prepare(config, out, resume=resume)
    try:
        train.fit(trainer, out, stop)
    except KeyboardInterrupt:
        assert stop_after is not None
    return trainer


@pytest.fixture
def cpu_time(monkeypatch):
    """The time that this process computes: a share of it stays one, whatever else the machine does."""
    monkeypatch.setattr(Trainer, "_now", lambda self: time.process_time())


@pytest.mark.usefixtures("cpu_time")
def test_train_writes_everything(tmp_path, capsys):
    assert cli.main(["train", "--epochs", "2", "--hidden", "32", "--out", str(tmp_path / "run")]) == 0
    out, lines = tmp_path / "run", capsys.readouterr().out.splitlines()
    assert sum(line.startswith("epoch ") for line in lines) == 2
    history = rows(out)
    latents = [f"{name}_{j}" for name in ("kl", "mu_variance") for j in range(8)]
    assert list(history[0]) == [*METRICS, *LATENT_METRICS, *latents] and [row["epoch"] for row in history] == [1, 2]
    for row in history:
        for split in ("train", "held_out"):
            assert row[f"{split}_elbo"] == pytest.approx(row[f"{split}_log_likelihood"] - row[f"{split}_kl"], abs=1e-9)
            assert row[f"{split}_bound"] == pytest.approx(row[f"{split}_elbo"], rel=1e-5)
        assert row["train_kl"] >= 0 and -60 < row["held_out_elbo"] < -15
        assert sum(row[f"kl_{j}"] for j in range(8)) == pytest.approx(row["held_out_kl"], rel=1e-5)
        assert row["active_units"] == sum(row[f"mu_variance_{j}"] > 0.01 for j in range(8)) and row["ess"] == 1
        assert row["ms_per_step"] > 0 and 0 < row["loss_share"] < 1
    assert history[1]["held_out_elbo"] > history[0]["held_out_elbo"]
    for name in PICTURES:
        picture = (out / f"{name}.png").read_bytes()
        assert picture[:8] == b"\x89PNG\r\n\x1a\n" and len(picture) > 5000
    state = torch.load(out / "checkpoint.pt", weights_only=True)
    assert state["epoch"] == 2 and state["config"]["likelihood"] == "bernoulli"
    assert not list(out.glob("*.partial"))


def test_held_out_figures_are_datum_weighted(monkeypatch):
    trainer = Trainer(Config(**SMALL))
    whole = trainer.evaluate()
    x = trainer.data.held_out[:]
    with torch.no_grad():
        kl = trainer.model.parts(x, **trainer.noise(x, torch.Generator().manual_seed(0))).kl.double().mean()
    assert whole["held_out_kl"] == pytest.approx(kl.item(), rel=1e-6)
    monkeypatch.setattr(pieces, "BATCH", 179)  # 180 held-out digits: a mean of means would be far off
    assert trainer.evaluate()["held_out_kl"] == pytest.approx(kl.item(), rel=1e-6)


@pytest.mark.parametrize(
    "options",
    [
        {"beta_warmup": 3},
        {"objective": "dreg", "num_samples": 3, "impl": "reference"},
        {"objective": "iwae", "num_samples": 6, "keep": 2},
    ],
    ids=str,
)
def test_resumed_run_equals_an_uninterrupted_one(tmp_path, options):
    config = Config(**SMALL, **options)
    whole = run(config, tmp_path / "whole")
    run(config, tmp_path / "parts", stop_after=2)
    with (tmp_path / "parts/metrics.csv").open("a") as file:
        file.write(
            "3," + ",".join("0" for _ in METRICS[1:]) + "\n"
        )  # left by an epoch that was cut before its checkpoint
    torch.manual_seed(123)
    parts = run(config, tmp_path / "parts", resume=True)
    assert untimed(rows(tmp_path / "whole")) == untimed(rows(tmp_path / "parts"))
    assert untimed(parts.history) == untimed(whole.history)
    for ours, theirs in zip(whole.model.parameters(), parts.model.parameters(), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("options", [{}, {"objective": "iwae", "num_samples": 6, "keep": 2}], ids=str)
def test_training_leaves_the_global_generator_alone(options):
    torch.manual_seed(1)
    before = torch.get_rng_state()
    Trainer(Config(**SMALL, **options)).run_epoch()
    assert torch.equal(torch.get_rng_state(), before)


def test_fused_and_reference_take_the_same_first_steps():
    fused, plain = (Trainer(Config(**SMALL, impl=impl)) for impl in ("fused", "reference"))
    fused.run_epoch(), plain.run_epoch()
    np.testing.assert_allclose(fused.step_losses[:5], plain.step_losses[:5], rtol=2e-6)
    assert fused.history[0]["held_out_elbo"] == pytest.approx(plain.history[0]["held_out_elbo"], rel=1e-4)


@pytest.mark.usefixtures("cpu_time")
def test_kept_samples_in_the_figures(tmp_path, capsys):
    options = ["--objective", "iwae", "--samples", "12", "--epochs", "2", "--hidden", "16", "--latent-dim", "2"]
    assert cli.main(["train", *options, "--keep", "3", "--out", str(tmp_path)]) == 0
    history = rows(tmp_path)
    line = next(text for text in capsys.readouterr().out.splitlines() if text.startswith("epoch 2/2"))
    assert "25% kept" in line and "99 % of the weight in" in line
    for row in history:
        assert row["ess"] < row["samples_99"] < 12 and 0 < row["loss_share"] < 1
    assert [row["kept_share"] for row in history] == [0.25, 0.25]
    assert history[1]["held_out_bound"] > history[0]["held_out_bound"]


@pytest.mark.parametrize(
    "options",
    [{}, {"objective": "iwae", "num_samples": 5}, {"objective": "iwae", "num_samples": 12, "keep": 3}],
    ids=str,
)
@pytest.mark.parametrize("data, likelihood", [("digits", "gaussian"), ("counts", "zinb")])
@pytest.mark.parametrize("impl", ["fused", "reference"])
def test_the_time_of_the_loss_leaves_the_run_as_it_was(options, data, likelihood, impl):
    """Without the networks: neither they nor their gradients, nor the generator, notice."""
    trainer = Trainer(Config(**SMALL, **options, data=data, likelihood=likelihood, impl=impl))
    calls = []
    trainer.model.decoder.register_forward_hook(lambda *_: calls.append(1))
    before = trainer.generator.get_state()
    assert 0 < trainer.loss_time(trainer.data.train[:64]) < 1
    assert len(calls) == 1 and all(p.grad is None for p in trainer.model.parameters())
    assert torch.equal(trainer.generator.get_state(), before)


def test_keep_auto_is_gone(tmp_path, capsys):
    """A run of it is read, but not continued."""
    (tmp_path / "run.toml").write_text('objective = "iwae"\nnum_samples = 8\nkeep = "auto"\n')
    iwae = ["--objective", "iwae", "--samples", "8"]
    for options, message in (
        ([*iwae, "--keep", "auto"], 'argument --keep: "auto", of earlier versions, is gone: give a number of samples'),
        (["--config", str(tmp_path / "run.toml")], "keep must be an int; got str"),
    ):
        with pytest.raises(SystemExit, match="2"):
            cli.main(["train", *options, "--out", str(tmp_path / "run")])
        error = capsys.readouterr().err
        assert message in error and error.count("\n") == 1
    old, run = Path(__file__).parents[1] / "saved/kept", tmp_path / "kept"
    shutil.copytree(old, run)
    assert fastelbo.load(run).latent_shape == (2,)
    for change in ([], ["--keep", "8"]):
        with pytest.raises(SystemExit, match="2"):
            cli.main(["train", "--resume", "--epochs", "3", *change, "--out", str(run)])
        error = capsys.readouterr().err
        assert error.endswith("holds a run of keep 'auto', which is gone and cannot be continued: start a new one\n")
        assert error.count("\n") == 1
    assert (run / "metrics.csv").read_bytes() == (old / "metrics.csv").read_bytes()


def test_the_reference_keeps_the_same_samples():
    options = {"objective": "dreg", "num_samples": 6, "keep": 2}
    fused, plain = (Trainer(Config(**SMALL, **options, impl=impl)) for impl in ("fused", "reference"))
    fused.run_epoch(), plain.run_epoch()
    np.testing.assert_allclose(fused.step_losses[:5], plain.step_losses[:5], rtol=2e-6)


@pytest.mark.parametrize("scale", [0.0, 1.0, 30.0])
def test_samples_that_carry_a_share_of_the_weight(scale):
    log_w = scale * torch.randn(20, 7)
    for share in (0.5, 0.99):
        found = train.samples_of_weight(log_w, share)
        for w, count in zip(torch.softmax(log_w.double(), 0).unbind(1), found, strict=True):
            largest = w.sort(descending=True).values
            assert largest[:count].sum() >= share - 1e-12 > largest[: count - 1].sum() - 2e-12


def test_fused_and_reference_agree_on_an_estimator_with_a_gradient_of_its_own():
    options = {**SMALL, "objective": "dreg", "num_samples": 4, "epochs": 1}
    fused, plain = (Trainer(Config(**options, impl=impl)) for impl in ("fused", "reference"))
    fused.run_epoch(), plain.run_epoch()
    np.testing.assert_allclose(fused.step_losses[:5], plain.step_losses[:5], rtol=2e-6)


def test_beta_rises_step_by_step():
    trainer = Trainer(Config(**SMALL, beta=2.0, beta_warmup=2, batch_size=809))  # 1617 data: two steps per epoch
    assert [trainer.beta(step) for step in range(6)] == [0.0, 0.5, 1.0, 1.5, 2.0, 2.0]
    assert Trainer(Config(**SMALL)).beta(0) == 1.0
    assert Trainer(Config(**SMALL, objective="ciwae", num_samples=2)).beta(0) == 0.5
    assert Trainer(Config(**SMALL, objective="iwae")).beta(0) is None
    x = trainer.data.train[:5]
    totals = trainer.step(x, 0.5)
    bound, _, log_likelihood, kl = totals.tolist()
    assert bound == pytest.approx(log_likelihood - 0.5 * kl, rel=1e-6)
    assert trainer.step_losses == [pytest.approx(-bound / 5, rel=1e-6)]


def test_free_bits_and_beta_reach_the_loss():
    for options in ({"free_bits": 0.5}, {"beta": 4.0}, {"objective": "ciwae", "beta": 0.9, "num_samples": 3}):
        changed, plain = (
            Trainer(Config(**SMALL, **{k: v for k, v in options.items() if k not in drop}))
            for drop in ((), ("free_bits", "beta"))
        )
        x = plain.data.train[:64]
        assert changed.step(x, changed.beta(0))[0] != plain.step(x, plain.beta(0))[0], options


def test_collapse_is_named_with_its_epoch(tmp_path, capsys):
    """A KL of weight 100 leaves nothing of q; free bits keep it."""
    arguments = ["train", "--latent-dim", "3", "--hidden", "16", "--epochs", "8"]
    assert cli.main([*arguments, "--beta", "100", "--beta-warmup", "4", "--lr", "0.01", "--out", str(tmp_path)]) == 0
    lines = capsys.readouterr().out.splitlines()
    history = rows(tmp_path)
    since = train.collapses(history)
    assert set(since) == {0, 1, 2} and history[-1]["active_units"] == 0
    named = [i for i, line in enumerate(lines) if "posterior collapse" in line]
    assert lines[named[-1]].startswith("at the end: ") and f"since epoch {max(since.values())}" in lines[named[-1]]
    assert all("--free-bits" in lines[i] for i in named)
    fifth = next(i for i, line in enumerate(lines) if line.startswith("epoch 5/"))
    for epoch in set(since.values()):  # said when it happens, after the warm-up and the first epochs
        after = max(fifth, next(i for i, line in enumerate(lines) if line.startswith(f"epoch {epoch}/")))
        assert "posterior collapse" in lines[after + 1]
    assert min(named) > fifth and min(since.values()) < 5


def test_the_first_epochs_are_no_collapse(tmp_path, capsys):
    assert cli.main(["train", "--epochs", "2", "--hidden", "16", "--lr", "1e-5", "--out", str(tmp_path)]) == 0
    assert rows(tmp_path)[-1]["active_units"] < 8 and "collapse" not in capsys.readouterr().out
    assert cli.main(["train", "--resume", "--out", str(tmp_path)]) == 0
    assert "nothing to train: all 2 epochs are done; --epochs N trains up to epoch N" in capsys.readouterr().out


@pytest.mark.parametrize("model", ["vae", "ppca"])
def test_samples(tmp_path, capsys, model):
    small = ["--epochs", "1", "--hidden", "16"] if model == "vae" else []
    assert cli.main(["train", "--model", model, *small, "--latent-dim", "2", "--out", str(tmp_path)]) == 0
    capsys.readouterr()
    for name, extra in (("a", []), ("b", []), ("c", ["--seed", "1"]), ("d", ["--mean"])):
        if (model, name) != ("ppca", "d"):
            assert cli.main(["sample", str(tmp_path), "--n", "5", "--out", str(tmp_path / f"{name}.npy"), *extra]) == 0
            assert f"{name}.npy: 5 samples of shape" in capsys.readouterr().out
    a, b, c = (np.load(tmp_path / f"{name}.npy") for name in "abc")
    assert a.shape == ((5, 8, 8) if model == "vae" else (5, 64))
    assert np.array_equal(a, b) and not np.array_equal(a, c)
    if model == "vae":
        assert set(np.unique(a)) == {0, 1} and 0 < np.load(tmp_path / "d.npy").min() < 1
    else:
        with pytest.raises(SystemExit) as stopped:
            cli.main(["sample", str(tmp_path), "--mean"])
        assert stopped.value.code == 2 and "mean has no effect with a PPCA" in capsys.readouterr().err
    with pytest.raises(SystemExit) as stopped:
        cli.main(["sample", str(tmp_path), "--n", "0"])
    assert stopped.value.code == 2 and "must be at least 1; got 0" in capsys.readouterr().err


@pytest.mark.parametrize("model", ["vae", "ppca"])
def test_evaluate_for_programs(tmp_path, capsys, model):
    small = ["--epochs", "1", "--hidden", "16"] if model == "vae" else []
    assert cli.main(["train", "--model", model, *small, "--latent-dim", "2", "--out", str(tmp_path)]) == 0
    capsys.readouterr()
    assert cli.main(["evaluate", str(tmp_path), "--samples", "50"]) == 0
    text = capsys.readouterr().out
    assert cli.main(["evaluate", str(tmp_path), "--samples", "50", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert f"{found['log_prob']:.4f}" in text and f"{found['data_error']:.4f}" in text and found["data"] == "digits"


def test_the_largest_number_of_components_is_said(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(commands_ppca, "ladder", lambda limit: iter((1, 2)))
    assert cli.main(["train", "--model", "ppca", "--out", str(tmp_path)]) == 0
    assert "kept: 2 components, the lowest BIC, which is the largest number tried" in capsys.readouterr().out


def test_collapses_follow_the_history():
    def row(epoch: int, *variances: float) -> dict[str, float]:
        return {"epoch": epoch, **{f"mu_variance_{j}": v for j, v in enumerate(variances)}}

    history = [row(1, 0.001, 1.0, 1.0), row(2, 0.5, 0.009, 1.0), row(3, 0.5, 0.0, 0.01), row(4, 0.5, 0.0, 0.0)]
    assert train.collapses(history) == {1: 2, 2: 3}
    assert train.collapses(history[:1]) == {0: 1} and train.collapses([]) == {}


def test_evaluate(tmp_path, capsys):
    arguments = ["--epochs", "2", "--hidden", "16", "--latent-dim", "2", "--out", str(tmp_path)]
    assert cli.main(["train", *arguments]) == 0
    capsys.readouterr()
    outputs = []
    for target, extra in ((tmp_path, []), (tmp_path / "checkpoint.pt", ["--chunk-size", "7"])):
        assert cli.main(["evaluate", str(target), "--samples", "100", *extra]) == 0
        outputs.append(capsys.readouterr().out)
    assert outputs[0] == outputs[1], "neither the folder nor the chunks make a difference"
    assert cli.main(["evaluate", str(tmp_path), "--samples", "100", "--seed", "1"]) == 0
    assert capsys.readouterr().out.splitlines()[1] != outputs[0].splitlines()[1], "the seed does"
    lines = {line[:17].strip(): line[17:].split() for line in outputs[0].splitlines()[1:]}
    state = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    trainer = train.prepare(Config(**state["config"]), tmp_path, resume=True)
    x = trainer.data.held_out[:]
    expected = trainer.model.log_marginal(x, 2000, seed=1)
    log_p, elbo = float(lines["log p(x)"][0]), float(lines["ELBO"][0])
    assert abs(log_p - expected.log_prob.mean()) < 5 * float(lines["log p(x)"][3])
    assert float(lines["log p(x) - ELBO"][0]) == pytest.approx(log_p - elbo, abs=2e-4) and elbo < log_p
    assert lines["active units"][-1] == "2" and 1 < float(lines["mean ESS"][0]) < 100
    np.save(tmp_path / "x.npy", np.random.default_rng(0).random((40, 5)))
    for wrong, message in (
        ([str(tmp_path / "none.pt")], "there is no"),
        ([str(tmp_path), "--data", str(tmp_path / "x.npy")], "data must be of shape (8, 8) as in training; got (5,)"),
        ([str(tmp_path), "--samples", "0"], "num_samples must be at least 1; got 0"),
    ):
        with pytest.raises(SystemExit) as exit_:
            cli.main(["evaluate", *wrong])
        error = capsys.readouterr().err
        assert exit_.value.code == 2 and message in error and error.count("\n") == 1


def test_iwae_trains_and_reports_its_bound(tmp_path, capsys):
    arguments = ["train", "--objective", "iwae", "--samples", "5", "--epochs", "2", "--hidden", "16"]
    assert cli.main([*arguments, "--out", str(tmp_path)]) == 0
    assert "iwae bound" in capsys.readouterr().out
    for row in rows(tmp_path):
        assert row["held_out_bound"] > row["held_out_elbo"]


@pytest.mark.parametrize("likelihood", ["bernoulli", "bernoulli_probs", "gaussian", "laplace", "student_t"])
def test_array_files(tmp_path, likelihood):
    x = (255 * torch.rand(40, 3, 5, generator=torch.Generator().manual_seed(0))).byte().numpy()
    np.savez(tmp_path / "x.npz", x=x, y=np.arange(40) % 3)
    arguments = ["train", "--data", str(tmp_path / "x.npz"), "--likelihood", likelihood, "--epochs", "1"]
    assert cli.main([*arguments, "--out", str(tmp_path / "run")]) == 0
    assert (tmp_path / "run/latent_plane.png").exists()


def test_data_that_are_no_images(tmp_path):
    np.save(tmp_path / "x.npy", np.random.default_rng(0).normal(size=(40, 7)))
    arguments = ["train", "--data", str(tmp_path / "x.npy"), "--latent-dim", "1", "--epochs", "1"]
    assert cli.main([*arguments, "--out", str(tmp_path / "run")]) == 0
    assert {p.stem for p in (tmp_path / "run").glob("*.png")} == {"curves", "kl_per_dimension"}
    state = torch.load(tmp_path / "run/checkpoint.pt", weights_only=True)
    assert state["config"]["likelihood"] == "gaussian"


# ----------------------------------------------------------------------------------------------------------------------
# Counts.


@pytest.mark.parametrize("options", [[], ["--likelihood", "zinb"], ["--likelihood", "poisson", "--impl", "reference"]])
def test_train_and_evaluate_on_counts(tmp_path, capsys, options):
    arguments = ["--data", "counts", "--epochs", "2", "--hidden", "16", "--out", str(tmp_path), *options]
    assert cli.main(["train", *arguments]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("counts: generated, not measured: negative binomial")
    likelihood = options[1] if options else "nb"
    assert lines[1].startswith(f"counts: 1800 training and 200 held-out data of shape (200,), likelihood {likelihood}")
    assert "no pictures of data and samples: (200,) is not the shape of an image" in lines
    assert {p.stem for p in tmp_path.glob("*.png")} == {"curves", "latent_plane", "kl_per_dimension"}
    history = rows(tmp_path)
    assert history[0]["held_out_elbo"] < history[1]["held_out_elbo"] < -180
    assert cli.main(["evaluate", str(tmp_path), "--samples", "20"]) == 0
    found = {line[:17].strip(): line[17:].split() for line in capsys.readouterr().out.splitlines()[1:]}
    assert history[1]["held_out_elbo"] - 5 < float(found["ELBO"][0]) < float(found["log p(x)"][0])


def resumed(config: Config, folder: Path) -> Trainer:
    """An uninterrupted run, to which one that was stopped after two epochs and resumed is equal."""
    whole = run(config, folder / "whole")
    run(config, folder / "parts", stop_after=2)
    parts = run(config, folder / "parts", resume=True)
    assert untimed(parts.history) == untimed(whole.history)
    for ours, theirs in zip(whole.model.parameters(), parts.model.parameters(), strict=True):
        assert torch.equal(ours, theirs)
    return whole


def test_resumed_run_on_counts_equals_an_uninterrupted_one(tmp_path):
    config = Config(**SMALL, data="counts", likelihood="zinb", objective="iwae", num_samples=2)
    resumed(config, tmp_path)


def test_fused_and_reference_agree_on_counts():
    options = {**SMALL, "data": "counts", "likelihood": "zinb", "epochs": 1}
    fused, plain = (Trainer(Config(**options, impl=impl)) for impl in ("fused", "reference"))
    fused.run_epoch(), plain.run_epoch()
    np.testing.assert_allclose(fused.step_losses[:5], plain.step_losses[:5], rtol=2e-6)


def test_the_dispersion_of_generated_counts_is_found():
    """That of genes with counts enough; before, latent dimensions that are missing count as dispersion."""
    log_mean, log_theta = counts_model()
    trainer = Trainer(Config(data="counts", hidden=128, lr=4e-3, beta_warmup=10, epochs=40))
    for _ in range(40):
        row = trainer.run_epoch()
    assert row["active_units"] == 5, "four factors and the library size"
    found = trainer.model.decoder[-1].log_theta.detach().double()
    enough = log_mean.exp().mean(0) > 0.5
    error = (found - log_theta)[enough]
    assert enough.sum() > 80 and error.abs().median() < 0.15
    assert torch.corrcoef(torch.stack([found, log_theta])[:, enough])[0, 1] > 0.95


def test_counts_from_files(tmp_path, capsys):
    """Images of counts have all pictures, also as bytes, which are not divided by 255 here."""
    x = np.random.default_rng(0).poisson(3, (40, 4, 5))
    for kind, options in ((np.int16, []), (np.uint8, ["--likelihood", "poisson"])):
        name = np.dtype(kind).name
        np.save(tmp_path / f"{name}.npy", x.astype(kind))
        arguments = ["train", "--data", str(tmp_path / f"{name}.npy"), "--epochs", "2", *options]
        assert cli.main([*arguments, "--out", str(tmp_path / name)]) == 0
        assert {p.stem for p in (tmp_path / name).glob("*.png")} == set(PICTURES)
        assert "no pictures" not in capsys.readouterr().out
    drawn = torch.from_numpy(x.astype(np.uint8))
    assert torch.equal(pictures.as_images(drawn, "counts"), drawn.float())
    assert pictures.as_images(drawn[:, 0, :4], "counts") is None, "16 counts are no square of pixels"


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--objective", "elboo"], "argument --objective: invalid choice: 'elboo'"),
        (["--epochs", "0"], "epochs must be at least 1; got 0"),
        (["--epochs", "many"], "argument --epochs: invalid int value"),
        (["--keep", "some"], "argument --keep: invalid int value: 'some'"),
        (["--keep", "0", "--objective", "iwae", "--samples", "4"], "keep must be at least 1; got 0"),
        (["--keep", "5", "--objective", "iwae", "--samples", "4"], "keep must be at most num_samples=4; got 5"),
        (["--keep", "2", "--samples", "4"], "keep has no use with 'elbo'"),
        (["--lr", "-1"], "lr must be positive and finite; got -1.0"),
        (["--data", "mnist.npy"], "No such file"),
        (["--data", "mnist"], "data must be one of digits, patches, counts, or an .npy, .npz or .h5ad file"),
        (["--data", "patches", "--likelihood", "nb"], "data must be counts, whole numbers, for likelihood 'nb'"),
        (["--data", "patches", "--likelihood", "nb", "--fractions"], "data must be counts, at least 0, for likelihood"),
        (["--data", "patches", "--likelihood", "bernoulli"], "data must lie in [0, 1]"),
        (["--resume"], "no run to go on from"),
        (["--free-bits", "0.1", "--objective", "iwae"], "free_bits has no effect with objective 'iwae'"),
        (["--beta-warmup", "2", "--objective", "dreg"], "beta_warmup has no effect with objective 'dreg'"),
        (["--groups", "3", "--samples", "4", "--objective", "miwae"], "groups must divide the number of samples K=4"),
        (["--objective", "rws"], "'rws' needs at least 2 samples"),
        (["--beta", "-1"], "beta must be finite and at least 0; got -1.0"),
        (["--unknown"], "unrecognized arguments: --unknown"),
    ],
)
def test_bad_arguments_end_in_one_line(tmp_path, capsys, arguments, message):
    with pytest.raises(SystemExit) as exit_:
        cli.main(["train", "--out", str(tmp_path), *arguments])
    error = capsys.readouterr().err
    assert exit_.value.code == 2 and message in error and error.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_a_run_is_neither_overwritten_nor_resumed_with_other_options(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(pictures, "save_all", lambda *_: [])
    arguments = ["train", "--hidden", "16", "--epochs", "1", "--out", str(tmp_path)]
    assert cli.main(arguments) == 0
    for extra, message in (([], "already holds a run"), (["--resume", "--lr", "0.1"], "changed: lr 0.002 -> 0.1")):
        with pytest.raises(SystemExit) as exit_:
            cli.main([*arguments, *extra])
        assert exit_.value.code == 2 and message in capsys.readouterr().err
    assert cli.main(["train", "--resume", "--epochs", "2", "--out", str(tmp_path)]) == 0
    assert len(rows(tmp_path)) == 2
    (tmp_path / "checkpoint.pt").write_bytes(b"damaged")
    with pytest.raises(SystemExit):
        cli.main(["train", "--resume", "--out", str(tmp_path)])
    assert "is damaged, or no checkpoint" in capsys.readouterr().err


def test_divergence_stops_with_a_message_and_without_a_checkpoint(tmp_path, capsys):
    assert cli.main(["train", "--lr", "1e8", "--epochs", "3", "--out", str(tmp_path)]) == 1
    assert capsys.readouterr().err.startswith("fastelbo train: loss is ")
    assert not (tmp_path / "checkpoint.pt").exists()


def test_missing_extra_is_named(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(cli, "find_spec", lambda name: None if name == "sklearn" else object())
    assert cli.main(["train", "--out", str(tmp_path)]) == 2
    assert capsys.readouterr().err == "fastelbo train needs sklearn: pip install fastelbo[train]\n"


def test_info_as_a_module():
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "fastelbo", "info"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=60)
    assert done.returncode == 0 and '"torch"' in done.stdout


# ----------------------------------------------------------------------------------------------------------------------
# Probabilistic PCA.

PPCA_PICTURES = ("log_prob", "components", "samples")


def test_ppca_on_digits(tmp_path, capsys):
    out = tmp_path / "run"
    assert cli.main(["train", "--model", "ppca", "--out", str(out)]) == 0
    found = rows(out)
    assert list(found[0]) == list(METRICS_OF_PPCA) and [row["components"] for row in found][:5] == [1, 2, 3, 4, 6]
    assert found[-1]["components"] == 48  # of rank 61
    fits = [row["train_log_prob"] for row in found]
    assert all(b > a for a, b in pairwise(fits))
    kept = min(found, key=lambda row: row["bic"])
    text = capsys.readouterr().out
    assert f"kept: {kept['components']:.0f} components, the lowest BIC" in text
    assert all((out / f"{name}.png").stat().st_size > 5000 for name in PPCA_PICTURES)
    assert cli.main(["evaluate", str(out)]) == 0
    assert f"log p(x)         {kept['held_out_log_prob']:10.4f}  exactly" in capsys.readouterr().out
    state = torch.load(out / "checkpoint.pt", weights_only=True)
    model = PPCA(int(kept["components"]))
    model.load_state_dict(state["model"])
    assert model.score(load("digits").held_out[:].flatten(1)) == pytest.approx(kept["held_out_log_prob"], rel=1e-6)


def test_ppca_of_a_file_with_missing_cells(tmp_path, capsys):
    x = np.random.default_rng(0).normal(size=(60, 5)).astype(np.float32)
    x[::7, 2] = np.nan
    np.save(tmp_path / "x.npy", x)
    options = ["train", "--model", "ppca", "--data", str(tmp_path / "x.npy"), "--latent-dim", "2"]
    with pytest.raises(SystemExit) as stopped:
        cli.main([*options, "--method", "eig", "--out", str(tmp_path / "eig")])
    assert stopped.value.code == 2 and '"em" takes NaN' in capsys.readouterr().err
    assert cli.main([*options, "--out", str(tmp_path / "em")]) == 0
    said = capsys.readouterr().out
    assert "2 components" in said and "PPCA by em" in said and "3.00% of the cells missing" in said
    found = {path.name for path in (tmp_path / "em").iterdir()}
    assert found == {"checkpoint.pt", "config.json", "log_prob.png", "metrics.csv"}


@pytest.mark.parametrize(
    "options, message",
    [
        (["--model", "ppca", "--beta", "2"], "beta has no effect with model 'ppca'"),
        (["--model", "ppca", "--resume"], "resume has no effect with model 'ppca'"),
        (["--method", "em"], "method has no effect with model 'vae'"),
        (["--model", "ppca", "--latent-dim", "0"], "latent_dim must be at least 1; got 0"),
        (["--model", "ppca", "--latent-dim", "62"], "n_components must be less than the rank 61 of the centered data"),
        (["--model", "ppca", "--data", "nothing"], "data must be one of digits, patches"),
    ],
)
def test_ppca_options_that_do_not_fit(tmp_path, capsys, options, message):
    with pytest.raises(SystemExit) as stopped:
        cli.main(["train", *options, "--out", str(tmp_path / "run")])
    assert stopped.value.code == 2 and message in capsys.readouterr().err


def test_a_ppca_run_is_not_overwritten_nor_resumed(tmp_path, capsys):
    out = str(tmp_path / "run")
    options = ["train", "--model", "ppca", "--latent-dim", "2", "--out", out]
    assert cli.main(options) == 0
    for again, message in ((options, "already holds a run"), (["train", "--resume", "--out", out], "not resumed")):
        with pytest.raises(SystemExit):
            cli.main(again)
        assert message in capsys.readouterr().err


# ----------------------------------------------------------------------------------------------------------------------
# Schedules, networks, precision.


def test_cosine_schedule(tmp_path):
    trainer = run(Config(**SMALL, lr_schedule="cosine", lr=0.01), tmp_path)
    steps = 26  # of 1617 digits, 64 at a time
    for step in (0, 1, steps, 4 * steps - 1):
        assert trainer.lr(step) == pytest.approx(0.005 * (1 + np.cos(np.pi * step / (4 * steps))))
    assert trainer.lr(0) == 0.01 and trainer.lr(4 * steps) == 0
    assert trainer.optimizer.param_groups[0]["lr"] == trainer.lr(4 * steps - 1)
    with pytest.raises(ValueError, match="keeps its options; changed: epochs 4 -> 6"):
        train.prepare(Config(**{**SMALL, "epochs": 6}, lr_schedule="cosine", lr=0.01), tmp_path, resume=True)


@pytest.mark.parametrize("options", [{"lr_schedule": "cosine"}, {"net": "conv"}, {"amp": "bf16"}], ids=str)
def test_a_resumed_run_of_these_equals_an_uninterrupted_one(tmp_path, options):
    config = Config(**SMALL, **options)
    whole = resumed(config, tmp_path)
    assert whole.history[-1]["held_out_elbo"] > whole.history[0]["held_out_elbo"]


def test_version(capsys):
    with pytest.raises(SystemExit, match="0"):
        cli.main(["--version"])
    assert capsys.readouterr().out == f"fastelbo {fastelbo.__version__}\n"


def test_device(tmp_path, capsys, monkeypatch):
    """What a GPU would change is chosen here, and not run."""
    assert run(Config(**SMALL, device="cpu"), tmp_path / "cpu").device == torch.device("cpu")
    resumed = train.prepare(Config(**SMALL), tmp_path / "cpu", resume=True)  # device="auto": it may be another machine
    assert len(resumed.history) == SMALL["epochs"]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match="2"):
        cli.main(["train", "--device", "cuda", "--out", str(tmp_path / "cuda")])
    assert "device must be 'cpu' or 'auto' here" in capsys.readouterr().err
    assert train.device_of("auto") == torch.device("cpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert train.device_of("auto") == train.device_of("cuda") == torch.device("cuda")
    assert train.device_of("cpu") == train.device_of("auto", processes=2) == torch.device("cpu")
    with pytest.raises(ValueError, match="device must be 'cpu' with several processes; got 'cuda' and 2"):
        train.device_of("cuda", processes=2)


def test_tensorboard(tmp_path, capsys, monkeypatch):
    """Every figure of every epoch; those of an epoch that is repeated replace the earlier ones."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    options = ["--hidden", "16", "--latent-dim", "2", "--logger", "tensorboard", "--out", str(tmp_path / "run")]
    assert cli.main(["train", "--epochs", "2", *options]) == 0
    assert cli.main(["train", "--epochs", "3", "--resume", *options[-4:]]) == 0
    events = EventAccumulator(str(tmp_path / "run"))
    events.Reload()
    table = rows(tmp_path / "run")
    assert set(events.Tags()["scalars"]) == set(table[0]) - {"epoch"}
    for name in ("train_elbo", "held_out_kl", "mu_variance_1"):
        scalars = events.Scalars(name)
        assert [event.step for event in scalars] == [1, 2, 3]
        assert [event.value for event in scalars] == pytest.approx([row[name] for row in table], rel=1e-6)
    monkeypatch.setattr(cli, "find_spec", lambda name: None if name == "tensorboard" else True)
    with pytest.raises(SystemExit, match="2"):
        cli.main(["train", *options[:-1], str(tmp_path / "other")])
    assert "pip install tensorboard" in capsys.readouterr().err


def test_patience(tmp_path, capsys, monkeypatch):
    bounds = iter([-9.0, -7.0, -8.0, -7.0, -7.5, -1.0])
    real = Trainer.evaluate
    monkeypatch.setattr(Trainer, "evaluate", lambda self: {**real(self), "held_out_bound": next(bounds)})
    options = ["--epochs", "9", "--hidden", "16", "--latent-dim", "2", "--patience", "3"]
    assert cli.main(["train", *options, "--out", str(tmp_path)]) == 0
    assert "stopped: no better held-out bound in 3 epochs; best.pt is epoch 2" in capsys.readouterr().out
    assert [row["epoch"] for row in rows(tmp_path)] == [1, 2, 3, 4, 5]
    states = [torch.load(tmp_path / name, weights_only=True) for name in ("best.pt", "checkpoint.pt")]
    assert [state["epoch"] for state in states] == [2, 5]
    assert cli.main(["evaluate", str(tmp_path / "best.pt"), "--samples", "10"]) == 0
    assert "after epoch 2" in capsys.readouterr().out
    assert cli.main(["train", "--resume", "--out", str(tmp_path)]) == 0, "a run that has stopped stays so"
    assert [row["epoch"] for row in rows(tmp_path)] == [1, 2, 3, 4, 5]


@pytest.mark.parametrize("shape", [(8, 8), (1, 8, 12), (3, 8, 8)], ids=str)
@pytest.mark.parametrize("likelihood", ["bernoulli", "bernoulli_probs", "gaussian"])
def test_convolutions(shape, likelihood):
    model = build_model(shape, 3, 32, likelihood, "conv")
    x = torch.rand(5, *shape)
    assert model.loss(x).isfinite() and model.reconstruct(x).shape == x.shape and model.sample(2).shape == (2, *shape)
    assert sum(isinstance(m, torch.nn.Conv2d) for m in model.modules()) == 2


@pytest.mark.parametrize(
    "shape, likelihood, message",
    [
        ((64,), "bernoulli", r"net 'conv' takes images .*; got \(64,\)"),
        ((2, 8, 8), "bernoulli", r"of 1 or 3 channels.*; got \(2, 8, 8\)"),
        ((10, 8), "bernoulli", r"multiples of 4; got \(10, 8\)"),
        ((8, 8), "nb", "net 'conv' takes no counts; got likelihood 'nb'"),
    ],
)
def test_what_convolutions_do_not_take(shape, likelihood, message):
    with pytest.raises(ValueError, match=message):
        build_model(shape, 3, 32, likelihood, "conv")


def test_half_precision_in_the_steps_alone():
    seen = []
    trainer = Trainer(Config(**SMALL, amp="bf16"))
    trainer.model.decoder.register_forward_hook(
        lambda module, args, out: seen.append((torch.is_grad_enabled(), out.dtype))
    )
    row = trainer.run_epoch()
    assert {dtype for grad, dtype in seen if grad} == {torch.bfloat16}
    assert {dtype for grad, dtype in seen if not grad} == {torch.float32}
    plain = Trainer(Config(**SMALL)).run_epoch()
    assert row["train_elbo"] == pytest.approx(plain["train_elbo"], rel=0.01)
    assert all(p.dtype == torch.float32 for p in trainer.model.parameters())


# ----------------------------------------------------------------------------------------------------------------------
# Options from a file.


def test_options_from_a_file(tmp_path, capsys):
    (tmp_path / "run.toml").write_text('objective = "iwae"\nnum_samples = 3\nhidden = 16\nlatent_dim = 2\nepochs = 1\n')
    arguments = ["train", "--config", str(tmp_path / "run.toml"), "--seed", "5", "--latent-dim", "3"]
    assert cli.main([*arguments, "--out", str(tmp_path / "a")]) == 0
    state = torch.load(tmp_path / "a/checkpoint.pt", weights_only=True)
    expected = {"objective": "iwae", "num_samples": 3, "hidden": 16, "latent_dim": 3, "epochs": 1, "seed": 5}
    assert {name: state["config"][name] for name in expected} == expected
    assert cli.main(["train", "--config", str(tmp_path / "a/config.json"), "--out", str(tmp_path / "b")]) == 0
    assert untimed(rows(tmp_path / "a")) == untimed(rows(tmp_path / "b"))


@pytest.mark.parametrize(
    "name, content, message",
    [
        (
            "run.toml",
            "objectiv = 'iwae'",
            "run.toml has no option objectiv: there are model, data, test_data",
        ),
        ("run.toml", "objective = ", "run.toml is damaged, or no TOML file"),
        ("run.json", "[1, 2]", "run.json is damaged, or no JSON file"),
        ("run.toml", "epochs = 'many'", "epochs must be an int; got str"),
        ("run.toml", "model = 'ppca'", "run.toml is of another model"),
        ("none.toml", None, "No such file"),
    ],
)
def test_bad_files_of_options(tmp_path, capsys, name, content, message):
    if content is not None:
        (tmp_path / name).write_text(content)
    with pytest.raises(SystemExit) as stopped:
        cli.main(["train", "--config", str(tmp_path / name), "--out", str(tmp_path / "out")])
    error = capsys.readouterr().err
    assert stopped.value.code == 2 and message in error and error.count("\n") == 1


# ----------------------------------------------------------------------------------------------------------------------
# Several processes.


@pytest.mark.parametrize(
    "options",
    [
        pytest.param([], marks=pytest.mark.slow),
        ["--objective", "dreg", "--samples", "3", "--batch-size", "101", "--lr-schedule", "cosine"],
    ],
    ids=str,
)
def test_two_processes_train_what_one_does(tmp_path, options):
    """1617 = 16 x 101 + 1: the last batch has one datum, and a process has none of it."""
    arguments = ["train", "--epochs", "2", "--hidden", "16", "--latent-dim", "2", *options]
    assert cli.main([*arguments, "--out", str(tmp_path / "one")]) == 0
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "fastelbo"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, *arguments, "--out", str(tmp_path / "two")], text=True, capture_output=True, env=environment
    )
    assert done.returncode == 0, done.stderr
    assert sum(line.startswith("epoch ") for line in done.stdout.splitlines()) == 2
    for one, two in zip(rows(tmp_path / "one"), rows(tmp_path / "two"), strict=True):
        for name in ("train_bound", "held_out_bound", "held_out_kl", "kl_0", "mu_variance_1"):
            assert two[name] == pytest.approx(one[name], rel=1e-3, abs=1e-4), name
    models = [torch.load(tmp_path / name / "checkpoint.pt", weights_only=True)["model"] for name in ("one", "two")]
    for name, t in models[0].items():
        torch.testing.assert_close(models[1][name], t, rtol=1e-3, atol=1e-4)
    assert {path.name for path in (tmp_path / "two").iterdir()} == {path.name for path in (tmp_path / "one").iterdir()}


def test_kept_samples_take_one_process(monkeypatch):
    several = SimpleNamespace(rank=0, size=2)
    monkeypatch.setattr(train.Processes, "world", lambda: several)
    with pytest.raises(ValueError, match=r"keep takes one process: .*; got 2"):
        Trainer(Config(**SMALL, objective="iwae", num_samples=4, keep=2))


# ----------------------------------------------------------------------------------------------------------------------
# Data that are split already.


@pytest.fixture
def splits(tmp_path) -> Path:
    """Like Keras's mnist.npz, and the same arrays in files of their own."""
    numbers = np.random.default_rng(0)
    arrays = {f"x_{part}": numbers.integers(0, 256, (n, 8, 8), np.uint8) for part, n in (("train", 40), ("test", 12))}
    labels = {f"y_{part}": numbers.integers(0, 10, n) for part, n in (("train", 40), ("test", 12))}
    np.savez(tmp_path / "mnist.npz", **arrays, **labels)
    for name, array in arrays.items():
        np.save(tmp_path / f"{name}.npy", array)
    return tmp_path


def test_a_file_that_is_split_already(splits, capsys):
    with np.load(splits / "mnist.npz") as arrays:
        for found in (
            load(str(splits / "mnist.npz")),
            load(str(splits / "x_train.npy"), test_data=str(splits / "x_test.npy")),
            load(str(splits / "x_train.npy"), test_data=str(splits / "mnist.npz")),
        ):
            assert np.array_equal(found.train[:], arrays["x_train"])
            assert np.array_equal(found.held_out[:], arrays["x_test"])
        found = load(str(splits / "mnist.npz"))
        assert np.array_equal(found.train.labels, arrays["y_train"]) and found.likelihood == "bernoulli"
        assert np.array_equal(found.held_out.labels, arrays["y_test"])
    small = ["--epochs", "1", "--hidden", "16", "--latent-dim", "2"]
    for name, options in (("a", ["mnist.npz"]), ("b", ["x_train.npy", "--test-data", str(splits / "x_test.npy")])):
        data, *others = options
        out = splits / name
        assert cli.main(["train", "--data", str(splits / data), *others, *small, "--out", str(out)]) == 0
        assert "40 training and 12 held-out data of shape (8, 8)" in capsys.readouterr().out
        assert cli.main(["evaluate", str(out), "--samples", "10"]) == 0
        assert ": 12 held-out data" in capsys.readouterr().out
    assert untimed(rows(splits / "a")) == untimed(rows(splits / "b"))
    np.save(splits / "x_test.npy", np.zeros((12, 8, 8), np.uint8))
    for command in (
        ["evaluate", str(splits / "b")],
        ["train", "--resume", "--epochs", "2", "--out", str(splits / "b")],
    ):
        with pytest.raises(SystemExit):
            cli.main(command)
        assert "are not what the run was trained on; changed: content" in capsys.readouterr().err


def test_held_out_data_of_another_kind(splits):
    for other in (np.zeros((5, 8, 9), np.uint8), np.zeros((5, 8, 8), np.float32)):
        np.save(splits / "other.npy", other)
        with pytest.raises(
            ValueError, match=r"held-out data must be like the training data, uint8 of shape \(8, 8\); th"
        ):
            load(str(splits / "x_train.npy"), test_data=str(splits / "other.npy"))
    with pytest.raises(ValueError, match=r"test_data must be an \.npy, \.npz or \.h5ad file; got 'digits'"):
        load("digits", test_data="digits")
