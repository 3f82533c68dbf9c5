"""Contenders that take turns in one process, in random order: a ratio is the median of the ratios within a round."""

import random
import time
from collections.abc import Callable
from statistics import median

MIN_ROUNDS = 5

Step = Callable[[], object]


def measured(steps: dict[str, Step], seconds: float) -> dict[str, list[float]]:
    """Milliseconds per step, a number per contender and round. A sample takes at least 50 ms."""
    repeats = {}
    for name, step in steps.items():
        for _ in range(3):
            start = time.perf_counter()
            step()
            repeats[name] = max(1, round(0.05 / (time.perf_counter() - start)))
    times: dict[str, list[float]] = {name: [] for name in steps}
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(times[next(iter(steps))]) < MIN_ROUNDS:
        for name in random.sample(list(steps), len(steps)):
            start = time.perf_counter()
            for _ in range(repeats[name]):
                steps[name]()
            times[name].append(1e3 * (time.perf_counter() - start) / repeats[name])
    return times


def report(label: str, times: dict[str, list[float]], subject: str, unit: str = "ms") -> None:
    """A line of Markdown: the median of each contender, and how many times as long as the subject it takes."""
    cells = []
    for name, of_name in times.items():
        ratio = median(a / b for a, b in zip(of_name, times[subject], strict=True))
        cells.append(f"{name} {median(of_name):.2f} {unit}" + ("" if name == subject else f" ({ratio:.2f}x)"))
    print(f"| {label} | {' | '.join(cells)} |", flush=True)
