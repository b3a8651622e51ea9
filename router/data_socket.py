"""The router's end of the data plane: frames of workers in, checked and told apart; messages to workers out."""

import logging
from pathlib import Path
from typing import Protocol

import zmq.asyncio

from common import sockets, wire
from common.errors import WireError
from common.logs import fields
from common.messages import Accepted, AskHello, Deltas, Failed, Finished, Load, ToWorkerData, WorkerHello
from router.model_table import Directory
from router.observer import Observers
from router.roster import Roster

log = logging.getLogger(__name__)
MAX_IGNORED_SENDERS = 1000

Context = zmq.asyncio.Context
Progress = Accepted | Deltas | Finished | Failed | Load


class Receiver(Protocol):
    """What the socket tells."""

    def worker_connected(self, worker: str) -> None:
        """A worker said hello: what was sent over an earlier connection may be lost."""

    def frame_lost(self, worker: str) -> None:
        """A worker sent something that cannot be read."""

    def message_received(self, worker: str, message: Progress) -> None: ...


class DataSocket:
    """Owns the socket and knows which of its peers are our supervisor's workers."""

    def __init__(self, socket: zmq.asyncio.Socket, directory: Directory, observers: Observers) -> None:
        self._socket = socket
        self._directory = directory
        self._observers = observers
        self._roster = Roster()
        self._ignored_senders: set[str] = set()  # those that the log has already

    def is_trusted(self, worker: str) -> bool:
        return self._roster.is_trusted(worker, self._directory.workers)

    def send(self, worker: str, message: ToWorkerData) -> bool:
        """False when the worker cannot be reached. Raises `WireError` for too large a message."""
        return sockets.send_now(self._socket, [worker.encode(), wire.encode(message)])

    async def run(self, receiver: Receiver) -> None:
        """Receive until cancelled."""
        while True:
            frames = await self._socket.recv_multipart()
            if len(frames) == 2:
                self._on_frame(receiver, frames[0].decode(errors="replace"), frames[1])
            else:
                self._ignore("malformed", "?")

    def _on_frame(self, receiver: Receiver, sender: str, frame: bytes) -> None:
        is_trusted = self.is_trusted(sender)
        try:
            message = wire.decode_from_worker(frame)
        except WireError as error:
            self._ignore("unreadable", sender, str(error))
            if is_trusted:
                receiver.frame_lost(sender)
            return
        if isinstance(message, WorkerHello):
            self._on_hello(receiver, sender, message)
        elif is_trusted:
            receiver.message_received(sender, message)
        else:
            self._ignore("unknown_identity", sender)
            if sender in self._directory.workers:
                self.send(sender, AskHello())

    def _on_hello(self, receiver: Receiver, sender: str, hello: WorkerHello) -> None:
        if not self._roster.greet(sender, hello, self._directory.workers):
            self._ignore("bad_hello", sender)
            return
        log.info("worker said hello %s", fields(worker=sender, pid=hello.pid))
        receiver.worker_connected(sender)

    def _ignore(self, reason: str, sender: str, detail: str | None = None) -> None:
        self._observers.ignored_frames[reason] += 1
        is_news = sender not in self._ignored_senders and len(self._ignored_senders) < MAX_IGNORED_SENDERS
        if is_news:
            self._ignored_senders.add(sender)
            log.warning("frames ignored %s", fields(reason=reason, sender=sender, detail=detail))


def new_context() -> Context:
    """ZeroMQ's threads, for the sockets of both planes."""
    return Context()


def bind_data_socket(context: Context, run_dir: Path) -> zmq.asyncio.Socket:
    """The data plane's ROUTER."""
    return sockets.bind_router(context, run_dir / sockets.DATA_SOCKET)
