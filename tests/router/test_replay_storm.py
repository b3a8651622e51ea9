"""Deaths and cancels at random, at once: every answer that is given is whole, and nothing is left behind."""

import asyncio
import random
from typing import Any

import pytest

from common.states import WorkerState
from tests.fakes import Cluster, FakeWorker, running_cluster, wait_until, whole_text

CLIENTS = 12
TOKENS = 30
SILENT_AFTER = 10  # tokens that a worker gives to a request before it hangs, so that deaths find work


async def ask(cluster: Cluster, number: int) -> str:
    body = {"prompt": f"client {number}", "max_tokens": TOKENS, "logprobs": 0}
    async with cluster.http.post("/generate", json=body) as response:
        answer: dict[str, Any] = await response.json()
        assert response.status == 200, answer
    assert [token["token_id"] - 100 for token in answer["logprobs"]] == list(range(TOKENS))
    assert [token["text_offset"] for token in answer["logprobs"]] == [len(whole_text(n)) for n in range(TOKENS)]
    assert answer["usage"]["completion_tokens"] == TOKENS
    text: str = answer["text"]
    return text


async def kill_and_replace(cluster: Cluster, generation: int, hold_at: int | None) -> FakeWorker:
    """Each worker dies once it is seen, and what comes next goes a little further."""
    cluster.supervisor.set("tiny", WorkerState.BACKOFF)
    await wait_until(lambda: not cluster.backend.journal.busy_workers())
    worker = await cluster.add_worker(f"tiny#{generation}")
    worker.hold_at = hold_at
    cluster.supervisor.set("tiny", WorkerState.READY, worker)
    return worker


@pytest.mark.parametrize("seed", range(5))
async def test_deaths_and_cancels_at_once_lose_and_double_nothing(seed: int) -> None:
    chance = random.Random(seed)
    async with running_cluster() as cluster:
        worker = await cluster.serve_model("tiny#1")
        worker.hold_at = SILENT_AFTER
        clients = [asyncio.create_task(ask(cluster, number)) for number in range(CLIENTS)]
        await wait_until(lambda: len(worker.generates) == CLIENTS)
        quitters = chance.sample(clients, CLIENTS // 2)
        await asyncio.sleep(chance.random() * 0.02)
        for client in quitters[::2]:
            client.cancel()
        worker = await kill_and_replace(cluster, 2, hold_at=None)
        await asyncio.sleep(chance.random() * 0.02)
        for client in quitters[1::2]:
            client.cancel()
        answers = await asyncio.gather(*clients, return_exceptions=True)
        for client, answer in zip(clients, answers, strict=True):
            assert answer == whole_text(TOKENS) or (client in quitters and isinstance(answer, asyncio.CancelledError))
        await wait_until(lambda: len(cluster.backend.journal) == 0)
        assert cluster.backend.journal._by_wire_id == {}


async def test_steps_of_a_dead_worker_count() -> None:
    async with running_cluster() as cluster:
        worker = await cluster.serve_model("tiny#1")
        worker.hold_at = 5
        body = {"prompt": "Hi", "max_tokens": 9}
        asking = asyncio.create_task(cluster.http.post("/generate", json=body))
        await wait_until(lambda: sum(len(r.token_ids) for r in cluster.backend.journal) == 5)
        await kill_and_replace(cluster, 2, hold_at=None)
        async with await asking as response:
            stats = (await response.json())["speculative_stats"]
        assert stats["steps"] == 5 + 6  # a fake worker says of nine tokens that they took six steps
