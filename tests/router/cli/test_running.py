"""The verbs that steer a running server, on a router with a fake supervisor."""

import asyncio
import json
import time
from typing import Any

import msgspec
import pytest

from common.config import Config, HubConfig
from common.errors import ConfigError
from common.messages import EnsureModel
from common.states import WorkerState
from router.cli.main import main
from router.cli.running import rows
from tests.fakes import Cluster, FakeWorker, running_cluster, wait_until


async def mlxspec(cluster: Cluster, *words: str) -> int:
    """The verb with these words, against the cluster's server."""
    url = f"http://127.0.0.1:{cluster.port}"
    return await asyncio.wait_for(asyncio.to_thread(main, [*words, "--url", url]), timeout=30)


async def test_ps_shows_each_process_and_the_memory(capsys: pytest.CaptureFixture[str]) -> None:
    async with running_cluster() as cluster:
        worker = await cluster.serve_model("tiny#1")
        busy = msgspec.structs.replace(worker.entry, running=3, waiting=2, footprint_bytes=5 << 20, started_at=1.0)
        worker.entry = busy
        cluster.supervisor.set("tiny", WorkerState.READY, worker, pinned=True)
        cluster.supervisor.set("cold", WorkerState.STOPPED)
        await wait_until(lambda: cluster.backend.directory.find("cold"))
        assert await mlxspec(cluster, "ps") == 0
        said = capsys.readouterr()
        (line,) = said.out.splitlines()
        cells = line.split("\t")
        assert cells[:6] == ["tiny", "ready", "1", "5.0 MiB", "3", "2"]
        assert cells[7:] == ["-", "0", "default, pinned"]
        assert said.err == "memory: 0 B of 1.0 KiB\n"
        assert await mlxspec(cluster, "ps", "--all") == 0
        assert "cold\tstopped\t-" in capsys.readouterr().out
        assert await mlxspec(cluster, "ps", "--json") == 0
        assert [model["name"] for model in json.loads(capsys.readouterr().out)["models"]] == ["tiny", "cold"]


async def test_nothing_loaded_says_what_to_do(capsys: pytest.CaptureFixture[str]) -> None:
    async with running_cluster() as cluster:
        assert await mlxspec(cluster, "ps") == 0
        assert "no model is loaded; mlxspec load FOLDER loads one" in capsys.readouterr().err


async def test_load_waits_until_the_model_is_ready(capsys: pytest.CaptureFixture[str]) -> None:
    async with running_cluster() as cluster:
        cluster.supervisor.set("tiny", WorkerState.STOPPED)

        def become_ready(call: EnsureModel) -> str:
            cluster.supervisor.set("tiny", WorkerState.READY)
            return ""

        cluster.supervisor.on_ensure = become_ready
        await wait_until(lambda: cluster.backend.directory.find("tiny"))
        assert await mlxspec(cluster, "load", "tiny") == 0
        assert capsys.readouterr().out == "tiny is ready\n"


async def test_load_of_a_folder_sends_its_absolute_path(
    tmp_path: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "config.json").write_text("{}")
    monkeypatch.chdir(tmp_path)
    async with running_cluster(Config(hub=HubConfig(model_roots=[str(tmp_path)]))) as cluster:
        cluster.supervisor.set("mine", WorkerState.STOPPED)
        await wait_until(lambda: cluster.backend.directory.find("mine"))
        assert await mlxspec(cluster, "load", "./mine", "--no-wait") == 0
        (call,) = cluster.supervisor.ensured
        assert (call.name, call.path) == ("mine", str(tmp_path / "mine"))


async def test_unload_pin_unpin_and_reload(
    cluster: Cluster, worker: FakeWorker, capsys: pytest.CaptureFixture[str]
) -> None:
    assert await mlxspec(cluster, "pin", "tiny") == 0
    assert await mlxspec(cluster, "unpin", "tiny") == 0
    assert [pin.pinned for pin in cluster.supervisor.pins] == [True, False]
    assert await mlxspec(cluster, "unload", "tiny") == 0
    assert [call.name for call in cluster.supervisor.unloaded] == ["tiny"]
    assert await mlxspec(cluster, "reload") == 0
    assert capsys.readouterr().out.splitlines() == [
        "tiny is pinned",
        "tiny is not pinned any more",
        "tiny is unloaded",
        "changed engine.kv_bits",
        "removed model old",
    ]
    assert await mlxspec(cluster, "reload", "--json") == 0
    assert json.loads(capsys.readouterr().out)["changes"][0] == "changed engine.kv_bits"


@pytest.mark.parametrize("verb", ["load", "unload", "pin", "unpin"])
async def test_unknown_model_is_exit_code_5_and_known_ones_are_named(
    verb: str, cluster: Cluster, worker: FakeWorker, capsys: pytest.CaptureFixture[str]
) -> None:
    assert await mlxspec(cluster, verb, "nobody") == 5
    assert "known models: tiny" in capsys.readouterr().err


async def test_refused_reload_says_why(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    async def refuse() -> list[str]:
        raise ConfigError("config.toml: engine.kv_bits is 5")

    monkeypatch.setattr(cluster.backend.control, "reload", refuse)
    assert await mlxspec(cluster, "reload") == 3
    assert capsys.readouterr().err == "mlxspec: config.toml: engine.kv_bits is 5\n"


async def test_top_without_a_terminal_is_shown_once(
    cluster: Cluster, worker: FakeWorker, capsys: pytest.CaptureFixture[str]
) -> None:
    assert await mlxspec(cluster, "top") == 0
    out = capsys.readouterr().out
    assert "tokens/s" in out
    assert "tiny" in out


def test_replicas_have_a_row_each() -> None:
    worker = {"state": "ready", "pid": 1, "footprint_bytes": 0, "running": 0, "waiting": 0, "started_at": 0}
    model = {
        "name": "m",
        "state": "ready",
        "is_default": False,
        "pinned": False,
        "detail": "",
        "restarts": 0,
        "last_used_at": time.time() - 90,
        "workers": [worker, worker | {"pid": 2}],
    }
    assert [(row[2], row[7]) for row in rows(model, time.time())] == [("1", "1m30s"), ("2", "1m30s")]
