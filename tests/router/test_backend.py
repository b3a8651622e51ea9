"""Disconnects, overload, slow readers, drains: what a request's end does to the rest."""

import asyncio
import time
from typing import Any

import aiohttp
import pytest

from common.config import Config, ServerConfig
from common.messages import Generate, TextPrompt
from common.sampling import Sampling
from common.states import WorkerState
from router.streams import MAX_UNREAD_EVENTS, Ended
from tests.fakes import Cluster, FakeWorker, running_cluster, wait_until, whole_text

CHAT = {"messages": [{"role": "user", "content": "Hi"}]}


async def start_and_leave(cluster: Cluster, path: str, body: dict[str, Any]) -> None:
    """Send a request, and close the connection once a worker has it."""
    worker = cluster.workers[0]
    async with aiohttp.ClientSession() as http:
        url = f"http://127.0.0.1:{cluster.port}{path}"
        asking = asyncio.create_task(http.post(url, json=body))
        await wait_until(lambda: worker.generates)
        asking.cancel()


@pytest.mark.parametrize(
    ("path", "body", "count"),
    [
        ("/generate", {"prompt": "Hi"}, 1),
        ("/generate", {"prompt": "Hi", "stream": True}, 1),
        ("/batch_generate", {"prompts": ["a", "b"]}, 2),
        ("/v1/chat/completions", CHAT | {"n": 3}, 3),
        ("/v1/chat/completions", CHAT | {"n": 3, "stream": True}, 3),
        ("/v1/completions", {"prompt": "Hi"}, 1),
    ],
)
async def test_disconnect_cancels_all_requests_of_the_client(
    cluster: Cluster, worker: FakeWorker, path: str, body: dict[str, Any], count: int
) -> None:
    worker.is_silent = True
    await start_and_leave(cluster, path, body)
    await wait_until(lambda: len(worker.cancels) == count)
    assert sorted(worker.cancels) == sorted(generate.request_id for generate in worker.generates)
    await wait_until(lambda: len(cluster.backend.journal) == 0)
    await wait_until(lambda: cluster.state.in_flight == 0)


async def test_disconnect_amid_a_stream_cancels(cluster: Cluster, worker: FakeWorker) -> None:
    worker.hold_at = 3
    async with cluster.http.post("/generate", json={"prompt": "Hi", "stream": True}) as response:
        await response.content.readuntil(b"\n\n")
        response.close()
    await wait_until(lambda: worker.cancels)
    await wait_until(lambda: len(cluster.backend.journal) == 0)


async def test_client_that_leaves_while_the_model_loads_is_forgotten(cluster: Cluster) -> None:
    cluster.supervisor.set("tiny", WorkerState.LOADING)
    await wait_until(lambda: cluster.backend.directory.find("tiny"))
    asking = asyncio.create_task(cluster.http.post("/generate", json={"prompt": "Hi"}))
    await wait_until(lambda: cluster.backend.count_waiting("tiny") == 1)
    asking.cancel()
    await wait_until(lambda: len(cluster.backend.journal) == 0)


async def test_overload_is_429_at_once_and_room_comes_back() -> None:
    async with running_cluster(Config(server=ServerConfig(max_concurrent_requests=4))) as cluster:
        worker = await cluster.serve_model("tiny#1")
        worker.is_silent = True
        body = {"prompt": "Hi", "max_tokens": 2}
        live = [asyncio.create_task(cluster.http.post("/generate", json=body)) for _ in range(4)]
        await wait_until(lambda: len(worker.generates) == 4)
        waits_s = []
        for _ in range(5):
            started = time.monotonic()
            async with cluster.http.post("/generate", json=body) as response:
                error = (await response.json())["error"]
            waits_s.append(time.monotonic() - started)
        assert min(waits_s) < 0.05
        assert (response.status, error["code"], error["type"]) == (429, "overloaded", "rate_limit_error")
        assert int(response.headers["Retry-After"]) >= 1
        assert "at most 4" in error["message"]
        worker.is_silent = False
        for generate in worker.generates:
            await worker.finish(generate)
        for answer in await asyncio.gather(*live):
            assert (await answer.json())["text"] == whole_text(2)
        async with cluster.http.post("/generate", json=body) as response:
            assert response.status == 200


