"""The benchmark suite judges, compares and reports as it says. Nothing here is timed."""

import os
from dataclasses import replace

import pytest
import torch

from benchmarks import cases, compare, measure, packages, report
from benchmarks.contenders import CONTENDERS, FASTELBO, JUDGE, SUBJECT, Contender
from benchmarks.measure import Row
from benchmarks.plain import PLAIN

ABOUT = {key: "-" for key in ("date", "revision", "fastelbo", "torch", "cpu", "cores", "isa", "load")}
SMALL = cases.Case(
    "small", "elbo_bernoulli", lambda: cases.bernoulli(4, 6), {"eager": 0.0}, contenders=("eager", SUBJECT)
)


@pytest.mark.parametrize("case", cases.CASES, ids=lambda case: case.name)
def test_case_is_known_to_us_and_to_the_judge(case):
    assert case.op in FASTELBO
    assert case.op in JUDGE
    names = {c.name for c in CONTENDERS if {case.op, case.yardstick} & c.functions.keys()}
    assert case.bars.keys() <= names
    assert case.yardstick == "" or case.yardstick in JUDGE
    assert case.part_of == "" or case.part_of in {c.name for c in cases.CASES}


def test_names_are_unique():
    names = [c.name for c in cases.CASES]
    assert len(names) == len(set(names))


def _measured(case=SMALL):
    return {(r.contender, r.phase): r for r in measure.measure(case, 5, 1e10, quick=True)}


def test_right_contenders_are_timed_in_phases():
    rows = _measured()
    assert set(rows) == {(c, p) for c in ("eager", SUBJECT) for p in ("forward", "backward", "both")}
    for row in rows.values():
        assert row.failure == ""
        assert row.p20_us <= row.median_us <= row.p80_us
        assert row.error < 1e-6
    # read: recon, x, mu, logvar; written: loss and the gradients of recon, mu, logvar
    assert rows[SUBJECT, "both"].bytes == 4 * (2 * 4 * 6 + 2 * 4 * 32 + 1 + 4 * 6 + 2 * 4 * 32)
    assert rows[SUBJECT, "both"].peak_bytes >= 4 * 4 * 6
    assert rows["eager", "both"].verdict == "met"


@pytest.mark.parametrize("wrong", ["value", "gradient"])
def test_wrong_contender_is_not_timed(monkeypatch, wrong):
    def off(recon, x, mu, logvar):
        loss = FASTELBO["elbo_bernoulli"](recon, x, mu, logvar)
        return loss * 1.001 if wrong == "value" else 1.001 * loss - (0.001 * loss).detach()

    planted = Contender("planted", {"elbo_bernoulli": off})
    monkeypatch.setattr(measure, "CONTENDERS", [*CONTENDERS, planted])
    rows = _measured(replace(SMALL, contenders=("eager", "planted", SUBJECT)))
    row = rows["planted", "both"]
    assert row.verdict == "WRONG"
    assert row.error == pytest.approx(1e-3, rel=0.2)
    assert row.median_us != row.median_us
    assert ("planted", "forward") not in rows


def test_failing_contender_is_reported(monkeypatch):
    def fails(**_):
        raise RuntimeError("no such luck")

    monkeypatch.setattr(measure, "CONTENDERS", [*CONTENDERS, Contender("planted", {"elbo_bernoulli": fails})])
    rows = _measured(replace(SMALL, contenders=("eager", "planted", SUBJECT)))
    assert "no such luck" in rows["planted", "both"].failure


def _rows(ours: float, eager: float, spread: float = 0.05) -> list[Row]:
    found = []
    for name, us in ((SUBJECT, ours), ("eager", eager)):
        row = Row("losses", "a case", 2, name, "both", median_us=us, ratio=us / ours, ns_per_element=1.0)
        row.p20_us, row.p80_us = us * (1 - spread), us * (1 + spread)
        row.elements, row.bytes, row.saved_bytes, row.peak_bytes, row.bandwidth_percent = 100, 1200, 0, 0, 50.0
        found.append(row)
    found[0].ratio, found[1].bar = float("nan"), 2.0
    return found


