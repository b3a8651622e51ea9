"""How long a step takes, by the number of tokens in it: measured at load, refreshed by every step since.

Verification is not free, and what it costs differs by device, model and batch: it is measured, never assumed.
"""

from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from worker.cache.layout import UNPADDED, StepSizes

Array = np.ndarray[Any, Any]

GRID = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512)
TIMED = (1, 2, 4, 8, 16, 32, 64, 128)  # those that are timed at load where a step takes long
_SHARED_RATE = 0.1  # least weight of a plain step's measurement for all sizes; the first ones count as in a mean …
_OWN_RATE = 0.03  # … and for its own
_DRAFTED_RATE = 0.1  # weight of a measurement with drafts, for its own size …
_DRIFT_RATE = 0.04  # … and for all: the machine may be another by now, or the drafts' price is wrong
_CATCH_UP_RATE = 0.02  # by which a plain step counts more for each one with drafts since the last …
_MOST_CATCH_UP = 0.5  # … and at most
_LEAST_ROUNDS = 3
_STEADY = 1.25  # how far the median of a calibration may lie above its best
_HICCUP = 3.0  # what takes so many times longer than predicted says little, even at first
_MOST_BESIDE = 2.0  # a size takes at most so many times more, or less, than the others do, over what was timed
_TRUST = 1.5  # a single measurement moves an estimate as if it lay at most this factor away


