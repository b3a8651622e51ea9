"""Who gets a row, and whose prompt is fed next: pure decisions over what is waiting, running and free."""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

from worker.cache.layout import CAPACITY_STEP, round_up
from worker.prefix_tree import shared_tokens
from worker.request import Request, Row

WORTH_WAITING_TOKENS = 64  # a shared beginning of fewer tokens is sooner read twice


@dataclass(frozen=True, slots=True)
class Limits:
    """What the batch may use. `kv_bytes` None: no limit but the rows. Recurrent states take bytes by row, not token."""

    rows: int
    waiting: int
    kv_bytes: int | None
    kv_bytes_per_token: int
    kv_bytes_per_row: int = 0


def kv_bytes_needed(rows: int, longest_tokens: int, limits: Limits) -> int:
    """Bytes of a cache for `rows` rows of which the longest may come to need `longest_tokens`."""
    slots = 1 << max(rows - 1, 0).bit_length()
    by_length = round_up(longest_tokens, CAPACITY_STEP) * limits.kv_bytes_per_token
    return slots * (by_length + limits.kv_bytes_per_row)


def fits_alone(request: Request, limits: Limits) -> bool:
    """Whether the request could ever run."""
    return limits.kv_bytes is None or kv_bytes_needed(1, request.total_tokens, limits) <= limits.kv_bytes


def admissible(waiting: deque[Request], running: Sequence[Row], limits: Limits) -> int:
    """How many of the waiting requests, in order of arrival, can get a row now."""
    longest = max((row.request.total_tokens for row in running), default=0)
    count = 0
    for request in waiting:
        longest = max(longest, request.total_tokens)
        rows = len(running) + count + 1
        if rows > limits.rows:
            break
        if limits.kv_bytes is not None and rows > 1 and kv_bytes_needed(rows, longest, limits) > limits.kv_bytes:
            break
        count += 1
    return count


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
    """The row in prefill that shares the longest beginning with a new one, and how long it is.

    None if it is too short to wait for, or longer than `most_tokens`, which could not be kept.
    """
    best: tuple[Row | None, int] = None, WORTH_WAITING_TOKENS - 1
    for other in earlier if most_tokens > best[1] else ():
        if other.is_decoding or other.tokens[:WORTH_WAITING_TOKENS] != row.tokens[:WORTH_WAITING_TOKENS]:
            continue
        shared = min(shared_tokens(row.tokens, other.tokens), len(row.tokens) - 1)
        if best[1] < shared <= most_tokens:
            best = other, shared
    return best if best[0] is not None else (None, 0)


def share_prefill(rows: Sequence[Row], budget_tokens: int) -> dict[int, int]:
    """Tokens that each row in prefill is fed in this step, by slot: first come, first fed, while the budget lasts."""
    fed: dict[int, int] = {}
    for row in sorted(rows, key=lambda row: row.admitted_s):
        width = min(row.uncached, budget_tokens - sum(fed.values()))
        if width <= 0:
            break
        fed[row.slot] = width
    return fed
