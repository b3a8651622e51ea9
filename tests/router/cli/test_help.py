"""What people read and type: the help of every verb, its examples, and the command lines of the documents."""

import argparse
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest

from router.cli import main as cli

TOP = Path(__file__).parents[3]
WIDTH = 120
DOCUMENTS = ("README.md", "config.toml", "docs/architecture.md")
PARSER = cli.build_parser()
Words = tuple[str, ...]
_COMMENT = re.compile(r"\s{2,}\S.*$")  # an example's explanation, after two blanks


def parsers(
    parser: argparse.ArgumentParser, words: Words = ("mlxspec",)
) -> Iterator[tuple[Words, argparse.ArgumentParser]]:
    """The program's parser and those of all verbs."""
    yield words, parser
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for name, inner in action.choices.items():
                yield from parsers(inner, (*words, name))


PLACES = dict(parsers(PARSER))


def examples_of(words: Words) -> list[str]:
    _, _, rest = (PLACES[words].epilog or "").partition("examples:\n")
    return [line.strip() for line in rest.partition("\n\n")[0].splitlines()]


def command_lines(text: str) -> list[str]:
    """Lines of Markdown's code blocks, and inline code, that call mlxspec or scripts/serve."""
    spans = re.findall(r"`([^`\n]+)`", text) + [line[4:] for line in text.splitlines() if line.startswith("    ")]
    return [span for span in spans if re.match(r"(\.venv/bin/)?mlxspec \S|scripts/serve -", span)]


def check(line: str) -> None:
    """The parser takes the command line; what the shell would do around it is left out."""
    command = re.search(r"(?:mlxspec|scripts/serve) .*", _COMMENT.sub("", line.replace("…", "").rstrip("\\")))
    assert command, line
    words = shlex.split(re.split(r"[|>;)]|\s#", command[0])[0].replace("[", "").replace("]", ""))
    arguments = ["serve", *words[1:]] if words[0] == "scripts/serve" else words[1:]
    try:
        PARSER.parse_args(arguments)
    except SystemExit as end:
        assert end.code == 0, f"{line}: this is no command line of mlxspec"


@pytest.mark.parametrize("words", PLACES, ids=" ".join)
def test_help_is_complete(words: Words, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", str(WIDTH))
    parser = PLACES[words]
    text = parser.format_help()
    assert text.startswith(f"usage: {' '.join(words)}")
    assert all(len(line) <= WIDTH for line in text.splitlines()), text
    assert parser.description and parser.description[0].isupper() and parser.description.endswith(".")
    assert examples_of(words), f"{' '.join(words)} shows no example"
    for action in parser._actions:
        assert action.help or isinstance(action, argparse._SubParsersAction), f"{words}: {action.dest} has no help"


@pytest.mark.parametrize(("words", "line"), [(words, line) for words in PLACES for line in examples_of(words)])
def test_example_of_the_help_is_right(words: Words, line: str) -> None:
    assert " ".join(words) in line
    check(line)


@pytest.mark.parametrize("name", DOCUMENTS)
def test_command_lines_of_the_documents_are_right(name: str) -> None:
    lines = command_lines((TOP / name).read_text())
    assert lines or name != "README.md"
    for line in lines:
        check(line)


@pytest.mark.parametrize("line", ["mlxspec dance", "mlxspec run", "mlxspec serve --modle-path x"])
def test_wrong_command_line_would_be_seen(line: str) -> None:
    with pytest.raises(AssertionError, match="no command line"):
        check(line)


@pytest.mark.parametrize(
    "line",
    ["serve --model-path X --draft-ratio 0.3", "serve --config x.json", 'run X "prompt"'],
)
def test_forms_that_people_know_work(line: str) -> None:
    assert PARSER.parse_args(shlex.split(line)).command == line.split()[0]
