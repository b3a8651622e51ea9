"""The router's end of the control plane: keeps the model table fresh and makes calls to the supervisor."""

import asyncio
import itertools
import logging
import os
import time
from collections.abc import Callable
from pathlib import Path

import zmq.asyncio

from common import sockets, wire
from common.errors import MlxspecError, ModelUnavailable, WireError, from_code
from common.messages import EnsureModel, FromClientControl, ModelTable, Pin, Reload, Reply, Status, Unload, Watch
from router.model_table import Directory

log = logging.getLogger(__name__)
WATCH_PERIOD_S = 1.0
WANT_PERIOD_S = 1.0
RETRY_PERIOD_S = 0.05
REPLY_TIMEOUT_S = 10.0


class ControlClient:
    """Feeds `directory`; `call`s raise the error that the supervisor answered with."""

    def __init__(self, socket: zmq.asyncio.Socket, directory: Directory) -> None:
        self.directory = directory
        self._socket = socket
        self._wanted_s: dict[str, float] = {}
        self._wants: set[asyncio.Task[None]] = set()
        self._calls: dict[str, asyncio.Future[Reply]] = {}
        self._call_ids = (f"{os.getpid()}-{number}" for number in itertools.count(1))

    async def run(self) -> None:
        """Watch and listen until cancelled."""
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._watch())
            tasks.create_task(self._listen())

    async def ensure_model(self, name: str, path: str | None = None) -> None:
        await self._call(lambda call_id: EnsureModel(call_id=call_id, name=name, path=path), REPLY_TIMEOUT_S)

    def want(self, name: str, on_refused: Callable[[MlxspecError], None]) -> None:
        """Ask for a model without waiting, at most once a second for each."""
        now = time.monotonic()
        if now - self._wanted_s.get(name, -WANT_PERIOD_S) < WANT_PERIOD_S:
            return
        self._wanted_s[name] = now
        call = asyncio.get_running_loop().create_task(self._want(name, on_refused))
        self._wants.add(call)
        call.add_done_callback(self._wants.discard)

    async def _want(self, name: str, on_refused: Callable[[MlxspecError], None]) -> None:
        try:
            await self.ensure_model(name)
        except MlxspecError as error:
            on_refused(error)

    async def unload(self, name: str, timeout_s: float) -> None:
        await self._call(lambda call_id: Unload(call_id=call_id, name=name), timeout_s)

    async def rescan(self) -> None:
        """Have the supervisor look for models that came or went."""
        await self._call(lambda call_id: Status(call_id=call_id), REPLY_TIMEOUT_S)

    async def pin(self, name: str, *, is_pinned: bool) -> None:
        await self._call(lambda call_id: Pin(call_id=call_id, name=name, pinned=is_pinned), REPLY_TIMEOUT_S)

    async def reload(self) -> list[str]:
        """Have the configuration read again; what changed, one thing a line."""
        return (await self._call(lambda call_id: Reload(call_id=call_id), REPLY_TIMEOUT_S)).splitlines()

    async def _call(self, message: Callable[[str], FromClientControl], timeout_s: float) -> str:
        """Send, again until it is gone, and wait; returns the answer's text or raises its error."""
        call_id = next(self._call_ids)
        answer: asyncio.Future[Reply] = asyncio.get_running_loop().create_future()
        self._calls[call_id] = answer
        try:
            async with asyncio.timeout(timeout_s):
                while not self._send(message(call_id)):  # noqa: ASYNC110 - a connection has no event to wait for
                    await asyncio.sleep(RETRY_PERIOD_S)
                reply = await answer
        except TimeoutError:
            raise ModelUnavailable(
                f"the supervisor did not answer within {timeout_s:g} s", retry_after_s=WATCH_PERIOD_S
            ) from None
        finally:
            del self._calls[call_id]
        if reply.code:
            raise from_code(reply.code, reply.message)
        return reply.message

    async def _watch(self) -> None:
        while True:
            is_sent = self._send(Watch(client="router"))
            await asyncio.sleep(WATCH_PERIOD_S if is_sent else RETRY_PERIOD_S)

    async def _listen(self) -> None:
        while True:
            frames = await self._socket.recv_multipart()
            try:
                message = wire.decode_to_client(frames[-1])
            except WireError as error:
                log.error("control message ignored: %s", error)
                continue
            if isinstance(message, ModelTable):
                self.directory.update(message)
            elif (answer := self._calls.get(message.call_id)) and not answer.done():
                answer.set_result(message)

    def _send(self, message: FromClientControl) -> bool:
        """False when there is no connection at the moment."""
        return sockets.send_now(self._socket, [wire.encode(message)])


def connect(context: zmq.asyncio.Context, run_dir: Path, directory: Directory) -> ControlClient:
    """A client of the supervisor that owns `run_dir`."""
    path = run_dir / sockets.CONTROL_SOCKET
    return ControlClient(sockets.connect_dealer(context, path, f"router#{os.getpid()}"), directory)
