"""The control socket: frames of workers, router and command line in, orders and the model table out.

It moves and checks data only; what a message means is decided in `fleet.py`.
"""

import logging
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import msgspec
import zmq
import zmq.asyncio

from common import sockets, wire
from common.errors import WireError
from common.logs import fields
from common.messages import Message, ModelEntry, ModelTable, ToSupervisor, Watch, WorkerEntry

log = logging.getLogger(__name__)


class ControlSocket:
    """The ROUTER that all other processes talk to. Peers are named by their ZeroMQ identity."""

    def __init__(self, path: Path) -> None:
        self._context = zmq.asyncio.Context()
        self._socket = sockets.bind_router(self._context, path)
        self._path = path
        self._watchers: dict[str, str] = {}  # identity -> kind of client
        self._table: ModelTable | None = None

    async def frames(self) -> AsyncIterator[tuple[str, ToSupervisor]]:
        """Every readable message with its sender, for ever. Other frames are logged and dropped."""
        while True:
            frames = await self._socket.recv_multipart()
            identity = frames[0].decode("latin-1")
            try:
                if len(frames) != 2:
                    raise WireError(f"{len(frames) - 1} parts; a message has one")
                message = wire.decode_to_supervisor(frames[1])
            except WireError as error:
                log.warning("control frame refused %s", fields(sender=identity, error=error))
                continue
            yield identity, message

    def send(self, identity: str, message: Message) -> bool:
        """Send, never waiting. False when the peer is gone or does not read."""
        frames = [identity.encode("latin-1"), wire.encode(message)]
        sending: Any = self._socket.send_multipart(frames, flags=zmq.DONTWAIT)
        error = sending.exception()  # with DONTWAIT it is decided at once
        if error is None:
            return True
        if isinstance(error, zmq.ZMQError):
            log.debug("not sent %s", fields(peer=identity, kind=type(message).__name__, error=error))
            return False
        raise error

    def add_watcher(self, identity: str, watch: Watch) -> None:
        """Send the table to this client now and whenever it changes."""
        self._watchers[identity] = watch.client
        if self._table is not None:
            self._send_table(identity, self._table)

    def publish(self, table: ModelTable) -> ModelTable:
        """Give the table its next revision and send it to all watchers."""
        revision = self._table.revision + 1 if self._table else 1
        self._table = msgspec.structs.replace(table, revision=revision)
        for identity in list(self._watchers):
            self._send_table(identity, self._table)
        return self._table

    def close(self) -> None:
        self._socket.close()
        self._context.term()
        self._path.unlink(missing_ok=True)

    def _send_table(self, identity: str, table: ModelTable) -> None:
        if not self.send(identity, table):
            self._watchers.pop(identity, None)


def differs_in_substance(before: tuple[ModelEntry, ...], after: tuple[ModelEntry, ...]) -> bool:
    """Whether two tables differ in more than the figures that every heartbeat moves."""
    return tuple(map(_without_figures, before)) != tuple(map(_without_figures, after))


def _without_figures(entry: ModelEntry) -> ModelEntry:
    workers = tuple(
        WorkerEntry(identity=w.identity, token=w.token, state=w.state, pid=w.pid, generation=w.generation)
        for w in entry.workers
    )
    return msgspec.structs.replace(entry, workers=workers, last_used_at=0.0)
