"""Who drafts for whom in a step: collects the drafters' offers, lets the controller decide, has them draft."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from worker.drafters.controller import Candidate, Controller, Costs, Decision
from worker.drafters.drafter import NO_DRAFT, Ask, Draft, Drafter, Offer
from worker.request import Row

PLAIN_EVERY = 24  # steps with drafts between plain ones, which keep the price of a plain step known
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
    drafted_steps: int = 0  # without a plain one between

    def drafts(self, rows: Sequence[Row], step_s: Callable[[int], float]) -> tuple[list[Draft], float]:
        """The drafts that pay for these decoding rows, one each, and the seconds that making them will take."""
        offers = [self._offers(row) for row in rows]
        if not any(offers) or self.drafted_steps >= PLAIN_EVERY:
            self.drafted_steps = 0
            return [NO_DRAFT] * len(rows), 0.0
        plan = self._best_plan(rows, offers, step_s)
        self.drafted_steps = self.drafted_steps + 1 if any(plan.decision.lengths) else 0
        return self._granted(rows, plan), plan.decision.draft_s

    def settle(self, row: Row, draft: Draft, accepted: int, gained: int) -> None:
        """A step gave the row `gained` tokens, of which `accepted` had been drafted."""
        if not draft.length:
            self.controller.went_plain(row.id, gained)
            return
        self.controller.observe(row.id, draft.drafter, draft.match, draft.length, accepted)
        self.drafters[draft.drafter].settle(row, draft.length, accepted)

    def keep_up(self, row: Row) -> None:
        """The target has gone on in this row."""
        for drafter in self.drafters.values():
            drafter.keep_up(row)

    def catch_up(self, row: Row) -> None:
        """What is in the row's slot will be copied now."""
        for drafter in self.drafters.values():
            drafter.catch_up(row)

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

    def _best_plan(
        self, rows: Sequence[Row], offers: Sequence[Sequence[Offer]], step_s: Callable[[int], float]
    ) -> Plan:
        """The best of two plans: only copies are drafted, or everyone also computes who gains more by it.

        A drafter that computes has a price that its rows share, so it is worth it for many or for none.
        """
        costs = Costs(step_s, {name: drafter.step_s for name, drafter in self.drafters.items() if drafter.step_s(1)})
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
            for place, draft in zip(wanted, self.drafters[name].draft(list(wanted.values())), strict=True):
                drafts[place] = draft
        return drafts


def _combined(offers: Sequence[Offer]) -> list[Offer]:
    copies = [offer for offer in offers if offer.tokens is not None]
    sure = [offer for offer in copies if offer.match >= SURE_MATCH]
    return sure or [offer for offer in offers if offer.tokens is None] or copies
