"""Who drafts for whom in a step: collects the drafters' offers, lets the controller decide, has them draft."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from worker.drafters.controller import FADES, Candidate, Controller, Costs, Decision
from worker.drafters.drafter import NO_DRAFT, Ask, Draft, Drafter, Offer
from worker.request import Row
from worker.step_times import StepTimes

PLAIN_EVERY = 24  # steps with drafts between plain ones, which keep the price of a plain step known; fewer at first
LARGEST_SHARE = 0.02  # of the time of steps that find nothing to draft, for looking
MOST_SKIPPED = 16  # steps in a row without a look
_PRICE_RATE = 0.1  # weight of one step's measurement
_MOST_OFF = 0.5  # a single step is taken to be off by so much at most, in prices of its parts
SURE_MATCH = 3  # `combo` takes a copy of such a match before it lets a drafter compute


@dataclass(frozen=True, slots=True)
class Plan:
    """An offer for each row (None: no draft), and the controller's decision on it."""

    offers: tuple[Offer | None, ...]
    decision: Decision


@dataclass(slots=True)
class Drafting:
    """The drafters of one model. `drafters` are in order of preference among equals."""

    drafters: Mapping[str, Drafter]
    in_auto: Sequence[str] = ()  # those that `auto` uses
    max_tokens: int = 8
    controller: Controller = field(default_factory=Controller)
    clock: Callable[[], float] = time.perf_counter
    drafted_steps: int = 0  # without a plain one between …
    plain_every: int = 1  # … and the most of them, which doubles up to PLAIN_EVERY
    beyond_s: float = 0.0  # what steps with computed drafts took beyond the prices of their parts, lately; may be less
    _skip: int = 0  # so many steps before the next look …
    _most_skipped: int = 0  # … which doubles while nothing pays
    catches_up: bool = False  # whether the latest step did: see `Drafter.catches_up`
    _is_computed: bool = False  # whether the latest step had such drafts

    def drafts(self, rows: Sequence[Row], times: StepTimes) -> tuple[list[Draft], float]:
        """The drafts that pay for these decoding rows, one each, and the seconds that making them will take.

        Looking takes time as well: where nothing paid, the next looks are put off until they take no more than
        `LARGEST_SHARE` of the steps' time. A small batch on a slow device is looked at in every step.
        """
        self._is_computed = self.catches_up = False
        if self._skip or self.drafted_steps >= self.plain_every:
            self.plain_every = min(2 * self.plain_every, PLAIN_EVERY)
            self._skip = max(self._skip - 1, 0)
            self.drafted_steps = 0
            return [NO_DRAFT] * len(rows), 0.0
        began_s = self.clock()
        offers = [self._offers(row) for row in rows]
        plan = self._best_plan(rows, offers, times) if any(offers) else None
        if plan is None or not any(plan.decision.lengths):
            self.drafted_steps = 0
            self._rest()
            if rows:
                self._put_off((self.clock() - began_s) / times.predict(len(rows)))
            return [NO_DRAFT] * len(rows), 0.0
        self._most_skipped = 0
        self.drafted_steps += 1
        drafts = self._granted(rows, plan)
        if not self._is_computed:
            self._rest()
        return drafts, plan.decision.draft_s

    def _rest(self) -> None:
        """Nobody computes: what made it look dear is forgotten slowly, or it would never be tried again."""
        self.beyond_s *= FADES
        for name, drafter in self.drafters.items():
            if drafter.step_s(1):
                self.controller.rest(name)

    def _put_off(self, share: float) -> None:
        """A look that took `share` of a step's time found nothing."""
        self._skip = min(int(share / LARGEST_SHARE), self._most_skipped)
        self._most_skipped = min(max(2 * self._most_skipped, 1), MOST_SKIPPED)

    def took(self, seconds: float, predicted_s: float) -> None:
        """The latest step had drafts and took so long; `predicted_s` are the prices of all its parts."""
        if self._is_computed:
            parts_s = predicted_s - self.once_s
            off_s = seconds - parts_s - self.beyond_s
            self.beyond_s += _PRICE_RATE * min(max(off_s, -_MOST_OFF * parts_s), _MOST_OFF * parts_s)

    @property
    def once_s(self) -> float:
        """What a step costs besides if anybody computes a draft in it; noise in both directions makes no price."""
        return max(self.beyond_s, 0.0)

    def settle(self, row: Row, draft: Draft, accepted: int, gained: int) -> None:
        """A step gave the row `gained` tokens, of which `accepted` had been drafted."""
        if not draft.length:
            self.controller.went_plain(row.id, gained)
            return
        self.controller.observe(row.id, draft.drafter, draft.match, draft.length, accepted)
        self.drafters[draft.drafter].settle(row, draft.length, accepted)

    def keep_up(self, rows: Sequence[Row]) -> None:
        """The target has gone on in these rows, sorted by slot."""
        for drafter in self.drafters.values():
            drafter.keep_up(rows)

    def catch_up(self, rows: Sequence[Row]) -> None:
        """What is in the slots of these rows, sorted by slot, will be copied now."""
        for drafter in self.drafters.values():
            drafter.catch_up(rows)

    def rearrange(self, kept: Sequence[int]) -> None:
        """The row of slot `kept[i]` has slot i from now on; there are no others."""
        for drafter in self.drafters.values():
            drafter.rearrange(kept)

    def forget(self, row: Row, *, is_finished: bool) -> None:
        """The row is gone, or has lost its slot."""
        self.controller.forget(row.id)
        for drafter in self.drafters.values():
            drafter.forget(row, is_finished=is_finished)

    # --- offers -------------------------------------------------------------------------------------------

    def _offers(self, row: Row) -> list[Offer]:
        """What the drafters that the request allows could draft for a row."""
        limit = self._limit(row)
        if limit <= 0:
            return []
        wanted = row.request.speculation.drafter
        names = {"auto": self.in_auto, "combo": self.drafters}.get(wanted, (wanted,))
        offers = (self.drafters[name].offer(row, limit) for name in names)
        return [offer for offer in offers if offer is not None and offer.length > 0]

    def _limit(self, row: Row) -> int:
        speculation = row.request.speculation
        if not speculation.is_on:
            return 0
        wanted = speculation.max_draft_tokens
        return min(self.max_tokens if wanted is None else wanted, row.tokens_left - 1)

    # --- the choice ---------------------------------------------------------------------------------------

    def _best_plan(self, rows: Sequence[Row], offers: Sequence[Sequence[Offer]], times: StepTimes) -> Plan:
        """The best of two plans: only copies are drafted, or everyone also computes who gains more by it.

        A drafter that computes has a price that its rows share, so it is worth it for many or for none.
        """
        prices = {name: drafter.step_s for name, drafter in self.drafters.items() if drafter.step_s(1)}
        costs = Costs(times.predict_all, prices, self.once_s)
        copies = [[offer for offer in own if offer.tokens is not None] for own in offers]
        plan = self._plan(rows, [self._favourite(row, own) for row, own in zip(rows, copies, strict=True)], costs)
        if all(offer.tokens is not None for own in offers for offer in own):
            return plan
        favourites = [self._favourite(row, own) for row, own in zip(rows, offers, strict=True)]
        other = self._plan(rows, favourites, costs)
        return max(plan, other, key=lambda p: (p.decision.goodput, p is plan))

    def _favourite(self, row: Row, offers: Sequence[Offer]) -> Offer | None:
        """The offer of which most is expected to stand; for `combo` a sure copy, else a computed one."""
        if row.request.speculation.drafter == "combo":
            offers = _combined(offers)
        if len(offers) < 2:
            return offers[0] if offers else None
        return max(offers, key=lambda o: self.controller.expected(row.id, o.drafter, o.match, o.length))

    def _plan(self, rows: Sequence[Row], offers: Sequence[Offer | None], costs: Costs) -> Plan:
        candidates = [
            Candidate(row.id, offer.drafter, offer.length, offer.match, self.controller.must_probe(row.id))
            for row, offer in zip(rows, offers, strict=True)
            if offer is not None
        ]
        return Plan(tuple(offers), self.controller.decide(candidates, len(rows), costs))

    # --- drafting -----------------------------------------------------------------------------------------

    def _granted(self, rows: Sequence[Row], plan: Plan) -> list[Draft]:
        lengths = iter(plan.decision.lengths)
        asks: dict[str, dict[int, Ask]] = {}
        for place, (row, offer) in enumerate(zip(rows, plan.offers, strict=True)):
            if offer is not None and (length := next(lengths)):
                asks.setdefault(offer.drafter, {})[place] = Ask(row, offer, length)
        drafts = [NO_DRAFT] * len(rows)
        for name, wanted in asks.items():
            drafter = self.drafters[name]
            self.catches_up |= drafter.catches_up([ask.row for ask in wanted.values()])
            for place, draft in zip(wanted, drafter.draft(list(wanted.values())), strict=True):
                drafts[place] = draft
        self._is_computed = any(draft.pending is not None for draft in drafts)
        return drafts


def _combined(offers: Sequence[Offer]) -> list[Offer]:
    copies = [offer for offer in offers if offer.tokens is not None]
    sure = [offer for offer in copies if offer.match >= SURE_MATCH]
    return sure or [offer for offer in offers if offer.tokens is None] or copies
