"""The benchmark suite judges, compares and reports as it says. Nothing here is timed."""

import math
import os
import time
from dataclasses import replace

import pytest
import torch

from benchmarks import cases, compare, measure, packages, records, report, targets, timers
from benchmarks.contenders import CONTENDERS, FASTELBO, JUDGE, SUBJECT, Contender
from benchmarks.plain import PLAIN
from benchmarks.records import Results, Row

ABOUT = dict.fromkeys(records.ABOUT, "-")
SMALL = cases.Case("small", "elbo_bernoulli", lambda: cases.bernoulli(4, 6), contenders=("eager", SUBJECT))
TIMER = timers.CpuTimer(1e10)
EVERY = [*cases.CASES, *cases.CUDA_CASES]


@pytest.mark.parametrize("case", EVERY, ids=lambda case: case.name)
def test_case_is_known_to_us_and_to_the_judge(case):
    assert case.op in FASTELBO
    assert case.op in JUDGE
    names = {c.name for c in CONTENDERS if {case.op, case.yardstick} & c.functions.keys()}
    assert case.targets.keys() <= names
    assert case.yardstick == "" or case.yardstick in JUDGE
    assert case.part_of == "" or case.part_of in {c.name for c in cases.CASES}


@pytest.mark.parametrize("device", cases.CASES_OF)
def test_names_are_unique(device):
    names = [c.name for c in cases.CASES_OF[device]]
    assert len(names) == len(set(names))


def _measured(case=SMALL, timer=TIMER):
    return {(r.contender, r.phase): r for r in measure.measure(case, 5, timer, quick=True)}


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
    assert rows[SUBJECT, "both"].page_faults >= 0
    assert math.isnan(rows[SUBJECT, "both"].kernels)


def test_the_kernel_alone_is_judged_right():
    kernel = next(case for case in cases.CASES if case.op == "kernel")
    small = replace(kernel, make=lambda: cases.bernoulli(4, 6).frozen(), contenders=(SUBJECT,))
    assert _measured(small)[SUBJECT, "forward"].failure == ""


@pytest.mark.parametrize("wrong", ["value", "gradient"])
def test_wrong_contender_is_not_timed(monkeypatch, wrong):
    def off(recon, x, mu, logvar):
        loss = FASTELBO["elbo_bernoulli"](recon, x, mu, logvar)
        return loss * 1.001 if wrong == "value" else 1.001 * loss - (0.001 * loss).detach()

    planted = Contender("planted", {"elbo_bernoulli": off})
    monkeypatch.setattr(measure, "CONTENDERS", [*CONTENDERS, planted])
    rows = _measured(replace(SMALL, contenders=("eager", "planted", SUBJECT)))
    row = rows["planted", "both"]
    assert row.failure == records.WRONG
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
        row.copy_gb_s = 10.0
        found.append(row)
    found[0].ratio = math.nan
    return found


@pytest.mark.parametrize(
    "target, met",
    [
        ({"targets": {"eager": 3.0}}, True),
        ({"targets": {"eager": 3.1}}, False),
        ({"target_of_copy": 0.5}, True),
        ({"target_of_copy": 0.51}, False),
        ({"target_peak_bytes": 0.0}, True),
        ({"target_peak_bytes": -1.0}, False),
    ],
)
def test_targets(target, met):
    (verdict,) = targets.verdicts(replace(SMALL, **target), _rows(100, 300))
    assert verdict.met == met


def test_target_of_a_contender_that_was_not_timed_has_no_verdict():
    assert targets.verdicts(replace(SMALL, targets={"compile": 2.0}), _rows(100, 300)) == []


class FakeEvent:
    def __init__(self, enable_timing=False):
        self.at = None

    def record(self):
        self.at = time.perf_counter()

    def synchronize(self):
        assert self.at is not None

    def elapsed_time(self, later):
        return 1e3 * (later.at - self.at)


