"""Blocks: rows of one step that go through a mixer together, [rows, width]: plain host arithmetic.

A *mixer* is a module that keeps a state other than plain keys and values: a recurrent layer, or latent attention. It
knows rows and their order in time, so a packed step is taken apart for it into blocks of equal width, without padding:
no mixer needs to honour masks or lengths.
"""

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from functools import cached_property

from worker.cache.layout import Segment, round_up


@dataclass(frozen=True)
class Block:
    """Rows of one width. `segments` are its rows, `tokens` the packed tokens of them, row by row."""

    segments: tuple[Segment, ...]
    tokens: tuple[int, ...]

    @property
    def rows(self) -> int:
        return len(self.segments)

    @property
    def width(self) -> int:
        return self.segments[0].width

    @property
    def is_fresh(self) -> bool:
        """The rows begin here: there is no state before them."""
        return self.segments[0].start == 0

    @property
    def stands(self) -> bool:
        """Nothing of it will be rolled back."""
        return self.segments[0].stands

    @cached_property
    def first_token(self) -> int | None:
        """The first of its packed tokens, if they are neighbours in the step; None if they must be gathered."""
        first = self.tokens[0]
        return first if self.tokens == tuple(range(first, first + len(self.tokens))) else None

    @cached_property
    def first_slot(self) -> int | None:
        """The first of its slots, if its rows are neighbours in the cache; None if they must be gathered."""
        first = self.segments[0].slot
        return first if [s.slot for s in self.segments] == list(range(first, first + self.rows)) else None

    def extent(self, step: int) -> int:
        """Cache positions that its rows attend to, rounded up to a multiple of `step`."""
        return round_up(max(segment.end for segment in self.segments), step)


def recurrent_blocks(segments: Sequence[Segment]) -> list[Block]:
    """Blocks by width, by whether there is a state before, and by whether the rows may be rolled back."""
    return _grouped(_placed(segments), lambda s: (s.width, s.start == 0, s.stands))


def attention_blocks(segments: Sequence[Segment], extent_step: int | None = None) -> list[Block]:
    """Chunks of prompts by width; before them all other tokens as rows of width 1, with `extent_step` by their extent.

    A draft's tokens are written together and seen by none before them, so they need not stand in one row. In rows of
    their own they are computed as plain decoding does it, where a mixer has another formula for width 1. A mixer
    that chooses among the keys chooses them in an order that depends on the extent, so its blocks must not mix extents.
    """
    singles: list[tuple[Segment, int]] = []
    chunks: list[tuple[Segment, int]] = []
    for segment, first in _placed(segments):
        if segment.stands and segment.width > 1:
            chunks.append((segment, first))
        else:
            singles += [(Segment(segment.slot, segment.start + i, 1), first + i) for i in range(segment.width)]
    singles.sort(key=lambda single: single[0].start if extent_step else 0)  # a row's keys before the queries after them
    extents = _grouped(singles, lambda s: round_up(s.end, extent_step) if extent_step else None)
    return extents + _grouped(chunks, lambda s: s.width)


def token_order(blocks: Sequence[Block]) -> list[int] | None:
    """Where each packed token stands in the blocks' outputs, one after the other; None if just there."""
    order = [token for block in blocks for token in block.tokens]
    if order == list(range(len(order))):
        return None
    places = [0] * len(order)
    for place, token in enumerate(order):
        places[token] = place
    return places


def _placed(segments: Sequence[Segment]) -> list[tuple[Segment, int]]:
    """Each segment with its first packed token."""
    placed, first = [], 0
    for segment in segments:
        placed.append((segment, first))
        first += segment.width
    return placed


def _grouped(placed: Sequence[tuple[Segment, int]], kind: Callable[[Segment], Hashable]) -> list[Block]:
    groups: dict[Hashable, list[tuple[Segment, int]]] = {}
    for segment, first in placed:
        groups.setdefault(kind(segment), []).append((segment, first))
    return [
        Block(
            tuple(segment for segment, _ in group),
            tuple(first + i for segment, first in group for i in range(segment.width)),
        )
        for group in groups.values()
    ]
