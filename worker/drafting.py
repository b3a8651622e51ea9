"""Who drafts for whom in a step: collects the drafters' offers, lets the controller decide, has them draft."""

import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

import numpy as np

from worker.drafters.controller import Candidate, Controller, Costs, Decision, expected
from worker.drafters.drafter import NO_DRAFT, Ask, Draft, Drafter, Offer
from worker.drafters.looks import Looks
from worker.request import Row
from worker.step_times import Array, StepTimes

PLAIN_EVERY = 24  # steps with drafts between plain ones, which keep the price of a plain step known; fewer at first
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
    looks: Looks = field(default_factory=Looks)
    look_s: float = 0.0  # what looking for drafts took in the latest step
    catches_up: bool = False  # whether the latest step did: see `Drafter.catches_up`
    is_computed: bool = False  # whether somebody computed drafts in the latest step

    def drafts(self, rows: Sequence[Row], times: StepTimes, beside: int = 0) -> tuple[list[Draft], float]:
        """The drafts that pay for these decoding rows, one each, and the seconds that making them will take.

        `beside`: so many tokens of prompts are in the step as well.
        """
        self.is_computed = self.catches_up = False
        self.look_s = 0.0
        if not rows:
            return [], 0.0
        if not self.looks.is_due() or self.drafted_steps >= self.plain_every:
            self.plain_every = min(2 * self.plain_every, PLAIN_EVERY)
            self.drafted_steps = 0
            return [NO_DRAFT] * len(rows), 0.0
        began_s, plain_s = self.clock(), times.predict(len(rows))
        searched = self.looks.to_search(row.id for row in rows)
        offers = [self._offers(row, searched) for row in rows]
        search_s = self.clock() - began_s
        plan = self._best_plan(rows, offers, self._costs(len(rows), beside, times)) if any(offers) else None
        self.look_s = self.clock() - began_s
        if plan is None or not any(plan.decision.lengths):
            self.drafted_steps = 0
            self._rest()
            self.looks.looked(self.look_s / plain_s, 0.0)
            return [NO_DRAFT] * len(rows), 0.0
        self.looks.looked(self.look_s / plain_s, plan.decision.goodput / len(rows) * plain_s - 1.0)
        self.drafted_steps += 1
        drafts = self._granted(rows, plan)
        copied = {row.id for row, draft in zip(rows, drafts, strict=True) if draft.tokens}
        share = search_s / max(len(searched), 1) * len(rows) / plain_s
        self.looks.searched(searched & copied, searched - copied, share)
        if not self.is_computed:
            self._rest()
        return drafts, plan.decision.draft_s

    def _rest(self) -> None:
        """Nobody computes: what is known of those who could is forgotten slowly, or they would never be tried again."""
        for name, drafter in self.drafters.items():
            if drafter.computes:
                self.controller.rest(name)

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
        self.looks.forget(row.id)
        for drafter in self.drafters.values():
            drafter.forget(row, is_finished=is_finished)

    # --- offers -------------------------------------------------------------------------------------------

    def _offers(self, row: Row, searched: Collection[str]) -> list[Offer]:
        """What the drafters that the request allows could draft for a row; copies only if it is to be searched."""
        limit = self._limit(row)
        if limit <= 0:
            return []
        wanted = row.request.speculation.drafter
        names = {"auto": self.in_auto, "combo": self.drafters}.get(wanted, (wanted,))
        asked = [drafter for name in names if (drafter := self.drafters[name]).computes or row.id in searched]
        offers = (drafter.offer(row, limit) for drafter in asked)
        return [offer for offer in offers if offer is not None and offer.length > 0]

    def _limit(self, row: Row) -> int:
        speculation = row.request.speculation
        if not speculation.is_on:
            return 0
        wanted = speculation.max_draft_tokens
        return min(self.max_tokens if wanted is None else wanted, row.tokens_left - 1)

    # --- the choice ---------------------------------------------------------------------------------------

    def _costs(self, rows: int, beside: int, times: StepTimes) -> Costs:
        """Of steps for so many rows. What prompts' tokens take is their own affair, but a draft comes on top of them:
        in a step that is large already the next token may cost more than in a small one."""
        prices = {
            name: partial(_scaled, drafter.step_s, times.now)
            for name, drafter in self.drafters.items()
            if drafter.computes
        }
        prompts_s = times.predict(rows + beside) - times.predict(rows) if beside else 0.0
        return Costs(
            lambda tokens: times.predict_all(tokens + beside) - prompts_s,
            prices,
            lambda tokens: times.computed(tokens + beside),
            times.factors.copied,
        )

    def _best_plan(self, rows: Sequence[Row], offers: Sequence[Sequence[Offer]], costs: Costs) -> Plan:
        """The best of two plans: only copies are drafted, or everyone also computes who gains more by it.

        A drafter that computes has a price that its rows share, so it is worth it for many or for none.
        """
        choice = self._choice(rows, offers)
        copies = [[one for one in own if choice.offers[one].tokens is not None] for own in choice.by_row]
        plan = self._plan(
            choice, [self._favourite(row, choice, own) for row, own in zip(rows, copies, strict=True)], costs
        )
        if not self._may_pay(choice, len(rows), costs):
            return plan
        favourites = [self._favourite(row, choice, own) for row, own in zip(rows, choice.by_row, strict=True)]
        other = self._plan(choice, favourites, costs)
        return max(plan, other, key=lambda p: (p.decision.goodput, p is plan))

    def _may_pay(self, choice: "_Choice", rows: int, costs: Costs) -> bool:
        """Whether computing would pay if it took one position for one row, and all that can be expected stood."""
        names = {offer.drafter for offer in choice.offers if offer.tokens is None}
        least_s = min((float(np.max(costs.draft_s[name](np.array([1])))) for name in names), default=np.inf)
        plain_s = float(np.max(costs.steps_s(np.array([rows]))))
        factor = float(np.max(costs.computed(np.array([rows + 1]))))
        return sum(choice.expected) * plain_s > rows * (factor * (plain_s + least_s) - plain_s)

    def _choice(self, rows: Sequence[Row], offers: Sequence[Sequence[Offer]]) -> "_Choice":
        candidates: list[Candidate] = []
        by_row: list[range] = []
        for row, own in zip(rows, offers, strict=True):
            must_probe = self.controller.must_probe(row.id)
            by_row.append(range(len(candidates), len(candidates) + len(own)))
            candidates += [Candidate(row.id, o.drafter, o.length, o.match, must_probe) for o in own]
        reaches = self.controller.reaches(candidates)
        return _Choice(
            offers=[offer for own in offers for offer in own],
            by_row=by_row,
            candidates=candidates,
            reaches=reaches,
            expected=expected(candidates, reaches).tolist(),
        )

    def _favourite(self, row: Row, choice: "_Choice", own: Sequence[int]) -> int | None:
        """Of a row's `own` offers the one of which most is expected to stand; for `combo` a sure copy, else a computed
        one."""
        if row.request.speculation.drafter == "combo":
            own = _combined(choice.offers, own)
        return max(own, key=choice.expected.__getitem__, default=None)

    def _plan(self, choice: "_Choice", chosen: Sequence[int | None], costs: Costs) -> Plan:
        """What to draft if each row has the chosen one of all offers, or none."""
        places = [one for one in chosen if one is not None]
        candidates = [choice.candidates[one] for one in places]
        decision = self.controller.decide(candidates, choice.reaches[places], len(chosen), costs)
        return Plan(tuple(None if one is None else choice.offers[one] for one in chosen), decision)

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
        self.is_computed = any(draft.pending is not None for draft in drafts)
        return drafts


@dataclass(frozen=True, slots=True)
class _Choice:
    """All rows' offers, one after the other, and what is to be expected of each."""

    offers: list[Offer]
    by_row: list[range]  # which of them are a row's
    candidates: list[Candidate]
    reaches: Array  # see `Controller.reaches`
    expected: list[float]  # tokens that stand


def _scaled(price: Callable[[Array], Array | float], scale: float, rows: Array) -> Array | float:
    """What was timed once, on a machine that takes `scale` times as long now."""
    return price(rows) * scale


def _combined(offers: Sequence[Offer], own: Sequence[int]) -> Sequence[int]:
    """Those of a row's `own` offers that `combo` considers."""
    copies = [one for one in own if offers[one].tokens is not None]
    sure = [one for one in copies if offers[one].match >= SURE_MATCH]
    return sure or [one for one in own if offers[one].tokens is None] or copies
