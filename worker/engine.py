"""The speculative, continuous batch loop's one step: admit, propose, verify, accept, commit.

Every row of the batch takes part in every step with as many tokens as suit it: a prompt's next chunk, or its pending
token and the draft that follows it. One forward of the target serves them all, and the device is waited for once.
"""

import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import cast

import mlx.core as mx

from common.errors import ContextLengthExceeded, InternalError, MlxspecError, Overloaded
from common.messages import Timings, Usage
from worker import scheduler
from worker.acceptance import accept
from worker.cache.layout import Segment
from worker.drafters.controller import PROBE_TOKENS, PROBE_TOKENS_MAX, Candidate, Controller
from worker.drafters.ngram import NO_DRAFT, Draft, NgramDrafter
from worker.request import Request, Row
from worker.sampler import Draw, choose
from worker.scheduler import Limits
from worker.step_times import StepTimes
from worker.target import Target

LARGEST_CHUNK = 2048  # tokens of prompts in one step at most
SMALLEST_CHUNK = 16
FIRST_TOKEN_WEIGHT = 4.0  # a row's wait for its first token counts as much as so many rows' waits for their next


@dataclass(frozen=True, slots=True)
class Pace:
    """How long a step may take for prompts' sake, in seconds: while others decode, and when nobody does."""

    chunk_s: float = 0.1
    chunk_alone_s: float = 0.8
    max_draft_tokens: int = 8

    def chunk_time(self, decoding: int, prefilling: int) -> float:
        """Seconds for prompts in one step: the more wait for their first token than for their next, the longer."""
        if not decoding:
            return self.chunk_alone_s
        return min(self.chunk_s * max(FIRST_TOKEN_WEIGHT * prefilling / decoding, 1.0), self.chunk_alone_s)


@dataclass(frozen=True, slots=True)
class Gain:
    """What one request got out of a step; the first `accepted` of its tokens were drafted.

    `error` or `finish` is set in its last one.
    """

    request_id: str
    tokens: tuple[int, ...] = ()
    drafted: int = 0
    accepted: int = 0
    finish: str | None = None
    error: MlxspecError | None = None
    usage: Usage | None = None
    timings: Timings | None = None


@dataclass(frozen=True, slots=True)
class StepReport:
    """One step in figures, for the outbox, the trace and the statistics."""

    step: int
    gains: tuple[Gain, ...]
    rows: int = 0
    decoding: int = 0
    prefill_tokens: int = 0
    drafted: int = 0
    accepted: int = 0
    gained: int = 0
    draft_s: float = 0.0
    verify_s: float = 0.0
    total_s: float = 0.0


@dataclass(slots=True)
class Totals:
    """Counters since the worker started."""

    steps: int = 0
    finished: int = 0
    prompt_tokens: int = 0
    generated: int = 0
    drafted: int = 0
    accepted: int = 0
    plain_decode_s: float = 0.0
    measured_decode_s: float = 0.0


@dataclass(frozen=True, slots=True)
class _Feed:
    """One row's part of a step: `width` of its own tokens, and a draft if that reaches its end."""

    row: Row
    width: int
    draft: Draft = NO_DRAFT

    @property
    def reaches_end(self) -> bool:
        return self.width == self.row.uncached

    @property
    def tokens(self) -> list[int]:
        start = self.row.cached
        return [*self.row.tokens[start : start + self.width], *self.draft.tokens]


