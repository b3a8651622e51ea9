"""How long a step takes, by the number of tokens in it: measured at load, refreshed by every step since.

Verification is not free, and what it costs differs by device, model and batch: it is measured, never assumed.
"""

from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from worker.cache.layout import UNPADDED, StepSizes
from worker.time_factors import Kind, TimeFactors

Array = np.ndarray[Any, Any]

GRID = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512)
TIMED = (1, 2, 4, 8, 16, 32, 64, 128)  # those that are timed at load where a step takes long
_LEAST_ROUNDS = 3
_STEADY = 1.25  # how far the median of a calibration may lie above its best


@dataclass(slots=True)
class StepTimes:
    """Seconds of a step at each size of `GRID`, as they were timed (None where nothing was), and what they take now.

    `sizes`: what steps are padded to. `factors`: what steps take now, over what was timed.

    A larger step is never taken to be faster than a smaller one: of what was timed the least of all larger ones counts,
    which keeps one disturbed measurement from shutting a size out; what was learned since takes larger ones along.
    """

    seconds: list[float | None] = field(default_factory=lambda: [None] * len(GRID))
    sizes: StepSizes = UNPADDED
    factors: TimeFactors = field(default_factory=lambda: TimeFactors(GRID), compare=False)
    _timed: Array | None = field(default=None, compare=False)  # `_all_timed`, until it changes
    _curve: tuple[list[int], list[float]] | None = field(default=None, compare=False)  # `_known`, until it changes

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
        return _on_lines(tokens, self._known()[1]) * self.now

    def usual(self, tokens: int) -> float:
        """Seconds of such a step on a calm machine: the prediction without the drift since load."""
        return self.predict(tokens) / self.now

    @property
    def now(self) -> float:
        """What all sizes take now, over what was timed."""
        return self.factors.machine

    def computed(self, tokens: Array) -> Array:
        """Factors, 1 at least, on the parts' prices of steps of so many tokens in which drafts are computed."""
        factors: Array = np.interp(self.sizes.padded_all(tokens), GRID, self.factors.computed)
        return factors

    def largest_within(self, seconds: float, least: int, most: int) -> int:
        """The most tokens in [least, most] that a step of at most `seconds` can have; at least `least`."""
        low, high = least, most
        while low < high:
            middle = (low + high + 1) // 2
            low, high = (middle, high) if self.predict(middle) <= seconds else (low, middle - 1)
        return low

    def observe(self, tokens: int, seconds: float, kind: Kind = Kind.PLAIN, draft_s: float = 0.0) -> None:
        """Take in one measured step; `draft_s`: what computing its drafts was predicted to take of it."""
        tokens = self.sizes.padded(tokens)
        if not self.is_measured:
            self._set(min(range(len(GRID)), key=lambda i: abs(GRID[i] - tokens)), seconds)
            return
        parts = 1.0 + draft_s / self.predict(tokens)  # in steps
        timed_s = float(_on_lines(np.array(tokens), self._all_timed()))
        self.factors.learn(seconds / (parts * timed_s), neighbours(tokens), kind)
        self._curve = None

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
        self._timed = self._curve = None

    def _known(self) -> tuple[list[int], list[float]]:
        if self._curve is None:
            ascending = np.maximum.accumulate(self._all_timed() * self.factors.sizes)
            self._curve = list(GRID), ascending.tolist()
        return self._curve

    def _all_timed(self) -> Array:
        """What was timed, for all sizes of the grid: between and beyond those that were by straight lines."""
        if self._timed is not None:
            return self._timed
        known = [(size, s) for size, s in zip(GRID, self.seconds, strict=True) if s is not None]
        if not known:
            raise LookupError("no step has been measured yet")
        sizes, times = [size for size, _ in known], [s for _, s in known]
        for i in range(len(times) - 2, -1, -1):
            times[i] = min(times[i], times[i + 1])
        slope = (times[-1] - times[-2]) / (sizes[-1] - sizes[-2]) if len(sizes) > 1 else 0.0
        beyond = np.maximum(np.array(GRID) - sizes[-1], 0) * slope
        self._timed = np.interp(GRID, sizes, times) + beyond
        return self._timed


def _on_lines(tokens: Array, times: Sequence[float] | Array) -> Array:
    """What steps of so many tokens take where those of `GRID` take `times`: by straight lines, beyond them too."""
    slope = (times[-1] - times[-2]) / (GRID[-1] - GRID[-2])
    taken: Array = np.interp(tokens, GRID, times) + np.maximum(tokens - GRID[-1], 0) * slope
    return taken


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
