"""The real processes, on the real model: what is left, and what goes on, when one of them dies."""

import signal
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.e2e.server import START_TIMEOUT_S, Serve, is_alive, wait_until


@pytest.fixture
def serve(demo_model: Path) -> Iterator[Serve]:
    server = Serve(demo_model)
    yield server
    server.close()


def test_killed_worker_is_replaced_and_the_next_request_served(serve: Serve) -> None:
    serve.wait_ready()
    status, text = serve.ask()
    assert (status, "Paris" in text) == (200, True), text
    (worker,) = serve.children_named("worker")
    worker.kill()
    status, again = serve.ask()
    assert (status, again) == (200, text)
    (successor,) = serve.children_named("worker")
    assert successor.pid != worker.pid
    assert "was killed by SIGKILL; starting it again (restart 1)" in serve.output()


def test_killed_router_is_replaced_while_the_model_stays(serve: Serve) -> None:
    serve.wait_ready()
    serve.ask()
    (worker,) = serve.children_named("worker")
    (router,) = serve.children_named("router")
    router.kill()

    def is_served() -> bool:
        try:
            return serve.ask()[0] == 200
        except OSError:
            return False

    wait_until(is_served, "answer of a new router", timeout_s=15)
    assert [p.pid for p in serve.children_named("worker")] == [worker.pid]


def test_killed_supervisor_leaves_nothing_and_the_next_start_works(serve: Serve) -> None:
    serve.wait_ready()
    assert len(serve.tree()) == 3
    serve.end(signal.SIGKILL)
    wait_until(lambda: not serve.tree(), "end of all processes", timeout_s=2.0)
    serve.process = serve.start()
    serve.wait_ready(times=2)
    assert serve.ask()[0] == 200


def test_ctrl_c_ends_everything_with_exit_0(serve: Serve) -> None:
    serve.wait_ready()
    serve.ask()
    assert serve.end(signal.SIGINT) == 0
    assert not serve.tree()
    assert list((serve.home / "run").iterdir()) == []
    assert serve.output().endswith("mlxspec has ended\n")


def test_ctrl_c_while_loading_ends_everything_with_exit_0(serve: Serve) -> None:
    wait_until(lambda: "loading model" in serve.output(), "loading")
    assert serve.end(signal.SIGINT) == 0
    assert not serve.tree()


def test_unknown_model_is_404_and_known_ones_are_named(serve: Serve) -> None:
    serve.wait_ready()
    body = {"model": "nobody", "messages": [{"role": "user", "content": "Hi"}]}
    status, answer = serve.request("POST", "/v1/chat/completions", body)
    assert status == 404
    assert answer["error"]["code"] == "model_not_found"
    assert serve.model_path.name in answer["error"]["message"]


def test_unloaded_model_is_loaded_again_by_the_next_request(serve: Serve) -> None:
    serve.wait_ready()
    (worker,) = serve.children_named("worker")
    assert serve.request("DELETE", f"/models/{serve.model_path.name}")[0] == 200
    assert not is_alive(worker)
    assert serve.ask()[0] == 200


def test_taken_port_is_named(demo_model: Path) -> None:
    server = Serve(demo_model)
    try:
        server.process.kill()
        server.process.wait()
        with socket.socket() as other:
            other.bind(("127.0.0.1", 0))
            other.listen()
            server.port = other.getsockname()[1]
            server.process = server.start()
            assert server.process.wait(START_TIMEOUT_S) == 3
        (line,) = [text for text in server.output().splitlines() if text.startswith("mlxspec: ")]
        assert str(server.port) in line
        assert "--port" in line
        assert not server.tree()
    finally:
        server.close()
