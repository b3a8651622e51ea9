"""A ragged KV cache: every row has its own length, and rolling a row back is a change of one number.

Slots [slots, kv_heads, capacity, head_dim] are left-aligned. Rejected tokens stay where they are, hidden by the mask,
until the next step writes over them. All layers share one `RaggedState`; a host copy of the lengths sizes everything,
so nothing here waits for the device.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property, partial
from typing import Any, TypeVar, cast

import mlx.core as mx
from mlx_lm.models.cache import KVCache, RotatingKVCache

from common.errors import ConfigError
from worker.cache import token_attention
from worker.cache.layout import (
    CAPACITY_STEP,
    UNPADDED,
    AttentionStyle,
    Group,
    Segment,
    StepSizes,
    group_segments,
    power_of_two,
    round_up,
)
from worker.cache.token_attention import Rotary

T = TypeVar("T")

ROOMY_CAPACITIES = (2048, 1024, 512)  # tokens of a slot where memory is no matter, and each size is a new shape
MOST_SCORES_BY_TOKEN = 1 << 20  # queries × keys of a row: beyond it matrix products are worth preparing a shape


class UnsupportedCache(ConfigError):
    """The model keeps a state that this cache cannot hold."""


class Step:
    """The arrays of one step, built once and shared by all layers.

    `is_by_token`: attention serves each token by itself. The arrays are padded to one of `sizes` with repetitions of
    the last token, which write what it writes. `is_fused`: keys and values are written where attention reads them, and
    rotary embeddings are made there, too.
    """

    def __init__(
        self,
        segments: Sequence[Segment],
        style: AttentionStyle,
        pool_slots: int = 0,
        *,
        by_token: bool = False,
        fused: bool = False,
        sizes: StepSizes = UNPADDED,
    ) -> None:
        self.style = style
        self.segments = tuple(sorted(segments, key=lambda segment: segment.slot))
        self.is_by_token = by_token and all(s.width * s.end <= MOST_SCORES_BY_TOKEN for s in self.segments)
        self.is_fused = fused and self.is_by_token
        self._pool_slots = pool_slots
        slots = [s.slot for s in self.segments for _ in range(s.width)]
        positions = [s.start + i for s in self.segments for i in range(s.width)]
        self.tokens = len(positions)
        is_padded = self.is_by_token == by_token  # few shapes are of no use to a step that is not compiled
        self.padding = sizes.padded(self.tokens) - self.tokens if is_padded else 0
        self.slots = mx.array(slots + slots[-1:] * self.padding, dtype=mx.int32)  # [tokens + padding]
        self.positions = mx.array(positions + positions[-1:] * self.padding, dtype=mx.int32)  # [tokens + padding]
        self.freed: set[int] = set()  # slots that were freed since
        self._memo: dict[tuple[Any, ...], Any] = {}
        self._postponed: dict[int, tuple[mx.array, Rotary]] = {}  # by `id`; the array keeps it from being used again

    @cached_property
    def groups(self) -> list[Group]:
        """Rows that attend together, where tokens do not by themselves."""
        return group_segments(self.segments, self.style, self._pool_slots)

    @contextmanager
    def traced(self, slots: mx.array, positions: mx.array) -> Iterator[None]:
        """Within it the step's arrays are these, while a function of them is compiled."""
        own = self.slots, self.positions, self._memo, self._postponed
        self.slots, self.positions, self._memo, self._postponed = slots, positions, {}, {}
        try:
            yield
        finally:
            self.slots, self.positions, self._memo, self._postponed = own

    def gather_index(self, group: Group) -> mx.array:
        """[slots × width] packed tokens of a padded group."""
        return self.remember(("gather", group.first_token), lambda: mx.array(group.gather_index(), dtype=mx.int32))

    def scatter_index(self, group: Group) -> mx.array:
        """[tokens of the group] places in the padded group; after the last group's the padding of the step."""
        return self.remember(("scatter", group.first_token), lambda: mx.array(self._scattered(group), dtype=mx.int32))

    def _scattered(self, group: Group) -> list[int]:
        index = group.scatter_index()
        return index + index[-1:] * self.padding if self.is_last(group) else index

    def is_last(self, group: Group) -> bool:
        """Whether the tokens of the group are the last ones."""
        return group.first_token + group.tokens == self.tokens

    def mask(self, group: Group, window: int | None, repeats: int) -> mx.array:
        """What each query may see: bool [slots, 1, repeats × width, extent]."""
        return self.remember(("mask", group.first_token, window, repeats), lambda: _make_mask(group, window, repeats))

    def postpone(self, x: mx.array, rotary: Rotary) -> None:
        """These queries or keys are still to be rotated."""
        self._postponed[id(x)] = x, rotary

    def postponed(self, x: mx.array) -> Rotary | None:
        """How these queries or keys are still to be rotated; asked for once."""
        return self._postponed.pop(id(x), (x, None))[1]

    def remember(self, key: tuple[Any, ...], make: Callable[[], T]) -> T:
        """What `make` gave the first time it was asked for under `key` in this step."""
        if key not in self._memo:
            self._memo[key] = make()
        return cast(T, self._memo[key])


