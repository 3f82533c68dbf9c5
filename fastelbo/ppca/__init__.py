"""Probabilistic PCA: the linear-Gaussian model in which likelihood, posterior and every bound are known exactly."""

from fastelbo.ppca.density import ppca_log_prob
from fastelbo.ppca.fit import FitReport
from fastelbo.ppca.model import PPCA

__all__ = ["PPCA", "FitReport", "ppca_log_prob"]
