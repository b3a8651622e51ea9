"""Models over HTTP."""

import asyncio
from typing import Any

from common.config import Config, HubConfig, ServerConfig
from common.messages import EnsureModel, ModelFacts
from common.states import WorkerState
from tests.fakes import Cluster, FakeWorker, running_cluster, wait_until

FACTS = ModelFacts(
    architecture="llama",
    context_tokens=8192,
    vocabulary=49152,
    weights_dtype="float32",
    weights_bytes=1,
    kv_bytes_per_token=2,
    backend="cpu",
    has_chat_template=True,
    drafters=("ngram",),
    load_s=0.5,
)


async def get(cluster: Cluster, path: str) -> tuple[int, dict[str, Any]]:
    async with cluster.http.get(path) as response:
        return response.status, await response.json()


async def load(cluster: Cluster, **body: Any) -> tuple[int, dict[str, Any]]:
    async with cluster.http.post("/models/load", json=body) as response:
        return response.status, await response.json()


async def test_models_are_listed_with_state_and_facts(cluster: Cluster) -> None:
    cluster.supervisor.set("tiny", WorkerState.STOPPED, facts=FACTS, pinned=True, restarts=2)
    cluster.supervisor.set("org/big", WorkerState.FAILED, detail="no config.json")
    await wait_until(lambda: cluster.backend.directory.find("org/big"))
    status, answer = await get(cluster, "/models")
    assert (status, answer["default_model"]) == (200, "tiny")
    tiny, big = answer["models"]
    assert (tiny["name"], tiny["state"], tiny["is_default"], tiny["restarts"]) == ("tiny", "stopped", True, 2)
    assert tiny["facts"]["context_tokens"] == 8192
    assert (big["state"], big["detail"]) == ("failed", "no config.json")
    assert (await get(cluster, "/models/org/big")) == (200, big)
    assert (await get(cluster, "/models/org%2Fbig")) == (200, big)
    status, answer = await get(cluster, "/v1/models")
    assert [model["id"] for model in answer["data"]] == ["tiny", "org/big"]
    assert (await get(cluster, "/v1/models/org/big"))[1]["id"] == "org/big"


async def test_unknown_model_is_404_with_the_known_ones(cluster: Cluster, worker: FakeWorker) -> None:
    for path in ("/models/no", "/v1/models/no", "/models/default"):
        status, answer = await get(cluster, path)
        assert (status, answer["error"]["code"]) == (404, "model_not_found")
        assert "known models: tiny" in answer["error"]["message"]


async def test_load_is_answered_when_the_model_is_ready(cluster: Cluster) -> None:
    cluster.supervisor.set("tiny", WorkerState.STOPPED)
    await wait_until(lambda: cluster.backend.directory.find("tiny"))
    loading = asyncio.create_task(load(cluster, model="tiny"))
    await wait_until(lambda: cluster.supervisor.ensured)
    cluster.supervisor.set("tiny", WorkerState.LOADING)
    await wait_until(lambda: cluster.backend.directory.models[0].state == WorkerState.LOADING)
    assert not loading.done()
    await cluster.serve_model("tiny#1")
    status, answer = await loading
    assert (status, answer["state"]) == (200, "ready")


async def test_load_of_a_new_path_registers_it_under_a_name() -> None:
    async with running_cluster(Config(hub=HubConfig(model_roots=["/some/folder"]))) as cluster:

        def register(call: EnsureModel) -> str:
            cluster.supervisor.set(call.name, WorkerState.READY)
            return ""

        cluster.supervisor.on_ensure = register
        status, answer = await load(cluster, path="/some/folder/new")
        assert (status, answer["name"]) == (200, "new")
        status, answer = await load(cluster, path="/some/folder/new", name="org/mine")
        assert (status, answer["name"]) == (200, "org/mine")
        assert [(call.name, call.path) for call in cluster.supervisor.ensured] == [
            ("new", "/some/folder/new"),
            ("org/mine", "/some/folder/new"),
        ]


async def test_failed_load_is_503_with_the_reason(cluster: Cluster) -> None:
    cluster.supervisor.set("tiny", WorkerState.STOPPED)
    await wait_until(lambda: cluster.backend.directory.find("tiny"))
    loading = asyncio.create_task(load(cluster, model="tiny"))
    await wait_until(lambda: cluster.supervisor.ensured)
    cluster.supervisor.set("tiny", WorkerState.FAILED, detail="weights are missing")
    status, answer = await loading
    assert status == 503
    assert "weights are missing" in answer["error"]["message"]


async def test_failure_from_before_the_load_is_not_its_answer(cluster: Cluster) -> None:
    cluster.supervisor.set("tiny", WorkerState.FAILED, detail="old")
    await wait_until(lambda: cluster.backend.directory.find("tiny"))
    loading = asyncio.create_task(load(cluster, model="tiny"))
    await wait_until(lambda: cluster.supervisor.ensured)
    cluster.supervisor.set("tiny", WorkerState.STARTING)
    await cluster.serve_model("tiny#2")
    assert (await loading)[0] == 200


async def test_load_without_waiting_is_202(cluster: Cluster) -> None:
    cluster.supervisor.set("tiny", WorkerState.STOPPED)
    await wait_until(lambda: cluster.backend.directory.find("tiny"))
    status, answer = await load(cluster, model="tiny", wait=False)
    assert (status, answer["state"]) == (202, "stopped")


async def test_refused_load_has_the_supervisors_code(cluster: Cluster, worker: FakeWorker) -> None:
    cluster.supervisor.on_ensure = lambda call: "conflict"
    status, answer = await load(cluster, model="tiny")
    assert (status, answer["error"]["code"]) == (409, "conflict")


async def test_load_that_takes_too_long_is_503() -> None:
    async with running_cluster(Config(server=ServerConfig(load_timeout_s=0.1))) as cluster:
        cluster.supervisor.set("tiny", WorkerState.LOADING)
        await wait_until(lambda: cluster.backend.directory.find("tiny"))
        status, answer = await load(cluster, model="tiny")
        assert status == 503
        assert "load_timeout_s" in answer["error"]["message"]


async def test_unload_is_answered_by_the_supervisor(cluster: Cluster, worker: FakeWorker) -> None:
    async with cluster.http.delete("/models/tiny") as response:
        assert (response.status, await response.json()) == (200, {"name": "tiny", "state": "stopped"})
    assert [call.name for call in cluster.supervisor.unloaded] == ["tiny"]
    cluster.supervisor.on_unload = lambda call: "conflict"
    async with cluster.http.delete("/models/tiny") as response:
        assert response.status == 409
    async with cluster.http.delete("/models/no") as response:
        assert response.status == 404
