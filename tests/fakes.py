"""A supervisor and workers that speak the real protocol over real sockets, and do what a test tells them."""

import asyncio
import contextlib
import shutil
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path

import aiohttp
import msgspec
import zmq.asyncio

from common import sockets, wire
from common.config import Config
from common.keys import Keys
from common.messages import (
    Accepted,
    AskHello,
    Cancel,
    ChosenLogprob,
    Delta,
    Deltas,
    EnsureModel,
    Failed,
    Finished,
    FromWorkerData,
    Generate,
    Message,
    ModelEntry,
    ModelTable,
    Pin,
    Reload,
    Reply,
    Status,
    Timings,
    TokenLogprob,
    Unload,
    Usage,
    Watch,
    WorkerEntry,
    WorkerHello,
)
from common.states import WorkerState
from router.app_keys import STATE, ServerState
from router.listener import listen
from router.names import Names
from router.server import connect, init_app, make_runner

PROMPT_TOKENS = 7
CACHED_TOKENS = 2
BUDGET_BYTES = 1000
FIRST_TOKEN_ID = 100


async def wait_until(condition: Callable[[], object], timeout_s: float = 5.0) -> None:
    """Poll until `condition` holds."""
    end = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > end:
            raise AssertionError("condition did not come true in time")
        await asyncio.sleep(0.005)


def piece(position: int) -> str:
    """The text that every fake worker writes at a position: lost and doubled tokens show."""
    return f"{position} "


def logprob(position: int, alternatives: int) -> ChosenLogprob:
    """What every fake worker tells of its token at a position; the last alternative is half a character."""
    token_id = FIRST_TOKEN_ID + position
    best = [
        TokenLogprob(token_id=token_id + 1000 * i, text=piece(position) + "?" * i, logprob=-0.5 - i)
        for i in range(alternatives)
    ]
    if alternatives > 1:
        best[-1] = TokenLogprob(token_id=9, text="\ufffd", raw=(0xC3,), logprob=-9.0)
    return ChosenLogprob(
        token_id=token_id,
        text=piece(position),
        logprob=-0.5,
        text_offset=len(whole_text(position)),
        top=tuple(best),
    )


def whole_text(tokens: int) -> str:
    return "".join(piece(position) for position in range(tokens))


class FakeSupervisor:
    """Publishes the model table that a test makes, and records calls."""

    def __init__(self, context: zmq.asyncio.Context, run_dir: Path) -> None:
        self.context = context
        self.models: dict[str, ModelEntry] = {}
        self.default_model: str | None = None
        self.ensured: list[EnsureModel] = []
        self.unloaded: list[Unload] = []
        self.pins: list[Pin] = []
        self.on_ensure: Callable[[EnsureModel], str] = lambda call: ""  # an error code, or none
        self.on_unload: Callable[[Unload], str] = lambda call: ""
        self.watches = 0
        self.is_answering = True
        self._revision = 0
        self._clients: set[bytes] = set()
        self._socket = sockets.bind_router(context, run_dir / sockets.CONTROL_SOCKET)

    async def run(self) -> None:
        while True:
            client, frame = await self._socket.recv_multipart()
            match wire.decode_to_supervisor(frame):
                case Watch():
                    self.watches += 1
                    self._clients.add(client)
                    if self.is_answering:
                        self._send(client, self._table())
                case EnsureModel() as call:
                    self.ensured.append(call)
                    self._send(client, Reply(call_id=call.call_id, code=self.on_ensure(call), message="told so"))
                case Pin() as call:
                    self.pins.append(call)
                    self._send(client, Reply(call_id=call.call_id))
                case Reload() as call:
                    self._send(client, Reply(call_id=call.call_id, message="changed engine.kv_bits\nremoved model old"))
                case Status() as call:
                    self._send(client, Reply(call_id=call.call_id))
                case Unload() as call:
                    self.unloaded.append(call)
                    self._send(client, Reply(call_id=call.call_id, code=self.on_unload(call), message="told so"))

    def set(self, name: str, state: WorkerState, *workers: "FakeWorker", **more: object) -> None:
        """Put a model with its workers in the table; the first one is the default."""
        self.default_model = self.default_model or name
        entries = tuple(worker.entry for worker in workers)
        self.models[name] = msgspec.structs.replace(
            ModelEntry(name=name, path=f"/models/{name}", state=state, workers=entries), **more
        )
        self.publish()

    def remove(self, name: str) -> None:
        del self.models[name]
        self.publish()

    def publish(self) -> None:
        self._revision += 1
        for client in self._clients:
            self._send(client, self._table())

    def _table(self) -> ModelTable:
        return ModelTable(
            revision=self._revision,
            default_model=self.default_model,
            memory_budget_bytes=BUDGET_BYTES,
            models=tuple(self.models.values()),
        )

    def _send(self, client: bytes, message: Message) -> None:
        sockets.send_now(self._socket, [client, wire.encode(message)])


