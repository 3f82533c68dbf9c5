"""python -m benchmarks [--quick] [--case TEXT] [--threads N]: prints a table; a full run also writes it to results/."""

import argparse
import csv
import datetime
import math
import os
import re
import subprocess
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path

# Every run compiles anew, so that its compile times are those of a first run. torch reads this when it is imported.
_cache = tempfile.TemporaryDirectory(prefix="fastelbo-bench-")
os.environ["TORCHINDUCTOR_CACHE_DIR"] = _cache.name

import torch  # noqa: E402

import fastelbo  # noqa: E402
from benchmarks.cases import CASES, LATENT  # noqa: E402
from benchmarks.measure import FLOOR, Row, measure  # noqa: E402

HERE = Path(__file__).parent
HEAD = ["contender", "median us", "p20 .. p80", "ratio", "bar", "", "saved KiB", "compile s", "error"]
WIDTHS = [-10, 11, 22, 8, 8, 8, 11, 11, 8]
LEGEND = f"""
Forward and backward, float32. Latent size of the ELBO cases: {LATENT}. The contenders take turns in one process.
- ratio: the contender's median divided by fastelbo's; the bar is what it must reach
- saved: kept for the backward beyond the inputs and the results; of fastelbo's losses, that is the gradient itself
- compile: the first step, with empty caches; the very first one also starts the compiler
- error: the largest one of any value or gradient against float64, relative to the largest entry of its tensor;
  beyond twice eager's plus {FLOOR:.0e} a contender is WRONG and is not timed
"""


def cells(row: Row) -> list[str]:
    def text(form: str, *values: float) -> str:
        return "" if math.isnan(values[0]) else form.format(*values)

    return [
        row.contender,
        text("{:.1f}", row.median_us),
        text("{:.1f} .. {:.1f}", row.p20_us, row.p80_us),
        text("{:.2f}x", row.ratio),
        text("{:.2f}x", row.bar),
        row.verdict,
        text("{:.1f}", row.saved_bytes / 1024),
        text("{:.1f}", row.compile_s),
        text("{:.0e}", row.error),
    ]


def line(texts: list[str]) -> str:
    return "".join(text.ljust(-w) if w < 0 else text.rjust(w) for text, w in zip(texts, WIDTHS, strict=True)).rstrip()


def facts() -> dict[str, str]:
    cpuinfo = Path("/proc/cpuinfo")
    cpu = re.search(r"model name\s*: (.+)", cpuinfo.read_text() if cpuinfo.exists() else "")
    git = subprocess.run(["git", "-C", HERE, "describe", "--always", "--dirty"], capture_output=True, text=True)
    return {
        "date": datetime.date.today().isoformat(),
        "cpu": cpu[1] if cpu else "unknown",
        "threads": str(torch.get_num_threads()),
        "load before": f"{os.getloadavg()[0]:.1f}",
        "isa": str(fastelbo.build_info()["isa"]),
        "torch": torch.__version__,
        "fastelbo": fastelbo.__version__,
        "revision": git.stdout.strip() or "unknown",
    }


def write(about: dict[str, str], rows: list[Row], name: str) -> Path:
    path = HERE / "results" / f"{about['date']}-{re.sub('[^a-z0-9]+', '-', name.lower()).strip('-')}.md"
    path.parent.mkdir(exist_ok=True)
    table = [["case", *HEAD], ["---"] * (len(HEAD) + 1), *([row.case, *cells(row)] for row in rows)]
    lines = [f"# Benchmarks, {about['date']}", "", *(f"- {key}: {value}" for key, value in about.items()), LEGEND]
    path.write_text("\n".join([*lines, *(f"| {' | '.join(texts)} |" for texts in table)]) + "\n")
    with path.with_suffix(".csv").open("w", newline="") as file:
        records = [about | asdict(row) | {"verdict": row.verdict} for row in rows]
        out = csv.DictWriter(file, list(records[0]))
        out.writeheader()
        out.writerows(records)
    return path


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description="fastelbo against plain PyTorch.")
    parser.add_argument("--case", action="append", metavar="TEXT", help="only the cases whose name contains TEXT")
    parser.add_argument("--quick", action="store_true", help="fewer rounds: a first look, not figures to report")
    parser.add_argument("--threads", type=int, metavar="N", help="threads of PyTorch; its own choice without it")
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    cases = [c for c in CASES if not args.case or any(text.lower() in c.name.lower() for text in args.case)]
    if not cases:
        parser.error("no such case; there are: " + ", ".join(c.name for c in CASES))

    about, rows = facts(), []
    print(", ".join(f"{key}: {value}" for key, value in about.items()), LEGEND, line(HEAD), sep="\n")
    if os.getloadavg()[0] > 0.5:
        print("\nOther processes are running: with them these figures mean little.")
    for case in cases:
        print(f"\n{case.name}", flush=True)
        found = measure(case, rounds=9 if args.quick else 60)
        print(*(line(cells(row)) for row in found), sep="\n", flush=True)
        rows += found

    verdicts = [row.verdict for row in rows]
    failed = sum(bool(row.failure) for row in rows)
    print(f"\nbars: {verdicts.count('met')} met, {verdicts.count('MISSED')} missed; contenders that failed: {failed}")
    if args.quick or args.case:
        print("Not a full run: nothing written.")
    else:
        threads = f" {args.threads} threads" if args.threads else ""
        print(f"Written, also as .csv: {write(about, rows, about['cpu'] + threads)}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
