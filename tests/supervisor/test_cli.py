"""The command line: help, versions, and one-line errors with their exit codes."""

import re
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from common import paths, sockets
from router.cli import main as cli
from router.supervisor import daemon


@pytest.fixture(autouse=True)
def home(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    folder = Path(tempfile.mkdtemp(dir="/tmp"))
    monkeypatch.setenv("MLXSPEC_HOME", str(folder))
    monkeypatch.delenv("MODEL_PATH", raising=False)
    yield folder
    shutil.rmtree(folder)


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match=r"^0$"):
        cli.main(["--version"])
    assert re.fullmatch(r"mlxspec \d+\.\d+\.\d+\n", capsys.readouterr().out)


def test_help_lists_what_there_is(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in (["--help"], ["serve", "--help"]):
        with pytest.raises(SystemExit, match=r"^0$"):
            cli.main(arguments)
    text = capsys.readouterr().out
    options = ("--host", "--port", "--config", "--model-path", "--memory-limit-gb", "--log-level")
    for word in ("serve", "MLXSPEC_HOME", *options):
        assert word in text


def test_no_command_shows_the_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([]) == 2
    assert "usage: mlxspec" in capsys.readouterr().out


@pytest.mark.parametrize("arguments", [["dance"], ["serve", "--port", "x"], ["serve", "--log-level", "loud"]])
def test_wrong_usage_exits_with_2(arguments: list[str]) -> None:
    with pytest.raises(SystemExit, match=r"^2$"):
        cli.main(arguments)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--port", "70000"], "server.port is 70000"),
        (["--host", "0.0.0.0"], "without API keys only loopback"),
        (["--config", "/no/such.toml"], "cannot read configuration /no/such.toml"),
        (["--memory-limit-gb", "-1"], "supervisor.memory_limit_gb is -1.0"),
        (["--model-path", "/proc/self/fd"], "MODEL_PATH=/proc/self/fd holds neither"),
    ],
)
def test_wrong_configuration_is_one_line_and_exits_with_3(
    arguments: list[str], says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["serve", *arguments]) == 3
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("mlxspec: ")
    assert says in line


def test_unknown_default_model_is_named(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (home / "config.toml").write_text('default_model = "nobody"\n')
    assert daemon.main([]) == 3
    assert "default_model is 'nobody'; known models: none" in capsys.readouterr().err


def test_second_server_on_a_run_dir_says_who_has_it(capsys: pytest.CaptureFixture[str]) -> None:
    with sockets.lock_run_dir(sockets.prepare_run_dir(paths.run_dir())):
        assert cli.main(["serve"]) == 3
    (line,) = capsys.readouterr().err.splitlines()
    assert "belongs to a running server" in line
    assert "MLXSPEC_HOME" in line


def test_mistyped_command_gets_the_nearest_one_in_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match=r"^2$"):
        cli.main(["serv"])
    (line,) = capsys.readouterr().err.splitlines()
    assert line == "mlxspec: there is no command 'serv', did you mean 'serve'?; see mlxspec --help"
