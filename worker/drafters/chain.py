"""Base of the drafters that compute: one small forward for each position, each fed with the token before it.

The whole chain is handed to the device without waiting: its tokens go into the target's forward as they are, and come
to the host together with the verdict. Tokens are drawn with the request's own noise at their position: a drafter whose
logits are like the target's is right at any temperature (drafter-invariant sampling, arXiv 2408.07978).
"""

from collections.abc import Sequence

import mlx.core as mx

from worker.cache.layout import Segment
from worker.drafters.drafter import Ask, Draft, Offer, Pending
from worker.request import Row
from worker.sampling.sampler import Draw, choose
from worker.step_times import Array, StepTimes
from worker.target import Target

GREEDY, SAMPLED = 0, 1  # classes of such drafts, as `Offer.match` tells them: noise makes them stand less often


def match_of(row: Row) -> int:
    """The class of a computed draft for this row."""
    return GREEDY if row.request.sampling.is_greedy else SAMPLED


class ChainDrafter:
    """Drafts with `forward` on the cache of `target`, whose slots are those of the rows.

    `times`: seconds of such a forward by its number of tokens. `acceptance`: what to expect of its drafts by position,
    where that is known better than by a trial; of greedy rows, and of sampled ones.
    """

    name = "chain"
    computes = True

    def __init__(self, target: Target, times: StepTimes) -> None:
        self.target = target
        self.times = times
        times.sizes = target.state.sizes
        self.acceptance: dict[int, Sequence[float]] = {}

    def offer(self, row: Row, limit: int) -> Offer | None:
        return Offer(self.name, limit, match_of(row))

    def step_s(self, rows: Array) -> Array | float:
        return self.times.predict_all(rows)

    def catches_up(self, rows: Sequence[Row]) -> bool:
        return False

    def draft(self, asks: Sequence[Ask]) -> list[Draft]:
        """One chain for all rows together; those that asked for less leave it earlier."""
        chain = sorted(asks, key=lambda ask: ask.row.slot)
        self._begin([ask.row for ask in chain])
        made = [self._first(chain)]  # int32 [rows of the chain] at each position
        places = {ask.row.slot: [i] for i, ask in enumerate(chain)}
        count = len(chain)
        for position in range(1, max(ask.length for ask in chain)):
            kept = [i for i, ask in enumerate(chain) if ask.length > position]
            tokens = made[-1]
            if len(kept) < len(chain):
                tokens = tokens[mx.array(kept, dtype=mx.int32)]
                chain = [chain[i] for i in kept]
            made.append(self._next(chain, tokens, position))
            for i, ask in enumerate(chain):
                places[ask.row.slot].append(count + i)
            count += len(chain)
        self._end([ask.row for ask in asks])
        tokens = made[0] if len(made) == 1 else mx.concatenate(made)
        return [
            Draft(self.name, ask.offer.match, ask.length, None, Pending(tokens, tuple(places[ask.row.slot])))
            for ask in asks
        ]

    def settle(self, row: Row, length: int, accepted: int) -> None:
        """Nothing is kept of a draft."""

    def keep_up(self, rows: Sequence[Row]) -> None:
        """It reads what it lacks when it drafts."""

    def catch_up(self, rows: Sequence[Row]) -> None:
        """Nothing of its own is in the target's slots."""

    def rearrange(self, kept: Sequence[int]) -> None:
        """The slots are the target's own."""

    def forget(self, row: Row, *, is_finished: bool) -> None:
        """Nothing is kept of a row."""

    # --- what differs -------------------------------------------------------------------------------------

    def forward(self, segments: Sequence[Segment], tokens: mx.array, chosen: Sequence[int]) -> mx.array:
        """Logits [chosen, vocabulary] of a packed step, not evaluated."""
        return self.target.forward(segments, tokens, chosen)

    def cached(self, row: Row) -> int:
        """Tokens of the row that the drafter's cache holds."""
        return self.target.state.lengths[row.slot] if row.slot < self.target.state.slots else 0

    def _begin(self, rows: Sequence[Row]) -> None:
        """Before a chain."""

    def _end(self, rows: Sequence[Row]) -> None:
        """After a chain."""

    # --- the chain ----------------------------------------------------------------------------------------

    def _first(self, asks: Sequence[Ask]) -> mx.array:
        """Feeds each row's tokens that the cache lacks, the pending one last; returns the first drafted tokens."""
        segments: list[Segment] = []
        fed: list[int] = []
        ends: list[int] = []
        for ask in asks:
            start = self.cached(ask.row)
            fed += ask.row.tokens[start:]
            segments.append(Segment(ask.row.slot, start, len(ask.row.tokens) - start))
            ends.append(len(fed) - 1)
        return self._chosen(asks, segments, mx.array(fed, dtype=mx.int32), ends, 0)

    def _next(self, asks: Sequence[Ask], tokens: mx.array, position: int) -> mx.array:
        segments = [Segment(ask.row.slot, len(ask.row.tokens) + position - 1, 1) for ask in asks]
        return self._chosen(asks, segments, tokens, range(len(asks)), position)

    def _chosen(
        self, asks: Sequence[Ask], segments: Sequence[Segment], tokens: mx.array, ends: Sequence[int], position: int
    ) -> mx.array:
        logits = self.forward(segments, tokens, ends)
        for segment in segments:
            self.target.state.commit(segment.slot, segment.end)
        draws = [Draw(ask.row.request.sampling, len(ask.row.tokens) + position) for ask in asks]
        return mx.maximum(choose(logits, draws), 0)  # what is not finite is drafted as any token
