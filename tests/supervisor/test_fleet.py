"""Fleets of models without processes: any life keeps the budget, spares who is busy, and serves in order."""

import asyncio
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

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
from router.supervisor import policy
from router.supervisor.budget import Budget
from router.supervisor.fleet import Fleet
from router.supervisor.launcher import OnExit
from router.supervisor.memory import GIB
from router.supervisor.model import Model
from router.supervisor.pressure import Pressure
from router.supervisor.worker import Worker

S = WorkerState
FACTS = ModelFacts(
    architecture="fake",
    context_tokens=128,
    vocabulary=10,
    weights_dtype="float32",
    weights_bytes=0,
    kv_bytes_per_token=0,
    backend="none",
    has_chat_template=False,
    drafters=(),
    load_s=0.0,
)
SIZES = {"a": 0.2, "b": 0.3, "c": 0.4, "d": 0.7}  # GB; the budget is one
NAMES = sorted(SIZES)


class World:
    """Plays all processes: each worker says what a test lets it say."""

    def __init__(self, config: Config) -> None:
        self.now = 0.0
        self.pressure = Pressure.NORMAL
        self.sent: list[tuple[str, Message]] = []
        self.started: list[str] = []
        self.running: dict[str, tuple[Worker, OnExit]] = {}
        budget = Budget(config, lambda: self.pressure)
        self.fleet = Fleet(config, self, self, clock=lambda: self.now, budget=budget)  # type: ignore[arg-type]

    # what the fleet needs of the outside

    def send(self, identity: str, message: Message) -> bool:
        self.sent.append((identity, message))
        return True

    def publish(self, table: ModelTable) -> ModelTable:
        return table

    def launch(self, worker: Worker, on_spawned: Callable[[Worker], None], on_exit: OnExit) -> None:
        self.started.append(worker.model.name)
        self.running[worker.identity] = worker, on_exit

    # what happens outside

    def model(self, name: str) -> Model:
        return self.fleet.models[name]

    def hello(self, worker: Worker) -> None:
        name, token = worker.identity, worker.token
        self.fleet.on_hello(name, WorkerHello(identity=name, token=token, model=worker.model.name, pid=1))

    def ready(self, worker: Worker) -> None:
        self.fleet.on_state(worker.identity, StateChanged(state=S.READY, facts=FACTS))
        self.beat(worker)

    def beat(self, worker: Worker, running: int = 0, grown_gb: float = 0.0) -> None:
        size = int((SIZES[worker.model.name] + grown_gb) * GIB)
        finished = worker.heartbeat.finished if worker.heartbeat else 0
        self.fleet.on_heartbeat(
            worker.identity,
            Heartbeat(
                loop_seq=int(self.now * 10),
                phase="idle",
                running=running,
                waiting=0,
                finished=finished,
                active_bytes=0,
                cache_bytes=0,
                footprint_bytes=size,
            ),
        )

    def exit(self, worker: Worker, code: int = 0) -> None:
        _, on_exit = self.running.pop(worker.identity)
        on_exit(worker, code, "gone")

    def load(self, name: str) -> Worker:
        """Want a model until its worker is ready."""
        self.fleet.want(self.model(name))
        self.fleet.settle()
        (worker,) = [worker for worker, _ in self.running.values() if worker.model.name == name]
        self.hello(worker)
        self.ready(worker)
        self.fleet.settle()
        return worker

    def told(self, kind: type[Message]) -> list[str]:
        """The workers that got such a message, and forget it."""
        told = [identity for identity, message in self.sent if isinstance(message, kind)]
        self.sent = [one for one in self.sent if not isinstance(one[1], kind)]
        return told

    def pass_time(self, seconds: float) -> None:
        """Second by second, with heartbeats of all workers as they were."""
        for _ in range(int(seconds)):
            self.now += 1.0
            for worker, _ in list(self.running.values()):
                if worker.state is S.READY and worker.heartbeat:
                    self.beat(worker, worker.heartbeat.running)
            self.fleet.settle()


@pytest.fixture(autouse=True)
def _home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLXSPEC_HOME", str(tmp_path))


def world(**changes: ModelConfig) -> World:
    models = {name: ModelConfig(path=f"/no/such/{name}") for name in NAMES} | changes
    return World(Config(models=models, supervisor=SupervisorConfig(memory_limit_gb=1.0)))


