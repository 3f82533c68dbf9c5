"""python -m benchmarks [run | report | compare OLD.csv NEW.csv]; without a word, run. See benchmarks/README.md."""

import argparse
import os
import sys
import tempfile
from pathlib import Path

# torch reads these when it is imported. Every run compiles anew, so that its compile times are those of a first run.
_cache = tempfile.TemporaryDirectory(prefix="fastelbo-bench-")
os.environ["TORCHINDUCTOR_CACHE_DIR"] = _cache.name
os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler announces itself for every contender

import torch  # noqa: E402

import fastelbo  # noqa: E402
from benchmarks import compare, report  # noqa: E402
from benchmarks.cases import CASES_OF, Case  # noqa: E402
from benchmarks.machine import DISTURBED, facts  # noqa: E402
from benchmarks.measure import measure, measure_in_new_process  # noqa: E402
from benchmarks.packages import MISSING  # noqa: E402
from benchmarks.records import Place, Row, newest, whole, write_csv  # noqa: E402
from benchmarks.targets import Verdict, verdicts  # noqa: E402
from benchmarks.timers import TIMERS  # noqa: E402

ROUNDS, QUICK_ROUNDS = 40, 9


def _has_gpu() -> bool:
    return torch.cuda.is_available() and bool(fastelbo.build_info()["cuda"])


def _places(args: argparse.Namespace) -> list[Place]:
    """Where to measure: the CPU with all threads, then with one, then the GPU."""
    threads: int = args.threads or torch.get_num_threads()
    found = [("cpu", threads)]
    if not (args.threads or args.quick or threads == 1):
        found.append(("cpu", 1))
    if _has_gpu():
        found.append(("cuda", threads))
    return [place for place in found if args.device in (None, place[0])]


def run(args: argparse.Namespace) -> int:
    def wanted(case: Case) -> bool:
        if args.case:
            return any(text.lower() in case.name.lower() for text in args.case)
        return case.quick or not args.quick

    places = _places(args)
    if not places:
        print("there is no GPU here, or fastelbo is built without CUDA: nothing measured", file=sys.stderr)
        return 2
    todo = [(place, [c for c in CASES_OF[place[0]] if wanted(c)]) for place in places]
    if not any(cases for _, cases in todo):
        names = dict.fromkeys(c.name for device, _ in places for c in CASES_OF[device])
        print("no such case; there are: " + ", ".join(names), file=sys.stderr)
        return 2

    about, rows, checked = facts(), list[Row](), list[Verdict]()
    print(", ".join(f"{key}: {value}" for key, value in about.items()), report.LEGEND, sep="\n")
    if os.getloadavg()[0] > 0.5:
        print("Other processes are running: do not rely on these figures.")
    if MISSING:
        print(f"Not installed, so not compared: {', '.join(MISSING)} (benchmarks/requirements.txt)")
    for (device, threads), cases in todo:
        again = device == "cpu" and threads != places[0][1]  # the pass with one thread: few cases, and no targets
        torch.set_num_threads(threads)
        timer = TIMERS[device]()
        where = f"{device}, {threads} threads. Copy bandwidth: {timer.bandwidth / 1e9:.1f} GB/s"
        print(f"\n{where}\n{report.line(report.COLUMNS)}")
        for case in cases:
            if again and not case.core:
                continue
            print(f"\n{case.name}", flush=True)
            here = measure if case.environment is None else measure_in_new_process
            found = here(case, QUICK_ROUNDS if args.quick else ROUNDS, timer, quick=args.quick)
            print(*(report.line(report.cells(row)) for row in whole(found)), sep="\n", flush=True)
            if not again:
                judged = verdicts(case, found)
                print(*judged, sep="\n", end="\n" if judged else "", flush=True)
                checked += judged
            if (busy := max(row.others_percent for row in found)) > DISTURBED:
                print(f"DISTURBED: other processes took {busy:.0f} % of the processors meanwhile.")
            rows += found

    failed = sum(row.failure.startswith("FAILED") for row in rows)
    met = sum(verdict.met for verdict in checked)
    print(f"\ntargets: {met} met, {len(checked) - met} missed; contenders that failed: {failed}")
    if args.out or not (args.quick or args.case or args.threads or args.device):
        path = write_csv(about, rows, args.out)
        print(f"Written: {path}")
        if not args.out:
            print(f"Written: {report.write_page(path)}")
    else:
        print("Not a full run: nothing written.")
    return 1 if failed else 0


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description="fastelbo compared with plain PyTorch.")
    parser.add_argument("--case", action="append", metavar="TEXT", help="only the cases whose name contains TEXT")
    parser.add_argument(
        "--quick", action="store_true", help="few cases and rounds: a first look, not figures to report"
    )
    parser.add_argument("--threads", type=int, metavar="N", help="N threads alone; else all of PyTorch's, then 1")
    parser.add_argument("--device", choices=list(TIMERS), help="this device alone; else the CPU, then a GPU")
    parser.add_argument("--out", type=Path, metavar="CSV", help="where to write the measurements")
    commands = parser.add_subparsers(dest="command")
    commands.add_parser("run", help="measure (the default)")
    page = commands.add_parser("report", help="write benchmarks/README.md and its plots from a CSV file")
    page.add_argument("csv", type=Path, nargs="?", help="the one in results/ with the latest date if left out")
    two = commands.add_parser("compare", help="name what became slower beyond noise; exit status 1 if anything did")
    two.add_argument("old", type=Path)
    two.add_argument("new", type=Path)
    args = parser.parse_args()
    if args.command == "report":
        print(f"Written: {report.write_page(args.csv or newest())}")
        return 0
    if args.command == "compare":
        return compare.main(args.old, args.new)
    return run(args)


if __name__ == "__main__":
    sys.exit(main())
