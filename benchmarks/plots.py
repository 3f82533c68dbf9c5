"""The plots of benchmarks/README.md."""

import math
from pathlib import Path

from matplotlib.figure import Figure

from benchmarks.records import Results

COLOURS = {"eager": "#9aa5b1", "compile": "#e0a458", "max-autotune": "#b5651d", "fastelbo": "#1f5fa8"}


def _save(figure: Figure, path: Path) -> Path:
    path.parent.mkdir(exist_ok=True)
    figure.savefig(path, dpi=110, facecolor="white", bbox_inches="tight", pad_inches=0.12)
    return path


def bars(results: Results, path: Path) -> Path:
    """How many times fastelbo's time the contenders take."""
    cases = [c for c in results.cases("losses", "calls") if results.of(c, "eager")]
    figure = Figure(figsize=(8, 0.55 * len(cases) + 1))
    axes = figure.subplots()
    names = [name for name in COLOURS if name != "fastelbo"]
    for i, name in enumerate(names):
        found = [results.of(case, name) for case in cases]
        ratios = [r.ratio if r else math.nan for r in found]
        axes.barh([n + 0.26 * (i - 1) for n in range(len(cases))], ratios, 0.24, color=COLOURS[name], label=name)
    axes.axvline(1, color=COLOURS["fastelbo"], label="fastelbo")
    axes.set_yticks(range(len(cases)), cases, fontsize=8)
    axes.invert_yaxis()
    axes.set_xlabel(f"time / fastelbo's, {results.main[1]} threads, forward and backward", fontsize=9)
    axes.legend(fontsize=8, frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    return _save(figure, path)


def roofline(results: Results, path: Path) -> Path:
    """Time per element against the bytes that no implementation can avoid; the line is the measured copy bandwidth."""
    figure = Figure(figsize=(8, 4.5))
    axes = figure.subplots()
    for name, colour in COLOURS.items():
        found = [r for case in results.cases("losses") if (r := results.of(case, name)) and not r.failure]
        per_element = [r.bytes / r.elements for r in found]
        times = [r.ns_per_element for r in found]
        axes.scatter(per_element, times, color=colour, label=name, s=24)
        if name == "fastelbo":
            for number, (x, y) in enumerate(zip(per_element, times, strict=True), 1):
                axes.annotate(str(number), (x, y), fontsize=7, xytext=(4, -7), textcoords="offset points")
            names = "\n".join(f"{number}  {r.case}" for number, r in enumerate(found, 1))
            axes.text(1.02, 0.98, names, transform=axes.transAxes, fontsize=7, va="top")
    low, high = axes.get_xlim()
    bandwidth = results.rows[0].copy_gb_s
    axes.plot([low, high], [low / bandwidth, high / bandwidth], color="black", lw=1, label="copy bandwidth")
    axes.set_yscale("log")
    axes.set_xlabel("least bytes per element", fontsize=9)
    axes.set_ylabel("ns per element", fontsize=9)
    axes.legend(fontsize=8, frameon=False, loc="upper left", bbox_to_anchor=(1, 0.5))
    axes.spines[["top", "right"]].set_visible(False)
    return _save(figure, path)


def scaling(results: Results, path: Path) -> Path:
    """Time against B, D and K on logarithmic axes."""
    cases = results.cases("scaling")
    axes_of = list(dict.fromkeys(case.rpartition("=")[0] for case in cases))
    figure = Figure(figsize=(4 * max(1, len(axes_of)), 3.6))
    for axes, title in zip(figure.subplots(1, max(1, len(axes_of)), squeeze=False)[0], axes_of, strict=False):
        for name, colour in COLOURS.items():
            found = [r for c in cases if c.rpartition("=")[0] == title and (r := results.of(c, name)) and not r.failure]
            if found:
                sizes, times = [r.size for r in found], [r.median_us for r in found]
                axes.loglog(sizes, times, "o-", color=colour, label=name, ms=4)
        axes.set_title(title.rpartition(", ")[0] or title, fontsize=9, loc="left")
        axes.set_xlabel(title.rpartition(" ")[2], fontsize=9)
        axes.set_ylabel("us", fontsize=9)
        axes.legend(fontsize=8, frameon=False)
        axes.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    return _save(figure, path)


def draw(results: Results, folder: Path) -> list[Path]:
    found = [bars(results, folder / "bars.png"), roofline(results, folder / "roofline.png")]
    if results.cases("scaling"):
        found.append(scaling(results, folder / "scaling.png"))
    return found