def _make_mask(group: Group, window: int | None, repeats: int) -> mx.array:
    starts = mx.array(group.starts(), dtype=mx.int32)
    query = starts[:, None, None] + mx.arange(group.width, dtype=mx.int32)[None, :, None]
    key = mx.arange(group.extent, dtype=mx.int32)
    mask = key <= query
    if window is not None:
        mask = mask & (key > query - window)
    shape = (group.slots, repeats, group.width, group.extent)
    return mx.broadcast_to(mask[:, None], shape).reshape(group.slots, 1, -1, group.extent)


class RaggedState:
    """Lengths and capacity of all slots, and the step in progress."""

    def __init__(self, style: AttentionStyle) -> None:
        self.style = style
        self.lengths: list[int] = []  # tokens kept in each slot
        self.capacity_tokens = 0
        self.longest_tokens = 0  # what the longest row may come to need: room to grow into
        self.step: Step | None = None
        self.is_by_token = False  # whether all layers' attention can serve each token by itself
        self.is_fused = False  # whether such attention may also write keys and values and make rotary embeddings
        self.sizes = UNPADDED  # of steps
        self.fits: Callable[[int, int], bool] = lambda slots, capacity_tokens: True  # whether there may be so many
        self.is_little: Callable[[int, int], bool] = lambda slots, capacity_tokens: False  # of what there may be
        self.most_slots = 0  # that rows will ever have

    @property
    def slots(self) -> int:
        return len(self.lengths)

    def begin(self, segments: Sequence[Segment]) -> Step:
        """Start a step; grows the slots' number and capacity as it needs. Segments must continue their slots."""
        self.reserve(max(segment.slot for segment in segments), max(segment.end for segment in segments))
        for segment in segments:
            assert segment.width > 0 and segment.start == self.lengths[segment.slot], segment
        self.step = self._step(segments)
        return self.step

    def _step(self, segments: Sequence[Segment]) -> Step:
        return Step(segments, self.style, self.slots, by_token=self.is_by_token, fused=self.is_fused, sizes=self.sizes)

    @contextmanager
    def aside(self, segments: Sequence[Segment]) -> Iterator[Step]:
        """Within it the caches are at a step that leaves all lengths alone; afterwards at the one before again."""
        self.reserve(max(segment.slot for segment in segments), max(segment.end for segment in segments))
        own = self.step
        self.step = self._step(segments)
        try:
            yield self.step
        finally:
            self.step = own

    def commit(self, slot: int, length: int) -> None:
        """Keep the first `length` tokens of a slot: less than what was written rolls the rest back."""
        assert 0 <= length <= self.capacity_tokens, (slot, length)
        self.lengths[slot] = length

    def free(self, slot: int) -> None:
        """Forget a slot's tokens, if it has come to have any."""
        if slot < self.slots:
            self.lengths[slot] = 0
        if self.step is not None:
            self.step.freed.add(slot)

    def reserve(self, slot: int, end: int) -> None:
        """Let `slot` exist, with room for `end` tokens; the caches' arrays grow when they are next written to."""
        slots, self.capacity_tokens = self.sized_for(slot, end)
        self.lengths += [0] * (slots - self.slots)

    def sized_for(self, slot: int, end: int) -> tuple[int, int]:
        """Number of slots and tokens in each, once `slot` has room for `end` tokens.

        Where tokens attend by themselves a step is compiled for each size of the pools: then they are large from the
        beginning, if that takes little memory.
        """
        slots = [self.slots] if slot < self.slots else [1 << slot.bit_length(), slot + 1]
        extent = round_up(end, self.style.extent_step)
        capacities = [self.capacity_tokens]
        if extent > self.capacity_tokens:
            roomy = min(self.capacity_tokens * 3 // 2, self.longest_tokens)
            capacities = [round_up(max(extent, roomy), CAPACITY_STEP), round_up(extent, CAPACITY_STEP)]
        sizes = [(number, capacity) for number in slots for capacity in capacities]
        return self._roomy(*sizes[0]) or next((size for size in sizes if self.fits(*size)), sizes[-1])

    def _roomy(self, slots: int, capacity_tokens: int) -> tuple[int, int] | None:
        """More slots and tokens in each than these, where that saves shapes and takes little memory."""
        if not self.is_by_token:
            return None
        slots, least = max(slots, self.most_slots), power_of_two(capacity_tokens)
        sizes = [(slots, max(capacity, least)) for capacity in ROOMY_CAPACITIES]
        return next((size for size in sizes if self.is_little(*size)), None)

    def rearrange(self, kept: Sequence[int], capacity_tokens: int) -> None:
        """From now on slot i is what slot `kept[i]` was, and there are no others; the caches' arrays come first."""
        self.lengths = [self.lengths[slot] if slot < self.slots else 0 for slot in kept]
        self.capacity_tokens = capacity_tokens
        assert max(self.lengths, default=0) <= capacity_tokens


class RaggedKVCache:
    """One layer's keys and values; stands in for mlx-lm's caches in its model classes, for packed steps.

    In a packed step the model sees [tokens, 1] inputs: every token is a batch row of its own for the linear layers and
    for rope (`offset` [tokens]); `ragged_attention` puts the rows together again.
    """

    POOLS = 2  # arrays that it keeps

    def __init__(
        self, state: RaggedState, window: int | None = None, forms: Sequence[tuple[int, int, mx.Dtype]] = ()
    ) -> None:
        self.state = state
        self.window = window
        self.is_plain = True  # only plain attention looks at it
        self.pools: list[mx.array] = []  # keys and values [slots, kv_heads, capacity, head_dim], once there are some
        self._forms = list(forms)  # (kv_heads, dim, dtype) of each pool; known at the latest once written to

    @property
    def step(self) -> Step:
        assert self.state.step is not None
        return self.state.step

    @property
    def offset(self) -> mx.array:
        """[tokens] position of each token, as rope wants it."""
        return self.step.positions

    def make_mask(self, width: int, return_array: bool = False, window_size: int | None = None) -> "Visibility":
        """What mlx-lm's models hand on to attention as `mask`: only a note of the layer's window."""
        return Visibility(window_size)

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[Any, Any]:
        """Write [tokens, kv_heads, 1, head_dim] of this step; returns the whole slots, as `attended` takes them.

        In a fused step they come back as they are: `take_in` writes them.
        """
        if self.step.is_fused:
            self._grow([(array.shape[1], array.shape[3], array.dtype) for array in (keys, values)])
            return keys, values
        self.write(keys, values, self.step.slots, self.step.positions)
        return self.pools[0], self.pools[1]

    def take_in(self, queries: mx.array, keys: mx.array, values: mx.array) -> mx.array:
        """Write what `update_and_fetch` gave back in a fused step; returns the queries [tokens, heads, 1, head_dim],
        rotated where that was postponed."""
        rotary = self.step.postponed(keys)
        assert self.step.postponed(queries) is rotary
        queries, self.pools = token_attention.taken_in(
            queries, keys, values, self.pools, self.step.slots, self.step.positions, rotary
        )
        return queries

    def write(self, keys: mx.array, values: mx.array, slots: mx.array, positions: mx.array) -> None:
        """Write [tokens, kv_heads, 1, head_dim] to the given slots and positions, [tokens] each."""
        self._write([keys, values], slots, positions)

    def attended(self, slots: mx.array, group: Group) -> mx.array:
        """A group's part [slots, kv_heads, extent, head_dim] of the keys or values that `update_and_fetch` gave."""
        return slots[group.first_slot : group.first_slot + group.slots, :, : group.extent]

    def _write(self, new: Sequence[mx.array], slots: mx.array, positions: mx.array) -> None:
        """Write [tokens, kv_heads, 1, dim] of each pool; in place, as the cache holds the sole reference."""
        self._grow([(array.shape[1], array.shape[3], array.dtype) for array in new])
        for pool, array in zip(self.pools, new, strict=True):
            heads = array.shape[1]
            places = self.step.remember(("places", id(slots), heads), partial(_places, slots, positions, heads))
            pool[places] = array[:, :, 0]

    def fill(self, slot: int, arrays: Sequence[mx.array]) -> None:
        """Write [kv_heads, tokens, dim] of each pool to the beginning of a slot."""
        self._grow([(array.shape[0], array.shape[2], array.dtype) for array in arrays])
        for pool, array in zip(self.pools, arrays, strict=True):
            pool[slot, :, : array.shape[1]] = array

    def _grow(self, forms: Sequence[tuple[int, int, mx.Dtype]]) -> None:
        """Let there be a pool for each (kv_heads, dim, dtype), large enough."""
        self._forms = list(forms)
        self.make_room()

    def make_room(self) -> bool:
        """Let the pools be as large as the state says; False if it is not known yet what they hold."""
        pools: list[mx.array | None] = [*self.pools] or [None] * len(self._forms)
        slots, capacity = self.state.slots, self.state.capacity_tokens
        self.pools = [
            _grown(pool, (slots, heads, capacity, dim), dtype)
            for pool, (heads, dim, dtype) in zip(pools, self._forms, strict=True)
        ]
        return bool(self._forms)

    def arrays(self) -> list[mx.array]:
        """The pools, to be evaluated with the step."""
        return list(self.pools)

    def scrub(self, slot: int) -> None:
        """Overwrite a slot with zeros."""
        for pool in self.pools:
            pool[slot] = 0

    def rearrange(self, kept: Sequence[int], capacity_tokens: int) -> None:
        """Let slot i be what slot `kept[i]` was, shorter if said, and give the memory of all others back."""
        for i, pool in enumerate(self.pools):  # one by one: the old one's memory is free for the next
            slots = mx.array([min(slot, pool.shape[0] - 1) for slot in kept], dtype=mx.int32)
            self.pools[i] = mx.take(pool[:, :, :capacity_tokens], slots, axis=0)
            del pool
            mx.eval(self.pools[i])

    def clear(self) -> None:
        """Give the memory back."""
        self.pools = []

    @property
    def nbytes(self) -> int:
        return sum(pool.nbytes for pool in self.pools)


class Visibility:
    """Stands in for a mask between mlx-lm's model code and `ragged_attention`."""

    __slots__ = ("window",)

    def __init__(self, window: int | None) -> None:
        self.window = window


def _places(slots: mx.array, positions: mx.array, heads: int) -> tuple[mx.array, mx.array, mx.array]:
    """Index of [tokens, heads] places in a pool, in the very form that a scatter takes: all layers share it."""
    parts = (slots[:, None], mx.arange(heads)[None], positions[:, None])
    shape = (slots.shape[0], heads)
    slot, head, position = (mx.contiguous(mx.broadcast_to(part.astype(mx.uint32), shape)) for part in parts)
    return slot, head, position


def _grown(pool: mx.array | None, shape: tuple[int, int, int, int], dtype: mx.Dtype) -> mx.array:
    if pool is not None and pool.shape == shape:
        return pool
    grown = mx.zeros(shape, dtype)
    if pool is not None:
        grown[: pool.shape[0], :, : pool.shape[2]] = pool
    return grown


def ragged_cache(cache: Any, state: RaggedState) -> RaggedKVCache:
    """The ragged form of one of mlx-lm's key-value caches.

    Raises `UnsupportedCache` for another kind (chunked, quantized, rotating with a kept start …).
    """
    if type(cache) is KVCache:
        return RaggedKVCache(state)
    if type(cache) is RotatingKVCache and not cache.keep:
        return RaggedKVCache(state, window=cache.max_size)
    raise UnsupportedCache(
        f"the model keeps a {type(cache).__name__}; supported are models with plain or sliding-window KV caches, "
        "latent attention and recurrent states"
    )