@dataclass(slots=True)
class Engine:
    """One model's rows and their steps. All methods belong to the thread that loaded the model."""

    target: Target
    times: StepTimes
    limits: Limits
    drafter: NgramDrafter
    pace: Pace = Pace()
    clock: Callable[[], float] = time.perf_counter
    controller: Controller = field(default_factory=Controller)
    waiting: deque[Request] = field(default_factory=deque)
    rows: list[Row] = field(default_factory=list)
    totals: Totals = field(default_factory=Totals)
    speculates: bool = True  # no row drafts if not: the model's states cannot be rolled back
    on_step_time: Callable[[float, float], None] | None = None  # seconds taken, and usual on a calm machine
    prefill_drift: float = 1.0  # measured over predicted time of steps with prompt chunks
    _ended: list[Gain] = field(default_factory=list)

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
        if reason := _already_over(request):
            self._ended.append(_without_row(request, reason))
            return
        self.waiting.append(request)

    def cancel(self, request_id: str) -> list[Gain]:
        """Free a request's row or place in the queue at once, and say how it ended; an unknown one is long gone."""
        gains: list[Gain] = []
        for request in [r for r in self.waiting if r.request_id == request_id]:
            self.waiting.remove(request)
            gains.append(_without_row(request, "cancelled"))
        for row in [r for r in self.rows if r.request.request_id == request_id]:
            gains.append(self._end(row, Gain(request_id), "cancelled"))
        return gains

    @property
    def has_work(self) -> bool:
        return bool(self.rows or self.waiting or self._ended)

    # --- one step -----------------------------------------------------------------------------------------

    def step(self) -> StepReport:
        """Run one step for all rows and say what each gained."""
        began = self.clock()
        self._admit(began)
        ended, self._ended = tuple(self._ended), []
        if not self.rows:
            self.target.clear()
            return StepReport(self.totals.steps, ended)
        feeds = self._propose()
        proposed = self.clock()
        own = self._verify(feeds)
        verified = self.clock()
        gains = [self._accept(feed, tokens) for feed, tokens in zip(feeds, own, strict=True)]
        report = self._report(feeds, ended + tuple(g for g in gains if g), began, proposed, verified)
        self._learn(feeds, gains, report)
        return report

    def _admit(self, now_s: float) -> None:
        count = scheduler.admissible(self.waiting, self.rows, self.limits)
        for slot in scheduler.free_slots(self.rows, count):
            request = self.waiting.popleft()
            self.rows.append(Row.of(request, slot, now_s))
            self.totals.prompt_tokens += len(request.prompt)
        self.rows.sort(key=lambda row: row.slot)
        self.target.state.longest_tokens = max((row.request.total_tokens for row in self.rows), default=0)

    def _propose(self) -> list[_Feed]:
        """Each row's tokens for this step, sorted by slot; rows in prefill beyond the time budget sit it out."""
        decoding = [row for row in self.rows if row.is_decoding]
        drafts = dict(zip((row.slot for row in decoding), self._draft(decoding), strict=True))
        decode_tokens = len(decoding) + sum(len(draft.tokens) for draft in drafts.values())
        prefilling = [row for row in self.rows if not row.is_decoding]
        chunk_s = self.pace.chunk_time(len(decoding), len(prefilling))
        chunks = scheduler.share_prefill(prefilling, self._chunk_tokens(decode_tokens, chunk_s)) if prefilling else {}
        return [
            _Feed(row, chunks.get(row.slot, 1), drafts.get(row.slot, NO_DRAFT))
            for row in self.rows
            if row.is_decoding or row.slot in chunks
        ]

    def _draft(self, decoding: Sequence[Row]) -> list[Draft]:
        """The drafts that pay in this step, one for each decoding row."""
        proposals = [
            self.drafter.propose(row.tokens, row.index, limit) if (limit := self._draft_limit(row)) > 0 else NO_DRAFT
            for row in decoding
        ]
        if not any(draft.tokens for draft in proposals):
            return proposals
        candidates = [
            Candidate(row.request.request_id, len(draft.tokens), draft.match, row.since_draft >= row.probe_after)
            for row, draft in zip(decoding, proposals, strict=True)
        ]
        lengths = self.controller.decide(candidates, len(decoding), len(decoding), self.times.predict)
        return [Draft(draft.tokens[:n], draft.match) for draft, n in zip(proposals, lengths, strict=True)]

    def _draft_limit(self, row: Row) -> int:
        speculation = row.request.speculation
        if not (speculation.is_on and self.speculates):
            return 0
        wanted = speculation.max_draft_tokens
        limit = self.pace.max_draft_tokens if wanted is None else wanted
        return min(limit, row.tokens_left - 1)

    def _chunk_tokens(self, decode_tokens: int, chunk_s: float) -> int:
        """How many prompt tokens a step of `decode_tokens` can take along for `chunk_s` seconds more."""
        base_s = self.times.predict(decode_tokens) if decode_tokens else 0.0
        allowed_s = base_s + chunk_s / self.prefill_drift
        most = self.times.largest_within(allowed_s, decode_tokens, decode_tokens + LARGEST_CHUNK)
        return max(most - decode_tokens, SMALLEST_CHUNK)

    def _verify(self, feeds: Sequence[_Feed]) -> list[list[int]]:
        """The target's own tokens after each row's pending token and each of its draft tokens; [] in mid-prompt."""
        tokens: list[int] = []
        chosen: list[int] = []
        draws: list[Draw] = []
        for feed in feeds:
            tokens += feed.tokens
            if feed.reaches_end:
                asked = len(feed.draft.tokens) + 1
                chosen += range(len(tokens) - asked, len(tokens))
                position = len(feed.row.tokens)
                draws += [Draw(feed.row.request.sampling, position + i) for i in range(asked)]
        segments = [Segment(f.row.slot, f.row.cached, len(f.tokens), stands=not f.draft.tokens) for f in feeds]
        logits = self.target.forward(segments, tokens, chosen or [0])
        own = choose(logits, draws) if draws else logits
        mx.eval(own, self.target.cached_arrays())
        return _split(cast(list[int], own.tolist()) if draws else [], feeds)

    def _accept(self, feed: _Feed, own: list[int]) -> Gain | None:
        """Commit what stands of a row's step and say what it gained."""
        row = feed.row
        if not own:
            row.cached += feed.width
            self.target.state.commit(row.slot, row.cached)
            return None
        if -1 in own:
            return self._fail(row)
        verdict = accept(feed.draft.tokens, own, row.tokens_left, row.request.end_tokens)
        if row.first_token_s is None:
            row.first_token_s = self.clock()
        row.cached = len(row.tokens) + verdict.accepted  # the pending token and the draft tokens that stood
        row.tokens += verdict.tokens
        self.target.state.commit(row.slot, row.cached)
        self._count(row, feed.draft, verdict.accepted, len(verdict.tokens))
        gain = Gain(row.request.request_id, verdict.tokens, len(feed.draft.tokens), verdict.accepted)
        return gain if verdict.finish is None else self._end(row, gain, verdict.finish)

    def _count(self, row: Row, draft: Draft, accepted: int, gained: int) -> None:
        row.steps += 1
        row.drafted += len(draft.tokens)
        row.accepted += accepted
        row.since_draft = 0 if draft.tokens else row.since_draft + gained
        if draft.tokens:
            row.probe_after = PROBE_TOKENS if accepted else min(2 * row.probe_after, PROBE_TOKENS_MAX)
            self.controller.observe(row.request.request_id, draft.match, len(draft.tokens), accepted)

    # --- ends ---------------------------------------------------------------------------------------------

    def _end(self, row: Row, gain: Gain, reason: str) -> Gain:
        self._release(row)
        self.totals.finished += 1
        return Gain(
            gain.request_id,
            gain.tokens,
            gain.drafted,
            gain.accepted,
            reason,
            None,
            _usage(row),
            self._timings(row),
        )

    def _fail(self, row: Row) -> Gain:
        """A row whose logits are not finite fails alone; its slot is cleaned for the next one."""
        self._release(row)
        self.target.scrub(row.slot)
        error = InternalError(
            f"the model gave no finite logits at position {len(row.tokens)}: its weights or number format overflow"
        )
        return Gain(row.request.request_id, error=error)

    def _release(self, row: Row) -> None:
        self.rows.remove(row)
        self.target.state.free(row.slot)
        self.controller.forget(row.request.request_id)

    def _timings(self, row: Row) -> Timings:
        now = self.clock()
        first = row.first_token_s or now
        is_measured = row.measured_decode_s > 0 and self.times.is_measured
        return Timings(
            queue_s=max(row.admitted_s - row.request.arrived_s, 0.0),
            prefill_s=first - row.admitted_s,
            decode_s=now - first,
            plain_decode_s=row.plain_decode_s if is_measured else None,
            measured_decode_s=row.measured_decode_s if is_measured else None,
        )

    # --- figures ------------------------------------------------------------------------------------------

    def _report(
        self, feeds: Sequence[_Feed], gains: tuple[Gain, ...], began: float, proposed: float, verified: float
    ) -> StepReport:
        self.totals.steps += 1
        prefill = sum(f.width for f in feeds if f.width > 1 or not f.reaches_end)
        return StepReport(
            step=self.totals.steps,
            gains=gains,
            rows=len(feeds),
            decoding=sum(f.reaches_end for f in feeds),
            prefill_tokens=prefill,
            drafted=sum(len(f.draft.tokens) for f in feeds),
            accepted=sum(g.accepted for g in gains),
            gained=sum(len(g.tokens) for g in gains),
            draft_s=proposed - began,
            verify_s=verified - proposed,
            total_s=self.clock() - began,
        )

    def _learn(self, feeds: Sequence[_Feed], gains: Sequence[Gain | None], report: StepReport) -> None:
        """Refresh the measured times, and what these tokens would have taken without drafts."""
        size = sum(len(feed.tokens) for feed in feeds)
        self.totals.generated += report.gained
        self.totals.drafted += report.drafted
        self.totals.accepted += report.accepted
        if self.on_step_time is not None and self.times.is_measured:
            self.on_step_time(report.total_s, self.times.usual(size))
        if report.prefill_tokens:
            drift = report.total_s / self.times.predict(size) if self.times.is_measured else 1.0
            self.prefill_drift += 0.2 * (min(max(drift, 0.3), 3.0) - self.prefill_drift)
            return
        self.times.observe(size, report.total_s)
        if not self.times.is_measured:
            return
        plain_s = self.times.predict(len(feeds))
        for feed, gain in zip(feeds, gains, strict=True):
            gained = len(gain.tokens) if gain else 0
            feed.row.plain_decode_s += gained * plain_s
            feed.row.measured_decode_s += report.total_s
        self.totals.plain_decode_s += report.gained / len(feeds) * plain_s
        self.totals.measured_decode_s += report.total_s


def _already_over(request: Request) -> str | None:
    """The finish of a resumed request whose last token had already been made."""
    if request.resume and request.resume[-1] in request.end_tokens:
        return "stop"
    return "length" if len(request.resume) >= request.max_tokens else None


def _without_row(request: Request, reason: str) -> Gain:
    usage = Usage(prompt_tokens=len(request.prompt), completion_tokens=len(request.resume))
    return Gain(request.request_id, finish=reason, usage=usage, timings=Timings())


def _split(own: list[int], feeds: Sequence[_Feed]) -> list[list[int]]:
    parts, at = [], 0
    for feed in feeds:
        count = len(feed.draft.tokens) + 1 if feed.reaches_end else 0
        parts.append(own[at : at + count])
        at += count
    return parts


def _usage(row: Row) -> Usage:
    return Usage(
        prompt_tokens=len(row.request.prompt),
        completion_tokens=row.output_tokens,
        drafted_tokens=row.drafted,
        accepted_tokens=row.accepted,
        steps=row.steps,
    )
