"""Fits of probabilistic PCA to large data, beside scikit-learn's PCA:

    python -m benchmarks.ppca_scale [--cases dense decaying sparse batches] [--rounds 3]

- dense: N = 20,000, D = 5,000, M = 50, float32, of a model's own; the solver "full", and scikit-learn's randomized one.
- decaying: the same with eigenvalues 1 / i.
- sparse: 100,000 x 20,000 counts, 5 % of them not 0, in CSR; scikit-learn's arpack.
- batches: N = 100,000, D = 20,000, generated anew in every pass.

The contenders take turns in one process; times are medians. Errors are against the float64 eigenvalues and eigenvectors
of the covariance: s2 (scikit-learn's times (N - 1) / N), relative, and the sine of the largest angle between subspaces.
Memory is the peak of the process beyond what there was before the fit.
"""

import argparse
import ctypes
import math
import time
from collections.abc import Callable, Iterator
from statistics import median
from typing import Any

import numpy as np
import scipy.sparse
import torch
from sklearn.decomposition import PCA
from torch import Tensor

from benchmarks.machine import DISTURBED, Peak, anonymous, facts, others_share
from fastelbo import PPCA

M = 50


def dense(N: int = 20_000, D: int = 5_000) -> Tensor:
    torch.manual_seed(0)
    W = torch.randn(D, M) * torch.linspace(2, 1, M)
    return torch.randn(N, M) @ W.mT + torch.randn(N, D) + torch.randn(D)


def decaying(N: int = 20_000, D: int = 5_000) -> Tensor:
    torch.manual_seed(0)
    V = torch.linalg.qr(torch.randn(D, D))[0]
    return torch.randn(N, D) @ (V * torch.arange(1, D + 1).rsqrt()).mT


def sparse(N: int = 100_000, D: int = 20_000) -> Any:
    """Counts of 50 latent factors, of which about 5 % are not 0."""
    numbers = np.random.default_rng(0)
    parts, W = [], numbers.standard_normal((M, D), np.float32)
    for _ in range(0, N, 1000):
        rate = 0.035 * np.exp(0.12 * numbers.standard_normal((1000, M), np.float32) @ W)
        parts.append(scipy.sparse.csr_matrix(numbers.poisson(rate).astype(np.float32)))
    return scipy.sparse.vstack(parts, format="csr")


class Generated:
    """Batches of a model's own data, of float32."""

    def __init__(self, N: int = 100_000, D: int = 20_000, size: int = 1000) -> None:
        self.N, self.D, self.size = N, D, size
        self.W = torch.randn(D, M, generator=torch.Generator().manual_seed(0)) * torch.linspace(2, 1, M)

    def __iter__(self) -> Iterator[Tensor]:
        for i in range(0, self.N, self.size):
            generator = torch.Generator().manual_seed(i)
            x = torch.randn(self.size, self.D, generator=generator)
            yield x.addmm_(torch.randn(self.size, M, generator=generator), self.W.mT)


def exact(X: Tensor) -> tuple[float, Tensor]:
    """s2 and the first eigenvectors, by the covariance in float64."""
    x = X.double()
    values, vectors = torch.linalg.eigh(torch.cov(x.mT, correction=0))
    return float(values[:-M].mean()), vectors[:, -M:]


def of_fastelbo(X: Any, **options: Any) -> tuple[float, Tensor]:
    model = PPCA(M).fit(X, **options)
    assert model.fit_report.converged
    return math.exp(model.log_sigma2.item()), torch.linalg.qr(model.W.detach().double())[0]


def of_sklearn(X: Any, solver: str) -> tuple[float, Tensor]:
    model = PCA(M, svd_solver=solver, random_state=0).fit(X)
    N = X.shape[0]
    return model.noise_variance_ * (N - 1) / N, torch.from_numpy(model.components_.T.copy()).double()


def compare(name: str, contenders: dict[str, Callable[[], tuple[float, Tensor]]], rounds: int, truth: Any) -> None:
    times: dict[str, list[float]] = {contender: [] for contender in contenders}
    text = {}
    for _ in range(rounds):
        for contender, fit in contenders.items():
            ctypes.CDLL(None).malloc_trim(0)  # pages that are free, but not given back, would be used again unseen
            before = anonymous()
            with Peak() as peak:
                start = time.perf_counter()
                sigma2, vectors = fit()
                times[contender].append(time.perf_counter() - start)
            text[contender] = f"{peak.highest - before:.0f} MB"
            if truth is not None:
                off = truth[1] - vectors @ (vectors.mT @ truth[1])
                text[contender] += f" | {abs(sigma2 / truth[0] - 1):.1e} | {torch.linalg.svdvals(off)[0]:.1e}"
    first = next(iter(times))
    for contender, of in times.items():
        ratio = median(a / b for a, b in zip(of, times[first], strict=True))
        print(f"| {name} | {contender} | {median(of):.2f} s | {ratio:.2f}x | {text[contender]} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", default=["dense", "decaying", "sparse", "batches"])
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    print(facts() | {"threads": torch.get_num_threads()})
    print("\n| case | contender | time | ratio | memory | error of s2 | sine |\n|---|---|---|---|---|---|---|")
    share = others_share()
    for name, make in (("dense", dense), ("decaying", decaying)):
        if name in arguments.cases:
            X = make()
            contenders: dict[str, Callable[[], tuple[float, Tensor]]] = {
                "fastelbo": lambda X=X: of_fastelbo(X),  # type: ignore[misc]
                "scikit-learn, randomized": lambda X=X: of_sklearn(X.numpy(), "randomized"),  # type: ignore[misc]
            }
            truth = exact(X)
            compare(name, contenders, arguments.rounds, truth)
            compare(name, {"fastelbo, full": lambda X=X: of_fastelbo(X, solver="full")}, 1, truth)  # type: ignore[misc]
    if "sparse" in arguments.cases:
        S = sparse()
        print(f"| sparse | {S.nnz / 1e6:.0f} million entries, {100 * S.nnz / S.shape[0] / S.shape[1]:.1f} % |")
        both = {"fastelbo": lambda: of_fastelbo(S), "scikit-learn, arpack": lambda: of_sklearn(S, "arpack")}
        compare("sparse", both, 1, None)
    if "batches" in arguments.cases:
        compare("batches", {"fastelbo": lambda: of_fastelbo(Generated(), solver="krylov")}, 1, None)
    busy = 100 * share()
    print(f"\nother processes took {busy:.1f} % of the machine" + " (disturbed)" * (busy > DISTURBED))


if __name__ == "__main__":
    main()
