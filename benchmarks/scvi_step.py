"""A training step of scvi-tools' SCVI with and without fastelbo, in the environment of `make test-integrations`:

    .venv-integrations/bin/python -m benchmarks.scvi_step [--genes 4000 20000] [--threads 1 2] [--likelihoods nb zinb]

A step is zero_grad, forward, loss, backward and Adam's fused step, on a batch of 128 cells with scvi's default
networks. The contenders take turns in one process, in random order; times are medians over rounds, and a ratio is the
median of the ratios within a round. Beside it: the last part of the decoder alone, and an epoch of `SCVI.train`.
"""

import argparse
import copy
import logging
import os
import time
import warnings
from collections.abc import Callable
from functools import partial

import anndata
import scvi
import torch
import torch.nn.functional as F
from scvi.module import VAE
from torch import Tensor

from benchmarks.machine import DISTURBED, facts, others_share
from benchmarks.turns import Step, measured, report
from fastelbo.integrations.scvi import SCVI, FusedVAE
from fastelbo.likelihoods import SCVI_ADDED

BATCH = 128
ADAM = {"lr": 1e-3, "eps": 0.01, "weight_decay": 1e-6}  # scvi's


def counts(cells: int, genes: int) -> Tensor:
    """[cells, genes]: negative binomial of theta 2, where most means are far below 1, as in single-cell data."""
    generator = torch.Generator().manual_seed(0)
    mean = torch.exp(1.5 * torch.randn(genes, generator=generator) - 2)
    rate = torch._standard_gamma(torch.full((cells, genes), 2.0), generator=generator) / 2 * mean
    x = torch.poisson(rate, generator=generator)
    x[:, 0] += 1  # no cell is empty
    return x


# ----------------------------------------------------------------------------------------------------------------------
# What is measured.


def training_step(module: VAE, tensors: dict[str, Tensor], loss: Callable[..., object] | None = None) -> Step:
    optimizer = torch.optim.Adam(module.parameters(), fused=True, **ADAM)
    loss = loss or module.loss

    def step() -> None:
        optimizer.zero_grad()
        inference, generative = module(tensors, compute_loss=False)
        loss(tensors, inference, generative, kl_weight=0.5).loss.backward()
        optimizer.step()

    return step


def steps_of(likelihood: str, genes: int, with_compile: bool) -> dict[str, Step]:
    x = counts(BATCH, genes)
    index = torch.zeros(BATCH, 1, dtype=torch.long)
    tensors = {"X": x, "batch": index, "labels": index}
    torch.manual_seed(0)
    plain = VAE(genes, n_batch=1, gene_likelihood=likelihood)
    fused = FusedVAE(genes, n_batch=1, gene_likelihood=likelihood)
    fused.load_state_dict(plain.state_dict())
    losses = []
    for module in (plain, fused):  # the two do the same
        torch.manual_seed(1)
        losses.append(module(tensors)[2].loss.item())
    assert abs(losses[0] - losses[1]) < 1e-4 * abs(losses[0]), losses
    steps = {"fastelbo": training_step(fused, tensors), "scvi": training_step(plain, tensors)}
    if with_compile:
        module = copy.deepcopy(plain)
        step = training_step(module, tensors, torch.compile(module.loss, dynamic=False))
        try:
            step()
            steps["scvi, compiled loss"] = step
        except Exception as error:
            print(f"torch.compile of scvi's loss: {type(error).__name__}: {str(error).splitlines()[0]}")
    return steps


def scale_tail(logits: Tensor, library: Tensor) -> Tensor:
    """log(mu + eps) as scvi comes to it; its loss needs mu as well."""
    return torch.log(torch.exp(library) * torch.softmax(logits, dim=-1) + SCVI_ADDED)


def log_tail(logits: Tensor, library: Tensor) -> Tensor:
    return library + F.log_softmax(logits, dim=-1)


def tails_of(genes: int) -> dict[str, Step]:
    """From the decoder's logits [B, G] to log mu, forward and backward."""
    logits, library = torch.randn(BATCH, genes, requires_grad=True), torch.full((BATCH, 1), 8.0)
    upstream = torch.randn(BATCH, genes)

    def step(tail: Callable[[Tensor, Tensor], Tensor]) -> None:
        logits.grad = None
        tail(logits, library).backward(upstream)

    return {"log_softmax": partial(step, log_tail), "softmax, exp, log": partial(step, scale_tail)}


def train_epochs(likelihood: str, genes: int, cells: int, rounds: int) -> dict[str, list[float]]:
    """Seconds per epoch of SCVI.train, data loading and logging included."""
    adata = anndata.AnnData(counts(cells, genes).numpy())
    models = {}
    for name, cls in (("fastelbo", SCVI), ("scvi", scvi.model.SCVI)):
        cls.setup_anndata(adata)
        models[name] = cls(adata, gene_likelihood=likelihood)
    times: dict[str, list[float]] = {name: [] for name in models}
    for turn in range(rounds + 1):
        for name, model in models.items():
            start = time.perf_counter()
            model.train(max_epochs=1, accelerator="cpu", enable_progress_bar=False, logger=False)
            if turn:  # the first is a warm-up
                times[name].append(time.perf_counter() - start)
    return times


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--genes", type=int, nargs="+", default=[4000, 20_000])
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--likelihoods", nargs="+", default=["nb", "zinb"])
    parser.add_argument("--seconds", type=float, default=8, help="per case (default: 8)")
    parser.add_argument("--cells", type=int, default=2560, help="of the data set for SCVI.train; 0: without it")
    parser.add_argument("--no-compile", action="store_true", help="without torch.compile of scvi's loss")
    arguments = parser.parse_args()

    warnings.filterwarnings("ignore")  # lightning's, about a missing GPU and few workers
    for name in ("lightning.pytorch", "lightning.fabric", "torch._dynamo", "scvi"):
        logging.getLogger(name).setLevel(logging.ERROR)
    allocator = {name: value for name, value in os.environ.items() if name.startswith("MALLOC_")}
    print(facts() | {"scvi-tools": scvi.__version__, "allocator": allocator or "default"})
    print(f"\nB = {BATCH}, 128 hidden, 10 latent dimensions, float32. In brackets: times as long as the first\n")
    share = others_share()
    for threads in arguments.threads:
        torch.set_num_threads(threads)
        for genes in arguments.genes:
            where = f"{genes} genes, {threads} thread{'s' * (threads > 1)}"
            for likelihood in arguments.likelihoods:
                steps = steps_of(likelihood, genes, not arguments.no_compile)
                report(f"step, {likelihood}, {where}", measured(steps, arguments.seconds), "fastelbo")
            report(f"decoder's tail, {where}", measured(tails_of(genes), arguments.seconds / 4), "log_softmax")
            if arguments.cells:
                for likelihood in arguments.likelihoods:
                    times = train_epochs(likelihood, genes, arguments.cells, 3)
                    report(f"epoch of {arguments.cells} cells, {likelihood}, {where}", times, "fastelbo", "s")
    busy = 100 * share()
    print(f"\nother processes took {busy:.1f} % of the machine" + " (disturbed)" * (busy > DISTURBED))


if __name__ == "__main__":
    main()
