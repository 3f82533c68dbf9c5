"""A model on paper of the CUDA kernels: what should a launch take on an A100, an H100, an H200, and what limits it?

    python scripts/cuda_model.py [--csv MEASURED.csv]    needs nvcc and nvdisasm (requirements-dev.txt), and no GPU

Registers and shared memory come from ptxas, instructions from the compiled code, bytes from the arguments of the ops.
The time of a launch is the largest of these, plus START:

    memory   bytes / bandwidth of a copy
    flight   bytes / (bytes that the resident threads have asked for / latency of memory); Little's law
    issue    warp instructions / (4 per clock and multiprocessor)
    mufu     exponentials, logarithms, reciprocals / (16 per clock and multiprocessor)

times the share of the device that the last wave of blocks leaves idle. Instructions are those of the shortest way
through the loop that passes all of its arithmetic: a lower bound, in which branches for other dtypes and strides are
not taken. With --csv, the table says beside each case what `python -m benchmarks --device cuda --out` measured.
"""

import argparse
import csv
import heapq
import json
import math
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).parent))
from ptxas_table import Kernel, compiled

START = 4e-6  # seconds from one launch to the next in a stream, about
THREADS = 256  # kThreads of csrc/cuda/kernels/kernels.h
LATENCY = 650e-9  # seconds of a load from memory under load, about; NVIDIA publishes none


class Card(NamedTuple):
    """NVIDIA's data sheets (multiprocessors, boost clock, bandwidth); limits: CUDA programming guide."""

    multiprocessors: int
    clock: float  # Hz
    bandwidth: float  # bytes per second, of the data sheet
    registers: int = 65_536
    threads: int = 2048
    shared: int = 228 * 1024

    @property
    def copy(self) -> float:
        """Bytes per second that a copy reaches: 92 % of the data sheet's, about."""
        return 0.92 * self.bandwidth


CARDS = {
    "A100 80GB": Card(108, 1.41e9, 2.039e12, shared=164 * 1024),
    "H100 SXM": Card(132, 1.98e9, 3.35e12),
    "H200": Card(132, 1.98e9, 4.8e12),
}


class Case(NamedTuple):
    """One launch of a case of benchmarks/cases.py."""

    name: str
    kernel: str  # as ptxas_table.py prints it
    elements: int
    bytes: float  # per element: read and written
    loads: float  # bytes that a thread asks for before it waits for any
    per_turn: int  # elements of a turn of the kernel's loop
    blocks: int


class Work(NamedTuple):
    """Of a turn of a kernel's loop, per thread."""

    instructions: int
    mufu: int


class Prediction(NamedTuple):
    """Of one launch on one card."""

    seconds: float
    copy: float  # seconds that a copy of as many bytes takes, divided by `seconds`
    limit: str
    resident: int  # blocks of a multiprocessor


