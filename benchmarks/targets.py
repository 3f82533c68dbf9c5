"""The targets of a case, compared with what was measured. Printed by a run; the page does not have them."""

import math
from dataclasses import dataclass

from benchmarks.cases import Case
from benchmarks.contenders import SUBJECT
from benchmarks.records import Row, whole


@dataclass(frozen=True)
class Verdict:
    text: str
    met: bool

    def __str__(self) -> str:
        return f"  target {self.text}: {'met' if self.met else 'MISSED'}"


def verdicts(case: Case, rows: list[Row]) -> list[Verdict]:
    """One for each target whose contender was timed."""
    found = []
    timed = {row.contender: row for row in whole(rows) if not math.isnan(row.median_us)}
    for name, least in case.targets.items():
        if name in timed and SUBJECT in timed:
            ratio = timed[name].ratio
            found.append(Verdict(f"{name} {ratio:.2f}x, at least {least:.2f}x", ratio >= least))
    if SUBJECT not in timed:
        return found
    ours = timed[SUBJECT]
    if not math.isnan(least := case.target_of_copy):
        share = ours.bandwidth_percent / 100
        found.append(Verdict(f"{share:.0%} of the copy bandwidth, at least {least:.0%}", share >= least))
    if not math.isnan(most := case.target_peak_bytes):
        text = f"peak {ours.peak_bytes / 1024:.0f} KiB, at most {most / 1024:.0f} KiB"
        found.append(Verdict(text, ours.peak_bytes <= most))
    return found
