"""Plants the defects of tests/mutants.py, one at a time, and says which test finds each. In a copy: build/mutants.

    python scripts/mutants.py [TEXT ...]    those whose name or file holds a TEXT; without, all that the table lacks
    python scripts/mutants.py --list

For each: the tests that are likely to find it, then the others, to the first failure or for 6 minutes. All likely tests
have to pass without a defect, and so has any other that finds one. Results are added to build/mutants.csv as they come:
an interrupted run goes on. Of the CPU's kernels one instruction set is compiled. A defect of CUDA is looked for as
tests/cuda_host does, one of an adapter with the packages of .venv-integrations; with the likely tests alone.
"""

import argparse
import csv
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterable
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tests"))
from mutants import MUTANTS, Mutant  # noqa: E402

COPY = ROOT / "build/mutants"
LIMIT = 360  # seconds
PARALLEL = ("-n", "auto", "--maxprocesses", "8")
INTEGRATIONS = ROOT / ".venv-integrations/bin/python"
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


def build(cuda: bool = False) -> None:
    os.environ["FASTELBO_CUDA"] = "0"
    cmake = ["cmake", "-S", ".", "-B", "build/cmake", "-G", "Ninja", f"-DPython_EXECUTABLE={sys.executable}"]
    host = [cmake, ["cmake", "--build", "build/cmake", "--target", "cuda_host"]]
    for command in host if cuda else [[sys.executable, "setup.py", "-q", "build_ext", "--inplace"]]:
        done = subprocess.run(command, cwd=COPY, text=True, capture_output=True)
        if done.returncode:
            sys.exit(done.stdout[-4000:] + done.stderr[-4000:])


def failing(tests: Iterable[str], seconds: float | None, *options: str, python: Path | str = sys.executable) -> str:
    """The first of the tests that fails; "" if all pass, or none has failed in that time."""
    environment = os.environ | {"PYTHONPATH": str(COPY)}  # also of the processes that tests start
    if "cuda_host.plugin" in options:
        environment["FASTELBO_CUDA_HOST"] = str(next((COPY / "build/cmake/cuda_host").glob("*.so")))
        environment["PYTHONPATH"] += f":{COPY}/tests"
    command = [str(python), "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", *options, *tests]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    process = subprocess.Popen(command, cwd=COPY, env=environment, start_new_session=True, **pipes)
    try:
        output, _ = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        return ""
    if process.returncode < 0:
        return f"a crash by signal {-process.returncode}"
    if process.returncode == 0:
        return ""
    found = re.search(r"^(?:FAILED|ERROR) (.+?)(?: - .*)?$", output, re.MULTILINE)
    return found[1] if found else sys.exit(output[-4000:])


def find(mutant: Mutant) -> str:
    """Which test finds the defect, in the words of the table."""
    file, likely = COPY / mutant.file, [f"tests/{name}" for name in mutant.tests]
    compiled, cuda, adapter = (mutant.file.startswith(f) for f in ("csrc/", "csrc/cuda/", "fastelbo/integrations/"))
    before = file.read_text()
    if before.count(mutant.old) != 1:
        sys.exit(f"{mutant.name}: {mutant.file} must hold its text once; it does {before.count(mutant.old)} times")
    if adapter and not INTEGRATIONS.exists():
        return "not run: there is no .venv-integrations"
    file.write_text(before.replace(mutant.old, mutant.new))
    try:
        if compiled:
            build(cuda)
        end = time.monotonic() + LIMIT
        options = ("-p", "cuda_host.plugin", "-p", "no:xdist") if cuda else ()
        found = failing(likely, LIMIT, *options, python=INTEGRATIONS if adapter else sys.executable)
        if found or cuda or adapter:
            return found or "NOT FOUND"
        others = ["tests", *(f"--ignore={name}" for name in ("tests/integrations", *likely))]
        found = failing(others, end - time.monotonic(), *PARALLEL)
    finally:
        file.write_text(before)  # with a new date: what is built next is without it
    if not found:
        return "NOT FOUND in 6 minutes" if time.monotonic() >= end else "NOT FOUND"
    build()
    return f"NOT FOUND: {found} fails without it" if failing([found], LIMIT) else found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("text", nargs="*")
    parser.add_argument("--list", action="store_true", help="print the defects, and plant none")
    parser.add_argument("--csv", type=Path, default=ROOT / "build/mutants.csv")
    args = parser.parse_args()
    chosen = [m for m in MUTANTS if not args.text or any(text in m.name or text in m.file for text in args.text)]
    chosen.sort(key=lambda m: m.file.startswith("csrc/"))  # those of Python first: nothing is compiled for them
    if args.list:
        return print(*(f"{m.name} | {m.file} | {' '.join(m.tests)}" for m in chosen), sep="\n")
    known = {row["name"] for row in csv.DictReader(args.csv.open())} if args.csv.exists() else set()
    copy()
    build()
    with args.csv.open("a", newline="") as table:

        def report(*row: str) -> None:
            csv.writer(table).writerow(row)
            table.flush()
            print(*row, sep=" | ", flush=True)

        start = time.monotonic()
        if "none" not in known:
            report("name", "file", "found by", "seconds")
            likely = {f"tests/{name}" for m in MUTANTS for name in m.tests if not name.startswith("integrations/")}
            if found := failing(sorted(likely), None, *PARALLEL):
                sys.exit(f"{found} fails without a defect")
            report("none", "", "all likely tests pass", f"{time.monotonic() - start:.0f}")
        for mutant in chosen:
            start = time.monotonic()
            if args.text or mutant.name not in known:
                report(mutant.name, mutant.file, find(mutant), f"{time.monotonic() - start:.0f}")


if __name__ == "__main__":
    main()
