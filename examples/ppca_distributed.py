"""Fits probabilistic PCA with several processes, each of which holds a part of the rows.

torchrun --nproc-per-node 2 examples/ppca_distributed.py
"""

import torch
import torch.distributed as dist

from fastelbo import PPCA
from fastelbo.commands.data import load


def main() -> None:
    dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    rank, size = dist.get_rank(), dist.get_world_size()
    x = load("patches", "gaussian").train[:].flatten(1)
    mine = x[rank::size]  # a real program would read only these rows
    for method in ("eig", "em"):
        model = PPCA(16).fit(mine, method, group=dist.group.WORLD, generator=torch.Generator().manual_seed(0))
        report = model.fit_report
        assert report is not None
        print(
            f"process {rank} of {size}, {len(mine)} of {report.rows} rows, {method}: log p(x) "
            f"{report.log_likelihood[-1]:.6f} nats per row after {len(report.log_likelihood) - 1} steps",
            flush=True,
        )
    if rank == 0:
        print(f"one process, eig: {PPCA(16).fit(x).score(x):.6f}")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
