"""What the chaos tests act on: a server with a tiny model, a client that checks every byte, and processes to kill."""

import asyncio
import contextlib
import itertools
import json
import os
import random
import statistics
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
import psutil

from tests.e2e.server import TOP, Serve, is_alive, wait_until

CLIENTS = 8
MOST_WARM_UPS = 30
PROMPTS = ("alpha beta", "one two three one two three", "the river", "a b c a b c a b c", "copper and tin", "snow")
LONG = {"prompt": "a b c d", "temperature": 0, "stream": True, "raw": True, "ignore_eos": True}
DRAFTERS = ("auto", "none", "suffix", "ngram", "layers")


def is_demo() -> bool:
    """Whether the demo model is to serve instead of the tiny one (`scripts/chaos --demo`)."""
    return os.environ.get("MLXSPEC_CHAOS_DEMO") == "1"


MOST_REQUESTS = 100  # in the server at once
# Memory is short, so that MLX's buffers and the prefix cache reach their limits within a warm-up.
CONFIG = f"""
[server]
max_concurrent_requests = {MOST_REQUESTS}
[engine]
prefix_cache_gb = 0.001
[supervisor]
immediate_restarts = 100000
memory_limit_gb = {3.0 if is_demo() else 1.5}
"""


def is_full() -> bool:
    """Whether the long form of each test is wanted (`scripts/chaos --full`)."""
    return os.environ.get("MLXSPEC_CHAOS_FULL") == "1"


def soak_minutes() -> float:
    """How long the soak is to take (`scripts/chaos --soak N`); 0: its short form."""
    return float(os.environ.get("MLXSPEC_CHAOS_SOAK", "0"))


def kills() -> int:
    """How often the loop of kills kills (`scripts/chaos --kills N`)."""
    return int(os.environ.get("MLXSPEC_CHAOS_KILLS", "1000" if is_full() else "3"))


@dataclass(slots=True)
class Take:
    """One answer: its text, its end, and when its pieces came (seconds on the monotonic clock)."""

    text: str = ""
    end: str = ""
    error: str = ""
    times_s: list[float] = field(default_factory=list)

    @property
    def outcome(self) -> tuple[str, str, str]:
        """What has to be the same, whatever happened meanwhile."""
        return self.text, self.end, self.error


@dataclass(frozen=True, slots=True)
class Memory:
    """Bytes of a worker; live arrays (`active`, prefixes among them) and MLX's buffers are parts of its footprint."""

    footprint: int
    active: int
    cache: int
    prefixes: int

    def __str__(self) -> str:
        rest = self.footprint - self.active - self.cache
        parts = {"live": self.active, "of it prefixes": self.prefixes, "buffers": self.cache, "rest": rest}
        return f"{self.footprint >> 20} MB (" + ", ".join(f"{n} {size / 2**20:.1f}" for n, size in parts.items()) + ")"


