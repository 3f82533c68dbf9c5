"""cell2location with its likelihood computed by fastelbo. One line, before the model is trained:

    fastelbo.integrations.cell2location.apply()

Import this module before cell2location: its release 0.1.5 takes a function from Pyro that Pyro 1.9.2 does not have
where it looks for it, and cannot be imported otherwise.
"""

import functools
from typing import Any

import pyro.infer.autoguide.guides
import pyro.infer.autoguide.utils
from pyro.distributions import GammaPoisson
from torch import Tensor

from fastelbo.integrations._replaced import Applied, Replaced, elements, validate

__all__ = ["apply"]


def _deep_getattr(of: Any, name: str) -> Any:
    """Pyro's, of versions before 1.9."""
    return functools.reduce(getattr, name.split("."), of)


_module: Any
for _module in (pyro.infer.autoguide.guides, pyro.infer.autoguide.utils):
    if not hasattr(_module, "deep_getattr"):
        _module.deep_getattr = _deep_getattr


def _gamma_poisson(px: Any, x: Tensor) -> Tensor | None:
    validate(px, x)
    return elements("gamma_poisson", (px.concentration, px.rate), x)


_REPLACED = Replaced({GammaPoisson: _gamma_poisson})


def apply() -> Applied:
    """Pyro's GammaPoisson, which is cell2location's likelihood, computes log_prob by fastelbo from here on, or within
    `with apply():`; its regression model of reference signatures too, and every other Pyro model that has such a site.

    log p is the exact one, where Pyro's has the rounding of three lgammas: in float32 up to 1 nat per element at a
    concentration of 1e6. float32 and float64 tensors on the CPU, and on CUDA where fastelbo was built for it; others
    are computed as before.

    Returns:
        An object whose `undo()` ends it; a context manager that does so on exit, also by an exception. Within one
        another the outer one stays on.

    Reference: Kleshchevnikov et al. 2022.
    """
    return _REPLACED.begin()
