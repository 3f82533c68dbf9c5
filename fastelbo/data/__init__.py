"""Data in files and in memory, for training loops, `fastelbo.PPCA.fit` and the `fastelbo` command."""

from fastelbo.data.dataset import Batches, Dataset, open_dataset, open_parts
from fastelbo.data.summary import Summary

__all__ = ["Batches", "Dataset", "Summary", "open_dataset", "open_parts"]
