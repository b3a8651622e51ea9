"""`mlxspec run`: one answer, conversations, drafts, and models that the server does not know yet."""

import builtins
import io
import json
from collections.abc import Sequence
from pathlib import Path

import pytest

from common.messages import ChatPrompt
from common.states import WorkerState
from router.cli.output import ExitStatus
from tests.fakes import Cluster, failed, wait_until, whole_text
from tests.router.cli.conftest import Cli


class Terminal(io.StringIO):
    """What is typed, or a screen."""

    def isatty(self) -> bool:
        return True


@pytest.fixture
def typed(monkeypatch: pytest.MonkeyPatch) -> Sequence[str]:
    """Lines that a person types; then end of input."""
    lines: list[str] = []
    monkeypatch.setattr("sys.stdin", Terminal())

    def read(prompt: str) -> str:
        if not lines:
            raise EOFError
        return lines.pop(0)

    monkeypatch.setattr("builtins.input", read)
    return lines


def said(cluster: Cluster) -> list[list[tuple[str, str]]]:
    """The messages of each request."""
    prompts = [generate.prompt for generate in cluster.workers[0].generates]
    return [[(m.role, m.content) for m in p.messages] for p in prompts if isinstance(p, ChatPrompt)]


async def test_one_answer_is_printed(cluster: Cluster, run_cli: Cli) -> None:
    status, out, _ = await run_cli("run", "tiny", "Hi", "--max-tokens", "3", "--system", "Be brief.", "--seed", "5")
    assert (status, out) == (0, whole_text(3) + "\n")
    assert said(cluster) == [[("system", "Be brief."), ("user", "Hi")]]
    assert cluster.workers[0].generates[0].sampling.seed == 5


async def test_json_has_the_figures(run_cli: Cli) -> None:
    status, out, _ = await run_cli("run", "tiny", "Hi", "--max-tokens", "3", "--json")
    answer = json.loads(out)
    assert (status, answer["text"]) == (0, whole_text(3))
    assert answer["usage"]["completion_tokens_details"]["accepted_prediction_tokens"] == 3


async def test_prompt_comes_from_standard_input(
    cluster: Cluster, run_cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    for arguments in ((), ("-",)):
        monkeypatch.setattr("sys.stdin", io.StringIO("from a pipe"))
        assert (await run_cli("run", "tiny", *arguments, "--max-tokens", "1"))[0] == 0
    assert said(cluster) == [[("user", "from a pipe")]] * 2


async def test_conversation_remembers_until_it_is_reset(cluster: Cluster, run_cli: Cli, typed: list[str]) -> None:
    typed += ["a", "", "b", "/reset", "c", "/quit", "never"]
    status, out, _ = await run_cli("run", "tiny", "--max-tokens", "1")
    assert status == 0
    assert out == f"{whole_text(1)}\n" * 3
    answer = ("assistant", whole_text(1))
    assert said(cluster) == [[("user", "a")], [("user", "a"), answer, ("user", "b")], [("user", "c")]]
    assert typed == ["never"]


async def test_ctrl_c_at_the_prompt_starts_a_new_line(
    cluster: Cluster, run_cli: Cli, typed: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    typed += ["CTRL-C", "a"]
    read = builtins.input

    def interrupted(prompt: str) -> str:
        line = read(prompt)
        if line == "CTRL-C":
            raise KeyboardInterrupt
        return line

    monkeypatch.setattr("builtins.input", interrupted)
    status, out, err = await run_cli("run", "tiny", "--max-tokens", "1")
    assert (status, out) == (0, f"{whole_text(1)}\n")
    assert err.count("Ctrl-D") == 2


async def test_model_that_is_not_loaded_is_announced(cluster: Cluster, run_cli: Cli) -> None:
    cluster.supervisor.set("cold", WorkerState.FAILED, detail="no memory")
    await wait_until(lambda: cluster.backend.directory.find("cold"))
    status, _, err = await run_cli("run", "cold", "Hi")
    assert status == ExitStatus.FAILED
    assert err.startswith("cold is not loaded yet: the first answer takes longer\nmlxspec: ")


async def test_refused_turn_does_not_end_the_conversation(cluster: Cluster, run_cli: Cli, typed: list[str]) -> None:
    typed += ["a", "b"]
    cluster.workers[0].answer = lambda generate: (
        failed("context_length_exceeded", "too long")(generate) if said(cluster)[-1][-1] == ("user", "a") else None
    )
    status, out, err = await run_cli("run", "tiny", "--max-tokens", "1")
    assert (status, out) == (0, f"{whole_text(1)}\n")
    assert "mlxspec: too long" in err
    assert said(cluster)[-1] == [("user", "b")]


async def test_accepted_drafts_are_dim_on_a_terminal(
    cluster: Cluster, run_cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    cluster.workers[0].drafted_chars = 1
    for screen, expected in ((Terminal(), "\x1b[2m0\x1b[0m \x1b[2m1\x1b[0m \n"), (io.StringIO(), "0 1 \n")):
        monkeypatch.setattr("sys.stdout", screen)
        status, _, err = await run_cli("run", "tiny", "Hi", "--max-tokens", "2", "--show-drafts", "--stats")
        assert (status, screen.getvalue()) == (0, expected)
        assert "[2 tokens, " in err
        assert "3 of 4 drafted accepted" in err


async def test_speculation_can_be_off(cluster: Cluster, run_cli: Cli) -> None:
    await run_cli("run", "tiny", "Hi", "--max-tokens", "1", "--no-speculation")
    assert cluster.workers[0].generates[0].speculation.drafter == "none"


@pytest.mark.parametrize(
    ("arguments", "status", "says"),
    [
        (("nobody", "Hi"), ExitStatus.NOT_FOUND, "known models: tiny"),
        (("tiny", "Hi", "--temperature", "-1"), ExitStatus.USAGE, "temperature is -1"),
        (("", "Hi"), ExitStatus.USAGE, "MODEL is empty"),
        (("tiny", "Hi", "--url", "http://127.0.0.1:1"), ExitStatus.NO_SERVER, "mlxspec serve"),
    ],
)
async def test_error_is_one_line_with_its_exit_code(
    run_cli: Cli, arguments: tuple[str, ...], status: int, says: str
) -> None:
    code, out, err = await run_cli("run", *arguments)
    assert (code, out) == (status, "")
    assert err.startswith("mlxspec: ") and says in err and err.count("\n") == 1


async def test_folder_is_to_get_a_name_first(run_cli: Cli, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    status, _, err = await run_cli("run", str(tmp_path), "Hi")
    assert status == ExitStatus.USAGE
    assert f"mlxspec load {tmp_path} --name NAME" in err


async def test_json_needs_a_prompt(run_cli: Cli, typed: list[str]) -> None:
    status, out, _ = await run_cli("run", "tiny", "--json")
    assert status == ExitStatus.USAGE
    assert "needs a PROMPT" in json.loads(out)["error"]["message"]


async def test_control_characters_do_not_reach_the_terminal(
    cluster: Cluster, run_cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tests.fakes.piece", lambda position: "a\x1b]0;owned\x07b\tc\n")
    screen = Terminal()
    monkeypatch.setattr("sys.stdout", screen)
    await run_cli("run", "tiny", "Hi", "--max-tokens", "1")
    assert screen.getvalue() == "a]0;ownedb\tc\n\n"
