"""How many tokens each row drafts in a step, and who drafts them: what raises the batch's measured goodput most.

Goodput of a step is Σ expected tokens of its rows / its time. A step is packed, so each draft token adds one token to
the step, whichever row it belongs to; given each row's chances, the best choice is the best prefix of all draft tokens
sorted by their chance to be reached and accepted. A drafter that computes also costs its own time for each position
that it drafts, shared by its rows. (After TurboSpec, arXiv 2406.14066, at the level of single tokens.)
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import msgspec
import numpy as np

from worker.step_times import Array

PROBE_TOKENS = 128  # a row that drafts nothing is parked and tries again after so many tokens …
PROBE_TOKENS_MAX = 4096  # … doubling while its probes fail
DEEPEST = 8  # positions of a draft are counted one by one up to here
_COPY_PRIOR = {1: 0.25, 2: 0.45, 3: 0.55, 4: 0.65}  # acceptance of a copy by its match, before anything is known
_LONG_COPY_PRIOR = 0.75
_PRIOR_WEIGHT = 8.0
_ROW_WEIGHT = 6.0
_MEMORY = 0.97  # of a row; of all rows …
_LONG_MEMORY = 0.99  # … more is kept: where drafts hardly pay an estimate has to be good
_SHARED_FROM = 4  # positions from here on share one estimate
_SUREST = 0.98
_SURE = 1.3  # drafts have to promise so many times what they cost, as shares: the best of many estimates is too good
_MOST_OF_IT = 0.95  # the shortest drafts are made that promise so much of the most that can be gained
FADES = 0.999  # what is known of a drafter that computes, after each step in which it was not used


@dataclass(slots=True)
class Tally:
    """An exponentially forgetting count of tries and acceptances."""

    accepted: float = 0.0
    tried: float = 0.0

    def add(self, is_accepted: bool, memory: float) -> None:
        self.accepted = self.accepted * memory + is_accepted
        self.tried = self.tried * memory + 1.0

    def mean(self, prior: float, weight: float) -> float:
        return (self.accepted + prior * weight) / (self.tried + weight)

    def fade(self) -> None:
        """It says a little less, of what it said."""
        self.accepted *= FADES
        self.tried *= FADES


class Candidate(msgspec.Struct, frozen=True, gc=False):
    """One drafter's offer for a row. `must_probe`: draft at least one token of it."""

    row: str
    drafter: str
    length: int
    match: int
    must_probe: bool = False


@dataclass(frozen=True, slots=True)
class Costs:
    """Predicted seconds: of steps of so many tokens each, and of one more position of computed drafts for so many rows.

    `computed`, `copied`: factors on the sum of both if anybody computes a draft in a step of so many tokens, and if all
    are copied.
    """

    steps_s: Callable[[Array], Array | float]
    draft_s: Mapping[str, Callable[[Array], Array | float]] = field(default_factory=dict)
    computed: Callable[[Array], Array | float] = lambda tokens: 1.0
    copied: float = 1.0


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
    priors: Mapping[tuple[str, int], Sequence[float]] = field(default_factory=dict)  # of those that compute, by match
    positions: dict[str, list[Position]] = field(default_factory=dict)  # by drafter, for the figures
    probes: int = 0
    _usual: dict[tuple[str, int], tuple[float, ...]] = field(default_factory=dict)  # see `usual`

    @property
    def parked(self) -> int:
        """Rows that have drafted nothing for a while."""
        return sum(record.is_parked for record in self.rows.values())

    def usual(self, drafter: str, match: int) -> tuple[float, ...]:
        """Chances of a draft's token to be accepted if those before it were, by depth, in any row; the last is for all
        deeper ones."""
        known = self._usual.get((drafter, match))
        if known is None:
            priors = self.priors.get((drafter, match)) or (_COPY_PRIOR.get(match, _LONG_COPY_PRIOR),)
            known = tuple(
                self.model.get((drafter, match, depth), _UNKNOWN).mean(
                    priors[min(depth, len(priors) - 1)], _PRIOR_WEIGHT
                )
                for depth in range(_SHARED_FROM + 1)
            )
            self._usual[drafter, match] = known
        return known

    def reaches(self, candidates: Sequence[Candidate]) -> Array:
        """That each draft token is reached and accepted, [candidates, longest]; beyond a candidate's end as well."""
        longest = max(candidate.length for candidate in candidates)
        depths = np.minimum(np.arange(longest), _SHARED_FROM)
        usual = np.array([self.usual(c.drafter, c.match) for c in candidates])[:, depths]
        own = [self._own(c.row, c.drafter) or _UNKNOWN for c in candidates]
        accepted, tried = (np.array([[getattr(one, name)] for one in own]) for name in ("accepted", "tried"))
        chances = (accepted + usual * _ROW_WEIGHT) / (tried + _ROW_WEIGHT)
        reaches: Array = np.cumprod(np.minimum(chances, _SUREST), axis=1)
        return reaches

    def _own(self, row: str, drafter: str) -> Tally | None:
        record = self.rows.get(row)
        return record.tallies.get(drafter) if record else None

    def must_probe(self, row: str) -> bool:
        """Whether the row has been parked for so long that it must try again."""
        record = self.rows.get(row)
        return record is not None and record.since_draft >= record.probe_after

    def decide(self, candidates: Sequence[Candidate], reaches: Array, rows: int, costs: Costs) -> Decision:
        """Draft lengths for the candidates, of which a row has one at most and whose `reaches` are given.

        `rows` gain a token in the step anyway.
        """
        if not any(candidate.length for candidate in candidates):
            return Decision((0,) * len(candidates), rows / float(np.max(costs.steps_s(np.array([rows])))))
        tokens = _sorted_tokens(candidates, reaches)
        added_s, is_computed = _draft_s(candidates, tokens, costs)
        draft_s, sizes = _summed(added_s), np.arange(rows, rows + len(added_s) + 1)
        factors = np.where(_summed(is_computed) > 0, costs.computed(sizes), costs.copied)
        factors[0] = 1.0
        made, taken_s = rows + _summed(tokens.reach), (costs.steps_s(sizes) + draft_s) * factors
        least = sum(candidate.must_probe and candidate.length > 0 for candidate in candidates)
        count = least + _best_count(made[least:], taken_s[least:])
        lengths = np.bincount(tokens.candidate[:count], minlength=len(candidates)).tolist()
        return Decision(tuple(lengths), float(made[count] / taken_s[count]), float(draft_s[count]))

    def observe(self, row: str, drafter: str, match: int, drafted: int, accepted: int) -> None:
        """Take in a verdict: `accepted` of `drafted` tokens stood; those after the first that fell say nothing."""
        record = self.rows.setdefault(row, RowRecord())
        own = record.tallies.setdefault(drafter, Tally())
        places = self.positions.setdefault(drafter, [Position() for _ in range(DEEPEST)])
        for depth in range(min(accepted + 1, drafted)):
            is_accepted = depth < accepted
            self._usual.pop((drafter, match), None)
            self.model.setdefault((drafter, match, min(depth, _SHARED_FROM)), Tally()).add(is_accepted, _LONG_MEMORY)
            own.add(is_accepted, _MEMORY)
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

    def rest(self, drafter: str) -> None:
        """The drafter, which computes, was not used: what is known of it fades to its prior, so that it has another
        chance some time."""
        for key, tally in self.model.items():
            if key[0] == drafter:
                tally.fade()
                self._usual.pop(key[:2], None)

    def forget(self, row: str) -> None:
        """The row is gone."""
        self.rows.pop(row, None)


