"""Every verb's help, the README's command lines, and what verbs print without a server."""

import argparse
import json
import re
import shlex
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from common.config import load
from router.cli.main import build_parser, main
from router.cli.verbs import Parser

TOP = Path(__file__).parents[3]
DOCUMENTS = ("README.md",)


def verbs(parser: argparse.ArgumentParser, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Parser]]:
    """Every verb and its parser, inner ones too."""
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for name, child in action.choices.items():
                yield (*path, name), child
                yield from verbs(child, (*path, name))


def command_lines() -> list[str]:
    """What the documents say to type after `mlxspec`, and what the helps give as examples."""
    texts = [(TOP / name).read_text() for name in DOCUMENTS]
    texts += [parser.epilog or "" for _, parser in verbs(build_parser())]
    found = [
        line for text in texts for line in re.findall(r"^\s*(?:\.venv/bin/)?mlxspec +([a-z].*)$", text, re.MULTILINE)
    ]
    return sorted({re.split(r"\s{2,}#|\s*\|", line)[0].strip() for line in found})


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MLXSPEC_HOME", str(tmp_path))
    monkeypatch.setenv("MLXSPEC_URL", "http://127.0.0.1:9")
    return tmp_path


@pytest.mark.parametrize("path", [path for path, _ in verbs(build_parser())], ids=" ".join)
def test_help_is_short_and_says_what_and_how(path: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match=r"^0$"):
        main([*path, "--help"])
    text = capsys.readouterr().out
    assert text.startswith(f"usage: mlxspec {' '.join(path)}")
    assert max(map(len, text.splitlines())) <= 100
    if len(path) == 1:
        assert "examples:\n  " in text


def test_every_command_line_of_the_documents_is_understood() -> None:
    lines = command_lines()
    assert len(lines) >= 20
    for line in lines:
        words = shlex.split(line, comments=True)
        options = build_parser().parse_args(words)
        assert callable(options.run), line


@pytest.mark.parametrize(
    "words",
    [
        ["serve", "--model-path", "microsoft/Phi-3-mini-4k-instruct", "--draft-ratio", "0.3"],
        ["download", "microsoft/Phi-3-mini-4k-instruct", "--quantize", "q4"],
        ["search", "phi-3"],
        ["popular"],
        ["list"],
        ["info", "microsoft/Phi-3-mini-4k-instruct"],
    ],
)
def test_older_forms_are_understood(words: list[str]) -> None:
    assert callable(build_parser().parse_args(words).run)


def test_every_answering_verb_has_json() -> None:
    without = {" ".join(path) for path, parser in verbs(build_parser()) if "--json" not in parser.format_help()}
    groups_and_scripts = {"serve", "groups", "config", "completion"}
    elsewhere = {name for name in without if name.split()[0] in ("service", "draft", "top")}
    assert without <= groups_and_scripts | elsewhere


@pytest.mark.parametrize(
    ("words", "status", "says"),
    [
        (["run", "x", "hi"], 4, "start one with: mlxspec serve"),
        (["groups", "list"], 4, "start one with: mlxspec serve"),
        (["rm", "../x"], 2, "is no model id"),
        (["rm", "acme/none"], 5, "acme/none is not in"),
        (["verify", "acme/none"], 5, "acme/none is not in"),
        (["convert", "acme/none"], 5, "acme/none is not in"),
        (["download", "a/b/c"], 2, "is no model id"),
        (["config", "check", "--config", "/no.toml"], 3, "cannot read configuration"),
        (["popular", "--limit", "0"], 2, "limit is 0; it must lie in [1, 100]"),
        (["search", "x", "--max-size-gb", "-1"], 2, "it must be positive"),
        (["ps", "--url", "host:99999"], 3, "is no server's address"),
        (["ps", "--url", "ftp://host"], 3, "is no server's address"),
        (["top", "--every", "0"], 2, "--every is 0"),
    ],
)
def test_mistakes_take_one_line_and_have_their_exit_code(
    words: list[str], status: int, says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(words) == status
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("mlxspec: ")
    assert says in line
    if "--config" not in words:
        assert main([*words, "--json"]) == status
        assert says in json.loads(capsys.readouterr().out)["error"]["message"]


@pytest.mark.parametrize(
    "words",
    [
        ["run", "x", "hi", "--temperature", "nan"],
        ["search", "x", "--max-size-gb", "inf"],
        ["top", "--every", "nan"],
        ["downlod", "x"],
        ["download", "x", "--quantize", "q9"],
        ["download", "x", "--group-size", "48"],
    ],
)
def test_wrong_usage_takes_one_line(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match=r"^2$"):
        main(words)
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("mlxspec") and "--help" in line


def test_home_that_cannot_be_written_is_told(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MLXSPEC_HOME", "/proc/none")
    assert main(["download", "acme/x"]) == 1
    assert "can /proc/none (MLXSPEC_HOME) be written?" in capsys.readouterr().err.splitlines()[-1]


def test_serve_refuses_a_model_that_is_nowhere(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["serve", "--model-path", "/no/such/folder"]) == 3
    (line,) = capsys.readouterr().err.splitlines()
    assert "there is no folder '/no/such/folder'" in line


def test_unchanged_configuration_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["config", "show", "--changed"]) == 0
    assert capsys.readouterr() == ("", "nothing differs from the defaults\n")


def test_list_of_an_empty_store(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["list"]) == 0
    assert capsys.readouterr().out == ""
    assert main(["list", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["models"] == []


def test_shown_configuration_is_the_configuration(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (home / "config.toml").write_text('[server]\nport = 8100\n[models."a.b"]\npath = "x/y"\n')
    assert main(["config", "show"]) == 0
    (home / "shown.toml").write_text(capsys.readouterr().out)
    assert load(home / "shown.toml") == load(home / "config.toml")
    assert main(["config", "check", "--json"]) == 0
    assert [model["name"] for model in json.loads(capsys.readouterr().out)["models"]] == ["a.b"]


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_knows_verbs_and_options(shell: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["completion", shell]) == 0
    script = capsys.readouterr().out
    for word in ("download", "quantize", "groups"):
        assert word in script


def test_bash_completes(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["completion", "bash"]) == 0
    script = capsys.readouterr().out
    asked = 'COMP_WORDS=(mlxspec {words}); COMP_CWORD={at}; _mlxspec; echo "${{COMPREPLY[@]}}"'
    for words, at, wanted in (("dow", 1, "download"), ("download x --qu", 3, "--quantize"), ("groups cr", 2, "create")):
        done = subprocess.run(
            ["bash", "-c", script + asked.format(words=words, at=at)], capture_output=True, text=True, check=True
        )
        assert done.stdout.split() == [wanted]