class Stage:
    """A server that is brought up again when a test has ended it."""

    def __init__(self, models: Path) -> None:
        # The wheel's BLAS gives the same bits for every batch, so that a text that differs is our fault alone. For the
        # demo model it is too slow.
        self.serve = Serve(models, CONFIG, {} if is_demo() else {"MLXSPEC_BLAS": "reference"})
        self.model = "a"
        self._starts = 1
        self._expected: dict[str, Take] = {}

    def ready(self) -> "Stage":
        """Up, with the model loaded."""
        if self.serve.process.poll() is not None:
            self.serve.process = self.serve.start()
            self._starts += 1
        self.serve.wait_ready(times=self._starts)
        self.load()
        return self

    def load(self) -> None:
        def is_loaded() -> bool:
            try:
                return self.serve.request("POST", "/models/load", {"model": self.model})[0] == 200
            except (OSError, ValueError):
                return False

        wait_until(is_loaded, "loaded model", timeout_s=60)

    def worker(self) -> psutil.Process:
        """The process that serves the model now."""

        def find() -> psutil.Process | None:
            alive = [p for p in self.serve.children_named("worker") if self.model in _words(p)]
            return alive[0] if len(alive) == 1 else None

        return wait_until(find, "one worker", timeout_s=60)

    def router(self) -> psutil.Process:
        return wait_until(lambda: next(iter(self.serve.children_named("router")), None), "router", timeout_s=20)

    def facts(self) -> dict[str, Any]:
        found: dict[str, Any] = self.serve.request("GET", f"/models/{self.model}")[1]
        return found

    def stats(self) -> dict[str, Any]:
        found: dict[str, Any] = self.serve.request("GET", "/stats")[1]["models"][self.model]
        return found

    def memory(self) -> Memory:
        """What the worker holds, as /metrics tell; a second old at most."""
        text = self.serve.read("/metrics")
        label = f'{{model_name="{self.model}"}}'

        def figure(name: str) -> int:
            (line,) = (line for line in text.splitlines() if line.startswith(name + label))
            return int(float(line.split()[-1]))

        return Memory(
            footprint=figure("mlxspec_memory_footprint_bytes"),
            active=figure("mlxspec_memory_active_bytes"),
            cache=figure("mlxspec_memory_cache_bytes"),
            prefixes=figure("mlxspec_prefix_cache_bytes"),
        )

    def is_idle(self) -> bool:
        stats = self.stats()
        return not stats["running"] and not stats["requests"]["live"]

    async def expected(self, bodies: Sequence[dict[str, Any]]) -> list[Take]:
        """The undisturbed answers, each asked for alone, once."""
        async with self.session() as session:
            for body in bodies:
                if (key := json.dumps(body, sort_keys=True)) not in self._expected:
                    self._expected[key] = take = await self.ask(session, body)
                    assert not take.error, take.error
        return [self._expected[json.dumps(body, sort_keys=True)] for body in bodies]

    def session(self) -> aiohttp.ClientSession:
        return aiohttp.ClientSession(
            self.serve.url,
            timeout=aiohttp.ClientTimeout(total=240),
            connector=aiohttp.TCPConnector(limit=0, force_close=True),
        )

    async def ask(
        self, session: aiohttp.ClientSession, body: dict[str, Any], on_piece: Callable[[], None] = int
    ) -> Take:
        """One answer, streamed or whole as the body says; what goes wrong is told in it."""
        take = Take()
        try:
            async with session.post("/generate", json=body | {"model": self.model}) as response:
                if response.status != 200:
                    take.error = f"{response.status}: {(await response.text())[:300]}"
                elif body.get("stream"):
                    await _read_stream(response, take, on_piece)
                else:
                    answer = await response.json()
                    take.text, take.end = answer["text"], answer["finish_reason"]
        except (aiohttp.ClientError, TimeoutError, ValueError, OSError) as error:
            take.error = repr(error)
        return take


async def _read_stream(response: aiohttp.ClientResponse, take: Take, on_piece: Callable[[], object]) -> None:
    async for line in response.content:
        if not line.startswith(b"data:") or b"[DONE]" in line:
            continue
        event = json.loads(line[5:])
        if "error" in event:
            take.error = str(event["error"])
        elif text := event.get("text", ""):
            take.text += text
            take.times_s.append(time.monotonic())
            on_piece()
        take.end = event.get("finish_reason") or take.end
    if not take.end and not take.error:
        take.error = "the stream ended without a finish reason"


def bodies(count: int, max_tokens: int = 24) -> list[dict[str, Any]]:
    """Requests in a fixed order: greedy and sampled, streamed and whole, few of them alike."""
    kinds = itertools.product(PROMPTS, (0, 0.9), (True, False))
    some = [
        {"prompt": prompt, "temperature": heat, "seed": 7, "stream": stream, "raw": True, "max_tokens": max_tokens}
        for prompt, heat, stream in kinds
    ]
    return [some[i % len(some)] for i in range(count)]


