"""What the loop tells of its steps: what each request gained, figures of one step, and counters of all."""

from dataclasses import dataclass, field

import msgspec

from common.errors import MlxspecError
from common.messages import Timings, Usage
from worker.sampling.logprobs import Logprob


class Gain(msgspec.Struct, frozen=True, gc=False):
    """What one request got out of a step; the first `accepted` of its tokens were drafted, by `drafter`.

    `error` or `finish` is set in its last one. `logprobs` has one for each token if the request asks for them.
    """

    request_id: str
    tokens: tuple[int, ...] = ()
    drafted: int = 0
    accepted: int = 0
    drafter: str = ""
    finish: str | None = None
    error: MlxspecError | None = None
    usage: Usage | None = None
    timings: Timings | None = None
    logprobs: tuple[Logprob, ...] = ()


@dataclass(frozen=True, slots=True)
class StepReport:
    """One step in figures, for the outbox, the trace and the statistics."""

    step: int
    gains: tuple[Gain, ...]
    rows: int = 0
    decoding: int = 0
    parked: int = 0
    prefill_tokens: int = 0
    drafted: int = 0
    accepted: int = 0
    gained: int = 0
    draft_s: float = 0.0
    verify_s: float = 0.0
    total_s: float = 0.0


@dataclass(slots=True)
class DrafterTotals:
    """One drafter's counters."""

    drafted: int = 0
    accepted: int = 0


@dataclass(slots=True)
class Totals:
    """Counters since the worker started."""

    steps: int = 0
    finished: int = 0
    preempted: int = 0
    prompt_tokens: int = 0
    generated: int = 0
    drafted: int = 0
    accepted: int = 0
    plain_decode_s: float = 0.0
    measured_decode_s: float = 0.0
    drafters: dict[str, DrafterTotals] = field(default_factory=dict)
    parked: int = 0  # rows at present

    def add(self, report: StepReport) -> None:
        """Count a step."""
        self.generated += report.gained
        self.drafted += report.drafted
        self.accepted += report.accepted
        self.parked = report.parked
        for gain in report.gains:
            if gain.drafted:
                totals = self.drafters.setdefault(gain.drafter, DrafterTotals())
                totals.drafted += gain.drafted
                totals.accepted += gain.accepted
