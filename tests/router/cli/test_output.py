"""What is printed on a terminal and elsewhere."""

import io

import pytest

from router.cli.output import Output

NAME = "an-owner-of-models/a-model-with-a-long-name-4bit"


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_names_stay_whole_on_a_narrow_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "40")
    screen = Terminal()
    Output(out=screen).table(("model", "path"), [(NAME, f"/models/{NAME}"), ("[x]", "y")])
    lines = screen.getvalue().splitlines()
    assert len(lines) == 3
    assert lines[1].split() == [NAME, f"/models/{NAME}"]
    assert lines[2].split() == ["[x]", "y"]


def test_elsewhere_cells_are_parted_by_tabs() -> None:
    out = io.StringIO()
    Output(out=out).table(("model", "size"), [("a", "1 B"), ("b", "")])
    assert out.getvalue() == "a\t1 B\nb\t\n"
