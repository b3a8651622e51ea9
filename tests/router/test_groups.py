"""Groups, aliases, pins and registered models: made over HTTP, used as a model's name, there after a restart."""

import asyncio
from pathlib import Path
from typing import Any

import pytest

from common.config import Config, HubConfig, ModelConfig, discover_models
from common.errors import ModelNotFound
from common.groups import Group
from common.messages import ModelEntry
from common.saved_state import FILE, Saved, load, save
from common.states import WorkerState
from router.names import Names, choose
from tests.fakes import Cluster, running_cluster, wait_until

A, B, C = "a", "b", "c"
READY, STOPPED, FAILED = WorkerState.READY, WorkerState.STOPPED, WorkerState.FAILED


def models(*states: WorkerState) -> list[ModelEntry]:
    return [ModelEntry(name=name, path="", state=state) for name, state in zip((A, B, C), states, strict=True)]


@pytest.mark.parametrize(
    ("policy", "states", "owed", "chosen"),
    [
        ("default", (READY, STOPPED, READY), {}, B),
        ("default", (READY, FAILED, READY), {}, A),
        ("default", (FAILED, FAILED, FAILED), {}, B),
        ("prefer_loaded", (STOPPED, READY, READY), {B: 9}, B),
        ("prefer_loaded", (STOPPED, STOPPED, READY), {}, C),
        ("prefer_loaded", (STOPPED, STOPPED, STOPPED), {}, B),
        ("least_loaded", (READY, READY, READY), {A: 5, B: 9, C: 7}, A),
        ("least_loaded", (READY, STOPPED, STOPPED), {}, A),
        ("least_loaded", (READY, READY, STOPPED), {A: 5, B: 9}, C),
        ("least_loaded", (FAILED, READY, READY), {B: 9, C: 8}, C),
    ],
)
def test_policy_chooses(policy: str, states: tuple[WorkerState, ...], owed: dict[str, int], chosen: str) -> None:
    group = Group(models=(A, B, C), default_model=B, policy=policy)
    assert choose("g", group, models(*states), owed).name == chosen


def test_group_without_a_known_model_is_not_found() -> None:
    with pytest.raises(ModelNotFound, match="it names: x, y"):
        choose("g", Group(models=("x", "y")), models(READY, READY, READY), {})


async def call(cluster: Cluster, method: str, path: str, body: Any = None) -> tuple[int, Any]:
    async with cluster.http.request(method, path, json=body) as response:
        return response.status, await response.json()


async def model_of(cluster: Cluster, name: str) -> str:
    status, answer = await call(cluster, "POST", "/generate", {"prompt": "Hi", "max_tokens": 1, "model": name})
    assert status == 200, answer
    found: str = answer["model"]
    return found


async def test_group_and_alias_serve_as_a_model() -> None:
    async with running_cluster() as cluster:
        await cluster.serve_model("a#1")
        await cluster.serve_model("b#1")
        made = {"name": "g", "models": ["a", "b"], "default_model": "b", "description": "Both."}
        status, answer = await call(cluster, "POST", "/groups", made)
        assert (status, answer) == (201, made | {"policy": "default"})
        assert await call(cluster, "GET", "/groups/g") == (200, answer)
        assert await call(cluster, "GET", "/groups") == (200, {"groups": [answer]})
        assert (await call(cluster, "PUT", "/aliases/gpt-4o", {"model": "g"}))[0] == 200
        assert await model_of(cluster, "g") == await model_of(cluster, "gpt-4o") == "b"
        assert (await call(cluster, "PUT", "/groups/g", {"models": ["a"]}))[0] == 200
        assert await model_of(cluster, "gpt-4o") == "a"
        listed = (await call(cluster, "GET", "/v1/models"))[1]["data"]
        assert [model["id"] for model in listed] == ["a", "b", "g", "gpt-4o"]
        assert await call(cluster, "DELETE", "/groups/g") == (200, {"name": "g", "deleted": True})
        assert (await call(cluster, "GET", "/groups/g"))[0] == 404
        chat = {"messages": [{"role": "user", "content": "Hi"}], "model": "gpt-4o"}
        assert (await call(cluster, "POST", "/v1/chat/completions", chat))[0] == 404
        assert (await call(cluster, "DELETE", "/aliases/gpt-4o"))[0] == 200


