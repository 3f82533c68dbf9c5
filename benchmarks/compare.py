"""Two CSV files of measurements: what became slower beyond noise."""

from pathlib import Path

from benchmarks.contenders import EAGER, SUBJECT
from benchmarks.report import Record, read_csv

SLOWER = 1.10  # a median that grew by less is noise, whatever the quantiles say

Key = tuple[str, str, str, str]


def _by_key(records: list[Record]) -> dict[Key, Record]:
    return {(r["case"], r["threads"], r["contender"], r["phase"]): r for r in records if r["median_us"] != "nan"}


def regressions(old: list[Record], new: list[Record]) -> list[str]:
    """Measurements of fastelbo that are slower, in time and, where eager was measured too, relative to it.

    Slower in time: the new p20 above the old p80, and the median above SLOWER times the old one. Eager takes turns with
    fastelbo, so that a machine that became slower as a whole slows both.
    """
    before, after = _by_key(old), _by_key(new)
    found = []
    for key in before.keys() & after.keys():
        case, threads, contender, phase = key
        a, b = before[key], after[key]
        if contender != SUBJECT or float(b["p20_us"]) <= float(a["p80_us"]):
            continue
        grown = float(b["median_us"]) / float(a["median_us"])
        eager = (case, threads, EAGER, phase)
        if eager in before and eager in after:
            grown = min(grown, grown / (float(after[eager]["median_us"]) / float(before[eager]["median_us"])))
        if grown > SLOWER:
            times = f"{float(a['median_us']):.1f} -> {float(b['median_us']):.1f} us"
            found.append(f"{case}, {phase}, {threads} threads: {times}, {grown:.2f}x beyond what eager lost")
    return sorted(found)


def main(old: Path, new: Path) -> int:
    before, after = read_csv(old), read_csv(new)
    for name, records in ((old, before), (new, after)):
        print(name, *(f"{key}: {records[0][key]}" for key in ("revision", "cpu", "isa", "torch")), sep="  ")
    shared = len(_by_key(before).keys() & _by_key(after).keys())
    found = regressions(before, after)
    print(f"{shared} measurements in both; slower beyond noise: {len(found)}", *found, sep="\n")
    return 1 if found else 0
