"""How much longer steps take than when they were timed: one Kalman filter over what all of them tell.

A step tells one number, and several things may be behind it: the machine is slower now, which concerns all steps; steps
of this size are, and those of nearly the same size about as much; or drafts take more than their parts do. The filter
keeps, for each of these, the logarithm of its factor and how sure that is. A step moves each by as much as is uncertain
about it, and later ones correct what was blamed wrongly. So plain steps of one size make no other size look cheap by
comparison, and a slow moment that fell on steps with drafts is not held against drafts for long.
"""

import enum
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]

# Standard deviations of logarithms: of what is expected before anything is seen …
_MACHINE = 0.4
_SIZE = 0.2  # between two sizes whose logarithms differ by 1, and growing with the root of that difference
_COPIED = 0.05
_COMPUTED, _COMPUTED_REACH = 0.1, 2.0  # alike at sizes whose logarithms differ by less than the reach
# … and of what comes later: the machine's change from one step to the next, and a step's own noise.
_CHANGE = 0.05
_NOISE = 0.08
_HICCUP = math.log(3.0)  # what is off by more says little …
_HICCUP_NOISE = 1.5
_MOST_OFF = 0.4  # … and nothing says more than if it were off by so much, or by three of its standard deviations
_USUAL = 8  # tokens of the step that stands for the machine
_FADES = 0.999  # what is known of sizes and drafts, a step
_FADES_AT_ONCE = 32  # steps


class Kind(enum.Enum):
    """Of a step: without drafts, with copied ones only, or with computed ones among them."""

    PLAIN = enum.auto()
    COPIED = enum.auto()
    COMPUTED = enum.auto()


@dataclass(slots=True)
class TimeFactors:
    """Factors on timed seconds, for the sizes of a `grid`, numbers of tokens in ascending order."""

    grid: Sequence[int]
    steps: int = 0  # seen
    _mean: Array = field(init=False)  # of the logarithms: machine, copied, each size, computed at each size
    _covariance: Array = field(init=False)
    _expected: Array = field(init=False)  # the covariance before anything was seen

    def __post_init__(self) -> None:
        count = len(self.grid)
        logs = np.log(self.grid)
        self._expected = np.zeros((2 + 2 * count, 2 + 2 * count))
        self._expected[0, 0], self._expected[1, 1] = _MACHINE**2, _COPIED**2
        self._expected[self._of_sizes, self._of_sizes] = _SIZE**2 * _shared(logs - math.log(_USUAL))
        self._expected[self._of_computed, self._of_computed] = _COMPUTED**2 * _alike(logs / _COMPUTED_REACH)
        self._covariance = self._expected.copy()
        self._mean = np.zeros(len(self._expected))

    @property
    def machine(self) -> float:
        """Of all steps."""
        return math.exp(self._mean[0])

    @property
    def sizes(self) -> Array:
        """Of steps of each size besides, [grid]."""
        factors: Array = np.exp(self._mean[self._of_sizes])
        return factors

    @property
    def copied(self) -> float:
        """Of steps with copied drafts besides; what seems to be less than 1 is noise."""
        return math.exp(max(self._mean[1], 0.0))

    @property
    def computed(self) -> Array:
        """Of steps with computed drafts besides, by size, [grid]; at least 1 as well."""
        factors: Array = np.exp(np.maximum(self._mean[self._of_computed], 0.0))
        return factors

    def learn(self, ratio: float, places: Sequence[tuple[int, float]], kind: Kind) -> None:
        """A step took `ratio` times what was timed for it; its size lies at these places of the grid, by shares."""
        self._pass()
        seen = np.zeros(len(self._mean))
        seen[0] = 1.0
        seen[1] = kind is Kind.COPIED
        for place, share in places:
            seen[2 + place] = share
            if kind is Kind.COMPUTED:
                seen[2 + len(self.grid) + place] = share
        off = math.log(max(ratio, 1e-9)) - float(seen @ self._mean)
        blame = self._covariance @ seen
        variance = float(seen @ blame) + _NOISE**2
        if abs(off) > _HICCUP:
            variance += _HICCUP_NOISE**2
        most = min(3 * math.sqrt(variance), _MOST_OFF)
        gain = blame / variance
        self._mean += gain * min(max(off, -most), most)
        self._covariance -= np.outer(gain, blame)

    def _pass(self) -> None:
        """Time passes: the machine may change, and what was seen long ago counts less."""
        self.steps += 1
        self._covariance[0, 0] += _CHANGE**2
        if self.steps % _FADES_AT_ONCE == 0:
            kept = np.full(len(self._mean), _FADES**_FADES_AT_ONCE)
            kept[0] = 1.0
            self._mean *= kept
            self._covariance *= np.outer(kept, kept)
            self._covariance += (1.0 - np.outer(kept, kept)) * self._expected

    @property
    def _of_sizes(self) -> slice:
        return slice(2, 2 + len(self.grid))

    @property
    def _of_computed(self) -> slice:
        return slice(2 + len(self.grid), 2 + 2 * len(self.grid))


def _shared(places: Array) -> Array:
    """Covariance of a Brownian motion from 0 in both directions: what is between two places differs on the way."""
    covariance: Array = np.minimum.outer(np.maximum(places, 0.0), np.maximum(places, 0.0))
    covariance += np.minimum.outer(np.maximum(-places, 0.0), np.maximum(-places, 0.0))
    return covariance


def _alike(places: Array) -> Array:
    """A correlation that falls with the distance."""
    correlation: Array = np.exp(-(np.subtract.outer(places, places) ** 2) / 2)
    return correlation
