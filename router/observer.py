"""What the backend tells those who count."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from common.messages import Timings, Usage


@dataclass(frozen=True, slots=True)
class EndRecord:
    """A request's end. `outcome`: finish reason or error code; usage and timings only with a good end."""

    model: str
    outcome: str
    is_error: bool
    elapsed_s: float
    first_token_s: float | None
    deaths: int
    replays: int = 0  # times that it was sent to another worker
    usage: Usage | None = None
    timings: Timings | None = None


class Observer(Protocol):
    """Counts what happens to requests; must not raise."""

    def request_started(self, model: str) -> None: ...

    def tokens_received(self, model: str, tokens: int, gap_s: float | None) -> None:
        """`gap_s` is the time since the request's tokens before, None for its first."""

    def step_received(self, model: str, tokens: int) -> None: ...

    def request_replayed(self, model: str, reason: str) -> None: ...

    def request_ended(self, record: EndRecord) -> None: ...


class Observers:
    """Passes everything on to several observers; `ignored_frames` counts useless frames by reason."""

    def __init__(self, members: Sequence[Observer] = ()) -> None:
        self.members = list(members)
        self.ignored_frames: Counter[str] = Counter()

    def request_started(self, model: str) -> None:
        for member in self.members:
            member.request_started(model)

    def tokens_received(self, model: str, tokens: int, gap_s: float | None) -> None:
        for member in self.members:
            member.tokens_received(model, tokens, gap_s)

    def step_received(self, model: str, tokens: int) -> None:
        for member in self.members:
            member.step_received(model, tokens)

    def request_replayed(self, model: str, reason: str) -> None:
        for member in self.members:
            member.request_replayed(model, reason)

    def request_ended(self, record: EndRecord) -> None:
        for member in self.members:
            member.request_ended(record)
