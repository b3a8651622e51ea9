"""`mlxspec groups` against the server's routes."""

import json

from common.states import WorkerState
from router.cli.output import ExitStatus
from tests.fakes import Cluster, wait_until
from tests.router.cli.conftest import Cli


async def add_models(cluster: Cluster, *names: str) -> None:
    for name in names:
        cluster.supervisor.set(name, WorkerState.STOPPED)
    await wait_until(lambda: all(cluster.backend.directory.find(name) for name in names))


async def test_group_is_made_shown_changed_and_removed(cluster: Cluster, run_cli: Cli) -> None:
    await add_models(cluster, "small", "large")
    assert (await run_cli("groups", "list"))[1] == ""
    status, out, _ = await run_cli("groups", "create", "chat", "small", "tiny", "--default", "tiny", "--json")
    assert (status, json.loads(out)["default_model"]) == (0, "tiny")
    status, out, _ = await run_cli("groups", "set", "chat", "small", "large", "--description", "for talking")
    assert status == 0
    assert "models       small, large" in out and "default      small" in out and "for talking" in out
    assert (await run_cli("groups", "set", "chat", "--policy", "least_loaded"))[0] == 0
    assert (await run_cli("groups", "list"))[1] == "chat\tsmall, large\tsmall\tleast_loaded\n"
    assert json.loads((await run_cli("groups", "show", "chat", "--json"))[1])["description"] == "for talking"
    assert (await run_cli("groups", "rm", "chat"))[0] == 0
    assert json.loads((await run_cli("groups", "list", "--json"))[1]) == []


async def test_mistakes_have_their_exit_codes(cluster: Cluster, run_cli: Cli) -> None:
    assert (await run_cli("groups", "show", "nobody"))[0] == ExitStatus.NOT_FOUND
    assert (await run_cli("groups", "create", "chat", "nobody"))[0] == ExitStatus.NOT_FOUND
    status, _, err = await run_cli("groups", "create", "chat", "tiny", "--default", "other")
    assert (status, err.count("\n")) == (ExitStatus.USAGE, 1)
    assert "default_model is 'other'" in err


async def test_member_of_a_group_answers(cluster: Cluster, run_cli: Cli) -> None:
    await run_cli("groups", "create", "chat", "tiny")
    status, out, _ = await run_cli("run", "chat", "Hi", "--max-tokens", "1")
    assert (status, out) == (0, "0 \n")
