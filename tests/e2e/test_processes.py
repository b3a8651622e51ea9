"""The real processes, on the real model: what is left, and what goes on, when one of them dies."""

import http.client
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import psutil
import pytest

from common import paths

TOP = Path(__file__).parents[2]
CALIBRATION = paths.home() / "calibration"  # read before any test sets MLXSPEC_HOME
START_TIMEOUT_S = 90.0
T = TypeVar("T")


def wait_until(look: Callable[[], T | None], what: str, timeout_s: float = START_TIMEOUT_S) -> T:
    """The first result of `look` that is true."""
    deadline = time.monotonic() + timeout_s
    while not (found := look()):
        assert time.monotonic() < deadline, f"{what} did not happen within {timeout_s} s"
        time.sleep(0.02)
    return found


class Serve:
    """`mlxspec serve` on a free port, in a state folder of its own."""

    def __init__(self, demo_model: Path) -> None:
        self.home = Path(tempfile.mkdtemp(dir="/tmp"))
        # Step times that an earlier run has measured are good for this one.
        CALIBRATION.mkdir(parents=True, exist_ok=True)
        (self.home / "calibration").symlink_to(CALIBRATION)
        self.model_path = demo_model
        self.port = free_port()
        self.process = self.start()
        self.seen: list[psutil.Process] = []

    def start(self) -> "subprocess.Popen[bytes]":
        path = os.pathsep.join(filter(None, [str(TOP), os.environ.get("PYTHONPATH", "")]))
        env = os.environ | {"MLXSPEC_HOME": str(self.home), "PYTHONPATH": path}
        options = ["--port", str(self.port), "--model-path", str(self.model_path)]
        command = [sys.executable, "-P", "-m", "router.cli", "serve", *options]
        with (self.home / "out.txt").open("ab") as out:
            return subprocess.Popen(command, env=env, stdout=out, stderr=out, stdin=subprocess.DEVNULL)

    def request(self, method: str, path: str, body: Any = None) -> tuple[int, dict[str, Any]]:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=START_TIMEOUT_S)
        try:
            payload = json.dumps(body) if body is not None else None
            connection.request(method, path, payload, {"Content-Type": "application/json"})
            response = connection.getresponse()
            return response.status, json.loads(response.read() or b"{}")
        finally:
            connection.close()

    def ask(self, prompt: str = "What is the capital of France?") -> tuple[int, str]:
        """A short greedy answer."""
        body = {"prompt": prompt, "max_tokens": 12, "temperature": 0}
        status, answer = self.request("POST", "/generate", body)
        return status, answer.get("text", str(answer))

    def output(self) -> str:
        return (self.home / "out.txt").read_text()

    def wait_ready(self, times: int = 1) -> None:
        def is_announced() -> bool:
            assert self.process.poll() is None, self.output()
            return self.output().count("curl -N") >= times

        wait_until(is_announced, "announcement")

    def tree(self) -> list[psutil.Process]:
        """Every process of the server, seen now or at an earlier call, that still runs."""
        if self.process.poll() is None:
            top = psutil.Process(self.process.pid)
            self.seen += [p for p in [top, *top.children(recursive=True)] if p not in self.seen]
        return [p for p in self.seen if is_alive(p)]

    def children_named(self, module: str) -> list[psutil.Process]:
        return [p for p in self.tree() if module in p.cmdline()]

    def end(self, number: int) -> int:
        self.tree()
        self.process.send_signal(number)
        return self.process.wait(START_TIMEOUT_S)

    def close(self) -> None:
        self.tree()
        self.process.kill()
        self.process.wait()
        for process in self.tree():
            process.kill()
        shutil.rmtree(self.home)


def is_alive(process: psutil.Process) -> bool:
    try:
        return bool(process.is_running() and process.status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


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
