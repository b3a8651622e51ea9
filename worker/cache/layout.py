"""Which tokens a step brings, where they go in the cache, and how attention is grouped: plain host arithmetic.

A step is *packed*: the tokens of all rows stand one after the other, [tokens], whatever each row's width, so that the
linear layers of the model see no padding. Only attention looks at rows, in groups of neighbouring slots.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import Any

import msgspec
import numpy as np

Array = np.ndarray[Any, Any]

CAPACITY_STEP = 256  # slots grow by multiples of this many tokens
LARGEST_PADDED = 8192  # tokens of a step, where there are to be few shapes


class Segment(msgspec.Struct, frozen=True, gc=False):
    """One row's part of a step: `width` tokens written to `slot` from position `start` on.

    `stands`: all of it will be kept, as with a prompt's chunk. Then no state has to be kept for a rollback.
    """

    slot: int
    start: int
    width: int
    stands: bool = False

    @property
    def end(self) -> int:
        return self.start + self.width


@dataclass(frozen=True, slots=True)
class AttentionStyle:
    """How attention is best done on a device.

    `extent_step`: attended extents are rounded up to a multiple of it. It must be a multiple of the width of vector
    units, which makes the sum inside softmax independent of the extent. `group_overhead`: the fixed cost of one more
    group, in scores (queries × attended slots). `folds_heads`: the query heads that share a key head go through one
    matrix product, for devices without a fused attention kernel. `doubles_shapes`: numbers of slots and widths are
    rounded up to powers of two, for devices that prepare a kernel for every new shape (some 80 ms on CUDA).
    `by_token`: a kernel serves each token by itself (`token_attention.py`), where the model's heads suit it.
    """

    extent_step: int
    group_overhead: int
    folds_heads: bool
    doubles_shapes: bool = False
    by_token: bool = False


@dataclass(frozen=True)
class Group:
    """Neighbouring slots that attend together, padded to one width and one extent."""

    segments: tuple[Segment, ...]
    first_token: int
    style: AttentionStyle
    pool_slots: int  # that there are at all

    @cached_property
    def first_slot(self) -> int:
        return min(self.segments[0].slot, self.pool_slots - self.slots)

    @cached_property
    def slots(self) -> int:
        count = self.segments[-1].slot + 1 - self.segments[0].slot
        return min(power_of_two(count), self.pool_slots) if self.style.doubles_shapes else count

    @cached_property
    def width(self) -> int:
        width = max(segment.width for segment in self.segments)
        return power_of_two(width) if self.style.doubles_shapes else width

    @cached_property
    def extent(self) -> int:
        return round_up(max(segment.end for segment in self.segments), self.style.extent_step)

    @cached_property
    def tokens(self) -> int:
        return sum(segment.width for segment in self.segments)

    @cached_property
    def is_rectangular(self) -> bool:
        """Every slot of the group has exactly `width` tokens: no gather is needed."""
        return self.tokens == self.slots * self.width

    def gather_index(self) -> list[int]:
        """Token of the packed step for each [slot, column]; padding points at the group's first token."""
        index = [self.first_token] * (self.slots * self.width)
        for column, token in zip(
            self.scatter_index(), range(self.first_token, self.first_token + self.tokens), strict=True
        ):
            index[column] = token
        return index

    def scatter_index(self) -> list[int]:
        """Flat [slot, column] of each of the group's packed tokens."""
        return [
            (segment.slot - self.first_slot) * self.width + column
            for segment in self.segments
            for column in range(segment.width)
        ]

    def starts(self) -> list[int]:
        """Position of the first query of each slot; -extent for a slot without tokens, which then sees nothing."""
        starts = [-self.extent - self.width] * self.slots
        for segment in self.segments:
            starts[segment.slot - self.first_slot] = segment.start
        return starts


def power_of_two(value: int) -> int:
    """The smallest power of two that is at least `value` (from 1)."""
    return 1 << (value - 1).bit_length()


