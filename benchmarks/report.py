"""Measurements as a table on the terminal, as a CSV file, and as the page benchmarks/README.md with its plots."""

import csv
import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path

from benchmarks.contenders import COMPILE, EAGER, SUBJECT, TUNED
from benchmarks.machine import DISTURBED
from benchmarks.measure import COARSE, FLOOR, Row

HERE = Path(__file__).parent
RESULTS, PAGE, LIMITS = HERE / "results", HERE / "README.md", HERE / "LIMITS.md"
Record = dict[str, str]  # a line of the CSV file
EVEN = 1.05  # a contender that takes less than this times fastelbo's time is not beaten

HEAD = [
    "contender",
    "median us",
    "p20 .. p80",
    "forward",
    "ratio",
    "bar",
    "",
    "saved KiB",
    "peak KiB",
    "compile s",
    "error",
]
WIDTHS = [-18, 11, 22, 9, 8, 8, 8, 11, 11, 11, 8]
LEGEND = f"""
Forward and backward (of a training step: the optimizer too). The contenders take turns in one process.
- forward: its share of the median
- ratio: the contender's median divided by fastelbo's; the bar is what it must reach
- saved: kept for the backward beyond the inputs and the results; of fastelbo's losses, that is the gradient itself
- peak: the most that one step holds at a time beyond what was there before
- compile: the first step, with empty caches; the very first one also starts the compiler
- error: the largest one of any value or gradient against float64, relative to the largest entry of its tensor;
  beyond twice eager's plus {FLOOR:.0e}, or beyond {COARSE:.0e}, a contender is WRONG and is not timed
  (of half types: plus one unit, or beyond eight)
"""


def _text(form: str, *values: float) -> str:
    return "" if math.isnan(values[0]) else form.format(*values)


def cells(row: Row) -> list[str]:
    return [
        row.contender,
        _text("{:.1f}", row.median_us),
        _text("{:.1f} .. {:.1f}", row.p20_us, row.p80_us),
        _text("{:.0f} %", row.forward_percent),
        _text("{:.2f}x", row.ratio),
        _text("{:.2f}x", row.bar),
        row.verdict,
        _text("{:.1f}", row.saved_bytes / 1024),
        _text("{:.1f}", row.peak_bytes / 1024),
        _text("{:.1f}", row.compile_s),
        _text("{:.0e}", row.error),
    ]


def line(texts: list[str]) -> str:
    return "".join(text.ljust(-w) if w < 0 else text.rjust(w) for text, w in zip(texts, WIDTHS, strict=True)).rstrip()


def write_csv(about: dict[str, str], bandwidths: dict[int, float], rows: list[Row], path: Path | None = None) -> Path:
    if path is None:
        RESULTS.mkdir(exist_ok=True)
        cpu = re.sub("[^a-z0-9]+", "-", f"{about['cpu']} {about['isa']}".lower()).strip("-")
        path = RESULTS / f"{about['date']}-{cpu}.csv"
    records = [
        about | {"copy_gb_s": f"{bandwidths[row.threads] / 1e9:.2f}"} | asdict(row) | {"verdict": row.verdict}
        for row in rows
    ]
    with path.open("w", newline="") as file:
        out = csv.DictWriter(file, list(records[0]))
        out.writeheader()
        out.writerows(records)
    return path


def read_csv(path: Path) -> list[Record]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def newest() -> Path:
    found = list(RESULTS.glob("*.csv"))
    if not found:
        raise FileNotFoundError(f"no CSV file in {RESULTS}: run `make bench` first")
    return max(found, key=lambda path: (path.name[:10], path.stat().st_mtime))  # by date; of one day, the last written


class Page:
    """The records of one run, by case and contender."""

    def __init__(self, records: Sequence[Record]) -> None:
        self.records = records
        self.threads = records[0]["threads"]  # all of them; a second pass has one
        self.whole = [r for r in records if r["phase"] == "both"] + [
            r for r in records if r["phase"] == "forward" and not self.find(r["case"], r["contender"], r["threads"])
        ]

    def find(self, case: str, contender: str, threads: str | None = None, phase: str = "both") -> Record | None:
        key = (case, contender, threads or self.threads, phase)
        matches = (r for r in self.records if (r["case"], r["contender"], r["threads"], r["phase"]) == key)
        return next(matches, None)

    def of(self, case: str, contender: str, threads: str | None = None) -> Record | None:
        """The whole step; of a case without gradients, its forward."""
        both = self.find(case, contender, threads)
        return both or self.find(case, contender, threads, "forward")

    def cases(self, *groups: str, threads: str | None = None) -> list[str]:
        threads = threads or self.threads
        return list(dict.fromkeys(r["case"] for r in self.records if r["group"] in groups and r["threads"] == threads))

    def contenders(self, cases: Iterable[str]) -> list[str]:
        wanted = set(cases)
        return list(dict.fromkeys(r["contender"] for r in self.records if r["case"] in wanted))