def test_cuda_timer_goes_through_the_same_harness(monkeypatch):
    """The driver is replaced, so that the timer runs without a GPU: events by a clock, memory by counters."""
    monkeypatch.setattr(torch.cuda, "Event", FakeEvent)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda: 100)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 350)
    for name in ("_sleep", "synchronize", "reset_peak_memory_stats"):
        monkeypatch.setattr(torch.cuda, name, lambda *_: None)
    monkeypatch.setattr(timers, "COPIED", 1024)
    cpu = [torch.profiler.ProfilerActivity.CPU]
    monkeypatch.setattr(timers, "profile", lambda activities: torch.profiler.profile(activities=cpu))
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *size, device=None, **options: empty(*size, **options))
    timer = timers.CudaTimer()
    assert timer.bandwidth > 0
    timer.device = "cpu"  # of the tensors
    rows = _measured(timer=timer)
    for row in rows.values():
        assert row.failure == ""
        assert 0 < row.p20_us <= row.median_us <= row.p80_us
        assert row.peak_bytes == 250
        assert row.kernels == 0
        assert math.isnan(row.page_faults)
    both = rows[SUBJECT, "both"]
    assert both.median_us == pytest.approx(
        rows[SUBJECT, "forward"].median_us + rows[SUBJECT, "backward"].median_us, rel=0.5
    )


@pytest.mark.slow
def test_case_with_an_environment_is_measured_in_a_process_of_its_own(monkeypatch):
    """128 KiB is far below the gradient's 12 MB: glibc maps it anew in each step, and every page is written."""
    monkeypatch.setenv("MALLOC_MMAP_THRESHOLD_", "1")
    pages = 4 * 1024 * 3072 / 4096
    faults = {}
    for case in cases.CASES:
        if case.environment:
            rows = measure.measure_in_new_process(replace(case, rounds=0.0), 5, TIMER)
            faults[case.name] = next(r.page_faults for r in rows if (r.contender, r.phase) == (SUBJECT, "both"))
    assert os.environ["MALLOC_MMAP_THRESHOLD_"] == "1"
    assert faults["freed memory kept"] < 0.05 * pages
    assert faults["freed memory returned to the system"] > 0.95 * pages


@pytest.mark.parametrize(
    "ours, eager, spread, regressed",
    [(140, 300, 0.05, True), (104, 300, 0.05, False), (140, 300, 0.5, False), (140, 420, 0.05, True)],
    ids=["slower", "within a tenth", "noise", "slower, and eager too"],
)
def test_compare(tmp_path, ours, eager, spread, regressed):
    old = records.write_csv(ABOUT, _rows(100, 300, spread), tmp_path / "old.csv")
    new = records.write_csv(ABOUT, _rows(ours, eager, spread), tmp_path / "new.csv")
    assert compare.main(old, new) == int(regressed)


@pytest.mark.parametrize(
    "ours, eager, regressed", [(140, 420, False), (90, 100, True)], ids=["a slower machine", "a faster one"]
)
def test_compare_of_two_machines_is_relative_to_eager(tmp_path, ours, eager, regressed):
    old = records.write_csv(ABOUT, _rows(100, 300), tmp_path / "old.csv")
    new = records.write_csv(ABOUT | {"cpu": "another"}, _rows(ours, eager), tmp_path / "new.csv")
    assert compare.main(old, new) == int(regressed)


def test_compare_of_nothing_is_no_success(tmp_path):
    old = records.write_csv(ABOUT, _rows(100, 300), tmp_path / "old.csv")
    rows = [replace(row, case="another case") for row in _rows(100, 300)]
    assert compare.main(old, records.write_csv(ABOUT, rows, tmp_path / "new.csv")) == 2


def test_compare_names_what_went_wrong(tmp_path):
    old = records.write_csv(ABOUT, _rows(100, 300), tmp_path / "old.csv")
    lost = Row("losses", "a case", 2, SUBJECT, "both", failure="WRONG")
    assert compare.main(old, records.write_csv(ABOUT, [lost], tmp_path / "new.csv")) == 1


def test_newest_is_the_one_with_the_latest_date(tmp_path, monkeypatch):
    monkeypatch.setattr(records, "RESULTS", tmp_path)
    for name, date in (("c", "2026-01-02"), ("b", "2026-01-02 10:30"), ("a", "2026-01-02 09:40")):
        records.write_csv(ABOUT | {"date": date}, _rows(1, 1), tmp_path / f"{name}.csv")
    assert records.newest().name == "b.csv"


