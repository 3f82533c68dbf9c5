"""Probabilistic PCA: the linear-Gaussian model in which likelihood, posterior and every bound are known exactly."""

from fastelbo.ppca.density import ppca_log_prob
from fastelbo.ppca.model import PPCA
from fastelbo.ppca.result import FitReport, RankError

__all__ = ["PPCA", "FitReport", "RankError", "ppca_log_prob"]
