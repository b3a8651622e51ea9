"""Sockets and the run directory that guards them."""

import asyncio
import contextlib
import multiprocessing
import shutil
import tempfile
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
import zmq
import zmq.asyncio

from common import sockets
from common.errors import ConfigError


@pytest.fixture
def run_dir() -> Iterator[Path]:
    folder = Path(tempfile.mkdtemp(dir="/tmp"))
    yield sockets.prepare_run_dir(folder)
    shutil.rmtree(folder)


class Sockets:
    """Makes sockets of one context and closes them all."""

    def __init__(self) -> None:
        self.context = zmq.asyncio.Context()
        self._open: list[zmq.asyncio.Socket] = []

    def router(self, path: Path) -> zmq.asyncio.Socket:
        self._open.append(sockets.bind_router(self.context, path))
        return self._open[-1]

    def dealer(self, path: Path, identity: str) -> zmq.asyncio.Socket:
        self._open.append(sockets.connect_dealer(self.context, path, identity))
        return self._open[-1]

    def watched_dealer(self, path: Path, identity: str) -> tuple[zmq.asyncio.Socket, zmq.asyncio.Socket]:
        pair = sockets.connect_watched_dealer(self.context, path, identity)
        self._open.extend(pair)
        return pair

    def close(self) -> None:
        for socket in reversed(self._open):
            socket.close()
        self.context.term()


@pytest.fixture
async def make() -> AsyncIterator[Sockets]:
    with contextlib.closing(Sockets()) as made:
        yield made


def test_run_dir_is_private(run_dir: Path) -> None:
    run_dir.chmod(0o755)
    assert sockets.prepare_run_dir(run_dir).stat().st_mode & 0o777 == 0o700


def test_too_long_a_path_is_refused_with_its_length_and_a_way_out(tmp_path: Path) -> None:
    folder = tmp_path / ("x" * 100)
    with pytest.raises(ConfigError, match=r"bytes; at most 103 work: set MLXSPEC_HOME"):
        sockets.prepare_run_dir(folder)
    assert not folder.exists()


async def test_longest_allowed_path_can_be_bound(run_dir: Path, make: Sockets) -> None:
    room = sockets.MAX_IPC_PATH_BYTES - len(str(run_dir / "x" / sockets.CONTROL_SOCKET)) + 1
    folder = sockets.prepare_run_dir(run_dir / ("x" * room))
    assert len(str(folder / sockets.CONTROL_SOCKET)) == sockets.MAX_IPC_PATH_BYTES
    make.router(folder / sockets.CONTROL_SOCKET)
    with pytest.raises(ConfigError):
        sockets.prepare_run_dir(run_dir / ("x" * (room + 1)))


def test_lock_is_held_by_one_and_names_its_owner(run_dir: Path) -> None:
    lock = sockets.lock_run_dir(run_dir)
    owner = (run_dir / sockets.LOCK_FILE).read_text()
    with pytest.raises(sockets.RunDirInUse, match=f"pid {owner}"):
        sockets.lock_run_dir(run_dir)
    lock.close()
    sockets.lock_run_dir(run_dir).close()


def _lock_and_die(run_dir: str) -> None:
    sockets.lock_run_dir(Path(run_dir))


def test_lock_of_a_dead_process_is_free(run_dir: Path) -> None:
    process = multiprocessing.get_context("spawn").Process(target=_lock_and_die, args=(str(run_dir),))
    process.start()
    process.join()
    assert process.exitcode == 0
    sockets.lock_run_dir(run_dir).close()


def test_lock_survives_the_removal_of_its_file(run_dir: Path) -> None:
    old = sockets.lock_run_dir(run_dir)
    (run_dir / sockets.LOCK_FILE).unlink()
    with sockets.lock_run_dir(run_dir), pytest.raises(sockets.RunDirInUse):
        sockets.lock_run_dir(run_dir)
    old.close()


async def test_frames_go_both_ways_and_stale_file_is_no_obstacle(run_dir: Path, make: Sockets) -> None:
    path = run_dir / sockets.DATA_SOCKET
    path.write_bytes(b"left by a crash")
    router = make.router(path)
    assert path.stat().st_mode & 0o777 == 0o600
    dealer = make.dealer(path, "m#1")
    await dealer.send(b"up")
    assert await router.recv_multipart() == [b"m#1", b"up"]
    await router.send_multipart([b"m#1", b"down"])
    assert await dealer.recv() == b"down"


async def test_sending_to_nobody_is_an_error(run_dir: Path, make: Sockets) -> None:
    router = make.router(run_dir / sockets.DATA_SOCKET)
    with pytest.raises(zmq.ZMQError) as caught:
        await router.send_multipart([b"nobody", b"x"])
    assert caught.value.errno == zmq.EHOSTUNREACH


async def test_first_connection_and_each_later_one_are_told(run_dir: Path, make: Sockets) -> None:
    path = run_dir / sockets.DATA_SOCKET
    router = make.router(path)
    _, events = make.watched_dealer(path, "m#1")
    await asyncio.sleep(0.05)  # long after the handshake
    await events.recv_multipart()
    router.close()
    make.router(path)
    await events.recv_multipart()
