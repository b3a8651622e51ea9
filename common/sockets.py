"""ZeroMQ sockets with our options, and the run directory that holds them.

Binding an ipc path that is alive succeeds in ZeroMQ and steals it, hence `lock_run_dir`: take the lock before binding.
"""

import asyncio
import fcntl
import os
from pathlib import Path
from typing import IO

import zmq
import zmq.asyncio

from common.errors import ConfigError
from common.paths import ensure_private_dir
from common.wire import MAX_FRAME_BYTES

MAX_IPC_PATH_BYTES = 103  # sun_path on macOS, less its closing zero
SEND_QUEUE_MESSAGES = 10_000
RECONNECT_MS = 50
DATA_SOCKET = "data.ipc"
CONTROL_SOCKET = "control.ipc"
LOCK_FILE = "supervisor.lock"


class RunDirInUse(ConfigError):
    """Another server runs on the same run directory."""


def prepare_run_dir(path: Path) -> Path:
    """Make the run directory private. Raises `ConfigError` when a socket path in it would be too long for ipc."""
    longest = len(os.fsencode(path / CONTROL_SOCKET))
    if longest > MAX_IPC_PATH_BYTES:
        raise ConfigError(
            f"socket path {path / CONTROL_SOCKET} has {longest} bytes; at most {MAX_IPC_PATH_BYTES} work: "
            "set MLXSPEC_HOME to a shorter folder"
        )
    return ensure_private_dir(path)


def lock_run_dir(path: Path) -> IO[str]:
    """Take the run directory's lock; it is held until the returned file is closed or the process dies.

    Raises `RunDirInUse` when another process has it.
    """
    lock = open(path / LOCK_FILE, "a+", encoding="utf-8")  # noqa: SIM115 - held for the process's life
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        lock.seek(0)
        owner = lock.read().strip() or "unknown"
        lock.close()
        raise RunDirInUse(
            f"{path} belongs to a running server (pid {owner}): stop it, or set MLXSPEC_HOME to another folder"
        ) from error
    if not _is_still_there(lock, path / LOCK_FILE):  # its last owner removed the file while we opened it
        lock.close()
        return lock_run_dir(path)
    lock.truncate(0)
    lock.write(str(os.getpid()))
    lock.flush()
    return lock


def _is_still_there(file: IO[str], path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False


def bind_router(context: zmq.asyncio.Context, path: Path) -> zmq.asyncio.Socket:
    """A ROUTER bound to the ipc `path`; sending to an unknown peer raises `zmq.ZMQError` (EHOSTUNREACH)."""
    socket = _with_options(context.socket(zmq.ROUTER))
    socket.set(zmq.ROUTER_MANDATORY, 1)
    socket.set(zmq.ROUTER_HANDOVER, 1)  # a peer that reconnects keeps its identity
    path.unlink(missing_ok=True)
    socket.bind(f"ipc://{path}")
    path.chmod(0o600)
    return socket


def connect_dealer(context: zmq.asyncio.Context, path: Path, identity: str) -> zmq.asyncio.Socket:
    """A DEALER named `identity`, connected to the ROUTER at `path`; it reconnects by itself when that comes back."""
    socket = _dealer(context, identity)
    socket.connect(f"ipc://{path}")
    return socket


def connect_watched_dealer(
    context: zmq.asyncio.Context, path: Path, identity: str
) -> tuple[zmq.asyncio.Socket, zmq.asyncio.Socket]:
    """The same, and a PAIR socket with one message for every (re)connection, the first one included."""
    socket = _dealer(context, identity)
    events = socket.get_monitor_socket(zmq.EVENT_HANDSHAKE_SUCCEEDED)  # before connecting, or the first is missed
    socket.connect(f"ipc://{path}")
    return socket, events


def _dealer(context: zmq.asyncio.Context, identity: str) -> zmq.asyncio.Socket:
    socket = _with_options(context.socket(zmq.DEALER))
    socket.set(zmq.IDENTITY, identity.encode())
    socket.set(zmq.IMMEDIATE, 1)
    socket.set(zmq.RECONNECT_IVL, RECONNECT_MS)  # and no longer ones: a new router is found as soon as it is there
    return socket


def send_now(socket: zmq.asyncio.Socket, frames: list[bytes]) -> bool:
    """Send at once or not at all: False when the peer is unknown, not connected or far behind.

    Unlike an awaited send it keeps the order of messages without a queue of our own.
    """
    sent = socket.send_multipart(frames, flags=zmq.NOBLOCK)
    return isinstance(sent, asyncio.Future) and sent.done() and sent.exception() is None


def _with_options(socket: zmq.asyncio.Socket) -> zmq.asyncio.Socket:
    socket.set(zmq.LINGER, 0)
    socket.set(zmq.SNDHWM, SEND_QUEUE_MESSAGES)
    socket.set(zmq.RCVHWM, SEND_QUEUE_MESSAGES)
    socket.set(zmq.MAXMSGSIZE, MAX_FRAME_BYTES)
    return socket
