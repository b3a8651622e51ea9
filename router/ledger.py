"""Running totals for GET /stats."""

import time
from collections import Counter, deque
from dataclasses import dataclass, field

from router.observer import EndRecord

WINDOW_S = 60


@dataclass(slots=True)
class ModelTotals:
    """What one model's finished requests add up to."""

    started: int = 0
    replayed: int = 0
    outcomes: Counter[str] = field(default_factory=Counter)
    prompt_tokens: int = 0
    cached_tokens: int = 0
    generated_tokens: int = 0
    drafted_tokens: int = 0
    accepted_tokens: int = 0
    steps: int = 0
    plain_decode_s: float = 0.0
    measured_decode_s: float = 0.0
    queue_s: float = 0.0
    elapsed_s: float = 0.0


class Ledger:
    """An observer that sums up. Tokens are counted as they arrive, the rest when requests end."""

    def __init__(self) -> None:
        self.models: dict[str, ModelTotals] = {}
        self._recent: deque[tuple[int, int]] = deque()  # (second, tokens of it)

    def of(self, model: str) -> ModelTotals:
        return self.models.setdefault(model, ModelTotals())

    def request_started(self, model: str) -> None:
        self.of(model).started += 1

    def tokens_received(self, model: str, tokens: int, gap_s: float | None) -> None:
        self.of(model).generated_tokens += tokens
        second = int(time.monotonic())
        if self._recent and self._recent[-1][0] == second:
            tokens += self._recent.pop()[1]
        self._recent.append((second, tokens))
        self._forget(second)

    def step_received(self, model: str, tokens: int) -> None:
        pass

    def request_replayed(self, model: str, reason: str) -> None:
        self.of(model).replayed += 1

    def request_ended(self, record: EndRecord) -> None:
        totals = self.of(record.model)
        totals.outcomes[record.outcome] += 1
        if record.usage is not None:
            totals.prompt_tokens += record.usage.prompt_tokens
            totals.cached_tokens += record.usage.cached_tokens
            totals.drafted_tokens += record.usage.drafted_tokens
            totals.accepted_tokens += record.usage.accepted_tokens
            totals.steps += record.usage.steps
        if record.timings is not None:
            totals.queue_s += record.timings.queue_s
            totals.elapsed_s += record.elapsed_s
        if (
            record.timings
            and record.timings.plain_decode_s is not None
            and record.timings.measured_decode_s is not None
        ):
            totals.plain_decode_s += record.timings.plain_decode_s
            totals.measured_decode_s += record.timings.measured_decode_s

    def recent_throughput(self, uptime_s: float) -> float:
        """Tokens a second over the last minute, or since the start."""
        self._forget(int(time.monotonic()))
        return sum(tokens for _, tokens in self._recent) / max(1.0, min(float(WINDOW_S), uptime_s))

    def _forget(self, now: int) -> None:
        while self._recent and self._recent[0][0] <= now - WINDOW_S:
            self._recent.popleft()
