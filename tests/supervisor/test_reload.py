"""What a changed configuration asks for, and that the server does that and no more."""

import os
import signal
from collections.abc import Callable

import pytest

from common.config import Config, EngineConfig, ModelConfig, ServerConfig, SupervisorConfig
from common.messages import Reload
from common.states import WorkerState
from router.supervisor.reload import compare
from tests.supervisor.harness import Client, Server, find, wait_until

S = WorkerState
A, B = ModelConfig(path="/a"), ModelConfig(path="/b")


@pytest.mark.parametrize(
    ("old", "new", "lines"),
    [
        (Config(), Config(), ["nothing has changed"]),
        (Config(models={"a": A}), Config(models={"a": A, "b": B}), ["added model b"]),
        (Config(models={"a": A}), Config(), ["removed model a"]),
        (
            Config(models={"a": A, "b": B}),
            Config(models={"a": ModelConfig(path="/a", kv_bits=8), "b": B}),
            ["restarts model a, if it is loaded, when its requests are done"],
        ),
        (Config(models={"a": A}), Config(models={"a": ModelConfig(path="/a", pin=True)}), ["adjusted model a"]),
        (
            Config(),
            Config(supervisor=SupervisorConfig(memory_limit_gb=3)),
            ["changed supervisor.memory_limit_gb"],
        ),
        (
            Config(models={"a": A}),
            Config(models={"a": A}, engine=EngineConfig(max_batch_size=3)),
            ["restarts all loaded models when their requests are done", "changed engine.max_batch_size"],
        ),
        (
            Config(),
            Config(server=ServerConfig(port=9)),
            ["not changed until the server is restarted: server.port"],
        ),
    ],
)
def test_comparison(old: Config, new: Config, lines: list[str]) -> None:
    change = compare(old, new)
    assert change.lines() == lines
    assert change.config.server == old.server
    assert change.config.supervisor == new.supervisor


def test_reload_touches_only_what_changed(server: Server, connect: Callable[..., Client]) -> None:
    for name in ("a", "b", "c"):
        server.add_model(name)
    sections = '[models.{0}]\npath = "{0}"\npreload = true\n'
    server.configure("".join(sections.format(name) for name in "abc"))
    server.start()
    client = connect()
    before = {name: client.model(name, S.READY) for name in "abc"}
    server.configure(sections.format("a") + sections.format("b") + "kv_bits = 8\n", memory_limit_gb=2)
    reply = client.reply(client.ask(Reload))
    assert (reply.code, reply.message.splitlines()) == (
        "",
        [
            "removed model c",
            "restarts model b, if it is loaded, when its requests are done",
            "changed supervisor.memory_limit_gb",
        ],
    )
    client.until(lambda t: find(t, "b").workers and find(t, "b").workers[0].identity == "b#2", "new worker of b")
    assert client.model("b", S.READY).restarts == 0
    assert client.model("a", S.READY).workers[0].pid == before["a"].workers[0].pid
    assert client.model("c", S.STOPPED).workers == ()  # its folder is still there
    assert client.tables[-1].memory_budget_bytes == 2 * 2**30


def test_hangup_reads_the_configuration_and_a_wrong_one_changes_nothing(server: Server, client: Client) -> None:
    server.configure(no_such_key=1)
    server.signal(signal.SIGHUP)
    wait_until(lambda: "configuration not taken over" in server.output(), "refusal")
    assert "no_such_key" in server.output()
    assert client.reply(client.ask(Reload)).code == "invalid_config"
    server.configure('[models.a]\npath = "a"\npin = true\n')
    server.signal(signal.SIGHUP)
    client.until(lambda t: find(t, "a").pinned, "pin")
    assert client.model("a", S.READY).workers[0].identity == "a#1"


def test_server_ends_when_its_terminal_is_closed(server: Server, connect: Callable[..., Client]) -> None:
    ours, its = os.openpty()
    server.start(stdin=its)
    os.close(its)
    client = connect()
    client.model("a", S.READY)
    server.signal(signal.SIGHUP)
    wait_until(lambda: "nothing has changed" in server.output(), "reload")
    os.close(ours)
    server.signal(signal.SIGHUP)
    assert server.wait() == 0
    assert not server.tree()