class FakeWorker:
    """Answers each request with `max_tokens` numbers; a test may hold it back, or speak for it."""

    def __init__(self, context: zmq.asyncio.Context, run_dir: Path, identity: str) -> None:
        self.identity = identity
        self.model = identity.partition("#")[0]
        self.entry = WorkerEntry(identity=identity, token=f"token of {identity}", state=WorkerState.READY, pid=1)
        self.generates: list[Generate] = []
        self.cancels: list[str] = []
        self.asked_hellos = 0
        self.hold_at: int | None = None  # tokens of a request after which it goes silent
        self.is_silent = False  # not even Accepted
        self.drafted_chars = 0  # of each token's text
        self.answer: Callable[[Generate], FromWorkerData | None] = lambda generate: None
        self._steps = 0
        self._socket = sockets.connect_dealer(context, run_dir / sockets.DATA_SOCKET, identity)

    async def run(self) -> None:
        while True:
            (frame,) = await self._socket.recv_multipart()
            match wire.decode_to_worker(frame):
                case Generate() as generate:
                    self.generates.append(generate)
                    await self._work(generate)
                case Cancel(request_id=request_id):
                    self.cancels.append(request_id)
                case AskHello():
                    self.asked_hellos += 1

    async def hello(self, **changes: object) -> None:
        hello = WorkerHello(identity=self.identity, token=self.entry.token, model=self.model, pid=1)
        await self.send(msgspec.structs.replace(hello, **changes))

    async def send(self, message: FromWorkerData) -> None:
        await self.send_frame(wire.encode(message))

    async def send_frame(self, frame: bytes) -> None:
        await self._socket.send_multipart([frame])

    async def finish(self, generate: Generate, start: int | None = None) -> None:
        """All tokens from `start` (default: after the resumed ones), then the end."""
        limit = generate.max_tokens or 0
        for position in range(len(generate.resume) if start is None else start, limit):
            await self.send_token(generate, position)
        await self.send(finished(generate.request_id, limit))

    async def send_token(self, generate: Generate, position: int) -> None:
        self._steps += 1
        asked = generate.logprobs
        delta = Delta(
            request_id=generate.request_id,
            token_ids=(FIRST_TOKEN_ID + position,),
            text=piece(position),
            drafted_chars=self.drafted_chars,
            logprobs=() if asked is None else (logprob(position, asked),),
        )
        await self.send(Deltas(step=self._steps, items=(delta,)))

    async def _work(self, generate: Generate) -> None:
        if self.is_silent:
            return
        if (message := self.answer(generate)) is not None:
            await self.send(message)
            return
        await self.send(Accepted(request_id=generate.request_id, prompt_tokens=PROMPT_TOKENS))
        if self.hold_at is None:
            await self.finish(generate)
            return
        for position in range(len(generate.resume), min(self.hold_at, generate.max_tokens or 0)):
            await self.send_token(generate, position)


