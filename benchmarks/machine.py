"""What the figures were measured on, and how fast its memory is."""

import datetime
import math
import os
import re
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import torch

import fastelbo

DISTURBED = 5  # percent of the processors: with more of them used by others, times mean little
COPIED = 1 << 26  # floats: 256 MB, far beyond any cache


def facts() -> dict[str, str]:
    cpuinfo = Path("/proc/cpuinfo")
    cpu = re.search(r"model name\s*: (.+)", cpuinfo.read_text() if cpuinfo.exists() else "")
    here = Path(__file__).parent
    git = subprocess.run(["git", "-C", here, "describe", "--always", "--dirty"], capture_output=True, text=True)
    return {
        "date": datetime.date.today().isoformat(),
        "cpu": cpu[1] if cpu else "unknown",
        "cores": str(os.cpu_count()),
        "load": f"{os.getloadavg()[0]:.1f}",
        "isa": str(fastelbo.build_info()["isa"]),
        "torch": torch.__version__,
        "fastelbo": fastelbo.__version__,
        "revision": git.stdout.strip() or "unknown",
    }


def _processor_seconds() -> tuple[float, float]:
    """Of the whole machine, and of this process with its children. user, nice, system, irq, softirq, stolen."""
    stat = Path("/proc/stat")
    if not stat.exists():
        return math.nan, math.nan
    ticks = [int(text) for text in stat.read_text().split("\n", 1)[0].split()[1:9]]
    ours = os.times()
    return (sum(ticks[:3]) + sum(ticks[5:])) / os.sysconf("SC_CLK_TCK"), sum(ours[:4])


def others_share() -> Callable[[], float]:
    """Call what it returns: the share of all processors that other processes took since. NaN where unknown."""
    start, (machine, ours) = time.perf_counter(), _processor_seconds()

    def share() -> float:
        wall, (machine_now, ours_now) = time.perf_counter() - start, _processor_seconds()
        return max(0.0, (machine_now - machine) - (ours_now - ours)) / (wall * (os.cpu_count() or 1))

    return share


def copy_bandwidth() -> float:
    """Bytes per second, read plus written, of copying one large tensor to another."""
    source, target = torch.zeros(COPIED), torch.zeros(COPIED)
    times = []
    for _ in range(7):
        start = time.perf_counter()
        target.copy_(source)
        times.append(time.perf_counter() - start)
    return 2 * 4 * COPIED / median(times)
