"""The supervisor as a process: real sockets, real children, a fake worker and router."""

import json
import os
import signal
import time
from collections.abc import Callable
from contextlib import suppress

import psutil
import pytest

from common import sockets
from common.messages import EnsureModel, Heartbeat, Pin, StateChanged, Status, Unload, WorkerHello
from common.states import WorkerState
from tests.supervisor.harness import Client, Server, find, wait_until

S = WorkerState
QUARTER_GIB = 2**28  # what the supervisor charges for a process without weights
BUDGET_FOR_TWO_GB = 0.7


def test_default_model_is_loaded_and_announced(server: Server, client: Client) -> None:
    entry = client.model("a", S.READY)
    assert entry.facts is not None
    (worker,) = entry.workers
    assert worker.identity == "a#1"
    assert psutil.pid_exists(worker.pid)
    assert client.tables[-1].default_model == "a"
    wait_until(lambda: "curl" in server.output(), "announcement")
    assert "a ready in 0.0 s (float32" in server.output()
    assert [n.split()[-1] for n in server.notes("a")][:2] == ["spawned", "SetLimits"]
    revisions = [table.revision for table in client.tables]
    assert revisions == sorted(revisions)


def test_killed_worker_is_noticed_at_once_and_replaced(client: Client) -> None:
    for restarts in (1, 2):
        (worker,) = client.model("a", S.READY).workers
        os.kill(worker.pid, signal.SIGKILL)
        died_at = time.monotonic()
        client.model("a", S.STARTING, S.LOADING, S.READY, restarts=restarts)
        assert time.monotonic() - died_at < 0.5  # 100 ms on an idle machine
        entry = client.model("a", S.READY, restarts=restarts)
        assert entry.workers[0].identity == f"a#{restarts + 1}"
        assert entry.workers[0].token != worker.token
        assert entry.detail == ""


def test_worker_that_keeps_dying_backs_off_and_never_gives_up(server: Server, client: Client) -> None:
    server.behave("a", exit_on_load=1, reason="tired")
    os.kill(client.model("a", S.READY).workers[0].pid, signal.SIGKILL)
    entry = client.model("a", S.BACKOFF)
    assert "model cannot be used: tired" in entry.detail
    assert entry.retry_after_s is not None
    assert 0.2 <= entry.retry_after_s <= 0.4
    client.until(lambda t: find(t, "a").restarts >= 5, "fifth restart")
    server.behave("a")
    client.model("a", S.READY)
    spawned = [float(n.split()[0]) for n in server.notes("a") if n.endswith("spawned")]
    assert spawned[4] - spawned[3] >= 0.2


def test_model_that_cannot_work_fails_with_its_detail_until_it_changes(
    server: Server, connect: Callable[..., Client]
) -> None:
    server.behave("a", exit_on_load=3, reason="weights are missing")
    server.start()
    client = connect()
    assert client.model("a", S.FAILED).detail == "model cannot be used: weights are missing"
    reply = client.ensure("a")
    assert (reply.code, "weights are missing" in reply.message) == ("model_unavailable", True)
    assert len(server.notes("a")) == 1
    wait_until(lambda: "a cannot be loaded: model cannot be used" in server.output(), "message")
    server.behave("a")
    assert client.ensure("a").code == ""
    client.model("a", S.READY)


def test_out_of_memory_fails_until_there_is_more(server: Server, connect: Callable[..., Client]) -> None:
    server.add_model("b", exit_on_load=4, reason="no memory")
    server.start()
    client = connect()
    client.model("a", S.READY)
    client.ensure("b")
    client.model("b", S.FAILED)
    assert client.ensure("b").code == "model_unavailable"
    client.unload("a")
    assert client.ensure("b").code == ""
    wait_until(lambda: len([n for n in server.notes("b") if n.endswith("spawned")]) == 2, "second try")


def test_two_waiters_share_one_worker(server: Server, client: Client, connect: Callable[..., Client]) -> None:
    server.add_model("b", load_s=0.3)
    other = connect("other")
    calls = [client.ask(EnsureModel, name="b") for _ in range(3)]
    assert other.ensure("b").code == ""
    assert all(client.reply(call).code == "" for call in calls)
    client.model("b", S.READY)
    assert client.ensure("b").code == ""
    assert len([n for n in server.notes("b") if n.endswith("spawned")]) == 1
    assert client.states("b")[-3:] == [S.STARTING, S.LOADING, S.READY]


def test_unload_is_answered_when_the_process_is_gone(server: Server, client: Client) -> None:
    server.behave("a", drain_s=0.3)
    (worker,) = client.model("a", S.READY).workers
    os.kill(worker.pid, signal.SIGKILL)  # the next one drains slowly
    (worker,) = client.model("a", S.READY, restarts=1).workers
    asked_at = time.time()
    call = client.ask(Unload, name="a")
    client.model("a", S.DRAINING)
    assert call not in client.replies
    assert client.reply(call).code == ""
    assert not psutil.pid_exists(worker.pid)
    assert time.time() - asked_at >= 0.3
    entry = client.model("a", S.STOPPED)
    assert entry.workers == ()
    assert client.unload("a").code == ""
    assert client.ensure("a").code == ""
    client.model("a", S.READY)


