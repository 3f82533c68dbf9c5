"""Training from files that are larger than what is kept of them: memory, and the time of a step against the same
batches in memory.

    python -m benchmarks.reading [--folder DIR] [--scale 1]

Generates the files in a temporary folder: .npy of [500,000 x 3,000] float32, 6 GB, and .h5ad of [1,000,000 x 30,000]
counts, 1 % of them not 0, in CSR as anndata writes it, 2.4 GB; `--scale` makes fewer rows. Each is read in a process of
its own: opened, summarized and split as the command does it, then 200 steps of a VAE on 64 rows each in a random order.
Peak of anonymous memory (RssAnon: mapped pages do not count) beyond torch, networks and optimizer. Steps: the file's
against the batches', alternating by 10; "cold" drops the file from the page cache before.
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path

import h5py
import numpy as np
import torch
from torch import Tensor

from benchmarks.machine import Peak, anonymous, facts
from fastelbo.commands import data
from fastelbo.data import open_dataset
from fastelbo.nets import build_model

STEPS, BATCH, ALTERNATE = 200, 64, 10
FILES = {"npy": (500_000, 3_000, "gaussian"), "h5ad": (1_000_000, 30_000, "nb")}


def generate(path: Path, rows: int, columns: int) -> None:
    numbers = np.random.default_rng(0)
    if path.suffix == ".npy":
        x = np.lib.format.open_memmap(path, "w+", np.float32, (rows, columns))
        for start in range(0, rows, 10_000):
            x[start : start + 10_000] = numbers.standard_normal(x[start : start + 10_000].shape, dtype=np.float32)
        return
    each = columns // 100
    with h5py.File(path, "w") as file:
        file.attrs["encoding-type"], group = "anndata", file.create_group("X")
        group.attrs["encoding-type"], group.attrs["shape"] = "csr_matrix", (rows, columns)
        group["indptr"] = np.arange(0, rows * each + 1, each)
        vectors = [
            group.create_dataset(n, (rows * each,), t, maxshape=(None,)) for n, t in (("data", "f4"), ("indices", "i4"))
        ]
        for start in range(0, rows, 10_000):
            stop = min(start + 10_000, rows)
            shape, span = (stop - start, each), slice(start * each, stop * each)
            vectors[0][span] = 1 + numbers.poisson(1.0, shape).ravel()
            vectors[1][span] = (100 * np.arange(each) + numbers.integers(0, 100, shape)).ravel()


class Steps:
    """Steps of a small VAE, timed with the reading of their batches."""

    def __init__(self, columns: int, likelihood: str) -> None:
        torch.manual_seed(0)
        self.model = build_model((columns,), 8, 256, likelihood)
        self.optimizer = torch.optim.Adam(self.model.parameters(), 1e-3, fused=True)

    def __call__(self, batches: Iterable[Tensor]) -> list[float]:
        """Seconds of each."""
        times, start = [], time.perf_counter()
        for x in batches:
            self.optimizer.zero_grad()
            self.model.loss(x).backward()
            self.optimizer.step()
            times.append(time.perf_counter() - start)
            start += times[-1]
        return times


def measure(path: Path, likelihood: str, cold: bool) -> None:
    file = open_dataset(path)
    steps = Steps(file.shape[1], likelihood)
    steps([torch.ones(BATCH, file.shape[1])] * 2)
    before = anonymous()
    if cold:
        with path.open("rb") as opened:
            os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        train, summary = open_dataset(path), ""
    else:
        start = time.perf_counter()
        with Peak() as peak:
            train = data.load(str(path)).train
        summary = f"one pass {time.perf_counter() - start:.1f} s, peak {peak.highest - before:.0f} MB; "
    order = train.order(torch.Generator().manual_seed(0))[: STEPS * BATCH]
    if cold:
        from_file = steps(train.batches(BATCH, order))
        found = list(train.batches(BATCH, order))
        from_memory = steps(found)
    else:
        with Peak() as peak:
            steps(train.batches(BATCH, order))
        summary += f"steps: peak {peak.highest - before:.0f} MB; "
        found, from_file, from_memory = list(train.batches(BATCH, order)), [], []
        batches: Iterator[Tensor] = iter(train.batches(BATCH, order))
        for start in range(0, STEPS, ALTERNATE):
            from_file += steps(islice(batches, ALTERNATE))
            from_memory += steps(found[start : start + ALTERNATE])
    ratio, total = statistics.median(from_file) / statistics.median(from_memory), sum(from_file) / sum(from_memory)
    print(
        f"{path.suffix} {list(train.shape)} {'cold' if cold else 'warm'}, block {train.block}: {summary}"
        f"step {1e3 * statistics.median(from_memory):.1f} ms in memory, from the file {ratio:.2f}x (all: {total:.2f}x)",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, help="of the files, which stay there; a temporary one by default")
    parser.add_argument("--scale", type=float, default=1.0, help="of the numbers of rows (default: 1)")
    parser.add_argument("--measure", nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        path, likelihood, kind = arguments.measure
        measure(Path(path), likelihood, kind == "cold")
        return
    print(", ".join(f"{name} {value}" for name, value in facts().items() if value), flush=True)
    with tempfile.TemporaryDirectory() as temporary:
        folder = arguments.folder or Path(temporary)
        for kind, (rows, columns, likelihood) in FILES.items():
            path = folder / f"{round(rows * arguments.scale)}x{columns}.{kind}"
            if not path.exists():
                generate(path, round(rows * arguments.scale), columns)
            for state in ("cold", "warm"):
                subprocess.run(
                    [sys.executable, "-m", "benchmarks.reading", "--measure", path, likelihood, state], check=True
                )


if __name__ == "__main__":
    main()
