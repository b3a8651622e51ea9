"""One worker of a model: its place in life, its process, and what it has reported."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from common.messages import Heartbeat, SetLimits, WorkerEntry
from common.states import WorkerState
from router.supervisor import memory
from router.supervisor.machine import Machine, has_process, may_start
from router.supervisor.process import Child
from router.supervisor.stall import StallWatch

if TYPE_CHECKING:
    from router.supervisor.model import Model

BASE_STEP_BYTES = 16 * 2**20  # so that the others' shares do not change with every page


@dataclass(slots=True, eq=False)
class Worker:
    """A model has as many as it has replicas, whether they have processes or not."""

    model: Model
    machine: Machine = field(default_factory=Machine)
    note: str = ""
    identity: str = ""
    generation: int = 0
    token: str = ""
    started_at: float = 0.0  # seconds since the epoch
    child: Child | None = None
    is_connected: bool = False
    heartbeat: Heartbeat | None = None
    stall: StallWatch = field(default_factory=StallWatch)
    base_bytes: int = 0  # what it holds without keys, values and caches
    is_measured: bool = False
    limits: SetLimits | None = None  # last sent

    def born(self, generation: int, identity: str, token: str, at: float) -> None:
        """A process is about to be spawned for it; what its predecessor said is forgotten."""
        self.generation, self.identity, self.token, self.started_at = generation, identity, token, at
        self.note, self.heartbeat, self.limits = "", None, None
        self.is_connected = self.is_measured = False
        self.stall, self.base_bytes = StallWatch(), 0

    @property
    def state(self) -> WorkerState:
        return self.machine.state

    @property
    def has_process(self) -> bool:
        return has_process(self.machine.state)

    @property
    def is_busy(self) -> bool:
        return self.heartbeat is not None and self.heartbeat.running + self.heartbeat.waiting > 0

    def may_start(self, now: float) -> bool:
        return may_start(self.machine, now)

    def charge_bytes(self) -> int:
        """What it counts in the budget: its need until it is loaded, then what it reports."""
        if not self.has_process:
            return 0
        reported = memory.charge(self.heartbeat) if self.heartbeat else 0
        if self.state in (WorkerState.STARTING, WorkerState.LOADING) or not reported:
            return max(reported, self.model.need_bytes or 0)
        return reported

    def observe(self, heartbeat: Heartbeat) -> None:
        """Take in a heartbeat; a ready worker's tells what it really holds."""
        self.heartbeat = heartbeat
        self.stall.observe(heartbeat)
        if self.state is not WorkerState.READY:
            return
        base_bytes = _rounded(memory.base(heartbeat))
        self.base_bytes = max(self.base_bytes, base_bytes) if self.is_measured else base_bytes
        if not self.is_measured and self.model.facts:  # before its rows and its heap's holes tell another story
            self.model.measured_bytes = base_bytes + memory.kv_need(self.model.facts)
            self.model.need_bytes = self.model.measured_bytes
            self.is_measured = True

    def entry(self) -> WorkerEntry:
        """Its line in the model table."""
        beat = self.heartbeat
        return WorkerEntry(
            identity=self.identity,
            token=self.token,
            state=self.state,
            pid=self.child.pid if self.child else 0,
            footprint_bytes=memory.charge(beat) if beat else 0,
            running=beat.running if beat else 0,
            waiting=beat.waiting if beat else 0,
            generation=self.generation,
            phase=beat.phase if beat else "",
            loop_seq=beat.loop_seq if beat else 0,
            finished=beat.finished if beat else 0,
            active_bytes=beat.active_bytes if beat else 0,
            cache_bytes=beat.cache_bytes if beat else 0,
            kv_bytes=beat.kv_bytes if beat else 0,
            kv_limit_bytes=self.limits.kv_bytes if self.limits else 0,
            started_at=self.started_at,
        )


def _rounded(size: int) -> int:
    return -(-size // BASE_STEP_BYTES) * BASE_STEP_BYTES
