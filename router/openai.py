"""What OpenAI's two generating surfaces share: one flow, and the narration of a stream of choices."""

import time
import uuid
from collections.abc import Iterable, Sequence
from typing import Protocol

import msgspec
from aiohttp import web
from msgspec import UNSET, UnsetType

from common.messages import Accepted, Delta, Generate
from router import sse
from router.answers import (
    Answer,
    Completion,
    SpeculativeStats,
    UsageAnswer,
    collect,
    json_response,
    require,
    speculative_stats_of,
    usage_of,
)
from router.app_keys import BACKEND
from router.streams import Ended, Event


class Chunk(Answer, frozen=True, kw_only=True):
    """One event of a stream. `usage` is absent unless the client asked for it, and null up to the last."""

    id: str
    object: str
    created: int
    model: str
    choices: Sequence[Answer]
    usage: UsageAnswer | UnsetType | None = UNSET
    speculative_stats: SpeculativeStats | UnsetType = UNSET


class Whole(Answer, frozen=True, kw_only=True):
    """An answer that is not streamed."""

    id: str
    object: str
    created: int
    model: str
    choices: Sequence[Answer]
    usage: UsageAnswer
    speculative_stats: SpeculativeStats


class Dialect(Protocol):
    """How a surface words its choices."""

    id_prefix: str
    whole_object: str
    chunk_object: str

    def whole_choice(self, index: int, completion: Completion) -> Answer: ...

    def first_piece(self, index: int) -> Answer | None: ...

    def piece(self, index: int, delta: Delta) -> Answer: ...

    def last_piece(self, index: int, reason: str) -> Answer: ...


async def answer(
    request: web.Request,
    dialect: Dialect,
    model: str,
    generates: Sequence[Generate],
    *,
    choices: int,
    is_stream: bool,
    with_usage: bool,
) -> web.StreamResponse:
    """Run the requests and answer in the surface's words. `choices` of each prompt stand together."""
    with request.app[BACKEND].start(model, generates) as streams:
        if is_stream:
            return await sse.respond(
                request, streams, _Narrator(dialect, model, generates, choices, with_usage=with_usage)
            )
        completions = require(await collect(streams, generates))
    ends = [completion.ended for completion in completions]
    return json_response(
        Whole(
            id=_new_id(dialect),
            object=dialect.whole_object,
            created=int(time.time()),
            model=model,
            choices=[dialect.whole_choice(index, completion) for index, completion in enumerate(completions)],
            usage=usage_of(ends, choices),
            speculative_stats=speculative_stats_of(ends, is_enabled=generates[0].speculation.is_on),
        )
    )


class _Narrator:
    def __init__(
        self, dialect: Dialect, model: str, generates: Sequence[Generate], choices: int, *, with_usage: bool
    ) -> None:
        self._dialect = dialect
        self._is_enabled = generates[0].speculation.is_on
        self._choices = choices
        self._ends: list[Ended | None] = [None] * len(generates)
        self._template = Chunk(
            id=_new_id(dialect),
            object=dialect.chunk_object,
            created=int(time.time()),
            model=model,
            choices=(),
            usage=None if with_usage else UNSET,
        )

    def tell(self, index: int, event: Event) -> Iterable[msgspec.Struct]:
        match event:
            case Accepted():
                piece = self._dialect.first_piece(index)
                if piece is not None:
                    yield self._chunk(piece)
            case Delta() if event.text or event.logprobs:
                yield self._chunk(self._dialect.piece(index, event))
            case Ended(reason=reason):
                self._ends[index] = event
                yield self._chunk(self._dialect.last_piece(index, reason))

    def close(self) -> Iterable[msgspec.Struct]:
        if self._template.usage is UNSET:
            return
        ends = [end for end in self._ends if end is not None]
        yield msgspec.structs.replace(
            self._template,
            usage=usage_of(ends, self._choices),
            speculative_stats=speculative_stats_of(ends, is_enabled=self._is_enabled),
        )

    def _chunk(self, choice: Answer) -> Chunk:
        return msgspec.structs.replace(self._template, choices=(choice,))


def _new_id(dialect: Dialect) -> str:
    return f"{dialect.id_prefix}{uuid.uuid4().hex}"
