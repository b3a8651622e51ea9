"""JSON configurations: the older shape means what it meant, and nothing is dropped silently."""

import json
from pathlib import Path
from typing import Any

import pytest

from common import config as configuration
from common.config import ModelConfig
from common.errors import ConfigError
from common.seed_config import in_our_shape

OLD_SHAPE: dict[str, Any] = {
    "server": {"host": "127.0.0.1", "port": 8123, "max_batch_size": 8, "batch_timeout": 0.1, "max_concurrent": 100},
    "models": {"llama3-8b": "/path/to/llama3-8b", "phi3-mini": "microsoft/Phi-3-mini-4k-instruct"},
    "generation": {"auto_draft": True, "draft_layers_ratio": 0.3, "trust_remote_code": False, "temperature": 0.2},
}
GROUPS = {"llama-family": {"models": ["llama3-8b"], "default_model": "llama3-8b", "description": "Llama 3"}}


def write(folder: Path, value: Any) -> Path:
    path = folder / "x.json"
    path.write_text(value if isinstance(value, str) else json.dumps(value))
    return path


def test_old_shape_sets_what_it_set(tmp_path: Path) -> None:
    config = configuration.load(write(tmp_path, OLD_SHAPE), env={})
    assert (config.server.port, config.server.max_concurrent_requests, config.engine.max_batch_size) == (8123, 100, 8)
    assert (config.speculation.auto_draft, config.speculation.draft_layers_ratio) == (True, 0.3)
    assert config.generation.temperature == 0.2
    assert config.models["llama3-8b"] == ModelConfig(path="/path/to/llama3-8b")
    assert configuration.default_model(config, config.models) == "llama3-8b"


def test_groups_keep_their_keys() -> None:
    assert in_our_shape(OLD_SHAPE | {"groups": GROUPS}, "x")["groups"] == GROUPS


def test_our_own_sections_may_be_written_as_json(tmp_path: Path) -> None:
    own = {"engine": {"kv_bits": 8}, "models": {"m": {"path": "m", "pin": True}}}
    assert in_our_shape(own, "x") == own
    config = configuration.load(write(tmp_path, own), env={})
    assert (config.engine.kv_bits, config.models["m"].pin) == (8, True)


def test_what_was_read_is_not_changed_in_place() -> None:
    raw = {"server": {"max_concurrent": 3}}
    in_our_shape(raw, "x")
    assert raw == {"server": {"max_concurrent": 3}}


@pytest.mark.parametrize(
    ("value", "says"),
    [
        ({"generation": {"trust_remote_code": True}}, "code of models is never run"),
        (
            {"server": {"max_batch_size": 8}, "engine": {"max_batch_size": 4}},
            "server.max_batch_size and engine.max_batch_size are the same setting",
        ),
        ({"server": {"max_batch_size": 8}, "engine": 3}, "engine must be a section"),
        ({"server": {"max_cats": 8}}, "unknown field `max_cats`"),
        ({"models": {"m": 3}}, "$.models"),
        ("{", "is not valid JSON"),
        ("[" * 100_000, "is not valid JSON"),
        ([], "is not a JSON object"),
    ],
)
def test_mistake_is_named(tmp_path: Path, value: Any, says: str) -> None:
    with pytest.raises(ConfigError) as error:
        configuration.load(write(tmp_path, value), env={})
    assert says in str(error.value)
