"""The speculative, continuous batch loop's one step: admit, propose, verify, accept, commit.

Every row of the batch takes part in every step with as many tokens as suit it: a prompt's next chunk, or its pending
token and the draft that follows it. One forward of the target serves them all, and the device is waited for once.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import msgspec

from common.errors import ContextLengthExceeded, InternalError, Overloaded
from common.messages import Timings
from worker import scheduler, slots
from worker.acceptance import accept
from worker.drafters.drafter import NO_DRAFT, Draft
from worker.drafting import Drafting
from worker.ends import already_over, timings_of, usage_of, without_row
from worker.prefix_cache import PrefixCache
from worker.report import Gain, StepReport, Totals
from worker.request import Request, Row
from worker.scheduler import Limits
from worker.step_times import StepTimes
from worker.target import Target
from worker.time_factors import Kind
from worker.verification import Feed, Verified, verify
from worker.waiting import WaitingList

LARGEST_CHUNK = 2048  # tokens of prompts in one step at most
SMALLEST_CHUNK = 16
PATIENCE = 2.0  # who waits for his next token waits so many usual steps longer for others' prompts, on a slow machine
SEVERAL = 3.0  # … or so many times that where several wait for their first: who is through needs not wait for the last
FIRST_TOKEN_WEIGHT = 8.0  # a row's wait for its first token counts as much as so many rows' waits for their next


@dataclass(frozen=True, slots=True)
class Pace:
    """How long a step may take for prompts' sake, in seconds: while others wait, and when nobody does."""

    chunk_s: float = 0.1
    chunk_alone_s: float = 0.8

    def chunk_time(self, decoding: int, prefilling: int, step_s: float) -> float:
        """Seconds for prompts in one step: the more wait for their first token than for their next, the longer.

        `step_s` is what the step takes without them: where that is long, small chunks would take more time in all.
        """
        if not decoding and prefilling == 1:
            return self.chunk_alone_s
        least_s = max(self.chunk_s, PATIENCE * step_s)
        weight = FIRST_TOKEN_WEIGHT * prefilling / decoding if decoding else SEVERAL
        return min(least_s * min(max(weight, 1.0), SEVERAL), self.chunk_alone_s)


