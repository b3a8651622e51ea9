"""One server that all tests of this folder may share; a test that kills something starts its own."""

import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

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