async def test_a_group_is_taken_whole_or_not_at_all() -> None:
    async with running_cluster(Config(server=ServerConfig(max_concurrent_requests=4))) as cluster:
        worker = await cluster.serve_model("tiny#1")
        worker.is_silent = True
        live = asyncio.create_task(cluster.http.post("/generate", json={"prompt": "Hi", "max_tokens": 1}))
        await wait_until(lambda: worker.generates)
        async with cluster.http.post("/batch_generate", json={"prompts": ["a"] * 4}) as response:
            assert response.status == 429
        assert len(worker.generates) == 1
        await worker.finish(worker.generates[0])
        (await live).close()


async def test_reader_that_falls_too_far_behind_is_cancelled(cluster: Cluster, worker: FakeWorker) -> None:
    worker.hold_at = 0
    generate = Generate(
        request_id="slow", prompt=TextPrompt(text="x"), sampling=Sampling(), max_tokens=MAX_UNREAD_EVENTS + 1
    )
    with cluster.backend.start("tiny", [generate]) as streams:
        await wait_until(lambda: worker.generates)
        await worker.finish(worker.generates[0])
        await wait_until(lambda: worker.cancels == ["slow"])
        events = [event async for _, event in streams]
    assert "too slowly" in str(events[-1])
    assert len(events) <= MAX_UNREAD_EVENTS + 1


async def test_leaving_the_block_after_the_end_cancels_nothing(cluster: Cluster, worker: FakeWorker) -> None:
    generate = Generate(request_id="x", prompt=TextPrompt(text="x"), sampling=Sampling(), max_tokens=2)
    with cluster.backend.start("tiny", [generate]) as streams:
        events = [event async for _, event in streams]
    assert isinstance(events[-1], Ended)
    async with cluster.http.post("/generate", json={"prompt": "Hi", "max_tokens": 1}) as response:
        assert response.status == 200
    assert worker.cancels == []


async def test_drain_refuses_new_work_and_lets_live_work_end(cluster: Cluster, worker: FakeWorker) -> None:
    worker.hold_at = 1
    live = asyncio.create_task(cluster.http.post("/generate", json={"prompt": "Hi", "max_tokens": 3}))
    await wait_until(lambda: worker.generates)
    cluster.state.is_draining = True
    async with cluster.http.post("/generate", json={"prompt": "Hi"}) as response:
        assert response.status == 503
        assert "Retry-After" in response.headers
    async with cluster.http.get("/readyz") as response:
        assert response.status == 503
    async with cluster.http.get("/livez") as response:
        assert response.status == 200
    await worker.finish(worker.generates[0], start=1)
    assert (await (await live).json())["text"] == whole_text(3)


async def test_a_server_about_to_stop_does_not_wait_for_models(cluster: Cluster) -> None:
    cluster.supervisor.set("tiny", WorkerState.LOADING)
    await wait_until(lambda: cluster.backend.directory.find("tiny"))
    waiting = asyncio.create_task(cluster.http.post("/generate", json={"prompt": "Hi"}))
    await wait_until(lambda: cluster.backend.count_waiting("tiny") == 1)
    cluster.backend.stop_waiting()
    assert (await waiting).status == 503


async def test_stopping_ends_what_is_live_with_503(cluster: Cluster, worker: FakeWorker) -> None:
    worker.is_silent = True
    live = asyncio.create_task(cluster.http.post("/generate", json={"prompt": "Hi"}))
    await wait_until(lambda: worker.generates)
    cluster.backend.stop_all()
    assert (await live).status == 503
    await wait_until(lambda: worker.cancels)


async def test_without_a_model_table_requests_are_503(
    cluster: Cluster, worker: FakeWorker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("router.backend.TABLE_TIMEOUT_S", 0.05)
    cluster.supervisor.is_answering = False
    cluster.backend.directory.table = None
    async with cluster.http.post("/generate", json={"prompt": "Hi"}) as response:
        assert (response.status, response.headers["Retry-After"]) == (503, "1")
    async with cluster.http.get("/health") as response:
        assert (response.status, (await response.json())["status"]) == (503, "starting")


async def test_a_hundred_clients_get_a_hundred_whole_answers(cluster: Cluster, worker: FakeWorker) -> None:
    async def ask(tokens: int) -> str:
        async with cluster.http.post("/generate", json={"prompt": "Hi", "max_tokens": tokens}) as response:
            text: str = (await response.json())["text"]
            return text

    texts = await asyncio.gather(*(ask(1 + number % 7) for number in range(100)))
    assert texts == [whole_text(1 + number % 7) for number in range(100)]
    await wait_until(lambda: cluster.state.in_flight == 0)
