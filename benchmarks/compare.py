"""Two CSV files of measurements: what became slower beyond noise."""

import math
from pathlib import Path

from benchmarks.contenders import EAGER, SUBJECT
from benchmarks.records import Place, Results, Row, read_csv

SLOWER = 1.10  # a median that grew by less is noise, whatever the quantiles say

Key = tuple[str, Place, str, str]
Interval = tuple[float, float, float]  # p20, median, p80


def _by_key(results: Results) -> dict[Key, Row]:
    return {(r.case, r.place, r.contender, r.phase): r for r in results.rows}


def _times(row: Row | None) -> Interval | None:
    return None if row is None or math.isnan(row.median_us) else (row.p20_us, row.median_us, row.p80_us)


def _over(ours: Interval, eager: Interval) -> Interval:
    """Our time in units of eager's, from the best that the quantiles allow to the worst."""
    return ours[0] / eager[2], ours[1] / eager[1], ours[2] / eager[0]


def _grown(old: Interval, new: Interval) -> float | None:
    """By how much the median grew, where that is beyond noise."""
    factor = new[1] / old[1]
    return factor if new[0] > old[2] and factor > SLOWER else None


def regressions(old: Results, new: Results) -> list[str]:
    """Measurements of fastelbo that are slower beyond noise, in time or relative to eager, or that are gone.

    Times of two machines cannot be compared: of two machines, only the time relative to eager counts, which takes
    turns with fastelbo.
    """
    before, after = _by_key(old), _by_key(new)
    same_machine = all(old.about[key] == new.about[key] for key in ("cpu", "cores", "isa", "gpu"))
    found = []
    for key in sorted(before.keys() & after.keys()):
        case, place, contender, phase = key
        if contender != SUBJECT or (a := _times(before[key])) is None:
            continue
        name = f"{case}, {phase}, {place[0]}, {place[1]} threads"
        if (b := _times(after[key])) is None:
            found.append(f"{name}: was timed, now {after[key].failure}")
            continue
        if same_machine and (factor := _grown(a, b)):
            found.append(f"{name}: {a[1]:.1f} -> {b[1]:.1f} us, {factor:.2f}x")
        eager = (case, place, EAGER, phase)
        eager_a, eager_b = _times(before.get(eager)), _times(after.get(eager))
        if eager_a and eager_b and (factor := _grown(_over(a, eager_a), _over(b, eager_b))):
            ratios = f"{eager_a[1] / a[1]:.2f}x -> {eager_b[1] / b[1]:.2f}x"
            found.append(f"{name}: against eager {ratios}")
    return found


def main(old: Path, new: Path) -> int:
    before, after = read_csv(old), read_csv(new)
    for name, results in ((old, before), (new, after)):
        print(name, *(f"{key}: {results.about[key]}" for key in ("revision", "cpu", "isa", "gpu", "torch")), sep="  ")
    shared = sum(key[2] == SUBJECT for key in _by_key(before).keys() & _by_key(after).keys())
    if not shared:
        print("The files share no measurement of fastelbo: nothing compared.")
        return 2
    found = regressions(before, after)
    print(f"measurements of fastelbo in both: {shared}; slower beyond noise: {len(found)}", *found, sep="\n")
    return 1 if found else 0
