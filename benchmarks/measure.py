"""One case: every contender is judged, then those that are right are timed side by side."""

import gc
import math
import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median, quantiles
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.profiler import ProfilerActivity, profile

from benchmarks.cases import Case, Inputs
from benchmarks.contenders import CONTENDERS, JUDGE, SUBJECT
from benchmarks.machine import others_share

# Errors are relative to the largest entry of each tensor. The first contender, eager, must be within COARSE of float64;
# the others may be twice as far from it as eager is, plus FLOOR. Half types: in their own units.
COARSE, FLOOR = 1e-3, 1e-6
SAMPLE_NS = 2e6  # a sample repeats the step for at least about this long
PHASES = ("forward", "backward", "both")

Outputs = tuple[Tensor, ...]


@dataclass
class Row:
    """One measurement: one line of the CSV file."""

    group: str
    case: str
    threads: int
    contender: str
    phase: str
    bar: float = math.nan
    median_us: float = math.nan
    p20_us: float = math.nan
    p80_us: float = math.nan
    forward_percent: float = math.nan
    ratio: float = math.nan  # its median divided by fastelbo's
    ns_per_element: float = math.nan
    bandwidth_percent: float = math.nan  # of the measured copy bandwidth, by the bytes that no one can avoid
    elements: int = 0  # of the largest tensor
    bytes: int = 0
    saved_bytes: float = math.nan
    peak_bytes: float = math.nan
    compile_s: float = math.nan
    error: float = math.nan
    failure: str = ""
    part_of: str = ""
    size: int = 0
    others_percent: float = math.nan  # of the machine's processors, used by other processes while the case was timed

    @property
    def verdict(self) -> str:
        if self.failure or math.isnan(self.bar) or math.isnan(self.ratio):
            return self.failure
        return "met" if self.ratio >= self.bar else "MISSED"


@dataclass
class Run:
    """A contender's step: forward, backward and, for a model, the optimizer's step, as in training."""

    function: Callable[..., Any]
    inputs: Inputs
    options: dict[str, Any]

    def forward(self) -> Outputs:
        """The gradients of the step before are let go first."""
        for leaf in self.inputs.leaves:
            leaf.grad = None
        outputs = self.function(**self.inputs.arguments, **self.options)
        return outputs if isinstance(outputs, tuple) else (outputs,)

    def backward(self, outputs: Outputs) -> None:
        if any(o.requires_grad for o in outputs):
            torch.autograd.backward(outputs, self.inputs.upstream)
        if self.inputs.optimizer is not None:
            self.inputs.optimizer.step()

    def __call__(self) -> Outputs:
        outputs = self.forward()
        self.backward(outputs)
        return outputs


def results(function: Callable[..., Any], inputs: Inputs, options: dict[str, Any]) -> list[Tensor]:
    """Values, then gradients, all on the case's own noise."""
    run = Run(function, inputs, options | inputs.noise)
    outputs = run.forward()
    if any(o.requires_grad for o in outputs):
        torch.autograd.backward(outputs, inputs.upstream)
    return [o.detach() for o in outputs] + [t.grad for t in inputs.leaves if t.grad is not None]


def distance(got: list[Tensor], expected: list[Tensor]) -> float:
    """The largest error; NaN where there is one; infinity where a value or gradient is missing or of another shape."""
    if [t.shape for t in got] != [t.shape for t in expected]:
        return math.inf
    # where float64 has zeros alone, the error itself
    errors = [(a.double() - b).abs().max() / (b.abs().max() or 1) for a, b in zip(got, expected, strict=True)]
    return torch.stack(errors).max().item()


def saved_bytes(run: Run) -> int:
    """What is kept for the backward beyond the inputs and the results, which the user holds anyway."""
    storages: dict[int, int] = {}

    def keep(t: Tensor) -> Tensor:
        storages[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with saved_tensors_hooks(keep, lambda t: t):
        outputs = run()
    for t in (*run.inputs.tensors.values(), *run.inputs.leaves, *outputs):
        storages.pop(t.untyped_storage().data_ptr(), None)
    return sum(storages.values())


def peak_bytes(run: Run) -> int:
    """The most that one step holds at a time beyond what was there before it, gradients included."""
    for leaf in run.inputs.leaves:
        leaf.grad = None
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        run()
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


def least_bytes(inputs: Inputs, outputs: Outputs) -> int:
    """Every input read and every output and gradient written once, every upstream gradient read once."""

    def total(tensors: Any) -> int:
        return sum(t.numel() * t.element_size() for t in tensors)

    upstream = inputs.upstream if any(o.requires_grad for o in outputs) else ()
    return total(inputs.tensors.values()) + total(outputs) + total(inputs.leaves) + total(upstream or ())


def timings(runs: dict[str, Run], rounds: int) -> dict[str, list[tuple[float, float]]]:
    """Microseconds of forward and of backward of each contender in each round.

    They take turns in random order: what slows the machine down hits all.
    """
    repeats: dict[str, int] = {}
    for name, run in runs.items():
        for _ in range(5):
            start = time.perf_counter_ns()
            run()
            repeats[name] = math.ceil(SAMPLE_NS / (time.perf_counter_ns() - start))
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in runs}
    order, shuffle, now = list(runs), random.Random(0).shuffle, time.perf_counter_ns
    gc.collect()
    gc.disable()
    for _ in range(rounds):
        shuffle(order)
        for name in order:
            run, count = runs[name], repeats[name]
            run()  # what ran before leaves caches, and threads that still spin
            forward = backward = 0
            for _ in range(count):
                start = now()
                outputs = run.forward()
                middle = now()
                run.backward(outputs)
                forward, backward = forward + middle - start, backward + now() - middle
            times[name].append((forward / count / 1e3, backward / count / 1e3))
    gc.enable()
    return times


