"""The data plane: sends requests to workers, gives tokens to their readers, replays what a dead worker had.

Every request ends exactly once, in `_end`. All runs on the event loop, each step to its end without a wait.
"""

import asyncio
import logging
import time
from collections.abc import Callable, Sequence
from functools import partial

from common.config import Config
from common.errors import (
    Cancelled,
    DeadlineExceeded,
    MlxspecError,
    ModelUnavailable,
    Overloaded,
    PoisonRequest,
    WireError,
    from_code,
)
from common.logs import fields
from common.messages import (
    Accepted,
    Cancel,
    Delta,
    Deltas,
    Failed,
    Finished,
    Generate,
    Load,
    ModelEntry,
    ModelTable,
)
from common.states import WorkerState
from router import balancer, verdict
from router.control_client import ControlClient
from router.data_socket import DataSocket, Progress
from router.journal import Journal, LiveRequest
from router.loads import Loads
from router.model_table import check_hope, failure_of
from router.names import Names, choose
from router.observer import Observers
from router.streams import Ended, Event, Streams

log = logging.getLogger(__name__)
TABLE_TIMEOUT_S = 5.0
RETRY_AFTER_S = 1.0
MAX_REFUSALS = 3  # times that workers may hand a request back before it fails
MAX_ATTEMPTS = 8  # of one request, for whatever reason
SERVING_STATES = (WorkerState.READY, WorkerState.DRAINING)