def finished(request_id: str, tokens: int, reason: str = "length", **timings: float) -> Finished:
    return Finished(
        request_id=request_id,
        reason=reason,
        usage=Usage(
            prompt_tokens=PROMPT_TOKENS,
            completion_tokens=tokens,
            cached_tokens=CACHED_TOKENS,
            drafted_tokens=4,
            accepted_tokens=3,
            steps=max(1, tokens - 3),
        ),
        timings=Timings(queue_s=0.001, prefill_s=0.002, decode_s=0.003, **timings),
    )


def failed(code: str, message: str = "no") -> Callable[[Generate], FromWorkerData | None]:
    """A worker's answer that refuses every request."""
    return lambda generate: Failed(request_id=generate.request_id, code=code, message=message)


class Cluster:
    """A router with its HTTP server in this process, a fake supervisor and any number of fake workers."""

    def __init__(self, config: Config, run_dir: Path, keys: Keys) -> None:
        self.config = config
        self.run_dir = run_dir
        self.context = zmq.asyncio.Context()
        self.supervisor = FakeSupervisor(self.context, run_dir)
        self.backend = connect(config, self.context, run_dir, Names(config, run_dir / "state.json"))
        self.app = init_app(config, self.backend, keys)
        self.http: aiohttp.ClientSession
        self.port = 0
        self.workers: list[FakeWorker] = []
        self._tasks: list[asyncio.Task[None]] = []

    @property
    def state(self) -> ServerState:
        return self.app[STATE]

    async def add_worker(self, identity: str = "tiny#1", *, is_greeted: bool = True) -> FakeWorker:
        """A connected worker; it is not in the table yet."""
        worker = FakeWorker(self.context, self.run_dir, identity)
        self.workers.append(worker)
        self._spawn(worker.run())
        if is_greeted:
            await worker.hello()
        return worker

    async def serve_model(self, identity: str = "tiny#1") -> FakeWorker:
        """A ready model with one worker that has said hello."""
        worker = await self.add_worker(identity)
        self.supervisor.set(worker.model, WorkerState.READY, worker)
        await wait_until(lambda: self.is_usable(worker))
        return worker

    def is_usable(self, worker: FakeWorker) -> bool:
        return self.backend._socket.is_trusted(worker.identity)

    async def open(self) -> None:
        self._spawn(self.supervisor.run())
        self._spawn(self.backend.run())
        self._spawn(self.backend.control.run())
        self._runner = make_runner(self.app)
        await self._runner.setup()
        self._door = await listen(self._runner, "127.0.0.1", 0, self.config.server.max_connections)
        self.port = self._door.sockets[0].getsockname()[1]
        self.http = aiohttp.ClientSession(f"http://127.0.0.1:{self.port}")
        await wait_until(lambda: self.backend.directory.table)

    async def close(self) -> None:
        await self.http.close()
        self._door.close()
        await self._runner.cleanup()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self.context.destroy(linger=0)

    def _spawn(self, work: "asyncio._CoroutineLike[None]") -> None:
        self._tasks.append(asyncio.create_task(work))


@contextlib.contextmanager
def short_run_dir() -> Iterator[Path]:
    """A run directory whose name is short enough for ipc."""
    run_dir = Path(tempfile.mkdtemp(prefix="mlxspec-", dir="/tmp"))
    try:
        yield run_dir
    finally:
        shutil.rmtree(run_dir, ignore_errors=True)


@contextlib.asynccontextmanager
async def running_cluster(config: Config | None = None, keys: Keys | None = None) -> AsyncIterator[Cluster]:
    """A cluster in a run directory of its own."""
    with short_run_dir() as run_dir:
        cluster = Cluster(config or Config(), run_dir, keys or Keys())
        await cluster.open()
        try:
            yield cluster
        finally:
            await cluster.close()
