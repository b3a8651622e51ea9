"""The command line against a router on fake workers."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable

import pytest

from router.cli import main as cli
from tests.fakes import Cluster, running_cluster

Cli = Callable[..., Awaitable[tuple[int, str, str]]]


@pytest.fixture
async def cluster() -> AsyncIterator[Cluster]:
    async with running_cluster() as cluster:
        await cluster.serve_model("tiny#1")
        yield cluster


@pytest.fixture
def run_cli(cluster: Cluster, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Cli:
    """Runs a command line against the cluster; returns exit code, standard output and standard error."""
    monkeypatch.setenv("MLXSPEC_URL", f"http://127.0.0.1:{cluster.port}")

    async def call(*arguments: str) -> tuple[int, str, str]:
        status = await asyncio.to_thread(cli.main, arguments)
        printed = capsys.readouterr()
        return status, printed.out, printed.err

    return call