def test_idle_model_is_unloaded_after_its_time_unless_it_is_used_or_pinned() -> None:
    w = world(
        a=ModelConfig(path="/a", idle_unload_s=60),
        b=ModelConfig(path="/b", idle_unload_s=60, pin=True),
    )
    a, b = w.load("a"), w.load("b")
    w.beat(a, running=1)
    w.pass_time(100)
    assert (a.state, b.state) == (S.READY, S.READY)
    w.beat(a, running=0)
    w.pass_time(58)
    assert (a.state, b.state) == (S.READY, S.READY)
    w.pass_time(3)
    assert (a.state, b.state) == (S.DRAINING, S.READY)
    w.exit(a)
    w.pass_time(5)
    assert (a.state, b.state) == (S.STOPPED, S.READY)
    assert w.load("a").state is S.READY


def test_pressure_shrinks_caches_first_and_then_evicts_one_idle_model_after_the_other() -> None:
    w = world()
    a, b = w.load("a"), w.load("b")
    w.pass_time(20)
    w.told(SetLimits)
    w.pressure = Pressure.SHORT
    w.pass_time(30)
    limits = [message for _, message in w.sent if isinstance(message, SetLimits)]
    assert sorted(w.told(SetLimits)) == ["a#1", "b#1"]
    assert {(one.cache_bytes, one.shrink) for one in limits} == {(0, True)}
    assert (a.state, b.state) == (S.READY, S.READY)
    w.pressure = Pressure.CRITICAL
    w.pass_time(3)
    assert (a.state, b.state) == (S.DRAINING, S.READY)
    w.exit(a)
    w.pass_time(10)
    assert b.state is S.DRAINING
    w.pressure = Pressure.NORMAL


def test_busy_model_is_not_evicted_under_pressure() -> None:
    w = world()
    a = w.load("a")
    w.pass_time(20)
    w.beat(a, running=1)
    w.pressure = Pressure.CRITICAL
    w.pass_time(30)
    assert a.state is S.READY


def test_models_that_outgrow_the_budget_make_the_least_used_idle_one_go() -> None:
    w = world()
    a, b, c = w.load("a"), w.load("b"), w.load("c")
    w.pass_time(20)
    w.beat(c, running=1)
    w.beat(b, running=1, grown_gb=0.3)
    w.fleet.settle()
    assert (a.state, b.state, c.state) == (S.DRAINING, S.READY, S.READY)


def test_shares_leave_the_weights_and_stay_within_the_soft_limit() -> None:
    w = world()
    a = w.load("a")
    alone = a.limits
    b = w.load("b")
    assert alone and a.limits and a.limits == b.limits
    assert alone.kv_bytes > 2 * a.limits.kv_bytes
    held = int((SIZES["a"] + SIZES["b"]) * GIB)
    assert held + 2 * (a.limits.kv_bytes + a.limits.cache_bytes) <= policy.SOFT_SHARE * GIB + 2 * 2**24


def test_what_was_measured_corrects_the_need() -> None:
    w = world()
    assert w.model("d").need_bytes is None
    d = w.load("d")
    assert SIZES["d"] * GIB <= (w.model("d").need_bytes or 0) <= SIZES["d"] * GIB + 2**24
    w.fleet.unload(d.model)
    w.exit(d)
    w.load("c")
    w.fleet.want(w.model("d"))
    w.fleet.settle()
    assert w.model("d").state is S.STOPPED  # by its measured size it does not fit beside the other


def test_hung_worker_is_aborted_and_restarted() -> None:
    w = world()
    a = w.load("a")
    for half in range(30):
        w.now = 1 + half / 2
        w.fleet.settle()
        if a.machine.is_hung:
            break
    assert 8 <= w.now <= 12
    w.exit(a, -6)
    assert a.state is S.BACKOFF
    assert "stood still" in a.machine.detail
    w.fleet.settle()
    assert a.state is S.STARTING
    entry = a.model.entry(0)
    assert (entry.restarts, entry.restarts_by_death) == (1, {"hung": 1})


def test_models_that_are_always_busy_take_turns() -> None:
    """Two of them that do not fit together: each is loaded in its turn, for a whole turn, and comes back."""
    w = world()
    w.fleet._need = lambda model: int(SIZES[model.name] * GIB)  # type: ignore[method-assign]
    turn_s = w.fleet.config.supervisor.turn_s
    served = {w.load("c"): 0.0}
    lives: list[tuple[str, float]] = []
    while w.now < 10 * turn_s:
        for name in "cd":  # requests for both never end: a router asks as long as one has no worker
            if not w.model(name).has_process:
                w.fleet.want(w.model(name))
        for worker, _ in list(w.running.values()):
            match worker.state:
                case S.STARTING:
                    w.hello(worker)
                case S.LOADING:
                    w.ready(worker)
                    served[worker] = w.now
                case S.READY:
                    w.beat(worker, running=3)
                case S.DRAINING:
                    assert worker.model.entry(0).gives_way
                    lives.append((worker.model.name, w.now - served[worker]))
                    w.exit(worker)
        w.now += 1.0
        w.fleet.settle()
    names = [name for name, _ in lives]
    assert names[:6] == list("cdcdcd")
    assert all(turn_s <= life_s <= turn_s + 5 for _, life_s in lives), lives


