"""The whole fleet through random lives: what must hold whatever clients, workers and the machine do.

Everything is real but the processes, the clock and the machine's memory: `Process` stands for a worker that keeps to
its limits, and may be slow, busy, dead or hung.
"""

import itertools
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from common.config import Config, ModelConfig, SupervisorConfig
from common.messages import (
    Drain,
    Exit,
    Heartbeat,
    Message,
    ModelFacts,
    ModelTable,
    SetLimits,
    StateChanged,
    WorkerHello,
)
from common.states import WorkerState
from router.supervisor import memory
from router.supervisor.budget import Budget
from router.supervisor.fleet import Fleet
from router.supervisor.model import Model
from router.supervisor.pressure import Pressure
from router.supervisor.worker import Worker

GIB = 2**30
BUDGET_GIB = 100
TURN_S = 6.0
NEEDS_GIB = {"small": 20, "large": 60, "twin": 25, "giant": 90}
REPLICAS = {"twin": 2}
KV_BYTES_PER_TOKEN = 2**16  # with 8192 tokens half a GiB
HARD_BYTES = 95 * GIB
SLACK_BYTES = 2 * GIB  # for shares that are never nothing, and for limits that are not worth a message


@dataclass(slots=True, eq=False)
class Process:
    """A worker's process: holds its base when it is loaded, and keys and values up to its limit when it is busy."""

    worker: Worker
    on_exit: Callable[[Worker, int, str], None]
    base_bytes: int
    pid: int = 0
    kv_bytes: int = 0
    running: int = 0
    finished: int = 0
    steps: int = 0
    is_loaded: bool = False
    ready_at: float = 0.0
    is_told_to_go: bool = False
    is_stopped: bool = False  # hung: only a kill helps
    codes: list[int] = field(default_factory=list)  # by which it is to end

    @property
    def held_bytes(self) -> int:
        return self.base_bytes + self.kv_bytes if self.is_loaded else self.base_bytes

    def abort(self) -> None:
        if not self.is_stopped:
            self.codes.append(-6)

    def kill(self) -> None:
        self.codes.append(-9)

    def terminate(self) -> None:
        self.is_told_to_go = True