async def run_clients(stage: Stage, work: Sequence[dict[str, Any]], clients: int) -> list[Take]:
    """All answers in the order of `work`, so many clients at a time."""
    queue = iter(enumerate(work))
    takes: dict[int, Take] = {}

    async def client(session: aiohttp.ClientSession) -> None:
        for i, body in queue:
            takes[i] = await stage.ask(session, body)

    async with stage.session() as session:
        await asyncio.gather(*(client(session) for _ in range(clients)))
    return [takes[i] for i in range(len(work))]


def mixed_bodies(count: int) -> list[dict[str, Any]]:
    """Requests of all lengths, samplers and drafters, streamed and whole, the same in every run."""
    rng, longest = random.Random(1), 48 if is_full() or soak_minutes() else 12
    return [
        {
            "prompt": " ".join(rng.choice(("red", "green", "blue", "one", "two")) for _ in range(rng.randint(1, 80))),
            "raw": True,
            "stream": bool(i % 2),
            "ignore_eos": True,
            "seed": i,
            "max_tokens": rng.randint(1, longest),
            "temperature": rng.choice((0, 0, 0.7, 1.3)),
            "top_p": rng.choice((1.0, 0.9)),
            "top_k": rng.choice((0, 40)),
            "repetition_penalty": rng.choice((1.0, 1.1)),
            "speculative": {"drafter": rng.choice(DRAFTERS)},
        }
        for i in range(count)
    ]


@contextlib.asynccontextmanager
async def streaming(stage: Stage, max_tokens: int) -> AsyncIterator[tuple["asyncio.Task[Take]", asyncio.Event]]:
    """A long answer under way; the event tells of its first piece."""
    begun = asyncio.Event()
    async with stage.session() as session:
        task = asyncio.create_task(stage.ask(session, LONG | {"max_tokens": max_tokens}, begun.set))
        try:
            await asyncio.wait_for(begun.wait(), 60)
            yield task, begun
        finally:
            task.cancel()


async def ttfts_s(stage: Stage, count: int) -> list[float]:
    """Times to the first piece of short answers, one after the other."""
    times = []
    async with stage.session() as session:
        for i in range(count):
            began_s = time.monotonic()
            take = await stage.ask(session, LONG | {"max_tokens": 4, "prompt": f"number {i}"})
            assert not take.error, take.error
            times.append(take.times_s[0] - began_s)
    return times


@contextlib.contextmanager
def slow_loris(port: int, sockets: int) -> Iterator[None]:
    """Within it so many connections of another process send a byte of their request's head a second."""
    command = [sys.executable, "-m", "tests.e2e.loris", str(port), str(sockets)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=TOP) as process:
        assert process.stdin and process.stdout
        assert process.stdout.readline() == b"ready\n"
        yield
        process.stdin.close()


async def warm_up(stage: Stage, work: list[dict[str, Any]], clients: int) -> None:
    """Let prefix cache, slots and MLX's buffers reach their size: until three rounds add next to nothing."""
    worker = stage.worker()
    highest, calm_rounds = 0, 0
    for _ in range(MOST_WARM_UPS):
        await run_clients(stage, work, clients)
        grown = worker.memory_info().rss - highest
        highest = max(highest, worker.memory_info().rss)
        calm_rounds = calm_rounds + 1 if grown < 8 << 20 else 0
        if calm_rounds == 3:
            return


def differences(takes: Sequence[Take], expected: Sequence[Take]) -> list[str]:
    """One line for each answer that is not the expected one."""
    return [
        f"{i}: {got.outcome} instead of {want.outcome}"
        for i, (got, want) in enumerate(zip(takes, expected, strict=True))
        if got.outcome != want.outcome
    ]


def percentile(values: Sequence[float], part: int) -> float:
    """The smallest value that `part` per cent do not exceed."""
    return statistics.quantiles(values, n=100, method="inclusive")[part - 1] if len(values) > 1 else values[0]


def open_things(process: psutil.Process) -> tuple[int, int]:
    """Open files and threads of a process."""
    return process.num_fds(), process.num_threads()


def _words(process: psutil.Process) -> list[str]:
    try:
        return list(process.cmdline()) if is_alive(process) else []
    except psutil.Error:
        return []
