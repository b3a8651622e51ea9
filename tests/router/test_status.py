"""Health, statistics, metrics and the index."""

import asyncio
import re
import time
from pathlib import Path
from typing import Any

import msgspec
import pytest

from common.messages import DrafterLoad, Load, ModelEntry, ModelTable
from common.states import Death, WorkerState
from router import health
from tests.fakes import BUDGET_BYTES, CACHED_TOKENS, PROMPT_TOKENS, Cluster, FakeWorker, failed, finished, wait_until
from tests.router.client import received, replace_worker

DOCUMENT = Path(__file__).parents[2] / "docs" / "metrics.md"

LOAD = Load(
    running=2,
    waiting=1,
    outstanding_tokens=9,
    kv_bytes=64,
    steps=40,
    prompt_tokens=1,
    generated_tokens=1,
    drafted_tokens=1,
    accepted_tokens=1,
    plain_step_ms=12.5,
    speedup=1.25,
    prefix_lookups=5,
    prefix_hits=4,
    prefix_tokens=300,
    prefix_evictions=2,
    prefix_bytes=4096,
    preempted=7,
    drafters=(DrafterLoad(name="suffix", drafted=10, accepted=6, judged=(5, 4, 0), stood=(4, 2, 0)),),
    parked=2,
    probes=3,
)


async def ask(cluster: Cluster, **body: Any) -> int:
    async with cluster.http.post("/generate", json={"prompt": "Hi", "max_tokens": 5} | body) as response:
        await response.read()
        return response.status


def table(*states: WorkerState) -> ModelTable:
    models = tuple(ModelEntry(name=f"m{number}", path="p", state=state) for number, state in enumerate(states))
    return ModelTable(revision=1, default_model="m0" if models else None, memory_budget_bytes=1, models=models)


@pytest.mark.parametrize(
    ("states", "status"),
    [
        ((), "no_model"),
        ((WorkerState.READY,), "ok"),
        ((WorkerState.STOPPED,), "ok"),
        ((WorkerState.STARTING,), "loading"),
        ((WorkerState.LOADING, WorkerState.READY), "loading"),
        ((WorkerState.BACKOFF,), "failed"),
        ((WorkerState.FAILED, WorkerState.READY), "degraded"),
        ((WorkerState.FAILED, WorkerState.STOPPED), "failed"),
    ],
)
def test_health_follows_from_the_model_table(states: tuple[WorkerState, ...], status: str) -> None:
    assert health.judge(table(*states), is_draining=False).status == status
    assert health.judge(table(*states), is_draining=True).status == "draining"


async def test_health_and_readiness_are_503_until_the_model_is_there(cluster: Cluster) -> None:
    cluster.supervisor.set("tiny", WorkerState.LOADING)
    await wait_until(lambda: cluster.backend.directory.find("tiny"))
    for path in ("/health", "/readyz"):
        async with cluster.http.get(path) as response:
            assert (response.status, (await response.json())["models"]) == (503, {"tiny": "loading"})
    async with cluster.http.get("/livez") as response:
        assert response.status == 200
    await cluster.serve_model("tiny#1")
    async with cluster.http.get("/health") as response:
        assert (response.status, (await response.json())["status"]) == (200, "ok")


async def test_stats_add_up(cluster: Cluster, worker: FakeWorker) -> None:
    for _ in range(2):
        assert await ask(cluster) == 200
    worker.answer = failed("context_length_exceeded")
    assert await ask(cluster) == 400
    worker.answer = lambda g: finished(g.request_id, 0, "stop", plain_decode_s=3.0, measured_decode_s=2.0)
    assert await ask(cluster) == 200
    await worker.send(LOAD)
    await wait_until(lambda: cluster.backend.loads.of_worker("tiny#1"))
    async with cluster.http.get("/stats") as response:
        stats = await response.json()
    outcomes = {"length": 2, "context_length_exceeded": 1, "stop": 1}
    assert stats["requests"] == {"received": 4, "live": 0, "replayed": 0, "outcomes": outcomes}
    assert (stats["tokens"]["prompt"], stats["tokens"]["generated"]) == (3 * PROMPT_TOKENS, 10)
    assert stats["tokens"]["per_second"] > 0
    assert stats["memory"]["budget_bytes"] == BUDGET_BYTES
    assert stats["uptime_s"] > 0
    model = stats["models"]["tiny"]
    assert (model["state"], model["running"], model["waiting"]) == ("ready", 2, 1)
    assert (model["steps"], model["plain_step_ms"], model["kv_bytes"]) == (40, 12.5, 64)
    assert model["preemptions"] == 7
    assert (model["parked_rows"], model["probes"]) == (2, 3)
    assert model["drafters"] == {
        "suffix": {
            "draft_tokens": 10,
            "accepted_tokens": 6,
            "acceptance_rate": 0.6,
            "acceptance_by_position": [0.8, 0.5],
        }
    }
    assert model["prefix_cache"] == {"lookups": 5, "hits": 4, "hit_tokens": 300, "evictions": 2, "bytes": 4096}
    assert stats["tokens"]["cached"] == model["cached_tokens"] == 3 * CACHED_TOKENS
    assert (model["acceptance_rate"], model["speedup"]) == (0.75, 1.5)


async def test_stats_leave_out_what_was_never_measured(cluster: Cluster, worker: FakeWorker) -> None:
    async with cluster.http.get("/stats") as response:
        model = (await response.json())["models"]["tiny"]
    assert model.keys().isdisjoint({"acceptance_rate", "speedup", "plain_step_ms"})


