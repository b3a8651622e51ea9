"""Reading: defaults, then the file, then the seed's environment variables, then the command line."""

import os
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec

from common import keys, paths
from common.config import older_json
from common.config.checks import check_bind, checked
from common.config.environment import from_environment
from common.config.sections import Config
from common.errors import ConfigError


def load(
    path: Path | None = None,
    env: Mapping[str, str] = os.environ,
    overrides: Mapping[str, Any] | None = None,
) -> Config:
    """The configuration from `path` (default: config.toml in the state folder, if there is one).

    `overrides` has dotted keys (`server.port`). Raises `ConfigError` naming the file and the key at fault.
    """
    raw: dict[str, Any] = _read_file(path)
    for key, value in (from_environment(env) | dict(overrides or {})).items():
        _put(raw, key.split("."), value)
    config = checked(_convert(raw, str(path or "configuration")))
    check_bind(config.server, keys.load_keys(config.server.api_keys_file, env))
    return config


def dump(config: Config, path: Path) -> None:
    """Write the effective configuration for child processes (JSON, mode 0600)."""
    path.touch(mode=0o600)
    path.write_bytes(msgspec.json.format(msgspec.json.encode(config)))


def load_effective(path: Path) -> Config:
    """What `dump` wrote."""
    return msgspec.json.decode(path.read_bytes(), type=Config)


def default_file() -> Path:
    """The file that is read when none is named; it need not exist."""
    return paths.home() / "config.toml"


def _read_file(path: Path | None) -> dict[str, Any]:
    if path is None:
        path = default_file()
        if not path.is_file():
            return {}
    try:
        text = path.read_text(encoding="utf-8")
        return _from_json(text, path) if path.suffix == ".json" else tomllib.loads(text)
    except OSError as error:
        raise ConfigError(f"cannot read configuration {path}: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not valid TOML: {error}") from error


def _from_json(text: str, path: Path) -> dict[str, Any]:
    try:
        raw = msgspec.json.decode(text)
    except (msgspec.DecodeError, RecursionError) as error:
        raise ConfigError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(raw, dict):
        raise ConfigError(f"{path} is not a JSON object")
    return older_json.in_our_shape(raw, str(path))


def _put(raw: dict[str, Any], keys: list[str], value: Any) -> None:
    *sections, last = (key.replace("\0", ".") for key in keys)
    for section in sections:
        raw = raw.setdefault(section, {})
        if not isinstance(raw, dict):
            raise ConfigError(f"{section} must be a section, not a value")
    raw[last] = value


def _convert(raw: dict[str, Any], source: str) -> Config:
    try:
        return msgspec.convert(raw, Config)
    except msgspec.ValidationError as error:
        raise ConfigError(f"{source}: {error}") from error
