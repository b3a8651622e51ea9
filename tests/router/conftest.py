"""A router on fake workers, and one with a ready model named `tiny`."""

from collections.abc import AsyncIterator

import pytest

from tests.fakes import Cluster, FakeWorker, running_cluster


@pytest.fixture
async def cluster() -> AsyncIterator[Cluster]:
    async with running_cluster() as cluster:
        yield cluster


@pytest.fixture
async def worker(cluster: Cluster) -> FakeWorker:
    """The only worker of the model `tiny`, the default one."""
    return await cluster.serve_model("tiny#1")
