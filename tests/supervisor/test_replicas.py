"""Several workers of one model, as processes."""

import os
import signal
from collections.abc import Callable

from common.messages import ModelTable
from common.states import WorkerState
from tests.supervisor.harness import Client, Server, find

S = WorkerState
QUARTER_GIB = 2**28


def replicas(server: Server, count: int, **more: float) -> str:
    server.configure(f'\n[models.a]\npath = "a"\nreplicas = {count}\n', **more)
    return "a"


def ready(count: int) -> Callable[[ModelTable], bool]:
    return lambda table: [w.state for w in find(table, "a").workers] == count * [S.READY]


def test_all_replicas_are_listed_and_a_dead_one_is_replaced(server: Server, connect: Callable[..., Client]) -> None:
    replicas(server, 3)
    server.start()
    client = connect()
    entry = find(client.until(ready(3), "three workers"), "a")
    assert entry.replicas == 3
    assert len({w.pid for w in entry.workers}) == len({w.token for w in entry.workers}) == 3
    assert {w.identity for w in entry.workers} == {"a#1", "a#2", "a#3"}
    os.kill(entry.workers[1].pid, signal.SIGKILL)
    client.until(lambda t: find(t, "a").restarts == 1, "restart")
    assert find(client.tables[-1], "a").state is S.READY
    table = client.until(ready(3), "three workers again")
    assert {w.identity for w in find(table, "a").workers} == {"a#1", "a#3", "a#4"}


def test_unload_ends_all_replicas(server: Server, connect: Callable[..., Client]) -> None:
    replicas(server, 2)
    server.start()
    client = connect()
    client.until(ready(2), "two workers")
    assert client.unload("a").code == ""
    assert client.model("a", S.STOPPED).workers == ()


def test_replica_without_room_waits_and_holds_up_nobody(server: Server, connect: Callable[..., Client]) -> None:
    for name in ("a", "b"):
        server.add_model(name, footprint=QUARTER_GIB)
    replicas(server, 4, memory_limit_gb=0.7)
    server.start()
    client = connect()
    client.until(ready(2), "two workers, for which there is room")
    client.ensure("b")
    client.model("b", S.READY)
    assert client.model("a", S.STOPPED).workers == ()