def _number(record: Record | None, key: str, form: str) -> str:
    value = math.nan if record is None else float(record[key])
    return "" if math.isnan(value) else form.format(value)


def _ratio(record: Record | None) -> str:
    if record is None:
        return ""
    if record["failure"]:
        return record["failure"].split(":")[0]
    return _number(record, "ratio", "{:.2f}x")


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    return [f"| {' | '.join(texts)} |" for texts in [head, ["---"] * len(head), *rows]]


def _losses_table(page: Page, threads: str, *groups: str) -> list[str]:
    cases = page.cases(*groups, threads=threads)
    named = (EAGER, COMPILE, TUNED)
    others = [name for name in page.contenders(cases) if name not in (*named, SUBJECT)]
    rows = []
    for case in cases:
        ours = page.of(case, SUBJECT, threads)
        rest = ", ".join(f"{name} {_ratio(r)}" for name in others if (r := page.of(case, name, threads)))
        rows.append(
            [
                case,
                *(_ratio(page.of(case, name, threads)) for name in named),
                rest,
                _number(ours, "median_us", "{:.0f}"),
                _number(ours, "ns_per_element", "{:.2f}"),
                _number(ours, "bandwidth_percent", "{:.0f} %"),
                f"{float(ours['saved_bytes']) / 1024:.0f} / {float(ours['peak_bytes']) / 1024:.0f}" if ours else "",
            ]
        )
    head = ["case", *named, "others", "fastelbo us", "ns per element", "of copy bandwidth", "saved / peak KiB"]
    return _table(head, rows)


def _steps_table(page: Page) -> list[str]:
    def share(case: str, contender: str) -> str:
        step, loss = page.of(case, contender), page.of(f"{case}: loss alone", contender)
        return "" if not step or not loss else f"{float(loss['median_us']) / float(step['median_us']):.0%}"

    cases = [c for c in page.cases("steps") if not c.endswith("loss alone")]
    rows = []
    for case in cases:
        others = ", ".join(f"{n} {_ratio(r)}" for n in ("pyro", "fastelbo compiled") if (r := page.of(case, n)))
        times = (_number(page.of(case, n), "median_us", "{:.0f}") for n in (EAGER, SUBJECT))
        ratios = (_ratio(page.of(case, n)) for n in (EAGER, COMPILE, TUNED))
        rows.append([case, *times, *ratios, others, share(case, EAGER), share(case, SUBJECT)])
    head = ["case", "eager us", "fastelbo us", EAGER, COMPILE, TUNED, "others", "loss in eager", "loss in fastelbo"]
    return _table(head, rows)


def _phases_table(page: Page) -> list[str]:
    rows = []
    for case in page.cases("losses"):
        for phase in ("forward", "backward"):
            ours = page.find(case, SUBJECT, phase=phase)
            if ours is None:
                continue
            ratios = [_ratio(page.find(case, name, phase=phase)) for name in (EAGER, COMPILE)]
            rows.append([case, phase, _number(ours, "median_us", "{:.0f}"), *ratios])
    return _table(["case", "phase", "fastelbo us", EAGER, COMPILE], rows)


def _named(record: Record) -> str:
    threads = "one thread" if record["threads"] == "1" else f"{record['threads']} threads"
    return f"{record['case']}, {record['contender']}, {threads}"


def _list(lines: Iterable[str]) -> list[str]:
    found = [f"- {text}" for text in lines]
    return found or ["- none"]


