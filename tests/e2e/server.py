"""A real server for the tests of this folder: `mlxspec serve` with all its processes, and what to ask of it."""

import http.client
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import psutil

from common import paths

TOP = Path(__file__).parents[2]
CALIBRATION = paths.home() / "calibration"  # read before any test sets MLXSPEC_HOME
START_TIMEOUT_S = float(os.environ.get("MLXSPEC_TEST_START_TIMEOUT_S", "90"))  # a GPU may have kernels to make
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

    def __init__(self, demo_model: Path, config: str = "", env: Mapping[str, str] | None = None) -> None:
        self._env = dict(env or {})
        self.home = Path(tempfile.mkdtemp(dir="/tmp"))
        # Step times that an earlier run has measured are good for this one.
        CALIBRATION.mkdir(parents=True, exist_ok=True)
        (self.home / "calibration").symlink_to(CALIBRATION)
        (self.home / "config.toml").write_text(config)
        self.model_path = demo_model
        self.port = free_port()
        self.process = self.start()
        self.seen: list[psutil.Process] = []

    @property
    def model(self) -> str:
        return self.model_path.name

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def start(self) -> "subprocess.Popen[bytes]":
        path = os.pathsep.join(filter(None, [str(TOP), os.environ.get("PYTHONPATH", "")]))
        env = os.environ | {"MLXSPEC_HOME": str(self.home), "PYTHONPATH": path} | self._env
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

    def read(self, path: str) -> str:
        """A page that is no JSON."""
        with urllib.request.urlopen(self.url + path, timeout=START_TIMEOUT_S) as response:
            return bytes(response.read()).decode()

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
