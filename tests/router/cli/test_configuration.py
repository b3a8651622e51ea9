"""`mlxspec config`: what counts is printed, and what would keep a server from starting is said."""

import json
import tomllib
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.config import Config
from router.cli import main as cli
from router.cli.toml_text import toml_text


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MLXSPEC_HOME", str(tmp_path))
    for variable in ("MODEL_PATH", "MEMORY_LIMIT_GB", "MAX_BATCH_SIZE"):
        monkeypatch.delenv(variable, raising=False)
    return tmp_path


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    status = cli.main(["config", *arguments])
    printed = capsys.readouterr()
    return status, printed.out, printed.err


def make_model(home: Path, name: str) -> None:
    (home / "models" / name).mkdir(parents=True)
    (home / "models" / name / "config.json").write_text("{}")


def test_what_is_shown_reads_back_as_the_same(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (home / "config.toml").write_text('[server]\nport = 9\n[models."a.b"]\npath = "a\\"b"\npin = true\n')
    status, text, _ = run(capsys, "show")
    config = msgspec.convert(tomllib.loads(text), Config)
    assert (status, config.server.port, config.models["a.b"].path) == (0, 9, 'a"b')


def test_changed_shows_only_that(
    home: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MEMORY_LIMIT_GB", "3")
    (home / "config.toml").write_text("[server]\nport = 9\n")
    assert tomllib.loads(run(capsys, "show", "--changed")[1]) == {
        "server": {"port": 9},
        "supervisor": {"memory_limit_gb": 3.0},
    }
    assert json.loads(run(capsys, "show", "--json")[1])["server"]["port"] == 9


def test_check_finds_the_models(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_model(home, "here")
    (home / "config.toml").write_text('[models.there]\npath = "org/there"\n')
    status, text, _ = run(capsys, "check")
    assert status == 0
    assert text.splitlines()[-1] == f"{home / 'config.toml'}: every key is right; 2 models"
    assert "there\torg/there\tcomes from the hub" in text
    checked = json.loads(run(capsys, "check", "--json")[1])
    assert [(m["name"], m["problem"]) for m in checked["models"]] == [("here", ""), ("there", "")]


def test_check_without_a_file_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(capsys, "check")[:2] == (0, "no configuration file: every key is right; 0 models\n")


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("[server]\nport = 0\n", "server.port is 0"),
        ("[servr]\n", "servr"),
        ('default_model = "nobody"\n', "default_model is 'nobody'"),
    ],
)
def test_wrong_key_is_one_line_and_exits_with_3(
    home: Path, capsys: pytest.CaptureFixture[str], text: str, says: str
) -> None:
    (home / "config.toml").write_text(text)
    status, _, error = run(capsys, "check")
    assert status == 3
    assert says in error and error.count("\n") == 1


def test_model_that_is_nowhere_exits_with_3(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (home / "config.toml").write_text('[models.lost]\npath = "/no/such/folder"\n')
    status, text, _ = run(capsys, "check")
    assert status == 3
    assert "lost\t/no/such/folder\tis neither a folder" in text
    assert text.splitlines()[-1].endswith("1 model has a problem")


def test_sub_command_is_required(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match=r"^2$"):
        run(capsys)


SCALARS = st.text() | st.booleans() | st.integers(-(2**53), 2**53) | st.floats(allow_nan=False, allow_infinity=False)
SETTINGS: st.SearchStrategy[dict[str, Any]] = st.dictionaries(
    st.text(min_size=1, max_size=8).filter(lambda key: "\0" not in key),
    st.recursive(SCALARS | st.lists(SCALARS, max_size=3), lambda inner: st.dictionaries(st.text(max_size=4), inner)),
    max_size=4,
)


@given(SETTINGS)
def test_toml_reads_back(settings: dict[str, Any]) -> None:
    assert tomllib.loads(toml_text(settings)) == settings
