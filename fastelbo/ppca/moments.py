"""Means and variances of weighted rows, summed over batches and over processes in float64.

What is kept between batches are moments about a mean (Chan, Golub & LeVeque 1983), so that nothing cancels where the
mean is large. Weights have a ratio's meaning: what is summed is a share of their sum, so that neither small nor large
ones leave float64's range.
"""

from typing import Any

import torch
from torch import Tensor

from fastelbo._internal.process_groups import Processes
from fastelbo.ppca.data import Dataset, dense
from fastelbo.ppca.sparse import Rows
from fastelbo.reference import read_data

SUMMED_ELEMENTS = 1 << 19


class Moments:
    """Rows, sum of their weights, mean and covariance."""

    def __init__(self, D: int, device: torch.device) -> None:
        self.rows, self.count = torch.zeros(2, dtype=torch.float64, device=device)
        self.mean = torch.zeros(D, dtype=torch.float64, device=device)
        self.covariance = torch.zeros(D, D, dtype=torch.float64, device=device)

    def __setstate__(self, state: dict[str, Any]) -> None:
        if "scatter" in state:  # of an older pickle: the sums
            state["covariance"] = state.pop("scatter") / state["count"]
        self.__dict__.update(state)

    def update(self, x: Tensor, weight: Tensor) -> None:
        """Add rows x [n, D], n at least 1, with weights [n]."""
        r, n = read_data(x, torch.float64), weight.sum()
        mean, count = (weight / n) @ r, self.count + n
        old, new, delta = self.count / count, n / count, mean - self.mean
        r = (r - mean) * (weight / count).sqrt()[:, None]
        self.rows, self.count, self.mean = self.rows + len(r), count, self.mean + delta * new
        self.covariance.mul_(old).addmm_(r.mT, r).addr_(old * new * delta, delta)

    def reduce(self, processes: Processes) -> None:
        """In place: the moments of the rows of all processes."""
        ours, mean = self.count.clone(), self.mean
        processes.sum(self.rows, self.count)
        share = ours / self.count
        self.mean = share * mean
        processes.sum(self.mean)
        delta = mean - self.mean
        self.covariance.addr_(delta, delta).mul_(share)
        processes.sum(self.covariance)


class Sums:
    """Of the columns of weighted rows."""

    def __init__(self) -> None:
        self._total: Tensor | float = 0.0
        self._count = 0.0

    def update(self, x: Tensor | Rows, weight: Tensor) -> None:
        """Add rows x [n, D] with weights [n]."""
        if isinstance(x, Rows):
            self._count += float(weight.sum())
            self._total = self._total + x.transposed_matmul(weight[:, None])[:, 0]
            return
        x = x if x.is_floating_point() else read_data(x, torch.float32)
        equal = weight.stride(0) == 0
        self._count += float(weight.sum())
        size = max(1, SUMMED_ELEMENTS // x.shape[1])  # torch's sum of larger ones in float64 takes seven times as long
        for part, w in zip(x.split(size), weight.split(size), strict=True):
            self._total = self._total + (w[0] * part.sum(0, dtype=torch.float64) if equal else w @ part.double())

    def mean(self, dataset: Dataset) -> Tensor:
        """Of the rows of all processes [D]."""
        total = self._total + torch.zeros(dataset.D, dtype=torch.float64, device=dataset.device)
        count = total.new_tensor(self._count)
        dataset.processes.sum(total, count)
        return total / count


def column_moments(dataset: Dataset) -> tuple[Tensor, Tensor]:
    """Of observed cells, in a first pass: the mean of every column [D], and the mean of their variances [].

    Raises:
        ValueError: as `Dataset.first_pass`; a column without an observed cell.
    """
    before: list[Tensor] = []
    for x, weight in dense(dataset.first_pass()):
        r, cells = read_data(x, torch.float64), weight[:, None]  # [n, 1] of complete rows, which takes less time
        if bool(x.isnan().any()):
            r, cells = torch.nan_to_num(r), ~x.isnan() * cells
        count = cells.sum(0)
        share = _share(cells, count)
        mean = (r * share).sum(0)
        variance = ((r - mean).square_() * share).sum(0)
        before = [_pooled([*before, torch.stack([count.expand_as(mean), mean, variance])])]
    parts = dataset.processes.gather([part.cpu() for part in before])
    count, mean, variance = _pooled([part.to(dataset.device) for process in parts for part in process])
    if (never := torch.nonzero(count == 0).flatten().tolist()) != []:
        raise ValueError(f"X must have an observed cell in every column; none in {', '.join(map(str, never))}")
    return mean, (count / count.sum()) @ variance


def _pooled(parts: list[Tensor]) -> Tensor:
    """Sum of the weights, mean and variance [3, D] of the cells of all parts, of which each has the same."""
    count, mean, variance = torch.stack(parts, 1)
    total = count.sum(0)
    share = _share(count, total)
    center = (share * mean).sum(0)
    return torch.stack([total, center, (share * (variance + (mean - center).square())).sum(0)])


def _share(part: Tensor, whole: Tensor) -> Tensor:
    """part / whole, 0 of nothing"""
    return torch.where(whole > 0, part / whole, 0.0)
