"""scvi-tools with the likelihoods of counts computed by fastelbo. One line, for every model:

    fastelbo.integrations.scvi.apply()

or one import, for those that gain more where log p starts from the logarithm of the mean:

    from fastelbo.integrations.scvi import SCVI  # was: from scvi.model import SCVI

Methods, options, seeds and files stay: either class loads the models of the other. A program that must keep its import
gets the same after `scvi.model.SCVI._module_cls = FusedVAE`. Written for scvi-tools 1.4 and 1.5.
"""

from fastelbo.integrations.scvi.distributions import apply
from fastelbo.integrations.scvi.models import (
    PEAKVI,
    SCANVI,
    SCVI,
    FusedLDVAE,
    FusedPEAKVAE,
    FusedSCANVAE,
    FusedVAE,
    LinearSCVI,
)

__all__ = [
    "PEAKVI",
    "SCANVI",
    "SCVI",
    "FusedLDVAE",
    "FusedPEAKVAE",
    "FusedSCANVAE",
    "FusedVAE",
    "LinearSCVI",
    "apply",
]
