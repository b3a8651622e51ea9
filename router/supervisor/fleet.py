"""All models and their workers: takes in what happens, steers each machine, keeps the memory budget.

Level-triggered: an event only changes a model; `settle` then looks at all of them and does what is due. So
events may come in any order, and nothing is lost when several come at once.
"""

import asyncio
import logging
import random
import time
from collections.abc import Callable
from pathlib import Path

from common import config as configuration
from common.config import Config, ModelConfig
from common.footprint import PROCESS_BYTES
from common.logs import fields
from common.messages import (
    PROTOCOL_VERSION,
    Exit,
    Heartbeat,
    ModelEntry,
    ModelTable,
    StateChanged,
    WorkerHello,
)
from common.states import WorkerState
from router.supervisor import machine, memory, policy
from router.supervisor.budget import Budget
from router.supervisor.bulletin import Bulletin, Post
from router.supervisor.hands import Hands
from router.supervisor.launcher import Launcher
from router.supervisor.machine import Action
from router.supervisor.model import ALWAYS, NEVER, Model
from router.supervisor.worker import Worker

log = logging.getLogger(__name__)

LEAST_WAIT_S = 0.05  # for what was due already and still waits for room
GLANCE_EVERY_S = 0.5  # at pulses and the machine's memory
Clock = Callable[[], float]


