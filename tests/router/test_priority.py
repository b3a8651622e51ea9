"""`priority` on every generating route, and OpenAI's word for it."""

from typing import Any

import pytest

from common.priority import Priority
from tests.fakes import Cluster, FakeWorker

MESSAGES = [{"role": "user", "content": "Hi"}]
BODIES: dict[str, dict[str, Any]] = {
    "/generate": {"prompt": "Hi"},
    "/batch_generate": {"prompts": ["Hi", "Ho"]},
    "/v1/completions": {"prompt": "Hi"},
    "/v1/chat/completions": {"messages": MESSAGES, "n": 2},
}
OPENAI = ("/v1/completions", "/v1/chat/completions")


async def send(cluster: Cluster, path: str, **fields: Any) -> tuple[int, Any]:
    async with cluster.http.post(path, json=BODIES[path] | {"max_tokens": 2} | fields) as response:
        return response.status, await response.json()


@pytest.mark.parametrize("path", BODIES)
@pytest.mark.parametrize(
    ("name", "priority"),
    [("low", Priority.LOW), ("normal", Priority.NORMAL), ("high", Priority.HIGH), (None, Priority.NORMAL)],
)
async def test_priority_reaches_the_worker(
    cluster: Cluster, worker: FakeWorker, path: str, name: str | None, priority: Priority
) -> None:
    assert (await send(cluster, path, priority=name))[0] == 200
    assert worker.generates and {generate.priority for generate in worker.generates} == {priority}


@pytest.mark.parametrize("path", BODIES)
@pytest.mark.parametrize("wrong", ["urgent", "HIGH", "", 1])
async def test_another_priority_is_refused_by_name(
    cluster: Cluster, worker: FakeWorker, path: str, wrong: object
) -> None:
    status, answer = await send(cluster, path, priority=wrong)
    assert (status, answer["error"]["param"]) == (422 if isinstance(wrong, str) else 400, "priority")
    if isinstance(wrong, str):
        assert repr(wrong) in answer["error"]["message"] and "low, normal, high" in answer["error"]["message"]
    assert not worker.generates


@pytest.mark.parametrize("path", OPENAI)
@pytest.mark.parametrize(
    ("tier", "priority"),
    [("flex", Priority.LOW), ("auto", Priority.NORMAL), ("default", Priority.NORMAL), ("priority", Priority.HIGH)],
)
async def test_a_service_tier_is_a_priority(
    cluster: Cluster, worker: FakeWorker, path: str, tier: str, priority: Priority
) -> None:
    assert (await send(cluster, path, service_tier=tier))[0] == 200
    assert {generate.priority for generate in worker.generates} == {priority}


@pytest.mark.parametrize("path", OPENAI)
async def test_two_words_for_it_must_agree(cluster: Cluster, worker: FakeWorker, path: str) -> None:
    assert (await send(cluster, path, service_tier="flex", priority="low"))[0] == 200
    status, answer = await send(cluster, path, service_tier="flex", priority="high")
    assert (status, answer["error"]["param"]) == (400, "service_tier")
    status, answer = await send(cluster, path, service_tier="gold")
    assert (status, answer["error"]["param"]) == (422, "service_tier")
    assert "'gold'" in answer["error"]["message"]


async def test_our_own_routes_know_no_service_tier(cluster: Cluster, worker: FakeWorker) -> None:
    status, answer = await send(cluster, "/generate", service_tier="flex")
    assert (status, answer["error"]["param"]) == (400, "service_tier")
