"""The machine on which a run was measured, how much other processes used it, and the memory of this one."""

import datetime
import math
import os
import re
import subprocess
import threading
import time
from collections.abc import Callable
from pathlib import Path

import torch

import fastelbo

DISTURBED = 5  # percent of the processors: if other processes use more, the times are not to be relied on


def facts() -> dict[str, str]:
    cpuinfo = Path("/proc/cpuinfo")
    cpu = re.search(r"model name\s*: (.+)", cpuinfo.read_text() if cpuinfo.exists() else "")
    here = Path(__file__).parent
    git = subprocess.run(["git", "-C", here, "describe", "--always", "--dirty"], capture_output=True, text=True)
    return {
        "date": datetime.datetime.now().isoformat(" ", "minutes"),
        "cpu": cpu[1] if cpu else "unknown",
        "cores": str(os.cpu_count()),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else "",
        "load": f"{os.getloadavg()[0]:.1f}",
        "isa": str(fastelbo.build_info()["isa"]),
        "torch": torch.__version__,
        "fastelbo": fastelbo.__version__,
        "revision": git.stdout.strip() or "unknown",
    }


def _processor_seconds() -> tuple[float, float]:
    """Seconds of processor time of the whole machine, and of this process with its children.

    /proc/stat counts user, nice, system, idle, iowait, irq, softirq and stolen time: all but idle and iowait.
    """
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


def anonymous() -> float:
    """RssAnon in MB."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("RssAnon:")[1].split()[0]) / 1e3


class Peak:
    """The highest `anonymous` within a block."""

    def __enter__(self) -> "Peak":
        self.highest, self._done = anonymous(), threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def _watch(self) -> None:
        while not self._done.wait(0.002):
            self.highest = max(self.highest, anonymous())

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()
