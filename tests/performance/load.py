"""A load generator for any server with OpenAI's streamed chat completions."""

import asyncio
import json
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import aiohttp

TIMEOUT_S = 3600.0
LINE_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class Server:
    """Where to ask, and what the model is called there."""

    name: str
    url: str
    model: str


@dataclass(slots=True)
class Answer:
    """One streamed answer. Token counts are the server's own; times in seconds since the request was sent."""

    text: str = ""
    tokens: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    ttft_s: float | None = None
    total_s: float = 0.0
    finish_reason: str | None = None
    error: str | None = None


@dataclass(frozen=True, slots=True)
class Measured:
    """What a number of clients got; `answers` are in the order of the prompts."""

    wall_s: float
    answers: list[Answer] = field(default_factory=list)

    @property
    def errors(self) -> list[str]:
        return [answer.error for answer in self.answers if answer.error]

    @property
    def tokens(self) -> int:
        return sum(answer.tokens for answer in self.answers)

    @property
    def tokens_per_s(self) -> float:
        return self.tokens / self.wall_s

    @property
    def ttfts_s(self) -> list[float]:
        """Of all answers with a text; an empty answer has none."""
        return [answer.ttft_s for answer in self.answers if answer.ttft_s is not None]

    @property
    def ttft_p50_s(self) -> float:
        return statistics.median(self.ttfts_s)

    @property
    def ttft_max_s(self) -> float:
        return max(self.ttfts_s)


def chat(prompt: str, max_tokens: int, **fields: Any) -> dict[str, Any]:
    """The body of a chat request, greedy unless `fields` say otherwise."""
    return {"messages": [{"role": "user", "content": prompt}], "max_tokens": max_tokens, "temperature": 0, **fields}


async def measure(server: Server, bodies: Sequence[dict[str, Any]], clients: int) -> Measured:
    """Send all requests, in order, `clients` at a time."""
    answers = [Answer() for _ in bodies]
    queue = iter(zip(bodies, answers, strict=True))

    async def client(session: aiohttp.ClientSession) -> None:
        for body, answer in queue:
            await ask(session, server, body, answer)

    async with open_session() as session:
        began = time.perf_counter()
        await asyncio.gather(*(client(session) for _ in range(clients)))
        return Measured(time.perf_counter() - began, answers)


def open_session() -> aiohttp.ClientSession:
    timeout = aiohttp.ClientTimeout(total=TIMEOUT_S)
    # No limit of connections: it would hide a queue in the client.
    return aiohttp.ClientSession(timeout=timeout, connector=aiohttp.TCPConnector(limit=0), read_bufsize=LINE_BYTES)


async def ask(session: aiohttp.ClientSession, server: Server, body: dict[str, Any], answer: Answer) -> None:
    """Stream one answer; what goes wrong is put into `answer.error`."""
    stream = {"model": server.model, "stream": True, "stream_options": {"include_usage": True}}
    began = time.perf_counter()
    try:
        async with session.post(f"{server.url}/v1/chat/completions", json=stream | body) as response:
            if response.status != 200:
                answer.error = f"status {response.status}: {(await response.text())[:300]}"
            else:
                await _read(response, answer, began)
    except (aiohttp.ClientError, TimeoutError, ValueError) as error:
        answer.error = repr(error)
    answer.total_s = time.perf_counter() - began
    if answer.error is None and not answer.tokens:
        answer.error = "the stream ended without a usage chunk"


async def _read(response: aiohttp.ClientResponse, answer: Answer, began: float) -> None:
    async for line in response.content:
        data = line.removeprefix(b"data:").strip()
        if not line.startswith(b"data:") or data == b"[DONE]":
            continue
        chunk = json.loads(data)
        if "error" in chunk:
            answer.error = str(chunk["error"])
        _add(answer, chunk, time.perf_counter() - began)


def _add(answer: Answer, chunk: dict[str, Any], at_s: float) -> None:
    for choice in chunk.get("choices", ()):
        text = (choice.get("delta") or {}).get("content") or ""
        if text and answer.ttft_s is None:
            answer.ttft_s = at_s
        answer.text += text
        answer.finish_reason = choice.get("finish_reason") or answer.finish_reason
    if usage := chunk.get("usage"):
        answer.tokens = usage["completion_tokens"]
        answer.prompt_tokens = usage["prompt_tokens"]
        answer.cached_tokens = (usage.get("prompt_tokens_details") or {}).get("cached_tokens", 0)
