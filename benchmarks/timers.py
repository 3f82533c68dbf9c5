"""A contender's step, and how it is measured on each device: time, memory, kernels, and the device's copy bandwidth."""

import math
import resource
import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from statistics import median
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from benchmarks.cases import Inputs

COPIED = 1 << 28  # bytes that are copied to measure the bandwidth, far beyond any cache

Outputs = tuple[Tensor, ...]


@dataclass
class Run:
    """A contender's step: forward, backward and, for a model, the optimizer's step, as in training."""

    function: Callable[..., Any]
    inputs: Inputs
    options: dict[str, Any]

    def forward(self) -> Outputs:
        """The gradients of the step before are freed first."""
        self.free_gradients()
        outputs = self.function(**self.inputs.arguments, **self.options)
        return outputs if isinstance(outputs, tuple) else (outputs,)

    def backward(self, outputs: Outputs) -> None:
        if any(o.requires_grad for o in outputs):
            torch.autograd.backward(outputs, self.inputs.upstream)
        if self.inputs.optimizer is not None:
            self.inputs.optimizer.step()

    def free_gradients(self) -> None:
        for leaf in self.inputs.leaves:
            leaf.grad = None

    def __call__(self) -> Outputs:
        outputs = self.forward()
        self.backward(outputs)
        return outputs


@dataclass
class Sample:
    """Averages over the steps of one sample."""

    forward_us: float
    backward_us: float
    page_faults: float = math.nan

    @property
    def both_us(self) -> float:
        return self.forward_us + self.backward_us


class Timer(Protocol):
    device: str
    sample_us: float  # a sample repeats the step for at least about this long
    bandwidth: float  # bytes per second, read plus written, of copying one large tensor to another

    def sample(self, run: Run, steps: int) -> Sample: ...
    def peak_bytes(self, run: Run) -> int:
        """The most that one step holds at a time beyond what was there before it, gradients included."""
        ...

    def kernels(self, run: Run) -> float: ...


class CpuTimer:
    """The wall clock."""

    device, sample_us = "cpu", 2000.0

    def __init__(self, bandwidth: float | None = None) -> None:
        self.bandwidth = bandwidth or self._copy_bandwidth()

    @staticmethod
    def _copy_bandwidth() -> float:
        source, target = torch.zeros(COPIED, dtype=torch.int8), torch.zeros(COPIED, dtype=torch.int8)
        times = []
        for _ in range(7):
            start = time.perf_counter()
            target.copy_(source)
            times.append(time.perf_counter() - start)
        return 2 * COPIED / median(times)

    def sample(self, run: Run, steps: int) -> Sample:
        now = time.perf_counter_ns
        forward = backward = 0
        faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        for _ in range(steps):
            start = now()
            outputs = run.forward()
            middle = now()
            run.backward(outputs)
            forward, backward = forward + middle - start, backward + now() - middle
        faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - faults
        return Sample(forward / steps / 1e3, backward / steps / 1e3, faults / steps)

    def peak_bytes(self, run: Run) -> int:
        run.free_gradients()
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
            run()
        events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
        held = peak = 0
        for event in sorted(events, key=lambda e: e.start_ns()):
            held += event.nbytes()
            peak = max(peak, held)
        return peak

    def kernels(self, run: Run) -> float:
        return math.nan


class CudaTimer:
    """CUDA events around single steps, with the L2 cache overwritten before each."""

    device, sample_us = "cuda", 0.0

    def __init__(self) -> None:
        self._flush = torch.empty(COPIED, dtype=torch.int8, device="cuda")
        source, target = torch.empty_like(self._flush), torch.empty_like(self._flush)
        times = [self._intervals(lambda: target.copy_(source))[0] for _ in range(30)]
        self.bandwidth = 2 * COPIED / (1e-6 * median(times))

    def _intervals(self, *parts: Callable[[], object]) -> list[float]:
        """Microseconds that the device spends on each of the parts, one after the other."""
        events = [torch.cuda.Event(enable_timing=True) for _ in range(len(parts) + 1)]
        self._flush.zero_()
        torch.cuda._sleep(200_000)  # cycles, in which the host queues the launches
        events[0].record()
        for part, event in zip(parts, events[1:], strict=True):
            part()
            event.record()
        events[-1].synchronize()
        return [1e3 * first.elapsed_time(second) for first, second in pairwise(events)]

    def sample(self, run: Run, steps: int) -> Sample:
        forward = backward = 0.0
        outputs: Outputs = ()

        def step_forward() -> None:
            nonlocal outputs
            outputs = run.forward()

        for _ in range(steps):
            first, second = self._intervals(step_forward, lambda: run.backward(outputs))
            forward, backward = forward + first, backward + second
        return Sample(forward / steps, backward / steps)

    def peak_bytes(self, run: Run) -> int:
        run.free_gradients()
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before

    def kernels(self, run: Run) -> float:
        with profile(activities=[ProfilerActivity.CUDA]) as profiler:
            run()
            torch.cuda.synchronize()
        events = profiler.events() or ()
        return float(sum(e.device_type == torch.autograd.DeviceType.CUDA for e in events))


TIMERS: dict[str, Callable[[], Timer]] = {"cpu": CpuTimer, "cuda": CudaTimer}
