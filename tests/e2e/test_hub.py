"""From the hub to an answer, over HTTP and by the command line, beside the demo model in one server."""

import contextlib
import io
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from router.cli.main import main
from tests.e2e.server import TOP, Serve, wait_until
from tests.hub.checkpoints import KINDS, make_checkpoint
from tests.hub.fake_hub import FakeHub

WEIGHTS = "model.safetensors"
HALF_BYTES = 150_000  # of the weights' 266 kB


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


@contextlib.contextmanager
def slow(hub: FakeHub, model: str) -> Iterator[None]:
    """The hub sends this model's weights slowly; `half_way` sees how far it is."""
    hub.served.clear()
    hub.repos[model].pause_s = 0.03
    yield
    hub.repos[model].pause_s = 0.0
    hub.served.clear()


def half_way(hub: FakeHub) -> None:
    wait_until(lambda: hub.served.get(WEIGHTS, 0) > HALF_BYTES, "half of the download", 30)


def mlxspec(server: Serve, *words: str, status: int = 0) -> str:
    """Standard output of a command on the server's home."""
    out, errors = io.StringIO(), io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(out), contextlib.redirect_stderr(errors):
        patch.setenv("MLXSPEC_HOME", str(server.home))
        assert main(words) == status, (out.getvalue(), errors.getvalue())
    return out.getvalue()


def start(server: Serve, *words: str) -> "subprocess.Popen[str]":
    """The same as a process."""
    env = os.environ | {"MLXSPEC_HOME": str(server.home), "PYTHONPATH": str(TOP)}
    command = [sys.executable, "-P", "-m", "router.cli", *words]
    return subprocess.Popen(
        command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, stdin=subprocess.DEVNULL, text=True
    )


def states(server: Serve) -> dict[str, str]:
    return {model["name"]: model["state"] for model in server.request("GET", "/models")[1]["models"]}


@pytest.mark.parametrize("kind", KINDS)
def test_by_the_command_line(kind: str, server: Serve, hub: FakeHub) -> None:
    """search → info → download, killed half-way and resumed → convert q4 → load → run → rm."""
    name, quantized = f"acme/tiny-{kind}", f"acme/tiny-{kind}-q4"
    assert name in mlxspec(server, "search", kind)
    assert json.loads(mlxspec(server, "info", name, "--json"))["fit"]["can_run"] is True
    with slow(hub, name):
        download = start(server, "download", name)
        half_way(hub)
        download.kill()
        download.communicate()
    left = json.loads(mlxspec(server, "list", "--json"))
    assert (left["models"], [pending["name"] for pending in left["stats"]["pending"]]) == ([], [name])
    assert str(server.home / "models" / name) in mlxspec(server, "download", name)
    assert hub.served[WEIGHTS] < HALF_BYTES
    assert "is whole" in mlxspec(server, "verify", name)
    made = json.loads(mlxspec(server, "convert", name, "--quantize", "q4", "--json"))
    assert (made["name"], made["quantization"]) == (quantized, "4-bit")
    assert states(server)[quantized] == "stopped"  # the server knows it
    assert mlxspec(server, "load", quantized) == f"{quantized} is ready\n"
    answer = json.loads(mlxspec(server, "run", quantized, "Hi", "--max-tokens", "4", "--seed", "1", "--json"))
    assert answer["usage"]["completion_tokens"] <= 4
    assert "unload it first" in json.loads(mlxspec(server, "rm", quantized, "--json", status=1))["error"]["message"]
    mlxspec(server, "unload", quantized)
    mlxspec(server, "rm", quantized, name)
    assert mlxspec(server, "list") == ""
    assert mlxspec(server, "rm", name, status=5) == ""
    assert set(states(server)) == {server.model}


@pytest.mark.parametrize("kind", KINDS)
def test_over_http_beside_the_demo_model(kind: str, server: Serve, hub: FakeHub) -> None:
    """search → info → download, its process killed half-way, resumed, into q4 → load → both models answer → delete."""
    model, name = f"acme/tiny-{kind}", f"acme/tiny-{kind}-q4"
    wish = {"id": model, "quantize": "q4"}
    status, found = server.request("POST", "/hf/models/search", {"query": kind})
    assert (status, [one["id"] for one in found["models"]]) == (200, [model])
    status, details = server.request("GET", f"/hf/models/{model}/info")
    assert (status, details["source"], details["fit"]["can_run"]) == (200, "hub", True)
    with slow(hub, model):
        job = server.request("POST", "/hf/models/download", wish)[1]["id"]
        half_way(hub)
        (process,) = server.children_named("router.hub")
        process.kill()
        failed = wait_until(lambda: server.request("GET", f"/hf/jobs/{job}")[1].get("error"), "the job's failure", 10)
    assert "try again" in failed["message"]
    status, done = server.request("POST", "/hf/models/download", wish | {"wait": True})
    assert (status, done["status"]) == (200, "done")
    assert hub.served[WEIGHTS] < HALF_BYTES
    status, loaded = server.request("POST", "/models/load", {"model": name})
    assert (status, loaded["state"]) == (200, "ready"), loaded
    body = {"model": name, "prompt": "Hello", "max_tokens": 8, "temperature": 0, "ignore_eos": True}
    status, answer = server.request("POST", "/generate", body)
    assert (status, answer["usage"]["completion_tokens"]) == (200, 8), answer
    assert "Paris" in server.ask()[1]
    assert (states(server)[name], states(server)[server.model]) == ("ready", "ready")
    assert server.request("DELETE", f"/hf/models/{name}")[0] == 409
    assert server.request("DELETE", f"/models/{name}")[0] == 200
    assert server.request("DELETE", f"/hf/models/{name}")[0] == 200
    assert server.request("GET", f"/models/{name}")[0] == 404


def test_run_fetches_what_only_the_hub_has(server: Serve, hub: FakeHub) -> None:
    """Its progress is told on standard error; the answer alone is on standard output."""
    name = "acme/tiny-llama"
    talk = start(server, "run", name, "Hi", "--max-tokens", "2", "--temperature", "0")
    out, errors = talk.communicate(timeout=100)
    assert talk.returncode == 0, errors
    assert errors.startswith(f"{name} is not on the server yet: it is fetched first\n")
    assert f"{name}: downloading" in errors
    assert out.endswith("\n") and out.strip()
    mlxspec(server, "unload", name)
    mlxspec(server, "rm", name)
