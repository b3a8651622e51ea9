"""The target model behind one call: packed tokens in, logits of the chosen tokens out, its cache ragged.

Works with mlx-lm's model classes as they are. Two seams are used: the attention function that a model's file calls
(see `cache/attention.py`), and the inner model's output, of which only the chosen tokens go on to the vocabulary.
"""

from collections.abc import Sequence
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from worker import cpu_ops
from worker.cache import spans
from worker.cache.attention import attention_style, install
from worker.cache.layout import Segment
from worker.cache.quantized import QuantizedRaggedKVCache, quantized
from worker.cache.ragged import RaggedKVCache, RaggedState, make_ragged_caches
from worker.cache.spans import KVSpan


class Target:
    """One loaded model with its ragged cache.

    `kv_bits` 8 or 4: keys and values are kept in so many bits. Raises `UnsupportedCache` when the model keeps a state
    that the ragged cache cannot hold.
    """

    def __init__(self, model: nn.Module, kv_bits: int = 0) -> None:
        self.model = model
        self.state = RaggedState(attention_style())
        self.caches: Sequence[RaggedKVCache] = make_ragged_caches(model, self.state)
        if kv_bits:
            self.caches = quantized(self.caches, kv_bits)
        install(model)
        cpu_ops.install(model)
        self._head = _HeadInput.of(model)

    def forward(self, segments: Sequence[Segment], tokens: mx.array | Sequence[int], chosen: Sequence[int]) -> mx.array:
        """One packed step: writes the tokens' keys and values, returns logits [chosen, vocabulary], not evaluated.

        `tokens` (int32 [tokens]) are those of the segments, sorted by slot, one after the other; `chosen` indexes
        them. What of it is kept is said afterwards with `state.commit`.
        """
        step = self.state.begin(segments)
        assert step.tokens == len(tokens), (step.tokens, len(tokens))
        packed = (tokens if isinstance(tokens, mx.array) else mx.array(list(tokens), dtype=mx.int32))[:, None]
        self._head.select(None if len(chosen) == step.tokens else mx.array(list(chosen), dtype=mx.int32))
        logits: mx.array = self.model(packed, cache=self.caches)
        if logits.shape[0] != len(chosen):  # the model's inner part could not be reached
            logits = logits[mx.array(list(chosen), dtype=mx.int32)]
        return logits[:, -1]

    def cached_arrays(self) -> list[mx.array]:
        """Keys and values of all layers, to be evaluated with the step."""
        return [pool for cache in self.caches for pool in cache.pools]

    @property
    def has_prefixes(self) -> bool:
        """Whether the state after any prefix of a slot's tokens can be copied out of it and into another slot."""
        return all(type(cache) in (RaggedKVCache, QuantizedRaggedKVCache) for cache in self.caches)

    @property
    def span_bytes_per_token(self) -> int:
        """What a token takes in a span; known once a step has been made."""
        return self.kv_bytes // (self.state.slots * self.state.capacity_tokens)

    def extract(self, slot: int, start: int, end: int) -> KVSpan:
        """Copy positions [start, end) of a slot, not evaluated; it must be before the next step."""
        return spans.extract(self.caches, slot, start, end)

    def insert(self, slot: int, span: KVSpan) -> None:
        """Let a free slot begin with a span, written with the next step."""
        assert self.has_prefixes
        self.state.reserve(slot, span.tokens)
        spans.insert(self.caches, slot, span)
        self.state.commit(slot, span.tokens)

    def scrub(self, slot: int) -> None:
        """Overwrite a slot with zeros: what is not finite would reach other rows through masked products."""
        for cache in self.caches:
            cache.scrub(slot)

    def clear(self) -> None:
        """Forget all rows and give the cache's memory back."""
        self.state.lengths = []
        self.state.capacity_tokens = 0
        for cache in self.caches:
            cache.clear()

    @property
    def kv_bytes(self) -> int:
        return sum(cache.nbytes for cache in self.caches)

    def kv_bytes_per_token(self) -> int:
        """Measured from a one-token step when the cache is empty."""
        assert self.state.slots == 0
        mx.eval(self.forward([Segment(0, 0, 1)], [0], [0]), self.cached_arrays())
        size = self.kv_bytes // (self.state.slots * self.state.capacity_tokens)
        self.clear()
        return size


class _HeadInput:
    """Picks the tokens whose logits are wanted, between a model's layers and its vocabulary projection.

    Without it a chunk of a prompt would pay the projection for tokens that nobody samples.
    """

    def __init__(self) -> None:
        self.chosen: mx.array | None = None

    def select(self, chosen: mx.array | None) -> None:
        self.chosen = chosen

    @classmethod
    def of(cls, model: nn.Module) -> "_HeadInput":
        head = cls()
        inner = getattr(model, "model", None)
        if not isinstance(inner, nn.Module):
            return head
        kind = type(inner)
        if isinstance(shared := getattr(kind, "head_input", None), cls):  # another target of the same model
            return shared

        def call(self: Any, *args: Any, **kwargs: Any) -> Any:
            hidden = kind.__call__(self, *args, **kwargs)
            return hidden if head.chosen is None or not isinstance(hidden, mx.array) else hidden[head.chosen]

        inner.__class__ = type(
            kind.__name__, (kind,), {"__call__": call, "__module__": kind.__module__, "head_input": head}
        )
        return head
