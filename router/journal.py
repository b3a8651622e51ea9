"""The journal of live requests: what each asked and all it got, so that it can go on at another worker."""

import asyncio
import itertools
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import msgspec

from common.errors import MlxspecError
from common.messages import ChatPrompt, Finished, Generate, TextPrompt, TokenPrompt
from router.balancer import CHARS_PER_TOKEN
from router.observer import EndRecord
from router.streams import Ended, Event


@dataclass(slots=True, eq=False)
class LiveRequest:
    """One request that has not ended. `deliver` is False when its reader is too far behind."""

    generate: Generate
    model: str
    deliver: Callable[[Event], bool]
    started_s: float
    token_ids: list[int] = field(default_factory=list)
    text_chars: int = 0
    prompt_tokens: int | None = None
    first_token_s: float | None = None
    last_token_s: float | None = None
    worker: str | None = None  # identity of the worker that has it; None while it waits
    wire_id: str = ""  # its id on that worker: a new one for each attempt
    attempts: int = 0
    handovers: int = 0  # of these, those that ended because the worker left in good order
    deaths: int = 0  # workers that died while they had it
    is_isolated: bool = False
    tokens_at_death: int = 0
    refused_by: str | None = None  # the worker that handed it back last; it gets a pause
    refusals: int = 0
    steps: int = 0  # of its present attempt that gave tokens
    lost_steps: int = 0  # of attempts that were cut off: no worker counts them
    deadline: asyncio.TimerHandle | None = None
    load_deadline: asyncio.TimerHandle | None = None

    @property
    def request_id(self) -> str:
        return self.generate.request_id

    def next_attempt(self) -> Generate:
        """The message for its next worker: the same request, to be continued after the tokens received."""
        self.wire_id = f"{self.request_id}~{self.attempts}" if self.attempts else self.request_id
        self.attempts += 1
        self.lost_steps, self.steps = self.lost_steps + self.steps, 0
        return msgspec.structs.replace(self.generate, request_id=self.wire_id, resume=tuple(self.token_ids))

    def outstanding_tokens(self) -> int:
        """Work that its worker still has with it: a guess from above."""
        answer = (self.generate.max_tokens or 0) - len(self.token_ids)
        prompt = 0 if self.token_ids else self.prompt_tokens or _guess_tokens(self.generate)
        return max(0, answer) + prompt

    def ended(self, message: Finished, now_s: float) -> Ended:
        """Its good end, for the reader."""
        usage = message.usage
        return Ended(
            reason=message.reason,
            usage=msgspec.structs.replace(usage, steps=usage.steps + self.lost_steps) if self.lost_steps else usage,
            timings=message.timings,
            elapsed_s=now_s - self.started_s,
            first_token_s=self._first_token_after_s(),
        )

    def record(self, event: Ended | MlxspecError, now_s: float) -> EndRecord:
        """Its end, for those who count."""
        return EndRecord(
            model=self.model,
            outcome=event.reason if isinstance(event, Ended) else event.code,
            is_error=isinstance(event, MlxspecError),
            elapsed_s=now_s - self.started_s,
            first_token_s=self._first_token_after_s(),
            deaths=self.deaths,
            replays=max(0, self.attempts - 1),
            usage=event.usage if isinstance(event, Ended) else None,
            timings=event.timings if isinstance(event, Ended) else None,
        )

    def _first_token_after_s(self) -> float | None:
        return None if self.first_token_s is None else self.first_token_s - self.started_s


class Journal:
    """All live requests, by request id and by their id on the wire."""

    def __init__(self) -> None:
        self._by_id: dict[str, LiveRequest] = {}
        self._by_wire_id: dict[str, LiveRequest] = {}

    def __len__(self) -> int:
        return len(self._by_id)

    def __iter__(self) -> Iterator[LiveRequest]:
        return iter(tuple(self._by_id.values()))

    def __contains__(self, request: LiveRequest) -> bool:
        return self._by_id.get(request.request_id) is request

    def add(self, request: LiveRequest) -> None:
        """Take a request in; its id gets a suffix when a client uses one id twice at a time."""
        request_id = request.request_id
        copies = itertools.count(2)
        while request.request_id in self._by_id:
            renamed = msgspec.structs.replace(request.generate, request_id=f"{request_id}+{next(copies)}")
            request.generate = renamed
        self._by_id[request.request_id] = request

    def remove(self, request: LiveRequest) -> None:
        self.detach(request)
        self._by_id.pop(request.request_id, None)

    def attach(self, request: LiveRequest, worker: str) -> None:
        request.worker = worker
        self._by_wire_id[request.wire_id] = request

    def detach(self, request: LiveRequest) -> None:
        self._by_wire_id.pop(request.wire_id, None)
        request.worker = None

    def find(self, wire_id: str, worker: str) -> LiveRequest | None:
        """The request that `worker` has under this id; None for one that has ended or moved on."""
        request = self._by_wire_id.get(wire_id)
        return request if request is not None and request.worker == worker else None

    def on_worker(self, worker: str) -> list[LiveRequest]:
        return [request for request in self._by_id.values() if request.worker == worker]

    def busy_workers(self) -> set[str]:
        return {request.worker for request in self._by_id.values() if request.worker is not None}

    def waiting(self, model: str) -> list[LiveRequest]:
        """Requests for `model` that no worker has, first come first."""
        return [r for r in self._by_id.values() if r.model == model and r.worker is None]

    def outstanding_by_model(self) -> Counter[str]:
        """Tokens that are still to be read or made for each model."""
        tokens: Counter[str] = Counter()
        for request in self._by_id.values():
            tokens[request.model] += request.outstanding_tokens()
        return tokens

    def waiting_models(self) -> set[str]:
        return {request.model for request in self._by_id.values() if request.worker is None}

    def has_isolated(self, model: str) -> bool:
        """Whether an isolated request of `model` is on a worker."""
        return any(r.is_isolated and r.worker is not None and r.model == model for r in self._by_id.values())


def _guess_tokens(generate: Generate) -> int:
    match generate.prompt:
        case ChatPrompt(messages=messages):
            return sum(len(message.content) for message in messages) // CHARS_PER_TOKEN
        case TextPrompt(text=text):
            return len(text) // CHARS_PER_TOKEN
        case TokenPrompt(token_ids=token_ids):
            return len(token_ids)
