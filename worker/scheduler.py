"""Who gets a row, and whose prompt is fed next: pure decisions over what is waiting, running and free."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from common.sampling import MAX_DRAFT_TOKENS
from worker.cache.layout import CAPACITY_STEP, round_up
from worker.prefix_tree import shared_tokens
from worker.request import Request, Row
from worker.waiting import Waiting, rank

STEP_TOKENS = MAX_DRAFT_TOKENS  # a decoding row may need so many more in a step
LITTLE_SHARE = 4  # what takes a quarter of the memory for keys and values at most is little …
LITTLE_BYTES = 1 << 30  # … or so much, where it has no limit
WORTH_WAITING_TOKENS = 64  # a shared beginning of fewer tokens is sooner read twice


@dataclass(frozen=True, slots=True)
class Limits:
    """What the batch may use. `kv_bytes` None: no limit but the rows. Recurrent states take bytes by row, not token.

    A request is admitted when the cache has room for what all rows have and `headroom_tokens` more of each.
    """

    rows: int
    waiting: int
    kv_bytes: int | None
    kv_bytes_per_token: int
    kv_bytes_per_row: int = 0
    headroom_tokens: int = 256

    def pool_bytes(self, slots: int, capacity_tokens: int) -> int:
        """Bytes of so many slots."""
        return slots * (capacity_tokens * self.kv_bytes_per_token + self.kv_bytes_per_row)

    def fit(self, slots: int, capacity_tokens: int) -> bool:
        """Whether there may be so many slots."""
        return self.kv_bytes is None or self.pool_bytes(slots, capacity_tokens) <= self.kv_bytes

    def is_little(self, slots: int, capacity_tokens: int) -> bool:
        """Whether so many slots are a small part of what there may be."""
        limit = LITTLE_BYTES if self.kv_bytes is None else self.kv_bytes // LITTLE_SHARE
        return self.pool_bytes(slots, capacity_tokens) <= limit


def fits_alone(request: Request, limits: Limits) -> bool:
    """Whether the request could ever run."""
    return limits.fit(1, round_up(request.total_tokens, CAPACITY_STEP))


def admissible(waiting: Iterable[Waiting], running: Sequence[Row], limits: Limits) -> list[Waiting]:
    """Those of the waiting requests, given in their order, that can get a row now. None overtakes another.

    Counted is what rows need soon, not what they may come to need at most; if that turns out to be too little, one of
    them is preempted. A request that has the batch for itself is always admitted.
    """
    headroom = max(limits.headroom_tokens, STEP_TOKENS)
    longest = max((row.soon_tokens(headroom) for row in running), default=0)
    admitted: list[Waiting] = []
    if len(running) >= limits.rows:
        return admitted
    for one in waiting:
        longest = max(longest, one.soon_tokens(headroom))
        rows = len(running) + len(admitted) + 1
        if rows > limits.rows or (rows > 1 and not limits.fit(rows, round_up(longest, CAPACITY_STEP))):
            break
        admitted.append(one)
    return admitted


def victim(running: Sequence[Row], now_s: float, aging_s: float) -> Row:
    """The row that has to give way: of the lowest class, which has risen with time as in the queue, the youngest."""
    return max(running, key=lambda row: rank(row.request.priority, row.number, now_s - row.since_s, aging_s))


@dataclass(frozen=True, slots=True)
class Shape:
    """Slots of the cache, and tokens in each."""

    slots: int
    capacity_tokens: int


def shape_to_move_to(running: Sequence[Row], has: Shape, grown: Shape, limits: Limits) -> Shape | None:
    """Fewer or shorter slots for the rows when those of the next step are too many; None: all is well as it is.

    `has` are the slots that there are, `grown` those that the next step would make of them without moving a row. Slots
    within the limit are taken together only where that pays: when they take more than half of it, and four times of
    what is needed soon.
    """
    if limits.fit(grown.slots, grown.capacity_tokens):
        soon = Shape(len(running), capacity_for(running, max(limits.headroom_tokens, STEP_TOKENS)))
        needed_bytes = limits.pool_bytes(soon.slots, soon.capacity_tokens)
        has_bytes = limits.pool_bytes(has.slots, has.capacity_tokens)
        is_wasteful = limits.kv_bytes is not None and has_bytes > max(limits.kv_bytes // 2, 4 * needed_bytes)
        return soon if is_wasteful else None
    return Shape(len(running), capacity_for(running, STEP_TOKENS))


def capacity_for(running: Sequence[Row], more_tokens: int) -> int:
    """Tokens in each slot, for these rows with so many tokens to come."""
    return round_up(max(row.soon_tokens(more_tokens) for row in running), CAPACITY_STEP)


def free_slots(running: Sequence[Row], count: int) -> list[int]:
    """The lowest slots that no row has: neighbours attend together at least cost."""
    taken = {row.slot for row in running}
    slots: list[int] = []
    slot = 0
    while len(slots) < count:
        if slot not in taken:
            slots.append(slot)
        slot += 1
    return slots


def reader_ahead(row: Row, earlier: Sequence[Row], most_tokens: int) -> tuple[Row | None, int]:
    """The row that shares the longest beginning with a new one, read or still to be read, and how long it is.

    None if it is too short to wait for, or longer than `most_tokens`, which could not be kept.
    """
    best: tuple[Row | None, int] = None, WORTH_WAITING_TOKENS - 1
    for other in earlier if most_tokens > best[1] else ():
        if other.tokens[:WORTH_WAITING_TOKENS] != row.tokens[:WORTH_WAITING_TOKENS]:
            continue
        shared = min(shared_tokens(row.tokens, other.tokens), len(row.tokens) - 1)
        if best[1] < shared <= most_tokens:
            best = other, shared
    return best if best[0] is not None else (None, 0)


def share_prefill(rows: Sequence[Row], budget_tokens: int) -> dict[int, int]:
    """Tokens that each row in prefill is fed in this step, by slot: first come, first fed, while the budget lasts.

    Of those that came together the shortest is first: then the others wait the least for it.
    """
    fed: dict[int, int] = {}
    for row in sorted(rows, key=lambda row: (row.admitted_s, row.uncached)):
        width = min(row.uncached, budget_tokens - sum(fed.values()))
        if width <= 0:
            break
        fed[row.slot] = width
    return fed