def render(records: Sequence[Record], plots: Sequence[str]) -> str:
    page, about = Page(records), records[0]
    bars = [r for r in page.whole if r["verdict"] in ("met", "MISSED") and r["threads"] == page.threads]
    missed = [r for r in bars if r["verdict"] == "MISSED"]
    slower = [r for r in page.whole if not math.isnan(float(r["ratio"])) and float(r["ratio"]) < EVEN]
    wrong = [r for r in page.records if r["failure"]]
    keys = ("date", "revision", "fastelbo", "torch", "cpu", "cores", "isa")
    machine = ", ".join(f"{key} {about[key]}" for key in keys)
    bandwidths = {r["threads"]: r["copy_gb_s"] for r in records}
    parts = [
        "# Benchmarks",
        "",
        "Written by `make bench`; every figure is in [results/](results/). Do not edit.",
        "",
        f"Machine: {machine}. Load before: {about['load']}. Copy bandwidth: "
        + ", ".join(f"{gb} GB/s with {threads} threads" for threads, gb in bandwidths.items())
        + ".",
        "",
        "## Method",
        "",
        "- `make bench` measures everything on your machine, `make bench-quick` a part of it in under 3 minutes,",
        "  `python -m benchmarks --case TEXT` some cases. `python -m benchmarks compare OLD.csv NEW.csv` names what",
        "  became slower beyond noise.",
        "- All contenders work on the same tensors in one process and take turns in random order; a sample repeats the",
        "  step for 2 ms or more; medians, with the 20th and 80th percentile in the CSV file.",
        "- First every contender's values and gradients are compared with float64. One that is off by more than twice",
        f"  eager's error plus {FLOOR:.0e} of the largest entry is WRONG: reported, not timed.",
        "- eager is the shortest PyTorch that a user would write (`plain.py`), faster than `fastelbo.reference`;",
        "  compile and max-autotune (without CUDA graphs) are the same code under `torch.compile(dynamic=False)`,",
        "  without their compile time. Other packages are called as their users call them (`packages.py`).",
        "- A figure such as 3.00x is the contender's time divided by fastelbo's, forward and backward together.",
        "- The share of the copy bandwidth counts every input once, every output and gradient once, whatever is moved:",
        "  a case that fits the caches can pass 100 %.",
        "- saved is what the backward keeps beyond inputs and results (of fastelbo's losses, the gradient itself);",
        "  peak is the most that a step holds at a time beyond what was there, gradients included.",
        "",
        f"## Losses, {page.threads} threads",
        "",
        *_losses_table(page, page.threads, "losses", "calls"),
        "",
        "How forward and backward share it: fastelbo's losses compute the gradient in the forward.",
        "",
        *_phases_table(page),
        "",
        "## Whole training steps",
        "",
        "Encoder, sampling, decoder, loss, backward and Adam: this is what a user gains. The loss's share is sampling",
        "and loss alone, on tensors of the same shapes.",
        "",
        *_steps_table(page),
        "",
        "## K-sample objectives and models",
        "",
        *_losses_table(page, page.threads, "objectives", "models"),
        "",
    ]
    if page.cases("losses", threads="1") and page.threads != "1":
        parts += ["## Losses, one thread", "", *_losses_table(page, "1", "losses", "calls"), ""]
    parts += [
        "## Bars",
        "",
        f"{len(bars) - len(missed)} of {len(bars)} are met. Missed:",
        "",
        *_list(f"{_named(r)}: {float(r['ratio']):.2f}x of {float(r['bar']):.2f}x" for r in missed),
        "",
        "## Where fastelbo is not faster",
        "",
        f"Every contender that needs less than {EVEN} times fastelbo's time:",
        "",
        *_list(f"{_named(r)}: {float(r['ratio']):.2f}x" for r in slower),
        "",
        "## Who is wrong, failed or was not installed",
        "",
        "The error is relative to the largest entry of the tensor; inf: a value or gradient is missing.",
        "",
        *_list(
            f"{_named(r)}: " + (f"error {float(r['error']):.0e}" if r["failure"] == "WRONG" else r["failure"])
            for r in wrong
        ),
        "",
    ]
    disturbed = {r["case"]: float(r["others_percent"]) for r in page.whole if float(r["others_percent"]) > DISTURBED}
    if disturbed:
        parts += [
            "## Disturbed",
            "",
            f"Other processes took more than {DISTURBED} % of the processors meanwhile: these figures mean little.",
            "",
            *_list(f"{case}: {busy:.0f} %" for case, busy in disturbed.items()),
            "",
        ]
    if LIMITS.exists():
        parts += [LIMITS.read_text().strip(), ""]
    parts += ["## Plots", "", *(f"![{Path(name).stem}]({name})" for name in plots), ""]
    return "\n".join(parts)


def write_page(path: Path) -> Path:
    from benchmarks.plots import draw  # matplotlib is slow to import, and no run needs it before its end

    records = read_csv(path)
    plots = draw(Page(records), HERE / "plots")
    PAGE.write_text(render(records, [str(p.relative_to(HERE)) for p in plots]))
    return PAGE
