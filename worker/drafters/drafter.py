"""What every drafter is to the engine: it offers tokens for a row, drafts as many as are wanted, and hears what stood.

Drafters that copy know their tokens when they offer them. Those that compute do so only for the length that the
controller grants, on the device, and nobody waits: the target's forward takes their tokens as they come.
"""

from collections.abc import Sequence
from typing import Protocol, cast

import mlx.core as mx
import msgspec

from worker.request import Row
from worker.step_times import Array


class Offer(msgspec.Struct, frozen=True, gc=False):
    """At most `length` tokens for one row. `tokens` are given by drafters that copy, None is still to be computed.

    `match` says how sure the drafter is, in its own classes: acceptance is tallied by it.
    """

    drafter: str
    length: int
    match: int = 0
    tokens: tuple[int, ...] | None = None


class Ask(msgspec.Struct, frozen=True, gc=False):
    """One row's grant: the first `length` tokens of its offer are wanted."""

    row: Row
    offer: Offer
    length: int


class Pending(msgspec.Struct, frozen=True, gc=False):
    """One row's part of tokens in the making: `places` of `tokens` (int32 [tokens of all rows])."""

    tokens: mx.array
    places: tuple[int, ...]

    def tolist(self) -> list[int]:
        """The row's tokens, waited for."""
        made = cast(list[int], self.tokens.tolist())
        return [made[place] for place in self.places]


class Draft(msgspec.Struct, frozen=True, gc=False):
    """Tokens for the target to verify: on the host (`tokens`), or still in the making (`pending`)."""

    drafter: str
    match: int
    length: int
    tokens: tuple[int, ...] | None = ()
    pending: Pending | None = None


NO_DRAFT = Draft("", 0, 0)


class Drafter(Protocol):
    """One way of guessing what comes next. Belongs to the MLX thread, as the engine does."""

    name: str
    computes: bool  # or it copies, which costs the device nothing

    def offer(self, row: Row, limit: int) -> Offer | None:
        """What could be drafted for a decoding row, `limit` tokens at most; None or length 0: nothing."""

    def step_s(self, rows: Array) -> Array | float:
        """Seconds that one more draft token takes, for so many rows together each; 0 for a drafter that copies."""

    def catches_up(self, rows: Sequence[Row]) -> bool:
        """Whether a draft for these rows begins with reading what piled up while there were none: how long such a step
        takes does not tell the price of a draft, or drafts that are rare would stay so."""

    def draft(self, asks: Sequence[Ask]) -> list[Draft]:
        """The drafts that were granted, one for each of `asks`; all of them belong to this drafter."""

    def settle(self, row: Row, length: int, accepted: int) -> None:
        """Of the `length` tokens drafted for this row, `accepted` stood; `row.tokens` holds them by now."""

    def keep_up(self, rows: Sequence[Row]) -> None:
        """The target has gone on in these rows, sorted by slot, in their prompts or behind them."""

    def catch_up(self, rows: Sequence[Row]) -> None:
        """What the drafter keeps in these rows' slots will be copied now: it should be complete."""

    def rearrange(self, kept: Sequence[int]) -> None:
        """What was in slot `kept[i]` is in slot i from now on; nothing else is left."""

    def forget(self, row: Row, *, is_finished: bool) -> None:
        """The row is gone; `is_finished`: it ended well, and its output may be learned from."""


class CopyingDrafter:
    """Base of the drafters that copy tokens on the host: drafting costs the device nothing."""

    computes = False

    def step_s(self, rows: Array) -> Array | float:
        return 0.0

    def catches_up(self, rows: Sequence[Row]) -> bool:
        return False

    def draft(self, asks: Sequence[Ask]) -> list[Draft]:
        return [_copied(ask) for ask in asks]

    def settle(self, row: Row, length: int, accepted: int) -> None:
        """Nothing is kept of a draft."""

    def keep_up(self, rows: Sequence[Row]) -> None:
        """Nothing is kept in slots."""

    def catch_up(self, rows: Sequence[Row]) -> None:
        """Nothing is kept in slots."""

    def rearrange(self, kept: Sequence[int]) -> None:
        """Nothing is kept in slots."""


def _copied(ask: Ask) -> Draft:
    assert ask.offer.tokens is not None
    return Draft(ask.offer.drafter, ask.offer.match, ask.length, ask.offer.tokens[: ask.length])
