"""The examples run; demo.py does in `make demo`."""

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.mark.slow
def test_ppca_distributed():
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*command, EXAMPLES / "ppca_distributed.py"],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        text=True,
        capture_output=True,
    )
    assert done.returncode == 0, done.stderr
    closed, em = (re.findall(rf"{m}: log p\(x\) (\S+)", done.stdout) for m in ("eig", "em"))
    alone = re.findall(r"one process, eig: (\S+)", done.stdout)
    assert len(closed) == 2 and len(em) == 2 and len(alone) == 1
    assert set(closed) == set(alone) and len(set(em)) == 1
    assert abs(float(em[0]) - float(alone[0])) < 1e-3


def run_in_small(name: str, out: Path, monkeypatch, capsys, **constants: object) -> str:
    """Run an example with constants of its module changed -> what it prints."""
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    example = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, name, example)  # dataclasses look for it there
    spec.loader.exec_module(example)
    for constant, value in constants.items():
        monkeypatch.setattr(example, constant, value)
    monkeypatch.setattr(sys, "argv", [f"{name}.py", str(out)])
    example.main()
    return capsys.readouterr().out


def test_kept_samples(tmp_path, monkeypatch, capsys):
    """In small: what it prints and draws. The full run takes ten minutes."""
    small = {"EPOCHS": 2, "LOOKS": (1, 2), "TRAIN": 500, "HELD_OUT": 20, "LOOK_SAMPLES": 20, "FINAL_SAMPLES": 50}
    text = run_in_small("kept_samples", tmp_path, monkeypatch, capsys, **small)
    found = re.findall(r"^   (\S.*?)  +(-\d+\.\d\d) +([+-]\S+) +(\S+) +(-\S+)$", text, re.M)
    assert [row[0] for row in found[:2]] == ["all 50 samples", "50 samples, keep=4"] and len(found) == 5
    figures = [float(row[1]) for row in found]
    assert all(-600 < figure < -200 for figure in figures)
    for row, figure in zip(found, figures, strict=True):
        assert abs(float(row[2]) - (figure - figures[0])) < 0.02 and abs(figure - figures[0]) < 30
    assert (tmp_path / "kept_samples.png").stat().st_size > 10_000


def test_inference_gap(tmp_path, monkeypatch, capsys):
    """In small: what it prints and draws. The full run takes a minute."""
    small = {"STEPS": 400, "BOUND_SAMPLES": (1, 64, 1024), "PRIOR_SAMPLES": (100,), "PRIOR_DIMENSIONS": (1, 8)}
    text = run_in_small("inference_gap", tmp_path, monkeypatch, capsys, **small)
    below = float(re.search(r"(\S+) below the maximum", text)[1])
    assert 0 < below < 10
    first, _, last = map(float, re.findall(r"K=\d+: ([+-]\S+)", text))
    gap = float(re.search(r"KL\(q \|\| posterior\) = (\S+)", text)[1])
    assert 0.5 * gap < first < 2 * gap and last < 0.2 * gap
    misses = [float(m) for m in re.findall(r"^ +\d+ +(\S+)$", text, re.M)]
    assert len(misses) == 2 and misses[1] > 20 * misses[0]
    assert (tmp_path / "inference_gap.png").stat().st_size > 10_000
