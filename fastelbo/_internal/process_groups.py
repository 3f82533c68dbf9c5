"""Collective operations over the processes of a torch.distributed group."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

_V = TypeVar("_V", bound=int | float | str)


class Processes:
    """The processes of a group, all of which must call each method; without a group, this process alone."""

    def __init__(self, group: "ProcessGroup | None") -> None:
        kind: Any = getattr(dist, "ProcessGroup", ())
        if group is not None and not isinstance(group, kind):
            raise TypeError(f"group must be a torch.distributed group or None; got {type(group).__name__}")
        self.group = group
        self.rank = 0 if group is None else dist.get_rank(group)
        self.size = 1 if group is None else dist.get_world_size(group)

    @classmethod
    def world(cls) -> "Processes":
        """The processes of the default group, where there is one."""
        return cls(dist.group.WORLD if dist.is_available() else None)

    @property
    def device(self) -> torch.device:
        """Where the tensors of a process must be that has no data to be with."""
        cuda = self.group is not None and dist.get_backend(self.group) == "nccl"
        return torch.device("cuda", torch.cuda.current_device()) if cuda else torch.device("cpu")

    def sum(self, *tensors: Tensor) -> None:
        """In place: the sums over all processes, bit by bit the same in each."""
        if self.group is not None:
            for t in tensors:
                dist.all_reduce(t, group=self.group)

    def broadcast(self, *tensors: Tensor) -> None:
        """In place: the tensors of the first process, in every process."""
        if self.group is not None:
            for t in tensors:
                dist.broadcast(t, group=self.group, group_src=0)

    def gather(self, value: object) -> list[Any]:
        """The value of every process, in the order of their ranks; tensors within must be on the CPU."""
        if self.group is None:
            return [value]
        found: list[Any] = [None] * self.size
        dist.all_gather_object(found, value, self.group)
        return found

    def agree(self, name: str, value: _V | None) -> _V | None:
        """The value, a number or a name, which must be the same in every process that has one."""
        found = [v for v in self.gather(value) if v is not None]
        if len(set(found)) > 1:
            first, *_, last = sorted(set(found), key=lambda v: (isinstance(v, str), v))
            raise ValueError(
                f"{name} must be the same in every process of the group; they have {first} to {last}, this one {value}"
            )
        return found[0] if found else None

    def concatenate(self, rows: Tensor) -> Tensor:
        """The rows [n, ...] of all processes, of which each may have another number, in the order of their ranks."""
        if self.group is None:
            return rows
        counts = self.gather(len(rows))
        padded = torch.cat([rows, rows.new_zeros(max(counts) - len(rows), *rows.shape[1:])])
        parts = [torch.empty_like(padded) for _ in counts]
        dist.all_gather(parts, padded, group=self.group)
        return torch.cat([part[:count] for part, count in zip(parts, counts, strict=True)])

    @contextmanager
    def together(self) -> Iterator[None]:
        """An error that one process raises in the block is raised in all, so that none waits for another forever."""
        error: Exception | None = None
        try:
            yield
        except Exception as e:
            error = e
        if any(self.gather(error is not None)):
            raise error or ValueError("X is refused by another process of the group, which says why")
