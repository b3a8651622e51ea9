"""More than there is room for: bounded queues, refused at once; idle connections that cost nobody else anything."""

import asyncio
import time

from common.config import Config, ServerConfig
from common.states import WorkerState
from tests.fakes import Cluster, failed, running_cluster, wait_until

BODY = {"prompt": "Hi", "max_tokens": 2}
HALF_A_HEAD = b"POST /generate HTTP/1.1\r\nHost: local"


async def ask(cluster: Cluster, **more: object) -> tuple[int, str, str]:
    async with cluster.http.post("/generate", json=BODY | more) as response:
        answer = await response.json()
        return response.status, answer.get("error", {}).get("message", ""), response.headers.get("Retry-After", "")


async def test_queue_of_a_model_that_loads_is_bounded_for_it_alone() -> None:
    config = Config(server=ServerConfig(max_waiting_per_model=2))
    async with running_cluster(config) as cluster:
        await cluster.serve_model("tiny#1")
        cluster.supervisor.set("slow", WorkerState.LOADING)
        await wait_until(lambda: cluster.backend.directory.find("slow"))
        waiting = [asyncio.create_task(ask(cluster, model="slow")) for _ in range(2)]
        await wait_until(lambda: cluster.backend.count_waiting("slow") == 2)
        started_s = time.monotonic()
        status, message, retry_after = await ask(cluster, model="slow")
        assert time.monotonic() - started_s < 1
        assert (status, retry_after) == (429, "1")
        assert "2 requests wait for model 'slow' and 1 more" in message
        assert (await ask(cluster))[0] == 200
        await cluster.serve_model("slow#1")
        assert [status for status, _, _ in await asyncio.gather(*waiting)] == [200, 200]


async def test_full_worker_is_429_with_retry_after() -> None:
    async with running_cluster() as cluster:
        worker = await cluster.serve_model("tiny#1")
        worker.answer = failed("overloaded", "1024 requests wait")
        assert await ask(cluster) == (429, "1024 requests wait", "1")


async def test_request_past_its_deadline_is_504_and_cancelled() -> None:
    async with running_cluster(Config(server=ServerConfig(request_timeout_s=0.1))) as cluster:
        worker = await cluster.serve_model("tiny#1")
        worker.is_silent = True
        status, message, _ = await ask(cluster)
        assert (status, "server.request_timeout_s" in message) == (504, True)
        await wait_until(lambda: len(worker.cancels) == 1)


async def test_connections_over_the_limit_are_refused_and_come_back_when_old_ones_time_out() -> None:
    config = Config(server=ServerConfig(max_connections=20, header_timeout_s=0.5))
    async with running_cluster(config) as cluster:
        await cluster.serve_model("tiny#1")
        writers = [(await asyncio.open_connection("127.0.0.1", cluster.port))[1] for _ in range(20)]
        for writer in writers:
            writer.write(HALF_A_HEAD)
        reader, late = await asyncio.open_connection("127.0.0.1", cluster.port)
        async with asyncio.timeout(5):
            assert (await reader.read()).startswith(b"HTTP/1.1 503 ")
        await asyncio.sleep(0.6)
        assert (await ask(cluster))[0] == 200
        for writer in (*writers, late):
            writer.close()


async def test_slow_clients_do_not_slow_others_down() -> None:
    """300 connections that send half a head and a byte now and then; each is closed at the limit all the same."""
    async with running_cluster(Config(server=ServerConfig(header_timeout_s=2.0))) as cluster:
        await cluster.serve_model("tiny#1")
        pairs = [await asyncio.open_connection("127.0.0.1", cluster.port) for _ in range(300)]
        for _, writer in pairs:
            writer.write(HALF_A_HEAD)
        for _ in range(10):
            for _, writer in pairs:
                writer.write(b"h")
            assert (await ask(cluster))[0] == 200
        async with asyncio.timeout(10):
            for reader, writer in pairs:
                assert await reader.read() == b""
                writer.close()