class Fleet:
    """The models by name. All methods run on the supervisor's event loop."""

    def __init__(
        self,
        config: Config,
        post: Post,
        launcher: Launcher,
        show: Callable[[ModelTable], None] = lambda table: None,
        clock: Clock = time.monotonic,
        budget: Budget | None = None,
    ) -> None:
        self.config = config
        self.budget = budget or Budget(config)
        self.models: dict[str, Model] = {}
        self.clock = clock
        self.is_stopping = False
        self.is_empty = asyncio.Event()  # no process is left
        self._post, self._bulletin = post, Bulletin(post, show)
        self._hands = Hands(post, launcher, self.on_exit, self.nudge)
        self._started_at = time.time()
        self._nudged = asyncio.Event()
        self.discover()
        self.default_model = configuration.default_model(config, configuration.discover_models(config))

    # --- the registry --------------------------------------------------------------------------------

    @property
    def workers(self) -> list[Worker]:
        """Those of all models, with and without process."""
        return [worker for model in self.models.values() for worker in model.workers]

    def discover(self) -> None:
        """Register configured models and model folders that are not known yet; forget those whose folder is gone."""
        known = configuration.discover_models(self.config)
        for name, found in known.items():
            if name not in self.models:
                self.register(name, found)
        gone = [m for m in self.models.values() if m.name not in known and not m.has_process]
        for model in gone:
            if Path(model.path).is_absolute() and not Path(model.path).is_dir():
                del self.models[model.name]
                self.nudge()

    def register(self, name: str, settings: ModelConfig) -> Model:
        """Make `name` known. Nothing is loaded yet."""
        path = configuration.resolve_model_path(settings.path)
        self.models[name] = Model(name=name, path=path, settings=settings, pinned=settings.pin)
        self.models[name].resize(settings.replicas)
        self.nudge()
        return self.models[name]

    def default_name(self) -> str | None:
        return self.default_model or next(iter(self.models), None)

    # --- what clients want ----------------------------------------------------------------------------

    def want(self, model: Model, *, for_ever: bool = False) -> None:
        """Have it loaded as soon as there is room: for ever, or as long as a request may wait for it."""
        now = self.clock()
        if not model.has_process:
            model.need_bytes = self._need(model)
        model.is_awaited = model.is_awaited or not for_ever
        if model.state is WorkerState.READY:
            model.last_used, model.last_used_at = now, time.time()
        model.want(now, ALWAYS if for_ever else now + self.config.server.load_timeout_s)
        self.nudge()

    def unload(self, model: Model) -> None:
        """Nobody wants it any more: drain its workers and end them."""
        model.wanted_until = NEVER
        self._drain(model, gives_way=False)

    def renew(self, model: Model) -> None:
        """Let its workers finish and go; if somebody wants it, others follow."""
        self._drain(model, gives_way=True)

    def _make_way(self, model: Model, other: str) -> None:
        """Let it go for another one; if requests wait for it, it comes back in its turn."""
        log.info("evicting %s", fields(model=model.name, to_make_room_for=other))
        model.wanted_until = NEVER
        self._drain(model, gives_way=True)

    def _drain(self, model: Model, *, gives_way: bool) -> None:
        model.gives_way = gives_way
        for worker in model.workers:
            worker.note = ""
            self._apply(worker, machine.DrainAsked())

    def reconsider(self, model: Model) -> None:
        """A failed model may be tried again."""
        for worker in model.workers:
            if worker.state is WorkerState.FAILED:
                self._apply(worker, machine.Forget())

    def has_changed(self, model: Model) -> bool:
        """Whether trying a failed model again may end otherwise: its files or free memory have changed."""
        if model.failed_with is None:
            return True
        files, free_bytes = model.failed_with
        fresh = memory.fingerprint(model.path)
        failed = model.best.machine
        if fresh is None:  # not on this disk: a download may work later
            return self.clock() - failed.since >= self.config.supervisor.backoff_max_s
        is_short = failed.failure is machine.Failure.OUT_OF_MEMORY
        return fresh != files or (is_short and self.free_bytes() > free_bytes)

    # --- what workers say -----------------------------------------------------------------------------

    def on_hello(self, sender: str, hello: WorkerHello) -> None:
        worker = self._hands.living.get(sender)
        if worker is None or hello.identity != sender or hello.token != worker.token:
            log.warning("stranger refused %s", fields(sender=sender, pid=hello.pid))
        elif hello.version != PROTOCOL_VERSION:
            detail = f"speaks protocol {hello.version}, this server {PROTOCOL_VERSION}: restart mlxspec"
            self._apply(worker, machine.Mismatch(detail))
        else:
            worker.is_connected = True
            self._apply(worker, machine.Hello())
            if worker.state is WorkerState.STOPPING:  # it was told by a signal that it may have missed
                self._post.send(sender, Exit())

    def on_state(self, sender: str, change: StateChanged) -> None:
        worker = self._speaker(sender)
        if worker is None:
            return
        if change.state is WorkerState.LOADING and worker.state is WorkerState.LOADING:
            worker.note = change.detail
        elif change.state is WorkerState.READY and worker.state is WorkerState.LOADING:
            worker.model.facts = change.facts or worker.model.facts
            self._apply(worker, machine.Ready())
        elif change.state is WorkerState.DRAINING:
            self._apply(worker, machine.DrainSeen())
        self.nudge()

    def on_heartbeat(self, sender: str, heartbeat: Heartbeat) -> None:
        if worker := self._speaker(sender):
            worker.observe(heartbeat)
            worker.model.note_use(self.clock(), time.time())
            self.nudge()

    def on_exit(self, worker: Worker, code: int, detail: str) -> None:
        """Its process was reaped."""
        log.info("worker gone %s", fields(identity=worker.identity, code=code, detail=detail))
        self._hands.bury(worker)
        self._apply(worker, machine.Exited(code, detail))

    def _speaker(self, sender: str) -> Worker | None:
        """The living, greeted worker of this name; None for strangers and old generations."""
        worker = self._hands.living.get(sender)
        if worker is None or not worker.is_connected:
            log.debug("frame of no living worker ignored %s", fields(sender=sender))
            return None
        return worker

    # --- steering -------------------------------------------------------------------------------------

    def nudge(self) -> None:
        """Something changed: settle soon."""
        self._nudged.set()

    async def steer(self) -> None:
        """Settle whenever something changed or is due; for ever."""
        while True:
            self._nudged.clear()
            self.settle()
            try:
                await asyncio.wait_for(self._nudged.wait(), self._until_due())
            except TimeoutError:
                continue

    def settle(self) -> None:
        """Do all that is due now, then tell everybody what changed."""
        now = self.clock()
        for worker in self.workers:
            if machine.is_overdue(worker.machine, now):
                self._apply(worker, machine.Elapsed())
            if worker.state is WorkerState.BACKOFF and not worker.model.is_wanted(now):
                self._apply(worker, machine.Forget())
        if not self.is_stopping:
            self._look_after(now)
            self._serve_queue(now)
        if not any(worker.has_process for worker in self.workers):
            self.is_empty.set()
        self._bulletin.tell(self._table(), now)
        self._tell_gone()

    def stop(self) -> None:
        """End all workers; `is_empty` is set when the last one is reaped."""
        self.is_stopping = True
        self.is_empty.clear()
        for model in self.models.values():
            model.wanted_until = NEVER
        for worker in self.workers:
            self._apply(worker, machine.ExitAsked())
        self.nudge()

    def kill(self) -> None:
        """End all workers at once."""
        self.stop()
        for worker in self.workers:
            self._hands.do(worker, Action.KILL)

    def used_bytes(self) -> int:
        return sum(model.charge_bytes() for model in self.models.values())

    def free_bytes(self) -> int:
        return self.budget.total_bytes - self.used_bytes()

    def _look_after(self, now: float) -> None:
        """Who hangs, who has to go, who is too many, and what each may hold."""
        for worker in self.workers:
            if worker.state in (WorkerState.LOADING, WorkerState.READY):
                worker.stall.glance(now)
                if detail := worker.stall.verdict(self.config.supervisor):
                    self._apply(worker, machine.Hung(detail))
        self.budget.look(now)
        for name, reason in self.budget.surplus(self.models.values(), now).items():
            log.info("unloading %s", fields(model=name, reason=reason))
            self.unload(self.models[name])
        for model in list(self.models.values()):
            self._trim(model)
        self._share_memory()

    def _trim(self, model: Model) -> None:
        """End workers that are too many, and forget a model that is not configured any more."""
        for worker in model.workers[model.settings.replicas :]:
            if worker.has_process:
                self._apply(worker, machine.DrainAsked())
            else:
                model.workers.remove(worker)
        if model.is_removed and not model.has_process:
            self._tell_gone()
            del self.models[model.name]

    def _until_due(self) -> float | None:
        now = self.clock()
        times = [w.machine.deadline for w in self.workers if w.machine.deadline is not None]
        times += [m.wanted_until for m in self.models.values() if now < m.wanted_until < ALWAYS]
        times += [due] if (due := self._bulletin.due_at(self._entries())) < ALWAYS else []
        times += [now + GLANCE_EVERY_S] if any(w.has_process for w in self.workers) else []
        return max(LEAST_WAIT_S, min(times) - now) if times else None

    def _serve_queue(self, now: float) -> None:
        """Load whoever is first in the queue and fits; nobody overtakes a first one that has to wait."""
        turn_s = self.config.supervisor.turn_s
        queue = policy.in_order(c for model in self.models.values() for c in model.candidates(now, turn_s))
        blocker = ""
        for candidate in queue:
            worker = self.models[candidate.name].workers[candidate.worker]
            if blocker:
                worker.note = f"waits behind {blocker}"
                continue
            worker.note = self._admit(worker, candidate, now)
            blocker = candidate.name if worker.note else ""

    def _admit(self, worker: Worker, candidate: policy.Candidate, now: float) -> str:
        """Start it, reject it, or make room; returns what it waits for, or nothing."""
        turn_s = self.config.supervisor.turn_s
        residents = [m.resident(now, turn_s) for m in self.models.values() if m.has_process]
        match policy.decide(candidate, residents, self.budget.total_bytes):
            case policy.Admit():
                self._apply(worker, machine.Start())
            case policy.Refuse(detail):
                self._apply(worker, machine.Forget())
                self._apply(worker, machine.Rejected(detail))
            case policy.Evict(names):
                for name in names:
                    self._make_way(self.models[name], candidate.name)
                return f"waits for memory: {', '.join(names)} must be unloaded first"
            case policy.Wait(detail):
                return detail
        return ""

    # --- machines and actions -------------------------------------------------------------------------

    def _apply(self, worker: Worker, event: machine.Event) -> None:
        before = worker.machine
        worker.machine, actions = machine.step(before, event, self.clock(), random.random(), self.config.supervisor)
        for action in actions:
            self._hands.do(worker, action)
        if worker.state is not before.state:
            self._entered(worker, before.state)
            self.nudge()

    def _entered(self, worker: Worker, before: WorkerState) -> None:
        model = worker.model
        detail = worker.note or worker.machine.detail or None
        log.info("worker of %s is %s %s", model.name, worker.state, fields(was=before, detail=detail))
        match worker.state:
            case WorkerState.STARTING if before is WorkerState.BACKOFF and worker.machine.death:
                model.restarts[worker.machine.death] += 1
            case WorkerState.READY:
                self._became_ready(worker)
            case WorkerState.FAILED if model.state is WorkerState.FAILED:
                model.wanted_until = NEVER
                model.failed_with = (memory.fingerprint(model.path), self.free_bytes())
            case WorkerState.STOPPED if not model.has_process:
                model.is_awaited = False
        self._share_memory()

    def _became_ready(self, worker: Worker) -> None:
        model = worker.model
        model.wanted_until = ALWAYS
        model.last_used, model.last_used_at = self.clock(), time.time()
        worker.note = ""
        if model.facts:
            worker.base_bytes = model.facts.weights_bytes + PROCESS_BYTES
            model.need_bytes = worker.base_bytes + memory.kv_need(model.facts)

    def _share_memory(self) -> None:
        """Tell each ready worker its share of what models that are being loaded leave."""
        for worker, limits in self.budget.shares(self.workers):
            if self._post.send(worker.identity, limits):
                worker.limits = limits

    # --- telling everybody ----------------------------------------------------------------------------

    def _table(self) -> ModelTable:
        return ModelTable(
            revision=0,
            default_model=self.default_name(),
            memory_budget_bytes=self.budget.total_bytes,
            models=self._entries(),
            memory_used_bytes=self.used_bytes(),
            memory_pressure=self.budget.pressure,
            started_at=self._started_at,
        )

    def _tell_gone(self) -> None:
        for model in self.models.values():
            if not model.has_process:
                while model.on_gone:
                    model.on_gone.pop(0)()

    def _entries(self) -> tuple[ModelEntry, ...]:
        return tuple(model.entry(self.budget.idle_unload_s(model)) for model in self.models.values())

    def _need(self, model: Model) -> int | None:
        weights = model.settings.weights or self.config.engine.weights
        drafter = model.settings.draft_model
        drafter = self.config.speculation.draft_model if drafter is None else drafter
        need = memory.estimate_need(model.path, weights, drafter)
        return max(need or 0, model.measured_bytes) or None
