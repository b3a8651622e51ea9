"""What systemd hears, on a socket that stands for its own."""

import asyncio
import contextlib
import socket
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from router.supervisor.notify import Notifier
from tests.supervisor.harness import Server, wait_until


class Systemd:
    """The receiving end."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "notify"
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.bind(str(self.path))
        self._socket.setblocking(False)
        self.heard: list[str] = []

    def hear(self) -> list[str]:
        while True:
            try:
                self.heard.append(self._socket.recv(1024).decode())
            except BlockingIOError:
                return self.heard

    def close(self) -> None:
        self._socket.close()


@pytest.fixture
def systemd() -> Iterator[Systemd]:
    with tempfile.TemporaryDirectory(dir="/tmp") as folder:
        systemd = Systemd(Path(folder))
        yield systemd
        systemd.close()


def test_ready_is_said_once_and_stopping_too(systemd: Systemd) -> None:
    notifier = Notifier({"NOTIFY_SOCKET": str(systemd.path)})
    notifier.ready()
    notifier.ready()
    notifier.stopping()
    assert systemd.hear() == ["READY=1", "STOPPING=1"]


async def test_signs_of_life_come_three_times_as_often_as_wanted(systemd: Systemd) -> None:
    notifier = Notifier({"NOTIFY_SOCKET": str(systemd.path), "WATCHDOG_USEC": "60000"})
    with contextlib.suppress(TimeoutError):
        await asyncio.wait_for(notifier.keep_alive(), timeout=0.5)
    assert len(systemd.hear()) >= 3
    assert set(systemd.heard) == {"WATCHDOG=1"}


@pytest.mark.parametrize("env", [{}, {"WATCHDOG_USEC": "10", "WATCHDOG_PID": "1"}, {"WATCHDOG_USEC": "soon"}])
async def test_without_a_wish_nothing_is_said(env: dict[str, str]) -> None:
    await asyncio.wait_for(Notifier(env).keep_alive(), timeout=1)


def test_socket_that_is_gone_does_not_stop_the_server() -> None:
    Notifier({"NOTIFY_SOCKET": "/no/such/socket"}).ready()


def test_server_tells_systemd_of_its_life(systemd: Systemd, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NOTIFY_SOCKET", str(systemd.path))
    monkeypatch.setenv("WATCHDOG_USEC", "300000")
    monkeypatch.delenv("WATCHDOG_PID", raising=False)
    server = Server()
    try:
        server.start()
        wait_until(lambda: "READY=1" in systemd.hear(), "READY")
        wait_until(lambda: systemd.hear().count("WATCHDOG=1") >= 2, "signs of life")
        server.signal(15)
        assert server.wait() == 0
        assert "STOPPING=1" in systemd.hear()
    finally:
        server.close()
