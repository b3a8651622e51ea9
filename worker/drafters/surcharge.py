"""What steps with computed drafts take beyond the prices of their parts, by their number of tokens: learned from steps.

The chain's first forward reads what was accepted, the host has more to do, and a machine that others use as well may
be slower at larger products than it was when they were timed.
"""

from dataclasses import dataclass, field

import numpy as np

from worker.step_times import GRID, Array, neighbours

_OWN_RATE = 0.1  # weight of one step's measurement for its own size …
_SHARED_RATE = 0.02  # … and for all
_MOST_OFF = 0.2  # a single step is taken to be off by so much at most, in prices of its parts
_MOST_CREDIT = 0.05  # steps that were faster than their parts' prices make up for slower ones by so much at most, too


@dataclass(slots=True)
class Surcharge:
    """Seconds, on the machine as it was when steps were timed, at each size of `GRID`; may be less than nothing."""

    seconds: Array = field(default_factory=lambda: np.zeros(len(GRID)))

    def at(self, tokens: Array | int) -> Array:
        """The surcharge of steps of so many tokens; noise in both directions makes no price."""
        charged: Array = np.maximum(np.interp(tokens, GRID, self.seconds), 0.0)
        return charged

    def learn(self, tokens: int, taken_s: float, parts_s: float) -> None:
        """Such a step took so long, and its parts are priced at `parts_s`."""
        most_s = _MOST_OFF * parts_s
        off_s = np.clip(taken_s - parts_s - np.interp(tokens, GRID, self.seconds), -most_s, most_s)
        self.seconds += _SHARED_RATE * off_s
        for i, share in neighbours(tokens):
            self.seconds[i] += _OWN_RATE * share * off_s
        np.maximum(self.seconds, -_MOST_CREDIT * parts_s, out=self.seconds)

    def fade(self, rate: float) -> None:
        """Nobody computed: what made it look dear is forgotten slowly, or it would never be tried again."""
        self.seconds *= rate