def resident_blocks(card: Card, registers: int, shared: int) -> int:
    """Blocks that a multiprocessor holds at a time: registers go to warps in units of 256, shared memory by 1 KB."""
    by_registers = card.registers // (math.ceil(registers * 32 / 256) * 256 * (THREADS // 32))
    by_shared = card.shared // (math.ceil((shared + 1024) / 1024) * 1024)
    return min(by_registers, by_shared, card.threads // THREADS)


def predict(card: Card, case: Case, kernel: Kernel, work: Work) -> Prediction:
    """The time of a launch, and what limits it."""
    resident = resident_blocks(card, kernel.registers, kernel.shared)
    slots = resident * card.multiprocessors
    busy = case.blocks / (slots * math.ceil(case.blocks / slots))  # of the block slots, over all waves
    moved, turns = case.bytes * case.elements, case.elements / case.per_turn
    in_flight = min(slots, case.blocks) * THREADS * case.loads
    limits = {
        "memory": moved / card.copy,
        "flight": moved / (in_flight / LATENCY),
        "issue": turns * work.instructions / 32 / (4 * card.multiprocessors * card.clock) / busy,
        "mufu": turns * work.mufu / (16 * card.multiprocessors * card.clock) / busy,
    }
    limit = max(limits, key=lambda name: limits[name])
    seconds = START + limits[limit]
    if limits[limit] < START:
        limit = "launch"
    return Prediction(seconds, moved / card.copy / seconds, limit, resident)


# ----------------------------------------------------------------------------------------------------------------------
# Instructions.

_LINE = re.compile(r"^\s+/\*[0-9a-f]+\*/\s+(@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)(.*);")


def parse(body: str) -> tuple[list[tuple[str, bool, str]], dict[str, int]]:
    """Disassembly of one kernel -> its instructions (name, whether predicated, label that it jumps to), the labels."""
    code: list[tuple[str, bool, str]] = []
    labels: dict[str, int] = {}
    for line in body.splitlines():
        if label := re.match(r"(\.L_x_\d+):", line):
            labels[label[1]] = len(code)
        elif found := _LINE.match(line):
            target = re.search(r"`\((\.L_x_\d+)\)", found[3]) if found[2].startswith("BRA") else None
            code.append((found[2], bool(found[1]) or "P" in found[3].split("`")[0], target[1] if target else ""))
    return code, labels


def work_of(body: str) -> Work:
    """Of the innermost loop with memory accesses and a third of the arithmetic of the one around it; see above."""
    code, labels = parse(body)
    jumps = {i: labels[target] for i, (_, _, target) in enumerate(code) if target in labels}

    def count(begin: int, end: int, names: tuple[str, ...]) -> int:
        return sum(code[i][0].startswith(names) for i in range(begin, end))

    loops = [(to, at + 1) for at, to in jumps.items() if to <= at]
    arithmetic = {loop: count(*loop, ("FFMA",)) for loop in loops if count(*loop, ("LDG", "STG"))}
    begin, end = max(arithmetic, key=lambda loop: (arithmetic[loop], loop[0] - loop[1]))
    while inner := [
        loop
        for loop in arithmetic
        if begin <= loop[0]
        and loop[1] <= end
        and loop != (begin, end)
        and 3 * arithmetic[loop] >= arithmetic[begin, end]
    ]:
        begin, end = max(inner, key=lambda loop: (arithmetic[loop], loop[0] - loop[1]))
    starts = sorted(
        {begin, end, *(to for to in jumps.values() if begin < to < end)}
        | {i + 1 for i in jumps if begin <= i < end - 1}
    )
    blocks = list(pairwise(starts))
    index = {start: n for n, (start, _) in enumerate(blocks)}

    def after(n: int) -> list[int]:
        last = blocks[n][1] - 1
        name, predicated, _ = code[last]
        there = [jumps[last]] if last in jumps else []
        goes_on = not (name.startswith("BRA") and not predicated) and not name.startswith("EXIT")
        return [index[to] for to in (*there, *([blocks[n][1]] if goes_on else [])) if to in index and index[to] != 0]

    def way(start: int, goal: int) -> list[int] | None:
        """The blocks after `start` up to `goal` on the way of fewest instructions; None if there is none."""
        queue, seen = [(0, start, [])], set()
        while queue:
            cost, n, path = heapq.heappop(queue)
            if n == goal and path:
                return path
            if n in seen:
                continue
            seen.add(n)
            for to in after(n):
                heapq.heappush(queue, (cost + blocks[to][1] - blocks[to][0], to, [*path, to]))
        return None

    goals = [n for n, block in enumerate(blocks) if n and count(*block, ("FFMA",)) >= 4]
    passed = [0]
    for goal in [*goals, len(blocks) - 1]:
        if goal != passed[-1] and (found := way(passed[-1], goal)):
            passed += found
    return Work(sum(blocks[n][1] - blocks[n][0] for n in passed), sum(count(*blocks[n], ("MUFU",)) for n in passed))


def disassemble(folder: str) -> dict[str, str]:
    """Of all .cubin files in the folder: mangled name -> text."""
    installed = Path(sysconfig.get_path("purelib")) / "nvidia/cu13/bin/nvdisasm"
    tool = shutil.which("nvdisasm") or shutil.which(installed)
    if tool is None:
        sys.exit("nvdisasm is not found: pip install nvidia-cuda-nvdisasm")
    found: dict[str, str] = {}
    for cubin in Path(folder).glob("*.cubin"):
        text = subprocess.run([tool, "-c", cubin], capture_output=True, text=True, check=True).stdout
        _, *parts = re.split(r"^\.text\.(\S+):\n", text, flags=re.MULTILINE)
        found |= dict(zip(parts[::2], parts[1::2], strict=True))
    return found


# ----------------------------------------------------------------------------------------------------------------------
# Cases, by the launches of csrc/cuda.


def rows(name: str, kernel: str, B: int, D: int, moved: float, loads: float, K: int = 1) -> Case:
    """rows_kernel: a group of threads per row and segment of 4096; see group_size of device.cuh."""
    segments = math.ceil(D / 4096)
    items, n, g = K * B * segments, min(D, 4096), 4
    while g < THREADS // 2 and g * 32 < n:
        g *= 2
    while g < THREADS // 2 and items * g < 65_536 and g * 8 < n:
        g *= 2
    return Case(name, kernel, K * B * D, moved, loads, 8, min(math.ceil(items / (THREADS // g)), 4096))


BERNOULLI = "rows_kernel<Bernoulli, 1, true, true, float>"
VALUES = "rows_kernel<Bernoulli, 1, false, true, float>"
FUSED = "multi_sample_kernel<Bernoulli, 1, true, true, float>"
CASES = [
    # forward and backward: 4 bytes of logits, 4 of x, 4 of the gradient, which the backward hands on
    rows("ELBO Bernoulli [1024 x 65536]", BERNOULLI, 1024, 65_536, 12, 64),
    rows("ELBO Bernoulli [1024 x 65536], x uint8", BERNOULLI, 1024, 65_536, 9, 40),
    # 16 bits: the forward reads 2 + 2, the backward once more and writes 2
    rows("ELBO Bernoulli [1024 x 65536], bfloat16, forward", VALUES, 1024, 65_536, 4, 32),
    rows("ELBO Bernoulli [1024 x 65536], bfloat16, backward", BERNOULLI, 1024, 65_536, 6, 32),
    rows("ELBO Bernoulli [512 x 784]", BERNOULLI, 512, 784, 12, 64),
    # fused: recon once from memory, its gradient written; else values, weights and gradients in three launches
    Case("IWAE K=50 B=512 D=784, a block per datum", FUSED, 50 * 512 * 784, 8, 64, 8, 512),
    rows("IWAE K=50 B=512 D=784, values", VALUES, 512, 784, 4, 64, K=50),
    rows("IWAE K=50 B=512 D=784, gradients", BERNOULLI, 512, 784, 8, 64, K=50),
    Case("IWAE K=50 B=100 D=784, a block per datum", FUSED, 50 * 100 * 784, 8, 64, 8, 100),
    rows("IWAE K=50 B=100 D=784, values", VALUES, 100, 784, 4, 64, K=50),
    rows("IWAE K=50 B=100 D=784, gradients", BERNOULLI, 100, 784, 8, 64, K=50),
    # 4 bytes of z written; 4 of its gradient read
    Case("rsample K=50 B=4096 M=64, forward", "samples_kernel<float>", 50 * 4096 * 64, 4, 32, 4, 4096),
    Case("rsample K=50 B=4096 M=64, backward", "samples_backward_kernel<float, 32>", 50 * 4096 * 64, 4, 16, 4, 2048),
    Case("rsample K=50 B=100 M=50, backward", "samples_backward_kernel<float, 8>", 50 * 100 * 50, 4, 16, 4, 157),
    # log mean and zero logits read and written, x read; log theta [D] from the cache; then its gradient reads once more
    rows("ELBO zinb [1024 x 20000]", "rows_kernel<Zinb, 3, true, true, float>", 1024, 20_000, 20, 64),
]


def table(kernels: dict[str, Kernel], work: dict[str, Work]) -> list[tuple[Case, dict[str, Prediction]]]:
    """What every case should take on every card."""
    return [
        (case, {name: predict(card, case, kernels[case.kernel], work[case.kernel]) for name, card in CARDS.items()})
        for case in CASES
    ]


def beside(rows: list[dict[str, str]], predicted: dict[str, float]) -> list[str]:
    """Lines "case, measured, predicted" for the rows of a benchmark's CSV file of fastelbo on a GPU.

    predicted: seconds by the beginning of a case's name; launches of one case are added up.
    """
    lines = []
    for row in rows:
        if (row["device"], row["contender"], row["phase"]) != ("cuda", "fastelbo", "both") or not row["median_us"]:
            continue
        if (seconds := predicted.get(row["case"])) is not None:
            measured = float(row["median_us"]) / 1e3
            lines.append(f"{row['case']:44s} measured {measured:8.3f} ms, predicted {1e3 * seconds:8.3f} ms")
    return lines


def main() -> int:
    """Print the table; with --csv, what was measured beside it."""
    parser = argparse.ArgumentParser(description="what the CUDA kernels should take, and what limits them")
    parser.add_argument("--csv", type=Path, help="measurements of python -m benchmarks --device cuda --out CSV")
    parser.add_argument("--card", choices=CARDS, default="H100 SXM", help="for --csv (default: H100 SXM)")
    parser.add_argument("--code", type=Path, help="a file for what the compiled code says; read where it exists")
    args = parser.parse_args()
    if args.code and args.code.exists():
        saved = json.loads(args.code.read_text())
        kernels = {name: Kernel(*row[0]) for name, row in saved.items()}
        work = {name: Work(*row[1]) for name, row in saved.items()}
    else:
        with tempfile.TemporaryDirectory() as folder:
            kernels = {kernel.name: kernel for kernel in compiled("sm_90", folder)}
            code = disassemble(folder)
        work = {name: work_of(code[kernels[name].mangled]) for name in dict.fromkeys(case.kernel for case in CASES)}
        if args.code:
            args.code.write_text(json.dumps({name: (kernels[name], work[name]) for name in work}))
    work[FUSED] = Work(*map(sum, zip(work[VALUES], work[BERNOULLI], strict=True)))  # its two loops, one after the other
    found = table(kernels, work)
    print("instructions per element at least, of sm_90; per card: microseconds, % of a copy, what limits it\n")
    print(f"{'':52}{'regs':>5}{'smem':>6}{'instr':>6}{'mufu':>5}{'blocks':>7}", *(f"{name:>24}" for name in CARDS))
    for case, of_card in found:
        kernel, turn = kernels[case.kernel], work[case.kernel]
        cells = [f"{1e6 * p.seconds:9.1f}{p.copy:5.0%} {p.limit:>6}/{p.resident}" for p in of_card.values()]
        head = f"{kernel.registers:5}{kernel.shared:6}{turn.instructions / case.per_turn:6.0f}"
        print(f"{case.name:52}{head}{turn.mufu / case.per_turn:5.1f}{case.blocks:7}", *(f"{c:>24}" for c in cells))
    if args.csv:
        total: dict[str, float] = {}
        for case, of_card in found:
            name = case.name
            for launch in (", forward", ", backward", ", values", ", gradients"):  # of one case
                name = name.removesuffix(launch)
            total[name] = total.get(name, 0) + of_card[args.card].seconds
        print("", *beside(list(csv.DictReader(args.csv.open())), total), sep="\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
