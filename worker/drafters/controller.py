"""How many tokens each row drafts in a step, and who drafts them: what raises the batch's measured goodput most.

Goodput of a step is Σ expected tokens of its rows / its time. A step is packed, so each draft token adds one token to
the step, whichever row it belongs to; given each row's chances, the best choice is the best prefix of all draft tokens
sorted by their chance to be reached and accepted. A drafter that computes also costs its own time for each position
that it drafts, shared by its rows. (After TurboSpec, arXiv 2406.14066, at the level of single tokens.)
"""

import heapq
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

PROBE_TOKENS = 128  # a row that drafts nothing is parked and tries again after so many tokens …
PROBE_TOKENS_MAX = 4096  # … doubling while its probes fail
DEEPEST = 8  # positions of a draft are counted one by one up to here
_COPY_PRIOR = {1: 0.25, 2: 0.45, 3: 0.55, 4: 0.65}  # acceptance of a copy by its match, before anything is known
_LONG_COPY_PRIOR = 0.75
_PRIOR_WEIGHT = 8.0
_ROW_WEIGHT = 6.0
_MEMORY = 0.97
_SHARED_FROM = 4  # positions from here on share one estimate
_SUREST = 0.98


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
    """One drafter's offer for a row. `must_probe`: draft at least one token of it."""

    row: str
    drafter: str
    length: int
    match: int
    must_probe: bool = False


@dataclass(frozen=True, slots=True)
class Costs:
    """Predicted seconds: of a step of so many tokens, and of one more draft position of a drafter for so many rows.

    `once_s`: what a step costs besides if anybody computes a draft in it.
    """

    step_s: Callable[[int], float]
    draft_s: Mapping[str, Callable[[int], float]] = field(default_factory=dict)
    once_s: float = 0.0

    def drafting(self, drafter: str, rows: int) -> float:
        price = self.draft_s.get(drafter)
        return 0.0 if price is None or not rows else price(rows)


@dataclass(frozen=True, slots=True)
class Decision:
    """Draft length of each candidate, and what it promises: expected tokens per second, and the drafters' seconds."""

    lengths: tuple[int, ...]
    goodput: float
    draft_s: float = 0.0


@dataclass(slots=True)
class RowRecord:
    """What is known of one live row."""

    tallies: dict[str, Tally] = field(default_factory=dict)  # by drafter
    since_draft: int = 0  # tokens made since it last drafted
    probe_after: int = PROBE_TOKENS

    @property
    def is_parked(self) -> bool:
        return self.since_draft >= PROBE_TOKENS // 4


@dataclass(slots=True)
class Position:
    """How often a draft's token at one position was judged, and stood."""

    judged: int = 0
    accepted: int = 0


