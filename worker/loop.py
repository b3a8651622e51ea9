"""The MLX thread of a served model: takes orders between steps, runs steps, hands out what they gave."""

import queue
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import mlx.core as mx

from common.errors import MlxspecError
from worker.engine import Engine
from worker.report import Gain, StepReport
from worker.request import Request

IDLE_WAIT_S = 1.0
CLEAR_AFTER_S = 10.0  # an idle worker gives its slots and MLX's buffer cache back after so long


@dataclass(frozen=True, slots=True)
class Submit:
    """Run this request."""

    request: Request


@dataclass(frozen=True, slots=True)
class CancelRequest:
    """Nobody wants this request's tokens any more."""

    request_id: str


@dataclass(frozen=True, slots=True)
class NewLimits:
    """This much memory for the KV cache, and for MLX's buffer cache. `shrink`: drop what is only remembered, now."""

    kv_bytes: int
    cache_bytes: int
    shrink: bool = False


@dataclass(frozen=True, slots=True)
class Stop:
    """End the loop now."""


Order = Submit | CancelRequest | NewLimits | Stop


@dataclass(slots=True)
class Pulse:
    """What other threads may read of the loop. `seq` grows with every turn: if it stands still, the loop hangs.

    `announce` tells the others at once of a phase that may hold this thread, and all of Python, for long.
    """

    seq: int = 0
    phase: str = "loading"
    slowest_step_s: float = 0.0
    announce: Callable[[], None] = lambda: None
    running: int = 0
    waiting: int = 0
    outstanding_tokens: int = 0
    kv_bytes: int = 0


@dataclass(slots=True)
class Loop:
    """Runs an engine from a queue of orders. `publish` is called on this thread with each step's report.

    On a GPU (`publishes_late`) a step's report waits until the next step waits for the device, or no row is left: who
    makes text of it would take the interpreter from a step in the making. On a CPU he would take a core from products.
    """

    engine: Engine
    orders: "queue.SimpleQueue[Order]"
    publish: Callable[[StepReport], None]
    pulse: Pulse
    publishes_late: bool = False
    is_stopping: bool = False
    idle_since_s: float | None = None
    _unpublished: list[StepReport] = field(default_factory=list)

    def run(self) -> None:
        """Until a `Stop` comes. What goes wrong in a step ends the process: a half-dead worker helps nobody."""
        self.engine.target.on_compile = self._on_compile
        self.engine.on_wait = self._publish_all
        while not self.is_stopping:
            self._take_orders()
            if self.engine.has_work:
                self._step()
            if not (self.publishes_late and self.engine.rows):
                self._publish_all()
            self._beat()
        self._publish_all()

    def _step(self) -> None:
        self.pulse.phase = "step"
        began_s = time.monotonic()
        report = self.engine.step()  # which publishes those before
        self._unpublished.append(report)
        if self.pulse.phase == "step":
            self.pulse.slowest_step_s = max(self.pulse.slowest_step_s, time.monotonic() - began_s)
        self.idle_since_s = None

    def _publish_all(self) -> None:
        reports, self._unpublished = self._unpublished, []
        for report in reports:
            self.publish(report)

    def _on_compile(self) -> None:
        """A step of a new shape: it takes longer than others, and that is no hang."""
        self._publish_all()
        self.pulse.phase = "compile"
        self.pulse.announce()

    def _take_orders(self) -> None:
        """Wait for an order if there is nothing else to do, then take all that are there."""
        self.pulse.phase = "orders"
        if not self.engine.has_work:
            try:
                self._take(self.orders.get(timeout=IDLE_WAIT_S))
            except queue.Empty:
                self._rest()
        while not self.orders.empty():
            self._take(self.orders.get_nowait())

    def _take(self, order: Order) -> None:
        match order:
            case Submit(request=request):
                self._submit(request)
            case CancelRequest(request_id=request_id):
                if gains := self.engine.cancel(request_id):
                    self._unpublished.append(StepReport(self.engine.totals.steps, tuple(gains)))
            case NewLimits():
                self._take_limits(order)
            case Stop():
                self.is_stopping = True

    def _take_limits(self, limits: NewLimits) -> None:
        self.engine.set_kv_limit(limits.kv_bytes)
        if limits.shrink:
            self.engine.prefixes.forget()
        mx.set_cache_limit(limits.cache_bytes)
        if mx.get_cache_memory() > limits.cache_bytes:
            mx.clear_cache()

    def _submit(self, request: Request) -> None:
        try:
            self.engine.submit(request)
        except MlxspecError as error:
            self._unpublished.append(StepReport(self.engine.totals.steps, (Gain(request.request_id, error=error),)))

    def _rest(self) -> None:
        now = time.monotonic()
        self.idle_since_s = self.idle_since_s or now
        if now - self.idle_since_s > CLEAR_AFTER_S:
            self.engine.target.clear()
            mx.clear_cache()

    def _beat(self) -> None:
        engine = self.engine
        self.pulse.seq += 1
        self.pulse.phase = "idle" if not engine.has_work else "step"
        self.pulse.running, self.pulse.waiting = len(engine.rows), len(engine.waiting)
        self.pulse.outstanding_tokens = sum(row.uncached + row.tokens_left for row in engine.rows) + sum(
            one.request.total_tokens for one in engine.waiting
        )
        self.pulse.kv_bytes = engine.target.kv_bytes + engine.prefixes.tree.nbytes