def padded_tokens(tokens: int) -> int:
    """The least of 1, 2, 3, 4, 6, 8, 12, 16, 24 … that is at least `tokens`: few shapes, less than half more."""
    power = power_of_two(tokens)
    return power * 3 // 4 if power > 2 and tokens <= power * 3 // 4 else power


class StepSizes:
    """Numbers of tokens that steps are padded to: each to the least that is enough, and to nothing beyond all of them.

    By default no step is padded.
    """

    def __init__(self, sizes: Iterable[int] = ()) -> None:
        ascending = sorted(sizes)
        reached = np.arange(ascending[-1] + 1 if ascending else 0)
        self._padded: Array = np.array(ascending, dtype=np.int64)[np.searchsorted(ascending, reached)]

    def padded(self, tokens: int) -> int:
        """Tokens of a step that has so many of its own."""
        return int(self._padded[tokens]) if tokens < len(self._padded) else tokens

    def padded_all(self, tokens: Array) -> Array:
        """The same for each of these numbers."""
        if not len(self._padded):
            return tokens
        padded: Array = np.where(
            tokens < len(self._padded), self._padded[np.minimum(tokens, len(self._padded) - 1)], tokens
        )
        return padded


UNPADDED = StepSizes()
FEW_SHAPES = StepSizes({padded_tokens(tokens) for tokens in range(1, LARGEST_PADDED + 1)})


def padded_places(chosen: int, tokens: int) -> int:
    """So many of `tokens` are chosen, rounded up to all of them, a quarter, a sixteenth …: few shapes beside theirs."""
    while tokens // 4 >= max(chosen, 1):
        tokens //= 4
    return tokens


def round_up(value: int, step: int) -> int:
    """The smallest multiple of `step` that is at least `value`."""
    return -(-value // step) * step


def group_segments(segments: Sequence[Segment], style: AttentionStyle, pool_slots: int = 0) -> list[Group]:
    """Groups of least cost for segments sorted by slot: neighbours merge while padding costs less than a group."""
    spans = [_Span.of(i, segment, style.extent_step) for i, segment in enumerate(segments)]
    whole = _Span.merged_all(spans)
    if whole.scores - sum(span.scores for span in spans) > style.group_overhead:
        _merge_neighbours(spans, style.group_overhead)
    else:
        spans = [whole]
    groups: list[Group] = []
    first_token = 0
    pool_slots = max(pool_slots, segments[-1].slot + 1)
    for span in spans:
        own = tuple(segments[span.first : span.last + 1])
        groups.append(Group(own, first_token, style, pool_slots))
        first_token += groups[-1].tokens
    return groups


class _Span(msgspec.Struct, frozen=True, gc=False):
    """Neighbouring segments as a group in the making, in figures alone."""

    first: int  # indexes of its segments
    last: int
    first_slot: int
    last_slot: int
    width: int
    extent: int

    @classmethod
    def of(cls, i: int, segment: Segment, extent_step: int) -> "_Span":
        return cls(i, i, segment.slot, segment.slot, segment.width, round_up(segment.end, extent_step))

    @classmethod
    def merged_all(cls, spans: Sequence["_Span"]) -> "_Span":
        width, extent = max(s.width for s in spans), max(s.extent for s in spans)
        return cls(spans[0].first, spans[-1].last, spans[0].first_slot, spans[-1].last_slot, width, extent)

    @property
    def scores(self) -> int:
        return (self.last_slot + 1 - self.first_slot) * self.width * self.extent


def _merge_neighbours(spans: list[_Span], overhead: int) -> None:
    """Merge the pair that needs least padding, again and again, in place."""
    paddings = [_padding(left, right) for left, right in pairwise(spans)]
    while paddings and (least := min(paddings)) <= overhead:
        at = paddings.index(least)
        spans[at : at + 2] = [_Span.merged_all(spans[at : at + 2])]
        del paddings[at]
        for i in (at - 1, at):
            if 0 <= i < len(paddings):
                paddings[i] = _padding(spans[i], spans[i + 1])


def _padding(left: _Span, right: _Span) -> int:
    return _Span.merged_all((left, right)).scores - left.scores - right.scores