class Backend:
    """Owns the journal of live requests; receives what the data socket tells."""

    def __init__(
        self, config: Config, socket: DataSocket, control: ControlClient, observers: Observers, names: Names
    ) -> None:
        self.control = control
        self.directory = control.directory
        self.observers = observers
        self.names = names
        self.journal = Journal()
        self._prefixes = balancer.PrefixMemory()
        self.loads = Loads()
        self._server = config.server
        self._socket = socket
        self._leaving: set[str] = set()  # workers last seen draining or stopping
        self._unreachable: set[str] = set()  # workers that a message could not be sent to, until the next table
        self.directory.subscribe(self._on_table)

    # --- for handlers ---

    async def resolve(self, name: str | None) -> ModelEntry:
        """The model that a request means, by its name, an alias, a group or the default.

        Raises `ModelNotFound`, or `ModelUnavailable` without hope.
        """
        await self.known_table()
        if name and not self.directory.find(name):
            name = self.names.aliases.get(name, name)
        group = None if not name or self.directory.find(name) else self.names.groups.get(name)
        if name and group:
            model = choose(name, group, self.directory.models, self.journal.outstanding_by_model())
        else:
            model = self.directory.resolve(name)
        check_hope(model)
        return model

    async def known_table(self) -> ModelTable:
        """The model table, which is there unless the router has only just started."""
        try:
            return await self.directory.wait_until(lambda table: table, TABLE_TIMEOUT_S)
        except TimeoutError:
            raise ModelUnavailable(
                "the supervisor has not said yet which models there are", retry_after_s=RETRY_AFTER_S
            ) from None

    def start(self, model: str, generates: Sequence[Generate]) -> Streams:
        """Begin a group of requests. Raises `Overloaded` unless there is room for all of them."""
        room = self._server.max_concurrent_requests - len(self.journal)
        if len(generates) > room:
            raise Overloaded(
                f"{len(self.journal)} requests are live and {len(generates)} more were asked for; "
                f"at most {self._server.max_concurrent_requests} are served at a time "
                "(server.max_concurrent_requests)",
                retry_after_s=RETRY_AFTER_S,
            )
        self._check_queue(model, len(generates))
        requests: list[LiveRequest] = []
        streams = Streams(len(generates), partial(self._abandon, requests))
        for index, generate in enumerate(generates):
            requests.append(self._admit(model, generate, partial(streams.put, index)))
        self._settle(model)
        return streams

    def _check_queue(self, model: str, count: int) -> None:
        """Raise `Overloaded` when too many requests wait for a model that no worker serves yet."""
        limit, waiting = self._server.max_waiting_per_model, self.count_waiting(model)
        if waiting + count > limit and not self.directory.ready_workers(model):
            raise Overloaded(
                f"{waiting} requests wait for model {model!r} and {count} more were asked for; "
                f"at most {limit} may wait for a model (server.max_waiting_per_model)",
                retry_after_s=RETRY_AFTER_S,
            )

    def count_waiting(self, model: str) -> int:
        return len(self.journal.waiting(model))

    def stop_waiting(self) -> None:
        """End what no worker has: the server is about to stop."""
        for request in self.journal:
            if request.worker is None:
                self._stop(request, ModelUnavailable("the server is stopping", retry_after_s=RETRY_AFTER_S))

    def stop_all(self) -> None:
        """End what is still live: the server stops now."""
        for request in self.journal:
            self._stop(request, ModelUnavailable("the server is stopping", retry_after_s=RETRY_AFTER_S))

    # --- life of a request ---

    def _admit(self, model: str, generate: Generate, deliver: Callable[[Event], bool]) -> LiveRequest:
        request = LiveRequest(generate=generate, model=model, deliver=deliver, started_s=time.monotonic())
        self.journal.add(request)
        limit = self._server.request_timeout_s
        late = DeadlineExceeded(f"the request took longer than {limit:g} s (server.request_timeout_s)")
        loop = asyncio.get_running_loop()
        request.deadline = loop.call_later(limit, self._stop, request, late)
        self._await_worker(request)
        self.observers.request_started(model)
        return request

    def _await_worker(self, request: LiveRequest) -> None:
        limit = self._server.load_timeout_s
        late = ModelUnavailable(
            f"model {request.model!r} was not ready within {limit:g} s (server.load_timeout_s)",
            retry_after_s=RETRY_AFTER_S,
        )
        loop = asyncio.get_running_loop()
        request.load_deadline = loop.call_later(limit, self._stop, request, late)

    def _place(self, request: LiveRequest, worker: str) -> None:
        try:
            is_sent = self._socket.send(worker, request.next_attempt())
        except WireError as error:
            self._end(request, error)
            return
        if not is_sent:  # gone or stuck, and the supervisor has not noticed yet
            self._unreachable.add(worker)
            return
        if request.load_deadline is not None:
            request.load_deadline.cancel()
        self.journal.attach(request, worker)
        if len(self.directory.ready_workers(request.model)) > 1:
            self._prefixes.remember(request.generate.prompt, worker)
        log.debug("request sent %s", fields(request=request.wire_id, worker=worker, attempt=request.attempts))

    def _take_back(self, request: LiveRequest, reason: str) -> None:
        """Put a request that some worker had back in the queue."""
        log.warning(
            "request is replayed %s",
            fields(request=request.wire_id, worker=request.worker, reason=reason, tokens=len(request.token_ids)),
        )
        self.journal.detach(request)
        self.observers.request_replayed(request.model, reason)
        cut_off = request.attempts - request.handovers
        if cut_off < MAX_ATTEMPTS:
            self._await_worker(request)
            return
        text = f"{cut_off} attempts at this request were cut off; the last: {reason}"
        self._end(request, ModelUnavailable(text, retry_after_s=RETRY_AFTER_S))

    def _stop(self, request: LiveRequest, error: MlxspecError) -> None:
        """End a request from our side, and tell its worker."""
        if request not in self.journal:
            return
        if request.worker is not None:
            self._socket.send(request.worker, Cancel(request_id=request.wire_id))
        self._end(request, error)

    def _abandon(self, requests: Sequence[LiveRequest]) -> None:
        for request in requests:
            self._stop(request, Cancelled("the client went away"))

    def _end(self, request: LiveRequest, event: Ended | MlxspecError) -> None:
        if request not in self.journal:
            return
        self.journal.remove(request)
        for timer in (request.deadline, request.load_deadline):
            if timer is not None:
                timer.cancel()
        request.deliver(event)
        self.observers.request_ended(request.record(event, time.monotonic()))
        if request.is_isolated:
            self._dispatch(request.model)

    # --- dispatch ---

    def _settle(self, model: str) -> None:
        """Bring the waiting requests of `model` to a worker, or to an end if there is no hope for them."""
        self._dispatch(model)
        waiting = self.journal.waiting(model)
        if not waiting:
            return
        try:
            entry = self.directory.resolve(model)
        except MlxspecError as error:
            self._end_all(waiting, error)
            return
        if entry.state == WorkerState.FAILED:
            self._end_all(waiting, failure_of(entry))
        elif entry.state == WorkerState.STOPPED:
            self.control.want(model, lambda error: self._end_all(self.journal.waiting(model), error))

    def _dispatch(self, model: str) -> None:
        """Send what waits for `model`, first come first served; isolated requests go one at a time."""
        for request in self.journal.waiting(model):
            if request.is_isolated and self.journal.has_isolated(model):
                continue
            while request.worker is None and request in self.journal:
                worker = self._pick(request)
                if worker is None:
                    break
                self._place(request, worker)

    def _pick(self, request: LiveRequest) -> str | None:
        outstanding = self._outstanding(request)
        if len(outstanding) < 2:
            return balancer.pick(outstanding)
        return balancer.pick(outstanding, self._prefixes.known_tokens(request.generate.prompt, outstanding))

    def _outstanding(self, request: LiveRequest) -> dict[str, int]:
        """Workers that may take `request`, with the tokens that each still owes."""
        return {
            worker.identity: sum(r.outstanding_tokens() for r in self.journal.on_worker(worker.identity))
            for worker in self.directory.ready_workers(request.model)
            if worker.identity not in self._unreachable
            and worker.identity != request.refused_by
            and self._socket.is_trusted(worker.identity)
        }

    def _end_all(self, requests: Sequence[LiveRequest], error: MlxspecError) -> None:
        for request in requests:
            self._end(request, error)

    # --- workers that go ---

    def _on_table(self) -> None:
        workers = self.directory.workers
        for identity in self.journal.busy_workers():
            entry = workers.get(identity)
            if entry is None or entry.state not in SERVING_STATES:
                self._on_worker_gone(identity)
        self._leaving = {i for i, w in workers.items() if w.state in (WorkerState.DRAINING, WorkerState.STOPPING)}
        self.loads.keep(workers)
        self._unreachable.clear()
        for request in self.journal:
            request.refused_by = None
        self._settle_all()

    def _on_worker_gone(self, identity: str) -> None:
        dead = self.journal.on_worker(identity)
        if identity in self._leaving:
            self._on_worker_left(dead)
            return
        log.error("worker died %s", fields(worker=identity, live_requests=len(dead)))
        for request in verdict.judge(dead):
            text = f"the model's worker died {request.deaths} times while it worked on this request"
            self._end(request, PoisonRequest(text))
        for request in dead:
            if request in self.journal:
                self._take_back(request, "worker_died")

    def _on_worker_left(self, unfinished: Sequence[LiveRequest]) -> None:
        """A worker was made to stop before its requests were done: another takes them, now or when there is one."""
        for request in unfinished:
            entry = self.directory.find(request.model)
            if (entry and entry.gives_way) or self.directory.ready_workers(request.model):
                request.handovers += 1
                self._take_back(request, "worker_stopped")
            else:
                text = f"model {request.model!r} was unloaded before the request had finished"
                self._end(request, ModelUnavailable(text, retry_after_s=RETRY_AFTER_S))

    def _on_connection_lost(self, identity: str) -> None:
        """A worker lives, but what was sent to or by it may be lost: do over what it has, under new ids."""
        for request in self.journal.on_worker(identity):
            self._socket.send(identity, Cancel(request_id=request.wire_id))
            self._take_back(request, "connection_lost")

    # --- what the socket tells ---

    async def run(self) -> None:
        """Receive until cancelled."""
        await self._socket.run(self)

    def worker_connected(self, worker: str) -> None:
        self._on_connection_lost(worker)  # nothing to do for a first hello
        self._settle_all()

    def frame_lost(self, worker: str) -> None:
        self._on_connection_lost(worker)
        self._settle_all()

    def message_received(self, sender: str, message: Progress) -> None:
        match message:
            case Deltas():
                self._on_deltas(sender, message)
            case Load():
                self.loads.take(sender, message, time.monotonic())
            case Accepted() | Finished() | Failed():
                request = self.journal.find(message.request_id, sender)
                if request is not None:
                    self._on_progress(request, message)

    def _on_deltas(self, sender: str, message: Deltas) -> None:
        tokens = 0
        model = ""
        for delta in message.items:
            request = self.journal.find(delta.request_id, sender)
            if request is not None:
                tokens, model = tokens + len(delta.token_ids), request.model
                self._on_delta(request, delta)
        if tokens:
            self.observers.step_received(model, tokens)

    def _on_delta(self, request: LiveRequest, delta: Delta) -> None:
        now = time.monotonic()
        request.token_ids.extend(delta.token_ids)
        request.text_chars += len(delta.text)
        gap_s = None if request.last_token_s is None else now - request.last_token_s
        if delta.token_ids:
            request.steps += 1
            request.first_token_s = request.first_token_s or now
            request.last_token_s = now
            self.observers.tokens_received(request.model, len(delta.token_ids), gap_s)
        if not request.deliver(delta):
            self._stop(request, Cancelled("the client reads too slowly: too many answers are unread"))
        elif request.is_isolated and verdict.is_cleared(request):
            request.is_isolated = False
            self._dispatch(request.model)

    def _on_progress(self, request: LiveRequest, message: Accepted | Finished | Failed) -> None:
        match message:
            case Accepted():
                is_first = request.prompt_tokens is None
                request.prompt_tokens = message.prompt_tokens
                if is_first:
                    request.deliver(message)
            case Finished(reason="cancelled"):
                self._on_refusal(request, ModelUnavailable("the worker gave the request up"))
            case Finished():
                self._end(request, request.ended(message, time.monotonic()))
            case Failed(code=ModelUnavailable.code):
                self._on_refusal(request, ModelUnavailable(message.message, retry_after_s=RETRY_AFTER_S))
            case Failed():
                self._end(request, from_code(message.code, message.message, message.param))

    def _on_refusal(self, request: LiveRequest, error: MlxspecError) -> None:
        """A worker that is about to stop hands a request back: another takes it."""
        request.refused_by = request.worker
        request.refusals += 1
        if request.refusals > MAX_REFUSALS:
            self._end(request, error)
            return
        self._take_back(request, "worker_refused")
        self._settle(request.model)

    def _settle_all(self) -> None:
        for model in self.journal.waiting_models():
            self._settle(model)
