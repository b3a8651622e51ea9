"""Who waits for a row, and in which order: by class, which rises with time, then by arrival."""

import heapq
from bisect import insort
from collections.abc import Iterator
from dataclasses import dataclass

from common.priority import Priority
from worker.request import Request, Row

AGING_S = 30.0

Rank = tuple[int, int]


def rank(priority: Priority, number: int, waited_s: float, aging_s: float) -> Rank:
    """The place of a request among others, least first; `number` is its place in the order of arrival.

    Its class rises by one every `aging_s`, to the highest at most. There it is older than whoever comes later, so
    nobody waits for ever.
    """
    return -min(priority + int(waited_s / aging_s), max(Priority)), number


@dataclass(slots=True, eq=False)
class Waiting:
    """A request without a row. `row` is the one it had, if it was preempted."""

    request: Request
    number: int
    since_s: float
    row: Row | None = None

    def soon_tokens(self, headroom_tokens: int) -> int:
        """Cache positions that it needs as a row, with so many tokens to come."""
        if self.row is not None:
            return self.row.soon_tokens(headroom_tokens)
        have = len(self.request.prompt) + len(self.request.resume)
        return min(have + headroom_tokens, self.request.total_tokens)

    def as_row(self, slot: int, now_s: float) -> Row:
        """Its new row, or the one that it had, which goes on from where it was."""
        if self.row is not None:
            self.row.take_slot(slot, now_s)
            return self.row
        row = Row.of(self.request, slot, now_s)
        row.number, row.since_s = self.number, self.since_s
        return row


class WaitingList:
    """All that wait. A class rises after `aging_s` seconds."""

    def __init__(self, aging_s: float = AGING_S) -> None:
        self.aging_s = aging_s
        self._classes: dict[Priority, list[Waiting]] = {priority: [] for priority in Priority}  # in order of arrival
        self._arrived = 0

    def __len__(self) -> int:
        return sum(len(members) for members in self._classes.values())

    def __iter__(self) -> Iterator[Waiting]:
        for members in self._classes.values():
            yield from members

    def add(self, request: Request, now_s: float) -> None:
        """A new request."""
        self._arrived += 1
        self._put(Waiting(request, self._arrived, now_s))

    def put_back(self, row: Row) -> None:
        """A preempted row: it came before all of its class that wait, and keeps that place."""
        self._put(Waiting(row.request, row.number, row.since_s, row))

    def in_order(self, now_s: float) -> Iterator[Waiting]:
        """Who is next, and next after that; the list must not change meanwhile."""
        return heapq.merge(*self._classes.values(), key=lambda waiting: self._rank(waiting, now_s))

    def remove(self, waiting: Waiting) -> None:
        self._classes[waiting.request.priority].remove(waiting)

    def _put(self, waiting: Waiting) -> None:
        insort(self._classes[waiting.request.priority], waiting, key=lambda other: other.number)

    def _rank(self, waiting: Waiting, now_s: float) -> Rank:
        return rank(waiting.request.priority, waiting.number, now_s - waiting.since_s, self.aging_s)
