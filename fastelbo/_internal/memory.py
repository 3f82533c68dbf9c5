"""Whether something fits in memory, before any is taken."""

import os
from collections.abc import Callable

import torch
from torch import nn


def check(needed: float, what: str, device: torch.device | None = None) -> None:
    """ValueError where so many bytes are more than all memory; `what` begins the message."""
    there = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if device is not None and device.type == "cuda":
        there = min(there, torch.cuda.get_device_properties(device).total_memory)
    if needed > there:
        raise ValueError(f"{what} at least {needed / 1e9:.4g} GB; there are {there / 1e9:.4g} GB")


def check_training(build: Callable[[], nn.Module], device: torch.device, sizes: str) -> None:
    """ValueError where the model that `build` makes, its gradients and Adam's moments take more than all memory.

    sizes: what the message says of the model.
    """
    try:
        with torch.device("meta"):
            needed = 4 * sum(p.numel() * p.element_size() for p in build().parameters())
    except (RuntimeError, TypeError):  # a size beyond int64
        needed = 2**63
    check(needed, f"{sizes} must fit in memory: weights, gradients and Adam's moments take", device)
