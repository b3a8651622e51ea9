"""How long a step takes, by the number of tokens in it: measured at load, refreshed by every step since.

Verification is not free, and what it costs differs by device, model and batch: it is measured, never assumed.
"""

from bisect import bisect_left
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from worker.cache.layout import UNPADDED, StepSizes

Array = np.ndarray[Any, Any]

GRID = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 64, 128, 256, 512)
TIMED = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)  # those that are timed at load; steps tell of the others
_SHARED_RATE = 0.1  # least weight of a plain step's measurement for all sizes; the first ones count as in a mean …
_OWN_RATE = 0.03  # … and for its own
_DRAFTED_RATE = 0.1  # weight of a measurement with drafts, for its own size only
_LEAST_ROUNDS = 3
_STEADY = 1.25  # how far the median of a calibration may lie above its best
_HICCUP = 3.0  # what takes so many times longer than predicted says little, even at first
_TRUST = 1.5  # a single measurement moves an estimate as if it lay at most this factor away


@dataclass(slots=True)
class StepTimes:
    """Seconds of a step at each size of `GRID`; None where nothing was measured.

    `sizes`: what steps are padded to. A larger step is never taken to be faster than a smaller one: the estimate at a
    size is the least of all larger ones', which keeps one disturbed measurement from shutting a size out.
    """

    seconds: list[float | None] = field(default_factory=lambda: [None] * len(GRID))
    sizes: StepSizes = UNPADDED
    scale: float = 1.0  # what all sizes take now, over what the table says
    plain_steps: int = 0  # that were observed
    _curve: tuple[list[int], list[float]] | None = None  # `_known`, until `seconds` changes

    @property
    def is_measured(self) -> bool:
        return sum(s is not None for s in self.seconds) >= 2

    def predict(self, tokens: int) -> float:
        """Seconds of a step of `tokens` tokens, between and beyond the grid by straight lines."""
        sizes, times = self._known()
        if len(sizes) == 1:
            return times[0] * self.scale
        tokens = self.sizes.padded(tokens)
        i = min(max(bisect_left(sizes, tokens), 1), len(sizes) - 1)
        slope = (times[i] - times[i - 1]) / (sizes[i] - sizes[i - 1])
        return max(times[0], times[i - 1] + slope * (tokens - sizes[i - 1])) * self.scale

    def predict_all(self, tokens: Array) -> Array:
        """Seconds of steps of so many tokens each, as `predict` says."""
        tokens = self.sizes.padded_all(tokens)
        sizes, times = self._known()
        slope = (times[-1] - times[-2]) / (sizes[-1] - sizes[-2]) if len(sizes) > 1 else 0.0
        predicted: Array = np.interp(tokens, sizes, times) + np.maximum(tokens - sizes[-1], 0) * slope
        return predicted * self.scale

    def usual(self, tokens: int) -> float:
        """Seconds of such a step on a calm machine: the prediction without the drift since load."""
        return self.predict(tokens) / self.scale

    def largest_within(self, seconds: float, least: int, most: int) -> int:
        """The most tokens in [least, most] that a step of at most `seconds` can have; at least `least`."""
        low, high = least, most
        while low < high:
            middle = (low + high + 1) // 2
            low, high = (middle, high) if self.predict(middle) <= seconds else (low, middle - 1)
        return low

    def observe(self, tokens: int, seconds: float, *, has_drafts: bool = False) -> None:
        """Take in one measured step.

        After a plain one all sizes move together (the machine is busier), its neighbours a little more. One with drafts
        tells what drafts cost, and must not make plain steps look dearer: it moves its larger neighbour only.
        """
        tokens = self.sizes.padded(tokens)
        if not self.is_measured:
            self._set(min(range(len(GRID)), key=lambda i: abs(GRID[i] - tokens)), seconds)
            return
        taken = seconds / self.predict(tokens)
        ratio = min(max(taken, 1 / _TRUST), _TRUST)
        if not has_drafts:
            self.plain_steps += taken < _HICCUP
            early_rate = 1 / self.plain_steps if taken < _HICCUP else 0.0
            self.scale *= 1 + max(_SHARED_RATE, early_rate) * (ratio - 1)
        rate = _DRAFTED_RATE if has_drafts else _OWN_RATE
        for i, share in [(_neighbours(tokens)[-1][0], 1.0)] if has_drafts else _neighbours(tokens):
            self._set(i, self.usual(GRID[i]) * (1 + rate * share * (ratio - 1)))
            self._lift(i)

    def calibrate(self, run: Callable[[int], float], largest: int, budget_s: float, rounds: int = 5) -> bool:
        """Fill the table: `run(tokens)` makes one step and returns its seconds; the first of each size warms up.

        Sizes are timed in turns, so that a moment in which the machine is slow does not fall on one of them alone, and
        the best of each counts. It ends after `rounds`, or after the round in which `budget_s` is spent; in the first
        one at any time, once there are two sizes. Returns whether all sizes were timed often enough, and the
        measurements agree well enough to be kept.
        """
        taken: dict[int, list[float]] = {size: [] for size in TIMED if size <= largest}
        spent_s, made = 0.0, 0
        while made < rounds and (spent_s <= budget_s or not self.is_measured):
            for size, own in taken.items():
                if made == 0 and spent_s > budget_s and self.is_measured:
                    return False
                spent_s += run(size) if made == 0 else 0.0
                own.append(run(size))
                spent_s += own[-1]
                self._set(GRID.index(size), min(own))
            made += 1
        return made >= min(rounds, _LEAST_ROUNDS) and all(sorted(own)[made // 2] < _STEADY * min(own) for own in taken.values())

    def _lift(self, i: int) -> None:
        """What is larger takes as long at least: it may have been measured long ago, with less to attend to."""
        least = self.seconds[i]
        for j in range(i + 1, len(GRID)):
            known = self.seconds[j]
            if known is not None and least is not None and known < least:
                self._set(j, least)

    def _set(self, i: int, seconds: float) -> None:
        self.seconds[i] = seconds
        self._curve = None

    def _known(self) -> tuple[list[int], list[float]]:
        if self._curve is None:
            self._curve = self._measured_curve()
        return self._curve

    def _measured_curve(self) -> tuple[list[int], list[float]]:
        known = [(size, s) for size, s in zip(GRID, self.seconds, strict=True) if s is not None]
        if not known:
            raise LookupError("no step has been measured yet")
        sizes, times = [size for size, _ in known], [s for _, s in known]
        for i in range(len(times) - 2, -1, -1):
            times[i] = min(times[i], times[i + 1])
        return sizes, times


def load(path: Path) -> StepTimes | None:
    """What an earlier worker of the same model on the same device measured, or None."""
    try:
        seconds = msgspec.json.decode(path.read_bytes(), type=list[float | None])
    except (OSError, msgspec.DecodeError):
        return None
    return StepTimes(seconds=seconds) if len(seconds) == len(GRID) else None


def save(times: StepTimes, path: Path) -> None:
    """Keep the measurements for the next start."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(msgspec.json.encode(times.seconds))


def _neighbours(tokens: int) -> list[tuple[int, float]]:
    """Grid places around `tokens` with their shares, which sum to 1."""
    i = bisect_left(GRID, tokens)
    if i == len(GRID):
        return [(len(GRID) - 1, 1.0)]
    if GRID[i] == tokens:
        return [(i, 1.0)]
    share = (tokens - GRID[i - 1]) / (GRID[i] - GRID[i - 1])
    return [(i - 1, 1 - share), (i, share)]