@pytest.mark.parametrize(
    "ours, eager, spread, regressed",
    [(140, 300, 0.05, True), (104, 300, 0.05, False), (140, 300, 0.5, False), (140, 420, 0.05, True)],
    ids=["slower", "within a tenth", "noise", "slower, and eager too"],
)
def test_compare(tmp_path, ours, eager, spread, regressed):
    old = report.write_csv(ABOUT, {2: 1e10}, _rows(100, 300, spread), tmp_path / "old.csv")
    new = report.write_csv(ABOUT, {2: 1e10}, _rows(ours, eager, spread), tmp_path / "new.csv")
    assert compare.main(old, new) == int(regressed)


@pytest.mark.parametrize(
    "ours, eager, regressed", [(140, 420, False), (90, 100, True)], ids=["a slower machine", "a faster one"]
)
def test_compare_of_two_machines_is_relative_to_eager(tmp_path, ours, eager, regressed):
    old = report.write_csv(ABOUT, {2: 1e10}, _rows(100, 300), tmp_path / "old.csv")
    new = report.write_csv(ABOUT | {"cpu": "another"}, {2: 1e10}, _rows(ours, eager), tmp_path / "new.csv")
    assert compare.main(old, new) == int(regressed)


def test_compare_of_nothing_is_no_success(tmp_path):
    old = report.write_csv(ABOUT, {2: 1e10}, _rows(100, 300), tmp_path / "old.csv")
    rows = [replace(row, case="another case") for row in _rows(100, 300)]
    assert compare.main(old, report.write_csv(ABOUT, {2: 1e10}, rows, tmp_path / "new.csv")) == 2


def test_compare_names_what_went_wrong(tmp_path):
    old = report.write_csv(ABOUT, {2: 1e10}, _rows(100, 300), tmp_path / "old.csv")
    lost = Row("losses", "a case", 2, SUBJECT, "both", failure="WRONG")
    assert compare.main(old, report.write_csv(ABOUT, {2: 1e10}, [lost], tmp_path / "new.csv")) == 1


def test_newest_is_the_last_written_of_the_last_day(tmp_path, monkeypatch):
    monkeypatch.setattr(report, "RESULTS", tmp_path)
    for age, name in enumerate(("2026-01-02-b-avx2.csv", "2026-01-02-b.csv", "2026-01-01-z.csv")):
        (tmp_path / name).touch()
        os.utime(tmp_path / name, (1e9 - age, 1e9 - age))
    assert report.newest().name == "2026-01-02-b-avx2.csv"


@pytest.mark.parametrize("case", [c for c in cases.CASES if c.part_of], ids=lambda case: case.name)
def test_plain_loss_alone_is_right(case):
    """Its share of the step needs eager's time: a contender that fails would leave a hole in the table."""
    inputs = case.make().to(torch.float64)
    assert (
        measure.distance(measure.results(PLAIN[case.op], inputs, {}), measure.results(JUDGE[case.op], inputs, {}))
        < 1e-9
    )


def test_page_names_what_is_not_installed(tmp_path, monkeypatch):
    planted = Contender("planted", {"elbo_bernoulli": packages._not_installed})
    monkeypatch.setattr(measure, "CONTENDERS", [*CONTENDERS, planted])
    found = measure.measure(replace(SMALL, contenders=("eager", "planted", SUBJECT)), 5, 1e10, quick=True)
    records = report.read_csv(report.write_csv(ABOUT, {2: 1e10, 1: 1e10}, found, tmp_path / "run.csv"))
    assert "planted" in report.render(records, []).split("not installed")[-2]


def test_page_says_where_we_lose(tmp_path, monkeypatch):
    monkeypatch.setattr(report, "HERE", tmp_path)
    monkeypatch.setattr(report, "PAGE", tmp_path / "README.md")
    csv = report.write_csv(ABOUT, {2: 1e10}, _rows(100, 90), tmp_path / "run.csv")
    page = report.write_page(csv).read_text()
    assert "a case, eager, 2 threads: 0.90x of 2.00x" in page
    assert "a case, eager, 2 threads: 0.90x\n" in page
    for name in ("bars", "roofline"):
        assert f"(plots/{name}.png)" in page
        assert (tmp_path / "plots" / f"{name}.png").stat().st_size > 1000


def test_float64_inputs_keep_bytes_and_models():
    inputs = cases.uint8(2, 3).to(torch.float64)
    assert inputs.tensors["x"].dtype == torch.uint8
    assert inputs.tensors["recon"].dtype == torch.float64
    step = next(c for c in cases.CASES if c.group == "steps").make()
    assert all(p.dtype == torch.float64 for p in step.to(torch.float64).module.parameters())
    assert all(p.dtype == torch.float32 for p in step.module.parameters())
