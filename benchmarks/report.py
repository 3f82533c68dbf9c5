"""Measurements as a table on the terminal, and as the page benchmarks/README.md with its plots."""

import math
from collections.abc import Iterable, Sequence
from pathlib import Path

from benchmarks.cases import CASES, MEMORY_KEPT
from benchmarks.contenders import COMPILE, EAGER, SUBJECT, TUNED
from benchmarks.machine import DISTURBED
from benchmarks.measure import COARSE, FLOOR
from benchmarks.records import WRONG, Place, Results, Row, read_csv

HERE = Path(__file__).parent
PAGE = HERE / "README.md"
EVEN = 1.05  # fastelbo is called faster than a contender that takes at least this times its time

COLUMNS = {  # of the terminal: widths, negative if aligned to the left
    "contender": -18,
    "median us": 11,
    "p20 .. p80": 22,
    "forward": 9,
    "ratio": 8,
    "": 8,
    "of copy": 9,
    "saved KiB": 11,
    "peak KiB": 11,
    "faults": 8,
    "kernels": 9,
    "compile s": 11,
    "error": 8,
}
LEGEND = f"""
Forward and backward (of a training step: the optimizer too). The contenders take turns in one process.
- forward: its share of the median
- ratio: the contender's median divided by fastelbo's
- of copy: the share of the copy bandwidth, by the bytes that no implementation can avoid
- saved: kept for the backward beyond the inputs and the results; of fastelbo's losses, that is the gradient itself
- peak: the most that one step holds at a time beyond what was there before
- faults: page faults a step; kernels: what a step launches on a GPU
- compile: the first step, with empty caches; the very first one also starts the compiler
- error: the largest one of any value or gradient against float64, relative to the largest entry of its tensor;
  beyond twice eager's plus {FLOOR:.0e}, or beyond {COARSE:.0e}, a contender is {WRONG} and is not timed
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
        row.failure,
        _text("{:.0f} %", row.bandwidth_percent),
        _text("{:.1f}", row.saved_bytes / 1024),
        _text("{:.1f}", row.peak_bytes / 1024),
        _text("{:.0f}", row.page_faults),
        _text("{:.0f}", row.kernels),
        _text("{:.1f}", row.compile_s),
        _text("{:.0e}", row.error),
    ]


def line(texts: Iterable[str]) -> str:
    pairs = zip(texts, COLUMNS.values(), strict=True)
    return "".join(text.ljust(-w) if w < 0 else text.rjust(w) for text, w in pairs).rstrip()


def _ratio(row: Row | None) -> str:
    if row is None:
        return ""
    return row.failure.split(":")[0] or _text("{:.2f}x", row.ratio)


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    return [f"| {' | '.join(texts)} |" for texts in [head, ["---"] * len(head), *rows]]


def _list(lines: Iterable[str]) -> list[str]:
    found = [f"- {text}" for text in lines]
    return found or ["- none"]


def _section(title: str, *lines: str) -> list[str]:
    return [f"## {title}", "", *lines, ""]


def _where(place: Place) -> str:
    device, threads = place
    if device != "cpu":
        return "GPU"
    return "one thread" if threads == 1 else f"{threads} threads"


def _named(row: Row) -> str:
    return f"{row.case}, {row.contender}, {_where(row.place)}"


def _times_table(results: Results, place: Place, *groups: str) -> list[str]:
    """Ratios of all contenders; of fastelbo the time, what it moves and what it holds."""
    cases = results.cases(*groups, place=place)
    named = (EAGER, COMPILE, TUNED)
    others = [name for name in results.contenders(cases) if name not in (*named, SUBJECT)]
    rows = []
    for case in cases:
        rest = ", ".join(f"{name} {_ratio(r)}" for name in others if (r := results.of(case, name, place)))
        row = [case, *(_ratio(results.of(case, name, place)) for name in named), rest]
        if ours := results.of(case, SUBJECT, place):
            row += [_text("{:.0f}", ours.median_us), _text("{:.2f}", ours.ns_per_element)]
            row += [_text("{:.0f} %", ours.bandwidth_percent)]
            row += [_text("{:.0f} / {:.0f}", ours.saved_bytes / 1024, ours.peak_bytes / 1024)]
            row += [_text("{:.0f}", ours.kernels)] if place[0] != "cpu" else []
        rows.append(row)
    head = ["case", *named, "others", "fastelbo us", "ns per element", "of copy bandwidth", "saved / peak KiB"]
    return _table(head + (["kernels"] if place[0] != "cpu" else []), rows)


def _steps_table(results: Results) -> list[str]:
    def share(case: str, contender: str) -> str:
        step, loss = results.of(case, contender), results.of(f"{case}: loss alone", contender)
        return "" if not step or not loss else f"{loss.median_us / step.median_us:.0%}"

    rows = []
    for case in results.cases("steps"):
        if case.endswith("loss alone"):
            continue
        others = ", ".join(f"{n} {_ratio(r)}" for n in ("pyro", "fastelbo compiled") if (r := results.of(case, n)))
        times = (_text("{:.0f}", r.median_us) if (r := results.of(case, n)) else "" for n in (EAGER, SUBJECT))
        ratios = (_ratio(results.of(case, n)) for n in (EAGER, COMPILE, TUNED))
        rows.append([case, *times, *ratios, others, share(case, EAGER), share(case, SUBJECT)])
    head = ["case", "eager us", "fastelbo us", EAGER, COMPILE, TUNED, "others", "loss in eager", "loss in fastelbo"]
    return _table(head, rows)


def _phases_table(results: Results) -> list[str]:
    rows = []
    for case in results.cases("losses"):
        for phase in ("forward", "backward"):
            if ours := results.phase(case, SUBJECT, phase):
                ratios = [_ratio(results.phase(case, name, phase)) for name in (EAGER, COMPILE)]
                rows.append([case, phase, _text("{:.0f}", ours.median_us), *ratios])
    return _table(["case", "phase", "fastelbo us", EAGER, COMPILE], rows)


def _variables(environment: dict[str, str]) -> str:
    return " ".join(f"{name}={value}" for name, value in environment.items())


ALLOCATOR = """\
PyTorch takes the memory of a CPU tensor from glibc's malloc. When a tensor is freed, malloc either keeps its memory or
returns it to the system. Returned memory costs time: the next tensor of that size gets new pages, and the first write
to each page is a page fault. malloc decides by what the process has allocated before, so the same step can be fast in
one program and slow in another. The table has forward and backward of the Bernoulli ELBO [1024 x 3072], whose gradient
takes 12 MB. Each line was measured in a process of its own. Page faults are those of one step."""

KEEP_MEMORY = f"""\
These variables make malloc keep the memory. They serve the whole training step, not only the loss:

