"""What a verification and a draft cost on this device, and the speed-up that follows from them and from acceptance."""

import time
from collections.abc import Callable, Sequence
from statistics import median
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import msgspec
from mlx_lm.models.cache import KVCache, make_prompt_cache

from worker.heads.head import Head

_CONTEXT, _REPEATS = 64, 5


class Costs(msgspec.Struct, frozen=True, kw_only=True):
    """Seconds for so many rows: of a target's step by its width from 1 on, and of one position of a draft."""

    rows: int
    step_s: tuple[float, ...]
    draft_s: float

    def speedup(self, by_position: Sequence[float]) -> tuple[float, int]:
        """Speed as a multiple of plain decoding at the best length of a draft; and that length, 0: none."""
        best, length, expected, reach = 1.0, 0, 1.0, 1.0
        for depth, chance in enumerate(by_position[: len(self.step_s) - 1], start=1):
            reach *= chance
            expected += reach
            gain = expected * self.step_s[0] / (self.step_s[depth] + depth * self.draft_s)
            if gain > best:
                best, length = gain, depth
        return best, length


def measure(model: nn.Module, head: Head, rows: int, most: int) -> Costs:
    """Timed with the model's own caches; `most` tokens of a draft."""
    cache = make_prompt_cache(model)
    mx.eval(model(mx.ones((rows, _CONTEXT), mx.int32), cache=cache))

    def step(width: int) -> Any:
        best = mx.argmax(model(mx.ones((rows, width), mx.int32), cache=cache), axis=-1)
        return best

    step_s = tuple(_seconds(lambda w=width: step(w)) for width in range(1, most + 2))  # type: ignore[misc]
    caches = [KVCache() for _ in head.layers]
    features = mx.zeros((rows, 1, head.config.hidden_size), head.norm.weight.dtype)
    token = mx.ones((rows, 1), mx.int32)
    mx.eval(head(features, head.embed(token), caches))

    def chain() -> Any:
        ahead, drafted = features, token
        for _ in range(most):
            ahead = head(ahead, head.embed(drafted), caches)
            drafted = head.vocabulary[mx.argmax(head.logits(ahead), axis=-1)]
        return drafted

    return Costs(rows=rows, step_s=step_s, draft_s=_seconds(chain) / most)


def _seconds(run: Callable[[], Any]) -> float:
    seconds = []
    mx.eval(run())
    for _ in range(_REPEATS):
        began = time.perf_counter()
        mx.eval(run())
        seconds.append(time.perf_counter() - began)
    return median(seconds)
