import pytest
import torch


@pytest.fixture(autouse=True)
def _same_start():
    """The same draws whichever tests are chosen. One thread: pytest-xdist uses the others; test_invariance has more."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