```sh
{_variables(MEMORY_KEPT)} python train.py
```

glibc reads them when the process starts. From then on the process holds the memory of its largest step until it ends.
`MALLOC_TRIM_THRESHOLD_` alone makes it worse: it also switches off malloc's own adaptation, so that every tensor of
128 KiB or more is returned when it is freed. [docs/performance.md](../docs/performance.md) says why fastelbo has no
cache of gradients of its own."""

METHOD = f"""\
- `make bench` measures everything on your machine, in 6 to 10 minutes on two quiet cores; `make bench-quick` measures a
  part of it in about 40 seconds, `python -m benchmarks --case TEXT` some cases. `python -m benchmarks compare OLD.csv
  NEW.csv` names what became slower beyond noise.
- All contenders work on the same tensors in one process and take turns in random order. A sample repeats the step for
  2 ms or more. The times are medians; the CSV file also has the 20th and 80th percentile.
- First, the values and gradients of every contender are compared with float64. A contender whose error is more than
  twice eager's plus {FLOOR:.0e} of the largest entry is marked {WRONG} and is not timed.
- eager is the shortest PyTorch that a user would write (`plain.py`). It is faster than `fastelbo.reference`. compile
  and max-autotune (without CUDA graphs) are the same code under `torch.compile(dynamic=False)`; their times are without
  the compilation. Other packages are called as their users call them (`packages.py`).
- The share of the copy bandwidth counts every input once and every output and gradient once, whatever is moved. A case
  that fits into the caches can pass 100 %.
- saved is what the backward keeps beyond inputs and results; of fastelbo's losses, that is the gradient itself. peak is
  the most that a step holds at a time beyond what was there before, gradients included."""


def _allocator(results: Results) -> list[str]:
    """The section on glibc's malloc; empty if it was not measured."""
    environments = {c.name: c.environment or {} for c in CASES if c.group == "allocator"}
    rows = []
    for case in results.cases("allocator"):
        eager, ours = results.of(case, EAGER), results.of(case, SUBJECT)
        if eager is None or ours is None:
            continue
        variables = _variables(environments.get(case, {}))
        figures = [text for r in (eager, ours) for text in (f"{r.median_us:.0f}", f"{r.page_faults:.0f}")]
        rows.append([case, f"`{variables}`" if variables else "none", *figures, _ratio(eager)])
    if not rows:
        return []
    head = ["allocator", "environment", "eager us", "page faults", "fastelbo us", "page faults", EAGER]
    return _section("What the memory allocator costs", ALLOCATOR, "", *_table(head, rows), "", KEEP_MEMORY)


