"""Compiles every CUDA kernel with nvcc, warnings being errors, and prints what ptxas says of each: no GPU is needed.

    python scripts/ptxas_table.py [--arch sm_90] [--main]

Registers, shared memory and spills per kernel. Exit status 1 where a kernel does not compile, or where a main kernel
spills: those of float32 that training steps run, the likelihoods in their plain layout.
"""

import argparse
import re
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import torch

ROOT = Path(__file__).parents[1]
ENTRY = re.compile(
    r"Compiling entry function '(\S+)'.*?(\d+) bytes spill stores, (\d+) bytes spill loads"
    r".*?Used (\d+) registers(.*?)\n",
    re.DOTALL,
)
MAIN = re.compile(
    r"(rows_kernel|multi_sample_kernel)<.*true, float>|shared_grads_kernel<.*float>"
    r"|(samples_kernel|samples_backward_kernel|kl_kernel|mixture_\w*kernel)<float[,>]"
)


def lines(path: str) -> list[str]:
    return [line for line in (ROOT / path).read_text().splitlines() if line and not line.startswith("#")]


class Kernel(NamedTuple):
    """What ptxas says of one kernel."""

    name: str  # without its arguments and the namespaces of the package
    registers: int
    shared: int  # bytes
    spills: int  # bytes
    main: bool  # of float32, which training steps run, in the plain layout


def compile_one(source: str, arch: str, folder: str, options: list[str]) -> str:
    includes = ["-I", str(ROOT / "csrc"), "-isystem", str(Path(torch.__file__).parent / "include")]
    command = ["nvcc", *lines("csrc/nvcc_flags.txt"), f"-arch={arch}", "-Xptxas=-v", "-cubin", *includes, *options]
    target = f"{folder}/{Path(source).stem}.cubin"
    done = subprocess.run([*command, str(ROOT / "csrc" / source), "-o", target], capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{source}:\n{done.stdout}{done.stderr}")
    return done.stdout + done.stderr


def compiled(arch: str, folder: str, options: list[str]) -> list[Kernel]:
    """All kernels, by name."""
    if not shutil.which("nvcc"):
        sys.exit("nvcc is not on PATH")
    sources = [source for source in lines("csrc/sources.txt") if source.endswith(".cu")]
    with ThreadPoolExecutor(2) as pool:
        output = "".join(pool.map(lambda source: compile_one(source, arch, folder, options), sources))
    found = ENTRY.findall(output)
    names = subprocess.run(["c++filt"], input="\n".join(f[0] for f in found), capture_output=True, text=True).stdout
    kernels = []
    for name, (_, stores, loads, registers, rest) in zip(names.splitlines(), found, strict=True):
        shared = re.search(r"(\d+) bytes smem", rest)
        short = re.sub(r"\(.*\)$", "", re.sub(r"fastelbo::(cuda::\(anonymous namespace\)::|baseline::)", "", name))
        short = short.removeprefix("void ").replace("(bool)1", "true").replace("(bool)0", "false")
        short = short.replace("(int)", "")
        sizes = int(registers), int(shared[1]) if shared else 0, int(stores) + int(loads)
        kernels.append(Kernel(short, *sizes, bool(MAIN.search(short))))
    return sorted(kernels)


def main() -> int:
    parser = argparse.ArgumentParser(description="registers, shared memory and spills of every CUDA kernel")
    parser.add_argument("--arch", default="sm_90")
    parser.add_argument("--main", action="store_true", help="without most of the other kernels: in half the time")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        kernels = compiled(args.arch, folder, ["-DFASTELBO_MAIN_KERNELS"] if args.main else [])
    print(f"{'registers':>9}{'shared B':>9}{'spill B':>8}  kernel, {args.arch}")
    for k in kernels:
        print(f"{k.registers:9d}{k.shared:9d}{k.spills:8d}  {k.name}{'  (main)' if k.main else ''}")
    mains = sum(k.main for k in kernels)
    bad = sum(k.main and k.spills > 0 for k in kernels)
    print(f"{len(kernels)} kernels compiled for {args.arch}; of {mains} main ones {bad} spill")
    return 1 if bad or not mains else 0


if __name__ == "__main__":
    sys.exit(main())
