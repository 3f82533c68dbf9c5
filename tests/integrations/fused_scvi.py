"""A pytest plugin that runs scvi-tools' own tests with the fused module in the place of scvi's.

`make test-scvi` fetches the tests and runs them with it; `--plain` leaves scvi's module, to compare.
"""

import pytest
import rich.pretty  # noqa: F401  scvi-tools 1.4.2 uses it without importing it
import scvi

from fastelbo.integrations.scvi import FusedVAE


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--plain", action="store_true", help="leave scvi's own module in place")


def pytest_configure(config: pytest.Config) -> None:
    """Before the tests are imported, which take the names from scvi's packages."""
    if not config.getoption("--plain"):
        scvi.model.SCVI._module_cls = scvi.module.VAE = FusedVAE


def pytest_report_header(config: pytest.Config) -> str:
    return f"module of SCVI: {scvi.model.SCVI._module_cls.__qualname__}"
