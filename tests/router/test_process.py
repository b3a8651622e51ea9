"""The router as a process: its start, its end and its exit status."""

import asyncio
import contextlib
import os
import signal
import socket
import sys
from asyncio.subprocess import PIPE, Process
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import aiohttp
import msgspec
import pytest
import zmq.asyncio

from common import config as configuration
from common.config import Config, ServerConfig
from common.states import WorkerState
from tests.fakes import FakeSupervisor, FakeWorker, short_run_dir, wait_until

ROOT = Path(__file__).parents[2]
ENV = os.environ | {"PYTHONPATH": str(ROOT)}


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


@pytest.fixture
def run_dir() -> Iterator[Path]:
    with short_run_dir() as path:
        yield path


@pytest.fixture
async def supervisor(run_dir: Path) -> AsyncIterator[FakeSupervisor]:
    context = zmq.asyncio.Context()
    supervisor = FakeSupervisor(context, run_dir)
    task = asyncio.create_task(supervisor.run())
    yield supervisor
    task.cancel()
    context.destroy(linger=0)


async def spawn(run_dir: Path, port: int) -> Process:
    settings = Config(server=ServerConfig(port=port))
    configuration.dump(settings, run_dir / "config.json")
    command = (sys.executable, "-P", "-m", "router", "--run-dir", str(run_dir))
    return await asyncio.create_subprocess_exec(*command, env=ENV, stderr=PIPE)


@contextlib.asynccontextmanager
async def running(run_dir: Path, port: int, supervisor: FakeSupervisor) -> AsyncIterator[Process]:
    process = await spawn(run_dir, port)
    try:
        await wait_until(lambda: supervisor.watches or process.returncode is not None, timeout_s=20)
        yield process
    finally:
        if process.returncode is None:
            process.kill()
        await process.communicate()


async def test_a_taken_port_is_one_clear_line_and_exit_3(run_dir: Path, supervisor: FakeSupervisor) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        process = await spawn(run_dir, port)
        _, errors = await asyncio.wait_for(process.communicate(), 20)
    assert process.returncode == 3
    lines = errors.decode().splitlines()
    assert len(lines) == 1
    assert f"cannot listen on http://127.0.0.1:{port}" in lines[0]
    assert supervisor.watches == 0


async def test_router_starts_without_what_it_seldom_needs() -> None:
    code = "import sys, router.__main__; print(*{'huggingface_hub', 'yaml', 'rich'} & set(sys.modules))"
    process = await asyncio.create_subprocess_exec(sys.executable, "-P", "-c", code, stdout=PIPE, env=ENV)
    slow, _ = await asyncio.wait_for(process.communicate(), 20)
    assert process.returncode == 0
    assert slow.decode().split() == []


async def test_watch_comes_once_http_is_bound_and_is_repeated(run_dir: Path, supervisor: FakeSupervisor) -> None:
    port = free_port()
    async with running(run_dir, port, supervisor):
        async with aiohttp.ClientSession() as http, http.get(f"http://127.0.0.1:{port}/livez") as response:
            assert response.status == 200
        await wait_until(lambda: supervisor.watches >= 2)


async def test_sigterm_drains_the_live_request_and_exits_0(run_dir: Path, supervisor: FakeSupervisor) -> None:
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    async with running(run_dir, port, supervisor) as process, aiohttp.ClientSession() as http:
        worker = FakeWorker(supervisor.context, run_dir, "tiny#1")
        worker.hold_at = 2
        task = asyncio.create_task(worker.run())
        await worker.hello()
        supervisor.set("tiny", WorkerState.READY, worker)
        await until_status(http, f"{url}/models/tiny", 200)
        body = {"prompt": "Hi", "max_tokens": 4}
        answer = asyncio.create_task(fetch(http, f"{url}/generate", body))
        await wait_until(lambda: worker.generates)
        process.send_signal(signal.SIGTERM)
        await until_status(http, f"{url}/readyz", 503)
        async with http.post(f"{url}/generate", json=body) as refused:
            assert refused.status == 503
            assert int(refused.headers["Retry-After"]) > 0
        async with http.get(f"{url}/livez") as live:
            assert live.status == 200
        await worker.finish(worker.generates[0], start=2)
        assert (await answer)["text"] == "0 1 2 3 "
        assert await asyncio.wait_for(process.wait(), 10) == 0
        task.cancel()


async def test_a_second_sigterm_ends_at_once(run_dir: Path, supervisor: FakeSupervisor) -> None:
    port = free_port()
    async with running(run_dir, port, supervisor) as process, aiohttp.ClientSession() as http:
        url = f"http://127.0.0.1:{port}"
        worker = FakeWorker(supervisor.context, run_dir, "tiny#1")
        worker.is_silent = True
        task = asyncio.create_task(worker.run())
        await worker.hello()
        supervisor.set("tiny", WorkerState.READY, worker)
        await until_status(http, f"{url}/models/tiny", 200)
        live = asyncio.create_task(fetch(http, f"{url}/generate", {"prompt": "Hi"}))
        await wait_until(lambda: worker.generates)
        process.send_signal(signal.SIGTERM)
        await until_status(http, f"{url}/readyz", 503)
        process.send_signal(signal.SIGTERM)
        assert await asyncio.wait_for(process.wait(), 10) == 0
        assert (await live)["error"]["code"] == "model_unavailable"
        task.cancel()


async def fetch(http: aiohttp.ClientSession, url: str, body: object) -> dict[str, Any]:
    async with http.post(url, data=msgspec.json.encode(body), headers={"Content-Type": "application/json"}) as r:
        answer: dict[str, Any] = await r.json()
        return answer


async def until_status(http: aiohttp.ClientSession, url: str, status: int) -> None:
    async with asyncio.timeout(15):
        while True:
            async with http.get(url) as response:
                if response.status == status:
                    return
            await asyncio.sleep(0.01)
