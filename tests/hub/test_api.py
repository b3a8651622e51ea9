"""Models of the hub over HTTP, on a router with fake workers and a hub that is real HTTP."""

import asyncio
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from common.config import Config, HubConfig
from common.messages import EnsureModel
from common.states import WorkerState
from tests.fakes import Cluster, running_cluster, wait_until
from tests.hub.fake_hub import COMMIT, FakeHub
from tests.hub.test_store import TRICKS

LLAMA = "acme/tiny-llama"


@pytest.fixture
async def cluster(hub: FakeHub) -> AsyncIterator[Cluster]:
    async with running_cluster() as cluster:
        yield cluster


async def call(cluster: Cluster, method: str, path: str, body: Any = None) -> tuple[int, dict[str, Any]]:
    async with cluster.http.request(method, path, json=body) as response:
        return response.status, await response.json()


async def download(cluster: Cluster, **body: Any) -> tuple[int, dict[str, Any]]:
    return await call(cluster, "POST", "/hf/models/download", body)


async def ended(cluster: Cluster, job: str) -> dict[str, Any]:
    while True:
        _, state = await call(cluster, "GET", f"/hf/jobs/{job}")
        if state["status"] not in ("waiting", "running"):
            return state
        await asyncio.sleep(0.02)


async def test_search_info_download_list_verify_delete(cluster: Cluster) -> None:
    status, found = await call(cluster, "POST", "/hf/models/search", {"query": "llama"})
    assert (status, [model["id"] for model in found["models"]]) == (200, [LLAMA])
    status, details = await call(cluster, "GET", f"/hf/models/{LLAMA}/info")
    assert (status, details["source"], details["fit"]["can_run"]) == (200, "hub", True)
    status, job = await download(cluster, id=LLAMA, wait=True)
    assert (status, job["status"], job["done_bytes"]) == (200, "done", job["total_bytes"])
    status, local = await call(cluster, "GET", "/hf/models/local")
    assert [(m["name"], m["revision"]) for m in local["models"]] == [(LLAMA, COMMIT)]
    assert (await call(cluster, "GET", f"/hf/models/{LLAMA}/info"))[1]["source"] == "local"
    assert (await call(cluster, "GET", f"/hf/models/{LLAMA}/verify"))[1]["ok"] is True
    assert (await call(cluster, "GET", "/hf/cache/stats"))[1]["models"] == 1
    status, answer = await call(cluster, "DELETE", "/hf/models/acme%2Ftiny-llama")
    assert (status, answer["freed_bytes"] > 0) == (200, True)
    assert (await call(cluster, "GET", "/hf/models/local"))[1]["models"] == []
    assert (await call(cluster, "DELETE", f"/hf/models/{LLAMA}"))[0] == 404


async def test_popular_lists_mlx_models(cluster: Cluster, hub: FakeHub) -> None:
    hub.repos[LLAMA].tags.append("mlx")
    status, found = await call(cluster, "GET", "/hf/models/popular?limit=3")
    assert (status, [model["id"] for model in found["models"]]) == (200, [LLAMA])
    assert (await call(cluster, "GET", "/hf/models/popular?limit=x"))[0] == 422


async def test_job_is_told_by_events_and_joined_by_a_second_wish(cluster: Cluster, hub: FakeHub) -> None:
    hub.repos[LLAMA].pause_s = 0.01
    status, job = await download(cluster, id=LLAMA)
    assert (status, job["model"]) == (202, LLAMA)
    assert (await download(cluster, id=LLAMA))[1]["id"] == job["id"]
    async with cluster.http.get(f"/hf/jobs/{job['id']}/events") as response:
        assert response.content_type == "text/event-stream"
        lines = [line[6:] for line in (await response.text()).split("\n\n") if line]
    assert lines.pop() == "[DONE]"
    states = [json.loads(line) for line in lines]
    assert states[-1]["status"] == "done"
    sizes = [state["done_bytes"] for state in states]
    assert sizes == sorted(sizes)
    assert sizes[-1] == states[-1]["total_bytes"]
    _, every = await call(cluster, "GET", "/hf/jobs")
    assert [j["id"] for j in every["jobs"]] == [job["id"]]


async def test_cancelled_job_is_resumed_by_the_next(cluster: Cluster, hub: FakeHub) -> None:
    hub.repos[LLAMA].pause_s = 0.05
    _, job = await download(cluster, id=LLAMA)
    await wait_until(lambda: hub.served.get("model.safetensors", 0) > 150_000, 20)
    status, state = await call(cluster, "DELETE", f"/hf/jobs/{job['id']}")
    assert (status, state["status"]) == (200, "cancelled")
    assert (await call(cluster, "DELETE", f"/hf/jobs/{job['id']}"))[0] == 409
    _, stats = await call(cluster, "GET", "/hf/cache/stats")
    assert [p["is_active"] for p in stats["pending"]] == [False]
    hub.repos[LLAMA].pause_s = 0.0
    hub.served.clear()
    status, state = await download(cluster, id=LLAMA, wait=True)
    assert (status, state["status"]) == (200, "done")
    assert hub.served["model.safetensors"] < 150_000


async def test_failed_job_has_the_reason(cluster: Cluster, hub: FakeHub) -> None:
    hub.repos[LLAMA].gated = True
    status, answer = await download(cluster, id=LLAMA, wait=True)
    assert (status, answer["error"]["code"]) == (403, "hub_gated")
    _, job = await download(cluster, id="acme/none")
    state = await ended(cluster, job["id"])
    assert (state["status"], state["error"]["code"]) == ("failed", "hub_model_not_found")
    assert (await call(cluster, "GET", "/hf/jobs/99"))[0] == 404


