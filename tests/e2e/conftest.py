"""One server that all tests of this folder may share; a test that kills something starts its own."""

import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.e2e.figures import FIGURES
from tests.e2e.server import Serve


@pytest.fixture(scope="session")
def server(demo_model: Path) -> Iterator[Serve]:
    """A server with the demo model loaded, ready to be asked."""
    server = Serve(demo_model)
    try:
        server.wait_ready()
        yield server
        # An orderly end: it lets a measurement of coverage be written.
        assert server.end(signal.SIGTERM) == 0, server.output()
    finally:
        server.close()


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """The reliability figures that this run has measured."""
    rows = list(FIGURES.rows())
    if not rows:
        return
    terminalreporter.section("reliability: goal, measured")
    for name, goal, measured in rows:
        terminalreporter.write_line(f"{name:<4} {goal}")
        terminalreporter.write_line(f"     -> {measured}")
