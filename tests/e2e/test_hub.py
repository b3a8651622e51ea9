"""From the hub to an answer, over HTTP and by the command line, beside the demo model in one server."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.server import TOP, Serve, wait_until
from tests.hub.checkpoints import KINDS, make_checkpoint
from tests.hub.fake_hub import FakeHub

WEIGHTS = "model.safetensors"


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[FakeHub]:
    """A hub with a checkpoint of each family, at HF_ENDPOINT."""
    hub, folder = FakeHub(), tmp_path_factory.mktemp("checkpoints")
    for kind in KINDS:
        hub.add(f"acme/tiny-{kind}", make_checkpoint(kind, folder / kind))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_ENDPOINT", hub.url)
        patch.setenv("HF_HOME", str(folder / "hf"))
        patch.setenv("DRAFT_LAYERS_RATIO", "0")  # no drafter that has to be tried at each load
        patch.delenv("HF_TOKEN", raising=False)
        yield hub
    hub.close()


@pytest.fixture(scope="module")
def server(hub: FakeHub, demo_model: Path) -> Iterator[Serve]:
    server = Serve(demo_model)
    try:
        server.wait_ready()
        yield server
        assert server.end(signal.SIGTERM) == 0, server.output()
    finally:
        server.close()


def mlxspec(server: Serve, *arguments: str, status: int = 0) -> str:
    """Standard output of a command that talks to the server's home."""
    done = start(server, *arguments)
    output, errors = done.communicate(timeout=100)
    assert done.returncode == status, (output, errors)
    return output


def start(server: Serve, *arguments: str) -> "subprocess.Popen[str]":
    env = os.environ | {"MLXSPEC_HOME": str(server.home), "PYTHONPATH": str(TOP)}
    command = [sys.executable, "-P", "-m", "router.cli", *arguments]
    return subprocess.Popen(
        command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, stdin=subprocess.DEVNULL, text=True
    )


def ask(server: Serve, model: str) -> dict[str, Any]:
    body = {"model": model, "prompt": "Hello", "max_tokens": 8, "temperature": 0, "ignore_eos": True}
    status, answer = server.request("POST", "/generate", body)
    assert status == 200, answer
    assert answer["usage"]["completion_tokens"] == 8
    return answer


def test_by_the_command_line(server: Serve, hub: FakeHub) -> None:
    """search → info → download, killed half-way and resumed → convert q4 → run → rm."""
    name = "acme/tiny-llama"
    assert name in mlxspec(server, "search", "llama")
    details = json.loads(mlxspec(server, "info", name, "--json"))
    assert details["fit"]["can_run"] is True
    hub.repos[name].pause_s = 0.05
    download = start(server, "download", name)
    wait_until(lambda: hub.served.get(WEIGHTS, 0) > 150_000, "half of the download", 30)
    download.kill()
    download.communicate()
    assert name not in mlxspec(server, "list")
    hub.repos[name].pause_s = 0.0
    hub.served.clear()
    assert str(server.home / "models" / name) in mlxspec(server, "download", name)
    assert hub.served[WEIGHTS] < 150_000
    assert "is whole" in mlxspec(server, "verify", name)
    made = json.loads(mlxspec(server, "convert", name, "--quantize", "q4", "--json"))
    assert (made["name"], made["quantization"]) == (f"{name}-q4", "4-bit")
    answer = json.loads(mlxspec(server, "run", made["name"], "Hi", "--max-tokens", "4", "--seed", "1", "--json"))
    assert answer["usage"]["completion_tokens"] <= 4
    assert mlxspec(server, "run", server.model, "What is the capital of France?", "--temperature", "0").count("Paris")
    assert "unload it first" in json.loads(mlxspec(server, "rm", made["name"], "--json", status=1))["error"]["message"]
    assert server.request("DELETE", f"/models/{made['name']}")[0] == 200
    mlxspec(server, "rm", made["name"], name)
    assert mlxspec(server, "list") == ""
    assert mlxspec(server, "rm", name, status=5) == ""
    assert name not in {model["name"] for model in server.request("GET", "/models")[1]["models"]}


@pytest.mark.parametrize("kind", ["qwen3", "gemma3", "mistral"])
def test_over_http_beside_the_demo_model(kind: str, server: Serve, hub: FakeHub) -> None:
    """Loaded by its hub id, which downloads it; one of them quantized; both models answer; deleted."""
    wish: dict[str, Any] = {"id": f"acme/tiny-{kind}", "wait": True}
    name = wish["id"]
    if kind == "qwen3":
        wish["quantize"], name = "q4", f"{name}-q4"
        status, job = server.request("POST", "/hf/models/download", wish)
        assert (status, job["status"]) == (200, "done")
    status, model = server.request("POST", "/models/load", {"model": name})
    assert (status, model["state"]) == (200, "ready"), model
    ask(server, name)
    assert "Paris" in server.ask()[1]
    states = {m["name"]: m["state"] for m in server.request("GET", "/models")[1]["models"]}
    assert (states[name], states[server.model]) == ("ready", "ready")
    assert server.request("DELETE", f"/hf/models/{name}")[0] == 409
    assert server.request("DELETE", f"/models/{name}")[0] == 200
    assert server.request("DELETE", f"/hf/models/{name}")[0] == 200
    assert server.request("GET", f"/models/{name}")[0] == 404
