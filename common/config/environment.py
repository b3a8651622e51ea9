"""The seed's environment variables, as dotted keys of the configuration."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from common.config.known_models import folders_in
from common.errors import ConfigError


def from_environment(env: Mapping[str, str]) -> dict[str, Any]:
    """The settings that are in the environment. Raises `ConfigError` naming the variable at fault."""
    values: dict[str, Any] = {}
    for name, (key, kind) in _VARIABLES.items():
        if text := env.get(name, "").strip():
            values[key] = kind(name, text)
    if path := env.get("MODEL_PATH", "").strip():
        values |= _models_from_path(path)
    return values


def _models_from_path(path: str) -> dict[str, Any]:
    """MODEL_PATH is one model (its folder or hub id), which becomes the default, or a folder of model folders."""
    folder = Path(path).expanduser().absolute()
    if (folder / "config.json").is_file() or not folder.is_dir():
        name = Path(path).name
        return {f"models.{_escape(name)}.path": path, "default_model": name}
    found = folders_in(folder)
    if not found:
        raise ConfigError(f"MODEL_PATH={path} holds neither a config.json nor model folders that do")
    return {f"models.{_escape(model.name)}.path": str(model) for model in found}


def _integer(name: str, text: str) -> int:
    try:
        return int(text)
    except ValueError as error:
        raise ConfigError(f"{name}={text!r} is not a whole number") from error


def _number(name: str, text: str) -> float:
    try:
        return float(text)
    except ValueError as error:
        raise ConfigError(f"{name}={text!r} is not a number") from error


def _text(name: str, text: str) -> str:
    return text


def _truth(name: str, text: str) -> bool:
    if text.lower() in ("1", "true", "yes", "on"):
        return True
    if text.lower() in ("0", "false", "no", "off"):
        return False
    raise ConfigError(f"{name}={text!r} is neither true nor false")


_VARIABLES: dict[str, tuple[str, Callable[[str, str], Any]]] = {
    "AUTO_DRAFT": ("speculation.auto_draft", _truth),
    "DRAFT_LAYERS_RATIO": ("speculation.draft_layers_ratio", _number),
    "DRAFT_MODEL_PATH": ("speculation.draft_model", _text),
    "MAX_BATCH_SIZE": ("engine.max_batch_size", _integer),
    "MAX_CONCURRENT_REQUESTS": ("server.max_concurrent_requests", _integer),
    "MEMORY_LIMIT_GB": ("supervisor.memory_limit_gb", _number),
}


def _escape(name: str) -> str:
    return name.replace(".", "\0")
