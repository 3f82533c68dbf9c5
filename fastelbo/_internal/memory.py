"""Whether a model fits in memory, before any is taken."""

import os
from collections.abc import Callable

import torch
from torch import nn


def check_training(build: Callable[[], nn.Module], device: torch.device, sizes: str) -> None:
    """ValueError where the model that `build` makes, its gradients and Adam's moments take more than all memory.

    sizes: what the message says of the model.
    """
    there = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if device.type == "cuda":
        there = min(there, torch.cuda.get_device_properties(device).total_memory)
    try:
        with torch.device("meta"):
            needed = 4 * sum(p.numel() * p.element_size() for p in build().parameters())
    except (RuntimeError, TypeError):  # a size beyond int64
        needed = 2**63
    if needed > there:
        raise ValueError(
            f"{sizes} must fit in memory: weights, gradients and Adam's moments take at least {needed / 1e9:.4g} GB; "
            f"there are {there / 1e9:.4g} GB"
        )
