import os

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # read with torch: threads beyond the cores wait, they do not spin

import pytest
import torch


@pytest.fixture(autouse=True)
def _same_start():
    """The same draws whichever tests are chosen. One thread: pytest-xdist uses the others; test_invariance has more."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