def _lists(results: Results) -> list[str]:
    """Where a contender is as fast as fastelbo, returns wrong values or did not run; what was disturbed."""
    slower = [r for r in results.whole if r.ratio < EVEN]
    wrong = [r for r in results.rows if r.failure == WRONG]
    failed = [r for r in results.rows if r.failure not in ("", WRONG)]
    disturbed = {r.case: r.others_percent for r in results.whole if r.others_percent > DISTURBED}
    parts = _section(
        "Where fastelbo is not faster",
        f"Every contender that needs less than {EVEN} times fastelbo's time:",
        "",
        *_list(f"{_named(r)}: {r.ratio:.2f}x" for r in slower),
    )
    parts += _section(
        "Which contenders return wrong values",
        "The error is relative to the largest entry of the tensor; inf: a value or gradient is missing.",
        "",
        *_list(f"{_named(r)}: error {r.error:.0e}" for r in wrong),
    )
    if failed:
        title = "Which contenders failed or were not installed"
        parts += _section(title, *_list(f"{_named(r)}: {r.failure}" for r in failed))
    if disturbed:
        parts += _section(
            "Which times not to rely on",
            f"Other processes took more than {DISTURBED} % of the processors while these cases were measured:",
            "",
            *_list(f"{case}: {busy:.0f} %" for case, busy in disturbed.items()),
        )
    return parts


def render(results: Results, plots: Sequence[str]) -> str:
    about, main = results.about, results.main
    keys = ("date", "revision", "fastelbo", "torch", "cpu", "cores", "isa", "gpu")
    machine = ", ".join(f"{key} {about[key]}" for key in keys if about[key])
    bandwidths = {r.place: r.copy_gb_s for r in results.rows}
    copied = ", ".join(f"{gb:.1f} GB/s ({_where(place)})" for place, gb in bandwidths.items())
    parts = [
        "# Benchmarks",
        "",
        "Written by `make bench`; every figure is in [results/](results/). Do not edit.",
        "",
        f"Machine: {machine}. Load before: {about['load']}. Copy bandwidth: {copied}.",
        "",
        "A figure such as 3.00x is the contender's time divided by fastelbo's, of forward and backward together.",
        f"Tensors are float32 unless the case says otherwise; tables are of {_where(main)} unless their title says so.",
        "How this is measured: [Method](#method). How the kernels are built and what limits them:",
        "[docs/performance.md](../docs/performance.md).",
        "",
    ]
    if results.cases("steps"):
        parts += _section(
            "Whole training steps",
            "Encoder, sampling, decoder, loss, backward and Adam: this is what a user gains. The last two columns are",
            "the share of sampling and loss in the step, measured alone on tensors of the same shapes.",
            "",
            *_steps_table(results),
        )
    if results.cases("objectives"):
        parts += _section(
            "K-sample steps",
            "Sampling K times, the objective and the backward of both, without encoder and decoder.",
            "",
            *_times_table(results, main, "objectives"),
        )
    parts += _section(
        "Losses",
        *_times_table(results, main, "losses", "calls"),
        "",
        "Forward and backward apart. fastelbo's losses compute the gradient in the forward:",
        "",
        *_phases_table(results),
    )
    parts += _allocator(results)
    if results.cases("models"):
        parts += _section("Models", *_times_table(results, main, "models"))
    for place in results.places[1:]:
        if place[0] == "cpu":
            parts += _section(f"Losses, {_where(place)}", *_times_table(results, place, "losses", "calls"))
            continue
        parts += _section(
            f"On the GPU, {about['gpu']}",
            "Times of CUDA events around single steps, with the L2 cache overwritten before each.",
            "",
            *_times_table(results, place, "losses", "calls", "objectives"),
        )
    parts += _lists(results)
    parts += _section("Method", METHOD)
    parts += _section("Plots", *(f"![{Path(name).stem}]({name})" for name in plots))
    return "\n".join(parts)


def write_page(path: Path) -> Path:
    from benchmarks.plots import draw  # matplotlib is slow to import, and no run needs it before its end

    results = read_csv(path)
    plots = draw(results, HERE / "plots")
    PAGE.write_text(render(results, [str(p.relative_to(HERE)) for p in plots]))
    return PAGE
