"""CellBender's remove-background with its likelihood computed by fastelbo. One line, before the model is trained:

fastelbo.integrations.cellbender.apply()
"""

from typing import Any

import torch
from cellbender.remove_background.distributions.NegativeBinomialPoissonConvApprox import (
    NegativeBinomialPoissonConvApprox,
)
from torch import Tensor

from fastelbo.integrations._replaced import Applied, Replaced, elements, validate
from fastelbo.likelihoods import THETA_LIMIT

__all__ = ["apply"]

SMALL = 1e-5  # CellBender's: beside a background so much larger the cell's counts are none


def _approximate(px: Any, x: Tensor) -> Tensor | None:
    """Negative binomial of the mean m = mu + lam and the theta alpha (m / mu)^2: by moments that of a negative binomial
    plus a Poisson. Where mu is small, the Poisson of lam: the one of the largest theta."""
    validate(px, x)
    mu, lam = torch.broadcast_tensors(px.mu, px.lam)
    empty = mu < SMALL * lam
    mean = mu + lam
    theta = px.alpha * (mean / torch.where(empty, mean, mu)).square()
    found = elements("nb_mean", (torch.where(empty, lam, mean), torch.where(empty, THETA_LIMIT, theta)), x)
    # CellBender's own log_prob names what is NaN
    return None if found is not None and torch.isnan(found.sum()) else found


_REPLACED = Replaced({NegativeBinomialPoissonConvApprox: _approximate})


def apply() -> Applied:
    """CellBender's approximate likelihood is computed by fastelbo from here on, or within `with apply():`.

    log p is the exact one of the approximation, whose theta exceeds 1e9 where the background is large: there the
    lgammas of CellBender's have no digits left in float32, and this is the Poisson. float32 and float64 tensors on the
    CPU, and on CUDA where fastelbo was built for it; others are computed as before.

    Returns:
        An object whose `undo()` ends it; a context manager that does so on exit, also by an exception. Within one
        another the outer one stays on.

    Reference: Fleming et al. 2023.
    """
    return _REPLACED.begin()
