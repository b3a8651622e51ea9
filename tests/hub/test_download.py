"""Downloads from a hub over HTTP: what is taken, what is resumed, and what each failure says."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import msgspec
import pytest

from common.errors import (
    Conflict,
    HubError,
    HubGated,
    HubNotFound,
    HubRateLimited,
    HubUnauthorized,
    HubUnreachable,
    MlxspecError,
    NoSpace,
)
from router.hub.download import fetch
from router.hub.jobs import Line
from router.hub.store import Store
from router.hub.wishes import Progress, Wish
from tests.e2e.server import free_port
from tests.hub.fake_hub import COMMIT, FakeHub

LLAMA = "acme/tiny-llama"
WEIGHTS = "model.safetensors"


def weights_bytes(checkpoints: Path) -> int:
    return (checkpoints / "llama" / WEIGHTS).stat().st_size


def wait_for(hub: FakeHub, served: int, timeout_s: float = 20.0) -> None:
    """Until so many bytes of the weights are out."""
    deadline = time.monotonic() + timeout_s
    while hub.served.get(WEIGHTS, 0) < served:
        assert time.monotonic() < deadline
        time.sleep(0.01)


def start_process(wish: Wish) -> "subprocess.Popen[bytes]":
    command = [sys.executable, "-P", "-m", "router.hub", msgspec.json.encode(wish).decode()]
    return subprocess.Popen(command, stdout=subprocess.PIPE, env=os.environ | {"PYTHONPATH": os.getcwd()})


def test_only_what_a_text_model_needs_is_taken_and_verified(hub: FakeHub, store: Store, checkpoints: Path) -> None:
    told: list[Progress] = []
    folder = fetch(Wish(id=LLAMA), store, told.append)
    assert folder == store.root / LLAMA
    names = {path.name for path in folder.iterdir()}
    config = {"config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"}
    assert names == {*config, WEIGHTS, ".mlxspec.json"}
    assert (folder / WEIGHTS).read_bytes() == (checkpoints / "llama" / WEIGHTS).read_bytes()
    assert store.verify(LLAMA) == []
    assert [told[0].stage, told[-1].stage] == ["looking", "ready"]
    assert told[-1].done_bytes == told[-1].total_bytes > weights_bytes(checkpoints)
    (model,) = store.models()
    assert (model.name, model.origin, model.revision) == (LLAMA, LLAMA, COMMIT)
    assert store.unfinished() == []


def test_second_download_asks_nothing(hub: FakeHub, store: Store) -> None:
    fetch(Wish(id=LLAMA), store)
    before = len(hub.requests)
    fetch(Wish(id=LLAMA), store)
    assert len(hub.requests) == before


def test_token_goes_to_the_hub_and_not_to_where_it_redirects(
    hub: FakeHub, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    hub.token = "hf_secret"
    hub.repos[LLAMA].gated = True
    fetch(Wish(id=LLAMA), store)
    keys = {path.startswith("/cdn/"): headers.get("authorization") for _, path, headers in hub.requests}
    assert keys == {False: "Bearer hf_secret", True: None}


def test_killed_download_goes_on_where_it_stopped(hub: FakeHub, store: Store, checkpoints: Path) -> None:
    total, repo = weights_bytes(checkpoints), hub.repos[LLAMA]
    repo.pause_s = 0.05
    process = start_process(Wish(id=LLAMA))
    wait_for(hub, total * 2 // 3)
    process.kill()
    process.communicate()
    assert not store.has(LLAMA)
    (pending,) = store.unfinished()
    assert (pending.name, pending.is_active) == (LLAMA, False)
    part = store.pending(LLAMA) / "files" / f"{WEIGHTS}.part"
    held = part.stat().st_size
    assert 0 < held < total
    repo.pause_s = 0.0
    before = len(hub.requests)
    fetch(Wish(id=LLAMA), store)
    later = [(path, headers.get("range")) for method, path, headers in hub.requests[before:] if method == "GET"]
    assert later[1:] == [(f"/cdn/{LLAMA}/{WEIGHTS}", f"bytes={held}-")]  # after the record of the model
    assert store.verify(LLAMA) == []
    assert store.unfinished() == []


def test_terminated_download_can_be_resumed_and_deleted(hub: FakeHub, store: Store, checkpoints: Path) -> None:
    hub.repos[LLAMA].pause_s = 0.05
    process = start_process(Wish(id=LLAMA))
    wait_for(hub, weights_bytes(checkpoints) // 3)
    with pytest.raises(Conflict, match="being downloaded"):
        fetch(Wish(id=LLAMA), store)
    with pytest.raises(Conflict, match="being downloaded"):
        store.delete(LLAMA)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=10)
    lines = [msgspec.json.decode(line, type=Line) for line in output.splitlines()]
    assert {line.progress.stage for line in lines if line.progress} == {"looking", "downloading"}
    assert len(store.unfinished()) == 1
    assert store.delete(LLAMA) > 0
    assert store.unfinished() == []


def test_dropped_connections_are_continued(hub: FakeHub, store: Store, checkpoints: Path) -> None:
    repo = hub.repos[LLAMA]
    repo.drop_after, repo.drops = weights_bytes(checkpoints) // 3, 2
    fetch(Wish(id=LLAMA), store)
    assert repo.drops == 0
    starts = [headers["range"] for _, path, headers in hub.requests if path.startswith("/cdn/") and "range" in headers]
    assert starts == ["bytes=65536-", "bytes=131072-"]
    assert store.verify(LLAMA) == []


def test_spoilt_file_is_refused_and_not_kept(hub: FakeHub, store: Store) -> None:
    hub.repos[LLAMA].spoil = True
    with pytest.raises(HubError, match=r"model.safetensors of acme/tiny-llama has another sha256.*try again"):
        fetch(Wish(id=LLAMA), store)
    assert not store.has(LLAMA)
    hub.repos[LLAMA].spoil = False
    fetch(Wish(id=LLAMA), store)
    assert store.verify(LLAMA) == []


def test_full_disk_is_seen_before_a_byte_is_fetched(
    hub: FakeHub, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Store, "free_bytes", lambda store: 1000)
    with pytest.raises(NoSpace, match=r"acme/tiny-llama needs .* kB and .* has 1.0 kB free"):
        fetch(Wish(id=LLAMA), store)
    assert hub.served == {}


@pytest.mark.parametrize(
    ("fault", "kind", "says"),
    [
        ("missing", HubNotFound, r"acme/none is not on http.*mlxspec search"),
        ("revision", HubNotFound, r"has no revision 'v9'"),
        ("gated", HubGated, r"is gated: accept its terms at http://127.0.0.1:\d+/acme/tiny-llama, then set HF_TOKEN"),
        ("limited", HubRateLimited, r"wants a pause: try again in \d+ s"),
        ("forbidden", HubUnauthorized, r"does not let this token read"),
        ("broken", HubUnreachable, r"has trouble of its own \(HTTP 500\)"),
        ("down", HubUnreachable, r"cannot reach http://127.0.0.1:\d+ .*check the network"),
        ("formless", HubNotFound, r"has no config.json with model\*.safetensors"),
    ],
)
def test_each_failure_has_its_own_error(
    fault: str, kind: type[MlxspecError], says: str, hub: FakeHub, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    repo = hub.repos[LLAMA]
    wish = Wish(id=LLAMA)
    match fault:
        case "missing":
            wish = Wish(id="acme/none")
        case "revision":
            wish = Wish(id=LLAMA, revision="v9")
        case "gated":
            repo.gated = True
        case "limited":
            repo.status = 429
        case "forbidden":
            repo.status = 403
        case "broken":
            repo.status = 500
        case "down":
            monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{free_port()}")
        case "formless":
            repo.left_out = ["model.safetensors"]
    with pytest.raises(kind, match=says) as caught:
        fetch(wish, store)
    assert "\n" not in caught.value.message
    assert store.models() == []


def test_offline_says_so(hub: FakeHub, home: Path) -> None:
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "PYTHONPATH": os.getcwd()}
    command = [sys.executable, "-P", "-m", "router.hub", '{"id": "acme/tiny-llama"}']
    done = subprocess.run(command, env=environment, capture_output=True, timeout=60, check=False)
    last = msgspec.json.decode(done.stdout.splitlines()[-1], type=Line)
    assert last.error is not None
    assert (done.returncode, last.error.code) == (1, "hub_offline")
    assert hub.requests == []