def test_unload_while_loading_ends_the_worker(server: Server, client: Client) -> None:
    server.add_model("b", load_s=30)
    client.ensure("b")
    client.model("b", S.LOADING)
    assert client.unload("b").code == ""
    client.model("b", S.STOPPED)


def test_worker_that_does_not_go_is_killed(server: Server, connect: Callable[..., Client]) -> None:
    server.behave("a", ignores_exit=True)
    server.start()
    client = connect()
    os.kill(client.model("a", S.READY).workers[0].pid, signal.SIGSTOP)
    asked_at = time.monotonic()
    assert client.unload("a").code == ""
    assert time.monotonic() - asked_at < 1.0 + 0.5 + 1.5  # drain, stop, margin


def test_worker_that_says_no_hello_is_killed(server: Server, connect: Callable[..., Client]) -> None:
    server.configure(start_timeout_s=1.0)
    server.behave("a", mute=True)
    server.start()
    client = connect()
    client.until(lambda t: find(t, "a").restarts == 1, "restart")
    assert "said no hello within 1 s" in find(client.tables[-1], "a").detail
    server.behave("a")
    client.model("a", S.READY)


def test_worker_of_another_protocol_fails(server: Server, connect: Callable[..., Client]) -> None:
    server.behave("a", version=99)
    server.start()
    assert "speaks protocol 99" in connect().model("a", S.FAILED).detail


def test_least_recently_used_model_makes_room(server: Server, connect: Callable[..., Client]) -> None:
    server.configure(memory_limit_gb=BUDGET_FOR_TWO_GB)
    for name in ("a", "b", "c"):
        server.add_model(name, footprint=QUARTER_GIB)
    server.start()
    client = connect()
    client.model("a", S.READY)
    client.ensure("b")
    client.model("b", S.READY)
    server.behave("a", footprint=QUARTER_GIB, finished=1)  # a was used after b
    server.behave("b", footprint=QUARTER_GIB, finished=1)
    time.sleep(0.2)
    server.behave("a", footprint=QUARTER_GIB, finished=2)
    time.sleep(0.2)
    client.ensure("c")
    client.model("c", S.READY)
    assert find(client.tables[-1], "a").state is S.READY
    assert find(client.tables[-1], "b").state is S.STOPPED
    assert [n.split()[-1] for n in server.notes("b")][-1] == "Drain"


def test_busy_and_pinned_models_are_not_evicted(server: Server, connect: Callable[..., Client]) -> None:
    server.configure(memory_limit_gb=BUDGET_FOR_TWO_GB)
    server.add_model("a", footprint=QUARTER_GIB, running=1)
    server.add_model("b", footprint=QUARTER_GIB, finished=1)
    server.add_model("c", footprint=QUARTER_GIB)
    server.start()
    client = connect()
    client.model("a", S.READY)
    assert client.reply(client.ask(Pin, name="b", pinned=True)).code == ""
    client.model("b", S.READY)
    client.ensure("c")
    client.until(lambda t: "waits for memory" in find(t, "c").detail, "waiting")
    assert "busy or pinned: a, b" in find(client.tables[-1], "c").detail
    client.reply(client.ask(Pin, name="b", pinned=False))
    client.model("c", S.READY)
    assert find(client.tables[-1], "b").state is S.STOPPED


def test_model_that_can_never_fit_fails(server: Server, connect: Callable[..., Client]) -> None:
    server.configure(memory_limit_gb=0.1)
    server.start()
    entry = connect().model("a", S.FAILED)
    assert "raise supervisor.memory_limit_gb" in entry.detail
    assert not server.notes("a")


def test_unknown_model_is_named_and_new_folders_are_found(server: Server, client: Client) -> None:
    reply = client.ensure("nobody")
    assert (reply.code, "known models: a" in reply.message) == ("model_not_found", True)
    server.add_model("late")
    assert client.ensure("late").code == ""
    client.model("late", S.READY)


def test_path_registers_a_model(server: Server, client: Client) -> None:
    folder = server.add_model("elsewhere")
    folder = folder.rename(server.home / "elsewhere")
    assert client.ensure("mine", path=str(folder)).code == ""
    assert client.model("mine", S.READY).path == str(folder)
    assert client.ensure("mine", path=str(server.home / "models" / "a")).code == "conflict"
    assert client.ensure("other", path="/no/such/folder").code == "model_not_found"


def test_status_tells_each_models_phase(client: Client) -> None:
    message = client.reply(client.ask(Status)).message
    assert "a ready restarts=0 phase=idle loop_seq=" in message


