"""python -m benchmarks [run | report | compare OLD.csv NEW.csv]; without a word, run. See benchmarks/README.md."""

import argparse
import math
import os
import sys
import tempfile
from pathlib import Path

# torch reads these when it is imported. Every run compiles anew, so that its compile times are those of a first run.
_cache = tempfile.TemporaryDirectory(prefix="fastelbo-bench-")
os.environ["TORCHINDUCTOR_CACHE_DIR"] = _cache.name
os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler announces itself for every contender

import torch  # noqa: E402

from benchmarks import compare, report  # noqa: E402
from benchmarks.cases import CASES  # noqa: E402
from benchmarks.machine import DISTURBED, copy_bandwidth, facts  # noqa: E402
from benchmarks.measure import Row, measure, whole  # noqa: E402
from benchmarks.packages import MISSING  # noqa: E402

ROUNDS, QUICK_ROUNDS = 40, 9


def run(args: argparse.Namespace) -> int:
    def wanted(name: str) -> bool:
        return not args.case or any(text.lower() in name.lower() for text in args.case)

    cases = [c for c in CASES if wanted(c.name) and (c.quick or args.case or not args.quick)]
    if not cases:
        print("no such case; there are: " + ", ".join(c.name for c in CASES), file=sys.stderr)
        return 2
    every = [torch.get_num_threads()] if args.threads is None else [args.threads]
    if args.threads is None and not args.quick and every != [1]:
        every.append(1)

    about, rows = facts(), list[Row]()
    print(", ".join(f"{key}: {value}" for key, value in about.items()), report.LEGEND, sep="\n")
    if os.getloadavg()[0] > 0.5:
        print("Other processes are running: with them these figures mean little.")
    if MISSING:
        print(f"Not installed, so not compared: {', '.join(MISSING)} (benchmarks/requirements.txt)")
    bandwidths = {}
    for threads in every:
        torch.set_num_threads(threads)
        bandwidths[threads] = copy_bandwidth()
        print(f"\nThreads: {threads}. Copy bandwidth: {bandwidths[threads] / 1e9:.1f} GB/s\n{report.line(report.HEAD)}")
        for case in cases:
            if threads != every[0] and not case.core:
                continue
            print(f"\n{case.name}", flush=True)
            found = measure(case, QUICK_ROUNDS if args.quick else ROUNDS, bandwidths[threads], quick=args.quick)
            for row in found:
                row.bar = row.bar if threads == every[0] else math.nan  # bars are for all threads
            print(*(report.line(report.cells(row)) for row in whole(found)), sep="\n", flush=True)
            if (busy := max(row.others_percent for row in found)) > DISTURBED:
                print(f"DISTURBED: other processes took {busy:.0f} % of the processors meanwhile.")
            rows += found

    failed = sum(row.failure.startswith("FAILED") for row in rows)
    verdicts = [row.verdict for row in rows]
    print(f"\nbars: {verdicts.count('met')} met, {verdicts.count('MISSED')} missed; contenders that failed: {failed}")
    if args.out or not (args.quick or args.case or args.threads):
        path = report.write_csv(about, bandwidths, rows, args.out)
        print(f"Written: {path}")
        if not args.out:
            print(f"Written: {report.write_page(path)}")
    else:
        print("Not a full run: nothing written.")
    return 1 if failed else 0


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description="fastelbo against plain PyTorch.")
    parser.add_argument("--case", action="append", metavar="TEXT", help="only the cases whose name contains TEXT")
    parser.add_argument(
        "--quick", action="store_true", help="few cases and rounds: a first look, not figures to report"
    )
    parser.add_argument("--threads", type=int, metavar="N", help="N threads alone; else all of PyTorch's, then 1")
    parser.add_argument("--out", type=Path, metavar="CSV", help="where to write the measurements")
    commands = parser.add_subparsers(dest="command")
    commands.add_parser("run", help="measure (the default)")
    page = commands.add_parser("report", help="write benchmarks/README.md and its plots from a CSV file")
    page.add_argument("csv", type=Path, nargs="?", help="the newest of results/ if left out")
    two = commands.add_parser("compare", help="name what became slower beyond noise; exit status 1 if anything did")
    two.add_argument("old", type=Path)
    two.add_argument("new", type=Path)
    args = parser.parse_args()
    if args.command == "report":
        print(f"Written: {report.write_page(args.csv or report.newest())}")
        return 0
    if args.command == "compare":
        return compare.main(args.old, args.new)
    return run(args)


if __name__ == "__main__":
    sys.exit(main())
