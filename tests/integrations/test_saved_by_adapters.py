"""Files of other packages that hold models of fastelbo.integrations: see tests/packaging/test_saved.py."""

import logging

import pytest
from saved import reading

logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
pytestmark = pytest.mark.filterwarnings("ignore")  # of lightning and scvi: no GPU, few workers, small batches


@pytest.mark.parametrize("name, package", [("lightning.ckpt", "lightning"), ("scvi", "scvi"), ("peakvi", "scvi")])
def test_figures_are_those_of_the_time_of_saving(name: str, package: str) -> None:
    pytest.importorskip(package, reason=f"{package} is not installed: make test-integrations installs it")
    reading.check(name)
