"""Data sets that need no download: bundled with scikit-learn, or generated."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from fastelbo.likelihoods import Domain
from fastelbo.losses import likelihood_sample

PATCH = 8  # side of an image patch, in pixels

Part = tuple[Tensor, Tensor | None]  # x and labels


def _digits() -> Part:
    """1797 handwritten digits of 8 x 8 pixels, in [0, 1]."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    return torch.from_numpy(digits.images).float() / 16, torch.from_numpy(digits.target)


def _patches() -> Part:
    """8480 grey patches of 8 x 8 pixels that tile two photographs, each with mean 0 and its contrast normalized.

    (p - mean(p)) / sqrt(var(p) + 10) on grey levels of 0 to 255 (Coates, Lee & Ng 2011).
    """
    from sklearn.datasets import load_sample_images

    tiles = []
    for image in load_sample_images().images:
        grey = torch.tensor(image, dtype=torch.float64).mean(2)
        tiles.append(grey.unfold(0, PATCH, PATCH).unfold(1, PATCH, PATCH).reshape(-1, PATCH, PATCH))
    patches = torch.cat(tiles)
    variance, mean = torch.var_mean(patches, (1, 2), keepdim=True)
    return ((patches - mean) / torch.sqrt(variance + 10)).float(), None


def counts_model(cells: int = 2000, genes: int = 200, rank: int = 4, seed: int = 0) -> tuple[Tensor, Tensor]:
    """log_mean [cells, genes] and log_theta [genes], float64, of the negative binomial that "counts" are drawn from.

    log mean = log s_n + b_d + z_n w_d, of library size s_n, a gene's b_d and w_d, and z_n ~ N(0, I) of `rank`
    dimensions; log theta is uniform between -1 and 2.
    """
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, dtype=torch.float64, generator=generator)

    log_library, gene = 0.4 * normal(cells, 1), 1.2 * normal(genes) - 1.2
    log_mean = log_library + gene + normal(cells, rank) @ (0.5 * normal(rank, genes))
    return log_mean, 3 * torch.rand(genes, dtype=torch.float64, generator=generator) - 1


def _counts() -> Part:
    """Counts of `counts_model`: 2000 cells, 200 genes, 69 % zeros."""
    drawn = likelihood_sample(counts_model(), "nb", generator=torch.Generator().manual_seed(1))
    return drawn.to(torch.int32), None


class BuiltIn(NamedTuple):
    """A data set that needs no file."""

    read: Callable[[], Part]
    domain: Domain
    generated: str | None = None  # from what, if it is not measured


_MODEL = "negative binomial, log means of rank 4, a library size per cell, a theta per gene"
BUILT_IN = {
    "digits": BuiltIn(_digits, "[0, 1]"),
    "patches": BuiltIn(_patches, "reals"),
    "counts": BuiltIn(_counts, "counts", _MODEL),
}
