"""Keys and values of neighbouring tokens, copied out of a slot to outlive it, and back into another one."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import mlx.core as mx

from worker.cache.ragged import RaggedKVCache


@dataclass(frozen=True, slots=True)
class KVSpan:
    """All layers' keys and values of some tokens; immutable, in memory of its own.

    Arrays of one form stand together: `stacks` [arrays, kv_heads, tokens, head_dim], one for each form. `places` says
    in which stack, and where in it, each layer's arrays are.
    """

    stacks: tuple[mx.array, ...]
    places: tuple[tuple[int, int], ...]

    @property
    def nbytes(self) -> int:
        return sum(stack.nbytes for stack in self.stacks)

    @property
    def tokens(self) -> int:
        return self.stacks[0].shape[2]

    def split(self, at: int) -> tuple[Self, Self]:
        """The first `at` tokens and the rest, copied: the memory of one does not hang on the other."""
        first = tuple(mx.contiguous(stack[:, :, :at]) for stack in self.stacks)
        rest = tuple(mx.contiguous(stack[:, :, at:]) for stack in self.stacks)
        mx.eval(first, rest)
        return type(self)(first, self.places), type(self)(rest, self.places)


def joined(parts: Sequence[tuple[KVSpan, int]]) -> KVSpan:
    """The first tokens of each span, as many as said, one after the other."""
    first = parts[0][0]
    stacks = [
        mx.concatenate([span.stacks[i][:, :, :tokens] for span, tokens in parts], axis=2)
        for i in range(len(first.stacks))
    ]
    return KVSpan(tuple(stacks), first.places)


def extract(caches: Sequence[RaggedKVCache], slot: int, start: int, end: int) -> KVSpan:
    """Copy positions [start, end) of a slot, not evaluated.

    It must be evaluated before the next step writes: until then it refers to the pools, and a pool with a second
    reference is copied as a whole to be written to.
    """
    forms: dict[tuple[int, int, mx.Dtype], list[mx.array]] = {}
    places = []
    for pool in (pool for cache in caches for pool in cache.pools):
        stack = forms.setdefault((pool.shape[1], pool.shape[3], pool.dtype), [])
        places.append((list(forms).index((pool.shape[1], pool.shape[3], pool.dtype)), len(stack)))
        stack.append(pool[slot, :, start:end])
    return KVSpan(tuple(mx.contiguous(mx.stack(stack)) for stack in forms.values()), tuple(places))


def insert(caches: Sequence[RaggedKVCache], slot: int, span: KVSpan) -> None:
    """Write a span to the beginning of a slot that has room for it; evaluated with the next step."""
    arrays = iter([span.stacks[stack][at] for stack, at in span.places])
    for cache in caches:
        cache.fill(slot, [next(arrays) for _ in range(cache.POOLS)])