@dataclass(frozen=True, slots=True)
class _Tokens:
    """Draft tokens of all candidates in the order in which they are taken: arrays of one length."""

    reach: Array  # that the token is reached and accepted
    candidate: Array  # whose it is
    depth: Array


def expected(candidates: Sequence[Candidate], reaches: Array) -> Array:
    """How many of each candidate's tokens will stand, if all are drafted; `reaches` as the controller gives them."""
    lengths = np.array([candidate.length for candidate in candidates])
    sums: Array = np.sum(reaches, axis=1, where=np.arange(reaches.shape[1]) < lengths[:, None])
    return sums


def _sorted_tokens(candidates: Sequence[Candidate], reaches: Array) -> _Tokens:
    """First one of each that must probe, then by their chance; those of one candidate stay in order."""
    lengths = np.array([candidate.length for candidate in candidates])
    forced = np.array([candidate.must_probe for candidate in candidates])
    candidate, depth = np.nonzero(np.arange(reaches.shape[1]) < lengths[:, None])
    reach = reaches[candidate, depth]
    order = np.argsort(np.where(forced[candidate] & (depth == 0), -2.0, -reach), kind="stable")
    return _Tokens(reach[order], candidate[order], depth[order])


def _best_count(made: Array, taken_s: Array) -> int:
    """How many draft tokens to take, where with so many of them so many tokens are expected in so many seconds."""
    goodput = made / taken_s
    gain = goodput - goodput[0]
    count = int(np.argmax(gain >= _MOST_OF_IT * gain.max()))
    is_sure = made[count] / made[0] - 1 >= _SURE * (taken_s[count] / taken_s[0] - 1)
    return count if is_sure else 0


def _draft_s(candidates: Sequence[Candidate], tokens: _Tokens, costs: Costs) -> tuple[Array, Array]:
    """What each token adds to the time of those who compute drafts, and whether it is computed."""
    added = np.zeros(len(tokens.reach))
    computed = np.zeros(len(tokens.reach), dtype=bool)
    for name, price in costs.draft_s.items():
        own = np.array([candidate.drafter == name for candidate in candidates])[tokens.candidate]
        if not own.any():
            continue
        computed |= own
        prices = np.zeros(len(candidates) + 1)
        prices[1:] = price(np.arange(1, len(prices)))
        added[own] = np.diff(prices)[_places_among_equals(tokens.depth[own])]
    return added, computed


def _places_among_equals(values: Array) -> Array:
    """For each of these small numbers, how many of those before it are the same."""
    order = np.argsort(values, kind="stable")
    counts = np.bincount(values)
    places = np.empty_like(values)
    places[order] = np.arange(len(values)) - (np.cumsum(counts) - counts)[values[order]]
    return places


def _summed(values: Array) -> Array:
    """The sums of none, the first, the first two … of them."""
    sums = np.zeros(len(values) + 1)
    np.cumsum(values, out=sums[1:])
    return sums


_UNKNOWN = Tally()
