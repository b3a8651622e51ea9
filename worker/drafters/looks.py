"""When looking for drafts is worth its time: it costs the host some microseconds a row, whatever comes of it.

In a small batch on a slow device that is next to nothing, and every step is looked at. With many rows on a fast one it
can take longer than drafts save.
"""

from collections.abc import Collection, Iterable
from dataclasses import dataclass, field

LARGEST_SHARE = 0.02  # of the steps' time for looks that do not pay
MOST_SKIPPED = 32  # steps in a row without a look
_RATE = 0.05  # weight of what one look took and saved; the first ones count as in a mean
_MOST_TAKEN = 1.0  # a look is taken to have lasted as long as a plain step at most: anything may have come in between


@dataclass(slots=True)
class Pause:
    """Steps that are let go by before the next look, since the last ones were in vain."""

    steps: int = 0  # left
    most: int = 0  # doubles while nothing pays

    def is_over(self) -> bool:
        """Whether it is time to look; asked once in each step."""
        self.steps -= 1
        return self.steps < 0

    def prolong(self, share: float) -> None:
        """A look that took `share` of a step's time was in vain."""
        self.steps = min(int(share / LARGEST_SHARE), self.most)
        self.most = min(max(2 * self.most, 1), MOST_SKIPPED)

    def shorten(self) -> None:
        """A look paid, which is not the rule."""
        self.steps, self.most = 0, self.most // 2

    def end(self) -> None:
        """Looks pay."""
        self.steps = self.most = 0


@dataclass(slots=True)
class Looks:
    """Looks at a whole batch, and the searches for copies in them, row by row. Times are in plain steps."""

    pause: Pause = field(default_factory=Pause)
    pauses: dict[str, Pause] = field(default_factory=dict)  # by row
    count: int = 0
    taken: float = 0.0  # by one look, on average …
    saved: float = 0.0  # … and what it saved

    def is_due(self) -> bool:
        """Whether this step is to be looked at; asked once in each."""
        return self.pause.is_over()

    def to_search(self, rows: Iterable[str]) -> set[str]:
        """Those of these rows in which copies are to be searched for in this step."""
        return {row for row in rows if self.pauses.setdefault(row, Pause()).is_over()}

    def looked(self, taken: float, saved: float) -> None:
        """What a look took and what its drafts save. Looks are rare while they take more than they save on average."""
        self.count += 1
        rate = max(1.0 / self.count, _RATE)
        self.taken += rate * (min(taken, _MOST_TAKEN) - self.taken)
        self.saved += rate * (saved - self.saved)
        if self.saved > self.taken:
            self.pause.end()
        elif saved > taken:
            self.pause.shorten()
        else:
            self.pause.prolong(taken)

    def searched(self, found: Collection[str], in_vain: Iterable[str], share: float) -> None:
        """Copies were drafted for some rows and for others not; searching all rows takes `share` of a step's time."""
        for row in found:
            self.pauses[row].end()
        for row in in_vain:
            self.pauses[row].prolong(share)

    def forget(self, row: str) -> None:
        """The row is gone."""
        self.pauses.pop(row, None)