@dataclass(slots=True)
class Controller:
    """Acceptance seen so far, of this model and of each live row; decisions are functions of it and of costs."""

    model: dict[tuple[str, int, int], Tally] = field(default_factory=dict)  # by drafter, match and depth
    rows: dict[str, RowRecord] = field(default_factory=dict)
    priors: dict[str, float] = field(default_factory=dict)  # acceptance of drafters that compute, measured at load
    positions: dict[str, list[Position]] = field(default_factory=dict)  # by drafter, for the figures
    probes: int = 0

    @property
    def parked(self) -> int:
        """Rows that have drafted nothing for a while."""
        return sum(record.is_parked for record in self.rows.values())

    def chance(self, row: str, drafter: str, match: int, depth: int) -> float:
        """That the draft token at `depth` (from 0) is accepted, given that those before it were."""
        prior = self.priors.get(drafter)
        if prior is None:
            prior = _COPY_PRIOR.get(match, _LONG_COPY_PRIOR)
        usual = self.model.get((drafter, match, min(depth, _SHARED_FROM)), _UNKNOWN).mean(prior, _PRIOR_WEIGHT)
        record = self.rows.get(row)
        own = record.tallies.get(drafter) if record else None
        return min(usual if own is None else own.mean(usual, _ROW_WEIGHT), _SUREST)

    def expected(self, row: str, drafter: str, match: int, length: int) -> float:
        """Draft tokens of `length` that are expected to stand."""
        expected, reach = 0.0, 1.0
        for depth in range(length):
            reach *= self.chance(row, drafter, match, depth)
            expected += reach
        return expected

    def must_probe(self, row: str) -> bool:
        """Whether the row has been parked for so long that it must try again."""
        record = self.rows.get(row)
        return record is not None and record.since_draft >= record.probe_after

    def decide(self, candidates: Sequence[Candidate], rows: int, costs: Costs) -> Decision:
        """Draft lengths for the candidates, of which a row has one at most. `rows` gain a token in the step anyway."""
        return _Search(self, candidates, rows, costs).best()

    def observe(self, row: str, drafter: str, match: int, drafted: int, accepted: int) -> None:
        """Take in a verdict: `accepted` of `drafted` tokens stood; those after the first that fell say nothing."""
        record = self.rows.setdefault(row, RowRecord())
        own = record.tallies.setdefault(drafter, Tally())
        places = self.positions.setdefault(drafter, [Position() for _ in range(DEEPEST)])
        for depth in range(min(accepted + 1, drafted)):
            is_accepted = depth < accepted
            self.model.setdefault((drafter, match, min(depth, _SHARED_FROM)), Tally()).add(is_accepted)
            own.add(is_accepted)
            place = places[min(depth, DEEPEST - 1)]
            place.judged += 1
            place.accepted += is_accepted
        if record.since_draft >= record.probe_after:
            self.probes += 1
        record.since_draft = 0
        record.probe_after = PROBE_TOKENS if accepted else min(2 * record.probe_after, PROBE_TOKENS_MAX)

    def went_plain(self, row: str, gained: int) -> None:
        """The row gained tokens in a step without a draft."""
        self.rows.setdefault(row, RowRecord()).since_draft += gained

    def forget(self, row: str) -> None:
        """The row is gone."""
        self.rows.pop(row, None)


class _Search:
    """Adds draft tokens in order of their chance, keeps the best prefix."""

    def __init__(self, controller: Controller, candidates: Sequence[Candidate], rows: int, costs: Costs) -> None:
        self.controller = controller
        self.candidates = candidates
        self.costs = costs
        self.lengths = [0] * len(candidates)
        self.reached = [1.0] * len(candidates)  # chance that all of the tokens taken so far stand
        self.rows = rows
        self.taken: list[int] = []  # the candidate that each token is of, in the order in which they were taken
        self.gained = float(rows)
        self.draft_s = 0.0
        self.drafting: dict[tuple[str, int], int] = {}  # rows that draft, by drafter and position

    def best(self) -> Decision:
        for i, candidate in enumerate(self.candidates):
            if candidate.must_probe and candidate.length:
                self._take(i, self._next_chance(i))
        count, goodput, draft_s = len(self.taken), self._goodput(), self.draft_s
        queue = [(-self._next_chance(i), i) for i, c in enumerate(self.candidates) if c.length > self.lengths[i]]
        heapq.heapify(queue)
        while queue:
            negative_chance, i = heapq.heappop(queue)
            self._take(i, -negative_chance)
            if (reached := self._goodput()) > goodput:
                count, goodput, draft_s = len(self.taken), reached, self.draft_s
            if self.lengths[i] < self.candidates[i].length:
                heapq.heappush(queue, (-self._next_chance(i), i))
        lengths = [0] * len(self.candidates)
        for i in self.taken[:count]:
            lengths[i] += 1
        return Decision(tuple(lengths), goodput, draft_s)

    def _next_chance(self, i: int) -> float:
        """That the next token of candidate `i` is reached and accepted."""
        c = self.candidates[i]
        return self.reached[i] * self.controller.chance(c.row, c.drafter, c.match, self.lengths[i])

    def _take(self, i: int, chance: float) -> None:
        drafter, position = self.candidates[i].drafter, self.lengths[i]
        self.lengths[i] += 1
        self.reached[i] = chance
        self.taken.append(i)
        self.gained += chance
        if drafter in self.costs.draft_s:
            self.draft_s += 0.0 if self.drafting else self.costs.once_s
            rows = self.drafting.get((drafter, position), 0)
            self.draft_s += self.costs.drafting(drafter, rows + 1) - self.costs.drafting(drafter, rows)
            self.drafting[drafter, position] = rows + 1

    def _goodput(self) -> float:
        return self.gained / (self.costs.step_s(self.rows + len(self.taken)) + self.draft_s)


_UNKNOWN = Tally()