def test_frames_of_strangers_and_old_generations_are_ignored(client: Client, connect: Callable[..., Client]) -> None:
    beat = Heartbeat(
        loop_seq=1,
        phase="x",
        running=99,
        waiting=0,
        finished=0,
        active_bytes=0,
        cache_bytes=0,
        footprint_bytes=10**15,
    )
    os.kill(client.model("a", S.READY).workers[0].pid, signal.SIGKILL)
    client.model("a", S.READY, restarts=1)
    for identity in ("a#1", "a#3", "stranger"):
        impostor = connect(identity)
        impostor.send(WorkerHello(identity="a#2", token="guessed", model="a", pid=1))
        impostor.send(beat)
        impostor.send(StateChanged(state=S.DRAINING))
        impostor.send_raw(b"\xc1 garbage")
        impostor.reply(impostor.ask(Status))
    entry = client.model("a", S.READY)
    assert (entry.restarts, entry.workers[0].running) == (1, 0)


def test_dead_router_is_replaced_while_models_stay(server: Server, client: Client) -> None:
    def routers() -> list[psutil.Process]:
        with suppress(psutil.NoSuchProcess):  # one of them has just died
            return [p for p in server.tree() if any("fake_router" in part for part in p.cmdline())]
        return []

    (router,) = wait_until(routers, "router")
    router.kill()
    wait_until(lambda: [p for p in routers() if p.pid != router.pid], "new router", timeout_s=2)
    assert client.model("a", S.READY).workers[0].identity == "a#1"


def test_router_that_cannot_start_ends_the_server(server: Server) -> None:
    (server.home / "router.json").write_text(json.dumps({"exit_before_watch": 3}))
    assert server.start().wait() == 3
    assert "mlxspec: cannot listen on port 8000; choose another address with --port" in server.output()
    assert not server.tree()


def test_router_that_keeps_dying_is_started_again_and_again(server: Server, client: Client) -> None:
    (server.home / "router.json").write_text(json.dumps({"exit_after_watch": True}))
    first = [p for p in server.tree() if any("fake_router" in part for part in p.cmdline())]
    first[0].kill()
    log = server.home / "logs" / "supervisor.log"
    wait_until(lambda: log.read_text().count("router gone") >= 5, "five deaths")
    assert client.model("a", S.READY)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signal_ends_everything_cleanly(server: Server, client: Client, number: int) -> None:
    server.signal(number)
    assert server.wait() == 0
    assert not server.tree()
    assert list((server.home / "run").iterdir()) == []
    assert "mlxspec has ended" in server.output()
    assert server.notes("a")[-1].endswith("Exit")


def test_workers_live_until_the_router_has_drained(server: Server, connect: Callable[..., Client]) -> None:
    (server.home / "router.json").write_text(json.dumps({"drain_s": 0.5}))
    server.start()
    connect().model("a", S.READY)
    wait_until(lambda: "curl" in server.output(), "announcement")
    signalled_at = time.time()
    server.signal(signal.SIGTERM)
    assert server.wait() == 0
    assert float(server.notes("a")[-1].split()[0]) - signalled_at >= 0.4


def test_second_signal_ends_it_at_once(server: Server, connect: Callable[..., Client]) -> None:
    (server.home / "router.json").write_text(json.dumps({"drain_s": 60}))
    server.configure(drain_timeout_s=50.0)
    server.start()
    connect().model("a", S.READY)
    wait_until(lambda: "curl" in server.output(), "announcement")
    server.signal(signal.SIGTERM)
    wait_until(lambda: "once more ends it at once" in server.output(), "first signal")
    hurried_at = time.monotonic()
    server.signal(signal.SIGINT)
    assert server.wait() == 0
    assert time.monotonic() - hurried_at < 1.9
    assert not server.tree()


def test_killed_supervisor_leaves_nothing_and_the_next_start_works(
    server: Server, client: Client, connect: Callable[..., Client]
) -> None:
    wait_until(lambda: "curl -N" in server.output(), "announcement")
    assert len(server.tree()) == 3
    server.signal(signal.SIGKILL)
    server.wait()
    wait_until(lambda: not server.tree(), "end of all processes", timeout_s=2.0)
    assert (server.home / "run" / sockets.CONTROL_SOCKET).exists()
    server.start()
    wait_until(lambda: server.output().count("curl -N") == 2, "second announcement")
    assert connect("next").model("a", S.READY)


def test_second_supervisor_refuses(server: Server, client: Client) -> None:
    second = Server()
    second.close()
    second.home = server.home
    second.start()
    assert second.wait() == 3
    assert server.process
    assert f"belongs to a running server (pid {server.process.pid})" in server.output()
    assert client.reply(client.ask(Status)).message.startswith("supervisor is alive")
    client.model("a", S.READY)


def test_logs_and_run_dir_are_private(server: Server, client: Client) -> None:
    for folder in ("run", "logs"):
        assert (server.home / folder).stat().st_mode & 0o777 == 0o700
        for file in (server.home / folder).iterdir():
            if file.name != sockets.LOCK_FILE:
                assert file.stat().st_mode & 0o077 == 0, file
