"""The target model behind one call: packed tokens in, logits of the chosen tokens out, its cache ragged.

Works with mlx-lm's model classes as they are. Two seams are used: the attention function that a model's file calls
(see `cache/attention.py`), and the inner model's output, of which only the chosen tokens go on to the vocabulary.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import mlx.core as mx
import mlx.nn as nn

from worker import cpu_ops, matrices
from worker.cache import spans
from worker.cache.attention import attention_style, install
from worker.cache.families import LayerCache, ragged_caches
from worker.cache.layout import Segment, padded_places
from worker.cache.quantized import QuantizedRaggedKVCache, quantized
from worker.cache.ragged import RaggedKVCache, RaggedState, Step
from worker.cache.spans import KVSpan
from worker.compiled import CompiledStep
from worker.taps import Taps, inner_model


@dataclass(frozen=True, slots=True)
class KVSize:
    """Bytes of cache: for each position of a row, and for each row whatever its length (recurrent states)."""

    per_token: int
    per_row: int


class Follower(Protocol):
    """Someone who goes by what the target's layers put out, with caches that live in the target's slots."""

    def saw(self, segments: Sequence[Segment], outputs: Sequence[mx.array]) -> None:
        """A step of these segments was built; `outputs` of the tapped layers, [tokens, 1, hidden] each."""

    def cleared(self) -> None:
        """All rows are gone."""


class Target:
    """One loaded model with its ragged cache.

    `kv_bits` 8 or 4: keys and values are kept in so many bits. Raises `UnsupportedCache` when the model keeps a state
    that the ragged cache cannot hold.
    """

    def __init__(self, model: nn.Module, kv_bits: int = 0) -> None:
        self.model = model
        self.state = RaggedState(attention_style())
        self.caches = ragged_caches(model, self.state)
        if kv_bits:
            self.caches = list(quantized(self.caches, kv_bits))
        self.caches_beside: list[RaggedKVCache] = []  # of the follower
        install(model)
        cpu_ops.install(model)
        matrices.install(model)
        self._head = _HeadInput.of(model)
        self._follower: Follower | None = None
        self._taps: Taps | None = None
        self._is_partial = False  # see `partial`
        self._tapped: list[mx.array] = []  # what the tapped layers put out in the latest step
        self.on_compile: Callable[[], None] = lambda: None  # called before a step of a new shape is compiled …
        self.compiled_shapes = 0  # … of which there were so many
        self._compiled = CompiledStep(self._run, self._kv_layers, self.state, self.tell_compile)

    def tell_compile(self) -> None:
        """A step of a new shape is about to be compiled."""
        self.compiled_shapes += 1
        self.on_compile()

    def forward(self, segments: Sequence[Segment], tokens: mx.array | Sequence[int], chosen: Sequence[int]) -> mx.array:
        """One packed step: writes the tokens' keys and values, returns logits [chosen, vocabulary], not evaluated.

        `tokens` (int32 [tokens]) are those of the segments, sorted by slot, one after the other; `chosen` indexes
        them. What of it is kept is said afterwards with `state.commit`.
        """
        step = self.state.begin(segments)
        assert step.tokens == len(tokens), (step.tokens, len(tokens))
        packed = tokens if isinstance(tokens, mx.array) else mx.array(list(tokens), dtype=mx.int32)
        size, last = step.tokens + step.padding, [step.tokens - 1]
        if step.padding:
            packed = packed[mx.array([*range(step.tokens), *last * step.padding], dtype=mx.int32)]
        if step.is_by_token:
            places = [*chosen, *last * (padded_places(len(chosen), size) - len(chosen))]
            run = self._run if self._is_partial else self._compiled
            outputs = run(packed, mx.array(places, dtype=mx.int32))
        elif len(chosen) == step.tokens:
            outputs = self._run(packed, None)
        else:
            places = [*chosen, *last * (min(self.state.sizes.padded(len(chosen)), size) - len(chosen))]
            outputs = self._run(packed, mx.array(places, dtype=mx.int32))
        return self._followed(step, outputs)[: len(chosen)]

    @contextmanager
    def partial(self) -> Iterator[None]:
        """Within it the model is not the whole one: nobody follows it, and nothing is compiled."""
        self._is_partial = True
        try:
            yield
        finally:
            self._is_partial = False

    def follow(self, follower: Follower, layers: Sequence[int], caches: Sequence[RaggedKVCache]) -> None:
        """Tell `follower` from now on what these layers put out; its caches are more layers of the slots.

        Raises `NoLayers`.
        """
        assert self._follower is None and not self.state.slots
        self._taps = Taps(self.model, layers)
        self._follower = follower
        self.caches_beside = list(caches)
        own = [c for c in self._kv_layers if c not in caches]
        self._compiled = CompiledStep(self._run, own, self.state, self.tell_compile)

    def _followed(self, step: Step, outputs: list[mx.array]) -> mx.array:
        logits, *self._tapped = outputs
        if self._follower is not None and not self._is_partial:
            self._follower.saw(step.segments, self._tapped)
        return logits

    def _run(self, packed: mx.array, chosen: mx.array | None) -> list[mx.array]:
        """The logits [chosen, vocabulary] of packed tokens (None chooses all), and what tapped layers put out."""
        self._head.select(chosen)
        logits: mx.array = self.model(packed[:, None], cache=self.caches)
        self._head.select(None)  # whoever else calls the model wants all of its tokens
        if chosen is not None and not self._head.is_reached:
            logits = logits[chosen]
        return [logits[:, -1], *(self._taps.take() if self._taps and not self._is_partial else [])]

    def cached_arrays(self) -> list[mx.array]:
        """Keys, values and recurrent states of all layers, to be evaluated with the step, and what is tapped of it."""
        return [*self._tapped, *(array for cache in self.layers for array in cache.arrays())]

    @property
    def layers(self) -> list[LayerCache]:
        """The caches of all layers, one after the other, and those of the follower."""
        own = [c for cache in self.caches for c in (cache if isinstance(cache, tuple) else (cache,))]
        return [*own, *self.caches_beside]

    @property
    def has_prefixes(self) -> bool:
        """Whether the state after any prefix of a slot's tokens can be copied out of it and into another slot."""
        return all(type(cache) in (RaggedKVCache, QuantizedRaggedKVCache) for cache in self.layers)

    @property
    def span_bytes_per_token(self) -> int:
        """What a token takes in a span; known once a step has been made."""
        return self.kv_bytes // (self.state.slots * self.state.capacity_tokens)

    def extract(self, slot: int, start: int, end: int) -> KVSpan:
        """Copy positions [start, end) of a slot, not evaluated; it must be before the next step."""
        for cache in self.caches_beside:
            cache.make_room()
        return spans.extract(self._kv_layers, slot, start, end)

    def insert(self, slot: int, span: KVSpan) -> None:
        """Let a free slot begin with a span, written with the next step."""
        assert self.has_prefixes
        self.state.reserve(slot, span.tokens)
        spans.insert(self._kv_layers, slot, span)
        self.state.commit(slot, span.tokens)

    @property
    def _kv_layers(self) -> list[RaggedKVCache]:
        return [cache for cache in self.layers if isinstance(cache, RaggedKVCache)]

    def scrub(self, slot: int) -> None:
        """Overwrite a slot with zeros: what is not finite would reach other rows through masked products."""
        for cache in self.layers:
            cache.scrub(slot)

    def rearrange(self, kept: Sequence[int], capacity_tokens: int | None = None) -> None:
        """Between steps: slot i becomes what slot `kept[i]` was, with room for so many tokens; all others are gone."""
        state = self.state
        if state.slots:
            capacity = state.capacity_tokens if capacity_tokens is None else min(state.capacity_tokens, capacity_tokens)
            for cache in self.layers:
                cache.rearrange(kept, capacity)
            state.rearrange(kept, capacity)

    def clear(self) -> None:
        """Forget all rows and give the cache's memory back."""
        self.state.lengths = []
        self.state.capacity_tokens = 0
        self.state.step = None
        self._tapped = []
        for cache in self.layers:
            cache.clear()
        if self._follower is not None:
            self._follower.cleared()

    @property
    def kv_bytes(self) -> int:
        return sum(cache.nbytes for cache in self.layers)

    def measure_kv(self) -> KVSize:
        """Measured from a one-token step when the cache is empty."""
        assert self.state.slots == 0
        mx.eval(self.forward([Segment(0, 0, 1)], [0], [0]), self.cached_arrays())
        for cache in self.caches_beside:
            cache.make_room()
        by_token = sum(cache.nbytes for cache in self.layers if isinstance(cache, RaggedKVCache))
        size = KVSize(
            per_token=by_token // (self.state.slots * self.state.capacity_tokens),
            per_row=2 * (self.kv_bytes - by_token),  # the states before a step are kept until it is settled
        )
        self.clear()
        return size


class _HeadInput:
    """Picks the tokens whose logits are wanted, between a model's layers and its vocabulary projection.

    Without it a chunk of a prompt would pay the projection for tokens that nobody samples.
    """

    def __init__(self) -> None:
        self.chosen: mx.array | None = None
        self.is_reached = False  # whether the model's inner part can be

    def select(self, chosen: mx.array | None) -> None:
        self.chosen = chosen

    @classmethod
    def of(cls, model: nn.Module) -> "_HeadInput":
        head = cls()
        inner = inner_model(model)
        if inner is None:
            return head
        head.is_reached = True
        kind = type(inner)
        if isinstance(shared := getattr(kind, "head_input", None), cls):  # another target of the same model
            return shared

        def call(self: Any, *args: Any, **kwargs: Any) -> Any:
            hidden = kind.__call__(self, *args, **kwargs)
            head.is_reached = isinstance(hidden, mx.array)
            return hidden if head.chosen is None or not head.is_reached else hidden[head.chosen]

        inner.__class__ = type(
            kind.__name__, (kind,), {"__call__": call, "__module__": kind.__module__, "head_input": head}
        )
        return head