@dataclass(slots=True)
class StepTimes:
    """Seconds of a step at each size of `GRID`, as they were timed (None where nothing was), and what they take now.

    `sizes`: what steps are padded to. `scale`: what all sizes take now, over what was timed; `factors`: what each takes
    besides, within bounds, so that it cannot run away from the others.

    A larger step is never taken to be faster than a smaller one: of what was timed the least of all larger ones counts,
    which keeps one disturbed measurement from shutting a size out; what was learned since takes larger ones along.
    """

    seconds: list[float | None] = field(default_factory=lambda: [None] * len(GRID))
    sizes: StepSizes = UNPADDED
    scale: float = 1.0
    factors: list[float] = field(default_factory=lambda: [1.0] * len(GRID))
    plain_steps: int = 0  # that were observed
    drafted_steps: int = 0  # since the latest plain one …
    drift: float = 1.0  # … and what all sizes may take now, over `scale`, by what those told
    _curve: tuple[list[int], list[float]] | None = None  # `_known`, until it changes

    @property
    def is_measured(self) -> bool:
        return sum(s is not None for s in self.seconds) >= 2

    def predict(self, tokens: int) -> float:
        """Seconds of a step of `tokens` tokens, between and beyond the grid by straight lines."""
        sizes, times = self._known()
        tokens = self.sizes.padded(tokens)
        i = min(max(bisect_left(sizes, tokens), 1), len(sizes) - 1)
        slope = (times[i] - times[i - 1]) / (sizes[i] - sizes[i - 1])
        return max(times[0], times[i - 1] + slope * (tokens - sizes[i - 1])) * self.now

    def predict_all(self, tokens: Array) -> Array:
        """Seconds of steps of so many tokens each, as `predict` says."""
        tokens = self.sizes.padded_all(tokens)
        sizes, times = self._known()
        slope = (times[-1] - times[-2]) / (sizes[-1] - sizes[-2])
        predicted: Array = np.interp(tokens, sizes, times) + np.maximum(tokens - sizes[-1], 0) * slope
        return predicted * self.now

    def usual(self, tokens: int) -> float:
        """Seconds of such a step on a calm machine: the prediction without the drift since load."""
        return self.predict(tokens) / self.now

    @property
    def now(self) -> float:
        """What all sizes take now, over what was timed."""
        return self.scale * self.drift

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
        tells what drafts cost, and must not make plain steps look dearer: it moves its larger neighbour, and all of
        them a little, until the next plain one.
        """
        tokens = self.sizes.padded(tokens)
        if not self.is_measured:
            self._set(min(range(len(GRID)), key=lambda i: abs(GRID[i] - tokens)), seconds)
            return
        if not has_drafts:
            self._settle_drift(seconds / self.predict(tokens))
        taken = seconds / self.predict(tokens)
        ratio = min(max(taken, 1 / _TRUST), _TRUST)
        if not has_drafts:
            self.plain_steps += taken < _HICCUP
            early_rate = 1 / self.plain_steps if taken < _HICCUP else 0.0
            missed_rate = min(_CATCH_UP_RATE * self.drafted_steps, _MOST_CATCH_UP)
            self.scale *= 1 + max(_SHARED_RATE, early_rate, missed_rate) * (ratio - 1)
            self.drafted_steps = 0
        else:
            self.took(taken)
        rate = _DRAFTED_RATE if has_drafts else _OWN_RATE
        for i, share in [(neighbours(tokens)[-1][0], 1.0)] if has_drafts else neighbours(tokens):
            factor = self.factors[i] * (1 + rate * share * (ratio - 1))
            self.factors[i] = min(max(factor, 1 / _MOST_BESIDE), _MOST_BESIDE)
        self._curve = None

    def took(self, taken: float) -> None:
        """A step with drafts took so many times its price."""
        self.drafted_steps += 1
        drift = self.drift * (1 + _DRIFT_RATE * (min(max(taken, 1 / _TRUST), _TRUST) - 1))
        self.drift = min(max(drift, 1 / _TRUST), _TRUST)

    def _settle_drift(self, taken: float) -> None:
        """A plain step took so many times what it was predicted to: is it the machine that changed?"""
        if abs(taken - 1.0) < abs(taken * self.drift - 1.0):
            self.scale *= self.drift
        self.drift = 1.0

    def calibrate(self, run: Callable[[int], float], sizes: Sequence[int], budget_s: float, rounds: int = 5) -> bool:
        """Fill the table for `sizes` of the grid: `run(tokens)` makes one step and returns its seconds.

        The first of each size warms up.
        Sizes are timed in turns, so that a moment in which the machine is slow does not fall on one of them alone, and
        the best of each counts. It ends after `rounds`, or after the round in which `budget_s` is spent; in the first
        one at any time, once there are two sizes. Returns whether all sizes were timed often enough, and the
        measurements agree well enough to be kept.
        """
        taken: dict[int, list[float]] = {size: [] for size in sizes}
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
        return made >= min(rounds, _LEAST_ROUNDS) and all(
            sorted(own)[made // 2] < _STEADY * min(own) for own in taken.values()
        )

    def _set(self, i: int, seconds: float) -> None:
        self.seconds[i] = seconds
        self._curve = None

    def _known(self) -> tuple[list[int], list[float]]:
        if self._curve is None:
            ascending = accumulate((s * f for s, f in zip(self._timed(), self.factors, strict=True)), max)
            self._curve = list(GRID), list(ascending)
        return self._curve

    def _timed(self) -> list[float]:
        """What was timed, for all sizes of the grid: between and beyond those that were by straight lines."""
        known = [(size, s) for size, s in zip(GRID, self.seconds, strict=True) if s is not None]
        if not known:
            raise LookupError("no step has been measured yet")
        sizes, times = [size for size, _ in known], [s for _, s in known]
        for i in range(len(times) - 2, -1, -1):
            times[i] = min(times[i], times[i + 1])
        slope = (times[-1] - times[-2]) / (sizes[-1] - sizes[-2]) if len(sizes) > 1 else 0.0
        beyond = np.maximum(np.array(GRID) - sizes[-1], 0) * slope
        timed: list[float] = (np.interp(GRID, sizes, times) + beyond).tolist()
        return timed


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


def neighbours(tokens: int) -> list[tuple[int, float]]:
    """Grid places around `tokens` with their shares, which sum to 1."""
    i = bisect_left(GRID, tokens)
    if i == len(GRID):
        return [(len(GRID) - 1, 1.0)]
    if GRID[i] == tokens:
        return [(i, 1.0)]
    share = (tokens - GRID[i - 1]) / (GRID[i] - GRID[i - 1])
    return [(i - 1, 1 - share), (i, share)]
