"""JSON configuration files of the older shape."""

import json
from pathlib import Path

import pytest

from common import config
from common.errors import ConfigError

OLDER = {
    "server": {"host": "127.0.0.1", "port": 8123, "max_batch_size": 8, "batch_timeout": 0.1, "max_concurrent": 100},
    "models": {"llama3-8b": "/path/to/llama3-8b", "phi3-mini": "/path/to/phi3-mini"},
    "generation": {"auto_draft": True, "draft_layers_ratio": 0.3, "trust_remote_code": False, "temperature": 0.5},
}


def load(tmp_path: Path, value: object) -> config.Config:
    path = tmp_path / "config.json"
    path.write_text(json.dumps(value))
    return config.load(path, env={})


def test_older_keys_become_ours(tmp_path: Path) -> None:
    loaded = load(tmp_path, OLDER)
    assert (loaded.server.port, loaded.server.max_concurrent_requests) == (8123, 100)
    assert loaded.engine.max_batch_size == 8
    assert (loaded.speculation.auto_draft, loaded.speculation.draft_layers_ratio) == (True, 0.3)
    assert loaded.generation.temperature == 0.5
    assert {name: model.path for name, model in loaded.models.items()} == OLDER["models"]


def test_our_own_keys_work_as_json_too(tmp_path: Path) -> None:
    loaded = load(tmp_path, {"engine": {"max_batch_size": 4}, "models": {"x": {"path": "y", "pin": True}}})
    assert (loaded.engine.max_batch_size, loaded.models["x"].pin) == (4, True)


def test_groups_are_taken_as_they_are(tmp_path: Path) -> None:
    group = {"models": ["phi3-mini", "llama3-8b"], "default_model": "llama3-8b", "description": "Small ones"}
    loaded = load(tmp_path, OLDER | {"groups": {"small": group}})
    assert loaded.groups["small"].default_model == "llama3-8b"


@pytest.mark.parametrize(
    ("value", "says"),
    [
        ({"generation": {"trust_remote_code": True}}, "code of models is never run"),
        ({"server": {"prot": 1}}, "prot"),
        ([], "not a JSON object"),
        ({"models": {"x": 3}}, "models"),
        ({"server": {"max_batch_size": 8}, "engine": 3}, "engine must be a section"),
        ({"server": {"max_batch_size": 8}, "engine": {"max_batch_size": 4}}, "are the same setting"),
    ],
)
def test_what_cannot_be_is_named(value: object, says: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=says):
        load(tmp_path, value)


def test_broken_json_is_told(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    for text in ("{", "[" * 100_000):
        path.write_text(text)
        with pytest.raises(ConfigError, match="not valid JSON"):
            config.load(path, env={})
