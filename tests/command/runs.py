"""What runs are compared by: checkpoints bit for bit, and every figure but the times."""

import csv
import io
import json
import math
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import torch

from fastelbo.commands import cli, files

TIMES = {"ms_per_step", "loss_share"}
STATES = ("epoch", "model", "optimizer", "generator")


def train(*arguments: object) -> str:
    return said("train", *arguments)


def said(*arguments: object) -> str:
    """What a command that succeeds prints."""
    with redirect_stdout(io.StringIO()) as out:
        assert cli.main([str(each) for each in arguments]) == 0
    return out.getvalue()


def figures(out: Path) -> list[dict[str, str]]:
    """The rows of metrics.csv as they are written, without the times."""
    with (out / "metrics.csv").open(newline="") as file:
        rows = list(csv.DictReader(file, restkey="beyond", strict=True))
    for row in rows:
        assert all(math.isfinite(float(value)) for value in row.values())  # TypeError: a row that is cut, or too long
    return [{name: value for name, value in row.items() if name not in TIMES} for row in rows]


def _differing(a: Any, b: Any, name: str) -> list[str]:
    """Where two states are not the same, bit for bit."""
    if type(a) is not type(b):
        return [name]
    if isinstance(a, dict):
        if a.keys() != b.keys():
            return [f"keys of {name}"]
        return [found for key in a for found in _differing(a[key], b[key], f"{name}.{key}")]
    if isinstance(a, (list, tuple)):
        pairs = enumerate(zip(a, b, strict=False))
        return [name] * (len(a) != len(b)) + [f for n, (x, y) in pairs for f in _differing(x, y, f"{name}.{n}")]
    if isinstance(a, torch.Tensor):
        same = (a.dtype, a.shape) == (b.dtype, b.shape) and a.numpy().tobytes() == b.numpy().tobytes()
        return [] if same else [name]
    return [] if a == b else [name]


def assert_same_run(ours: Path, theirs: Path) -> None:
    """The same parameters, optimizer, generator and figures, bit for bit."""
    states = [files.read_checkpoint(out) for out in (ours, theirs)]
    assert not [found for key in STATES for found in _differing(states[0][key], states[1][key], key)]
    assert figures(ours) == figures(theirs)


def check_files(out: Path) -> int:
    """Every file of a run that is there can be read, whatever happened -> the epochs of its checkpoint."""
    if (out / "config.json").exists():
        assert json.loads((out / "config.json").read_text())["model"] == "vae"
    rows = figures(out) if (out / "metrics.csv").exists() else []
    assert [row["epoch"] for row in rows] == [str(n + 1) for n in range(len(rows))]
    epoch = int(files.read_checkpoint(out)["epoch"]) if (out / "checkpoint.pt").exists() else 0
    assert len(rows) in (epoch, epoch + 1)  # a row goes before its checkpoint
    return epoch