@pytest.mark.parametrize("body", [{"id": "../x"}, {"id": "a/b", "quantize": "q9"}, {"id": "a/b", "revision": "../x"}])
async def test_impossible_downloads_start_no_job(cluster: Cluster, body: dict[str, Any]) -> None:
    status, _ = await call(cluster, "POST", "/hf/models/download", body)
    assert status == 422
    assert (await call(cluster, "GET", "/hf/jobs"))[1]["jobs"] == []


async def test_tricks_in_urls_reach_no_file(cluster: Cluster, home: Path) -> None:
    secret = home / "secret"
    secret.mkdir()
    (secret / "config.json").write_text("{}")
    from urllib.parse import quote

    from yarl import URL

    for name in ["../secret", "x/../../secret", str(secret), *TRICKS[1:]]:
        for path in (f"/hf/models/{quote(name, safe='')}", f"/hf/models/{quote(name, safe='/')}"):
            async with cluster.http.delete(URL(path, encoded=True)) as response:
                assert response.status in (400, 404, 405, 422), (name, response.status)
    assert (secret / "config.json").is_file()


async def test_loaded_model_is_not_deleted(cluster: Cluster) -> None:
    _, job = await download(cluster, id=LLAMA, wait=True)
    cluster.supervisor.set(LLAMA, WorkerState.READY, path=job["path"])
    await wait_until(lambda: cluster.backend.directory.find(LLAMA))
    status, answer = await call(cluster, "DELETE", f"/hf/models/{LLAMA}")
    assert (status, answer["error"]["code"]) == (409, "conflict")
    assert "unload it first" in answer["error"]["message"]


async def test_load_of_a_hub_id_downloads_it_first(cluster: Cluster, home: Path) -> None:
    def register(call: EnsureModel) -> str:
        cluster.supervisor.set(call.name, WorkerState.READY, path=call.path)
        return ""

    cluster.supervisor.on_ensure = register
    status, answer = await call(cluster, "POST", "/models/load", {"model": LLAMA})
    assert (status, answer["name"], answer["path"]) == (200, LLAMA, str(home / "models" / LLAMA))
    body = {"path": "acme/tiny-mistral", "name": "mine", "wait": False}
    status, job = await call(cluster, "POST", "/models/load", body)
    assert (status, job["model"]) == (202, "acme/tiny-mistral")
    await wait_until(lambda: cluster.backend.directory.find("mine"), 30)
    status, answer = await call(cluster, "POST", "/models/load", {"model": "acme/none"})
    assert (status, answer["error"]["code"]) == (404, "hub_model_not_found")


async def test_model_of_the_configuration_is_fetched_when_it_is_asked_for(cluster: Cluster, home: Path) -> None:
    folder = str(home / "models" / LLAMA)

    def load(call: EnsureModel) -> str:
        if call.name == "broken":
            return ""
        assert call.path in (None, folder)
        cluster.supervisor.set("far", WorkerState.READY, cluster.workers[0], path=folder)
        return ""

    await cluster.add_worker("far#1")
    cluster.supervisor.on_ensure = load
    cluster.supervisor.set("far", WorkerState.STOPPED, path=LLAMA)
    cluster.supervisor.set("broken", WorkerState.STOPPED, path="acme/none")
    await wait_until(lambda: cluster.backend.directory.find("broken"))
    status, answer = await call(cluster, "POST", "/generate", {"model": "far", "prompt": "Hi", "max_tokens": 2})
    assert (status, answer["usage"]["completion_tokens"]) == (200, 2)
    assert (home / "models" / LLAMA / "config.json").is_file()
    status, answer = await call(cluster, "POST", "/generate", {"model": "broken", "prompt": "Hi"})
    assert (status, answer["error"]["code"]) == (404, "hub_model_not_found")


async def test_known_model_of_the_hub_is_loaded_by_its_name(cluster: Cluster, home: Path) -> None:
    def load(call: EnsureModel) -> str:
        cluster.supervisor.set(call.name, WorkerState.READY, path=call.path)
        return ""

    cluster.supervisor.on_ensure = load
    cluster.supervisor.set("far", WorkerState.STOPPED, path=LLAMA)
    await wait_until(lambda: cluster.backend.directory.find("far"))
    status, answer = await call(cluster, "POST", "/models/load", {"model": "far"})
    assert (status, answer["path"]) == (200, str(home / "models" / LLAMA))
    assert not (home / "state.json").exists()  # it stands in the configuration: nothing is to be remembered


async def test_only_allowed_folders_are_loaded_by_path(hub: FakeHub, home: Path, tmp_path: Path) -> None:
    allowed, other = tmp_path / "allowed", tmp_path / "other"
    for folder in (allowed, other, home / "models"):
        (folder / "model").mkdir(parents=True)
    (allowed / "way-out").symlink_to(other)
    async with running_cluster(Config(hub=HubConfig(model_roots=[str(allowed)]))) as cluster:
        cluster.supervisor.on_ensure = lambda call: "conflict"  # it was asked: allowed
        for path, wanted in [
            (str(allowed / "model"), 409),
            (str(home / "models" / "model"), 409),
            ("model", 409),
            (str(other / "model"), 403),
            (str(allowed / "way-out" / "model"), 403),
            (str(allowed / ".." / "other" / "model"), 403),
            ("../../etc", 403),
            ("/etc", 403),
            ("~/x", 403),
        ]:
            status, answer = await call(cluster, "POST", "/models/load", {"path": path, "name": "x"})
            assert status == wanted, (path, answer)
        assert all(Path(call.path or "").is_absolute() for call in cluster.supervisor.ensured)
