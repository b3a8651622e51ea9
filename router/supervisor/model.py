"""One known model: its wish to be loaded, its workers, and what the supervisor has learned of it."""

import hashlib
import math
import re
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from common.config import ModelConfig
from common.messages import ModelEntry, ModelFacts
from common.states import Death, WorkerState
from router.supervisor.machine import is_leaving
from router.supervisor.policy import Candidate, Resident
from router.supervisor.worker import Worker

TURN_LOADS = 4  # a turn is at least so many times as long as loading took, so that swapping stays a small part
LINGER_S = 1.0  # a model is idle when nobody has used it for so long: between two requests of a client it is busy
UNSERVED_GRACE_S = 10.0  # how long a model that was loaded for a request may not be evicted before it has served it
NEVER, ALWAYS = -math.inf, math.inf
_BEST_FIRST = (
    WorkerState.READY,
    WorkerState.LOADING,
    WorkerState.STARTING,
    WorkerState.DRAINING,
    WorkerState.STOPPING,
    WorkerState.BACKOFF,
    WorkerState.FAILED,
    WorkerState.STOPPED,
)


@dataclass(slots=True, eq=False)
class Model:
    """A name that can be asked for. Times are the supervisor's monotonic clock."""

    name: str
    path: str
    settings: ModelConfig
    pinned: bool = False
    workers: list[Worker] = field(default_factory=list)
    generations: int = 0  # workers spawned so far
    restarts: Counter[Death] = field(default_factory=Counter)  # those that followed a death

    wanted_until: float = NEVER
    asked_at: float = 0.0
    is_awaited: bool = False
    gives_way: bool = False  # it leaves, but what it does not finish goes on when it is back
    is_removed: bool = False  # not configured any more: to be forgotten when it has no process

    need_bytes: int | None = None
    measured_bytes: int = 0  # the same, by what a worker of it held when it had just been loaded
    facts: ModelFacts | None = None
    finished: int = 0
    last_used: float = 0.0
    last_used_at: float = 0.0  # the same in seconds since the epoch; 0: never
    failed_with: tuple[object, int] | None = None  # fingerprint of its files, free bytes
    on_gone: list[Callable[[], None]] = field(default_factory=list)  # whom to tell that it has no process any more

    def __post_init__(self) -> None:
        self.workers = self.workers or [Worker(self)]

    @property
    def best(self) -> Worker:
        """The worker that stands for the model."""
        return min(self.workers, key=lambda worker: _BEST_FIRST.index(worker.state))

    @property
    def state(self) -> WorkerState:
        return self.best.state

    @property
    def has_process(self) -> bool:
        return any(worker.has_process for worker in self.workers)

    @property
    def detail(self) -> str:
        best = self.best
        return best.note or best.machine.detail

    @property
    def is_busy(self) -> bool:
        return any(worker.is_busy for worker in self.workers)

    def is_wanted(self, now: float) -> bool:
        return now < self.wanted_until

    def want(self, now: float, until: float) -> None:
        """Somebody asks for it: from now until `until`, unless it is unloaded before."""
        if not self.is_wanted(now):
            self.asked_at = now
        self.wanted_until = max(self.wanted_until, until)

    def charge_bytes(self) -> int:
        return sum(worker.charge_bytes() for worker in self.workers)

    def note_use(self, now: float, at: float) -> None:
        """Take in that a worker has reported: use, and whether the awaited request has been served."""
        finished = sum(w.heartbeat.finished for w in self.workers if w.heartbeat)
        if self.is_busy or finished > self.finished:
            self.last_used, self.last_used_at = now, at
            self.is_awaited = False
        self.finished = finished

    def resize(self, replicas: int) -> None:
        """Have at least so many workers; those that are too many are taken away when they have gone."""
        while len(self.workers) < replicas:
            self.workers.append(Worker(self))

    def candidates(self, now: float, turn_s: float = 0.0) -> Iterable[Candidate]:
        """Its workers that want to start. Others than the first do not hold up anybody."""
        if self.is_removed or not self.is_wanted(now):
            return
        has_one = self.has_process
        for number, worker in enumerate(self.workers[: self.settings.replicas]):
            if worker.may_start(now):
                yield Candidate(
                    name=self.name,
                    need_bytes=self.need_bytes or 0,
                    asked_at=self.asked_at,
                    is_restart=worker.state is WorkerState.BACKOFF and not has_one,
                    is_extra=has_one,
                    is_due=self._has_waited(worker, now, turn_s),
                    worker=number,
                )
                has_one = True

    def _has_waited(self, worker: Worker, now: float, turn_s: float) -> bool:
        is_urgent = self.is_awaited or worker.state is WorkerState.BACKOFF
        return is_urgent and 0 < turn_s <= now - max(self.asked_at, worker.machine.since)

    def resident(self, now: float, turn_s: float = 0.0) -> Resident:
        states = [worker.state for worker in self.workers if worker.has_process]
        ready_since = max((w.machine.since for w in self.workers if w.state is WorkerState.READY), default=now)
        turn_s = max(turn_s, TURN_LOADS * self.facts.load_s if self.facts else 0.0)
        return Resident(
            name=self.name,
            charge_bytes=self.charge_bytes(),
            last_used=self.last_used,
            is_ready=WorkerState.READY in states,
            is_busy=self.is_busy or now < self.last_used + LINGER_S,
            is_pinned=self.pinned,
            is_awaited=self.is_awaited and now < self.last_used + UNSERVED_GRACE_S,
            is_leaving=all(is_leaving(state) for state in states),
            ready_since=ready_since,
            has_had_turn=now - ready_since >= turn_s,
        )

    def entry(self, idle_unload_s: float) -> ModelEntry:
        """Its line in the model table."""
        machine = self.best.machine
        is_delayed = self.state is WorkerState.BACKOFF and machine.deadline is not None
        return ModelEntry(
            name=self.name,
            path=self.path,
            state=self.state,
            detail=self.detail,
            pinned=self.pinned,
            restarts=self.restarts.total(),
            restarts_by_death=dict(self.restarts),
            retry_after_s=round((machine.deadline or 0.0) - machine.since, 1) if is_delayed else None,
            facts=self.facts,
            workers=tuple(worker.entry() for worker in self.workers if worker.has_process),
            preload=self.settings.preload,
            replicas=self.settings.replicas,
            need_bytes=self.need_bytes or 0,
            last_used_at=self.last_used_at,
            idle_unload_s=idle_unload_s,
            gives_way=self.gives_way,
        )


def slug(name: str) -> str:
    """`name` in characters safe in file names and socket identities; two names never share a slug."""
    plain = re.sub(r"[^a-z0-9._-]+", "-", name.lower()).strip("-.")[:64]
    if plain == name:
        return plain
    return f"{plain}-{hashlib.sha256(name.encode()).hexdigest()[:6]}"
