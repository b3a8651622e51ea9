"""What a handler reads: the events of a group of requests, in the order in which they came."""

import asyncio
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from types import TracebackType

from common.errors import MlxspecError
from common.messages import Accepted, Delta, Timings, Usage

MAX_UNREAD_EVENTS = 1024  # per request; a reader that is further behind is cancelled


@dataclass(frozen=True, slots=True)
class Ended:
    """The good end of a request, with the router's own times in seconds since it arrived."""

    reason: str
    usage: Usage
    timings: Timings
    elapsed_s: float
    first_token_s: float | None


Event = Accepted | Delta | Ended | MlxspecError


class Streams:
    """Iterates over `(index, event)`; each request of the group ends with one `Ended` or one error.

    Leaving its `with` block cancels what has not ended.
    """

    def __init__(self, count: int, on_leave: Callable[[], None]) -> None:
        self._unread: asyncio.Queue[tuple[int, Event]] = asyncio.Queue()
        self._limit = MAX_UNREAD_EVENTS * count
        self._open = count
        self._on_leave = on_leave

    def put(self, index: int, event: Event) -> bool:
        """Hand over an event; False when the reader is too far behind for another delta."""
        if isinstance(event, Delta) and self._unread.qsize() >= self._limit:
            return False
        self._unread.put_nowait((index, event))
        return True

    def __enter__(self) -> "Streams":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._on_leave()

    def __aiter__(self) -> AsyncIterator[tuple[int, Event]]:
        return self

    async def __anext__(self) -> tuple[int, Event]:
        if self._open == 0:
            raise StopAsyncIteration
        index, event = await self._unread.get()
        if isinstance(event, Ended | MlxspecError):
            self._open -= 1
        return index, event


async def with_pauses(streams: Streams, pause_s: float) -> AsyncIterator[tuple[int, Event] | None]:
    """The events of `streams`, and None whenever nothing came for `pause_s`."""
    while True:
        try:
            async with asyncio.timeout(pause_s):
                item = await anext(streams)
        except TimeoutError:
            yield None
        except StopAsyncIteration:
            return
        else:
            yield item
