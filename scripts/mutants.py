"""Plants the defects of tests/defects.py, one at a time, and says which test finds each. In a copy: build/mutants.

    python scripts/mutants.py [TEXT ...]    those whose name or file holds a TEXT; without, all that the table lacks
    python scripts/mutants.py --list

For each: the tests that are likely to find it, then the others, to the first failure or for 6 minutes. In the end all
tests that found one have to pass without a defect. Results are added to build/mutants.csv as they come: an interrupted
run goes on. Of the CPU's kernels one instruction set is compiled. A defect of CUDA is looked for as tests/cuda_host
does, one of an adapter with the packages of .venv-integrations; with the likely tests alone.
"""

import argparse
import csv
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tests"))
from defects import DEFECTS, Defect  # noqa: E402

COPY = ROOT / "build/mutants"
LIMIT = 360  # seconds
INTEGRATIONS = ROOT / ".venv-integrations/bin/python"
CUDA, ADAPTER = "csrc/cuda/", "fastelbo/integrations/"  # whose tests run otherwise
NOT_RUN = ("tests/integrations", "tests/packaging/test_defects.py")  # among the others
PARALLEL = ("-n", "auto", "--maxprocesses", "8")
ONE_ISA = """#include "cpu/kernels/kernels.h"
namespace fastelbo::baseline {{ const KernelTable& table(); }}
namespace fastelbo::{0} {{ const KernelTable& table(); }}
const fastelbo::KernelTable& fastelbo::{0}::table() {{ return baseline::table(); }}
"""


def copy() -> None:
    """The checkout as it is. Files that are the same keep their dates, and with them what was built."""
    listed = subprocess.run(["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, text=True, capture_output=True)
    names = {name for name in listed.stdout.splitlines() if (ROOT / name).is_file()}
    for folder in ("csrc", "fastelbo", "tests"):
        for old in (COPY / folder).rglob("*.*"):
            if old.is_file() and old.suffix != ".so" and str(old.relative_to(COPY)) not in names:
                old.unlink()
    for name in names:
        target = COPY / name
        isa = re.fullmatch(r"isa_(avx\w+)\.cpp", target.name)
        content = ONE_ISA.format(isa[1]).encode() if isa else (ROOT / name).read_bytes()
        if not target.is_file() or target.read_bytes() != content:
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(content)


def build(file: str = "csrc/") -> None:
    """What a change of the file needs."""
    os.environ["FASTELBO_CUDA"] = "0"
    cmake = ["cmake", "-S", ".", "-B", "build/cmake", "-G", "Ninja", f"-DPython_EXECUTABLE={sys.executable}"]
    host = [cmake, ["cmake", "--build", "build/cmake", "--target", "cuda_host"]]
    commands = host if file.startswith(CUDA) else [[sys.executable, "setup.py", "-q", "build_ext", "--inplace"]]
    for command in commands if file.startswith("csrc/") else ():
        done = subprocess.run(command, cwd=COPY, text=True, capture_output=True)
        if done.returncode:
            sys.exit(done.stdout[-4000:] + done.stderr[-4000:])


def failing(file: str, tests: Sequence[str], seconds: float | None, *options: str) -> str:
    """The first of the tests of that source that fails; "" if all pass, or none has failed in that time."""
    environment = os.environ | {"PYTHONPATH": f"{COPY}:{COPY}/tests"}  # also of the processes that tests start
    if file.startswith(CUDA):
        environment["FASTELBO_CUDA_HOST"] = str(next((COPY / "build/cmake/cuda_host").glob("*.so")))
        options = ("-p", "cuda_host.plugin", "-p", "no:xdist")
    python = INTEGRATIONS if file.startswith(ADAPTER) else sys.executable
    command = [str(python), "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", *options, *tests]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    process = subprocess.Popen(command, cwd=COPY, env=environment, start_new_session=True, **pipes)
    try:
        output, _ = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        return ""
    if process.returncode <= 0:
        return "a crash" if process.returncode else ""
    found = re.search(r"^(?:FAILED|ERROR) (.+?)(?: - .*)?$", output, re.MULTILINE)
    return found[1] if found else sys.exit(output[-4000:])


def find(defect: Defect) -> str:
    """Which test finds the defect, in the words of the table."""
    file, likely = COPY / defect.file, [f"tests/{name}" for name in defect.tests]
    before = file.read_text()
    if before.count(defect.old) != 1:
        sys.exit(f"{defect.name}: {defect.file} must hold its text once; it does {before.count(defect.old)} times")
    if defect.file.startswith(ADAPTER) and not INTEGRATIONS.exists():
        return "not run: there is no .venv-integrations"
    file.write_text(before.replace(defect.old, defect.new))
    try:
        build(defect.file)
        end = time.monotonic() + LIMIT
        found = failing(defect.file, likely, LIMIT)
        if not found and not defect.file.startswith((CUDA, ADAPTER)):
            others = ["tests", *(f"--ignore={name}" for name in (*NOT_RUN, *likely))]
            found = failing(defect.file, others, end - time.monotonic(), *PARALLEL)
        return found or f"NOT FOUND{' in 6 minutes' if time.monotonic() >= end else ''}"
    finally:
        file.write_text(before)  # with a new date: what is built next is without it


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("text", nargs="*")
    parser.add_argument("--list", action="store_true", help="print the defects, and plant none")
    parser.add_argument("--csv", type=Path, default=ROOT / "build/mutants.csv")
    args = parser.parse_args()
    signal.signal(signal.SIGINT, signal.default_int_handler)  # else tests of Ctrl-C fail in a shell's background
    chosen = [m for m in DEFECTS if not args.text or any(text in m.name or text in m.file for text in args.text)]
    chosen.sort(key=lambda m: m.file.startswith("csrc/"))  # those of Python first: nothing is compiled for them
    if args.list:
        return print(*(f"{m.name} | {m.file} | {' '.join(m.tests)}" for m in chosen), sep="\n")
    known = list(csv.reader(args.csv.open())) if args.csv.exists() else []
    copy()
    build()
    with args.csv.open("a", newline="") as table:
        for defect in chosen:
            if args.text or defect.name not in (row[0] for row in known):
                start = time.monotonic()
                row = [defect.name, defect.file, find(defect), f"{time.monotonic() - start:.0f}"]
                csv.writer(table).writerow(row)
                table.flush()
                print(*row, sep=" | ", flush=True)
                known.append(row)
    build()
    for kind in (CUDA, ADAPTER, ""):
        mine = [row for row in known if row[2].startswith("tests/") and row[1].startswith(kind)]
        known = [row for row in known if row not in mine]
        build(kind)
        if mine and (wrong := failing(kind, sorted({row[2] for row in mine}), None)):
            sys.exit(f"{wrong} fails without a defect")
    print("Each of these tests passes without a defect.")


if __name__ == "__main__":
    main()
