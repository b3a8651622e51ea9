"""What a verification and a draft cost on this device, and the speed-up that follows from them and from acceptance."""

import time
from collections.abc import Callable, Sequence
from functools import partial
from statistics import median

import mlx.core as mx
import mlx.nn as nn
import msgspec

from worker.cache.layout import Segment
from worker.drafters.head import HeadDrafter
from worker.drafters.layers import HealedLayersDrafter
from worker.drafters.trial import time_head, time_step
from worker.heads.folder import Trained
from worker.heads.healed import HealedLayers
from worker.heads.vocabulary import projection
from worker.step_times import StepTimes
from worker.target import Target

_CONTEXT, _REPEATS = 64, 7


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


def measure(model: nn.Module, trained: Trained, all_rows: Sequence[int], most: int) -> list[Costs]:
    """For each number of rows, timed as the engine runs them; `most` tokens of a draft."""
    target = Target(model)
    vocabulary = projection(model).weight.shape[0]
    if isinstance(trained, HealedLayers):
        healed = HealedLayersDrafter(trained, StepTimes(), vocabulary)
        own, draft = healed.target, lambda rows: time_step(healed, rows)
    else:
        drafter = HeadDrafter(target, trained, StepTimes(), vocabulary)
        own, draft = target, lambda rows: time_head(drafter, rows)
    return [_measured(target, own, draft, rows, most) for rows in all_rows]


def _measured(target: Target, own: Target, draft: Callable[[int], float], rows: int, most: int) -> Costs:
    """`draft` makes a draft for so many rows in the slots of `own`, and says what one position of it took."""
    _run(target, rows, 0, _CONTEXT)
    step_s = _medians([partial(_run, target, rows, _CONTEXT, width) for width in range(1, most + 2)])
    target.clear()
    (draft_s,) = _medians([partial(draft, rows)])
    own.clear()
    return Costs(rows=rows, step_s=step_s, draft_s=draft_s)


def _run(target: Target, rows: int, start: int, width: int) -> float:
    """Seconds of a step of `width` tokens for each row, which then has _CONTEXT tokens."""
    began = time.perf_counter()
    segments = [Segment(row, start, width) for row in range(rows)]
    logits = target.forward(segments, [1] * (rows * width), range(rows * width))
    mx.eval(mx.argmax(logits, axis=-1), target.cached_arrays())
    seconds = time.perf_counter() - began
    for row in range(rows):
        target.state.commit(row, _CONTEXT)
    return seconds


def _medians(runs: Sequence[Callable[[], float]]) -> tuple[float, ...]:
    """Median of the seconds that each says it took, in turns, so that a machine's ups and downs meet all of them.

    The first round, which may make kernels, does not count.
    """
    rounds = [[run() for run in runs] for _ in range(1 + _REPEATS)]
    return tuple(median(seconds) for seconds in zip(*rounds[1:], strict=True))