@pytest.mark.parametrize(
    ("method", "path", "body", "status", "words"),
    [
        ("POST", "/groups", {"name": "g", "models": []}, 422, "0 names; 1 to 64"),
        ("POST", "/groups", {"name": "g", "models": ["tiny", "tiny"]}, 400, "twice"),
        ("POST", "/groups", {"name": "g", "models": ["no"]}, 404, "known models: tiny"),
        ("POST", "/groups", {"name": "../g", "models": ["tiny"]}, 422, "must match"),
        ("POST", "/groups", {"name": "tiny", "models": ["tiny"]}, 409, "a model's name"),
        ("POST", "/groups", {"name": "fixed", "models": ["tiny"]}, 409, "exists"),
        ("PUT", "/groups/fixed", {"models": ["tiny"]}, 409, "configuration file"),
        ("DELETE", "/groups/fixed", None, 409, "configuration file"),
        ("PUT", "/groups/g", {"models": ["tiny"], "policy": "best"}, 422, "possible: default"),
        ("PUT", "/groups/g", {"models": ["tiny"], "default_model": "x"}, 400, "must be one of"),
        ("PUT", "/groups/g", {"models": ["tiny"], "colour": 1}, 400, "not a known field"),
        ("DELETE", "/groups/g", None, 404, "there are: fixed"),
        ("PUT", "/aliases/x", {"model": "no"}, 404, "known models: tiny"),
        ("PUT", "/aliases/fixed", {"model": "tiny"}, 409, "something else"),
        ("POST", "/models/pin", {"model": "no"}, 404, "known models: tiny"),
        ("POST", "/models/search", {"limit": 0}, 422, "[1, 1000]"),
        ("POST", "/models/search", {"state": "tired"}, 422, "possible: "),
    ],
)
async def test_wrong_change_is_refused(method: str, path: str, body: Any, status: int, words: str) -> None:
    async with running_cluster(Config(groups={"fixed": Group(models=("tiny",))})) as cluster:
        await cluster.serve_model("tiny#1")
        got, answer = await call(cluster, method, path, body)
        assert (got, words in answer["error"]["message"]) == (status, True), answer


async def test_models_are_searched_by_words_and_state() -> None:
    async with running_cluster() as cluster:
        await cluster.serve_model("tiny-llama#1")
        cluster.supervisor.set("tiny-qwen", STOPPED)
        await wait_until(lambda: cluster.backend.directory.find("tiny-qwen"))
        for body, names in [
            ({}, ["tiny-llama", "tiny-qwen"]),
            ({"query": "TINY qwen"}, ["tiny-qwen"]),
            ({"state": "ready"}, ["tiny-llama"]),
            ({"query": "big"}, []),
        ]:
            status, answer = await call(cluster, "POST", "/models/search", body)
            assert (status, [model["name"] for model in answer["models"]]) == (200, names)
        assert (await call(cluster, "POST", "/models/search", {"limit": 1}))[1]["total"] == 2


async def test_what_was_set_over_http_is_there_after_a_restart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with running_cluster(Config(hub=HubConfig(model_roots=[str(tmp_path)]))) as cluster:
        monkeypatch.setenv("MLXSPEC_HOME", str(cluster.run_dir))
        await cluster.serve_model("tiny#1")
        assert (await call(cluster, "POST", "/groups", {"name": "g", "models": ["tiny"]}))[0] == 201
        assert (await call(cluster, "PUT", "/aliases/x", {"model": "tiny"}))[0] == 200
        assert (await call(cluster, "POST", "/models/pin", {"model": "tiny"}))[0] == 200
        assert [(pin.name, pin.pinned) for pin in cluster.supervisor.pins] == [("tiny", True)]
        cluster.supervisor.set("new", STOPPED)
        folder = tmp_path / "new"
        folder.mkdir()
        (folder / "config.json").write_text("{}")
        body = {"path": str(folder), "name": "new", "wait": False}
        assert (await call(cluster, "POST", "/models/load", body))[0] == 202
        path = cluster.run_dir / FILE
        assert path.stat().st_mode & 0o777 == 0o600
        names = Names(Config(), path)
        assert (names.groups["g"].models, names.aliases) == (("tiny",), {"x": "tiny"})
        known = discover_models(Config(models={"tiny": ModelConfig(path="/t")}))
        assert known["new"].path == str(folder)
        assert known["tiny"] == ModelConfig(path="/t", pin=True)
        assert list(cluster.run_dir.glob(f"{FILE}.*")) == []


async def test_unreadable_state_is_put_aside(cluster: Cluster) -> None:
    path = cluster.run_dir / FILE
    path.write_text("{")
    assert load(path) == Saved()
    assert path.with_name(f"{FILE}.broken").read_text() == "{"
    save(Saved(aliases={"a": "b"}), path)
    assert load(path).aliases == {"a": "b"}


async def test_replicas_share_the_work_and_equal_beginnings_meet() -> None:
    async with running_cluster() as cluster:
        one, two = [await cluster.add_worker(f"tiny#{number}") for number in (1, 2)]
        cluster.supervisor.set("tiny", READY, one, two)
        await wait_until(lambda: cluster.is_usable(one) and cluster.is_usable(two))
        long, other = "l" * 4000, "o" * 4000
        for worker in (one, two):
            worker.is_silent = True
        asking = [cluster.http.post("/generate", json={"prompt": text, "max_tokens": 1}) for text in (long, other)]
        answers = [asyncio.create_task(each) for each in asking]  # type: ignore[arg-type]
        await wait_until(lambda: len(one.generates) == len(two.generates) == 1)
        for worker in (one, two):
            worker.is_silent = False
            await worker.finish(worker.generates[0])
        for answer in await asyncio.gather(*answers):
            answer.close()
        for text in (long, other, long, other):
            status, _ = await call(cluster, "POST", "/generate", {"prompt": f"{text} and more", "max_tokens": 1})
            assert status == 200
        for worker in (one, two):
            first = str(worker.generates[0].prompt)[:2000]
            assert [str(generate.prompt)[:2000] for generate in worker.generates] == [first] * 3
