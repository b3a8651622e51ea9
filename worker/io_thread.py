"""The I/O thread of a served model: owns both sockets and all text; tokens in, tokens out, signs of life."""

import asyncio
import logging
import os
import queue
import threading
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import zmq.asyncio

from common import sockets, wire
from common.config import Config
from common.errors import InternalError, MlxspecError, ModelUnavailable
from common.logs import fields
from common.messages import (
    Accepted,
    AskHello,
    Cancel,
    ChosenLogprob,
    Delta,
    Deltas,
    Drain,
    Exit,
    Failed,
    Finished,
    Generate,
    Heartbeat,
    Message,
    ModelFacts,
    SetLimits,
    StateChanged,
    Timings,
    Usage,
    WorkerHello,
)
from common.sampling import check_drafter, check_vocabulary
from common.states import ExitCode, WorkerState
from worker import limits
from worker.detokenize import Detokenizer, TextStream
from worker.engine import Engine
from worker.load_report import load_of
from worker.loop import CancelRequest, NewLimits, Order, Pulse, Stop, Submit
from worker.report import Gain, StepReport
from worker.request import Request
from worker.template import check_length, to_tokens
from worker.token_text import TokenTexts

LOAD_REPORT_S = 1.0
ANNOUNCE_S = 0.1  # that the MLX thread waits at most for its phase to be told

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Name:
    """Who this worker is on the bus."""

    identity: str
    token: str
    model: str
    pid: int


@dataclass(frozen=True, slots=True)
class Served:
    """What the I/O thread needs of a loaded model. Of `engine` it reads counters only."""

    engine: Engine
    tokenizer: Any
    facts: ModelFacts
    end_tokens: frozenset[int]
    texts: TokenTexts


