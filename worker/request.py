"""A request as the batch loop sees it, and the row it becomes."""

from collections.abc import Collection
from dataclasses import dataclass, field

from common.sampling import Sampling, Speculation
from worker.drafters.controller import PROBE_TOKENS
from worker.drafters.ngram import NgramIndex

_USUAL = Speculation()


@dataclass(frozen=True, slots=True)
class Request:
    """One completion to make. `resume` holds output tokens that were made before, by a worker that died."""

    request_id: str
    prompt: tuple[int, ...]
    sampling: Sampling
    max_tokens: int
    end_tokens: Collection[int] = frozenset()
    speculation: Speculation = _USUAL
    resume: tuple[int, ...] = ()
    arrived_s: float = 0.0

    @property
    def total_tokens(self) -> int:
        """Cache positions that it may come to need."""
        return len(self.prompt) + self.max_tokens


@dataclass(slots=True)
class Row:
    """A request in the batch.

    `tokens` are prompt and output so far; the first `cached` of them are in the cache. At least one never is: the
    pending token, whose forward gives the next one. A row with more than that is still in prefill.
    """

    request: Request
    slot: int
    tokens: list[int]
    admitted_s: float
    cached: int = 0
    recalled: int = 0  # tokens that came from the prefix cache
    ahead: "Row | None" = field(default=None, repr=False, compare=False)  # a row that reads the same prompt before it
    ahead_tokens: int = 0  # how far the same
    is_held: bool = False  # it waits for that row
    first_token_s: float | None = None
    steps: int = 0
    drafted: int = 0
    accepted: int = 0
    plain_decode_s: float = 0.0
    measured_decode_s: float = 0.0
    since_draft: int = 0  # tokens made since it last drafted
    probe_after: int = PROBE_TOKENS
    index: NgramIndex = field(default_factory=NgramIndex)

    @classmethod
    def of(cls, request: Request, slot: int, now_s: float) -> "Row":
        return cls(request=request, slot=slot, tokens=[*request.prompt, *request.resume], admitted_s=now_s)

    @property
    def output_tokens(self) -> int:
        return len(self.tokens) - len(self.request.prompt)

    @property
    def tokens_left(self) -> int:
        return self.request.max_tokens - self.output_tokens

    @property
    def uncached(self) -> int:
        """Tokens still to be fed, the pending one included."""
        return len(self.tokens) - self.cached

    @property
    def is_unread(self) -> bool:
        """Still in prefill, and none of its tokens was fed."""
        return self.uncached > 1 and self.cached == self.recalled

    @property
    def is_decoding(self) -> bool:
        return self.uncached == 1
