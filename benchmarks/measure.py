"""One case: every contender's values are compared with float64, then those that are right are timed side by side."""

import gc
import math
import os
import random
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from multiprocessing import get_context
from statistics import median, quantiles
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from benchmarks.cases import CASES, Case, Inputs
from benchmarks.contenders import CONTENDERS, JUDGE, SUBJECT
from benchmarks.machine import others_share
from benchmarks.records import WRONG, Row
from benchmarks.timers import CpuTimer, Outputs, Run, Sample, Timer

# Errors are relative to the largest entry of each tensor. The first contender, eager, must be within COARSE of float64;
# the others may be twice as far from it as eager is, plus FLOOR. Half types: in their own units.
COARSE, FLOOR = 1e-3, 1e-6
PHASES = ("forward", "backward", "both")


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


def least_bytes(inputs: Inputs, outputs: Outputs) -> int:
    """Every input read and every output and gradient written once, every upstream gradient read once."""

    def total(tensors: Any) -> int:
        return sum(t.numel() * t.element_size() for t in tensors)

    upstream = inputs.upstream if any(o.requires_grad for o in outputs) else ()
    return total(inputs.tensors.values()) + total(outputs) + total(inputs.leaves) + total(upstream or ())


def timings(runs: dict[str, Run], rounds: int, timer: Timer) -> dict[str, list[Sample]]:
    """A sample of each contender in each round. They take turns in random order: what slows the machine hits all."""
    repeats: dict[str, int] = {}
    for name, run in runs.items():
        for _ in range(5):
            repeats[name] = max(1, math.ceil(timer.sample_us / timer.sample(run, 1).both_us))
    samples: dict[str, list[Sample]] = {name: [] for name in runs}
    order, shuffle = list(runs), random.Random(0).shuffle
    gc.collect()
    gc.disable()
    for _ in range(rounds):
        shuffle(order)
        for name in order:
            runs[name]()  # what ran before leaves caches, and threads that still spin
            samples[name].append(timer.sample(runs[name], repeats[name]))
    gc.enable()
    return samples


def _judge(case: Case, timer: Timer, quick: bool) -> tuple[dict[str, Row], dict[str, Run], dict[str, Outputs]]:
    """A row and a run for every contender; no run for one that returns wrong values or fails."""
    inputs = case.make() if timer.device == "cpu" else case.make().to(device=timer.device)
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
        row = Row(case.group, case.name, torch.get_num_threads(), contender.name, "both", timer.device)
        row.part_of, row.size, row.copy_gb_s = case.part_of, case.size, timer.bandwidth / 1e9
        rows[contender.name] = row
        run = Run(contender.function(op), given, case.options)
        try:
            start = time.perf_counter()
            outputs = run()
            if contender.mode:
                row.compile_s = time.perf_counter() - start
            row.saved_bytes, row.peak_bytes = saved_bytes(run), timer.peak_bytes(run)
            row.kernels = timer.kernels(run)
            row.elements = max(t.numel() for t in (*given.tensors.values(), *outputs))
            row.bytes = least_bytes(given, outputs)
            expected = results(JUDGE[op], given.to(torch.float64), case.options)
            row.error = distance(results(run.function, given, case.options), expected)
            if not row.error <= allowed:
                row.failure = WRONG
                continue
            if len(rows) == 1 and case.tolerance is None:
                allowed = min(allowed, 2 * row.error + floor)
            runs[contender.name], first[contender.name] = run, outputs
        except ModuleNotFoundError as error:
            row.failure = f"not installed: {error}"
        except Exception as error:  # a contender that cannot run does not stop the others
            row.failure = f"FAILED: {error!r:.100}"
    return rows, runs, first


def measure(case: Case, rounds: int, timer: Timer, *, quick: bool = False) -> list[Row]:
    """The rows of all contenders: of every phase of those that are right, one with the failure of the others."""
    torch.manual_seed(0)
    torch._dynamo.reset()  # else the compiled functions of all cases pile up behind one chain of guards
    heads, runs, outputs = _judge(case, timer, quick)
    others = others_share()
    samples = timings(runs, max(5, round(case.rounds * rounds)), timer)
    busy = 100 * others()
    found: list[Row] = []
    for name, head in heads.items():
        head.others_percent = busy
        if name not in samples:
            found.append(head)
            continue
        head.page_faults = median(s.page_faults for s in samples[name])
        trains = any(o.requires_grad for o in outputs[name]) or runs[name].inputs.optimizer is not None
        for phase in PHASES if trains else PHASES[:1]:
            us = [getattr(s, f"{phase}_us") for s in samples[name]]
            row = replace(head, phase=phase)
            row.p20_us, _, _, row.p80_us = quantiles(us, n=5)
            row.median_us = median(us)
            row.forward_percent = 100 * median(s.forward_us / s.both_us for s in samples[name]) if trains else 100.0
            row.ns_per_element = 1e3 * row.median_us / row.elements
            if phase == "both" or not trains:
                row.bandwidth_percent = 100 * row.bytes / (1e-6 * row.median_us) / timer.bandwidth
            found.append(row)
    subject = {row.phase: row.median_us for row in found if row.contender == SUBJECT}
    for row in found:
        if row.contender != SUBJECT and row.phase in subject:
            row.ratio = row.median_us / subject[row.phase]
    return found


def _measure_named(name: str, rounds: int, bandwidth: float, threads: int, quick: bool) -> list[Row]:
    torch.set_num_threads(threads)
    return measure(next(c for c in CASES if c.name == name), rounds, CpuTimer(bandwidth), quick=quick)


def measure_in_new_process(case: Case, rounds: int, timer: Timer, *, quick: bool = False) -> list[Row]:
    """The same in a process that starts with the case's environment variables: glibc reads its own at the start."""
    assert case.environment is not None
    saved = dict(os.environ)
    for name in [n for n in os.environ if n.startswith("MALLOC_")]:
        del os.environ[name]
    os.environ.update(case.environment)
    try:
        with ProcessPoolExecutor(1, get_context("spawn")) as process:
            threads = torch.get_num_threads()
            return process.submit(_measure_named, case.name, rounds, timer.bandwidth, threads, quick).result()
    finally:
        os.environ.clear()
        os.environ.update(saved)