class FleetLives(RuleBasedStateMachine):
    """Rules are what clients ask, what workers say, and what time does."""

    @initialize()
    def begin(self) -> None:
        self.now = 1000.0
        self.pressure = Pressure.NORMAL
        self.living: dict[str, Process] = {}
        self.unloaded_by_hand: set[str] = set()
        self.pids = itertools.count(1)
        models = {name: ModelConfig(path=f"/nowhere/{name}", replicas=REPLICAS.get(name, 1)) for name in NEEDS_GIB}
        config = Config(models=models, supervisor=SupervisorConfig(memory_limit_gb=BUDGET_GIB, turn_s=TURN_S))
        budget = Budget(config, lambda: self.pressure)
        self.fleet = Fleet(config, self, self, clock=lambda: self.now, budget=budget)  # type: ignore[arg-type]
        self.fleet._need = lambda model: NEEDS_GIB[model.name] * GIB  # type: ignore[method-assign]

    # --- what the fleet does to the world ---

    def launch(self, worker: Worker, on_spawned: Callable[[Worker], None], on_exit: Callable[..., None]) -> None:
        self._check_order(worker)
        need = NEEDS_GIB[worker.model.name] * GIB
        base = need - memory.ADMITTED_TOKENS * KV_BYTES_PER_TOKEN
        process = Process(worker, on_exit, base, next(self.pids))
        worker.child = process  # type: ignore[assignment]
        self.living[worker.identity] = process
        on_spawned(worker)

    def send(self, identity: str, message: Message) -> bool:
        process = self.living.get(identity)
        if process is None:
            return False
        match message:
            case SetLimits(kv_bytes=kv_bytes):
                process.kv_bytes = min(process.kv_bytes, kv_bytes)
            case Drain() | Exit():
                self._check_leave(process)
                process.is_told_to_go = True
        return True

    def publish(self, table: ModelTable) -> ModelTable:
        for entry in table.models:
            assert all(worker.state is not WorkerState.STOPPED for worker in entry.workers)
        return table

    # --- what clients ask ---

    @rule(name=st.sampled_from(sorted(NEEDS_GIB)))
    def ask_for(self, name: str) -> None:
        model = self.fleet.models[name]
        if model.state is WorkerState.FAILED:
            self.fleet.reconsider(model)
        self.fleet.want(model)

    @rule(name=st.sampled_from(sorted(NEEDS_GIB)), is_pinned=st.booleans(), running=st.integers(0, 1))
    def load(self, name: str, is_pinned: bool, running: int) -> None:
        """Ask for it, and let it serve a request, or begin to, if there is room for it now."""
        self.ask_for(name)
        self.fleet.models[name].pinned = is_pinned
        for _ in range(4):
            self.fleet.settle()
            for process in self._talking():
                self._get_on(process)
        for process in self._talking(name):
            process.finished += 1
            process.running = running if process.is_loaded and not process.is_told_to_go else 0
        self._all_beat()

    @rule(name=st.sampled_from(sorted(NEEDS_GIB)))
    def unload(self, name: str) -> None:
        model = self.fleet.models[name]
        self.unloaded_by_hand |= {worker.identity for worker in model.workers}
        self.fleet.unload(model)

    # --- what workers do ---

    @rule(steps=st.integers(1, 3))
    def get_on(self, steps: int) -> None:
        """All workers say hello, or that they have loaded, or go as they were told."""
        for _ in range(steps):
            for process in self._talking():
                self._get_on(process)
            self.fleet.settle()

    @rule(name=st.sampled_from(sorted(NEEDS_GIB)), running=st.integers(0, 2), kv_gib=st.integers(0, 50))
    def serve(self, name: str, running: int, kv_gib: int) -> None:
        """A model's ready workers have requests, for which they use what they may."""
        for process in self._talking(name):
            if process.is_loaded:
                limits = process.worker.limits
                process.finished += process.running
                process.running = running if not process.is_told_to_go else 0
                process.kv_bytes = min(kv_gib * GIB, limits.kv_bytes if limits else 0)
                self._beat(process)

    @rule(name=st.sampled_from(sorted(NEEDS_GIB)), is_hang=st.booleans())
    def break_down(self, name: str, is_hang: bool) -> None:
        for process in self._talking(name)[:1]:
            process.is_stopped = is_hang
            process.codes += [] if is_hang else [-11]

    @rule(seconds=st.sampled_from([0.1, 2.0, 12.0]))
    def wait(self, seconds: float) -> None:
        """Time passes in glances, in which living workers talk."""
        for _ in range(min(int(seconds / 0.5), 60) or 1):
            self.now += min(seconds, 0.5)
            self._all_beat()
            self.fleet.settle()
            self._bury()

    @rule(level=st.sampled_from(Pressure))
    def press(self, level: Pressure) -> None:
        self.pressure = level

    # --- what must hold ---

    @invariant()
    def settled(self) -> None:
        """After each event all that is due is done, and the budget is kept."""
        if not hasattr(self, "fleet"):
            return
        self.fleet.settle()
        self._bury()
        self.fleet.settle()
        held = sum(process.held_bytes for process in self.living.values())
        assert held <= HARD_BYTES + SLACK_BYTES, self._picture()
        with_process = {worker.identity for worker in self.fleet.workers if worker.has_process}
        assert with_process == set(self.living)

    def teardown(self) -> None:
        """When everybody behaves, nobody who may be served is left waiting, and a stop ends all."""
        if not hasattr(self, "fleet"):
            return
        self.pressure = Pressure.NORMAL
        for model in self.fleet.models.values():
            model.pinned = False
        for process in self.living.values():
            process.is_stopped = False
        for _ in range(60):
            for process in list(self.living.values()):
                process.running = 0
                self._get_on(process)
                self._beat(process)
            self.wait(4.0)
        waiting = [c.name for m in self.fleet.models.values() for c in m.candidates(self.now) if not c.is_extra]
        assert not waiting, self._picture()
        self.fleet.stop()
        for process in list(self.living.values()):
            self._get_on(process)
        self.fleet.settle()
        assert self.fleet.is_empty.is_set() and not self.living

    # --- helpers ---

    def _talking(self, name: str | None = None) -> list[Process]:
        """The processes (of one model) that do not hang."""
        living = [process for process in self.living.values() if not process.is_stopped]
        return [process for process in living if name in (None, process.worker.model.name)]

    def _get_on(self, process: Process) -> None:
        worker, identity = process.worker, process.worker.identity
        if process.is_told_to_go and not process.running:
            process.codes.append(0)
        elif worker.state is WorkerState.STARTING:
            hello = WorkerHello(identity=identity, token=worker.token, model=worker.model.name, pid=process.pid)
            self.fleet.on_hello(identity, hello)
        elif worker.state is WorkerState.LOADING:
            process.is_loaded, process.ready_at = True, self.now
            self._beat(process)
            facts = _facts(process.base_bytes - memory.PROCESS_BYTES)
            self.fleet.on_state(identity, StateChanged(state=WorkerState.READY, facts=facts))
        self._bury()

    def _beat(self, process: Process) -> None:
        process.steps += 1
        beat = Heartbeat(
            loop_seq=process.steps,
            phase="step" if process.is_loaded else "loading",
            running=process.running,
            waiting=0,
            finished=process.finished,
            active_bytes=process.held_bytes,
            cache_bytes=0,
            footprint_bytes=process.held_bytes,
            kv_bytes=process.kv_bytes,
        )
        self.fleet.on_heartbeat(process.worker.identity, beat)

    def _all_beat(self) -> None:
        for process in self._talking():
            self._beat(process)

    def _bury(self) -> None:
        """Reap whoever has died; those that hang die of SIGKILL alone."""
        for identity, process in list(self.living.items()):
            codes = [code for code in process.codes if code == -9 or not process.is_stopped]
            if codes:
                del self.living[identity]
                process.on_exit(process.worker, codes[0], "test")

    def _check_order(self, worker: Worker) -> None:
        """Nobody who asked later is loaded first; restarts and second workers have rules of their own."""
        model = worker.model
        if worker.machine.restarts or any(other.has_process for other in model.workers if other is not worker):
            return
        earlier = [
            candidate.name
            for other in self.fleet.models.values()
            if other is not model and other.asked_at < model.asked_at
            for candidate in other.candidates(self.now)
            if not candidate.is_extra and not candidate.is_restart
        ]
        assert not earlier, f"{model.name} overtakes {earlier}"

    def _check_leave(self, process: Process) -> None:
        """Only by hand is a pinned model told to go, and a busy one by hand or when its turn is over."""
        worker = process.worker
        is_by_hand = worker.identity in self.unloaded_by_hand or self.fleet.is_stopping
        is_turn_over = worker.model.gives_way and self.now - process.ready_at >= TURN_S
        assert is_by_hand or not worker.model.pinned, f"{worker.identity} was evicted"
        assert is_by_hand or is_turn_over or not worker.is_busy, f"{worker.identity} was evicted"

    def _picture(self) -> str:
        return "; ".join(_line(model) for model in self.fleet.models.values())


def _line(model: Model) -> str:
    states = ", ".join(worker.state for worker in model.workers)
    return f"{model.name} {states} {model.charge_bytes() / GIB:.1f} GiB {model.detail}"


def _facts(weights_bytes: int) -> ModelFacts:
    return ModelFacts(
        architecture="test",
        context_tokens=1024,
        vocabulary=10,
        weights_dtype="float32",
        weights_bytes=weights_bytes,
        kv_bytes_per_token=KV_BYTES_PER_TOKEN,
        backend="none",
        has_chat_template=False,
        drafters=(),
        load_s=0.0,
    )


@pytest.fixture(autouse=True)
def home(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLXSPEC_HOME", tempfile.gettempdir() + "/no-such-home")


TestFleetLives = FleetLives.TestCase
TestFleetLives.settings = settings(max_examples=15, stateful_step_count=40, deadline=None)
