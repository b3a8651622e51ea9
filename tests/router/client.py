"""What tests of several surfaces ask of a cluster, and do to its workers."""

import json
from typing import Any

from common.states import WorkerState
from tests.fakes import Cluster, FakeWorker, wait_until


async def post(cluster: Cluster, path: str, **body: Any) -> dict[str, Any]:
    async with cluster.http.post(path, json=body) as response:
        answer: dict[str, Any] = await response.json()
        assert response.status == 200, answer
        return answer


async def stream(cluster: Cluster, path: str, **body: Any) -> list[dict[str, Any]]:
    """The chunks of a stream that ends with [DONE]."""
    async with cluster.http.post(path, json={"stream": True, **body}) as response:
        assert response.status == 200
        lines = [line[6:] for line in (await response.text()).split("\n\n") if line]
    assert lines.pop() == "[DONE]"
    return [json.loads(line) for line in lines]


def received(cluster: Cluster) -> int:
    """Tokens of all live requests."""
    return sum(len(request.token_ids) for request in cluster.backend.journal)


async def replace_worker(cluster: Cluster, identity: str) -> FakeWorker:
    """The model's worker is dead, and after a while there is a new one."""
    model = identity.partition("#")[0]
    cluster.supervisor.set(model, WorkerState.BACKOFF)
    await wait_until(lambda: cluster.backend.directory.find(model).state == WorkerState.BACKOFF)  # type: ignore[union-attr]
    return await cluster.serve_model(identity)
