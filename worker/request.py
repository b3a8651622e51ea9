"""A request as the batch loop sees it, and the row it becomes."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field

from common.priority import Priority
from common.sampling import Sampling, Speculation
from worker.sampling.sampler import Draw
from worker.sampling.tally import Tally

_USUAL = Speculation()


@dataclass(frozen=True, slots=True)
class Request:
    """One completion to make. `resume` holds output tokens that were made before, by a worker that died.

    `logprobs` is the number of alternatives to tell with each token's log-probability; None: tell none.
    """

    request_id: str
    prompt: tuple[int, ...]
    sampling: Sampling
    max_tokens: int
    end_tokens: Collection[int] = frozenset()
    speculation: Speculation = _USUAL
    resume: tuple[int, ...] = ()
    arrived_s: float = 0.0
    scope: str = ""  # requests of one scope may draft from each other's outputs
    logprobs: int | None = None
    priority: Priority = Priority.NORMAL

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
    admitted_s: float  # or later, by the time that it was without a slot since
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
    tally: Tally | None = None  # of biases and penalties, if the request has any
    number: int = 0  # in the order of arrival
    since_s: float = 0.0  # when it was queued first
    preempted_s: float | None = None  # when it lost its slot last
    recalled_before: int | None = None  # `recalled` when it lost its slot first

    @classmethod
    def of(cls, request: Request, slot: int, now_s: float) -> "Row":
        return cls(
            request=request,
            slot=slot,
            tokens=[*request.prompt, *request.resume],
            admitted_s=now_s,
            tally=Tally.of(request.sampling, len(request.prompt)),
        )

    def lose_slot(self, now_s: float) -> None:
        """Its place in the cache is needed: what it has made is kept, what it has read is to be read again."""
        if self.recalled_before is None:
            self.recalled_before = self.recalled
        self.cached = self.recalled = 0
        self.ahead, self.ahead_tokens, self.is_held = None, 0, False
        self.preempted_s = now_s

    def take_slot(self, slot: int, now_s: float) -> None:
        """Go on in a slot, after `lose_slot`."""
        self.slot = slot
        self.end_pause(now_s)

    def end_pause(self, now_s: float) -> None:
        """The time without a slot was spent in the queue: neither reading nor decoding took it."""
        assert self.preempted_s is not None
        pause_s, self.preempted_s = now_s - self.preempted_s, None
        self.admitted_s += pause_s
        if self.first_token_s is not None:
            self.first_token_s += pause_s

    def soon_tokens(self, headroom_tokens: int) -> int:
        """Cache positions that it needs with so many tokens to come."""
        return min(len(self.tokens) + headroom_tokens, self.request.total_tokens)

    def draws(self, draft: Sequence[int]) -> list[Draw]:
        """The choices after the pending token and after each token of a draft."""
        request, position, tally = self.request, len(self.tokens), self.tally
        if tally is not None:
            tally.extend(self.tokens)
        return [
            Draw(request.sampling, position + i, tally, tuple(draft[:i]) if tally else (), request.logprobs)
            for i in range(len(draft) + 1)
        ]

    @property
    def id(self) -> str:
        return self.request.request_id

    @property
    def first_recalled(self) -> int:
        """Tokens that came from the prefix cache when it was read first."""
        return self.recalled if self.recalled_before is None else self.recalled_before

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
