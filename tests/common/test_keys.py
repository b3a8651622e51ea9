"""API keys: where they come from, who may read them, what they are good for."""

from pathlib import Path

import pytest

from common import config as configuration
from common.errors import ConfigError
from common.keys import Keys, Scope, load_keys

USER, ADMIN = "u" * 16, "a" * 20


def key_file(folder: Path, text: str, mode: int = 0o600) -> str:
    path = folder / "keys"
    path.write_text(text)
    path.chmod(mode)
    return str(path)


def test_file_and_environment_add_up(tmp_path: Path) -> None:
    file = key_file(tmp_path, f"# ours\n\nuser {USER}\nadmin {ADMIN}\n")
    keys = load_keys(file, {"MLXSPEC_API_KEY": "e" * 16, "MLXSPEC_ADMIN_KEY": "f" * 16})
    scopes = [keys.scope_of(key) for key in (USER, ADMIN, "e" * 16, "f" * 16, "", USER[:-1], "ü" * 8)]
    assert scopes == [Scope.USER, Scope.ADMIN, Scope.USER, Scope.ADMIN, Scope.NONE, Scope.NONE, Scope.NONE]


def test_key_file_of_the_state_folder_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLXSPEC_HOME", str(tmp_path))
    assert not load_keys(env={})
    (tmp_path / "api_keys").write_text(f"user {USER}\n")
    (tmp_path / "api_keys").chmod(0o600)
    assert load_keys(env={}).scope_of(USER) is Scope.USER


@pytest.mark.parametrize(
    ("text", "mode", "names"),
    [
        (f"user {USER}\n", 0o644, "chmod 600"),
        (f"user {USER}\n", 0o620, "mode 0620"),
        (f"{USER}\n", 0o600, ":1 is not a line of the form"),
        (f"\nking {USER}\n", 0o600, ":2 is not a line of the form"),
        ("user short\n", 0o600, "has 5 characters; at least 16"),
        ("user üüüüüüüüüüüüüüüü\n", 0o600, "a header cannot carry"),
    ],
)
def test_unsafe_key_file_is_refused(tmp_path: Path, text: str, mode: int, names: str) -> None:
    with pytest.raises(ConfigError, match=names) as caught:
        load_keys(key_file(tmp_path, text, mode), {})
    assert USER not in str(caught.value)


def test_missing_key_file_is_refused_if_it_was_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot read the API keys"):
        load_keys(str(tmp_path / "no"), {})


def test_keys_are_not_printed() -> None:
    assert USER not in repr(Keys(((USER.encode(), Scope.USER),)))


def test_other_addresses_than_loopback_need_a_key() -> None:
    settings = {"server.host": "0.0.0.0"}
    with pytest.raises(ConfigError, match="without API keys only loopback"):
        configuration.load(env={}, overrides=settings)
    assert configuration.load(env={"MLXSPEC_API_KEY": USER}, overrides=settings).server.host == "0.0.0.0"
