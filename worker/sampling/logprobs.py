"""Log-probabilities of chosen tokens and of the likeliest ones beside them.

They are the model's own: of its logits as they come, before biases, penalties, temperature and filters.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import mlx.core as mx

from common.sampling import MAX_TOP_LOGPROBS


@dataclass(frozen=True, slots=True)
class Logprob:
    """Of a chosen token: its natural logarithm of probability, and the likeliest token ids with theirs, best first."""

    logprob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True, slots=True)
class Measured:
    """Log-probabilities of the draws that ask for them, on the device until the step is evaluated."""

    asked: tuple[int | None, ...]  # alternatives for each draw of the step; None: it does not ask
    arrays: tuple[mx.array, ...] = ()  # chosen [asking]; with alternatives also ids and values [asking, some]

    def read(self) -> list[Logprob | None]:
        """One for each draw, None where it does not ask. Waits for the device unless all is evaluated."""
        if not self.arrays:
            return [None] * len(self.asked)
        chosen = cast(list[float], self.arrays[0].tolist())
        tops = self._tops() if len(self.arrays) > 1 else [[] for _ in chosen]
        read = iter(zip(chosen, tops, strict=True))
        return [None if count is None else _logprob(*next(read), count) for count in self.asked]

    def _tops(self) -> list[list[tuple[int, float]]]:
        ids, values = (cast(list[list[float]], array.tolist()) for array in self.arrays[1:])
        return [
            sorted(zip(map(int, i), v, strict=True), key=lambda pair: (-pair[1], pair[0]))
            for i, v in zip(ids, values, strict=True)
        ]


def measure(logits: mx.array, tokens: mx.array, asked: Sequence[int | None]) -> Measured:
    """Of `tokens` [draws] under `logits` [draws, vocabulary], for the draws that ask; not evaluated."""
    rows = [i for i, count in enumerate(asked) if count is not None]
    if not rows:
        return Measured(tuple(asked))
    index = mx.array(rows, dtype=mx.int32)
    logprobs = logits[index].astype(mx.float32)
    logprobs = logprobs - mx.logsumexp(logprobs, axis=-1, keepdims=True)
    chosen = mx.take_along_axis(logprobs, mx.maximum(tokens[index], 0)[:, None], axis=-1)[:, 0]
    if not any(asked):
        return Measured(tuple(asked), (chosen,))
    # As many for all: what one request gets does not depend on what its neighbours ask.
    top = min(MAX_TOP_LOGPROBS, logits.shape[-1])
    ids = mx.argpartition(-logprobs, kth=top - 1, axis=-1)[:, :top]
    return Measured(tuple(asked), (chosen, ids, mx.take_along_axis(logprobs, ids, axis=-1)))


def _logprob(chosen: float, top: Sequence[tuple[int, float]], count: int) -> Logprob:
    return Logprob(chosen, tuple(top[:count]))
