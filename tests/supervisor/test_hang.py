"""Workers that hang, as processes: stopped by a signal, or with a loop that stands still while a thread talks."""

import os
import signal
import time
from collections.abc import Callable

from common.states import WorkerState
from tests.supervisor.harness import Client, Server

S = WorkerState
HANG_S = 1.6


def start(server: Server, connect: Callable[..., Client], **behaviour: object) -> Client:
    server.configure(hang_timeout_s=HANG_S, compile_timeout_s=30.0)
    server.behave("a", **behaviour)
    server.start()
    client = connect()
    client.model("a", S.READY)
    return client


def test_loop_that_stands_still_is_ended_with_its_stack_in_the_log(
    server: Server, connect: Callable[..., Client]
) -> None:
    client = start(server, connect)
    began = time.monotonic()
    server.behave("a", stuck_at=3, phase="step")
    client.until(lambda t: t.models[0].restarts == 1, "restart")
    assert time.monotonic() - began < 10
    server.behave("a")
    assert client.model("a", S.READY, restarts=1).detail == ""
    assert "hung: its loop stood still for" in server.output()
    assert "Current thread" in (server.home / "logs" / "worker-a.log").read_text()


def test_stopped_worker_is_killed_and_replaced(server: Server, connect: Callable[..., Client]) -> None:
    client = start(server, connect)
    (worker,) = client.model("a", S.READY).workers
    os.kill(worker.pid, signal.SIGSTOP)
    entry = client.model("a", S.READY, restarts=1)
    assert entry.workers[0].pid != worker.pid
    assert "hung: its loop stood still" in server.output()


def test_silence_while_compiling_is_no_hang(server: Server, connect: Callable[..., Client]) -> None:
    client = start(server, connect)
    server.behave("a", phase="compile", stuck_at=3)
    entry = client.model("a", S.READY)
    client.until(lambda t: t.models[0].workers[0].phase == "compile", "phase")
    os.kill(entry.workers[0].pid, signal.SIGSTOP)
    time.sleep(2 * HANG_S)
    os.kill(entry.workers[0].pid, signal.SIGCONT)
    server.behave("a")
    client.until(lambda t: t.models[0].workers[0].phase == "idle", "end of compiling")
    assert client.model("a", S.READY).restarts == 0


def test_frozen_supervisor_blames_nobody(server: Server, connect: Callable[..., Client]) -> None:
    client = start(server, connect)
    server.signal(signal.SIGSTOP)
    time.sleep(2 * HANG_S)
    server.signal(signal.SIGCONT)
    time.sleep(2 * HANG_S)  # time to misjudge
    assert client.model("a", S.READY).restarts == 0