async def test_metrics_have_vllms_names(cluster: Cluster, worker: FakeWorker) -> None:
    assert await ask(cluster) == 200
    worker.answer = failed("context_length_exceeded")
    await ask(cluster)
    await worker.send(LOAD)
    await wait_until(lambda: cluster.backend.loads.of_worker("tiny#1"))
    async with cluster.http.get("/metrics") as response:
        assert response.headers["Content-Type"].startswith("text/plain")
        lines = (await response.text()).splitlines()
    model = 'model_name="tiny"'
    for line in (
        f"vllm:num_requests_running{{{model}}} 2.0",
        f"vllm:num_requests_waiting{{{model}}} 1.0",
        f"vllm:num_preemptions_total{{{model}}} 7.0",
        f"mlxspec_parked_rows{{{model}}} 2.0",
        f"vllm:prompt_tokens_total{{{model}}} {PROMPT_TOKENS}.0",
        f"vllm:generation_tokens_total{{{model}}} 5.0",
        f'vllm:request_success_total{{finished_reason="length",{model}}} 1.0',
        f"vllm:spec_decode_num_draft_tokens_total{{{model}}} 4.0",
        f"vllm:spec_decode_num_accepted_tokens_total{{{model}}} 3.0",
        f"vllm:time_to_first_token_seconds_count{{{model}}} 1.0",
        f"vllm:inter_token_latency_seconds_count{{{model}}} 4.0",
        f"vllm:e2e_request_latency_seconds_count{{{model}}} 1.0",
        f"vllm:request_prompt_tokens_count{{{model}}} 1.0",
        f'mlxspec_request_errors_total{{code="context_length_exceeded",{model}}} 1.0',
        f"vllm:prompt_tokens_cached_total{{{model}}} {CACHED_TOKENS}.0",
        f"vllm:prefix_cache_queries_total{{{model}}} 1.0",
        f"vllm:prefix_cache_hits_total{{{model}}} 300.0",
        f"mlxspec_prefix_cache_evictions_total{{{model}}} 2.0",
        f"mlxspec_prefix_cache_bytes{{{model}}} 4096.0",
        f"mlxspec_speculation_speedup{{{model}}} 1.25",
        f"vllm:spec_decode_num_drafts_total{{{model}}} 5.0",
        f"mlxspec_kv_bytes{{{model}}} 64.0",
        f"mlxspec_memory_budget_bytes {BUDGET_BYTES}.0",
    ):
        assert line in lines


async def scrape(cluster: Cluster) -> list[str]:
    async with cluster.http.get("/metrics") as response:
        return (await response.text()).splitlines()


async def test_metrics_tell_of_memory_and_deaths(cluster: Cluster, worker: FakeWorker) -> None:
    worker.entry = msgspec.structs.replace(
        worker.entry, active_bytes=30, cache_bytes=20, footprint_bytes=60, kv_bytes=10, kv_limit_bytes=40
    )
    deaths = {Death.KILLED: 2, Death.HUNG: 1}
    cluster.supervisor.set("tiny", WorkerState.READY, worker, restarts=3, restarts_by_death=deaths)
    await wait_until(lambda: cluster.backend.directory.models[0].restarts == 3)
    lines, model = await scrape(cluster), 'model_name="tiny"'
    for line in (
        f"mlxspec_memory_active_bytes{{{model}}} 30.0",
        f"mlxspec_memory_cache_bytes{{{model}}} 20.0",
        f"mlxspec_memory_footprint_bytes{{{model}}} 60.0",
        f"vllm:kv_cache_usage_perc{{{model}}} 0.25",
        "mlxspec_memory_pressure_level 1.0",
        f'mlxspec_worker_restarts_total{{{model},reason="killed"}} 2.0',
        f'mlxspec_worker_restarts_total{{{model},reason="hung"}} 1.0',
    ):
        assert line in lines


async def test_replays_are_counted_by_how_their_requests_end(cluster: Cluster, worker: FakeWorker) -> None:
    worker.hold_at = 2
    answer = asyncio.create_task(ask(cluster))
    await wait_until(lambda: received(cluster) == 2)
    await replace_worker(cluster, "tiny#2")
    assert await answer == 200
    assert 'mlxspec_request_replays_total{model_name="tiny",outcome="length"} 1.0' in await scrape(cluster)


async def test_every_metric_is_documented_and_no_other(cluster: Cluster) -> None:
    told = set(re.findall(r"^# TYPE (\S+)", "\n".join(await scrape(cluster)), re.MULTILINE))
    documented = set(re.findall(r"^\| `([a-z_0-9:]+)", DOCUMENT.read_text(), re.MULTILINE))
    assert {name for name in told if not name.endswith("_created")} == documented


async def test_age_of_a_step_grows_only_while_a_busy_worker_stands_still(cluster: Cluster, worker: FakeWorker) -> None:
    model = cluster.backend.directory.models[0]
    assert cluster.backend.loads.step_age_s(model, time.monotonic()) is None
    for steps, running, is_older in [(1, 1, False), (1, 1, True), (2, 1, False), (2, 0, False)]:
        before = time.monotonic()
        load = msgspec.structs.replace(LOAD, steps=steps, running=running, kv_bytes=int(before * 1e6))
        await worker.send(load)
        await wait_until(lambda load=load: cluster.backend.loads.of_worker("tiny#1") == load)  # type: ignore[misc]
        age_s = cluster.backend.loads.step_age_s(model, time.monotonic())
        assert age_s is not None
        assert (age_s > time.monotonic() - before) is is_older


async def test_index_lists_every_route(cluster: Cluster) -> None:
    async with cluster.http.get("/") as response:
        answer = await response.json()
    assert answer["name"] == "mlxspec"
    assert "POST /generate" in answer["routes"]
    assert "DELETE /models/{name}" in answer["routes"]


async def test_head_is_answered_like_get(cluster: Cluster, worker: FakeWorker) -> None:
    async with cluster.http.head("/health") as response:
        assert response.status == 200