@dataclass(slots=True)
class Engine:
    """One model's rows and their steps. All methods belong to the thread that loaded the model."""

    target: Target
    times: StepTimes
    limits: Limits
    drafting: Drafting
    pace: Pace = Pace()
    clock: Callable[[], float] = time.perf_counter
    waiting: WaitingList = field(default_factory=WaitingList)
    rows: list[Row] = field(default_factory=list)
    totals: Totals = field(default_factory=Totals)
    prefixes: PrefixCache = field(default_factory=PrefixCache)
    on_step_time: Callable[[float, float], None] | None = None  # seconds taken, and usual on a calm machine
    on_answer: Callable[[Sequence[int], Sequence[int]], None] | None = None  # prompt and answer, as token ids
    on_wait: Callable[[], None] = lambda: None  # a step is about to wait for the device
    prefill_drift: float = 1.0  # measured over predicted time of steps with prompt chunks
    _ended: list[Gain] = field(default_factory=list)
    _leaving: list[tuple[Row, str]] = field(default_factory=list)  # rows that ended in this step, and how
    _draft_s: float = 0.0  # predicted time of this step's drafters
    _ends_s: float = 0.0  # what the ends of rows took in this step

    # --- requests come and go, between steps ----------------------------------------------------------

    def submit(self, request: Request) -> None:
        """Queue a request. Raises `Overloaded` or `ContextLengthExceeded` when it cannot wait or can never run."""
        if len(self.waiting) >= self.limits.waiting:
            raise Overloaded(
                f"{len(self.waiting)} requests wait for this model, its limit is {self.limits.waiting}: try again later"
            )
        if not scheduler.fits_alone(request, self.limits):
            raise ContextLengthExceeded(
                f"prompt and max_tokens come to {request.total_tokens} tokens, whose cache takes more than the "
                f"{self.limits.kv_bytes} bytes that this model may use: lower max_tokens or raise the memory limit",
                param="max_tokens",
            )
        if reason := already_over(request):
            self._ended.append(without_row(request, reason))
            return
        self.waiting.add(request, self.clock())

    def cancel(self, request_id: str) -> list[Gain]:
        """Free a request's row or place in the queue at once, and say how it ended; an unknown one is long gone."""
        gains: list[Gain] = []
        for one in [w for w in self.waiting if w.request.request_id == request_id]:
            self.waiting.remove(one)
            gains.append(without_row(one.request, "cancelled") if one.row is None else self._end_preempted(one.row))
        for row in [r for r in self.rows if r.request.request_id == request_id]:
            gains.append(self._end(row, Gain(request_id), "cancelled"))
        self._let_go()
        return gains

    def set_kv_limit(self, kv_bytes: int) -> None:
        """Use at most so much memory for keys and values; rows beyond it are preempted at the next step.

        Only a row that is alone goes on whatever it takes.
        """
        self.limits = replace(self.limits, kv_bytes=kv_bytes)
        if not self.rows:
            self.target.clear()
        self.prefixes.fit(kv_bytes, self.target.kv_bytes)

    @property
    def has_work(self) -> bool:
        return bool(self.rows or self.waiting or self._ended)

    # --- one step -----------------------------------------------------------------------------------------

    def step(self) -> StepReport:
        """Run one step for all rows and say what each gained."""
        began, compiled = self.clock(), self.target.compiled_shapes
        self._admit(began)
        ended, self._ended = tuple(self._ended), []
        if not self.rows:
            self.target.clear()
            return StepReport(self.totals.steps, ended)
        self._shed(began)
        self._recall()
        feeds = self._propose()
        self._make_room(feeds)
        proposed = self.clock()
        outcome = verify(self.target, feeds, self.on_wait)
        verified = self.clock()
        gains = [self._accept(feed, tokens) for feed, tokens in zip(feeds, outcome, strict=True)]
        accepted = self.clock()
        self._let_go()
        self._ends_s = self.clock() - accepted
        self.drafting.keep_up(self.rows)
        report = self._report(feeds, ended + tuple(g for g in gains if g), began, proposed, verified)
        is_usual = self.target.compiled_shapes == compiled and not self.drafting.catches_up
        self._learn(feeds, gains, report, is_usual=is_usual)
        return report

    def _admit(self, now_s: float) -> None:
        admitted = scheduler.admissible(self.waiting.in_order(now_s), self.rows, self.limits)
        for one, slot in zip(admitted, scheduler.free_slots(self.rows, len(admitted)), strict=True):
            self.waiting.remove(one)
            self.totals.prompt_tokens += len(one.request.prompt) if one.row is None else 0
            row = one.as_row(slot, now_s)
            if self.prefixes.is_on:
                self.prefixes.lookups += 1
                self._look_ahead(row)
            self.rows.append(row)
        self.rows.sort(key=lambda row: row.slot)
        self.target.state.longest_tokens = max((row.request.total_tokens for row in self.rows), default=0)

    def _shed(self, now_s: float) -> None:
        """Preempt rows until the slots that the others need fit the limit, and let those move together."""
        while (shape := slots.shape_to_move_to(self.target, self.rows, self.limits)) is not None:
            if len(self.rows) == 1 or self.limits.fit(shape.slots, shape.capacity_tokens):
                return slots.move_together(self.target, self.drafting, self.rows, shape.capacity_tokens)
            self._preempt(scheduler.victim(self.rows, now_s, self.waiting.aging_s), now_s)

    def _preempt(self, row: Row, now_s: float) -> None:
        """Take a row's slot; it waits in its old place in the queue, and goes on as if it had never stopped."""
        self._keep([row])
        self.prefixes.settle()
        self._release(row, is_finished=False)
        row.lose_slot(now_s)
        self.waiting.put_back(row)
        self.totals.preempted += 1
        for other in [other for other in self.rows if other.ahead is row]:
            self._look_ahead(other)

    def _recall(self) -> None:
        """Rows that have read nothing yet begin with what the prefix cache knows, or wait for who reads the same."""
        reading = [row for row in self.rows if not row.is_decoding]
        for row in [row for row in reading if row.is_unread]:
            if row.ahead is not None and not any(row.ahead is other for other in self.rows):
                self._look_ahead(row)  # that one is gone
            elif row.ahead is not None and row.ahead.cached >= row.ahead_tokens:
                self._keep([row.ahead], row.ahead_tokens)
                row.ahead = None
            self.prefixes.recall(self.target, row)
            missing = row.ahead_tokens - row.cached
            row.is_held = row.ahead is not None and missing >= scheduler.WORTH_WAITING_TOKENS
        self.prefixes.settle()

    def _keep(self, rows: Sequence[Row], tokens: int | None = None) -> None:
        """Let the prefix cache know what rows, sorted by slot, have in their slots (the first `tokens`; None: all)."""
        if self.prefixes.budget_bytes and rows:
            self.drafting.catch_up(rows)
            for row in rows:
                self.prefixes.keep(self.target, row, tokens)

    def _look_ahead(self, row: Row) -> None:
        earlier = [other for other in self.rows if (other.admitted_s, other.slot) < (row.admitted_s, row.slot)]
        most = self.prefixes.budget_bytes // max(self.limits.kv_bytes_per_token, 1)
        row.ahead, row.ahead_tokens = scheduler.reader_ahead(row, earlier, most)

    def _make_room(self, feeds: Sequence[Feed]) -> None:
        """The prefix cache gives way to the slots that this step needs."""
        last, end = max(f.row.slot for f in feeds), max(f.row.cached + f.size for f in feeds)
        size = self.target.state.sized_for(last, end)
        self.prefixes.fit(self.limits.kv_bytes, self.limits.pool_bytes(*size))

    def _propose(self) -> list[Feed]:
        """Each row's tokens for this step, sorted by slot; rows in prefill beyond the time budget sit it out."""
        decoding = [row for row in self.rows if row.is_decoding]
        chunks = self._chunks(len(decoding))
        proposed, self._draft_s = self.drafting.drafts(decoding, self.times, sum(chunks.values()))
        drafts = dict(zip((row.slot for row in decoding), proposed, strict=True))
        return [
            Feed(row, chunks.get(row.slot, 1), drafts.get(row.slot, NO_DRAFT))
            for row in self.rows
            if row.is_decoding or row.slot in chunks
        ]

    def _chunks(self, decoding: int) -> dict[int, int]:
        """How many tokens of its prompt each row in prefill reads in this step, by slot, beside so many that decode."""
        prefilling = [row for row in self.rows if not row.is_decoding]
        readers = [row for row in prefilling if not row.is_held]
        if not readers:
            return {}
        step_s = self.times.predict(max(decoding, 1))
        chunk_s = self.pace.chunk_time(decoding, len(prefilling), step_s) / self.prefill_drift
        allowed_s = (step_s if decoding else 0.0) + chunk_s
        most = self.times.largest_within(allowed_s, decoding, decoding + LARGEST_CHUNK)
        return scheduler.share_prefill(readers, max(most - decoding, SMALLEST_CHUNK))

    def _accept(self, feed: Feed, verified: Verified) -> Gain | None:
        """Commit what stands of a row's step and say what it gained."""
        row = feed.row
        if not verified.own:
            row.cached += feed.width
            self.target.state.commit(row.slot, row.cached)
            return None
        if -1 in verified.own:
            return self._fail(row)
        verdict = accept(verified.draft, verified.own, row.tokens_left, row.request.end_tokens)
        if row.first_token_s is None:
            row.first_token_s = self.clock()
        row.cached = len(row.tokens) + verdict.accepted  # the pending token and the draft tokens that stood
        row.tokens += verdict.tokens
        self.target.state.commit(row.slot, row.cached)
        self._count(row, feed.draft, verdict.accepted, len(verdict.tokens))
        logprobs = tuple(one for one in verified.logprobs[: len(verdict.tokens)] if one is not None)
        gain = Gain(row.id, verdict.tokens, feed.draft.length, verdict.accepted, feed.draft.drafter, logprobs=logprobs)
        return gain if verdict.finish is None else self._end(row, gain, verdict.finish)

    def _count(self, row: Row, draft: Draft, accepted: int, gained: int) -> None:
        row.steps += 1
        row.drafted += draft.length
        row.accepted += accepted
        self.drafting.settle(row, draft, accepted, gained)

    # --- ends ---------------------------------------------------------------------------------------------

    def _end(self, row: Row, gain: Gain, reason: str) -> Gain:
        self._leaving.append((row, reason))
        self.totals.finished += 1
        return msgspec.structs.replace(gain, finish=reason, usage=usage_of(row), timings=self._timings(row))

    def _let_go(self) -> None:
        """Rows that ended leave their slots, of which the prefix cache takes copies, all at once."""
        self._keep([row for row, _ in self._leaving])
        self.prefixes.settle()
        for row, reason in self._leaving:
            self._release(row, is_finished=reason != "cancelled")
            if self.on_answer is not None and reason != "cancelled":
                prompt = len(row.request.prompt)
                self.on_answer(row.tokens[:prompt], row.tokens[prompt:])
        self._leaving = []

    def _end_preempted(self, row: Row) -> Gain:
        """A row that waits again is cancelled."""
        row.end_pause(self.clock())
        self.totals.finished += 1
        return Gain(row.id, finish="cancelled", usage=usage_of(row), timings=self._timings(row))

    def _fail(self, row: Row) -> Gain:
        """A row whose logits are not finite fails alone; its slot is cleaned for the next one."""
        self._release(row, is_finished=False)
        self.target.scrub(row.slot)
        error = InternalError(
            f"the model gave no finite logits at position {len(row.tokens)}: its weights or number format overflow"
        )
        return Gain(row.id, error=error)

    def _release(self, row: Row, *, is_finished: bool) -> None:
        self.rows.remove(row)
        self.target.state.free(row.slot)
        self.drafting.forget(row, is_finished=is_finished)

    def _timings(self, row: Row) -> Timings:
        return timings_of(row, self.clock(), is_measured=self.times.is_measured)

    # --- figures ------------------------------------------------------------------------------------------

    def _report(
        self, feeds: Sequence[Feed], gains: tuple[Gain, ...], began: float, proposed: float, verified: float
    ) -> StepReport:
        self.totals.steps += 1
        prefill = sum(f.width for f in feeds if f.width > 1 or not f.reaches_end)
        return StepReport(
            step=self.totals.steps,
            gains=gains,
            rows=len(feeds),
            decoding=sum(f.reaches_end for f in feeds),
            parked=self.drafting.controller.parked,
            prefill_tokens=prefill,
            drafted=sum(f.draft.length for f in feeds),
            accepted=sum(g.accepted for g in gains),
            gained=sum(len(g.tokens) for g in gains),
            draft_s=proposed - began,
            verify_s=verified - proposed,
            total_s=self.clock() - began,
        )

    def _learn(
        self, feeds: Sequence[Feed], gains: Sequence[Gain | None], report: StepReport, *, is_usual: bool
    ) -> None:
        """Refresh the measured times, and what these tokens would have taken without drafts.

        A step that was not a usual one, since something had to be compiled or read first, tells nothing. Rows end
        whatever is drafted: that is no part of a step's price.
        """
        self.totals.add(report)
        step_s = report.total_s - self._ends_s
        if is_usual:
            self._learn_times(feeds, report, step_s - self.drafting.look_s)
        if report.prefill_tokens or not self.times.is_measured:
            return
        plain_s = self.times.predict(len(feeds))
        for feed, gain in zip(feeds, gains, strict=True):
            gained = len(gain.tokens) if gain else 0
            feed.row.plain_decode_s += gained * plain_s
            feed.row.measured_decode_s += step_s
        self.totals.plain_decode_s += report.gained / len(feeds) * plain_s
        self.totals.measured_decode_s += step_s

    def _learn_times(self, feeds: Sequence[Feed], report: StepReport, taken_s: float) -> None:
        """`taken_s`: without looking for drafts, which has a price of its own."""
        size = sum(feed.size for feed in feeds)
        step_s = max(taken_s - self._draft_s, 0.0)
        if self.on_step_time is not None and self.times.is_measured:
            self.on_step_time(step_s, self.times.usual(size))
        if report.prefill_tokens:
            drift = step_s / self.times.predict(size) if self.times.is_measured else 1.0
            self.prefill_drift += 0.2 * (min(max(drift, 0.3), 3.0) - self.prefill_drift)
            return
        kind = Kind.COMPUTED if self.drafting.is_computed else Kind.COPIED if report.drafted else Kind.PLAIN
        self.times.observe(size, taken_s, kind, self._draft_s)
