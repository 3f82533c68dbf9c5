import os

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # read with torch: threads beyond the cores wait, they do not spin

import pytest
import torch


@pytest.fixture(autouse=True)
def _same_start():
    """The same draws whichever tests are chosen. One thread: pytest-xdist uses the others; test_invariance has more."""
    torch.set_num_threads(1)
    torch.manual_seed(0)


HIDES = {"test_threads.py", "test_invariance.py", "test_ordered.py"}  # what torch's deterministic algorithms would


@pytest.fixture(autouse=True)
def _fresh_memory_is_nan(request):
    """In the tests of the ops, memory of torch.empty and at::empty is NaN until it is written: no sanitizer sees that.

    torch does it with its deterministic algorithms.
    """
    wanted = request.path.parent.name == "ops" and request.path.name not in HIDES
    torch.use_deterministic_algorithms(wanted)
    assert not wanted or torch.empty(5).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def double():
    """New tensors are float64."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)
