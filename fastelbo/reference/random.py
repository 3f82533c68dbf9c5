"""The noise of `rsample`: Box-Muller on Philox, a function of the seed and the index of an element."""

import math
from collections.abc import Sequence
from functools import cache

import torch
from torch import Tensor


def exports_to_onnx() -> bool:
    """Whether this is a trace of torch.onnx.export."""
    tracing = torch.compiler.is_exporting() or torch.jit.is_tracing()  # type: ignore[attr-defined, no-untyped-call]
    return tracing and torch.onnx.is_in_onnx_export()  # the latter takes longer than all else that is asked here


def philox(seed: Tensor, index: Tensor) -> Tensor:
    """Philox 4x32-10 (Salmon et al. 2011) of the counters int64 [n] -> int64 [n, 4] in [0, 2^32)."""
    low = 0xFFFFFFFF
    key0, key1 = seed.reshape(()) & low, (seed.reshape(()) >> 32) & low
    c0, c1, c2, c3 = index & low, index >> 32, torch.zeros_like(index), torch.zeros_like(index)
    for _ in range(10):
        p0, p1 = 0xD2511F53 * c0, 0xCD9E8D57 * c2
        c0, c1, c2, c3 = ((p1 >> 32) & low) ^ c1 ^ key0, p1 & low, ((p0 >> 32) & low) ^ c3 ^ key1, p0 & low
        key0, key1 = (key0 + 0x9E3779B9) & low, (key1 + 0xBB67AE85) & low
    return torch.stack([c0, c1, c2, c3], 1)


@cache
def _has_float64(device: torch.device) -> bool:
    try:
        torch.ones((), dtype=torch.float64, device=device).log()
    except (RuntimeError, TypeError):
        return False
    return True


def noise_dtype(device: torch.device) -> torch.dtype:
    """The type in which `normal` computes: float64, or float32 on a device that has no float64."""
    return torch.float64 if device.type in ("cpu", "cuda", "meta") or _has_float64(device) else torch.float32


def normal(seed: Tensor, shape: tuple[int, ...], offset: int = 0) -> Tensor:
    """Standard normal noise, a pure function of (seed, linear index + offset): Box-Muller on Philox, in `noise_dtype`.

    Element e takes number e mod 4 of counter e // 4; the words (a, b) of a pair give r cos t and r sin t with
    r = sqrt(-2 log u), u = (a + 1/2) 2^-32, and t = 2 pi b 2^-32.
    """
    count = math.prod(shape)
    first, last = offset // 4, (offset + count + 3) // 4
    words = philox(seed, torch.arange(first, last, dtype=torch.int64, device=seed.device))
    return _box_muller(words).flatten()[offset - 4 * first :][:count].reshape(shape)


def normal_rows(seed: Tensor, rows: Tensor, size: int) -> Tensor:
    """Rows [n, size] of that noise, float32: row r has the elements r size to (r + 1) size - 1; rows is int64 [n]."""
    index = (rows[:, None] * size + torch.arange(size, device=rows.device)).flatten()
    numbers = _box_muller(philox(seed, index >> 2)).gather(1, (index & 3)[:, None])
    return numbers.reshape(len(rows), size).float()


def draws_by_kernel(seed: Tensor) -> bool:
    return seed.device.type in KERNEL_DEVICES and not exports_to_onnx()


def noise(seed: Tensor, shape: Sequence[int], first_sample: int = 0) -> Tensor:
    """The noise [K, B, *latent] that `rsample` draws, float32: on a device that has kernels theirs, to the bit."""
    if not draws_by_kernel(seed):
        return normal(seed, tuple(shape), first_sample * math.prod(shape[1:])).float()
    size = math.prod(shape[1:])
    rows = torch.arange(first_sample, first_sample + shape[0], device=seed.device)
    return torch.ops.fastelbo._normal_rows(seed, rows, size).reshape(shape)  # type: ignore[no-any-return]


KERNEL_DEVICES: set[str] = set()  # the types of device that have kernels; fastelbo._internal.ops fills it


def _box_muller(words: Tensor) -> Tensor:
    """Two normals of every pair of words: int64 [n, 4] -> [n, 4]."""
    dtype = noise_dtype(words.device)
    a, b = words[:, 0::2], words[:, 1::2]
    # u, or where it is above 1/2 its complement 1 - u, which float32 too holds without a loss of digits
    upper = a >= 1 << 31
    v = (torch.where(upper, 0xFFFFFFFF - a, a).to(dtype) + 0.5) * 2.0**-32
    r = torch.sqrt(-2 * torch.where(upper, torch.log1p(-v), torch.log(v)))
    # t is a number of half turns, each of which is a change of sign, and a rest of at most a quarter turn
    half_turns = (b + (1 << 30)) >> 31
    r = torch.where(half_turns == 1, -r, r)
    t = (b - (half_turns << 31)).to(dtype) * (2 * math.pi * 2.0**-32)
    return torch.stack([r * torch.cos(t), r * torch.sin(t)], 2).flatten(1)
