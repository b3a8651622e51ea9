"""All models and their workers: takes in what happens, steers each machine, keeps the memory budget.

Level-triggered: an event only changes a model; `settle` then looks at all of them and does what is due. So
events may come in any order, and nothing is lost when several come at once.
"""

import asyncio
import logging
import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from common import config as configuration
from common import paths
from common.config import Config
from common.footprint import ADMITTED_TOKENS, PROCESS_BYTES
from common.logs import fields
from common.messages import (
    PROTOCOL_VERSION,
    Drain,
    Exit,
    Heartbeat,
    Message,
    ModelEntry,
    ModelTable,
    SetLimits,
    StateChanged,
    WorkerHello,
)
from common.states import WorkerState
from router.supervisor import machine, memory, policy, process
from router.supervisor.control import differs_in_substance
from router.supervisor.machine import Action
from router.supervisor.model import ALWAYS, NEVER, Model, slug

log = logging.getLogger(__name__)

FIGURES_EVERY_S = 1.0  # how often a table is sent that differs in heartbeat figures only
LEAST_WAIT_S = 0.05  # for what was due already and still waits for room
Clock = Callable[[], float]


class Post(Protocol):
    """Where messages go; `ControlSocket` in life."""

    def send(self, identity: str, message: Message) -> bool: ...

    def publish(self, default_model: str | None, budget_bytes: int, models: tuple[ModelEntry, ...]) -> ModelTable: ...


@dataclass(frozen=True, slots=True)
class Launcher:
    """What it takes to spawn a worker."""

    commands: process.Commands
    run_dir: Path
    line: process.Lifeline


