"""A ragged KV cache in 8 or 4 bits: about half or a quarter of the memory of 16-bit keys and values.

Each token's keys and values are quantized by themselves when they are written, so what is kept of a token depends
neither on its batch nor on a draft; attention widens the part of the slots that it looks at.
"""

from collections.abc import Sequence
from typing import Any

import mlx.core as mx

from worker.cache.layout import UNPADDED, Group
from worker.cache.ragged import RaggedKVCache, RaggedState, UnsupportedCache

GROUP_SIZES = (64, 32)  # elements that share a scale and a bias; the first that divides the head


class QuantizedRaggedKVCache(RaggedKVCache):
    """One layer's keys and values as packed integers uint32 with their scales and biases: six pools.

    Raises `UnsupportedCache` at the first write if no group size divides the heads.
    """

    POOLS = 6

    def __init__(self, state: RaggedState, window: int | None, kv_bits: int) -> None:
        super().__init__(state, window)
        self.kv_bits = kv_bits

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[Any, Any]:
        """Quantize and write [tokens, kv_heads, 1, head_dim]; returns the whole slots, as `attended` takes them."""
        new = [*self._quantized(keys), *self._quantized(values)]
        self._write(new, self.step.slots, self.step.positions)
        return _Packed(self.pools[:3], keys), _Packed(self.pools[3:], values)

    def attended(self, slots: Any, group: Group) -> mx.array:
        """A group's part [slots, kv_heads, extent, head_dim], widened."""
        packed, scales, biases = (super(QuantizedRaggedKVCache, self).attended(pool, group) for pool in slots.pools)
        return mx.dequantize(packed, scales, biases, group_size=self._group_size(slots.head_dim), bits=self.kv_bits)

    def _quantized(self, new: mx.array) -> tuple[mx.array, mx.array, mx.array]:
        packed, scales, biases = mx.quantize(new, group_size=self._group_size(new.shape[3]), bits=self.kv_bits)
        return packed, scales, biases

    def _group_size(self, head_dim: int) -> int:
        for size in GROUP_SIZES:
            if head_dim % size == 0:
                return size
        raise UnsupportedCache(
            f"kv_bits is {self.kv_bits}, but the model's heads have {head_dim} elements, which cannot be quantized in "
            f"groups of {' or '.join(map(str, GROUP_SIZES))}: set kv_bits = 0 for this model"
        )


class _Packed:
    """What a model hands on from the cache to attention."""

    def __init__(self, pools: Sequence[mx.array], new: mx.array) -> None:
        self.pools = pools
        self.head_dim = new.shape[3]
        self.shape = (*pools[0].shape[:3], self.head_dim)
        self.dtype = new.dtype


def quantized(caches: Sequence[Any], kv_bits: int) -> list[QuantizedRaggedKVCache]:
    """The same caches in `kv_bits` bits. Raises `UnsupportedCache` when one holds something else than these."""
    for cache in caches:
        if type(cache) is not RaggedKVCache or not cache.is_plain:
            raise UnsupportedCache(
                f"kv_bits is {kv_bits}, but the model keeps more than keys and values for plain attention (recurrent "
                "states, latent or several caches a layer), which cannot be quantized: set kv_bits = 0 for this model"
            )
        if cache.state.is_by_token:  # the kernel reads keys and values as computed
            cache.state.is_by_token, cache.state.sizes = False, UNPADDED
    return [QuantizedRaggedKVCache(cache.state, cache.window, kv_bits) for cache in caches]
