"""Server-sent events: one loop that every streaming surface shares."""

import asyncio
import logging
from collections.abc import Iterable
from typing import Protocol

import msgspec
from aiohttp import web

from common.errors import MlxspecError
from common.logs import fields
from router.answers import error_answer
from router.app_keys import REQUEST_ID
from router.streams import Event, Streams, with_pauses

log = logging.getLogger(__name__)
KEEP_ALIVE_S = 15.0
WRITE_TIMEOUT_S = 60.0  # a client that takes nothing for so long is gone
HEADERS = {
    "Cache-Control": "no-cache",
    "X-Accel-Buffering": "no",
    "Content-Type": "text/event-stream; charset=utf-8",
}


class Narrator(Protocol):
    """Turns the events of a group of requests into a surface's chunks."""

    def tell(self, index: int, event: Event) -> Iterable[msgspec.Struct]: ...

    def close(self) -> Iterable[msgspec.Struct]:
        """What comes after the last event."""


async def respond(request: web.Request, streams: Streams, narrator: Narrator) -> web.StreamResponse:
    """Stream until the last request has ended.

    Nothing is sent before the first event (or a pause), so that an error up to then is an ordinary answer; a
    later one is an event, and the last.
    """
    out = EventWriter(request)
    try:
        async for item in with_pauses(streams, KEEP_ALIVE_S):
            if item is None:
                await out.write(b": keep-alive\n\n")
                continue
            index, event = item
            if isinstance(event, MlxspecError):
                raise event
            await out.send(narrator.tell(index, event))
        await out.send(narrator.close())
        await out.write(b"data: [DONE]\n\n")
    except MlxspecError as error:
        if not out.response.prepared:
            raise
        log.warning("stream ends with an error %s", fields(request=request.get(REQUEST_ID), code=error.code))
        await out.send([error_answer(error)])
    return out.response


class EventWriter:
    """Writes events; opens the response with the first."""

    def __init__(self, request: web.Request) -> None:
        self.response = web.StreamResponse(headers=HEADERS)
        self._request = request

    async def send(self, chunks: Iterable[msgspec.Struct]) -> None:
        data = b"".join(b"data: %b\n\n" % msgspec.json.encode(chunk) for chunk in chunks)
        if data:
            await self.write(data)

    async def write(self, data: bytes) -> None:
        if not self.response.prepared:
            await self.response.prepare(self._request)
        try:
            async with asyncio.timeout(WRITE_TIMEOUT_S):
                await self.response.write(data)
        except TimeoutError:
            if self._request.transport is not None:
                self._request.transport.abort()
            raise ConnectionResetError("the client takes no data") from None