class IoThread:
    """Runs an event loop in its own thread; the MLX thread talks to it by `ready` and `publish`."""

    def __init__(self, name: Name, run_dir: Path, config: Config, pulse: Pulse) -> None:
        self.name = name
        self.config = config
        self.pulse = pulse
        self.orders: queue.SimpleQueue[Order] = queue.SimpleQueue()
        self._run_dir = run_dir
        self._served: Served | None = None
        self._state = WorkerState.LOADING
        self._streams: dict[str, TextStream] = {}
        self._apology: asyncio.Future[Any] | None = None  # a hello that waits until the router reads
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._main, name="io", daemon=True)

    # --- called by the MLX thread -------------------------------------------------------------------------

    def start(self) -> None:
        """Connect and say hello, while the model is loading."""
        self._thread.start()

    def ready(self, served: Served) -> None:
        """The model answers from now on."""
        self._loop.call_soon_threadsafe(self._become_ready, served)

    def publish(self, report: StepReport) -> None:
        """Hand out what a step gave."""
        self._loop.call_soon_threadsafe(self._on_report, report)

    def announce(self) -> None:
        """Tell the supervisor of the phase before it begins: what follows may keep this thread from talking."""
        sent = threading.Event()

        def tell() -> None:
            self._send(self._control, self._heartbeat())
            sent.set()

        self._loop.call_soon_threadsafe(tell)
        sent.wait(ANNOUNCE_S)

    def stop(self) -> None:
        """End the loop, or the process if it is still loading: there is nobody yet who would take the order."""
        if self._state is WorkerState.LOADING:
            os._exit(ExitCode.OK)
        self.orders.put(Stop())

    # --- the thread -----------------------------------------------------------------------------------------

    def _main(self) -> None:
        try:
            self._loop.run_until_complete(self._serve())
        except BaseException:
            log.exception("The I/O thread broke.")
            raise
        finally:
            self.orders.put(Stop())

    async def _serve(self) -> None:
        context = zmq.asyncio.Context()
        identity = self.name.identity
        self._control, control_events = sockets.connect_watched_dealer(
            context, self._run_dir / sockets.CONTROL_SOCKET, identity
        )
        self._data, data_events = sockets.connect_watched_dealer(context, self._run_dir / sockets.DATA_SOCKET, identity)
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(_greet(control_events, self._greet_supervisor))
            tasks.create_task(_greet(data_events, self._greet_router))
            tasks.create_task(self._receive_orders())
            tasks.create_task(self._receive_requests())
            tasks.create_task(self._beat())
            tasks.create_task(self._report_load())

    async def _greet_supervisor(self) -> None:
        await self._control.send(wire.encode(self._hello()))
        await self._announce()

    async def _greet_router(self) -> None:
        self._drop_all()  # they belonged to a router that is gone
        if self._apology is None or self._apology.done():
            await self._data.send(wire.encode(self._hello()))

    def _on_data_lost(self) -> None:
        """The router reads too slowly, or is gone: its requests end here, so that none goes on with a gap.

        It does them over when it reads the hello that waits for it.
        """
        if self._streams:
            log.warning("The router does not read: its requests are given up. %s", fields(live=len(self._streams)))
        self._drop_all()
        if self._apology is None or self._apology.done():
            self._apology = asyncio.ensure_future(self._data.send(wire.encode(self._hello())))

    def _drop_all(self) -> None:
        for request_id in list(self._streams):
            self._drop(request_id)

    def _hello(self) -> WorkerHello:
        return WorkerHello(identity=self.name.identity, token=self.name.token, model=self.name.model, pid=self.name.pid)

    async def _announce(self) -> None:
        facts = self._served.facts if self._served and self._state is WorkerState.READY else None
        await self._control.send(wire.encode(StateChanged(state=self._state, facts=facts)))

    def _become_ready(self, served: Served) -> None:
        self._served = served
        self._change_state(WorkerState.READY)

    def _change_state(self, state: WorkerState) -> None:
        self._state = state
        self._send(self._control, StateChanged(state=state, facts=self._served.facts if self._served else None))

    # --- orders of the supervisor ------------------------------------------------------------------------------

    async def _receive_orders(self) -> None:
        while True:
            match wire.decode_worker_order(await self._control.recv()):
                case SetLimits(kv_bytes=kv_bytes, cache_bytes=cache_bytes, shrink=shrink):
                    self.orders.put(NewLimits(kv_bytes, cache_bytes, shrink))
                case Drain():
                    self._change_state(WorkerState.DRAINING)
                    self._stop_if_drained()
                case Exit():
                    self.stop()

    def _stop_if_drained(self) -> None:
        if self._state is WorkerState.DRAINING and not self._streams:
            self.orders.put(Stop())

    async def _beat(self) -> None:
        while True:
            self._send(self._control, self._heartbeat())
            await asyncio.sleep(self.config.supervisor.heartbeat_s)

    def _heartbeat(self) -> Heartbeat:
        return Heartbeat(
            loop_seq=self.pulse.seq,
            phase=self.pulse.phase,
            running=self.pulse.running,
            waiting=self.pulse.waiting,
            finished=self._served.engine.totals.finished if self._served else 0,
            active_bytes=limits.active_bytes(),
            cache_bytes=limits.cache_bytes(),
            footprint_bytes=limits.footprint_bytes(),
            kv_bytes=self.pulse.kv_bytes,
            slowest_step_s=self.pulse.slowest_step_s,
        )

    # --- requests of the router ----------------------------------------------------------------------------------

    async def _receive_requests(self) -> None:
        while True:
            match wire.decode_to_worker(await self._data.recv()):
                case Generate() as generate:
                    self._start(generate)
                case Cancel(request_id=request_id):
                    self._drop(request_id)
                case AskHello():
                    await self._greet_router()

    def _start(self, generate: Generate) -> None:
        try:
            request = self._accept(generate)
        except MlxspecError as error:
            self._fail(generate.request_id, error)
        except Exception as error:  # one request's prompt must not end the others
            log.exception("Cannot prepare a prompt. %s", fields(request=generate.request_id))
            self._fail(generate.request_id, InternalError(f"the prompt could not be prepared: {error}"))
        else:
            self._send(self._data, Accepted(request_id=generate.request_id, prompt_tokens=len(request.prompt)))
            self.orders.put(Submit(request))
            if self._streams[generate.request_id].is_stopped:  # its last worker died with the end in its hands
                self.orders.put(CancelRequest(generate.request_id))

    def _accept(self, generate: Generate) -> Request:
        served = self._served
        if served is None or self._state is not WorkerState.READY:
            raise ModelUnavailable(f"{self.name.model} is {self._state}: it takes no request now")
        check_drafter(generate.speculation, served.facts.drafters)
        check_vocabulary(generate.sampling, served.facts.vocabulary)
        prompt = to_tokens(generate.prompt, served.tokenizer, served.facts.vocabulary)
        max_tokens = check_length(len(prompt), generate.max_tokens, served.facts.context_tokens)
        stream = text_stream(served.tokenizer, served.end_tokens, generate.stop)
        stream.push(generate.resume)
        self._streams[generate.request_id] = stream
        return Request(
            request_id=generate.request_id,
            prompt=tuple(prompt),
            sampling=generate.sampling,
            max_tokens=max_tokens,
            end_tokens=frozenset() if generate.ignore_eos else served.end_tokens,
            speculation=generate.speculation,
            resume=generate.resume,
            arrived_s=served.engine.clock(),
            logprobs=generate.logprobs,
            scope=generate.scope,
            priority=generate.priority,
        )

    def _drop(self, request_id: str) -> None:
        if self._streams.pop(request_id, None) is not None:
            self.orders.put(CancelRequest(request_id))
            self._stop_if_drained()

    # --- what the loop gives ---------------------------------------------------------------------------------------

    def _on_report(self, report: StepReport) -> None:
        deltas: list[Delta] = []
        ends: list[Message] = []
        for gain in report.gains:
            stream = self._streams.get(gain.request_id)
            if stream is None:
                continue
            if delta := self._advance(stream, gain):
                deltas.append(delta)
            if end := self._end(stream, gain):
                ends.append(end)
                del self._streams[gain.request_id]
        steps = [Deltas(step=report.step, items=tuple(deltas))] if deltas else []
        for message in (*steps, *ends):
            if not self._send(self._data, message):
                break  # an end must not overtake its tokens
        self._stop_if_drained()

    def _advance(self, stream: TextStream, gain: Gain) -> Delta | None:
        """The tokens and the text that a request gained; a stop string ends it here and frees its row."""
        if stream.is_stopped:
            return None
        before = stream.tokens
        text, drafted_chars, logprobs = self._push(stream, gain)
        if gain.finish:
            text += stream.finish()
        elif stream.is_stopped:
            self.orders.put(CancelRequest(gain.request_id))
        tokens = gain.tokens[: stream.tokens - before]
        if not tokens and not text:
            return None
        return Delta(
            request_id=gain.request_id, token_ids=tokens, text=text, drafted_chars=drafted_chars, logprobs=logprobs
        )

    def _push(self, stream: TextStream, gain: Gain) -> tuple[str, int, tuple[ChosenLogprob, ...]]:
        """The text that may be sent, its part of drafted tokens, and log-probabilities up to a stop string."""
        if not gain.logprobs:
            drafted = stream.push(gain.tokens[: gain.accepted]) if gain.accepted else ""
            rest = "" if stream.is_stopped else stream.push(gain.tokens[gain.accepted :])
            return drafted + rest, len(drafted), ()
        assert self._served is not None
        sent, chosen = "", []
        for token, logprob in zip(gain.tokens, gain.logprobs, strict=True):
            if not stream.is_stopped:
                chosen.append(self._served.texts.chosen(token, logprob, stream.characters))
                sent += stream.push([token])
        return sent, 0, tuple(chosen)

    def _end(self, stream: TextStream, gain: Gain) -> Message | None:
        if gain.error is not None:
            return _failed(gain.request_id, gain.error)
        if gain.finish is None:
            return None
        usage = gain.usage or Usage(prompt_tokens=0, completion_tokens=0)
        timings = gain.timings or Timings()
        if not stream.is_stopped:
            return Finished(request_id=gain.request_id, reason=gain.finish, usage=usage, timings=timings)
        return Finished(
            request_id=gain.request_id,
            reason="stop",
            usage=msgspec.structs.replace(usage, completion_tokens=stream.tokens),
            timings=timings,
        )

    def _fail(self, request_id: str, error: MlxspecError) -> None:
        self._streams.pop(request_id, None)
        self._send(self._data, _failed(request_id, error))

    # --- figures ------------------------------------------------------------------------------------------------------

    async def _report_load(self) -> None:
        while True:
            if self._served is not None:
                self._send(self._data, load_of(self._served.engine, self.pulse))
            await asyncio.sleep(LOAD_REPORT_S)

    def _send(self, socket: zmq.asyncio.Socket, message: Message) -> bool:
        """Send without waiting, in order; False when the peer does not take it."""
        if sockets.send_now(socket, [wire.encode(message)]):
            return True
        log.debug("A message found no reader. %s", fields(kind=type(message).__name__))
        if socket is self._data:
            self._on_data_lost()
        return False


async def _greet(events: zmq.asyncio.Socket, say: Callable[[], Awaitable[None]]) -> None:
    """Say hello after each connection: the first one, and those to a peer that was started again."""
    while True:
        await events.recv_multipart()
        await say()


def _failed(request_id: str, error: MlxspecError) -> Failed:
    return Failed(request_id=request_id, code=error.code, message=error.message, param=error.param)


def text_stream(tokenizer: Any, end_tokens: frozenset[int], stop: tuple[str, ...] = ()) -> TextStream:
    """An empty text stream for one request to this tokenizer's model."""

    def decode(tokens: list[int]) -> str:
        text: str = tokenizer.decode(tokens, skip_special_tokens=True)
        return text

    return TextStream(Detokenizer(decode), stop, end_tokens)
