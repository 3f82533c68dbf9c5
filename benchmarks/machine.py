"""What the figures were measured on, and how fast its memory is."""

import datetime
import os
import re
import subprocess
import time
from pathlib import Path
from statistics import median

import torch

import fastelbo

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


def copy_bandwidth() -> float:
    """Bytes per second, read plus written, of copying one large tensor to another."""
    source, target = torch.zeros(COPIED), torch.zeros(COPIED)
    times = []
    for _ in range(7):
        start = time.perf_counter()
        target.copy_(source)
        times.append(time.perf_counter() - start)
    return 2 * 4 * COPIED / median(times)