def _judge(case: Case, quick: bool) -> tuple[dict[str, Row], dict[str, Run], dict[str, Outputs]]:
    """A row and a run for every contender; no run for one that is wrong or fails."""
    inputs = case.make()
    other = case.other(inputs)
    rows: dict[str, Row] = {}
    runs: dict[str, Run] = {}
    first: dict[str, Outputs] = {}
    floats = [t.dtype for t in inputs.tensors.values() if t.is_floating_point()]
    eps = torch.finfo(floats[0]).eps
    floor = max(FLOOR, eps)
    allowed = case.tolerance or max(COARSE, 8 * eps)
    for contender in CONTENDERS:
        op = next((op for op in (case.op, case.yardstick) if op in contender.functions), None)
        if op is None or (case.contenders and contender.name not in case.contenders):
            continue
        if quick and contender.mode.startswith("max"):
            continue
        given = inputs if op == case.op else other
        row = Row(case.group, case.name, torch.get_num_threads(), contender.name, "both", part_of=case.part_of)
        row.size = case.size
        rows[contender.name] = row
        run = Run(contender.function(op), given, case.options)
        try:
            start = time.perf_counter()
            outputs = run()
            if contender.mode:
                row.compile_s = time.perf_counter() - start
            row.saved_bytes, row.peak_bytes = saved_bytes(run), peak_bytes(run)
            row.elements = max(t.numel() for t in (*given.tensors.values(), *outputs))
            row.bytes = least_bytes(given, outputs)
            expected = results(JUDGE[op], given.to(torch.float64), case.options)
            row.error = distance(results(run.function, given, case.options), expected)
            if not row.error <= allowed:
                row.failure = "WRONG"
                continue
            if len(rows) == 1 and case.tolerance is None:
                allowed = min(allowed, 2 * row.error + floor)
            runs[contender.name], first[contender.name] = run, outputs
        except ModuleNotFoundError as error:
            row.failure = f"not installed: {error}"
        except Exception as error:  # a contender that cannot run does not stop the others
            row.failure = f"FAILED: {error!r:.100}"
    return rows, runs, first


def measure(case: Case, rounds: int, copy_bandwidth: float, *, quick: bool = False) -> list[Row]:
    torch.manual_seed(0)
    torch._dynamo.reset()  # else the compiled functions of all cases pile up behind one chain of guards
    heads, runs, outputs = _judge(case, quick)
    others = others_share()
    times = timings(runs, max(5, round(case.rounds * rounds)))
    busy = 100 * others()
    for head in heads.values():
        head.others_percent = busy
    found: list[Row] = []
    for name, head in heads.items():
        if name not in times:
            found.append(head)
            continue
        trains = any(o.requires_grad for o in outputs[name]) or runs[name].inputs.optimizer is not None
        for phase in PHASES if trains else PHASES[:1]:
            us = [{"forward": f, "backward": b, "both": f + b}[phase] for f, b in times[name]]
            row = Row(**(vars(head) | {"phase": phase}))
            row.p20_us, _, _, row.p80_us = quantiles(us, n=5)
            row.median_us = median(us)
            row.forward_percent = 100 * median(f / (f + b) for f, b in times[name]) if trains else 100.0
            row.ns_per_element = 1e3 * row.median_us / row.elements
            if phase == "both" or not trains:
                row.bar = case.bars.get(name, math.nan)
                row.bandwidth_percent = 100 * row.bytes / (1e-6 * row.median_us) / copy_bandwidth
            found.append(row)
    subject = {row.phase: row.median_us for row in found if row.contender == SUBJECT}
    for row in found:
        if row.contender != SUBJECT and row.phase in subject:
            row.ratio = row.median_us / subject[row.phase]
    return found


def whole(rows: list[Row]) -> list[Row]:
    """The rows of whole steps: one per case and contender."""
    return [row for row in rows if row.phase == "both" or not _has_both(rows, row)]


def _has_both(rows: list[Row], one: Row) -> bool:
    key = (one.case, one.threads, one.contender)
    return any(row.phase == "both" and (row.case, row.threads, row.contender) == key for row in rows)