class Fleet:
    """The models by name. All methods run on the supervisor's event loop."""

    def __init__(
        self,
        config: Config,
        post: Post,
        launcher: Launcher,
        tasks: asyncio.TaskGroup,
        show: Callable[[ModelTable], None] = lambda table: None,
        clock: Clock = time.monotonic,
    ) -> None:
        self.config = config
        self.budget_bytes = memory.budget(config.supervisor)
        self.models: dict[str, Model] = {}
        self.clock = clock
        self.is_stopping = False
        self.is_empty = asyncio.Event()  # no process is left
        self._post, self._launcher, self._tasks, self._show = post, launcher, tasks, show
        self._by_identity: dict[str, Model] = {}
        self._nudged = asyncio.Event()
        self._published: tuple[ModelEntry, ...] | None = None
        self._published_at = NEVER
        self.discover()
        self.default_model = configuration.default_model(config, configuration.discover_models(config))

    # --- the registry --------------------------------------------------------------------------------

    def discover(self) -> None:
        """Register configured models and model folders that are not known yet; forget those whose folder is gone."""
        known = configuration.discover_models(self.config)
        for name, found in known.items():
            if name not in self.models:
                self.register(name, found.path, weights=found.weights, pinned=found.pin)
        gone = [m for m in self.models.values() if m.name not in known and not m.has_process]
        for model in gone:
            if Path(model.path).is_absolute() and not Path(model.path).is_dir():
                del self.models[model.name]
                self.nudge()

    def register(self, name: str, path: str, *, weights: str | None = None, pinned: bool = False) -> Model:
        """Make `name` known. Nothing is loaded yet."""
        self.models[name] = Model(
            name=name,
            path=configuration.resolve_model_path(path),
            weights=weights or self.config.engine.weights,
            pinned=pinned,
        )
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
            model.last_used = now
        model.want(now, ALWAYS if for_ever else now + self.config.server.load_timeout_s)
        self.nudge()

    def unload(self, model: Model) -> None:
        """Nobody wants it any more: drain its worker and end it."""
        model.wanted_until = NEVER
        model.note = ""
        self._apply(model, machine.DrainAsked())

    def reconsider(self, model: Model) -> None:
        """A failed model may be tried again."""
        self._apply(model, machine.Forget())

    def has_changed(self, model: Model) -> bool:
        """Whether trying a failed model again may end otherwise: its files or free memory have changed."""
        if model.failed_with is None:
            return True
        files, free_bytes = model.failed_with
        fresh = memory.fingerprint(model.path)
        if fresh is None:  # not on this disk: a download may work later
            return self.clock() - model.machine.since >= self.config.supervisor.backoff_max_s
        is_short = model.machine.failure is machine.Failure.OUT_OF_MEMORY
        return fresh != files or (is_short and self.free_bytes() > free_bytes)

    # --- what workers say -----------------------------------------------------------------------------

    def on_hello(self, sender: str, hello: WorkerHello) -> None:
        model = self._by_identity.get(sender)
        if model is None or hello.identity != sender or hello.token != model.token:
            log.warning("stranger refused %s", fields(sender=sender, pid=hello.pid))
        elif hello.version != PROTOCOL_VERSION:
            detail = f"speaks protocol {hello.version}, this server {PROTOCOL_VERSION}: restart mlxspec"
            self._apply(model, machine.Mismatch(detail))
        else:
            model.is_connected = True
            self._apply(model, machine.Hello())
            if model.state is WorkerState.STOPPING:  # it was told by a signal that it may have missed
                self._post.send(sender, Exit())

    def on_state(self, sender: str, change: StateChanged) -> None:
        model = self._speaker(sender)
        if model is None:
            return
        if change.state is WorkerState.LOADING and model.state is WorkerState.LOADING:
            model.note = change.detail
        elif change.state is WorkerState.READY and model.state is WorkerState.LOADING:
            model.facts = change.facts or model.facts
            self._apply(model, machine.Ready())
        elif change.state is WorkerState.DRAINING:
            self._apply(model, machine.DrainSeen())
        self.nudge()

    def on_heartbeat(self, sender: str, heartbeat: Heartbeat) -> None:
        if model := self._speaker(sender):
            model.observe(heartbeat, self.clock())
            self.nudge()

    def on_exit(self, model: Model, code: int, detail: str) -> None:
        """Its process was reaped."""
        log.info("worker gone %s", fields(identity=model.identity, code=code, detail=detail))
        self._by_identity.pop(model.identity, None)
        model.child, model.is_connected, model.heartbeat, model.note = None, False, None, ""
        self._apply(model, machine.Exited(code, detail))

    def _speaker(self, sender: str) -> Model | None:
        """The model whose living, greeted worker this is; None for strangers and old generations."""
        model = self._by_identity.get(sender)
        if model is None or not model.is_connected:
            log.debug("frame of no living worker ignored %s", fields(sender=sender))
            return None
        return model

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
        for model in self.models.values():
            if machine.is_overdue(model.machine, now):
                self._apply(model, machine.Elapsed())
            if model.state is WorkerState.BACKOFF and not model.is_wanted(now):
                self._apply(model, machine.Forget())
        if not self.is_stopping:
            self._serve_queue(now)
        if not any(model.has_process for model in self.models.values()):
            self.is_empty.set()
        self._publish(now)
        self._tell_gone()

    def stop(self) -> None:
        """End all workers; `is_empty` is set when the last one is reaped."""
        self.is_stopping = True
        self.is_empty.clear()
        for model in self.models.values():
            model.wanted_until = NEVER
            self._apply(model, machine.ExitAsked())
        self.nudge()

    def kill(self) -> None:
        """End all workers at once."""
        self.stop()
        for model in self.models.values():
            self._act(model, Action.KILL)

    def free_bytes(self) -> int:
        return self.budget_bytes - sum(model.charge_bytes() for model in self.models.values())

    def _until_due(self) -> float | None:
        now = self.clock()
        times = [m.machine.deadline for m in self.models.values() if m.machine.deadline is not None]
        times += [m.wanted_until for m in self.models.values() if now < m.wanted_until < ALWAYS]
        times += [self._published_at + FIGURES_EVERY_S] if self._published != self._entries() else []
        return max(LEAST_WAIT_S, min(times) - now) if times else None

    def _serve_queue(self, now: float) -> None:
        """Load whoever is first in the queue and fits; nobody overtakes a first one that has to wait."""
        queue = policy.in_order(m.candidate() for m in self.models.values() if m.wants_start(now))
        blocker = ""
        for candidate in queue:
            model = self.models[candidate.name]
            if blocker:
                model.note = f"waits behind {blocker}"
                continue
            model.note = self._admit(model, candidate, now)
            blocker = model.name if model.note else ""

    def _admit(self, model: Model, candidate: policy.Candidate, now: float) -> str:
        """Start it, reject it, or make room; returns what it waits for, or nothing."""
        residents = [m.resident(now) for m in self.models.values() if m.has_process]
        match policy.decide(candidate, residents, self.budget_bytes):
            case policy.Admit():
                self._apply(model, machine.Start())
            case policy.Refuse(detail):
                self._apply(model, machine.Forget())
                self._apply(model, machine.Rejected(detail))
            case policy.Evict(names):
                for name in names:
                    log.info("evicting %s", fields(model=name, to_make_room_for=model.name))
                    self.unload(self.models[name])
                return f"waits for memory: {', '.join(names)} must be unloaded first"
            case policy.Wait(detail):
                return detail
        return ""

    # --- machines and actions -------------------------------------------------------------------------

    def _apply(self, model: Model, event: machine.Event) -> None:
        before = model.machine
        model.machine, actions = machine.step(before, event, self.clock(), random.random(), self.config.supervisor)
        for action in actions:
            self._act(model, action)
        if model.state is not before.state:
            self._entered(model, before.state)
        self.nudge()

    def _entered(self, model: Model, before: WorkerState) -> None:
        log.info("model %s is %s %s", model.name, model.state, fields(was=before, detail=model.detail or None))
        match model.state:
            case WorkerState.READY:
                self._became_ready(model)
            case WorkerState.FAILED:
                model.wanted_until = NEVER
                model.failed_with = (memory.fingerprint(model.path), self.free_bytes())
            case WorkerState.STOPPED:
                model.is_awaited = False
        self._share_memory()

    def _became_ready(self, model: Model) -> None:
        model.wanted_until = ALWAYS
        model.last_used = self.clock()
        model.note = ""
        if facts := model.facts:
            model.base_bytes = facts.weights_bytes + PROCESS_BYTES
            by_length = ADMITTED_TOKENS * facts.kv_bytes_per_token
            model.need_bytes = model.base_bytes + by_length + facts.kv_bytes_per_row

    def _share_memory(self) -> None:
        """Give each ready worker its share of what models that are being loaded leave."""
        ready = [m for m in self.models.values() if m.state is WorkerState.READY]
        held = sum(m.base_bytes if m in ready else m.charge_bytes() for m in self.models.values())
        kv = policy.kv_share(self.budget_bytes, held, len(ready), self.config.engine.kv_cache_gb)
        for model in ready:
            limits = SetLimits(kv_bytes=kv, cache_bytes=policy.cache_share(kv))
            if limits != model.limits and self._post.send(model.identity, limits):
                model.limits = limits

    def _act(self, model: Model, action: Action) -> None:
        match action:
            case Action.SPAWN:
                self._spawn(model)
            case Action.SEND_DRAIN:
                self._tell(model, Drain())
            case Action.SEND_EXIT:
                self._tell(model, Exit())
            case Action.KILL if model.child:
                model.child.kill()

    def _tell(self, model: Model, order: Drain | Exit) -> None:
        """By message if it listens, else by signal."""
        if not (model.is_connected and self._post.send(model.identity, order)) and model.child:
            model.child.terminate()

    def _spawn(self, model: Model) -> None:
        model.identity = f"{slug(model.name)}#{model.machine.generation}"
        model.token = process.new_token()
        model.note, model.heartbeat, model.limits, model.is_connected = "", None, None, False
        self._by_identity[model.identity] = model
        self._tasks.create_task(self._live(model), name=f"worker {model.identity}")

    async def _live(self, model: Model) -> None:
        """One worker process from spawn to reaping."""
        launch = process.WorkerLaunch(
            identity=model.identity,
            name=model.name,
            path=model.path,
            run_dir=self._launcher.run_dir,
            token=model.token,
            log_path=paths.logs_dir() / f"worker-{slug(model.name)}.log",
        )
        try:
            child = await process.spawn_worker(self._launcher.commands, launch, self._launcher.line)
        except OSError as error:
            self.on_exit(model, 1, f"cannot be spawned: {error.strerror}")
            return
        log.info("worker spawned %s", fields(identity=model.identity, pid=child.pid, path=model.path))
        model.child = child
        if model.state is WorkerState.STOPPING:  # told to go before it was there
            child.kill()
        self.nudge()
        code = await child.wait()
        self.on_exit(model, code, child.describe_exit(code, otherwise=model.note))

    # --- telling everybody ----------------------------------------------------------------------------

    def _publish(self, now: float) -> None:
        entries = self._entries()
        if entries == self._published:
            return
        is_news = self._published is None or differs_in_substance(self._published, entries)
        if is_news or now >= self._published_at + FIGURES_EVERY_S:
            self._published, self._published_at = entries, now
            self._show(self._post.publish(self.default_name(), self.budget_bytes, entries))

    def _tell_gone(self) -> None:
        for model in self.models.values():
            if not model.has_process:
                while model.on_gone:
                    model.on_gone.pop(0)()

    def _entries(self) -> tuple[ModelEntry, ...]:
        return tuple(model.entry() for model in self.models.values())

    def _need(self, model: Model) -> int | None:
        return memory.estimate_need(model.path, model.weights)
