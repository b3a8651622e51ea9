"""A whole server with a fake worker and router, and a client of its control socket."""

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import psutil
import zmq

from common import sockets, wire
from common.messages import (
    EnsureModel,
    FromClientControl,
    Message,
    ModelEntry,
    ModelTable,
    Pin,
    Reload,
    Reply,
    Status,
    Unload,
    Watch,
)
from common.states import WorkerState

TOP = Path(__file__).parents[2]
SERVER = Path(__file__).parent / "fakes" / "fake_server.py"
PATIENCE_S = 10.0
T = TypeVar("T")
CONFIG = {
    "drain_timeout_s": 1.0,
    "stop_timeout_s": 0.5,
    "backoff_first_s": 0.2,
    "backoff_max_s": 0.4,
    "immediate_restarts": 2,
}


def wait_until(look: Callable[[], T | None], what: str, timeout_s: float = PATIENCE_S) -> T:
    """The first result of `look` that is true."""
    deadline = time.monotonic() + timeout_s
    while not (found := look()):
        assert time.monotonic() < deadline, f"{what} did not happen within {timeout_s} s"
        time.sleep(0.01)
    return found


class Server:
    """One server process in a state folder of its own."""

    def __init__(self) -> None:
        self.home = Path(tempfile.mkdtemp(dir="/tmp"))
        self.configure()
        self.process: subprocess.Popen[bytes] | None = None
        self._seen: list[psutil.Process] = []

    def add_model(self, name: str, **behaviour: Any) -> Path:
        folder = self.home / "models" / name
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.json").write_text("{}")
        self.behave(name, **behaviour)
        return folder

    def behave(self, name: str, **behaviour: Any) -> None:
        file = self.home / "models" / name / "behaviour.json"
        file.with_suffix(".new").write_text(json.dumps(behaviour))
        file.with_suffix(".new").replace(file)

    def configure(self, more: str = "", **values: float) -> None:
        """Set keys of [supervisor]; `more` are other sections."""
        lines = [f"{key} = {value}\n" for key, value in (CONFIG | values).items()]
        (self.home / "config.toml").write_text("[supervisor]\n" + "".join(lines) + more)

    def start(self, stdin: int = subprocess.DEVNULL) -> "Server":
        env = os.environ | {"MLXSPEC_HOME": str(self.home), "PYTHONPATH": str(TOP)}
        with (self.home / "out.txt").open("ab") as out:
            self.process = subprocess.Popen(
                [sys.executable, "-P", str(SERVER)], env=env, stdout=out, stderr=out, stdin=stdin
            )
        return self

    def signal(self, number: int) -> None:
        assert self.process
        self.tree()
        self.process.send_signal(number)

    def wait(self, timeout_s: float = PATIENCE_S) -> int:
        assert self.process
        return self.process.wait(timeout_s)

    def output(self) -> str:
        return (self.home / "out.txt").read_text()

    def notes(self, name: str) -> list[str]:
        """What the workers of a model noted: `TIME IDENTITY WHAT`."""
        file = self.home / "models" / name / "notes.txt"
        return file.read_text().splitlines() if file.is_file() else []

    def tree(self) -> list[psutil.Process]:
        """Every process of the server, seen now or at an earlier call, that still runs."""
        assert self.process
        if self.process.poll() is None:
            top = psutil.Process(self.process.pid)
            self._seen += [p for p in [top, *top.children(recursive=True)] if p not in self._seen]
        return [p for p in self._seen if p.is_running() and p.status() != psutil.STATUS_ZOMBIE]

    def close(self) -> None:
        if self.process:
            self.tree()
            self.process.kill()
            self.process.wait()
            for process in self._seen:
                if process.is_running() and process.pid != self.process.pid:
                    process.kill()
        shutil.rmtree(self.home)


class Client:
    """Watches the model table and makes calls."""

    def __init__(self, home: Path, identity: str = "test") -> None:
        self._context = zmq.Context()
        self._socket = self._context.socket(zmq.DEALER)
        self._socket.set(zmq.IDENTITY, identity.encode())
        self._socket.set(zmq.LINGER, 0)
        self._socket.connect(f"ipc://{home / 'run' / sockets.CONTROL_SOCKET}")
        self.tables: list[ModelTable] = []
        self.replies: dict[str, Reply] = {}
        self.replied_at: dict[str, float] = {}
        self._calls = 0

    def send(self, message: Message) -> None:
        self._socket.send(wire.encode(message))

    def send_raw(self, frame: bytes) -> None:
        self._socket.send(frame)

    def watch(self) -> "Client":
        self.send(Watch(client="test"))
        self.until(lambda table: True, "table")
        return self

    def ask(
        self, kind: type[EnsureModel] | type[Unload] | type[Pin] | type[Status] | type[Reload], **values: Any
    ) -> str:
        """Send a call; returns its id."""
        self._calls += 1
        call: FromClientControl = kind(call_id=str(self._calls), **values)
        self.send(call)
        return str(self._calls)

    def reply(self, call_id: str) -> Reply:
        def answer() -> Reply | None:
            self._pump()
            return self.replies.get(call_id)

        return wait_until(answer, f"reply to call {call_id}")

    def ensure(self, name: str, path: str | None = None) -> Reply:
        return self.reply(self.ask(EnsureModel, name=name, path=path))

    def unload(self, name: str) -> Reply:
        return self.reply(self.ask(Unload, name=name))

    def until(self, look: Callable[[ModelTable], Any], what: str, timeout_s: float = PATIENCE_S) -> ModelTable:
        """The newest table, as soon as it is as `look` wants it."""

        def newest() -> ModelTable | None:
            self._pump()
            return self.tables[-1] if self.tables and look(self.tables[-1]) else None

        return wait_until(newest, what, timeout_s)

    def model(self, name: str, *states: WorkerState, restarts: int | None = None) -> ModelEntry:
        """Its entry, as soon as it is in one of `states` (and was restarted so often)."""

        def is_there(table: ModelTable) -> bool:
            entry = next((entry for entry in table.models if entry.name == name), None)
            return entry is not None and entry.state in states and restarts in (None, entry.restarts)

        return find(self.until(is_there, f"{name} {states} restarts={restarts}"), name)

    def states(self, name: str) -> list[WorkerState]:
        """The states that this model was seen in, without repetition."""
        self._pump()
        seen = [entry.state for table in self.tables for entry in table.models if entry.name == name]
        return [state for i, state in enumerate(seen) if i == 0 or seen[i - 1] != state]

    def _pump(self) -> None:
        while self._socket.poll(0):
            message = wire.decode_to_client(self._socket.recv())
            if isinstance(message, ModelTable):
                self.tables.append(message)
            else:
                self.replies[message.call_id] = message
                self.replied_at[message.call_id] = time.time()

    def close(self) -> None:
        self._socket.close()
        self._context.term()


def find(table: ModelTable, name: str) -> ModelEntry:
    return next(entry for entry in table.models if entry.name == name)
