"""One case: every contender is judged, then those that are right are timed side by side."""

import gc
import math
import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from statistics import median, quantiles
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from benchmarks.cases import Case, Inputs
from benchmarks.contenders import CONTENDERS, JUDGE, SUBJECT

# Errors are relative to the largest entry of each tensor. The first contender, eager, must be within COARSE of float64;
# the others may be twice as far from it as eager is, plus FLOOR.
COARSE, FLOOR = 1e-3, 1e-6
SAMPLE_NS = 2e6  # a sample repeats the step for at least about this long


@dataclass
class Row:
    case: str
    contender: str
    bar: float
    median_us: float = math.nan
    p20_us: float = math.nan
    p80_us: float = math.nan
    ratio: float = math.nan  # its median divided by fastelbo's
    saved_bytes: float = math.nan
    compile_s: float = math.nan
    error: float = math.nan
    failure: str = ""

    @property
    def verdict(self) -> str:
        if self.failure or math.isnan(self.bar) or math.isnan(self.ratio):
            return self.failure
        return "met" if self.ratio >= self.bar else "MISSED"


def step(function: Callable[..., Any], inputs: Inputs, options: dict[str, Any]) -> tuple[Tensor, ...]:
    """Forward and backward, as in training: the gradients of the step before are let go first."""
    for tensor in inputs.tensors.values():
        tensor.grad = None
    outputs = function(**inputs.tensors, **options)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    if any(o.requires_grad for o in outputs):
        torch.autograd.backward(outputs, inputs.upstream)
    return outputs


def results(function: Callable[..., Any], inputs: Inputs, options: dict[str, Any]) -> list[Tensor]:
    """Values, then gradients, all on the case's own noise."""
    outputs = step(function, inputs, options | inputs.noise)
    return [o.detach() for o in outputs] + [t.grad for t in inputs.tensors.values() if t.grad is not None]


def distance(got: list[Tensor], expected: list[Tensor]) -> float:
    """The largest error; NaN where there is one."""
    errors = []
    for a, b in zip(got, expected, strict=True):
        assert a.shape == b.shape, f"{tuple(a.shape)} instead of {tuple(b.shape)}"
        errors.append((a - b).abs().max() / b.abs().max())
    return torch.stack(errors).max().item()


def saved_bytes(run: Callable[[], tuple[Tensor, ...]], inputs: Inputs) -> int:
    """What is kept for the backward beyond the inputs and the results, which the user holds anyway."""
    storages: dict[int, int] = {}

    def keep(t: Tensor) -> Tensor:
        storages[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with saved_tensors_hooks(keep, lambda t: t):
        outputs = run()
    for t in (*inputs.tensors.values(), *outputs):
        storages.pop(t.untyped_storage().data_ptr(), None)
    return sum(storages.values())


def timings(steps: dict[str, Callable[[], Any]], rounds: int) -> dict[str, list[float]]:
    """Microseconds per step of each contender in each round. They take turns: what slows the machine down hits all."""
    repeats: dict[str, int] = {}
    for name, run in steps.items():
        for _ in range(5):
            start = time.perf_counter_ns()
            run()
            repeats[name] = math.ceil(SAMPLE_NS / (time.perf_counter_ns() - start))
    times: dict[str, list[float]] = {name: [] for name in steps}
    order, shuffle = list(steps), random.Random(0).shuffle
    gc.collect()
    gc.disable()
    for _ in range(rounds):
        shuffle(order)
        for name in order:
            run, count = steps[name], repeats[name]
            run()  # what ran before leaves caches, and threads that still spin
            start = time.perf_counter_ns()
            for _ in range(count):
                run()
            times[name].append((time.perf_counter_ns() - start) / count / 1e3)
    gc.enable()
    return times


def measure(case: Case, rounds: int) -> list[Row]:
    torch.manual_seed(0)
    torch._dynamo.reset()  # else the compiled functions of all cases pile up behind one chain of guards
    inputs = case.make()
    rows: dict[str, Row] = {}
    steps: dict[str, Callable[[], tuple[Tensor, ...]]] = {}
    allowed = case.tolerance or COARSE
    for contender in CONTENDERS:
        op = next((op for op in (case.op, case.yardstick) if op in contender.functions), None)
        if op is None:
            continue
        row = rows[contender.name] = Row(case.name, contender.name, case.bars.get(contender.name, math.nan))
        function = contender.function(op)
        run = partial(step, function, inputs, case.options)
        try:
            start = time.perf_counter()
            run()
            row.compile_s = time.perf_counter() - start if contender.compiled else math.nan
            row.saved_bytes = saved_bytes(run, inputs)
            expected = results(JUDGE[op], inputs.double(), case.options)
            row.error = distance(results(function, inputs, case.options), expected)
            if not row.error <= allowed:
                row.failure = "WRONG"
                continue
            if len(rows) == 1 and case.tolerance is None:
                allowed = min(allowed, 2 * row.error + FLOOR)
            steps[contender.name] = run
        except Exception as error:  # a contender that cannot run does not stop the others
            row.failure = f"FAILED: {error!r:.100}"
    for name, times in timings(steps, max(5, round(case.rounds * rounds))).items():
        rows[name].p20_us, _, _, rows[name].p80_us = quantiles(times, n=5)
        rows[name].median_us = median(times)
    for name, row in rows.items():
        if name != SUBJECT and SUBJECT in steps:
            row.ratio = row.median_us / rows[SUBJECT].median_us
    return list(rows.values())
