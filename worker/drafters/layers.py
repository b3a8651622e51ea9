"""The `layers` drafter: some of the target's own layers, with their weights and their part of the KV cache.

It takes no memory: what it writes behind a row's tokens is written over by the verification of its draft. Which layers
it skips is chosen by block influence (ShortGPT, arXiv 2403.03853): those that change their input least.

Where the layers have been healed by training, their keys and values are not the target's any more: then it drafts like
a smaller model, with a cache of its own.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from worker.cache.layout import Segment
from worker.drafters.chain import ChainDrafter
from worker.drafters.model import ModelDrafter
from worker.heads.healed import HealedLayers
from worker.request import Row
from worker.step_times import StepTimes
from worker.taps import replaced
from worker.target import Target


class LayersDrafter(ChainDrafter):
    """Self-speculative decoding (Zhang et al., arXiv 2309.08168) without training; `kept`: its layers' indexes."""

    name = "layers"

    def __init__(self, target: Target, times: StepTimes, kept: Sequence[int]) -> None:
        super().__init__(target, times)
        self.kept = tuple(kept)

    def forward(self, segments: Sequence[Segment], tokens: mx.array, chosen: Sequence[int]) -> mx.array:
        with self.target.partial(), only_layers(self.target.model, self.kept):
            return super().forward(segments, tokens, chosen)

    def cached(self, row: Row) -> int:
        return row.cached

    def _end(self, rows: Sequence[Row]) -> None:
        for row in rows:
            self.target.state.commit(row.slot, row.cached)


class HealedLayersDrafter(ModelDrafter):
    """Drafts with healed layers."""

    name = LayersDrafter.name

    def __init__(self, healed: HealedLayers, times: StepTimes, vocabulary: int) -> None:
        super().__init__(Target(healed.model), times, vocabulary)
        self.healed = healed


class _Skipped:
    """Stands for a layer that hands its input on; answers for the layer's attributes, which some models look at."""

    def __init__(self, layer: nn.Module) -> None:
        self._layer = layer

    def __call__(self, hidden: mx.array, *args: Any, **options: Any) -> mx.array:
        return hidden

    def __getattr__(self, name: str) -> Any:
        return getattr(self._layer, name)


class _Watched(_Skipped):
    """Runs its layer and tells how much that changed the hidden states."""

    def __init__(self, layer: nn.Module, tell: Callable[[mx.array], None]) -> None:
        super().__init__(layer)
        self._tell = tell

    def __call__(self, hidden: mx.array, *args: Any, **options: Any) -> mx.array:
        after = self._layer(hidden, *args, **options)
        a, b = hidden.astype(mx.float32), after.astype(mx.float32)
        norms = mx.linalg.norm(a, axis=-1) * mx.linalg.norm(b, axis=-1)
        self._tell(1.0 - mx.mean((a * b).sum(axis=-1) / mx.maximum(norms, 1e-6)))
        return after


@contextmanager
def only_layers(model: nn.Module, kept: Sequence[int]) -> Iterator[None]:
    """Within it the model runs with these of its layers alone."""
    chosen = set(kept)
    with replaced(model, lambda i, layer: layer if i in chosen else _Skipped(layer)):
        yield


def influence_in(model: nn.Module, run: Callable[[], mx.array]) -> list[float]:
    """For each layer 1 − mean cosine of its input and output in the forward `run`: what it changes (arXiv 2403.03853).

    Raises `NoLayers`.
    """
    told: dict[int, mx.array] = {}
    with replaced(model, lambda i, layer: _Watched(layer, lambda value: told.__setitem__(i, value))):
        output = run()
    mx.eval(output, list(told.values()))
    return [float(told[i]) for i in sorted(told)]


def block_influence(target: Target, tokens: Sequence[int]) -> list[float]:
    """The influence of each of a target's layers on a text."""
    with target.partial():
        influence = influence_in(target.model, lambda: target.forward([Segment(0, 0, len(tokens))], list(tokens), [0]))
    target.clear()
    return influence


def most_influential(influence: Sequence[float], ratio: float) -> list[int]:
    """Indexes of the `ratio` of all layers that change most, in their order; one at least, and never all."""
    count = min(max(round(ratio * len(influence)), 1), len(influence) - 1)
    return sorted(sorted(range(len(influence)), key=lambda i: -influence[i])[:count])
