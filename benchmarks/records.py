"""A measured row, the CSV file of a run, and a run as the page and its plots read it."""

import csv
import math
import re
from collections.abc import Iterable
from dataclasses import MISSING, asdict, dataclass, fields
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"  # one CSV file for each machine: its newest full run

# What the rows of a file have in common, in the columns before those of the row.
ABOUT = ("date", "cpu", "cores", "gpu", "load", "isa", "torch", "fastelbo", "revision")
WRONG = "WRONG"  # the failure of a contender whose values or gradients are not those of float64

About = dict[str, str]
Place = tuple[str, int]  # device and number of threads


@dataclass
class Row:
    """One measurement: one line of the CSV file."""

    group: str
    case: str
    threads: int
    contender: str
    phase: str  # "forward", "backward" or "both"
    device: str = "cpu"
    copy_gb_s: float = math.nan  # of the device, read plus written
    median_us: float = math.nan
    p20_us: float = math.nan
    p80_us: float = math.nan
    forward_percent: float = math.nan
    ratio: float = math.nan  # its median divided by fastelbo's
    ns_per_element: float = math.nan
    bandwidth_percent: float = math.nan  # of the copy bandwidth, by the bytes that no implementation can avoid
    elements: int = 0  # of the largest tensor
    bytes: int = 0
    saved_bytes: float = math.nan
    peak_bytes: float = math.nan
    page_faults: float = math.nan  # per step, of this process; CPU alone
    kernels: float = math.nan  # that one step launches; GPU alone
    compile_s: float = math.nan
    error: float = math.nan
    failure: str = ""
    part_of: str = ""
    size: int = 0
    others_percent: float = math.nan  # of the machine's processors, used by other processes while the case was timed

    @property
    def place(self) -> Place:
        return self.device, self.threads


def whole(rows: Iterable[Row]) -> list[Row]:
    """The rows of whole steps, one for each case and contender: forward and backward, or a forward without one."""
    rows = list(rows)
    both = {(r.case, r.place, r.contender) for r in rows if r.phase == "both"}
    return [r for r in rows if r.phase == "both" or (r.case, r.place, r.contender) not in both]


def csv_path(about: About) -> Path:
    """The file of this machine. A later run replaces it."""
    words = [about["cpu"], about["cores"], "cores", about["isa"], about["gpu"]]
    return RESULTS / (re.sub("[^a-z0-9]+", "-", " ".join(words).lower()).strip("-") + ".csv")


def write_csv(about: About, rows: Iterable[Row], path: Path | None = None) -> Path:
    path = path or csv_path(about)
    path.parent.mkdir(exist_ok=True)
    with path.open("w", newline="") as file:
        out = csv.DictWriter(file, [*ABOUT, *(f.name for f in fields(Row))])
        out.writeheader()
        out.writerows(about | asdict(row) for row in rows)
    return path


def _row(line: dict[str, str]) -> Row:
    """Columns that an older file does not have take their defaults."""
    given: dict[str, Any] = {}
    for f in fields(Row):
        if f.name in line or f.default is MISSING:
            given[f.name] = f.type(line[f.name])  # type: ignore[operator]
    return Row(**given)


class Results:
    """The rows of one run, by place, case and contender."""

    def __init__(self, about: About, rows: Iterable[Row]) -> None:
        self.about, self.rows = about, list(rows)
        self.places = list(dict.fromkeys(row.place for row in self.rows))
        self.main = self.places[0]  # the CPU with all threads; then one thread; then a GPU
        self.whole = whole(self.rows)
        self._by_key = {(r.case, r.contender, r.place, r.phase): r for r in self.rows}
        self._whole_by_key = {(r.case, r.contender, r.place): r for r in self.whole}

    def of(self, case: str, contender: str, place: Place | None = None) -> Row | None:
        """The row of the whole step; of a case without gradients, that of its forward."""
        return self._whole_by_key.get((case, contender, place or self.main))

    def phase(self, case: str, contender: str, phase: str) -> Row | None:
        return self._by_key.get((case, contender, self.main, phase))

    def cases(self, *groups: str, place: Place | None = None) -> list[str]:
        place = place or self.main
        return list(dict.fromkeys(r.case for r in self.rows if r.group in groups and r.place == place))

    def contenders(self, cases: Iterable[str]) -> list[str]:
        wanted = set(cases)
        return list(dict.fromkeys(r.contender for r in self.rows if r.case in wanted))


def read_csv(path: Path) -> Results:
    with path.open(newline="") as file:
        lines = list(csv.DictReader(file))
    return Results({key: lines[0].get(key, "") for key in ABOUT}, map(_row, lines))


def newest() -> Path:
    """The file in results/ with the latest date in it."""
    found = list(RESULTS.glob("*.csv"))
    if not found:
        raise FileNotFoundError(f"no CSV file in {RESULTS}: run `make bench` first")
    return max(found, key=lambda path: (read_csv(path).about["date"], path.name))
