"""Recurrent states of all rows of one layer, with rollback.

Arrays are immutable, so the states before a step are kept for nothing. A row whose tokens all stand has the state after
the step; a row that was rolled back to n of them gets its state from a replay of the layer's mixers alone, from the
state before over the first n of their recorded inputs. It is only built here, and computed with
the next step.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import mlx.core as mx
from mlx_lm.models.cache import ArraysCache

from worker.cache.blocks import Block
from worker.cache.ragged import RaggedState, Step

States = list[mx.array | None]  # one layer's, each [rows, …]; None where the layer has none (yet)


@dataclass(slots=True)
class LiveBlock:
    """A block of the latest step: its states before, the cache that its mixers wrote to, and how to run them again."""

    block: Block
    before: States
    cache: ArraysCache
    calls: list[Callable[[ArraysCache, Sequence[int], int], None]] = field(default_factory=list)

    def replay(self, rows: Sequence[int], tokens: int) -> States:
        """States of some of the rows after their first `tokens` tokens."""
        cache = arrays_cache([pick_rows(array, rows) for array in self.before])
        for call in self.calls:
            call(cache, rows, tokens)
        return states_of(cache)


@dataclass(frozen=True, slots=True)
class _Place:
    """Where a slot's state lies: one row of arrays that it may share with other slots."""

    states: States
    row: int


class RecurrentCache:
    """Stands in for mlx-lm's `ArraysCache` of one layer, for packed steps."""

    def __init__(self, state: RaggedState, size: int) -> None:
        self.state = state
        self.size = size
        self._places: dict[int, _Place] = {}
        self._step: Step | None = None
        self._live: list[LiveBlock] = []

    def make_mask(self, *_: Any, **__: Any) -> None:
        """Blocks have no padding, so there is nothing to mask."""

    def live_blocks(self, blocks: Sequence[Block]) -> list[LiveBlock]:
        """The step's blocks with the states of their rows; the same ones for every mixer that shares this cache."""
        if self._step is not self.state.step:
            self.settle()
            self._step = self.state.step
            self._live = [self._begin(block) for block in blocks]
        return self._live

    def settle(self) -> None:
        """Give every row of the latest step the state that belongs to the tokens it kept."""
        for live in self._live:
            for kept, rows in self._kept(live.block).items():
                self._settle_rows(live, rows, kept)
        self._live, self._step = [], None

    def arrays(self) -> list[mx.array]:
        """All states, to be evaluated with the step."""
        states = [live.cache.cache for live in self._live] + [place.states for place in self._places.values()]
        return list({id(array): array for group in states for array in group if array is not None}.values())

    def scrub(self, slot: int) -> None:
        """Drop what a slot held; rows never meet in a recurrence, so nothing of it can reach another."""
        self._places.pop(slot, None)

    def rearrange(self, kept: Sequence[int], capacity_tokens: int) -> None:
        """Let slot i be what slot `kept[i]` was; a state has the same size at any capacity."""
        self.settle()
        self._places = _close_together(
            {slot: self._places[old] for slot, old in enumerate(kept) if old in self._places}
        )

    def clear(self) -> None:
        """Give the memory back."""
        self._places.clear()
        self._live, self._step = [], None

    @property
    def nbytes(self) -> int:
        return sum(array.nbytes for array in self.arrays())

    def _begin(self, block: Block) -> LiveBlock:
        if block.is_fresh:
            before: States = [None] * self.size
        else:
            before = gathered([self._places[segment.slot] for segment in block.segments])
        if block.stands:  # what was before is not needed again
            for segment in block.segments:
                self._places.pop(segment.slot, None)
        return LiveBlock(block, [] if block.stands else before, arrays_cache(before))

    def _kept(self, block: Block) -> dict[int | None, list[int]]:
        """Rows of a block by how many of its tokens they keep; None for rows that are gone."""
        freed = self._step.freed if self._step else set()
        kept: dict[int | None, list[int]] = {}
        for row, segment in enumerate(block.segments):
            is_gone = segment.slot in freed
            kept.setdefault(None if is_gone else self.state.lengths[segment.slot] - segment.start, []).append(row)
        return kept

    def _settle_rows(self, live: LiveBlock, rows: list[int], kept: int | None) -> None:
        slots = [live.block.segments[row].slot for row in rows]
        if kept is None or (kept == 0 and live.block.is_fresh):
            for slot in slots:
                self._places.pop(slot, None)
            return
        assert kept == live.block.width or not live.block.stands, (live.block, kept)
        if kept > 0:
            is_whole = kept == live.block.width
            states = states_of(live.cache) if is_whole else live.replay(rows, kept)
            for at, slot in enumerate(slots):
                self._places[slot] = _Place(states, rows[at] if is_whole else at)


def arrays_cache(states: States) -> ArraysCache:
    """mlx-lm's own cache, holding `states`."""
    cache = ArraysCache(len(states))
    cache.cache = cast(list[None], list(states))  # so it was inferred from what it begins with
    return cache


def states_of(cache: ArraysCache) -> States:
    """What mlx-lm's own cache holds."""
    return cast(States, list(cache.cache))


def pick_rows(array: mx.array | None, rows: Sequence[int]) -> mx.array | None:
    """Rows of an array [rows, …]."""
    if array is None or list(rows) == list(range(array.shape[0])):
        return array
    return array[rows[0] : rows[0] + 1] if len(rows) == 1 else array[mx.array(list(rows), dtype=mx.int32)]


def gathered(places: Sequence[_Place]) -> States:
    """States of several rows side by side; as they are where they lie so already, as in plain decoding."""
    runs = list(_runs(places))
    size = len(places[0].states)
    return [_joined([pick_rows(states[i], rows) for states, rows in runs]) for i in range(size)]


def _close_together(places: dict[int, _Place]) -> dict[int, _Place]:
    """The same states in arrays that hold nothing else."""
    sharing: dict[int, list[int]] = {}
    for slot, place in places.items():
        sharing.setdefault(id(place.states), []).append(slot)
    moved: dict[int, _Place] = {}
    for slots in sharing.values():
        rows = mx.array([places[slot].row for slot in slots], dtype=mx.int32)
        states = [None if array is None else mx.take(array, rows, axis=0) for array in places[slots[0]].states]
        moved |= {slot: _Place(states, row) for row, slot in enumerate(slots)}
    return moved


def _joined(parts: Sequence[mx.array | None]) -> mx.array | None:
    arrays = [part for part in parts if part is not None]
    assert len(arrays) in (0, len(parts)), "rows of one block differ in which states they have"
    return None if not arrays else arrays[0] if len(arrays) == 1 else mx.concatenate(arrays)


def _runs(places: Iterable[_Place]) -> Iterable[tuple[States, list[int]]]:
    """Neighbouring places that lie in the same arrays."""
    states: States | None = None
    rows: list[int] = []
    for place in places:
        if states is not None and place.states is not states:
            yield states, rows
            rows = []
        states = place.states
        rows.append(place.row)
    if states is not None:
        yield states, rows