def test_a_machine_has_one_file(tmp_path, monkeypatch):
    monkeypatch.setattr(records, "RESULTS", tmp_path)
    about = ABOUT | {"cpu": "A (R) B", "cores": "2", "isa": "avx2", "gpu": ""}
    for date in ("2026-01-02", "2026-01-03"):
        records.write_csv(about | {"date": date}, _rows(1, 1))
    records.write_csv(about | {"isa": "avx512"}, _rows(1, 1))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a-r-b-2-cores-avx2.csv", "a-r-b-2-cores-avx512.csv"]


def test_csv_keeps_every_field(tmp_path):
    row = Row("losses", "a case", 2, "eager", "both", median_us=1.5, failure="FAILED: a, b", size=7, page_faults=12.5)
    results = records.read_csv(records.write_csv(ABOUT, [row], tmp_path / "run.csv"))
    assert repr(results.rows) == repr([row])  # NaN is not equal to itself
    assert results.about == ABOUT


@pytest.mark.parametrize("path", sorted(records.RESULTS.glob("*.csv")), ids=lambda path: path.name)
def test_files_in_the_repository_are_read(path):
    results = records.read_csv(path)
    assert results.of("ELBO Bernoulli [512 x 784]", SUBJECT).median_us > 0
    assert path.name == records.csv_path(results.about).name
    report.render(results, [])


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
    found = measure.measure(replace(SMALL, contenders=("eager", "planted", SUBJECT)), 5, TIMER, quick=True)
    results = records.read_csv(records.write_csv(ABOUT, found, tmp_path / "run.csv"))
    page = report.render(results, [])
    assert "small, planted" in page[page.index("## Which contenders failed or were not installed") :]


def test_page_says_where_fastelbo_is_slower(tmp_path, monkeypatch):
    monkeypatch.setattr(report, "HERE", tmp_path)
    monkeypatch.setattr(report, "PAGE", tmp_path / "README.md")
    csv = records.write_csv(ABOUT, _rows(100, 90), tmp_path / "run.csv")
    page = report.write_page(csv).read_text()
    assert "- a case, eager, 2 threads: 0.90x\n" in page
    for name in ("bars", "roofline"):
        assert f"(plots/{name}.png)" in page
        assert (tmp_path / "plots" / f"{name}.png").stat().st_size > 1000


def test_page_has_its_sections_in_order():
    groups = ("losses", "objectives", "steps", "models", "allocator")
    rows = [replace(row, group=group, case=group) for group in groups for row in _rows(100, 300)]
    rows += [replace(row, threads=1) for row in _rows(100, 300)]
    rows += [replace(row, device="cuda", kernels=7.0) for row in _rows(100, 300)]
    page = report.render(Results(ABOUT | {"gpu": "A GPU"}, rows), [])
    titles = [line[3:] for line in page.splitlines() if line.startswith("## ")]
    assert titles == [
        "Whole training steps",
        "K-sample steps",
        "Losses",
        "What the memory allocator costs",
        "Models",
        "Losses, one thread",
        "On the GPU, A GPU",
        "Where fastelbo is not faster",
        "Which contenders return wrong values",
        "Method",
        "Plots",
    ]
    gpu = page[page.index("## On the GPU") : page.index("## Where fastelbo")]
    assert "| kernels |" in gpu
    assert gpu.rstrip().endswith("| 7 |")
    assert "| kernels |" not in page[: page.index("## On the GPU")]


@pytest.mark.parametrize("case", [c for c in cases.CASES if not math.isnan(c.target_peak_bytes)], ids=lambda c: c.name)
def test_small_parameters_have_small_gradients(case):
    """No gradient of a learned parameter is written at recon's size."""
    run = timers.Run(FASTELBO[case.op], case.make(), case.options)
    run()
    assert TIMER.peak_bytes(run) <= case.target_peak_bytes


def test_float64_inputs_keep_bytes_and_models():
    inputs = cases.uint8(2, 3).to(torch.float64)
    assert inputs.tensors["x"].dtype == torch.uint8
    assert inputs.tensors["recon"].dtype == torch.float64
    step = next(c for c in cases.CASES if c.group == "steps").make()
    assert step.to(torch.float64).optimizer.param_groups[0]["lr"] == 0
    assert all(p.dtype == torch.float64 for p in step.to(torch.float64).module.parameters())
    assert all(p.dtype == torch.float32 for p in step.module.parameters())
