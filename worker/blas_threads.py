"""How many threads OpenBLAS may use, step by step: all of them on a calm machine, one on a busy one.

Its threads meet in every matrix product. If another process has one of the cores, each meeting costs a time slice of
the scheduler, hundreds of times a step: a step of 0.1 s then takes seconds. One thread alone never waits.
"""

from dataclasses import dataclass

SLOW = 2.0  # time of a step beyond this many times the usual counts as waiting
PATIENCE = 10.0  # so much waiting, in usual steps, is too much …
FORGIVENESS = 0.9  # … but what is long ago counts less
FIRST_PAUSE_STEPS = 50
LONGEST_PAUSE_STEPS = 1600
CALM_STEPS = 200  # steps after a pause that make the next one short again


@dataclass(slots=True)
class ThreadChoice:
    """Decides from the steps' times; `most` threads exist. Pure: the caller sets what `observe` returns."""

    most: int
    waited: float = 0.0  # in usual steps
    pause_steps: int = FIRST_PAUSE_STEPS
    left_steps: int = 0
    calm: int = 0

    def observe(self, seconds: float, usual_s: float) -> int:
        """Threads for the next step, after one that took `seconds` instead of `usual_s` (as on a calm machine)."""
        if self.left_steps:
            self.left_steps -= 1
        else:
            self._judge(seconds / usual_s)
        return 1 if self.left_steps else self.most

    def _judge(self, slowness: float) -> None:
        self.waited = self.waited * FORGIVENESS + max(slowness - SLOW, 0.0)
        self.calm += 1
        if self.waited > PATIENCE:
            self.waited, self.calm, self.left_steps = 0.0, 0, self.pause_steps
            self.pause_steps = min(2 * self.pause_steps, LONGEST_PAUSE_STEPS)
        elif self.calm >= CALM_STEPS:
            self.pause_steps = FIRST_PAUSE_STEPS
