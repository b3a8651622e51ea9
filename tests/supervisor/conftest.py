"""A server with one fake model, and clients of its control socket."""

from collections.abc import Callable, Iterator

import pytest

from common import sockets
from common.states import WorkerState
from tests.supervisor.harness import Client, Server, wait_until


@pytest.fixture
def server() -> Iterator[Server]:
    """Not started yet; it knows a model a."""
    server = Server()
    server.add_model("a")
    yield server
    server.close()


@pytest.fixture
def connect(server: Server) -> Iterator[Callable[..., Client]]:
    """Makes clients that watch."""
    clients: list[Client] = []

    def connect(identity: str = "test") -> Client:
        wait_until((server.home / "run" / sockets.CONTROL_SOCKET).exists, "control socket")
        clients.append(Client(server.home, identity))
        return clients[-1].watch()

    yield connect
    for client in clients:
        client.close()


@pytest.fixture
def client(server: Server, connect: Callable[..., Client]) -> Client:
    """A client of the started server with model a ready."""
    server.start()
    client = connect()
    client.model("a", WorkerState.READY)
    return client
