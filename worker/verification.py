"""One forward of the target over all rows of a step: their tokens and drafts go in, the target's choices come out."""

from collections.abc import Callable, Sequence
from typing import cast

import mlx.core as mx
import msgspec

from worker.cache.layout import Segment
from worker.drafters.drafter import NO_DRAFT, Draft
from worker.request import Row
from worker.sampling.logprobs import Logprob, measure
from worker.sampling.sampler import Draw, choose
from worker.target import Target


class Feed(msgspec.Struct, frozen=True, gc=False):
    """One row's part of a step: `width` of its own tokens, and a draft if that reaches its end."""

    row: Row
    width: int
    draft: Draft = NO_DRAFT

    @property
    def reaches_end(self) -> bool:
        return self.width == self.row.uncached

    @property
    def size(self) -> int:
        return self.width + self.draft.length

    @property
    def own_tokens(self) -> list[int]:
        """Of the row itself, without the draft."""
        return self.row.tokens[self.row.cached : self.row.cached + self.width]


class Verified(msgspec.Struct, frozen=True, gc=False):
    """What a row's feed came to: its draft, and the target's own tokens after the pending and each draft token.

    In mid-prompt nothing is chosen: all are empty. `logprobs` has one entry for each of `own`.
    """

    draft: Sequence[int]
    own: Sequence[int]
    logprobs: Sequence[Logprob | None]


def verify(target: Target, feeds: Sequence[Feed], on_wait: Callable[[], None] = lambda: None) -> list[Verified]:
    """Run the step of `feeds` (sorted by slot) and wait for it, once.

    `on_wait` is called before that: from then on Python belongs to other threads for a while.
    """
    packed = _packed(feeds)
    chosen: list[int] = []
    draws: list[Draw] = []
    end = 0
    for feed in feeds:
        end += feed.size
        if feed.reaches_end:
            chosen += range(end - feed.draft.length - 1, end)
            draws += feed.row.draws(_draft_tokens(feed))
    segments = [Segment(f.row.slot, f.row.cached, f.size, stands=not f.draft.length) for f in feeds]
    logits = target.forward(segments, packed, chosen or [0])
    own = choose(logits, draws) if draws else logits
    measured = measure(logits, own, [draw.logprobs for draw in draws])
    on_wait()
    mx.eval(own, packed, measured.arrays, target.cached_arrays())
    tokens = cast(list[int], own.tolist()) if draws else []
    return _split(feeds, cast(list[int], packed.tolist()), tokens, measured.read())


def _draft_tokens(feed: Feed) -> Sequence[int]:
    """The draft on the host; of one still on the device only the length counts, unless the row tallies tokens."""
    draft = feed.draft
    if draft.tokens is not None:
        return draft.tokens
    assert draft.pending is not None
    return range(draft.length) if feed.row.tally is None else draft.pending.tolist()


def _packed(feeds: Sequence[Feed]) -> mx.array:
    """All tokens of a step, int32 [tokens]; drafts that are still in the making take their places on the device."""
    tokens: list[int] = []
    parts: dict[int, tuple[mx.array, list[int], list[int]]] = {}  # of arrays in the making: places in it, and here
    for feed in feeds:
        tokens += feed.own_tokens
        if feed.draft.tokens is not None:
            tokens += feed.draft.tokens
            continue
        pending = feed.draft.pending
        assert pending is not None
        _, taken, places = parts.setdefault(id(pending.tokens), (pending.tokens, [], []))
        taken += pending.places
        places += range(len(tokens), len(tokens) + feed.draft.length)
        tokens += [0] * feed.draft.length
    packed = mx.array(tokens, dtype=mx.int32)
    for made, taken, places in parts.values():
        packed[mx.array(places, dtype=mx.int32)] = made[mx.array(taken, dtype=mx.int32)]
    return packed


def _split(feeds: Sequence[Feed], packed: list[int], own: list[int], logprobs: list[Logprob | None]) -> list[Verified]:
    """The step's tokens by feed; `own` and `logprobs` are of the feeds that end with a choice."""
    parts: list[Verified] = []
    end = at = 0
    for feed in feeds:
        end += feed.size
        count = feed.draft.length + 1 if feed.reaches_end else 0
        parts.append(Verified(packed[end - feed.draft.length : end], own[at : at + count], logprobs[at : at + count]))
        at += count
    return parts
