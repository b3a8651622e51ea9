"""One known model: its wish to be loaded, its worker, and what the supervisor has learned of both."""

import hashlib
import math
import re
from collections.abc import Callable
from dataclasses import dataclass, field

from common.messages import Heartbeat, ModelEntry, ModelFacts, SetLimits, WorkerEntry
from common.states import WorkerState
from router.supervisor import memory
from router.supervisor.machine import Machine, has_process, is_leaving, may_start
from router.supervisor.policy import Candidate, Resident
from router.supervisor.process import Child

UNSERVED_GRACE_S = 10.0  # how long a model that was loaded for a request may not be evicted before it has served it
NEVER, ALWAYS = -math.inf, math.inf


@dataclass(slots=True)
class Model:
    """A name that can be asked for. Times are the supervisor's monotonic clock."""

    name: str
    path: str
    weights: str
    pinned: bool = False
    machine: Machine = field(default_factory=Machine)

    wanted_until: float = NEVER
    asked_at: float = 0.0
    is_awaited: bool = False
    note: str = ""

    identity: str = ""
    token: str = ""
    child: Child | None = None
    is_connected: bool = False

    need_bytes: int | None = None
    base_bytes: int = 0  # what it holds without a KV cache
    facts: ModelFacts | None = None
    heartbeat: Heartbeat | None = None
    last_used: float = 0.0
    failed_with: tuple[object, int] | None = None  # fingerprint of its files, free bytes
    limits: SetLimits | None = None  # last sent to its worker
    on_gone: list[Callable[[], None]] = field(default_factory=list)  # whom to tell that it has no process any more

    @property
    def state(self) -> WorkerState:
        return self.machine.state

    @property
    def has_process(self) -> bool:
        return has_process(self.machine.state)

    @property
    def detail(self) -> str:
        return self.note or self.machine.detail

    @property
    def is_busy(self) -> bool:
        return self.heartbeat is not None and self.heartbeat.running + self.heartbeat.waiting > 0

    def is_wanted(self, now: float) -> bool:
        return now < self.wanted_until

    def wants_start(self, now: float) -> bool:
        return self.is_wanted(now) and may_start(self.machine, now)

    def want(self, now: float, until: float) -> None:
        """Somebody asks for it: from now until `until`, unless it is unloaded before."""
        if not self.is_wanted(now):
            self.asked_at = now
        self.wanted_until = max(self.wanted_until, until)

    def charge_bytes(self) -> int:
        """What it counts in the budget: its need until it is loaded, then what it reports."""
        if not self.has_process:
            return 0
        reported = memory.charge(self.heartbeat) if self.heartbeat else 0
        if self.state in (WorkerState.STARTING, WorkerState.LOADING) or not reported:
            return max(reported, self.need_bytes or 0)
        return reported

    def observe(self, heartbeat: Heartbeat, now: float) -> None:
        """Take in a heartbeat: use, and whether the awaited request has been served."""
        finished = self.heartbeat.finished if self.heartbeat else 0
        self.heartbeat = heartbeat
        if self.is_busy or heartbeat.finished != finished:
            self.last_used = now
            self.is_awaited = False

    def candidate(self) -> Candidate:
        return Candidate(
            name=self.name,
            need_bytes=self.need_bytes or 0,
            asked_at=self.asked_at,
            is_restart=self.state is WorkerState.BACKOFF,
        )

    def resident(self, now: float) -> Resident:
        return Resident(
            name=self.name,
            charge_bytes=self.charge_bytes(),
            last_used=self.last_used,
            is_ready=self.state is WorkerState.READY,
            is_busy=self.is_busy,
            is_pinned=self.pinned,
            is_awaited=self.is_awaited and now < self.last_used + UNSERVED_GRACE_S,
            is_leaving=is_leaving(self.state),
        )

    def entry(self) -> ModelEntry:
        """Its line in the model table."""
        machine = self.machine
        is_delayed = self.state is WorkerState.BACKOFF and machine.deadline is not None
        return ModelEntry(
            name=self.name,
            path=self.path,
            state=self.state,
            detail=self.detail,
            pinned=self.pinned,
            restarts=machine.restarts,
            retry_after_s=round((machine.deadline or 0.0) - machine.since, 1) if is_delayed else None,
            facts=self.facts,
            workers=(self._worker_entry(),) if self.has_process else (),
        )

    def _worker_entry(self) -> WorkerEntry:
        beat = self.heartbeat
        return WorkerEntry(
            identity=self.identity,
            token=self.token,
            state=self.state,
            pid=self.child.pid if self.child else 0,
            footprint_bytes=memory.charge(beat) if beat else 0,
            running=beat.running if beat else 0,
            waiting=beat.waiting if beat else 0,
        )


def slug(name: str) -> str:
    """`name` in characters safe in file names and socket identities; two names never share a slug."""
    plain = re.sub(r"[^a-z0-9._-]+", "-", name.lower()).strip("-.")[:64]
    if plain == name:
        return plain
    return f"{plain}-{hashlib.sha256(name.encode()).hexdigest()[:6]}"