class RandomFleet(RuleBasedStateMachine):
    """Models are asked for, used, unloaded, pinned, and die, in any order."""

    @initialize()
    def begin(self) -> None:
        self.loop = asyncio.new_event_loop()
        self.world = world()
        for name, size in SIZES.items():
            self.world.model(name).measured_bytes = self.world.model(name).need_bytes = int(size * GIB)
            self.world.fleet._need = lambda model: model.measured_bytes  # type: ignore[method-assign]

    def teardown(self) -> None:
        self.loop.close()

    @property
    def workers(self) -> list[Worker]:
        return [worker for worker, _ in self.world.running.values()]

    def _settle(self) -> None:
        """Settle, and look at what the fleet does by itself: who is sent away was not busy, awaited or pinned."""
        fleet = self.world.fleet
        now, turn_s = self.world.now, fleet.config.supervisor.turn_s
        loaded = [m for m in fleet.models.values() if m.has_process]
        waiting = policy.in_order(c for m in fleet.models.values() for c in m.candidates(now, turn_s))
        is_turn_over = any(candidate.is_due for candidate in waiting)
        may_go = {m.name for m in loaded if m.resident(now, turn_s).may_go}
        may_go |= {m.name for m in loaded if is_turn_over and m.resident(now, turn_s).may_give_way}
        self.world.told(Drain)
        before = len(self.world.started)
        fleet.settle()
        assert {identity.partition("#")[0] for identity in self.world.told(Drain)} <= may_go
        started = self.world.started[before:]
        assert started == [c.name for c in waiting if c.name in started], "served in order"
        assert started == [c.name for c in waiting][: len(started)], "nobody overtakes"

    @rule(name=st.sampled_from(NAMES))
    def want(self, name: str) -> None:
        self.world.fleet.want(self.world.model(name))
        self._settle()

    @rule(name=st.sampled_from(NAMES))
    def unload(self, name: str) -> None:
        self.world.fleet.unload(self.world.model(name))
        self._settle()

    @rule(name=st.sampled_from(NAMES), pinned=st.booleans())
    def pin(self, name: str, pinned: bool) -> None:
        self.world.model(name).pinned = pinned
        self._settle()

    @rule(seconds=st.sampled_from([1, 3, 15]))
    def wait(self, seconds: int) -> None:
        for _ in range(seconds):
            self.world.now += 1.0
            for worker in self.workers:
                if worker.state is S.READY and worker.heartbeat:
                    self.world.beat(worker, worker.heartbeat.running)
            self._settle()

    @precondition(lambda self: self.workers)
    @rule(data=st.data())
    def go_on(self, data: st.DataObject) -> None:
        """A worker does what comes next."""
        worker = data.draw(st.sampled_from(self.workers))
        match worker.state:
            case S.STARTING:
                self.world.hello(worker)
            case S.LOADING:
                self.world.ready(worker)
            case S.READY:
                self.world.beat(worker, running=data.draw(st.integers(0, 2)))
            case _:
                self.world.exit(worker)
        self._settle()

    @precondition(lambda self: self.workers)
    @rule(data=st.data(), code=st.sampled_from([-9, 1, 4]))
    def die(self, data: st.DataObject, code: int) -> None:
        self.world.exit(data.draw(st.sampled_from(self.workers)), code)
        self._settle()

    @invariant()
    def budget_is_never_exceeded(self) -> None:
        fleet = self.world.fleet
        assert fleet.used_bytes() <= policy.HARD_SHARE * fleet.budget.total_bytes + len(self.workers) * 2**24

    @invariant()
    def processes_are_those_of_the_machines(self) -> None:
        fleet = self.world.fleet
        assert {w.identity for w in fleet.workers if w.has_process} == set(self.world.running)

    @invariant()
    def nobody_is_told_to_exit_unasked(self) -> None:
        for identity in self.world.told(Exit):
            worker = self.world.fleet._hands.living.get(identity)
            assert worker is None or worker.state is S.STOPPING


RandomFleet.TestCase.settings = settings(max_examples=40, stateful_step_count=40, deadline=None)
TestRandomFleet = RandomFleet.TestCase
