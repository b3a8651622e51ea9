"""Keys and values of one block, for mixers that do more with them than attention: latent attention, sparse indexers."""

from collections.abc import Sequence
from typing import Any

import mlx.core as mx

from worker.cache.blocks import Block
from worker.cache.ragged import RaggedKVCache, Step


def block_mask(step: Step, block: Block, window: int | None) -> mx.array:
    """What each query of a block may see: bool [rows, 1, width, extent]."""
    return step.remember(("block mask", id(block), window), lambda: _make_mask(step, block, window))


def _make_mask(step: Step, block: Block, window: int | None) -> mx.array:
    query = block_starts(step, block)[:, None, None, None] + mx.arange(block.width, dtype=mx.int32)[:, None]
    key = mx.arange(block.extent(step.style.extent_step), dtype=mx.int32)
    return key <= query if window is None else (key <= query) & (key > query - window)


def block_starts(step: Step, block: Block) -> mx.array:
    """[rows] position of each row's first token."""
    starts = [segment.start for segment in block.segments]
    return step.remember(("block starts", id(block)), lambda: mx.array(starts, dtype=mx.int32))


class BlockKV:
    """One layer's ragged cache as a block's mixers see it: like mlx-lm's `KVCache`, with an offset for each row."""

    def __init__(self, cache: RaggedKVCache, step: Step, block: Block) -> None:
        self.cache = cache
        self.step = step
        self.block = block
        self.keys: mx.array | None = None  # of this block; some mixers tie them into their graph
        self.values: mx.array | None = None

    @property
    def offset(self) -> mx.array:
        """[rows] position of each row's first token, as rope wants it."""
        return block_starts(self.step, self.block)

    def make_mask(self, width: int, return_array: bool = False, window_size: int | None = None) -> mx.array:
        windows = [window for window in (window_size, self.cache.window) if window]
        return block_mask(self.step, self.block, min(windows) if windows else None)

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        """Write [rows, heads, width, dim] behind each row; returns the rows' slots [rows, heads, extent, dim]."""
        slots, positions = self._places()
        self.cache.write(_by_token(keys), _by_token(values), slots, positions)
        self.keys, self.values = self._fetched(self.cache.pools[0]), self._fetched(self.cache.pools[1])
        return self.keys, self.values

    def _places(self) -> tuple[mx.array, mx.array]:
        """Slot and position of each of the block's tokens."""
        segments = self.block.segments
        return self.step.remember(
            ("block places", id(self.block)),
            lambda: (
                mx.array([s.slot for s in segments for _ in range(s.width)], dtype=mx.int32),
                mx.array([s.start + i for s in segments for i in range(s.width)], dtype=mx.int32),
            ),
        )

    def _fetched(self, pool: mx.array) -> mx.array:
        block, extent = self.block, self.block.extent(self.step.style.extent_step)
        if block.first_slot is not None:
            return pool[block.first_slot : block.first_slot + block.rows, :, :extent]
        slots = [segment.slot for segment in block.segments]
        return pool[:, :, :extent][
            self.step.remember(("block slots", id(block)), lambda: mx.array(slots, dtype=mx.int32))
        ]


class IgnoredKV:
    """Stands in for keys and values in a replay, of which only the recurrent states are wanted."""

    def __init__(self, kv: Any, rows: Sequence[int]) -> None:
        self.offset = kv.offset[mx.array(list(rows), dtype=mx.int32)]

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        """The new keys and values alone: what comes of them is never computed."""
        return keys, values


def _by_token(new: mx.array) -> mx.array:
    """[rows, heads, width, dim] → [rows × width, heads, 1, dim]."""
    return new.transpose(0, 2, 1, 3).reshape(-1, new.shape[1], 1, new.shape[3])
