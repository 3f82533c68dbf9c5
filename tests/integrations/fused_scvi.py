"""A pytest plugin that runs scvi-tools' own tests with the fused modules in the place of scvi's.

`make test-scvi` fetches the tests and runs them with it; `--plain` leaves scvi's modules, to compare. `--apply` leaves
them too, and runs the tests of every model within `apply()`.
"""

import pytest
import rich.pretty  # noqa: F401  scvi-tools 1.4.2 uses it without importing it
import scvi

import fastelbo
from fastelbo.integrations.scvi import FusedLDVAE, FusedSCANVAE, FusedVAE, apply

MODULES = {"SCVI": FusedVAE, "SCANVI": FusedSCANVAE, "LinearSCVI": FusedLDVAE}

calls = 0  # of fastelbo.log_prob


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--plain", action="store_true", help="leave scvi's own module in place")
    parser.addoption("--apply", action="store_true", help="leave it, within fastelbo.integrations.scvi.apply()")


def pytest_configure(config: pytest.Config) -> None:
    """Before the tests are imported, which take the names from scvi's packages."""
    if config.getoption("--apply"):
        config.add_cleanup(apply().undo)
    elif not config.getoption("--plain"):
        for name, fused in MODULES.items():
            of = getattr(scvi.model, name)
            setattr(scvi.module, of._module_cls.__name__, fused)
            of._module_cls = fused
    log_prob = fastelbo.log_prob

    def counted(*args: object, **options: object) -> object:
        global calls
        calls += 1
        return log_prob(*args, **options)

    fastelbo.log_prob = counted


def pytest_report_header(config: pytest.Config) -> str:
    applied = ", within apply()" if config.getoption("--apply") else ""
    return f"scvi-tools {scvi.__version__}, module of SCVI: {scvi.model.SCVI._module_cls.__qualname__}{applied}"


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    terminalreporter.write_line(f"calls of fastelbo.log_prob: {calls}")
