"""The suffix drafter: copies what followed the longest match in the row itself or in recent outputs of its scope.

After SuffixDecoding (arXiv 2411.04975): matches of any length, the commonest continuation, drafts as long as they are
likely to stand. Costs the device nothing.
"""

from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import msgspec

from worker.drafters.drafter import CopyingDrafter, Offer
from worker.drafters.memory import CONTEXT_TOKENS, GENERATION_TOKENS, Generation, Memory
from worker.drafters.occurrences import NO_MATCH, Continuation, Match, Occurrences, continuation
from worker.request import Row

SCOPES = 16
LEAST_REACH = 0.1  # a draft ends where its next token would stand with a chance below this
LEAST_SHARED_MATCH = 3  # shorter ones in other outputs are right one time in ten
LONGEST_TOLD = 8  # what a draft says of its match goes no further: longer ones are right equally often
FIRST_ROOM = 512  # tokens that a row may grow by before its index is made anew
# A lone match of as many tokens is right every other time; measured on the answers of a small model.
_OWN_DOUBT, _SHARED_DOUBT = 2.0, 6.0


@dataclass(slots=True)
class _Reading:
    """A row's match in one generation, found when that had `known` tokens."""

    generation: Generation
    match: Match = NO_MATCH
    known: int = 0


@dataclass(slots=True)
class _Row:
    """A live row: the places of its own n-grams, and the matches of its first `seen` tokens."""

    places: Occurrences
    seen: int = 0
    own: Match = NO_MATCH
    shared: list[_Reading] = field(default_factory=list)


class Copy(msgspec.Struct, frozen=True, gc=False):
    """Proposed tokens, and the length of a lone match in the row itself that is as likely right, up to LONGEST_TOLD."""

    tokens: tuple[int, ...]
    match: int


NO_COPY = Copy((), 0)


class SuffixDrafter(CopyingDrafter):
    """Rows read what ended rows of their scope wrote; scopes never see each other's tokens.

    Shared memory takes at most `scopes` × `Memory.bytes_for(generation_tokens)`, by default 16 × 3.5 MiB; for a new
    scope the least recently used one is dropped. A live row takes `Occurrences.bytes_for(its tokens + FIRST_ROOM)`,
    24 to 36 bytes a token, and up to twice as much once it has outgrown that.
    """

    name = "suffix"

    def __init__(
        self,
        *,
        least_reach: float = LEAST_REACH,
        least_shared_match: int = LEAST_SHARED_MATCH,
        scopes: int = SCOPES,
        generation_tokens: int = GENERATION_TOKENS,
    ) -> None:
        self._least_reach = least_reach
        self._least_shared_match = least_shared_match
        self._scopes = scopes
        self._generation_tokens = generation_tokens
        self._rows: dict[str, _Row] = {}
        self._memories: OrderedDict[str, Memory] = OrderedDict()  # the least recently used first

    def offer(self, row: Row, limit: int) -> Offer | None:
        copy = self.propose(row.id, row.request.scope, row.tokens, limit)
        return Offer(self.name, len(copy.tokens), copy.match, copy.tokens) if copy.tokens else None

    def forget(self, row: Row, *, is_finished: bool) -> None:
        if is_finished:
            self.finish(row.id, row.request.scope, row.tokens, len(row.request.prompt))
        else:
            self.drop(row.id)

    def propose(self, row_id: str, scope: str, tokens: Sequence[int], limit: int) -> Copy:
        """At most `limit` tokens that may follow `tokens`, the row's prompt and output; never fewer than last time."""
        row = self._rows.get(row_id)
        if row is None:
            row = self._rows[row_id] = _Row(Occurrences(len(tokens) + FIRST_ROOM))
        row.places.extend(tokens)
        row.own = row.places.follow(tokens, row.own, tokens, row.seen)
        self._read_shared(row, scope, tokens)
        row.seen = len(tokens)
        found = list(self._continuations(row, tokens, limit))
        # Of equals the first, the row's own.
        best = max(found, key=lambda one: one.expected) if len(found) > 1 else found[0] if found else _NOTHING
        return Copy(best.tokens, _lone_match(best.chances[0])) if best.tokens else NO_COPY

    def finish(self, row_id: str, scope: str, tokens: Sequence[int], prompt_tokens: int) -> None:
        """The row has ended: what follows the first `prompt_tokens` of its `tokens` joins its scope's memory."""
        self.drop(row_id)
        if len(tokens) == prompt_tokens:
            return
        if scope not in self._memories:
            self._memories[scope] = Memory(self._generation_tokens)
        self._memories.move_to_end(scope)
        self._memories[scope].add(tokens[max(prompt_tokens - CONTEXT_TOKENS, 0) :])
        if len(self._memories) > self._scopes:
            self._memories.popitem(last=False)

    def drop(self, row_id: str) -> None:
        """The row is gone; nothing is learned from it."""
        self._rows.pop(row_id, None)

    def _read_shared(self, row: _Row, scope: str, tokens: Sequence[int]) -> None:
        memory = self._memories.get(scope)
        if memory is None:
            row.shared = []
            return
        self._memories.move_to_end(scope)
        before = {id(reading.generation): reading for reading in row.shared}
        row.shared = [before.get(id(one)) or _Reading(one) for one in memory.generations()]
        for reading in row.shared:
            text, places = reading.generation.text, reading.generation.places
            if reading.known < len(text):  # another row has ended meanwhile
                reading.match, reading.known = places.find(text, tokens, self._least_shared_match), len(text)
            else:
                reading.match = places.follow(text, reading.match, tokens, row.seen, self._least_shared_match)

    def _continuations(self, row: _Row, tokens: Sequence[int], limit: int) -> Iterator[Continuation]:
        if row.own.places:
            yield continuation(tokens, row.own, limit, _OWN_DOUBT, self._least_reach)
        for reading in row.shared:
            if reading.match.length >= self._least_shared_match:
                yield continuation(reading.generation.text, reading.match, limit, _SHARED_DOUBT, self._least_reach)


def _lone_match(chance: float) -> int:
    """The length L of a match at one place of the row itself that is right with `chance`: 1 / (1 + doubt / L)."""
    return min(max(round(_OWN_DOUBT * chance / (1.0 - chance)), 1), LONGEST_TOLD)


_NOTHING = Continuation()
