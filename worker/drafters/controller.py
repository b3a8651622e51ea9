"""How many tokens each row drafts in a step: as many as raise the batch's measured goodput, none if none do.

Goodput of a step is Σ expected tokens of its rows / its time. A step is packed, so each draft token adds one token to
the step, whichever row it belongs to; given each row's chances, the best choice is the best prefix of all draft tokens
sorted by their chance to be reached and accepted. (After TurboSpec, arXiv 2406.14066, at the level of single tokens.)
"""

import heapq
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

PROBE_TOKENS = 64  # a row that drafts nothing tries again after so many tokens …
PROBE_TOKENS_MAX = 1024  # … doubling while its probes fail
_PRIOR = {1: 0.25, 2: 0.45, 3: 0.55, 4: 0.65, 5: 0.75}  # acceptance by match length before anything is known
_PRIOR_WEIGHT = 8.0
_ROW_WEIGHT = 6.0
_MEMORY = 0.97
_DEEPEST = 4  # positions from here on share one estimate


@dataclass(slots=True)
class Tally:
    """An exponentially forgetting count of tries and acceptances."""

    accepted: float = 0.0
    tried: float = 0.0

    def add(self, is_accepted: bool) -> None:
        self.accepted = self.accepted * _MEMORY + is_accepted
        self.tried = self.tried * _MEMORY + 1.0

    def mean(self, prior: float, weight: float) -> float:
        return (self.accepted + prior * weight) / (self.tried + weight)


@dataclass(frozen=True, slots=True)
class Candidate:
    """A row's proposal: its length and the match it comes from. `must_probe`: draft at least one token."""

    row: str
    length: int
    match: int
    must_probe: bool = False


@dataclass(slots=True)
class Controller:
    """Acceptance seen so far, of this model and of each live row; decisions are functions of it and of step times."""

    model: dict[tuple[int, int], Tally] = field(default_factory=dict)
    rows: dict[str, Tally] = field(default_factory=dict)

    def chance(self, row: str, match: int, depth: int) -> float:
        """That the draft token at `depth` (from 0) is accepted, given that those before it were."""
        prior = _PRIOR.get(match, _PRIOR[5])
        usual = self.model.get((match, min(depth, _DEEPEST)), _UNKNOWN).mean(prior, _PRIOR_WEIGHT)
        own = self.rows.get(row)
        if own is None or not own.tried:
            return usual
        drift = own.mean(usual, _ROW_WEIGHT)
        return min(drift, 0.98)

    def decide(
        self, candidates: Sequence[Candidate], base_tokens: int, rows: int, step_s: Callable[[int], float]
    ) -> list[int]:
        """Draft length for each candidate.

        `base_tokens`: tokens of the step without any draft; `rows`: rows that gain a token in it anyway;
        `step_s(tokens)`: predicted seconds of a step of so many tokens.
        """
        lengths = [int(c.must_probe and c.length > 0) for c in candidates]
        base = base_tokens + sum(lengths)
        gained = rows + sum(self._reach(c, n)[0] for c, n in zip(candidates, lengths, strict=True))
        best, best_goodput = list(lengths), gained / step_s(base)
        queue = [
            (-self._reach(c, n)[1], i) for i, (c, n) in enumerate(zip(candidates, lengths, strict=True)) if c.length > n
        ]
        heapq.heapify(queue)
        added = 0
        while queue:
            gain, i = heapq.heappop(queue)
            lengths[i] += 1
            added += 1
            gained -= gain
            goodput = gained / step_s(base + added)
            if goodput > best_goodput:
                best, best_goodput = list(lengths), goodput
            if lengths[i] < candidates[i].length:
                depth = lengths[i]
                heapq.heappush(queue, (gain * self.chance(candidates[i].row, candidates[i].match, depth), i))
        return best

    def _reach(self, candidate: Candidate, length: int) -> tuple[float, float]:
        """Expected accepted tokens of the first `length`, and the chance that the next one is reached and accepted."""
        expected, reach = 0.0, 1.0
        for depth in range(length):
            reach *= self.chance(candidate.row, candidate.match, depth)
            expected += reach
        return expected, reach * self.chance(candidate.row, candidate.match, length)

    def observe(self, row: str, match: int, drafted: int, accepted: int) -> None:
        """Take in a verdict: `accepted` of `drafted` tokens stood; those after the first that fell say nothing."""
        own = self.rows.setdefault(row, Tally())
        for depth in range(min(accepted + 1, drafted)):
            is_accepted = depth < accepted
            self.model.setdefault((match, min(depth, _DEEPEST)), Tally()).add(is_accepted)
            own.add(is_accepted)

    def forget(self, row: str) -> None:
        """The row is gone."""
        self.rows.pop(row, None)


_UNKNOWN = Tally()
