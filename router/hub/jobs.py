"""Downloads that run beside the server: each a child process, watched and told of by number."""

import asyncio
import contextlib
import itertools
import logging
import os
import signal
import sys
import time
from collections.abc import AsyncIterator, Coroutine
from dataclasses import dataclass, field
from pathlib import Path

import msgspec

from common import lifeline
from common.errors import HubError, MlxspecError, NotFound, Overloaded, from_code
from common.logs import fields
from router.hub.wishes import Progress, Wish, check_wish

log = logging.getLogger(__name__)
MODULE = "router.hub"
AT_ONCE = 2
MAX_WAITING = 32
KEPT = 64  # finished jobs that are remembered
STOP_S = 5.0
MAX_LINE_BYTES = 1 << 16


class LineError(msgspec.Struct, frozen=True, kw_only=True):
    code: str
    message: str


class Line(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A line of a download process: one of the three."""

    progress: Progress | None = None
    path: str | None = None
    error: LineError | None = None


class JobState(msgspec.Struct, frozen=True, kw_only=True):
    """A job as it is told. `status`: waiting, running, done, failed or cancelled."""

    id: str
    model: str
    name: str
    revision: str | None
    quantize: str | None
    status: str
    stage: str
    done_bytes: int
    total_bytes: int
    bytes_per_s: float | None
    path: str | None
    error: LineError | None
    created_at: int


@dataclass(slots=True)
class Job:
    """One download. `changed` is replaced at each change, so that any number of readers can wait for the next one."""

    id: str
    wish: Wish
    status: str = "waiting"
    progress: Progress = field(default_factory=lambda: Progress(stage="waiting"))
    path: str | None = None
    error: MlxspecError | None = None
    created_at: int = field(default_factory=lambda: int(time.time()))
    first: tuple[float, int] | None = None  # when bytes began to come, and how many were there
    bytes_per_s: float | None = None
    changed: asyncio.Event = field(default_factory=asyncio.Event)
    task: "asyncio.Task[None] | None" = None

    @property
    def is_over(self) -> bool:
        return self.status in ("done", "failed", "cancelled")

    def state(self) -> JobState:
        return JobState(
            id=self.id,
            model=self.wish.id,
            name=self.wish.name,
            revision=self.wish.revision,
            quantize=self.wish.quantize,
            status=self.status,
            stage=self.progress.stage,
            done_bytes=self.progress.done_bytes,
            total_bytes=self.progress.total_bytes,
            bytes_per_s=self.bytes_per_s,
            path=self.path,
            error=None if self.error is None else LineError(code=self.error.code, message=self.error.message),
            created_at=self.created_at,
        )

    def take(self, line: Line, now_s: float) -> None:
        """What the process said."""
        if line.progress is not None:
            self._advance(line.progress, now_s)
        if line.path is not None:
            self.path, self.status = line.path, "done"
        if line.error is not None:
            self.error, self.status = from_code(line.error.code, line.error.message), "failed"
        self.tell()

    def _advance(self, progress: Progress, now_s: float) -> None:
        self.progress = progress
        if progress.stage != "downloading":
            return
        self.first = self.first or (now_s, progress.done_bytes)
        elapsed_s = now_s - self.first[0]
        if elapsed_s > 0:
            self.bytes_per_s = round((progress.done_bytes - self.first[1]) / elapsed_s)

    def tell(self) -> None:
        changed, self.changed = self.changed, asyncio.Event()
        changed.set()


class JobDesk:
    """All jobs of this server. Its methods run on the event loop."""

    def __init__(self, command: tuple[str, ...] = (sys.executable, "-P", "-m", MODULE)) -> None:
        self.jobs: dict[str, Job] = {}
        self._command = command
        self._numbers = itertools.count(1)
        self._later: set[asyncio.Task[None]] = set()
        self._places = asyncio.Semaphore(AT_ONCE)

    def start(self, wish: Wish) -> Job:
        """Begin a download, or join the one that makes the same model. Raises `InvalidValue` or `Overloaded`."""
        check_wish(wish)
        live = [job for job in self.jobs.values() if not job.is_over]
        for job in live:
            if job.wish == wish:
                return job
        if len(live) >= AT_ONCE + MAX_WAITING:
            raise Overloaded(f"{len(live)} downloads run or wait; try again when some have ended (GET /hf/jobs)")
        self._forget_old()
        job = Job(id=f"{next(self._numbers)}", wish=wish)
        self.jobs[job.id] = job
        job.task = asyncio.get_running_loop().create_task(self._run(job), name=f"download {wish.name}")
        return job

    def find(self, job_id: str) -> Job:
        """The job of that number. Raises `NotFound`."""
        try:
            return self.jobs[job_id]
        except KeyError:
            raise NotFound(f"there is no job {job_id[:32]!r}; GET /hf/jobs lists them") from None

    async def cancel(self, job: Job) -> None:
        """End it; what came stays for a later try. A job that is over stays as it is."""
        if job.task is not None and not job.is_over:
            job.task.cancel()
            await asyncio.wait([job.task], timeout=2 * STOP_S)

    def afterwards(self, job: Job, work: Coroutine[None, None, None]) -> None:
        """Do something in the background that waits for the job itself; its errors go to the log."""

        async def guarded() -> None:
            try:
                await work
            except MlxspecError as error:
                log.warning("nothing follows a download %s", fields(job=job.id, model=job.wish.name, error=error))

        task = asyncio.get_running_loop().create_task(guarded(), name=f"after download {job.wish.name}")
        self._later.add(task)
        task.add_done_callback(self._later.discard)

    async def close(self) -> None:
        """End all of them, and what was to follow them."""
        for task in self._later:
            task.cancel()
        await asyncio.gather(*(self.cancel(job) for job in self.jobs.values()))

    async def wait(self, job: Job) -> Path:
        """The model's folder when the job is done. Raises its error."""
        async for _ in self.watch(job):
            pass
        if job.path is not None:
            return Path(job.path)
        raise job.error or HubError(f"the download of {job.wish.name} was cancelled")

    async def watch(self, job: Job, pause_s: float | None = None) -> AsyncIterator[JobState | None]:
        """Its state, now and at each change, until it is over; None when nothing has changed for `pause_s`."""
        while True:
            changed = job.changed
            yield job.state()
            if job.is_over:
                return
            while not changed.is_set():
                try:
                    await asyncio.wait_for(changed.wait(), pause_s)
                except TimeoutError:
                    yield None

    async def _run(self, job: Job) -> None:
        try:
            async with self._places:
                job.status = "running"
                await self._download(job)
        except asyncio.CancelledError:
            job.status = "cancelled"
        except Exception as error:
            log.exception("a download broke %s", fields(job=job.id))
            job.status, job.error = "failed", HubError(f"the download process broke: {error}")
        if not job.is_over:
            job.status, job.error = "failed", HubError("the download process ended without a word; try again")
        log.info("download ended %s", fields(job=job.id, model=job.wish.name, status=job.status))
        job.tell()

    async def _download(self, job: Job) -> None:
        read_end, write_end = os.pipe()
        try:
            process = await asyncio.create_subprocess_exec(
                *self._command,
                msgspec.json.encode(job.wish).decode(),
                stdin=asyncio.subprocess.DEVNULL,
                stdout=asyncio.subprocess.PIPE,
                limit=MAX_LINE_BYTES,
                env=os.environ | {lifeline.VARIABLE: str(read_end)},
                pass_fds=(read_end,),
                start_new_session=True,
            )
        except BaseException:
            os.close(write_end)
            raise
        finally:
            os.close(read_end)
        try:
            assert process.stdout is not None
            async for raw in process.stdout:
                job.take(msgspec.json.decode(raw, type=Line), time.monotonic())
            await process.wait()
        finally:
            os.close(write_end)
            await _end(process)

    def _forget_old(self) -> None:
        over = [job_id for job_id, job in self.jobs.items() if job.is_over]
        for job_id in over[: max(0, len(over) - KEPT + 1)]:
            del self.jobs[job_id]


async def _end(process: asyncio.subprocess.Process) -> None:
    """End the process and its own children, first asking."""
    if process.returncode is not None:
        return
    for number in (signal.SIGTERM, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, number)
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(process.wait(), STOP_S)
            return
