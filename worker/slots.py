"""Makes slots fit the limit: when rows must give way, and how the others move together."""

from collections.abc import Sequence

from worker import scheduler
from worker.drafting import Drafting
from worker.request import Row
from worker.scheduler import STEP_TOKENS, Limits, Shape
from worker.target import Target


def limit(target: Target, limits: Limits) -> None:
    """Let slots become as many and as long as these limits say."""
    state = target.state
    state.fits, state.is_little, state.most_slots = limits.fit, limits.is_little, limits.rows


def shape_to_move_to(target: Target, rows: Sequence[Row], limits: Limits) -> Shape | None:
    """Slots for these rows, sorted by slot, instead of those that the next step needs; None: all is well as it is."""
    state = target.state
    limit(target, limits)
    end = max(row.soon_tokens(STEP_TOKENS) for row in rows)
    has, grown = Shape(state.slots, state.capacity_tokens), Shape(*state.sized_for(rows[-1].slot, end))
    return scheduler.shape_to_move_to(rows, has, grown, limits)


def move_together(target: Target, drafting: Drafting, rows: Sequence[Row], capacity_tokens: int) -> None:
    """Let the rows have the first slots, in the order that they have, and give the rest of the memory back.

    All of the cache that stays is copied once, layer by layer.
    """
    kept, state = [row.slot for row in rows], target.state
    if kept == list(range(max(state.slots, len(kept)))) and state.capacity_tokens <= capacity_tokens:
        return  # there is nothing to give back
    target.rearrange(kept, capacity_tokens)
    drafting.rearrange(kept)
    for slot, row in enumerate(rows):
        row.slot = slot
